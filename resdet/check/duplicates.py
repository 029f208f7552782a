"""Find image files that show the same picture, within a split and across splits."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from resdet.check.files import THUMBNAIL_SIZE, ImageFacts
from resdet.data.annotations import AnnotationTable
from resdet.data.coco_rules import Problem

NEAR_BITS = 48
"""Of the 256 bits of two perceptual hashes, how many may differ between near duplicates. Photographs saved again at
JPEG quality 40, halved or enlarged differed in at most 46, different ones in at least 65 (30 each of COCO, VOC and
BCCD)."""

NEAR_GRAY = 4.0
"""Of 256 gray levels, by how many two thumbnails of the same picture may differ on average. The same pictures differed
by at most 1.5; different ones, blood cells under one microscope, by at least 14."""

_FLAT = 4.0  # standard deviation in gray levels below which a picture has no contrast
_BLOCK = 2048  # rows of distances that are held at a time


def duplicate_problems(
    tables: Mapping[str, AnnotationTable], paths: Mapping[str, Mapping[int, str]], facts: Mapping[str, ImageFacts]
) -> Iterator[tuple[str | None, Problem]]:
    """Yield groups of files with the same pixels and pairs of nearly the same pictures.

    ``tables`` and ``paths`` (by image index) are those of each split, ``facts`` those of each file. Each problem comes
    with the name of its split, or None if it concerns both.
    """
    users: dict[str, list[tuple[str, int]]] = defaultdict(list)  # of each file
    for split, of_split in paths.items():
        for index, path in of_split.items():
            users[path].append((split, int(tables[split].image_ids[index])))
    by_digest: dict[bytes, list[str]] = defaultdict(list)
    for of_file in facts.values():
        if of_file.header is not None:
            by_digest[of_file.digest].append(of_file.path)
    groups = [("duplicate_image", "the same pixels", same) for same in by_digest.values() if len(same) > 1]
    unique = [facts[same[0]] for same in by_digest.values()]
    for i, j in near_duplicates(unique):
        groups.append(("near_duplicate_image", "nearly the same picture", [unique[i].path, unique[j].path]))
    for kind, what, files in groups:
        where = [(split, image_id, path) for path in files for split, image_id in users[path]]
        ids = tuple(image_id for _, image_id, _ in where)
        listed = ", ".join(f"image {image_id} of {split} ({os.path.basename(path)})" for split, image_id, path in where)
        owner = where[0][0] if len({split for split, _, _ in where}) == 1 else None
        kind = kind if owner else "train_val_overlap"
        yield owner, Problem(kind, f"{what}: {listed}", ids, file=files[0], count=len(files) - 1)


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
