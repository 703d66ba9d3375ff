"""Softmax attention of every query over every key, on the kernel that suits the device.

    attention(q, k, v) = softmax(q @ k.T / sqrt(depth)) @ v

- "xla": two matrix products and a softmax. Runs anywhere, in any dtype. It writes all heads x n x n logits to memory, forward
  and backward.
- "cudnn": flash attention of cuDNN (NVIDIA, Ampere or later): no n x n array.
- "splash": flash attention as a Pallas kernel (TPU): no n x n array. The sequence is padded to whole tiles and, as the compiler
  does not partition Pallas kernels, it runs under `shard_map`, each device on its own images.

"auto" is chosen when a program is traced, by its devices and its number of tokens; any other choice is used as given, or refused
when the model is made.

With `lengths` the keys after each image's own length get no weight, in any kernel. Padding must come last, which is all that
cuDNN and splash can leave out.

The trap: fused kernels see the batch, never a gathered sequence; dropout on the weights and cross-attention with one query (the
MAP head) stay with "xla". What stands in rows after an image's length differs from kernel to kernel.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from siglip.array_types import Array, Float, Int
from siglip.errors import UserError
from siglip.models.naflex import Size, mask_of
from siglip.parallel.sharding import P_BATCH

Attention = Literal["auto", "xla", "cudnn", "splash"]
Kernel = Literal["xla", "cudnn", "splash"]
AttentionFn = Callable[..., Array]  # attention_fn with its kernel

# The `checkpoint_name` of what a backward pass needs of a forward pass: the output and, of a fused kernel, its statistics.
SAVED = "attention"
SPLASH_MIN_TOKENS = 512
_CUDNN_MAX_HEAD_DIM = 128
# Rows of a TPU's vector registers hold 128 numbers: tiles come in multiples of that. Larger ones than this overflow its memory.
_LANES, _MAX_TILE = 128, 768


def attention_fn(
    query: Float[Array, "b q heads depth"],
    key: Float[Array, "b k heads depth"],
    value: Float[Array, "b k heads depth"],
    *,
    lengths: Int[Array, " b"] | None = None,
    kernel: Kernel = "xla",
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> Float[Array, "b q heads depth"]:
    """The attention above with a kernel from `choose_kernel`.

    Args:
        lengths: keys of each row of the batch that count, at least one; None for all.
        mesh: for "splash": where the batch is spread out.
        interpret: for "splash": emulate the kernel, on any device and slowly.
    """
    if kernel == "cudnn":
        sizes = {} if lengths is None else {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
        out = jax.nn.dot_product_attention(query, key, value, implementation="cudnn", **sizes)
        # It may leave rows after an image's length as they were in memory; times a weight of 0, NaN is NaN.
        return out if lengths is None else jnp.where(mask_of(lengths, out.shape[1])[..., None, None], out, 0)
    if kernel == "splash":
        local = functools.partial(_splash, interpret=interpret)
        if mesh is not None and mesh.size > 1:
            # Nothing inside is replicated, so the replication checker has nothing to protect.
            local = jax.shard_map(local, mesh=mesh, in_specs=P_BATCH, out_specs=P_BATCH, check_vma=False)
        return local(query, key, value, lengths)
    return checkpoint_name(_einsum(query, key, value, lengths), SAVED)


def is_fused_forward(primitive: Any) -> bool:
    """Whether a remat policy is asked about cuDNN's forward pass, whose statistics jax leaves without a `checkpoint_name`."""
    return primitive.name.startswith("dot_product_attention_fwd")


def mask_keys(logits: Float[Array, "b ... k"], lengths: Int[Array, " b"] | None) -> Float[Array, "b ... k"]:
    """Logits with -inf for the keys after each row's length."""
    if lengths is None:
        return logits
    counts = mask_of(lengths, logits.shape[-1])
    return jnp.where(jnp.expand_dims(counts, range(1, logits.ndim - 1)), logits, -jnp.inf)


def _einsum(query: Array, key: Array, value: Array, lengths: Array | None) -> Array:
    """Heads become a batch axis before the products: XLA on CPU then runs them as batched matrix products, up to
    1.5 times faster than contracting around the head axis; on GPU and TPU the transposes fuse."""
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query * query.shape[-1] ** -0.5, key, value))
    logits = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(mask_keys(logits, lengths), axis=-1).astype(value.dtype)
    return jnp.swapaxes(jnp.einsum("bhqk,bhkd->bhqd", weights, value), 1, 2)


