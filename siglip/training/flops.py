"""Model FLOPs of a training step, and what the devices could do at most: the two halves of MFU.

    MFU = pairs/s * FLOPs per pair / (devices * peak)                       (model FLOPs utilization, PaLM, arXiv 2204.02311)

Counted are the matrix products of the forward pass, times three for the backward pass: a frozen tower has only the forward
pass, one whose embeddings are read has none. A product that `remat` or micro-batches compute again is not counted again, nor is
anything elementwise. Loss terms are not counted: with a large head the true MFU is higher than the one that is logged.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from siglip.models.naflex import NaflexConfig
from siglip.models.two_tower import ModelConfig
from siglip.models.variants import Variant

# How often the products of the (image, text) tower run: 3 for forward and backward, 1 for forward, 0 for not at all.
Passes = tuple[int, int]

# Dense bfloat16 FLOP/s of one jax device, by the start of its kind; the first that matches counts. Sources: the vendors' data
# sheets, which often name twice as much, for sparse matrices. A v4, v5p or v6e device is a whole chip; a 7x chip is two devices.
PEAK_BF16_FLOPS = (
    ("NVIDIA H200", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA B200", 2250e12),
    ("NVIDIA GB200", 2500e12),
    ("NVIDIA A100", 312e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
    ("TPU7x", 2307e12 / 2),
)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device, or None for a kind that is not listed (a CPU)."""
    return next((peak for start, peak in PEAK_BF16_FLOPS if device_kind.startswith(start)), None)


def peak_pairs_per_s(
    model: ModelConfig, *, batch_size: int, passes: Passes = (3, 3), shares: Mapping[int, float] | None = None
) -> float | None:
    """Pairs per second of all devices of the job at an MFU of 1, on average over a NaFlex run's lengths; None if their peak is
    not known."""
    peak = peak_flops(jax.devices()[0].device_kind)
    cost = train_flops_per_pair(model, batch_size=batch_size, passes=passes, shares=shares)
    return None if peak is None else jax.device_count() * peak / cost


def tower_passes(frozen: Mapping[str, Any], *, stored: bool) -> Passes:
    """Of a run with these frozen parameters (siglip.training.optim.frozen_mask); stored: the image embeddings are read.

    A tower of which anything trains counts whole, although nothing flows back below the lowest part that does.
    """

    def of(tower: str) -> int:
        return 1 if all(jax.tree.leaves(frozen.get(tower, False))) else 3

    return 0 if stored else of("img"), of("txt")


def train_flops_per_pair(
    model: ModelConfig, *, batch_size: int, passes: Passes = (3, 3), shares: Mapping[int, float] | None = None
) -> float:
    """FLOPs of the matrix products of one pair in one training step.

    Args:
        shares: of a NaFlex run's lengths, padding included; None for the tower's longest.
    """
    if shares:
        options = {"batch_size": batch_size, "passes": passes}
        return sum(share * train_flops_per_pair(_of_length(model, n), **options) for n, share in shares.items())
    image, text = model.image, model.text
    zimg, ztxt = model.embedding_dims
    height, width = image.patch
    spec, tokens = image.spec, image.train_tokens
    forward = 2 * image.kept_patches * height * width * 3 * spec.width + _blocks(spec, tokens)
    forward += _pool(image.pool, spec, tokens) + 2 * spec.width * (model.out_dim[0] or 0)
    total = float(passes[0] * forward)
    if text is not None:
        forward = _blocks(text.spec, text.length) + _pool(text.pool, text.spec, text.length)
        forward += 2 * text.spec.width * ((model.out_dim[1] or 0) + text.length * (text.embed_bottleneck or 0))
        total += passes[1] * forward + 3 * 2 * batch_size * (zimg or ztxt or 0)
    return total


def _of_length(model: ModelConfig, patches: int) -> ModelConfig:
    naflex = NaflexConfig(patches, patches)
    return dataclasses.replace(model, image=dataclasses.replace(model.image, naflex=naflex))


def _blocks(spec: Variant, tokens: int) -> int:
    """Four projections, two products of attention, two of the MLP."""
    return spec.depth * 4 * tokens * spec.width * (2 * spec.width + tokens + spec.mlp_dim)


def _pool(pool: str, spec: Variant, tokens: int) -> int:
    """Attention of one query for the whole batch: logits and weighted sums of the tokens; value, output and MLP of one."""
    if pool != "map":
        return 0
    return 4 * tokens * spec.width * spec.num_heads + 4 * spec.width * (spec.width + spec.mlp_dim)
