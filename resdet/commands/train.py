"""Train a detector from a configuration.

resdet train configs/quickstart.yaml
resdet train configs/frcnn_r101_voc.yaml data.train.root=/data/VOCdevkit train.batch_size=4
torchrun --nproc-per-node 8 --no-python resdet train configs/frcnn_r101.yaml
"""

from collections.abc import Sequence

from resdet.commands.run import command_parser, show


def main(arguments: Sequence[str]) -> None:
    """Run ``resdet train``."""
    parser = command_parser("train", __doc__)
    parser.add_argument("config", metavar="CONFIG", help="a YAML file; resdet/config.py documents every key")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, as in optim.lr=0.01")
    options = parser.parse_intermixed_args(arguments)

    from resdet.config import load_config
    from resdet.training.detection import train

    config = load_config(options.config, options.overrides)
    result = train(config)
    numbers = "  ".join(f"{name} {result.metrics[name]:.3f}" for name in ("AP", "AP50", "AP75"))
    metric = config.eval.best_metric
    show(f"{numbers}  (best {metric} {result.best:.3f}) after {result.steps} steps, {result.seconds:.0f} s")
    show(f"run: {result.output_dir}  best detector: {result.output_dir / 'best.pt'}")
