"""One mesh with two axes, `data` and `fsdp`, and who lives where on it.

The batch is sharded over both axes, the parameters over `fsdp` alone (replicated over `data`), by rules of the form
(regex, what to do), first match wins. With `fsdp=1` this is plain data parallelism. The optimizer's moments and the running
average follow the parameters. A `ParamLayout` tells the towers: it gathers one block's weights where the block runs and
scatters their gradients back at once, so that no device ever holds the whole of a tower.

The traps: a dimension that does not divide by the axis silently stays replicated, and a model that
was meant to be sharded then needs the memory of a replicated one: here that is an error. Left alone, the compiler does not
gather weights at all but moves the activations, many times their size. `jax.make_mesh` makes Explicit axes by default, in
which flax Linen's Dense fails: axis types are always given here.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from siglip import trees
from siglip.errors import UserError

BATCH_AXES = ("data", "fsdp")
_AXIS_TYPES = (AxisType.Auto, AxisType.Auto)
P_BATCH = PartitionSpec(BATCH_AXES)
P_REPLICATED = PartitionSpec()

# A token looks up one row: sharded by columns, a table is never gathered, only the few rows that were looked up move.
EMBEDDING_TABLE = "(.*/)?Embed_0/embedding"
_DEFAULT_RULES = ((EMBEDDING_TABLE, "fsdp:1"), (".*", "fsdp"))
_ACTION = re.compile(r"replicate|fsdp(?::(-?\d+))?")
# A block is a sub-tree called encoderblock, decoderblock, … when it is a stack, whose axis 0 is the layer, and encoderblock_0,
# encoderblock_1, … when it is one layer. Sharding the leading axis of a stack would move whole layers.
_STACKED = re.compile(r"(?:.*/)?[a-z]*block/.*")
_IN_BLOCK = re.compile(r"(?:.*/)?[a-z]*block(?:_\d+)?/.*")
_COLUMNS = PartitionSpec(None, "fsdp")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices are laid out.

    Attributes:
        data: devices along the data axis; -1 takes all that `fsdp` leaves.
        fsdp: devices that share one copy of the parameters and of the optimizer state.
        fsdp_min_size_bytes: parameters smaller than this stay replicated.
        rules: (pattern, action) pairs, first match wins, every parameter needs one. "fsdp" shards the largest dimension that
            the axis divides, "fsdp:DIM" that dimension (negative counts from the end; of scanned blocks, 0 is the layer and
            cannot be sharded), "replicate" none.
    """

    data: int = -1
    fsdp: int = 1
    fsdp_min_size_bytes: int = 2**20
    rules: tuple[tuple[str, str], ...] = _DEFAULT_RULES

    def __post_init__(self) -> None:
        if self.data == 0 or self.data < -1:
            raise UserError(f"mesh.data={self.data} must be a number of devices, or -1 for all that are left")
        if self.fsdp < 1:
            raise UserError(f"mesh.fsdp={self.fsdp} must be at least 1")
        for pattern, action in self.rules:
            if not _ACTION.fullmatch(action):
                raise UserError(
                    f"mesh.rules: {action!r} of pattern {pattern!r} is none of 'fsdp', 'fsdp:DIM' and 'replicate'"
                    f"{trees.did_you_mean(action, ('fsdp', 'replicate'))}"
                )


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The (data, fsdp) mesh over `devices` (default: all of this job).

    Raises:
        UserError: if the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = make_abstract_mesh(config, len(devices)).axis_sizes
    return jax.make_mesh(shape, BATCH_AXES, axis_types=_AXIS_TYPES, devices=np.asarray(devices))


def make_abstract_mesh(config: MeshConfig, devices: int) -> AbstractMesh:
    """The same mesh over so many devices that are not there; shapes can be laid out on it.

    Raises:
        UserError: if the axes do not multiply to the number of devices.
    """
    data = devices // config.fsdp if config.data == -1 else config.data
    if data * config.fsdp != devices:
        raise UserError(
            f"mesh data={config.data} x fsdp={config.fsdp} does not cover {devices} devices; "
            f"use data=-1 and an fsdp that divides {devices}"
        )
    return AbstractMesh((data, config.fsdp), BATCH_AXES, axis_types=_AXIS_TYPES)


