"""List the recipes that come with resdet, or print one: a start for your own configuration.

    resdet recipes
    resdet recipes frcnn_r101 > mine.yaml
    resdet config frcnn_r101 optim.lr=0.01

A recipe's name is taken where a configuration file is taken: resdet train frcnn_r101. The keys of a configuration are
listed by resdet config --keys.
"""

from collections.abc import Sequence

from resdet.commands.run import command_parser, show
from resdet.recipes import find_recipe, find_recipes


def main(arguments: Sequence[str]) -> None:
    """Run ``resdet recipes``."""
    parser = command_parser("recipes", __doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this recipe")
    options = parser.parse_intermixed_args(arguments)
    if options.name is not None:
        show(find_recipe(options.name).text().rstrip("\n"))
        return
    lines = []
    for command, what in (("train", "detection"), ("pretrain", "classification")):
        lines += [f"{what} (resdet {command} NAME [key=value ...]):"]
        lines += [f"  {name:33}  {one.story}" for name, one in find_recipes().items() if one.command == command]
    show("\n".join(lines))
