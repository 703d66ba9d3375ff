"""Columns and features by name: which one holds the image, and what to say if a name does not exist."""

import difflib
import json
import os
import re
from collections.abc import Collection, Mapping

from data_pipelines.errors import UserError

_A_FILE = re.compile(r"://|\.(?:jpe?g|png|webp|gif|bmp|tiff?|avif)$", re.IGNORECASE)


def did_you_mean(name: str, candidates: Collection[str]) -> str:
    """What a message adds about an unknown name: "; there are a, b, c", and the close one if there is one."""
    close = difflib.get_close_matches(name, set(candidates) - {name}, 1, 0.5)
    meant = f", did you mean {close[0]!r}?" if close else ""
    return f"; there are {', '.join(sorted(candidates)) or 'none'}{meant}"


def _how_to_name_one(columns: Collection[str]) -> str:
    """What a message adds if no column of a file holds images."""
    found = f"; there are {', '.join(sorted(columns)) or 'none'}"
    if any(separator in column for column in columns for separator in ";\t|"):
        return f"{found}: separate columns with commas, or with tabs in a file called .tsv"
    if any(_A_FILE.search(column) for column in columns):
        return f"{found}: its first line is a row; put one before it that names the columns, such as image,caption"
    close = difflib.get_close_matches("image", set(columns) - {"image"}, 1, 0.5)
    return f"{found}; rename {repr(close[0]) if close else 'the right one'} to 'image'"


def parse_object(text: str | bytes) -> dict | None:
    """The JSON object in a text; None if it holds anything else."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):  # RecursionError: nested a thousand deep
        return None
    return parsed if isinstance(parsed, dict) else None


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
