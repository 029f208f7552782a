"""Images as people have them (paths, URLs, Pillow's, arrays, tensors, folders, patterns, videos), one by one as RGB."""

from __future__ import annotations

import os
import tempfile
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import TypeAlias
from urllib.parse import unquote, urlparse

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from resdet.data.image_files import find_images
from resdet.data.images import image_to_rgb, read_image
from resdet.data.video import Frame, is_video, read_frames
from resdet.errors import DataError, UnreadableImageError, UserError, first_line
from resdet.weights.download import TIMEOUT, open_url

Source: TypeAlias = str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8] | Tensor
"""A path (of a file or folder, or a pattern), an http, https or file URL, or an image in memory."""

MAX_DOWNLOAD = 256 * 2**20
"""Bytes of an image behind a URL; larger ones are refused."""

_STREAMS = ("rtsp", "rtmp", "rtp", "udp", "tcp", "srt", "mms")
_KINDS = "a path, a URL, a PIL image, a uint8 array [H, W, 3] or a tensor [3, H, W]"


@dataclass(frozen=True)
class Entry:
    """An image, or a video, that has been found but not read.

    Attributes:
        where: What messages call it.
        source: A file, a URL, or the image itself.
    """

    where: str
    source: Path | str | Image.Image | npt.NDArray[np.uint8] | Tensor

    @property
    def path(self) -> Path | str | None:
        """The file or URL; None for an image in memory."""
        return self.source if isinstance(self.source, Path | str) else None

    @property
    def is_video(self) -> bool:
        """Whether it stands for many images."""
        return is_video(self.source)

    def read(self, *, upright: bool, every: int) -> Iterator[tuple[Frame | None, npt.NDArray[np.uint8]]]:
        """Yield the image, uint8 RGB ``[H, W, 3]``, or every ``every``-th frame of the video.

        A DataError is raised if it cannot be read, or what is in memory is no such image.
        """
        if isinstance(self.source, Path) and is_video(self.source):
            yield from read_frames(self.source, every=every, upright=upright)
        else:
            yield None, self._image(upright)

    def _image(self, upright: bool) -> npt.NDArray[np.uint8]:
        source = self.source
        if isinstance(source, Path):
            return read_image(source, upright=upright)
        if isinstance(source, str):
            return _downloaded(source, upright)
        if isinstance(source, Image.Image):
            image = image_to_rgb(source, self.where, upright=upright)
        else:
            image = _from_tensor(source, self.where) if isinstance(source, Tensor) else _from_array(source, self.where)
        if 0 in image.shape:
            raise DataError(f"{self.where}: an image must have pixels, got {image.shape[1]}x{image.shape[0]}")
        return image


def find_sources(images: Source | Iterable[Source]) -> Iterator[Entry]:
    """Yield what one source or many stand for, in order: a folder or pattern for its files, a 4-D array for its images.

    Raises:
        DataError: If a path does not exist, matches nothing or holds no image.
        UserError: If an element is of a type that is no image, or the address of a stream.
    """
    if _is_one(images):
        yield from _entries(images, "image")
        return
    for index, one in enumerate(images):  # type: ignore[arg-type]
        yield from _entries(one, f"images[{index}]")


def source_name(source: Path | str) -> str:
    """Return the file name of a path or URL, without folders."""
    return source.name if isinstance(source, Path) else PurePosixPath(unquote(urlparse(source).path)).name or "image"


def _is_one(images: object) -> bool:
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim != 4
    return isinstance(images, str | os.PathLike | bytes | Image.Image) or not isinstance(images, Iterable)


def _entries(source: object, where: str) -> Iterator[Entry]:
    if isinstance(source, np.ndarray | Tensor | Image.Image):
        yield Entry(where, source)
    elif isinstance(source, str) and (scheme := urlparse(source).scheme) in ("http", "https", "file", *_STREAMS):
        if scheme == "file":
            yield from _entries(Path(urllib.request.url2pathname(urlparse(source).path)), where)
            return
        if scheme in _STREAMS:
            raise UserError(
                f"{source}: streams are not read: write one to a video file, or hand over its frames as arrays"
            )
        if is_video(Path(source_name(source))):
            raise UserError(f"{source}: videos are read from files only: download it first")
        yield Entry(source, source)
    elif isinstance(source, str | os.PathLike) and isinstance(os.fspath(source), str):
        yield from (Entry(str(file), file) for file in find_images([Path(source)], videos=True))
    else:
        raise UserError(f"{where}: must be {_KINDS}, got {type(source).__name__}")


def _downloaded(url: str, upright: bool) -> npt.NDArray[np.uint8]:
    try:
        with open_url(url) as response:
            # Headers may lie: no more is read than is allowed, and one byte.
            content = response.read(MAX_DOWNLOAD + 1)
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None)  # of a URLError, which a connection raises
        cause = reason if isinstance(reason, OSError) else error
        why = f"nothing came for {TIMEOUT:g} seconds" if isinstance(cause, TimeoutError) else first_line(cause)
        raise UnreadableImageError(f"{url}: cannot be downloaded ({why})") from error
    if len(content) > MAX_DOWNLOAD:
        raise UnreadableImageError(f"{url}: refused: an image file may have at most {MAX_DOWNLOAD} bytes")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "image"
        file.write_bytes(content)
        try:
            return read_image(file, upright=upright)
        except UnreadableImageError as error:
            raise UnreadableImageError(str(error).replace(str(file), url, 1)) from error


def _from_array(image: npt.NDArray[np.uint8], where: str) -> npt.NDArray[np.uint8]:
    if image.dtype == np.uint8 and image.ndim == 2:
        return np.repeat(image[:, :, None], 3, axis=2)  # gray [H, W]
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        got = f"{image.dtype} {list(image.shape)}"
        hint = "; scale floats to 0..255 and round them" if image.dtype.kind == "f" else ""
        raise DataError(f"{where}: expected uint8 RGB [H, W, 3] or gray [H, W], got {got}{hint}")
    return np.ascontiguousarray(image)


def _from_tensor(image: Tensor, where: str) -> npt.NDArray[np.uint8]:
    if image.ndim != 3 or image.shape[0] != 3 or not (image.dtype == torch.uint8 or image.is_floating_point()):
        got = f"{str(image.dtype).removeprefix('torch.')} {list(image.shape)}"
        raise DataError(f"{where}: a tensor must be uint8 or float RGB [3, H, W], got {got}")
    if image.is_floating_point():
        image = image.detach().float()
        low, high = (float(value) for value in image.aminmax()) if image.numel() else (0.0, 0.0)
        if not 0 <= low <= high <= 1:  # NaN too
            raise DataError(f"{where}: a float tensor must be in [0, 1], got {low:g} to {high:g}")
        image = (255 * image).round().to(torch.uint8)
    return np.ascontiguousarray(image.cpu().permute(1, 2, 0).numpy())  # [H, W, 3]
