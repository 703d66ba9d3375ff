"""Encoded images to the pixels of training, in TensorFlow ops: for graphs that run without Pillow and without this package.

    JPEG, PNG, WebP, GIF or BMP -> upright (EXIF) -> over white -> RGB -> uint8 [h, w, 3], with antialias

Resizing is that of Pillow 13, to the bit (libImaging/Resample.c): the weights of a triangle or a cubic as integers of 22
fractional bits, one direction, rounded to bytes, then the other. The rows come first where they shrink more than twice as much
as the columns.
Not as in training: transparent parts of a GIF keep their hidden colour, the EXIF orientation of a WebP is not read, and AVIF and
BMP of other than 24 bits are refused.

The trap: `tf.image.resize(antialias=True)` does not round between the passes and is off by one in many pixels; TensorFlow's
JPEG decoder defaults to a faster and less accurate transform than everyone else's; and its PNG decoder calls the opaque pixels of
images with less than 8 bits nearly transparent.
"""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import tensorflow as tf

Resample = Literal["bilinear", "bicubic"]
_PRECISION_BITS = 22
_EXIF_HEADER = b"Exif\0\0"
_ORIENTATION_TAG = 0x0112
_APP1, _SCAN = 0xE1, 0xDA


def pixels(data: "tf.Tensor", size_px: tuple[int, int], resample: Resample = "bilinear") -> "tf.Tensor":
    """One encoded image, a string scalar -> uint8 [h, w, 3]. Other bytes fail with InvalidArgumentError when the graph runs."""
    return resize(decode(data), size_px, resample)


def decode(data: "tf.Tensor") -> "tf.Tensor":
    """One encoded image, a string scalar -> upright RGB over white, uint8 [h, w, 3]."""
    import tensorflow as tf

    def has(magic: bytes, at: int = 0) -> tf.Tensor:
        return tf.equal(tf.strings.substr(tf.strings.join([data, bytes(32)]), at, len(magic)), magic)

    def unknown() -> tf.Tensor:
        message = "an image is neither JPEG, PNG, WebP, GIF nor BMP of 24 bits; its bytes are so many:"
        with tf.control_dependencies([tf.debugging.Assert(False, [message, tf.strings.length(data)])]):
            return tf.zeros((1, 1, 3), tf.uint8)

    kinds = [
        (has(b"\xff\xd8\xff"), lambda: _jpeg(data)),
        (has(b"\x89PNG\r\n\x1a\n"), lambda: _png(data)),
        (has(b"RIFF") & has(b"WEBP", 8), lambda: _webp(data)),
        (has(b"GIF8"), lambda: tf.io.decode_gif(data)[0]),
        (has(b"BM") & has(b"\x18\0", 28), lambda: tf.io.decode_bmp(data, channels=3)),
    ]
    return tf.ensure_shape(tf.case(kinds, default=unknown), (None, None, 3))


def resize(image: "tf.Tensor", size_px: tuple[int, int], resample: Resample = "bilinear") -> "tf.Tensor":
    """uint8 [any height, any width, 3] -> uint8 [h, w, 3]."""
    import tensorflow as tf

    h, w = size_px
    image = tf.cast(image, tf.int32)
    height, width = tf.unstack(tf.shape(image)[:2])
    shrinks_more = (height > h) & (height - h > 2 * (width - w))
    resized = tf.cond(
        shrinks_more,
        lambda: _resample(_rows(image, h, resample), w, resample),
        lambda: _rows(_resample(image, w, resample), h, resample),
    )
    return tf.ensure_shape(tf.cast(resized, tf.uint8), (h, w, 3))


def _rows(image: "tf.Tensor", h: int, resample: Resample) -> "tf.Tensor":
    import tensorflow as tf

    height, width = tf.unstack(tf.shape(image)[:2])
    return tf.reshape(_resample(tf.reshape(image, (1, height, width * 3)), h, resample), (h, width, 3))


