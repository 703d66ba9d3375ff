"""A run's workdir on disk, and checkpoints that are whole or absent.

    workdir/config.json           what the run was started with
    workdir/tokenizer.model       its SentencePiece model, so that the run can be evaluated and exported on its own
    workdir/metrics.jsonl
    workdir/checkpoints/STEP/     orbax: state, data (the loader's position), config: one atomic unit

Saving is asynchronous: orbax copies the arrays from the device, writes to a folder with a temporary name and renames it
when every file is there. The last `keep` checkpoints stay, and the best one by `best_metric`.

Several processes write one checkpoint together, so the workdir is a folder that all hosts share. It is laid out on whatever
devices restore it: their number, the number of hosts, FSDP and the data workers may change between starts.

How a run starts, in this order: the newest checkpoint of its workdir; else fresh parameters.

The trap: a run that goes on with other settings is neither run. Whatever changes the parameters or the pairs must agree with
the workdir's config.json; only where it runs and what it reports may differ.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from siglip import trees
from siglip.peers import Alone

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.model"
CHECKPOINTS_DIR = "checkpoints"

# Fields (patterns of their paths) that neither change the parameters nor the pairs: where it runs, how often it reports, where
# files lie. What the files hold is compared by content: the loader's fingerprint, and the tokenizer in the workdir.
FREE_FIELDS = (
    "workdir",
    "(mesh|log|checkpoint|eval|distributed)(/.*)?",
    "loss/(impl|chunk_size|micro_batch_size)",
    "model/(image|text)/(attention|remat)",
    "data/(workers|threads|prefetch|cache_bytes|tokenizer)",
    r"data/sources/\d+/shards",
)
# Fields in which the processes of one run may differ: who they are, and what a host can and where it has its files.
OWN_FIELDS = (
    "workdir",
    "distributed(/.*)?",
    "data/(workers|threads|prefetch|cache_bytes|tokenizer)",
    r"data/sources/\d+/shards",
)
_SHARED_FILE_S = 5.0  # a network folder may be slow to show what another host wrote


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
        self._check_model(step, like)
        with _reading(self._folder / str(step), fix="move that folder away to go on from the one before"):
            items = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore())
            )
        return items.state, items.data

    def _check_model(self, step: int, like: Any) -> None:
        """Raises ValueError if the parameters of a step have other names or shapes than `like`: config.json may be gone."""
        folder = self._folder / str(step)
        try:
            with ocp.PyTreeCheckpointer() as reader:
                tree = reader.metadata(folder / "state").item_metadata.tree
            there = {path: tuple(leaf.shape) for path, leaf in trees.flatten(tree["params"]).items()}
        except Exception:  # `restore` says what is wrong with the files
            return
        here = {path: tuple(leaf.shape) for path, leaf in trees.flatten(like.params).items()}
        here["ema"], there["ema"] = like.ema is not None, bool(tree.get("ema"))
        other = sorted(path for path in there.keys() | here.keys() if there.get(path) != here.get(path))
        if other:
            path, more = other[0], f" and {len(other) - 1} more" if len(other) > 1 else ""
            raise ValueError(
                f"checkpoint {folder} is of another model: {path} is {there.get(path, 'absent')} there and "
                f"{here.get(path, 'absent')} here{more}; use the settings it was trained with, or another --workdir"
            )

    def wait(self) -> None:
        """Returns when everything saved is complete on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases."""
        self._manager.wait_until_finished()
        self._manager.close()


def check_same_run(
    peers: Alone, *, config: Mapping[str, Any], data_state: Mapping[str, Any], tokenizer: bytes | None
) -> None:
    """Raises ValueError, in every process, if one was started with other settings or other data than process 0."""
    own = re.compile("|".join(f"(?:{pattern})" for pattern in OWN_FIELDS))
    data = {**data_state, "tokenizer": None if tokenizer is None else hashlib.sha256(tokenizer).hexdigest()[:16]}
    flat = {path: value for path, value in _flatten_json(_plain(config)).items() if not own.fullmatch(path)}
    settings = flat | {f"data/{name}": value for name, value in _plain(data).items()}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    if len(set(peers.gather("settings", digest))) == 1:
        return
    everyones = peers.gather("settings in full", settings)
    index = next(i for i, theirs in enumerate(everyones) if theirs != everyones[0])
    differences = _differences(everyones[0], everyones[index], ())
    told = [f"{name} is {first!r} in process 0 and {its!r} in process {index}" for name, first, its in differences[:3]]
    raise ValueError(
        f"process {index} was started with other settings than process 0: {'; '.join(told)}; "
        f"start the same command, with the same recipe and data, on every host"
    )


def _plain(tree: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: tuples become lists."""
    return json.loads(json.dumps(tree))


