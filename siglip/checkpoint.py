"""A run's workdir on disk, and checkpoints that are whole or absent.

    workdir/config.json           what the run was started with
    workdir/tokenizer.model       its SentencePiece model, so that the run can be evaluated and exported on its own
    workdir/metrics.jsonl
    workdir/checkpoints/STEP/     orbax: state, data (the loader's position), config: one atomic unit

Saving is asynchronous: orbax copies the arrays from the device, writes to a folder with a temporary name and renames it
when every file is there. The last `keep` checkpoints stay, and the best one by `best_metric`.

How a run starts, in this order: the newest checkpoint of its workdir; else fresh parameters.

The trap: a run that goes on with other settings is neither run. Whatever changes the parameters or the pairs must agree with
the workdir's config.json; only where it runs and what it reports may differ.
"""

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from siglip import trees

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.model"
CHECKPOINTS_DIR = "checkpoints"

# Fields (patterns of their paths) that neither change the parameters nor the pairs: where it runs, how often it reports, where
# files lie. What the files hold is compared by content: the loader's fingerprint, and the tokenizer in the workdir.
FREE_FIELDS = (
    "workdir",
    "(mesh|log|checkpoint|eval)(/.*)?",
    "data/(workers|threads|prefetch|cache_bytes|tokenizer)",
    r"data/sources/\d+/shards",
)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep.

    Attributes:
        every_steps: steps between checkpoints; one more is always written at the end and at SIGTERM or SIGINT.
        keep: how many of the newest stay.
        best_metric: name of an evaluation metric in metrics.jsonl, one for which higher is better; the checkpoint where it
            is highest stays too, and one is written whenever an evaluation sets a new best.
    """

    every_steps: int = 1000
    keep: int = 2
    best_metric: str | None = None

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"checkpoint.{name}={getattr(self, name)} must be at least 1")
        if self.best_metric is not None and self.best_metric.endswith("median_rank"):
            raise ValueError(
                f"checkpoint.best_metric={self.best_metric} is better when lower; name a recall or an accuracy"
            )


class Checkpointer:
    """Saves to and restores from one workdir."""

    def __init__(self, workdir: Path, config: CheckpointConfig) -> None:
        # Values are stored under the metric's name: what another metric was best at does not count.
        self._best_name = config.best_metric or "none"

        def value_of(metrics: Mapping[str, float]) -> float:
            return metrics.get(self._best_name, -np.inf)

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
        """Starts saving and returns when the arrays are copied; the files are complete after `wait`."""
        if self._manager.latest_step() == step:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave(dict(data_state)),
                config=ocp.args.JsonSave(dict(config)),
            ),
            metrics=None if best_metric is None else {self._best_name: best_metric},
        )

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """(state, data_state) of a step; `like` is the state as shapes with shardings: arrays arrive laid out so.

        Raises:
            ValueError: if the checkpoint is damaged or belongs to another model.
        """
        try:
            items = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore())
            )
        except (PermissionError, MemoryError, jax.errors.JaxRuntimeError):
            raise  # the checkpoint may be whole
        except Exception as error:  # orbax raises a dozen kinds for one cause: files that do not fit
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(
                f"checkpoint {self._folder / str(step)} cannot be read ({first_line[:200]}); "
                f"move that folder away to go on from the one before"
            ) from error
        return items.state, items.data

    def wait(self) -> None:
        """Returns when everything saved is complete on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases."""
        self._manager.wait_until_finished()
        self._manager.close()


def open_workdir(workdir: Path, config: Mapping[str, Any]) -> None:
    """Creates the workdir with its config.json, or checks that the one there is of the same run.

    Raises:
        ValueError: if config.json there differs in a field that changes the parameters or the pairs.
        PermissionError, NotADirectoryError: if the folder cannot be made or written.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    if not os.access(workdir, os.W_OK):
        raise PermissionError(f"{workdir} is not writable; give another --workdir")
    path = workdir / CONFIG_FILE
    if path.exists():
        differences = _differences(_read_json(path), json.loads(json.dumps(config)))
        if differences:
            raise ValueError(
                f"workdir {workdir} belongs to another run: {'; '.join(differences[:3])}"
                f"{f' and {len(differences) - 3} more' if len(differences) > 3 else ''}; "
                f"use another --workdir, or the settings in {path}"
            )
    write_atomically(path, json.dumps(config, indent=2) + "\n")


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    old_flat, new_flat = _flatten_json(old), _flatten_json(new)
    free = re.compile("|".join(f"(?:{pattern})" for pattern in FREE_FIELDS))
    return [
        f"{path.replace('/', '.')} is {old_flat.get(path, 'absent')!r} there and {new_flat.get(path, 'absent')!r} here"
        for path in sorted(old_flat.keys() | new_flat.keys())
        if not free.fullmatch(path) and old_flat.get(path) != new_flat.get(path)
    ]


