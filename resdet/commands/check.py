"""Report every problem of a configuration's datasets before training meets it.

    resdet check configs/frcnn_r101.yaml
    resdet check configs/frcnn_r101.yaml --no-images --json report.json
    resdet check configs/frcnn_r101.yaml --fix train_fixed.json --split train
    resdet check configs/frcnn_r101.yaml --browse train.html

Exit code 0: no errors (there may be warnings and infos). 1: training would be refused or would go wrong; also after
--fix, because the configuration still names the old file. 2: the configuration or the command line is wrong, or a
folder or file that it names does not exist.

--fix writes a repaired copy of one split as a COCO json and lists what it changed; --json holds every id. --browse
writes a page of training images with their boxes, as stored and as training sees them after augmentation.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from resdet.commands.run import command_parser


def main(arguments: Sequence[str]) -> int:
    """Run ``resdet check``."""
    parser = command_parser("check", __doc__)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of a run")
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

    from resdet.build import anchor_layout, build_browse_page, build_split
    from resdet.check.check import check_dataset
    from resdet.check.files import default_num_workers
    from resdet.check.repair import write_fixed
    from resdet.check.report import report_text
    from resdet.config import load_config
    from resdet.errors import DataError
    from resdet.files import written_whole

    config = load_config(options.config, options.overrides)
    splits = [build_split(config.data.train, "train"), build_split(config.data.val, "val")]
    report = check_dataset(
        splits,
        anchors=anchor_layout(config.model),
        decode=not options.no_images,
        num_workers=default_num_workers() if options.workers is None else options.workers,
        progress=True,
    )
    print(report_text(report, num_examples=options.examples))
    if options.json is not None:
        with written_whole(options.json) as temporary:
            temporary.write_text(json.dumps(report.to_plain(), indent=1), encoding="utf-8")
        print(f"\nwritten: {options.json}")
    if options.fix is not None:
        changes = write_fixed(next(split for split in splits if split.name == options.split), report, options.fix)
        print(f"\nchanged in {options.split}:")
        print("\n".join(f"  {change}" for change in changes or ["nothing"]))
        print(f"written: {options.fix}")
    if options.browse is not None:
        try:
            build_browse_page(config, options.browse, num_images=options.browse_images)
            print(f"written: {options.browse}")
        except DataError as error:
            print(f"not written: {options.browse}: {error}")
            return 1
    return 1 if report.wrong else 0
