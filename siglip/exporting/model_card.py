"""The README.md of an export: what it is, where it comes from, what it wants to be fed, how far it was checked, how to call it.

Its head is the YAML that model hubs read. What is not known is said to be unknown: a card is no place for guesses.

The trap: the two contracts that are lost most often on the way to a consumer are the range and resize of pixels, and the lower
case, end token and padding of texts. Both are spelt out here, in every format.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from siglip.formats import hugging_face
from siglip.models.two_tower import ModelConfig
from siglip.workdir.files import read_config
from siglip.workdir.metrics import format_value, read_metrics

_HUB_LICENCES = (
    "apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "gpl-3.0", "gemma",
)  # fmt: skip

Format = Literal["bigvision", "hf", "stablehlo", "savedmodel"]


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where a model comes from.

    Attributes:
        name: of the source.
        licence: an SPDX identifier or a name; None when the exporter was not told.
        config: the run's config.json, or {} when the source is no run.
        metrics: the run's last evaluation, {"eval/<task>/<name>/<metric>": value}.
        step: the checkpoint's step, or None.
    """

    name: str
    licence: str | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    step: int | None = None


def provenance(src: str | Path, *, licence: str | None = None) -> Provenance:
    """What the source itself tells of its origin."""
    # Orbax is slow to import, and only runs need it.
    from siglip.workdir import checkpoint

    path = Path(src)
    found = checkpoint.locate(path) if path.is_dir() else None
    if found is None:
        return Provenance(path.resolve().name, licence)
    workdir, step = found
    config = read_config(workdir, fields=("data", "optim", "loss", "total_steps", "batch_size", "seed"))
    lines = [line for line in read_metrics(workdir) if line["step"] <= step]
    metrics = {}
    for line in lines:
        metrics |= {name: value for name, value in line.items() if name.startswith("eval/")}
    return Provenance(workdir.resolve().name, licence, config, metrics, step)


