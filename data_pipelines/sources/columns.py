"""Fields by name: which one holds the image, what to say if a name does not exist, and the fields in a JSON object."""

import collections
import difflib
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from data_pipelines.errors import UserError
from data_pipelines.text_ops import without_surrogates

_MAX_DEPTH, _MAX_JSON_BYTES = 100, 1 << 24

_A_FILE = re.compile(r"://|\.(?:jpe?g|png|webp|gif|bmp|tiff?|avif)$", re.IGNORECASE)


def did_you_mean(name: str, candidates: Collection[str]) -> str:
    """What a message adds about an unknown name: "; there are a, b, c", and the close one if there is one."""
    found = f"; there are {', '.join(sorted(candidates)) or 'none'}"
    if told := _no_header(candidates):
        return found + told
    close = difflib.get_close_matches(name, set(candidates) - {name}, 1, 0.5)
    return f"{found}, did you mean {close[0]!r}?" if close else found


def repeated_name(names: Sequence[str]) -> str | None:
    """The first name that comes again; "" may."""
    return next((name for name, count in collections.Counter(names).items() if name and count > 1), None)


def _how_to_name_one(columns: Collection[str]) -> str:
    """What a message adds if no column of a file holds images."""
    found = f"; there are {', '.join(sorted(columns)) or 'none'}"
    if told := _no_header(columns):
        return found + told
    close = difflib.get_close_matches("image", set(columns) - {"image"}, 1, 0.5)
    return f"{found}; name {repr(close[0]) if close else 'the right one'}: --image-column, or image= in a recipe"


def _no_header(columns: Collection[str]) -> str:
    """What a message adds where the first line of a list does not name its columns, or they are not apart."""
    if any(separator in column for column in columns for separator in ";\t|,"):
        return ": separate columns with commas, or with tabs in a file called .tsv"
    if any(_A_FILE.search(column) for column in columns):
        return ": its first line is a row; put one before it that names the columns, such as image,caption"
    return ""


def parse_object(text: bytes) -> tuple[dict[str, Any], list[str]]:
    """The JSON object in a text, and its problems: {} and "invalid_json" if it holds anything else, or too much.

    Half an emoji ("\\ud83d") is taken out: no encoding has it. That is the problem "control_chars".
    """
    if len(text) > _MAX_JSON_BYTES:
        return {}, ["invalid_json"]
    try:
        parsed, repaired = load_json(text)
    except (ValueError, RecursionError):  # RecursionError: nested a thousand deep
        return {}, ["invalid_json"]
    brackets = text.count(b"[") + text.count(b"{")
    if not isinstance(parsed, dict) or (brackets > _MAX_DEPTH and _is_deep(parsed)):
        return {}, ["invalid_json"]
    return parsed, ["control_chars"] if repaired else []


def load_json(text: bytes) -> tuple[Any, bool]:
    """What a JSON text holds without halves of surrogate pairs, and whether it had any. Raises ValueError, RecursionError."""
    parsed = json.loads(text)
    # What a surrogate may come from: an escape, its own bytes, or UTF-16. Few objects have one of these.
    if b"\\ud" in text or b"\\uD" in text or b"\xed" in text or b"\0" in text:
        repaired = _without_surrogates(parsed)
        return repaired, repaired != parsed
    return parsed, False


def _is_deep(value: Any) -> bool:
    """Whether it is nested deeper than pickle and json can write."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [it for v in level if isinstance(v, dict | list) for it in (v.values() if isinstance(v, dict) else v)]
    return bool(level)


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, list):
        return [_without_surrogates(entry) for entry in value]
    if isinstance(value, dict):
        return {without_surrogates(name): _without_surrogates(entry) for name, entry in value.items()}
    return value


def check_image(path: str, notes: Mapping[str, object], image: str | None) -> str:
    """The column of a shard that holds the image.

    Args:
      path: the shard, for the message.
      notes: the notes of its index: `image`, the column that was found, and `features` or `columns`, all that exist.
      image: the requested column; None for the one that was found.

    Raises:
      UserError: there is no such column.
    """
    columns = notes.get("features") or notes["columns"]
    if image is not None and image not in columns:
        raise UserError(f"shard {os.fspath(path)!r} has no image column {image!r}{did_you_mean(image, columns)}")
    found = image or notes["image"]
    if found is None:
        raise UserError(f"shard {os.fspath(path)!r} has no column with images{_how_to_name_one(columns)}")
    return found
