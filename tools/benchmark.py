"""Measure what the documentation claims, on this machine.

    python tools/benchmark.py work=annotations
    python tools/benchmark.py work=annotations num_images=5000 num_boxes=36000 output=annotations.json

work=annotations  loading a made-up annotation file of COCO train2017's size, against pycocotools, and the memory that
                  its table takes in data-loading workers; num_images=, num_boxes=, num_workers=, repeats=,
                  start_methods=fork,spawn,forkserver, seed=
work=evaluation   COCO's twelve numbers at val2017's size, by pycocotools, by faster-coco-eval where it is installed,
                  and by ours; num_images=, num_classes=, detections_per_image=, num_repeats=, seed=
work=loading      images per second of a data-loading worker with flips and multi-scale, against torchvision's reference
                  pipeline; num_images=, batch_size=, num_workers=, repeats=, images=, annotations=, seed=

output=FILE writes the figures as json too.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from resdet.cli import run_tool


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", metavar="key=value", help="work=NAME, output=FILE, settings of the work")
    settings = parser.parse_args(arguments).settings

    from resdet.benchmarks import run_benchmark

    outputs = [Path(setting.removeprefix("output=")) for setting in settings if setting.startswith("output=")]
    report = run_benchmark([setting for setting in settings if not setting.startswith("output=")])
    print(report)
    for output in outputs:
        report.write(output)
        print(f"written: {output}")


if __name__ == "__main__":
    run_tool(main)
