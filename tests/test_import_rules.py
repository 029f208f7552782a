"""The checker of import rules finds what it is there to find."""

from __future__ import annotations

from pathlib import Path

import pytest
from import_rules import broken_rules

SOUND = {
    "__init__.py": "from resdet.models.detector import Detector",
    "errors.py": "",
    "commands/__init__.py": "",
    "commands/train.py": "def main():\n    from resdet.models.detector import Detector\n    import torch",
    "data/__init__.py": "",
    "data/coco.py": "from resdet import errors\ndef steps():\n    import albumentations",
    "models/__init__.py": "",
    "models/archs.py": "from resdet.errors import UserError",
    "models/detector.py": "from resdet.models.archs import ARCHS\nfrom resdet.weights.files import read",
    "training/__init__.py": "",
    "training/loop.py": "from resdet.data import coco",
    "weights/__init__.py": "",
    "weights/files.py": "from resdet.models.archs import ARCHS",
}


def broken(folder: Path, changes: dict[str, str]) -> list[str]:
    """Return what is broken in a sound package after some files were changed or added."""
    for name, text in {**SOUND, **changes}.items():
        path = folder / "resdet" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return broken_rules(folder)


def test_a_sound_package_breaks_nothing(tmp_path: Path) -> None:
    assert broken(tmp_path, {}) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"data/coco.py": "import resdet.training.loop", "training/loop.py": ""},
            "forbidden import: resdet.data.coco -> resdet.training.loop",
        ),
        (
            {"models/detector.py": "from resdet import config", "config.py": "", "training/loop.py": ""},
            "forbidden import: resdet.models.detector -> resdet.config",
        ),
        (
            {
                "data/coco.py": "from resdet import drawing",
                "drawing.py": "import resdet.prediction",
                "prediction.py": "",
            },
            "forbidden import: resdet.data.coco -> resdet.drawing -> resdet.prediction",
        ),
        (
            {"check/boxes.py": "if True:\n    from resdet.training import loop"},
            "forbidden import: resdet.check.boxes -> resdet.training.loop",
        ),
        (
            {"weights/files.py": "from resdet.models import norm", "models/norm.py": ""},
            "forbidden import: resdet.weights.files -> resdet.models.norm",
        ),
        (
            {"models/archs.py": "def late():\n    from resdet.models.detector import Detector"},
            "import circle: resdet.models.archs -> resdet.models.detector -> resdet.models.archs",
        ),
        (
            {"evaluation/__init__.py": "from resdet.training import loop", "build.py": "import resdet.evaluation.coco"}
            | {"evaluation/coco.py": "", "training/loop.py": "from resdet import build"},
            "import circle: resdet.build -> resdet.evaluation -> resdet.training.loop -> resdet.build",
        ),
        (
            {"data/coco.py": "def read():\n    import torch"},
            "import inside a function: resdet/data/coco.py:2: torch",
        ),
        ({"data/coco.py": "import resdet"}, "import of resdet/__init__.py: resdet/data/coco.py:1"),
        (
            {"data/coco.py": "from resdet import Detector"},
            "import of resdet/__init__.py: resdet/data/coco.py:1",
        ),
    ],
)
def test_a_breach_is_found(tmp_path: Path, changes: dict[str, str], expected: str) -> None:
    assert expected in broken(tmp_path, changes)
