"""Plots of classifiers: error curves of several runs, and responses of the layers of several networks.

python -m resdet.classification.plots RUN [RUN ...] --output FILE.png
"""

from __future__ import annotations

import argparse
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from resdet.commands.run import run_tool
from resdet.errors import UserError
from resdet.files import check_output, written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ErrorCurves:
    """The errors that a run's metrics.jsonl holds: shares of wrong answers in [0, 1]."""

    name: str  # of the run
    train_steps: list[int]  # optimizer steps at the end of each interval that was logged
    train_errors: list[float]  # in that interval, on images as they were augmented
    test_steps: list[int]  # optimizer steps at each evaluation
    test_errors: list[float]  # in that evaluation


def read_curves(run: Path) -> ErrorCurves:
    """Read the errors of a run of resdet pretrain from its folder."""
    path = run / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: must be the log of a run of `resdet pretrain`: {error}") from None
    train = [line for line in lines if line.get("error") is not None]
    test = [line for line in lines if line.get("top1") is not None]
    if not train:
        raise UserError(f"{path}: holds no errors of classification; is it a run of `resdet pretrain`?")
    (train_steps, test_steps) = ([line["step"] for line in part] for part in (train, test))
    train_errors, test_errors = [line["error"] for line in train], [1 - line["top1"] for line in test]
    return ErrorCurves(run.name, train_steps, train_errors, test_steps, test_errors)


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Average each value with those before it, ``window`` of them at most."""
    return [sum(values[max(0, end - window) : end]) / min(end, window) for end in range(1, len(values) + 1)]


def plot_errors(runs: Sequence[ErrorCurves], path: Path, *, window: int = 1, top: float | None = None) -> None:
    """Draw training error (thin) and test error (bold) over steps in percent, as figures 4 and 6 of He et al. 2016.

    The picture's suffix is its format (.png, .svg, .pdf). Training errors are averaged over ``window`` logged
    intervals, each of which is that of a few batches; errors above ``top`` percent are not shown.
    """
    figure = _figure(7, 4.5)
    axes = figure.add_subplot()
    for number, run in enumerate(runs):
        train = [100 * error for error in smoothed(run.train_errors, window)]
        axes.plot(run.train_steps, train, color=f"C{number}", linewidth=0.8, alpha=0.7)
        last = f" ({100 * run.test_errors[-1]:.2f} %)" if run.test_errors else ""
        test = [100 * error for error in run.test_errors]
        axes.plot(run.test_steps, test, color=f"C{number}", linewidth=2, label=f"{run.name}{last}")
    axes.set_xlabel("step")
    axes.set_ylabel("error (%), thin: training, bold: test")
    axes.set_ylim(0, top)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def plot_responses(responses: Mapping[str, Mapping[str, float]], path: str | os.PathLike[str]) -> None:
    """Draw the responses of several networks, in the order of their layers and sorted, as figure 7 of He et al. 2016.

    ``responses`` holds what ``response_deviations`` returns, by each network's name in the legend.
    """
    if not responses:
        raise UserError("plot_responses: got no responses to draw")
    figure = _figure(7.5, 6)
    in_order, by_size = figure.subplots(2, 1, sharey=True)
    for number, (name, deviations) in enumerate(responses.items()):
        # The paper's dashes distinguish plain networks where colours cannot.
        style = "--" if "plain" in name else "-"
        marker = "o" if len(deviations) <= 60 else None
        values = list(deviations.values())
        for axes, ordered in ((in_order, values), (by_size, sorted(values, reverse=True))):
            layers = range(1, len(values) + 1)
            axes.plot(
                layers, ordered, style, label=name, color=f"C{number}", linewidth=1.3, marker=marker, markersize=3
            )
    for axes, order in ((in_order, "from the input on"), (by_size, "sorted by its response")):
        axes.set_xlabel(f"3x3 layer, {order}")
        axes.set_ylabel("standard deviation")
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    in_order.legend(frameon=False)
    _save(figure, Path(path))


def _figure(width: float, height: float) -> Figure:
    """Return a figure made without pyplot, which would choose a display and keep the figure."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots are drawn by matplotlib, which is not installed: pip install 'resdet[plots]'") from None
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def check_plot(path: Path) -> None:
    """Raise a UserError if plots cannot be drawn here, or not in the format that the ending of ``path`` names."""
    kind, kinds = path.suffix.lstrip("."), _figure(1, 1).canvas.get_supported_filetypes()
    if kind not in kinds:
        raise UserError(f"{path}: its ending must be one of {', '.join(sorted(kinds))}; others cannot be written")


def _save(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all."""
    check_plot(path)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lstrip("."))
    with written_whole(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def main(arguments: Sequence[str]) -> None:
    """Draw the plot that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run of resdet pretrain")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the picture: .png, .svg or .pdf")
    parser.add_argument("--window", type=int, default=1, help="logged intervals that training errors are averaged over")
    parser.add_argument("--top", type=float, help="largest error shown, in percent")
    options = parser.parse_args(arguments)
    if options.window < 1:
        raise UserError(f"--window must be at least 1, got {options.window}")
    check_plot(options.output)
    check_output(options.output)
    plot_errors([read_curves(run) for run in options.runs], options.output, window=options.window, top=options.top)


if __name__ == "__main__":
    run_tool(main)