def check_batch_size(batch_size: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError, with the nearest sizes that fit, when the batch does not divide over the devices."""
    devices = mesh.size
    if batch_size < 1 or batch_size % devices:
        lower, upper = batch_size // devices * devices, (batch_size // devices + 1) * devices
        fix = f"use {lower} or {upper}" if lower > 0 else f"use {upper}"
        raise UserError(f"batch_size={batch_size} does not divide over {devices} devices; {fix}")


def check_micro_batch_size(micro_batch_size: int, batch_size: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError, with the nearest sizes that fit, unless micro-batches fill the batch and the devices exactly."""
    fitting = [n for n in range(mesh.size, batch_size + 1, mesh.size) if batch_size % n == 0]
    if micro_batch_size not in fitting:
        lower = [n for n in fitting if n < micro_batch_size][-1:]
        upper = [n for n in fitting if n > micro_batch_size][:1]
        raise UserError(
            f"loss.micro_batch_size={micro_batch_size} must divide batch_size={batch_size} and itself divide over "
            f"{mesh.size} devices; use {' or '.join(map(str, lower + upper))}"
        )


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of the global batch (leading axis) -> global arrays sharded over all devices."""
    sharding = NamedSharding(mesh, P_BATCH)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def param_shardings(shapes: Mapping[str, Any], mesh: Mesh | AbstractMesh, config: MeshConfig) -> dict[str, Any]:
    """A NamedSharding per parameter, as `config.rules` say.

    Args:
        shapes: nested dict of arrays or ShapeDtypeStructs.

    Raises:
        UserError: if a pattern matches nothing, a parameter has no rule, a rule cannot shard a large parameter it applies
            to, or fsdp > 1 and no parameter is large enough to be sharded.
    """
    flat = trees.flatten(shapes)
    patterns = [pattern for pattern, _ in config.rules]
    matches = trees.first_matches(patterns, flat, what="mesh.rules", optional=[p for p, _ in _DEFAULT_RULES])
    actions = {path: None if rule is None else config.rules[rule][1] for path, rule in matches.items()}
    missing = [path for path, action in actions.items() if action is None]
    if missing:
        raise UserError(
            f"mesh.rules have none for {missing[0]!r}{_and_more(missing)}; end them with ('.*', 'fsdp') or ('.*', 'replicate')"
        )

    def specs_over(fsdp: int) -> dict[str, PartitionSpec | None]:
        return {path: _fsdp_spec(path, leaf, actions[path], fsdp, config) for path, leaf in flat.items()}

    specs = specs_over(config.fsdp)
    failed = [path for path, spec in specs.items() if spec is None]
    if failed:
        path, smaller = failed[0], range(config.fsdp - 1, 0, -1)
        fits = next(n for n in smaller if mesh.size % n == 0 and None not in specs_over(n).values())
        dimension = "no dimension" if actions[path] == "fsdp" else f"not the dimension of {actions[path]!r}"
        raise UserError(
            f"mesh.fsdp={config.fsdp} divides {dimension} of {path} {tuple(flat[path].shape)}{_and_more(failed)}; "
            f"use mesh.fsdp={fits}, or put ({path!r}, 'replicate') first in mesh.rules"
        )
    meant = [path for path, action in actions.items() if action != "replicate"]
    if config.fsdp > 1 and all(specs[path] == P_REPLICATED for path in meant):
        raise UserError(
            f"mesh.fsdp={config.fsdp} shards no parameter: "
            + (f"none has {config.fsdp_min_size_bytes} bytes; " if meant else "mesh.rules replicate them all; ")
            + "use mesh.fsdp=1 or lower mesh.fsdp_min_size_bytes"
        )
    return trees.unflatten({path: NamedSharding(mesh, spec) for path, spec in specs.items()})


def _fsdp_spec(path: str, leaf: Any, action: str, fsdp: int, config: MeshConfig) -> PartitionSpec | None:
    """Where a parameter is split by `fsdp` devices; None if it ought to be and cannot."""
    size_bytes = int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize
    if action == "replicate" or fsdp == 1 or size_bytes < config.fsdp_min_size_bytes:
        return P_REPLICATED
    first = 1 if _STACKED.fullmatch(path) else 0
    divisible = [axis for axis in range(first, len(leaf.shape)) if leaf.shape[axis] % fsdp == 0]
    wanted = _ACTION.fullmatch(action)[1]
    if wanted is not None:
        axis = int(wanted) + len(leaf.shape) * (int(wanted) < 0)
        divisible = [axis] if axis in divisible else []
    if not divisible:
        return None
    return PartitionSpec(*[None] * max(divisible, key=lambda axis: leaf.shape[axis]), "fsdp")


def _and_more(paths: Sequence[str]) -> str:
    return f" and {len(paths) - 1} more" if len(paths) > 1 else ""


def like_params(tree: Any, params: Mapping[str, Any], shardings: Mapping[str, Any], mesh: Mesh | AbstractMesh) -> Any:
    """Shardings for a tree that holds param-shaped sub-trees (an optimizer state): param-shaped leaves get theirs.

    A leaf belongs to a parameter when its path ends with the parameter's path. A leaf of the parameter's shape is sharded
    alike; one that lacks a dimension (Adafactor's factored moments) is sharded over what is left of it; every other leaf
    (counters) is replicated.
    """
    flat_shardings = trees.flatten(shardings)
    by_path = {path: (leaf.shape, flat_shardings[path].spec) for path, leaf in trees.flatten(params).items()}

    def choose(path: Any, leaf: Any) -> NamedSharding:
        names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        suffixes = ("/".join(names[start:]) for start in range(len(names)))
        shape, spec = next((by_path[suffix] for suffix in suffixes if suffix in by_path), (leaf.shape, P_REPLICATED))
        return NamedSharding(mesh, spec if shape == leaf.shape else _without_one_dimension(spec, shape, leaf.shape))

    return jax.tree_util.tree_map_with_path(choose, tree)


def _without_one_dimension(spec: PartitionSpec, shape: Sequence[int], reduced: Sequence[int]) -> PartitionSpec:
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    for gone in range(len(shape)):
        left = entries[:gone] + entries[gone + 1 :]
        if tuple(reduced) == (*shape[:gone], *shape[gone + 1 :]) and "fsdp" in left:
            return PartitionSpec(*left[: left.index("fsdp") + 1])
    return P_REPLICATED


@dataclasses.dataclass(frozen=True)
class ParamLayout:
    """What the modules of a model need to know of the mesh they run on. Hashable, as module attributes are.

    Attributes:
        specs: (path, PartitionSpec) of the parameters that are sharded; none without FSDP.
    """

    mesh: Mesh
    specs: tuple[tuple[str, PartitionSpec], ...] = ()

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> "ParamLayout":
        """The layout of parameters (arrays or ShapeDtypeStructs) that carry a NamedSharding."""
        shardings = {path: leaf.sharding for path, leaf in trees.flatten(params).items()}
        specs = tuple((path, each.spec) for path, each in shardings.items() if each.spec != P_REPLICATED)
        return cls(next(iter(shardings.values())).mesh, specs)

    @property
    def platform(self) -> str:
        """Of the devices: "cpu", "gpu" or "tpu", also where they only describe a topology."""
        return self.mesh.devices.flat[0].platform

    def within(self, name: str) -> "ParamLayout":
        """The layout of the sub-tree `name`, for a module whose parameters it is."""
        prefix = f"{name}/"
        specs = ((path.removeprefix(prefix), spec) for path, spec in self.specs if path.startswith(prefix))
        return dataclasses.replace(self, specs=tuple(specs))

    def shards(self, pattern: str) -> bool:
        """Whether some parameter whose whole path matches is sharded."""
        return any(re.fullmatch(pattern, path) for path, _ in self.specs)

    def batch(self, x: jax.Array) -> jax.Array:
        """`x` with its leading axis split over all devices, which the compiler must not trade for another split."""
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P_BATCH)) if self.mesh.size > 1 else x

    def in_order(self, x: jax.Array) -> jax.Array:
        """`x` [b, n, d] laid out in memory in that order, which the compiler must not trade for another."""

        def pin(x: jax.Array) -> jax.Array:
            return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

        if self.mesh.size == 1:
            return pin(x)
        # The partitioner does not know that this can be split, and would gather x for it.
        return jax.shard_map(pin, mesh=self.mesh, in_specs=P_BATCH, out_specs=P_BATCH, check_vma=False)(x)

    def like_params(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """A param-shaped tree (gradients), sharded as the parameters are."""
        specs = dict(self.specs)
        where = {path: NamedSharding(self.mesh, specs.get(path, P_REPLICATED)) for path in trees.flatten(tree)}
        return jax.lax.with_sharding_constraint(tree, trees.unflatten(where))

    def gather_outside_blocks(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """`params` with everything whole but blocks, which use `gather_block`, and tables, which use `look_up`."""
        specs = dict(self.specs)

        def gather_leaf(path: str, leaf: jax.Array) -> jax.Array:
            if path not in specs or _IN_BLOCK.fullmatch(path) or self._is_columns(path):
                return leaf
            return _gather(leaf, NamedSharding(self.mesh, specs[path]))

        return trees.map_with_path(gather_leaf, params)

    def look_up(self, path: str, rows: Callable[[jax.Array], jax.Array], ids: jax.Array) -> jax.Array:
        """`rows(ids)` [b, l, d] of the table at `path`, split by b. Devices look up their columns of the ids of their whole
        `fsdp` group and exchange what they found."""
        if not self._is_columns(path):
            return self.batch(rows(ids))
        ids = jax.lax.with_sharding_constraint(ids, NamedSharding(self.mesh, PartitionSpec("data")))
        split = NamedSharding(self.mesh, PartitionSpec("data", None, "fsdp"))
        return self.batch(jax.lax.with_sharding_constraint(rows(ids), split))

    def _is_columns(self, path: str) -> bool:
        return bool(re.fullmatch(EMBEDDING_TABLE, path)) and dict(self.specs).get(path) == _COLUMNS

    def gather_block(self, params: Mapping[str, Any], *, prefix: str, dtype: Any) -> dict[str, Any]:
        """One block's parameters, whole on every device; their gradients are scattered as soon as they exist.

        Args:
            prefix: the block's path, ending in "/"; the parameters of a block of a stack have lost their layer axis.
            dtype: of the block's matrix products: kernels are cast to it before they travel.
        """
        assert _IN_BLOCK.fullmatch(prefix), f"{prefix} is not named as a block, so it was gathered with the rest"
        specs = dict(self.specs)

        def gather_leaf(path: str, leaf: jax.Array) -> jax.Array:
            spec = specs.get(prefix + path)
            if spec is None:
                return leaf
            leaf = leaf.astype(dtype) if path.endswith("kernel") else leaf
            where = NamedSharding(self.mesh, PartitionSpec(*spec[1:]) if _STACKED.fullmatch(prefix) else spec)
            return _gather(leaf, where)

        return trees.map_with_path(gather_leaf, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(shard: jax.Array, sharding: NamedSharding) -> jax.Array:
    # Both ends are pinned: with the output alone, the compiler may gather earlier, above the slice out of the stack.
    shard = jax.lax.with_sharding_constraint(shard, sharding)
    return jax.lax.with_sharding_constraint(shard, NamedSharding(sharding.mesh, P_REPLICATED))


def _gather_fwd(shard: jax.Array, sharding: NamedSharding) -> tuple[jax.Array, None]:
    return _gather(shard, sharding), None


def _gather_bwd(sharding: NamedSharding, _: None, grad: jax.Array) -> tuple[jax.Array]:
    # The transpose of a constraint is the same constraint, which would sum the whole gradient on every device.
    return (jax.lax.with_sharding_constraint(grad, sharding),)


_gather.defvjp(_gather_fwd, _gather_bwd)