def _flatten_json(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list):
        items = ((str(i), v) for i, v in enumerate(value))
    else:
        return {prefix[:-1]: value}
    return {k: v for name, item in items for k, v in _flatten_json(item, f"{prefix}{name}/").items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); restore it from a checkpoint's config/ or remove it"
        ) from None


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file under a temporary name beside its place, then renames: readers see the old one or the new one."""
    content = content.encode() if isinstance(content, str) else content
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def is_run(path: Path) -> bool:
    """Whether `path` is a run's workdir or one checkpoint inside it."""
    return _run_of(path) is not None


def read_run_params(path: Path, *, step: int | None = None) -> tuple[dict[str, Any], dict[str, Any], int]:
    """(params as numpy, config as JSON, step) of a workdir's newest checkpoint, or of the checkpoint `path` names.

    Only the parameters are read, whatever devices they were saved from; their running average where the run keeps one.

    Raises:
        FileNotFoundError: if the workdir has no whole checkpoint.
        ValueError: if the checkpoint is damaged.
    """
    workdir, named_step = _run_of(path) or (path, None)
    step = named_step if step is None else step
    folder = workdir.resolve() / CHECKPOINTS_DIR
    # orbax writes this file last: a folder without it is half a checkpoint.
    whole = [p for p in folder.glob("*") if p.name.isdigit() and (p / "_CHECKPOINT_METADATA").exists()]
    steps = sorted(int(p.name) for p in whole)
    step = steps[-1] if step is None and steps else step
    if step not in steps:
        raise FileNotFoundError(
            f"{workdir} has no checkpoint{'' if step is None else f' {step}'}; it has {steps or 'none'}"
        )
    config = _read_json(workdir / CONFIG_FILE)
    try:
        with ocp.PyTreeCheckpointer() as reader:
            tree = reader.metadata(folder / str(step) / "state").item_metadata.tree
            name = "ema" if tree.get("ema") else "params"
            stored = tree[name]
            like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored)
            restored = reader.restore(
                folder / str(step) / "state",
                args=ocp.args.PyTreeRestore(
                    item={name: like},
                    restore_args={name: jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)},
                    partial_restore=True,
                ),
            )
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # as in Checkpointer.restore
        raise ValueError(
            f"checkpoint {folder / str(step)} cannot be read ({str(error)[:200]}); try another step"
        ) from error
    params = restored[name]
    assert trees.flatten(params), "a checkpoint without parameters"
    return params, config, step


def _run_of(path: Path) -> tuple[Path, int | None] | None:
    """(workdir, step or None) when `path` is a workdir or WORKDIR/checkpoints/STEP, else None."""
    if (path / CONFIG_FILE).is_file() and (path / CHECKPOINTS_DIR).is_dir():
        return path, None
    path = path.resolve()
    if path.name.isdigit() and path.parent.name == CHECKPOINTS_DIR and (path.parent.parent / CONFIG_FILE).is_file():
        return path.parent.parent, int(path.name)
    return None
