"""Encoded images to pixels, as a browser would show them, and resizing with antialias.

Order: header -> size check -> decode -> turn upright (EXIF) -> over white -> RGB -> resize to h x w, bilinear or bicubic.
Pillow's filters widen with the reduction, as the published preprocessors do; without that, the pixels of a reduced image are
off by 0.08 of the [-1, 1] range.

Pillow decodes, and judges every damaged file. Two optional libraries speed up its slow parts: simplejpeg (libjpeg-turbo)
decodes flawless grey and colour JPEGs to the same pixels 1.5 times as fast; cykooz-resizer computes Pillow's filter with SIMD
instructions, 5 times as fast, within 1/255 (2/255 at one value in millions), for training alone: what is evaluated or embedded
is Pillow's to the last bit, and so is bicubic.

The trap: Pillow clips 16-bit grey to white instead of scaling it, and allocates a whole image before it finds that the file
is a bomb or cut. So only the header is trusted with sizes here, and any error of any codec is a `DecodeError`.

A decode takes at most about five seconds and 512 MiB beside the image: hence limits on sides, on the scans of a JPEG, on the
parts of a header (`image_files`), and on the pixels that go through decoders which hold an image several times (WebP, AVIF, CMYK)
or are in Python (run lengths in a BMP).
"""

import math
import struct
import threading
from typing import Literal

import numpy as np
import pyarrow
from PIL import Image, UnidentifiedImageError

from data_pipelines.image_files import (
    JPEG_MAGIC,
    PNG_MAGIC,
    START_OF_SCAN,
    DecodeError,
    open_image,
    orientation,
    without_texts,
)

try:
    import simplejpeg
except ImportError:
    simplejpeg = None
try:
    import cykooz_resizer
except ImportError:
    cykooz_resizer = None

