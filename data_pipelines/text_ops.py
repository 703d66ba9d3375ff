"""From the fields of a pair to one caption: which field, which language, which keywords.

A caption spec is a tuple of (field, probability):
  "txt", "caption"        a field by name
  "captions.en"           an entry of a field that is a mapping
  "captions.*"            any entry of it, uniformly; also of a field that is a list, and any line of a text
  "keywords"              a comma-separated (or JSON) list: a few of them in random order
  "captions.en+keywords"  the parts joined by a comma; only the first of them has to be there
If the pair lacks the drawn field, or it is blank, another of its fields is drawn, so a rare language costs no pairs.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from data_pipelines.counter_rng import Rng
from data_pipelines.errors import UserError

MAX_KEYWORDS = 4
ALL_FIELDS = ("txt", "caption", "captions.*", "keywords")  # the usual ones
CaptionSpec = Sequence[tuple[str, float]]


class HasFields(Protocol):
    """Such as `records.Pair`."""

    fields: Mapping[str, object]


class CaptionError(ValueError):
    """This pair has no usable caption; `reason` is "missing_text" or "empty_text"."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def check_spec(spec: CaptionSpec) -> None:
    """Raises UserError when a caption spec cannot be drawn from."""
    if not spec:
        raise UserError('captions=() names no caption field; use e.g. captions=(("txt", 1.0),)')
    for field, probability in spec:
        if not field or any(not part.strip() for part in field.split("+")):
            raise UserError(f"caption field {field!r} is empty; use e.g. 'txt' or 'captions.en+keywords'")
        if not probability > 0 or probability == float("inf"):
            raise UserError(f"caption field {field!r} has probability {probability}; it must be positive")


def draw_caption(fields: Mapping[str, object], spec: CaptionSpec, rng: Rng) -> str:
    """Draws a caption of a pair. fields: as in `Pair`; spec: see above, checked by `check_spec`.

    Raises:
      CaptionError: no field of the spec is there ("missing_text"), or all that are there are blank ("empty_text").
    """
    remaining = list(spec)
    while remaining:
        chosen = _draw_weighted(remaining, rng)
        text = _draw_field(fields, remaining[chosen][0], rng)
        if text:
            return text
        del remaining[chosen]
    present = any(lookup(fields, field.split("+")[0]) is not None for field, _ in spec)
    raise CaptionError("empty_text" if present else "missing_text")


def captions_of(fields: Mapping[str, object], field: str) -> list[str]:
    """Every text that one field of a spec (without "+") stands for; [] when it is missing or blank."""
    value = lookup(fields, field)
    if field == "keywords":
        return [", ".join(words)] if (words := _keyword_list(value)) else []
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, str) and field.endswith(".*"):
        value = value.splitlines()
    texts = value if isinstance(value, list | tuple) else [value]
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]


def iter_captions(
    pairs: Iterable[HasFields], *, fields: Sequence[str] = ALL_FIELDS, repeat: Mapping[str, int] | None = None
) -> Iterator[str]:
    """Every text that some fields of every pair hold, once a pair: what a tokenizer is trained on. A `Source` is iterable.

    repeat: field -> how often its texts come in all, so that a language among many gets pieces of its own.
    """
    for pair in pairs:
        texts = [captions_of(pair.fields, field) for field in fields]
        yield from dict.fromkeys(itertools.chain.from_iterable(texts))
        for field, times in (repeat or {}).items():
            yield from captions_of(pair.fields, field) * (times - 1)


def lookup(fields: Mapping[str, object], field: str) -> object:
    """The value at a dotted path, or None. A mapping is a value only when asked for as such, by `.*`."""
    value = fields[field] if field in fields else fields
    for part in () if field in fields else field.removesuffix(".*").split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return None if isinstance(value, Mapping) and not field.endswith(".*") else value


def without_surrogates(text: str) -> str:
    """The text without half surrogate pairs, as a cut emoji leaves them: no encoding has them. Whole pairs are joined."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore")


def field_names(fields: Mapping[str, object]) -> list[str]:
    """The fields that a spec may name, entries of mappings as "field.entry"."""
    names = ([f"{name}.{entry}" for entry in it] if isinstance(it, Mapping) else [name] for name, it in fields.items())
    return list(itertools.chain.from_iterable(names))


def _draw_weighted(spec: CaptionSpec, rng: Rng) -> int:
    """The index of a field, drawn in proportion to its probability."""
    if len(spec) == 1:
        return 0
    point = rng.random() * sum(probability for _, probability in spec)
    for index, (_, probability) in enumerate(spec):
        point -= probability
        if point < 0:
            return index
    return len(spec) - 1


def _draw_field(fields: Mapping[str, object], field: str, rng: Rng) -> str:
    """The text of a field, "" when it is missing or blank."""
    if "+" not in field:
        return _draw_part(fields, field, rng)
    first, *others = [_draw_part(fields, part.strip(), rng) for part in field.split("+")]
    return ", ".join([first, *filter(None, others)]) if first else ""


def _draw_part(fields: Mapping[str, object], field: str, rng: Rng) -> str:
    if field == "keywords":
        return ", ".join(_draw_some(_keyword_list(lookup(fields, field)), rng))
    texts = captions_of(fields, field)
    if len(texts) > 1:
        return texts[int(rng.random() * len(texts))]
    return texts[0] if texts else ""


def _keyword_list(value: object) -> list[str]:
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list | tuple):
        return []
    return [word.strip() for word in value if isinstance(word, str) and word.strip()]


def _draw_some(words: list[str], rng: Rng) -> list[str]:
    """One to MAX_KEYWORDS of the words, without repetition, in random order."""
    count = 1 + int(rng.random() * min(MAX_KEYWORDS, len(words)))
    words, drawn = list(words), []
    for _ in range(min(count, len(words))):
        drawn.append(words.pop(int(rng.random() * len(words))))
    return drawn
