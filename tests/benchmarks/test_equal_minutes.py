"""Recipes compared in equal minutes, on small datasets."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from benchmarks import run_benchmark
from benchmarks.recipes import RECIPES, common_settings
from coco_files import coco_folder

from resdet.config import load_config
from resdet.errors import DataError, UserError


def split_set(folder: Path) -> Path:
    """Write a dataset with the same pictures as train, val and test."""
    folder.mkdir()
    images = coco_folder(folder / "images", 4)
    for split in ("train", "val", "test"):
        shutil.copyfile(images / "a.json", folder / f"{split}.json")
    return folder


def test_every_recipe_of_ours_is_a_configuration(tmp_path: Path) -> None:
    ours = [recipe for recipe in RECIPES.values() if recipe is not None]
    assert len(ours) == len(RECIPES) - 1  # all but torchvision's
    for name, *overrides in ours:
        common = common_settings(tmp_path, 10, "resnet50", "", 0)
        assert load_config(name, [*common, *overrides]).minutes == 10


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ([], "data= must be folders"),
        (["data={set},{set}"], "of different names"),
        (["data={set}", "recipes=best"], "recipes must be some of torchvision, sgd"),
        (["data={set}", "recipes=sgd,sgd"], "each once"),
        (["data={set}", "minutes=0"], "minutes must be above 0"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, settings: list[str], problem: str) -> None:
    folder = split_set(tmp_path / "set")
    with pytest.raises(UserError, match=problem):
        run_benchmark(["work=recipes", *(setting.format(set=folder) for setting in settings)])


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    folder = split_set(tmp_path / "set")
    (folder / "test.json").unlink()
    with pytest.raises(DataError, match=r"test\.json is missing"):
        run_benchmark(["work=recipes", f"data={folder}"])


@pytest.mark.slow  # 80 s: torchvision's images are 800 pixels large
def test_each_recipe_has_its_minutes(tmp_path: Path) -> None:
    folders = [split_set(tmp_path / name) for name in ("one", "two")]
    data, names = ",".join(map(str, folders)), ("torchvision", "adamw")
    report = run_benchmark(
        ["work=recipes", f"data={data}", "minutes=0.5", f"recipes={','.join(names)}", "arch=resnet18"]
    )
    *tables, means = report.tables.values()
    assert len(tables) == 2
    for rows in tables:
        assert [row["recipe"] for row in rows] == list(names)
        for row in rows:
            assert row["steps"] >= 1
            assert 15 < row["seconds"] < 45  # of 30; a step of torchvision's is half a second and more
            assert -1 <= row["AP"] <= row["AP50"] <= 1
    assert means[0]["AP"] == (tables[0][0]["AP"] + tables[1][0]["AP"]) / 2
