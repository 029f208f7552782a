"""What image files turn out to be when every one of them is decoded, and which of them show the same picture."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from resdet.data.images import ImageHeader, read_header, read_image
from resdet.errors import DataError

NEAR_BITS = 48
"""Of the 256 bits of two perceptual hashes, how many may differ in pictures taken for the same. Photographs saved again
at JPEG quality 40, halved or enlarged differed in 46 at most, different ones in 65 at least (30 each of COCO, VOC and
BCCD)."""

NEAR_GRAY = 4.0
"""How many of 256 gray levels two thumbnails of the same picture may differ, on average: the same ones differed by 1.5
at most, different ones, blood cells under one microscope, by 14 at least."""

_SIDE = 16
_FLAT = 4.0
# How many images a process takes at a time, and how many rows of distances are held at a time.
_CHUNK = 16
_BLOCK = 2048


@dataclass(frozen=True)
class ImageFacts:
    """One image file.

    Attributes:
        path: The file.
        error: Why it cannot be read, or empty.
        header: What it says of itself; None if it cannot be read.
        digest: Hash of the decoded pixels and their shape; empty if it cannot be read.
        thumbnail: Its gray version of 16 x 17 pixels as bytes; empty if it cannot be read.
    """

    path: str
    error: str = ""
    header: ImageHeader | None = None
    digest: bytes = b""
    thumbnail: bytes = b""


def image_facts(path: str) -> ImageFacts:
    """Decode an image file as training does; whatever is wrong with it becomes ``error``."""
    try:
        header = read_header(Path(path))
        pixels = read_image(Path(path))
    except DataError as error:
        return ImageFacts(path, error=str(error))
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    digest.update(pixels.data)
    gray = Image.fromarray(pixels).convert("L")
    thumbnail = gray.resize((_SIDE + 1, _SIDE), Image.Resampling.BOX)
    return ImageFacts(path, "", header, digest.digest(), thumbnail.tobytes())


def all_image_facts(paths: Sequence[str], *, num_workers: int, progress: bool) -> dict[str, ImageFacts]:
    """Decode many image files, in several processes.

    Args:
        paths: The files.
        num_workers: Processes; 0 works in this one.
        progress: Show a bar on stderr.
    """
    with tqdm(total=len(paths), desc="images", unit="image", disable=not progress, leave=False) as bar:
        facts = {}
        for found in _in_processes(paths, num_workers) if num_workers else map(image_facts, paths):
            facts[found.path] = found
            bar.update()
    return facts


def _in_processes(paths: Sequence[str], num_workers: int) -> Iterator[ImageFacts]:
    num_done = 0
    try:
        with ProcessPoolExecutor(num_workers) as pool:
            for found in pool.map(image_facts, paths, chunksize=_CHUNK):
                num_done += 1
                yield found
        return
    except BrokenProcessPool:
        suspects = paths[num_done : num_done + _CHUNK * (2 * num_workers + 1)]
    # A decoder has taken its process down. Which image it was is found with a process for each.
    for path in suspects:
        try:
            with ProcessPoolExecutor(1) as pool:
                yield pool.submit(image_facts, path).result()
        except BrokenProcessPool:
            yield ImageFacts(path, error=f"{path}: cannot be decoded: it ends the process that tries")
    yield from _in_processes(paths[num_done + len(suspects) :], num_workers)


def default_num_workers() -> int:
    """Give the processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def near_duplicates(facts: Sequence[ImageFacts]) -> list[tuple[int, int]]:
    """Find pairs of pictures that are the same but for scale and compression.

    The hash of a picture has one bit for each pair of neighbours in a row of its thumbnail: whether the left one is
    brighter. Two pictures are near duplicates if at most ``NEAR_BITS`` of the 256 bits differ, their thumbnails differ
    by at most ``NEAR_GRAY`` on average, and their sides have the same ratio within 5 %. Pictures without contrast (a
    deviation below 4 gray levels) are left out. Mirrored, cropped and recoloured pictures are not found.

    Args:
        facts: Readable images.

    Returns:
        Pairs ``(i, j)``, ``i < j``, of positions in ``facts``; pairs of equal digests are not among them.

    Source: the difference hash, https://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html, with
        16 x 16 bits in place of 8 x 8.
    """
    thumbnails = b"".join(of_file.thumbnail for of_file in facts)
    grays = np.frombuffer(thumbnails, dtype=np.uint8).reshape(len(facts), _SIDE, _SIDE + 1).astype(np.float32)
    usable = np.flatnonzero(grays.std(axis=(1, 2)) >= _FLAT)
    grays = grays[usable]
    signs = np.where(grays[:, :, :-1] > grays[:, :, 1:], 1, -1).reshape(len(usable), _SIDE**2).astype(np.float32)
    headers = [facts[i].header for i in usable.tolist()]
    sides = np.array([(0, 0) if header is None else header.size for header in headers], dtype=np.float64)
    pairs = []
    for start in range(0, len(usable), _BLOCK):
        for other in range(start, len(usable), _BLOCK):
            agreement = signs[start : start + _BLOCK] @ signs[other : other + _BLOCK].T
            rows, columns = np.nonzero(agreement >= signs.shape[1] - 2 * NEAR_BITS)
            for i, j in zip((rows + start).tolist(), (columns + other).tolist(), strict=True):
                first, second = facts[usable[i]], facts[usable[j]]
                if i < j and first.digest != second.digest and _alike(grays[i], grays[j], sides[i], sides[j]):
                    pairs.append((int(usable[i]), int(usable[j])))
    return pairs


def _alike(
    gray: npt.NDArray[np.float32],
    other: npt.NDArray[np.float32],
    size: npt.NDArray[np.float64],
    other_size: npt.NDArray[np.float64],
) -> bool:
    ratio = (size[0] / size[1]) / (other_size[0] / other_size[1])
    return bool(1 / 1.05 <= ratio <= 1.05 and np.abs(gray - other).mean() <= NEAR_GRAY)
