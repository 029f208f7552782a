"""Train a classifier from a configuration; its best.pt can be a detector's first weights (model.weights).

resdet pretrain configs/pretrain_digits_resnet20.yaml
resdet pretrain configs/pretrain_imagenet_resnet50.yaml data.train.root=ILSVRC/train data.val.root=ILSVRC/val
torchrun --nproc-per-node 8 --no-python resdet pretrain configs/pretrain_imagenet_resnet50.yaml
"""

from collections.abc import Sequence

from resdet.commands.run import command_parser, show


def main(arguments: Sequence[str]) -> None:
    """Run ``resdet pretrain``."""
    parser = command_parser("pretrain", __doc__)
    parser.add_argument(
        "config", metavar="CONFIG", help="a YAML file; resdet/classification/config.py documents every key"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, as in optim.lr=0.01")
    options = parser.parse_intermixed_args(arguments)

    from resdet.classification.config import load_pretrain_config
    from resdet.classification.task import pretrain

    config = load_pretrain_config(options.config, options.overrides)
    result = pretrain(config)
    numbers = "  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
    metric = config.eval.best_metric
    show(f"{numbers}  (best {metric} {result.best:.4f}) after {result.steps} steps, {result.seconds:.0f} s")
    show(f"run: {result.output_dir}  weights for a detector: model.weights={result.output_dir / 'best.pt'}")
