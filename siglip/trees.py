"""Named pytrees: nested dicts whose leaves are addressed as "img/Transformer/encoder_norm/scale".

Published checkpoints, sharding rules, weight-decay masks and learning-rate multipliers all speak in such paths, so there is
one place that makes and matches them. Patterns are regular expressions that must match the *whole* path (`re.fullmatch`),
and the first pattern that matches wins.

The trap: a pattern that matches nothing is almost always a typing error, and silently does nothing. Every function here that
takes patterns therefore raises on one that matches no path.
"""

import dataclasses
import difflib
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from siglip.errors import UserError

T = TypeVar("T")
_LFS_POINTER, _MAX_POINTER_BYTES = b"version https://git-lfs", 1024  # git-lfs, docs/spec.md
_MAX_DIGITS = 100  # of a number in a JSON file: many times larger ones are not floats


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a/b": 1}, in sorted order of the keys at every level."""
    flat: dict[str, Any] = {}
    for key in sorted(tree):
        path = f"{prefix}{key}"
        if isinstance(tree[key], Mapping):
            flat |= flatten(tree[key], path + "/")
        else:
            flat[path] = tree[key]
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": 1} -> {"a": {"b": 1}}.

    Raises:
        UserError: if one path is a prefix of another ("a" and "a/b").
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"path {path!r} goes through {parent!r}, which is a leaf; rename one of the two")
        if name in node:
            raise UserError(f"path {path!r} appears twice or is also a folder of other paths; rename one of the two")
        node[name] = leaf
    return tree


def map_with_path(function: Callable[[str, Any], Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Applies `function(path, leaf)` to every leaf of a nested dict; the structure stays."""
    return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})


def did_you_mean(name: Any, candidates: Iterable[Any]) -> str:
    """A suffix for error messages: "; did you mean 'x'?" for the closest other candidate, or "" when none is close."""
    others = [str(candidate) for candidate in candidates if candidate != name]
    close = difflib.get_close_matches(str(name), others, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def first_matches(
    patterns: Sequence[str], paths: Iterable[str], *, what: str, optional: Iterable[str] = ()
) -> dict[str, int | None]:
    """For every path the index of the first pattern that matches it whole, or None.

    Args:
        what: names the setting in errors, e.g. "optim.lr_mults".
        optional: patterns that may match nothing (defaults that suit every model).

    Raises:
        UserError: if a pattern is not a regular expression, or is not `optional` and matches no path.
    """
    paths = list(paths)
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise UserError(f"{what}: {error.pattern!r} is not a regular expression ({error.msg})") from None
    for pattern, regex in zip(patterns, compiled, strict=True):
        if pattern not in optional and not any(regex.fullmatch(path) for path in paths):
            raise UserError(
                f"{what}: pattern {pattern!r} matches no parameter{did_you_mean(pattern, paths)}; "
                f"it must match the whole path, as 'img/.*' does"
            )
    return {path: next((i for i, regex in enumerate(compiled) if regex.fullmatch(path)), None) for path in paths}


def regular(path: Path) -> Path:
    """The same path.

    Raises:
        UserError: a device or a pipe, which may have no end and can be read but once; or a Git LFS pointer in place of a file.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is a device or a pipe; write it to a file and name that")
    if path.is_file() and path.stat().st_size < _MAX_POINTER_BYTES and path.read_bytes().startswith(_LFS_POINTER):
        raise UserError(f"{path} is not the file, but Git LFS' note of where it is; get it with 'git lfs pull'")
    return path


def read_json(path: Path, *, fix: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        fix: what to do about a file that holds something else, for the message.

    Raises:
        FileNotFoundError, PermissionError: it is not there, or not to be read.
        UserError: it does not hold a JSON object.
    """
    regular(path)
    try:
        tree = json.loads(path.read_bytes(), parse_int=_parse_int)
    except (ValueError, RecursionError) as error:  # bytes that are not text, numbers of 5000 digits, nested 1000 deep
        raise UserError(f"{path} is not valid JSON ({' '.join(str(error).split())}); {fix}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds a {type(tree).__name__}, not a JSON object; {fix}")
    return tree


def _parse_int(digits: str) -> int:
    """Raises ValueError where float has no such number."""
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"{digits[:10]}… is a number of {len(digits)} digits")
    return int(digits)


def is_one_of(value: Any, options: Collection[Any]) -> bool:
    """Whether a value from a JSON file, of whatever type, is one of some texts or numbers."""
    return isinstance(value, Hashable) and value in options


def build_dataclass(cls: type[T], tree: Any, *, where: str = "config") -> T:
    """Rebuilds a (nested, frozen) config dataclass from what `dataclasses.asdict` and JSON made of it.

    Handles nested dataclasses, tuples, Optional and Union fields, Literals and plain values; an absent field takes its
    default.

    Raises:
        UserError: for an unknown field (with a suggestion), or for a value that does not fit its field.
    """
    if not isinstance(tree, Mapping):
        raise UserError(f"{where}={tree!r} is not an object with the fields of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    names = {field.name for field in dataclasses.fields(cls)}
    for name in tree:
        if name not in names:
            raise UserError(f"{where} has no field {name!r}{did_you_mean(name, names)}")
    values = {name: _build_value(hints[name], value, f"{where}.{name}") for name, value in tree.items()}
    for field in dataclasses.fields(cls):
        if field.name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where} is incomplete: add {field.name}")
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _by_literal(options: Sequence[Any], value: Any, where: str) -> tuple[Any, dict[str, Any]] | None:
    """The one of some dataclasses that `value` is, told by a Literal field that differs in all of them, and its fields; or None.

    Fields that only the other dataclasses have are left out.
    """
    hints = {cls: typing.get_type_hints(cls) for cls in options if dataclasses.is_dataclass(cls)}
    if len(hints) < 2 or not isinstance(value, Mapping):
        return None
    for field in sorted(set.intersection(*map(set, hints.values()))):
        literals = [typing.get_args(own[field]) * (typing.get_origin(own[field]) is Literal) for own in hints.values()]
        tags = {tag: cls for cls, own in zip(hints, literals, strict=True) for tag in own}
        if not all(literals) or len(tags) < sum(map(len, literals)):
            continue
        if not isinstance(tag := value.get(field), str) or tag not in tags:
            hint = did_you_mean(str(tag), tags)
            raise UserError(f"{where}.{field}={tag!r} must be one of {', '.join(map(repr, tags))}{hint}")
        own, others = hints[tags[tag]], set().union(*hints.values())
        return tags[tag], {name: v for name, v in value.items() if name in own or name not in others}
    return None


def _build_value(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build_dataclass(hint, value, where=where)
    if origin is Literal and value in args:
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        items = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(items) == len(value):
            return tuple(
                _build_value(item, v, f"{where}.{i}") for i, (item, v) in enumerate(zip(items, value, strict=True))
            )
    if origin in (types.UnionType, typing.Union):
        chosen = _by_literal(args, value, where)
        if chosen is not None:
            return _build_value(*chosen, where)
        for option in args:
            try:
                return _build_value(option, value, where)
            except UserError:
                continue
    if hint is type(None) and value is None:
        return None
    if hint is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    if origin is Literal:
        raise UserError(f"{where}={value!r} must be one of {', '.join(map(repr, args))}{did_you_mean(value, args)}")
    raise UserError(f"{where}={value!r} is not a {'list' if origin is tuple else getattr(hint, '__name__', hint)}")
