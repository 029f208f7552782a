"""Write a dataset in another layout: COCO's, YOLO's or Pascal VOC's, with its images.

    resdet convert-data my_folder --to yolo --output my_yolo
    resdet convert-data my_folder/data.yaml --to coco --output my_coco
    resdet convert-data frcnn_r101_voc data.train.root=VOCdevkit data.val.root=VOCdevkit --to coco --output voc_coco

The source is a dataset's folder, whose layout is recognised and all of whose splits are written, or a configuration,
whose data.train and data.val are written. Class names and their order, names of images with their subfolders, and
images without objects are kept, and boxes to 0.001 px. What a layout cannot hold is counted: YOLO has no crowd regions
and no difficult objects, VOC no crowd regions and no boxes of one pixel, and none of the three keeps polygons.

The output is complete by itself. Images are hard links to the given files where the file system allows it, which takes
no space; a program that changes an image in place then changes both. --copy makes them files of their own.
"""

from collections.abc import Sequence
from pathlib import Path

from resdet.commands.run import command_parser, show


def main(arguments: Sequence[str]) -> None:
    """Run ``resdet convert-data``."""
    parser = command_parser("convert-data", __doc__)
    parser.add_argument(
        "source", type=Path, metavar="FOLDER_OR_CONFIG", help="a dataset's folder, YOLO's data.yaml, or a configuration"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of a configuration: dotted keys")
    parser.add_argument("--to", required=True, choices=("coco", "yolo", "voc"), help="the new layout")
    parser.add_argument("--output", type=Path, required=True, metavar="OUT", help="a new or an empty folder")
    parser.add_argument("--copy", action="store_true", help="copy images instead of linking them")
    options = parser.parse_intermixed_args(arguments)

    from resdet.build import build_parts
    from resdet.config import folder_sources, load_config
    from resdet.data.writing import write_dataset
    from resdet.data.yolo_layout import describes_classes

    is_data = options.source.is_dir() or (options.source.is_file() and describes_classes(options.source))
    if is_data and options.overrides:
        parser.error(f"key=value belongs to a configuration, got {options.overrides[0]} with a dataset")
    sources = folder_sources(options.source) if is_data else load_config(options.source, options.overrides).data
    parts = build_parts(sources)
    notes = [note for part in parts for note in part.table.notes]
    lines = write_dataset(parts, options.to, options.output, copy=options.copy)
    show("\n".join([*(f"{part.name}: read {part.table.name} ({part.layout})" for part in parts), *notes, *lines]))
    show(f"written: {options.output} ({options.to})")
