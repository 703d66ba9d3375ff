"""A run's checkpoints, which are whole or absent.

    workdir/checkpoints/STEP/     orbax: state, data (the loader's position), config, checksums: one atomic unit

Saving is asynchronous: orbax copies the arrays from the device, writes to a folder with a temporary name and renames it
when every file is there. The last `keep` checkpoints stay, and the best one by `best_metric`.

Several processes write one checkpoint together, so the workdir is a folder that all hosts share. It is laid out on whatever
devices restore it: their number, the number of hosts, FSDP and the data workers may change between starts.

The trap: a folder under checkpoints/ may be half a checkpoint. Whole is what has orbax's last file. And orbax does not notice
a flipped bit in an array: so what is read is compared with the checksums of what was saved.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import re
import shutil
import sys
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from siglip import trees
from siglip.atomic import naming, write_atomically
from siglip.errors import UserError
from siglip.parallel.collectives import gather_records
from siglip.parallel.launch import in_all_or_none
from siglip.workdir.checksums import checksums
from siglip.workdir.files import CONFIG_FILE, read_config

CHECKPOINTS_DIR = "checkpoints"
_LOWER_IS_BETTER = re.compile(
    r".*median_rank|brier.*|ece.*|acc1_gap(_se)?|demographic_parity_gap|tied_fraction"
    r"|mean_corruption_error|error_increase(_se)?|(relative_)?mce(_se)?"
)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep.

    Attributes:
        every_steps: steps between checkpoints; one more is always written at the end and at SIGTERM or SIGINT.
        keep: how many of the newest stay.
        best_metric: name of an evaluation metric in metrics.jsonl, one for which higher is better; the checkpoint where it
            is highest stays too, and one is written whenever an evaluation sets a new best.
        patience: evaluations in a row without a new best after which the run ends; 0: it goes on to its last step.
    """

    every_steps: int = 1000
    keep: int = 2
    best_metric: str | None = None
    patience: int = 0

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"checkpoint.{name}={getattr(self, name)} must be at least 1")
        if self.patience < 0 or (self.patience and self.best_metric is None):
            raise UserError(f"checkpoint.patience={self.patience} must be at least 0, and needs checkpoint.best_metric")
        if self.best_metric is not None and _LOWER_IS_BETTER.fullmatch(self.best_metric.rpartition("/")[2]):
            raise UserError(
                f"checkpoint.best_metric={self.best_metric} is better when lower; name a recall or an accuracy"
            )
        if self.best_metric is not None and re.search(r"_(se|chance)(@|$)", self.best_metric):
            raise UserError(
                f"checkpoint.best_metric={self.best_metric} does not measure the model; name the metric it belongs to"
            )


