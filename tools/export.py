"""Take the backbone out of a trained detector.

    python tools/export.py runs/frcnn_r101/best.pt --output r101.safetensors
    python tools/export.py runs/frcnn_r101/best.pt --fpn --output r101_fpn.safetensors

The file has torchvision's parameter names and the metadata to rebuild it: resdet.load_backbone gives it back, and the
body alone loads into torchvision.models.resnet101 (all but fc).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from resdet.cli import run_tool


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="best.pt or last.pt of a run")
    parser.add_argument("--what", choices=["backbone"], default="backbone")
    parser.add_argument("--format", choices=["safetensors"], default="safetensors")
    parser.add_argument("--fpn", action="store_true", help="the FPN too, not only the body (C2-C5)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)

    import resdet

    model = resdet.load_detector(options.checkpoint)
    resdet.export_backbone(model, options.output, include_fpn=options.fpn)
    print(f"{model.spec.arch}{' + FPN' if options.fpn else ''} -> {options.output}")


if __name__ == "__main__":
    run_tool(main)
