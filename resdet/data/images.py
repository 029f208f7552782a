"""Read image files as uint8 RGB arrays, with errors that name the file.

Not built: decoding on a GPU (nvjpeg). Its pixels are not libjpeg's, augmentation takes images in host memory, and all
that is done here about EXIF's orientation, CMYK, other formats and damaged files would be needed a second time.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from resdet.data.annotations import AnnotationTable
from resdet.data.image_files import ImageFolder, check_names
from resdet.data.names import is_file
from resdet.errors import DataError, UnreadableImageError, first_line
from resdet.types import Floats

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
"""Pillow's names of the formats that are read. Its other forty decoders stay off: one of them runs Ghostscript."""

MAX_PIXELS = 178_956_970
"""Larger images (512 MiB as RGB) are refused before they are decoded. It is Pillow's own limit too, which a program may
have switched off."""

MAX_JPEG_SCANS = 100
"""Progressive JPEGs of more scans are refused; encoders write about 10. Each scan goes over the whole image: 95 bytes
cost 0.05 s at 8000x8000, so that a megabyte would keep a decoder busy for ten minutes."""

_EXIF_ORIENTATION = 0x0112
_TIFF_BITS = 258
_TIFF_PHOTOMETRIC = 262
_PIXELS = "pixels must be 8- or 16-bit gray, RGB or CMYK"


class Images(Protocol):
    """Anything that returns the images of a table."""

    def __call__(self, index: int) -> npt.NDArray[np.uint8]:
        """Return the image at row ``index`` of the table, uint8 RGB ``[H, W, 3]``."""
        ...


@dataclass(frozen=True)
class ImageHeader:
    """An image file's properties."""

    size: tuple[int, int]  # (height, width) of what read_image returns
    format: str  # one of IMAGE_FORMATS, or Pillow's name of a variant ("MPO", the JPEG of some telephones)
    mode: str  # Pillow's name of the pixel type: "RGB", "L" (gray), "P" (palette), "CMYK", "I;16" and so on
    orientation: int  # EXIF's 1..8; 1, upright, where none is given


def read_image(path: Path, *, upright: bool = False) -> npt.NDArray[np.uint8]:
    """Read an image file as 8-bit RGB, with its stored pixels or ``upright``, as EXIF's orientation says.

    * Formats are ``IMAGE_FORMATS``, recognised by content. Of an animation, the first frame is read.
    * Grayscale and 1-bit pixels are repeated into three channels, a palette is looked up, and an alpha channel is
      dropped: the colours stored under transparent pixels are kept.
    * CMYK is converted by Pillow, without colour profiles. A CMYK JPEG is taken as inverted, as Adobe writes it and
      OpenCV reads it.
    * 16-bit samples keep their high byte (Pillow alone would clip 16-bit grayscale to white), those of a 12-bit TIFF
      their high eight bits. Signed, 32-bit and floating-point pixels, whose range is unknown, are refused.
    * Pillow turns TIFF files by itself, whether they are to be ``upright`` or not.
    * Pillow's warnings (of odd EXIF, say) are not passed on: a file is read, or it is an error. Only libtiff may write
      to stderr.

    Decoding is Pillow's, 1.84 ms for one of COCO's JPEG files. OpenCV, which returns gray where a file is cut short,
    took 1.46 ms for the others, with the same pixels: not worth two decoders that may diverge in their next versions.

    Returns:
        uint8 ``[H, W, 3]``, RGB, contiguous and writable.

    Raises:
        UnreadableImageError: If the file is missing, empty, cut short, not an image, larger than ``MAX_PIXELS``, or
            holds no 8- or 16-bit pixels.
    """
    with _opened(path) as image:
        return _pixels(image, path, upright)