def open_workdir(
    workdir: Path, config: Mapping[str, Any], *, tokenizer: bytes | None = None, peers: Alone | None = None
) -> None:
    """Creates the workdir with its config.json and tokenizer, or checks that those there are of the same run.

    Raises:
        ValueError: if config.json there differs in a field that changes the parameters or the pairs, if its tokenizer is
            another one, or if the processes do not all see the same folder.
        PermissionError, NotADirectoryError: if the folder cannot be made or written.
    """
    peers = Alone() if peers is None else peers
    if peers.is_first:
        _make_workdir(workdir, config, tokenizer)
    if peers.count == 1:
        return
    # Leftovers of an earlier run may lie on every host: only a file written now proves that the folder is one.
    proof = workdir / f".shared-{uuid.uuid4().hex}"
    if peers.is_first:
        proof.touch()
    proof = workdir / peers.gather("workdir", proof.name)[0]
    deadline = time.monotonic() + _SHARED_FILE_S
    while not (seen := proof.exists() and os.access(workdir, os.W_OK)) and time.monotonic() < deadline:
        time.sleep(0.1)
    everyones = peers.gather("workdir is shared", [seen, str(workdir)])
    if peers.is_first:
        proof.unlink()
    blind = [(index, path) for index, (seen, path) in enumerate(everyones) if not seen]
    if blind:
        raise ValueError(
            f"process {blind[0][0]} does not see, or may not write, what process 0 writes to workdir {everyones[0][1]} "
            f"(there it is {blind[0][1]}); give --workdir a folder that all hosts share"
        )


def _make_workdir(workdir: Path, config: Mapping[str, Any], tokenizer: bytes | None) -> None:
    path = workdir / TOKENIZER_FILE
    if tokenizer is not None and path.exists() and path.read_bytes() != tokenizer:
        raise ValueError(
            f"workdir {workdir} was trained with another tokenizer than {config['data']['tokenizer']}; "
            f"use --data.tokenizer {path}, or another --workdir"
        )
    _make_config_file(workdir, config)
    if tokenizer is not None and not path.exists():
        write_atomically(path, tokenizer)


def _make_config_file(workdir: Path, config: Mapping[str, Any]) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    if not os.access(workdir, os.W_OK):
        raise PermissionError(f"{workdir} is not writable; give another --workdir")
    path = workdir / CONFIG_FILE
    if path.exists():
        differences = _differences(_flatten_json(_read_json(path)), _flatten_json(_plain(config)), FREE_FIELDS)
        if differences:
            told = [f"{name} is {there!r} there and {here!r} here" for name, there, here in differences[:3]]
            raise ValueError(
                f"workdir {workdir} belongs to another run: {'; '.join(told)}"
                f"{f' and {len(differences) - 3} more' if len(differences) > 3 else ''}; "
                f"use another --workdir, or the settings in {path}"
            )
    write_atomically(path, json.dumps(config, indent=2) + "\n")


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], free_fields: Sequence[str]
) -> list[tuple[str, Any, Any]]:
    """(dotted name, old value, new value) of every path whose value differs and that is not free."""
    free = re.compile("|".join(f"(?:{pattern})" for pattern in free_fields))
    return [
        (path.replace("/", "."), old.get(path, "absent"), new.get(path, "absent"))
        for path in sorted(old.keys() | new.keys())
        if not free.fullmatch(path) and old.get(path) != new.get(path)
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
    folder, steps = workdir.resolve() / CHECKPOINTS_DIR, _whole_steps(workdir)
    step = steps[-1] if step is None and steps else step
    if step not in steps:
        raise FileNotFoundError(
            f"{workdir} has no checkpoint{'' if step is None else f' {step}'}; it has {steps or 'none'}"
        )
    config = _read_json(workdir / CONFIG_FILE)
    with _reading(folder / str(step), fix="try another step"):
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
    params = restored[name]
    assert trees.flatten(params), "a checkpoint without parameters"
    return params, config, step


@contextlib.contextmanager
def _reading(folder: Path, *, fix: str) -> Iterator[None]:
    """Turns what orbax raises for a damaged checkpoint into a ValueError; what may be the machine's fault passes."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # orbax raises a dozen kinds for one cause: files that do not fit
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise  # a disk or a network that fails, a folder that may not be read
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"checkpoint {folder} cannot be read ({first_line[:200]}); {fix}") from error


def newest_step(workdir: Path) -> str:
    """ "step N of WORKDIR" or "the beginning": where a run would go on that had to stop now."""
    steps = _whole_steps(workdir)
    return f"step {steps[-1]} of {workdir}" if steps else f"the beginning, workdir {workdir} has no checkpoint yet"


def _whole_steps(workdir: Path) -> list[int]:
    # orbax writes this file last: a folder without it is half a checkpoint.
    folders = (workdir.resolve() / CHECKPOINTS_DIR).glob("*")
    return sorted(
        int(path.name) for path in folders if path.name.isdigit() and (path / "_CHECKPOINT_METADATA").exists()
    )


def _run_of(path: Path) -> tuple[Path, int | None] | None:
    """(workdir, step or None) when `path` is a workdir or WORKDIR/checkpoints/STEP, else None."""
    if (path / CONFIG_FILE).is_file() and (path / CHECKPOINTS_DIR).is_dir():
        return path, None
    path = path.resolve()
    if path.name.isdigit() and path.parent.name == CHECKPOINTS_DIR and (path.parent.parent / CONFIG_FILE).is_file():
        return path.parent.parent, int(path.name)
    return None
