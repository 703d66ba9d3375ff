"""What a run needs and how long it takes, by arithmetic: memory per device, FLOPs, traffic, time, decoding.

    total = parameters + optimizer + gradients + activations + gathered weights + loss + two batches
    step  = max(FLOPs / (devices * peak * MFU), bytes that travel / links)

State, gradients and batches are exact: the run's own shapes and shardings are laid out on a mesh of no devices. Activations are a
fit to compiled programs (docs/scaling.md has them side by side): what blocks keep for the backward pass, and the working set
of one block of the image tower. MFU is a stated range, not a prediction.

The trap: the range is for a step that computes nothing twice. What `remat` and micro-batches compute again is added to the time.
"""

import collections
import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from siglip import trees
from siglip.losses import tile_shape
from siglip.models.attention import choose_kernel
from siglip.models.layers import Remat
from siglip.models.two_tower import ImageConfig, TextConfig
from siglip.parallel import sharding
from siglip.planning.accelerators import Topology
from siglip.training import flops, optim
from siglip.training.config import TrainConfig
from siglip.training.lengths import length_shares, micro_batch_sizes
from siglip.training.objective import all_param_shapes
from siglip.training.step import TrainState, lay_out_state, state_shapes

REMATS = typing.get_args(Remat)
# Model FLOPs utilization, (low, expected, high), by the image tower's width: docs/scaling.md says where it comes from.
_NARROW, MFU, MFU_NARROW = 1024, (0.35, 0.45, 0.55), (0.25, 0.35, 0.45)
# What the loss takes where its tile and the travelling texts stay in the chip's own memory (docs/scaling.md), up to that size.
_VMEM_BYTES, _LOSS_IN_VMEM_BYTES = {"v5e": 2**26, "v6e": 2**26}, 2**19
# JPEGs of 640 x 480 px and 58 KB, decoded, resized and tokenized at 500 a second and core: docs/data.md.
_PAIRS_PER_CORE_S, _JPEG_BYTES, _JPEG_PIXELS = 500, 58_000, 640 * 480


class _Kept(NamedTuple):
    """Bytes of activations. Kept by every block for the backward pass, for a token: `width` for each number of its width, `mlp`
    for each of its MLP's, `logits` for each head and token attended to. `working`: the same of the one block that is
    being differentiated, on top."""

    width: dict[str, float]
    mlp: dict[str, float]
    logits: dict[str, float]
    working: tuple[float, float, float]


# Fitted to compiled steps; `python benchmarks/plan_table.py --compile` shows how far off they are.
_KEPT = {
    "tpu": _Kept(
        width={"none": 38, "dots+gelu": 14, "dots": 14, "full": 4},
        mlp={"none": 8, "dots+gelu": 4, "dots": 2, "full": 0},
        logits={"none": 6, "dots+gelu": 0, "dots": 0, "full": 0},
        working=(35, 14, 10),
    ),
    "gpu": _Kept(
        width={"none": 21, "dots+gelu": 11, "dots": 11, "full": 4},
        mlp={"none": 4, "dots+gelu": 4, "dots": 2, "full": 0},
        logits={"none": 6, "dots+gelu": 0, "dots": 0, "full": 0},
        working=(40, 8, 8),
    ),
}


