"""`siglip eval`: a model and the data side joined into an embedder, with which evaluations are run."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import jax
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding

from data_pipelines.loader import make_eval_batches
from data_pipelines.sources.opening import open_source
from data_pipelines.text_ops import captions_of, field_names, lookup
from data_pipelines.tokenizers import SentencePieceTokenizer
from siglip.atomic import write_atomically
from siglip.cli import BAD_INPUT, describe
from siglip.cli.arguments import find_flag, parse
from siglip.cli.data_sets import complete, protocol
from siglip.errors import UserError
from siglip.evaluation.embed import Embedder, Params, Value, embeddings, rows_per_process
from siglip.evaluation.suite import run_tasks, task_classes
from siglip.model_source import read_model
from siglip.models.two_tower import ModelConfig, blank_images
from siglip.parallel import launch, sharding
from siglip.parallel.launch import DistributedConfig
from siglip.trees import did_you_mean
from siglip.workdir.metrics import CHANCE, error_of, format_value, short_name

TaskT = TypeVar("TaskT")
_LOOKED_AT_PAIRS = 100

USAGE = """usage: siglip eval SRC --task {names} --data SHARDS [flags]
       siglip eval SRC --suite FILE.yaml --out DIR [flags]

SRC is a run's workdir, a checkpoint inside it, a big_vision .npz, or a Hugging Face folder.
{tasks}
`siglip eval --task NAME --help` lists the flags of a task, `siglip eval --suite FILE --help` those of a suite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """A model and how it is run.

    Attributes:
        src: a run's workdir, a checkpoint inside it, a big_vision .npz, or a Hugging Face folder.
        batch_size: images or texts per forward pass, over all devices.
        threads: threads that decode images; 0 takes one per core that this process may use.
        workers: processes that decode images; with 0, threads alone do it.
        max_patches: of an image, for a NaFlex model; without one the model's own number.
        distributed: several processes as one job: flags for where its coordinator is not detected.
    """

    src: tyro.conf.Positional[str]
    batch_size: int = 256
    threads: int = 0
    workers: int = 0
    max_patches: int | None = None
    distributed: DistributedConfig = DistributedConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalArgs(ModelArgs, Generic[TaskT]):
    """Evaluate a model zero-shot.

    Attributes:
        task: the settings of the evaluation.
        tokenizer: SentencePiece model, when SRC does not bring one.
        out: file for the result as JSON; a table is printed in any case.
        pixels: squash resizes images whole; square875 and aspect75 are big_vision's: larger, and the centre cut out.
        max_patches: of an image, for a NaFlex model; with several numbers a row of the table for each.
    """

    task: tyro.conf.OmitArgPrefixes[TaskT]
    tokenizer: str | None = None
    out: str | None = None
    pixels: Literal["squash", "square875", "aspect75"] = "squash"
    max_patches: tuple[int, ...] = ()


def _columns(fields: Sequence[str]) -> set[str]:
    return {field.split(".")[0] for field in fields}


def first_values(data: str, fields: Sequence[str], *, image_column: str | None = None) -> dict[str, list[Value]]:
    """What some fields hold in the first pair of some shards that has one of them.

    Raises:
        FileNotFoundError, PermissionError, UserError: the shards cannot be opened, or none of the first pairs has any.
        OSError: none of the first pairs can be read.
    """
    source = open_source(data, image=image_column)
    if source.columns is not None:  # of tars only the pairs tell what fields there are
        source = open_source(data, image=image_column, fields=_columns(fields))
    count, there, lost = min(_LOOKED_AT_PAIRS, len(source)), set(source.columns or ()), []
    for index in range(count if fields else 0):
        try:
            record = source[index].fields
        except OSError as error:  # storage fails for a pair now and then
            lost.append(error)
            continue
        there.update(field_names(record))
        values = {field: values_of(record, field) for field in fields}
        if any(values.values()):
            return values
    if lost and len(lost) == count:
        raise lost[0]
    if fields:
        told = " or ".join(map(repr, fields))
        has = ", ".join(sorted(there)) or "no field"
        raise UserError(f"none of the first {count} pairs of {data} has {told}; they have {has}: name the right one")
    return {}


def completed(task: TaskT) -> TaskT:
    """The task with what its data tell of themselves, after its check. Raises as `complete` and the task's `check` do."""
    task = complete(task)
    task.check(functools.partial(first_values, image_column=task.image_column))
    return task


def values_of(record: Mapping[str, Any], field: str) -> list[Value]:
    """Captions, or labels, that a field of a pair holds: texts and numbers; whatever else is in a column becomes a text."""
    texts = captions_of(record, field)
    if texts:
        return texts
    value = lookup(record, field)
    values = value if isinstance(value, list | tuple) else [value]
    return [_plain(v) for v in values if v is not None and not isinstance(v, str | Mapping)]


