"""A small Gemma as a prefix language model: a dict of arrays and pure functions over it.

    x <- x + Attention(norm(x));   x <- x + (gelu(norm(x) W_gate) * (norm(x) W_up)) W_down;   logits = norm(x) Eᵀ
    norm(x) = (1 + scale) * x / rms(x);   token i sees token j  <=>  j < prefix or j <= i

Multi-query attention with rotary positions and a GeGLU, its embeddings E tied to the output, as in Gemma (arXiv:2403.08295);
what comes before the text it writes sees itself in both directions, as in PaliGemma (arXiv:2407.07726, figure 2).

The trap: Gemma multiplies what it looks up in E by sqrt(d), and that alone: vectors from elsewhere, such as image tokens,
join after it and stay as they are.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from siglip.array_types import Array, Float, Int

Params = Mapping[str, Any]
Cache = tuple[Array, Array]  # keys and values, each [layer, b, t, k]

_MAX_WAVELENGTH = 10_000.0
_NORM_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder.

    Attributes:
        vocab_size: token ids.
        width: of the tokens.
        depth: blocks.
        mlp_dim: hidden units of the GeGLU.
        num_heads: query heads, which share one head of keys and values.
        head_dim: width of a head; even, since positions rotate pairs.
    """

    vocab_size: int
    width: int = 96
    depth: int = 2
    mlp_dim: int = 256
    num_heads: int = 3
    head_dim: int = 32

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"decoder.{field.name}={getattr(self, field.name)} must be at least 1")
        if self.head_dim % 2:
            raise ValueError(f"decoder.head_dim={self.head_dim} must be even: positions rotate pairs of channels")


@functools.partial(jax.jit, static_argnums=0)
def init_decoder(config: DecoderConfig, key: jax.Array) -> dict[str, Any]:
    """Random parameters; those of the blocks are stacked, with a leading layer axis."""
    d, f, h, k = config.width, config.mlp_dim, config.num_heads, config.head_dim
    keys = iter(jax.random.split(key, 7))

    def draw(*shape: int, fan_in: int, depth: tuple[int, ...] = (config.depth,)) -> Array:
        return jax.random.normal(next(keys), (*depth, *shape)) / fan_in**0.5

    blocks = {
        "attention_norm": jnp.zeros((config.depth, d)),
        "query": draw(d, h, k, fan_in=d),
        "key": draw(d, k, fan_in=d),
        "value": draw(d, k, fan_in=d),
        "out": draw(h, k, d, fan_in=h * k),
        "mlp_norm": jnp.zeros((config.depth, d)),
        "gate_up": draw(2, d, f, fan_in=d),
        "down": draw(f, d, fan_in=f),
    }
    return {"embedding": draw(config.vocab_size, d, fan_in=d, depth=()), "blocks": blocks, "norm": jnp.zeros(d)}


def embed(params: Params, tokens: Int[Array, "*b l"]) -> Float[Array, "*b l d"]:
    """Token ids -> what the blocks take."""
    table = params["embedding"]
    return table[tokens] * table.shape[1] ** 0.5


def logits(params: Params, x: Float[Array, "b l d"]) -> Float[Array, "b l v"]:
    """What the blocks return -> a score for every token of the vocabulary."""
    return _norm(x, params["norm"]) @ params["embedding"].T


def prefix_mask(prefix: int, total: int) -> Array:
    """bool [total, total]: whether token i (row) sees token j (column)."""
    i, j = jnp.arange(total)[:, None], jnp.arange(total)[None]
    return (j < prefix) | (j <= i)


def run_blocks(
    params: Params,
    x: Float[Array, "b s d"],
    mask: Array,
    *,
    start: Int[Array, ""] | int = 0,
    cache: Cache | None = None,
) -> tuple[Float[Array, "b s d"], Cache | None]:
    """The blocks over a stretch of the sequence.

    Args:
        x: the tokens at the positions start, start + 1, …
        mask: bool [s, t]: what each of them sees; without a cache t = s, with one its length.
        cache: keys and values of the whole sequence as far as it is known; those of `x` are put in at `start`.

    Returns:
        The tokens after the last block, and the cache with theirs in it, or None when there was none.
    """
    rotation = _rotation(start + jnp.arange(x.shape[1]), params["blocks"]["key"].shape[-1])

    def block(x: Array, layer: tuple[Params, Cache | None]) -> tuple[Array, Cache | None]:
        p, known = layer
        normed = _norm(x, p["attention_norm"])
        keys, values = _rotate(normed @ p["key"], rotation), normed @ p["value"]
        if known is not None:
            keys = lax.dynamic_update_slice_in_dim(known[0], keys, start, axis=1)
            values = lax.dynamic_update_slice_in_dim(known[1], values, start, axis=1)
        x = x + _attend(p, normed, rotation, keys, values, mask)
        gate, up = jnp.einsum("bsd,gdf->gbsf", _norm(x, p["mlp_norm"]), p["gate_up"])
        x = x + (jax.nn.gelu(gate) * up) @ p["down"]
        return x, None if known is None else (keys, values)

    return lax.scan(block, x, (params["blocks"], cache))


def empty_cache(config: DecoderConfig, batch: int, length: int) -> Cache:
    """Room for the keys and values of `length` tokens."""
    shape = (config.depth, batch, length, config.head_dim)
    return jnp.zeros(shape), jnp.zeros(shape)


def _attend(p: Params, x: Array, rotation: Array, keys: Array, values: Array, mask: Array) -> Array:
    queries = _rotate(jnp.einsum("bsd,dhk->bhsk", x, p["query"]), rotation) * keys.shape[-1] ** -0.5
    scores = jnp.where(mask, jnp.einsum("bhsk,btk->bhst", queries, keys), -jnp.inf)
    mixed = jnp.einsum("bhst,btk->bshk", jax.nn.softmax(scores), values)
    return jnp.einsum("bshk,hkd->bsd", mixed, p["out"])


def _norm(x: Array, scale: Array) -> Array:
    return (1 + scale) * x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + _NORM_EPSILON)


def _rotation(positions: Array, channels: int) -> Array:
    """Angles [s, channels / 2]."""
    wavelengths = _MAX_WAVELENGTH ** (jnp.arange(0, channels, 2) / channels)
    return positions[:, None] / wavelengths


def _rotate(x: Array, rotation: Array) -> Array:
    """Turns channel pairs (i, i + k / 2) of [..., s, k] by their angles."""
    first, second = jnp.split(x, 2, axis=-1)
    sin, cos = jnp.sin(rotation), jnp.cos(rotation)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