class Shapes(NamedTuple):
    """What is traced once for a config, whatever its mesh: the state's shapes, and which parameters are frozen."""

    state: TrainState
    frozen: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A plan of a run on a topology. Bytes are per device; times in seconds.

    Attributes:
        parameters: numbers of them, by tower and head.
        bytes_per_device: by what they are for; "total" is their sum, "usable" what the device has.
        activations_by_remat: bytes if both towers had that policy.
        collective_bytes: by kind and step, the larger side of each, as siglip/planning/compile.py counts.
        mfu: (low, expected, high); step_range_s, hours_range: at high, and at low.
        step_s: at the expected MFU, no shorter than what travels takes.
    """

    topology: Topology
    mesh: tuple[int, int]
    parameters: dict[str, int]
    bytes_per_device: dict[str, int]
    activations_by_remat: dict[str, int]
    flops_per_pair: float
    flops_per_step: float
    collective_bytes: dict[str, int]
    collective_s: float
    mfu: tuple[float, float, float]
    recomputed: float
    step_s: float
    step_range_s: tuple[float, float]
    run_s: float
    device_hours: float
    pairs_per_s: float
    decoding_cores: float
    storage_bytes_per_s: float

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        return self.bytes_per_device["total"] <= self.bytes_per_device["usable"]


def shapes_of(config: TrainConfig) -> Shapes:
    """Traces the model; takes a second or two, the rest of a plan milliseconds.

    Raises:
        UserError: the optimizer's settings do not fit the model.
    """
    params = all_param_shapes(config.model, config.terms)
    optimizer = optim.make_optimizer(config.optim, params, total_steps=config.total_steps)
    return Shapes(state_shapes(params, optimizer, ema=config.optim.ema > 0), optim.frozen_mask(config.optim, params))


def estimate(config: TrainConfig, topology: Topology, shapes: Shapes | None = None) -> Estimate:
    """The plan of a config whose model is known (siglip.training.config.resolve).

    Args:
        shapes: of the same model, optimizer and terms, if they are known already.

    Raises:
        UserError: the config does not fit the devices: its mesh, its batch, or a weight that cannot be sharded.
    """
    shapes = shapes or shapes_of(config)
    return estimate_laid_out(config, topology, shapes, lay_out(config, topology, shapes))


def lay_out(config: TrainConfig, topology: Topology, shapes: Shapes) -> TrainState:
    """The state on the config's mesh; raises UserError if the mesh does not cover the devices or cannot shard a weight."""
    mesh = sharding.make_abstract_mesh(config.mesh, topology.devices)
    return lay_out_state(shapes.state, mesh, config.mesh)


def estimate_laid_out(config: TrainConfig, topology: Topology, shapes: Shapes, state: TrainState) -> Estimate:
    """`estimate` of a state that is laid out already, as many configs that differ in other things have it."""
    mesh = state.step.sharding.mesh
    sharding.check_batch_size(config.batch_size, mesh)
    if config.loss.micro_batch_size is not None:
        sharding.check_micro_batch_size(config.loss.micro_batch_size, config.batch_size, mesh)
    stored = config.data.image_embeddings is not None
    passes = flops.tower_passes(shapes.frozen, stored=stored)
    memory = _memory(config, topology, state, shapes.frozen, passes)
    options = {"batch_size": config.batch_size, "shares": length_shares(config)}
    per_pair = flops.train_flops_per_pair(config.model, passes=passes, **options)
    moved, turns = collections.Counter(), _micro_batches(config, topology.devices)
    for patches, share in _shares(config).items():
        one = _collectives(config, state, shapes.frozen, passes, mesh.axis_sizes, turns[patches])
        moved.update({kind: share * size for kind, size in one.items()})
    mfu = MFU if config.model.image.spec.width >= _NARROW else MFU_NARROW
    again = _executed_flops(config, passes, topology.devices) / per_pair
    rate = topology.devices * topology.accelerator.peak_flops
    compute_s = [per_pair * config.batch_size * again / (rate * share) for share in mfu]
    collective_s = _seconds(moved, mesh.size, topology)
    slow, step_s, fast = (max(seconds, collective_s) for seconds in compute_s)
    pairs_per_s, cores, stored_bytes = _input(config, step_s)
    return Estimate(
        topology=topology,
        mesh=mesh.axis_sizes,
        parameters=_count(state.params),
        bytes_per_device=memory,
        activations_by_remat={remat: _activations(_with_remat(config, remat), topology, passes) for remat in REMATS},
        flops_per_pair=per_pair,
        flops_per_step=per_pair * config.batch_size,
        collective_bytes={kind: int(size) for kind, size in moved.items()},
        collective_s=collective_s,
        mfu=mfu,
        recomputed=again,
        step_s=step_s,
        step_range_s=(fast, slow),
        run_s=step_s * config.total_steps,
        device_hours=step_s * config.total_steps * topology.devices / 3600,
        pairs_per_s=pairs_per_s,
        decoding_cores=cores,
        storage_bytes_per_s=stored_bytes,
    )


