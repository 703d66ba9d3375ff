"""Exports: write, read back, compare, and only then let the folder appear under its name.

The file is read back the way its users will read it (Hugging Face's by `transformers` where that is installed) and
fed random pictures and token ids; every output must agree with the source's to 1e-5 of its largest value, or of 1
where that is more.

The trap: a checkpoint that loads is not a checkpoint that is right. A loader that misses a key fills it with random
numbers and warns; so missing and unexpected keys fail an export as well.
"""

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from siglip import encoder
from siglip.encoder import Encoder
from siglip.formats import big_vision, hugging_face
from siglip.models.two_tower import ModelConfig
from siglip.source import EXPORTED_NPZ

Format = Literal["bigvision", "hf"]
Tower = Literal["image", "both"]
Outputs = dict[str, np.ndarray]

# Two implementations of the same float32 arithmetic differ by rounding in the order of sums: 2e-6 is typical.
TOLERANCE = 1e-5
_PICTURES = 2
_TEXTS = 3


class ExportMismatch(RuntimeError):
    """What was written does not read back as its source: a failed run, not a user's mistake."""


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written and how far it is from its source.

    Attributes:
        path: the folder, or the npz.
        differences: largest absolute difference of every output compared.
        verified: whether the reader its users have read it back; False when `transformers` is not installed.
        message: one line for a person, warnings included.
    """

    path: Path
    differences: dict[str, float]
    verified: bool
    message: str


def export(
    src: str | Path, *, format: Format, out: str | Path, tower: Tower = "image", image_size: int | None = None
) -> ExportReport:
    """Writes a model in another format, verified.

    Args:
        src: any source that `encoder.load` reads.
        format: "bigvision" (a folder with model.npz, or the npz alone when `out` ends in .npz) or "hf".
        out: where to; must not exist yet.
        tower: the image tower alone, or both.
        image_size: pixels; positions are resampled to it. None keeps the source's.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError: there is nothing at `src`.
        ValueError: the format cannot express this model.
        ExportMismatch: the written file does not give the same outputs; nothing is left of it.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{str(out)!r} exists; export to a new name, or remove it first")
    if format not in ("bigvision", "hf") or tower not in ("image", "both"):
        raise ValueError(f"format={format!r} is 'bigvision' or 'hf' and tower={tower!r} is 'image' or 'both'")
    model = _tower_of(encoder.load(src, image_size), tower)
    if format == "hf":
        hugging_face.check_expressible(model.config)
    with _new_beside(out) as partial:
        write = _write_hugging_face if format == "hf" else _write_big_vision
        read_back, verified, warning = write(model, partial, source=str(src))
        differences = _compare(_outputs(model), read_back())
        _publish(partial, out)
    worst = max(differences.values())
    message = f"wrote {out}: {len(differences)} outputs agree, largest difference {worst:.1e}"
    return ExportReport(out, differences, verified, "; ".join(filter(None, (message, warning))))


def _tower_of(model: Encoder, tower: Tower) -> Encoder:
    """The model to export, in float32: what is compared must not be the rounding of bfloat16."""
    params, config = model.params, model.config
    if tower == "both" and config.text is None:
        raise ValueError("the source has only the image tower; export with tower='image'")
    if tower == "image":
        params, config = {"img": params["img"]}, big_vision.image_only(config)
    image = dataclasses.replace(config.image, dtype="float32", remat="none")
    text = config.text and dataclasses.replace(config.text, dtype="float32", remat="none")
    tokenizer = model.tokenizer if tower == "both" else None
    return Encoder(params, dataclasses.replace(config, image=image, text=text), tokenizer=tokenizer)


Written = tuple[Callable[[], Outputs], bool, str]


def _write_big_vision(model: Encoder, folder: Path, *, source: str) -> Written:
    npz = folder / EXPORTED_NPZ
    big_vision.write(npz, model.params, model.config)
    if model.tokenizer:
        (folder / hugging_face.TOKENIZER_FILE).write_bytes(model.tokenizer.read_bytes())
    (folder / "README.md").write_text(model_card(model.config, format="bigvision", source=source))
    return lambda: _outputs(encoder.load(npz)), True, ""


def _write_hugging_face(model: Encoder, folder: Path, *, source: str) -> Written:
    hugging_face.write(folder, model.params, model.config, tokenizer=model.tokenizer)
    (folder / "README.md").write_text(model_card(model.config, format="hf", source=source))
    warnings = [hugging_face.pipeline_length_warning(model.config)]
    if model.config.text is not None and model.tokenizer is None:
        warnings.append("the source has no tokenizer, so the folder has none")
    if find_spec("transformers") and find_spec("torch"):
        return lambda: _transformers_outputs(model, folder), True, "; ".join(filter(None, warnings))
    warnings.append("verified with our own reader only; for transformers: pip install 'siglip-stage0[interop]'")
    return lambda: _outputs(encoder.load(folder)), False, "; ".join(filter(None, warnings))


def _inputs(model: Encoder) -> tuple[np.ndarray, np.ndarray | None]:
    """Random pictures and, with a text tower, random token ids."""
    rng, text = np.random.default_rng(0), model.config.text
    images = rng.uniform(-1, 1, (_PICTURES, *model.config.image.image_size, 3)).astype(np.float32)
    tokens = None if text is None else rng.integers(text.vocab_size, size=(_TEXTS, text.length), dtype=np.int32)
    return images, tokens


