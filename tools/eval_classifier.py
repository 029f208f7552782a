"""Run ``resdet eval-classifier`` in a checkout: ``python tools/eval_classifier.py --help``."""

from resdet.commands.eval_classifier import main
from resdet.commands.run import run_tool

if __name__ == "__main__":
    run_tool(main)
