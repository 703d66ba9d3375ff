"""Encoded pictures to pixels, the way a browser would show them, and resizing with antialias.

Order: header -> size check -> decode -> turn upright (EXIF) -> over white -> RGB -> resize to h x w,
bilinear. Pillow's bilinear filter widens with the reduction, as the published preprocessors do; without that,
pixels of a reduced picture are off by 0.08 of the [-1, 1] range.

The trap: Pillow clips 16-bit grey to white instead of scaling it, and allocates the whole picture before it
finds that the file is a bomb or cut: only the header is trusted with sizes here, and any error of any codec
is a `DecodeError`.
"""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

# What browsers show. Naming them also keeps Pillow's other fifty decoders away from files of unknown origin.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"RIFF")
MAX_CANVAS_PIXELS = 1 << 25
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WHITE = (255, 255, 255)


class DecodeError(ValueError):
    """A picture that cannot be shown.

    `reason`: "empty_image" (no bytes), "not_an_image", "bomb" (too large), "truncated" or "corrupt_image".
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def decode_image(data: bytes, *, max_pixels: int) -> Image.Image:
    """The upright RGB picture in an encoded file: of an animation the first frame, transparent parts white.

    Args:
      data: a JPEG, PNG, WebP, GIF, BMP or AVIF file.
      max_pixels: the largest width x height to decode; larger ones are refused on sight of the header.

    Raises:
      DecodeError: the file cannot be decoded in full, see its `reason`.
    """
    if not data:
        raise DecodeError("empty_image", "0 bytes")
    try:
        picture = Image.open(io.BytesIO(data), formats=_FORMATS)
        if picture.width * picture.height > max_pixels:
            raise DecodeError("bomb", f"{picture.width} x {picture.height} px, limit {max_pixels}")
        picture.load()
        return _to_rgb(_upright(picture))
    except DecodeError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError("bomb", str(error)) from error
    except UnidentifiedImageError as error:
        reason = "corrupt_image" if data.startswith(_MAGIC) else "not_an_image"
        raise DecodeError(reason, str(error)) from error
    except Exception as error:  # Codecs raise anything on damaged files: OSError, SyntaxError, struct.error
        reason = "truncated" if "truncated" in str(error) else "corrupt_image"
        raise DecodeError(reason, f"{type(error).__name__}: {error}") from error


def resize(
    picture: Image.Image, size_px: tuple[int, int], *, box: tuple[float, float, float, float] | None = None
) -> np.ndarray:
    """Resizes a picture, or a box of it, with antialias. The aspect ratio gives way.

    Args:
      picture: RGB.
      size_px: (h, w) of the result.
      box: (left, top, right, bottom) in pixels of the picture; what lies outside the picture is white.

    Returns:
      uint8 [h, w, 3].
    """
    h, w = size_px
    if box is not None:
        picture, box = _pad_to(picture, box)
    return np.asarray(picture.resize((w, h), Image.Resampling.BILINEAR, box=box))


def _upright(picture: Image.Image) -> Image.Image:
    if "exif" not in picture.info:
        return picture
    try:
        orientation = picture.getexif().get(_ORIENTATION_TAG)
    except Exception:  # Broken metadata of a whole picture: browsers show it as it lies.
        return picture
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I"):
        return _deep_grey_to_rgb(picture)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    white = Image.new("RGB", picture.size, _WHITE)
    white.paste(picture, mask=picture.getchannel("A"))
    return white


def _deep_grey_to_rgb(picture: Image.Image) -> Image.Image:
    """16-bit grey to RGB: 65535 is white, and the grey that a PNG declares transparent is white as well."""
    grey = np.asarray(picture).astype(np.uint32)
    shown = ((grey + 128) // 257).astype(np.uint8)
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        shown[grey == transparent] = 255
    return Image.fromarray(shown).convert("RGB")


def _pad_to(
    picture: Image.Image, box: tuple[float, float, float, float]
) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """A picture with as much white around it as the box reaches out, and the box in its pixels.

    Where that would need a canvas of more than MAX_CANVAS_PIXELS, the picture is reduced first: it ends up small anyway.
    """
    width, height = picture.size
    reach = (max(box[2], width) - min(box[0], 0)) * (max(box[3], height) - min(box[1], 0))
    if reach > MAX_CANVAS_PIXELS:
        factor = int(np.ceil((reach / MAX_CANVAS_PIXELS) ** 0.5))
        picture = picture.reduce(factor)
        box = tuple(
            side * size / old for side, size, old in zip(box, picture.size * 2, (width, height) * 2, strict=True)
        )
    left, top, right, bottom = box
    width, height = picture.size
    pad_left, pad_top = max(0, int(np.ceil(-left))), max(0, int(np.ceil(-top)))
    pad_right, pad_bottom = max(0, int(np.ceil(right - width))), max(0, int(np.ceil(bottom - height)))
    if pad_left or pad_top or pad_right or pad_bottom:
        canvas = Image.new("RGB", (width + pad_left + pad_right, height + pad_top + pad_bottom), _WHITE)
        canvas.paste(picture, (pad_left, pad_top))
        picture = canvas
    return picture, (left + pad_left, top + pad_top, right + pad_left, bottom + pad_top)
