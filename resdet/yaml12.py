"""Read YAML by the core rules of YAML 1.2, with the line of every key.

PyYAML follows YAML 1.1, which reads ``1e-4`` as a string and ``off`` as False, and silently keeps the last of two equal
keys. Here a repeated key is an error. So are aliases, with which a few lines can expand to gigabytes, tags
(``!!python/object``), and documents of a size or depth that no configuration has.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from resdet.errors import ConfigError

MAX_CHARACTERS = 100_000  # of a document: configurations have some 5,000, and PyYAML can take a second for every 30,000
MAX_DEPTH = 50  # nesting of lists and mappings
_MAX_DIGITS = 100

KeyPath = tuple[str | int, ...]  # the keys and list positions that lead to a value


class _Refused(yaml.MarkedYAMLError):
    """The document uses a part of YAML that is not read."""


# YAML 1.2 core schema (https://yaml.org/spec/1.2.2, section 10.3.2), in PyYAML's composer.
class _Yaml12Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own protocol
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse nodes that could expand, recurse or name types, before they are built."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        tag = getattr(event, "tag", None)
        what = ""
        if isinstance(event, yaml.AliasEvent):
            what = f"anchors and aliases (*{event.anchor}) are not read"
        elif tag is not None:
            what = f"tags ({tag}) are not read"
        elif isinstance(event, yaml.CollectionStartEvent) and self.depth == MAX_DEPTH:
            what = f"refused: lists and mappings nested more than {MAX_DEPTH} deep"
        if what:
            raise _Refused(problem=what, problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


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
    """Read one YAML document, which messages call ``source``.

    ``problems`` receives mistakes that leave the rest readable, one line each, and ``places`` the place of every key,
    ``source:line``. A ConfigError reports what is no YAML document or is refused.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(source, [f"refused: at most {MAX_CHARACTERS} characters are read, got {len(text)}"])
    try:
        node = yaml.compose(text, Loader=_Yaml12Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = f"{ord(text[error.position]):04X}"
        raise ConfigError(source, [f"line {line}: not YAML: the character U+{character} may not stand here"]) from None
    except yaml.MarkedYAMLError as error:
        line, column = (error.problem_mark.line + 1, error.problem_mark.column + 1) if error.problem_mark else (1, 1)
        problem = f"line {line}, column {column}: not YAML: {error.problem}"
        if isinstance(error, _Refused):
            problem = f"line {line}: {error.problem}"
        elif error.problem == "but found another document":
            problem = f"line {line}: one document is read, and '---' begins another"
        raise ConfigError(source, [problem]) from None
    return None if node is None else _construct(node, (), source, problems, places)


def _construct(node: yaml.Node, path: KeyPath, source: str, problems: list[str], places: dict[KeyPath, str]) -> Any:
    line = f"{source}:{node.start_mark.line + 1}"
    places.setdefault(path, line)
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = f"{source}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                where = f" of {dotted(path)}" if path else ""
                problems.append(f"{place}: a key{where} must be a text, got a list or mapping")
                continue
            key = str(key_node.value)
            if key in mapping:
                problems.append(f"{place}: {dotted((*path, key))}: written twice; keep one")
            places[(*path, key)] = place
            mapping[key] = _construct(value_node, (*path, key), source, problems, places)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, (*path, i), source, problems, places) for i, item in enumerate(node.value)]
    # Tags are the resolver's own by now: written ones have been refused.
    kind, value = node.tag.rsplit(":", 1)[-1], str(node.value)
    if kind == "null":
        return None
    if kind == "bool":
        return value.lower() == "true"
    if kind in ("int", "float") and len(value) > _MAX_DIGITS:
        problems.append(f"{line}: {dotted(path)}: a number has at most {_MAX_DIGITS} digits, got {len(value)}")
        return 0
    if kind == "int":
        return int(value, 0) if value[:2] in ("0x", "0o") else int(value)
    if kind == "float":
        return float(value.replace(".inf", "inf").replace(".nan", "nan").replace(".Inf", "inf").replace(".NaN", "nan"))
    return value


def dotted(path: KeyPath) -> str:
    """Return a path as text: ``data.train.format``."""
    return ".".join(str(part) for part in path)
