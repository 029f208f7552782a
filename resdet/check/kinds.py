"""Define every kind of problem: how severe it is and what it means.

``error``: the data are refused, or training on them would be wrong. ``warning``: training works, and may be worse for
it. ``info``: good to know.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")

OVERHANG = 0.5
"""Pixels by which a box may leave its image unreported: rounding."""

TINY_SIDE = 2.0
"""Pixels of the stored image; boxes with a shorter side are tiny."""

EXTREME_ASPECT = 20.0
"""Ratio of the longer to the shorter side from which a box is extreme."""

IMBALANCE = 100.0
"""Ratio of the most frequent class's boxes to the rarest's from which classes are imbalanced."""

MIN_EVIDENCE = 5
"""Number of objects, or of sides of boxes, from which a share or a convention is judged."""

CROWD_SHARE = 0.25
"""Share of objects with ``iscrowd`` 1 from which it is unusual. COCO's train2017 has 1.2 %; VOC 2007 has 20 % of
difficult objects, which --fix turns into crowds."""

UNREACHED = 0.25
"""Share of training boxes that no anchor reaches from which anchors are unfit. The default anchors miss about 17 % of
COCO's boxes."""


class Kind(NamedTuple):
    """One kind of problem."""

    severity: Severity
    meaning: str  # one line for the report
    elsewhere: Severity | None = None  # outside training data, if different there


_REFUSED = "refused when read"
_DROPPED = f"{_REFUSED}; --fix leaves the entry out"
_NUMBER = f"{_REFUSED}; --fix reads a number from a text, and leaves out what is none"
_LEFT_OUT = "left out of training, so its object is taken for background; --fix leaves it out of the file"

