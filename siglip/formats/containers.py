"""The two file formats that hold checkpoints, npz and safetensors. Arrays are described first, then read or written one by one.

    npz           a zip file of .npy files, each a header (type, shape) and the bytes
    safetensors   the header's length (8 bytes), a JSON header {name: {dtype, shape, data_offsets}}, the bytes

So one tower can be read from a file many times its size, and a model is written without a second copy of it in memory.

The trap: files come from strangers and over bad connections. Nothing is ever unpickled, every shape is checked against the
bytes that are there, and whatever is wrong with a file is a UserError of one line. An npz has checksums; a flipped bit in
the numbers of a safetensors file goes unnoticed.
"""

import contextlib
import dataclasses
import functools
import io
import json
import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from siglip.atomic import new_file
from siglip.errors import UserError
from siglip.trees import regular

Shape = tuple[int, ...]

# What zipfile, its decompressors and numpy's header parser raise on damaged bytes; RuntimeError is a flag that says "encrypted",
# or a subclass.
_DAMAGE = (
    ValueError,
    OSError,
    EOFError,
    KeyError,
    SyntaxError,
    RuntimeError,
    OverflowError,
    struct.error,
    lzma.LZMAError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
_SAFETENSORS_TYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
}
FLOATING = tuple(dtype.name for dtype in _SAFETENSORS_TYPES.values())
_WRITTEN = {dtype.name: (name, dtype) for name, dtype in _SAFETENSORS_TYPES.items()}
_CHUNK_BYTES = 1 << 24
# XLA's CPU client takes arrays that start at such an address as they are; others it copies.
_ALIGNMENT_BYTES = 64


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array that is read when it is needed: `read()` returns float32 of shape `shape`; `dtype` is the stored type."""

    shape: Shape
    read: Callable[[], np.ndarray]
    dtype: str = "float32"


@contextlib.contextmanager
def open_npz(file: Path) -> Iterator[dict[str, LazyArray]]:
    """The arrays of an npz by key; they can be read while the context lasts. bfloat16 is kept as raw 2-byte values there.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is damaged, holds a key twice, or is a note of Git LFS.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no file {str(file)!r}")
    regular(file)
    with contextlib.ExitStack() as stack:
        with _one_line(file, "its index"):
            archive = stack.enter_context(zipfile.ZipFile(file))
        arrays: dict[str, LazyArray] = {}
        for member in archive.infolist():
            key = member.filename.removesuffix(".npy")
            if key in arrays:
                raise UserError(f"{file} holds {key} twice; save it again with one of them")
            with _one_line(file, key):
                arrays[key] = _describe_npy(archive, member, file)
        yield arrays


def _describe_npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, file: Path) -> LazyArray:
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise UserError(f"npy version {version}")
        header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version[0]]
        try:
            shape, fortran_order, dtype = header(stream)
        except TypeError:
            raise UserError("a header that does not describe an array") from None
        start = stream.tell()
    name = "bfloat16" if dtype == np.dtype("V2") else dtype.name
    if not dtype.hasobject and (
        min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != member.file_size - start
    ):
        raise UserError(f"{member.file_size - start} bytes do not make {dtype} of shape {shape}")
    stored = np.dtype(jnp.bfloat16) if name == "bfloat16" else dtype
    read = functools.partial(_read_npy, archive, member, file, start, shape, stored, fortran_order)
    return LazyArray(shape, read, name)


def _read_npy(
    archive: zipfile.ZipFile,
    member: zipfile.ZipInfo,
    file: Path,
    start: int,
    shape: Shape,
    stored: Any,
    transposed: bool,
) -> np.ndarray:
    with _one_line(file, member.filename.removesuffix(".npy")), archive.open(member) as stream:
        stream.read(start)
        # At the last byte zipfile compares the checksum.
        if transposed:
            return np.asarray(_read_array(stream, shape[::-1], stored).T, order="C")
        return _read_array(stream, shape, stored)


@contextlib.contextmanager
def open_safetensors(files: Sequence[Path]) -> Iterator[dict[str, LazyArray]]:
    """The arrays of one model in one or several safetensors files; they can be read while the context lasts.

    Raises:
        UserError: a file is damaged or a note of Git LFS, or two hold the same key.
    """
    with contextlib.ExitStack() as stack:
        arrays: dict[str, LazyArray] = {}
        home: dict[str, Path] = {}
        for file in files:
            regular(file)
            with _one_line(file, "its header"):
                stream = stack.enter_context(file.open("rb"))
                tensors = _describe_safetensors(stream, file)
            for key, array in tensors.items():
                if key in home:
                    raise UserError(
                        f"{key} is in {home[key]} and in {file}, but a key belongs to one shard; copy them again"
                    )
                home[key], arrays[key] = file, array
        yield arrays


