"""From a batch number to the arrays of a training batch: the part that runs in threads and worker processes.

    places -> read -> decode (kept in memory while there is room) -> field by field -> rows of the batch

Every random choice is a function of (seed, position), so batch k is the same whatever makes it.

A pair that cannot become a sample is replaced by another of its source, drawn from (seed, position), and counted
under the reason why the original failed. The counts travel with the batch, so they are exact for what was
handed out.

The trap: the replacement may be broken as well; after MAX_TRIES the source is not noisy but unusable, and
that stops.
"""

import collections
import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from data_pipelines import text_ops
from data_pipelines.counter_rng import Draws
from data_pipelines.errors import UserError
from data_pipelines.samples.pairs import (
    BrokenPair,
    Field,
    ImageCache,
    ImageDecoder,
    SamplePair,
    read_pair,
    to_sample_pair,
)
from data_pipelines.samples.patches import Patches
from data_pipelines.samples.reading import Place, Reader
from data_pipelines.samples.tokens import Tokens

MAX_TRIES = 100
ENDLESS_BATCHES = 1 << 40
_SAMPLE_STREAM, _SUBSTITUTE_STREAM = 2, 3
_LOOKED_AT_PAIRS = 100


@dataclass(frozen=True)
class TrainBatches:
    """The local batches of one process, as `workers.iterate` wants them.

    A batch has the arrays of all fields, key: list[str] of its rows, replaced: {reason: substitutes}, and several_lines: how
    many captions have line breaks.

    Attributes:
      reader: which pairs.
      fields: what becomes of each; they draw from one stream, in this order.
      decoder, cache: how images are decoded, and where they are kept.
      seed: of every random choice.
      names: of the sources, for messages.
    """

    reader: Reader
    fields: tuple[Field, ...]
    decoder: ImageDecoder
    cache: ImageCache
    seed: int
    names: tuple[str, ...]

    def __len__(self) -> int:
        return ENDLESS_BATCHES

    @property
    def rows(self) -> int:
        return self.reader.rows

    @cached_property
    def shapes(self) -> Mapping[str, tuple[tuple[int, ...], Any]]:
        arrays = itertools.chain.from_iterable(field.arrays.items() for field in self.fields)
        return {name: ((self.rows, *shape), dtype) for name, (shape, dtype) in arrays}

    def items(self, batch: int, part: int, parts: int) -> Sequence[Place]:
        return self.reader.places(batch, part, parts)

    def fill(
        self, places: Sequence[Place], arrays: dict[str, np.ndarray]
    ) -> tuple[list[int], list[str], dict[str, int], int]:
        """Writes some rows of one batch. -> (rows, keys, substitutes by reason, captions with line breaks)"""
        keys, replaced, several = [], collections.Counter(), 0
        fields = self._fields_at(places[0].position // self.reader.batch_pairs) if places else ()
        # The rows of a step may be shorter than the memory they lie in.
        inside = {name: tuple(map(slice, shape)) for field in fields for name, (shape, _) in field.arrays.items()}
        for place in places:
            values, key, reason = self.sample(place, fields)
            several += values.pop("several_lines", False)
            for name, value in values.items():
                arrays[name][(place.row, *inside[name])] = value
            keys.append(key)
            if reason:
                replaced[reason] += 1
        return [place.row for place in places], keys, dict(replaced), several

    def finish(self, batch: int, arrays: dict[str, np.ndarray], notes: list) -> dict:
        fields = self._fields_at(self.reader.start + batch)
        for name, (shape, _) in itertools.chain.from_iterable(field.arrays.items() for field in fields):
            arrays[name] = arrays[name][(slice(None), *map(slice, shape))]
        keys, replaced = [""] * self.rows, collections.Counter()
        for rows, chunk_keys, chunk_replaced, _ in notes:
            replaced.update(chunk_replaced)
            for row, key in zip(rows, chunk_keys, strict=True):
                keys[row] = key
        several = sum(note[-1] for note in notes)
        return arrays | {"key": keys, "replaced": dict(replaced), "several_lines": several}

    def _fields_at(self, step: int) -> tuple[Field, ...]:
        """The fields of a step: the length of `Patches` is one of many."""
        return tuple(field.at(step) if isinstance(field, Patches) else field for field in self.fields)

    def sample(self, place: Place, fields: Sequence[Field]) -> tuple[dict[str, Any], str, str | None]:
        """The arrays and the key of the sample at a place, and why it is a substitute (None: it is not)."""
        substitutes = first_reason = None
        for _ in range(MAX_TRIES):
            try:
                pair = self.cache.get(place.source, place.record) or self._read(place, fields)
                rng, values = Draws(self.seed, _SAMPLE_STREAM, place.position), {}
                for field in fields:
                    values.update(field.make(pair, rng))
                return values, pair.key, first_reason
            except BrokenPair as error:
                first_reason = first_reason or error.reason
            substitutes = substitutes or Draws(self.seed, _SUBSTITUTE_STREAM, place.position)
            record = int(substitutes.random() * len(self.reader.sources[place.source]))
            place = place._replace(record=record, block=None)
        raise self._unusable(place.source, first_reason)

    def _read(self, place: Place, fields: Sequence[Field]) -> SamplePair:
        read = self.reader.read(place)
        decoder = self.decoder if any(field.reads_pixels for field in fields) else None
        pair = to_sample_pair(read, place.source, place.record, decoder)
        if len(fields) == len(self.fields):  # With fewer fields it may lack its image.
            self.cache.add(pair, file_bytes=len(read.image or b""))
        return pair

    def _unusable(self, source: int, reason: str) -> UserError:
        """What to say of a source of which no pair can be used."""
        name, first = self.names[source], []
        captions = next((field.captions[source] for field in self.fields if isinstance(field, Tokens)), ())
        for record in range(min(_LOOKED_AT_PAIRS, len(self.reader.sources[source]))):
            with contextlib.suppress(BrokenPair):
                first.append(read_pair(self.reader.sources[source], record).fields)
        wanted = [field for field, _ in captions]
        known = [field for field in wanted if any(text_ops.lookup(it, field.split("+")[0]) is not None for it in first)]
        if reason != "missing_text" or known:
            return UserError(
                f"{MAX_TRIES} pairs drawn from {name!r} cannot be used, the first for {reason!r}; check its shards"
            )
        there = ", ".join(sorted(set(itertools.chain.from_iterable(map(text_ops.field_names, first)))))
        told = (
            f"caption field {wanted[0]!r} is"
            if len(wanted) == 1
            else f"caption fields {', '.join(map(repr, wanted))} are"
        )
        return UserError(
            f"{told} in none of the first {len(first)} pairs of {name!r}; they have {there or 'no texts'}; "
            f"set data.sources.{source}.captions"
        )
