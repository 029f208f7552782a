"""Print a configuration as a run would use it, all defaults and overrides in place, without training.

    resdet config frcnn_r101 optim.lr=0.01
    resdet config mine.yaml > resolved.yaml
    resdet config --keys
    resdet config --keys optim
    resdet config --keys --pretrain data.train

CONFIG is a YAML file or the name of a recipe, for resdet train or resdet pretrain. What is printed is YAML that reads
back to the same configuration. --keys documents the keys instead: their values, defaults and meaning.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from resdet.commands.run import command_parser, show

if TYPE_CHECKING:
    from resdet.config_reading import Section


def main(arguments: Sequence[str]) -> None:
    """Run ``resdet config``."""
    parser = command_parser(
        "config", __doc__, arguments="[-h] CONFIG [key=value ...]\n       %(prog)s --keys [--pretrain] [SECTION ...]"
    )
    parser.add_argument("words", nargs="*", metavar="CONFIG | key=value | SECTION", help="see above")
    parser.add_argument(
        "--keys", action="store_true", help="document all keys, or those of a SECTION (optim, data.train)"
    )
    parser.add_argument("--pretrain", action="store_true", help="those of the command pretrain, not of train")
    options = parser.parse_intermixed_args(arguments)
    if options.pretrain and not options.keys:
        parser.error("--pretrain goes with --keys; a configuration says itself which command it is for")
    if not options.words and not options.keys:
        parser.error("give a CONFIG: a YAML file or the name of a recipe (or --keys)")

    from resdet.classification.config import PretrainConfig
    from resdet.config import Config
    from resdet.config_keys import keys_text
    from resdet.config_reading import config_to_yaml

    if options.keys:
        show(keys_text(PretrainConfig if options.pretrain else Config, options.words))
        return
    show(config_to_yaml(_load(*options.words)).rstrip("\n"))


def _load(path: str, *overrides: str) -> "Section":
    """Load a configuration of either command: a recipe says which; else it is the one that it comes nearer to."""
    from resdet.classification.config import load_pretrain_config
    from resdet.config import load_config
    from resdet.errors import ConfigError
    from resdet.recipes import find_recipes

    recipe = find_recipes().get(path)
    if recipe is not None:
        return load_config(path, overrides) if recipe.command == "train" else load_pretrain_config(path, overrides)
    try:
        return load_config(path, overrides)
    except ConfigError as error:
        try:
            return load_pretrain_config(path, overrides)
        except ConfigError as other:
            raise min(error, other, key=lambda one: len(one.problems)) from None