_MAGIC = (b"\xff\xd8\xff", PNG_MAGIC, b"GIF8", b"RIFF")
MAX_CANVAS_PIXELS = 1 << 25
_MAX_SIDE_PX = 1 << 16
_MAX_PIXELS_HELD_TWICE, _MAX_PIXELS_IN_PYTHON = 1 << 25, 1 << 24
_MAX_SCANNED_PIXELS, _MIN_SCAN_BYTES = 1 << 31, 10
_GREY_OF_16_BITS = ((np.arange(1 << 16) + 128) // 257).astype(np.uint8)
Resample = Literal["bilinear", "bicubic"]
Protocol = Literal["squash", "square875", "aspect75"]
PILLOW_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_WHITE = (255, 255, 255)
# JFIF, JPEG tables and frames, comments, ICC profiles; not APP1, where EXIF may say that the image is stored on its side.
_START_OF_FRAME = (0xC0, 0xC2)
_PLAIN_SEGMENTS = frozenset((*_START_OF_FRAME, START_OF_SCAN, 0xC4, 0xDB, 0xDD, 0xE0, 0xE2, 0xFE))
_FRAME = struct.Struct(">BHHB")
_local = threading.local()


def decode_image(data: bytes, *, max_pixels: int, min_size_px: tuple[int, int] | None = None) -> Image.Image:
    """Decodes a file to an upright RGB image: the first frame of an animation, transparent parts white.

    Args:
      data: a JPEG, PNG, WebP, GIF, BMP or AVIF file.
      max_pixels: the maximum width x height; larger images are refused by their header.
      min_size_px: (h, w), upright; a plain JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that is not smaller than this.
        None decodes in full.

    Raises:
      DecodeError: the file cannot be decoded in full; its `reason` says why.
    """
    if not data:
        raise DecodeError("empty_image", "0 bytes")
    try:
        image = open_image(data)
        _check_size(data, image.size, min(max_pixels, _codecs_limit(image)))
        is_plain = simplejpeg is not None and image.format == "JPEG" and image.mode in ("L", "RGB")
        if is_plain and min_size_px is not None and orientation(image) in _SIDEWAYS:
            min_size_px = min_size_px[::-1]
        pixels = _decode_jpeg(data, "RGBX", image.size, min_size_px) if is_plain else None
        if pixels is None:
            image.load()
        turned = orientation(image)  # after load(): a PNG may have it behind its pixels
        image = image.convert("RGBA") if image.mode == "LA" else image  # here, so that only one of them is in memory
        return _upright(_to_rgb(image) if pixels is None else _to_pil(pixels), turned)
    except DecodeError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError("bomb", str(error)) from error
    except UnidentifiedImageError as error:
        reason = "corrupt_image" if data.startswith(_MAGIC) else "not_an_image"
        raise DecodeError(reason, str(error)) from error
    except Exception as error:  # codecs raise anything on damaged files: OSError, SyntaxError, struct.error
        if isinstance(error, ValueError) and (lean := without_texts(data)) is not None:  # texts behind the pixels
            return decode_image(lean, max_pixels=max_pixels, min_size_px=min_size_px)
        reason = "truncated" if "truncated" in str(error) else "corrupt_image"
        raise DecodeError(reason, f"{type(error).__name__}: {error}") from error


def as_shown(image: Image.Image) -> Image.Image:
    """Pillow's image as a browser shows it: upright, transparent parts white, RGB. Raises whatever Pillow does."""
    image.load()
    return _upright(_to_rgb(image), orientation(image))


def _upright(image: Image.Image, turned: int | None) -> Image.Image:
    return image.transpose(_UPRIGHT[turned]) if turned in _UPRIGHT else image


def decode_pixels(data: bytes, *, max_pixels: int, min_size_px: tuple[int, int] | None = None) -> np.ndarray:
    """`decode_image` as an array, without Pillow for a plain JPEG. -> uint8 [h, w, 3]"""
    size = _plain_jpeg_size(data)
    if size is not None:
        _check_size(data, size, max_pixels)
        pixels = _decode_jpeg(data, "RGB", size, min_size_px)
        if pixels is not None:
            return pixels
    return np.asarray(decode_image(data, max_pixels=max_pixels, min_size_px=min_size_px))


def resize(
    image: np.ndarray | Image.Image,
    size_px: tuple[int, int],
    *,
    box: tuple[float, float, float, float] | None = None,
    resample: Resample = "bilinear",
    exact: bool = True,
) -> np.ndarray:
    """Resizes an image, or a box of it, with antialias, to a fixed size whatever its aspect ratio. -> uint8 [h, w, 3]

    Args:
      image: RGB, uint8 [h, w, 3] or Pillow's.
      size_px: (h, w) of the result.
      box: (left, top, right, bottom) in pixels of the image; outside the image it is white.
      resample: the filter.
      exact: Pillow's pixels; without, 1/255 may be off, and it is several times as fast.
    """
    pixels, (h, w) = np.asarray(image), size_px
    if box is not None:
        pixels, box = _pad_to(pixels, box)
    if (
        exact or cykooz_resizer is None or resample != "bilinear"
    ):  # its bicubic clips between its passes, in another order
        return np.asarray(Image.fromarray(pixels).resize((w, h), PILLOW_FILTERS[resample], box=box))
    rgb, (height, width) = cykooz_resizer.PixelType.U8x3, pixels.shape[:2]
    resized = cykooz_resizer.ImageData(w, h, rgb)
    whole = cykooz_resizer.ImageData(width, height, rgb, pixels.tobytes())
    _thread_resizer().resize(whole, resized, _resize_options((width, height), box))
    return np.frombuffer(resized.get_buffer(), np.uint8).reshape(h, w, 3)


def resize_and_crop(
    image: np.ndarray,
    size_px: tuple[int, int],
    protocol: Protocol,
    *,
    resample: Resample = "bilinear",
    exact: bool = True,
) -> np.ndarray:
    """An image as an evaluation's protocol prepares it. -> uint8 [h, w, 3]

    Args:
      protocol: squash: resized whole, whatever its aspect ratio (CLIP_benchmark, Hugging Face). square875: resized to a square
        1 / 0.875 times as large, and its centre (big_vision). aspect75: its shorter side resized to 1 / 0.75 of the size, and
        its centre (big_vision, for ImageNet-A).
      resample, exact: as for `resize`.
    """
    if protocol == "squash":
        return resize(image, size_px, resample=resample, exact=exact)
    (h, w), (height, width) = size_px, image.shape[:2]
    if protocol == "square875":
        large = int(h / 0.875), int(w / 0.875)
    else:
        scale = max(int(h / 0.75) / height, int(w / 0.75) / width)
        large = max(h, round(height * scale)), max(w, round(width * scale))
    top, left = (large[0] - h) // 2, (large[1] - w) // 2
    return resize(image, large, resample=resample, exact=exact)[top : top + h, left : left + w]


def _thread_resizer():
    """This thread's resizer: it owns buffers, so threads cannot share one."""
    if not hasattr(_local, "resizer"):
        _local.resizer = cykooz_resizer.Resizer()
    return _local.resizer


def _resize_options(size: tuple[int, int], box: tuple[float, float, float, float] | None):
    """Pillow's bilinear filter over a box that lies within the image."""
    crop = None
    if box is not None:
        (left, width), (top, height) = (_within(box[side], box[side + 2], size[side]) for side in (0, 1))
        crop = cykooz_resizer.CropBox(left, top, width, height)
    filter_type = cykooz_resizer.FilterType.bilinear
    return cykooz_resizer.ResizeOptions(cykooz_resizer.ResizeAlg.convolution(filter_type), crop_box=crop)


def _within(start: float, end: float, limit: int) -> tuple[float, float]:
    """(start, length), whose sum does not exceed the limit, not even by rounding."""
    length = end - start
    while start + length > limit:
        length = math.nextafter(length, 0)
    return start, length


def _decode_jpeg(
    data: bytes, colors: str, size: tuple[int, int], min_size_px: tuple[int, int] | None
) -> np.ndarray | None:
    """Decodes a grey or YCbCr JPEG of this (width, height); None if it has any flaw, which Pillow then judges."""
    shape, factor = size[::-1], 1
    if min_size_px is not None:  # the inverse DCT makes 4, 2 or 1 pixels of 8 for part of its cost
        fits = (f for f in (8, 4, 2) if all(side >= f * least for side, least in zip(shape, min_size_px, strict=True)))
        factor = next(fits, 1)
    height, width = (-(-side // factor) for side in shape)
    try:
        pixels = simplejpeg.decode_jpeg(data, colors, strict=True, min_height=height, min_width=width)
    except ValueError:
        return None
    if pixels.shape[:2] != (height, width):
        return None
    # The last row or column may stand for less than half of its pixels; it would stretch the image.
    return np.ascontiguousarray(pixels[: round(shape[0] / factor), : round(shape[1] / factor)])


def _to_pil(pixels: np.ndarray) -> Image.Image:
    """Pixels of four bytes as a Pillow image; Pillow stores RGB so and takes them without a copy."""
    flat = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(pixels.reshape(-1)), 4)
    return Image.fromarrow(flat, "RGB", pixels.shape[1::-1])


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a grey or YCbCr JPEG that is stored upright; None for every other file."""
    if simplejpeg is None or not data.startswith(JPEG_MAGIC):
        return None
    size, start = None, 2
    while start + 4 <= len(data):
        mark, marker, length = data[start], data[start + 1], data[start + 2] << 8 | data[start + 3]
        if mark != 0xFF or marker not in _PLAIN_SEGMENTS or length < 2:
            return None
        if marker == START_OF_SCAN:
            return size
        if marker in _START_OF_FRAME:
            bits, height, width, components = _FRAME.unpack_from(data[start + 4 : start + 10].ljust(6, b"\0"))
            if size is not None or bits != 8 or components not in (1, 3) or not height or not width:
                return None
            size = width, height
        start += 2 + length
    return None


def _codecs_limit(image: Image.Image) -> float:
    """The pixels that the decoder of an image may have."""
    if image.format in ("WEBP", "AVIF") or image.mode == "CMYK":
        return _MAX_PIXELS_HELD_TWICE
    return _MAX_PIXELS_IN_PYTHON if image.tile and image.tile[0][0] == "bmp_rle" else math.inf


def _check_size(data: bytes, size: tuple[int, int], max_pixels: int) -> None:
    """Raises DecodeError for an image that would take too much time or memory."""
    pixels = size[0] * size[1]
    if pixels > max_pixels or max(size) > _MAX_SIDE_PX:
        raise DecodeError("bomb", f"{size[0]} x {size[1]} px, limit {max_pixels} in all and {_MAX_SIDE_PX} on a side")
    # A progressive JPEG goes over all its pixels in each scan. No need to count what so many bytes cannot hold.
    if pixels * (len(data) // _MIN_SCAN_BYTES) > _MAX_SCANNED_PIXELS and data.startswith(JPEG_MAGIC):
        scans = data.count(bytes((0xFF, START_OF_SCAN)))
        if pixels * scans > _MAX_SCANNED_PIXELS:
            raise DecodeError(
                "bomb", f"{size[0]} x {size[1]} px in {scans} scans, limit {_MAX_SCANNED_PIXELS} px in all"
            )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _deep_grey_to_rgb(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    white = Image.new("RGB", image.size, _WHITE)
    white.paste(image, mask=image.getchannel("A"))
    return white


def _deep_grey_to_rgb(image: Image.Image) -> Image.Image:
    """Converts 16-bit grey to RGB; 65535 becomes white, and so does the grey that a PNG declares transparent."""
    grey = np.asarray(image)
    shown = _GREY_OF_16_BITS[grey if grey.dtype.itemsize == 2 else grey.clip(0, 65535)]
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        shown[grey == transparent] = 255
    return Image.fromarray(shown).convert("RGB")


def _pad_to(
    pixels: np.ndarray, box: tuple[float, float, float, float]
) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """Pads an image with white as far as the box reaches beyond it. -> the padded image, the box in its pixels

    If that needs a canvas of more than MAX_CANVAS_PIXELS, the image is reduced first: it ends up small anyway.
    """
    height, width = pixels.shape[:2]
    reach = (max(box[2], width) - min(box[0], 0)) * (max(box[3], height) - min(box[1], 0))
    if reach > MAX_CANVAS_PIXELS:
        pixels = np.asarray(Image.fromarray(pixels).reduce(int(np.ceil((reach / MAX_CANVAS_PIXELS) ** 0.5))))
        old, (height, width) = (width, height), pixels.shape[:2]
        box = tuple(side * size / was for side, size, was in zip(box, (width, height) * 2, old * 2, strict=True))
    left, top, right, bottom = box
    pad_left, pad_top = max(0, math.ceil(-left)), max(0, math.ceil(-top))
    pad_right, pad_bottom = max(0, math.ceil(right - width)), max(0, math.ceil(bottom - height))
    if pad_left or pad_top or pad_right or pad_bottom:
        canvas = np.full((height + pad_top + pad_bottom, width + pad_left + pad_right, 3), 255, np.uint8)
        canvas[pad_top : pad_top + height, pad_left : pad_left + width] = pixels
        pixels = canvas
    return pixels, (left + pad_left, top + pad_top, right + pad_left, bottom + pad_top)
