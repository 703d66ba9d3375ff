"""`siglip eval` and `siglip embed`: a model and the data side joined into an embedder, with which evaluations are run."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding

from data_pipelines.loader import make_eval_batches
from data_pipelines.sources.opening import open_source
from data_pipelines.text_ops import captions_of, lookup
from data_pipelines.tokenizers import SentencePieceTokenizer
from siglip.atomic import new_file, write_atomically
from siglip.cli import BAD_INPUT, describe
from siglip.cli.arguments import find_flag, parse
from siglip.errors import UserError
from siglip.evaluation.embed import Embedder, Params, Value, embeddings, rows_per_process
from siglip.evaluation.suite import run_tasks, task_classes
from siglip.model_source import read_model
from siglip.models.two_tower import ModelConfig
from siglip.parallel import launch, sharding
from siglip.parallel.launch import DistributedConfig
from siglip.trees import did_you_mean
from siglip.workdir.metrics import format_value, short_name

TaskT = TypeVar("TaskT")
_LOOKED_AT_PAIRS = 100

USAGE = """usage: siglip eval SRC --task {names} --data SHARDS [flags]

SRC is a run's workdir, a checkpoint inside it, a big_vision .npz, or a Hugging Face folder.
{tasks}
`siglip eval --task NAME --help` lists the flags of a task."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """A model and how it is run.

    Attributes:
        src: a run's workdir, a checkpoint inside it, a big_vision .npz, or a Hugging Face folder.
        batch_size: images or texts per forward pass, over all devices.
        threads: threads that decode images; 0 takes one per core that this process may use.
        workers: processes that decode images; with 0, threads alone do it.
        image: column of the images, where the shards have several or it has another name than usual; tars have none.
        distributed: several processes as one job: flags for where its coordinator is not detected.
    """

    src: tyro.conf.Positional[str]
    batch_size: int = 256
    threads: int = 0
    workers: int = 0
    image: str | None = None
    distributed: DistributedConfig = DistributedConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalArgs(ModelArgs, Generic[TaskT]):
    """Evaluate a model zero-shot.

    Attributes:
        task: the settings of the evaluation.
        tokenizer: SentencePiece model, when SRC does not bring one.
        out: file for the result as JSON; a table is printed in any case.
    """

    task: tyro.conf.OmitArgPrefixes[TaskT]
    tokenizer: str | None = None
    out: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedArgs(ModelArgs):
    """Embed every image of some shards.

    Attributes:
        data: shards, as for training: tar files as img2dataset writes them, Parquet, ArrayRecord, TFRecord, lists.
        out: FILE.npz or FILE.parquet; columns `key` and `embedding` (float32, L2-normalised).
    """

    data: str
    out: str


def _columns(fields: Sequence[str]) -> set[str]:
    return {field.split(".")[0] for field in fields}


def first_values(data: str, fields: Sequence[str]) -> dict[str, list[Value]]:
    """What some fields hold in the first pair of some shards that has one of them, among the first `_LOOKED_AT_PAIRS`."""
    source = open_source(data)
    if source.columns is not None:  # of tars only the pairs tell what fields there are
        source = open_source(data, fields=_columns(fields))
    values: dict[str, list[Value]] = {}
    for index in range(min(_LOOKED_AT_PAIRS, len(source))):
        with contextlib.suppress(OSError):  # storage fails for a pair now and then
            values = {field: values_of(source[index].fields, field) for field in fields}
        if any(values.values()):
            return values
    return dict.fromkeys(fields, []) | values


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
        settings: batch_size, threads, workers and image, as for `make_embedder`.

    Raises:
        FileNotFoundError, UserError: it is not a model, or lacks what is needed.
    """
    params, config, own_tokenizer = read_model(src, only_image=not with_texts)
    path = tokenizer or own_tokenizer
    if config.image.pool == "none":
        raise UserError(
            "this image tower has no pooling, so an image has no embedding; siglip.load(SRC) gives image_tokens"
        )
    if with_texts and config.text is None:
        raise UserError("the model has no text tower, so it cannot be evaluated zero-shot; export it with --tower both")
    if with_texts and path is None:
        raise UserError("the model brings no tokenizer; name its SentencePiece model with --tokenizer FILE")
    mesh = sharding.make_mesh(sharding.MeshConfig())
    params = jax.device_put(params, NamedSharding(mesh, sharding.P_REPLICATED))
    pieces = SentencePieceTokenizer(str(path), **vars(config.text.tokens)) if with_texts else None
    return make_embedder(params, config, mesh=mesh, tokenizer=pieces, **settings)


