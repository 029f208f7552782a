"""Run ``resdet predict`` in a checkout: ``python tools/predict.py --help``."""

from resdet.commands.predict import main
from resdet.commands.run import run_tool

if __name__ == "__main__":
    run_tool(main)
