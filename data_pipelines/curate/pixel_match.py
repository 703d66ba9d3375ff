"""Whether two thumbnails show the same image, one of them perhaps cropped: align them, then compare.

One image is laid over the other by an axis-aligned affine map, x -> x0 (1 - u) + x1 u and y -> y0 (1 - v) + y1 v, which
Gauss-Newton finds on the grey thumbnails (Lucas and Kanade 1981) at a quarter of their size, then at half, then in full;
pairs that look hopeless at a smaller size are given up there. Brightness may differ, clip(g x + o) with one g and a small o
for all colours, fitted where neither image is saturated: a brighter copy is a copy, but another colour is another image, and
so is a faint drawing in a lighter grey. What differs after that is measured in two ways:

    error = rms(difference) / rms contrast         over the whole image, relative to what it shows
    spot  = max |difference|, the worst 1 % aside  at one place: another face, another number on the same card

Both are taken on slightly blurred colours, so that fine lines sampled differently do not count, and without the rim, into
which a frame bleeds. The distance of two images is the larger of the two measures, each as a share of its permitted maximum: up
to 1 they are the same.

The trap: to a thumbnail, every small drawing on a large white page is alike. So the less of a thumbnail stands out from its
background, the smaller the permitted error.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data_pipelines.curate.image_hashes import read_thumbnail

_BATCH = 64
_DECODED_AT_ONCE = 2048
_GREY = np.array([0.299, 0.587, 0.114], np.float32)
_MAX_CUT, _MAX_OUTSIDE = 0.18, 0.12  # shares of a side that may be missing on one side, or stick out
_STEP = 0.05
_HOPELESS, _HOPELESS_HALF = 0.9, 0.6  # errors at a quarter and at half of the size that a larger size does not repair
_STANDS_OUT, _FULL_SHARE = 24.0, 0.1
_RIM_PX = 3  # of 64
_GAIN, _OFFSET = (0.85, 1.18), 5.0
_SATURATED = 6.0
_TINY = 1e-9  # in place of a tolerance of 0
_COLOURLESS = 2.5  # mean distance of a channel from the mean of the three


class _Operators(NamedTuple):
    """Linear operators along an axis of n samples. cells: [n], the samples' positions in [0, 1]; the others: [n, n]."""

    cells: np.ndarray
    blur: np.ndarray
    gradient: np.ndarray


@dataclass(frozen=True)
class Tolerance:
    """How much two images may differ and still be the same.

    Attributes:
      error, spot: the maximum of each measure, see the module.
      spot_share: the share of pixels, the worst ones, that `spot` leaves aside.
      grey: compare in grey if one of the two has no colour.
    """

    error: float
    spot: float
    spot_share: float = 0.01
    grey: bool = False


def distances(
    part: np.ndarray, whole: np.ndarray, cut: np.ndarray, tolerance: Tolerance, *, hopeless: float = np.inf
) -> np.ndarray:
    """How far apart pairs of thumbnails are; 1 or less means the same image. -> float32 [n]

    Args:
      part, whole: uint8 [n, 64, 64, 3]; `part` may be a crop of `whole`, or slightly the other way round.
      cut: float32 [n, 4], a guess of the shares of `whole` that `part` lacks at (top, bottom, left, right).
      hopeless: the largest error between them as they lie, at half of the size, with which they are measured like that too;
        others are only measured if aligning helps, and are infinitely far where it does not.
    """
    found = np.zeros(len(part), np.float32)
    for start in range(0, len(part), _BATCH):
        rows = slice(start, start + _BATCH)
        a, b = (images[rows].transpose(0, 3, 1, 2).astype(np.float32) for images in (part, whole))
        if tolerance.grey:
            _drop_colour(a, b)
        found[rows] = _distances_of_batch(a, b, cut[rows], tolerance, hopeless)
    return found


def same_image(part: np.ndarray, whole: np.ndarray, cut: np.ndarray, tolerance: Tolerance) -> np.ndarray:
    """Which pairs of thumbnails show the same image; arguments as for `distances`. -> bool [n]"""
    return distances(part, whole, cut, tolerance, hopeless=_HOPELESS_HALF) <= 1