def _count(params: Mapping[str, Any]) -> dict[str, int]:
    """Numbers of parameters by tower, its pooling and its head: {"img": …, "img/MAPHead_0": …, "txt": …, …, "total": …}."""
    flat = {path: math.prod(leaf.shape) for path, leaf in trees.flatten(params).items()}
    parts = ["img", "img/MAPHead_0", "img/head", "txt", "txt/Embed_0", "txt/MAPHead_0", "txt/head"]
    parts += [name for name in params if name not in ("img", "txt", "t", "b")]
    counts = {part: sum(n for path, n in flat.items() if path.startswith(f"{part}/")) for part in parts}
    return {part: n for part, n in counts.items() if n} | {"total": sum(flat.values())}


def _memory(
    config: TrainConfig, topology: Topology, state: TrainState, frozen: Mapping[str, Any], passes: flops.Passes
) -> dict[str, int]:
    leaves = zip(jax.tree.leaves(state.params), jax.tree.leaves(frozen), strict=True)
    trained = [leaf for leaf, is_frozen in leaves if not is_frozen]
    sizes = {
        "parameters": _shard_bytes(state.params),
        "optimizer": _shard_bytes(state.opt_state) + _shard_bytes(state.ema),
        "gradients": _shard_bytes(trained),
        "activations": _activations(config, topology, passes),
        "gathered": _gathered_bytes(config, state, passes),
        "loss": _loss_bytes(config, topology),
        "batch": 2 * _batch_bytes(config) // topology.devices,
    }
    return sizes | {"total": sum(sizes.values()), "usable": topology.accelerator.usable_bytes}


def _shard_bytes(tree: Any) -> int:
    """Of what one device holds."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _micro_batches(config: TrainConfig, devices: int) -> dict[int, int]:
    """Micro-batches of a step, by the length of its images, which is 0 for images of one size."""
    sizes = micro_batch_sizes(config, devices=devices) or {0: config.loss.micro_batch_size}
    return {patches: config.batch_size // (size or config.batch_size) for patches, size in sizes.items()}


def _shares(config: TrainConfig) -> dict[int, float]:
    """The share of the steps with images of each length, which is 0 for images of one size."""
    return length_shares(config) or {0: 1.0}


def _towers(config: TrainConfig, passes: flops.Passes, patches: int) -> list[tuple[ImageConfig | TextConfig, int, int]]:
    """(config, tokens, passes) of the image tower, for images of that length, and of the text tower."""
    image, text = config.model.image, config.model.text
    tokens = patches + (image.pool == "tok") if patches else image.train_tokens
    return [(image, tokens, passes[0]), (text, text.length, passes[1])]


def _activations(config: TrainConfig, topology: Topology, passes: flops.Passes) -> int:
    """Of the length that needs most: a short one may keep logits that a longer one's fused attention does not."""
    turns = _micro_batches(config, topology.devices)
    return max(_activations_of(config, topology, passes, patches, turns[patches]) for patches in turns)


def _activations_of(config: TrainConfig, topology: Topology, passes: flops.Passes, patches: int, turns: int) -> int:
    kept, pairs = _KEPT[_platform(topology)], config.batch_size // turns / topology.devices
    total, working = 0.0, 0.0
    for tower, tokens, times in _towers(config, passes, patches):
        spec = tower.spec
        logits = spec.num_heads * tokens if _kernel(tower, tokens, topology) == "xla" else 0
        low = 1 if tower.dtype == "bfloat16" else 2
        if times == 3:
            mlp, attended = kept.mlp[tower.remat] * spec.mlp_dim, kept.logits[tower.remat] * logits
            # The stream that was fitted is float32; its bfloat16 saves two bytes of every number that a block keeps of it.
            width = kept.width[tower.remat] - (2 if tower.residual_dtype == "bfloat16" else 0)
            total += pairs * tokens * spec.depth * (width * spec.width + low * (mlp + attended))
        if times:
            a, b, c = kept.working
            working = max(working, pairs * tokens * (a * spec.width + low * (b * spec.mlp_dim + c * logits)))
    return int(total + working)


