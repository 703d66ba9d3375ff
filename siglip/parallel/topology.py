"""Where devices sit, and the paths that collectives take over them: a ring of neighbours, and the axes of the torus.

TPU chips sit on a grid (`device.coords`). A `ppermute` is asynchronous and uses one link per device only if its partners are
neighbours. An all-gather along one axis of the grid at a time is a real all-gather; over all chips at once it may not be.
Both are choices of the collective and not of the mesh, which may list its devices in any order.

The trap: only whole slices of the largest size close their axes to a torus. The ring here uses no such link: it comes back
along a row of its own.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# An object with `coords` and perhaps `core_on_chip` (TPU), or without (CPU, GPU).
Device = Any


class Ring(NamedTuple):
    """A closed walk over devices. order: their indices; one_hop: whether every step goes to a neighbour on the grid."""

    order: tuple[int, ...]
    one_hop: bool


def ring(devices: Sequence[Device]) -> Ring:
    """A closed walk over all devices; in the given order if they have no coordinates or do not fill a box."""
    grid = _grid(devices)
    if grid is None:
        return Ring(tuple(range(len(devices))), one_hop=False)
    grid = np.squeeze(grid)
    if grid.ndim < 2:
        return Ring(tuple(grid.ravel().tolist()), one_hop=grid.size <= 2)
    # All axes but the first are walked back and forth and become one axis, so that the grid is a plane.
    plane = _unrolled(grid)
    if plane.shape[1] % 2:
        plane = plane.T
    if plane.shape[1] % 2:  # an odd number of devices has no closed walk of single hops
        return Ring(_back_and_forth(plane), one_hop=False)
    # The first row is the way back. The columns of the others, an even number of them, are walked back and forth.
    out = _back_and_forth(plane[1:].T)
    return Ring((*plane[:1, 0].tolist(), *out, *plane[0, :0:-1].tolist()), one_hop=True)


def axis_groups(devices: Sequence[Device]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """One grouping of all devices (by index) per axis of their grid; gathering along one axis after the other gathers all.

    Without coordinates there is one axis with every device.
    """
    grid = _grid(devices)
    if grid is None:
        return ((tuple(range(len(devices))),),)
    axes = [axis for axis, n in enumerate(grid.shape) if n > 1]
    return tuple(
        tuple(tuple(line) for line in np.moveaxis(grid, axis, -1).reshape(-1, grid.shape[axis]).tolist())
        for axis in axes
    ) or (((0,),),)


def _grid(devices: Sequence[Device]) -> np.ndarray | None:
    """The devices' indices laid out by their coordinates (x, y, z, core), or None if they do not fill a box."""
    if not all(hasattr(device, "coords") for device in devices):
        return None
    slices = {getattr(device, "slice_index", 0) for device in devices}
    coords = np.array([(*device.coords, getattr(device, "core_on_chip", 0)) for device in devices])
    coords -= coords.min(axis=0)
    shape = coords.max(axis=0) + 1
    if len(slices) > 1 or np.prod(shape) != len(devices) or len(np.unique(coords, axis=0)) != len(devices):
        return None
    grid = np.empty(shape, int)
    grid[tuple(coords.T)] = np.arange(len(devices))
    return grid


def _unrolled(grid: np.ndarray) -> np.ndarray:
    """[a, b, c, …] -> [a, b·c·…], the columns ordered so that neighbours are one hop apart."""
    while grid.ndim > 2:
        turned = grid.copy()
        turned[:, 1::2] = turned[:, 1::2, ::-1]
        grid = turned.reshape(grid.shape[0], -1, *grid.shape[3:])
    return grid


def _back_and_forth(plane: np.ndarray) -> tuple[int, ...]:
    """The rows of a plane one after the other, every other row backwards."""
    return tuple(_unrolled(plane[np.newaxis])[0].tolist())
