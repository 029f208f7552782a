"""Find image files that show the same picture, within a split and across splits."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping

from resdet.data.annotations import AnnotationTable
from resdet.data.coco_rules import Problem
from resdet.data.image_facts import ImageFacts, near_duplicates


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
