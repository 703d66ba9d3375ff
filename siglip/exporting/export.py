"""Exports: write, read back, compare, and only then let the folder appear under its name.

What was written is read back by the reader that its users have (Hugging Face's by `transformers` where that is installed) and
fed noise and, where the caller has them, real images and texts. A new format is a module of siglip.formats and a line in FORMATS.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from siglip import __version__
from siglip.atomic import new_folder
from siglip.encoder import Encoder
from siglip.errors import UserError
from siglip.exporting.model_card import model_card, provenance
from siglip.exporting.verification import compare, expected_outputs, largest_difference, model_outputs, random_inputs
from siglip.formats import big_vision, hf_export, saved_model, stablehlo
from siglip.formats.export_format import Dtype, ExportFormat, Inputs, Layout, Outputs
from siglip.model_source import read_model
from siglip.models.two_tower import ModelConfig

FORMATS = {
    "hf": hf_export.EXPORT,
    "bigvision": big_vision.EXPORT,
    "stablehlo": stablehlo.EXPORT,
    "savedmodel": saved_model.EXPORT,
}
_ONLY_BY_US = "verified with our own reader only; for {}: pip install 'siglip-stage0[interop]'"
Tower = Literal["image", "both"]
Samples = Callable[[ModelConfig, Path | None], Inputs]


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written and how far it is from its source.

    Attributes:
        path: the folder, or the npz.
        differences: {inputs: {output: largest absolute difference}}; inputs are "random" and "sample". Under "rounding": what
            rounding the weights changed, with the inputs "random".
        verified: whether the reader that its users have read it back; False when that one is not installed.
        message: one line for a person, warnings included.
    """

    path: Path
    differences: dict[str, dict[str, float]]
    verified: bool
    message: str


def export(
    src: str | Path,
    *,
    format: str,
    out: str | Path,
    tower: Tower = "image",
    image_size: int | tuple[int, int] | None = None,
    patch_size: int | tuple[int, int] | None = None,
    head: bool = True,
    layout: Layout = "loop",
    dtype: Dtype = "float32",
    shard_bytes: int | None = None,
    licence: str | None = None,
    samples: Samples | None = None,
) -> ExportReport:
    """Writes a model in another format, verified.

    Args:
        src: any source that `siglip.load` reads.
        format: one of `FORMATS`.
        out: the folder to make, or with "bigvision" an .npz; must not exist yet.
        tower: the image tower alone, or both.
        image_size, patch_size: pixels; positions and the patch kernel are resampled. None keeps the source's.
        head: False leaves the pooling head away, which a vision-language model does not use; for the image tower alone.
        layout: for "bigvision": blocks one by one, or stacked.
        dtype: of the weights in the file; "bfloat16" only with "hf". The rounded model is then compared; the report says what
            rounding changed.
        shard_bytes: for "hf": the weights in several files of at most so many bytes, with an index; None: in one.
        licence: for the model card.
        samples: (config, tokenizer file) -> real images and texts as our pipeline prepares them, to compare with as well.
            "savedmodel" needs them: it takes encoded images and raw texts, which this package does not prepare.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError: there is nothing at `src`.
        UserError: the format cannot express this model.
        ExportMismatch: the written file does not give the same outputs; nothing is left of it.
    """
    out = Path(out).expanduser()
    chosen = _check_request(out, src, format=format, tower=tower, layout=layout, dtype=dtype, samples=samples)
    options = _options(chosen, layout=layout, dtype=dtype, shard_bytes=shard_bytes)
    params, config, tokenizer = _model(src, tower=tower, head=head, image_size=image_size, patch_size=patch_size)
    params, differences = (params, {}) if dtype == "float32" else _rounded(params, config)
    known = (config, tokenizer is not None)
    verified = all(find_spec(package) for package in chosen.needs)
    with new_folder(out, publish=_publish_npz if out.suffix == ".npz" else os.rename) as partial:
        chosen.write(partial, params, config, tokenizer=tokenizer, **options)
        cases = _cases(chosen, config, tokenizer, samples)
        expected = [expected_outputs(Encoder(params, config), case) for case in cases]
        del params  # held once while they are written, and once while they are read back
        found = _read_back(chosen if verified else None, partial, cases)
        differences |= {case.name: compare(*pair) for case, *pair in zip(cases, expected, found, strict=True)}
        card = model_card(
            config, library=chosen.library, origin=provenance(src, licence=licence), differences=differences,
            contract=chosen.contract(*known), example=chosen.example(*known), reader=_reader(chosen, verified),
        )  # fmt: skip
        (partial / "README.md").write_text(card)
    warnings = [*chosen.warnings(*known)] + ([] if verified else [_ONLY_BY_US.format(chosen.library)])
    return ExportReport(out, differences, verified, _message(out, differences, warnings))


def _cases(chosen: ExportFormat, config: ModelConfig, tokenizer: Path | None, samples: Samples | None) -> list[Inputs]:
    """What the source and its export are compared on: noise, which has no encoded files, and the caller's samples."""
    noise = [] if chosen.takes_files else [random_inputs(config)]
    return noise + ([] if samples is None else [samples(config, tokenizer)])


def _read_back(chosen: ExportFormat | None, folder: Path, cases: Sequence[Inputs]) -> list[Outputs]:
    """What the format's own library, or without one our reader, makes of the cases."""
    if chosen is not None and chosen.outputs:
        return chosen.outputs(folder, cases)
    model = Encoder(*read_model(folder)[:2])
    return [model_outputs(model, case) for case in cases]