def _splash(query: Array, key: Array, value: Array, lengths: Array | None, *, interpret: bool) -> Array:
    # Pallas is imported where it is used: it is slow to load, and a machine without a TPU never needs it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    (_, tokens, heads, depth), padded = query.shape, -(-query.shape[1] // _LANES) * _LANES
    tile = max(n for n in range(_LANES, min(padded, _MAX_TILE) + 1, _LANES) if padded % n == 0)
    tiles = splash_attention_kernel.BlockSizes(
        block_q=tile, block_kv=tile, block_q_dkv=tile, block_kv_dkv=tile, block_q_dq=tile, block_kv_dq=tile
    )
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((padded, padded))] * heads)
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        mask, block_sizes=tiles, residual_checkpoint_name=SAVED, interpret=interpret
    )
    segments = None
    if padded > tokens or lengths is not None:
        # Attention stays within a segment: real tokens look at real ones, the padding at itself.
        is_real = (jnp.arange(padded) < tokens if lengths is None else mask_of(lengths, padded)).astype(jnp.int32)
        segments = splash_attention_kernel.SegmentIds(is_real, is_real)

    def heads_first(x: Array) -> Array:
        return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, padded - tokens), (0, 0)))

    query, key, value = heads_first(query * depth**-0.5), heads_first(key), heads_first(value)
    each = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=ids), (0, 0, 0, None if lengths is None else 0))
    out = each(query, key, value, segments)
    return jnp.swapaxes(out[:, :, :tokens], 1, 2)


def attention_on(
    choice: Attention, *, device: Any, head_dim: int, dtype: str, where: str = "attention", mesh: Mesh | None = None
) -> AttentionFn:
    """`attention_fn` with the kernel that `choose_kernel` takes for each number of tokens it is called with.

    Raises:
        UserError: if `choice` names a kernel that cannot run there.
    """
    choose = functools.partial(choose_kernel, choice, device=device, head_dim=head_dim, dtype=dtype, where=where)
    choose(tokens=1)

    def attend(query: Array, key: Array, value: Array, *, lengths: Array | None = None) -> Array:
        return attention_fn(query, key, value, lengths=lengths, kernel=choose(tokens=query.shape[1]), mesh=mesh)

    return attend


def choose_kernel(
    choice: Attention, *, device: Any, tokens: Size, head_dim: int, dtype: str, where: str = "attention"
) -> Kernel:
    """The kernel for these sizes on this kind of device (a jax.Device, or what describes one ahead of time).

    `where` names the setting in errors.

    "auto" is cuDNN on NVIDIA when the sizes allow it, splash on TPU from SPLASH_MIN_TOKENS tokens on, and XLA otherwise.

    Raises:
        UserError: if `choice` names a kernel that cannot run there.
    """
    obstacles = {
        "cudnn": cudnn_obstacle(device, head_dim, dtype),
        "splash": None if device.platform == "tpu" else f"a TPU, not {device.platform}",
    }
    if choice == "auto":
        if obstacles["cudnn"] is None:
            return "cudnn"
        # Splash pads to whole tiles, which a symbolic number of an exported program is not known to fill.
        is_long = isinstance(tokens, int) and tokens >= SPLASH_MIN_TOKENS
        return "splash" if obstacles["splash"] is None and is_long else "xla"
    if choice == "xla":
        return "xla"
    if obstacles[choice] is not None:
        raise UserError(f"{where}={choice!r} needs {obstacles[choice]}; use 'auto' or 'xla'")
    return choice


def cudnn_obstacle(device: Any, head_dim: int, dtype: str) -> str | None:
    """What cuDNN's attention lacks there, as the end of a sentence "… needs", or None."""
    # Devices that only describe a topology, for compiling ahead of time, do not always say; AMD's is not a number.
    capability = str(getattr(device, "compute_capability", "8.0"))
    if device.platform != "gpu" or not re.fullmatch(r"\d+(\.\d+)?", capability):
        return f"an NVIDIA GPU, not {device.device_kind if device.platform == 'gpu' else device.platform}"
    if float(capability) < 8.0:
        return f"compute capability 8.0 or later, not {capability}"
    if dtype != "bfloat16":
        return f"dtype 'bfloat16', not {dtype!r}"
    if head_dim % 8 or head_dim > _CUDNN_MAX_HEAD_DIM:
        return f"a head dimension (width / num_heads) that 8 divides, at most {_CUDNN_MAX_HEAD_DIM}, not {head_dim}"
    return None
