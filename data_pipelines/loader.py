"""The resumable stream of training batches, and every pair once for evaluation.

    mixture order -> read -> decode, crop, resize, tokenize -> rows of a batch, by threads (Grain) or processes: see workers.py

The position is the number of batches handed out, nothing else. Batch k is a pure function of (seed, k), so a resume
seeks by arithmetic and may change the number of threads, workers and processes.

Grain and Pillow are imported when a loader is made, not with this module: machines that have neither can read the
configuration of a training run.
"""

import collections
import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_pipelines import workers
from data_pipelines.augment import AugmentConfig
from data_pipelines.errors import UserError
from data_pipelines.image_embeddings import ImageEmbeddings
from data_pipelines.order.lengths import LengthConfig
from data_pipelines.order.mixture import SourceConfig
from data_pipelines.order.permutation import BlockShuffle
from data_pipelines.records import Source
from data_pipelines.samples.noise import NoiseConfig

if TYPE_CHECKING:  # they import Pillow and SentencePiece
    from data_pipelines.corruptions import Corruption
    from data_pipelines.image_ops import Protocol, Resample
    from data_pipelines.samples.batches import TrainBatches
    from data_pipelines.samples.in_order import EvalBatches
    from data_pipelines.samples.pairs import Field
    from data_pipelines.samples.patches import Patches


@dataclass(frozen=True)
class DataConfig:
    """Where training pairs come from and how they are prepared.

    Attributes:
      sources: what to mix.
      tokenizer: path of a SentencePiece model; None takes that of the model that training starts from.
      augment: random crops and colours; None for none.
      workers: processes that decode; 0 decodes in threads of the main process, which is faster for small
        images.
      threads: decoding threads in the main process, or in each worker.
      prefetch: local batches made ahead of the one in use, by all workers together; fewer, but at least one, where they
        exceed 16 GiB.
      max_image_pixels: larger images are refused as decompression bombs.
      jpeg_scaling: decodes JPEGs at 1/2, 1/4 or 1/8 of their size where the model needs no more pixels: faster, but the
        pixels differ a little.
      cache_bytes: memory for decoded images, in the main process or in each worker; 0 for none.
      image_embeddings: folder in which a frozen image tower's embeddings of all images are kept, computed when they are
        missing; training then reads them instead of images. All hosts share it. None decodes images.
      shuffle_blocks: shuffles block by block, for storage that likes long reads; None moves every pair anywhere.
      block_bytes: memory for what was read of blocks, encoded, in the main process or in each worker. It should hold what a
        process reads of two stretches of `shuffle_blocks`: this one and, ahead of need, the next.
      noise: corrupts pairs on purpose, for studies of robustness; None for none.
      lengths: of a NaFlex model's images, step by step; None for model.image.naflex.patches in every step.
    """

    sources: tuple[SourceConfig, ...]
    tokenizer: str | None
    augment: AugmentConfig | None = None
    workers: int = 0
    threads: int = 2
    prefetch: int = 2
    max_image_pixels: int = 1 << 26
    jpeg_scaling: bool = False
    cache_bytes: int = 1 << 28
    image_embeddings: str | None = None
    shuffle_blocks: BlockShuffle | None = None
    block_bytes: int = 1 << 29
    noise: NoiseConfig | None = None
    lengths: LengthConfig | None = None

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
            raise UserError(f"data.noise.image={self.noise.image} needs images; leave out data.image_embeddings")


