"""Videos: frames with their indices and times, and files that are whole or absent."""

from __future__ import annotations

import functools
import logging
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from resdet.data import video
from resdet.data.video import Frame, frame_rate, is_video, read_frames, write_video
from resdet.errors import UnreadableImageError

NUM, RATE = 9, 12.5


def pictures(num: int = NUM, size: tuple[int, int] = (48, 64)) -> list[np.ndarray]:
    """Frame i is red at level 25 * i, with blue at its top left: codecs lose little of that."""
    frames = np.zeros((num, *size, 3), dtype=np.uint8)
    frames[..., 0] = 25 * np.arange(num)[:, None, None]
    frames[:, :16, :16, 2] = 250
    return list(frames)


def replace_in(module: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, **methods: Callable[..., Any]) -> None:
    """Have a module see one of OpenCV's classes with other methods; it cannot be inherited from."""
    kind = getattr(cv2, name)

    class Other:
        fourcc = cv2.VideoWriter.fourcc

        def __init__(self, *args: Any) -> None:
            self._real = kind(*args)

        def __getattr__(self, method: str) -> Any:
            real = self._real
            return functools.partial(methods[method], real) if method in methods else getattr(real, method)

    seen = SimpleNamespace(**{key: value for key, value in vars(cv2).items() if not key.startswith("__")})
    setattr(seen, name, Other)
    monkeypatch.setattr(module, "cv2", seen)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    write_video(tmp_path / "clip.mp4", iter(pictures()), RATE)
    return tmp_path / "clip.mp4"


def motion_jpeg(path: Path, frames: Iterable[np.ndarray], size: tuple[int, int] = (48, 64)) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), RATE, size[::-1])
    for picture in frames:
        writer.write(picture[:, :, ::-1])
    writer.release()
    return path


@pytest.mark.parametrize("name", ["clip.mp4", "clip.AVI"])
def test_frames_come_in_order_in_rgb_with_their_times(clip: Path, name: str) -> None:
    path = (
        clip if name == "clip.mp4" else motion_jpeg(clip.with_name("clip.avi"), pictures()).rename(clip.with_name(name))
    )
    frames = list(read_frames(path))
    assert [frame for frame, _ in frames] == [Frame(i, pytest.approx(i / RATE)) for i in range(NUM)]
    for (_, image), expected in zip(frames, pictures(), strict=True):
        assert (image.dtype, image.shape, image.flags.c_contiguous) == (np.uint8, (48, 64, 3), True)
        inner = (slice(20, 40), slice(24, 60))
        assert np.abs(image[inner].astype(int) - expected[inner]).max() < 12
        assert image[4:12, 4:12, 2].min() > 200
    assert frame_rate(path) == pytest.approx(RATE)


def test_every_nth_frame(clip: Path) -> None:
    assert [frame.index for frame, _ in read_frames(clip, every=4)] == [0, 4, 8]
    assert [frame.index for frame, _ in read_frames(clip, every=100)] == [0]
    seen = [int(image[30, 40, 0]) for _, image in read_frames(clip, every=4)]
    assert seen == pytest.approx([0, 100, 200], abs=12)


def test_a_turned_video_is_read_as_players_show_it(clip: Path) -> None:
    """The matrix of the track's header says a quarter turn clockwise, as telephones write it."""
    content = bytearray(clip.read_bytes())
    start = content.index(b"tkhd") + 44
    one = 1 << 16
    content[start : start + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 48 * one, 0, 1 << 30)
    clip.write_bytes(content)
    (_, upright), (_, stored) = next(read_frames(clip)), next(read_frames(clip, upright=False))
    assert (upright.shape, stored.shape) == ((64, 48, 3), (48, 64, 3))
    np.testing.assert_array_equal(upright, np.rot90(stored, -1))
    assert stored[:8, :8, 2].min() > 200
    assert upright[:8, -8:, 2].min() > 200


def test_a_video_that_is_cut_short_is_read_as_far_as_it_goes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (NUM, 240, 320, 3), dtype=np.uint8)
    path = motion_jpeg(tmp_path / "a.avi", noise, (240, 320))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    frames = list(read_frames(path))
    assert 2 <= len(frames) < NUM
    assert caplog.messages == [f"{path}: {len(frames)} frames could be read, of {NUM} that the file states"]