def model_card(
    config: ModelConfig,
    *,
    format: Format,
    origin: Provenance,
    differences: Mapping[str, Mapping[str, float]],
    has_tokenizer: bool,
) -> str:
    """The card. differences: {inputs: {output: largest difference}}, as the export's own check found them."""
    both = config.text is not None
    parts = [
        _front_matter(origin, format=format, both=both),
        f"# SigLIP {'image and text towers' if both else 'image tower'}",
        _origin(origin),
        "## Architecture\n\n" + _architecture(config),
        "## What it takes\n\n" + _contract(config, format=format, has_tokenizer=has_tokenizer),
        "## Data and recipe\n\n" + _recipe(origin),
        "## Evaluation\n\n" + _evaluation(origin),
        "## How far it was checked\n\n" + _differences(differences),
        "## Example\n\n" + _example(config, format=format, has_tokenizer=has_tokenizer),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(origin: Provenance, *, format: Format, both: bool) -> str:
    library = {"hf": "transformers", "bigvision": "big_vision", "stablehlo": "jax", "savedmodel": "tensorflow"}[format]
    tag = "zero-shot-image-classification" if both else "image-feature-extraction"
    # Hubs know a list of identifiers; everything else is "other" with a name.
    known = origin.licence in _HUB_LICENCES
    licence = (
        f"license: {origin.licence}"
        if known
        else f"license: other\nlicense_name: {json.dumps(origin.licence or 'unknown')}"
    )
    return f"---\nlibrary_name: {library}\npipeline_tag: {tag}\ntags: [siglip, vision]\n{licence}\n---"


def _origin(origin: Provenance) -> str:
    at = "" if origin.step is None else f", step {origin.step}"
    licence = origin.licence or "unknown; fill in the licence of the data and of the run"
    return f"Exported from `{origin.name}`{at}. Licence: {licence}."


def _architecture(config: ModelConfig) -> str:
    image, text, spec = config.image, config.text, config.image.spec
    head = f", linear head to {config.out_dim[0]}" if config.out_dim[0] else ""
    lines = [
        f"- image: ViT, width {spec.width}, depth {spec.depth}, MLP {spec.mlp_dim}, {spec.num_heads} heads, "
        f"patches of {image.patch[0]} x {image.patch[1]} px, {image.posemb} positions, pooling `{image.pool}`{head}"
    ]
    if text:
        lines.append(
            f"- text: transformer, width {text.spec.width}, depth {text.spec.depth}, MLP {text.spec.mlp_dim}, "
            f"{text.spec.num_heads} heads, {text.vocab_size} pieces, pooling `{text.pool}`, "
            f"embedding {config.embedding_dims[1]}"
        )
    return "\n".join(lines)


def _contract(config: ModelConfig, *, format: Format, has_tokenizer: bool) -> str:
    image, text, (height, width), (down, across) = config.image, config.text, config.image.image_size, config.image.grid
    lines = [
        f"- pictures: upright RGB, transparent parts over white, resized to {height} x {width} px (bilinear with antialias, as "
        "Pillow does; the aspect ratio is not kept), then x / 127.5 - 1: values in [-1, 1]",
        f"- they become {down * across} tokens ({down} x {across}, row by row) of width {image.spec.width}"
        + (", with a class token before them" if image.pool == "tok" else ""),
    ]
    if text:
        lines.append(
            f"- texts: lower-cased as Python's `str.lower` does, SentencePiece, cut to {text.length - 1} pieces, then filled up "
            f"to exactly {text.length} with the end token `</s>`; punctuation stays, pads are attended to, there is no mask"
        )
    if format == "hf":
        lines.append(_HF_PICTURES)
        lines += [_HF_TEXTS if has_tokenizer else _NO_TOKENIZER] if text else []
        lines += [f"- note: {warning}"] if (warning := hugging_face.pipeline_length_warning(config)) else []
    if format == "savedmodel":
        lines.append(_SAVED_MODEL)
    return "\n".join(lines)


_HF_PICTURES = (
    "- the preprocessor here resizes and scales to the same pixels, but only calls `convert('RGB')` before: turn pictures "
    "upright (`ImageOps.exif_transpose`), put transparent ones over white and scale 16-bit grey to 8 bits yourself"
)
_HF_TEXTS = (
    "- the tokenizer here gives the ids of training with `padding='max_length', truncation=True`; a `</s>` typed in a text is "
    "text"
)
_NO_TOKENIZER = "- no tokenizer is here, because the source had none: use that of training"
_SAVED_MODEL = (
    "- all of it happens inside the graph: it takes encoded files (JPEG, PNG, WebP, GIF's first frame, 24-bit BMP; EXIF turned "
    "but in WebP, transparency over white but in GIF) and raw UTF-8 texts; a damaged file is an InvalidArgumentError"
)


def _recipe(origin: Provenance) -> str:
    config = origin.config
    if not config:
        return "Unknown: the source is not a training run."
    optim, data = config["optim"], config["data"]
    steps = config["total_steps"] if origin.step is None else origin.step
    sources = [
        f"- `{Path(source['shards']).name}`, weight {source['weight']}, captions "
        + ", ".join(f"`{field}` {probability:g}" for field, probability in source["captions"])
        for source in data["sources"]
    ]
    started = config.get("init") or {}
    lines = [
        f"- {steps} of {config['total_steps']} steps of {config['batch_size']} pairs "
        f"({steps * config['batch_size']:,} pairs seen), {config['loss']['kind']} loss, seed {config['seed']}",
        f"- {optim['name']}, lr {optim['lr']:g}, weight decay {optim['weight_decay']:g} (times the schedule, not the lr), "
        f"b2 {optim['b2']:g}, {optim['schedule']} schedule, {optim['warmup_steps']} warm-up steps",
    ]
    lines += [f"- started from `{Path(started['src']).name}`"] if started.get("src") else []
    return "\n".join(["Pairs from:", "", *sources, "", *lines])


def _evaluation(origin: Provenance) -> str:
    """A table per task, with a row per data set and a column per metric."""
    tasks: dict[str, dict[str, dict[str, float]]] = {}
    for path, value in sorted(origin.metrics.items()):
        _, task, dataset, metric = path.split("/", 3)
        tasks.setdefault(task, {}).setdefault(dataset, {})[metric] = value
    tables = [_table(task, rows) for task, rows in tasks.items()]
    return "\n\n".join(tables) or "None on record."


def _table(task: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    metrics = list(dict.fromkeys(metric for found in rows.values() for metric in found))
    lines = [
        f"| {task} | " + " | ".join(metric.replace("_", " ") for metric in metrics) + " |",
        "|---" * (1 + len(metrics)) + "|",
    ]
    for dataset, found in rows.items():
        values = [format_value(found.get(metric), rank=metric.endswith("_rank")) for metric in metrics]
        lines.append(f"| {dataset} | {' | '.join(values)} |")
    return "\n".join(lines)


def _differences(differences: Mapping[str, Mapping[str, float]]) -> str:
    outputs = list(dict.fromkeys(name for found in differences.values() for name in found))
    rows = [
        f"| {name} | "
        + " | ".join(f"{found[name]:.1e}" if name in found else "" for found in differences.values())
        + " |"
        for name in outputs
    ]
    head = [
        "| largest difference from the source | " + " | ".join(differences) + " |",
        "|---" * (1 + len(differences)) + "|",
    ]
    return "\n".join(["Read back and fed the same inputs as its source:", "", *head, *rows])


def _example(config: ModelConfig, *, format: Format, has_tokenizer: bool) -> str:
    name = format
    if format == "hf" and config.text is not None and has_tokenizer:
        name = "hf_both" if hugging_face.pipeline_length_warning(config) else "hf_pipeline"
    elif format in ("stablehlo", "savedmodel") and config.text is not None:
        name = f"{format}_both"
    height, width = config.image.image_size
    return (
        _EXAMPLES[name]
        .strip()
        .replace("HEIGHT", str(height))
        .replace("WIDTH", str(width))
        .replace("LENGTH", str(config.text.length if config.text else 0))
    )


_EXAMPLES = {
    "bigvision": """
Run in this folder; `model.npz` also loads in big_vision, as `model.npz` or `model.npz:img`.

```python
import numpy as np
import siglip

model = siglip.load("model.npz")
pictures = np.zeros((1, HEIGHT, WIDTH, 3), np.float32)
print(model.image_tokens(pictures).shape)
```
""",
    "hf": """
Run in this folder, with `pip install transformers torch pillow`.

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, SiglipVisionModel

processor = AutoImageProcessor.from_pretrained(".")
model = SiglipVisionModel.from_pretrained(".")
picture = Image.new("RGB", (640, 480))
with torch.no_grad():
    tokens = model(**processor(picture, return_tensors="pt")).last_hidden_state
print(tokens.shape)
```
""",
    "hf_pipeline": """
Run in this folder, with `pip install transformers torch pillow`.

```python
from PIL import Image
from transformers import pipeline

classify = pipeline("zero-shot-image-classification", model=".")
picture = Image.new("RGB", (640, 480), "red")
print(classify(picture, candidate_labels=["a red wall", "two cats"]))
```
""",
    "hf_both": """
Run in this folder, with `pip install transformers torch pillow`.

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, SiglipModel

processor, tokenizer = AutoImageProcessor.from_pretrained("."), AutoTokenizer.from_pretrained(".")
model = SiglipModel.from_pretrained(".")
picture = Image.new("RGB", (640, 480), "red")
texts = tokenizer(["a red wall", "two cats"], padding="max_length", truncation=True, return_tensors="pt")
with torch.no_grad():
    logits = model(**processor(picture, return_tensors="pt"), **texts).logits_per_image
print(torch.sigmoid(logits))
```
""",
    "stablehlo": """
Run in this folder, with `pip install jax numpy`; the program runs on CPU, CUDA and TPU, for any number of rows.

```python
import jax.export
import numpy as np

program = jax.export.deserialize(bytearray(open("image.stablehlo", "rb").read()))
weights = dict(np.load("image.npz"))
pictures = np.zeros((1, HEIGHT, WIDTH, 3), np.float32)
outputs = program.call(weights, pictures)
print(outputs["image_tokens"].shape)
```
""",
    "stablehlo_both": """
Run in this folder, with `pip install jax numpy`; the programs run on CPU, CUDA and TPU, for any number of rows.

```python
import jax.export
import numpy as np


def load(name):
    program = jax.export.deserialize(bytearray(open(f"{name}.stablehlo", "rb").read()))
    return program.call, dict(np.load(f"{name}.npz"))


embed_images, image_weights = load("image")
embed_texts, text_weights = load("text")
zimg = embed_images(image_weights, np.zeros((1, HEIGHT, WIDTH, 3), np.float32))["image_embedding"]
ztxt = embed_texts(text_weights, np.ones((2, LENGTH), np.int32))["text_embedding"]
logits = np.exp(text_weights["params/t"]) * zimg @ ztxt.T + text_weights["params/b"]
print(1 / (1 + np.exp(-logits)))
```
""",
    "savedmodel": """
Run in this folder, with `pip install tensorflow`.

```python
import tensorflow as tf

model = tf.saved_model.load(".")
picture = tf.io.encode_png(tf.zeros((480, 640, 3), tf.uint8))
outputs = model.signatures["serving_default"](images=tf.stack([picture]))
print(outputs["image_tokens"].shape)
```
""",
    "savedmodel_both": """
Run in this folder, with `pip install tensorflow tensorflow-text`; the second one is imported for its ops.

```python
import tensorflow as tf
import tensorflow_text

model = tf.saved_model.load(".")
picture = tf.io.encode_png(tf.zeros((480, 640, 3), tf.uint8))
outputs = model.signatures["serving_default"](images=tf.stack([picture]), texts=tf.constant(["a red wall", "two cats"]))
print(outputs["probabilities"].numpy())
```
""",
}