def _plain(value: Any) -> Value:
    if isinstance(value, int | float):
        return value
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def embedder_of(src: str | Path, *, tokenizer: str | None = None, with_texts: bool = True, **settings: Any) -> Embedder:
    """The model at SRC on all devices of this job.

    Args:
        with_texts: whether texts will be embedded: then the model must have a text tower and a tokenizer.
        settings: batch_size, threads, workers, pixels and max_patches, as for `make_embedder`.

    Raises:
        FileNotFoundError, UserError: it is not a model, or lacks what is needed.
    """
    if with_texts:
        params, config, pieces = read_for_texts(src, tokenizer)
    else:
        params, config, pieces = *read_model(src, only_image=True)[:2], None
        _check_pools(config)
    mesh = sharding.make_mesh(sharding.MeshConfig())
    params = jax.device_put(params, NamedSharding(mesh, sharding.P_REPLICATED))
    return make_embedder(params, config, mesh=mesh, tokenizer=pieces, **settings)


def read_for_texts(
    src: str | Path, tokenizer: str | None, *, needed: bool = True
) -> tuple[dict[str, Any], ModelConfig, SentencePieceTokenizer | None]:
    """Both towers of a model on no device yet, and its tokenizer, or the one named. Raises as `embedder_of`.

    Args:
        needed: whether a model without a text tower or a tokenizer is refused; else the tokenizer is None then.
    """
    params, config, own_tokenizer = read_model(src)
    path = tokenizer or own_tokenizer
    _check_pools(config)
    if not needed and (config.text is None or path is None):
        return params, config, None
    if config.text is None:
        raise UserError("the model has no text tower, so it cannot be evaluated zero-shot; export it with --tower both")
    if path is None:
        raise UserError("the model brings no tokenizer; name its SentencePiece model with --tokenizer FILE")
    return params, config, SentencePieceTokenizer(str(path), **vars(config.text.tokens))


def _check_pools(config: ModelConfig) -> None:
    if config.image.pool == "none":
        raise UserError(
            "this image tower has no pooling, so an image has no embedding; siglip.load(SRC) gives image_tokens"
        )


def make_embedder(
    params: Params,
    config: ModelConfig,
    *,
    mesh: Mesh,
    tokenizer: SentencePieceTokenizer | None,
    batch_size: int = 256,
    threads: int = 0,
    workers: int = 0,
    pixels: str = "squash",
    max_patches: int | None = None,
) -> Embedder:
    """Parameters on a mesh, and how the data side reads shards and tokenizes, as an embedder. Settings: see `EvalArgs`."""
    if batch_size < 1 or threads < 0 or workers < 0:
        raise UserError(
            f"batch_size={batch_size} must be at least 1, threads={threads} and workers={workers} at least 0"
        )
    image, rows = config.image, rows_per_process(batch_size, mesh)
    image_size, resample = image.image_size, image.pixels.resample
    max_patches = _max_patches(config, max_patches)
    patches = None
    if max_patches is not None:
        from data_pipelines.samples.patches import Patches  # it imports Pillow

        if pixels != "squash":
            raise UserError(f"--pixels {pixels} is for images of one size; a NaFlex model keeps their aspect ratio")
        patches = Patches(image.patch, max_patches, resample=resample, exact=True)

    def tokenize(texts: Sequence[str]) -> np.ndarray:
        length = config.text.length
        return np.array([tokenizer.encode(text, length) for text in texts], np.int32).reshape(-1, length)

    def read(data: Any, fields: Sequence[str], *, image_column: str | None = None, **more: Any) -> tuple[int, Any]:
        columns = _columns([*fields, more["mask"]] if "mask" in more else fields)
        source = open_source(data, image=image_column, fields=columns) if isinstance(data, str) else data
        return len(source), make_eval_batches(
            source, batch_size=rows, image_size=image_size, resample=resample, protocol=pixels, patches=patches,
            threads=threads, workers=workers, fields=columns,
            process_index=jax.process_index(), process_count=jax.process_count(), **more,
        )  # fmt: skip

    def at_length(n: int) -> Embedder:
        settings = {"batch_size": batch_size, "threads": threads, "workers": workers}
        return make_embedder(params, config, mesh=mesh, tokenizer=tokenizer, max_patches=n, **settings)

    return Embedder(
        functools.partial(embeddings, config, params),
        mesh=mesh, rows=rows, image_size=image_size, patch_px=image.patch, resample=resample, max_patches=max_patches,
        no_images=blank_images(image, 0, patches=max_patches),
        canonical_prompts=config.text is not None and config.text.tokens.canonical != "none",
        tokenize=tokenize, read=read, values_of=values_of, at_length=at_length, **_scale_of(params, config),
    )  # fmt: skip


