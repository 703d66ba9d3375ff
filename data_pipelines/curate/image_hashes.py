"""What curation keeps of an image: format, size, hashes, and a thumbnail to compare duplicates on.

Perceptual hash (pHash): which of the 8 x 8 lowest DCT coefficients of the 32 x 32 grey image, the mean left out, are above
their median by a margin. The margin is there because half the coefficients of a symmetrical drawing are zero, and noise
must not flip their bits. Cropping 5 % flips 10 of 64 bits, so an image is hashed under many crops: a cropped copy matches
the closest crop of its original. All crops cost one matrix product, since cropping, shrinking and the DCT are linear and
separable: H(crop) = R X C^T, where R stacks the row operators of every crop and C the column operators.

The trap: the hashes of a whole image and of its crops must come from the same 64 x 64 pixels, or they disagree by a few bits
for no reason.
"""

import functools
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
_DEAD_ZONE = 0.05  # relative to the mean magnitude of a coefficient
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")

Box = tuple[float, float, float, float]  # shares cut off at (top, bottom, left, right)
_ONE_SIDE = tuple(tuple(0.1 * (side == cut) for side in range(4)) for cut in range(4))
# An image of the corpus gets 21 hashes, one of an evaluation set 81; the hash of the whole image comes first. Of 40 copies
# cut by 8 to 12 % on each side, 16 hashes find 15 within 12 bits, 21 find 37, and 81 find 39.
CROPS: tuple[Box, ...] = (*itertools.product((0.0, 0.05), repeat=4), *_ONE_SIDE, (0.1,) * 4)
EVAL_CROPS: tuple[Box, ...] = tuple(itertools.product((0.0, 0.05, 0.1), repeat=4))


@dataclass(frozen=True)
class ImageInfo:
    """What is known of an image file.

    Attributes:
      format, width, height: upright; "" and 0 if the header cannot be read.
      animated: whether there is a second frame.
      reason: why it cannot be decoded (`DecodeError.reason`), or None; only then the fields below are set.
      pixels: a hash of the decoded image.
      hashes: perceptual hashes, uint64 [len(crops)].
      thumbnail: a JPEG of 64 x 64.
    """

    format: str
    width: int
    height: int
    animated: bool
    reason: str | None = None
    pixels: bytes = b""
    hashes: np.ndarray | None = None
    thumbnail: bytes | None = None


def examine(data: bytes, *, max_pixels: int, crops: tuple[Box, ...] = CROPS) -> ImageInfo:
    """Decodes a file, whatever it is, and describes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of bombs and odd metadata; what matters is in the result
        format_name, width, height, animated = _header(data)
        try:
            image = image_ops.decode_image(data, max_pixels=max_pixels)
        except image_ops.DecodeError as error:
            return ImageInfo(format_name, width, height, animated, error.reason)
    size = f"{image.width}x{image.height}".encode()
    pixels = xxhash.xxh3_128(np.asarray(image), seed=xxhash.xxh32_intdigest(size)).digest()
    grey = np.asarray(image.convert("L").resize((_GREY_PX, _GREY_PX), Image.Resampling.BILINEAR, reducing_gap=2.0))
    thumbnail = image.resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return ImageInfo(
        format_name,
        image.width,
        image.height,
        animated,
        pixels=pixels,
        hashes=perceptual_hashes(grey, crops),
        thumbnail=_encode(thumbnail),
    )


def read_thumbnail(data: bytes) -> np.ndarray:
    """The pixels of a thumbnail. -> uint8 [64, 64, 3]"""
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as thumbnail:
        return np.asarray(thumbnail)


def perceptual_hashes(grey: np.ndarray, crops: tuple[Box, ...] = CROPS) -> np.ndarray:
    """The hashes of an image under all crops. grey: [64, 64] -> uint64 [len(crops)]"""
    operator, down, across = _operator(crops)
    blocks = (operator @ grey.astype(np.float32)) @ operator.T
    blocks = blocks.reshape(len(operator) // _DCT, _DCT, -1, _DCT)[down, :, across].reshape(len(crops), _DCT * _DCT)
    # Rounded, so that the last bits of a matrix product, which differ between machines, do not flip a bit of the hash.
    blocks = np.round(blocks[:, 1:], 2)
    threshold = np.median(blocks, axis=1, keepdims=True) + _DEAD_ZONE * np.abs(blocks).mean(1, keepdims=True)
    bits = blocks > threshold
    return np.packbits(np.pad(bits, ((0, 0), (1, 0))), axis=1).view(">u8")[:, 0].astype(np.uint64)


@functools.cache
def _operator(crops: tuple[Box, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The operators of every distinct cut of an axis, float32 [cuts * 8, 64], and each crop's cuts, down and across.

    An operator shrinks to 32 cells, then takes the 8 lowest DCT rows.
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
    """Encodes without chroma subsampling: colour may be all that tells two drawings apart."""
    file = io.BytesIO()
    thumbnail.save(file, "JPEG", quality=_THUMBNAIL_QUALITY, subsampling=0)
    return file.getvalue()


def _header(data: bytes) -> tuple[str, int, int, bool]:
    """Format, width, height, whether there is a second frame; ("", 0, 0, False) for a file that is not an image."""
    try:
        with image_ops.open_image(data) as image:
            animated = image.format in _ANIMATED and getattr(image, "is_animated", False)
            return image.format or "", *image.size, bool(animated)
    except Exception:  # codecs raise anything on damaged files
        return "", 0, 0, False
