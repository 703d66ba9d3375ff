"""`siglip embed`: images and texts to embeddings, or to un-pooled tokens, on all devices of all hosts.

    for every part that is missing:  read -> tower -> part on disk;   then the parts become one file   (embedding_files.py)

All processes compute each part together, and process 0 writes it. A part holds at most 64 MiB, so memory does not grow with
the data.
"""

import dataclasses
import functools
import hashlib
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.sharding import NamedSharding

from data_pipelines.sources.opening import Stretch, open_source
from data_pipelines.text_ops import captions_of
from siglip.cli import BAD_INPUT, describe
from siglip.cli.arguments import parse, spell_out
from siglip.cli.embedding_files import Part, PartFiles, check_out
from siglip.cli.evaluation import ModelArgs, check_folder_of, make_embedder, settings_of
from siglip.cli.frozen_images import fingerprint
from siglip.errors import RunFailed, UserError
from siglip.evaluation.embed import Embedder, token_embeddings
from siglip.inputs import tokenizer_of
from siglip.model_source import read_model
from siglip.models.two_tower import ModelConfig
from siglip.parallel import launch, sharding
from siglip.parallel.collectives import gather_records
from siglip.trees import regular

logger = logging.getLogger(__name__)

_PART_BYTES = 1 << 26
_PART_ROWS = 1 << 13
_TELL_EVERY_S = 10.0

