"""Recipes: named where a configuration file is taken, listed with their stories, copied for editing."""

import logging
from pathlib import Path

import pytest
import yaml

from resdet.classification.config import load_pretrain_config
from resdet.config import load_config
from resdet.errors import ConfigError
from resdet.recipes import FOLDER, find_config, find_recipe, find_recipes

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_their_home_is_configs() -> None:
    assert FOLDER == ROOT / "configs"
    assert set(find_recipes()) == {path.stem for path in (ROOT / "configs").glob("*.yaml")}


@pytest.mark.parametrize("name", find_recipes())
def test_a_name_is_taken_where_a_file_is_taken(name: str) -> None:
    load = load_config if find_recipe(name).command == "train" else load_pretrain_config
    assert load(name, ["seed=7"]) == load(ROOT / "configs" / f"{name}.yaml", ["seed=7"])


@pytest.mark.parametrize("name", find_recipes())
def test_a_story_is_one_line_and_a_copy_is_the_same_configuration(name: str) -> None:
    recipe = find_recipe(name)
    assert recipe.story.endswith(".")
    assert len(recipe.story) <= 100
    copy, source = recipe.text().split("\n", 1), recipe.path.read_text().split("\n", 1)
    assert copy[1] == source[1]
    schema = "schema.json" if recipe.command == "train" else "pretrain_schema.json"
    assert source[0] == f"# yaml-language-server: $schema={schema}"
    assert copy[0] == f"# yaml-language-server: $schema={(ROOT / 'configs' / schema).as_uri()}"
    assert yaml.safe_load(recipe.text()) == yaml.safe_load(recipe.path.read_text())


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml"])
def test_a_file_here_comes_before_the_recipe_of_its_name(name: str, caplog: pytest.LogCaptureFixture) -> None:
    Path(name).write_text(find_recipe("quickstart").text().replace("seed: 0", "seed: 5"))
    with caplog.at_level(logging.INFO, "resdet"):
        assert load_config("quickstart").data.train.seed == 5
    assert caplog.messages == [f"quickstart: taken from the file {name} here, not from the recipe of this name"]


def test_a_folder_here_does_not_hide_a_recipe() -> None:
    Path("quickstart").mkdir()
    assert find_config("quickstart") == ROOT / "configs" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("frcnn_r10", "did you mean frcnn_r101 or frcnn_r101_3x or frcnn_r101_voc? "),
        ("voc", "did you mean frcnn_r101_voc? "),
        ("quickstrat.yaml", "did you mean quickstart? "),
        ("configs/quickstart.yaml", "did you mean quickstart? "),
        ("sub/mien.yaml", "did you mean sub/mine.yaml? "),
        ("nothing_like_it", ""),
    ],
)
def test_what_is_neither_names_the_nearest(given: str, expected: str) -> None:
    Path("sub").mkdir()
    Path("sub/mine.yaml").touch()
    with pytest.raises(ConfigError) as caught:
        load_config(given)
    assert caught.value.problems == [f"no such file or recipe; {expected}`resdet recipes` lists the recipes"]


def test_a_recipe_for_the_other_command_is_told() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("pretrain_digits_resnet20")
    assert caught.value.problems == ["this recipe is one for `resdet pretrain`, not `resdet train`"]
    with pytest.raises(ConfigError) as caught:
        load_pretrain_config("quickstart")
    assert caught.value.problems == ["this recipe is one for `resdet train`, not `resdet pretrain`"]
