"""Images as people have them (paths, URLs, Pillow's, arrays, tensors, folders, patterns, videos), one by one as RGB."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeAlias
from urllib.parse import unquote, urlparse
from urllib.request import url2pathname

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from resdet.data.image_files import find_images
from resdet.data.images import image_to_rgb, read_image
from resdet.data.video import Frame, is_video, read_frames
from resdet.errors import DataError, UnreadableImageError, UserError, WeightsError, printable_name
from resdet.weights.download import open_url, reason_of

_OVERSHOOT = 1e-3
"""What resizing may add to white, or take from black."""

Source: TypeAlias = str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8] | Tensor
"""A path (of a file or folder, or a pattern), an http, https or file URL, or an image in memory."""

MAX_DOWNLOAD = 256 * 2**20
"""Bytes of an image behind a URL; larger ones are refused."""

_STREAMS = ("rtsp", "rtmp", "rtp", "udp", "tcp", "srt", "mms")
_KINDS = "a path, a URL, a PIL image, a uint8 array [H, W, 3] or a tensor [3, H, W]"


class Found(NamedTuple):
    """An image, or a video, that has been found and not yet read."""

    where: str  # what messages call it
    source: Path | str | Image.Image | npt.NDArray[np.uint8] | Tensor  # a file, a URL, or the image itself

    @property
    def path(self) -> Path | str | None:
        """The file or URL; None for an image in memory."""
        return self.source if isinstance(self.source, Path | str) else None


def find_sources(images: Source | Iterable[Source]) -> Iterator[Found]:
    """Yield what one source or many stand for, in order: a folder or pattern for its files, a 4-D array for its images.

    Raises:
        DataError: If a path does not exist, matches nothing or holds no image.
        UserError: If an element is of a type that is no image, or the address of a stream or video.
    """
    if isinstance(images, np.ndarray | Tensor):
        is_one = images.ndim != 4
    else:
        is_one = isinstance(images, str | os.PathLike | bytes | Image.Image) or not isinstance(images, Iterable)
    named = [("image", images)] if is_one else ((f"images[{i}]", one) for i, one in enumerate(images))  # type: ignore[arg-type]
    for where, source in named:
        scheme = urlparse(source).scheme if isinstance(source, str) else ""
        if isinstance(source, np.ndarray | Tensor | Image.Image):
            yield Found(where, source)
        elif isinstance(source, str) and (scheme in ("http", "https") or scheme in _STREAMS):
            if scheme in _STREAMS or is_video(Path(source_name(source))):
                raise UserError(f"{source}: only files are read as videos: save it, or pass its frames as arrays")
            yield Found(source, source)
        elif isinstance(source, str | os.PathLike) and not isinstance(os.fspath(source), bytes):
            path = url2pathname(urlparse(str(source)).path) if scheme == "file" else source
            yield from (Found(str(file), file) for file in find_images([Path(path)], videos=True))
        else:
            raise UserError(f"{where}: must be {_KINDS}, got {type(source).__name__}")


def source_name(source: Path | str) -> str:
    """Return the file name of a path or URL, without folders."""
    if isinstance(source, Path):
        return source.name
    return printable_name(PurePosixPath(unquote(urlparse(source).path)).name) or "image"


def read_source(
    found: Found, *, upright: bool = True, every: int = 1
) -> Iterator[tuple[Frame | None, npt.NDArray[np.uint8]]]:
    """Yield an image, uint8 RGB ``[H, W, 3]``, or every ``every``-th frame of a video, as ``read_frames`` does.

    A DataError is raised if it cannot be read, or what is in memory is no such image.
    """
    where, source = found
    if isinstance(source, Path) and is_video(source):
        yield from read_frames(source, every=every, upright=upright)
    elif isinstance(source, Path):
        yield None, read_image(source, upright=upright)
    elif isinstance(source, str):
        yield None, _downloaded(source, upright)
    else:
        yield None, image_in_memory(source, where, upright=upright)


def _downloaded(url: str, upright: bool) -> npt.NDArray[np.uint8]:
    try:
        with open_url(url) as response:
            # Headers may lie: no more is read than is allowed, and one byte.
            content = response.read(MAX_DOWNLOAD + 1)
    except (OSError, HTTPException, WeightsError) as error:
        raise UnreadableImageError(f"{url}: {reason_of(error)}") from error
    if len(content) > MAX_DOWNLOAD:
        raise UnreadableImageError(f"{url}: refused: an image file may have at most {MAX_DOWNLOAD} bytes")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "image"
        file.write_bytes(content)
        try:
            return read_image(file, upright=upright)
        except UnreadableImageError as error:
            raise UnreadableImageError(str(error).replace(str(file), url, 1)) from error


def image_in_memory(
    image: Image.Image | npt.NDArray[np.uint8] | Tensor, where: str, *, upright: bool = False
) -> npt.NDArray[np.uint8]:
    """Return an image as uint8 RGB ``[H, W, 3]``; a DataError says of ``where`` what it must be."""
    if isinstance(image, Image.Image):
        image = image_to_rgb(image, where, upright=upright)
    elif isinstance(image, Tensor):
        image = _from_tensor(image, where)
    if image.dtype != np.uint8 or image.shape[2:] not in ((), (3,)) or 0 in image.shape or image.ndim < 2:
        got = f"{image.dtype} {list(image.shape)}"
        hint = "; scale floats to 0..255 and round them" if image.dtype.kind == "f" else ""
        raise DataError(f"{where}: expected uint8 RGB [H, W, 3] or gray [H, W], got {got}{hint}")
    return np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else np.ascontiguousarray(image)


def _from_tensor(image: Tensor, where: str) -> npt.NDArray[np.uint8]:
    is_float = image.is_floating_point()
    if image.shape[:-2] != (3,) or 0 in image.shape or not (is_float or image.dtype == torch.uint8):
        got = f"{str(image.dtype).removeprefix('torch.')} {list(image.shape)}"
        raise DataError(f"{where}: a tensor must be uint8 or float RGB [3, H, W], got {got}")
    image = image.detach().cpu()
    if is_float:
        low, high = image.float().aminmax()
        if not -_OVERSHOOT <= low <= high <= 1 + _OVERSHOOT:  # NaN too
            raise DataError(f"{where}: a float tensor must be in [0, 1], got {low:g} to {high:g}")
        image = (255 * image.float().clamp(0, 1)).round().to(torch.uint8)
    return image.permute(1, 2, 0).numpy()  # [H, W, 3]
