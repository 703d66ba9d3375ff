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

Box = tuple[float, float, float, float]  # the shares cut off at (top, bottom, left, right)
_ONE_SIDE = tuple(tuple(0.1 * (side == cut) for side in range(4)) for cut in range(4))
# Of every picture 21 hashes, of those to be protected 81; the whole picture first. Of 40 copies cut by 8 to 12 % of each
# side 16 hashes find 15 within 12 bits, 21 find 37, 81 find 39.
CROPS: tuple[Box, ...] = (*itertools.product((0.0, 0.05), repeat=4), *_ONE_SIDE, (0.1,) * 4)
EVAL_CROPS: tuple[Box, ...] = tuple(itertools.product((0.0, 0.05, 0.1), repeat=4))


@dataclass(frozen=True)
class Picture:
    """What a file shows.

    format, width, height: as far as the header could be read, else "" and 0; upright. reason: of the `DecodeError`, or
    None; then the rest is there. pixels: a hash of the decoded picture. thumbnail: a JPEG of 64 x 64.
    hashes: uint64 [len(crops)].
    """

    format: str
    width: int
    height: int
    animated: bool
    reason: str | None = None
    pixels: bytes = b""
    hashes: np.ndarray | None = None
    thumbnail: bytes | None = None


def examine(data: bytes, *, max_pixels: int, crops: tuple[Box, ...] = CROPS) -> Picture:
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


def perceptual_hashes(grey: np.ndarray, crops: tuple[Box, ...] = CROPS) -> np.ndarray:
    """The hashes of a picture under all crops. grey: [64, 64] -> uint64 [len(crops)]."""
    operator, down, across = _operator(crops)
    blocks = (operator @ grey.astype(np.float32)) @ operator.T
    blocks = blocks.reshape(len(operator) // _DCT, _DCT, -1, _DCT)[down, :, across].reshape(len(crops), _DCT * _DCT)
    # Rounded, so that the last bit of a matrix product on another machine does not turn a bit of the hash.
    blocks = np.round(blocks[:, 1:], 2)
    threshold = np.median(blocks, axis=1, keepdims=True) + _DEAD_ZONE * np.abs(blocks).mean(1, keepdims=True)
    bits = blocks > threshold
    return np.packbits(np.pad(bits, ((0, 0), (1, 0))), axis=1).view(">u8")[:, 0].astype(np.uint64)


@functools.cache
def _operator(crops: tuple[Box, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every cut of an axis: shrink to 32 cells, then the 8 lowest DCT rows. float32 [cuts * 8, 64]; and of every crop
    its cuts, down and across.
    """
    cuts = sorted({cut for box in crops for cut in (box[:2], box[2:])})
    down, across = np.array([(cuts.index(box[:2]), cuts.index(box[2:])) for box in crops]).T
    cells = 32
    angles = np.pi * (np.arange(cells) + 0.5) * np.arange(_DCT)[:, None] / cells
    dct = np.cos(angles) * np.where(np.arange(_DCT) == 0, 0.5, 1.0)[:, None] ** 0.5 * (2 / cells) ** 0.5
    rows = []
    for start, end in cuts:
        edges = np.linspace(start * _GREY_PX, (1 - end) * _GREY_PX, cells + 1)
        pixel = np.arange(_GREY_PX)
        covered = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
        weights = np.clip(covered, 0, None)
        rows.append(dct @ (weights / weights.sum(1, keepdims=True)))
    return np.concatenate(rows).astype(np.float32), down, across


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
