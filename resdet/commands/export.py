"""Export a trained detector or its backbone, and check the file against the model.

    resdet export runs/frcnn_r101/best.pt --output r101.safetensors
    resdet export runs/frcnn_r101/best.pt --fpn --format export --output r101_fpn.pt2
    resdet export runs/frcnn_r101/best.pt --what detector --format onnx --output detector.onnx

backbone  safetensors  torchvision's names; resdet.load_backbone rebuilds it, and torchvision.models.resnet101 loads the
                       body (all but fc)
          torchscript, export (torch.export's .pt2), onnx: C2-C5 or P2-P6 of float images [B, 3, H, W], normalised
detector  torchscript, onnx: boxes, labels and scores of one image, uint8 [3, H, W]; any size, everything inside

The file is loaded again and compared with the model before it is moved into place; FILE.json records the result.
"""

from collections.abc import Sequence
from pathlib import Path

from resdet.commands.run import checkpoint_in, command_parser, show
from resdet.errors import UserError


def main(arguments: Sequence[str]) -> None:
    """Run ``resdet export``."""
    parser = command_parser("export", __doc__)
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a run's folder, a checkpoint, or the name of a published detector",
    )
    parser.add_argument("--what", choices=["backbone", "detector"], default="backbone")
    parser.add_argument(
        "--format",
        choices=["safetensors", "torchscript", "export", "onnx"],
        help="default: safetensors for a backbone, onnx for a detector",
    )
    parser.add_argument("--fpn", action="store_true", help="include the FPN, not only the body (C2-C5)")
    parser.add_argument(
        "--names", choices=["torchvision", "timm"], default="torchvision", help="naming of the tensors in safetensors"
    )
    parser.add_argument(
        "--images",
        type=Path,
        nargs="+",
        metavar="IMAGE_OR_FOLDER",
        help="images on which a detector is compared, at most 8 (default: two generated ones)",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_intermixed_args(arguments)

    from resdet.data.image_files import find_images
    from resdet.data.images import read_image
    from resdet.export.backbone import export_backbone
    from resdet.export.compare import is_report, report_file
    from resdet.export.detector import export_detector
    from resdet.files import check_outputs
    from resdet.models.checkpoint import load_detector

    if options.what == "detector" and (options.fpn or options.names != "torchvision"):
        raise UserError("--fpn and --names are for a backbone; a detector is exported whole")
    if options.what == "backbone" and options.images:
        raise UserError("--images is for a detector; a backbone is compared on random input")
    checkpoint, files = checkpoint_in(options.checkpoint), find_images(options.images) if options.images else []
    report_path = report_file(options.output)
    check_outputs([options.output, report_path], [checkpoint, *files])
    if report_path.exists() and not is_report(report_path):
        raise UserError(
            f"{report_path}: would be replaced by the report of this export, but is none of an earlier one; give "
            "another --output"
        )
    model = load_detector(checkpoint)
    if options.what == "backbone":
        report = export_backbone(
            model, options.output, include_fpn=options.fpn, format=options.format or "safetensors", names=options.names
        )
    else:
        images = [read_image(file, upright=True) for file in files[:8]] or None
        report = export_detector(model, options.output, format=options.format or "onnx", images=images)
    show(f"{report}\nwritten: {options.output} and {report_path}")
