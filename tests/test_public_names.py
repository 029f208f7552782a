"""The package's front: every public name exists, is typed, and costs nothing until it is used."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import resdet


def names_for_type_checkers() -> dict[str, str]:
    """Read which name comes from which module from the block that only type checkers read."""
    tree = ast.parse(Path(inspect.getfile(resdet)).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert all(alias.name == alias.asname for node in imports for alias in node.names)
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def test_type_checkers_see_what_python_does() -> None:
    assert names_for_type_checkers() == resdet._HOMES
    assert set(resdet.__all__) == {"__version__", *resdet._HOMES}


def test_every_public_name_exists() -> None:
    for name in resdet.__all__:
        assert getattr(resdet, name) is not None
        assert name in dir(resdet)
    with pytest.raises(AttributeError, match="module 'resdet' has no attribute 'detect'"):
        resdet.detect  # noqa: B018


def test_importing_the_package_imports_nothing_else() -> None:
    script = "import sys, resdet; print(sorted(name for name in sys.modules if name.startswith(('resdet', 'torch'))))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['resdet', 'resdet.version']"
