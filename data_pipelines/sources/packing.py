"""Any source to tar shards: 00000.tar, 00001.tar, … in the layout that WebDataset and img2dataset have.

    KEY.jpg, KEY.txt (KEY.0.txt, … for further captions), KEY.cls, KEY.json with all other fields and the image's name

Image files are copied as they are. A pair whose image is missing or cannot be decoded, or that lacks the caption that it ought to
have, is skipped and counted.

Labels that are names become numbers, in the order of classnames.txt beside the shards, as CLIP_benchmark has it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data_pipelines import image_ops
from data_pipelines.errors import UserError
from data_pipelines.records import Pair, Source
from data_pipelines.sources.blocks import InOrder
from data_pipelines.sources.writing import TarWriter
from data_pipelines.text_ops import captions_of, lookup

MAX_SHARDS, MAX_IMAGE_PIXELS = 100_000, 1 << 26


@dataclass
class Packed:
    """What became of a source: pairs written, shards, how many were skipped by reason, and an example of each."""

    pairs: int = 0
    shards: int = 0
    skipped: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def skip(self, reason: str, key: str) -> None:
        self.skipped[reason] += 1
        self.examples.setdefault(reason, key)


def pack(
    source: Source,
    out: Path,
    *,
    captions: str | None = None,
    label: str | None = None,
    classes: list[str] | None = None,
    shard_pairs: int = 10_000,
    progress: Callable[[int], None] = lambda pairs: None,
) -> Packed:
    """Writes the pairs of a source, in order, into a folder that exists.

    Args:
      captions: the field that becomes `txt`; None: pairs need no caption.
      label: the field that becomes `cls`.
      classes: the names that labels stand for; labels that are among them become their numbers.
      shard_pairs: pairs in each shard but the last.
      progress: called with the number of pairs looked at.

    Raises:
      UserError: no pair is left, or a label is no class.
      OSError: the disk is full.
    """
    packed = Packed()
    numbers = {name: number for number, name in reversed(list(enumerate(classes or [])))}
    pairs = _usable(source, packed, captions, progress)
    for shard in range(MAX_SHARDS):
        first = next(pairs, None)
        if first is None:
            break
        with TarWriter(out / f"{shard:05d}.tar") as writer:
            packed.shards += 1
            for pair in _some(first, pairs, shard_pairs):
                writer.write(_renamed(pair, packed.pairs, captions, label, numbers))
                packed.pairs += 1
    if next(pairs, None) is not None:
        raise UserError(f"shard_pairs={shard_pairs} makes more than {MAX_SHARDS} shards; write more pairs into each")
    if not packed.pairs:
        raise UserError(f"none of the {len(source)} pairs can be packed: {told(packed)}")
    if classes:
        (out / "classnames.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
    return packed


def told(packed: Packed) -> str:
    """The reasons for what was skipped, with an example of each."""
    return ", ".join(
        f"{count} {reason} ({packed.examples[reason]!r})" for reason, count in packed.skipped.most_common()
    )


def _some(first: Pair, pairs: Iterator[Pair], count: int) -> Iterator[Pair]:
    yield first
    for _ in range(count - 1):
        pair = next(pairs, None)
        if pair is None:
            return
        yield pair


def _usable(source: Source, packed: Packed, captions: str | None, progress: Callable[[int], None]) -> Iterator[Pair]:
    in_order = InOrder(source)
    for index in range(len(source)):
        progress(index)
        try:
            pair = in_order[index]
        except OSError as error:
            packed.skip("unreadable", str(error)[:80])
            continue
        reason = _fault(pair, captions)
        if reason is None:
            yield pair
        else:
            packed.skip(reason, pair.key)


def _fault(pair: Pair, captions: str | None) -> str | None:
    if pair.image is None:
        return next(
            (problem for problem in pair.problems if problem in ("missing_image", "invalid_csv")), "missing_image"
        )
    if captions is not None and not captions_of(pair.fields, captions):
        return "missing_text"
    try:
        # JPEGs at an eighth of their size: enough to find what is cut or damaged.
        image_ops.decode_pixels(pair.image, max_pixels=MAX_IMAGE_PIXELS, min_size_px=(1, 1))
        return None
    except image_ops.DecodeError as error:
        return error.reason


def _renamed(pair: Pair, number: int, captions: str | None, label: str | None, numbers: Mapping[str, int]) -> Pair:
    """The pair under a number, with its caption and label where the layout has them."""
    fields = dict(pair.fields)
    if captions is not None:
        texts = captions_of(fields, captions)
        fields.pop(captions, None)
        fields["txt"] = texts if len(texts) > 1 else texts[0]
    if label is not None and (value := lookup(fields, label)) is not None:
        fields.pop(label, None)
        if numbers and isinstance(value, str) and value not in numbers:
            raise UserError(f"{pair.key!r} has {label}={value!r}, which is none of the {len(numbers)} classes")
        fields["cls"] = numbers.get(value, value) if isinstance(value, str) else value
    return Pair(f"{number:09d}", pair.image, {"name": pair.key} | fields)
