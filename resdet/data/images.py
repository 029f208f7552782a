"""Image files -> uint8 RGB arrays, with errors that name the file."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from resdet.data.annotations import AnnotationTable
from resdet.errors import DataError, UnreadableImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
"""What folders are searched for; the decoder itself goes by a file's content, not its name."""

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
"""Pillow's names of the formats that are read. Its other forty decoders stay shut: one of them runs Ghostscript."""

MAX_PIXELS = 178_956_970
"""Images of more are refused before they are decoded. It is the number from which Pillow refuses them too, but it
stands where a program has switched Pillow's limit off; as RGB it is 512 MiB, and no camera reaches it."""

MAX_JPEG_SCANS = 100
"""Progressive JPEGs of more scans are refused; encoders write about 10. Each goes over the whole image: 95 bytes cost
0.05 s at 8000x8000, so that a megabyte would keep a decoder busy for ten minutes."""

_EXIF_ORIENTATION = 0x0112
_TIFF_BITS = 258
_TIFF_PHOTOMETRIC = 262
_PIXELS = "pixels must be 8- or 16-bit gray, RGB or CMYK"
_MAX_NAME = 1024
# Line breaks of Unicode among them: a name with one would break messages and lists of names apart.
# Halves of surrogate pairs are in no file's name either, but for those by which Python shows bytes that are no UTF-8.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udc7f\udd00-\udfff]")


class Images(Protocol):
    """Whatever gives image ``index`` of a table as uint8 RGB ``[H, W, 3]``."""

    def __call__(self, index: int) -> npt.NDArray[np.uint8]:
        """Give image ``index``, 0-based row of the table."""
        ...


@dataclass(frozen=True)
class ImageHeader:
    """What an image file says of itself.

    Attributes:
        size: ``(height, width)`` of the pixels as ``read_image`` gives them.
        format: One of ``IMAGE_FORMATS``, or Pillow's name of a variant ("MPO", the JPEG of some telephones).
        mode: Pillow's name of the kind of pixels: "RGB", "L" (gray), "P" (palette), "CMYK", "I;16" and so on.
        orientation: EXIF's 1..8; 1, upright, where none is given.
    """

    size: tuple[int, int]
    format: str
    mode: str
    orientation: int


def read_image(path: Path) -> npt.NDArray[np.uint8]:
    """Read an image file as 8-bit RGB.

    * Formats are JPEG, PNG, WebP, BMP, TIFF, GIF and PPM, told by the content. Of an animation, the first frame is
      read.
    * Grayscale and 1-bit pixels are repeated into three channels, a palette is looked up, and an alpha channel is
      dropped: the colours stored under transparent pixels are kept.
    * CMYK is converted by Pillow, without colour profiles. CMYK in a JPEG counts as Adobe writes it, inverted; OpenCV
      takes it so too.
    * 16-bit samples keep their high byte (Pillow alone would clip 16-bit grayscale to white), those of a 12-bit TIFF
      their high eight bits. Signed, 32-bit and floating-point pixels have no range known to the reader: refused.
    * EXIF orientation is not applied here; ``FolderImages`` says where it is. Pillow turns TIFF files by itself.

    Decoding is Pillow's: on COCO's JPEG files it took 1.84 ms. OpenCV for the files in which it can hit no damage (it
    gives gray where a file is cut short) took 1.46 ms, with the same pixels on one machine: two decoders that may part
    in their next versions are not worth it. Its warnings (of odd EXIF, say) are not passed on: a file is read, or it is
    an error. libtiff alone may write to stderr.

    Returns:
        uint8 ``[H, W, 3]``, RGB, contiguous and writable.

    Raises:
        UnreadableImageError: If the file is missing, empty, cut short, not an image, larger than ``MAX_PIXELS``, or
            holds no 8- or 16-bit pixels.
    """
    with _opened(path) as image:
        if image.mode.startswith("I"):
            return _from_deep_gray(image, path)
        if image.mode in ("F", "LAB"):
            raise UnreadableImageError(f"{path}: {_PIXELS}, got mode {image.mode}")
        return np.array(image.convert("RGB"))


