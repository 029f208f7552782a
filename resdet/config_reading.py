"""Read YAML and overrides into pydantic models, and explain every mistake with its line and what must hold."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from resdet.errors import ConfigError, UserError
from resdet.recipes import find_config
from resdet.yaml12 import KeyPath, dotted, read_yaml

_Settings = TypeVar("_Settings", bound=BaseModel)


class Section(BaseModel):
    """A part of a configuration: strict, frozen, without unknown keys, documented by its fields' docstrings."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @classmethod
    def in_full(cls, value: Any) -> Any:
        """Return what a shorter spelling of this section stands for, anything else as it is."""
        return value

    def __init__(self, **values: Any) -> None:
        """Check values of Python as those of a file (``plain_values``); a ConfigError reports every mistake."""
        cls, tree = type(self), plain_values(values, type(self).__name__)
        try:
            cls.__pydantic_validator__.validate_json(json.dumps(tree), strict=True, self_instance=self)
        except ValidationError as error:
            problems = [_explain(item, tree, {}, cls.__name__, cls) for item in error.errors()]
            raise ConfigError(cls.__name__, problems) from None

    # As pydantic's own has it: sections within sections are checked in one go, without this method.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


Overrides = Sequence[str] | Mapping[str, Any]
"""``key=value`` with values in YAML, or a mapping with values of Python; keys are dotted."""


def plain_values(value: Any, source: str, path: KeyPath = ()) -> Any:
    """Return what Python people have as what a YAML file holds.

    Paths become text, tuples lists, NumPy's and torch's numbers and arrays Python's, members of an enum (torchvision's
    weights) their names, and sections mappings of what they state. A ConfigError names anything else by its ``path``
    within ``source``.
    """
    if value is None or type(value) in (str, bool, int, float):
        return value
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Mapping):
        return {str(key): plain_values(item, source, (*path, str(key))) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(item, source, (*path, number)) for number, item in enumerate(value)]
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # without NumPy: reading a configuration does not import it
        return plain_values(value.tolist(), source, path)
    where = f"{source}: {dotted(path)}" if path else source
    what = "text, a number, true/false, None, a path, or a list or mapping of these"
    raise ConfigError(source, [f"{where}: must be {what}; got {value!r:.60} ({type(value).__name__})"])


def load_settings(
    root: type[_Settings],
    config: str | Path | Mapping[str, Any],
    overrides: Overrides = (),
    *,
    command: str | None = None,
) -> _Settings:
    """Read the settings of a run from a YAML file, recipe or mapping, and overrides; see ``load_config``."""
    if isinstance(config, Mapping):
        return _checked(root, {}, [config, overrides], [], {}, "the given settings")
    try:
        text = find_config(config, command).read_text(encoding="utf-8")
    except IsADirectoryError:
        what = f"a folder; that of a dataset is given as data={config}, after the configuration"
        raise ConfigError(str(config), [what]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(config), [f"cannot be read: {error}"]) from None
    return parse_settings(root, text, overrides, source=str(config))


def parse_settings(root: type[_Settings], text: str, *overrides: Overrides, source: str = "<text>") -> _Settings:
    """Read the settings of a run from YAML text; ``source`` is what messages call it."""
    problems: list[str] = []
    places: dict[KeyPath, str] = {}
    tree = read_yaml(text, source, problems, places)
    if not isinstance(tree, dict):
        raise ConfigError(source, problems or [f"must be a mapping of sections, got {_describe(tree)}"])
    return _checked(root, tree, overrides, problems, places, source)


def _checked(
    root: type[_Settings],
    tree: dict[str, Any],
    overrides: Sequence[Overrides],
    problems: list[str],
    places: dict[KeyPath, str],
    source: str,
) -> _Settings:
    for some in overrides:
        for key, value, place in _given(some, problems):
            _set(tree, key, value, place, places, root)
    try:
        # JSON mode is the one in which strict typing still takes a string for a Path and a list for a tuple.
        config = root.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        problems.extend(_explain(item, tree, places, source, root) for item in error.errors())
    if problems:
        raise ConfigError(source, problems)
    return config


def config_to_plain(config: BaseModel) -> dict[str, Any]:
    """Return the whole configuration, defaults included, as plain values."""
    return config.model_dump(mode="json")


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested sections by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def config_to_yaml(config: BaseModel) -> str:
    """Return the whole configuration, defaults included, as YAML that reads back to the same."""
    return yaml.safe_dump(config_to_plain(config), sort_keys=False, default_flow_style=None, width=120)


