"""NaFlex: an image in at most N patches, its aspect ratio nearly kept (SigLIP 2, arXiv:2502.14786, section 2.4.2).

    grid(r) = max(1, ceil(h r / p_h)), max(1, ceil(w r / p_w));   r: the largest, to 1e-5, whose grid has at most N patches

The resize is one step from the image's bytes, Pillow's bilinear filter with antialias, to grid * patch pixels. A patch is
(row, column, channel); patches come row by row, and rows of zeros fill up to N.

The trap: the search is part of the format. One in 18,000 images has another grid with exact arithmetic than with this bisection,
which is that of big_vision, transformers and timm, number by number.
"""

import math

import numpy as np

from data_pipelines.errors import UserError

_TOLERANCE, _MAX_RATIO = 1e-5, 100.0


def fit_grid(size_px: tuple[float, float], patch_px: tuple[int, int], max_patches: int) -> tuple[int, int]:
    """Patches (down, across) of an image.

    Args:
      size_px: (h, w) of the image; patch_px: (h, w) of a patch.

    Raises:
      UserError: max_patches is below 1, or the image has no pixel.
    """
    if max_patches < 1:
        raise UserError(f"max_patches={max_patches} must be at least 1")
    if not min(size_px) > 0:
        raise UserError(f"an image of {size_px[0]} x {size_px[1]} px has no pixel for a patch")

    def grid(ratio: float) -> tuple[int, int]:
        (h, w), (patch_h, patch_w) = size_px, patch_px
        return max(1, math.ceil(h * ratio / patch_h)), max(1, math.ceil(w * ratio / patch_w))

    low, high = _TOLERANCE / 10, _MAX_RATIO
    while high - low >= _TOLERANCE:
        ratio = (low + high) / 2
        down, across = grid(ratio)
        low, high = (ratio, high) if down * across <= max_patches else (low, ratio)
    return grid(low)


def fit_size(size_px: tuple[float, float], patch_px: tuple[int, int], max_patches: int) -> tuple[int, int]:
    """(h, w) in pixels of the grid of an image. Args, Raises: as `fit_grid`."""
    down, across = fit_grid(size_px, patch_px, max_patches)
    return down * patch_px[0], across * patch_px[1]


def cut_patches(image: np.ndarray, patch_px: tuple[int, int], length: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [h, w, c], whole patches -> patches [length, p_h p_w c], zeros after the last; and their grid, int32 [2]."""
    (patch_h, patch_w), (h, w, channels) = patch_px, image.shape
    down, across = h // patch_h, w // patch_w
    patches = np.zeros((length, patch_h * patch_w * channels), image.dtype)
    cut = image.reshape(down, patch_h, across, patch_w, channels).swapaxes(1, 2)
    patches[: down * across].reshape(cut.shape)[...] = cut
    return patches, np.array([down, across], np.int32)


def join_patches(patches: np.ndarray, grid: tuple[int, int], patch_px: tuple[int, int]) -> np.ndarray:
    """The inverse of `cut_patches`: [n, p] -> [h, w, 3]."""
    (down, across), (patch_h, patch_w) = grid, patch_px
    cut = patches[: down * across].reshape(down, across, patch_h, patch_w, 3)
    return cut.swapaxes(1, 2).reshape(down * patch_h, across * patch_w, 3)
