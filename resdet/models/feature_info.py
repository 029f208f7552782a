"""Describe the feature maps of a body as timm's ``features_only`` networks do, for code that was written against them.

Source: ``FeatureInfo`` of timm's ``models/_features.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class FeatureInfo:
    """Channels, stride and module of each feature map of a body, the stem's too; used as timm's class of this name.

    Without ``idx`` the methods answer for the maps that the body returns, in their order. With a number, or several,
    they answer for those of all maps, counted from the stem's 0 (a stage has its own number: 1 to 4 in a ResNet).

    Attributes:
        info: A dictionary for each map: ``num_chs`` (channels), ``reduction`` (stride), ``module`` (the name of the
            module that computes it) and ``index``.
        out_indices: Indices of the maps that the body returns.
    """

    def __init__(self, info: Sequence[dict[str, Any]], out_indices: Sequence[int]) -> None:
        self.info = [{**one, "index": index} for index, one in enumerate(info)]
        self.out_indices = tuple(out_indices)

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        """Return one entry, of one map or as a list."""
        found = self.get_dicts([key], idx)
        return found[key] if isinstance(found, dict) else [one[key] for one in found]

    def get_dicts(self, keys: Sequence[str] | None = None, idx: int | Sequence[int] | None = None) -> Any:
        """Return some entries, or all, as a dictionary of one map or as a list of them."""
        wanted = self.out_indices if idx is None else idx
        if isinstance(wanted, int):
            one = self.info[wanted]
            return one if keys is None else {key: one[key] for key in keys}
        return [self.get_dicts(keys, index) for index in wanted]

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        """Return the number of channels."""
        return self.get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        """Return the stride, in input pixels."""
        return self.get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        """Return the name of the module, as in ``named_modules``."""
        return self.get("module", idx)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.info[index]

    def __len__(self) -> int:
        return len(self.info)
