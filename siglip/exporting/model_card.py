"""The README.md of an export: what it is, where it comes from, what to feed it, how far it was checked, how to call it.

Its head is the YAML that model hubs read. What is not known is said to be unknown; the card does not guess.

The trap: what a consumer gets wrong most often is the range and resize of pixels, and the lower case, end token and padding of
texts. Every card spells them out.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from siglip.errors import UserError
from siglip.models.two_tower import ModelConfig
from siglip.models.vit import ImageConfig, PixelConfig
from siglip.workdir.files import CONFIG_FILE, read_config
from siglip.workdir.metrics import format_value, read_metrics
from siglip.workdir.report import final_results

_LOWER = {
    "text": "lower-cased as Python's `str.lower` does",
    "character": "every character lower-cased",
    "none": "capitals stay",
}
_HUB_LICENCES = (
    "apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "gpl-3.0", "gemma",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where a model comes from.

    Attributes:
        name: the name of the source.
        licence: an SPDX identifier or a name; None when the exporter was not told.
        config: the run's config.json, or {} when the source is not a run.
        results: the run's last evaluation, {task: {data set: {metric: value}}}.
        step: the checkpoint's step, or None.
    """

    name: str
    licence: str | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    results: Mapping[str, Mapping[str, Mapping[str, float]]] = dataclasses.field(default_factory=dict)
    step: int | None = None


def provenance(src: str | Path, *, licence: str | None = None) -> Provenance:
    """What the source itself tells of its origin."""
    # Orbax is slow to import, and only runs need it.
    from siglip.workdir import checkpoint

    path = Path(src).expanduser()
    found = checkpoint.locate(path) if path.is_dir() else None
    if found is None:
        return Provenance(path.resolve().name, licence)
    workdir, step = found
    config = read_config(workdir, fields=("data", "optim", "loss", "total_steps", "batch_size", "seed"))
    results = final_results([line for line in read_metrics(workdir) if line["step"] <= step])
    found = Provenance(workdir.resolve().name, licence, config, results, step)
    try:
        _recipe(found)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{workdir / CONFIG_FILE} is not the config of a run ({error!r}); restore it from a checkpoint's config/"
        ) from None
    return found


def model_card(
    config: ModelConfig,
    *,
    library: str,
    contract: Sequence[str],
    example: str,
    origin: Provenance,
    differences: Mapping[str, Mapping[str, float]],
    reader: str,
) -> str:
    """The card.

    Args:
        library: what loads the export, as model hubs call it.
        contract: the format's own lines on what to feed.
        example: text and code; HEIGHT, WIDTH and LENGTH become the model's numbers.
        differences: {inputs: {output: largest difference}}, as the export's own check found them.
        reader: what read it back for that check, with its version.
    """
    both = config.text is not None
    parts = [
        _front_matter(origin, library=library, both=both),
        f"# SigLIP {'image and text towers' if both else 'image tower'}",
        _origin(origin),
        "## Architecture\n\n" + _architecture(config),
        "## What it takes\n\n" + "\n".join([*_contract(config), *contract]),
        "## Data and recipe\n\n" + _recipe(origin),
        "## Evaluation\n\n" + _evaluation(origin),
        "## How far it was checked\n\n" + _differences(differences, reader),
        "## Example\n\n" + _example(config, example),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(origin: Provenance, *, library: str, both: bool) -> str:
    tag = "zero-shot-image-classification" if both else "image-feature-extraction"
    licence = f"license: {origin.licence}"
    if origin.licence not in _HUB_LICENCES:  # hubs know a list of identifiers; everything else is "other" with a name
        licence = f"license: other\nlicense_name: {json.dumps(origin.licence or 'unknown')}"
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


def _contract(config: ModelConfig) -> list[str]:
    image, text = config.image, config.text
    lines = [_naflex_contract(image)] if image.naflex else _images_contract(image)
    if text:
        lines.append(
            f"- texts: {_LOWER[text.tokens.lower]}, SentencePiece, cut to {text.length - text.tokens.end} pieces, then "
            f"{'the end token, ' if text.tokens.end else ''}filled up to exactly {text.length} with "
            + ("the end token itself" if text.tokens.pad_id is None else f"the id {text.tokens.pad_id}")
            + ("; punctuation is removed" if text.tokens.canonical == "texts" else "; punctuation stays")
            + ", pads are attended to, there is no mask"
        )
    return lines


def _images_contract(image: ImageConfig) -> list[str]:
    (height, width), (down, across) = image.image_size, image.grid
    return [
        f"- images: upright RGB, transparent parts over white, resized to {height} x {width} px ({image.pixels.resample} with "
        f"antialias, as Pillow does; the aspect ratio is not kept), then {_pixel_range(image.pixels)}",
        f"- they become {down * across} tokens ({down} x {across}, row by row) of width {image.spec.width}"
        + (", with a class token before them" if image.pool == "tok" else ""),
    ]


def _naflex_contract(image: ImageConfig) -> str:
    patch = " x ".join(map(str, image.patch))
    return (
        f"- images: upright RGB, transparent parts over white, resized once ({image.pixels.resample} with antialias, as Pillow "
        f"does) to whole patches of {patch} px, the largest grid of at most {image.naflex.patches} that keeps the aspect ratio "
        f"(SigLIP 2's search; up to {image.naflex.max_patches} can be asked for), then {_pixel_range(image.pixels)}; a patch is "
        f"(row, column, channel), patches come row by row, and what follows an image's last one is padding\n"
        f"- they become as many tokens of width {image.spec.width}; a mask tells padding, which means nothing"
    )


def _pixel_range(pixels: PixelConfig) -> str:
    scaled = "x / 127.5 - 1: values in [-1, 1]"
    if pixels.has_default_range:
        return scaled
    return f"{scaled}; inside, or in a preprocessor, (x / 255 - {pixels.mean}) / {pixels.std}"


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
    tables = []
    for task, results in sorted(origin.results.items()):
        metrics = list(dict.fromkeys(metric for _, found in sorted(results.items()) for metric in sorted(found)))
        rows = [
            [dataset, *(format_value(found.get(metric), rank=metric.endswith("_rank")) for metric in metrics)]
            for dataset, found in sorted(results.items())
        ]
        tables.append(_table([task, *(metric.replace("_", " ") for metric in metrics)], rows))
    return "\n\n".join(tables) or "None on record."


def _differences(differences: Mapping[str, Mapping[str, float]], reader: str) -> str:
    outputs = dict.fromkeys(name for found in differences.values() for name in found)
    rows = [
        [name, *(f"{found[name]:.1e}" if name in found else "" for found in differences.values())] for name in outputs
    ]
    table = _table(["largest difference from the source", *differences], rows)
    rounded = "rounding" in differences
    note = (
        " The weights are bfloat16; the source here is the rounded model, and `rounding` is what that changed."
        if rounded
        else ""
    )
    return f"Read back by {reader}, and fed the same inputs as its source.{note}\n\n{table}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def _example(config: ModelConfig, example: str) -> str:
    patch = math.prod(config.image.patch) * 3
    numbers = (*config.image.image_size, config.text.length if config.text else 0, patch)
    for name, number in zip(("HEIGHT", "WIDTH", "LENGTH", "PATCH"), numbers, strict=True):
        example = example.replace(name, str(number))
    return example.strip()
