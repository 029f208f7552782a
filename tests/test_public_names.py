"""The package's front: every public name exists, is typed, and costs nothing until it is used."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import resdet


def test_public_names_are_those_of_the_stub() -> None:
    """Type checkers read the stub, and so does Python when a name is used."""
    stub = ast.parse(Path(inspect.getfile(resdet)).with_suffix(".pyi").read_text())
    homes = {
        alias.name: f"resdet.{node.module}"
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name == alias.asname
    }
    assert set(resdet.__all__) == set(homes)
    for name, module in homes.items():
        assert getattr(resdet, name) is getattr(importlib.import_module(module), name)


def test_every_public_name_exists() -> None:
    for name in resdet.__all__:
        assert getattr(resdet, name) is not None
        assert name in dir(resdet)
    with pytest.raises(AttributeError, match="No resdet attribute detect"):
        resdet.detect  # noqa: B018


def test_importing_the_package_imports_nothing_else() -> None:
    script = "import sys, resdet; print(sorted(name for name in sys.modules if name.startswith(('resdet', 'torch'))))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['resdet', 'resdet.version']"
