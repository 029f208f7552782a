"""Convert weights between torchvision and other libraries, without any of them installed.

    resdet convert model_final_f6e8b1.pkl --to torchvision --output r101_fpn.pth
    resdet convert runs/frcnn_r101/best.pt --to detectron2 --output model.pkl
    resdet convert R-101.pkl --to torchvision --output r101_msra.safetensors

Formats: torchvision (and checkpoints of this project), detectron2, detectron (the Caffe2 blobs of MSRA's R-50.pkl and
R-101.pkl and of Detectron's model zoo), mmdetection (2.0 and later), mmdetection-caffe (its style "caffe"),
maskrcnn-benchmark, timm. Values are copied, not recomputed: a round trip returns the same bits. Pickles are
read without running any code they hold.
"""

from collections.abc import Sequence
from pathlib import Path

from resdet.commands.run import checkpoint_in, command_parser, show
from resdet.errors import name_some


def main(arguments: Sequence[str]) -> None:
    """Run ``resdet convert``."""
    parser = command_parser("convert", __doc__)
    parser.add_argument(
        "source", metavar="IN", help=".pth, .pt, .pkl or .safetensors, or the name of a published detector"
    )
    parser.add_argument("--to", required=True, metavar="FORMAT", help="one of the formats above")
    parser.add_argument(
        "--from", dest="source_format", metavar="FORMAT", help="default: recognised by its tensors' names"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="OUT", help=".pth, .safetensors, or .pkl for detectron2"
    )
    parser.add_argument(
        "--prefix", metavar="NAMES", help="what precedes the network's names, where IN holds several networks"
    )
    parser.add_argument(
        "--channel-order", choices=["rgb", "bgr"], help="of the images it was trained on, where IN does not say it"
    )
    parser.add_argument(
        "--image-mean", type=float, nargs=3, metavar="X", help="red, green and blue in [0, 1]; likewise"
    )
    parser.add_argument("--image-std", type=float, nargs=3, metavar="X", help="likewise")
    parser.add_argument(
        "--stride-in",
        choices=["1x1", "3x3"],
        help="convolution in which its bottlenecks stride, where IN does not say it",
    )
    options = parser.parse_intermixed_args(arguments)

    from pydantic import ValidationError

    from resdet.files import check_output
    from resdet.models.spec import WeightsOrigin
    from resdet.weights.convert_file import convert_file

    given = {name: getattr(options, name) for name in ("prefix", "channel_order", "image_mean", "image_std")}
    given["stride_in_1x1"] = options.stride_in and options.stride_in == "1x1"
    try:
        origin = WeightsOrigin.model_validate(given, strict=False)
    except ValidationError as error:
        parser.error(f"--image-mean and --image-std: {error.errors()[0]['msg']}")
    source = checkpoint_in(options.source)
    check_output(options.output, [source])
    report = convert_file(source, options.to, options.output, source_format=options.source_format, origin=origin)
    read, written = report.read, report.written
    show(f"{source}: {read.facts['format']} {read.kind}, {read.facts['arch'] or 'no known architecture'}")
    show(f"  read:    {', '.join(read.rules) or 'unchanged'}")
    show(f"  written: {', '.join(written.rules) or 'unchanged'}")
    show(f"{len(written.tensors)} tensors -> {options.output} ({options.to})")
    if read.left_over:
        show(f"left over, without a counterpart in torchvision: {name_some(read.left_over)}")
    if written.left_over:
        show(f"left over, without a counterpart in {options.to}: {name_some(written.left_over)}")
    if report.not_copied:
        show(f"not converted: {name_some(report.not_copied)}")
    show("build the model with:")
    for name, value in report.settings.items():
        show(f"  {name}: {value}")
