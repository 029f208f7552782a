"""Published Faster R-CNNs by name: where each file is, what is known of it, under which licence, and its reported AP.

``PUBLISHED`` holds those that ``resdet.models.checkpoint.load_detector`` can build; ``resdet.weights.source.locate``
takes their names. Their classes are COCO's. Every entry is copied from its publisher's pages, and nothing is filled in:

* detectron2: MODEL_ZOO.md has addresses, box AP, licence, and "any model on this page contains its md5 prefix in its
  file name"; it states neither sizes nor SHA-256. Its models without a pyramid (C4, DC5) are none that the importer
  reads.
* torchvision: ``FasterRCNN_ResNet50_FPN_Weights.COCO_V1`` in models/detection/faster_rcnn.py has address and box AP.
  The address holds the first digits of the SHA-256. ``_file_size`` is rounded (159.743 MiB); the bytes are those that
  FiftyOne's manifest-torch.json states. Version 2 has convolutions in its box head, which this detector has not.
* mmdetection: configs/faster_rcnn/metafile.yml has addresses, which hold the first digits of the SHA-256
  (tools/model_converters/publish_model.py), and box AP. Those of January 2020 are left out: they are
  older than mmdetection 2 and its conventions of boxes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urldefrag

# torch.hub's convention: such a file name holds the first digits of the file's SHA-256.
_HASH_IN_NAME = re.compile(r"-([a-f0-9]{8,})\.")

LICENCES = {
    "detectron2": "CC BY-SA 3.0",
    "mmdetection": "Apache-2.0",
    "torchvision": "BSD-3-Clause",
}
"""Licence of each library's weights. Only detectron2 licenses them apart from its code: the others' is the code's."""

_LICENCE_NOTES = {
    "detectron2": "https://creativecommons.org/licenses/by-sa/3.0/, by the section License of its MODEL_ZOO.md",
    "mmdetection": "of the repository, which states no other for its models",
    "torchvision": "of the repository, whose README says that models may have terms derived from their training data",
}


@dataclass(frozen=True)
class Published:
    """A detector's weights file that its authors offer for download."""

    name: str  # by which it is asked for
    url: str
    library: str  # whose names and conventions it has, a key of ``resdet.weights.layouts.FORMATS``
    arch: str  # a key of ``resdet.models.archs.ARCHS``
    box_ap: float  # on COCO val2017 as ``source`` reports it, in percent: a reference, not measured here
    source: str  # the page that states address and AP
    num_classes: int = 81  # rows of its scores: COCO's 80 classes and the background; torchvision's ids leave gaps
    md5: str = ""  # the first digits of its MD5, if they are published
    size: int | None = None  # bytes, if they are known

    @property
    def file_name(self) -> str:
        """The file's name, by which it is kept."""
        return self.url.rpartition("/")[2]

    @property
    def licence(self) -> str:
        """The licence in a few words, and where it is stated."""
        return f"{LICENCES[self.library]} ({_LICENCE_NOTES[self.library]})"


def _detectron2(name: str, arch: str, box_ap: float, path: str) -> Published:
    url = f"https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/{path}"
    md5 = path.removesuffix(".pkl")[-6:]
    source = "https://github.com/facebookresearch/detectron2/blob/main/MODEL_ZOO.md"
    return Published(f"detectron2_{name}", url, "detectron2", arch, box_ap, source, md5=md5)


def _mmdetection(name: str, arch: str, box_ap: float, path: str) -> Published:
    url = f"https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/{path}"
    source = "https://github.com/open-mmlab/mmdetection/blob/main/configs/faster_rcnn/metafile.yml"
    return Published(f"mmdetection_{name}", url, "mmdetection", arch, box_ap, source)


_ENTRIES = (
    _detectron2("r50_fpn_1x", "resnet50", 37.9, "faster_rcnn_R_50_FPN_1x/137257794/model_final_b275ba.pkl"),
    _detectron2("r50_fpn_3x", "resnet50", 40.2, "faster_rcnn_R_50_FPN_3x/137849458/model_final_280758.pkl"),
    _detectron2("r101_fpn_3x", "resnet101", 42.0, "faster_rcnn_R_101_FPN_3x/137851257/model_final_f6e8b1.pkl"),
    _detectron2(
        "x101_32x8d_fpn_3x",
        "resnext101_32x8d",
        43.0,
        "faster_rcnn_X_101_32x8d_FPN_3x/139173657/model_final_68b088.pkl",
    ),
    _mmdetection(
        "r101_fpn_3x",
        "resnet101",
        41.8,
        "faster_rcnn_r101_fpn_mstrain_3x_coco/faster_rcnn_r101_fpn_mstrain_3x_coco_20210524_110822-4d4d2ca8.pth",
    ),
    _mmdetection(
        "x101_64x4d_fpn_3x",
        "resnext101_64x4d",
        43.1,
        "faster_rcnn_x101_64x4d_fpn_mstrain_3x_coco/"
        "faster_rcnn_x101_64x4d_fpn_mstrain_3x_coco_20210524_124528-26c63de6.pth",
    ),
    Published(
        "torchvision_r50_fpn",
        "https://download.pytorch.org/models/fasterrcnn_resnet50_fpn_coco-258fb6c6.pth",
        "torchvision",
        "resnet50",
        37.0,
        "https://github.com/pytorch/vision/blob/main/torchvision/models/detection/faster_rcnn.py",
        num_classes=91,
        size=167_502_836,
    ),
)

PUBLISHED: dict[str, Published] = {entry.name: entry for entry in _ENTRIES}
"""Every published detector by name."""


def find_published(source: str) -> Published | None:
    """Look up a published detector by name, URL, or a path that ends in its file's name; None if it is none."""
    if source in PUBLISHED:
        return PUBLISHED[source]
    where, is_url = urldefrag(source).url.partition("?")[0], "://" in source
    last = re.split(r"[/\\]", where)[-1]
    return next((one for one in PUBLISHED.values() if (one.url == where if is_url else one.file_name == last)), None)


def sha256_in(file_name: str) -> str:
    """Return the first digits of the SHA-256 that a file's name holds by torch.hub's convention, or an empty text."""
    found = _HASH_IN_NAME.search(file_name)
    return found[1] if found else ""
