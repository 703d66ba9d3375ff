"""The export for `transformers`: what it is fed, how it is read back, and the examples of its model card.

The trap: a checkpoint that loads need not be right. transformers fills a weight that it does not find with random numbers
and warns, so missing and unexpected keys fail an export.
"""

import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from siglip.formats import hugging_face
from siglip.formats.export_format import ExportFormat, ExportMismatch, Inputs, Layout, Outputs, in_folder
from siglip.formats.hf_tokenizer.convert import read_pieces
from siglip.models.naflex import Patches
from siglip.models.two_tower import ModelConfig
from siglip.models.vit import PixelConfig

_PIPELINE_LENGTH = 64
_UPRIGHT = (
    "- the preprocessor here resizes and scales to the same pixels, but only calls `convert('RGB')` before: turn images "
    "upright (`ImageOps.exif_transpose`), put transparent ones over white and scale 16-bit grey to 8 bits yourself"
)
_PIXELS = (
    "- transformers 5 takes torchvision's resize where that is installed; it rounds otherwise, up to 1/255 off (bicubic: 2/255). "
    "What was verified here resizes by Pillow: `AutoImageProcessor.from_pretrained(DIR, backend='pil')`, in transformers 4 "
    "`use_fast=False`"
)
_TOKENIZER = (
    "- the tokenizer here gives the ids of training with `padding='max_length', truncation=True`; a `</s>` typed in a text is "
    "text"
)
_NO_TOKENIZER = "- no tokenizer is here, because the source had none: use that of training"
_ONE_COLUMN = (
    "torch resizes the positions of an image of one column of several patches (very tall, few patches) wrongly on CPUs, so "
    "transformers gives such images other embeddings than their source; the verification leaves them out"
)
_NO_PROCESSOR = (
    "- take AutoImageProcessor and AutoTokenizer, not AutoProcessor: transformers' Siglip2Processor sets patches of 16 px, 256 "
    "of them, and texts of 64 tokens itself, whatever is written here"
)
_EXAMPLE_IMAGES = """
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, SiglipVisionModel

by_pillow = {"use_fast": False} if transformers.__version__.startswith("4.") else {"backend": "pil"}
processor = AutoImageProcessor.from_pretrained(".", **by_pillow)
model = SiglipVisionModel.from_pretrained(".")
image = Image.new("RGB", (640, 480))
with torch.no_grad():
    tokens = model(**processor(image, return_tensors="pt")).last_hidden_state
print(tokens.shape)
"""
_EXAMPLE_PIPELINE = """
from PIL import Image
from transformers import pipeline

classify = pipeline("zero-shot-image-classification", model=".")
image = Image.new("RGB", (640, 480), "red")
print(classify(image, candidate_labels=["a red wall", "two cats"]))
"""
_EXAMPLE_BOTH = """
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, SiglipModel

by_pillow = {"use_fast": False} if transformers.__version__.startswith("4.") else {"backend": "pil"}
processor = AutoImageProcessor.from_pretrained(".", **by_pillow)
tokenizer = AutoTokenizer.from_pretrained(".")
model = SiglipModel.from_pretrained(".")
image = Image.new("RGB", (640, 480), "red")
texts = tokenizer(["a red wall", "two cats"], padding="max_length", truncation=True, return_tensors="pt")
with torch.no_grad():
    logits = model(**processor(image, return_tensors="pt"), **texts).logits_per_image
print(torch.sigmoid(logits))
"""


def outputs(folder: Path, cases: Sequence[Inputs]) -> list[Outputs]:
    """What `transformers` gives, its preprocessor and tokenizer included where there are files and texts. Its pixels have the
    mean and the deviation of the folder, ours reach from -1 to 1.

    Raises:
        ExportMismatch: it does not find every weight, or finds one it does not know.
    """
    # transformers 4 imports TensorFlow wherever it finds it, which costs seconds and half a gigabyte.
    os.environ.setdefault("USE_TF", "0")
    from transformers import AutoModel

    model, loading = AutoModel.from_pretrained(folder, output_loading_info=True, dtype="float32")
    check_all_loaded(loading)
    model = model.eval()
    pixels = hugging_face.read_config(folder).image.pixels
    return [_preprocessed(folder, case, pixels) | _torch_outputs(model, case, pixels) for case in cases]


def check_all_loaded(loading: Mapping[str, Any]) -> None:
    """Raises ExportMismatch if transformers' loading info has a key that is missing, unexpected or of another shape."""
    bad = {kind: sorted(keys) for kind, keys in loading.items() if kind.endswith("_keys") and keys}
    if bad:
        raise ExportMismatch(f"transformers did not load the weights as they are: {bad}")


