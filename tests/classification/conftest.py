"""Fixtures of the tests of classification training."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_classes import make_folder


@pytest.fixture(scope="session")
def folder(session_folder: Path) -> Path:
    """Two folders, train and val, of folders of pictures."""
    root = session_folder / "colours"
    root.mkdir()
    make_folder(root / "train", num_images=8, seed=0)
    make_folder(root / "val", num_images=5, seed=1)
    return root
