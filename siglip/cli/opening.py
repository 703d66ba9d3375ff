"""What `siglip embed` and `siglip demo` read: shards or a folder of image files, whole or a part of them."""

import dataclasses
import hashlib
import os
from collections.abc import Collection
from functools import cached_property

from data_pipelines.errors import UserError
from data_pipelines.records import Pair, Source
from data_pipelines.sources import files
from data_pipelines.sources.opening import open_source

_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif")


class ImageFolder:
    """Every image file of a folder and the folders in it; a pair's key is its path there.

    Raises:
      UserError: the folder has no image.
    """

    def __init__(self, folder: str):
        self._folder, found = folder, []
        for parent, _, names in os.walk(folder):
            found += [os.path.join(parent, name) for name in names if name.lower().endswith(_ENDINGS)]
        self._paths = sorted(os.path.relpath(path, folder) for path in found)
        if not self._paths:
            raise UserError(f"folder {folder!r} has no image file ({', '.join(_ENDINGS)}); name another, or shards")

    @cached_property
    def fingerprint(self) -> str:
        stats = ((path, os.stat(os.path.join(self._folder, path))) for path in self._paths)
        lines = (f"{path}\t{stat.st_size}\t{stat.st_mtime_ns}\n" for path, stat in stats)
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Pair:
        path = self._paths[index]
        return Pair(path, files.read_whole(os.path.join(self._folder, path)), {})


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Some pairs of a source as a source."""

    source: Source
    rows: range

    @property
    def fingerprint(self) -> str:
        return f"{self.source.fingerprint} {self.rows}"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        return self.source[self.rows[index]]


def open_images(data: str, *, fields: Collection[str] | None = None) -> Source:
    """The pairs of shards with these fields (None: all), or the images of a folder. Raises as `open_source` and `ImageFolder`."""
    if os.path.isdir(data) and not os.path.exists(os.path.join(data, "dataset_info.json")):
        return ImageFolder(data)
    return open_source(data, fields=fields)
