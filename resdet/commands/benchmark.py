"""Measure what the documentation claims, on this machine (in a checkout of the source only).

resdet benchmark --help
resdet benchmark work=inference images=val2017 weights=best.pt
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from resdet.errors import UserError
from resdet.version import VERSION

_SOURCE = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str]) -> None:
    """Run ``resdet benchmark``: ``tools/benchmark.py`` of the checkout that this package is in.

    Raises:
        UserError: If it is not in one.
    """
    if not (_SOURCE / "pyproject.toml").is_file():
        raise UserError(
            "benchmarks are not installed with the package: run tools/benchmark.py in a checkout or in the unpacked "
            f"source distribution of resdet {VERSION}"
        )
    sys.path.insert(0, str(_SOURCE / "tools"))
    importlib.import_module("benchmark").main(arguments)
