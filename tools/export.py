"""Run ``resdet export`` in a checkout: ``python tools/export.py --help``."""

from resdet.commands.export import main
from resdet.commands.run import run_tool

if __name__ == "__main__":
    run_tool(main)
