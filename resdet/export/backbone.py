"""Export a body, or a body with its pyramid; rebuild the backbone that was exported as safetensors."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor, nn

from resdet.errors import UserError, WeightsError
from resdet.export.card import files_beside, write_card
from resdet.export.compare import CHECK_SIZES, FEATURE_TOLERANCE, ExportReport, feature_difference, speed_ratio
from resdet.export.programs import (
    BackboneGraph,
    backbone_to_onnx,
    backbone_to_openvino,
    check_openvino,
    companion,
    feature_runner,
    output_names,
    write_exported_program,
    write_torchscript,
)
from resdet.export.timm_config import WEIGHTS_NAME, config_file, timm_problem, write_timm_config
from resdet.files import written_whole
from resdet.models.backbone import ResNetFPN, SingleLevel, freeze_stages
from resdet.models.bodies import Body, make_body
from resdet.models.detector import Detector
from resdet.models.finite import check_weights
from resdet.models.loading import load_strictly
from resdet.models.norm import folded_copy, frozen_copy
from resdet.models.spec import DetectorSpec
from resdet.version import VERSION
from resdet.weights.files import BACKBONE_FORMAT, WeightsPath, read_weights

logger = logging.getLogger(__name__)

BackboneFormat = Literal["safetensors"] | BackboneGraph
BACKBONE_FORMATS: tuple[BackboneFormat, ...] = ("safetensors", "torchscript", "export", "onnx", "openvino")


def export_backbone(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    include_fpn: bool = False,
    format: BackboneFormat = "safetensors",
    names: Literal["torchvision", "timm"] = "torchvision",
    checkpoint: WeightsPath | None = None,
) -> ExportReport:
    """Write a body, or a body with its pyramid, and check the file against the model; write its model card beside it.

    As safetensors, the body alone has the names of torchvision's classifier (``conv1.weight``,
    ``layer1.0.conv1.weight``, ...), which loads it with only ``fc`` missing; with the pyramid they are those of
    ``BackboneWithFPN`` (``body.``, ``fpn.``). Tensors are written as they are, nothing is folded. A body called
    ``model.safetensors`` gets a ``config.json`` beside it, and timm loads the folder, if timm has such a network.

    In the other formats the network runs without this package, in evaluation mode and float32 on the CPU. TorchScript
    and ``.pt2`` return the features under their names in Python (``"0"``, ...), ONNX and OpenVINO as ``C2``.. or
    ``P2``.., by stride. A ``.pt2`` refuses images whose last map would be one pixel high or wide (64 pixels with P6, 32
    without): ``torch.export`` specialises on a size of 1.

    Args:
        model: A ResNet, a ResNetFPN, or a detector on one; not changed.
        path: The file to write; its directory must exist. It appears whole or not at all.
        include_fpn: Whether to write the pyramid too.
        format: ``"safetensors"``, ``"torchscript"``, ``"export"`` (a ``torch.export`` program, ``.pt2``), ``"onnx"`` or
            ``"openvino"`` (``path`` ends in ``.xml``, and a ``.bin`` is written too).
        names: Naming of the tensors in safetensors. timm's ResNets have torchvision's names, and it has no pyramids, so
            both give the same file of a body.
        checkpoint: The file that the model is from, whose configuration and evaluation the model card states.

    Raises:
        UserError: If the model has no backbone of this package, or no pyramid though it is asked for; if the directory
            is missing, format or names unknown, a package that the format needs is not installed, or a file that is no
            card of an earlier export has the name of this one's.
        WeightsError: If its weights are not finite.
        ExportError: If the file computes something else than the model.
    """
    exported, path = _part_to_export(model, include_fpn), Path(path)
    _check_arguments(format, names, include_fpn)
    if format == "openvino":
        check_openvino(path)
    beside, source = files_beside(path, format), None if checkpoint is None else read_weights(checkpoint)
    check_weights(exported, "export")
    about = _describe(exported)
    if isinstance(model, Detector):
        about |= {"image_mean": model.spec.image_mean, "image_std": model.spec.image_std}
    if format in ("onnx", "openvino"):
        about["outputs"] = output_names(exported)
    with written_whole(path, companion(format)) as temporary:
        if format == "safetensors":
            metadata = {"format": BACKBONE_FORMAT, "backbone": json.dumps(about), "resdet_version": VERSION}
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in exported.state_dict().items()}
            temporary.write_bytes(save(tensors, metadata))
            run = _rebuilt(temporary, exported)
        else:
            _write_program(folded_copy(exported), temporary, format, output_names(exported))
            run = feature_runner(temporary, format)
        report = _compare(frozen_copy(exported), run, path, "backbone" if include_fpn else "body", format)
        report.check()
    report.write(about)
    body = exported.body if isinstance(exported, ResNetFPN) else exported
    problem = "it has no feature pyramids" if include_fpn else timm_problem(body)
    config = _write_timm_config(model, body, path, problem, names) if format == "safetensors" else None
    channels = [exported.out_channels] * len(exported.strides) if isinstance(exported, ResNetFPN) else body.channels
    keys = about.get("outputs") or [str(level) for level in range(len(exported.strides))]
    maps = list(zip(keys, channels, exported.strides, strict=True))
    write_card(beside[-1], report, model, maps=maps, source=source, timm_problem=problem)
    return replace(report, beside=(*([config] if config else []), *beside))


def load_backbone(path: str | os.PathLike[str], *, trainable_layers: int = 3, fast: bool = True) -> Body | ResNetFPN:
    """Build the backbone that ``export_backbone`` wrote, with the same outputs bit for bit.

    Args:
        path: The file.
        trainable_layers: How many stages of the body take gradients, 0 to 5; see ``resnet_fpn``.
        fast: As in ``resnet_fpn``; outputs are the same bit for bit if the exported backbone had the same.

    Returns:
        A ResNetFPN if the file has the pyramid, else a ResNet; in training mode, like every new module.

    Raises:
        WeightsError: If the file is missing, damaged or not of this format.
        UserError: If ``trainable_layers`` is not in 0..5.
    """
    file = read_weights(path)
    if file.format != BACKBONE_FORMAT:
        raise WeightsError(
            f"{file.path}: was not written by export_backbone ('format' is {file.format!r}, "
            f"not {BACKBONE_FORMAT!r}); resnet_fpn(arch, weights=path) takes any ResNet weights"
        )
    description = file.exported
    try:
        backbone: Body | ResNetFPN
        body = make_body(
            description["arch"],
            norm=description["norm"],
            norm_eps=description["norm_eps"],
            returned_layers=description["returned_layers"],
            stride_in_1x1=description.get("stride_in_1x1", False),
            dilate_c5=description.get("dilate_c5", False),
            fast=fast,
        )
        if "out_channels" in description:
            channels, blocks = description["out_channels"], description["extra_blocks"]
            backbone = ResNetFPN(body, out_channels=channels, extra_blocks=blocks)
        else:
            backbone = body
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{file.path}: its description and its tensors do not fit together ({error})") from error
    load_strictly(backbone, file, what=f"the {body.arch} that its description builds")
    freeze_stages(body, trainable_layers)
    return backbone


def _write_timm_config(model: nn.Module, body: Body, path: Path, problem: str | None, names: str) -> Path | None:
    """Write ``config.json`` where timm can use it and return its path; the log says why not where it was wanted."""
    config = config_file(path)
    if problem is None and config is not None:
        write_timm_config(config, body, model.spec if isinstance(model, Detector) else DetectorSpec(arch=body.arch))
        return config
    if problem is None and path.name == WEIGHTS_NAME:
        problem = f"{path.with_name('config.json')} is another program's and was left as it is"
    if problem is None and names == "timm":
        problem = f"timm finds the weights by the name {WEIGHTS_NAME}: give the output this name"
    if problem is not None and (names == "timm" or path.name == WEIGHTS_NAME):
        logger.warning("%s: no config.json for timm's loader was written: %s", path, problem)
    return None


def _part_to_export(model: nn.Module, include_fpn: bool) -> Body | ResNetFPN:
    backbone = model if isinstance(model, Body | ResNetFPN) else getattr(model, "backbone", None)
    if isinstance(backbone, SingleLevel):
        backbone = backbone.body
    if not isinstance(backbone, Body | ResNetFPN):
        raise UserError(f"export_backbone takes a ResNet, a ResNetFPN or a detector on one, got {type(model).__name__}")
    if include_fpn and not isinstance(backbone, ResNetFPN):
        raise UserError("include_fpn needs a ResNetFPN or a detector on one, got a ResNet, which has no pyramid")
    return backbone if include_fpn or isinstance(backbone, Body) else backbone.body


def _check_arguments(format: str, names: str, include_fpn: bool) -> None:
    if format not in BACKBONE_FORMATS:
        raise UserError(f"format of a backbone must be one of {', '.join(BACKBONE_FORMATS)}, got {format!r}")
    if names not in ("torchvision", "timm"):
        raise UserError(f"names must be torchvision or timm, got {names!r}")
    if names == "timm" and (include_fpn or format != "safetensors"):
        raise UserError("timm's names are for the body as safetensors: timm has no pyramid, and other formats no names")


def _write_program(folded: Body | ResNetFPN, path: Path, format: BackboneGraph, map_names: list[str]) -> None:
    if format == "torchscript":
        write_torchscript(folded, path)
    elif format == "export":
        write_exported_program(folded, path)
    else:
        (backbone_to_onnx if format == "onnx" else backbone_to_openvino)(folded, path, map_names)


def _rebuilt(path: Path, exported: Body | ResNetFPN) -> Callable[[Tensor], list[Tensor]]:
    """Load an exported state dict as a function from images to its maps."""
    body = exported.body if isinstance(exported, ResNetFPN) else exported
    backbone = load_backbone(path, fast=body.fast).eval()
    return lambda images: list(backbone(images).values())


@torch.no_grad()
def _compare(
    model: nn.Module, run: Callable[[Tensor], list[Tensor]], path: Path, what: str, format: BackboneFormat
) -> ExportReport:
    """Compare the exported file, as ``run``, with the model on random images."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(1 + i, 3, *size, generator=generator) for i, size in enumerate(CHECK_SIZES)]
    difference = max(feature_difference(run(batch), list(model(batch).values())) for batch in batches)
    ratio = None
    if format != "safetensors":
        ratio = speed_ratio(lambda: [model(batch) for batch in batches], lambda: [run(batch) for batch in batches])
    return ExportReport(
        path=path,
        what=what,
        format=format,
        sizes=CHECK_SIZES,
        differences={"features": difference},
        tolerances={"features": 0.0 if format == "safetensors" else FEATURE_TOLERANCE},
        num_detections=None,
        speed_ratio=ratio,
    )


def _describe(exported: Body | ResNetFPN) -> dict[str, Any]:
    """Return what ``load_backbone`` builds the backbone from."""
    body = exported.body if isinstance(exported, ResNetFPN) else exported
    description: dict[str, Any] = {
        "arch": body.arch,
        "norm": body.norm,
        "norm_eps": body.norm_eps,
        "returned_layers": list(body.returned_layers),
        "stride_in_1x1": body.stride_in_1x1,
        "dilate_c5": body.dilate_c5,
    }
    if isinstance(exported, ResNetFPN):
        description |= {"out_channels": exported.out_channels, "extra_blocks": exported.extra_blocks}
    return description