def _from_deep_gray(image: Image.Image, path: Path) -> npt.NDArray[np.uint8]:
    if image.mode == "I" and image.format == "TIFF":
        raise UnreadableImageError(f"{path}: {_PIXELS}, got signed or 32-bit gray")
    tags = getattr(image, "tag_v2", {})
    bits = int(tags.get(_TIFF_BITS, (16,))[0])
    values = np.array(image).astype(np.int32) >> (bits - 8)
    # Pillow inverts a TIFF whose 0 is white only if it has 8 bits.
    gray = (255 - values if tags.get(_TIFF_PHOTOMETRIC) == 0 else values).astype(np.uint8)
    return np.repeat(gray[:, :, None], 3, axis=2)


def read_header(path: Path) -> ImageHeader:
    """Read what an image file says of itself.

    Pixels are decoded only in a PNG that holds no EXIF before them: it may follow them.

    Raises:
        UnreadableImageError: As from ``read_image``, for what is met before the pixels.
    """
    with _opened(path) as image:
        # Pillow applies a TIFF's own, so that nothing is left to do.
        value = 1 if image.format == "TIFF" else image.getexif().get(_EXIF_ORIENTATION, 1)
        orientation = value if isinstance(value, int) and 1 <= value <= 8 else 1
        return ImageHeader((image.height, image.width), str(image.format), image.mode, orientation)


def read_size(path: Path) -> tuple[int, int]:
    """Give an image file's ``(height, width)``, without decoding its pixels.

    Raises:
        UnreadableImageError: If the file is missing, empty, not an image, or larger than ``MAX_PIXELS``.
    """
    with _opened(path) as image:
        return image.height, image.width


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image file; whatever a decoder raises inside becomes an error that names the file."""
    try:
        # Before it is opened: opening a pipe would wait for somebody to write into it.
        if not os.path.isfile(path):
            what = "not an image file, but a folder or a device" if os.path.exists(path) else "no such image file"
            raise UnreadableImageError(f"{path}: {what}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UnreadableImageError(_too_large(path, f"{image.width}x{image.height}"))
                if "progressive" in image.info:
                    _check_scans(path)
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
    # Decoders fed with damaged bytes raise whatever they stumble over: IndexError, struct.error, MemoryError, ...
    except Exception as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        if "truncated" in what.lower():
            what = f"the file is cut short ({os.path.getsize(path)} bytes)"
        raise UnreadableImageError(f"{path}: cannot be decoded: {what or type(error).__name__}") from error


def _too_large(path: Path, got: str) -> str:
    return f"{path}: refused: an image may have at most {MAX_PIXELS} pixels, got {got}"


def _check_scans(path: Path) -> None:
    # In a JPEG's data, a byte 0xFF is never followed by this one unless both are the marker of a scan.
    num_scans = Path(path).read_bytes().count(b"\xff\xda")
    if num_scans > MAX_JPEG_SCANS:
        raise UnreadableImageError(f"{path}: refused: a JPEG may have at most {MAX_JPEG_SCANS} scans, got {num_scans}")


class FolderImages:
    """The images of a table, read from a folder when asked for.

    An image must have the size that the table says. Boxes are in pixels of the image that was annotated, which is
    the stored one for COCO, for VOC and for tools that ignore EXIF orientation, but the upright one for tools that
    show photographs as a browser does. So an image is

    * taken as stored if its stored size is the table's: pycocotools and torchvision's datasets read it so too;
    * turned upright if only then its size is the table's, which takes an orientation of 90 or 270 degrees (5 to 8);
    * refused otherwise.

    A size cannot tell which of the two was annotated if the image is square, or mirrored or turned by 180 degrees (2
    to 4): such an image is taken as stored. detectron2 and mmdetection, by contrast, turn every image, and refuse or
    misread annotations of the stored one. ``tools/check_data.py`` lists the images that carry an orientation.

    Args:
        root: Folder that the table's file names are relative to.
        table: Whose images.

    Raises:
        DataError: If a file name leads out of ``root`` or can be no name of a file.
    """

    def __init__(self, root: Path, table: AnnotationTable) -> None:
        _check_names(table)
        self._root = str(root)
        self._table = table

    def path(self, index: int) -> Path:
        """Give the file of image ``index``."""
        return Path(self._root, self._table.file_names[index])

    def __call__(self, index: int) -> npt.NDArray[np.uint8]:
        """Read image ``index``: uint8 RGB ``[H, W, 3]``.

        Raises:
            UnreadableImageError: If it cannot be read.
            DataError: If its size is not the one in the table.
        """
        image_id = self._table.image_ids[index]
        path = self.path(index)
        try:
            image = read_image(path)
        except UnreadableImageError as error:
            raise UnreadableImageError(f"image {image_id}: {error}") from error
        height, width = (int(side) for side in self._table.sizes[index])
        if image.shape[:2] == (height, width):
            return image
        if image.shape[:2] == (width, height):
            orientation = read_header(path).orientation
            if orientation >= 5:
                return _turn(image, orientation)
        raise DataError(
            f"image {image_id}: {path} is {image.shape[1]}x{image.shape[0]} pixels (width x height), "
            f"but {self._table.name} says {width}x{height}"
        )


def _turn(image: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """Turn a stored image ``[H, W, 3]`` of EXIF orientation 5 to 8 upright: ``[W, H, 3]``."""
    transposed = image.swapaxes(0, 1)
    turned = {
        5: transposed,
        6: transposed[:, ::-1],
        7: transposed[::-1, ::-1],
        8: transposed[::-1],
    }[orientation]
    return np.ascontiguousarray(turned)


def _check_names(table: AnnotationTable) -> None:
    """Find out that a table's file names are names of files below a folder; nothing is opened."""
    for image_id, name in zip(table.image_ids.tolist(), table.file_names.tolist(), strict=True):
        if _leaves_folder(name):
            rule = "lie in the image folder"
        elif _CONTROL.search(name):
            rule = "hold no control characters and no half surrogates"
        elif len(name) > _MAX_NAME:
            rule = f"have at most {_MAX_NAME} characters"
        elif name.strip("./") == "":
            rule = "name a file"
        else:
            continue
        shown = repr(name) if len(name) <= 80 else f"{name[:77]!r}... ({len(name)} characters)"
        raise DataError(f"{table.name}: image {image_id}: file_name must {rule}, got {shown}")


