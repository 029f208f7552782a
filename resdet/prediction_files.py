"""Write what a detector finds in files: pictures, videos, COCO's JSON and YOLO's labels."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
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

    Each file is taken once. Those that cannot be read are left out and reported. Outputs are named after their inputs,
    with a number where two would have the same name (``picture_names``). ``save`` is one or more of

    * "pictures": ``NAME.png`` with the boxes of at least ``score_threshold``, small images enlarged; of a video
      ``NAME.mp4``, with the frames that ``every`` leaves, at the speed of the original;
    * "coco": ``detections.json`` with every detection of all files (``to_coco_json``);
    * "yolo": ``labels/NAME.txt`` (of a video ``labels/NAME/FRAME.txt``) with the detections of at least
      ``score_threshold``, and ``classes.txt`` with the classes' names: labels to correct and train on.

    Outputs of an earlier call are replaced, but no input and no label file; and in a folder that holds an input, no
    picture that this function has not drawn. A UserError says so before anything is written. Other errors are those of
    ``predict_each``, and OSErrors; what was written before stays.

    Args:
        model: As for ``predict``.
        images: Paths and URLs, as for ``predict_each``.
        output_dir: The folder.
        settings: As for ``predict``.
        save: What to write.
        every: As for ``predict_each``.
        score_threshold: The score from which detections are drawn and labels written; by default that of the best F1 in
            the model's last evaluation, 0.5 before any.
        stored_pixels: As for ``predict_each``.
    """
    if unknown := sorted(set(save) - set(get_args(Output))):
        raise UserError(f"save: must be among {', '.join(get_args(Output))}, got {', '.join(map(repr, unknown))}")
    outputs = _Outputs(Path(output_dir), _paths(images), save)
    found: dict[Path | str, list[Result]] = {source: [] for source in outputs.sources}  # without pixels
    unreadable: dict[Path | str, DataError] = {}

    def results() -> Iterator[Result]:
        for result in predict_each(
            model,
            outputs.sources,
            settings,
            every=every,
            stored_pixels=stored_pixels,
            on_unreadable=unreadable.__setitem__,
        ):
            assert result.path is not None
            found[result.path].append(replace(result, image=_NO_PIXELS))
            yield result if score_threshold is None else replace(result, shown_from=score_threshold)

    for source, group in itertools.groupby(results(), key=lambda result: result.path):
        assert source is not None
        outputs.write(source, group, every)
    # An unreadable file has a number too, so that those of the others are their positions.
    in_order: list[Result | None] = [result for source in outputs.sources for result in found[source] or (None,)]
    outputs.finish(in_order)
    return PredictionReport(
        num_images=sum(len(found[source]) for source in outputs.sources if not is_video(source)),
        num_frames={source: len(found[source]) for source in outputs.sources if is_video(source) and found[source]},
        num_detections=sum(len(result) for result in in_order if result is not None),
        unreadable=unreadable,
    )


def _paths(images: Source | Iterable[Source]) -> list[Path | str]:
    """Return the files and URLs that images are, each once."""
    paths: dict[Path | str, None] = {}
    for entry in find_sources(images):
        if entry.path is None:
            raise UserError(f"{entry.where}: results are named after files: expected a path or a URL")
        paths[entry.path] = None
    return list(paths)


class _Outputs:
    """The files that ``predict_files`` writes; a UserError if one is in the way."""

    def __init__(self, folder: Path, sources: Sequence[Path | str], save: Collection[Output]) -> None:
        self.folder, self.sources, self._save = folder, sources, save
        names = dict(zip(sources, picture_names(map(source_name, sources)), strict=True))
        self._pictures = {one: folder / f"{name}{'.mp4' if is_video(one) else '.png'}" for one, name in names.items()}
        # A video's is a folder, so that no frame takes the name of an image.
        self._labels = {
            one: folder / "labels" / (name if is_video(one) else f"{name}.txt") for one, name in names.items()
        }
        self._check()

    def _check(self) -> None:
        make_output_folder(self.folder)
        inputs = [source for source in self.sources if isinstance(source, Path)]
        pictures = self._pictures.values() if "pictures" in self._save else ()
        texts = [self.folder / name for name, what in ((DETECTIONS, "coco"), (CLASSES, "yolo")) if what in self._save]
        check_outputs([*pictures, *texts], inputs)
        if self.folder.resolve() in {folder.resolve() for folder in {file.parent for file in inputs}}:
            for picture in pictures:
                if picture.exists() and not is_drawing(picture):
                    what = "replaced by a picture of detections"
                    raise UserError(f"{picture}: would be {what}; give another output folder")
        if "yolo" in self._save:
            make_output_folder(self.folder / "labels")
            for label in self._labels.values():
                if label.exists():
                    raise UserError(f"{label}: labels exist and may be somebody's work; give another output folder")

    def write(self, source: Path | str, results: Iterator[Result], every: int) -> None:
        """Write the picture and the labels of an image, or those of a video's frames."""
        if "yolo" in self._save:
            results = map(self._labelled, results)
        if "pictures" in self._save and isinstance(source, Path) and is_video(source):
            write_video(self._pictures[source], (result.picture() for result in results), frame_rate(source) / every)
            return
        for result in results:
            if "pictures" in self._save:
                save_picture(self._pictures[source], result.picture())

    def _labelled(self, result: Result) -> Result:
        assert result.path is not None
        file = self._labels[result.path]
        if result.frame is not None:
            file.mkdir(exist_ok=True)
            file /= f"{result.frame.index:06d}.txt"
        write_text(file, result.above(result.shown_from).to_yolo())
        return result

    def finish(self, results: Sequence[Result | None]) -> None:
        """Write the files that are for all images together."""
        if "coco" in self._save:
            with written_whole(self.folder / DETECTIONS) as temporary, temporary.open("w", encoding="utf-8") as file:
                # One by one: of a long video they may fill the memory.
                for number, entry in enumerate(coco_entries(results)):
                    file.write((", " if number else "[") + json.dumps(entry))
                file.write("]\n" if any(results) else "[]\n")
        if "yolo" in self._save:
            categories = next((result.categories for result in results if result is not None), ())
            write_text(self.folder / CLASSES, "".join(f"{printable_name(category.name)}\n" for category in categories))
