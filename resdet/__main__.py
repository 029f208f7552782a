"""Run ``resdet`` where its command is not on the path: ``python -m resdet``."""

import sys

from resdet.commands.main import start
from resdet.commands.run import AS_MODULE

if __name__ == "__main__":
    sys.argv[0] = AS_MODULE
    start()
