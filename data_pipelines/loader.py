"""The resumable stream of training batches, and every pair once for evaluation.

    mixture order -> read -> decode, crop, resize, tokenize -> batch -> Grain: threads, workers, prefetch

The position is the number of batches handed out, nothing else: batch k is a pure function of (seed, k), so a
resume seeks by arithmetic and is free to change the number of threads, workers and processes.

Grain and Pillow are imported when a loader is made, not with this module: the configuration of a training run
is to be read on machines that have neither.
"""

import collections
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_pipelines.augment import AugmentConfig
from data_pipelines.mixture import Mixture, SourceConfig
from data_pipelines.records import Source
from data_pipelines.sources.webdataset import TarSource


@dataclass(frozen=True)
class DataConfig:
    """Where training pairs come from and how they are prepared.

    Attributes:
      sources: what to mix.
      tokenizer: path of a SentencePiece model.
      augment: random crops and colours; None for none.
      workers: processes that decode; 0 decodes in threads of the main process, which is faster for small
        pictures.
      threads: decoding threads in the main process, or in each worker.
      prefetch: batches kept ready, in the main process or in each worker.
      max_image_pixels: larger pictures are refused as decompression bombs.
      cache_bytes: memory for decoded pictures, in the main process or in each worker; 0 for none.
    """

    sources: tuple[SourceConfig, ...]
    tokenizer: str
    augment: AugmentConfig | None = None
    workers: int = 0
    threads: int = 2
    prefetch: int = 4
    max_image_pixels: int = 1 << 26
    cache_bytes: int = 1 << 28

    def __post_init__(self):
        if not self.sources:
            raise ValueError("data.sources is empty; name at least one set of shards")
        least = {"workers": 0, "threads": 1, "prefetch": 1, "max_image_pixels": 1, "cache_bytes": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"data.{name}={getattr(self, name)} must be at least {bound}")
        if self.max_image_pixels > 89_478_485:
            raise ValueError(f"data.max_image_pixels={self.max_image_pixels} exceeds Pillow's limit, 89478485")


class Loader:
    """An endless iterator of local batches; make one with `make_loader`.

    A batch is a dict: image uint8 [bl, h, w, 3], text int32 [bl, l], key list[str] of length bl.

    Attributes:
      counts: pairs handed out since this loader was made or restored that are substitutes for broken ones, by
        reason.
    """

    def __init__(self, batches, config: DataConfig, identity: dict):
        self._batches = batches
        self._config = config
        self._identity = identity
        self._iterator = None
        self.restore({"position": batches.start, "counts": {}, **identity})

    def __iter__(self) -> Iterator[dict]:
        return self

    def __next__(self) -> dict:
        if self._iterator is None:
            self._iterator = _iterate(self._batches, self._config, self._position)
        batch = next(self._iterator)
        self._position += 1
        self.counts.update(batch.pop("replaced"))
        if self._config.workers:
            # Plain memory: a worker's shared segment would live on for as long as the batch is referenced.
            batch = batch | {name: np.array(batch[name]) for name in ("image", "text")}
        return batch

    def state(self) -> dict:
        """What `restore` needs, for json: the batches handed out, the counts, and what they are a function of."""
        return {"position": self._position, "counts": dict(self.counts), **self._identity}

    def restore(self, state: dict) -> None:
        """Goes to where `state()` was taken.

        Raises:
          ValueError: the state belongs to other data, another seed or another batch size.
        """
        for name, ours in self._identity.items():
            if state.get(name) != ours:
                raise ValueError(
                    f"the data position was saved with {name}={state.get(name)!r}, here it is {ours!r}; "
                    "resume with the same data, seed and batch size, or start in a new workdir"
                )
        self.close()
        self._position = state["position"]
        self.counts = collections.Counter(state["counts"])

    def close(self) -> None:
        """Stops threads and worker processes. The next batch starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


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
    from data_pipelines.samples import BatchSource, PictureCache, SampleSpec
    from data_pipelines.tokenizers import SentencePieceTokenizer

    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size={batch_size} does not divide over {process_count} processes")
    if text_length < 1:
        raise ValueError(f"text_length={text_length} must be at least 1")
    tokenizer = SentencePieceTokenizer(config.tokenizer)
    sources = tuple(TarSource(source.shards) for source in config.sources)
    order = Mixture(tuple(map(len, sources)), tuple(source.weight for source in config.sources), seed)
    spec = SampleSpec(
        image_size_px=tuple(image_size),
        text_length=text_length,
        captions=tuple(source.captions for source in config.sources),
        augment=config.augment,
        max_image_pixels=config.max_image_pixels,
        seed=seed,
    )
    cache = PictureCache(config.cache_bytes)
    batches = BatchSource(
        sources, order, spec, cache, tokenizer, batch_size, process_index, process_count, start=position
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
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")
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
        from data_pipelines import image_ops, samples

        pair = samples.read_pair(self.source, index)
        picture = samples.decode_picture(pair, max_pixels=self.max_image_pixels)
        return pair, image_ops.resize(picture, self.image_size), index

    def _settle(self, future) -> Iterator[tuple]:
        from data_pipelines.samples import BrokenPair

        try:
            yield future.result()
        except BrokenPair as error:
            self.counts[error.reason] += 1


def _stack(rows: list[tuple]) -> dict:
    images, keys, fields, indices = zip(*rows, strict=True)
    return {"image": np.stack(images), "key": list(keys), "fields": list(fields), "index": list(indices)}


def _iterate(batches, config: DataConfig, position: int):
    """Grain's iterator over the batches from `position` on."""
    import dataclasses

    import grain
    from absl import flags

    dataset = grain.MapDataset.source(dataclasses.replace(batches, start=position))
    options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.prefetch)
    iterable = dataset.to_iter_dataset(options)
    if config.workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain passes absl flags to its workers, unparsed ones raise.
        iterable = iterable.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=config.prefetch),
            worker_init_fn=_leave_signals_to_the_parent,
        )
    return iter(iterable)


def _leave_signals_to_the_parent(index: int, count: int) -> None:
    """In a worker process. Terminals and schedulers signal it too, but the parent still needs its batches to stop in order;
    a parent that was killed is followed at once.
    """
    del index, count
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _fingerprint(sources: tuple[Source, ...], config: DataConfig) -> str:
    """Of all that the order depends on, besides seed and batch size."""
    parts = [[source.fingerprint, part.weight] for source, part in zip(sources, config.sources, strict=True)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
