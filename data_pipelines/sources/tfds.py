"""What a folder written by TensorFlow Datasets says about its shards, read without the tfds package.

    dataset_info.json   fileFormat, and per split its name and the number of records in each shard
    features.json       the features; one of class …image_feature.Image is the image
    NAME-SPLIT.tfrecord-00000-of-00010, or .array_record-…

The trap: the number of records is the only sign that a shard without a footer was cut between two records.
"""

import functools
import json
import os
import re

from data_pipelines.errors import UserError
from data_pipelines.sources import files

_SHARD = re.compile(r"(?:.*-)?(?P<split>[^-]+)\.(?:tfrecord|array_record)-(?P<number>\d{5})-of-\d{5}")


def expand_folder(folder: str) -> list[str]:
    """The shards of a folder with one split.

    Raises:
      UserError: the folder has several splits, or was not written by TFDS.
    """
    splits = _splits(folder)
    if not splits:
        raise UserError(f"{folder!r} is a folder without dataset_info.json; name its files, e.g. '{folder}/*.tar'")
    if len(splits) > 1:
        names = ", ".join(splits)
        example = f"{folder}/*-{next(iter(splits))}.*-of-*"
        raise UserError(f"{folder!r} holds the splits {names}; name the files of one, e.g. {example!r}")
    found = files.expand_shards(os.path.join(folder, f"*-{next(iter(splits))}.*-of-*"))
    return [path for path in found if _SHARD.fullmatch(os.path.basename(path))]


def records_due(shard: str) -> int | None:
    """The number of records that a shard should hold; None if its folder does not say."""
    matched = _SHARD.fullmatch(os.path.basename(shard))
    lengths = _splits(os.path.dirname(shard)).get(matched["split"], ()) if matched else ()
    return lengths[int(matched["number"])] if lengths and int(matched["number"]) < len(lengths) else None


def image_feature(shard: str) -> str | None:
    """The name of the image feature, if features.json lies beside the shard and names one."""
    described = _json(os.path.join(os.path.dirname(shard), "features.json"))
    try:
        features = described.get("featuresDict", {}).get("features", {})
        return next((name for name, value in features.items() if "image" in value), None)
    except (AttributeError, TypeError):  # not in TFDS's format
        return None


def _splits(folder: str) -> dict[str, tuple[int, ...]]:
    """The number of records in each shard of each split."""
    described = _json(os.path.join(folder, "dataset_info.json")).get("splits", [])
    try:
        return {split["name"]: tuple(map(int, split.get("shardLengths", ()))) for split in described}
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"'{folder}/dataset_info.json' is not in TFDS's format ({error!r})") from error


@functools.lru_cache(64)
def _json(path: str) -> dict:
    if not files.exists(path):
        return {}
    try:
        parsed = json.loads(files.read_whole(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path!r} is not JSON ({error})") from error
    return parsed if isinstance(parsed, dict) else {}
