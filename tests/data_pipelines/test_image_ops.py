"""Every kind of image comes out upright, in the right colours, over white; bombs and damage are refused."""

import contextlib
import io
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines import image_ops
from data_pipelines.curate import image_hashes
from data_pipelines.image_ops import DecodeError, decode_image, decode_pixels, resize
from tests.data_pipelines.shards import encode, quadrants

LIMIT = 1 << 20


def decoded(data: bytes) -> np.ndarray:
    image = decode_image(data, max_pixels=LIMIT)
    assert image.mode == "RGB"
    assert (decode_pixels(data, max_pixels=LIMIT) == np.asarray(image)).all()
    return np.asarray(image)


def png(width: int, height: int, *, bits: int, color_type: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG written by hand. extra: whole chunks between header and data."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@contextlib.contextmanager
def without(library: str):
    """As on a machine that lacks this library."""
    kept = getattr(image_ops, library)
    assert kept is not None, f"these tests need {library}"
    setattr(image_ops, library, None)
    try:
        yield
    finally:
        setattr(image_ops, library, kept)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize(
    "format, options, tolerance",
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 95, "subsampling": 0}, 12),
        ("AVIF", {"quality": 95, "subsampling": "4:4:4"}, 12),
    ],
)
def test_formats(format, options, tolerance):
    shown = decoded(encode(quadrants(), format, **options)).astype(int)
    assert np.abs(shown - quadrants()).max() <= tolerance


def test_lossy_webp():
    centres = decoded(encode(quadrants(64), "WEBP", quality=95))[16::32, 16::32].astype(int)
    assert np.abs(centres - quadrants(64)[16::32, 16::32]).max() <= 6  # Edges bleed: its colours are 4:2:0.


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(orientation, format):
    upright = Image.fromarray(quadrants())
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}, "PNG": {}}[format]
    shown = decoded(encode(stored, format, exif=exif, **options)).astype(int)
    assert np.abs(shown - quadrants()).max() <= 12


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_does_not_cost_the_image():
    data = encode(quadrants(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff", quality=95, subsampling=0)
    assert np.abs(decoded(data).astype(int) - quadrants()).max() <= 12


def test_grey_jpeg():
    assert decoded(encode(np.full((8, 8), 100, np.uint8), "JPEG")).tolist() == [[[100] * 3] * 8] * 8


def test_cmyk_jpeg_as_adobe_stores_it():
    cmyk = Image.fromarray(quadrants()).convert("CMYK")
    data = encode(cmyk, "JPEG", quality=95, subsampling=0)
    assert b"Adobe" in data  # Inverted inks, as Photoshop writes them: ignoring that shows the negative.
    assert np.abs(decoded(data).astype(int) - quadrants()).max() <= 12


def test_16_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 257 * 10, 257 * 128, 65535]], np.uint16)
    assert decoded(encode(values))[0, :, 0].tolist() == [0, 10, 128, 255]


def test_16_bit_grey_with_a_transparent_value():
    rows = b"\0" + struct.pack(">3H", 0, 2570, 65535)
    data = png(3, 1, bits=16, color_type=0, rows=rows, extra=chunk(b"tRNS", struct.pack(">H", 2570)))
    assert decoded(data)[0, :, 0].tolist() == [0, 255, 255]


def test_16_bit_rgb_and_rgba():
    rgb = struct.pack(">6H", 65535, 0, 257 * 77, 0, 0, 0)
    assert decoded(png(2, 1, bits=16, color_type=2, rows=b"\0" + rgb))[0].tolist() == [[255, 0, 77], [0, 0, 0]]
    rgba = struct.pack(">8H", 65535, 0, 0, 65535, 0, 0, 0, 0)
    assert decoded(png(2, 1, bits=16, color_type=6, rows=b"\0" + rgba))[0].tolist() == [[255, 0, 0], [255] * 3]


def test_alpha_over_white():
    image = np.zeros((1, 3, 4), np.uint8)
    image[0, :, 3] = 0, 51, 255
    assert decoded(encode(image))[0, :, 0].tolist() == [255, 204, 0]


