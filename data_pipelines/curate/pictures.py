"""What is remembered of a picture: format, size, hashes, and a thumbnail to compare copies on.

Perceptual hash (pHash): bits of the 8 x 8 lowest DCT coefficients of the 32 x 32 grey picture, without the mean, that are
above their median by a little: half the coefficients of a symmetrical drawing are zero, and noise must not turn them.
Cropping 5 % moves 10 of 64 bits, so a picture is hashed under many crops: a copy that was cut matches the crop of its
original that comes closest. All crops cost one product: cropping, shrinking and the DCT are linear and separable, so
H(crop) = R X C^T, where R stacks the row operators of every crop and C the column operators.

The trap: crops are of the picture as stored, 64 x 64 first; the hashes of a whole picture and of its crops must come from
the same 64 x 64 pixels or they disagree by a few bits for no reason.
"""

import functools
import hashlib
import io
import itertools
import warnings
from dataclasses import dataclass

import numpy as np
import xxhash
from PIL import Image

from data_pipelines import image_ops

THUMBNAIL_PX = 64
_THUMBNAIL_QUALITY = 90
_GREY_PX, _DCT = 64, 8
_DEAD_ZONE = 0.05  # of the mean size of a coefficient
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")
CROPS = (0.0, 0.05)  # of each side, of every picture: 2^4 = 16 hashes
EVAL_CROPS = (0.0, 0.05, 0.1)  # of each side, of pictures to be protected: 3^4 = 81 hashes


@dataclass(frozen=True)
class Picture:
    """What a file shows.

    format, width, height: as far as the header could be read, else "" and 0; upright. reason: of the `DecodeError`, or
    None; then the rest is there. pixels: a hash of the decoded picture. thumbnail: a JPEG of 64 x 64.
    hashes: uint64 [len(crops)^4], of the whole picture first.
    """

    format: str
    width: int
    height: int
    animated: bool
    reason: str | None = None
    pixels: bytes = b""
    hashes: np.ndarray | None = None
    thumbnail: bytes | None = None


def examine(data: bytes, *, max_pixels: int, crops: tuple[float, ...] = CROPS) -> Picture:
    """Decodes a file, whatever it is, and describes what it shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's about bombs and odd metadata: what matters is in the result.
        format_name, width, height, animated = _header(data)
        try:
            picture = image_ops.decode_image(data, max_pixels=max_pixels)
        except image_ops.DecodeError as error:
            return Picture(format_name, width, height, animated, error.reason)
    size = f"{picture.width}x{picture.height}".encode()
    pixels = xxhash.xxh3_128(np.asarray(picture), seed=xxhash.xxh32_intdigest(size)).digest()
    grey = np.asarray(picture.convert("L").resize((_GREY_PX, _GREY_PX), Image.Resampling.BILINEAR, reducing_gap=2.0))
    thumbnail = picture.resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return Picture(
        format_name,
        picture.width,
        picture.height,
        animated,
        pixels=pixels,
        hashes=perceptual_hashes(grey, crops),
        thumbnail=_encode(thumbnail),
    )


def read_thumbnail(data: bytes) -> np.ndarray:
    """uint8 [64, 64, 3]."""
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as thumbnail:
        return np.asarray(thumbnail)


def content_hash(data: bytes) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def perceptual_hashes(grey: np.ndarray, crops: tuple[float, ...] = CROPS) -> np.ndarray:
    """The hashes of a picture under all crops. grey: [64, 64] -> uint64 [len(crops)^4], see `crop_boxes`."""
    operator = _operator(crops)
    n = len(crops) ** 2
    blocks = operator @ grey.astype(np.float32) @ operator.T
    blocks = blocks.reshape(n, _DCT, n, _DCT).transpose(0, 2, 1, 3).reshape(n * n, _DCT * _DCT)
    # Rounded, so that the last bit of a matrix product on another machine does not turn a bit of the hash.
    blocks = np.round(blocks[:, 1:], 2)
    threshold = np.median(blocks, axis=1, keepdims=True) + _DEAD_ZONE * np.abs(blocks).mean(1, keepdims=True)
    bits = blocks > threshold
    return np.packbits(np.pad(bits, ((0, 0), (1, 0))), axis=1).view(">u8")[:, 0].astype(np.uint64)


@functools.cache
def crop_boxes(crops: tuple[float, ...]) -> np.ndarray:
    """The shares cut off at (top, bottom, left, right), in the order of the hashes. float32 [len(crops)^4, 4]"""
    return np.array(list(itertools.product(crops, repeat=4)), np.float32)


@functools.cache
def _operator(crops: tuple[float, ...]) -> np.ndarray:
    """Of every (start, end) cut: shrink to 32 cells, then the 8 lowest DCT rows. float32 [len(crops)^2 * 8, 64]"""
    cells = 32
    angles = np.pi * (np.arange(cells) + 0.5) * np.arange(_DCT)[:, None] / cells
    dct = np.cos(angles) * np.where(np.arange(_DCT) == 0, 0.5, 1.0)[:, None] ** 0.5 * (2 / cells) ** 0.5
    rows = []
    for start, end in itertools.product(crops, repeat=2):
        edges = np.linspace(start * _GREY_PX, (1 - end) * _GREY_PX, cells + 1)
        pixel = np.arange(_GREY_PX)
        covered = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
        weights = np.clip(covered, 0, None)
        rows.append(dct @ (weights / weights.sum(1, keepdims=True)))
    return np.concatenate(rows).astype(np.float32)


def _encode(thumbnail: Image.Image) -> bytes:
    """All colours at full resolution: a changed colour may be all that tells two drawings apart."""
    file = io.BytesIO()
    thumbnail.save(file, "JPEG", quality=_THUMBNAIL_QUALITY, subsampling=0)
    return file.getvalue()


def _header(data: bytes) -> tuple[str, int, int, bool]:
    """Format, width, height, and whether there is a second frame; ("", 0, 0, False) of what is no picture."""
    try:
        with Image.open(io.BytesIO(data), formats=image_ops.FORMATS) as picture:
            animated = picture.format in _ANIMATED and getattr(picture, "is_animated", False)
            return picture.format or "", *picture.size, bool(animated)
    except Exception:  # Codecs raise anything on damaged files.
        return "", 0, 0, False
