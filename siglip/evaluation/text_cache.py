"""Embeddings of texts kept on disk: 80 prompts for each of 1000 classes cost as much as 25,000 images.

A file is named after the weights of the text tower, its settings, the tokenizer and the texts, so none is ever out of date.
Above a limit the least recently used ones are deleted. Every process of a job must find a file, or all of them compute.
"""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from siglip.array_types import Float
from siglip.atomic import new_file
from siglip.evaluation.embed import Embedder
from siglip.parallel.collectives import gather_records
from siglip.trees import flatten

MAX_BYTES = 1 << 32


@dataclasses.dataclass(frozen=True, eq=False)
class CachingEmbedder(Embedder):
    """An embedder that keeps the embeddings of texts in a folder.

    Attributes:
        folder: where they are kept; made when it is missing.
        text_tower: what identifies the tower and its tokenizer, see `digest`.
    """

    folder: Path = Path()
    text_tower: str = ""

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "m e"]:
        """As `Embedder.embed_texts`; read from disk where all processes find it there."""
        if not texts:
            return super().embed_texts(texts)
        distinct = list(dict.fromkeys(texts))
        path = self.folder / f"{digest([self.text_tower, *distinct])}.npy"
        z = _read(path, len(distinct))
        if not all(gather_records([z is not None])):
            z = super().embed_texts(distinct)
            if jax.process_index() == 0:
                _write(path, z)
        row_of = {text: row for row, text in enumerate(distinct)}
        return z[[row_of[text] for text in texts]]


def caching(embedder: Embedder, folder: Path, text_tower: str) -> CachingEmbedder:
    """The same embedder with a cache."""
    settings = {field.name: getattr(embedder, field.name) for field in dataclasses.fields(Embedder)}
    return CachingEmbedder(**settings, folder=folder, text_tower=text_tower)


def digest(parts: Iterable[str | bytes]) -> str:
    """Identifies texts and bytes, and where each of them ends."""
    sha = hashlib.sha256()
    for part in parts:
        part = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        sha.update(len(part).to_bytes(8, "little") + part)
    return sha.hexdigest()[:32]


def digest_params(params: Any) -> str:
    """Identifies parameters by their names, shapes, types and values."""
    sha = hashlib.sha256()
    for name, leaf in flatten(params).items():
        array = np.ascontiguousarray(leaf)
        sha.update(f"{name} {array.shape} {array.dtype}\n".encode())
        sha.update(array.view(np.uint8).data if array.size else b"")
    return sha.hexdigest()[:32]


def _read(path: Path, rows: int) -> np.ndarray | None:
    try:
        z = np.load(path, allow_pickle=False)
        os.utime(path)
    except (OSError, ValueError, EOFError):  # there is none, or it is damaged
        return None
    return z if z.ndim == 2 and len(z) == rows and z.dtype == np.float32 else None


def _write(path: Path, z: np.ndarray) -> None:
    """A folder that is full or read-only is no reason to stop."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as partial, partial.open("wb") as file:
            np.save(file, z)
        left = MAX_BYTES
        for kept in sorted(path.parent.glob("*.npy"), key=lambda kept: kept.stat().st_mtime, reverse=True):
            left -= kept.stat().st_size
            if left < 0 and kept != path:
                kept.unlink(missing_ok=True)
