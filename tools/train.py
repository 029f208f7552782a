"""Run ``resdet train`` in a checkout: ``python tools/train.py --help``."""

from resdet.commands.run import run_tool
from resdet.commands.train import main

if __name__ == "__main__":
    run_tool(main)