def _max_patches(config: ModelConfig, max_patches: int | None) -> int | None:
    """Of an image: what is asked for, or the model's own number; None of a tower for images of one size."""
    naflex, (height, width) = config.image.naflex, config.image.image_size
    if naflex is not None:
        return naflex.check_length(naflex.patches if max_patches is None else max_patches, "--max-patches")
    if max_patches is not None:
        raise UserError(
            f"--max-patches {max_patches} is for NaFlex models; this one takes images of {height} x {width} px"
        )
    return None


def _scale_of(params: Params, config: ModelConfig) -> dict[str, float]:
    """What makes logits of cosines, where the model has both towers."""
    if config.text is None:
        return {}
    t, b = (float(np.asarray(params[name]).reshape(())) for name in ("t", "b"))
    return {"temperature": float(np.exp(t)), "bias": b}


def settings_of(options: Any) -> dict[str, Any]:
    """What `make_embedder` takes of `ModelArgs`, or of a recipe's `EvalConfig`."""
    names = ("batch_size", "threads", "workers", "max_patches")
    return {name: getattr(options, name) for name in names if hasattr(options, name)}


def eval_command(args: list[str]) -> None:
    """Prints a table; writes the JSON when asked."""
    if find_flag(args, "--suite") is not None:
        from siglip.cli.suites import suite_command

        return suite_command(args)
    classes = task_classes()
    name = find_flag(args, "--task")
    if name is None and ("-h" in args or "--help" in args):
        tasks = "\n".join(f"  {kind:10}  {(cls.__doc__ or '').partition('.')[0]}" for kind, cls in classes.items())
        print(USAGE.format(names="|".join(classes), tasks=tasks))
        return
    if name not in classes:
        hint = did_you_mean(name or "", classes) or f"; there are {', '.join(classes)}"
        raise UserError(f"unknown task {name!r}{hint}" if name else f"no task given; add --task {'|'.join(classes)}")
    options = parse(EvalArgs[classes[name]], args, prog="siglip eval")
    with launch.joined(options.distributed, describe=describe):
        if options.out is not None:
            check_folder_of(Path(options.out))
        settings = settings_of(options) | {"pixels": options.pixels}
        texts = classes[name].EMBEDS_TEXTS
        settings["max_patches"] = next(iter(options.max_patches), None)
        embedder = embedder_of(options.src, tokenizer=options.tokenizer, with_texts=texts, **settings)
        others = [embedder.with_max_patches(n) for n in options.max_patches[1:]]
        task = completed(options.task)
        found = [(one, result) for one in (embedder, *others) for result in run_tasks([task], one)]
        if jax.process_index():
            return
        name_of = lambda one, result: result.dataset + (f" @{one.max_patches}" if others else "")  # noqa: E731
        print(format_table({name_of(one, result): result.metrics for one, result in found}))
        lengths = [str(one.max_patches) for one in (embedder, *others) if one.max_patches is not None]
        size = f"at most {', '.join(lengths)} patches" if lengths else " x ".join(map(str, embedder.image_size))
        prepared = {"size": size, "resample": embedder.resample}
        print(protocol(task, pixels=options.pixels, **prepared, canonical=embedder.canonical_prompts))
        if options.out is not None:
            results = [r.to_clip_benchmark(options.src) | _length_of(one) for one, r in found]
            write_atomically(Path(options.out), json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def _length_of(embedder: Embedder) -> dict[str, int]:
    return {} if embedder.max_patches is None else {"max_patches": embedder.max_patches}


def format_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Rows of metrics as aligned text, ± their standard errors; columns in the order in which they first appear, without those
    of chance levels."""
    names = dict.fromkeys(name for row in rows.values() for name in row)
    errors = {error_of(name) for name in names} & set(names)
    columns = {"": [*rows]}
    for name in names:
        if name in errors or name.endswith(CHANCE):
            continue
        cells = [format_value(row.get(name), rank="rank" in name) for row in rows.values()]
        if error_of(name) in errors:
            own = (row.get(error_of(name)) for row in rows.values())
            cells = [
                f"{cell} {'' if e is None else f'±{format_value(e)}':6}" for cell, e in zip(cells, own, strict=True)
            ]
        columns[short_name(name)] = cells
    widths = [max(map(len, [head, *cells, " " * 8 * bool(head)])) for head, cells in columns.items()]
    lines = zip(*([head, *cells] for head, cells in columns.items()), strict=True)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if n else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def check_folder_of(out: Path) -> None:
    """Raises FileNotFoundError in every process if process 0, which writes `out`, does not see its folder."""

    def check() -> None:
        if jax.process_index() == 0 and not out.absolute().parent.is_dir():
            raise FileNotFoundError(f"the folder {out.parent} of --out does not exist; make it first")

    launch.in_all_or_none(check, bad_input=BAD_INPUT)
