"""Does an export give its source's numbers? The same inputs through both, and the largest difference of every output.

Embeddings and probabilities must agree to 1e-5; image tokens and logits, which have no bound, to 1e-5 of their largest value, or
of 1 where that is more. Two implementations of the same float32 arithmetic differ by rounding in the order of sums, typically by
2e-6. Pixels and token ids must be equal.

The trap: a checkpoint that loads is not a checkpoint that is right. A loader that misses a key fills it with random numbers and
warns; so missing and unexpected keys fail an export as well.
"""

import dataclasses
import functools
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from siglip.array_types import Array
from siglip.encoder import Encoder
from siglip.errors import RunFailed
from siglip.models.two_tower import ModelConfig, make_model

Outputs = dict[str, np.ndarray]

TOLERANCE = 1e-5
_EXACT = ("pixels", "tokens")
_DERIVED = (*_EXACT, "probabilities")  # what not every reader gives
_UNBOUNDED = ("image_tokens", "logits")  # float32 has seven digits, wherever the point is
# x / 127.5 - 1 and (x / 255 - 0.5) / 0.5 round differently in float32; ids are whole numbers.
_PIXEL_ROUNDING = 3e-7
ROWS = 6  # pictures, and texts; the same for noise and for samples, so that one program serves both


class ExportMismatch(RunFailed):
    """What was written does not read back as its source: a failed run, not a user's mistake."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What both sides are fed.

    Attributes:
        name: "random" or "sample".
        images: float32 [b, h, w, 3] in [-1, 1], as our pipeline prepares them.
        tokens: int32 [k, l], likewise, or None for an image tower alone.
        files: the pictures as encoded files, for what decodes them itself.
        texts: the texts, for what tokenizes them itself; (), though there are tokens, where there is no tokenizer.
    """

    name: str
    images: np.ndarray
    tokens: np.ndarray | None
    files: Sequence[bytes] = ()
    texts: Sequence[str] = ()


def random_inputs(config: ModelConfig) -> Inputs:
    """Pictures of noise and, with a text tower, random token ids."""
    rng, text = np.random.default_rng(0), config.text
    images = rng.uniform(-1, 1, (ROWS, *config.image.image_size, 3)).astype(np.float32)
    tokens = None if text is None else rng.integers(text.vocab_size, size=(ROWS, text.length), dtype=np.int32)
    return Inputs("random", images, tokens)


def model_outputs(model: Encoder, inputs: Inputs) -> Outputs:
    """Every output that the model has."""
    with jax.default_matmul_precision("highest"):
        zimg, ztxt, image_tokens = _forward(model.config, model.params, inputs.images, inputs.tokens)
        outputs = {"image_tokens": image_tokens, "image_embedding": zimg, "text_embedding": ztxt}
        if zimg is not None and ztxt is not None:
            outputs["logits"] = model.logits(zimg, ztxt)
    return {name: np.asarray(array) for name, array in outputs.items() if array is not None}


@functools.partial(jax.jit, static_argnums=0)
def _forward(config: ModelConfig, params: Any, images: Array, tokens: Array | None) -> tuple[Any, Any, Array]:
    # One program for all outputs: compiling takes far longer than running.
    batch = {"image": images} | ({} if tokens is None else {"text": tokens})
    zimg, ztxt, out = make_model(config).apply({"params": params}, batch)
    return zimg, ztxt, out["img/encoded"]


def expected_outputs(model: Encoder, inputs: Inputs) -> Outputs:
    """What an export has to give: the model's outputs, and what its preprocessing has to make of files and texts."""
    outputs = model_outputs(model, inputs)
    if "logits" in outputs:
        outputs["probabilities"] = 1 / (1 + np.exp(-outputs["logits"].astype(np.float64)))
    outputs |= {"pixels": inputs.images} if inputs.files else {}
    return outputs | ({"tokens": inputs.tokens} if inputs.texts else {})


def transformers_outputs(folder: Path, cases: Sequence[Inputs], *, pooled: bool) -> list[Outputs]:
    """The same from `transformers`, its preprocessor and tokenizer included where there are files and texts.

    Raises:
        ExportMismatch: it does not find every weight, or finds one it does not know.
    """
    # transformers 4 imports TensorFlow wherever it finds it, which costs seconds and half a gigabyte.
    os.environ.setdefault("USE_TF", "0")
    from transformers import AutoModel

    model, loading = AutoModel.from_pretrained(folder, output_loading_info=True)
    check_all_loaded(loading)
    model = model.float().eval()
    return [_preprocessed(folder, case) | _torch_outputs(model, case, pooled=pooled) for case in cases]


def check_all_loaded(loading: Mapping[str, Any]) -> None:
    """Raises ExportMismatch if transformers' loading info has a key that is missing, unexpected or of another shape."""
    bad = {kind: sorted(keys) for kind, keys in loading.items() if kind.endswith("_keys") and keys}
    if bad:
        raise ExportMismatch(f"transformers did not load the weights as they are: {bad}")


def _torch_outputs(model: Any, inputs: Inputs, *, pooled: bool) -> Outputs:
    import torch

    pixels = torch.from_numpy(np.ascontiguousarray(inputs.images.transpose(0, 3, 1, 2)))
    with torch.no_grad():
        if inputs.tokens is None:
            vision = getattr(model, "vision_model", model)(pixel_values=pixels)
        else:
            both = model(pixel_values=pixels, input_ids=torch.from_numpy(inputs.tokens).long())
            vision = both.vision_model_output
    found = {"image_tokens": vision.last_hidden_state}
    if inputs.tokens is not None:
        found |= {"image_embedding": both.image_embeds, "text_embedding": both.text_embeds}
        found |= {"logits": both.logits_per_image, "probabilities": torch.sigmoid(both.logits_per_image)}
    elif pooled:
        found["image_embedding"] = torch.nn.functional.normalize(vision.pooler_output)
    return {name: tensor.numpy() for name, tensor in found.items()}


def _preprocessed(folder: Path, inputs: Inputs) -> Outputs:
    from transformers import AutoImageProcessor, AutoTokenizer

    outputs: Outputs = {}
    if inputs.files:
        from PIL import Image

        # The preprocessor of transformers neither turns pictures upright nor puts them over white: that is its caller's part.
        pictures = [Image.open(io.BytesIO(file)) for file in inputs.files]
        pixels = AutoImageProcessor.from_pretrained(folder)(pictures, return_tensors="np")["pixel_values"]
        outputs["pixels"] = np.asarray(pixels, np.float32).transpose(0, 2, 3, 1)
    if inputs.texts:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(list(inputs.texts), padding="max_length", truncation=True, return_tensors="np")["input_ids"]
        outputs["tokens"] = np.asarray(ids, np.int32)
    return outputs


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
        differences[name] = float(np.max(np.abs(expected[name].astype(np.float64) - array.astype(np.float64))))
        if not differences[name] <= _allowed(name, expected[name]):  # so that NaN fails
            raise ExportMismatch(
                f"the export's {name} differs from its source by {differences[name]:.1e}, allowed is "
                f"{_allowed(name, expected[name]):.1e}"
            )
    return differences


def _allowed(name: str, expected: np.ndarray) -> float:
    if name in _EXACT:
        return _PIXEL_ROUNDING
    return TOLERANCE * (max(1.0, float(np.max(np.abs(expected)))) if name in _UNBOUNDED else 1.0)
