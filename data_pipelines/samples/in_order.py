"""Images of a source in order, every one once, without augmentation: for evaluation, and for embeddings of all of them."""

import collections
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from data_pipelines import workers
from data_pipelines.corruptions import Corruption, corrupt
from data_pipelines.records import Source
from data_pipelines.samples.masks import Mask
from data_pipelines.samples.pairs import BrokenPair, ImageDecoder, read_pair, to_sample_pair
from data_pipelines.samples.patches import Patches
from data_pipelines.samples.pixels import Pixels


class RowNote(NamedTuple):
    """What is told of a row beside its image. reason: why there is none, or None."""

    row: int
    index: int
    reason: str | None
    key: str = ""
    fields: dict[str, object] | None = None


@dataclass(frozen=True)
class ImagesInOrder:
    """Batches of the pairs in `ranges`, one batch each, as `workers.iterate` wants them: {"image": uint8 [n, h, w, 3], "notes"}.

    With `Patches` they hold "patches" and "grid" in place of "image". Rows whose image is broken are zeros. fields: which texts
    are carried along; None for all. corruption: name and severity of what is done to every image. mask: with it, batches hold
    "mask" too.
    """

    source: Source
    ranges: Sequence[range]
    rows: int
    pixels: Pixels | Patches
    decoder: ImageDecoder
    fields: frozenset[str] | None = None
    corruption: tuple[Corruption, int] | None = None
    mask: Mask | None = None

    def __len__(self) -> int:
        return len(self.ranges)

    @cached_property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        arrays = self.pixels.arrays | (self.mask.arrays if self.mask else {})
        return {name: ((self.rows, *shape), dtype) for name, (shape, dtype) in arrays.items()}

    def items(self, batch: int, part: int, parts: int) -> list[tuple[int, int]]:
        rows = list(enumerate(self.ranges[batch]))
        return rows[part * len(rows) // parts : (part + 1) * len(rows) // parts]

    def fill(self, items: Sequence[tuple[int, int]], arrays: dict[str, np.ndarray]) -> list[RowNote]:
        return [self._fill_row(row, index, arrays) for row, index in items]

    def finish(self, batch: int, arrays: dict[str, np.ndarray], notes: list[list[RowNote]]) -> dict:
        used = {name: array[: len(self.ranges[batch])] for name, array in arrays.items()}
        return used | {"notes": sorted(sum(notes, []))}

    def _fill_row(self, row: int, index: int, arrays: dict[str, np.ndarray]) -> RowNote:
        try:
            read = read_pair(self.source, index)
            pair = to_sample_pair(read, 0, index, self.decoder)
            image = self.pixels.draw(pair.pixels)
            mask = self.mask.make(pair, None) if self.mask else {}
        except BrokenPair as error:
            for array in arrays.values():
                array[row] = 0
            return RowNote(row, index, error.reason)
        if self.corruption is not None:
            image = corrupt(image, *self.corruption, key=pair.key)
        for name, values in (self.pixels.pack(image) | mask).items():
            arrays[name][row] = values
        wanted = self.fields
        fields = {name: v for name, v in pair.fields.items() if wanted is None or name.partition(".")[0] in wanted}
        return RowNote(row, index, None, pair.key, fields)


class EvalBatches:
    """Iterates over {"image": uint8 [b, h, w, 3], "key": list[str], "fields": list[dict], "index": list[int] in the source}.

    Pairs that cannot be decoded are left out; after a pass, `counts` says how many, by reason.
    """

    def __init__(self, images: ImagesInOrder, workers: int, threads: int | None):
        self._images, self._workers, self._threads = images, workers, threads
        self.counts = collections.Counter()

    def __iter__(self) -> Iterator[dict]:
        self.counts = collections.Counter()
        threads = self._threads or max(1, workers.usable_cores() // max(1, self._workers))
        batches = workers.iterate(self._images, workers=self._workers, threads=threads, prefetch=1)
        waiting: tuple[dict[str, np.ndarray], list[RowNote]] | None = None  # rows that did not fill a batch
        try:
            for batch in batches:
                self.counts.update(note.reason for note in batch["notes"] if note.reason)
                notes = batch.pop("notes")
                arrays, notes = _join(waiting, _usable(batch, notes))
                size = self._images.rows
                if len(notes) >= size:
                    yield _to_batch({name: array[:size] for name, array in arrays.items()}, notes[:size])
                    arrays, notes = {name: array[size:] for name, array in arrays.items()}, notes[size:]
                waiting = (arrays, notes) if notes else None
        finally:
            batches.close()
        if waiting:
            yield _to_batch(*waiting)


def _usable(arrays: dict[str, np.ndarray], notes: list[RowNote]) -> tuple[dict[str, np.ndarray], list[RowNote]]:
    usable = [note for note in notes if note.reason is None]
    if len(usable) == len(notes):
        return arrays, usable
    return {name: array[[note.row for note in usable]] for name, array in arrays.items()}, usable


def _join(
    waiting: tuple[dict[str, np.ndarray], list] | None, more: tuple[dict[str, np.ndarray], list]
) -> tuple[dict[str, np.ndarray], list]:
    if waiting is None:
        return more
    return {name: np.concatenate([array, more[0][name]]) for name, array in waiting[0].items()}, waiting[1] + more[1]


def _to_batch(arrays: dict[str, np.ndarray], notes: list[RowNote]) -> dict:
    _, indices, _, keys, fields = zip(*notes, strict=True)
    return arrays | {"key": list(keys), "fields": list(fields), "index": list(indices)}
