"""Find the recipes: complete configurations that come with resdet and are named where a configuration file is taken.

Their one home is ``configs/`` at the top of the source; a wheel holds that folder inside the package.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from resdet.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent
FOLDER = next((folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()), _PACKAGE)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """A configuration that comes with resdet.

    Attributes:
        path: Its YAML file.
    """

    path: Path

    @property
    def command(self) -> str:
        """The subcommand that takes it: train or pretrain."""
        return "pretrain" if self.path.stem.startswith("pretrain_") else "train"

    @property
    def story(self) -> str:
        """What it trains, in one line: the first line of its header after that for editors."""
        lines = (line.lstrip("# ").rstrip() for line in self._source().splitlines()[1:])
        return next(filter(None, lines))

    def text(self) -> str:
        """Return the file with the full address of its JSON Schema, by which editors check a copy anywhere."""
        modeline, rest = self._source().split("\n", 1)
        start, schema = modeline.split("$schema=")
        return f"{start}$schema={self.path.with_name(schema).as_uri()}\n{rest}"

    def _source(self) -> str:
        return self.path.read_text(encoding="utf-8")


def find_recipes() -> dict[str, Recipe]:
    """Return all recipes by name, in the order of their names."""
    return {path.stem: Recipe(path) for path in sorted(FOLDER.glob("*.yaml"))}


def find_recipe(name: str) -> Recipe:
    """Return the recipe of this name.

    Raises:
        ConfigError: If there is none; it names the nearest.
    """
    recipes = find_recipes()
    if name not in recipes:
        raise ConfigError(name, [f"no such recipe; {_hint(name, recipes)}"])
    return recipes[name]


def find_config(given: str | Path, command: str | None = None) -> Path:
    """Return the configuration file that is meant: a path, or the name of a recipe.

    A file in the working folder that is called as a recipe, with or without ``.yaml``, is taken before it, and logged.

    Args:
        given: A path, or a name.
        command: Refuse recipes for other subcommands than this: train or pretrain.

    Raises:
        ConfigError: If there is neither a file nor a recipe of this name; it names the nearest.
    """
    path, recipes = Path(given), find_recipes()
    recipe = recipes.get(str(given))
    for file in (path, path.with_suffix(".yaml")) if recipe else (path,):
        # A pipe is read too; a folder (of a run, say) is left to the recipe of its name.
        if file.exists() and not (recipe and file.is_dir()):
            if recipe and file.resolve() != recipe.path:
                _logger.info("%s: taken from the file %s here, not from the recipe of this name", given, file)
            return file
    if recipe is None:
        raise ConfigError(str(given), [f"no such file or recipe; {_hint(str(given), recipes)}"])
    if command not in (None, recipe.command):
        raise ConfigError(str(given), [f"this recipe is one for `resdet {recipe.command}`, not `resdet {command}`"])
    return recipe.path


def _hint(given: str, recipes: Iterable[str]) -> str:
    path = Path(given)
    files = [file.name for file in sorted(path.parent.glob("*.yaml"))]
    near = [str(path.parent / name) for name in difflib.get_close_matches(path.name, files, n=1)]
    name = path.name.removesuffix(".yaml")
    near += difflib.get_close_matches(name, recipes, n=3) or [recipe for recipe in recipes if name and name in recipe]
    question = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{question}`resdet recipes` lists the recipes"
