"""A run's workdir: what it was started with, and that whoever goes on with it agrees.

    .lock               who trains in it now (lock.py)
    config.json         the settings; those that change the parameters or the pairs must be the same at every start
    tokenizer.model     its SentencePiece model, so that the run can be evaluated and exported on its own

The trap: a run that goes on with other settings is neither run. Only where it runs, what it reports, and the weights of its
sources may differ, and it may be made longer; what files hold is compared by content, so they may lie elsewhere.
"""

import contextlib
import glob
import hashlib
import json
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from data_pipelines.lock import hold
from siglip.atomic import write_atomically
from siglip.errors import BAD_PATH, UserError
from siglip.parallel.collectives import gather_records
from siglip.parallel.launch import in_all_or_none
from siglip.trees import read_json

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.model"

_LOADER = "workers|threads|prefetch|cache_bytes|block_bytes"
# Fields (patterns of their paths) that neither change the parameters nor the pairs: where it runs, how often it reports, where
# files lie. What the files hold is compared by content: the loader's fingerprint, and the tokenizer in the workdir. Weights
# do change the pairs to come: the loader goes on from the count that each source has reached.
FREE_FIELDS = (
    "workdir",
    "(mesh|log|checkpoint|eval|distributed)(/.*)?",
    "loss/(impl|chunk_size|micro_batch_size)",
    "model/(image|text)/(attention|remat|unroll)",
    f"data/({_LOADER}|tokenizer|image_embeddings)",
    r"data/sources/\d+/(shards|manifest|weight)",
)
# Fields in which the processes of one run may differ: who they are, and what a host can and where it has its files.
OWN_FIELDS = (
    "workdir",
    "distributed(/.*)?",
    f"data/({_LOADER}|tokenizer|image_embeddings)",
    r"data/sources/\d+/(shards|manifest)",
)
_SHARED_FILE_S = 5.0  # a network folder may be slow to show what another host wrote


def check_same_run(
    *,
    config: Mapping[str, Any],
    data_state: Mapping[str, Any],
    tokenizer: bytes | None,
    initial: str | None = None,
) -> None:
    """Raises UserError, in every process, if one was started with other settings or other data than process 0.

    `initial` is the digest of the parameters that this process has read from `init.src`.
    """
    own = re.compile("|".join(f"(?:{pattern})" for pattern in OWN_FIELDS))
    data = {**data_state, "tokenizer": None if tokenizer is None else hashlib.sha256(tokenizer).hexdigest()[:16]}
    everything = _flatten_json(_plain(config))
    flat = {path: value for path, value in everything.items() if not own.fullmatch(path)}
    # Where the embeddings are kept is a host's affair, whether they are used is not.
    data["image_embeddings_used"] = everything.get("data/image_embeddings") is not None
    settings = flat | {f"data/{name}": value for name, value in _plain(data).items()} | {"init/parameters": initial}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    if len(set(gather_records([digest]))) == 1:
        return
    everyones = gather_records([settings])
    index = next(i for i, theirs in enumerate(everyones) if theirs != everyones[0])
    differences = _differences(everyones[0], everyones[index], ())
    told = [f"{name} is {first!r} in process 0 and {its!r} in process {index}" for name, first, its in differences[:3]]
    raise UserError(
        f"process {index} was started with other settings than process 0: {'; '.join(told)}; "
        f"start the same command, with the same recipe and data, on every host"
    )


def _plain(tree: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: tuples become lists."""
    return json.loads(json.dumps(tree))


@contextlib.contextmanager
def open_workdir(
    workdir: Path,
    config: Mapping[str, Any],
    *,
    tokenizer: bytes | None = None,
    complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
) -> Iterator[None]:
    """Creates the workdir with its config.json and tokenizer, or checks that those there are of the same run.

    Within it this run holds the workdir: process 0 has its lock.

    Args:
        complete: adds to a config.json the fields that are newer than it, with their defaults.

    Raises:
        UserError: if config.json there differs in a field that changes the parameters or the pairs, if its tokenizer is
            another one, or if the processes do not all see the same folder.
        data_pipelines.errors.RunFailed: if another run holds the workdir.
        PermissionError, NotADirectoryError: if the folder cannot be made or written.
    """
    with contextlib.ExitStack() as stack:

        def make() -> None:
            if jax.process_index() == 0:
                stack.enter_context(hold(workdir, fix="give another --workdir"))
                _make_workdir(workdir, config, tokenizer, complete)

        in_all_or_none(make, bad_input=(UserError, *BAD_PATH))
        if jax.process_count() > 1:
            _check_shared(workdir)
        yield


def _check_shared(workdir: Path) -> None:
    """Raises UserError, in every process, if one does not see the folder that process 0 sees."""
    is_first = jax.process_index() == 0
    # Leftovers of an earlier run may lie on every host: only a file written now proves that the folder is one.
    proof = workdir / gather_records([f".shared-{uuid.uuid4().hex}"])[0]
    if is_first:
        proof.touch()
    deadline = time.monotonic() + _SHARED_FILE_S
    while not (seen := proof.exists() and os.access(workdir, os.W_OK)) and time.monotonic() < deadline:
        time.sleep(0.1)
    everyones = gather_records([[seen, str(workdir)]])
    if is_first:
        proof.unlink()
    blind = [(index, path) for index, (seen, path) in enumerate(everyones) if not seen]
    if blind:
        raise UserError(
            f"process {blind[0][0]} does not see, or may not write, what process 0 writes to workdir {everyones[0][1]} "
            f"(there it is {blind[0][1]}); give --workdir a folder that all hosts share"
        )


def _make_workdir(workdir: Path, config: Mapping[str, Any], tokenizer: bytes | None, complete: Callable) -> None:
    if glob.has_magic(str(workdir.resolve())):
        # Orbax looks for the parts of a checkpoint by a pattern that begins with this path.
        raise UserError(
            f"workdir {workdir.resolve()} has one of * ? [ in its path, where checkpoints cannot be kept; name another"
        )
    path = workdir / TOKENIZER_FILE
    if tokenizer is not None and path.exists() and path.read_bytes() != tokenizer:
        raise UserError(
            f"workdir {workdir} was trained with another tokenizer than {config['data']['tokenizer']}; "
            f"use --data.tokenizer {path}, or another --workdir"
        )
    _make_config_file(workdir, config, complete)
    if tokenizer is not None and not path.exists():
        write_atomically(path, tokenizer)


def _make_config_file(workdir: Path, config: Mapping[str, Any], complete: Callable) -> None:
    path = workdir / CONFIG_FILE
    if path.exists():
        saved, ours = (_flatten_json(_plain(tree)) for tree in (complete(read_config(workdir)), config))
        # A run may be made longer: the loop says what its schedule does then.
        longer = [field for field in ("total_steps",) if ours.get(field, 0) > saved.get(field, math.inf)]
        differences = _differences(saved, ours, (*FREE_FIELDS, *longer))
        if differences:
            told = [f"{name} is {there!r} there and {here!r} here" for name, there, here in differences[:3]]
            raise UserError(
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


def read_config(workdir: Path, *, fields: Sequence[str] = ()) -> dict[str, Any]:
    """config.json of a workdir, which has to have these fields.

    Raises:
        FileNotFoundError: if there is none.
        UserError: if it is not a JSON object, or lacks a field.
    """
    path, fix = workdir / CONFIG_FILE, "restore it from a checkpoint's config/"
    tree = read_json(path, fix=f"{fix} or remove it")
    if lacks := [name for name in fields if name not in tree]:
        raise UserError(f"{path} is not the config of a run: it lacks {', '.join(lacks)}; {fix}")
    return tree
