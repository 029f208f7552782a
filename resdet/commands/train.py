"""Train a detector from a configuration.

    resdet train quickstart
    resdet train finetune data=FOLDER minutes=30
    resdet train frcnn_r101_voc data.train.root=/data/VOCdevkit train.batch_size=4
    resdet train frcnn_r101 data=FOLDER output_dir=runs/mine optim.lr=0.01
    torchrun --nproc-per-node 8 --no-python resdet train frcnn_r101

CONFIG is a YAML file or the name of a recipe (resdet recipes lists them). A file of your own starts as a copy of one:

    resdet recipes frcnn_r101 > mine.yaml
    resdet train mine.yaml

The recipe finetune chooses for your data what you do not state, and ends within its minutes. --plan-only trains
nothing: it writes what was chosen, with the reasons, to standard error, and the configuration to standard output:

    resdet train finetune data=FOLDER minutes=30
    resdet train finetune data=FOLDER minutes=30 --plan-only > mine.yaml
"""

import sys
import time
from collections.abc import Sequence

from resdet.commands.run import command_parser, show
from resdet.errors import printable


def main(arguments: Sequence[str]) -> None:
    """Run ``resdet train``."""
    begun = time.perf_counter()  # before torch is imported, which takes a minute from a cold disk
    from resdet.config import Config, load_config
    from resdet.config_keys import sections_text

    parser = command_parser("train", f"{__doc__}\n{sections_text(Config, 'resdet config --keys')}")
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, as in optim.lr=0.01")
    parser.add_argument("--plan-only", action="store_true", help="only choose what CONFIG leaves open, and show it")
    options = parser.parse_intermixed_args(arguments)

    from resdet.config_reading import config_to_yaml
    from resdet.training.detection import plan_alone, train

    config = load_config(options.config, options.overrides)
    if options.plan_only:
        plan = plan_alone(config)
        sys.stderr.write(printable(plan.text()) + "\n\n")
        show(config_to_yaml(plan.config).rstrip("\n"))
        return
    result = train(config, begun=begun)
    numbers = "  ".join(f"{name} {result.metrics[name]:.3f}" for name in ("AP", "AP50", "AP75"))
    metric = config.eval.best_metric
    show(f"{numbers}  (best {metric} {result.best:.3f}) after {result.steps} steps, {result.seconds:.0f} s")
    show(f"run: {result.output_dir}  best detector: {result.output_dir / 'best.pt'}")
