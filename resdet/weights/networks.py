"""Find the network in a file: which of its dictionaries, and what precedes the network's own names there.

Training code wraps networks: in dictionaries (``state_dict``, ``student``), in modules (``module.``, ``_orig_mod.``,
``encoder.``), in both. A network is known by the names of its first layers, under whatever prefix.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from resdet.errors import WeightsError, name_some
from resdet.weights.layouts import Tensors

logger = logging.getLogger(__name__)

WRAPPERS = ("state_dict", "model", "blobs")
"""Entries under which libraries store a state dict."""
_NO_WEIGHTS = ("optim", "training")  # beginnings of keys: an optimizer's state, the training state of our own runs

# The first layer of a network, and one of the second that proves it, in each library's names; a VGG's first comes last.
_FIRST_LAYERS = (
    ("conv1.weight", "layer1.0.conv1.weight"),
    ("conv1.0.weight", "layer1.0.conv1.weight"),  # a deep stem
    ("stem.conv1.weight", "layer1.0.conv1.weight"),
    ("stem.conv1.weight", "res2.0.conv1.weight"),
    ("conv1_w", "res2_0_branch2a_w"),
    ("features.0.weight", "features.2.weight"),
    ("features.0.weight", "features.3.weight"),
)
# What a detector or a pyramid puts before the names of its body, the longest first.
_BODIES = ("backbone.body.", "backbone.bottom_up.", "bottom_up.", "body.", "backbone.")
_HEADS = re.compile(r"(backbone\.fpn|fpn|fpn_\w+|neck|rpn|rpn_head|roi_heads?|bbox_head|proposal_generator)[._\d]")


@dataclass(frozen=True)
class Network:
    """The tensors of one network, named as it names them."""

    tensors: Tensors
    prefix: str  # what preceded each name: keys of dictionaries and modules, joined by dots
    outside: tuple[str, ...]  # names in the same dictionary that do not begin with it


def find_network(content: Mapping[str, Any], source: str, prefix: str | None = None) -> Network:
    """Find the network in a file's content, or that under ``prefix``; what was taken is logged if it is not plain.

    The state dict that libraries store (``WRAPPERS``, or the content itself) comes first. Otherwise there must be one
    network. Where no network is known by its names, the tensors are returned as they are stored.

    Raises:
        WeightsError: If there are no tensors, several networks, or none under ``prefix``.
    """
    stored = stored_tensors(content)
    everything = dict(_flat(content, "", set()))
    found = list(dict.fromkeys(_prefixes(everything)))
    if prefix is not None:
        found = _under(found, prefix, source)
    elif "" in _prefixes(_without_module(stored)):
        others = [root for root in found if root.removesuffix("module.").rstrip(".") not in ("", *WRAPPERS)]
        if others:
            logger.info("%s: not taking the networks under %s", source, name_some(map(repr, others)))
        found = []
    if len(found) > 1:
        raise WeightsError(
            f"{source}: holds {len(found)} networks, under the prefixes {name_some(map(repr, found), 10)}: say which "
            "(model.weights_origin.prefix in a configuration, origin=WeightsOrigin(prefix=...), convert --prefix)"
        )
    if not found:
        if not stored:
            raise WeightsError(f"{source}: holds no tensors; its keys are {name_some(map(str, content)) or 'none'}")
        return Network(_without_module(stored), "", ())
    root = found[0]
    if root:
        logger.info("%s: taking the network under the prefix %r", source, root)
    inside = {name.removeprefix(root): value for name, value in everything.items() if name.startswith(root)}
    folder = _folder(content, root)
    outside = (name for name in everything if name.startswith(folder) and not name.startswith(root))
    return Network(inside, root, tuple(name.removeprefix(folder) for name in outside))


def stored_tensors(content: Mapping[str, Any]) -> Tensors:
    """Return the tensors of the state dict that libraries store (``WRAPPERS``), or else of the content itself."""
    stored = next((content[name] for name in WRAPPERS if isinstance(content.get(name), dict)), content)
    return {str(name): value for name, value in stored.items() if isinstance(value, Tensor)}


def _under(found: list[str], prefix: str, source: str) -> list[str]:
    """Return the networks at a prefix, or else those that begin with it or end in it."""
    asked = f"{prefix}." if prefix and not prefix.endswith(".") else prefix
    fitting = [root for root in found if root == asked]
    fitting = fitting or [root for root in found if asked and (root.startswith(asked) or root.endswith(f".{asked}"))]
    if not fitting:
        known = name_some(map(repr, found), 10) or "none"
        raise WeightsError(
            f"{source}: holds no network under the prefix {prefix!r}; the prefixes of those it has: {known}"
        )
    return fitting


def _without_module(tensors: Tensors) -> Tensors:
    """Drop ``module.``, which DataParallel puts before every name."""
    if not all(name.startswith("module.") for name in tensors):
        return tensors
    return {name.removeprefix("module."): value for name, value in tensors.items()}


def _flat(content: Mapping[str, Any], path: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of nested dictionaries by its keys, joined by dots, of each dictionary once."""
    seen.add(id(content))
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield f"{path}{key}", value
        elif isinstance(value, dict) and id(value) not in seen and not str(key).startswith(_NO_WEIGHTS):
            yield from _flat(value, f"{path}{key}.", seen)


def _folder(content: Mapping[str, Any], root: str) -> str:
    """Return the part of a prefix that is keys of dictionaries."""
    for key, value in content.items():
        if isinstance(value, dict) and root.startswith(f"{key}."):
            return f"{key}." + _folder(value, root.removeprefix(f"{key}."))
    return ""


def _prefixes(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return what precedes each network's names, from its first layers."""
    roots = []
    for name in tensors:
        for first, second in _FIRST_LAYERS:
            before = name.removesuffix(first)
            if before == name or (before and before[-1] not in ".") or f"{before}{second}" not in tensors:
                continue
            roots.append(_root(before, first, tensors))
    return roots


def _root(before: str, first: str, tensors: Mapping[str, Tensor]) -> str:
    """Return what precedes the names of a whole network, given what precedes those of its body."""
    for body in _BODIES:
        root = before.removesuffix(body)
        if root == before or (root and root[-1] != "."):
            continue
        if body != "backbone.":
            return root
        if first.startswith(("features", "stem", "conv1.0")):
            continue  # no library has them there
        if not root or any(name.startswith(root) and _HEADS.match(name.removeprefix(root)) for name in tensors):
            return root
    return before
