"""Does an export give its source's numbers? The same inputs through both, and the largest difference of every output.

Embeddings and probabilities must agree to 1e-5; image tokens and logits, which have no bound, to 1e-5 of their largest value, or
of 1 where that is more. Two implementations of the same float32 arithmetic differ by rounding in the order of sums, typically by
2e-6. Pixels and token ids must be equal.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from siglip.array_types import Array
from siglip.encoder import Encoder
from siglip.formats.export_format import ExportMismatch, Inputs, Outputs
from siglip.models.naflex import Patches
from siglip.models.two_tower import ModelConfig, batch_of, blank_images, make_model

TOLERANCE = 1e-5
_EXACT = ("pixels", "grid", "tokens")
_DERIVED = (*_EXACT, "probabilities")  # what not every reader gives
_UNBOUNDED = ("image_tokens", "logits")  # float32 has seven digits, wherever the point is
# x / 127.5 - 1 and (x / 255 - 0.5) / 0.5 round differently in float32; ids are whole numbers.
_PIXEL_ROUNDING = 3e-7
ROWS = 6  # images, and texts; the same for noise and for samples, so that one program serves both


def random_inputs(config: ModelConfig) -> Inputs:
    """Images of noise and, with a text tower, random token ids. Of a NaFlex model they have several grids, and noisy padding."""
    rng, text = np.random.default_rng(0), config.text
    blank = blank_images(config.image, ROWS)
    images = rng.uniform(-1, 1, next(iter(blank.values())).shape).astype(np.float32)
    if config.image.naflex is not None:
        images = Patches(images, np.array(_some_grids(images.shape[1]), np.int32))
    tokens = None if text is None else rng.integers(text.vocab_size, size=(ROWS, text.length), dtype=np.int32)
    return Inputs("random", images, tokens)


def _some_grids(n: int) -> list[tuple[int, int]]:
    """Square, flat, wide, tall, small, one patch; no column of several patches, for which torch resizes positions wrongly."""
    side = math.isqrt(n)
    return [
        (side, side),
        (1, n),
        (min(2, side), n // 2 or 1),
        (n // 2 or 1, min(2, side)),
        (max(1, side // 2),) * 2,
        (1, 1),
    ]


def model_outputs(model: Encoder, inputs: Inputs) -> Outputs:
    """Every output that the model has."""
    with jax.default_matmul_precision("highest"):
        zimg, ztxt, image_tokens = _forward(model.config, model.params, inputs.images, inputs.tokens)
        outputs = {"image_tokens": image_tokens, "image_embedding": zimg, "text_embedding": ztxt}
        if zimg is not None and ztxt is not None:
            outputs["logits"] = model.logits(zimg, ztxt)
    return {name: np.asarray(array) for name, array in outputs.items() if array is not None}


@functools.partial(jax.jit, static_argnums=0)
def _forward(config: ModelConfig, params: Any, images: Array | Patches, tokens: Array | None) -> tuple[Any, Any, Array]:
    # One program for all outputs: compiling takes far longer than running.
    batch = batch_of(images) | ({} if tokens is None else {"text": tokens})
    zimg, ztxt, out = make_model(config).apply({"params": params}, batch)
    # Padding means nothing, and every implementation has another one.
    tokens = out["img/encoded"]
    return zimg, ztxt, jnp.where(out["img/mask"][..., None], tokens, 0) if "img/mask" in out else tokens


def expected_outputs(model: Encoder, inputs: Inputs) -> Outputs:
    """What an export has to give: the model's outputs, and the pixels and token ids of files and texts."""
    outputs = model_outputs(model, inputs)
    if "logits" in outputs:
        outputs["probabilities"] = 1 / (1 + np.exp(-outputs["logits"].astype(np.float64)))
    if inputs.files and isinstance(inputs.images, Patches):
        pixels = inputs.images.without_padding()
        outputs |= {"pixels": pixels.patches, "grid": pixels.grid}
    elif inputs.files:
        outputs["pixels"] = inputs.images
    return outputs | ({"tokens": inputs.tokens} if inputs.texts else {})


def compare(expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Largest absolute difference of every output that was found.

    Raises:
        ExportMismatch: an output of the towers that is missing, one that the source lacks, or of another shape, or further
            from it than allowed.
    """
    if lost := [name for name in expected if name not in found and name not in _DERIVED]:
        raise ExportMismatch(f"the export lacks {', '.join(lost)}; it has {', '.join(found) or 'nothing'}")
    differences = {}
    for name, array in found.items():
        if name not in expected or expected[name].shape != array.shape:
            there = expected[name].shape if name in expected else "absent"
            raise ExportMismatch(f"the export's {name} has shape {array.shape}, its source's is {there}")
        differences[name] = largest_difference(expected[name], array)
        if not differences[name] <= _allowed(name, expected[name]):  # so that NaN fails
            raise ExportMismatch(
                f"the export's {name} differs from its source by {differences[name]:.1e}, allowed is "
                f"{_allowed(name, expected[name]):.1e}"
            )
    return differences


def largest_difference(expected: np.ndarray, found: np.ndarray) -> float:
    """The largest absolute one; NaN where either holds one."""
    return float(np.max(np.abs(expected.astype(np.float64) - found.astype(np.float64))))


def _allowed(name: str, expected: np.ndarray) -> float:
    if name in _EXACT:
        return _PIXEL_ROUNDING
    return TOLERANCE * (max(1.0, float(np.max(np.abs(expected)))) if name in _UNBOUNDED else 1.0)
