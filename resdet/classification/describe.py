"""What ``tools/describe.py`` shows of trained networks: the responses of their layers, measured on images and drawn."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from resdet.classification.summary import default_image_size, response_deviations
from resdet.data.images import read_image
from resdet.errors import UserError
from resdet.files import written_whole
from resdet.models.archs import find_arch
from resdet.models.bodies import make_body
from resdet.models.loading import load_backbone_weights
from resdet.models.spec import DetectorSpec
from resdet.prediction import find_images
from resdet.weights.files import read_weights
from resdet.weights.source import locate


def measure_responses(
    arch: str,
    weights: str,
    images: Sequence[Path | str],
    *,
    image_size: tuple[int, int] | None = None,
    batch_size: int = 32,
) -> dict[str, float]:
    """Measure the responses of a trained network's 3x3 layers on image files.

    Args:
        arch: A key of ``resdet.models.archs.ARCHS``.
        weights: A torchvision weight name, a file or a URL; of a classifier, a backbone or a detector with a pyramid.
            What it tells of the pixels it was trained on is followed; otherwise they are normalised as ImageNet's.
        images: Files, folders or patterns.
        image_size: ``(height, width)`` that images are scaled to; by default ``default_image_size``.
        batch_size: Images of a forward pass.

    Returns:
        See ``response_deviations``.

    Raises:
        UserError: If there is no such architecture or no image.
        WeightsError: If the weights cannot be had or are not those of this network.
        DataError: If an image cannot be read.
    """
    last = len(find_arch(arch).strides)
    files = find_images(images)
    file = read_weights(locate(weights, arch))
    settings = file.settings
    has_statistics = any(name.endswith("running_mean") for name in file.tensors)
    body = make_body(
        arch,
        norm="frozen" if has_statistics else "group",
        norm_eps=settings.get("norm_eps", 1e-5),
        returned_layers=(last,),
        stride_in_1x1=settings.get("stride_in_1x1", False),
    )
    load_backbone_weights(body, file, arch)
    fields = DetectorSpec.model_fields
    mean = torch.tensor(settings.get("image_mean", fields["image_mean"].default)).view(3, 1, 1)
    std = torch.tensor(settings.get("image_std", fields["image_std"].default)).view(3, 1, 1)
    size = image_size or default_image_size(arch)

    def batches() -> Iterator[Tensor]:
        for start in range(0, len(files), batch_size):
            pictures = [_scaled(file, size) for file in files[start : start + batch_size]]
            yield (torch.stack(pictures) - mean) / std

    return response_deviations(body.eval(), batches())


def _scaled(file: Path, size: tuple[int, int]) -> Tensor:
    """Read an image as float ``[3, H, W]`` in [0, 1]."""
    pixels = torch.from_numpy(read_image(file)).permute(2, 0, 1).float() / 255
    if pixels.shape[1:] == size:
        return pixels
    return F.interpolate(pixels[None], size=size, mode="bilinear", antialias=True)[0].clamp(0, 1)


def plot_responses(responses: Mapping[str, Mapping[str, float]], path: str | os.PathLike[str]) -> None:
    """Draw the responses of several networks, in the order of their layers and sorted, as figure 7 of the paper.

    Args:
        responses: For each network, by the name in the legend, what ``response_deviations`` gives.
        path: The file to write; matplotlib knows the format by its ending. It appears whole or not at all.

    Raises:
        UserError: If there is nothing to draw, the ending is none that matplotlib knows, or matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise UserError("a plot needs matplotlib, which is not installed: pip install matplotlib") from error

    if not responses:
        raise UserError("plot_responses: got no responses to draw")
    path = Path(path)
    # Made without pyplot, which would choose a display and keep the figure.
    figure = Figure(figsize=(7.5, 6.0), layout="constrained")
    formats = FigureCanvasAgg(figure).get_supported_filetypes()
    if path.suffix.lstrip(".") not in formats:
        raise UserError(f"{path}: its ending must be one of {', '.join(sorted(formats))}")
    in_order, sorted_down = figure.subplots(2, 1, sharey=True)
    for number, (name, deviations) in enumerate(responses.items()):
        # The paper's dashes tell plain networks apart where colours cannot.
        style = {"linestyle": "--" if "plain" in name else "-", "color": f"C{number}", "linewidth": 1.3}
        marker = "o" if len(deviations) <= 60 else None
        values = list(deviations.values())
        layers = range(1, len(values) + 1)
        in_order.plot(layers, values, label=name, marker=marker, markersize=3, **style)
        sorted_down.plot(layers, sorted(values, reverse=True), label=name, marker=marker, markersize=3, **style)
    in_order.set_xlabel("3x3 layer, from the input on")
    sorted_down.set_xlabel("3x3 layer, sorted by its response")
    for axes in (in_order, sorted_down):
        axes.set_ylabel("standard deviation")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    in_order.legend(frameon=False)
    with written_whole(path) as beside:
        figure.savefig(beside, format=path.suffix.lstrip("."), dpi=150)