def _rounded(params: Mapping[str, Any], config: ModelConfig) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """The parameters as bfloat16 holds them, but for temperature and bias, two numbers that every logit depends on; and what that
    changes, {"rounding": {output: largest difference}}."""
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16).astype(np.float32), params)
    rounded |= {name: params[name] for name in ("t", "b") if name in params}
    before, after = (model_outputs(Encoder(tree, config), random_inputs(config)) for tree in (params, rounded))
    return rounded, {"rounding": {name: largest_difference(before[name], after[name]) for name in before}}


def _reader(chosen: ExportFormat, verified: bool) -> str:
    """What has read the export back, with its version."""
    if not (chosen.outputs and verified):
        alone = "" if verified else f" alone, not by {chosen.library}"
        return f"siglip-stage0 {__version__}{alone}"
    return " and ".join(f"{name} {version(name)}" for name in chosen.needs or (chosen.library,))


def _message(out: Path, differences: Mapping[str, Mapping[str, float]], warnings: Sequence[str]) -> str:
    differences = dict(differences)
    rounding = differences.pop("rounding", {})
    worst = max(value for found in differences.values() for value in found.values())
    count = len({name for found in differences.values() for name in found})
    told = [f"wrote {out}: {count} outputs agree, largest difference {worst:.1e}"]
    told += [f"rounding changes the outputs by up to {max(rounding.values()):.1e}"] if rounding else []
    return "; ".join([*told, *warnings])


def _check_request(
    out: Path, src: str | Path, *, format: str, tower: Tower, layout: Layout, dtype: Dtype, samples: Samples | None
) -> ExportFormat:
    if format not in FORMATS:
        raise UserError(f"format={format!r} is not one of {', '.join(FORMATS)}")
    chosen = FORMATS[format]
    for name, value, choices in (
        ("tower", tower, get_args(Tower)),
        ("layout", layout, chosen.layouts),
        ("dtype", dtype, chosen.dtypes),
    ):
        if value not in choices:
            raise UserError(f"{name}={value!r}: --format {format} has {', '.join(choices)}; take one of these")
    if out.suffix == ".npz" and chosen is not big_vision.EXPORT:
        raise UserError(f"--out {out}: only --format bigvision writes a lone npz; name a folder")
    # A config file that is left from another npz would be believed.
    for path in (out, big_vision.sidecar(out)) if out.suffix == ".npz" else (out,):
        if path.exists():
            raise FileExistsError(f"{str(path)!r} exists; export to a new name, or remove it first")
    if chosen.takes_files and samples is None:
        raise UserError(f"{format} takes encoded images and raw texts, so it is verified with some: pass samples=…")
    _check_place(out, big_vision.split_subtree(src)[0])
    return chosen


def _options(chosen: ExportFormat, *, layout: Layout, dtype: Dtype, shard_bytes: int | None) -> dict[str, Any]:
    """Arguments of `chosen.write`."""
    if shard_bytes is not None and (shard_bytes < 1 or not chosen.has_shards):
        raise UserError(
            f"shard_bytes={shard_bytes} must be a positive number, and only --format hf has it; leave it out"
        )
    options = {"layout": layout} | ({"dtype": dtype} if len(chosen.dtypes) > 1 else {})
    return options | ({"shard_bytes": shard_bytes} if chosen.has_shards else {})


def _check_place(out: Path, src: Path) -> None:
    """Raises UserError if `out` lies inside the source or inside a run, which are copied, resumed and deleted as a whole."""
    # Orbax is slow to import, and an export that is refused for its flags does not need it.
    from siglip.workdir.checkpoint import run_of

    for folder in reversed(out.resolve().parents):  # a run before the checkpoint inside it
        if run_of(folder) or folder == src.resolve():
            raise UserError(
                f"--out {out} lies inside the model {folder}; name a folder elsewhere, such as {folder}-{out.name}"
            )


def _model(
    src: str | Path, *, tower: Tower, head: bool, **sizes: Any
) -> tuple[dict[str, Any], ModelConfig, Path | None]:
    """The model to export, in float32: what is compared must not be the rounding of bfloat16."""
    params, config, tokenizer = read_model(src, only_image=tower == "image", **sizes)
    if tower == "both" and config.text is None:
        raise UserError("the source has only the image tower; export with --tower image")
    if tower == "both" and not head:
        raise UserError("without its pooling head the image tower has no embedding for texts; use --tower image")
    tokenizer = tokenizer if tower == "both" else None
    if not head:
        params, config = big_vision.without_head(params, config)
    exact = {"dtype": "float32", "residual_dtype": "float32", "remat": "none"}
    image = dataclasses.replace(config.image, **exact)
    text = config.text and dataclasses.replace(config.text, **exact)
    return params, dataclasses.replace(config, image=image, text=text), tokenizer


def _publish_npz(partial: Path, out: Path) -> None:
    """The file alone; its config file, if it needs one, goes first, so that the npz is never read without."""
    npz, described = partial / big_vision.EXPORTED_NPZ, big_vision.sidecar(partial / big_vision.EXPORTED_NPZ).exists()
    if described:
        os.rename(big_vision.sidecar(npz), big_vision.sidecar(out))
    try:
        os.rename(npz, out)
    except OSError:
        if described:
            big_vision.sidecar(out).unlink()
        raise
