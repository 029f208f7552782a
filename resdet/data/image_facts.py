"""What image files hold once they are decoded, and which of them show nearly the same picture."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from resdet.data.images import ImageHeader, read_header, read_image
from resdet.errors import DataError

THUMBNAIL_SIZE = (16, 17)
"""``(height, width)``: each row has 16 pairs of neighbours."""

_CHUNK = 16  # images that a process takes at a time

NEAR_BITS = 48
"""Of the 256 bits of two perceptual hashes, how many may differ between near duplicates. Photographs saved again at
JPEG quality 40, halved or enlarged differed in at most 46, different ones in at least 65 (30 each of COCO, VOC and
BCCD)."""

NEAR_GRAY = 4.0
"""Of 256 gray levels, by how many two thumbnails of the same picture may differ on average. The same pictures differed
by at most 1.5; different ones, blood cells under one microscope, by at least 14."""

_FLAT = 4.0  # standard deviation in gray levels below which a picture has no contrast
_BLOCK = 2048  # rows of distances that are held at a time


@dataclass(frozen=True)
class ImageFacts:
    """What decoding an image file gave: an error, or all but that."""

    path: str
    error: str = ""
    header: ImageHeader | None = None
    digest: bytes = b""  # of the decoded pixels and their shape
    thumbnail: bytes = b""  # gray levels, THUMBNAIL_SIZE


def image_facts(path: str) -> ImageFacts:
    """Decode an image file as training does; an exception becomes ``error``."""
    try:
        header = read_header(Path(path))
        pixels = read_image(Path(path))
    except DataError as error:
        return ImageFacts(path, error=str(error))
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    digest.update(pixels.data)
    gray = Image.fromarray(pixels).convert("L")
    thumbnail = gray.resize(THUMBNAIL_SIZE[::-1], Image.Resampling.BOX)
    return ImageFacts(path, "", header, digest.digest(), thumbnail.tobytes())


def all_image_facts(paths: Sequence[str], *, num_workers: int, progress: bool) -> dict[str, ImageFacts]:
    """Decode image files in ``num_workers`` processes (0: in this one), and return what was found by path."""
    found = _in_processes(paths, num_workers) if num_workers else map(image_facts, paths)
    bar = tqdm(found, total=len(paths), desc="images", unit="image", disable=not progress, leave=False)
    return {facts.path: facts for facts in bar}


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
    # A decoder has crashed its process. One process for each image finds which image it was.
    for path in suspects:
        try:
            with ProcessPoolExecutor(1) as pool:
                yield pool.submit(image_facts, path).result()
        except BrokenProcessPool:
            yield ImageFacts(path, error=f"{path}: cannot be decoded: the decoder crashes")
    yield from _in_processes(paths[num_done + len(suspects) :], num_workers)


def default_num_workers() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def near_duplicates(facts: Sequence[ImageFacts]) -> list[tuple[int, int]]:
    """Find pairs ``(i, j)``, ``i < j``, of readable images that differ only in scale and compression.

    The hash of a picture has one bit for each pair of neighbours in a row of its thumbnail: whether the left one is
    brighter. Two pictures are near duplicates if at most ``NEAR_BITS`` of the 256 bits differ, their thumbnails differ
    by at most ``NEAR_GRAY`` on average, and their aspect ratios agree within 5 %. Pictures without contrast (a
    deviation below 4 gray levels) and pairs with the same pixels are left out. Mirrored, cropped and recoloured
    pictures are not found.

    Source: the difference hash, https://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html, with
        16 x 16 bits in place of 8 x 8.
    """
    thumbnails = b"".join(of_file.thumbnail for of_file in facts)
    grays = np.frombuffer(thumbnails, dtype=np.uint8).reshape(len(facts), *THUMBNAIL_SIZE).astype(np.float32)
    usable = np.flatnonzero(grays.std(axis=(1, 2)) >= _FLAT)
    grays = grays[usable]
    signs = np.where(grays[:, :, :-1] > grays[:, :, 1:], 1, -1).reshape(len(usable), 256).astype(np.float32)
    sizes = [header.size for header in (facts[i].header for i in usable.tolist()) if header is not None]
    aspects = [height / width for height, width in sizes]
    pairs = []
    for start in range(0, len(usable), _BLOCK):
        for other in range(start, len(usable), _BLOCK):
            # [rows, columns]: bits that agree less bits that differ, which is 256 - 2 * differing bits
            agreement = signs[start : start + _BLOCK] @ signs[other : other + _BLOCK].T
            near = np.triu(agreement >= signs.shape[1] - 2 * NEAR_BITS, k=start - other + 1)  # each pair once: i < j
            for i, j in (np.argwhere(near) + np.array([start, other])).tolist():
                alike = 1 / 1.05 <= aspects[i] / aspects[j] <= 1.05 and np.abs(grays[i] - grays[j]).mean() <= NEAR_GRAY
                if alike and facts[usable[i]].digest != facts[usable[j]].digest:
                    pairs.append((int(usable[i]), int(usable[j])))
    return pairs
