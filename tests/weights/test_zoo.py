"""Published detectors by name: the table, what is checked of a file, what is said of it, and how names are mistaken."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from local_server import Server
from torchvision.models import ResNet50_Weights, ResNet101_Weights
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_V2_Weights, FasterRCNN_ResNet50_FPN_Weights

from resdet.commands.main import main
from resdet.errors import UserError, WeightsError
from resdet.models.archs import ARCHS
from resdet.weights.layouts import FORMATS
from resdet.weights.source import locate
from resdet.weights.zoo import PUBLISHED, Published, find_published, sha256_in

pytestmark = pytest.mark.usefixtures("hub")

Publish = Callable[..., Published]
NAME = "detectron2_r101_fpn_3x"


def weights(path: Path, value: float = 1.0) -> Path:
    torch.save({"w": torch.full((5_000,), value)}, path)
    return path


def digest(kind: str, path: Path) -> str:
    return hashlib.new(kind, path.read_bytes()).hexdigest()


# ---- the table


@pytest.mark.parametrize("entry", PUBLISHED.values(), ids=lambda entry: entry.name)
def test_entries_are_consistent(entry: Published) -> None:
    assert PUBLISHED[entry.name] is entry
    assert re.fullmatch(r"[a-z0-9_]+", entry.name)  # no path and no URL, which are told by . / and :
    assert entry.library in FORMATS
    assert entry.name.startswith(f"{entry.library}_")
    assert entry.arch in ARCHS
    assert 35 < entry.box_ap < 45
    # Something of each file is published by which a wrong one is told.
    assert entry.md5 or sha256_in(entry.file_name)
    assert entry.num_classes == (91 if entry.library == "torchvision" else 81)
    for known in (entry.name, entry.url, f"{entry.url}?download=1", f"/somewhere/{entry.file_name}"):
        assert find_published(known) is entry


def test_addresses_are_those_of_the_publishers() -> None:
    """Copied by hand from MODEL_ZOO.md and metafile.yml a second time; torchvision's from torchvision itself."""
    zoo = "https://dl.fbaipublicfiles.com/detectron2/COCO-Detection"
    mm = "https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn"
    stated = {
        "detectron2_r50_fpn_1x": (f"{zoo}/faster_rcnn_R_50_FPN_1x/137257794/model_final_b275ba.pkl", "b275ba", 37.9),
        "detectron2_r50_fpn_3x": (f"{zoo}/faster_rcnn_R_50_FPN_3x/137849458/model_final_280758.pkl", "280758", 40.2),
        NAME: (f"{zoo}/faster_rcnn_R_101_FPN_3x/137851257/model_final_f6e8b1.pkl", "f6e8b1", 42.0),
        "detectron2_x101_32x8d_fpn_3x": (
            f"{zoo}/faster_rcnn_X_101_32x8d_FPN_3x/139173657/model_final_68b088.pkl",
            "68b088",
            43.0,
        ),
        "mmdetection_r101_fpn_3x": (
            f"{mm}/faster_rcnn_r101_fpn_mstrain_3x_coco/"
            "faster_rcnn_r101_fpn_mstrain_3x_coco_20210524_110822-4d4d2ca8.pth",
            "",
            41.8,
        ),
        "mmdetection_x101_64x4d_fpn_3x": (
            f"{mm}/faster_rcnn_x101_64x4d_fpn_mstrain_3x_coco/"
            "faster_rcnn_x101_64x4d_fpn_mstrain_3x_coco_20210524_124528-26c63de6.pth",
            "",
            43.1,
        ),
    }
    theirs = FasterRCNN_ResNet50_FPN_Weights.COCO_V1
    stated["torchvision_r50_fpn"] = theirs.url, "", theirs.meta["_metrics"]["COCO-val2017"]["box_map"]
    assert {name: (entry.url, entry.md5, entry.box_ap) for name, entry in PUBLISHED.items()} == stated
    entry = PUBLISHED["torchvision_r50_fpn"]
    assert entry.size is not None
    assert round(entry.size / 2**20, 3) == theirs.meta["_file_size"]
    assert entry.num_classes == len(theirs.meta["categories"])
    assert find_published(FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1.url) is None  # the importer refuses it


