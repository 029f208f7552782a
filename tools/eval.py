"""Judge detectors on a dataset: COCO's numbers and VOC's AP, per class too, and report.html on what they get wrong.

    python tools/eval.py runs/quickstart
    python tools/eval.py runs/frcnn_r101/last.pt data.val.images=/coco/val2017 data.val.annotations=/coco/instances.json
    python tools/eval.py runs/frcnn_r101 eval.tricks.refine=1 eval.tricks.voting=0.8 eval.tricks.flip=true
    python tools/eval.py runs/short runs/long --output comparison

A run's folder stands for its best.pt. The data are those of data.val in each checkpoint's own configuration unless
overridden; several runs must have the same, and come side by side into one report.html.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from resdet.commands.run import run_tool
from resdet.errors import UserError


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [-h] [--output OUTPUT] RUN [RUN ...] [key=value ...]",
    )
    parser.add_argument(
        "arguments",
        nargs="+",
        metavar="RUN | key=value",
        help="runs' folders or checkpoints (best.pt, last.pt), and dotted keys, as in eval.batch_size=4",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for the results (default: eval/ beside the checkpoint; of several runs, eval/ in the current "
        "folder, with a folder for each run's numbers)",
    )
    options = parser.parse_intermixed_args(arguments)
    # A folder may well be called lr=0.01.
    overrides = [text for text in options.arguments if "=" in text and not Path(text).exists()]
    paths = [Path(text) for text in options.arguments if text not in overrides]
    if not paths:
        parser.error("give at least one RUN: a run's folder or a checkpoint")
    checkpoints = [path / "best.pt" if path.is_dir() else path for path in paths]
    names = name_runs(checkpoints)

    import resdet
    from resdet.build import build_dataset, config_of_checkpoint
    from resdet.config import config_to_plain
    from resdet.evaluation.report import ReportedRun, check_same_ground_truth, read_log, write_report
    from resdet.evaluation.write import metrics_table, write_evaluation
    from resdet.processes import choose_device

    configs = [config_of_checkpoint(checkpoint, overrides) for checkpoint in checkpoints]
    datasets = [build_dataset(config.data.val, training=False) for config in configs]
    check_same_ground_truth([(name, dataset.table) for name, dataset in zip(names, datasets, strict=True)])
    dataset = datasets[0]
    output = options.output or (checkpoints[0].parent / "eval" if len(paths) == 1 else Path("eval"))
    runs = []
    for name, checkpoint, config in zip(names, checkpoints, configs, strict=True):
        model = resdet.load_detector(checkpoint).to(choose_device(config.train.device))
        settings = resdet.InferenceSettings(
            batch_size=config.eval.batch_size,
            num_workers=config.loader.num_workers,
            precision=config.eval.precision or config.train.precision,
            tricks=config.eval.tricks,
            progress=True,
        )
        evaluation = resdet.evaluate(model, dataset, settings)
        folder = output if len(paths) == 1 else output / name
        write_evaluation(folder, evaluation, dataset.table)
        runs.append(ReportedRun(name, evaluation, config_to_plain(config), read_log(checkpoint.parent)))
        print(f"{name}\n{metrics_table(evaluation)}" if len(paths) > 1 else metrics_table(evaluation))
        print(f"written: {folder / 'metrics.json'}, {folder / 'detections.json'}")
    write_report(output / "report.html", dataset, runs)
    print(f"written: {output / 'report.html'}")


def name_runs(checkpoints: Sequence[Path]) -> list[str]:
    """Name each run by its folder, by its checkpoint too where a folder comes twice, and by number if need be."""
    files = [checkpoint.resolve() for checkpoint in checkpoints]
    twice = [str(file) for file, count in Counter(files).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]}: given twice")
    names = [file.parent.name for file in files]
    names = [name if names.count(name) == 1 else f"{name}_{file.stem}" for name, file in zip(names, files, strict=True)]
    return [name if names.count(name) == 1 else f"{number}_{name}" for number, name in enumerate(names, start=1)]


if __name__ == "__main__":
    run_tool(main)
