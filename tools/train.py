"""Train a detector as a configuration says.

python tools/train.py configs/quickstart.yaml
python tools/train.py configs/frcnn_r101_voc.yaml data.train.root=/data/VOCdevkit train.batch_size=4
torchrun --nproc-per-node 8 tools/train.py configs/frcnn_r101.yaml
"""

import argparse
from collections.abc import Sequence

from resdet.commands.run import run_tool


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", help="a YAML file; resdet/config.py documents every key")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, as in optim.lr=0.01")
    options = parser.parse_args(arguments)

    import resdet

    config = resdet.load_config(options.config, options.overrides)
    result = resdet.train(config)
    numbers = "  ".join(f"{name} {result.metrics[name]:.3f}" for name in ("AP", "AP50", "AP75"))
    metric = config.eval.best_metric
    print(f"{numbers}  (best {metric} {result.best:.3f}) after {result.steps} steps, {result.seconds:.0f} s")
    print(f"run: {result.output_dir}  best detector: {result.output_dir / 'best.pt'}")


if __name__ == "__main__":
    run_tool(main)
