"""Write what a detector finds in files: pictures, videos, COCO's JSON and YOLO's labels."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from resdet.data.sources import Source, find_sources, source_name
from resdet.data.video import frame_rate, is_video, write_video
from resdet.drawing import is_drawing, picture_names, save_picture
from resdet.errors import DataError, UserError, printable_name
from resdet.evaluation.settings import InferenceSettings
from resdet.files import check_outputs, make_output_folder, write_text, written_whole
from resdet.prediction import Model, predict_each
from resdet.result import Result, coco_entries

Output = Literal["pictures", "coco", "yolo"]
"""What ``predict_files`` can write."""

DETECTIONS, CLASSES = "detections.json", "classes.txt"
_NO_PIXELS = np.zeros((0, 0, 3), dtype=np.uint8)


@dataclass(frozen=True)
class PredictionReport:
    """What ``predict_files`` has done."""

    num_images: int
    num_frames: dict[Path | str, int]  # of each video, those that were looked at
    num_detections: int
    unreadable: dict[Path | str, DataError]  # the files that were left out, and why


def predict_files(
    model: Model,
    images: Source | Iterable[Source],
    output_dir: str | os.PathLike[str],
    settings: InferenceSettings = InferenceSettings(),
    *,
    save: Collection[Output] = ("pictures", "coco"),
    every: int = 1,
    score_threshold: float | None = None,
    stored_pixels: bool = False,
) -> PredictionReport:
    """Detect objects in image and video files, and write what was found into a folder, which is created.

    Each file is taken once; those that cannot be read are left out and reported. Outputs are named after their inputs,
    with a number where two would have the same name. ``save`` is one or more of

    * "pictures": ``NAME.png`` with the boxes of at least ``score_threshold``, small images enlarged; of a video
      ``NAME.mp4``, with the frames that ``every`` leaves, at the speed of the original;
    * "coco": ``detections.json`` with every detection of all files, as ``coco_entries`` yields them;
    * "yolo": ``labels/NAME.txt`` (of a video ``labels/NAME/FRAME.txt``) with the detections of at least
      ``score_threshold``, and ``classes.txt`` with the classes' names: labels to correct and train on.

    ``score_threshold`` is by default that of the best F1 in the model's last evaluation, 0.5 before any; other
    arguments are those of ``predict_each``.

    Outputs of an earlier call are replaced, but no input and no label file; and in a folder that holds an input, no
    picture that this function has not drawn. A UserError says so before anything is written. Other errors are those of
    ``predict_each``, and OSErrors; what was written before stays.
    """
    if unknown := sorted(set(save) - set(get_args(Output))):
        raise UserError(f"save: must be among {', '.join(get_args(Output))}, got {', '.join(map(repr, unknown))}")
    folder, found = Path(output_dir), {path: list[Result]() for path in _paths(images)}  # results without pixels
    names = dict(zip(found, picture_names(map(source_name, found)), strict=True))
    pictures = {path: folder / f"{name}{'.mp4' if is_video(path) else '.png'}" for path, name in names.items()}
    # The frames of a video have a folder, so that none takes the name of an image.
    labels = {path: folder / "labels" / f"{name}{'' if is_video(path) else '.txt'}" for path, name in names.items()}
    outputs = {"pictures": pictures.values(), "coco": [folder / DETECTIONS], "yolo": [folder / CLASSES]}
    _check_outputs(folder, {key: outputs[key] for key in save}, labels.values(), list(found))
    unreadable: dict[Path | str, DataError] = {}

    def results() -> Iterator[Result]:
        for result in predict_each(
            model, list(found), settings, every=every, stored_pixels=stored_pixels, on_unreadable=unreadable.__setitem__
        ):
            assert result.path is not None
            found[result.path].append(replace(result, image=_NO_PIXELS))
            shown = result if score_threshold is None else replace(result, shown_from=score_threshold)
            if "yolo" in save:
                _write_label(labels[result.path], shown)
            yield shown

    for path, group in itertools.groupby(results(), key=lambda result: result.path):
        drawn = (np.asarray(result.draw()) for result in group)
        if isinstance(path, Path) and is_video(path) and "pictures" in save:
            write_video(pictures[path], drawn, frame_rate(path) / every)
        elif path is not None and "pictures" in save:
            save_picture(pictures[path], next(drawn))
    # An unreadable file has a number too, so that the others' are their positions.
    in_order: list[Result | None] = [result for group in found.values() for result in group or (None,)]
    if "coco" in save:
        _write_json(folder / DETECTIONS, in_order)
    if "yolo" in save:
        categories = next((result.categories for result in in_order if result is not None), ())
        write_text(folder / CLASSES, "".join(f"{printable_name(category.name)}\n" for category in categories))
    counts = {path: len(results) for path, results in found.items() if results}
    return PredictionReport(
        num_images=sum(not is_video(path) for path in counts),
        num_frames={path: count for path, count in counts.items() if is_video(path)},
        num_detections=sum(len(result) for result in in_order if result is not None),
        unreadable=unreadable,
    )


def _paths(images: Source | Iterable[Source]) -> list[Path | str]:
    """Return the files and URLs that images are, each once."""
    paths: dict[Path | str, None] = {}
    for one in find_sources(images):
        if one.path is None:
            raise UserError(f"{one.where}: results are named after files: expected a path or a URL")
        paths[one.path] = None
    return list(paths)


def _check_outputs(
    folder: Path, outputs: Mapping[Output, Collection[Path]], labels: Collection[Path], sources: Sequence[Path | str]
) -> None:
    make_output_folder(folder)
    inputs = [source for source in sources if isinstance(source, Path)]
    check_outputs(itertools.chain.from_iterable(outputs.values()), inputs)
    if folder.resolve() in {parent.resolve() for parent in {file.parent for file in inputs}}:
        for picture in outputs.get("pictures", ()):
            if picture.exists() and not is_drawing(picture):
                raise UserError(f"{picture}: would be replaced by a picture of detections; give another output folder")
    if "yolo" in outputs:
        make_output_folder(folder / "labels")
        for label in labels:
            if label.exists():
                raise UserError(f"{label}: exists, and labels are never replaced; give another output folder")


def _write_label(path: Path, result: Result) -> None:
    if result.frame is not None:
        path.mkdir(exist_ok=True)
        path /= f"{result.frame.index:06d}.txt"
    write_text(path, result.above(result.shown_from).to_yolo())


def _write_json(path: Path, results: Sequence[Result | None]) -> None:
    with written_whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        before = "["
        for entry in coco_entries(results):  # those of a long video together may not fit into memory
            file.write(before + json.dumps(entry))
            before = ", "
        file.write("]\n" if before == ", " else "[]\n")