def make_embedder(
    params: Params,
    config: ModelConfig,
    *,
    mesh: Mesh,
    tokenizer: SentencePieceTokenizer | None,
    batch_size: int = 256,
    threads: int = 0,
    workers: int = 0,
    image: str | None = None,
) -> Embedder:
    """Parameters on a mesh, and how the data side reads shards and tokenizes, as an embedder. Settings: see `ModelArgs`."""
    if batch_size < 1 or threads < 0 or workers < 0:
        raise UserError(
            f"batch_size={batch_size} must be at least 1, threads={threads} and workers={workers} at least 0"
        )
    rows, image_size, resample = (
        rows_per_process(batch_size, mesh),
        config.image.image_size,
        config.image.pixels.resample,
    )

    def tokenize(texts: Sequence[str]) -> np.ndarray:
        length = config.text.length
        return np.array([tokenizer.encode(text, length) for text in texts], np.int32).reshape(-1, length)

    def read(data: str, fields: Sequence[str]) -> tuple[int, Any]:
        columns = _columns(fields)
        source = open_source(data, fields=columns, image=image)
        return len(source), make_eval_batches(
            source, batch_size=rows, image_size=image_size, resample=resample, threads=threads, workers=workers,
            fields=columns, process_index=jax.process_index(), process_count=jax.process_count(),
        )  # fmt: skip

    return Embedder(
        functools.partial(embeddings, config, params),
        mesh=mesh, rows=rows, image_size=image_size, resample=resample,
        canonical_prompts=config.text is not None and config.text.tokens.canonical != "none",
        tokenize=tokenize, read=read, values_of=values_of,
    )  # fmt: skip


def settings_of(options: Any) -> dict[str, Any]:
    """What `make_embedder` takes of `ModelArgs`, or of a recipe's `EvalConfig`, whose shards have the usual names."""
    settings = {"batch_size": options.batch_size, "threads": options.threads, "workers": options.workers}
    return settings | {"image": getattr(options, "image", None)}


def eval_command(args: list[str]) -> None:
    """Prints a table; writes the JSON when asked."""
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
            _check_folder_of(Path(options.out))
        embedder = embedder_of(options.src, tokenizer=options.tokenizer, **settings_of(options))
        options.task.check(first_values)
        results = run_tasks([options.task], embedder)
        if jax.process_index():
            return
        print(format_table({result.dataset: result.metrics for result in results}))
        if options.out is not None:
            content = json.dumps([r.to_clip_benchmark(options.src) for r in results], indent=2, ensure_ascii=False)
            write_atomically(Path(options.out), content + "\n")


def format_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Rows of metrics as aligned text; columns in the order in which they first appear."""
    columns = {name: short_name(name) for metrics in rows.values() for name in metrics}
    head = max(len(name) for name in ["", *rows])
    lines = [" " * head + "".join(f"  {short:>8}" for short in columns.values())]
    for name, metrics in rows.items():
        cells = (format_value(metrics.get(c), rank="rank" in c).rjust(max(8, len(columns[c]))) for c in columns)
        lines.append(name.ljust(head) + "".join(f"  {cell}" for cell in cells))
    return "\n".join(lines)


def embed_command(args: list[str]) -> None:
    """Embeds every image; the file appears when it is whole."""
    options = parse(EmbedArgs, args, prog="siglip embed")
    out = Path(options.out)
    if out.suffix not in (".npz", ".parquet"):
        raise UserError(f"--out {options.out} must end in .npz or .parquet")
    with launch.joined(options.distributed, describe=describe):
        _check_folder_of(out)
        embedder = embedder_of(options.src, with_texts=False, **settings_of(options))
        images = embedder.embed_shards(options.data)
        if jax.process_index() == 0:
            _write_embeddings(out, images.keys, images.zimg)
            print(f"{len(images.keys)} images -> {out}")


def _check_folder_of(out: Path) -> None:
    """Raises FileNotFoundError in every process if process 0, which writes `out`, does not see its folder."""

    def check() -> None:
        if jax.process_index() == 0 and not out.absolute().parent.is_dir():
            raise FileNotFoundError(f"the folder {out.parent} of --out does not exist; make it first")

    launch.in_all_or_none(check, bad_input=BAD_INPUT)


def _write_embeddings(out: Path, keys: list[str], z: np.ndarray) -> None:
    with new_file(out) as partial, partial.open("wb") as file:
        if out.suffix == ".npz":
            np.savez(file, key=np.asarray(keys), embedding=z)
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            vectors = pa.FixedSizeListArray.from_arrays(pa.array(z.reshape(-1)), z.shape[1])
            pq.write_table(pa.table({"key": pa.array(keys, pa.string()), "embedding": vectors}), file)