KINDS = {
    "unreadable_annotations": Kind("error", "the annotation file cannot be used at all"),
    "not_an_object": Kind("error", f"{_DROPPED}: every entry must be an object with named values"),
    "no_images": Kind("error", _REFUSED),
    "no_categories": Kind("error", _REFUSED),
    "bad_image_id": Kind("error", _NUMBER),
    "bad_annotation_id": Kind("error", f"{_REFUSED}; --fix turns a text into a number, and gives others a new id"),
    "bad_category_id": Kind("error", _NUMBER),
    "duplicate_image_id": Kind("error", f"{_DROPPED}: which image do its annotations belong to?"),
    "duplicate_annotation_id": Kind("error", f"{_REFUSED}: evaluation counts matches by id; --fix gives new ones"),
    "duplicate_category_id": Kind("error", f"{_REFUSED}; --fix keeps the first"),
    "bad_category_name": Kind("error", f"{_REFUSED}; --fix names the class after its id"),
    "duplicate_category_name": Kind("error", f"{_REFUSED}: nothing tells the classes apart; --fix makes them one"),
    "bad_file_name": Kind("error", _DROPPED),
    "bad_image_size": Kind("error", f"{_REFUSED}; --fix takes the size from a text or from the image"),
    "bad_image_reference": Kind("error", _NUMBER),
    "unknown_image": Kind("error", f"{_DROPPED}: annotations of an image that does not exist"),
    "bad_category_reference": Kind("error", _NUMBER),
    "unknown_category": Kind("error", f"{_DROPPED}: annotations of a class that does not exist"),
    "bad_box": Kind("error", _NUMBER),
    "bad_iscrowd": Kind("error", f"{_REFUSED}; --fix writes 0 where it is neither a number nor true or false"),
    "bad_area": Kind("error", f"{_REFUSED}; --fix removes an area that is no number: width * height counts"),
    "bad_annotation_file": Kind("error", f"{_REFUSED}; --fix leaves the image out"),
    "listed_twice": Kind("error", f"{_REFUSED}; --fix keeps the first"),
    "unknown_class": Kind("error", f"{_REFUSED}: the configuration names a class that does not exist"),
    "different_classes": Kind("error", "val has classes that train lacks, so evaluation is refused"),
    "nothing_to_train_on": Kind("error", "training is refused"),
    "missing_file": Kind(
        "error", "training is refused; --fix takes the file that was meant, if its size fits, or leaves the image out"
    ),
    "unreadable_file": Kind(
        "error", "refused when the image is read, or skipped if the configuration says so; --fix leaves it out"
    ),
    "size_mismatch": Kind(
        "error", "refused when the image is read: its boxes belong to an image of another size; --fix leaves it out"
    ),
    "negative_box": Kind("error", _LEFT_OUT),
    "zero_box": Kind("error", _LEFT_OUT),
    "box_outside_image": Kind("error", _LEFT_OUT),
    "duplicate_file_name": Kind(
        "error", "each entry lacks the boxes of the other, which are taken for background; --fix makes them one"
    ),
    "boxes_are_corners": Kind("error", "COCO's boxes are [x, y, width, height]; these look like [x1, y1, x2, y2]"),
    "boxes_are_fractions": Kind("error", "boxes must be in pixels; these look like fractions of the image"),
    "nothing_to_evaluate_on": Kind("warning", "no evaluation, so no best checkpoint: give val single objects"),
    "more_objects_than_detections": Kind("warning", "the others are never found: raise the key that is named"),
    "more_objects_than_proposals": Kind("warning", "the others are hardly found: raise the key that is named"),
    "strip": Kind(
        "warning", "hardly anything is left of it once it is scaled: cut it into tiles, or raise model.max_size"
    ),
    "many_crowds": Kind(
        "warning",
        "not trained on, nor scored: if these are single objects (some labelling tools write iscrowd 1 for every "
        "mask), set iscrowd to 0, or export polygons; --fix leaves them",
    ),
    "similar_class_names": Kind("warning", "one class, written in several ways?"),
    "areas_contradict_boxes": Kind(
        "warning",
        "evaluation by size (AP_small, AP_medium, AP_large) goes by areas; --fix removes them: width * height counts",
    ),
    "box_partly_outside": Kind(
        "warning", f"exceeds the image by more than {OVERHANG:g} px; clipped in training, and by --fix"
    ),
    "one_based_corners": Kind("warning", "boxes pile up at 1, none begins at 0: converted from VOC without the - 1?"),
    "zero_based_corners": Kind("warning", "VOC counts pixels from 1; corners at 0 suggest that all are off by one"),
    "short_boxes": Kind(
        "warning", "boxes pile up one pixel before the far border and none reaches it: xmax - xmin without the + 1?"
    ),
    "repeated_box": Kind("warning", "the same box and class again; --fix keeps the first"),
    "shared_label_file": Kind("warning", "two images of one name but for the suffix; the same boxes in both?"),
    "train_val_overlap": Kind("warning", "the same picture in train and val: results on val are too good"),
    "duplicate_image": Kind("warning", "the same pixels under several names"),
    "near_duplicate_image": Kind("info", "the same picture at another scale or compression"),
    "exif_rotation": Kind("warning", "boxes are assumed to be in unrotated pixels, which the size cannot confirm"),
    "unused_category": Kind("warning", "a class without a box is never learned", elsewhere="info"),
    "unfit_anchors": Kind(
        "warning", "learned worse; model.anchor_sizes and model.aspect_ratios, or model.min_size, may fit better"
    ),
    "tiny_box": Kind("info", f"a side below {TINY_SIDE:g} px"),
    "extreme_aspect": Kind("info", f"one side is {EXTREME_ASPECT:g} times the other or more"),
    "absent_classes": Kind("info", "val lacks classes of train: their AP is undefined and stays out of the means"),
    "unclear_difficult": Kind("info", "a <difficult> that is neither yes nor no, taken as not difficult"),
    "class_imbalance": Kind("info", "rare classes are learned late, or not at all"),
    "image_without_boxes": Kind("info", "trained on as background; right if nothing is on it"),
    "root_category": Kind("info", "left out of the classes, as Roboflow's exports mean it"),
    "file_name_from_url": Kind("info", "the end of coco_url, such as train2017/000000391895.jpg, is taken"),
    "other_unicode_form": Kind(
        "info", "the same name in another form (NFC, or NFD as Macs write it): the file is taken"
    ),
    "unlisted_file": Kind("info", "in the image folder, but in no annotation"),
    "not_rgb": Kind("info", "converted to 8-bit RGB when read"),
    "exif_turned": Kind("info", "turned upright when read, as the annotations mean it"),
    "guessed_layout": Kind("info", "how a path or name in data.yaml is understood"),
    "missing_label_file": Kind("info", "taken for an image without objects; right if nothing is on it"),
    "label_without_image": Kind("info", "not read: was its image lost or renamed?"),
}
"""In the order of a report, within each severity."""
