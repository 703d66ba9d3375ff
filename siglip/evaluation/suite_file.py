"""A suite of evaluations in a YAML file: data sets, the task of each, how pixels are prepared, and published results.

    root: ../data                        # where relative paths count from: this file's folder, and --root overrides it
    defaults: {task: zeroshot, pixels: squash}
    sources: {siglip-b16-224: where its published values are from}
    entries:
      - {name: cifar10, data: wds_cifar10_test, published: {siglip-b16-224: 0.923}}
      - {name: coco, task: retrieval, data: "dataset_coco.json#test", metrics: [mean_recall@1]}

Every other key of an entry is a field of its task. A published number is of the first of the entry's `metrics`.
"""

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from siglip.errors import UserError
from siglip.evaluation.suite import Task, task_classes
from siglip.trees import build_dataclass, did_you_mean, regular

PixelProtocol = Literal["squash", "square875", "aspect75"]
_MAIN = {
    "zeroshot": ("acc1", "mean_per_class_recall"),
    "retrieval": ("text_retrieval_recall@1", "image_retrieval_recall@1"),
}
_OWN = ("metrics", "published", "note")
_PATHS, _FILES = ("data", "train"), ("classes", "templates", "subset", "label_map", "instances", "reference")
_MEANS = {"mean_recall@1": _MAIN["retrieval"]}


class _Loader(yaml.SafeLoader):
    """YAML's own, which keeps the last of two values under one key without a word."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"the key {key.value!r} is there more than once"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One data set of a suite.

    Attributes:
        task: with paths as they are opened.
        settings: what the file says of it, by which results are recognised: defaults and own keys, with paths as written and what
            identifies the files of class names and the like.
        pixels: how images are prepared.
        metrics: what the table shows; none: all.
        published: {model: {metric: value}}.
    """

    task: Task
    settings: Mapping[str, Any]
    pixels: PixelProtocol
    metrics: tuple[str, ...]
    published: Mapping[str, Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Suite:
    """The entries of a suite file, where its published values are from, and whether the mean over its sets means anything."""

    entries: tuple[Entry, ...]
    sources: Mapping[str, str]
    average: bool = False

    def only(self, names: Sequence[str]) -> "Suite":
        """The entries of these names, all for none. Raises UserError: there is no such entry."""
        known = [entry.task.dataset for entry in self.entries]
        for name in names:
            if name not in known:
                hint = did_you_mean(name, known) or f"; there are {', '.join(known)}"
                raise UserError(f"the suite has no entry {name!r}{hint}")
        chosen = tuple(entry for entry in self.entries if not names or entry.task.dataset in names)
        return dataclasses.replace(self, entries=chosen)


def read_suite(path: Path, *, root: str | None = None) -> Suite:
    """The suite in a file.

    Args:
        root: folder that the data's relative paths count from, in place of the file's own `root`.

    Raises:
        FileNotFoundError, UserError: there is no file, or something in it is wrong.
    """
    try:
        tree = yaml.load(regular(path).read_text(encoding="utf-8"), _Loader)  # noqa: S506
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not YAML ({' '.join(str(error).split())}); correct it") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("entries"), list) or not tree["entries"]:
        raise UserError(f"{path} holds no suite; write `entries:` and below it a list of data sets")
    known = ("about", "root", "defaults", "sources", "average", "entries")
    if unknown := [key for key in tree if key not in known]:
        raise UserError(
            f"{path} has no field {unknown[0]!r}{did_you_mean(str(unknown[0]), known)}; it has {', '.join(known)}"
        )
    defaults, sources = (_mapping(tree.get(key) or {}, f"{path}: {key}") for key in ("defaults", "sources"))
    settings = set().union(*map(_settings_of, task_classes().values()))
    if unknown := [key for key in defaults if key not in settings]:
        raise UserError(
            f"{path}: defaults: no task has a field {unknown[0]!r}{did_you_mean(str(unknown[0]), settings)}"
        )
    average, own_root = tree.get("average", False), tree.get("root", ".")
    if not isinstance(average, bool) or not isinstance(own_root, str):
        raise UserError(f"{path}: average={average!r} must be true or false, and root={own_root!r} a folder")
    folder = Path(root) if root is not None else path.parent / os.path.expanduser(own_root)
    entries = [
        _entry(
            _mapping(entry, f"{path}: entries.{n}"), defaults, (folder, path.parent), sources, f"{path}: entries.{n}"
        )
        for n, entry in enumerate(tree["entries"])
    ]
    for name, count in Counter(entry.task.dataset for entry in entries).items():
        if count > 1:
            raise UserError(f"{path}: {count} entries are called {name!r}; give each of them a name of its own")
    return Suite(tuple(entries), {str(k): str(v) for k, v in sources.items()}, average)


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}={value!r} is not a mapping; write `key: value`")
    return value


