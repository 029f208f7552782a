import itertools
import json

import cv2
import numpy as np
import pytest
import torch
from benchmarks import loading
from benchmarks.loading import PIPELINES, benchmark_loading, measure_loading, write_photos
from PIL import Image

from resdet.errors import UserError


@pytest.fixture
def one_thread(tmp_path, monkeypatch):
    """Let measurements set this process up, and undo it."""
    monkeypatch.setenv("RESDET_CACHE", str(tmp_path / "cache"))
    threads, cv_threads, state = torch.get_num_threads(), cv2.getNumThreads(), torch.random.get_rng_state()
    yield
    torch.set_num_threads(threads)
    cv2.setNumThreads(cv_threads)
    torch.random.set_rng_state(state)


def test_report_has_a_row_for_each_pipeline_and_stage(monkeypatch, one_thread):
    # Four processes would spend their time importing.
    monkeypatch.setattr(loading, "in_own_process", lambda function, *arguments, environment: function(*arguments))
    report = benchmark_loading(num_images=4, num_workers=1, repeats=1)
    assert report.settings["images_with_boxes"] == 4
    assert len(report.tables) == 3
    for rows in report.tables.values():
        assert [row["pipeline"] for row in rows] == list(PIPELINES.values())
        assert all(row["images/s"] > 0 for row in rows)
        assert rows[0]["resdet is times faster"] == 1
    batch, network_input, workers = report.tables.values()
    megabytes = {row["pipeline"]: row["MB/image"] for row in batch}
    assert megabytes[PIPELINES["resdet"]] == pytest.approx(480 * 640 * 3 / 1e6)
    assert megabytes[PIPELINES["hflip"]] == pytest.approx(4 * 480 * 640 * 3 / 1e6)
    assert [row["MB/image"] for row in workers] == list(megabytes.values())
    # Scaled once by the reference's transforms and not again: at most 800 pixels, padded to multiples of 32.
    assert all(480 * 640 * 12 / 1e6 <= row["MB/image"] <= 800 * 1088 * 12 / 1e6 for row in network_input)
    json.dumps(report.tables)


def test_pipelines_are_given_the_same_images(tmp_path, one_thread):
    write_photos(tmp_path, tmp_path / "a.json", num_images=6)
    dataset = loading._dataset(tmp_path, tmp_path / "a.json", 6)
    ours = list(itertools.islice(loading._resdet(dataset, 2, seed=3)(0), 3))
    theirs = list(loading._torchvision(dataset, tmp_path, tmp_path / "a.json", "hflip", 2, 3, seed=3)(0))
    for batch, (images, targets) in zip(ours, theirs, strict=True):
        assert [int(target["image_id"]) for target in batch.targets] == [target["image_id"] for target in targets]
        for image, other, target, other_target in zip(batch.images, images, batch.targets, targets, strict=True):
            other = other.mul(255).round().to(torch.uint8)
            # Each has drawn its own flip.
            assert torch.equal(image, other) or torch.equal(image, other.flip(-1))
            assert len(target["boxes"]) == len(other_target["boxes"])
    with pytest.raises(AssertionError):
        assert torch.equal(ours[0].images[0], ours[0].images[1])


def test_photos_weigh_what_cocos_weigh(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_photos(tmp_path / folder, tmp_path / f"{folder}.json", num_images=3)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    for path in sorted((tmp_path / "a").iterdir()):
        assert 90e3 < path.stat().st_size < 180e3
        with Image.open(path) as image, Image.open(tmp_path / "b" / path.name) as again:
            assert image.size == (640, 480)
            assert np.array_equal(np.array(image), np.array(again))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_workers": 0}, "num_workers must be 1 or more, got 0"),
        ({"images": "photos"}, "images= and annotations= must be given together"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        benchmark_loading(**settings)


def test_too_few_images_are_named(tmp_path, one_thread):
    write_photos(tmp_path, tmp_path / "a.json", num_images=1)
    with pytest.raises(UserError, match=r"a\.json: batches of 2 need as many images with boxes, got 1$"):
        measure_loading("resdet", str(tmp_path), str(tmp_path / "a.json"), 1, 2, 1, 0)


@pytest.mark.slow
def test_faster_than_the_reference_by_half():
    report = benchmark_loading(num_images=32, repeats=1)
    for title, rows in report.tables.items():
        ratio = {row["pipeline"]: row["resdet is times faster"] for row in rows}
        if "network's input" not in title:
            assert ratio[PIPELINES["multiscale"]] > 1.5
