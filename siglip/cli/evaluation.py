"""`siglip eval` and `siglip embed`: shards -> embeddings -> metrics in CLIP_benchmark's JSON."""

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import tyro

from data_pipelines.loader import make_eval_batches
from data_pipelines.sources.opening import open_source
from data_pipelines.text_ops import captions_of, lookup
from data_pipelines.tokenizers import SentencePieceTokenizer
from siglip.atomic import new_file, write_atomically
from siglip.cli.arguments import parse
from siglip.encoder import Encoder, load
from siglip.errors import UserError
from siglip.evaluation import zeroshot
from siglip.evaluation.retrieval import mean_of, retrieval
from siglip.parallel.collectives import gather_records, gather_rows
from siglip.training.config import EvalTask
from siglip.training.step import normalize_pixels
from siglip.workdir.metrics import format_value, short_name

TASK_NAMES = {"retrieval": "zeroshot_retrieval", "zeroshot": "zeroshot_classification"}


@dataclasses.dataclass(frozen=True)
class EvalArgs:
    """Evaluate a model zero-shot.

    Attributes:
        src: a run's workdir, a checkpoint inside it, a big_vision .npz, or a Hugging Face folder.
        task: retrieval both ways, or zero-shot classification.
        data: shards, as for training: tar files as img2dataset writes them, Parquet, ArrayRecord, TFRecord, lists.
        name: of the data set, in the result.
        captions: retrieval: text fields; each is evaluated on its own.
        classes: zeroshot: file of class names, one per line or a JSON list.
        templates: zeroshot: file of templates with {} for the class name, one per line.
        label: zeroshot: field that holds the label, a number or a class name.
        tokenizer: SentencePiece model, when SRC does not bring one.
        batch_size: pictures or texts per forward pass.
        out: where the result goes as JSON; it is printed in any case.
    """

    src: tyro.conf.Positional[str]
    task: Literal["retrieval", "zeroshot"]
    data: str
    name: str | None = None
    captions: tuple[str, ...] = ("txt",)
    classes: str | None = None
    templates: str | None = None
    label: str = "cls"
    tokenizer: str | None = None
    batch_size: int = 256
    out: str | None = None


@dataclasses.dataclass(frozen=True)
class EmbedArgs:
    """Embed every picture of some shards.

    Attributes:
        src: a run's workdir, a checkpoint inside it, a big_vision .npz, or a Hugging Face folder.
        data: shards, as for training: tar files as img2dataset writes them, Parquet, ArrayRecord, TFRecord, lists.
        out: FILE.npz or FILE.parquet; columns `key` and `embedding` (float32, L2-normalised).
        batch_size: pictures per forward pass.
    """

    src: tyro.conf.Positional[str]
    data: str
    out: str
    batch_size: int = 256


logger = logging.getLogger(__name__)


