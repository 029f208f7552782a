"""Run ``resdet quantize`` in a checkout: ``python tools/quantize.py --help``."""

from resdet.commands.quantize import main
from resdet.commands.run import run_tool

if __name__ == "__main__":
    run_tool(main)
