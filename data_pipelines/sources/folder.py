"""Image files as a source: a folder, with a folder per class or without, or an annotation file (see `annotations`).

    shard = FOLDER | FILE.json | FILE.json#SPLIT | FILE.txt

The rows are found in one pass and kept as an index, so memory does not grow with their number, and workers share it.

The trap: a folder has no modification time that changes with what lies deeper. Its version is that of all folders in it.
"""

import hashlib
import json
import os
from collections.abc import Callable

import numpy as np

from data_pipelines.records import Pair
from data_pipelines.sources import annotations, files, index_file
from data_pipelines.sources.index_file import Contents
from data_pipelines.sources.listing import read_image
from data_pipelines.sources.remote import FileStat
from data_pipelines.sources.shards import ShardedSource, join_offsets


class FolderSource(ShardedSource):
    """The images of folders and annotation files, in their order.

    A pair whose image file does not exist has no image and the problem "missing_image".

    Raises:
      FileNotFoundError, PermissionError: a file is missing or unreadable, or the images are not where they should be.
      UserError: it is none of the formats that are known, or holds no images.
    """

    kind = "folder"

    @staticmethod
    def stat(shard: str) -> FileStat:
        """Size and version of an annotation file, or of the folders in a folder."""
        place, _ = annotations.split_name(shard)
        if files.is_remote(place) or not os.path.isdir(place):
            return files.stat(place)
        folders = [folder for folder, _ in annotations.walk(place)]
        listed = os.path.join(place, annotations.CROSSMODAL)
        if os.path.exists(listed):  # written anew, a file leaves its folder as old as it was
            folders.append(listed)
        times = [(os.path.relpath(folder, place), os.stat(folder).st_mtime_ns) for folder in folders]
        return FileStat(len(times), hashlib.sha256(repr(sorted(times)).encode()).hexdigest())

    @staticmethod
    def build(shard: str, stat: FileStat) -> Contents:
        """The index of a folder or an annotation file. Raises as `annotations.read_annotations`."""
        found = annotations.read_annotations(shard)
        lines = [json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogateescape") for row in found.rows]
        sizes = np.fromiter(map(len, lines), np.int64, len(lines))
        rows = join_offsets(np.cumsum(sizes) - sizes, sizes)
        text = np.frombuffer(b"".join(lines), [("byte", "u1")])
        notes = {"columns": annotations.columns_of(found.rows), "root": found.root, "classes": found.classes}
        return Contents(
            len(rows), {"rows": rows, "text": text}, notes, index_file.digest(FileStat(len(rows), ""), rows, text)
        )

    def _pair(self, shard: int, row: int, read: Callable[[int, int], bytes]) -> Pair:
        tables, path = self._tables(shard), annotations.split_name(self.paths[shard])[0]
        offset, size = tables["rows"][row].item()
        fields = json.loads(tables["text"]["byte"][offset : offset + size].tobytes().decode("utf-8", "surrogateescape"))
        name = fields.pop("image")
        beside = os.path.join(path, "_") if not files.is_remote(path) and os.path.isdir(path) else path
        image, problems = read_image(annotations.join(beside, os.path.join(self.notes(shard)["root"], name)))
        return Pair(str(fields.pop("key", name)), image, fields, problems)