def image_to_rgb(image: Image.Image, where: str, *, upright: bool = False) -> npt.NDArray[np.uint8]:
    """Convert a Pillow image of any format to 8-bit RGB, as ``read_image`` does; errors name it as ``where``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _pixels(image, where, upright)
    except DataError:
        raise
    except Exception as error:  # a file that Pillow has opened is decoded only here
        raise UnreadableImageError(f"{where}: cannot be decoded: {first_line(error)}") from error


def _pixels(image: Image.Image, where: Path | str, upright: bool) -> npt.NDArray[np.uint8]:
    if image.mode.startswith("I"):
        pixels = _from_deep_gray(image, where)
    elif image.mode in ("F", "LAB"):
        raise UnreadableImageError(f"{where}: {_PIXELS}, got mode {image.mode}")
    else:
        pixels = np.array(image.convert("RGB"))
    return _turned(pixels, _orientation(image)) if upright else pixels


def _from_deep_gray(image: Image.Image, where: Path | str) -> npt.NDArray[np.uint8]:
    if image.mode == "I" and image.format in (None, "TIFF"):  # older Pillow has 16-bit PNG in mode "I" too
        raise UnreadableImageError(f"{where}: {_PIXELS}, got signed or 32-bit gray")
    tags = getattr(image, "tag_v2", {})
    bits = int(tags.get(_TIFF_BITS, (16,))[0])
    values = np.array(image).astype(np.int32) >> (bits - 8)  # [H, W]
    # Pillow inverts a TIFF whose 0 is white only if it has 8 bits.
    gray = (255 - values if tags.get(_TIFF_PHOTOMETRIC) == 0 else values).astype(np.uint8)
    return np.repeat(gray[:, :, None], 3, axis=2)  # [H, W, 3]


def read_header(path: Path) -> ImageHeader:
    """Read an image file's properties; errors are those of ``read_image``, for what comes before the pixels.

    Pixels are decoded only in a PNG without EXIF before them, where it may follow them.
    """
    with _opened(path) as image:
        return ImageHeader((image.height, image.width), str(image.format), image.mode, _orientation(image))


def read_size(path: Path) -> tuple[int, int]:
    """Return an image file's ``(height, width)``; raises as ``read_header`` does."""
    with _opened(path) as image:
        return image.height, image.width


def read_upright_size(path: Path) -> tuple[int, int]:
    """Return the ``(height, width)`` of what ``read_image`` returns ``upright``; raises as ``read_header`` does.

    No pixels are decoded, so the orientation of a PNG that has it behind them, as few writers do, is not seen.
    """
    with _opened(path) as image:
        size = image.height, image.width
        return size[::-1] if _seen_orientation(image) >= 5 else size


def read_orientation(path: Path) -> int:
    """Return an image's EXIF orientation, 1 to 8, as ``read_upright_size`` sees it."""
    with _opened(path) as image:
        return _seen_orientation(image)


def size_tells(orientation: int, size: tuple[int, int]) -> bool:
    """Return whether the size in a table tells if it means the upright image: a turn by 90 degrees, no square."""
    return orientation >= 5 and size[0] != size[1]


def turned_boxes(boxes_xywh: Floats, size: tuple[int, int], orientation: int, *, back: bool) -> Floats:
    """Return boxes ``[N, 4]`` of a stored image in its upright one, or ``back``; ``size`` is that of the given ones."""
    transposed = orientation >= 5
    x, y, w, h = boxes_xywh.T
    height, width = size
    if transposed and not back:
        x, y, w, h, height, width = y, x, h, w, width, height
    if orientation in (3, 4, 7, 8):
        y = height - y - h
    if orientation in (2, 3, 6, 7):
        x = width - x - w
    return np.stack([y, x, h, w] if transposed and back else [x, y, w, h], axis=1)


def _seen_orientation(image: Image.Image) -> int:
    return 1 if image.format == "PNG" and "exif" not in image.info else _orientation(image)


