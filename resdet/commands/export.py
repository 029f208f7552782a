"""Export a trained detector or its backbone, and check the file against the model.

    resdet export runs/frcnn_r101/best.pt --output r101.safetensors
    resdet export runs/frcnn_r101/best.pt --fpn --format export --output r101_fpn.pt2
    resdet export runs/frcnn_r101/best.pt --what detector --format onnx --output detector.onnx
    resdet export runs/frcnn_r101/best.pt --what detector --format openvino --output detector.xml

backbone  safetensors  torchvision's names; resdet.load_backbone rebuilds it, and torchvision.models.resnet101 loads the
                       body (all but fc); FOLDER/model.safetensors gets the config.json by which timm loads FOLDER
          torchscript, export (torch.export's .pt2), onnx, openvino: C2-C5 or P2-P6 of float images [B, 3, H, W],
                       normalised
detector  torchscript, onnx, openvino: boxes, labels and scores of one image, uint8 [3, H, W]; any size, everything
                       inside

The file is loaded again and compared with the model before it is moved into place; FILE.json records the result, and
README.md beside it (FILE.README.md where there is another one) is its model card: what it is, results, data, classes,
licence of the first weights, and code that loads it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
        choices=["safetensors", "torchscript", "export", "onnx", "openvino"],
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
    from resdet.export.card import files_beside
    from resdet.export.compare import is_report, report_file
    from resdet.export.detector import export_detector
    from resdet.export.timm_config import config_file
    from resdet.files import check_outputs
    from resdet.models.checkpoint import load_detector
    from resdet.weights.files import read_weights

    if options.what == "detector" and (options.fpn or options.names != "torchvision"):
        raise UserError("--fpn and --names are for a backbone; a detector is exported whole")
    if options.what == "backbone" and options.images:
        raise UserError("--images is for a detector; a backbone is compared on random input")
    checkpoint, files = checkpoint_in(options.checkpoint), find_images(options.images) if options.images else []
    report_path = report_file(options.output)
    format: Any = options.format or ("onnx" if options.what == "detector" else "safetensors")
    config = config_file(options.output) if format == "safetensors" else None
    outputs = [options.output, *([config] if config else []), *files_beside(options.output, format)]
    check_outputs(outputs, [checkpoint, *files])
    if report_path.exists() and not is_report(report_path):
        raise UserError(
            f"{report_path}: would be replaced by the report of this export, but is none of an earlier one; give "
            "another --output"
        )
    source = read_weights(checkpoint)
    model = load_detector(source)
    if options.what == "backbone":
        report = export_backbone(
            model, options.output, include_fpn=options.fpn, format=format, names=options.names, checkpoint=source
        )
    else:
        images = [read_image(file, upright=True) for file in files[:8]] or None
        report = export_detector(model, options.output, format=format, images=images, checkpoint=source)
    *others, card = report.beside
    show(f"{report}\nwritten: {', '.join(map(str, [options.output, *others]))} and the model card {card}")