class Tower(NamedTuple):
    """What an evaluation needs of a model: uint8 pictures and token ids in, unit vectors out.

    Of several processes each calls `images` and `texts` with its own rows, equally many times, and gets their vectors.
    """

    images: Callable[[np.ndarray], Any]
    texts: Callable[[np.ndarray], Any]
    tokenizer: SentencePieceTokenizer
    image_size: tuple[int, int]
    text_length: int
    batch_size: int
    process_index: int = 0
    process_count: int = 1

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Strings -> float32 [m, e]; each process embeds every `process_count`-th, and all get all."""
        tokens = np.zeros((-(-len(texts) // self.process_count), self.text_length), np.int32)
        own = texts[self.process_index :: self.process_count]
        for row, text in enumerate(own):
            tokens[row] = self.tokenizer.encode(text, self.text_length)
        shares = gather_rows(embed_in_batches(self.texts, tokens, self.batch_size)[: len(own)])
        order = [i for first in range(self.process_count) for i in range(first, len(texts), self.process_count)]
        return shares[np.argsort(order)]

    def embed_shards(self, data: str) -> tuple[np.ndarray, list[str], list[Mapping[str, Any]]]:
        """(float32 [n, e], keys, fields) of every decodable picture of the shards, in order."""
        return embed_shards(
            self.images, data, image_size=self.image_size, batch_size=self.batch_size,
            process_index=self.process_index, process_count=self.process_count,
        )  # fmt: skip


def embed_shards(
    images: Callable[[np.ndarray], Any],
    data: str,
    *,
    image_size: tuple[int, int],
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> tuple[np.ndarray, list[str], list[Mapping[str, Any]]]:
    """(float32 [n, e], keys, fields) of every picture of the shards, in order; those that do not decode are left out, aloud.

    Of several processes each reads and embeds its share, `batch_size` pictures at a time, and all get everything.

    Raises:
        ValueError: if none decodes.
    """
    source = open_source(data)
    batches = make_eval_batches(
        source, batch_size=batch_size, image_size=image_size, process_index=process_index, process_count=process_count
    )
    z, records = [], []
    iterator = iter(batches)
    for _ in range(-(-len(source) // (batch_size * process_count))):
        # A process that runs out of pictures earlier still takes part in the others' forward passes.
        batch = next(iterator, {"image": np.zeros((0, *image_size, 3), np.uint8), "key": [], "fields": [], "index": []})
        z.append(embed_in_batches(images, batch["image"], batch_size))
        records += zip(batch["index"], batch["key"], batch["fields"], strict=True)
    next(iterator, None)  # what comes last may have to be counted as broken
    counts = sum(map(Counter, gather_records([dict(batches.counts)])), Counter())
    records = gather_records(records)
    if not records:
        raise UserError(f"{data} holds no picture that can be decoded ({dict(counts)}); check the shards")
    if counts and process_index == 0:
        logger.warning("pictures of %s left out because they cannot be decoded: %s", data, dict(counts))
    order = np.argsort([index for index, _, _ in records])
    keys, fields = [records[i][1] for i in order], [records[i][2] for i in order]
    return gather_rows(np.concatenate(z))[order], keys, fields


class Result(NamedTuple):
    """One evaluation; `dataset` carries the language as its ending when there are several."""

    dataset: str
    task: str
    language: str
    metrics: dict[str, float]


def embed_in_batches(function: Callable[[np.ndarray], Any], rows: np.ndarray, batch_size: int) -> np.ndarray:
    """`function` over batches of one size, the last one filled up with zeros: one compilation. No rows are one batch of zeros."""
    parts = []
    for start in range(0, max(len(rows), 1), batch_size):
        part = rows[start : start + batch_size]
        fill = np.zeros((batch_size - len(part), *rows.shape[1:]), rows.dtype)
        parts.append(np.asarray(function(np.concatenate([part, fill])))[: len(part)])
    return np.concatenate(parts)


def evaluate_task(task: EvalTask, tower: Tower) -> list[Result]:
    """Runs one task; retrieval over several caption fields also gives their mean.

    Raises:
        ValueError: for missing captions, labels or classes.
    """
    zimg, keys, fields = tower.embed_shards(task.data)
    if task.task == "zeroshot":
        return [_zeroshot(task, tower, zimg, keys, fields)]
    results = []
    for caption_field in task.captions:
        texts, image_of_text = _captions(fields, caption_field, task.data)
        language = caption_field.partition("captions.")[2]
        name = f"{task.name}-{language or caption_field}" if len(task.captions) > 1 else task.name
        metrics = retrieval(zimg, tower.embed_texts(texts), image_of_text)
        results.append(Result(name, task.task, language, metrics))
    if len(results) > 1:
        results.append(Result(f"{task.name}-mean", task.task, "mean", mean_of([r.metrics for r in results])))
    return results


def check_task(task: EvalTask) -> None:
    """Opens every file of a task and looks for its fields in the first pair.

    Raises:
        FileNotFoundError, ValueError: for what would fail later.
    """
    first = open_source(task.data)[0].fields
    if task.task == "retrieval":
        missing = [name for name in task.captions if not captions_of(first, name)]
        if len(missing) == len(task.captions):
            raise UserError(f"the first pair of {task.data} has none of the caption fields {task.captions}")
        return
    zeroshot.make_prompts("class", ["{}"] if task.templates is None else read_names(task.templates))
    if lookup(first, task.label) is None:
        raise UserError(f"the first pair of {task.data} has no field {task.label!r}; name the right field with --label")
    read_names(task.classes)


def _captions(fields: Iterable[Mapping[str, Any]], name: str, data: str) -> tuple[list[str], np.ndarray]:
    texts, image_of_text = [], []
    for i, record in enumerate(fields):
        for text in captions_of(record, name):
            texts.append(text)
            image_of_text.append(i)
    if not texts:
        raise UserError(f"no picture of {data} has the caption field {name!r}; look at a member's .json for its fields")
    return texts, np.asarray(image_of_text)


def _zeroshot(
    task: EvalTask, tower: Tower, zimg: np.ndarray, keys: list[str], fields: list[Mapping[str, Any]]
) -> Result:
    classnames = read_names(task.classes)
    templates = ["{}"] if task.templates is None else read_names(task.templates)
    index = {name: k for k, name in enumerate(classnames)}
    labels = np.asarray([_label(record, task, key, index) for key, record in zip(keys, fields, strict=True)])
    classes = zeroshot.class_embeddings(tower.embed_texts, classnames, templates)
    return Result(task.name, task.task, "", zeroshot.classification(zimg, classes, labels))


def _label(record: Mapping[str, Any], task: EvalTask, key: str, index: Mapping[str, int]) -> int:
    label = lookup(record, task.label)
    if isinstance(label, str) and label in index:
        return index[label]
    if isinstance(label, int) or (isinstance(label, str) and label.isdigit()):
        return int(label)
    raise UserError(
        f"picture {key} has {task.label}={label!r}, which is neither a number nor one of the {len(index)} class names; "
        f"name the right field with --label"
    )


def read_names(path: str) -> list[str]:
    """A JSON list, or one name per line.

    Raises:
        ValueError: if it holds none.
    """
    content = Path(path).read_text(encoding="utf-8")
    if content.lstrip().startswith("["):
        try:
            names = [str(name) for name in json.loads(content)]
        except json.JSONDecodeError as error:
            raise UserError(f"{path} starts like a JSON list but is not one ({error})") from None
    else:
        names = [line.strip() for line in content.splitlines() if line.strip()]
    if not names:
        raise UserError(f"{path} is empty; write one name per line, or a JSON list")
    return names


def tower_of(encoder: Encoder, *, tokenizer: str | None, batch_size: int) -> Tower:
    """A loaded model as a Tower.

    Raises:
        ValueError: if it has no text tower, or brings no tokenizer and none is given.
    """
    path = tokenizer or encoder.tokenizer
    if encoder.config.text is None:
        raise UserError("the model has no text tower, so it cannot be evaluated zero-shot; export it with --tower both")
    if path is None:
        raise UserError("the model brings no tokenizer; name its SentencePiece model with --tokenizer FILE")
    return Tower(
        images=_image_function(encoder),
        texts=encoder.embed_texts,
        tokenizer=SentencePieceTokenizer(str(path)),
        image_size=encoder.config.image.image_size,
        text_length=encoder.config.text.length,
        batch_size=batch_size,
    )


def eval_command(args: list[str]) -> None:
    """Prints a table; writes the JSON when asked."""
    options = parse(EvalArgs, args, prog="siglip eval")
    name = options.name or Path(options.data).name.partition(".")[0].rstrip("-0123456789*") or "data"
    task = EvalTask(
        options.task, name, options.data, options.captions, options.classes, options.templates, options.label
    )
    results = evaluate_task(
        task, tower_of(load(options.src), tokenizer=options.tokenizer, batch_size=options.batch_size)
    )
    print(format_table({result.dataset: result.metrics for result in results}))
    if options.out is not None:
        content = json.dumps(
            [to_clip_benchmark(result, options.src) for result in results], indent=2, ensure_ascii=False
        )
        write_atomically(Path(options.out), content + "\n")


def to_clip_benchmark(result: Result, model: str) -> dict[str, Any]:
    """The keys of CLIP_benchmark's result files."""
    return {
        "dataset": result.dataset,
        "model": model,
        "pretrained": "",
        "task": TASK_NAMES[result.task],
        "language": result.language,
        "metrics": result.metrics,
    }


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
    """Embeds every picture; the file appears when it is whole."""
    options = parse(EmbedArgs, args, prog="siglip embed")
    out = Path(options.out)
    if out.suffix not in (".npz", ".parquet"):
        raise UserError(f"--out {options.out} must end in .npz or .parquet")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"the folder {out.parent} of --out does not exist; make it first")
    encoder = load(options.src)
    z, keys, _ = embed_shards(
        _image_function(encoder),
        options.data,
        image_size=encoder.config.image.image_size,
        batch_size=options.batch_size,
    )
    with new_file(out) as partial, partial.open("wb") as file:
        if out.suffix == ".npz":
            np.savez(file, key=np.asarray(keys), embedding=z)
        else:
            _write_parquet(file, keys, z)
    print(f"{len(keys)} pictures -> {out}")


def _image_function(encoder: Encoder) -> Callable[[np.ndarray], Any]:
    return lambda images: encoder.embed_images(normalize_pixels(images))


def _write_parquet(file: BinaryIO, keys: list[str], z: np.ndarray) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    vectors = pa.FixedSizeListArray.from_arrays(pa.array(z.reshape(-1)), z.shape[1])
    pq.write_table(pa.table({"key": pa.array(keys, pa.string()), "embedding": vectors}), file)