Dtype = Literal["float32", "float16", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedArgs(ModelArgs):
    """Embed images or texts. A run that was killed goes on with the same command.

    Attributes:
        data: images: shards, as for training, or a folder of image files; or texts: FILE.txt with one on each line.
        out: FILE.npz or FILE.parquet with columns `key` and `embedding` (L2-normalised), FILE.npy with the keys in
            FILE.keys.txt, or a folder of Parquet files.
        image_column: the column that holds the image; without one it is found.
        captions: the field of shards whose texts are embedded in place of the images ("txt", "captions.de").
        tokens: the tokens before pooling, after the last LayerNorm, in place of one embedding. A NaFlex model's are padded:
            the column `grid` (FILE.grid.npy) holds the patches of each image, down and across.
        dtype: float32, float16 or bfloat16; without it float32 for embeddings, float16 for tokens.
        tokenizer: SentencePiece model for texts, when SRC does not bring one.
    """

    data: str
    out: str
    image_column: str | None = None
    captions: str | None = None
    tokens: bool = False
    dtype: Dtype | None = None
    tokenizer: str | None = None


@dataclasses.dataclass(frozen=True)
class _Job:
    """What is embedded. rows: number of images, texts, or pairs with captions; embed: some of them -> (part, what is broken)."""

    what: str
    rows: int
    data: str
    embed: Callable[[range], tuple[Part, Counter]]


def embed_command(args: list[str]) -> None:
    """Computes the parts that are missing; the file appears when it is whole."""
    options = parse(EmbedArgs, spell_out(args, "--tokens"), prog="siglip embed")
    out, dtype = Path(options.out), options.dtype or ("float16" if options.tokens else "float32")
    check_out(out, dtype=dtype)
    is_text_file = options.data.endswith(".txt")
    if is_text_file and options.captions is not None:
        raise UserError(f"--captions {options.captions} is a field of shards, but {options.data} is a text file")
    with launch.joined(options.distributed, describe=describe):
        check_folder_of(out)
        texts = is_text_file or options.captions is not None
        embedder, config, model = _load(options, texts=texts, dtype=dtype)
        job = _text_job(options.data, embedder) if is_text_file else _shard_job(options, embedder)
        files = _open_files(options, job, config, model, dtype=dtype, embedder=embedder)
        broken = _compute(job, files, dtype)
        if files is None:
            return
        count, keys = files.join()
        if keys < count and job.what == "images":
            told = "%d images of %s have %d keys: some name several; go by the rows, which are in the order of the data"
            logger.warning(told, count, options.data, keys)
        if broken:
            logger.warning("images of %s left out because they cannot be decoded: %s", options.data, dict(broken))
        print(f"{count} {job.what} -> {out}")


def _open_files(
    options: EmbedArgs, job: _Job, config: ModelConfig, model: str, *, dtype: str, embedder: Embedder
) -> PartFiles | None:
    """The parts, in process 0, which writes them. Raises UserError in every process."""
    texts = job.what == "texts"
    row_shape = (config.embedding_dims[texts],)
    if options.tokens:
        row_shape = _token_shape(config, texts=texts, max_patches=embedder.max_patches)
    about = {
        "model": model, "data": job.data, "what": job.what, "image_column": options.image_column,
        "captions": options.captions, "tokens": options.tokens, "dtype": dtype,
        **({} if options.max_patches is None else {"max_patches": options.max_patches}),
    }  # fmt: skip
    rows_per_pass = embedder.rows * jax.process_count()
    sizes = {"rows": job.rows, "part_rows": _part_rows(row_shape, dtype, rows_per_pass=rows_per_pass)}
    make = functools.partial(PartFiles, Path(options.out), about=about, **sizes)
    return launch.in_all_or_none(lambda: make() if jax.process_index() == 0 else None, bad_input=BAD_INPUT)


def _load(options: EmbedArgs, *, texts: bool, dtype: str) -> tuple[Embedder, ModelConfig, str]:
    """The model on all devices, its config, and a fingerprint of its function."""
    params, config, own_tokenizer = read_model(options.src, only_image=not texts)
    tokenizer = options.tokenizer or own_tokenizer
    if texts and config.text is None:
        raise UserError(f"{options.src} has no text tower; name a source with both towers to embed texts")
    if texts and tokenizer is None:
        raise UserError("the model brings no tokenizer; name its SentencePiece model with --tokenizer FILE")
    if not texts and not options.tokens and config.image.pool == "none":
        raise UserError("this image tower has no pooling, so an image has no embedding; add --tokens for its tokens")
    mesh = sharding.make_mesh(sharding.MeshConfig())
    params = jax.device_put(params, NamedSharding(mesh, sharding.P_REPLICATED))
    pieces = tokenizer_of(Path(tokenizer), config.text) if texts else None
    embedder = make_embedder(params, config, mesh=mesh, tokenizer=pieces, **settings_of(options))
    if options.tokens:
        embed = functools.partial(token_embeddings, config, dtype, params)
        embedder = dataclasses.replace(embedder, embed=embed)
    tower = fingerprint(params["txt" if texts else "img"], config)
    return embedder, config, f"{tower} {config.text} {_digest(Path(tokenizer).read_bytes())}" if texts else tower


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _token_shape(config: ModelConfig, *, texts: bool, max_patches: int | None) -> tuple[int, int]:
    if texts:
        return config.text.length, config.text.spec.width
    patches = max_patches or math.prod(config.image.grid)
    return patches + (config.image.pool == "tok"), config.image.spec.width


def _part_rows(row_shape: Sequence[int], dtype: str, *, rows_per_pass: int) -> int:
    """Rows of a part: as many whole passes as fit, at least one."""
    row_bytes = int(np.prod(row_shape)) * jax.numpy.dtype(dtype).itemsize
    rows = min(_PART_ROWS, _PART_BYTES // row_bytes)
    return max(1, rows // rows_per_pass) * rows_per_pass


def _text_job(path: str, embedder: Embedder) -> _Job:
    """The lines of a text file; the key of a text is the number of its line, from 0."""
    try:
        content = regular(Path(path)).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); write one text per line") from None
    lines = content.split("\n")
    lines = [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]
    if not any(line.strip() for line in lines):
        raise UserError(f"{path} holds no text; write one text per line")

    def embed(rows: range) -> tuple[Part, Counter]:
        texts = lines[rows.start : rows.stop]
        return Part([str(row) for row in rows], texts, embedder.embed_texts(texts)), Counter()

    return _Job("texts", len(lines), _digest(content.encode()), embed)


def _shard_job(options: EmbedArgs, embedder: Embedder) -> _Job:
    field = options.captions
    source = open_source(
        options.data, image=options.image_column, fields=set() if field is None else {field.partition(".")[0]}
    )

    def embed_images(rows: range) -> tuple[Part, Counter]:
        found, broken = embedder.embed_batches(*embedder.read(Stretch(source, rows), ()))
        grid = np.asarray(found.grids, np.int32).reshape(-1, 2) if options.tokens and found.grids is not None else None
        return Part(found.keys, None, found.zimg, grid), Counter(broken)

    def embed_captions(rows: range) -> tuple[Part, Counter]:
        found = [(pair.key, text) for pair in map(source.__getitem__, rows) for text in captions_of(pair.fields, field)]
        keys, texts = [key for key, _ in found], [text for _, text in found]
        return Part(keys, texts, embedder.embed_texts(texts)), Counter()

    if field is None:
        return _Job("images", len(source), source.fingerprint, embed_images)
    return _Job("texts", len(source), source.fingerprint, embed_captions)


def _compute(job: _Job, files: PartFiles | None, dtype: str) -> Counter:
    """Computes and writes what is missing; all processes take part. -> images that cannot be decoded, by reason"""
    missing = gather_records([None if files is None else [[r.start, r.stop] for r in files.missing()]])[0]
    rows_missing, done, broken = sum(stop - start for start, stop in missing), 0, Counter()
    if files is not None and rows_missing < job.rows:
        logger.info("%d of %d %s are there already", job.rows - rows_missing, job.rows, job.what)
    began = told = time.monotonic()
    for start, stop in missing:
        part, counts = job.embed(range(start, stop))
        broken, done = broken + counts, done + stop - start
        finite = np.isfinite(part.z.astype(np.float32)).all(axis=tuple(range(1, part.z.ndim)))
        bad = np.flatnonzero(~finite)
        if bad.size:
            raise RunFailed(f"the model makes NaN of {part.keys[bad[0]]!r}; it has diverged, or its file is damaged")
        if files is None:
            continue
        files.write(range(start, stop), part._replace(z=part.z.astype(dtype)))
        now = time.monotonic()
        if now > told + _TELL_EVERY_S:
            told, per_s = now, done / (now - began)
            left_s = (rows_missing - done) / per_s
            logger.info("%d of %d %s, %.0f per s, %.0f s left", done, rows_missing, job.what, per_s, left_s)
    return broken