def test_what_is_no_video_is_an_error(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(UnreadableImageError, match=r"none\.mp4: no such video file"):
        next(read_frames(tmp_path / "none.mp4"))
    clip.write_bytes(clip.read_bytes()[:500])  # the index of an MP4 is at its end
    with pytest.raises(UnreadableImageError, match=r"clip\.mp4: not a readable video \(500 bytes\)"):
        next(read_frames(clip))
    assert not is_video(str(clip))
    assert not is_video(Path("mp4"))


def test_a_video_without_a_single_frame_is_an_error(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_in(video, monkeypatch, "VideoCapture", grab=lambda capture: False)
    with pytest.raises(UnreadableImageError, match="no frame of this video can be decoded"):
        next(read_frames(clip))


@pytest.mark.parametrize("stated", [0.0, float("nan"), 90000.0])
def test_without_a_usable_rate_25_is_taken_and_logged(
    clip: Path, stated: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    replace_in(
        video,
        monkeypatch,
        "VideoCapture",
        get=lambda capture, key: stated if key == cv2.CAP_PROP_FPS else capture.get(key),
    )
    assert frame_rate(clip) == 25
    text = f"{clip}: states no usable frame rate ({stated:g}); 25 frames per second are assumed"
    assert caplog.record_tuples == [("resdet.data.video", logging.WARNING, text)]


@pytest.mark.parametrize(("size", "even"), [((47, 65), (48, 66)), ((47, 64), (48, 64)), ((480, 640), (480, 640))])
def test_videos_of_any_size_are_written(tmp_path: Path, size: tuple[int, int], even: tuple[int, int]) -> None:
    """OpenCV would cut off the last column or row of an odd size, and with it the lines of boxes there."""
    images = pictures(3, size)
    for image in images:
        image[-5:] = image[:, -5:] = 255
    write_video(tmp_path / "a.mp4", images, 0.5)
    read = [image for _, image in read_frames(tmp_path / "a.mp4")]
    assert [image.shape for image in read] == [(*even, 3)] * 3
    assert min(int(image[-3:].min()) for image in read) > 150
    assert frame_rate(tmp_path / "a.mp4") == pytest.approx(0.5)


def test_a_video_may_be_slower_than_the_format_can_say(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", pictures(3), 0.001)
    assert frame_rate(tmp_path / "a.mp4") == pytest.approx(0.01)


@pytest.mark.parametrize("stated", [0.0, -9e15])
def test_a_file_that_does_not_state_its_length_is_no_damaged_one(
    clip: Path, stated: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def get(capture: cv2.VideoCapture, key: int) -> float:
        return stated if key == cv2.CAP_PROP_FRAME_COUNT else capture.get(key)

    replace_in(video, monkeypatch, "VideoCapture", get=get)
    assert len(list(read_frames(clip))) == NUM
    assert caplog.messages == []


def test_a_frame_of_another_size_is_scaled_and_not_lost(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", [*pictures(2), *pictures(2, (96, 128))], RATE)
    assert [image.shape for _, image in read_frames(tmp_path / "a.mp4")] == [(48, 64, 3)] * 4


def test_an_interrupted_video_leaves_no_file_or_the_one_before(clip: Path) -> None:
    before = clip.read_bytes()

    def interrupted():
        yield from pictures(3)
        raise KeyboardInterrupt

    for path in (clip, clip.with_name("new.mp4")):
        with pytest.raises(KeyboardInterrupt):
            write_video(path, interrupted(), RATE)
    assert clip.read_bytes() == before
    assert [path.name for path in clip.parent.iterdir()] == ["clip.mp4"]


def test_frames_that_are_lost_in_writing_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_written = iter(range(NUM))
    write = lambda writer, picture: next(num_written) < 2 and writer.write(picture)  # noqa: E731
    replace_in(video, monkeypatch, "VideoWriter", write=write)
    with pytest.raises(OSError, match=r"only 2 of 9 frames could be written: is the disk full\?") as caught:
        write_video(tmp_path / "a.mp4", pictures(), RATE)
    assert caught.value.filename == str(tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []
