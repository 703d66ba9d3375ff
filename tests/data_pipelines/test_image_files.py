"""Image files made to cost much are refused: headers of endless parts, run lengths that Pillow decodes in Python."""

import struct

import pytest

from data_pipelines import image_files, image_ops
from data_pipelines.image_ops import DecodeError, decode_image
from tests.data_pipelines.shards import encode
from tests.data_pipelines.test_image_ops import LIMIT, chunk, painting


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(
            lambda n: encode(painting(8, 8))[:-12] + n * chunk(b"prVt", b"") + chunk(b"IEND", b""), id="chunks"
        ),
        pytest.param(lambda n: encode(painting(8, 8))[:33] + n * chunk(b"tEXt", b"a\0b"), id="texts"),
        pytest.param(lambda n: encode(painting(8, 8), "GIF")[:13] + n * b"!\xfe\0", id="extensions"),
        pytest.param(lambda n: encode(painting(8, 8), "GIF")[:13] + n * b"zz", id="what is no block"),
    ],
)
def test_a_header_of_endless_parts_is_a_bomb(monkeypatch, data):
    """Pillow goes through them in Python, a microsecond each."""
    monkeypatch.setattr(image_files, "_MAX_PARTS", 1000)
    with pytest.raises(DecodeError, match="bomb: a header of more than 1000 parts"):
        decode_image(data(1000), max_pixels=LIMIT)


def test_run_lengths_are_decoded_in_python_and_so_of_few_pixels(monkeypatch):
    def run_lengths(side: int) -> bytes:
        head = b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024)
        head += struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, 0, 0, 0, 256, 256)
        return head + bytes(range(256)) * 4 + bytes((side, 9, 0, 0)) * side + b"\0\1"

    monkeypatch.setattr(image_ops, "_MAX_PIXELS_IN_PYTHON", 400)
    assert decode_image(run_lengths(20), max_pixels=LIMIT).size == (20, 20)
    with pytest.raises(DecodeError, match="bomb: 21 x 21 px, limit 400"):
        decode_image(run_lengths(21), max_pixels=LIMIT)
