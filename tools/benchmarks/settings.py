"""Check settings that several benchmarks share: counts, sizes, devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch

from resdet.errors import UserError
from resdet.processes import choose_device


def check_counts(settings: Mapping[str, Any], *keys: str, least: int = 1) -> None:
    """Check that settings are at least ``least``.

    Raises:
        UserError: If one is less.
    """
    for key in keys:
        if settings[key] < least:
            raise UserError(f"{key} must be {least} or more, got {settings[key]}")


def check_positive(settings: Mapping[str, Any], *keys: str) -> None:
    """Check that settings are above 0.

    Raises:
        UserError: If one is not.
    """
    for key in keys:
        if not settings[key] > 0:
            raise UserError(f"{key} must be above 0, got {settings[key]}")


def parse_counts(key: str, text: str) -> list[int]:
    """Read counts separated by commas: ``2,16``.

    Raises:
        UserError: If one is no whole number from 1.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"{key} must be whole numbers from 1, separated by commas, got {text!r}")
    return [int(part) for part in parts]


def find_device(name: str) -> torch.device:
    """Return the device that ``device=`` names: ``cpu``, ``cuda``, or ``auto`` for a GPU where there is one.

    Raises:
        UserError: If it is none of these, or there is no GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device must be auto, cpu or cuda, got {name!r}")
    return choose_device(cast(Literal["auto", "cpu", "cuda"], name))


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """Read sizes as ``min_size/max_size``, separated by commas: ``480/640,800/1333``.

    Raises:
        UserError: If one is not of this form, or its sides are not in order.
    """
    sizes = []
    for part in text.split(","):
        shorter, slash, longer = part.strip().partition("/")
        if not (slash and shorter.isdecimal() and longer.isdecimal()):
            raise UserError(f"sizes must be like 480/640,800/1333 (shorter side, longest allowed), got {part!r}")
        check_size(int(shorter), int(longer))
        sizes.append((int(shorter), int(longer)))
    return sizes


def check_size(min_size: int, max_size: int) -> None:
    """Check that images can be scaled to a size.

    Raises:
        UserError: If they cannot.
    """
    if not 1 <= min_size <= max_size:
        raise UserError(f"min_size must lie between 1 and max_size, got {min_size} and {max_size}")
