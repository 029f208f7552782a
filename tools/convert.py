"""Run ``resdet convert`` in a checkout: ``python tools/convert.py --help``."""

from resdet.commands.convert import main
from resdet.commands.run import run_tool

if __name__ == "__main__":
    run_tool(main)
