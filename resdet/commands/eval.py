"""Evaluate detectors on a dataset: COCO's metrics, VOC's AP, both per class, and report.html with their errors.

    resdet eval runs/quickstart
    resdet eval runs/frcnn_r101/last.pt data.val.images=/coco/val2017 data.val.annotations=/coco/instances.json
    resdet eval runs/frcnn_r101 eval.tricks.refine=1 eval.tricks.voting=0.8 eval.tricks.flip=true
    resdet eval runs/short runs/long --output comparison

RUN is a run's folder, which stands for its best.pt, or a checkpoint. The dataset is data.val of each checkpoint's own
configuration unless overridden. A published detector (resdet weights) has none: give all of data.val. Several runs must
share one dataset; report.html shows them side by side.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from resdet.commands.run import checkpoint_in, command_parser, show
from resdet.errors import UserError
from resdet.weights.zoo import find_published


def main(arguments: Sequence[str]) -> None:
    """Run ``resdet eval``."""
    parser = command_parser("eval", __doc__, arguments="[-h] [--output OUTPUT] RUN [RUN ...] [key=value ...]")
    parser.add_argument(
        "arguments",
        nargs="+",
        metavar="RUN | key=value",
        help="folders of runs or checkpoints (best.pt, last.pt), and dotted keys, as in eval.batch_size=4",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for the results (default: eval/ in the checkpoint's folder; for several runs, eval/ in the "
        "current folder, with one subfolder per run)",
    )
    options = parser.parse_intermixed_args(arguments)
    # A folder may be called lr=0.01, and an address may hold a "=".
    paths = [text for text in options.arguments if not re.match(r"[^=:]*=", text) or os.path.exists(text)]
    overrides = [text for text in options.arguments if text not in paths]
    if not paths:
        parser.error("give at least one RUN: a run's folder or a checkpoint")
    checkpoints = [checkpoint_in(path) for path in paths]
    names = name_runs(checkpoints)

    from resdet.build import annotation_files, build_val_set, config_of_checkpoint, inference_settings
    from resdet.config import HeldOut
    from resdet.config_reading import config_to_plain
    from resdet.data.split import check_lists
    from resdet.evaluation.detect import evaluate
    from resdet.evaluation.inference import device_for
    from resdet.evaluation.labels import with_model_classes
    from resdet.evaluation.report import write_report
    from resdet.evaluation.report_runs import ReportedRun, check_same_ground_truth, read_log, read_plan
    from resdet.evaluation.write import EVALUATION_FILES, metrics_table, write_evaluation
    from resdet.files import check_outputs, make_output_folder
    from resdet.models.checkpoint import load_detector
    from resdet.weights.files import read_weights

    files = [read_weights(checkpoint) for checkpoint in checkpoints]
    configs = [config_of_checkpoint(file, overrides) for file in files]
    is_own = len(paths) == 1 and Path(paths[0]).exists()  # and no download
    output = options.output or (checkpoints[0].parent / "eval" if is_own else Path("eval"))
    folders = [output] if len(paths) == 1 else [output / name for name in names]
    for folder in folders:
        make_output_folder(folder)
    outputs = [output / "report.html", *(folder / name for folder in folders for name in EVALUATION_FILES)]
    inputs = [file for config in configs for file in annotation_files(config)]
    check_outputs(outputs, [*checkpoints, *inputs])
    logs = [read_log(file.path.parent) for file in files]
    datasets = [build_val_set(config) for config in configs]
    for file, config, dataset in zip(files, configs, datasets, strict=True):
        # Images of another dataset may have the same names.
        if isinstance(config.data.val, HeldOut) and config.data.train == config_of_checkpoint(file).data.train:
            check_lists(file.path.parent, None, dataset.table)
    check_same_ground_truth([(name, dataset.table) for name, dataset in zip(names, datasets, strict=True)])
    dataset = datasets[0]
    runs: list[ReportedRun] = []
    for name, file, config, log, folder in zip(names, files, configs, logs, folders, strict=True):
        model = load_detector(file)
        settings = inference_settings(config, device=device_for(model, config.train.device), progress=True)
        judged = with_model_classes(model, dataset)
        if runs and judged.categories != dataset.categories:
            raise UserError(f"{name}: its classes are not those of {names[0]}; one report cannot show both")
        dataset = judged
        evaluation = evaluate(model, dataset, settings)
        if config.eval.reference:
            evaluation = evaluation.with_reference(dataset.table)
        write_evaluation(folder, evaluation, dataset.table)
        plan = read_plan(file.path.parent)
        runs.append(ReportedRun(name, evaluation, config_to_plain(config), log, plan))
        written = ", ".join(str(folder / file_name) for file_name in EVALUATION_FILES)
        # What stdout refuses (a full disk) it refuses again at the end, when all files are written.
        with suppress(OSError):
            show("\n".join([*([name] if len(paths) > 1 else []), metrics_table(evaluation), f"written: {written}"]))
    write_report(output / "report.html", dataset, runs)
    show(f"written: {output / 'report.html'}")
    for run, folder in zip(runs, folders, strict=True):
        if run.evaluation.reference is not None:
            run.evaluation.reference.check(str(folder / "metrics.json"))


def name_runs(checkpoints: Sequence[Path]) -> list[str]:
    """Return a distinct name for each run: its folder, with the checkpoint where folders repeat, or with a number."""
    files = [checkpoint.resolve() for checkpoint in checkpoints]
    twice = [str(file) for file, count in Counter(files).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]}: given twice")
    published = [find_published(file.name) for file in files]
    names = [one.name if one else file.parent.name for one, file in zip(published, files, strict=True)]
    names = [
        name if _is_single(name, names) else f"{name}_{file.stem}" for name, file in zip(names, files, strict=True)
    ]
    return [name if _is_single(name, names) else f"{number}_{name}" for number, name in enumerate(names, start=1)]


def _is_single(name: str, names: Sequence[str]) -> bool:
    # Names are those of folders, and some file systems ignore case.
    return [other.casefold() for other in names].count(name.casefold()) == 1
