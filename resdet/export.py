"""Take a backbone elsewhere: safetensors under torchvision's names, with what is needed to build it again."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

import resdet
from resdet.errors import UserError, WeightsError
from resdet.models.backbone import ResNetFPN, freeze_stages
from resdet.models.resnet import ResNet

BACKBONE_FORMAT = "resdet-backbone-1"


def export_backbone(model: nn.Module, path: str | os.PathLike[str], *, include_fpn: bool = False) -> Path:
    """Write a body, or a body with its pyramid, as safetensors.

    The body alone has the names of torchvision's classifier (``conv1.weight``, ``layer1.0.conv1.weight``, ...), which
    loads it with nothing but ``fc`` missing; with the pyramid they are those of ``BackboneWithFPN`` (``body.``,
    ``fpn.``). Tensors are written as they are, nothing folded. The file appears whole or not at all.

    Args:
        model: A ResNet, a ResNetFPN, or a detector on one.
        path: The file to write; its directory must exist.
        include_fpn: Whether to write the pyramid too.

    Returns:
        The path.

    Raises:
        UserError: If the model has no backbone of ours, or no pyramid though it is asked for.
    """
    backbone = model if isinstance(model, ResNet | ResNetFPN) else getattr(model, "backbone", None)
    if not isinstance(backbone, ResNet | ResNetFPN):
        raise UserError(f"export_backbone takes a ResNet, a ResNetFPN or a detector on one, got {type(model).__name__}")
    if include_fpn and not isinstance(backbone, ResNetFPN):
        raise UserError("include_fpn needs a ResNetFPN or a detector on one, got a ResNet, which has no pyramid")
    body = backbone.body if isinstance(backbone, ResNetFPN) else backbone
    description: dict[str, Any] = {
        "arch": body.arch,
        "norm": body.norm,
        "norm_eps": body.norm_eps,
        "returned_layers": list(body.returned_layers),
    }
    exported: nn.Module = body
    if include_fpn and isinstance(backbone, ResNetFPN):
        exported = backbone
        description |= {"out_channels": backbone.out_channels, "extra_blocks": backbone.extra_blocks}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in exported.state_dict().items()}
    _write_whole(
        Path(path),
        tensors,
        {
            "format": BACKBONE_FORMAT,
            "backbone": json.dumps(description),
            "resdet_version": resdet.__version__,
        },
    )
    return Path(path)


def load_backbone(path: str | os.PathLike[str], *, trainable_layers: int = 3, fast: bool = True) -> ResNet | ResNetFPN:
    """Build the backbone that ``export_backbone`` wrote, with the same outputs bit for bit.

    Args:
        path: The file.
        trainable_layers: How many stages of the body take gradients, 0 to 5; see ``resnet_fpn``.
        fast: As in ``resnet_fpn``; bit for bit holds where it is what the exported backbone had.

    Returns:
        A ResNetFPN if the file has the pyramid, else a ResNet; in training mode, as modules are made.

    Raises:
        WeightsError: If the file is missing, damaged or not of this format.
        UserError: If ``trainable_layers`` is not in 0..5.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: there is no such file") from error
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: is damaged, cut short or not a safetensors file ({error})") from error
    if about.get("format") != BACKBONE_FORMAT:
        raise WeightsError(
            f"{path}: was not written by export_backbone ('format' is {about.get('format')!r}, "
            f"not {BACKBONE_FORMAT!r}); resnet_fpn(arch, weights=path) takes any ResNet weights"
        )
    try:
        description = json.loads(about["backbone"])
        backbone: ResNet | ResNetFPN
        body = ResNet(
            description["arch"],
            norm=description["norm"],
            norm_eps=description["norm_eps"],
            returned_layers=description["returned_layers"],
            fast=fast,
        )
        if "out_channels" in description:
            backbone = ResNetFPN(
                body, out_channels=description["out_channels"], extra_blocks=description["extra_blocks"]
            )
        else:
            backbone = body
        backbone.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{path}: its description and its tensors do not fit together ({error})") from error
    freeze_stages(body, trainable_layers)
    return backbone


def _write_whole(path: Path, tensors: Mapping[str, Tensor], about: dict[str, str]) -> None:
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with beside.open("wb") as file:
            file.write(save(dict(tensors), about))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