def json_schema(root: type[BaseModel]) -> str:
    """Return the JSON Schema of the YAML files, for editors."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **root.model_json_schema()}
    return json.dumps(schema, indent=1) + "\n"


def or_text(schema: dict[str, Any]) -> None:
    """Let the JSON Schema of a section take a text too, which ``Section.in_full`` reads."""
    schema["anyOf"] = [{"type": "string"}, {"$ref": schema.pop("$ref")}]


def _given(overrides: Overrides, problems: list[str]) -> Iterator[tuple[list[str], Any, str]]:
    """Yield the keys, value and place of each override that can be read."""
    if isinstance(overrides, Mapping):
        for key, value in plain_values(overrides, "settings").items():
            yield key.split("."), value, "settings"
        return
    for override in [overrides] if isinstance(overrides, str) else overrides:
        place = f"command line ({override})"
        key, equals, text = override.partition("=")
        keys = key.split(".")
        if not equals or not all(keys):
            problems.append(f"{place}: must be key=value with a dotted key, as in optim.lr=0.01")
            continue
        try:
            yield keys, read_yaml(text, place, problems, {}), place
        except ConfigError as error:
            problems.extend(f"{place}: {problem}" for problem in error.problems)


def _set(
    tree: dict[str, Any],
    keys: Sequence[str],
    value: Any,
    place: str,
    places: dict[KeyPath, str],
    root: type[BaseModel],
) -> None:
    """Set one key in the tree; replace whatever is no mapping on the way by one, a short section in full."""
    node = tree
    if keys[1:] and isinstance(tree.get(keys[0]), str):
        section = root.model_fields[keys[0]].annotation if keys[0] in root.model_fields else None
        try:
            if isinstance(section, type) and issubclass(section, Section):
                tree[keys[0]] = section.in_full(tree[keys[0]])
        except UserError:
            return  # validation of the section reports it, with its place
    for name in keys[:-1]:
        if not isinstance(node.get(name), dict):
            node[name] = {}
        node = node[name]
    node[keys[-1]] = value
    for stale in [known for known in places if known[: len(keys)] == tuple(keys)]:
        del places[stale]
    places[tuple(keys)] = place


def _explain(item: Any, tree: Any, places: Mapping[KeyPath, str], source: str, root: type[BaseModel]) -> str:
    """Return one of pydantic's errors on a ``root`` as ``place: key: what must hold, what was got``."""
    path = _real_path(item["loc"], tree)
    # A key's own place; that of something below it, if an override made both; or that of the section around it.
    below = [place for known, place in places.items() if known[: len(path)] == path]
    around = [places[path[:n]] for n in range(len(path), -1, -1) if path[:n] in places]
    place = places.get(path) or (below + around + [source])[0]
    where = f"{place}: {dotted(path)}" if path else place
    kind, context = item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        known = list(_sections_at(path[:-1], tree, root)[0].model_fields)
        near = difflib.get_close_matches(str(path[-1]), known, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(known)}"
        return f"{where}: unknown key{hint}"
    if kind == "missing":
        return f"{where}: missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        got = item["input"].get("format") if isinstance(item["input"], dict) else item["input"]
        formats = [name for section in _sections_at(path, {}, root) for name in _formats(section)]
        return f"{where}.format: must be one of {', '.join(formats)}; got {_describe(got)}"
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("a valid ")
    if kind == "value_error":
        return f"{where}: {context.get('error', message)}"
    return f"{where}: must be {message}; got {_describe(item['input'])}"


def _real_path(location: KeyPath, tree: Any) -> KeyPath:
    """Return pydantic's location without what is no key of the file: union tags and type names."""
    path: list[str | int] = []
    node = tree
    for number, part in enumerate(location, start=1):
        if isinstance(node, dict):
            if part not in node and (part == node.get("format") or number < len(location)):
                continue
            path.append(part)
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int):
            path.append(part)
            node = node[part] if part < len(node) else None
    return tuple(path)


def _sections_at(path: KeyPath, tree: Any, root: type[BaseModel]) -> list[type[BaseModel]]:
    """Return the section of ``root`` at ``path``: for sources, that of the format in the tree, or all of them."""
    sections = [root]
    node = tree
    for part in path:
        annotation: Any = sections[0].model_fields[str(part)].annotation
        members = (annotation, *get_args(annotation))
        sections = [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]
        node = node.get(part) if isinstance(node, dict) else None
        if len(sections) > 1 and isinstance(node, dict):
            sections = [section for section in sections if node.get("format") in _formats(section)] or sections
            keys = set(node)  # without a format, the likeliest first
            sections = sorted(sections, key=lambda section: len(keys & section.model_fields.keys()), reverse=True)
    return sections


def _formats(source: type[BaseModel]) -> tuple[str, ...]:
    return get_args(source.model_fields["format"].annotation)


def _describe(value: Any) -> str:
    text = json.dumps(value, default=str)
    kind = {str: "text", bool: "true/false", int: "whole number", float: "number", list: "list", dict: "mapping"}
    if value is None:
        return "nothing (null)"
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({kind.get(type(value), type(value).__name__)})"