def _settings_of(task: type) -> set[str]:
    return {field.name for field in dataclasses.fields(task)} | {"pixels", *_OWN}


def _entry(
    own: dict[str, Any], defaults: Mapping[str, Any], roots: tuple[Path, Path], sources: Mapping, where: str
) -> Entry:
    kind, classes = own.get("task", defaults.get("task")), task_classes()
    if not isinstance(kind, str) or kind not in classes:
        raise UserError(f"{where}.task={kind!r} must be one of {', '.join(classes)}{did_you_mean(str(kind), classes)}")
    cls = classes[kind]
    names = _settings_of(cls)
    merged = {key: value for key, value in defaults.items() if key in names} | own  # some may be those of another task
    settings = {key: value for key, value in merged.items() if key not in _OWN}
    fields = {key: _resolve(key, value, roots) for key, value in settings.items() if key != "pixels"}
    pixels = settings.get("pixels", "squash")
    if pixels not in get_args(PixelProtocol):
        raise UserError(f"{where}.pixels={pixels!r} must be one of {', '.join(get_args(PixelProtocol))}")
    metrics = merged.get("metrics", _MAIN.get(kind, ()))
    if not isinstance(metrics, list | tuple) or not all(isinstance(name, str) for name in metrics):
        raise UserError(f"{where}.metrics={metrics!r} is not a list of names, such as [acc1]")
    published = _published(_mapping(merged.get("published") or {}, f"{where}.published"), metrics, sources, where)
    task = build_dataclass(cls, fields | {"task": kind}, where=where)
    named = {key: Path(fields[key]) for key in _FILES if isinstance(fields.get(key), str)}
    files = {key: _digest(path) for key, path in named.items() if path.is_file()}
    return Entry(task, settings | {"task": kind, "files": files}, pixels, tuple(metrics), published)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _published(given: Mapping, metrics: Sequence[str], sources: Mapping, where: str) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for model, values in given.items():
        if model not in sources:
            raise UserError(
                f"{where}.published names {model!r}, which `sources` does not have: say where its values are from"
            )
        values = values if isinstance(values, dict) else {metrics[0] if metrics else "": values}
        if not all(isinstance(name, str) and name and type(value) in (int, float) for name, value in values.items()):
            raise UserError(f"{where}.published.{model}={values!r} must be a number, or numbers by metric")
        found[str(model)] = {name: float(value) for name, value in values.items()}
    return found


def _resolve(key: Any, value: Any, roots: tuple[Path, Path]) -> Any:
    """A path of an entry: data count from the root; other files too, or from the suite's folder, where they are there."""
    if not isinstance(value, str) or "://" in value or key not in (*_PATHS, *_FILES):
        return value
    value = os.path.expanduser(value)
    if key in _PATHS:
        return "::".join(str(roots[0] / part) for part in value.split("::"))  # `/` keeps what is absolute
    there = [str(root / value) for root in roots if os.path.exists(root / value)]
    return there[0] if there else value


def metric_of(metrics: Mapping[str, float], name: str) -> float | None:
    """A metric by its name; "mean_recall@1" is DataComp's, the mean of both directions. None: there is no such metric."""
    parts = [metrics.get(part) for part in _MEANS.get(name, (name,))]
    return None if None in parts else sum(parts) / len(parts)
