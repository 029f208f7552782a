"""Read the frames of a video file, and write pictures as one, both by OpenCV."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from resdet.data.image_files import VIDEO_SUFFIXES
from resdet.errors import UnreadableImageError
from resdet.files import written_whole

logger = logging.getLogger(__name__)

_ASSUMED_RATE = 25.0


@dataclass(frozen=True)
class Frame:
    """Where in a video an image is from."""

    index: int  # from 0, frames that were skipped included
    seconds: float  # from the start, as the file states it


def is_video(source: object) -> bool:
    """Return whether something is the path of a video file, going by its suffix."""
    return isinstance(source, Path) and source.suffix.lower() in VIDEO_SUFFIXES


def read_frames(path: Path, *, every: int = 1, upright: bool = True) -> Iterator[tuple[Frame, npt.NDArray[np.uint8]]]:
    """Yield every ``every``-th frame of a video file, the first one included, as uint8 RGB ``[H, W, 3]``.

    ``upright`` turns frames as the file says, as players do. Reading ends with the first frame that cannot be decoded;
    a warning states how many there were if the file should have more.

    Raises:
        UnreadableImageError: If the file is missing, or no frame of it can be decoded.
    """
    with _opened(path) as capture:
        capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, float(upright))
        index = 0
        while capture.grab():
            seconds = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            if index % every == 0:
                is_decoded, bgr = capture.retrieve()
                if not is_decoded:
                    break
                yield Frame(index, seconds), np.ascontiguousarray(bgr[:, :, ::-1])
            index += 1
        if index == 0:
            raise UnreadableImageError(f"{path}: no frame of this video can be decoded")
        stated = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))  # 0 or less where the file does not say
        if index < stated:
            logger.warning("%s: %d frames could be read, of %d that the file states", path, index, stated)


def frame_rate(path: Path) -> float:
    """Return a video's frames per second; where the file does not say it, 25, which is logged."""
    with _opened(path) as capture:
        rate = float(capture.get(cv2.CAP_PROP_FPS))
    if 0 < rate < 1000:
        return rate
    logger.warning("%s: states no usable frame rate (%g); %g frames per second are assumed", path, rate, _ASSUMED_RATE)
    return _ASSUMED_RATE


@contextmanager
def _opened(path: Path) -> Iterator[cv2.VideoCapture]:
    if not path.is_file():
        raise UnreadableImageError(f"{path}: no such video file")
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    try:
        if not capture.isOpened():
            raise UnreadableImageError(f"{path}: not a readable video ({path.stat().st_size} bytes)")
        yield capture
    finally:
        capture.release()


def write_video(path: Path, pictures: Iterable[npt.NDArray[np.uint8]], rate: float) -> None:
    """Write uint8 RGB pictures ``[H, W, 3]`` as MPEG-4 in an .mp4 file, whole or not at all.

    The first picture sets the size, to which others are scaled; an odd side gets a pixel more, which the format needs.
    An interruption leaves no file, or the one that was there.

    Args:
        path: A name that ends in .mp4.
        pictures: One at least.
        rate: Frames per second; the format has 0.01 at least, which stands for less.

    Raises:
        OSError: If the file cannot be written.
    """
    with written_whole(path) as temporary:
        writer, size, written = cv2.VideoWriter(), None, 0
        try:
            for picture in pictures:
                height, width = picture.shape[:2]
                bgr = cv2.copyMakeBorder(picture[:, :, ::-1], 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
                if size is None:
                    size = bgr.shape[1], bgr.shape[0]
                    writer.open(str(temporary), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"mp4v"), max(rate, 0.01), size)
                # OpenCV drops pictures of another size without a word.
                writer.write(bgr if bgr.shape[1::-1] == size else cv2.resize(bgr, size))
                written += 1
        finally:
            writer.release()
        check = cv2.VideoCapture(str(temporary), cv2.CAP_FFMPEG)
        held = int(check.get(cv2.CAP_PROP_FRAME_COUNT)) if check.isOpened() else 0
        check.release()
        if held < written:  # OpenCV does not report what it cannot write
            raise OSError(5, f"only {held} of {written} frames could be written: is the disk full?", str(path))
