"""What a folder holds, as people and tools leave it: which shards, lists or images, and in which splits.

    dataset_info.json                    TensorFlow Datasets
    [SPLIT/]nshards.txt, [SPLIT/]0.tar   CLIP_benchmark and DataComp (`wds_*`)
    *.tar                                shards
    captions.jsonl, images/              Crossmodal-3600
    [data/]SPLIT-00000-of-00002.parquet  Hugging Face
    one *.csv, *.tsv or *.jsonl          a list of the images beside it
    CLASS/*.jpg, or *.jpg                a folder per class, or images alone; SPLIT/CLASS/*.jpg

`FOLDER#test` names a split, and so does `FILE.json#test` for Karpathy's files. What has several is refused without one; an
evaluation takes its test set.
"""

import glob
import os
import re
from collections.abc import Sequence

from data_pipelines.errors import UserError
from data_pipelines.sources import annotations, files, tfds
from data_pipelines.sources.annotations import split_name

EVALUATED = ("test", "validation", "val", "valid", "dev")
TRAINED = ("train", "training")
SPLITS = (*TRAINED, *EVALUATED)
_PARQUET_SPLIT = re.compile(r"(.+?)(?:-\d{5}-of-\d{5})?(?:-[0-9a-f]{16})?\.parquet")
_LISTS = (".csv", ".tsv", ".jsonl")


def expand(path: str) -> list[str]:
    """What a path stands for: itself, or the shards of a folder, of the split that is named after `#`.

    Raises:
      UserError: a folder holds nothing that is known, or several splits of which none is named.
    """
    place, split = split_name(path)
    if not _is_folder(place):
        return [path]
    found = _splits(place)
    if split and split not in found:
        raise UserError(f"{place!r} has no split {split!r}; there are {', '.join(found) if any(found) else 'none'}")
    if len(found) > 1 and not split:
        raise UserError(f"{place!r} holds the splits {', '.join(found)}; name one: {place}#{next(iter(found))}")
    return found[split or next(iter(found))]


def with_split(path: str, wanted: Sequence[str] = EVALUATED) -> str:
    """The path with the first wanted split that there is after `#`, where it has several splits and names none.

    Raises:
      UserError: as `expand`, or it has none of them.
    """
    place, split = split_name(path)
    if split or not (_is_folder(place) or place.lower().endswith(".json")):
        return path
    splits = list(_splits(place)) if _is_folder(place) else annotations.splits_of(place)
    if len(splits) < 2:
        return path
    chosen = next((name for name in wanted if name in splits), None)
    if chosen is None:
        raise UserError(f"{place!r} holds the splits {', '.join(splits)}; name one: {place}#{splits[0]}")
    return f"{place}#{chosen}"


def _is_folder(path: str) -> bool:
    """A URL is taken for a folder where CLIP_benchmark's files are under it."""
    if not files.is_remote(path):
        return os.path.isdir(path)
    name = path.rstrip("/").rpartition("/")[2]
    return "." not in name and any(files.exists(f"{path}/{own}nshards.txt") for own in ("", "test/", "train/"))


def _splits(folder: str) -> dict[str, list[str]]:
    """The shards, lists or folders of each split; under "" where there are no splits."""
    folder = folder.rstrip("/") or folder
    if counted := {name: _counted_tars(os.path.join(folder, name)) for name in ("", *SPLITS)}:
        counted = {name: paths for name, paths in counted.items() if paths}
    if counted or files.is_remote(folder):
        return counted
    entries = sorted(os.listdir(folder))
    if "dataset_info.json" in entries:
        return tfds.expand_folder(folder)
    if tars := [os.path.join(folder, name) for name in entries if name.endswith(".tar")]:
        return {"": tars}
    if annotations.CROSSMODAL in entries and "images" in entries:
        return {"": [folder]}
    for inner in (folder, os.path.join(folder, "data")):
        if found := _by_split(glob.glob(os.path.join(glob.escape(inner), "*.parquet"))):
            return found
    return _image_splits(folder, entries)


def _counted_tars(folder: str) -> list[str]:
    """CLIP_benchmark's shards, as many as nshards.txt says."""
    path = os.path.join(folder, "nshards.txt")
    if not files.exists(path):
        return []
    text = files.read_whole(path).decode("utf-8", "replace").strip()
    if not text.isdecimal() or not 0 < int(text) < 10**7:
        raise UserError(f"{path!r} holds {text[:20]!r}, not the number of shards beside it; correct it")
    return [os.path.join(folder, f"{number}.tar") for number in range(int(text))]


def _by_split(paths: list[str]) -> dict[str, list[str]]:
    """Parquet files by what stands before their numbers; files without a known split are one set."""
    found: dict[str, list[str]] = {}
    for path in sorted(paths):
        matched = _PARQUET_SPLIT.fullmatch(os.path.basename(path))
        found.setdefault(matched[1] if matched else "", []).append(path)
    return found if not found or set(found) & set(SPLITS) else {"": sorted(paths)}


def _image_splits(folder: str, entries: list[str]) -> dict[str, list[str]]:
    lists = [name for name in entries if name.lower().endswith(_LISTS) and not name.startswith(".")]
    stems = {os.path.splitext(name)[0]: [os.path.join(folder, name)] for name in lists}
    if len(lists) == 1:
        return {"": [os.path.join(folder, lists[0])]}
    if lists and set(stems) <= set(SPLITS):
        return stems
    folders = [name for name in entries if not name.startswith(".") and os.path.isdir(os.path.join(folder, name))]
    on_top = any(map(annotations.is_image_name, entries))
    if folders and set(folders) <= set(SPLITS) and not on_top:
        return {name: [os.path.join(folder, name)] for name in folders}
    if on_top or any(_has_images(os.path.join(folder, name)) for name in folders):
        return {"": [folder]}
    raise UserError(
        f"{folder!r} holds neither images nor shards of a known layout (see docs/data.md); name its files, e.g. '{folder}/*.tar'"
    )


def _has_images(folder: str) -> bool:
    return any(annotations.is_image_name(name) for _, names in annotations.walk(folder) for name in names)
