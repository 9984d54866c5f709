"""Images in and out: bounded decoding of any file, tensors for models, encoded bytes for shards.

Shape letters: B batch, h w image. Tensors are float32 RGB in [-1, 1]; arrays are uint8 RGB.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import IO, TYPE_CHECKING, Literal

import numpy as np
import simplejpeg
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

if TYPE_CHECKING:
    from torch import Tensor

MAX_PIXELS = 1 << 26  # 8192 x 8192, 256 MiB decoded: above every phone and all but studio cameras
MAX_BYTES = 1 << 27  # 128 MiB: above the PNG of that many photographic pixels
PILLOW_LIMIT = 2 * 89_478_485  # pixels; Pillow itself refuses more, whatever we allow

ACCURATE = 96  # the least JPEG quality for which simplejpeg is as exact as Pillow
ENCODERS = 8  # threads of a process, at most

# Raster formats only ("JPEG" reads the MPO of phones too). Pillow would also hand EPS to Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")

# Pillow warns of large and of odd files. Here the first are checked and the others have a reason of ours.
warnings.filterwarnings("ignore", module=r"PIL\.")

# EXIF orientation -> what makes the stored pixels upright (EXIF 2.32, tag 0x0112).
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class NotAnImage(ValueError):
    """The bytes are no usable image; the message is the reason, in a few words."""


def decode(data: bytes | memoryview, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> Image.Image:
    """The upright RGB image in `data`, every pixel of it decoded.

    Transparent pixels lie on white, 16 bits are scaled to 8, of an animation the first frame counts, colour
    profiles are ignored (as torchvision, webdataset and datasets ignore them). The sizes are compared with
    `max_bytes` and `max_pixels` before any pixel is decoded. Raises `NotAnImage` for whatever cannot be
    decoded completely; only a lack of memory passes as it is, for it says nothing about the file.
    """
    if not data:
        raise NotAnImage("empty file")
    if len(data) > max_bytes:
        raise NotAnImage(f"more than {max_bytes} bytes")
    try:
        Image.init()  # makes all of FORMATS known; does nothing the second time
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise NotAnImage(f"{image.width} x {image.height} pixels, more than {max_pixels}")
        image.load()
        return _rgb(_upright(image))
    except (NotAnImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise NotAnImage(f"not an image ({_looks_like(bytes(data[:256]))})") from error
    except Image.DecompressionBombError as error:
        raise NotAnImage(f"more than {min(max_pixels, PILLOW_LIMIT)} pixels") from error
    # The bytes are in memory, so whatever a decoder throws (OSError, struct.error, SyntaxError, IndexError,
    # ...) is about their content.
    except Exception as error:
        raise NotAnImage(f"damaged or truncated image ({error or type(error).__name__})") from error


def _looks_like(data: bytes) -> str:
    """What a file that no decoder knows seems to be, for the person who reads the reason."""
    head = data.lstrip().lower()
    if head.startswith((b"<svg", b"<?xml")):
        return "XML or SVG"
    if head.startswith((b"<!doctype html", b"<html")):
        return "HTML"
    if data[4:8] == b"ftyp":
        return "HEIC or video"
    if head.isascii() and b"\0" not in head:
        return "text"
    return f"or of an unknown kind; known: {', '.join(FORMATS)}"


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged EXIF block says nothing, and the pixels are whole; viewers do the same
        orientation = 1
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise NotAnImage("floating-point pixels, whose range is not known")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bit(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    layers = image.convert("RGBA")
    white = Image.new("RGBA", layers.size, "white")
    return Image.alpha_composite(white, layers).convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Grey levels 0..65535 scaled to 0..255, rounded; the transparent level of a PNG becomes white."""
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 0xFFFF:
        raise NotAnImage("32-bit pixels beyond 0..65535, whose range is not known")
    scaled = ((grey + 128) // 257).astype(np.uint8)
    scaled[grey == image.info.get("transparency", -1)] = 255
    return Image.fromarray(scaled).convert("RGB")


def to_tensor(image: Image.Image, size: int) -> Float[Tensor, "3 h w"]:
    """The largest centred square of an RGB image, resized to `size`, in [-1, 1].

    Antialiased bicubic. The same as resizing the shorter side and then cropping, but in one step, so a
    1 x 10000 strip is not blown up on the way. Pillow computes it in fixed point: equal on every CPU.
    """
    import torch

    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    square = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous().float() / 127.5 - 1


def to_uint8(image_B3hw: Float[Tensor, "B 3 h w"]) -> UInt8[np.ndarray, "B h w 3"]:
    """Pixels of images in [-1, 1]: clamped, scaled in float32, halves rounded up.

    Raises `ValueError` when a value is not a number: there is no pixel for it.
    """
    if image_B3hw.isnan().any():
        rows = image_B3hw.isnan().flatten(1).any(1).nonzero().flatten().tolist()
        raise ValueError(f"images {rows} of the batch have values that are not numbers")
    return to_pixels(image_B3hw).cpu().numpy()


def to_pixels(image_B3hw: Float[Tensor, "B 3 h w"]) -> UInt8[Tensor, "B h w 3"]:
    """The same of images without such values, left on their device."""
    scaled_B3hw = image_B3hw.detach().float().clamp(-1, 1).add(1).mul(127.5).add(0.5).floor()
    return scaled_B3hw.byte().permute(0, 2, 3, 1).contiguous()


def encode(
    image_hw3: UInt8[np.ndarray, "h w 3"], format: Literal["jpeg", "png", "webp"], quality: int
) -> bytes:
    """The bytes of an image file; the same for the same pixels under one Pillow (and, for PNG, one CPU kind).

    JPEG keeps its colour at full resolution (4:4:4). At half of it (4:2:0, Pillow's default) a photograph of
    64 x 64 pixels (scikit-image's astronaut) ends at 33 dB at quality 100; 4:4:4 reaches 38 dB at quality 95,
    in fewer bytes and about the same time. The Huffman tables are the standard ones: fitting them takes 2.7
    times the time for 3 % of the bytes. From quality 96 on simplejpeg makes the same pixels in four fifths of
    Pillow's time; below, its cosine transform costs half a decibel, so that Pillow makes those. PNG, which is
    lossless and has no use for `quality`, takes the fastest level: a quarter to a half of the time of
    Pillow's default, for at most a tenth more bytes.
    """
    if format == "jpeg" and quality >= ACCURATE:
        return simplejpeg.encode_jpeg(image_hw3, quality, "RGB", "444")
    options: dict[str, dict[str, int]] = {
        "jpeg": {"quality": quality, "subsampling": 0},
        "png": {"compress_level": 1},
        "webp": {"quality": quality, "method": 4},
    }
    with _memory_file() as file:
        Image.fromarray(image_hw3).save(file, format, **options[format])
        file.seek(0)
        return file.read()


def encode_all(
    images: Sequence[UInt8[np.ndarray, "h w 3"]], format: Literal["jpeg", "png", "webp"], quality: int
) -> list[bytes]:
    """Their files, encoded side by side."""
    return list(_encoders().map(lambda image_hw3: encode(image_hw3, format, quality), images))


@lru_cache
def _encoders() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(os.cpu_count() or 1, ENCODERS), "encode")


def _memory_file() -> IO[bytes]:
    """A file in memory that the system knows as one: while Pillow writes to it, other threads run."""
    if sys.platform == "linux":
        return os.fdopen(os.memfd_create("image"), "w+b")
    return io.BytesIO()
