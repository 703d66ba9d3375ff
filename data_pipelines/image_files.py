"""Image files as Pillow opens them, within bounds: it goes through headers and run lengths in Python, part by part.

The traps: Pillow refuses a PNG with long texts, keeps every segment of a JPEG, joins its EXIF segments by copying all before each
one, and copies what each entry of EXIF points to, which may be all of it. So what says nothing about the pixels is left out here
where it is long, and of EXIF only the one entry is read.
"""

import io
import struct

from PIL import Image

# What browsers show. Naming them also keeps Pillow's other fifty decoders away from files of unknown origin.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
PNG_MAGIC, _PNG_TEXTS = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
JPEG_MAGIC, START_OF_SCAN = b"\xff\xd8", 0xDA
# Comments and what applications add, but for JFIF's and Adobe's segments, which tell the colours.
_JPEG_NOTES = frozenset((*range(0xE1, 0xEE), 0xEF, 0xFE))
_MAX_JPEG_NOTES = 300  # a colour profile has 255 at most
# Of about 1 us each. A segment of a JPEG is four, and may cost much more; the run lengths of a BMP cost less.
_MAX_PARTS, _MAX_JPEG_PARTS, _MAX_BMP_PARTS = 1 << 20, 1 << 11, 1 << 23
_EXIF = b"Exif\0\0"
_BLOCK_BYTES = 1 << 16  # of pixels, in one read
_BYTE_ORDERS, _ORIENTATION_TAG, _INTEGERS = {b"II*\0": "<", b"MM\0*": ">"}, 0x0112, {1: "B", 3: "H", 4: "I"}


class DecodeError(ValueError):
    """An image that cannot be decoded.

    `reason`: "empty_image" (no bytes), "not_an_image", "bomb" (too large), "truncated" or "corrupt_image".
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class _Parts(io.BytesIO):
    """A file whose header is read in a limited number of parts."""

    def __init__(self, data: bytes):
        super().__init__(data)
        limits = {JPEG_MAGIC: _MAX_JPEG_PARTS, b"BM": _MAX_BMP_PARTS}
        self._limit = self._left = limits.get(data[:2], _MAX_PARTS)

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= size is not None and 0 <= size < _BLOCK_BYTES
        if self._left < 0:
            raise DecodeError("bomb", f"a header of more than {self._limit} parts")
        return super().read(size)


def open_image(data: bytes) -> Image.Image:
    """An image whose header is read. Raises DecodeError for a header without end, and whatever Pillow does."""
    data, exif = _with_few_notes(data)
    try:
        image = Image.open(_Parts(data), formats=FORMATS)
    except ValueError as error:
        if isinstance(error, DecodeError) or (lean := without_texts(data)) is None:
            raise
        image = Image.open(_Parts(lean), formats=FORMATS)
    if exif is not None:
        image.info["exif"] = exif
    return image


def orientation(image: Image.Image) -> int | None:
    """What EXIF says, 1 to 8, of how an image is stored; None if it says nothing, or is damaged, as browsers take it."""
    exif = image.info.get("exif", b"").removeprefix(_EXIF)
    order = _BYTE_ORDERS.get(exif[:4])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, values = struct.unpack_from(f"{order}HHI", exif, place)
            if tag == _ORIENTATION_TAG and values == 1 and kind in _INTEGERS:
                return struct.unpack_from(order + _INTEGERS[kind], exif, place + 8)[0]
    except struct.error:  # it ends before that
        pass
    return None


def without_texts(data: bytes) -> bytes | None:
    """A PNG without texts and colour profile, of which Pillow refuses long ones; None if there are none, or it is no PNG."""
    kept, start = [], len(PNG_MAGIC)
    while data.startswith(PNG_MAGIC) and start < len(data) and len(kept) < _MAX_PARTS:
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if data[start + 4 : start + 8] not in _PNG_TEXTS:
            kept.append(data[start:end])
        start = end
    lean = b"".join([PNG_MAGIC, *kept])
    return lean if kept and len(lean) < len(data) else None


def _with_few_notes(data: bytes) -> tuple[bytes, bytes | None]:
    """A JPEG without EXIF and without most of its other notes, if there are many, and its first EXIF; any other file as it is."""
    kept, start, notes, exif = [], len(JPEG_MAGIC), 0, None
    while data.startswith(JPEG_MAGIC) and data[start : start + 1] == b"\xff" and len(kept) < _MAX_JPEG_PARTS:
        marker, end = data[start + 1 : start + 2], start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        if marker == bytes([START_OF_SCAN]) or end < start + 4:
            break
        is_note = marker[0] in _JPEG_NOTES
        is_exif = marker == b"\xe1" and data.startswith(_EXIF, start + 4)
        exif = data[start + 4 : end] if is_exif and exif is None else exif
        notes += is_note
        if not is_exif and not (is_note and notes > _MAX_JPEG_NOTES):
            kept.append(data[start:end])
        start = end
    lean = b"".join([JPEG_MAGIC, *kept, data[start:]]) if exif is not None or notes > _MAX_JPEG_NOTES else data
    return lean, exif