def _outputs(model: Encoder) -> Outputs:
    images, tokens = _inputs(model)
    outputs = {}
    with jax.default_matmul_precision("highest"):
        outputs["image_tokens"] = model.image_tokens(images)
        if model.config.image.pool != "none":
            outputs["image_embedding"] = model.embed_images(images)
        if tokens is not None:
            outputs["text_embedding"] = model.embed_texts(tokens)
        if "image_embedding" in outputs and "text_embedding" in outputs:
            outputs["logits"] = model.logits(outputs["image_embedding"], outputs["text_embedding"])
    return {name: np.asarray(array) for name, array in outputs.items()}


def _transformers_outputs(model: Encoder, folder: Path) -> Outputs:
    """The same outputs from `transformers`.

    Raises:
        ExportMismatch: it does not find every weight, or finds one it does not know.
    """
    import torch
    from transformers import AutoModel

    torch_model, loading = AutoModel.from_pretrained(folder, output_loading_info=True)
    bad = {kind: sorted(keys) for kind, keys in loading.items() if kind.endswith("_keys") and keys}
    if bad:
        raise ExportMismatch(f"transformers does not load what was written: {bad}")
    torch_model = torch_model.float().eval()
    images, tokens = _inputs(model)
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    with torch.no_grad():
        if tokens is None:
            vision = torch_model(pixel_values=pixels)
        else:
            both = torch_model(pixel_values=pixels, input_ids=torch.from_numpy(tokens).long())
            vision = both.vision_model_output
    outputs = {"image_tokens": vision.last_hidden_state}
    if tokens is not None:
        outputs |= {"image_embedding": both.image_embeds, "text_embedding": both.text_embeds}
        outputs["logits"] = both.logits_per_image
    elif model.config.image.pool == "map":
        outputs["image_embedding"] = torch.nn.functional.normalize(vision.pooler_output)
    return {name: tensor.numpy() for name, tensor in outputs.items()}


def _compare(expected: Outputs, found: Outputs) -> dict[str, float]:
    assert expected.keys() == found.keys(), (expected.keys(), found.keys())
    differences = {name: float(np.max(np.abs(expected[name] - found[name]))) for name in expected}
    for name, difference in differences.items():
        allowed = TOLERANCE * max(1.0, float(np.max(np.abs(expected[name]))))
        if not difference <= allowed:  # so that NaN fails
            raise ExportMismatch(
                f"the export's {name} differs from its source by {difference:.1e}, allowed is {allowed:.1e}"
            )
    return differences


@contextlib.contextmanager
def _new_beside(out: Path) -> Iterator[Path]:
    """A temporary folder where `out` will be; if the block fails, it and the parents made for it are gone again."""
    made = [folder for folder in out.absolute().parents if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        partial.chmod(0o755)
        yield partial
        made = []
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in made:
            folder.rmdir()


def _publish(partial: Path, out: Path) -> None:
    """Renames what was written; for an npz alone its config file, if it needs one, goes first."""
    if out.suffix != ".npz":
        os.rename(partial, out)
        return
    npz = partial / EXPORTED_NPZ
    if big_vision.sidecar(npz).exists():
        os.rename(big_vision.sidecar(npz), big_vision.sidecar(out))
    os.rename(npz, out)


def model_card(config: ModelConfig, *, format: Format, source: str) -> str:
    """The README.md of an export: what it is, what it wants to be fed, and how to call it."""
    image, text, (height, width) = config.image, config.text, config.image.image_size
    spec, (down, across) = image.spec, image.grid
    lines = [
        f"# SigLIP {'image and text towers' if text else 'image tower'}",
        "",
        f"Exported from `{Path(source).name}`. License: unknown; fill in the licence of the data and of the run.",
        "",
        "## Architecture",
        "",
        f"- image: ViT, width {spec.width}, depth {spec.depth}, MLP {spec.mlp_dim}, {spec.num_heads} heads, "
        f"patches of {image.patch[0]} x {image.patch[1]} px, {image.posemb} positions, pooling `{image.pool}`"
        + (f", linear head to {config.out_dim[0]}" if config.out_dim[0] else ""),
    ]
    if text:
        lines.append(
            f"- text: transformer, width {text.spec.width}, depth {text.spec.depth}, MLP {text.spec.mlp_dim}, "
            f"{text.spec.num_heads} heads, {text.vocab_size} pieces, pooling `{text.pool}`, "
            f"embedding {config.embedding_dims[1]}"
        )
    lines += [
        "",
        "## What it takes",
        "",
        f"- pictures: RGB, resized to {height} x {width} px (bilinear with antialias, the aspect ratio is not kept), "
        "then x / 127.5 - 1: values in [-1, 1]",
        f"- they become {down * across} tokens ({down} x {across}, row by row) of width {spec.width}",
    ]
    if text:
        lines.append(
            f"- texts: lower-cased, SentencePiece, cut to {text.length - 1} pieces, then filled up to exactly "
            f"{text.length} with the end token `</s>` (id 1); pads are attended to, there is no mask"
        )
        if format == "hf":
            warning = hugging_face.pipeline_length_warning(config)
            lines += [f"- note: {note}" for note in (_HF_PUNCTUATION, warning) if note]
    example = _HF_EXAMPLE if format == "hf" else _BIG_VISION_EXAMPLE
    return "\n".join([*lines, "", "## Example", "", example.format(height=height, width=width), ""])


_HF_PUNCTUATION = (
    "transformers' `SiglipTokenizer` also drops ASCII punctuation; `spiece.model` itself, on lower-cased text, gives "
    "the ids of training"
)

_BIG_VISION_EXAMPLE = """\
Run in this folder; `model.npz` also loads in big_vision, as `model.npz` or `model.npz:img`.

```python
import numpy as np
import siglip

model = siglip.load("model.npz")
pictures = np.zeros((1, {height}, {width}, 3), np.float32)
print(model.image_tokens(pictures).shape)
```"""

_HF_EXAMPLE = """\
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
```"""
