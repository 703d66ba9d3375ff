"""Exports: write, read back, compare, and only then let the folder appear under its name.

What was written is read back the way its users will read it (Hugging Face's by `transformers` where that is installed) and fed
noise and, where the caller has them, real images and texts (siglip/exporting/verification.py). A failed export leaves nothing
behind.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from siglip.atomic import new_folder
from siglip.encoder import Encoder
from siglip.errors import UserError
from siglip.exporting import verification
from siglip.exporting.model_card import Format, model_card, provenance
from siglip.exporting.verification import Inputs, Outputs, compare, expected_outputs, model_outputs, random_inputs
from siglip.formats import big_vision, hugging_face, saved_model, stablehlo
from siglip.formats.hf_tokenizer.convert import read_sentencepiece
from siglip.model_source import EXPORTED_NPZ, read_model
from siglip.models.two_tower import ModelConfig

Tower = Literal["image", "both"]
Layout = Literal["loop", "scan"]
Samples = Callable[[ModelConfig, Path | None], Inputs]


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written and how far it is from its source.

    Attributes:
        path: the folder, or the npz.
        differences: {inputs: {output: largest absolute difference}}; inputs are "random" and "sample".
        verified: whether the reader its users have read it back; False when `transformers` is not installed.
        message: one line for a person, warnings included.
    """

    path: Path
    differences: dict[str, dict[str, float]]
    verified: bool
    message: str


def export(
    src: str | Path,
    *,
    format: Format,
    out: str | Path,
    tower: Tower = "image",
    image_size: int | tuple[int, int] | None = None,
    patch_size: int | tuple[int, int] | None = None,
    head: bool = True,
    layout: Layout = "loop",
    licence: str | None = None,
    samples: Samples | None = None,
) -> ExportReport:
    """Writes a model in another format, verified.

    Args:
        src: any source that `siglip.load` reads.
        format: "bigvision" (a folder with model.npz, or the npz alone when `out` ends in .npz), "hf", "stablehlo" or
            "savedmodel".
        out: where to; must not exist yet.
        tower: the image tower alone, or both.
        image_size, patch_size: pixels; positions and the patch kernel are resampled. None keeps the source's.
        head: False leaves the pooling head away, which a vision-language model has no use for; of the image tower alone.
        layout: of "bigvision": blocks one by one, or stacked.
        licence: for the model card.
        samples: (config, tokenizer file) -> real pictures and texts as our pipeline prepares them, to compare with as well.
            "savedmodel" with both towers needs them: it takes texts, and tokenizing is no part of this package.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError: there is nothing at `src`.
        ValueError: the format cannot express this model.
        ExportMismatch: the written file does not give the same outputs; nothing is left of it.
    """
    out = Path(out)
    _check_request(out, format=format, tower=tower, layout=layout, samples=samples)
    params, config, tokenizer = _model(src, tower=tower, head=head, image_size=image_size, patch_size=patch_size)
    _check_model(src, config, tokenizer, format=format)
    # Noise as encoded files would be another question: what takes files is asked with real ones only.
    cases = [] if format == "savedmodel" else [random_inputs(config)]
    cases += [] if samples is None else [samples(config, tokenizer)]
    model = Encoder(params, config)
    expected = [expected_outputs(model, case) for case in cases]
    del model  # Weights are held once while they are written, and once while they are read back.
    with new_folder(out, publish=_publish_npz if out.suffix == ".npz" else os.rename) as partial:
        written = _write(partial, params, config, tokenizer, format=format, layout=layout)
        del params
        found = written.read_back(cases)
        differences = {case.name: compare(*pair) for case, *pair in zip(cases, expected, found, strict=True)}
        origin = provenance(src, licence=licence)
        card = model_card(
            config, format=format, origin=origin, differences=differences, has_tokenizer=tokenizer is not None
        )
        (partial / "README.md").write_text(card)
    worst = max(value for found in differences.values() for value in found.values())
    count = len({name for found in differences.values() for name in found})
    message = f"wrote {out}: {count} outputs agree, largest difference {worst:.1e}"
    return ExportReport(out, differences, written.verified, "; ".join(filter(None, (message, *written.warnings))))


def _check_request(out: Path, *, format: Format, tower: Tower, layout: Layout, samples: Samples | None) -> None:
    for name, value, choices in (("format", format, Format), ("tower", tower, Tower), ("layout", layout, Layout)):
        if value not in get_args(choices):
            raise UserError(f"{name}={value!r} is none of {', '.join(get_args(choices))}")
    if out.suffix == ".npz" and format != "bigvision":
        raise UserError(f"--out {out}: only --format bigvision writes a lone npz; name a folder")
    # A config file that is left from another npz would be believed.
    for path in (out, big_vision.sidecar(out)) if out.suffix == ".npz" else (out,):
        if path.exists():
            raise FileExistsError(f"{str(path)!r} exists; export to a new name, or remove it first")
    if format == "savedmodel" and samples is None:
        raise UserError(
            "a SavedModel takes encoded pictures and raw texts, so it is verified with some: pass samples=…"
        )