class Checkpointer:
    """Saves to and restores from one workdir."""

    def __init__(self, workdir: Path, config: CheckpointConfig) -> None:
        # Values are stored under the metric's name: what another metric was best at does not count.
        self._best_name = config.best_metric or "none"

        def value_of(metrics: Mapping[str, float]) -> float:
            return metrics.get(self._best_name, -np.inf)

        _check_metrics(workdir)
        best = BestN(get_metric_fn=value_of, n=1, keep_checkpoints_without_metrics=False)
        self._folder = workdir.resolve() / CHECKPOINTS_DIR
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(n=config.keep), best]),
                best_fn=value_of,  # without it orbax does not write the metric down
                cleanup_tmp_directories=True,
            ),
        )

    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def best_value(self) -> float:
        """Highest `best_metric` among the checkpoints on disk; minus infinity when none has one."""
        values = [self._manager.metrics(step) for step in self._manager.all_steps()]
        return max((v.get(self._best_name, -np.inf) for v in values if v), default=-np.inf)

    def save(
        self,
        step: int,
        state: Any,
        *,
        data_state: Mapping[str, Any],
        config: Mapping[str, Any],
        best_metric: float | None = None,
    ) -> None:
        """Starts saving and returns when the arrays are copied; the files are complete after `close`.

        Raises:
            OSError: in every process, if the disk has no room for it, or cannot be written.
        """
        if self._manager.latest_step() == step:
            return
        self._check_room(state)
        items = {
            "data": ocp.args.JsonSave(dict(data_state)),
            "config": ocp.args.JsonSave(dict(config)),
            "checksums": ocp.args.JsonSave(checksums(state) | {"data": _json_checksum(data_state)}),
        }
        metrics = None if best_metric is None else _with_checksum({self._best_name: best_metric})
        with naming(self._folder):
            self._manager.save(
                step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), **items), metrics=metrics
            )

    def _check_room(self, state: Any) -> None:
        # Found out by orbax's threads, a full disk is half a checkpoint and their tracebacks.
        usage, needed = shutil.disk_usage(self._folder), sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        if any(gather_records([0 < usage.total and usage.free < needed])):
            told = f"{os.strerror(errno.ENOSPC)} for a checkpoint of {needed} bytes; free some and start the same command again"
            raise OSError(errno.ENOSPC, told, str(self._folder))

    def mark_best(self, step: int, value: float) -> None:
        """Notes that the checkpoint of `step`, which is on disk, has the highest `best_metric` so far: it stays."""
        self.wait()
        if jax.process_index() == 0:
            path = _metrics_file(self._folder / str(step))
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, json.dumps(_with_checksum({self._best_name: value})))
        gather_records([])  # the others read what process 0 wrote
        self._manager.reload()

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """(state, data_state) of a step; arrays arrive with the shardings of `abstract_state`.

        Raises:
            UserError: if the checkpoint is damaged or belongs to another model.
        """
        # Orbax's processes read together: one that fails alone would leave the others waiting.
        in_all_or_none(lambda: self._check_model(step, abstract_state), bad_input=(UserError,))
        with _reading(self._folder / str(step), fix=_fix(self._folder.parent, step)):
            items = self._manager.restore(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore()),
            )
            found = checksums(items.state) | {"data": _json_checksum(items.data)}
            _compare(found, self._folder / str(step))
        return items.state, items.data

    def _check_model(self, step: int, abstract_state: Any) -> None:
        """Raises UserError if the parameters of a step have other names or shapes: config.json may be gone."""
        folder = self._folder / str(step)
        try:
            with ocp.PyTreeCheckpointer() as reader:
                tree = _stored_tree(reader, folder / "state")
            there = {path: tuple(leaf.shape) for path, leaf in trees.flatten(tree["params"]).items()}
        except Exception:  # `restore` says what is wrong with the files
            return
        here = {path: tuple(leaf.shape) for path, leaf in trees.flatten(abstract_state.params).items()}
        here["ema"], there["ema"] = abstract_state.ema is not None, bool(tree.get("ema"))
        other = sorted(path for path in there.keys() | here.keys() if there.get(path) != here.get(path))
        if other:
            path, more = other[0], f" and {len(other) - 1} more" if len(other) > 1 else ""
            raise UserError(
                f"checkpoint {folder} is of another model: {path} is {there.get(path, 'absent')} there and "
                f"{here.get(path, 'absent')} here{more}; use the settings it was trained with, or another --workdir"
            )

    def wait(self) -> None:
        """Returns when everything saved is complete on disk. Raises OSError if it cannot be: a full disk, for one."""
        with naming(self._folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until everything saved is complete on disk, and releases. Raises OSError as `wait` does."""
        with naming(self._folder):
            self._manager.wait_until_finished()
            self._manager.close()


def locate(path: Path) -> tuple[Path, int] | None:
    """(workdir, step) of a workdir's newest checkpoint, or of the one that `path` names; None when there is none."""
    workdir, step = run_of(path) or (None, None)
    steps = whole_steps(workdir) if workdir and step is None else [step]
    return (workdir, steps[-1]) if workdir and steps else None


def read_run_params(path: Path, *, parts: Collection[str] = ()) -> tuple[dict[str, Any], dict[str, Any], int]:
    """(params as numpy, config as JSON, step) of a workdir's newest checkpoint, or of the checkpoint `path` names.

    Only the parameters are read, whatever devices they were saved from; their running average where the run keeps one.

    Args:
        parts: names at the top of the tree, such as "img": those that are there are read; () for all.

    Raises:
        FileNotFoundError: if the workdir has no whole checkpoint.
        UserError: if the checkpoint is damaged.
    """
    workdir, step = run_of(path) or (path, None)
    steps = whole_steps(workdir)
    step = steps[-1] if step is None and steps else step
    if step not in steps:
        raise FileNotFoundError(
            f"{workdir} has no checkpoint{'' if step is None else f' {step}'}; it has {steps or 'none'}"
        )
    config, folder = read_config(workdir, fields=("model",)), workdir.resolve() / CHECKPOINTS_DIR / str(step)
    others = [other for other in steps if other != step]
    with _reading(folder, fix=f"try {folder.parent / str(others[-1])}" if others else "it is the only one"):
        with ocp.PyTreeCheckpointer() as reader:
            tree = _stored_tree(reader, folder / "state")
            name = "ema" if tree.get("ema") else "params"
            stored = {part: leaves for part, leaves in tree[name].items() if part in parts or not parts}
            like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored)
            restored = reader.restore(
                folder / "state",
                args=ocp.args.PyTreeRestore(
                    item={name: like},
                    restore_args={name: jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)},
                    partial_restore=True,
                ),
            )
        _compare(checksums({name: restored[name]}), folder)
    return restored[name], config, step


