"""Whether two thumbnails show the same picture, one of them perhaps cut: align, then compare.

One picture is laid over the other by an axis-aligned affine map, x -> x0 (1 - u) + x1 u and y -> y0 (1 - v) + y1 v, that
Gauss-Newton finds on the grey thumbnails (Lucas and Kanade 1981): at a quarter of the size, at half, in full; what looks
hopeless on the way is given up.
What is left after that is

    error = rms(difference) / rms contrast         the whole picture, in units of what it shows
    spot  = largest |difference| but for 1 %       a place: another face, another number on the same card

both on slightly blurred colours, so that fine lines sampled differently do not count.

The trap: a small drawing on a large white page is like any other such drawing, as far as a thumbnail can tell. The less
of a thumbnail stands out from its surroundings, the more exactly it has to agree.
"""

import functools
from typing import NamedTuple

import numpy as np

_BATCH = 128
_GREY = np.array([0.299, 0.587, 0.114], np.float32)
_MAX_CUT, _MAX_OUTSIDE = 0.18, 0.12  # shares of a side that may be missing on one side, or stick out
_STEP = 0.05
_HOPELESS, _HOPELESS_HALF = 0.6, 0.4  # errors at a quarter and at half of the size that the next does not mend
_SPOT_SHARE = 0.01
_STANDS_OUT, _FULL_SHARE = 24.0, 0.1


class _Operators(NamedTuple):
    """What acts along one axis of n samples. cells: their places in [0, 1]; the rest: [n, n]."""

    cells: np.ndarray
    blur: np.ndarray
    gradient: np.ndarray


def same_picture(
    part: np.ndarray, whole: np.ndarray, cut: np.ndarray, *, max_error: float, max_spot: float
) -> np.ndarray:
    """Which pairs of thumbnails show the same picture.

    Args:
      part, whole: uint8 [n, 64, 64, 3]; `part` may be a cut-out of `whole`, or slightly the other way round.
      cut: float32 [n, 4], guess of the shares of `whole` that are missing at (top, bottom, left, right) of `part`.
      max_error, max_spot: see above.

    Returns:
      bool [n].
    """
    same = np.zeros(len(part), bool)
    for start in range(0, len(part), _BATCH):
        rows = slice(start, start + _BATCH)
        same[rows] = _same_batch(_planes(part[rows]), _planes(whole[rows]), cut[rows], max_error, max_spot)
    return same


def _same_batch(a: np.ndarray, b: np.ndarray, cut: np.ndarray, max_error: float, max_spot: float) -> np.ndarray:
    """Both ways round: either may be the one that was cut. a, b: [n, 3, 64, 64]."""
    found = np.zeros(len(a), bool)
    small, tiny = (_halve(a), _halve(b)), (_halve(_halve(a)), _halve(_halve(b)))
    for fixed, first in ((0, cut), (1, np.zeros_like(cut))):
        left = np.flatnonzero(~found)
        box = first[left]
        for sizes, start, hopeless in ((tiny, _best_start, _HOPELESS), (small, _next_start, _HOPELESS_HALF)):
            if len(left):
                box, error = start(sizes[fixed][left], sizes[1 - fixed][left], box)
                left, box = left[error < hopeless], box[error < hopeless]
        if len(left):
            full = (a, b)[fixed][left], (a, b)[1 - fixed][left]
            box = _align(*full, box, blurs=(2,), steps=4)
            error, spot, share = _compare(*full, box, blur=2)
            found[left] = (error <= max_error * np.minimum(1, 0.25 + share / _FULL_SHARE)) & (spot <= max_spot)
    return found