def _torch_outputs(model: Any, inputs: Inputs, config: PixelConfig) -> Outputs:
    import torch

    images, mask = inputs.images, None
    values = config.scaled(np.asarray(images.patches if isinstance(images, Patches) else images))
    if isinstance(images, Patches):
        mask = torch.from_numpy(np.arange(values.shape[1]) < np.asarray(images.lengths)[:, None])
        pixels = {"pixel_values": torch.from_numpy(np.array(values)), "pixel_attention_mask": mask.int()}
        pixels["spatial_shapes"] = torch.from_numpy(np.array(images.grid)).long()
    else:
        pixels = {"pixel_values": torch.from_numpy(np.ascontiguousarray(values.transpose(0, 3, 1, 2)))}
    with torch.no_grad():
        if inputs.tokens is None:
            vision = (model if mask is not None else getattr(model, "vision_model", model))(**pixels)
        else:
            both = model(**pixels, input_ids=torch.from_numpy(inputs.tokens).long())
            vision = both.vision_model_output
    tokens = vision.last_hidden_state
    found = {"image_tokens": tokens if mask is None else torch.where(mask[..., None], tokens, 0.0)}
    if inputs.tokens is not None:
        found |= {"image_embedding": both.image_embeds, "text_embedding": both.text_embeds}
        found |= {"logits": both.logits_per_image, "probabilities": torch.sigmoid(both.logits_per_image)}
    elif vision.pooler_output is not None:
        found["image_embedding"] = torch.nn.functional.normalize(vision.pooler_output)
    return {name: tensor.numpy() for name, tensor in found.items()}


def _preprocessed(folder: Path, inputs: Inputs, config: PixelConfig) -> Outputs:
    from transformers import AutoImageProcessor, AutoTokenizer, __version__

    outputs: Outputs = {}
    if inputs.files:
        from PIL import Image

        # The preprocessor of transformers neither turns images upright nor puts them over white: that is its caller's part.
        images = [Image.open(io.BytesIO(file)) for file in inputs.files]
        by_pillow = {"use_fast": False} if __version__.startswith("4.") else {"backend": "pil"}
        made = AutoImageProcessor.from_pretrained(folder, **by_pillow)(images, return_tensors="np")
        is_naflex, pixels = isinstance(inputs.images, Patches), np.asarray(made["pixel_values"], np.float32)
        pixels = pixels if is_naflex else pixels.transpose(0, 2, 3, 1)
        outputs["pixels"] = pixels = config.unscaled(pixels)
        if is_naflex:
            patches = Patches(pixels, np.asarray(made["spatial_shapes"], np.int32)).without_padding()
            outputs |= {"pixels": patches.patches, "grid": patches.grid}
    if inputs.texts:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(list(inputs.texts), padding="max_length", truncation=True, return_tensors="np")["input_ids"]
        outputs["tokens"] = np.asarray(ids, np.int32)
    return outputs


def _length_note(config: ModelConfig) -> list[str]:
    """transformers' zero-shot pipeline makes texts 64 tokens long; only version 4 can be told otherwise."""
    if config.text is None or config.text.length == _PIPELINE_LENGTH:
        return []
    return [
        f"texts have {config.text.length} tokens, of which pipeline('zero-shot-image-classification') makes {_PIPELINE_LENGTH}: "
        f"in transformers 4 call it with `tokenizer_kwargs={{'max_length': {config.text.length}}}`; version 5 ignores that, so "
        "call the tokenizer and the model directly"
    ]


def _contract(config: ModelConfig, has_tokenizer: bool) -> list[str]:
    notes = [f"- note: {warning}" for warning in [*_one_column(config), *_length_note(config)]]
    if config.text is None:
        return [_UPRIGHT, _PIXELS, *notes]
    notes += [] if config.image.naflex is None else [_NO_PROCESSOR]
    return [_UPRIGHT, _PIXELS, _TOKENIZER if has_tokenizer else _NO_TOKENIZER, *notes]


def _warnings(config: ModelConfig, has_tokenizer: bool) -> list[str]:
    lacks = ["the source has no tokenizer, so the folder has none"] if config.text and not has_tokenizer else []
    return _one_column(config) + _length_note(config) + lacks


def _one_column(config: ModelConfig) -> list[str]:
    return [] if config.image.naflex is None else [_ONE_COLUMN]


def _example(config: ModelConfig, has_tokenizer: bool) -> str:
    naflex = config.image.naflex is not None
    both = _EXAMPLE_BOTH if naflex or _length_note(config) else _EXAMPLE_PIPELINE
    code = both if config.text and has_tokenizer else _EXAMPLE_IMAGES
    code = re.sub("Siglip(Vision)?Model", r"Siglip2\1Model", code) if naflex else code
    return in_folder("transformers torch pillow", code)


def _write(
    folder: Path, params: Any, config: ModelConfig, *, tokenizer: Path | None, layout: Layout, **weights: Any
) -> None:
    hugging_face.write(folder, params, config, tokenizer=tokenizer, **weights)
    if tokenizer is not None:
        read_pieces(tokenizer, room=config.text.vocab_size)


EXPORT = ExportFormat(
    library="transformers",
    write=_write,
    example=_example,
    outputs=outputs,
    needs=("transformers", "torch"),
    contract=_contract,
    warnings=_warnings,
    dtypes=("float32", "bfloat16"),
    has_shards=True,
)
