"""A row of an Arrow table in Python, whatever it holds: texts that are not UTF-8, times that Python does not have."""

from collections.abc import Collection

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from data_pipelines.text_ops import without_surrogates

_MAX_ROW_BYTES, _VALUE_BYTES = 1 << 28, 64  # in Python: of the lists of a row, and of a value beside its own bytes


def check_lists(table: pa.Table, about: str) -> None:
    """Raises OSError if the lists of a row are too long for memory: in Arrow they may repeat what is stored once."""
    nbytes = np.zeros(len(table), np.int64)
    for column in table.columns:
        if _holds_lists(column.type) and len(column):
            nbytes += np.concatenate([_bytes_in_python(chunk) for chunk in column.chunks])
    if nbytes.max(initial=0) > _MAX_ROW_BYTES:
        raise OSError(
            f"{about}: the lists of row {nbytes.argmax()} take {nbytes.max()} bytes in memory, more than "
            f"{_MAX_ROW_BYTES >> 20} MiB; make them shorter"
        )


def _holds_lists(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):  # such as a tensor
        return _holds_lists(kind.storage_type)
    return any(_holds_lists(field.type) for field in kind) if types.is_struct(kind) else types.is_nested(kind)


def _bytes_in_python(values: pa.Array) -> np.ndarray:
    """About what each value takes. -> int64 [n]"""
    values = values.storage if isinstance(values, pa.ExtensionArray) else values
    kind, nbytes = values.type, np.full(len(values), _VALUE_BYTES, np.int64)
    if types.is_struct(kind):
        return nbytes + sum(map(_bytes_in_python, values.flatten()))
    if types.is_map(kind):
        values = pa.ListArray.from_arrays(values.offsets, values.values)
    if types.is_nested(kind):
        lengths = pc.list_value_length(values).fill_null(0).to_numpy().astype(np.int64)
        before, ends = np.append(0, np.cumsum(_bytes_in_python(values.flatten()))), np.cumsum(lengths)
        return nbytes + before[ends] - before[ends - lengths]
    if types.is_dictionary(kind):
        return pc.take(pa.array(_bytes_in_python(values.dictionary)), values.indices).fill_null(0).to_numpy()
    if types.is_binary(kind) or types.is_string(kind) or types.is_large_binary(kind) or types.is_large_string(kind):
        return nbytes + pc.binary_length(values).fill_null(0).to_numpy()
    return nbytes


def row_values(
    table: pa.Table, row: int, *, unchecked: Collection[str] = ()
) -> tuple[dict[str, object], tuple[str, ...]]:
    """The values of a row by column, and the problems of its texts (see `records.Pair`).

    A value that Python cannot have is None, or lacks the part that is wrong. unchecked: columns whose texts do not matter.
    """
    picked, problems = table.slice(row, 1), []
    try:
        return (picked.to_pylist() or [{}])[0], ()
    except Exception:  # few rows have such a value, so each is looked for only now
        columns = zip(picked.column_names, picked.columns, strict=True)
        values = {name: _value(column[0], [] if name in unchecked else problems) for name, column in columns}
    return values, tuple(dict.fromkeys(problems))


def _value(scalar: pa.Scalar, problems: list[str]) -> object:
    """A value in Python, without the parts that Python cannot have; texts that are not UTF-8 are told in `problems`."""
    try:
        return scalar.as_py()
    except Exception:  # texts that are not UTF-8; times beyond the year 9999, in nanoseconds, of unknown zones, …
        kind = scalar.type
    if types.is_dictionary(kind):
        return _value(scalar.value, problems)
    if types.is_struct(kind):
        return {field.name: _value(scalar[number], problems) for number, field in enumerate(kind)}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return [_value(entry, problems) for entry in scalar.values]
    if not isinstance(scalar, pa.StringScalar):  # the scalars of longer strings are its subclasses
        return None
    try:
        text = scalar.as_buffer().to_pybytes().decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        problems.append("invalid_utf8")
        return None
    problems.append("control_chars")
    return without_surrogates(text)