def test_the_table_of_the_readme_is_this_one() -> None:
    text = (Path(__file__).parents[2] / "configs" / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| ([\d.]+) \| (.+?) \|$", text, flags=re.MULTILINE)
    assert rows == [(e.name, e.arch, f"{e.box_ap}", e.licence.partition(" (")[0]) for e in PUBLISHED.values()]


def test_the_command_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights"]) is None
    lines = capsys.readouterr().out.splitlines()
    for entry, line in zip(PUBLISHED.values(), lines[1:], strict=False):
        assert line.split()[:3] == [entry.name, entry.arch, f"{entry.box_ap}"]
        assert entry.licence.startswith(line.split(maxsplit=3)[3])
    assert "what their publishers report (reference)" in lines[-1]


# ---- names


@pytest.mark.parametrize(
    ("source", "arch", "message"),
    [
        (
            "detectron2_r101_fpn",
            None,
            "weights: 'detectron2_r101_fpn' is no file, no URL and no published detector; did you mean "
            "'detectron2_r101_fpn_3x' or 'detectron2_r50_fpn_3x'? known are detectron2_r50_fpn_1x, "
            "detectron2_r50_fpn_3x, detectron2_r101_fpn_3x, detectron2_x101_32x8d_fpn_3x, mmdetection_r101_fpn_3x, "
            "mmdetection_x101_64x4d_fpn_3x, torchvision_r50_fpn",
        ),
        (
            "Detectron2_R101_FPN",
            "resnet101",
            "weights: 'Detectron2_R101_FPN' is no file, no URL and no weights of resnet101; did you mean "
            "'detectron2_r101_fpn_3x' or 'mmdetection_r101_fpn_3x'? known are IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT, "
            "detectron2_r101_fpn_3x, mmdetection_r101_fpn_3x",
        ),
        (
            NAME,
            "resnet50",
            "weights: detectron2_r101_fpn_3x is of resnet101, not of resnet50: set arch to resnet101, or take "
            "detectron2_r50_fpn_1x or detectron2_r50_fpn_3x or torchvision_r50_fpn",
        ),
        (NAME, "resnet34", "weights: detectron2_r101_fpn_3x is of resnet101, not of resnet34: set arch to resnet101"),
        (
            "ResNet50_Weights.IMAGENET1K_V1",
            "resnet101",
            "weights: 'ResNet50_Weights.IMAGENET1K_V1' is no file, no URL and no weights of resnet101; ",
        ),
        (
            ResNet50_Weights.IMAGENET1K_V1,
            "resnet101",
            "weights: ResNet50_Weights.IMAGENET1K_V1 are not for resnet101, whose weights are "
            "ResNet101_Weights.IMAGENET1K_V1, ResNet101_Weights.IMAGENET1K_V2, ResNet101_Weights.IMAGENET1K_V2",
        ),
    ],
)
def test_a_name_that_is_none_or_of_another_network_is_corrected(source: str, arch: str | None, message: str) -> None:
    with pytest.raises(WeightsError) as caught:
        locate(source, arch)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "source", ["IMAGENET1K_V1", "ResNet101_Weights.IMAGENET1K_V1", ResNet101_Weights.IMAGENET1K_V1]
)
def test_torchvisions_spellings_name_one_file(source: str, hub: Path) -> None:
    hub.mkdir(parents=True)
    by_hand = weights(hub / ResNet101_Weights.IMAGENET1K_V1.url.rpartition("/")[2])
    assert locate(source, "resnet101") == by_hand


def test_a_runs_folder_stands_for_its_best_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(WeightsError, match=r"run: must be a checkpoint or the folder of a run, but this folder holds"):
        locate(str(run))
    weights(run / "best.pt")
    assert locate(str(run)) == locate(run) == run / "best.pt"


# ---- files


