"""A trained image tower at another resolution or patch size: what has to change in its parameters.

    positions:  bilinear between aligned corners, without antialias     (the published models, scipy.ndimage.zoom of order 1)
    patches:    ŵ = (Bᵀ)⁺ w for the resize B of a patch                 (FlexiViT, arXiv:2212.08013, section 3.4)

The trap: the two are resized differently. Positions are points at the corners of a grid; a patch is a small image, so it goes
through the resize that images go through: edges aligned, antialiased.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from siglip.array_types import Float
from siglip.models.two_tower import ModelConfig


def resample(
    params: Mapping[str, Any],
    config: ModelConfig,
    *,
    image_size: tuple[int, int] | None = None,
    patch_size: tuple[int, int] | None = None,
) -> tuple[dict[str, Any], ModelConfig]:
    """The same model for images of another (height, width), cut into patches of another (height, width), in pixels.

    None keeps what the model has. Learned positions change with the grid, the patch kernel with the patch.

    Raises:
        ValueError: the size does not hold one patch.
    """
    old, params = config.image, dict(params)
    new = dataclasses.replace(
        old, image_size=tuple(image_size or old.image_size), patch_size=patch_size or old.patch_size
    )
    image = params["img"] = dict(params["img"])
    if new.patch != old.patch:
        kernel = resample_patches(np.asarray(image["embedding"]["kernel"]), new.patch)
        image["embedding"] = {**image["embedding"], "kernel": kernel}
    if new.posemb == "learn" and new.grid != old.grid:
        image["pos_embedding"] = resample_positions(np.asarray(image["pos_embedding"]), old.grid, new.grid)
    return params, dataclasses.replace(config, image=new)


def resample_positions(
    positions: Float[np.ndarray, "1 n d"], grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[np.ndarray, "1 m d"]:
    """Learned positions for another grid.

    It differs visibly from an image resize, which aligns the edges of pixels instead of the centres of the outermost ones.
    """
    assert positions.shape[1] == grid[0] * grid[1], (positions.shape, grid)
    down, across = (_between_corners(old, new) for old, new in zip(grid, new_grid, strict=True))
    image = np.asarray(positions, np.float64).reshape(*grid, -1)
    out = np.einsum("hi,wj,ijd->hwd", down, across, image, optimize=True)
    return out.reshape(1, -1, positions.shape[-1]).astype(np.float32)


def resample_patches(kernel: Float[np.ndarray, "h w c d"], patch: tuple[int, int]) -> Float[np.ndarray, "i j c d"]:
    """A patch embedding's kernel for patches of another (height, width).

    Larger patches give exactly the old outputs on patches that were enlarged; smaller ones come as close as least squares can.
    """
    down, across = (
        np.linalg.pinv(_between_edges(old, new).T) for old, new in zip(kernel.shape[:2], patch, strict=True)
    )
    out = np.einsum("ih,jw,hwcd->ijcd", down, across, np.asarray(kernel, np.float64), optimize=True)
    return out.astype(np.float32)


def _between_corners(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Row i holds the weights of the old points around the new point i."""
    at = np.linspace(0, old - 1, new)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old)))


def _between_edges(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """An antialiased bilinear resize: the triangle widens with the reduction, and what lies outside does not count."""
    at = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old)) / max(1.0, old / new))
    return weights / weights.sum(axis=1, keepdims=True)
