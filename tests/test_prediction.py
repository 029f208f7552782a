import json
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn

from resdet.commands.predict import main
from resdet.data.image_files import find_images
from resdet.data.shapes import ShapesImages, shapes_table
from resdet.data.video import frame_rate, read_frames, write_video
from resdet.drawing import above, class_color, draw, is_drawing, legible_scale, picture_names, shown_from
from resdet.errors import DataError, UserError, WeightsError
from resdet.evaluation.coco import read_coco_detections
from resdet.evaluation.settings import InferenceSettings
from resdet.models.checkpoint import checkpoint_payload
from resdet.models.detector import build_detector
from resdet.models.spec import DetectorSpec
from resdet.prediction import predict, predict_each
from resdet.prediction_files import predict_files
from resdet.result import Result, coco_entries
from resdet.types import Category, Prediction

CATEGORIES = (Category(1, 7, "cat"), Category(2, 3, "dog"))


def prediction(boxes: list[list[float]], labels: list[int], scores: list[float]) -> Prediction:
    return Prediction(
        boxes=torch.tensor(boxes).float().reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.int64),
        scores=torch.tensor(scores),
    )


class Corner(nn.Module):
    """Returns for each image one box of the image's size and one of half of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.batch_sizes: list[int] = []

    def forward(self, images):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.batch_sizes.append(len(images))
        answers = []
        for image in images:
            assert 0 <= float(image.min()) <= float(image.max()) <= 1
            height, width = image.shape[1:]
            answers.append(prediction([[0, 0, width, height], [0, 0, width / 2, height / 2]], [1, 2], [0.9, 0.3]))
        return answers


def write_image(path: Path, height: int = 8, width: int = 12) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


def test_images_are_found_in_files_folders_and_patterns(tmp_path):
    b, a = write_image(tmp_path / "b.png"), write_image(tmp_path / "a.JPG")
    deep = write_image(tmp_path / "deep" / "c.jpg")
    (tmp_path / "notes.txt").write_text("no image")
    odd = tmp_path / "odd"
    a.replace(odd)
    a = write_image(tmp_path / "a.JPG")
    assert find_images([tmp_path]) == [a, b]
    assert find_images([b, tmp_path, str(a)]) == [b, a]
    assert find_images([odd]) == [odd]
    assert find_images([tmp_path / "**" / "*.jpg"]) == [deep]
    assert find_images([tmp_path / "?.png", tmp_path / "deep"]) == [b, deep]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jpg", r"none\.jpg: no such file or folder"),
        ("empty", r"empty: no images in this folder \(looked for \.jpg"),
        ("*.tif", r"\*\.tif: no image matches this pattern"),
    ],
)
def test_nothing_found_is_an_error(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.txt").write_text("")
    with pytest.raises(DataError, match=message):
        find_images([tmp_path / name])
    with pytest.raises(DataError, match="no images given"):
        find_images([])


def test_predictions_come_in_order_with_their_images(tmp_path):
    paths = [write_image(tmp_path / f"{i}.png", height=8 + i) for i in range(4)]
    array = np.zeros((20, 30, 3), dtype=np.uint8)
    model = Corner().train()
    results = predict(model, [*paths, array], InferenceSettings(batch_size=2), score_threshold=0.5)
    assert model.batch_sizes == [2, 2, 1]
    assert [result.path for result in results] == [*paths, None]
    assert model.training
    for i, result in enumerate(results[:4]):
        assert result.image.shape == (8 + i, 12, 3)
        np.testing.assert_array_equal(result.image, np.asarray(Image.open(paths[i])))
        assert result.boxes.tolist() == [[0, 0, 12, 8 + i]]
        assert result.labels.tolist() == [1]
    assert len(predict(model, [array])[0]) == 2


def test_predicting_leaves_the_callers_gradients_alone_and_ends_cleanly():
    model = Corner().train()
    results = predict_each(model, [np.zeros((4, 4, 3), dtype=np.uint8)] * 3)
    next(results)
    assert torch.is_grad_enabled()
    results.close()
    assert model.training
    assert model.batch_sizes == [1]


def test_unreadable_images_are_named(tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.jpg"):
        list(predict(Corner(), [broken]))
    good = np.zeros((4, 4, 3), dtype=np.uint8)
    for bad in (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 4), np.uint8)):
        with pytest.raises(DataError, match=r"images\[1\]: expected uint8 RGB \[H, W, 3\] or gray \[H, W\], got"):
            predict(Corner(), [good, bad])


def test_unreadable_files_are_left_out_and_reported(tmp_path):
    files = [write_image(tmp_path / f"{i}.png", height=8 + i) for i in range(5)]
    for bad in (files[0], files[1], files[3]):
        bad.write_bytes(b"no image")
    model, errors = Corner(), {}
    settings = InferenceSettings(batch_size=2)
    results = list(predict_each(model, files, settings, on_unreadable=errors.__setitem__))
    assert model.batch_sizes == [2], "batches are of images that could be read"
    assert [(result.path, result.image.shape[0]) for result in results] == [(files[2], 10), (files[4], 12)]
    assert list(errors) == [files[0], files[1], files[3]]
    assert all(str(path) in str(error) for path, error in errors.items())
    with pytest.raises(UserError, match="batch_size must be at least 1, got 0"):
        list(predict(model, files, InferenceSettings(batch_size=0)))


def test_one_image_or_many_always_give_a_list(tmp_path):
    path, array = write_image(tmp_path / "a.png"), np.zeros((4, 4, 3), dtype=np.uint8)
    for one in (path, str(path), tmp_path, str(tmp_path / "*.png"), Image.open(path), array, torch.zeros(3, 8, 12)):
        results = predict(Corner(), one)
        assert isinstance(results, list)
        assert len(results) == 1
    assert len(predict(Corner(), (one for one in (path, array)))) == 2
    assert predict(Corner(), []) == []
    assert [(one.categories, one.shown_from) for one in predict(Corner(), array)] == [((), 0.5)]


def test_a_model_is_loaded_from_where_it_is_said_to_be(tmp_path):
    spec = DetectorSpec(arch="resnet18", min_size=32, max_size=32, out_channels=8, box_head_channels=8)
    model = build_detector(spec, num_classes=3, categories=CATEGORIES)
    model.score_threshold = 0.25
    run = tmp_path / "run"
    run.mkdir()
    torch.save(checkpoint_payload(model), run / "best.pt")
    array = np.zeros((32, 32, 3), dtype=np.uint8)
    settings = InferenceSettings(device=torch.device("cpu"))
    for source in (run, str(run), run / "best.pt"):
        (result,) = predict(source, array, settings)
        assert (result.categories, result.shown_from) == (CATEGORIES, 0.25)
    with pytest.raises(UserError, match=r"this folder holds no best\.pt"):
        predict(tmp_path, array)


def test_paths_are_looked_up_before_work_starts_and_iterators_one_by_one(tmp_path):
    good, none = write_image(tmp_path / "a.png"), tmp_path / "none.png"
    model = Corner()
    with pytest.raises(DataError, match=r"none\.png: no such file or folder"):
        predict_each(model, [good, none])
    assert model.batch_sizes == []
    alive: list[weakref.ref[np.ndarray]] = []

    def arrays():
        for _ in range(6):
            array = np.zeros((4, 4, 3), dtype=np.uint8)
            alive.append(weakref.ref(array))
            yield array
            del array
            assert sum(one() is not None for one in alive) <= 4, "a batch that is worked on, and the one that is read"
        yield none

    results = predict_each(model, arrays(), InferenceSettings(batch_size=2))
    for _ in range(5):
        next(results)
    with pytest.raises(DataError, match=r"none\.png: no such file or folder"):
        list(results)
    assert len(alive) == 6


@pytest.fixture
def clip(tmp_path):
    """Six frames at 12.5 per second, of 48x64 pixels."""
    (tmp_path / "in").mkdir(exist_ok=True)
    write_video(tmp_path / "in" / "clip.mp4", [np.full((48, 64, 3), 40 * i, dtype=np.uint8) for i in range(6)], 12.5)
    return tmp_path / "in" / "clip.mp4"


def test_videos_yield_a_result_for_each_frame(clip, tmp_path):
    photo = write_image(tmp_path / "a.png")
    model = Corner()
    results = list(predict_each(model, [clip, photo], InferenceSettings(batch_size=2), every=2))
    assert [result.frame and result.frame.index for result in results] == [0, 2, 4, None]
    assert [result.path for result in results] == [clip] * 3 + [photo]
    assert results[2].frame.seconds == pytest.approx(4 / 12.5)
    assert [int(result.image[20, 20, 0]) for result in results[:3]] == pytest.approx([0, 80, 160], abs=5)
    assert model.batch_sizes == [2, 2]
    with pytest.raises(UserError, match=r"clip\.mp4: is a video: loop over resdet\.predict_each"):
        predict(model, [photo, clip])
    with pytest.raises(UserError, match="every must be at least 1, got 0"):
        predict_each(model, clip, every=0)

    class Diverged(Corner):
        def forward(self, images):
            return [prediction([[0, 0, 1, float("nan")]], [1], [0.9]) for _ in images]

    with pytest.raises(WeightsError, match=r"NaN or infinity on .*clip\.mp4 frame 0"):
        next(predict_each(Diverged(), clip))


def test_videos_and_images_are_written_together(clip, tmp_path):
    photo, out = write_image(clip.parent / "clip.jpg", 48, 64), tmp_path / "out"
    before = clip.read_bytes()
    report = predict_files(Corner(), [clip.parent], out, save=("pictures", "coco", "yolo"), every=2)
    assert (report.num_images, report.num_frames, report.num_detections) == (1, {clip: 3}, 8)
    frames = [image for _, image in read_frames(out / "clip_2.mp4")]
    assert [image.shape for image in frames] == [(7 * 48, 7 * 64, 3)] * 3
    assert frame_rate(out / "clip_2.mp4") == pytest.approx(12.5 / 2), "as fast as the original"
    for image, gray in zip(frames, (0, 80, 160), strict=True):
        assert np.abs(image[200, 100].astype(int) - gray).max() < 15
        assert np.abs(image[300, :2].astype(int) - class_color(1)).max() < 90, "the box around the frame"
    entries = json.loads((out / "detections.json").read_text())
    assert [entry["image_id"] for entry in entries] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [entry.get("frame") for entry in entries] == [None, None, 0, 0, 2, 2, 4, 4]
    assert entries[-1]["seconds"] == pytest.approx(4 / 12.5)
    assert entries[-1]["file_name"] == "clip.mp4"
    names = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.txt"))
    assert names == ["classes.txt", "labels/clip.txt", *(f"labels/clip_2/{i:06d}.txt" for i in (0, 2, 4))]
    assert (out / "labels" / "clip.txt").read_text() == "0 0.5 0.5 1 1\n", "that of a score from 0.5 on"
    assert clip.read_bytes() == before
    assert photo.exists()
    with pytest.raises(UserError, match=r"clip\.txt: exists, and labels are never replaced; give another"):
        predict_files(Corner(), [clip.parent], out, save=["yolo"])
    with pytest.raises(UserError, match=r"clip\.mp4: the output would overwrite an input"):
        predict_files(Corner(), [clip], clip.parent)
    predict_files(Corner(), [clip.parent], tmp_path / "labels", save=["yolo"], every=9, score_threshold=0.1)
    assert {path.name for path in (tmp_path / "labels").iterdir()} == {"classes.txt", "labels"}
    assert len((tmp_path / "labels" / "labels" / "clip.txt").read_text().splitlines()) == 2


def test_an_interrupted_video_leaves_nothing_half_written(clip, tmp_path):
    class Interrupted(Corner):
        def forward(self, images):
            if len(self.batch_sizes) == 3:
                raise KeyboardInterrupt
            return super().forward(images)

    with pytest.raises(KeyboardInterrupt):
        predict_files(Interrupted(), clip, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_cannot_be_written_to_files_is_refused(tmp_path):
    photo = write_image(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"images\[1\]: results are named after files: expected a path or a URL"):
        predict_files(Corner(), [photo, np.zeros((4, 4, 3), np.uint8)], tmp_path / "out")
    with pytest.raises(UserError, match="save: must be among pictures, coco, yolo, got 'json'"):
        predict_files(Corner(), [photo], tmp_path / "out", save=["coco", "json"])
    assert not (tmp_path / "out").exists()


def test_the_command_takes_videos_and_says_what_it_wrote(clip, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("resdet.models.checkpoint.load_detector", lambda _: Corner())
    photo, out = write_image(clip.parent / "a.png"), tmp_path / "out"
    (clip.parent / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(DataError) as caught:
        main(
            [
                "best.pt",
                str(clip.parent),
                str(photo),
                "--output",
                str(out),
                "--every",
                "4",
                "--save",
                "yolo",
                "pictures",
            ]
        )
    assert str(caught.value).splitlines() == [
        "1 of 3 files could not be read and were left out:",
        f"  {clip.parent / 'broken.mp4'}: not a readable video (8 bytes)",
    ]
    assert capsys.readouterr().out.splitlines() == [
        "1 images, 2 frames of 1 videos, 6 detections; drawn those of score >= 0.5 "
        "(no threshold has been evaluated yet)",
        f"written: {out}/*.png, *.mp4 and {out}/labels/*.txt",
    ]
    assert {path.name for path in out.iterdir()} == {"a.png", "clip.mp4", "labels", "classes.txt"}
    main(["best.pt", str(photo), "--output", str(out), "--save", "coco"])
    assert capsys.readouterr().out == f"1 images, 2 detections\nwritten: {out}/detections.json\n"
    with pytest.raises(SystemExit):
        main(["best.pt", str(photo), "--every", "0"])
    assert "--every must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("names", [["10.png", "broken.png", "30.png"], ["a.png", "b.png", "c.png"]])
def test_detections_keep_their_ids_where_a_file_is_unreadable(tmp_path, names):
    files = [write_image(tmp_path / "in" / name) for name in names]
    files[1].write_bytes(b"no image")
    out = tmp_path / "out"
    report = predict_files(Corner(), files, out)
    assert list(report.unreadable) == [files[1]]
    assert {path.name for path in out.iterdir()} == {names[0], names[2], "detections.json"}
    entries = json.loads((out / "detections.json").read_text())
    assert report.num_detections == len(entries) == 4
    # Names that are numbers are ids whatever the broken file is called; positions are those of all files.
    assert [entry["image_id"] for entry in entries] == ([10, 10, 30, 30] if names[0] == "10.png" else [1, 1, 3, 3])


def test_the_command_goes_on_after_unreadable_files_and_lists_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("resdet.models.checkpoint.load_detector", lambda _: Corner())
    good, bad, out = write_image(tmp_path / "in" / "a.png"), tmp_path / "in" / "b.png", tmp_path / "out"
    bad.write_bytes(b"no image")
    (tmp_path / "in" / "._a.png").write_bytes(b"Mac OS X")
    with pytest.raises(DataError) as caught:
        main([str(tmp_path / "best.pt"), str(tmp_path / "in"), "--output", str(out)])
    first, second = str(caught.value).splitlines()
    assert first == "1 of 2 files could not be read and were left out:"
    assert second.startswith(f"  {bad}: not a readable image")
    assert "1 images, 2 detections" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"a.png", "detections.json"}
    good.unlink()
    with pytest.raises(DataError, match="1 of 1 files could not be read"):
        main([str(tmp_path / "best.pt"), str(tmp_path / "in"), "--output", str(out)])
    assert json.loads((out / "detections.json").read_text()) == []


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_detected_in_and_drawn_as_they_are_seen(tmp_path, orientation):
    """What Pillow shows upright has one dark corner, at the top left, whatever the orientation."""
    upright = np.full((40, 60, 3), 200, dtype=np.uint8)
    upright[:20, :30] = 0
    undo = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}  # the orientation that turns back
    picture = Image.fromarray(upright)
    picture.getexif()[0x0112] = undo.get(orientation, 1)
    stored, exif = ImageOps.exif_transpose(picture), Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.png"
    stored.save(path, exif=exif)
    width, height = stored.size
    for source in (path, Image.open(path)):
        (result,) = predict(Corner(), [source])
        np.testing.assert_array_equal(result.image, upright)
        assert result.boxes[0].tolist() == [0, 0, 60, 40]
        (result,) = predict(Corner(), [source], stored_pixels=True)
        np.testing.assert_array_equal(result.image, np.asarray(stored))
        assert result.boxes[0].tolist() == [0, 0, width, height]
    assert (width, height) == ((40, 60) if orientation >= 5 else (60, 40))
    predict_files(Corner(), [path], tmp_path / "out")
    assert Image.open(tmp_path / "out" / "photo.png").size == (8 * 60, 8 * 40)
    assert json.loads((tmp_path / "out" / "detections.json").read_text())[0]["bbox"] == [0, 0, 60, 40]
    predict_files(Corner(), [path], tmp_path / "out", stored_pixels=True)
    assert Image.open(tmp_path / "out" / "photo.png").size == (8 * width, 8 * height)


def test_pictures_in_the_folder_of_an_input_replace_only_earlier_drawings(tmp_path):
    photo = tmp_path / "a.jpg"
    Image.new("RGB", (12, 8)).save(photo)
    for _ in range(2):  # the second call replaces the drawing of the first
        predict_files(Corner(), [photo], tmp_path)
    assert is_drawing(tmp_path / "a.png")
    other = write_image(tmp_path / "a.png")
    before = other.read_bytes()
    with pytest.raises(UserError, match=r"a\.png: would be replaced by a picture of detections; give another output"):
        predict_files(Corner(), [photo], tmp_path)
    assert other.read_bytes() == before
    # Elsewhere a folder is one of results, also those of versions that did not mark their drawings.
    predict_files(Corner(), [photo], write_image(tmp_path / "out" / "a.png").parent)
    assert is_drawing(tmp_path / "out" / "a.png")


def test_pictures_of_files_with_one_name_are_numbered(tmp_path):
    names = ["x/1.jpg", "y/1.jpg", "1.PNG", "1_2.png", "A.png", "a.png", "e\u0301.png", "\u00e9.png", "y/1.png"]
    expected = ["1", "1_2", "1_3", "1_2_2", "A", "a_2", "e\u0301", "\u00e9_2", "1_4"]
    assert picture_names(names) == expected
    assert [len(name) for name in picture_names(["n" * 255, "n" * 255])] == [200, 202]
    files = [write_image(tmp_path / "in" / name) for name in names]
    predict_files(Corner(), files, tmp_path / "out")
    assert {path.stem for path in tmp_path.glob("out/*.png")} == set(expected)


def test_threshold_keeps_equal_scores():
    kept = above(prediction([[0, 0, 1, 1]] * 3, [1, 2, 1], [0.75, 0.5, 0.25]), 0.5)
    assert kept["labels"].tolist() == [1, 2]
    assert kept["boxes"].shape == (2, 4)


def test_drawing_marks_the_box_and_nothing_far_from_it():
    image = np.full((200, 300, 3), 128, dtype=np.uint8)
    before = image.copy()
    drawn = draw(image, prediction([[100, 80, 160, 140]], [1], [0.9]), CATEGORIES)
    np.testing.assert_array_equal(image, before)
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    color = np.array(class_color(1))
    # First and last pixel of the box: continuous corners 100 and 160 enclose columns 100..159.
    for row, column in ((139, 100), (139, 159), (110, 100), (110, 159)):
        np.testing.assert_array_equal(drawn[row, column], color)
    assert (drawn[110, [99, 160]] == 128).all()
    changed = np.argwhere((drawn != image).any(axis=2))
    assert changed.min(axis=0)[0] >= 60  # the name above
    assert changed[:, 0].max() == 139
    assert changed[:, 1].min() == 100
    assert (drawn[85:135, 105:155] == 128).all()


def test_small_images_are_enlarged_with_their_boxes():
    image = np.full((100, 128, 3), 128, dtype=np.uint8)
    assert legible_scale(image) == 4
    assert legible_scale(np.zeros((320, 640, 3), dtype=np.uint8)) == 1
    assert legible_scale(np.zeros((1, 5000, 3), dtype=np.uint8)) == 1  # 320 would make 512 megapixels of it
    assert legible_scale(np.zeros((300, 2, 3), dtype=np.uint8)) == 6
    drawn = draw(image, prediction([[40, 50, 80, 90]], [1], [0.9]), CATEGORIES, scale=4)
    assert drawn.shape == (400, 512, 3)
    marked = np.argwhere((drawn[200:360] == np.array(class_color(1))).all(axis=2))
    assert (marked[:, 1].min(), marked[:, 1].max()) == (160, 319)


@pytest.mark.parametrize("name", ["two\nlines", "\ud800", "\x00", "\x1b[31m", "n" * 5000, ""])
def test_any_name_of_a_class_can_be_drawn(name):
    image = np.full((60, 80, 3), 128, dtype=np.uint8)
    drawn = draw(image, prediction([[9, 9, 40, 40]], [1], [0.9]), (Category(1, 1, name),))
    assert (drawn != image).any()


def test_nothing_below_the_threshold_is_drawn():
    image = np.full((50, 60, 3), 128, dtype=np.uint8)
    found = prediction([[5, 5, 30, 30]], [1], [0.4])
    np.testing.assert_array_equal(draw(image, found, CATEGORIES, score_threshold=0.5), image)
    np.testing.assert_array_equal(draw(image, prediction([], [], []), CATEGORIES), image)
    assert (draw(image, found, CATEGORIES, score_threshold=0.4) != image).any()


@pytest.mark.parametrize("size", [(5, 5), (40, 60), (1200, 1600), (3, 400)])
@pytest.mark.parametrize(
    "box", [[0, 0, 3, 3], [-20, -20, 2000, 2000], [2.4, 2.4, 2.5, 2.5], [50, 35, 60, 40], [5000, 5000, 5010, 5010]]
)
def test_any_box_can_be_drawn_in_any_image(size, box):
    image = np.full((*size, 3), 128, dtype=np.uint8)
    drawn = draw(image, prediction([box, box, box, box], [1, 2, 3, 99], [0.9, 0.8, 0.7, 0.6]), CATEGORIES)
    assert drawn.shape == image.shape
    assert (drawn != image).any()


def test_the_name_stays_inside_the_image():
    image = np.full((120, 160, 3), 128, dtype=np.uint8)

    def plate(box: list[float]) -> int:
        drawn = draw(image, prediction([box], [1], [0.9]), CATEGORIES)
        return int((drawn == np.array(class_color(1))).all(axis=2).sum())

    # As many coloured pixels as for the same box in the middle: no row or column of the plate (ten pixels and more
    # each) is cut off. The box itself, a pixel or two, may be covered.
    middle = plate([80, 60, 81, 61])
    for box in ([158, 60, 159, 61], [80, 0, 81, 1], [158, 118, 160, 120], [0, 0, 1, 1]):
        assert abs(plate(box) - middle) < 5


def test_names_do_not_cover_each_other():
    image = np.full((200, 200, 3), 128, dtype=np.uint8)
    boxes = [[50, 80, 120, 140], [52, 81, 121, 141]]
    both = draw(image, prediction(boxes, [1, 2], [0.9, 0.8]), CATEGORIES)
    alone = draw(image, prediction(boxes[:1], [1], [0.9]), CATEGORIES)
    plate = (slice(60, 80), slice(50, 120))
    np.testing.assert_array_equal(both[plate], alone[plate])


def test_colors_are_fixed_and_distinct():
    assert class_color(1) == class_color(1)
    colors = np.array([class_color(label) for label in range(1, 21)]).astype(int)
    distance = np.abs(colors[:, None] - colors[None]).sum(axis=2) + 1000 * np.eye(20, dtype=int)
    assert distance.min() > 25
    assert len({class_color(label) for label in range(1, 81)}) == 80


def result(path: str | Path, found: Prediction, categories: tuple[Category, ...] = CATEGORIES) -> Result:
    return Result(np.zeros((8, 12, 3), dtype=np.uint8), **found, categories=categories, path=Path(path))


def test_coco_entries_name_images_by_number_or_position():
    found = [prediction([[1, 2, 4, 6], [0, 0, 1, 1]], [1, 2], [0.5, 0.25]), prediction([], [], [])]
    entries = list(coco_entries([result("a/000139.jpg", found[0]), result("7.png", found[1])]))
    assert entries[0] == {
        "image_id": 139,
        "file_name": "000139.jpg",
        "category_id": 7,
        "category_name": "cat",
        "bbox": [1, 2, 3, 4],
        "score": 0.5,
    }
    assert [entry["category_id"] for entry in entries] == [7, 3]
    # One name is not a number, or two are the same number: images are numbered, so that no two share an id.
    for names in (["139.jpg", "b.jpg"], ["x/1.jpg", "y/1.jpg"], ["2.jpg", "\u00b2.jpg"]):
        entries = list(coco_entries([result(name, found[0]) for name in names]))
        assert [entry["image_id"] for entry in entries] == [1, 1, 2, 2]
    (first, _) = coco_entries([result("x.jpg", found[0], ())])
    assert first["category_id"] == 1
    assert "category_name" not in first


def test_coco_entries_are_read_back_as_detections(tmp_path):
    table = shapes_table(3, 64, 0)
    images = ShapesImages(image_size=64, seed=0)
    for index in range(3):
        Image.fromarray(images(index)).save(tmp_path / f"{index + 1:06d}.png")
    results = [replace(one, categories=table.categories) for one in predict(Corner(), tmp_path)]
    path = tmp_path / "detections.json"
    path.write_text(json.dumps(list(coco_entries(results))))
    read = read_coco_detections(path, table)
    assert read.image_index.tolist() == [0, 0, 1, 1, 2, 2]
    assert read.boxes[0].tolist() == [0, 0, 64, 64]
    assert read.labels.tolist() == [1, 2] * 3


def test_detections_are_shown_from_the_last_evaluations_best_f1_or_a_half():
    model = Corner()
    assert shown_from(model) == (0.5, "no threshold has been evaluated yet")
    model.score_threshold = None
    assert shown_from(model)[0] == 0.5
    model.score_threshold = 0.0
    assert shown_from(model) == (0.0, "best F1 of the last evaluation")