def test_a_name_is_downloaded_once_and_its_licence_said_once(
    publish: Publish, tmp_path: Path, hub: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = weights(tmp_path / "model_final.pth")
    entry = publish(NAME, file, md5=digest("md5", file)[:6], size=file.stat().st_size)
    with caplog.at_level(logging.INFO, "resdet"):
        for named in (NAME, NAME, entry.url):
            assert locate(named) == hub / "model_final.pth"
    assert Server.requests == ["/model_final.pth"]
    licences = [record.getMessage() for record in caplog.records if "licence" in record.getMessage()]
    assert licences == [
        "detectron2_r101_fpn_3x: licence of these weights: CC BY-SA 3.0 "
        "(https://creativecommons.org/licenses/by-sa/3.0/, by the section License of its MODEL_ZOO.md)"
    ]


def test_a_file_is_pinned_at_its_first_use(publish: Publish, tmp_path: Path, hub: Path) -> None:
    entry = publish(NAME, weights(tmp_path / "model.pth"))
    path = locate(NAME)
    first = digest("sha256", path)
    record = hub / "model.pth.sha256"
    assert record.read_text() == f"{first}  model.pth\n"  # as sha256sum -c reads it
    weights(path, 2.0)
    second = digest("sha256", path)
    known = f"has the SHA-256 {second}, but the first file of this name had {first} (remove {record} if you trust the"
    with pytest.raises(WeightsError, match=re.escape(f"{path}: the file {known} new one); without the file it is")):
        locate(NAME)
    # A later download that differs is none either, and leaves the record.
    path.unlink()
    (tmp_path / "model.pth").unlink()
    served = next(tmp_path.rglob("served")) / "model.pth"
    weights(served, 2.0)
    with pytest.raises(WeightsError, match=re.escape(f"{entry.url}: the download {known}")):
        locate(NAME)
    assert sorted(file.name for file in hub.iterdir()) == ["model.pth.sha256"]
    record.unlink()
    assert locate(NAME) == path
    assert record.read_text().startswith(second)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"md5": "000000"}, "has the MD5 {md5}, and not the published 000000..."),
        ({"size": 1234}, "has {size} bytes, and not the published 1234"),
    ],
)
def test_a_file_that_is_not_the_published_one_is_refused(
    stated: dict[str, object], message: str, publish: Publish, tmp_path: Path, hub: Path
) -> None:
    file = weights(tmp_path / "model.pth")
    entry = publish(NAME, file, **stated)
    told = message.format(md5=digest("md5", file), size=file.stat().st_size)
    with pytest.raises(WeightsError) as caught:
        locate(NAME)
    assert str(caught.value) == (
        f"{entry.url}: the download {told}; without a network, put model.pth from that URL into {hub}{os.sep}"
    )
    assert not list(hub.iterdir())
    # Put there by hand, it is refused too.
    (hub / "model.pth").hardlink_to(file)
    with pytest.raises(WeightsError) as caught:
        locate(NAME)
    assert str(caught.value) == f"{hub / 'model.pth'}: the file {told}; without the file it is downloaded again"


def test_without_a_network_one_line_says_what_to_put_where(
    hub: Path, monkeypatch: pytest.MonkeyPatch, publish: Publish, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = weights(tmp_path / "model_final_f6e8b1.pth")
    url = "http://127.0.0.1:1/detectron2/model_final_f6e8b1.pth"
    publish(NAME, file, url=url)
    with pytest.raises(WeightsError) as caught:
        locate(NAME)
    assert str(caught.value) == (
        f"{url}: cannot be downloaded ([Errno 111] Connection refused); without a network, put "
        f"model_final_f6e8b1.pth from that URL into {hub}{os.sep}"
    )
    (hub / "model_final_f6e8b1.pth").hardlink_to(file)
    assert main(["weights", NAME]) is None
    assert capsys.readouterr().out == f"{NAME}: {hub / 'model_final_f6e8b1.pth'}\n"
    with pytest.raises(UserError, match=r"absent\.pth: there is no such file"):
        main(["weights", "absent.pth"])


def test_a_folder_that_cannot_be_written_to_is_read(
    publish: Publish, tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared cache that others fill: nothing is recorded in it."""
    file = weights(tmp_path / "model.pth")
    publish(NAME, file)
    hub.mkdir(parents=True)
    (hub / "model.pth").hardlink_to(file)

    def read_only(*arguments: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("resdet.weights.source.write_text", read_only)
    assert locate(NAME) == hub / "model.pth"
    assert [path.name for path in hub.iterdir()] == ["model.pth"]
