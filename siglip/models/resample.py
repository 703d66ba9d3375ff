"""A trained image tower at another resolution or patch size: what changes in its parameters.

    positions:  bilinear between aligned corners, without antialias     (the published models, scipy.ndimage.zoom of order 1)
                of NaFlex as an image is resized, antialiased           (SigLIP 2, arXiv:2502.14786: siglip/models/naflex.py)
    patches:    ŵ = (Bᵀ)⁺ w for the resize B of a patch                 (FlexiViT, arXiv:2212.08013, section 3.4)

The trap: the two are resized differently. Positions are points at the corners of a grid. A patch is a small image, so it goes
through the resize that images go through: edges aligned, antialiased.
"""

import dataclasses
from collections.abc import Callable, Mapping
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
    """The same model for images of another (height, width) and patches of another (height, width), in pixels.

    None keeps the model's own. Learned positions change with the grid, the patch kernel with the patch. A NaFlex model becomes
    one for images of `image_size` alone, with the positions that it gives to such images; another patch size leaves it NaFlex.

    Raises:
        UserError: the image is smaller than one patch.
    """
    old, params = config.image, dict(params)
    size = tuple(image_size or old.image_size)
    if old.naflex is not None and image_size is None and patch_size is not None:
        size = tuple(n * side for n, side in zip(old.grid, patch_size, strict=True))
    naflex = None if image_size else old.naflex
    new = dataclasses.replace(old, image_size=size, patch_size=patch_size or old.patch_size, naflex=naflex)
    image = params["img"] = dict(params["img"])
    if new.patch != old.patch:
        kernel = resample_patches(np.asarray(image["embedding"]["kernel"]), new.patch)
        image["embedding"] = {**image["embedding"], "kernel": kernel}
    if new.posemb == "learn" and new.grid != old.grid:
        between = _between_corners if old.naflex is None else _between_edges
        image["pos_embedding"] = resample_positions(np.asarray(image["pos_embedding"]), old.grid, new.grid, between)
    return params, dataclasses.replace(config, image=new)


def _between_corners(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Row i holds the weights of the old points next to new point i."""
    at = np.linspace(0, old - 1, new)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old)))


def resample_positions(
    positions: Float[np.ndarray, "1 n d"],
    grid: tuple[int, int],
    new_grid: tuple[int, int],
    between: Callable[[int, int], Float[np.ndarray, "new old"]] = _between_corners,
) -> Float[np.ndarray, "1 m d"]:
    """Learned positions for another grid; `between` gives the weights along an axis.

    Between corners differs visibly from an image resize, which aligns the edges of pixels and not the outermost centres.
    """
    assert positions.shape[1] == grid[0] * grid[1], (positions.shape, grid)
    down, across = (between(old, new) for old, new in zip(grid, new_grid, strict=True))
    image = np.asarray(positions, np.float64).reshape(*grid, -1)
    out = np.einsum("hi,wj,ijd->hwd", down, across, image, optimize=True)
    return out.reshape(1, -1, positions.shape[-1]).astype(np.float32)


def resample_patches(kernel: Float[np.ndarray, "h w c d"], patch: tuple[int, int]) -> Float[np.ndarray, "i j c d"]:
    """A patch embedding's kernel for patches of another (height, width).

    A larger kernel gives exactly the old outputs on enlarged patches; a smaller one is the least-squares approximation.
    """
    down, across = (
        np.linalg.pinv(_between_edges(old, new).T) for old, new in zip(kernel.shape[:2], patch, strict=True)
    )
    out = np.einsum("ih,jw,hwcd->ijcd", down, across, np.asarray(kernel, np.float64), optimize=True)
    return out.astype(np.float32)


def _between_edges(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """An antialiased bilinear resize: the triangle widens with the reduction; samples outside do not count."""
    at = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old)) / max(1.0, old / new))
    return weights / weights.sum(axis=1, keepdims=True)
