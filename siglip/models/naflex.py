"""NaFlex: images of any aspect ratio and length in one batch (SigLIP 2, arXiv:2502.14786; after NaViT, arXiv:2307.06304).

An image is a grid of at most n patches, row by row, padded at the end. The tower has the parameters of the fixed one; its learned
positions are resized to each image's grid (g_y, g_x), bilinear with antialias:

    P[y g_x + x] = sum_ij W(g_y)[y, i] W(g_x)[x, j] E[i, j]
    W(g)[k, i]   = max(0, 1 - |(k + 1/2) s - 1/2 - i| / max(1, s)),  s = rows of E / g,  rows of W normalised to 1

The weights of a patch are its row's times its column's, so one matrix product gives the positions of a whole batch, whatever its
grids: no canvas, and no largest grid.

The trap: what stands at padded positions is not a result. Never pool, average or compare them; `image_tokens` returns a mask.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from siglip.array_types import Array, Bool, Float, Int, UInt8
from siglip.errors import UserError
from siglip.models.variants import check_size


@dataclasses.dataclass(frozen=True)
class NaflexConfig:
    """A tower for images of their own aspect ratio.

    Attributes:
        patches: the most patches of an image where nothing else is said: evaluation, embedding, export.
        max_patches: the longest that the tower was, or is to be, trained at; more are refused.
    """

    patches: int = 256
    max_patches: int = 1024

    def __post_init__(self) -> None:
        check_size("image.naflex.patches", self.patches)
        check_size("image.naflex.max_patches", self.max_patches)
        if self.patches > self.max_patches:
            raise UserError(f"image.naflex.patches={self.patches} must be at most max_patches={self.max_patches}")

    def check_length(self, patches: int, name: str = "max_patches") -> int:
        """The same number. Raises UserError unless images may have so many patches."""
        if not 1 <= patches <= self.max_patches:
            raise UserError(
                f"{name}={patches} must lie in 1 … {self.max_patches}, the longest that this tower takes "
                "(model.image.naflex.max_patches)"
            )
        return patches


class Patches(NamedTuple):
    """A batch of images as patches.

    Attributes:
        patches: (row, column, channel) of one patch side by side; uint8, or float32 in [-1, 1]. What follows an image's last
            patch is not looked at.
        grid: patches (down, across) of each image; their product is at most n.
    """

    patches: Float[Array | np.ndarray, "b n p"] | UInt8[Array | np.ndarray, "b n p"]
    grid: Int[Array | np.ndarray, "b 2"]

    @property
    def lengths(self) -> Int[Array, " b"]:
        """Patches of each image, at least one: a row of zeros, which fills up a batch, is an image of one patch."""
        return jnp.maximum(self.grid, 1).prod(axis=1).astype(jnp.int32)

    def without_padding(self) -> "Patches":
        """The same with zeros after each image's last patch: what two batches may be compared by."""
        mask = np.arange(self.patches.shape[1]) < np.asarray(self.lengths)[:, None]
        return Patches(np.where(mask[..., None], np.asarray(self.patches), 0), np.asarray(self.grid))


# Of a tower's images: all valid; or, from a NaFlex tower, with a mask that is False at padding.
Tokens = Float[Array, "b n d"] | tuple[Float[Array, "b n d"], Bool[Array, "b n"]]
Size = Any  # a number of patches: an int, or a symbolic dimension of an exported program


def mask_of(lengths: Int[Array, " b"], n: Size) -> Bool[Array, "b n"]:
    """True at the first `lengths` of n positions."""
    return jnp.arange(n)[None] < lengths[:, None]


def resize_positions(
    table: Float[Array, "1 m d"], shape: tuple[int, int], grid: Int[Array, "b 2"], n: Size
) -> Float[Array, "b n d"]:
    """The positions of n patches of each image.

    Args:
        table: learned, row by row; shape: its (rows, columns).
        grid: patches (down, across) of each image. Positions after its last patch repeat its last row.
    """
    grid = jnp.maximum(grid, 1)
    down, across = grid[:, :1], grid[:, 1:]
    place = jnp.arange(n)[None]
    y = _weights(jnp.minimum(place // across, down - 1), down, shape[0])
    x = _weights(place % across, across, shape[1])
    weights = (y[..., :, None] * x[..., None, :]).reshape(*y.shape[:2], -1)
    # The products of two patches of one image must not differ by a device's reduced precision: the table is float32.
    return jnp.matmul(weights, table[0], precision=jax.lax.Precision.HIGHEST)


def _weights(k: Int[Array, "b n"], size: Int[Array, "b 1"], old: int) -> Float[Array, "b n old"]:
    """Row k of the resize from `old` to `size` points, for each k."""
    scale = old / size.astype(jnp.float32)
    at = (k + 0.5) * scale - 0.5
    distance = jnp.abs(at[..., None] - jnp.arange(old)[None, None])
    weights = jnp.maximum(0, 1 - distance / jnp.maximum(1, scale)[..., None])
    return weights / weights.sum(axis=-1, keepdims=True)
