"""Images as people have them: every kind becomes the same pixels, and what is none is named in the error."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resdet.data import sources
from resdet.data.sources import find_sources, read_source, source_name
from resdet.errors import DataError, UnreadableImageError, UserError
from resdet.weights import download

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)


def read_all(images: object, *, upright: bool = True) -> list[np.ndarray]:
    return [
        image
        for found in find_sources(images)
        for _, image in read_source(found, upright=upright)  # type: ignore[arg-type]
    ]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(PIXELS).save(tmp_path / "photo 1.png")
    return tmp_path / "photo 1.png"


def test_every_kind_of_source_gives_the_same_pixels(photo: Path) -> None:
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    kinds = [
        photo,
        str(photo),
        photo.parent,
        str(photo.parent / "*.png"),
        photo.as_uri(),
        Image.open(photo),
        PIXELS,
        PIXELS[:, ::-1][:, ::-1],  # not contiguous
        tensor,
        tensor / 255,
        tensor.double() / 255,
        (tensor / 255).requires_grad_(),
    ]
    for one in kinds:
        (image,) = read_all(one)
        np.testing.assert_array_equal(image, PIXELS, err_msg=repr(one)[:80])
        assert image.dtype == np.uint8
    for image in read_all(kinds) + read_all(iter(kinds)):
        np.testing.assert_array_equal(image, PIXELS)
    assert len(read_all(np.stack([PIXELS] * 3))) == len(read_all(torch.stack([tensor] * 3))) == 3
    assert len(read_all([photo, photo])) == 2, "each element counts, repeated ones too"
    assert read_all([]) == []


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "I;16"])
def test_pil_images_of_any_mode_are_read_as_their_files_are(tmp_path: Path, mode: str) -> None:
    if mode == "I;16":
        picture = Image.fromarray(PIXELS[:, :, 0].astype(np.uint16) * 256 + 77)
    else:
        picture = Image.fromarray(PIXELS).convert("L" if mode == "LA" else "RGB").convert("P" if mode == "PA" else mode)
        picture = picture.convert(mode)
    (image,) = read_all(picture)
    if mode == "I;16":
        np.testing.assert_array_equal(image, np.repeat(PIXELS[:, :, :1], 3, axis=2))
    else:
        np.testing.assert_array_equal(image, np.asarray(picture.convert("RGB")))
    if mode in ("1", "L", "LA", "P", "RGBA", "I;16"):
        picture.save(tmp_path / "a.png")
        np.testing.assert_array_equal(read_all(tmp_path / "a.png")[0], image)


def test_float_tensors_are_rounded_to_8_bits() -> None:
    (image,) = read_all(torch.tensor([0.0, 0.3 / 255, 0.7 / 255, 0.999, 1.0]).expand(3, 1, 5))
    assert image[0, :, 0].tolist() == [0, 0, 1, 255, 255]


def test_gray_arrays_are_repeated_into_three_channels() -> None:
    (image,) = read_all(PIXELS[:, :, 0])
    np.testing.assert_array_equal(image, np.repeat(PIXELS[:, :, :1], 3, axis=2))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            PIXELS / 255,
            "uint8 RGB [H, W, 3] or gray [H, W], got float64 [8, 12, 3]; scale floats to 0..255 and round them",
        ),
        (PIXELS[:, :, :1], "expected uint8 RGB [H, W, 3] or gray [H, W], got uint8 [8, 12, 1]"),
        (PIXELS.transpose(2, 0, 1), "expected uint8 RGB [H, W, 3] or gray [H, W], got uint8 [3, 8, 12]"),
        (PIXELS[:0], "expected uint8 RGB [H, W, 3] or gray [H, W], got uint8 [0, 12, 3]"),
        (PIXELS[0, 0], "expected uint8 RGB [H, W, 3] or gray [H, W], got uint8 [3]"),
        (PIXELS.astype(np.uint16), "expected uint8 RGB [H, W, 3] or gray [H, W], got uint16 [8, 12, 3]"),
        (Image.new("RGB", (0, 5)), "expected uint8 RGB [H, W, 3] or gray [H, W], got uint8 [5, 0, 3]"),
        (Image.new("F", (4, 5)), "pixels must be 8- or 16-bit gray, RGB or CMYK, got mode F"),
        (Image.new("I", (4, 5)), "pixels must be 8- or 16-bit gray, RGB or CMYK, got signed or 32-bit gray"),
        (torch.zeros(8, 12, 3), "a tensor must be uint8 or float RGB [3, H, W], got float32 [8, 12, 3]"),
        (torch.zeros(3, 8, 12).int(), "a tensor must be uint8 or float RGB [3, H, W], got int32 [3, 8, 12]"),
        (torch.full((3, 8, 12), 2.0), "a float tensor must be in [0, 1], got 2 to 2"),
        (torch.full((3, 8, 12), torch.nan), "a float tensor must be in [0, 1], got nan to nan"),
    ],
)
def test_what_is_no_image_in_memory_is_refused_with_its_position(image: object, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_all([PIXELS, image])
    assert str(caught.value).startswith("images[1]: ")
    assert str(caught.value).endswith(message)
    with pytest.raises(DataError, match=r"^image: "):
        read_all(image)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (
            7,
            UserError,
            "image: must be a path, a URL, a PIL image, a uint8 array [H, W, 3] or a tensor [3, H, W], got int",
        ),
        (b"x.jpg", UserError, "[H, W, 3] or a tensor [3, H, W], got bytes"),
        (
            [PIXELS, None],
            UserError,
            "images[1]: must be a path, a URL, a PIL image, a uint8 array [H, W, 3] or a tensor ",
        ),
        (["none.jpg"], DataError, "none.jpg: no such file or folder"),
        ("no*.jpg", DataError, "no*.jpg: no image or video matches this pattern"),
        ("empty", DataError, "empty: no images or videos in this folder (looked for .jpg, "),
        ("rtsp://camera/1", UserError, "rtsp://camera/1: only files are read as videos: save it, or pass its frames"),
        ("http://host/a.mp4?x=1", UserError, "http://host/a.mp4?x=1: only files are read as videos: save it"),
    ],
)
def test_what_is_no_source_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: object, error: type[Exception], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(error) as caught:
        read_all(images)
    assert message in str(caught.value)


def test_a_pil_image_of_a_damaged_file_is_named(photo: Path) -> None:
    photo.write_bytes(photo.read_bytes()[:-60])
    with pytest.raises(UnreadableImageError, match=r"^image: cannot be decoded: "):
        read_all(Image.open(photo))


# ---- URLs


class Server(http.server.SimpleHTTPRequestHandler):
    """A path says what happens: moved, silent, or the file."""

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if "moved" in self.path:
            self.send_response(302)
            self.send_header("Location", self.path.partition("to=")[2])
            self.end_headers()
        elif "silent" in self.path:
            self.server.done.wait(5)  # type: ignore[attr-defined]
        else:
            super().do_GET()


@pytest.fixture
def server(tmp_path: Path, photo: Path) -> Iterator[str]:
    (tmp_path / "page.jpg").write_text("<!doctype html><title>Log in</title>")
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:-60])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(tmp_path))) as httpd:
        httpd.done = threading.Event()  # type: ignore[attr-defined]
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_port}"
        finally:
            httpd.done.set()  # type: ignore[attr-defined]
            httpd.shutdown()
            thread.join()


@pytest.mark.parametrize("path", ["photo%201.png", "photo%201.png?size=large/x.jpg", "moved?to=/photo%201.png"])
def test_images_are_read_from_urls(server: str, path: str) -> None:
    (found,) = find_sources(f"{server}/{path}")
    ((_, image),) = read_source(found)
    np.testing.assert_array_equal(image, PIXELS)
    assert found.path == f"{server}/{path}"
    assert source_name(found.path) == ("moved" if "moved" in path else "photo 1.png")
    assert source_name("https://host") == "image"
    assert source_name("https://host/a%00%2F..%0Ab.jpg") == "..\\nb.jpg"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.jpg", "cannot be downloaded (HTTP Error 404: File not found)"),
        ("silent.jpg", "cannot be downloaded (nothing came for 0.3 seconds)"),
        ("page.jpg", "not a readable image (36 bytes); formats are JPEG, PNG"),
        ("cut.png", "cannot be decoded: "),
        ("moved?to=ftp://host/a.jpg", "is redirected to ftp://host/a.jpg, which is refused: not http or https)"),
    ],
)
def test_what_cannot_be_downloaded_is_an_unreadable_image(
    server: str, path: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    with pytest.raises(UnreadableImageError) as caught:
        read_all(f"{server}/{path}")
    assert str(caught.value).startswith(f"{server}/{path}: ")
    assert message in str(caught.value)


def test_large_downloads_are_refused(server: str, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = photo.stat().st_size
    monkeypatch.setattr(sources, "MAX_DOWNLOAD", size)
    assert len(read_all(f"{server}/photo%201.png")) == 1
    monkeypatch.setattr(sources, "MAX_DOWNLOAD", size - 1)
    with pytest.raises(UnreadableImageError, match=f"refused: an image file may have at most {size - 1} bytes"):
        read_all(f"{server}/photo%201.png")
    with pytest.raises(UnreadableImageError, match=r"cannot be downloaded \(.*refused"):
        read_all("http://127.0.0.1:9/a.jpg")