def _platform(topology: Topology) -> str:
    return "tpu" if topology.accelerator.sides else "gpu"


def _kernel(tower: ImageConfig | TextConfig, tokens: int, topology: Topology) -> str:
    """The attention kernel that training takes there; without "xla" no logits are written to memory."""
    device = types.SimpleNamespace(platform=_platform(topology), device_kind=topology.accelerator.device_kind)
    head_dim = tower.spec.width // tower.spec.num_heads
    return choose_kernel(tower.attention, device=device, tokens=tokens, head_dim=head_dim, dtype=tower.dtype)


def _with_remat(config: TrainConfig, remat: str) -> TrainConfig:
    image, text = (dataclasses.replace(tower, remat=remat) for tower in (config.model.image, config.model.text))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, image=image, text=text))


def _moved_params(config: TrainConfig, state: TrainState, passes: flops.Passes) -> dict[str, tuple[Any, int]]:
    """(leaf, bytes of a number on its way) of every parameter: kernels of blocks travel in the dtype of their products.
    Those of a tower that does not run stay where they are."""
    model = config.model
    low = [name for name, tower in (("img", model.image), ("txt", model.text)) if tower.dtype == "bfloat16"]
    kernel = re.compile(rf"({'|'.join(low)})/.*encoderblock.*kernel" if low else "(?!)")
    still = tuple(f"{name}/" for name, times in zip(("img", "txt"), passes, strict=True) if not times)
    flat = trees.flatten(state.params)
    return {path: (flat[path], 2 if kernel.fullmatch(path) else 4) for path in flat if not path.startswith(still)}


def _is_sharded(leaf: Any) -> bool:
    return leaf.sharding.spec != sharding.P_REPLICATED


def _gathered_bytes(config: TrainConfig, state: TrainState, passes: flops.Passes) -> int:
    """Weights of one block in use, of the next on their way, and a block's gradients before they are scattered; of what
    is outside blocks everything, and its gradients."""
    model, blocks, others = config.model, {"img": 0.0, "txt": 0.0}, 0
    depth = {"img": model.image.spec.depth, "txt": model.text.spec.depth}
    for path, (leaf, size) in _moved_params(config, state, passes).items():
        if not _is_sharded(leaf) or re.fullmatch(sharding.EMBEDDING_TABLE, path):
            continue
        whole = math.prod(leaf.shape) * size
        if "/encoderblock" in path and path[:3] in depth:
            blocks[path[:3]] += whole / depth[path[:3]]
        else:
            others += 2 * whole
    return int(3 * max(blocks.values())) + others


def _batch_bytes(config: TrainConfig) -> int:
    model = config.model
    stored = config.data.image_embeddings is not None
    pixels = max(length_shares(config)) * math.prod(model.image.patch) if model.image.naflex else None
    image = 4 * (model.embedding_dims[0] or 0) if stored else (pixels or math.prod(model.image.image_size)) * 3
    return config.batch_size * (image + 4 * model.text.length)


def _loss_bytes(config: TrainConfig, topology: Topology) -> int:
    """Gradients of a device's own embeddings in float32, a tile of logits, and the texts on their way."""
    rows, width = config.batch_size // topology.devices, config.model.embedding_dims[0] or 0
    if config.loss.kind == "softmax":
        return 3 * 4 * rows * config.batch_size + 2 * 4 * config.batch_size * width
    platform = _platform(topology)
    ring = config.loss.impl == "ring" or (config.loss.impl == "auto" and platform == "tpu" and topology.devices > 2)
    options = {"chunk_size": config.loss.chunk_size, "ring": ring}
    chunk, tile_rows = tile_shape(config.batch_size, topology.devices, platform, **options)
    columns = chunk if ring else chunk * topology.devices
    total = 2 * 4 * rows * width + columns * (4 * min(rows, tile_rows) + 6 * width)
    in_vmem = total <= _VMEM_BYTES.get(topology.name.partition(":")[0], 0)
    return _LOSS_IN_VMEM_BYTES if in_vmem else total


