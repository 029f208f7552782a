"""The subcommands of ``resdet``, one module each, with ``main(arguments) -> int | None``.

``tools/NAME.py`` is the door to the same function in a checkout. A module here imports only what is light: libraries
that take seconds to import (torch first) are imported inside ``main``, after the arguments have been parsed, so that
``--help`` and a mistyped option are answered at once. This is the package's one exception to imports at the top of a
file, and ``tests/import_rules.py`` knows it.
"""

COMMANDS = (
    *("train", "eval", "predict", "export", "check", "convert", "convert-data", "quantize"),
    *("pretrain", "eval-classifier", "describe", "recipes", "weights", "config", "benchmark"),
)
"""The subcommands in the order of ``resdet --help``; each is the module of its name, whose docstring begins with what
it does."""