def _check_model(src: str | Path, config: ModelConfig, tokenizer: Path | None, *, format: Format) -> None:
    if format == "hf":
        hugging_face.check_expressible(config)
    if config.text is None:
        return
    if tokenizer is None and format == "savedmodel":
        raise UserError(
            f"{str(src)!r} has no tokenizer, and a SavedModel takes raw text; put spiece.model beside it, or use --tower image"
        )
    if tokenizer is not None and format != "stablehlo":
        pieces, room = (
            len(read_sentencepiece(tokenizer.read_bytes(), source=str(tokenizer)).pieces),
            config.text.vocab_size,
        )
        if pieces > room:
            raise UserError(
                f"tokenizer {tokenizer} has {pieces} pieces, the text tower room for {room}; put its own there"
            )


def _model(
    src: str | Path, *, tower: Tower, head: bool, **sizes: Any
) -> tuple[dict[str, Any], ModelConfig, Path | None]:
    """The model to export, in float32: what is compared must not be the rounding of bfloat16."""
    params, config, tokenizer = read_model(src, **sizes)
    if tower == "both" and config.text is None:
        raise UserError("the source has only the image tower; export with --tower image")
    if tower == "both" and not head:
        raise UserError("without its pooling head the image tower has no embedding for texts; use --tower image")
    if tower == "image":
        params, config, tokenizer = {"img": params["img"]}, big_vision.image_only(config), None
    if not head:
        params, config = big_vision.without_head(params, config)
    image = dataclasses.replace(config.image, dtype="float32", remat="none")
    text = config.text and dataclasses.replace(config.text, dtype="float32", remat="none")
    return params, dataclasses.replace(config, image=image, text=text), tokenizer


@dataclasses.dataclass(frozen=True)
class _Written:
    """How to read back what was written."""

    read_back: Callable[[Sequence[Inputs]], list[Outputs]]
    verified: bool = True
    warnings: tuple[str, ...] = ()


def _write(
    folder: Path,
    params: Mapping[str, Any],
    config: ModelConfig,
    tokenizer: Path | None,
    *,
    format: Format,
    layout: Layout,
) -> _Written:
    match format:
        case "bigvision":
            npz = folder / EXPORTED_NPZ
            big_vision.write(npz, params, config, layout=layout)
            if tokenizer:
                (folder / hugging_face.TOKENIZER_FILE).write_bytes(tokenizer.read_bytes())
            return _Written(lambda cases: _own_outputs(npz, cases))
        case "hf":
            hugging_face.write(folder, params, config, tokenizer=tokenizer)
            return _hugging_face_written(folder, config, tokenizer)
        case "stablehlo":
            stablehlo.write(folder, params, config)
            return _Written(lambda cases: [stablehlo.outputs(folder, case.images, case.tokens) for case in cases])
        case "savedmodel":
            saved_model.write(folder, params, config, tokenizer=tokenizer)
            return _Written(lambda cases: [saved_model.outputs(folder, case.files, case.texts) for case in cases])


def _hugging_face_written(folder: Path, config: ModelConfig, tokenizer: Path | None) -> _Written:
    warnings = [hugging_face.pipeline_length_warning(config)]
    if config.text is not None and tokenizer is None:
        warnings.append("the source has no tokenizer, so the folder has none")
    if find_spec("transformers") and find_spec("torch"):
        pooled = config.image.pool == "map"
        return _Written(
            lambda cases: verification.transformers_outputs(folder, cases, pooled=pooled), warnings=tuple(warnings)
        )
    warnings.append("verified with our own reader only; for transformers: pip install 'siglip-stage0[interop]'")
    return _Written(lambda cases: _own_outputs(folder, cases), verified=False, warnings=tuple(warnings))


def _own_outputs(src: Path, cases: Sequence[Inputs]) -> list[Outputs]:
    params, config, _ = read_model(src)
    model = Encoder(params, config)
    return [model_outputs(model, case) for case in cases]


def _publish_npz(partial: Path, out: Path) -> None:
    """The file alone; its config file, if it needs one, goes first, so that the npz is never read without."""
    npz, described = partial / EXPORTED_NPZ, big_vision.sidecar(partial / EXPORTED_NPZ).exists()
    if described:
        os.rename(big_vision.sidecar(npz), big_vision.sidecar(out))
    try:
        os.rename(npz, out)
    except OSError:
        if described:
            big_vision.sidecar(out).unlink()
        raise
