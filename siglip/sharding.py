"""One mesh with two axes, `data` and `fsdp`, and who lives where on it.

The batch is sharded over both axes, the parameters over `fsdp` alone (replicated over `data`), by rules of the form
(regex, function). With `fsdp=1` this is plain data parallelism.

The trap: a dimension that does not divide by the axis stays replicated without a word from the compiler, and a model that
was meant to be sharded then needs the memory of a replicated one. A rule that shards nothing is therefore an error.
`jax.make_mesh` makes Explicit axes by default, in which flax Linen's Dense fails: axis types are always given here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from siglip import trees

BATCH_AXES = ("data", "fsdp")
P_BATCH = PartitionSpec(BATCH_AXES)
P_REPLICATED = PartitionSpec()


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices are laid out.

    Attributes:
        data: devices along the data axis; -1 takes all that `fsdp` leaves.
        fsdp: devices that share one copy of the parameters and of the optimizer state.
        fsdp_min_size_bytes: parameters smaller than this stay replicated.
    """

    data: int = -1
    fsdp: int = 1
    fsdp_min_size_bytes: int = 2**20

    def __post_init__(self) -> None:
        if self.data == 0 or self.data < -1:
            raise ValueError(f"mesh.data={self.data} must be a number of devices, or -1 for all that are left")
        if self.fsdp < 1:
            raise ValueError(f"mesh.fsdp={self.fsdp} must be at least 1")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The (data, fsdp) mesh over `devices` (default: all of this job).

    Raises:
        ValueError: if the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    data = len(devices) // config.fsdp if config.data == -1 else config.data
    if data * config.fsdp != len(devices):
        raise ValueError(
            f"mesh data={config.data} x fsdp={config.fsdp} does not cover {len(devices)} devices; "
            f"use data=-1 and an fsdp that divides {len(devices)}"
        )
    return jax.make_mesh(
        (data, config.fsdp), BATCH_AXES, axis_types=(AxisType.Auto, AxisType.Auto), devices=np.asarray(devices)
    )


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError, with the nearest sizes that fit, when the batch does not divide over the devices."""
    devices = mesh.size
    if batch_size < 1 or batch_size % devices:
        lower, upper = batch_size // devices * devices, (batch_size // devices + 1) * devices
        fix = f"use {lower} or {upper}" if lower > 0 else f"use {upper}"
        raise ValueError(f"batch_size={batch_size} does not divide over {devices} devices; {fix}")


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of the global batch (leading axis) -> global arrays sharded over all devices."""
    sharding = NamedSharding(mesh, P_BATCH)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def param_shardings(shapes: Mapping[str, Any], mesh: Mesh, config: MeshConfig) -> dict[str, Any]:
    """A NamedSharding per parameter: the largest dimension that `fsdp` divides, if the parameter is large enough.

    Args:
        shapes: nested dict of arrays or ShapeDtypeStructs.

    Raises:
        ValueError: if fsdp > 1 and no parameter could be sharded.
    """
    shardings = trees.map_with_path(lambda _, leaf: NamedSharding(mesh, _fsdp_spec(leaf, config)), shapes)
    if config.fsdp > 1 and all(s.is_fully_replicated for s in jax.tree.leaves(shardings)):
        raise ValueError(
            f"mesh.fsdp={config.fsdp} shards no parameter: none has at least {config.fsdp_min_size_bytes} bytes and a "
            f"dimension that {config.fsdp} divides; use fsdp=1 or lower mesh.fsdp_min_size_bytes"
        )
    return shardings


def _fsdp_spec(leaf: Any, config: MeshConfig) -> PartitionSpec:
    size_bytes = int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize
    if config.fsdp == 1 or size_bytes < config.fsdp_min_size_bytes:
        return P_REPLICATED
    divisible = [axis for axis, n in enumerate(leaf.shape) if n % config.fsdp == 0]
    if not divisible:
        return P_REPLICATED
    largest = max(divisible, key=lambda axis: leaf.shape[axis])
    return PartitionSpec(*[None] * largest, "fsdp")


def like_params(tree: Any, params: Mapping[str, Any], shardings: Mapping[str, Any], mesh: Mesh) -> Any:
    """Shardings for a tree that holds param-shaped sub-trees (an optimizer state): param-shaped leaves get theirs.

    A leaf belongs to a parameter when its path ends with the parameter's path and the shapes agree; every other leaf
    (counters, factored moments) is replicated.
    """
    flat_shardings = trees.flatten(shardings)
    by_path = {path: (leaf.shape, flat_shardings[path]) for path, leaf in trees.flatten(params).items()}
    replicated = NamedSharding(mesh, P_REPLICATED)

    def choose(path: Any, leaf: Any) -> NamedSharding:
        names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        for start in range(len(names)):
            shape, sharding = by_path.get("/".join(names[start:]), (None, None))
            if sharding is not None and shape == leaf.shape:
                return sharding
        return replicated

    return jax.tree_util.tree_map_with_path(choose, tree)
