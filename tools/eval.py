"""Run ``resdet eval`` in a checkout: ``python tools/eval.py --help``."""

from resdet.commands.eval import main
from resdet.commands.run import run_tool

if __name__ == "__main__":
    run_tool(main)