def _orientation(image: Image.Image) -> int:
    # Pillow applies a TIFF's own orientation.
    value = 1 if image.format == "TIFF" else image.getexif().get(_EXIF_ORIENTATION, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turned(pixels: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """Return stored pixels ``[H, W, 3]`` as EXIF's orientation shows them: ``[W, H, 3]`` for 5 to 8."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return np.ascontiguousarray(pixels[rows, columns])


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image file, and turn whatever a decoder raises inside into an error that names the file."""
    try:
        # Checked first: opening a pipe would wait for somebody to write into it.
        if not os.path.isfile(path):
            what = "not an image file, but a folder or a device" if os.path.exists(path) else "no such image file"
            raise UnreadableImageError(f"{path}: {what}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UnreadableImageError(_too_large(path, f"{image.width}x{image.height}"))
                # In a JPEG's data, these two bytes are always the marker of a scan.
                num_scans = Path(path).read_bytes().count(b"\xff\xda") if "progressive" in image.info else 0
                if num_scans > MAX_JPEG_SCANS:
                    what = f"a JPEG may have at most {MAX_JPEG_SCANS} scans, got {num_scans}"
                    raise UnreadableImageError(f"{path}: refused: {what}")
                yield image
    except DataError:
        raise
    except UnidentifiedImageError as error:
        size = os.path.getsize(path)
        what = f"not a readable image ({size} bytes); formats are {', '.join(IMAGE_FORMATS)}"
        raise UnreadableImageError(f"{path}: {what if size else 'the file is empty'}") from error
    except Image.DecompressionBombError as error:
        found = re.search(r"\d+", str(error))
        raise UnreadableImageError(_too_large(path, found[0] if found else "more")) from error
    # Decoders of damaged bytes raise anything: IndexError, struct.error, MemoryError, ...
    except Exception as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        if "truncated" in what.lower():
            what = f"the file is cut short ({os.path.getsize(path)} bytes)"
        raise UnreadableImageError(f"{path}: cannot be decoded: {what or type(error).__name__}") from error


def _too_large(path: Path, got: str) -> str:
    return f"{path}: refused: an image may have at most {MAX_PIXELS} pixels, got {got}"


class FolderImages:
    """The images of a table, read from a folder when asked for.

    An image must have the size that the table states. Boxes are in pixels of the image that was annotated: the stored
    one for COCO, for VOC and for tools that ignore EXIF orientation, the upright one for tools that show photographs as
    a browser does. So an image is

    * taken as stored if its stored size is the table's, as by pycocotools and torchvision's datasets;
    * turned upright if only then its size is the table's, which takes an orientation of 90 or 270 degrees (5 to 8);
    * refused otherwise.

    An image that is square, mirrored or turned by 180 degrees (2 to 4) is taken as stored, as its size cannot tell.
    detectron2 and mmdetection turn every image, and refuse or misread annotations of the stored one.
    ``resdet check`` lists the images that carry an orientation.

    With ``upright`` the table is known to mean upright images, as YOLO's does: every image is turned.

    File names of the table are relative to ``root`` and may differ from the disk's in Unicode's form
    (``ImageFolder.find``); one that leads out of ``root``, or cannot be a file's name, raises a DataError.
    """

    def __init__(self, root: Path, table: AnnotationTable, *, upright: bool = False) -> None:
        check_names(root, table)
        self._folder = ImageFolder(root)
        self._table = table
        self._upright = upright

    def __call__(self, index: int) -> npt.NDArray[np.uint8]:
        """Read image ``index``: uint8 RGB ``[H, W, 3]``.

        An UnreadableImageError is raised if it cannot be read, a DataError if its size is not the one in the table.
        """
        image_id = self._table.image_ids[index]
        path = self._path(self._table.file_names[index])
        try:
            image = read_image(path, upright=self._upright)
        except UnreadableImageError as error:
            raise UnreadableImageError(f"image {image_id}: {error}") from error
        height, width = (int(side) for side in self._table.sizes[index])
        if image.shape[:2] == (height, width):
            return image
        on_side = image.shape[:2] == (width, height) and not self._upright
        if on_side and (orientation := read_header(path).orientation) >= 5:
            return _turned(image, orientation)
        raise DataError(
            f"image {image_id}: {path} is {image.shape[1]}x{image.shape[0]} pixels (width x height), "
            f"but {self._table.name} says {width}x{height}"
        )

    def _path(self, name: str) -> Path:
        path = self._folder.root / name
        return path if name.isascii() or is_file(path) else self._folder.root / (self._folder.find(name) or name)
