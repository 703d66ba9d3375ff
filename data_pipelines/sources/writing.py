"""Pairs to shards: tars in the img2dataset layout, or ArrayRecord of tf.train.Example.

    with TarWriter("00000.tar") as shard:
        shard.write(pair)

What is written reads back as the same pairs. The same pairs give the same bytes: no times, no users.

A shard appears under its name when it is whole and on disk; after an error nothing stays behind.
"""

import contextlib
import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

from data_pipelines.atomic import new_file
from data_pipelines.records import Pair
from data_pipelines.sources import examples

_EXTENSIONS = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp"))
_ONE_BY_ONE = "group_size:1"


class _ShardWriter:
    """Writes `path` under another name, and renames it when the block ends without an error."""

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self._partial = os.fspath(stack.enter_context(new_file(Path(self.path))))
            self._begin()
            stack.push(self._close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *raised) -> None:
        self._stack.__exit__(*raised)

    def _close(self, kind, error, traceback) -> None:
        self._end()
        if kind is None:
            with open(self._partial, "rb") as file:
                os.fsync(file.fileno())


class TarWriter(_ShardWriter):
    """One tar: KEY.jpg (or png, webp, …), KEY.txt (KEY.0.txt, … for further captions), KEY.json, KEY.cls."""

    def _begin(self) -> None:
        self._archive = tarfile.open(self._partial, "w", format=tarfile.PAX_FORMAT)

    def _end(self) -> None:
        self._archive.close()

    def write(self, pair: Pair) -> None:
        """Appends a pair. Dots in its key's file name become underscores: a member's key ends at the first dot."""
        folder, slash, name = pair.key.rpartition("/")
        key = folder + slash + name.replace(".", "_")
        if pair.image is not None:
            self._add(f"{key}.{_extension(pair.image)}", pair.image)
        texts, label, rest = _split_fields(pair.fields)
        for number, text in enumerate(texts):
            self._add(f"{key}.{number - 1}.txt" if number else f"{key}.txt", text.encode("utf-8", "replace"))
        if rest:
            self._add(f"{key}.json", json.dumps(rest, ensure_ascii=False, default=str).encode("utf-8", "replace"))
        if label is not None:
            self._add(f"{key}.cls", str(label).encode("utf-8", "replace"))

    def _add(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._archive.addfile(member, io.BytesIO(data))


class ArrayRecordWriter(_ShardWriter):
    """One ArrayRecord shard: features `key`, `image`, `txt` (one value per caption), `cls`, and `json` for all other fields."""

    def _begin(self) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter as Writer

        self._writer = Writer(self._partial, _ONE_BY_ONE)

    def _end(self) -> None:
        self._writer.close()

    def write(self, pair: Pair) -> None:
        """Appends a pair."""
        texts, label, rest = _split_fields(pair.fields)
        features: dict[str, list] = {"key": [pair.key.encode("utf-8", "replace")]}
        features["image"] = [] if pair.image is None else [pair.image]
        features["txt"] = [text.encode("utf-8", "replace") for text in texts]
        features["json"] = [json.dumps(rest, ensure_ascii=False, default=str).encode("utf-8", "replace")]
        if label is not None:
            features["cls"] = [label if isinstance(label, int) and -(1 << 63) <= label < 1 << 63 else str(label)]
        self._writer.write(examples.serialize({name: values for name, values in features.items() if values}))


def _split_fields(fields: Mapping[str, object]) -> tuple[list[str], object, dict[str, object]]:
    """The captions of `txt`, the label of `cls`, and every other field."""
    rest = dict(fields)
    texts, label = rest.pop("txt", None), rest.pop("cls", None)
    return [texts] if isinstance(texts, str) else list(texts or ()), label, rest


def _extension(image: bytes) -> str:
    if image[8:12] == b"WEBP":
        return "webp"
    if image[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    return next((extension for magic, extension in _EXTENSIONS if image.startswith(magic)), "jpg")
