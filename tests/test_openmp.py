"""OpenMP's threads wait briefly in commands, unless the environment says how."""

import os
import subprocess
import sys

import pytest

from resdet.openmp import wait_briefly


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "4000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_whoever_sets_a_variable_decides(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: dict[str, str]
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    wait_briefly()
    assert os.environ == expected


def test_commands_set_it_before_torch_is_loaded() -> None:
    program = (
        "import os, sys; from resdet.commands.run import run_tool\n"
        "run_tool(lambda arguments: print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules))"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4000", "False"]
