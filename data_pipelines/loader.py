"""The resumable stream of training batches, and every pair once for evaluation.

    mixture order -> read -> decode, crop, resize, tokenize -> batch -> threads (Grain) or processes (workers.py)

The position is the number of batches handed out, nothing else: batch k is a pure function of (seed, k), so a
resume seeks by arithmetic and is free to change the number of threads, workers and processes.

Grain and Pillow are imported when a loader is made, not with this module: the configuration of a training run
is to be read on machines that have neither.
"""

import collections
import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipelines import workers
from data_pipelines.augment import AugmentConfig
from data_pipelines.errors import UserError
from data_pipelines.image_embeddings import ImageEmbeddings
from data_pipelines.order.mixture import Mixture, SourceConfig
from data_pipelines.order.permutation import BlockShuffle
from data_pipelines.records import Source
from data_pipelines.samples.noise import NoiseConfig


@dataclass(frozen=True)
class DataConfig:
    """Where training pairs come from and how they are prepared.

    Attributes:
      sources: what to mix.
      tokenizer: path of a SentencePiece model; None takes that of the model that training starts from.
      augment: random crops and colours; None for none.
      workers: processes that decode; 0 decodes in threads of the main process, which is faster for small
        pictures.
      threads: decoding threads in the main process, or in each worker.
      prefetch: batches kept ready, in the main process or in each worker.
      max_image_pixels: larger pictures are refused as decompression bombs.
      cache_bytes: memory for decoded pictures, in the main process or in each worker; 0 for none.
      image_embeddings: folder in which a frozen image tower's embeddings of all pictures are kept, computed when they are
        missing; training then reads them instead of pictures. All hosts share it. None decodes pictures.
      shuffle_blocks: shuffles block by block, for storage that likes long reads; None moves every pair anywhere.
      block_bytes: memory for what was read of blocks, encoded, in the main process or in each worker. It should hold what a
        process reads of two stretches of `shuffle_blocks`: this one and, ahead of need, the next.
      noise: corrupts pairs on purpose, for studies of robustness; None for none.
    """

    sources: tuple[SourceConfig, ...]
    tokenizer: str | None
    augment: AugmentConfig | None = None
    workers: int = 0
    threads: int = 2
    prefetch: int = 4
    max_image_pixels: int = 1 << 26
    cache_bytes: int = 1 << 28
    image_embeddings: str | None = None
    shuffle_blocks: BlockShuffle | None = None
    block_bytes: int = 1 << 29
    noise: NoiseConfig | None = None

    def __post_init__(self):
        if not self.sources:
            raise UserError("data.sources is empty; name at least one set of shards")
        least = {"workers": 0, "threads": 1, "prefetch": 1, "max_image_pixels": 1, "cache_bytes": 0, "block_bytes": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise UserError(f"data.{name}={getattr(self, name)} must be at least {bound}")
        if self.max_image_pixels > 89_478_485:
            raise UserError(f"data.max_image_pixels={self.max_image_pixels} exceeds Pillow's limit, 89478485")
        if self.noise is not None and self.noise.image and self.image_embeddings is not None:
            raise UserError(f"data.noise.image={self.noise.image} needs pictures; leave out data.image_embeddings")


class Loader:
    """An endless iterator of local batches; make one with `make_loader`.

    A batch is a dict: image uint8 [bl, h, w, 3], text int32 [bl, l], key list[str] of length bl; after
    `use_image_embeddings`, zimg float32 [bl, e] takes the place of image.

    Attributes:
      sources: what the pairs come from, in the order of the config.
      counts: pairs handed out since this loader was made or restored that are substitutes for broken ones, by
        reason.
    """

    def __init__(self, batches, config: DataConfig, identity: dict):
        self._batches = batches
        self._config = config
        self._identity = identity
        self._iterator = None
        self.sources = batches.sources
        self._position = batches.start
        self.counts = collections.Counter()

    def __iter__(self) -> Iterator[dict]:
        return self

    def __next__(self) -> dict:
        if self._iterator is None:
            self._iterator = self._begin()
        batch = next(self._iterator)
        self._position += 1
        self.counts.update(batch.pop("replaced"))
        return batch

    def _begin(self):
        batches = dataclasses.replace(self._batches, start=self._position)
        parts = self._config.workers if self._config.shuffle_blocks is not None else 1
        if parts < 2:
            return _iterate(batches, self._config)
        # Every worker makes its part of every batch: of blocks of its own, which no other has to read as well.
        return _joined(_iterate(dataclasses.replace(batches, parts=parts), self._config), parts)

    def use_image_embeddings(self, embeddings: Sequence[ImageEmbeddings]) -> None:
        """From the next batch on, batches hold these in place of pictures. embeddings: whole, one per source."""
        self.close()
        self._batches = dataclasses.replace(self._batches, embeddings=tuple(embeddings))

    def part_pictures(
        self, source: int, embeddings: ImageEmbeddings, parts: Sequence[int], *, rows: int
    ) -> Iterator[dict]:
        """The pictures of these parts of a source, `rows` at a time: {"image": uint8 [n, h, w, 3], "broken": {record: reason}}.

        Every part gives equally many batches, the last of them short or empty.
        """
        from data_pipelines.samples.batches import PartPictures

        spec = self._batches.spec
        pictures = PartPictures(
            self.sources[source], embeddings, tuple(parts), rows, spec.image_size_px, spec.max_image_pixels
        )
        iterator = _iterate(pictures, self._config)
        try:
            yield from iterator
        finally:
            iterator.close()

    def progress(self) -> dict[str, float]:
        """What all processes together have seen of each source: {"source_0/pairs": …, "source_0/epochs": …, …}."""
        order = self._batches.order
        counts = order.counts_before(self._position * self._batches.batch_pairs)
        values = {}
        for source, (pairs, size) in enumerate(zip(counts, order.sizes, strict=True)):
            values |= {f"source_{source}/pairs": pairs, f"source_{source}/epochs": pairs / size}
        return values

    def state(self) -> dict:
        """What `restore` needs, for json: the batches handed out, the counts, and what they are a function of."""
        order = self._batches.order
        mixture = {"weights": list(order.weights), "since": order.since, "counts": list(order.counts)}
        return {"position": self._position, "counts": dict(self.counts), "mixture": mixture, **self._identity}

    def restore(self, state: dict) -> None:
        """Goes to where `state()` was taken. Where the weights were others, each source goes on from its own count.

        Raises:
          ValueError: the state belongs to other data, another seed or another batch size.
        """
        for name, ours in self._identity.items():
            if state.get(name) != ours:
                raise UserError(
                    f"the data position was saved with {name}={state.get(name)!r}, here it is {ours!r}; "
                    "resume with the same data, seed and batch size, or start in a new workdir"
                )
        self.close()
        self._position = state["position"]
        self.counts = collections.Counter(state["counts"])
        was, ours = state["mixture"], tuple(source.weight for source in self._config.sources)
        order = dataclasses.replace(
            self._batches.order, weights=tuple(was["weights"]), since=was["since"], counts=tuple(was["counts"])
        )
        if order.weights != ours:
            order = order.reweighted(ours, position=self._position * self._batches.batch_pairs)
        self._batches = dataclasses.replace(self._batches, order=order)

    def close(self) -> None:
        """Stops threads and worker processes. The next batch starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
        for cache in self._batches.open_blocks:
            cache.clear()


def make_loader(
    config: DataConfig,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    text_length: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    position: int = 0,
) -> Loader:
    """The training stream of one process.

    Args:
      config: the data.
      batch_size: pairs in the global batch; this process gets `batch_size / process_count` of them.
      image_size: (h, w) in pixels.
      text_length: token ids of a caption.
      seed: of the order and of every random choice.
      process_index, process_count: which slice of each batch.
      position: batches to skip.

    Raises:
      FileNotFoundError, PermissionError, ValueError: shards, tokenizer or numbers that cannot be used.
    """
    from data_pipelines.samples.batches import BatchSource, PictureCache, SampleSpec
    from data_pipelines.tokenizers import SentencePieceTokenizer

    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"batch_size={batch_size} does not divide over {process_count} processes")
    if text_length < 1:
        raise UserError(f"text_length={text_length} must be at least 1")
    tokenizer = SentencePieceTokenizer(config.tokenizer)
    sources = tuple(map(_open, config.sources))
    weights = tuple(source.weight for source in config.sources)
    order = Mixture(tuple(map(len, sources)), weights, seed, config.shuffle_blocks)
    spec = SampleSpec(
        image_size_px=tuple(image_size),
        text_length=text_length,
        captions=tuple(source.captions for source in config.sources),
        augment=config.augment,
        max_image_pixels=config.max_image_pixels,
        seed=seed,
        noise=config.noise,
    )
    cache = PictureCache(config.cache_bytes)
    batches = BatchSource(
        sources,
        order,
        spec,
        cache,
        tokenizer,
        batch_size,
        process_index,
        process_count,
        start=position,
        open_blocks=_block_caches(config, sources, readers=process_count * max(1, config.workers)),
    )
    identity = {"fingerprint": _fingerprint(sources, config), "seed": seed, "batch_size": batch_size}
    return Loader(batches, config, identity)


def make_eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    max_image_pixels: int = 1 << 26,
    threads: int = 2,
    process_index: int = 0,
    process_count: int = 1,
) -> "EvalBatches":
    """Every pair of a source once, in order, without augmentation; the last batch may be short.

    Of several processes each gets every `process_count`-th pair, from `process_index` on.
    """
    share = range(process_index, len(source), process_count)
    return EvalBatches(source, batch_size, tuple(image_size), max_image_pixels, threads, share)


@dataclass
class EvalBatches:
    """Iterates over {"image": uint8 [b, h, w, 3], "key": list[str], "fields": list[dict], "index": list[int] in the source}.

    Pairs that cannot be decoded are left out; after a pass, `counts` says how many, by reason.
    """

    source: Source
    batch_size: int
    image_size: tuple[int, int]
    max_image_pixels: int
    threads: int
    share: range

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size} must be at least 1")
        self.counts = collections.Counter()

    def __iter__(self) -> Iterator[dict]:
        self.counts = collections.Counter()
        rows = []
        for pair, image, index in self._decoded():
            rows.append((image, pair.key, dict(pair.fields), index))
            if len(rows) == self.batch_size:
                yield _stack(rows)
                rows = []
        if rows:
            yield _stack(rows)

    def _decoded(self) -> Iterator[tuple]:
        """(pair, image, index) in order, decoded one batch ahead."""
        from concurrent.futures import ThreadPoolExecutor

        pending = collections.deque()
        with ThreadPoolExecutor(self.threads) as pool:
            for index in self.share:
                pending.append(pool.submit(self._decode, index))
                if len(pending) > 2 * self.batch_size:
                    yield from self._settle(pending.popleft())
            while pending:
                yield from self._settle(pending.popleft())

    def _decode(self, index: int) -> tuple:
        from data_pipelines import image_ops
        from data_pipelines.samples import batches

        pair = batches.read_pair(self.source, index)
        picture = batches.decode_picture(pair, max_pixels=self.max_image_pixels)
        return pair, image_ops.resize(picture, self.image_size), index

    def _settle(self, future) -> Iterator[tuple]:
        from data_pipelines.samples.batches import BrokenPair

        try:
            yield future.result()
        except BrokenPair as error:
            self.counts[error.reason] += 1


def _stack(rows: list[tuple]) -> dict:
    images, keys, fields, indices = zip(*rows, strict=True)
    return {"image": np.stack(images), "key": list(keys), "fields": list(fields), "index": list(indices)}


def _iterate(batches, config: DataConfig):
    """The batches in order, from worker processes or from threads of this one."""
    workers.keep_freed_memory()
    if config.workers:
        return workers.WorkerPool(batches, workers=config.workers, threads=config.threads, prefetch=config.prefetch)
    import grain

    options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.prefetch)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))


def _joined(parts, count: int) -> Iterator[dict]:
    """Batches of `count` parts each. parts: as `_iterate` gives them."""
    try:
        for some in zip(*[parts] * count, strict=True):
            order = np.argsort(np.concatenate([part.pop("rows") for part in some]))
            replaced = sum((collections.Counter(part.pop("replaced")) for part in some), collections.Counter())
            keys = sum((part.pop("key") for part in some), [])
            arrays = {name: np.concatenate([part[name] for part in some])[order] for name in some[0]}
            yield arrays | {"key": [keys[row] for row in order.tolist()], "replaced": replaced}
    finally:
        parts.close()


def _open(config: SourceConfig) -> Source:
    """Raises FileNotFoundError, PermissionError, ValueError, OSError: see `open_source` and `KeptPairs`."""
    from data_pipelines.sources.opening import open_source

    parts = (part.strip() for field, _ in config.captions for part in field.split("+"))
    source = open_source(config.shards, fields={part.split(".")[0] for part in parts})
    if config.manifest is None:
        return source
    from data_pipelines.sources.kept_pairs import KeptPairs

    return KeptPairs(source, config.manifest)


def _block_caches(config: DataConfig, sources: tuple[Source, ...], *, readers: int) -> tuple:
    """One for each source, by its weight; () without blocks. readers: processes that share a stretch."""
    from data_pipelines.sources.blocks import BlockCache

    blocks, total = config.shuffle_blocks, sum(source.weight for source in config.sources)
    if blocks is None:
        return ()
    limits = [int(config.block_bytes * source.weight / total) for source in config.sources]
    for source, limit, named in zip(sources, limits, config.sources, strict=True):
        stretch = min(blocks.block_pairs * blocks.open_blocks, len(source))
        needed = int(stretch * source.pair_bytes) // readers
        if source.is_remote and needed > limit:
            warnings.warn(
                f"{stretch} pairs of {named.shards!r} are mixed at a time, about {needed} bytes in each process, and its share "
                f"of data.block_bytes={config.block_bytes} is {limit}: of what exceeds it each pair is a request of its own; "
                f"raise data.block_bytes or lower data.shuffle_blocks.open_blocks={blocks.open_blocks}",
                stacklevel=3,
            )
    return tuple(map(BlockCache, limits))


def _fingerprint(sources: tuple[Source, ...], config: DataConfig) -> str:
    """Of all that the order depends on, besides seed, batch size and weights."""
    parts = [source.fingerprint for source in sources]
    if config.shuffle_blocks is not None:
        parts.append(dataclasses.asdict(config.shuffle_blocks))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
