r"""Describe a network: stages, parameters, multiply-adds, receptive fields, and the responses of its layers.

    resdet describe resnet50
    resdet describe resnet101 --image-size 800 1216
    resdet describe cifar20 cifar_plain20 --weights runs/residual/best.pt runs/plain/best.pt \
        --responses images/ --output responses.png

Counts are exact, for one image: multiply-adds are those of convolutions and fully connected layers. A receptive field
is the side of the square of pixels that one pixel of a stage's output can depend on. Responses are the standard
deviations of each 3x3 layer's output after its norm, before the addition and the nonlinearity (He et al. 2016, figure
7) and are meaningful for trained networks only. resdet/models/archs.py holds the table of architectures.
"""

from collections.abc import Sequence
from pathlib import Path

from resdet.commands.run import command_parser, show


def main(arguments: Sequence[str]) -> None:
    """Run ``resdet describe``."""
    parser = command_parser("describe", __doc__)
    parser.add_argument("archs", nargs="+", metavar="ARCH", help="an architecture; give several to compare them")
    parser.add_argument("--image-size", nargs=2, type=int, metavar=("H", "W"), help="default: 224 224; CIFAR's 32 32")
    parser.add_argument("--weights", nargs="+", metavar="FILE", help="one for each ARCH: torchvision name, file or URL")
    parser.add_argument("--responses", nargs="+", metavar="IMAGES", help="image files, folders, or glob patterns")
    parser.add_argument("--output", type=Path, metavar="PLOT", help="plot of the responses: .png, .pdf, .svg, ...")
    options = parser.parse_intermixed_args(arguments)
    if options.image_size and min(options.image_size) < 1:
        parser.error("--image-size: height and width must be at least 1")
    if bool(options.responses) != bool(options.weights):
        parser.error("--weights and --responses go together: responses are those of trained networks to images")
    if options.output and not options.responses:
        parser.error("--output is the plot of --responses")
    if options.weights and len(options.weights) != len(options.archs):
        parser.error(f"--weights: one for each of the {len(options.archs)} ARCH, got {len(options.weights)}")

    from resdet.classification.describe import measure_responses
    from resdet.classification.plots import check_plot, plot_responses
    from resdet.classification.summary import summarise, summary_table
    from resdet.data.image_files import find_images
    from resdet.files import check_output

    images = find_images(options.responses) if options.responses else []
    if options.output:
        check_plot(options.output)
        check_output(options.output, [*map(Path, options.weights), *images])
    size = tuple(options.image_size) if options.image_size else None
    lines = []
    for arch in options.archs:
        lines += [f"{arch}:"] if len(options.archs) > 1 else []
        lines.append(summary_table(summarise(arch, size)))
    measured = {}
    for arch, weights in zip(options.archs, options.weights or [], strict=False):
        name = arch if arch not in measured else f"{arch} ({weights})"
        measured[name] = measure_responses(arch, weights, images, image_size=size)
        lines.append(f"\nstandard deviation of responses, {name}:")
        lines += [f"{layer:30}  {deviation:.4f}" for layer, deviation in measured[name].items()]
    if options.output:
        plot_responses(measured, options.output)
        lines.append(f"written: {options.output}")
    show("\n".join(lines))
