"""Embeddings on disk, made of parts, so that a run that was killed goes on where it stopped.

    FILE.npz       key [n], embedding [n, …]; and text [n] where texts were embedded
    FILE.npy       embedding [n, …], with one key per line in FILE.keys.txt
    FILE.parquet   columns key, embedding (a fixed-size list, of lists for tokens), text
    DIR            part-00000.parquet, part-00001.parquet, …, with the same columns

A NaFlex model's tokens are padded: `grid` [n, 2], for an .npy in FILE.grid.npy, holds the patches of each image, down and across.

The parts of a file are kept in a hidden folder beside it until it is whole; a folder keeps them for good.

The trap: parts of another model or other data look like any others. `_about.json` says what they are of.
"""

import contextlib
import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from siglip.atomic import new_file, write_atomically
from siglip.errors import UserError

ENDINGS = (".npz", ".npy", ".parquet")
_ABOUT = "_about.json"


class Part(NamedTuple):
    """Some rows: what they are of, and their embeddings [n, …].

    Attributes:
        texts: None where images were embedded.
        grid: int32 [n, 2], where `z` are tokens of images and padded.
    """

    keys: list[str]
    texts: list[str] | None
    z: np.ndarray
    grid: np.ndarray | None = None


def check_out(out: Path, *, dtype: str) -> None:
    """Raises UserError for an ending, a folder or a type of numbers that cannot be written."""
    if out.suffix not in ("", *ENDINGS) and not out.is_dir():
        raise UserError(f"--out {out} must end in .npz, .npy or .parquet, or be a folder, without an ending")
    if out.name.endswith(".grid.npy"):
        raise UserError(f"--out {out}: names that end in .grid.npy are for the grids beside an .npy; choose another")
    if out.suffix in ENDINGS and out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file, or a folder without that ending")
    if out.is_dir() and any(out.iterdir()) and not (out / _ABOUT).exists():
        raise UserError(f"the folder {out} has other files; name a new one")
    if dtype == "bfloat16" and out.suffix not in (".npz", ".npy"):
        raise UserError("Parquet has no bfloat16; use --dtype float16, or an --out that ends in .npz or .npy")


