"""Run ``resdet check`` in a checkout: ``python tools/check_data.py --help``."""

from resdet.commands.check import main
from resdet.commands.run import run_tool

if __name__ == "__main__":
    run_tool(main)