def _best_start(fixed: np.ndarray, moved: np.ndarray, cut: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Aligned from the guess and from no cut at all: the better box of each pair and its error."""
    boxes, errors = [], []
    for guess in (cut, np.zeros_like(cut)):
        box = np.stack([guess[:, 0], 1 - guess[:, 1], guess[:, 2], 1 - guess[:, 3]], axis=1).astype(np.float32)
        box = _align(fixed, moved, box, blurs=(2, 0), steps=5)
        boxes.append(box)
        errors.append(_compare(fixed, moved, box, blur=0)[0])
    first = (errors[0] <= errors[1])[:, None]
    return np.where(first, *boxes), np.minimum(*errors)


def _next_start(fixed: np.ndarray, moved: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The box refined, and its error."""
    box = _align(fixed, moved, box, blurs=(1,), steps=4)
    return box, _compare(fixed, moved, box, blur=1)[0]


def _compare(
    fixed: np.ndarray, moved: np.ndarray, box: np.ndarray, *, blur: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Error, spot, and the share of `fixed` that stands out from its surroundings. Each [n]."""
    smooth = np.linalg.matrix_power(_operators(fixed.shape[-1]).blur, blur)
    shown = smooth @ fixed @ smooth.T
    difference = smooth @ _warp(moved, box[:, None]) @ smooth.T - shown
    contrast = np.sqrt(shown.var((2, 3)).mean(1))
    error = np.sqrt((difference**2).mean((1, 2, 3))) / (contrast + 2.0)
    places = fixed.shape[-1] ** 2
    worst = np.abs(difference).max(1).reshape(len(fixed), places)
    rank = max(1, int(_SPOT_SHARE * places))
    spot = np.partition(worst, -rank, axis=1)[:, -rank]
    ground = np.median(shown, axis=(2, 3), keepdims=True)
    return error, spot, (np.abs(shown - ground).max(1) > _STANDS_OUT).mean((1, 2))


def _align(fixed: np.ndarray, moved: np.ndarray, box: np.ndarray, *, blurs: tuple[int, ...], steps: int) -> np.ndarray:
    """The box (y0, y1, x0, x1) of `moved` that looks like `fixed`. [n, 3, t, t] x 2, [n, 4] -> float32 [n, 4]."""
    count, samples = len(fixed), fixed.shape[-1]
    operators = _operators(samples)
    fixed, moved = (np.einsum("ncyx,c->nyx", images, _GREY) for images in (fixed, moved))
    low = np.array([-_MAX_OUTSIDE, 1 - _MAX_CUT] * 2, np.float32)
    high = np.array([_MAX_CUT, 1 + _MAX_OUTSIDE] * 2, np.float32)
    v, u = operators.cells[:, None], operators.cells
    for blur in blurs:
        smooth = np.linalg.matrix_power(operators.blur, blur)
        target, source = smooth @ fixed @ smooth.T, smooth @ moved @ smooth.T
        down, across = operators.gradient @ source, source @ operators.gradient.T
        for _ in range(steps):
            off = (_warp(source, box) - target).reshape(count, samples**2, 1)
            dy, dx = _warp(down, box), _warp(across, box)
            slopes = np.stack([dy * (1 - v), dy * v, dx * (1 - u), dx * u], axis=1).reshape(count, 4, samples**2)
            normal = slopes @ slopes.transpose(0, 2, 1)
            damping = 1e-3 * np.trace(normal, axis1=1, axis2=2) + 1.0
            normal += np.eye(4, dtype=np.float32) * damping[:, None, None]
            step = np.linalg.solve(normal, slopes @ off)[..., 0]
            box = np.clip(box - np.clip(step, -_STEP, _STEP), low, high)
    return box


def _warp(images: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Bilinear samples of a box of each image. images: [..., t, t]; box: [..., 4] -> [..., t, t]."""
    down = _sampling(box[..., 0], box[..., 1], images.shape[-1])
    across = _sampling(box[..., 2], box[..., 3], images.shape[-1])
    return down @ images @ np.swapaxes(across, -1, -2)


def _sampling(start: np.ndarray, end: np.ndarray, samples: int) -> np.ndarray:
    """Linear interpolation at `samples` places between two shares of the side. [...] x 2 -> [..., t, t]."""
    cells = _operators(samples).cells
    places = np.clip((start[..., None] + (end - start)[..., None] * cells) * samples - 0.5, 0, samples - 1)
    return np.maximum(0, 1 - np.abs(places[..., None] - np.arange(samples, dtype=np.float32)))


@functools.cache
def _operators(samples: int) -> _Operators:
    """blur: [1 2 1] / 4; gradient: central differences per side length; edges repeated in both."""
    rows = np.arange(samples)
    after, before = np.minimum(rows + 1, samples - 1), np.maximum(rows - 1, 0)
    blur, gradient = np.zeros((2, samples, samples), np.float32)
    np.add.at(blur, (rows, rows), 0.5)
    np.add.at(blur, (rows, after), 0.25)
    np.add.at(blur, (rows, before), 0.25)
    np.add.at(gradient, (rows, after), samples / 2)
    np.add.at(gradient, (rows, before), -samples / 2)
    return _Operators(((rows + 0.5) / samples).astype(np.float32), blur, gradient)


def _planes(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2).astype(np.float32)


def _halve(images: np.ndarray) -> np.ndarray:
    even, odd = images[..., 0::2, :], images[..., 1::2, :]
    return (even[..., 0::2] + even[..., 1::2] + odd[..., 0::2] + odd[..., 1::2]) / 4
