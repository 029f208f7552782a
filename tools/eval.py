"""Judge a detector on a dataset: COCO's numbers (and VOC's AP on VOC data), per class too.

    python tools/eval.py runs/quickstart/best.pt
    python tools/eval.py runs/frcnn_r101/best.pt data.val.images=/coco/val2017 data.val.annotations=/coco/instances.json

The data are those of data.val in the checkpoint's own configuration unless overridden.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from resdet.cli import run_tool


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="best.pt or last.pt of a run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, as in eval.batch_size=4")
    parser.add_argument("--output", type=Path, help="folder for the results (default: eval/ beside the checkpoint)")
    options = parser.parse_args(arguments)

    import resdet
    from resdet.build import build_dataset, config_of_checkpoint
    from resdet.evaluation.write import metrics_table, write_evaluation
    from resdet.training.distributed import choose_device

    config = config_of_checkpoint(options.checkpoint, options.overrides)
    dataset = build_dataset(config.data.val, training=False)
    model = resdet.load_detector(options.checkpoint).to(choose_device(config.train.device))
    evaluation = resdet.evaluate(
        model,
        dataset,
        batch_size=config.eval.batch_size,
        num_workers=config.loader.num_workers,
        precision=config.eval.precision or config.train.precision,
        progress=True,
    )
    output = options.output or options.checkpoint.parent / "eval"
    write_evaluation(output, evaluation, dataset.table)
    print(metrics_table(evaluation))
    print(f"written: {output / 'metrics.json'}, {output / 'detections.json'}")


if __name__ == "__main__":
    run_tool(main)