def _resample(lines: "tf.Tensor", out: int, resample: Resample) -> "tf.Tensor":
    """int32 [n, size, m] of bytes -> [n, out, m]. Whole numbers: sums stay below 255 * 2^22 * 1.3, the cubic's lobes, < 2^31."""
    import tensorflow as tf

    size = tf.shape(lines)[1]
    first, weights = _weights(size, out, resample)
    half = tf.fill((tf.shape(lines)[0], out, tf.shape(lines)[2]), 1 << (_PRECISION_BITS - 1))

    def add(tap: tf.Tensor, sums: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        pixel = tf.gather(lines, tf.minimum(first + tap, size - 1), axis=1)
        return tap + 1, sums + pixel * weights[:, tap][None, :, None]

    taps = tf.shape(weights)[1]
    sums = tf.while_loop(lambda tap, _: tap < taps, add, [0, half], parallel_iterations=1)[1]
    return tf.clip_by_value(tf.bitwise.right_shift(sums, _PRECISION_BITS), 0, 255)


def _weights(size: "tf.Tensor", out: int, resample: Resample) -> tuple["tf.Tensor", "tf.Tensor"]:
    """Where the pixels of a line begin that count in each pixel of the result, int32 [out], and how much, [out, taps]."""
    import tensorflow as tf

    scale = tf.cast(size, tf.float64) / out
    widened = tf.maximum(scale, 1.0)
    support = widened * (1.0 if resample == "bilinear" else 2.0)
    centre = (tf.range(out, dtype=tf.float64) + 0.5) * scale
    first = tf.maximum(tf.cast(centre - support + 0.5, tf.int32), 0)
    end = tf.minimum(tf.cast(centre + support + 0.5, tf.int32), size)
    places = first[:, None] + tf.range(tf.reduce_max(end - first))
    distance = tf.abs((tf.cast(places, tf.float64) - centre[:, None] + 0.5) * (1.0 / widened))
    kernel = tf.maximum(1.0 - distance, 0.0) if resample == "bilinear" else _cubic(distance)
    kernel = tf.where(places < end[:, None], kernel, 0.0)
    share = kernel / tf.reduce_sum(kernel, axis=1, keepdims=True)
    return first, tf.cast(share * float(1 << _PRECISION_BITS) + 0.5 * tf.sign(share), tf.int32)


def _cubic(x: "tf.Tensor") -> "tf.Tensor":
    """Keys's cubic convolution kernel with a = -0.5, of distances."""
    import tensorflow as tf

    a = -0.5
    near, far = ((a + 2.0) * x - (a + 3.0)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return tf.where(x < 1.0, near, tf.where(x < 2.0, far, 0.0))


def _over_white(image: "tf.Tensor") -> "tf.Tensor":
    """RGBA -> RGB as Pillow blends: a product of two bytes divided by 255 is rounded."""
    import tensorflow as tf

    image = tf.cast(image, tf.int32)
    colour, alpha = image[..., :3], image[..., 3:]
    blended = colour * alpha + 255 * (255 - alpha) + 128
    return tf.cast((blended + blended // 256) // 256, tf.uint8)


def _png(data: "tf.Tensor") -> "tf.Tensor":
    """16-bit grey by value, other 16-bit images by their high byte."""
    import tensorflow as tf

    header = tf.cast(tf.io.decode_raw(tf.strings.substr(data, 24, 2), tf.uint8), tf.int32)

    def deep_grey() -> tf.Tensor:
        image = tf.cast(tf.io.decode_png(data, channels=4, dtype=tf.uint16), tf.int32)
        shown = tf.where(tf.equal(image[..., 3:], 0), 255, (image[..., :3] + 128) // 257)
        return tf.cast(shown, tf.uint8)

    def shallow() -> tf.Tensor:
        image = tf.io.decode_png(data, channels=4)
        # The decoder fills in an opaque alpha in the file's own bits: 1, 3 or 15 of 255.
        filled = tf.cast(tf.bitwise.left_shift(1, tf.minimum(header[0], 8)) - 1, tf.uint8)
        opaque = tf.reduce_all(tf.equal(image[..., 3], filled))
        return tf.cond(opaque, lambda: image[..., :3], lambda: _over_white(image))

    image = tf.cond(tf.reduce_all(tf.equal(header, [16, 0])), deep_grey, shallow)
    content = _bytes(data)

    def more(place: tf.Tensor) -> tf.Tensor:
        return (place + 12 < tf.size(content)) & ~_matches(content, place + 4, b"eXIf")

    chunk = tf.while_loop(more, lambda place: [place + 12 + _number(content, place, 4)], [tf.constant(8)])[0]
    return _upright(image, tf.where(_matches(content, chunk + 4, b"eXIf"), _orientation(content, chunk + 8), 0))


def _webp(data: "tf.Tensor") -> "tf.Tensor":
    import tensorflow as tf

    image = tf.io.decode_webp(data)[0]
    return tf.cond(tf.equal(tf.shape(image)[-1], 4), lambda: _over_white(image), lambda: image[..., :3])


def _jpeg(data: "tf.Tensor") -> "tf.Tensor":
    import tensorflow as tf

    image = tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE", fancy_upscaling=True)
    content = _bytes(data)

    def is_exif(place: tf.Tensor) -> tf.Tensor:
        return _matches(content, place, bytes([0xFF, _APP1])) & _matches(content, place + 4, _EXIF_HEADER)

    def more(place: tf.Tensor) -> tf.Tensor:
        is_marker = (place + 4 < tf.size(content)) & _matches(content, place, b"\xff")
        return is_marker & ~_matches(content, place + 1, bytes([_SCAN])) & ~is_exif(place)

    segment = tf.while_loop(more, lambda place: [place + 2 + _number(content, place + 2, 2)], [tf.constant(2)])[0]
    return _upright(image, tf.where(is_exif(segment), _orientation(content, segment + 10), 0))


def _upright(image: "tf.Tensor", orientation: "tf.Tensor") -> "tf.Tensor":
    """Undoes an EXIF orientation, 1 … 8; any other number is none."""
    import tensorflow as tf

    def across() -> tf.Tensor:
        return tf.transpose(image, (1, 0, 2))

    turned = [
        lambda: image,
        lambda: tf.reverse(image, [1]),
        lambda: tf.reverse(image, [0, 1]),
        lambda: tf.reverse(image, [0]),
        across,
        lambda: tf.reverse(across(), [1]),
        lambda: tf.reverse(across(), [0, 1]),
        lambda: tf.reverse(across(), [0]),
    ]
    return tf.switch_case(tf.where((orientation >= 1) & (orientation <= 8), orientation - 1, 0), turned)


def _orientation(content: "tf.Tensor", tiff: "tf.Tensor") -> "tf.Tensor":
    """The orientation in the EXIF data that begins at a place, or 0 where it says nothing."""
    import tensorflow as tf

    little = tf.equal(_number(content, tiff, 2), 0x4949)
    directory = tiff + _number(content, tiff + 4, 4, little)
    count = tf.clip_by_value(_number(content, directory, 2, little), 0, tf.size(content) // 12)
    entries = directory + 2 + 12 * tf.range(count)
    wanted = tf.equal(_number(content, entries, 2, little), _ORIENTATION_TAG)
    return tf.reduce_max(tf.where(wanted, _number(content, entries + 8, 2, little), 0))


def _bytes(data: "tf.Tensor") -> "tf.Tensor":
    """int32 [n]: the bytes, and zeros for what a damaged header places behind the end."""
    import tensorflow as tf

    return tf.concat([tf.cast(tf.io.decode_raw(data, tf.uint8), tf.int32), tf.zeros((16,), tf.int32)], 0)


def _at(content: "tf.Tensor", places: "tf.Tensor", count: int) -> "tf.Tensor":
    import tensorflow as tf

    return tf.gather(content, tf.clip_by_value(places, 0, tf.size(content) - 16)[..., None] + tf.range(count))


def _matches(content: "tf.Tensor", place: "tf.Tensor", wanted: bytes) -> "tf.Tensor":
    import tensorflow as tf

    return tf.reduce_all(tf.equal(_at(content, place, len(wanted)), list(wanted)))


def _number(content: "tf.Tensor", places: "tf.Tensor", count: int, little: "tf.Tensor | bool" = False) -> "tf.Tensor":
    """Whole numbers of `count` bytes at some places; one past 2^31 becomes 2^31 - 1, behind the end of every file."""
    import tensorflow as tf

    found = _at(content, places, count)
    found = tf.cast(tf.where(little, tf.reverse(found, [-1]), found), tf.int64)
    value = tf.reduce_sum(found * [1 << (8 * i) for i in reversed(range(count))], -1)
    return tf.cast(tf.minimum(value, (1 << 31) - 1), tf.int32)
