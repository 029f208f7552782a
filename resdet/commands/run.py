"""What all tools share: exit codes and logging. 0 done, 2 a user's mistake in readable lines, 1 a fault of ours.

A run that a signal stopped in good order ends with 128 + the signal's number.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence

from resdet.errors import Interrupted, UserError


def run_tool(main: Callable[[Sequence[str]], int | None]) -> None:
    """Run a tool's ``main`` on the command line and leave with its exit code.

    Args:
        main: Takes the arguments without the program's name; gives an exit code, or None for 0.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("resdet").setLevel(logging.INFO)
    try:
        code = main(sys.argv[1:]) or 0
        sys.stdout.flush()
    except UserError as error:
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)  # noqa: T201 - the tools' own output
        code = 2
    except Interrupted as interruption:
        if os.environ.get("RANK", "0") == "0":  # of all processes of a run one is enough
            print(f"{os.path.basename(sys.argv[0])}: {interruption}", file=sys.stderr)  # noqa: T201
        code = interruption.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); Python would complain again while closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