def test_grey_with_alpha_over_white():
    image = Image.fromarray(np.array([[[0, 0], [0, 255]]], np.uint8), "LA")
    assert decoded(encode(image))[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize("transparency", [1, b"\xff\x00\x80"])
def test_palette_with_transparency(transparency):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([255, 0, 0, 9, 9, 9, 0, 0, 255])
    third = [0, 0, 255] if transparency == 1 else [127, 127, 255]
    assert decoded(encode(image, transparency=transparency))[0].tolist() == [[255, 0, 0], [255] * 3, third]


def test_rgb_with_a_transparent_colour():
    image = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    assert decoded(encode(image, transparency=(1, 2, 3)))[0].tolist() == [[255] * 3, [4, 5, 6]]


def test_bilevel():
    assert decoded(encode(Image.fromarray(np.eye(2) > 0)))[:, :, 0].tolist() == [[255, 0], [0, 255]]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(format):
    frames = [Image.fromarray(np.full((4, 4, 3), color, np.uint8)) for color in ((255, 0, 0), (0, 255, 0))]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
    assert decoded(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side_px", [10_000, 20_000, 60_000])
def test_bombs_are_refused_before_allocating(side_px):
    bomb = png(side_px, side_px, bits=1, color_type=0, rows=b"\0" * 1000)
    tracemalloc.start()
    with pytest.raises(DecodeError) as refused:
        decode_image(bomb, max_pixels=1 << 26)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused.value.reason == "bomb"
    assert peak_bytes < 1 << 20


def test_the_limit_is_exact():
    data = encode(np.zeros((8, 8, 3), np.uint8))
    assert decode_image(data, max_pixels=64).size == (8, 8)
    with pytest.raises(DecodeError, match="bomb: 8 x 8 px"):
        decode_image(data, max_pixels=63)


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_half_a_file_is_an_error_with_a_reason(format):
    data = encode(NOISE, format)
    with pytest.raises(DecodeError) as error:
        decode_image(data[: len(data) // 2], max_pixels=LIMIT)
    assert error.value.reason in ("truncated", "corrupt_image")


def test_truncated_jpeg_is_called_so():
    data = encode(NOISE, "JPEG")
    with pytest.raises(DecodeError) as error:
        decode_image(data[: len(data) // 2], max_pixels=LIMIT)
    assert error.value.reason == "truncated"


@pytest.mark.parametrize(
    "data, reason",
    [(b"", "empty_image"), (b"<html>404</html>", "not_an_image"), (b"\xff\xd8\xff\xe0\0\x10", "corrupt_image")],
)
def test_what_is_no_image(data, reason):
    with pytest.raises(DecodeError) as error:
        decode_image(data, max_pixels=LIMIT)
    assert error.value.reason == reason


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP"]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_flipped_bytes_decode_or_raise_decode_error(format, flips):
    data = bytearray(encode(quadrants(), format))
    for place, value in flips:
        data[int(place * (len(data) - 1))] = value
    try:
        decode_image(bytes(data), max_pixels=LIMIT)
    except DecodeError:
        pass


def test_resize_has_antialias():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    shown = resize(Image.fromarray(stripes), (8, 8))
    assert 115 < shown.min() and shown.max() < 140  # without: all black or all white


def test_resize_gives_the_asked_height_and_width():
    assert resize(Image.new("RGB", (50, 30)), (4, 6)).shape == (4, 6, 3)


def test_a_box_that_reaches_outside_brings_in_white():
    black = Image.new("RGB", (10, 10))
    shown = resize(black, (20, 20), box=(-5, 0, 15, 20))[:, :, 0]
    inside = np.zeros((20, 20), bool)
    inside[:10, 5:15] = True
    assert (shown[inside] == 0).all() and (shown[~inside] == 255).all()


def test_the_whole_box_is_the_plain_resize():
    image = Image.fromarray(NOISE)
    assert (resize(image, (20, 30)) == resize(image, (20, 30), box=(0.0, 0.0, 64.0, 64.0))).all()


def test_a_wide_box_of_a_large_image_needs_no_giant_canvas(monkeypatch):
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((400, 300), Image.Resampling.BICUBIC)
    box = (-200.0, -150.0, 600.0, 450.0)
    whole = image_ops.resize(smooth, (16, 16), box=box)
    monkeypatch.setattr(image_ops, "MAX_CANVAS_PIXELS", 60_000)
    reduced = image_ops.resize(smooth, (16, 16), box=box)
    assert np.abs(whole.astype(int) - reduced).max() <= 12 and np.abs(whole.astype(int) - reduced).mean() < 1


def painting(height: int, width: int, seed: int = 0) -> Image.Image:
    """Shades and edges in colour."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    image.paste((255, 0, 40), (width // 4, height // 3, width // 2, height // 2))
    return image


sizes = st.integers(1, 150)
edges = st.floats(-0.6, 1.6)


@settings(max_examples=150, deadline=None)
@given(st.tuples(sizes, sizes), st.tuples(sizes, sizes), st.lists(edges, min_size=4, max_size=4), st.booleans())
def test_resize_is_pillows_within_a_level_almost_everywhere(image_size, size_px, box, whole):
    image = painting(*image_size)
    width, height = image.size
    left, right = sorted((box[0] * width, box[1] * width))
    top, bottom = sorted((box[2] * height, box[3] * height))
    box = None if whole or right - left < 0.1 or bottom - top < 0.1 else (left, top, right, bottom)
    ours = resize(image, size_px, box=box, exact=False)
    pillows = resize(image, size_px, box=box)
    with without("cykooz_resizer"):
        np.testing.assert_array_equal(resize(image, size_px, box=box, exact=False), pillows)
    assert ours.shape == pillows.shape == (*size_px, 3)
    off = np.abs(ours.astype(int) - pillows)
    assert off.max() <= 2 and (off > 1).sum() <= max(1, off.size // 1000)


def test_resize_of_a_large_image_is_pillows():
    image = painting(2500, 2600)  # More than one block of Pillow's memory.
    ours = resize(image, (224, 224), box=(3.3, 100.7, 2600.0, 2400.2), exact=False)
    assert np.abs(ours.astype(int) - resize(image, (224, 224), box=(3.3, 100.7, 2600.0, 2400.2))).max() <= 1


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 10**5), st.floats(0, 1), st.floats(0, 1))
def test_a_box_ends_within_the_image_in_spite_of_rounding(limit, start, end):
    start, end = sorted((start * limit, end * limit))
    kept_start, length = image_ops._within(start, end, limit)
    assert kept_start == start and start + length <= limit and abs(length - (end - start)) < 1e-9 * limit


def test_a_machine_without_the_fast_libraries_decodes_too():
    script = (
        "import sys\n"
        "for name in ('simplejpeg', 'cykooz_resizer'): sys.modules[name] = None\n"
        "from data_pipelines.image_ops import decode_image, resize\n"
        "print(resize(decode_image(sys.stdin.buffer.read(), max_pixels=9999), (2, 3)).shape)\n"
    )
    data = encode(painting(20, 20), "JPEG")
    done = subprocess.run([sys.executable, "-c", script], input=data, check=True, capture_output=True)
    assert done.stdout == b"(2, 3, 3)\n"


def with_texts(data: bytes, *, behind: bool) -> bytes:
    """A PNG with chunks that Pillow refuses to read: texts of 2 MiB and a profile, before its pixels or behind them."""
    text = zlib.compress(bytes(1 << 21))
    chunks = chunk(b"zTXt", b"workflow\0\0" + text) + chunk(b"iTXt", b"x\0\1\0\0\0" + text)
    chunks += chunk(b"iCCP", b"profile\0\0" + text)
    at = data.index(b"IEND") - 4 if behind else data.index(b"IDAT") - 4
    return data[:at] + chunks + data[at:]


@pytest.mark.parametrize("behind", [False, True])
def test_long_texts_and_profiles_of_a_png_do_not_matter(behind):
    exif = Image.Exif()
    exif[0x0112] = 6
    for options in ({}, {"exif": exif}):
        plain = encode(painting(20, 30), **options)
        data = with_texts(plain, behind=behind)
        with pytest.raises(ValueError, match="too large"):
            Image.open(io.BytesIO(data)).load()
        assert (decoded(data) == decoded(plain)).all()
        found = image_hashes.examine(data, max_pixels=LIMIT)
        assert (found.format, found.reason, found.pixels) == (
            "PNG",
            None,
            image_hashes.examine(plain, max_pixels=LIMIT).pixels,
        )
    with pytest.raises(DecodeError) as error:
        decode_image(with_texts(encode(painting(20, 30)), behind=False)[:-60], max_pixels=LIMIT)
    assert error.value.reason in ("truncated", "corrupt_image")


@pytest.mark.parametrize("size", [(1, (1 << 16) + 1), ((1 << 16) + 1, 1)])
def test_an_image_of_one_endless_side_is_a_bomb(size):
    with pytest.raises(DecodeError, match="bomb: .* 65536 on a side"):
        decode_image(encode(Image.new("L", size)), max_pixels=LIMIT)
    assert decode_image(encode(Image.new("L", (1, 1 << 16))), max_pixels=LIMIT).size == (1, 1 << 16)


@pytest.mark.parametrize("format, mode", [("WEBP", "RGB"), ("WEBP", "RGBA"), ("AVIF", "RGB"), ("JPEG", "CMYK")])
def test_decoders_that_hold_an_image_several_times_take_fewer_pixels(monkeypatch, format, mode):
    monkeypatch.setattr(image_ops, "_MAX_PIXELS_HELD_TWICE", 400)
    assert decode_image(encode(Image.new(mode, (20, 20)), format), max_pixels=LIMIT).size == (20, 20)
    with pytest.raises(DecodeError, match="bomb: 21 x 20 px, limit 400"):
        decode_image(encode(Image.new(mode, (21, 20)), format), max_pixels=LIMIT)
    assert decode_image(encode(Image.new("RGB", (21, 20)), "PNG"), max_pixels=LIMIT).size == (21, 20)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16"])
def test_decoding_takes_little_more_memory_than_the_image(tmp_path, mode):
    """512 MiB beside the 192 of the largest image; here of a quarter of its pixels."""
    image = Image.fromarray(np.zeros((4096, 4096), np.uint16)) if mode == "I;16" else Image.new(mode, (4096, 4096))
    (tmp_path / "a.png").write_bytes(encode(image, compress_level=1))
    script = (
        "import sys; from data_pipelines.image_ops import decode_pixels\n"
        "def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "data = open(sys.argv[1], 'rb').read(); before = peak()\n"
        "decode_pixels(data, max_pixels=1 << 26); print(peak() - before)"
    )
    command = [sys.executable, "-c", script, tmp_path / "a.png"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout) < (512 + 192) * 1024 // 4
