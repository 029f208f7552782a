"""Report every problem of a configuration's datasets, or of a dataset's folder, before training meets it.

    resdet check my_dataset
    resdet check mine.yaml
    resdet check mine.yaml --no-images --json report.json
    resdet check mine.yaml --fix train_fixed.json --split train
    resdet check mine.yaml --browse train.html

Exit code 0: no errors (there may be warnings and infos). 1: training would be refused or would go wrong; also after
--fix, because the configuration still names the old file. 2: the configuration or the command line is wrong, or a
folder or file that it names does not exist.

--fix writes a repaired copy of one split as a COCO json and lists what it changed; --json holds every id. --browse
writes a page of training images with their boxes, as stored and as training sees them after augmentation.
"""

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path

from resdet.commands.run import command_parser, show


def main(arguments: Sequence[str]) -> int:
    """Run ``resdet check``."""
    parser = command_parser("check", __doc__)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file, a recipe, or a dataset's folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, as in data.train.root=my")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="write every finding with all its ids")
    parser.add_argument("--fix", type=Path, metavar="OUT.json", help="write a repaired copy of a split as a COCO json")
    parser.add_argument("--split", choices=("train", "val"), default="train", help="what --fix copies (default: train)")
    parser.add_argument("--browse", type=Path, metavar="OUT.html", help="write a page of training images with boxes")
    parser.add_argument("--browse-images", type=int, default=48, metavar="N", help="images on that page (default: 48)")
    parser.add_argument("--no-images", action="store_true", help="do not decode images, only check that they exist")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that decode images (default: one per CPU)")
    parser.add_argument("--examples", type=int, default=3, metavar="N", help="examples of each kind (default: 3)")
    options = parser.parse_intermixed_args(arguments)
    if min(options.examples, options.workers or 0) < 0:
        parser.error("--examples and --workers must be at least 0")
    if options.browse_images < 1:
        parser.error(f"--browse-images must be at least 1, got {options.browse_images}")

    from resdet.build import anchor_layout, build_browse_page, build_splits, detector_limits
    from resdet.check.check import check_dataset
    from resdet.check.repair import write_fixed
    from resdet.check.report import report_text
    from resdet.config import folder_config, load_config
    from resdet.data.image_facts import default_num_workers
    from resdet.data.yolo_layout import describes_classes
    from resdet.errors import DataError
    from resdet.files import check_outputs, write_text
    from resdet.recipes import find_recipes

    # As in find_config, a run's folder may be called as its recipe.
    is_folder = options.config.is_dir() and str(options.config) not in find_recipes()
    is_dataset = is_folder or (options.config.is_file() and describes_classes(options.config))
    read = folder_config if is_dataset else load_config
    config = read(options.config, options.overrides)
    splits = build_splits(config)
    outputs = [path for path in (options.json, options.fix, options.browse) if path is not None]
    for path in outputs:
        if sum(os.path.realpath(path) == os.path.realpath(other) for other in outputs) > 1:
            parser.error(f"--json, --fix and --browse must name different files, got {path} twice")
    check_outputs(outputs, itertools.chain([options.config], *(split.input_files() for split in splits)))
    report = check_dataset(
        splits,
        anchors=anchor_layout(config.model, config.eval.tiles),
        limits=detector_limits(config),
        decode=not options.no_images,
        num_workers=default_num_workers() if options.workers is None else options.workers,
        progress=True,
    )
    told = [report_text(report, num_examples=options.examples), ""]
    code = 1 if report.wrong else 0
    # Files first: what reads the report may stop reading (`| head`), and that ends the command.
    try:
        if options.json is not None:
            write_text(options.json, json.dumps(report.to_plain(), indent=1))
            told.append(f"written: {options.json}")
        if options.fix is not None:
            changes = write_fixed(next(split for split in splits if split.name == options.split), report, options.fix)
            told += [f"changed in {options.split}:", *(f"  {change}" for change in changes or ["nothing"])]
            told.append(f"written: {options.fix}")
        if options.browse is not None:
            try:
                build_browse_page(config, options.browse, num_images=options.browse_images)
                told.append(f"written: {options.browse}")
            except DataError as error:
                told.append(f"not written: {options.browse}: {error}")
                code = 1
    finally:
        show("\n".join(told).rstrip("\n"))
    return code