def _collectives(
    config: TrainConfig,
    state: TrainState,
    frozen: Mapping[str, Any],
    passes: flops.Passes,
    mesh: tuple[int, ...],
    turns: int,
) -> dict[str, float]:
    """Bytes by kind, of a step of so many micro-batches: weights gathered, gradients summed, the loss."""
    (data, fsdp), moved = mesh, collections.Counter()
    # With micro-batches the forward pass runs twice. A tower that is frozen as a whole has no backward pass.
    forward, backward = (1 if turns == 1 else 2 * turns), turns
    only_forward = tuple(f"{name}/" for name, times in zip(("img", "txt"), passes, strict=True) if times == 1)
    is_frozen = trees.flatten(frozen)
    for path, (leaf, size) in _moved_params(config, state, passes).items():
        whole = math.prod(leaf.shape) * size
        if _is_sharded(leaf):
            gathers = forward if path.startswith(only_forward) else forward + backward
            table = re.fullmatch(sharding.EMBEDDING_TABLE, path)
            moved["all-gather"] += (
                0 if table else whole * (gathers if "/encoderblock" in path else max(1, gathers // 2))
            )
            if not is_frozen[path]:
                moved["reduce-scatter"] += 0 if table else whole * turns
                moved["all-reduce"] += whole // fsdp if data > 1 else 0
        elif data * fsdp > 1 and not is_frozen[path]:
            moved["all-reduce"] += whole
    if data * fsdp > 1 and config.model.embedding_dims[0]:
        low = 2 if "bfloat16" in (config.model.image.dtype, config.model.text.dtype) else 4
        texts = config.batch_size * config.model.embedding_dims[0]
        moved["loss"] = texts * (low + 4)
    return dict(moved)


def _seconds(moved: Mapping[str, float], devices: int, topology: Topology) -> float:
    """The least that these take on the links if nothing else travels; summing costs a scatter and a gather."""
    passes = {"all-reduce": 2}
    total = sum(size * passes.get(kind, 1) for kind, size in moved.items())
    return total * (devices - 1) / devices / topology.link_bytes_per_s


def _executed_flops(config: TrainConfig, passes: flops.Passes, devices: int) -> float:
    """FLOPs that run for a pair: `remat` repeats the forward pass of a tower that trains, micro-batches that of both."""
    turns, total = _micro_batches(config, devices), 0.0
    for patches, share in _shares(config).items():
        again = 1 if turns[patches] > 1 else 0
        towers = _towers(config, passes, patches)
        runs = [times and times + again + (times == 3 and tower.remat == "full") for tower, _, times in towers]
        options = {"batch_size": config.batch_size, "shares": {patches: 1.0} if patches else None}
        total += share * flops.train_flops_per_pair(config.model, passes=(runs[0], runs[1]), **options)
    return total


def _input(config: TrainConfig, step_s: float) -> tuple[float, float, float]:
    """(pairs/s, decoding cores, bytes/s read from storage), over all hosts."""
    pairs_per_s, model = config.batch_size / step_s, config.model
    if config.data.image_embeddings is not None:
        return pairs_per_s, 0.0, pairs_per_s * 4 * (model.embedding_dims[0] or 0)
    pixels = {
        n * math.prod(model.image.patch) or math.prod(model.image.image_size): s for n, s in _shares(config).items()
    }
    larger = sum(share * max(1.0, size / _JPEG_PIXELS) for size, share in pixels.items())
    return pairs_per_s, pairs_per_s / _PAIRS_PER_CORE_S * larger, pairs_per_s * _JPEG_BYTES * larger