def _describe_safetensors(stream: io.BufferedIOBase, file: Path) -> dict[str, LazyArray]:
    size, length = file.stat().st_size, int.from_bytes(stream.read(8), "little")
    if length > size - 8:
        raise UserError(f"a header of {length} bytes in a file of {size}")
    header = json.loads(stream.read(length), object_pairs_hook=_without_repetition)
    if not isinstance(header, dict):
        raise UserError("no header")
    begin, places, arrays = 8 + length, [], {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        match entry:
            case {"dtype": str(name), "shape": [*shape], "data_offsets": [int(first), int(last)]}:
                dtype, shape = _SAFETENSORS_TYPES.get(name), tuple(shape)
            case _:
                raise UserError(f"{key} is described as {entry}")
        if not all(type(n) is int and n >= 0 for n in (*shape, first, last)):
            raise UserError(f"{key} has shape {shape} at bytes {first} to {last}")
        if dtype is not None and last - first != math.prod(shape) * dtype.itemsize:
            raise UserError(f"{key}: {last - first} bytes do not make {dtype} of shape {shape}")
        read = functools.partial(_read_tensor, stream, begin + first, shape, dtype, key, file)
        arrays[key] = LazyArray(shape, read, name if dtype is None else dtype.name)
        places.append((first, last, key))
    end = 0
    for first, last, key in sorted(places):  # the format wants no gap and no overlap: a shifted offset is another model
        if first != end or last < first:
            raise UserError(f"{key} is at bytes {first} to {last}, where {end} is due")
        end = last
    if begin + end != size:
        raise UserError(f"{size} bytes where the header describes {begin + end}")
    return arrays


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(tree := dict(pairs)) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise UserError(f"{twice} twice")
    return tree


def _read_tensor(
    stream: io.BufferedIOBase, start: int, shape: Shape, dtype: np.dtype | None, key: str, file: Path
) -> np.ndarray:
    if dtype is None:
        raise UserError(f"{key} of {file} is of a type that no parameter has")
    with _one_line(file, key):
        stream.seek(start)
        return _read_array(stream, shape, dtype)


@contextlib.contextmanager
def _one_line(file: Path, where: str) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        what = " ".join(f"{error}".split()) or type(error).__name__
        raise UserError(
            f"{file} cannot be read at {where} ({what}); is it cut short or damaged? copy it again"
        ) from None


def _read_array(stream: io.BufferedIOBase, shape: Shape, dtype: np.dtype) -> np.ndarray:
    """The next bytes of a stream as float32."""
    array = _aligned(shape, dtype)
    view = memoryview(array.reshape(-1).view(np.uint8))
    while view:
        if not (count := stream.readinto(view[:_CHUNK_BYTES])):
            raise EOFError(f"{len(view)} bytes too few")
        view = view[count:]
    return array if array.dtype == np.float32 else aligned_float32(array)


def aligned_float32(array: np.ndarray) -> np.ndarray:
    """A float32 copy in row-major order, at an address that XLA's CPU client uses without copying again."""
    out = _aligned(array.shape, np.dtype(np.float32))
    out[...] = array
    return out


def _aligned(shape: Shape, dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT_BYTES, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT_BYTES
    return raw[start : start + size].view(dtype).reshape(shape)


def write_npz(file: Path, arrays: Mapping[str, LazyArray]) -> None:
    """Writes an npz as `np.savez` would, holding one array at a time; a file that fails half-way is removed."""
    with new_file(file) as partial, zipfile.ZipFile(partial, "w", allowZip64=True) as archive:
        for key, array in arrays.items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array.read(), allow_pickle=False)


def written_bytes(array: LazyArray) -> int:
    """The bytes of an array in its stored type."""
    return _WRITTEN[array.dtype][1].itemsize * math.prod(array.shape)


def write_safetensors(file: Path, arrays: Mapping[str, LazyArray]) -> None:
    """Writes arrays, each in its stored type, as one safetensors file for torch, holding one array at a time; a file that fails
    half-way is removed."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, array in arrays.items():
        start, end = end, end + written_bytes(array)
        header[key] = {"dtype": _WRITTEN[array.dtype][0], "shape": array.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with new_file(file) as partial, partial.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for key, array in arrays.items():
            values = np.asarray(array.read(), _WRITTEN[array.dtype][1], order="C")
            assert values.shape == array.shape, (key, values.shape, array.shape)
            stream.write(values.view(np.uint8).data if values.ndim else values.tobytes())
