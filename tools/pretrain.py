"""Run ``resdet pretrain`` in a checkout: ``python tools/pretrain.py --help``."""

from resdet.commands.pretrain import main
from resdet.commands.run import run_tool

if __name__ == "__main__":
    run_tool(main)
