"""Take a trained detector, or its backbone, elsewhere.

    python tools/export.py runs/frcnn_r101/best.pt --output r101.safetensors
    python tools/export.py runs/frcnn_r101/best.pt --fpn --format export --output r101_fpn.pt2
    python tools/export.py runs/frcnn_r101/best.pt --what detector --format onnx --output detector.onnx

backbone  safetensors  torchvision's names; resdet.load_backbone gives it back, and torchvision.models.resnet101 loads
                       the body (all but fc)
          torchscript, export (torch.export's .pt2), onnx: C2-C5 or P2-P6 of float images [B, 3, H, W], normalised
detector  torchscript, onnx: boxes, labels and scores of one image, uint8 [3, H, W]; any size, everything inside

The file is loaded again and compared with the model before it is kept; FILE.json says how that went.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from resdet.commands.run import run_tool


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="best.pt or last.pt of a run")
    parser.add_argument("--what", choices=["backbone", "detector"], default="backbone")
    parser.add_argument(
        "--format",
        choices=["safetensors", "torchscript", "export", "onnx"],
        help="default: safetensors for a backbone, onnx for a detector",
    )
    parser.add_argument("--fpn", action="store_true", help="the FPN too, not only the body (C2-C5)")
    parser.add_argument(
        "--names", choices=["torchvision", "timm"], default="torchvision", help="of the tensors in safetensors"
    )
    parser.add_argument(
        "--images",
        type=Path,
        nargs="+",
        metavar="IMAGE_OR_FOLDER",
        help="images to compare a detector on, at most 8 of them (default: two generated ones)",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)

    import resdet
    from resdet.data.images import read_image
    from resdet.errors import UserError
    from resdet.prediction import find_images

    if options.what == "detector" and (options.fpn or options.names != "torchvision"):
        raise UserError("--fpn and --names are for a backbone; a detector is exported whole")
    if options.what == "backbone" and options.images:
        raise UserError("--images is for a detector; a backbone is compared on random numbers")
    model = resdet.load_detector(options.checkpoint)
    if options.what == "backbone":
        report = resdet.export_backbone(
            model,
            options.output,
            include_fpn=options.fpn,
            format=options.format or "safetensors",
            names=options.names,
        )
    else:
        images = [read_image(file) for file in find_images(options.images)[:8]] if options.images else None
        report = resdet.export_detector(model, options.output, format=options.format or "onnx", images=images)
    print(report)
    print(f"written: {options.output} and {options.output}.json")


if __name__ == "__main__":
    run_tool(main)
