"""Columns and features by name: which holds the picture, and what to say when a name is not there."""

import difflib
import os
from collections.abc import Collection, Mapping

from data_pipelines.errors import UserError


def did_you_mean(name: str, candidates: Collection[str]) -> str:
    """ "; there are a, b, c" and, when one of them is close, which was meant."""
    close = difflib.get_close_matches(name, set(candidates) - {name}, 1, 0.5)
    meant = f", did you mean {close[0]!r}?" if close else ""
    return f"; there are {', '.join(sorted(candidates)) or 'none'}{meant}"


def _how_to_have_one(columns: Collection[str]) -> str:
    """What to do about the columns of a file of which none holds the images."""
    told = f"; there are {', '.join(sorted(columns)) or 'none'}"
    for separator in ";\t|":
        if len(columns) == 1 and separator in min(columns):
            return f"{told}: separate columns with commas, or with tabs in a file called .tsv"
    close = difflib.get_close_matches("image", set(columns) - {"image"}, 1, 0.5)
    return f"{told}; rename {close[0]!r} to 'image'" if close else told


def check_image(path: str, notes: Mapping[str, object], image: str | None) -> str:
    """The column of a shard that holds the picture.

    Args:
      path: of the shard, for the message.
      notes: of its index: `image`, the column that was found, and `features` or `columns`, all that there are.
      image: the one that was asked for; None for the one that was found.

    Raises:
      ValueError: there is none.
    """
    columns = notes.get("features") or notes["columns"]
    if image is not None and image not in columns:
        raise UserError(f"shard {os.fspath(path)!r} has no image column {image!r}{did_you_mean(image, columns)}")
    found = image or notes["image"]
    if found is None:
        raise UserError(f"shard {os.fspath(path)!r} has no column with pictures{_how_to_have_one(columns)}")
    return found