def same_thumbnails(
    ours: pa.ChunkedArray,
    theirs: pa.ChunkedArray,
    rows: tuple[np.ndarray, np.ndarray],
    cut: np.ndarray,
    is_part: np.ndarray,
    tolerance: Tolerance,
) -> np.ndarray:
    """`same_image` for rows of two columns of encoded thumbnails. -> bool [n]; arguments as for `compare_thumbnails`"""
    return compare_thumbnails(same_image, ours, theirs, rows, cut, is_part, tolerance).astype(bool)


def compare_thumbnails(
    compare: Callable[[np.ndarray, np.ndarray, np.ndarray, Tolerance], np.ndarray],
    ours: pa.ChunkedArray,
    theirs: pa.ChunkedArray,
    rows: tuple[np.ndarray, np.ndarray],
    cut: np.ndarray,
    is_part: np.ndarray,
    tolerance: Tolerance,
) -> np.ndarray:
    """`distances` or `same_image` for rows of two columns of encoded thumbnails, some at a time. -> float32 [n]

    Args:
      ours, theirs: binary columns of JPEGs.
      rows: int [n] each, which row of ours is compared with which row of theirs.
      cut: float32 [n, 4], as for `distances`.
      is_part: bool [n], whether ours may be a crop of theirs; otherwise theirs of ours.
    """
    found = np.zeros(len(cut), np.float32)
    for start in range(0, len(cut), _DECODED_AT_ONCE):
        some = slice(start, start + _DECODED_AT_ONCE)
        a, b = (_decode(column.take(pa.array(row[some]))) for column, row in zip((ours, theirs), rows, strict=True))
        first = is_part[some, None, None, None]
        found[some] = compare(np.where(first, a, b), np.where(first, b, a), cut[some], tolerance)
    return found


def _decode(thumbnails: pa.ChunkedArray) -> np.ndarray:
    """Pixels of thumbnails; each file is decoded once. -> uint8 [n, 64, 64, 3]"""
    files = thumbnails.combine_chunks().dictionary_encode()
    pixels = [read_thumbnail(data) for data in files.dictionary.to_pylist()]
    return np.stack(pixels)[files.indices.to_numpy()]


def _distances_of_batch(
    a: np.ndarray, b: np.ndarray, cut: np.ndarray, tolerance: Tolerance, hopeless: float
) -> np.ndarray:
    """Compares images as they are and, if that is too far, aligned, either as the crop of the other. a, b: [n, 3, 64, 64]."""
    full = tuple(np.einsum("ncyx,c->nyx", images, _GREY) for images in (a, b))
    half = tuple(_halve(images) for images in full)
    quarter = tuple(_halve(images) for images in half)
    found = np.full(len(a), np.inf, np.float32)
    nothing = np.zeros_like(cut)
    likely = np.flatnonzero(_error(*half, _box(nothing), blur=1) < hopeless)
    if len(likely):
        found[likely] = _distance(a[likely], b[likely], _box(nothing[likely]), tolerance)
    for fixed, guess in ((0, cut), (1, nothing)):
        left = np.flatnonzero(found > 1)
        box = guess[left]
        for sizes, start, limit in ((quarter, _best_start, _HOPELESS), (half, _next_start, _HOPELESS_HALF)):
            if len(left):
                box, error = start(sizes[fixed][left], sizes[1 - fixed][left], box)
                left, box = left[error < limit], box[error < limit]
        if len(left):
            box = _align(full[fixed][left], full[1 - fixed][left], box, blurs=(2,), steps=4)
            aligned = _distance((a, b)[fixed][left], (a, b)[1 - fixed][left], box, tolerance)
            found[left] = np.minimum(found[left], aligned)
    return found


