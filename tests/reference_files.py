"""Files that tests of several layers share: bad references of every kind, and real photographs."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def _image(file_format: str, mode: str = "RGB", size: tuple[int, int] = (48, 40), **options) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, file_format, **options)
    return file.getvalue()


def _png(width: int, height: int, depth: int, color: int, raw: bytes, transparent: bytes = b"") -> bytes:
    """A PNG of kinds that Pillow reads but does not write. `raw` is zlib data of filtered rows."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    key = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + header + key + chunk(b"IDAT", raw) + chunk(b"IEND", b"")


def _bomb(side: int) -> bytes:
    """A valid PNG of side x side black pixels, a few KiB long: one bit a pixel, rows of zeros."""
    squeeze = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)
    raw = b"".join(squeeze.compress(row * 100) for _ in range(side // 100)) + squeeze.flush()
    return _png(side, side, 1, 0, raw)


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("image.jpg", _image("JPEG"))
    return file.getvalue()


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


class _Opened:
    """Unpickling this would raise, and so show that somebody unpickles references."""

    def __reduce__(self):
        return (eval, ("1/0",))


@pytest.fixture(scope="session")
def png() -> Callable[..., bytes]:
    return _png


@pytest.fixture(scope="session")
def bad_files() -> dict[str, tuple[bytes, str]]:
    """{file name: (content, what the reason must contain)}; names lie about the content, as they do."""
    floats = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.float32)).save(floats, "TIFF")
    png, jpeg = _image("PNG"), _image("JPEG")
    return {
        "zero.jpg": (b"", "empty file"),
        "notes.txt": (b"Take the blue ones.\n", "text"),
        "note.png": ("Größe: ×2\n".encode(), "not an image"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "truncated.png": (png[: len(png) // 2], "truncated"),
        "truncated.gif": ((gif := _image("GIF"))[: len(gif) // 2], "truncated"),
        "truncated.webp": ((webp := _image("WEBP"))[: len(webp) // 2], "image"),
        "truncated.tif": ((tif := _image("TIFF"))[: len(tif) // 2], "image"),
        "header_only.jpg": (jpeg[:20], "image"),
        "bomb.png": (_bomb(9_000), "9000 x 9000 pixels, more than"),
        "bigger_bomb.png": (_bomb(30_000), "pixels"),
        "page.jpg": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "HTML"),
        "drawing.svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "SVG"),
        "model.pkl": (pickle.dumps({"weights": [1.0, 2.0]}), "not an image"),
        "evil.jpg": (pickle.dumps(_Opened()), "not an image"),
        "archive.png": (_zip(), "not an image"),
        "noise.jpg": (np.random.default_rng(2).bytes(4096), "not an image"),
        "corrupt_header.png": (_flipped(png, 18), "image"),
        "corrupt_data.png": (_flipped(png, 60), "damaged"),
        "script.eps": (_image("EPS"), "not an image"),
        "document.pdf": (_image("PDF"), "not an image"),
        "photo.heic": (struct.pack(">I", 24) + b"ftypheic" + bytes(64), "HEIC"),
        "floats.tif": (floats.getvalue(), "floating-point"),
    }


@pytest.fixture(scope="session")
def photographs() -> dict[str, Path]:
    """{name: path} of the sample photographs that come with scikit-learn and scikit-image."""
    import skimage.data
    import sklearn.datasets

    folders = [Path(skimage.data.__file__).parent, Path(sklearn.datasets.__file__).parent / "images"]
    found = [path for folder in folders for path in folder.iterdir()]
    return {p.name: p for p in sorted(found) if p.suffix in {".jpg", ".png", ".tif", ".gif"}}