class Loader:
    """An endless iterator of local batches; make one with `make_loader`.

    A batch is a dict: image uint8 [bl, h, w, 3], text int32 [bl, l], key list[str] of length bl; zimg float32 [bl, e] after
    `use_image_embeddings` in place of image, with `Patches` patches uint8 [bl, n, p] and grid int32 [bl, 2], n the step's.

    Attributes:
      sources: what the pairs come from, in the order of the config.
      counts: pairs handed out since this loader was made or restored that are substitutes for broken ones, by
        reason.
    """

    def __init__(self, batches: "TrainBatches", config: DataConfig, identity: dict):
        self._batches = batches
        self._config = config
        self._identity = identity
        self._iterator = None
        self.sources = batches.reader.sources
        self._position = batches.reader.start
        self.counts = collections.Counter()
        self._tells_of_lines = batches.reader.process_index == 0

    def __iter__(self) -> Iterator[dict]:
        return self

    def __next__(self) -> dict:
        if self._iterator is None:
            self._change_reader(start=self._position)
            self._iterator = self._iterate(self._batches)
        batch = next(self._iterator)
        self._position += 1
        self.counts.update(batch.pop("replaced"))
        if (lines := batch.pop("several_lines")) and self._tells_of_lines:
            told = "captions of a batch have several lines, used as one; if each is a caption, name 'txt.*'"
            warnings.warn(f"{lines} of {len(batch['key'])} {told}", stacklevel=2)
            self._tells_of_lines = False
        return batch

    def _iterate(self, batches: workers.Batches):
        config = self._config
        return workers.iterate(batches, workers=config.workers, threads=config.threads, prefetch=config.prefetch)

    def _change_reader(self, **changes) -> None:
        reader = dataclasses.replace(self._batches.reader, **changes)
        self._batches = dataclasses.replace(self._batches, reader=reader)

    def use_image_embeddings(self, embeddings: Sequence[ImageEmbeddings]) -> None:
        """From the next batch on, batches hold these in place of images. embeddings: whole, one per source."""
        from data_pipelines.samples.stored_embedding import StoredEmbedding

        self.close()
        others = (field for field in self._batches.fields if not field.reads_pixels)
        self._batches = dataclasses.replace(self._batches, fields=(StoredEmbedding(tuple(embeddings)), *others))

    def part_images(
        self, source: int, embeddings: ImageEmbeddings, parts: Sequence[int], *, rows: int
    ) -> Iterator[dict]:
        """The images of these parts of a source, `rows` at a time: {"image": uint8 [n, h, w, 3], "broken": {record: reason}}.

        Every part gives equally many batches, the last of them short or empty.
        """
        from data_pipelines.samples.in_order import ImagesInOrder
        from data_pipelines.samples.pairs import ImageDecoder
        from data_pipelines.samples.pixels import Pixels

        starts = range(0, embeddings.part_pairs, rows)
        ranges = [embeddings.records(part)[start : start + rows] for part in parts for start in starts]
        pixels = next(field for field in self._batches.fields if isinstance(field, Pixels))
        whole = Pixels(pixels.size_px, resample=pixels.resample)
        decoder = ImageDecoder(self._config.max_image_pixels)  # in full: the store is named after nothing else
        images = ImagesInOrder(self.sources[source], ranges, rows, whole, decoder, fields=frozenset())
        iterator = self._iterate(images)
        try:
            for batch in iterator:
                broken = {note.index: note.reason for note in batch["notes"] if note.reason}
                yield {"image": batch["image"], "broken": broken}
        finally:
            iterator.close()

    def progress(self) -> dict[str, float]:
        """What all processes together have seen of each source: {"source_0/pairs": …, "source_0/epochs": …, …}."""
        mixture = self._batches.reader.mixture
        counts = mixture.counts_before(self._position * self._batches.reader.batch_pairs)
        values = {}
        for source, (pairs, size) in enumerate(zip(counts, mixture.sizes, strict=True)):
            values |= {f"source_{source}/pairs": pairs, f"source_{source}/epochs": pairs / size}
        return values

    def state(self) -> dict:
        """What `restore` needs, for json: the batches handed out, the counts, and what they are a function of."""
        mixture = self._batches.reader.mixture
        weights = {"weights": list(mixture.weights), "since": mixture.since, "counts": list(mixture.counts)}
        state = {"position": self._position, "counts": dict(self.counts), "mixture": weights}
        return state | self._identity | {"data": self._describe()}

    def _describe(self) -> str:
        """The data by the names of its shards, which are the same wherever they lie."""
        return "; ".join(map(_describe, self.sources))

    def restore(self, state: dict) -> None:
        """Goes to where `state()` was taken. Where the weights were others, each source goes on from its own count.

        Raises:
          UserError: the state belongs to other data, another seed or another batch size.
        """
        for name, ours in self._identity.items():
            if state.get(name) == ours:
                continue
            told = f"the data position was saved with {name}={state.get(name)!r}, here it is {ours!r}"
            if name == "fingerprint":
                was = state.get("data", "unknown")
                told = f"the data changed since this run was saved (was: {was}; now: {self._describe()})"
            raise UserError(
                f"{told}; resume with the same shards, manifests, data.shuffle_blocks, seed and batch size, "
                "or start in a new workdir"
            )
        self.close()
        self._position = state["position"]
        self.counts = collections.Counter(state["counts"])
        was, ours = state["mixture"], tuple(source.weight for source in self._config.sources)
        saved = {"weights": tuple(was["weights"]), "since": was["since"], "counts": tuple(was["counts"])}
        mixture = dataclasses.replace(self._batches.reader.mixture, **saved)
        if mixture.weights != ours:
            position = self._position * self._batches.reader.batch_pairs
            mixture = mixture.reweighted(ours, position=position)
        self._change_reader(mixture=mixture)

    def close(self) -> None:
        """Stops threads and worker processes. The next batch starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
        self._batches.reader.close()


def make_loader(
    config: DataConfig,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    text_length: int,
    seed: int,
    tokens: Mapping[str, Any] | None = None,
    resample: "Resample" = "bilinear",
    patches: "Patches | None" = None,
    process_index: int = 0,
    process_count: int = 1,
    position: int = 0,
    fields: "tuple[Field, ...] | None" = None,
) -> Loader:
    """The training stream of one process.

    Args:
      config: the data.
      batch_size: pairs in the global batch; this process gets `batch_size / process_count` of them.
      image_size: (h, w) in pixels.
      text_length: token ids of a caption.
      seed: of the order and of every random choice.
      tokens: the settings of `SentencePieceTokenizer`.
      resample: the filter that resizes images.
      patches: images as patches in their own aspect ratio, in place of `image_size` and `resample`.
      process_index, process_count: which slice of each batch.
      position: batches to skip.
      fields: what becomes of each pair; None for `default_fields`.

    Raises:
      FileNotFoundError, PermissionError, UserError: shards, tokenizer or numbers that cannot be used.
    """
    from data_pipelines.samples.batches import TrainBatches
    from data_pipelines.samples.noisy_batches import NoisyBatches
    from data_pipelines.samples.pairs import ImageCache, ImageDecoder
    from data_pipelines.samples.patches import check_settings
    from data_pipelines.samples.pixels import Pixels
    from data_pipelines.samples.reading import open_reader

    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"batch_size={batch_size} does not divide over {process_count} processes")
    if text_length < 1:
        raise UserError(f"text_length={text_length} must be at least 1")
    check_settings(config, patches)
    if fields is None:
        fields = default_fields(
            config, image_size=image_size, text_length=text_length, tokens=tokens, resample=resample, patches=patches
        )
    reader = open_reader(config, batch_size, seed, (process_index, process_count), start=position)
    pixels = next((field for field in fields if isinstance(field, Pixels)), None)
    min_size_px = pixels.min_decoded_px if config.jpeg_scaling and pixels else None
    decoder, cache = ImageDecoder(config.max_image_pixels, min_size_px), ImageCache(config.cache_bytes)
    batches = TrainBatches(reader, fields, decoder, cache, seed, tuple(it.shards for it in config.sources))
    if config.noise is not None:
        batches = NoisyBatches(reader, fields, decoder, cache, seed, batches.names, config.noise)
    identity = {"fingerprint": _fingerprint(reader.sources, config), "seed": seed, "batch_size": batch_size}
    return Loader(batches, config, identity)


def default_fields(
    config: DataConfig,
    *,
    image_size: tuple[int, int],
    text_length: int,
    tokens: Mapping[str, Any] | None = None,
    resample: "Resample" = "bilinear",
    patches: "Patches | None" = None,
) -> "tuple[Field, ...]":
    """What becomes of a pair: its image and one of its captions. They draw in this order, see samples/pairs.py."""
    from data_pipelines.samples.pixels import Pixels
    from data_pipelines.samples.tokens import Tokens
    from data_pipelines.tokenizers import SentencePieceTokenizer

    captions = tuple(source.captions for source in config.sources)
    tokenizer = SentencePieceTokenizer(config.tokenizer, **(tokens or {}))
    return Tokens(tokenizer, text_length, captions), patches or Pixels(tuple(image_size), config.augment, resample)


def make_eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    resample: "Resample" = "bilinear",
    protocol: "Protocol" = "squash",
    patches: "Patches | None" = None,
    max_image_pixels: int = 1 << 26,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    threads: int | None = None,
    fields: Collection[str] | None = None,
    corruption: "tuple[Corruption, int] | None" = None,
    mask: str | None = None,
) -> "EvalBatches":
    """Every pair of a source once, in order, without augmentation; the last batch may be short.

    Args:
      source: the pairs.
      batch_size: pairs in a batch of this process.
      image_size: (h, w) in pixels.
      resample: the filter that resizes images.
      protocol: squash, square875 or aspect75: see `image_ops.resize_and_crop`.
      patches: images as patches in their own aspect ratio, in place of these three.
      max_image_pixels: larger images are left out.
      process_index, process_count: of several processes each gets every `process_count`-th pair, from `process_index` on.
      workers: processes that decode; 0 decodes in threads of this one.
      threads: in each process; None for as many as there are cores.
      fields: which fields of the pairs to carry along; None for all.
      corruption: name and severity of what is done to every image.
      mask: field of a segmentation mask; batches then hold "mask", uint8 [b, h, w], too; of patches [b, n, p_h p_w].

    Raises:
      UserError: batch_size is below 1, or there is a mask and images are not resized whole.
    """
    from data_pipelines.samples.in_order import EvalBatches, ImagesInOrder
    from data_pipelines.samples.masks import Mask
    from data_pipelines.samples.pairs import ImageDecoder
    from data_pipelines.samples.pixels import Pixels

    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    if mask is not None and protocol != "squash":
        raise UserError(f"masks are resized whole, but pixels={protocol} cuts images; use pixels=squash")
    share = range(process_index, len(source), process_count)
    ranges = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
    kept = None if fields is None else frozenset(fields)
    if patches is not None and protocol != "squash":
        raise UserError(f"pixels={protocol} needs images of one size; this model is NaFlex")
    pixels = patches or Pixels(tuple(image_size), resample=resample, protocol=protocol, exact=True)
    masks = None if mask is None else Mask(pixels, mask)
    images = ImagesInOrder(source, ranges, batch_size, pixels, ImageDecoder(max_image_pixels), kept, corruption, masks)
    return EvalBatches(images, workers, threads)


def _describe(source: Source) -> str:
    paths = [os.path.basename(path) for path in source.paths]
    return f"{paths[0] if len(paths) == 1 else f'{paths[0]} … {paths[-1]}'}, {len(source)} pairs"


def _fingerprint(sources: tuple[Source, ...], config: DataConfig) -> str:
    """A hash of what decides the order, besides seed, batch size and weights; where the files lie does not matter."""
    parts = [source.fingerprint for source in sources]
    if config.shuffle_blocks is not None:
        parts.append(dataclasses.asdict(config.shuffle_blocks))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