def _best_start(fixed: np.ndarray, moved: np.ndarray, cut: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Aligns twice, from the guessed cut and from none. -> the better box of each pair [n, 4], its error [n]"""
    boxes, errors = [], []
    for guess in (cut, np.zeros_like(cut)):
        box = _align(fixed, moved, _box(guess), blurs=(2, 0), steps=5)
        boxes.append(box)
        errors.append(_error(fixed, moved, box, blur=0))
    first = (errors[0] <= errors[1])[:, None]
    return np.where(first, *boxes), np.minimum(*errors)


def _next_start(fixed: np.ndarray, moved: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Refines the box. -> the box [n, 4], its error [n]"""
    box = _align(fixed, moved, box, blurs=(1,), steps=4)
    return box, _error(fixed, moved, box, blur=1)


def _error(fixed: np.ndarray, moved: np.ndarray, box: np.ndarray, *, blur: int) -> np.ndarray:
    """The error between grey images. [n, t, t] x 2, [n, 4] -> [n]"""
    shown, difference = _difference(fixed[:, None], moved[:, None], box, blur=blur, faint=0.0)
    return _relative(shown, difference)


def _distance(fixed: np.ndarray, moved: np.ndarray, box: np.ndarray, tolerance: Tolerance) -> np.ndarray:
    """The error and the spot as shares of what is permitted, the larger one. [n, 3, 64, 64] x 2, [n, 4] -> [n]"""
    shown, difference = _difference(fixed, moved, box, blur=2, faint=_STANDS_OUT)
    inner = difference[..., _RIM_PX:-_RIM_PX, _RIM_PX:-_RIM_PX]
    worst = np.abs(inner).max(1).reshape(len(fixed), -1)
    rank = max(1, int(tolerance.spot_share * worst.shape[1]))
    spot = np.partition(worst, -rank, axis=1)[:, -rank]
    ground = np.median(shown, axis=(2, 3), keepdims=True)
    share = (np.abs(shown - ground).max(1) > _STANDS_OUT).mean((1, 2))
    limit = tolerance.error * np.minimum(1, 0.25 + share / _FULL_SHARE)
    return np.maximum(_relative(shown, inner) / np.maximum(limit, _TINY), spot / max(tolerance.spot, _TINY))


def _difference(
    fixed: np.ndarray, moved: np.ndarray, box: np.ndarray, *, blur: int, faint: float
) -> tuple[np.ndarray, np.ndarray]:
    """`fixed`, blurred, and how `moved`, laid over it, differs from it. -> [n, c, t, t] each

    The brightness of `moved` is fitted to `fixed` where that helps and `fixed` has more contrast than `faint`.
    """
    smooth = np.linalg.matrix_power(_operators(fixed.shape[-1]).blur, blur)
    shown, laid = smooth @ fixed @ smooth.T, smooth @ _warp(moved, box[:, None]) @ smooth.T
    gain, offset = _light(laid, shown)
    relit = np.clip(gain * laid + offset, 0, 255) - shown
    laid -= shown
    helps = ((relit**2).sum((1, 2, 3)) < (laid**2).sum((1, 2, 3))) & (_contrast(shown) > faint)
    laid[helps] = relit[helps]
    return shown, laid


def _light(laid: np.ndarray, shown: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(g, o) such that clip(g laid + o) is near `shown`: first g by least squares, then o, both within limits."""
    low, high = _SATURATED, 255 - _SATURATED
    counts = ((laid > low) & (laid < high) & (shown > low) & (shown < high)).astype(np.float32)
    axes = (1, 2, 3)
    number = counts.sum(axes, keepdims=True) + 1e-3
    laid, shown = laid * counts, shown * counts
    gain = np.clip((laid * shown).sum(axes, keepdims=True) / ((laid**2).sum(axes, keepdims=True) + 1e-3), *_GAIN)
    return gain, np.clip((shown - gain * laid).sum(axes, keepdims=True) / number, -_OFFSET, _OFFSET)


def _relative(shown: np.ndarray, difference: np.ndarray) -> np.ndarray:
    """The root mean square difference as a share of the contrast. [n, c, t, t], [n, c, r, r] -> [n]"""
    return np.sqrt((difference**2).mean((1, 2, 3))) / (_contrast(shown) + 2.0)


def _contrast(images: np.ndarray) -> np.ndarray:
    return np.sqrt(images.var((2, 3)).mean(1))


def _align(fixed: np.ndarray, moved: np.ndarray, box: np.ndarray, *, blurs: tuple[int, ...], steps: int) -> np.ndarray:
    """The box (y0, y1, x0, x1) of `moved` that looks like `fixed`. [n, t, t] x 2, [n, 4] -> float32 [n, 4]."""
    count, samples = len(fixed), fixed.shape[-1]
    operators = _operators(samples)
    low = np.array([-_MAX_OUTSIDE, 1 - _MAX_CUT] * 2, np.float32)
    high = np.array([_MAX_CUT, 1 + _MAX_OUTSIDE] * 2, np.float32)
    rim = -(-_RIM_PX * samples // 64)
    inner = slice(rim, samples - rim)
    v, u = operators.cells[inner, None], operators.cells[inner]
    for blur in blurs:
        smooth = np.linalg.matrix_power(operators.blur, blur)
        target, source = smooth @ fixed @ smooth.T, smooth @ moved @ smooth.T
        planes = np.stack([source, operators.gradient @ source, source @ operators.gradient.T], axis=1)
        for _ in range(steps):
            laid, dy, dx = np.moveaxis(_warp(planes, box[:, None])[..., inner, inner], 1, 0)
            off = (laid - target[:, inner, inner]).reshape(count, -1, 1)
            slopes = np.stack([dy * (1 - v), dy * v, dx * (1 - u), dx * u], axis=1).reshape(count, 4, -1)
            normal = slopes @ slopes.transpose(0, 2, 1)
            damping = 1e-3 * np.trace(normal, axis1=1, axis2=2) + 1.0
            normal += np.eye(4, dtype=np.float32) * damping[:, None, None]
            step = np.linalg.solve(normal, slopes @ off)[..., 0]
            box = np.clip(box - np.clip(step, -_STEP, _STEP), low, high)
    return box


def _box(cut: np.ndarray) -> np.ndarray:
    """The box (y0, y1, x0, x1) that a cut leaves. float32 [n, 4] -> [n, 4]"""
    return np.stack([cut[:, 0], 1 - cut[:, 1], cut[:, 2], 1 - cut[:, 3]], axis=1).astype(np.float32)


def _drop_colour(a: np.ndarray, b: np.ndarray) -> None:
    """Makes both images of a pair grey where one is. [n, 3, t, t] x 2, changed in place."""
    grey = [np.abs(images - images.mean(1, keepdims=True)).mean((1, 2, 3)) < _COLOURLESS for images in (a, b)]
    some = grey[0] | grey[1]
    for images in (a, b):
        images[some] = np.einsum("ncyx,c->nyx", images[some], _GREY)[:, None]


def _warp(images: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Bilinear samples of a box of each image. images: [..., t, t]; box: [..., 4] -> [..., t, t]"""
    down = _sampling(box[..., 0], box[..., 1], images.shape[-1])
    across = _sampling(box[..., 2], box[..., 3], images.shape[-1])
    return down @ images @ np.swapaxes(across, -1, -2)


def _sampling(start: np.ndarray, end: np.ndarray, samples: int) -> np.ndarray:
    """Linear interpolation at `samples` points between two shares of the side. [...] x 2 -> [..., t, t]"""
    cells = _operators(samples).cells
    points = np.clip((start[..., None] + (end - start)[..., None] * cells) * samples - 0.5, 0, samples - 1)
    return np.maximum(0, 1 - np.abs(points[..., None] - np.arange(samples, dtype=np.float32)))


@functools.cache
def _operators(samples: int) -> _Operators:
    """blur: [1 2 1] / 4; gradient: central differences per side length; both repeat the edge samples."""
    rows = np.arange(samples)
    after, before = np.minimum(rows + 1, samples - 1), np.maximum(rows - 1, 0)
    blur, gradient = np.zeros((2, samples, samples), np.float32)
    np.add.at(blur, (rows, rows), 0.5)
    np.add.at(blur, (rows, after), 0.25)
    np.add.at(blur, (rows, before), 0.25)
    np.add.at(gradient, (rows, after), samples / 2)
    np.add.at(gradient, (rows, before), -samples / 2)
    return _Operators(((rows + 0.5) / samples).astype(np.float32), blur, gradient)


def _halve(images: np.ndarray) -> np.ndarray:
    even, odd = images[..., 0::2, :], images[..., 1::2, :]
    return (even[..., 0::2] + even[..., 1::2] + odd[..., 0::2] + odd[..., 1::2]) / 4
