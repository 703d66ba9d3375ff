"""JPEGs: two decoders give the same pixels and the same errors, large ones are decoded smaller, bombs are refused."""

import contextlib
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines import image_ops
from data_pipelines.image_ops import DecodeError, decode_image, decode_pixels
from tests.data_pipelines.shards import encode
from tests.data_pipelines.test_image_ops import LIMIT, NOISE, decoded, painting, without


def outcome(decode, data: bytes) -> tuple:
    try:
        shown = np.asarray(decode(data, max_pixels=LIMIT))
        return shown.shape, shown.tobytes()
    except DecodeError as error:
        return error.reason, None


JPEG_OPTIONS = [
    {"subsampling": 0},
    {"subsampling": 1},
    {"subsampling": 2},
    {"progressive": True, "subsampling": 2},
    {"quality": 20, "optimize": True},
    {"quality": 100, "keep_rgb": True},
    {"restart_marker_blocks": 2},
]


JPEG_KINDS = [(options, mode) for mode in ("RGB", "L", "CMYK") for options in JPEG_OPTIONS]


JPEG_KINDS = [kind for kind in JPEG_KINDS if kind[1] == "RGB" or "keep_rgb" not in kind[0]]


@pytest.mark.parametrize("options, mode", JPEG_KINDS, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (17, 31), (120, 161)])
def test_both_decoders_give_the_same_pixels(options, mode, size):
    data = encode(painting(*size).convert(mode), "JPEG", **options)
    with without("simplejpeg"):
        pillows = decoded(data)
    assert (decoded(data) == pillows).all()
    assert image_ops._plain_jpeg_size(data) == (None if "keep_rgb" in options or mode == "CMYK" else size[::-1])


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(JPEG_OPTIONS[:4]),
    st.sampled_from(["RGB", "L"]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    st.one_of(st.just(1.0), st.floats(0, 1)),
    st.binary(max_size=4),
)
def test_a_damaged_jpeg_ends_alike_with_both_decoders(options, mode, flips, cut, trailer):
    data = bytearray(encode(painting(24, 40).convert(mode), "JPEG", **options))
    for place, value in flips:
        data[int(place * (len(data) - 1))] = value
    data = bytes(data[: int(cut * len(data))]) + trailer
    ours = [outcome(decode, data) for decode in (decode_image, decode_pixels)]
    with without("simplejpeg"):
        assert ours == [outcome(decode_image, data)] * 2


