"""Train a classifier from a configuration; its best.pt can be a detector's first weights (model.weights).

    resdet pretrain pretrain_digits_resnet20
    resdet pretrain pretrain_imagenet_resnet50 data.train.root=ILSVRC/train data.val.root=ILSVRC/val
    torchrun --nproc-per-node 8 --no-python resdet pretrain pretrain_imagenet_resnet50

CONFIG is a YAML file or the name of a recipe (resdet recipes lists them). A file of your own starts as a copy of one:

    resdet recipes pretrain_digits_resnet20 > mine.yaml
    resdet pretrain mine.yaml
"""

from collections.abc import Sequence

from resdet.commands.run import command_parser, show


def main(arguments: Sequence[str]) -> None:
    """Run ``resdet pretrain``."""
    from resdet.classification.config import PretrainConfig, load_pretrain_config
    from resdet.config_keys import sections_text

    parser = command_parser(
        "pretrain", f"{__doc__}\n{sections_text(PretrainConfig, 'resdet config --pretrain --keys')}"
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, as in optim.lr=0.01")
    options = parser.parse_intermixed_args(arguments)

    from resdet.classification.task import pretrain

    config = load_pretrain_config(options.config, options.overrides)
    result = pretrain(config)
    numbers = "  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
    metric = config.eval.best_metric
    show(f"{numbers}  (best {metric} {result.best:.4f}) after {result.steps} steps, {result.seconds:.0f} s")
    show(f"run: {result.output_dir}  weights for a detector: model.weights={result.output_dir / 'best.pt'}")
