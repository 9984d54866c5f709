import io
import os
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data as photographs

from stages import images
from stages.images import NotAnImage, decode, encode, to_tensor, to_uint8

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged files

RED, GREEN, BLUE, YELLOW, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 255, 255)


def corners_hw3(height: int = 32, width: int = 48) -> np.ndarray:
    """Red, green / blue, yellow quarters of an upright picture that is wider than high."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2] = RED
    image[: height // 2, width // 2 :] = GREEN
    image[height // 2 :, : width // 2] = BLUE
    image[height // 2 :, width // 2 :] = YELLOW
    return image


def saved(image: Image.Image, file_format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def close(actual, expected, within=6) -> bool:
    return bool((np.abs(np.asarray(actual).astype(int) - np.asarray(expected)) <= within).all())


# --- decode: what is refused ----------------------------------------------------------------------


def test_every_bad_file_is_refused_with_its_reason(bad_files):
    for name, (data, reason) in bad_files.items():
        with pytest.raises(NotAnImage) as caught:
            decode(data)
        assert reason in str(caught.value), name


def test_a_bomb_is_refused_before_its_pixels_are_decoded(bad_files):
    data, _ = bad_files["bomb.png"]
    tracemalloc.start()
    with pytest.raises(NotAnImage, match="pixels"):
        decode(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6  # bytes; the pixels would be 81 MB
    assert decode(data, max_pixels=9_000**2).size == (9_000, 9_000)  # a sound image otherwise


def test_the_limits_are_inclusive():
    data = saved(Image.new("RGB", (10, 7)), "PNG")
    assert decode(data, max_pixels=70, max_bytes=len(data)).size == (10, 7)
    with pytest.raises(NotAnImage, match="10 x 7 pixels, more than 69"):
        decode(data, max_pixels=69)
    with pytest.raises(NotAnImage, match=f"more than {len(data) - 1} bytes"):
        decode(data, max_bytes=len(data) - 1)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_a_file_cut_anywhere_is_refused(file_format):
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), file_format)
    whole = pixels(data)
    for length in range(0, len(data), 7):
        try:
            cut = pixels(data[:length])
        except NotAnImage:
            continue
        assert np.array_equal(cut, whole), length  # only what follows the pixels was missing


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"]), st.data())
def test_damaged_bytes_never_raise_anything_else(file_format, draw):
    data = bytearray(saved(Image.fromarray(corners_hw3(8, 12)), file_format))
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    try:
        image = decode(bytes(data), max_pixels=10_000)
    except NotAnImage:
        return
    assert image.mode == "RGB"
    assert image.width * image.height <= 10_000


# --- decode: what is admitted ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "file_format", ["PNG", "BMP", "TIFF", "PPM", "JPEG", "WEBP", "GIF", "AVIF", "JPEG2000"]
)
def test_rgb_in_every_format(file_format):
    picture = corners_hw3()
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(file_format, {})
    decoded = pixels(saved(Image.fromarray(picture), file_format, **options))
    assert close(decoded[4:12, 4:20], RED)
    assert close(decoded[4:12, 28:44], GREEN)
    assert close(decoded[20:28, 4:20], BLUE)
    assert close(decoded[20:28, 28:44], YELLOW)


def test_grey_and_bits():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(pixels(saved(Image.fromarray(grey), "PNG")), np.stack([grey] * 3, -1))
    bits = grey % 2 == 0
    decoded = pixels(saved(Image.fromarray(bits), "PNG"))
    assert np.array_equal(decoded, np.where(bits, 255, 0)[..., None].repeat(3, -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_on_white(mode):
    layers = Image.new("LA", (3, 1), (0, 255))
    layers.putpixel((1, 0), (0, 0))
    layers.putpixel((2, 0), (0, 51))  # 20 % black over white: 204
    data = saved(layers.convert(mode), "PNG")
    assert pixels(data)[0].tolist() == [[0] * 3, [255] * 3, [204] * 3]


def test_transparent_colour_of_a_palette_lies_on_white():
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putdata([0, 1])
    assert pixels(saved(image, "PNG"))[0].tolist() == [list(RED), list(BLUE)]
    for file_format in ("PNG", "GIF"):
        assert pixels(saved(image, file_format, transparency=1))[0].tolist() == [list(RED), list(WHITE)]


def test_transparent_colour_without_a_palette_lies_on_white():
    image = Image.fromarray(np.array([[RED, BLUE]], np.uint8))
    assert pixels(saved(image, "PNG", transparency=BLUE))[0].tolist() == [list(RED), list(WHITE)]
    grey = Image.fromarray(np.array([[10, 20]], np.uint8))
    assert pixels(saved(grey, "PNG", transparency=20))[0].tolist() == [[10] * 3, [255] * 3]


def test_cmyk_jpeg():
    image = Image.new("CMYK", (16, 8), (0, 255, 255, 0))  # magenta and yellow ink: red
    image.paste((255, 255, 0, 0), (0, 0, 8, 8))  # cyan and magenta: blue
    decoded = pixels(saved(image, "JPEG", quality=100))
    assert close(decoded[:, :7], BLUE)
    assert close(decoded[:, 9:], RED)


def test_sixteen_bits_are_scaled_and_rounded(png):
    grey = np.array([[0, 1, 128, 129, 257, 32768, 65406, 65407, 65535]], np.uint16)
    expected = [round(v / 257) for v in grey[0].tolist()]
    for data in (saved(Image.fromarray(grey), "PNG"), saved(Image.fromarray(grey), "TIFF")):
        assert pixels(data)[0, :, 0].tolist() == expected
    big_endian = grey.astype(">u2").tobytes()
    keyed = png(9, 1, 16, 0, zlib.compress(b"\0" + big_endian), transparent=b"\x01\x01")
    assert pixels(keyed)[0, :, 0].tolist() == [*expected[:4], 255, *expected[5:]]
    maximum_65535 = b"P5 9 1 65535\n" + big_endian
    assert pixels(maximum_65535)[0, :, 0].tolist() == expected


def test_sixteen_bit_colour(png):
    raw = np.array([[[0, 0x80FF, 0xFFFF], [0xFFFF, 0x4000, 0]]], ">u2")
    decoded = pixels(png(2, 1, 16, 2, zlib.compress(b"\0" + raw.tobytes())))
    assert close(decoded[0], [[0, 128, 255], [255, 64, 0]], within=1)


def stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The array that a camera stores for an upright picture, straight from the table of EXIF tag 0x0112:
    which side of the picture row 0 and column 0 of the stored array are."""
    sides = {
        1: ("top", "left"),
        2: ("top", "right"),
        3: ("bottom", "right"),
        4: ("bottom", "left"),
        5: ("left", "top"),
        6: ("right", "top"),
        7: ("right", "bottom"),
        8: ("left", "bottom"),
    }[orientation]
    image = upright
    if "bottom" in sides:
        image = image[::-1]
    if "right" in sides:
        image = image[:, ::-1]
    return image if sides[0] in ("top", "bottom") else image.transpose(1, 0, 2)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, file_format):
    upright = corners_hw3()
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(file_format, {})
    image = Image.fromarray(np.ascontiguousarray(stored(upright, orientation)))
    decoded = pixels(saved(image, file_format, exif=exif, **options))
    assert decoded.shape == upright.shape
    assert close(decoded[2:-2:3, 2:-2:3], upright[2:-2:3, 2:-2:3], within=12)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x09\0\0"]
)
def test_an_exif_block_that_says_nothing_leaves_the_picture(exif):
    upright = corners_hw3()
    data = saved(Image.fromarray(upright), "JPEG", quality=95, exif=exif)
    assert pixels(data).shape == upright.shape


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(file_format):
    frames = [Image.new("RGB", (16, 16), color) for color in (RED, BLUE, GREEN)]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = saved(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert close(pixels(data), RED)


def test_sample_photographs(photographs):
    assert len(photographs) > 25
    for name, path in photographs.items():
        if name == "multipage_rgb.tif":  # planes of a kind that Pillow does not know
            with pytest.raises(NotAnImage, match="unknown kind"):
                decode(path.read_bytes())
            continue
        image = decode(path.read_bytes())
        with Image.open(path) as reference:
            assert image.size == reference.size, name
        assert np.asarray(image).std() > 5, name  # a picture, not one flat colour


# --- tensors --------------------------------------------------------------------------------------


def test_tensor_of_an_image_at_its_own_size_is_exact():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    tensor_3hw = to_tensor(Image.fromarray(levels), 16)
    assert tensor_3hw.dtype == torch.float32
    assert tensor_3hw.shape == (3, 16, 16)
    assert tensor_3hw.min() == -1
    assert tensor_3hw.max() == 1
    assert np.array_equal(to_uint8(tensor_3hw[None])[0], levels)


@pytest.mark.parametrize("upright", [True, False])
def test_tensor_shows_the_middle(upright):
    stripes = np.concatenate([np.full((32, 32, 3), c, np.uint8) for c in (RED, GREEN, BLUE)], axis=1)
    image = Image.fromarray(stripes if not upright else np.ascontiguousarray(stripes.transpose(1, 0, 2)))
    seen = to_uint8(to_tensor(image, 8)[None])[0]
    assert close(seen[1:-1, 1:-1], GREEN, within=0)
    assert close(seen, GREEN, within=20)  # the kernel sees a little of what lies beside the square


def test_tensor_equals_resizing_and_then_cropping(photographs):
    image = decode(photographs["chelsea.png"].read_bytes()).crop((0, 0, 448, 300))
    resized = image.resize((224, 150), Image.Resampling.BICUBIC)
    middle = np.asarray(resized.crop((37, 0, 187, 150)))
    assert close(to_uint8(to_tensor(image, 150)[None])[0], middle, within=1)


def test_tensor_is_antialiased():
    checks = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    tensor_3hw = to_tensor(Image.fromarray(checks).convert("RGB"), 20)
    assert tensor_3hw.abs().max() < 0.05  # mid grey; sampling single pixels would give -1 and 1


def test_tensor_of_a_strip_takes_no_memory():
    strip = Image.new("RGB", (100_000, 1), RED)
    assert close(to_uint8(to_tensor(strip, 512)[None])[0], RED, within=0)  # resized first: 512 x 51,200,000


def test_pixels_are_clamped_and_rounded_half_up():
    values = torch.tensor([-7.0, -1.0, -0.999, 0.0, 1 / 255, 0.5, 1.0, 1.5])
    image_B3hw = values.expand(2, 3, 4, 8)
    expected = [0, 0, 0, 128, 128, 191, 255, 255]  # 0.0 is level 127.5, 0.5 is 191.25
    array = to_uint8(image_B3hw)
    assert array.shape == (2, 4, 8, 3)
    assert array.dtype == np.uint8
    assert array[1, 2, :, 1].tolist() == expected
    assert array.flags.c_contiguous
    assert np.array_equal(to_uint8(image_B3hw.double()), array)
    assert to_uint8(image_B3hw.half())[0, 0, [0, 1, 3, 6, 7], 0].tolist() == [0, 0, 128, 255, 255]


def test_pixels_do_not_invent_a_colour_for_nan():
    image_B3hw = torch.zeros(3, 3, 4, 4)
    image_B3hw[1, 0, 2, 2] = torch.nan
    with pytest.raises(ValueError, match=r"images \[1\]"):
        to_uint8(image_B3hw)


# --- encode ---------------------------------------------------------------------------------------

PICTURE = "np.random.default_rng(5).integers(0, 256, (40, 56, 3), dtype=np.uint8)"


@pytest.mark.parametrize(("file_format", "quality"), [("jpeg", 95), ("jpeg", 96), ("png", 95), ("webp", 80)])
def test_encoding_is_the_same_in_another_process(file_format, quality):
    import hashlib

    code = (
        "import hashlib, numpy as np; from stages.images import encode;"
        f"print(hashlib.sha256(encode({PICTURE}, {file_format!r}, {quality})).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    image = eval(PICTURE)
    assert hashlib.sha256(encode(image, file_format, quality)).hexdigest() == there.strip()
    strided = np.repeat(image, 2, axis=0)[::2]  # the same pixels, elsewhere in memory
    assert encode(strided, file_format, quality) == encode(image, file_format, quality)


def test_png_keeps_every_pixel():
    image = eval(PICTURE)
    assert np.array_equal(pixels(encode(image, "png", 1)), image)


def test_jpeg_keeps_the_resolution_of_colour():
    columns = np.zeros((64, 64, 3), np.uint8)
    columns[:, ::2], columns[:, 1::2] = RED, BLUE  # one pixel wide
    decoded = pixels(encode(columns, "jpeg", 95))
    assert close(decoded[:, ::2].mean((0, 1)), RED, within=8)
    assert close(decoded[:, 1::2].mean((0, 1)), BLUE, within=8)


@pytest.mark.parametrize("file_format", ["jpeg", "webp"])
def test_quality_buys_fidelity(file_format, photographs):
    image = np.asarray(decode(photographs["china.jpg"].read_bytes()).crop((100, 100, 228, 228)))
    errors, sizes = [], []
    for quality in (30, 60, 90, 97):
        data = encode(image, file_format, quality)
        sizes.append(len(data))
        errors.append(float(np.mean((pixels(data).astype(float) - image) ** 2)))
    assert errors == sorted(errors, reverse=True)
    assert sizes == sorted(sizes)
    assert errors[-1] < errors[0] / 4


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
def test_many_files_are_those_of_one_after_another_in_their_order(format):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 24, 3), np.uint8)
    assert images.encode_all(list(pixels), format, 90) == [images.encode(one, format, 90) for one in pixels]
    assert images.encode_all([], format, 90) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has files in memory")
def test_pillow_gets_a_file_that_it_writes_to_without_holding_up_other_threads():
    """Pillow asks for the number of the file, and keeps the interpreter to itself where there is none."""
    with images._memory_file() as file:
        assert os.fstat(file.fileno()).st_size == 0


@pytest.mark.parametrize("side", [8, 33, 64])
@pytest.mark.parametrize("quality", [96, 98, 100])
def test_a_fine_jpeg_shows_what_pillows_shows(side, quality):
    """Two libraries, one transform: no pixel is further from the original than rounding explains."""
    scene = Image.fromarray(photographs.astronaut()).resize((side, side), Image.Resampling.LANCZOS)
    ours = np.asarray(Image.open(io.BytesIO(encode(np.asarray(scene), "jpeg", quality))))
    theirs = np.asarray(Image.open(io.BytesIO(saved(scene, "JPEG", quality=quality, subsampling=0))))
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1
