"""A row of an Arrow table in Python, whatever it holds: texts that are not UTF-8, times that Python does not have."""

from collections.abc import Collection

import pyarrow as pa
from pyarrow import types

from data_pipelines.text_ops import without_surrogates


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
