"""Document every key of a configuration in plain text, from the fields' types, defaults and docstrings."""

from __future__ import annotations

import difflib
import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from resdet.errors import UserError

_Schema = dict[str, Any]
_WIDTH = 112


def keys_text(root: type[BaseModel], wanted: Sequence[str] = ()) -> str:
    """Return the documentation of the keys of ``root``, or of the sections and keys that are ``wanted``.

    Raises:
        UserError: If there is no such section or key; it names the nearest.
    """
    groups = list(_groups(root.model_json_schema()))
    sections = {path.rstrip(".") for path, _, _ in groups}
    known = sections | {f"{path}{name}" for path, _, keys in groups for name in keys}
    for key in wanted:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{key}: no such section or key of the configuration{hint}")
    blocks: list[str] = []
    first_at: dict[str, str] = {}  # sections that are in several places are written once
    for path, title, keys in groups:
        chosen = {path + name: text for name, text in keys.items() if not wanted or _is_in(path + name, wanted)}
        chosen = {key: text for key, text in chosen.items() if key not in sections & set(wanted)}
        if not chosen:
            continue
        heading = textwrap.fill(f"[{path.rstrip('.') or 'top level'}] {title}", _WIDTH)
        twin = first_at.setdefault(f"{title} {keys}", path)
        if twin != path and len(chosen) == len(keys):
            blocks.append(f"{heading}\n    The keys are those of {twin.rstrip('.')}.")
        else:
            blocks.append("\n".join([heading, *(f"{key}{text}" for key, text in chosen.items())]))
    return "\n\n".join(blocks)


def sections_text(root: type[BaseModel], command: str) -> str:
    """Return a line for each section and key at the top of a configuration; ``command`` documents the keys of one."""
    schema = root.model_json_schema()
    lines = [f"sections of a configuration ({command} SECTION documents their keys):"]
    for name, field in schema["properties"].items():
        lines.append(f"  {name:15}  {re.split(r'[.:;](?: |$)', _description(field, schema))[0]}")
    return "\n".join(lines)


def _is_in(key: str, wanted: Sequence[str]) -> bool:
    return any(f"{key}.".startswith(f"{section}.") for section in wanted)


def _groups(schema: _Schema, path: str = "", node: _Schema | None = None) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Yield each section: its path with a dot at the end, its title, and the text of each of its keys."""
    node = node or schema
    properties = node["properties"]
    title = _description(node, schema)
    if "format" in properties and "const" in properties["format"]:
        title = f"format {properties['format']['const']}: {title}"
    required = node.get("required", ())
    yield path, title, {name: _key_text(field, schema, name in required) for name, field in properties.items()}
    for name, field in properties.items():
        for section in _sections(field, schema):
            yield from _groups(schema, f"{path}{name}.", section)


def _sections(field: _Schema, schema: _Schema) -> list[_Schema]:
    """Return the sections that may be the value of a key; those of sources differ in their format."""
    if "$ref" in field:
        section = schema["$defs"][field["$ref"].rpartition("/")[2]]
        return [section] if "properties" in section else []
    members = [*field.get("anyOf", ()), *field.get("oneOf", ())]
    return [section for member in members for section in _sections(member, schema)]


def _key_text(field: _Schema, schema: _Schema, required: bool) -> str:
    default = field.get("default")
    if required:
        note = ", required"
    elif _sections(field, schema):
        note = ""
    else:
        note = f", default {default if isinstance(default, str) else json.dumps(default)}"
    about = textwrap.fill(_description(field, schema), _WIDTH, initial_indent="    ", subsequent_indent="    ")
    return f": {_type_text(field, schema)}{note}\n{about}"


def _description(field: _Schema, schema: _Schema) -> str:
    texts = [field, *_sections(field, schema)]
    text = next((text["description"] for text in texts if "description" in text), "")
    return " ".join(text.replace("``", "`").split())


def _type_text(field: _Schema, schema: _Schema) -> str:
    if "$ref" in field:
        return "section" if _sections(field, schema) else _type_text(schema["$defs"][field["$ref"][8:]], schema)
    if members := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(dict.fromkeys(_type_text(member, schema) for member in members))
    if "enum" in field or "const" in field:
        return " | ".join(map(str, field.get("enum") or [field["const"]]))
    if field.get("type") == "array":
        count = f"{field['minItems']} " if "prefixItems" in field else ""
        member = _type_text(field.get("items") or field["prefixItems"][0], schema)
        return f"list of {count}{f'({member})' if ' ' in member else member}"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = " and ".join(f"{sign} {field[name]}" for name, sign in signs.items() if name in field)
    kind = field.get("type", "any")
    kind = {"string": "text", "object": "mapping", "boolean": "true | false"}.get(kind, kind)
    return " ".join(filter(None, ["path" if field.get("format") == "path" else kind, bounds]))