def _leaves_folder(name: str) -> bool:
    if ".." not in name and ":" not in name and not name.startswith(("/", "\\")):
        return False
    windows = PureWindowsPath(name)
    return ".." in windows.parts or bool(windows.drive or windows.root) or PurePosixPath(name).is_absolute()


def check_files(root: Path, table: AnnotationTable) -> None:
    """Find out that every image of a table exists, without opening any.

    Each folder is listed once (118 000 names in a fraction of a second, where as many ``stat`` calls over a network
    take minutes).

    Raises:
        DataError: If files are missing: how many, the folder, and the first few; or if a file name leads out of
            ``root`` or can be no name of a file.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such image folder (the images of {table.name})")
    _check_names(table)
    listings: dict[str, set[str]] = {}
    missing: list[int] = []
    for index, file_name in enumerate(table.file_names.tolist()):
        folder, name = os.path.split(file_name)
        if folder not in listings:
            try:
                listings[folder] = set(os.listdir(root / folder))
            except (OSError, ValueError):
                listings[folder] = set()
        # A file system that ignores case lists one spelling and opens all, hence the second look.
        if name not in listings[folder] and not os.path.isfile(root / file_name):
            missing.append(index)
    if missing:
        shown = ", ".join(f"{table.file_names[i]} (image {table.image_ids[i]})" for i in missing[:3])
        more = ", ..." if len(missing) > 3 else ""
        slashes = any("\\" in table.file_names[i] for i in missing[:3])
        why = r"; folders in a file_name must be parted by /, not by \ " if slashes and os.sep == "/" else ""
        raise DataError(
            f"{root}: {len(missing)} of the {table.num_images} images of {table.name} are missing: {shown}{more}"
            + why.rstrip()
        )
