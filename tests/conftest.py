"""Fixtures shared by several test files."""

from pathlib import Path

import pytest

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real data and real outputs of other programs, kept beside the project and not part of it."""
    if not ASSETS.is_dir():
        pytest.skip(f"needs the real data of {ASSETS}, which is not part of the project")
    return ASSETS