class PartFiles:
    """The parts of one `out`; see the top of this file.

    Args:
        about: what the embeddings depend on, for JSON. Parts of something else are thrown away, unless `out` is a folder.
        rows: of all parts. part_rows: of each part but the last; that of parts which are there takes its place.

    Raises:
        UserError: the folder `out` holds embeddings of something else.
    """

    def __init__(self, out: Path, *, about: Mapping[str, Any], rows: int, part_rows: int) -> None:
        self._out, self._rows = out, rows
        self._keeps_parts = out.suffix not in ENDINGS
        self.folder = out if self._keeps_parts else out.with_name(f".{out.name}.parts")
        self._ending = ".parquet" if self._keeps_parts or out.suffix == ".parquet" else ".npz"
        about, found = json.loads(json.dumps({**about, "rows": rows})), self._read_about()
        self.part_rows = found.pop("part_rows", part_rows) if found else part_rows
        if found != about:
            if self._keeps_parts and out.is_dir() and any(out.iterdir()):
                what = "embeddings of another model, other data or other settings" if found else f"a damaged {_ABOUT}"
                raise UserError(f"the folder {out} holds {what}; name a new one")
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            self.part_rows = part_rows
            write_atomically(self.folder / _ABOUT, json.dumps(about | {"part_rows": part_rows}, indent=2))

    def _read_about(self) -> dict[str, Any]:
        with contextlib.suppress(FileNotFoundError, ValueError):
            about = json.loads((self.folder / _ABOUT).read_text())
            return about if isinstance(about, dict) and type(about.get("part_rows")) is int else {}
        return {}

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}{self._ending}"

    @property
    def _paths(self) -> list[Path]:
        return [self._path(part) for part in range(-(-self._rows // self.part_rows))]

    def missing(self) -> list[range]:
        """The rows of every part that is not there."""
        starts = range(0, self._rows, self.part_rows)
        return [
            range(start, min(start + self.part_rows, self._rows))
            for start, path in zip(starts, self._paths, strict=True)
            if not path.exists()
        ]

    def write(self, rows: range, part: Part) -> None:
        """Publishes a part."""
        with new_file(self._path(rows.start // self.part_rows)) as partial, partial.open("wb") as file:
            if self._ending == ".parquet":
                _write_parquet(file, iter([part]))
            else:
                more = {} if part.texts is None else {"text": np.asarray(part.texts, np.str_)}
                more |= {} if part.grid is None else {"grid": part.grid}
                np.savez(file, key=np.asarray(part.keys, np.str_), embedding=_plain(part.z), **more)

    def _parts(self) -> Iterator[Part]:
        for path in self._paths:
            if self._ending == ".parquet":
                yield _read_parquet(path)
                continue
            with np.load(path) as file:
                texts = file["text"].tolist() if "text" in file else None
                yield Part(file["key"].tolist(), texts, file["embedding"], file.get("grid"))

    def join(self) -> tuple[int, int]:
        """Makes the file of its parts, one in memory at a time, and removes them. -> (its rows, how many keys they have)"""
        shapes, hashes = [], [np.empty(0, np.int64)]
        for part in self._parts():
            shapes.append((len(part.keys), part.z.shape[1:], part.z.dtype))
            hashes.append(np.fromiter(map(hash, part.keys), np.int64, len(part.keys)))
        count, keys = sum(rows for rows, _, _ in shapes), len(np.unique(np.concatenate(hashes)))
        if not count:
            shutil.rmtree(self.folder)
            raise UserError("there is no image that can be decoded; check the data")
        if self._keeps_parts:
            return count, keys
        shape, dtype = (count, *next(inner for rows, inner, _ in shapes if rows)), shapes[0][2]
        if self._out.suffix == ".npy":
            lines = (" ".join(key.splitlines()) + "\n" for part in self._parts() for key in part.keys)
            write_atomically(self._out.with_suffix(".keys.txt"), "".join(lines))
            grid, grids = self._grid(), self._out.with_suffix(".grid.npy")
            if grid is not None:
                with new_file(grids) as partial, partial.open("wb") as file:
                    np.save(file, grid)
        with new_file(self._out) as partial, partial.open("wb") as file:
            if self._out.suffix == ".parquet":
                _write_parquet(file, self._parts())
            elif self._out.suffix == ".npy":
                _write_array(file, self._parts(), shape, dtype)
            else:
                self._write_npz(file, shape, dtype)
        if self._out.suffix == ".npy" and grid is None:
            grids.unlink(missing_ok=True)  # of tokens that had this name before
        shutil.rmtree(self.folder)
        return count, keys

    def _grid(self) -> np.ndarray | None:
        """Of parts that are .npz: of these only what is asked for is read."""
        grids = []
        for path in self._paths:
            with np.load(path) as file:
                grids.append(file.get("grid"))
        return None if grids[0] is None else np.concatenate(grids)

    def _write_npz(self, file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype) -> None:
        keys, texts = [], []
        for part in self._parts():
            keys, texts = keys + part.keys, texts + (part.texts or [])
        arrays = {"key": np.asarray(keys, np.str_)} | ({"text": np.asarray(texts, np.str_)} if texts else {})
        arrays |= {} if (grid := self._grid()) is None else {"grid": grid}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, values in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, values)
            with archive.open("embedding.npy", "w", force_zip64=True) as member:
                _write_array(member, self._parts(), shape, dtype)


def _plain(z: np.ndarray) -> np.ndarray:
    """bfloat16, which numpy's files do not know, as two bytes: `.view(ml_dtypes.bfloat16)` makes it one again."""
    return z.view("V2") if z.dtype.name == "bfloat16" else z


def _write_array(file: Any, parts: Iterator[Part], shape: tuple[int, ...], dtype: np.dtype) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for part in parts:
        file.write(np.ascontiguousarray(part.z).tobytes())


def _write_parquet(file: BinaryIO, parts: Iterator[Part]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    for part in parts:
        vectors = pa.array(part.z.reshape(-1))
        for size in reversed(part.z.shape[1:]):
            vectors = pa.FixedSizeListArray.from_arrays(vectors, size)
        columns = {"key": pa.array(part.keys, pa.string()), "embedding": vectors}
        columns |= {} if part.texts is None else {"text": pa.array(part.texts, pa.string())}
        if part.grid is not None:
            columns["grid"] = pa.FixedSizeListArray.from_arrays(pa.array(part.grid.reshape(-1)), 2)
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(file, table.schema, compression="none", use_dictionary=False)
        writer.write_table(table)
    writer.close()


def _read_parquet(path: Path) -> Part:
    import pyarrow.parquet as pq

    table, shape = pq.read_table(path).combine_chunks(), []
    vectors = table["embedding"].combine_chunks()
    while hasattr(vectors.type, "list_size"):
        shape, vectors = [*shape, vectors.type.list_size], vectors.flatten()
    texts = table["text"].to_pylist() if "text" in table.column_names else None
    grid = None
    if "grid" in table.column_names:
        grid = table["grid"].combine_chunks().flatten().to_numpy().reshape(-1, 2)
    return Part(table["key"].to_pylist(), texts, vectors.to_numpy().reshape(-1, *shape), grid)
