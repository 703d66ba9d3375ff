"""What a folder written by TensorFlow Datasets says about its shards, read without the tfds package.

    dataset_info.json   fileFormat, and per split its name and the number of records in each shard
    features.json       the features; one of class …image_feature.Image is the image
    NAME-SPLIT.tfrecord-00000-of-00010, or .array_record-…

The trap: the number of records is the only sign that a shard without a footer was cut between two records.
"""

import functools
import glob
import json
import os
import re

from data_pipelines.errors import UserError
from data_pipelines.sources import files

_SHARD = re.compile(r"(?:.*-)?(?P<split>[^-]+)\.(?:tfrecord|array_record)-(?P<number>\d{5})-of-\d{5}")


def expand_folder(folder: str) -> dict[str, list[str]]:
    """The shards of each split that is there. Raises UserError: there is none."""
    found = {}
    for split in _splits(folder):
        paths = sorted(glob.glob(os.path.join(glob.escape(folder), f"*-{glob.escape(split)}.*-of-*")))
        found[split] = [path for path in paths if _SHARD.fullmatch(os.path.basename(path))]
    found = {split: paths for split, paths in found.items() if paths}
    if not found:
        raise UserError(f"{folder!r} has a dataset_info.json, but no shards of a split that it names; copy it again")
    return found


def records_due(shard: str) -> int | None:
    """The number of records that a shard should hold; None if its folder does not say."""
    matched = _SHARD.fullmatch(os.path.basename(shard))
    lengths = _splits(os.path.dirname(shard)).get(matched["split"], ()) if matched else ()
    return lengths[int(matched["number"])] if lengths and int(matched["number"]) < len(lengths) else None


def image_feature(shard: str) -> str | None:
    """The name of the image feature, if features.json lies beside the shard and names one."""
    path = os.path.join(os.path.dirname(shard), "features.json")
    match _json(path):
        case {"featuresDict": {"features": dict(features)}}:
            return next(
                (name for name, value in features.items() if isinstance(value, dict) and "image" in value), None
            )
        case {"featuresDict": _}:
            raise UserError(f"{path!r} is not in TFDS's format: it has no featuresDict.features; copy it again")
    return None


def class_names(shard: str) -> dict[str, list[str]]:
    """The names of the classes of each label feature, from FEATURE.labels.txt beside the shard."""
    pattern = os.path.join(glob.escape(os.path.dirname(shard)), "*.labels.txt")
    paths = [] if files.is_remote(shard) else sorted(glob.glob(pattern))
    texts = {os.path.basename(path).removesuffix(".labels.txt"): files.read_whole(path) for path in paths}
    return {name: files.lines(text, "replace") for name, text in texts.items()}


def _splits(folder: str) -> dict[str, tuple[int, ...]]:
    """The number of records in each shard of each split."""
    path = os.path.join(folder, "dataset_info.json")
    try:
        splits = {
            str(split["name"]): tuple(map(int, split.get("shardLengths", ())))
            for split in _json(path).get("splits", [])
        }
        if any(length < 0 for lengths in splits.values() for length in lengths):
            raise ValueError("a negative number of records")
    except (AttributeError, TypeError, KeyError, ValueError, OverflowError) as error:
        raise UserError(f"{path!r} is not in TFDS's format ({error!r}); copy it again") from error
    return splits


@functools.lru_cache(64)
def _json(path: str) -> dict:
    if not files.exists(path):
        return {}
    try:
        parsed = json.loads(files.read_whole(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path!r} is not JSON ({error}); copy it again") from error
    if not isinstance(parsed, dict):
        raise UserError(f"{path!r} holds a {type(parsed).__name__}, not a JSON object; copy it again")
    return parsed
