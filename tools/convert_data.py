"""Run ``resdet convert-data`` in a checkout: ``python tools/convert_data.py --help``."""

from resdet.commands.convert_data import main
from resdet.commands.run import run_tool

if __name__ == "__main__":
    run_tool(main)
