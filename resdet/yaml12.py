"""YAML by YAML 1.2's core rules, with the place of every key: what configuration files are written in.

PyYAML alone follows YAML 1.1, which reads ``1e-4`` as a string and ``off`` as False, and keeps the last of two equal
keys without a word. Here a key written twice is an error, and so are anchors and aliases, with which a few lines can
expand to gigabytes.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from resdet.errors import ConfigError

KeyPath = tuple[str | int, ...]
"""The keys and list positions that lead to a value."""


# YAML 1.2 core schema (https://yaml.org/spec/1.2.2, section 10.3.2), in PyYAML's composer.
class _Yaml12Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own protocol


_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", _FLOAT + r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.0123456789"),
):
    _Yaml12Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), [*_first] + ([""] if _tag == "null" else [])
    )


def read_yaml(text: str, source: str, problems: list[str], places: dict[KeyPath, str]) -> Any:
    """Read one YAML document.

    Args:
        text: The document.
        source: What messages call it.
        problems: Mistakes that leave the rest readable are added here, one line each.
        places: The place of every key, ``source:line``, is added here.

    Raises:
        ConfigError: If it is no YAML document, or uses aliases.
    """
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                line = event.start_mark.line + 1 if event.start_mark else 0
                raise ConfigError(source, [f"line {line}: anchors and aliases (*{event.anchor}) are not read"])
        node = yaml.compose(text, Loader=_Yaml12Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(source, [f"{where}not YAML: {getattr(error, 'problem', None) or error}"]) from None
    return None if node is None else _construct(node, (), source, problems, places)


def _construct(
    node: yaml.Node,
    path: KeyPath,
    source: str,
    problems: list[str],
    places: dict[KeyPath, str],
) -> Any:
    line = f"{source}:{node.start_mark.line + 1}"
    places.setdefault(path, line)
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            place = f"{source}:{key_node.start_mark.line + 1}"
            if key in mapping:
                problems.append(f"{place}: {dotted((*path, key))}: written twice; keep one")
            places[(*path, key)] = place
            mapping[key] = _construct(value_node, (*path, key), source, problems, places)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, (*path, i), source, problems, places) for i, item in enumerate(node.value)]
    kind, value = node.tag.rsplit(":", 1)[-1], str(node.value)
    if kind == "null":
        return None
    if kind == "bool":
        return value.lower() == "true"
    if kind == "int":
        return int(value, 0) if value[:2] in ("0x", "0o") else int(value)
    if kind == "float":
        return float(value.replace(".inf", "inf").replace(".nan", "nan").replace(".Inf", "inf").replace(".NaN", "nan"))
    if kind != "str":
        problems.append(f"{line}: {dotted(path)}: tag {node.tag} is not read")
    return value


def dotted(path: KeyPath) -> str:
    """Write a path as people do: ``data.train.format``."""
    return ".".join(str(part) for part in path)
