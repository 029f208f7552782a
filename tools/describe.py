"""Run ``resdet describe`` in a checkout: ``python tools/describe.py --help``."""

from resdet.commands.describe import main
from resdet.commands.run import run_tool

if __name__ == "__main__":
    run_tool(main)