def _fix(workdir: Path, step: int) -> str:
    before = [saved for saved in whole_steps(workdir) if saved < step]
    return f"move that folder away to {f'go on from step {before[-1]}' if before else 'start from the beginning'}"


def _metrics_file(folder: Path) -> Path:
    return folder / "metrics" / "metrics"  # where orbax writes it


def _with_checksum(metrics: dict[str, float]) -> dict[str, float]:
    return {**metrics, "crc32": _json_checksum(metrics)}


def _check_metrics(workdir: Path) -> None:
    """Raises UserError for a checkpoint whose metrics are damaged: orbax would, without saying whose."""
    for step in whole_steps(workdir):
        path = _metrics_file(workdir.resolve() / CHECKPOINTS_DIR / str(step))
        with _reading(path.parents[1], fix=_fix(workdir, step)):
            metrics = json.loads(path.read_bytes()) if path.exists() else {}
            stated = metrics.pop("crc32", None)
            if stated not in (None, _json_checksum(metrics)):
                raise UserError("its best metric is not what was saved")


def _json_checksum(tree: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(tree, sort_keys=True).encode())


def _compare(found: Mapping[str, Any], folder: Path) -> None:
    """Raises UserError if something is not what was saved. Checkpoints from before there were checksums have none."""
    path = folder / "checksums" / "metadata"  # where orbax writes it
    if not path.parent.exists():
        return
    saved = json.loads(path.read_text())
    damaged = [name for name, value in found.items() if saved.get(name) != value]
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise UserError(f"{damaged[0]}{more} is not what was saved")


def _stored_tree(reader: ocp.PyTreeCheckpointer, folder: Path) -> dict[str, Any]:
    """Shapes and dtypes of what a folder of arrays holds."""
    _drop_late_tracebacks()
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)  # it warns that the whole checkpoint's metadata is not in the folder of its arrays
    try:
        metadata = reader.metadata(folder).item_metadata
    finally:
        logger.setLevel(before)
    if metadata is None:
        raise UserError(f"{folder.name}/_METADATA or manifest.ocdbt, which tell what there is, is missing or damaged")
    return metadata.tree


def _drop_late_tracebacks() -> None:
    """Orbax closes its event loop at the first read that fails, and each of the others would print a traceback of its own."""
    before = sys.unraisablehook

    def without_them(told: Any) -> None:
        if "Event loop is closed" not in str(told.exc_value):
            before(told)

    if getattr(before, "__qualname__", "") != without_them.__qualname__:
        sys.unraisablehook = without_them


@contextlib.contextmanager
def _reading(folder: Path, *, fix: str) -> Iterator[None]:
    """Turns what orbax raises for a damaged checkpoint into a UserError; what may be the machine's fault passes."""
    try:
        with naming(folder):
            yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # orbax raises a dozen kinds for one cause: files that do not fit
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise  # a disk or a network that fails, a folder that may not be read
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"checkpoint {folder} cannot be read ({first_line[:200]}); {fix}") from error


def whole_steps(workdir: Path) -> list[int]:
    """Steps of the checkpoints that a run in this workdir can go on from, in order."""
    # orbax writes this file last: a folder without it is half a checkpoint.
    folders = (workdir.resolve() / CHECKPOINTS_DIR).glob("*")
    return sorted(
        int(path.name) for path in folders if path.name.isdigit() and (path / "_CHECKPOINT_METADATA").exists()
    )


def run_of(path: Path) -> tuple[Path, int | None] | None:
    """(workdir, step or None) when `path` is a workdir or WORKDIR/checkpoints/STEP, else None."""
    if (path / CONFIG_FILE).is_file() and (path / CHECKPOINTS_DIR).is_dir():
        return path, None
    path = path.resolve()
    if path.name.isdigit() and path.parent.name == CHECKPOINTS_DIR and (path.parent.parent / CONFIG_FILE).is_file():
        return path.parent.parent, int(path.name)
    return None