def test_a_jpeg_bomb_is_refused_before_allocating():
    data = encode(NOISE, "JPEG")
    frame = data.index(b"\xff\xc0")
    data = data[: frame + 5] + struct.pack(">HH", 60_000, 1000) + data[frame + 9 :]
    tracemalloc.start()
    for decode in (decode_image, decode_pixels):
        with pytest.raises(DecodeError, match="bomb: 1000 x 60000 px, limit 33554432"):
            decode(data, max_pixels=1 << 25)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_large_jpeg_is_decoded_smaller_and_upright(orientation):
    y, x = np.mgrid[:240, :321] / 321
    image = (255 * np.stack([x, y, 0.5 + 0.5 * np.sin(9 * x)], axis=-1)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(image, "JPEG", quality=95, **({"exif": exif} if orientation > 1 else {}))
    full = image_ops.decode_pixels(data, max_pixels=1 << 20)
    for min_size_px, factor in (
        ((60, 60), 4),
        ((61, 30), 2 if full.shape[0] == 240 else 4),
        ((121, 161), 1),
        ((1, 1), 8),
    ):
        small = image_ops.decode_pixels(data, max_pixels=1 << 20, min_size_px=min_size_px)
        assert small.shape == (round(full.shape[0] / factor), round(full.shape[1] / factor), 3)
        size = (24, 32)
        off = image_ops.resize(small, size).astype(int) - image_ops.resize(full, size)
        assert np.abs(off).max() <= (0 if factor == 1 else 16) and np.abs(off).mean() <= 2
    with pytest.raises(image_ops.DecodeError, match="bomb"):
        image_ops.decode_pixels(data, max_pixels=240 * 321 - 1, min_size_px=(1, 1))


def many_scans(data: bytes, scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    last = data.rindex(b"\xff\xda")
    return data[:last] + (data[last:-2]) * scans + data[-2:]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("exif", [b"", b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"])
def test_a_jpeg_of_a_thousand_scans_is_refused_before_decoding(mode, exif):
    large = encode(Image.new(mode, (2000, 1500), 77), "JPEG", progressive=True, exif=exif)
    assert decode_pixels(many_scans(large, 3), max_pixels=1 << 22).shape == (1500, 2000, 3)
    for decode in (decode_image, decode_pixels):
        with pytest.raises(DecodeError, match=r"bomb: 2000 x 1500 px in 1\d\d\d scans"):
            decode(many_scans(large, 1000), max_pixels=1 << 22)
    small = encode(Image.new(mode, (20, 20), 77), "JPEG", progressive=True, exif=exif)
    assert decode_pixels(many_scans(small, 1000), max_pixels=LIMIT).shape == (20, 20, 3)


def with_segments(data: bytes, segments: list[tuple[int, bytes]]) -> bytes:
    """A JPEG with more segments (marker, content) before its own."""
    more = b"".join(bytes((0xFF, marker)) + struct.pack(">H", len(text) + 2) + text for marker, text in segments)
    return data[:2] + more + data[2:]


def overlapping_exif(entries: int, nbytes: int) -> bytes:
    """EXIF that says "turned", and each of whose other entries is as long as all of it."""
    kept = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    rows = [struct.pack(">HHII", 0x9000 + number, 7, nbytes - 8, 8) for number in range(entries)]
    return (b"MM\0*\0\0\0\x08" + struct.pack(">H", entries + 1) + kept + b"".join(rows)).ljust(nbytes, b"\0")


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("marker", [0xE1, 0xE2, 0xED, 0xFE])
def test_many_segments_of_a_jpeg_take_no_memory_and_do_not_matter(marker, fast):
    """Pillow keeps each of them, and copies all EXIF before each further segment of it."""
    turned = (0xE1, b"Exif\0\0" + overlapping_exif(0, 30))
    plain = encode(painting(20, 30), "JPEG")
    data = with_segments(plain, [turned] + [(marker, b"Exif\0\0" + bytes(50_000))] * 500 + [(marker, b"")] * 50_000)
    with contextlib.nullcontext() if fast else without("simplejpeg"):
        tracemalloc.start()
        shown = decoded(data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (shown == decoded(with_segments(plain, [turned]))).all() and peak < 2 * len(data)
    with pytest.raises(DecodeError, match="bomb: a header of more than 2048 parts"):
        decode_image(plain[:2] + b"\xff" * 3000 + plain[2:], max_pixels=LIMIT)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_of_exif_only_the_orientation_is_read(format):
    """Pillow copies what each entry points to: a thousand times all of it."""
    image = painting(20, 30)
    data = encode(image, format, exif=b"Exif\0\0" + overlapping_exif(3000, 60_000))
    tracemalloc.start()
    shown = decode_image(data, max_pixels=LIMIT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 21
    assert shown.size == decode_image(encode(image, format), max_pixels=LIMIT).size[::-1]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"MM*\0\0\0\0\x08", b"MM\0*\0\0\0\xff", b"II"]),
    st.sampled_from([(0x0112, 3, 1, 6), (0x0112, 4, 1, 3), (0x010F, 3, 1, 5), (0x0112, 3, 2, 6), (0x0112, 2, 1, 6)]),
    st.binary(max_size=30),
)
def test_any_exif_gives_an_image(head, entry, rest):
    order = "<" if head.startswith(b"I") else ">"
    exif = head + struct.pack(f"{order}HHHIHH", 1, *entry, 0) + rest
    image = painting(4, 6)
    shown = decode_image(encode(image, "PNG", exif=b"Exif\0\0" + exif), max_pixels=LIMIT)
    whole = head[2:4] in (b"*\0", b"\0*") and 8 in head[4:] and head[:4] != b"MM*\0"
    turned = whole and entry == (0x0112, 3, 1, 6)
    assert shown.size == (image.size[::-1] if turned else image.size)
