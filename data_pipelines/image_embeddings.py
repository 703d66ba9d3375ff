"""Image embeddings on disk: what a frozen tower makes of every image of one source, computed once.

    FOLDER/meta.json           what they are of, and how they are cut into parts
    FOLDER/00012.npy           float32 [n, e]: pairs 12 * part_pairs onwards; a row of zeros where an image is broken
    FOLDER/00012.broken.json   {pair: reason}; only where there are some, and written before its part

A part is whole or absent: it is written under another name and renamed. Parts are mapped into memory, never read whole, so
training needs the memory of the rows it looks up.

The trap: embeddings of another tower look like any others. FOLDER is therefore named after all that they depend on
(`make_key`), and two towers, image sizes or data sets never meet in one.
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.atomic import new_file
from data_pipelines.errors import UserError
from data_pipelines.records import Source

_META_FILE = "meta.json"
_PART_PAIRS = 1 << 13
_OPEN_PARTS = 256


def make_key(tower: str, *, source: Source, image_size: tuple[int, int], max_image_pixels: int) -> str:
    """The name of the folder for a source's embeddings. tower: fingerprint of the image tower."""
    parts = [1, tower, source.fingerprint, list(image_size), max_image_pixels]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ImageEmbeddings:
    """The embeddings of one source, being written or whole. Safe to read from several threads; picklable.

    Attributes:
      folder: holds the parts.
      pairs: in the source.
      width: of an embedding.
      part_pairs: pairs in a part; the last one may have fewer.
    """

    folder: Path
    pairs: int
    width: int
    part_pairs: int

    def __post_init__(self):
        object.__setattr__(self, "_part", functools.lru_cache(_OPEN_PARTS)(self._open_part))

    def __reduce__(self):
        return type(self), (self.folder, self.pairs, self.width, self.part_pairs)

    @property
    def parts(self) -> int:
        return -(-self.pairs // self.part_pairs)

    def records(self, part: int) -> range:
        """The pairs of a part; none outside."""
        return range(min(part * self.part_pairs, self.pairs), min((part + 1) * self.part_pairs, self.pairs))

    def missing(self) -> list[int]:
        """The parts that are not there, or were cut by a crash of the machine."""
        return [part for part in range(self.parts) if not self._is_whole(part)]

    def write(self, part: int, rows: np.ndarray, broken: Mapping[int, str]) -> None:
        """Publishes a part. rows: float32 [n, e]; broken: pair -> why its image has no embedding."""
        assert rows.shape == (len(self.records(part)), self.width) and rows.dtype == np.float32
        if broken:
            text = json.dumps({str(record): reason for record, reason in sorted(broken.items())})
            _publish(self._path(part, "broken.json"), lambda file: file.write(text.encode()))
        _publish(self._path(part, "npy"), lambda file: np.save(file, rows))

    def get(self, record: int) -> np.ndarray | str:
        """The embedding of a pair, float32 [e], or the reason why its image has none."""
        rows, broken = self._part(record // self.part_pairs)
        return broken.get(record) or np.array(rows[record % self.part_pairs])

    def count_broken(self) -> Counter:
        """Images without an embedding, by reason."""
        return Counter(reason for path in self.folder.glob("*.broken.json") for reason in _read(path).values())

    def sweep(self) -> None:
        """Removes what killed processes have left behind. Call it when every part is there."""
        for path in self.folder.glob(".*.partial"):
            path.unlink(missing_ok=True)

    def _open_part(self, part: int) -> tuple[np.ndarray, dict[int, str]]:
        path = self._path(part, "broken.json")
        broken = {int(record): reason for record, reason in _read(path).items()} if path.exists() else {}
        return np.load(self._path(part, "npy"), mmap_mode="r"), broken

    def _is_whole(self, part: int) -> bool:
        try:  # Only the header is read; a file that is shorter than it says cannot be mapped.
            return np.load(self._path(part, "npy"), mmap_mode="r").shape == (len(self.records(part)), self.width)
        except (FileNotFoundError, ValueError, EOFError):
            return False

    def _path(self, part: int, kind: str) -> Path:
        return self.folder / f"{part:05d}.{kind}"


def open_image_embeddings(
    folder: Path, *, pairs: int, width: int, about: Mapping[str, object], part_pairs: int = _PART_PAIRS
) -> ImageEmbeddings:
    """The embeddings in `folder`, which is made if need be. about: what they are of, for whoever finds the folder.

    Raises:
      UserError: what is there has another number of pairs or another width.
      OSError: the folder cannot be made.
    """
    path = folder / _META_FILE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        layout = {"pairs": pairs, "width": width, "part_pairs": min(part_pairs, pairs)}
        _publish(path, lambda file: file.write(json.dumps(layout | dict(about), indent=2).encode()))
    meta = _read(path)
    if not isinstance(meta, dict) or type(meta.get("part_pairs")) is not int or meta["part_pairs"] < 1:
        raise UserError(f"{path} is damaged; remove that folder to compute its embeddings again")
    if (meta.get("pairs"), meta.get("width")) != (pairs, width):
        raise UserError(
            f"{path} describes {meta.get('pairs')} pairs and embeddings of width {meta.get('width')}, but there are "
            f"{pairs} of {width}; remove that folder to compute them again"
        )
    return ImageEmbeddings(folder, pairs, width, meta["part_pairs"])


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove that folder to compute its embeddings again") from None


def _publish(path: Path, write: Callable) -> None:
    with new_file(path) as partial, partial.open("wb") as file:
        write(file)
