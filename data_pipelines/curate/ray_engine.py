"""An engine on many machines: tasks on a Ray cluster (Moritz et al., arXiv 1712.05889), or on a small one started here.

Through Ray go a function's name, an item and a small result; rows go through files in a folder that all machines share.
That they do share it is checked: every machine must see a file that the driver wrote, and the driver what each of them
wrote; a worker process on a machine that comes later looks before its first task.

A machine may come or go at any time. A task that was lost with its machine is given out again; one whose process was
killed (out of memory, a codec's crash) is tried once more after all others, spread over the machines; a second death is
its outcome.

The trap: Ray retries on its own, and for a process that ran out of memory without an end. Here its retries are off and
deaths are counted, so that one picture that kills whoever decodes it cannot hold up a billion others.
"""

import contextlib
import fcntl
import functools
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from data_pipelines.curate.engine import Item, WorkerDied, use_one_thread
from data_pipelines.errors import UserError
from data_pipelines.sources.shards import usable_cores

_ANSWER_S, _NODE_S, _RECOUNT_S = 30, 60, 5
_TASKS_PER_CPU = 2  # one runs, one is on its way
_MOST_LOSSES = 3  # of a task with its machine, after which the task is suspected
_MARKER = ".cluster-"
_TEMPORARY = "siglip-ray-"
_SECRET = uuid.uuid4().hex  # one for all clusters that this process starts: Ray reads it once
_OBJECT_STORE_BYTES = 80 << 20  # nothing large goes through it; Ray wants at least 75 MiB
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # that a worker died is told here, in one line
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# Connecting to what is no Ray, or not reachable, takes Ray minutes and cannot be stopped: a process is tried first.
_PROBE = "import sys, ray; ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR')"


class RayEngine:
    """Tasks on a Ray cluster, for as long as the `with` block lasts.

    folder: on storage that all machines share, at the same path; made if it is not there.
    address: HOST:PORT of the cluster's head, `auto` on one of its machines, ray://HOST:PORT from elsewhere; None starts a
      cluster on this machine, and stops it in the end.
    workers: processes of a cluster that is started here; 0 is one per core.
    gpus_per_task: of a task that uses a model; with 0 as many run as there are machines, spread over them.
    """

    def __init__(self, folder: Path, *, address: str | None = None, workers: int = 0, gpus_per_task: float = 0):
        if workers < 0:
            raise UserError(f"workers={workers} must be at least 0 (0: every core)")
        if gpus_per_task < 0:
            raise UserError(f"gpus_per_task={gpus_per_task} must be at least 0 (0: none)")
        self._folder, self._address, self._gpus_per_task = folder, address, gpus_per_task
        self._workers = workers or usable_cores()
        self._marker = folder.absolute() / f"{_MARKER}{uuid.uuid4().hex[:12]}"
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> "RayEngine":
        """Raises: ValueError if Ray is not installed, no cluster answers, or it does not share the folder."""
        _import_ray()
        with contextlib.ExitStack() as cleanup:  # undone at once when a step fails
            if self._address is None:
                _start(self._workers, cleanup)
            else:
                _join(self._address, cleanup)
            self._marker.parent.mkdir(parents=True, exist_ok=True)
            _remove_markers(self._marker.parent)  # of a run that was killed
            cleanup.callback(_remove_markers, self._marker.parent)
            self._marker.touch()
            _check_nodes(self._marker)
            if self._gpus_per_task and not self._slots_with_model():
                raise UserError(f"gpus_per_task={self._gpus_per_task} but no machine of the cluster has a GPU; use 0")
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._cleanup.close()

    def map(self, function: Callable[[Item], Any], items: Iterable[Item]) -> Iterator[tuple[Item, Any]]:
        """Yields (item, result), or (item, exception) of an item that failed."""
        return self._map(function, items, {"num_cpus": 1}, _slots)

    def map_with_model(self, function: Callable[[Item], Any], items: Iterable[Item]) -> Iterator[tuple[Item, Any]]:
        """The same where items bring a model: spread over the GPUs, or over the machines, about one task on each."""
        # Ray ends a process that used a GPU after its task, and with it the model, unless told otherwise.
        resources = {"num_cpus": 1, "num_gpus": self._gpus_per_task, "max_calls": 0, "scheduling_strategy": "SPREAD"}
        return self._map(function, items, resources, self._slots_with_model)

    def _slots_with_model(self) -> int:
        if not self._gpus_per_task:
            return len(_nodes())
        import ray

        return int(ray.cluster_resources().get("GPU", 0) / self._gpus_per_task)

    def _map(
        self, function: Callable, items: Iterable[Item], resources: dict, slots: Callable[[], int]
    ) -> Iterator[tuple[Item, Any]]:
        suspects: list[Item] = []
        for item, result in self._run(function, deque(items), resources, slots):
            if isinstance(result, WorkerDied):
                suspects.append(item)
            else:
                yield item, result
        resources = resources | {"scheduling_strategy": "SPREAD"}
        yield from self._run(function, deque(suspects), resources, lambda: len(_nodes()))

    def _run(
        self, function: Callable, waiting: deque, resources: dict, slots: Callable[[], int]
    ) -> Iterator[tuple[Item, Any]]:
        """Yields (item, outcome), `WorkerDied` of one that took its process with it."""
        import ray

        remote = ray.remote(max_retries=0, **resources)(_compute)
        running: dict[ray.ObjectRef, tuple[Item, int]] = {}
        lost: deque[tuple[Item, int]] = deque()  # with their machines, and how often
        most, counted, seen = 0, -float("inf"), time.monotonic()
        while waiting or lost or running:
            if (now := time.monotonic()) - counted > _RECOUNT_S:  # machines come and go
                found, counted = slots(), now
                most, seen = max(1, found), now if found else seen
                if now - seen > _NODE_S:
                    told = f"{_NODE_S} s without a machine that can take a task; start one (`ray start --address …`)"
                    warnings.warn(told, stacklevel=2)
                    seen = float("inf")  # told once, until one comes
            while (waiting or lost) and len(running) < most:
                item, losses = lost.popleft() if lost else (waiting.popleft(), 0)
                payload = pickle.dumps((function, item))
                running[remote.remote(payload, str(self._marker), os.getcwd())] = item, losses
            ray.wait(list(running), num_returns=1, timeout=_RECOUNT_S)
            done, _ = ray.wait(list(running), num_returns=len(running), timeout=0)
            for reference in done:
                item, losses = running.pop(reference)
                result = _outcome(reference, item)
                if result is _LOST and losses < _MOST_LOSSES:
                    lost.append((item, losses + 1))
                else:
                    yield item, _died(item) if result is _LOST else result


_LOST = object()


def _outcome(reference: Any, item: Any) -> Any:
    """A result, or the exception in its place; `_LOST` when the task went down with its machine."""
    import ray.exceptions

    try:
        return ray.get(reference)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
        return _died(item)
    except (ray.exceptions.NodeDiedError, ray.exceptions.LocalRayletDiedError, ray.exceptions.ObjectLostError):
        return _LOST
    except ray.exceptions.RayTaskError as error:
        if not isinstance(error.cause, Exception):
            return RuntimeError(_last_line(str(error)))
        error.cause.__cause__ = RuntimeError(str(error))  # with the traceback on that machine
        return error.cause
    except ray.exceptions.RayError as error:
        return RuntimeError(f"Ray could not run a task: {_last_line(str(error))}")


def _died(item: Any) -> WorkerDied:
    return WorkerDied(
        f"its worker process was killed twice; the log of the kernel or of Ray may say why: {item!r:.200}"
    )


def _compute(payload: bytes, marker: str, folder: str) -> Any:
    """On a worker: one task."""
    _prepare(marker, folder)
    function, item = pickle.loads(payload)
    return function(item)


@functools.lru_cache(1)
def _prepare(marker: str, folder: str) -> None:
    """Once per process, so that machines that came after the check are held to it too."""
    if not Path(marker).exists():
        raise UserError(
            f"machine {socket.gethostname()} does not see {marker!r}; "
            f"--out must be on storage that every machine of the cluster shares, at the same path"
        )
    with contextlib.suppress(OSError):  # relative names of shards mean what they mean to the driver
        os.chdir(folder)
    use_one_thread()


def _leave_mark(marker: str, folder: str, node: str) -> None:
    """On a worker: what the driver must see."""
    _prepare(marker, folder)
    Path(f"{marker}-{node}").touch()


def _import_ray() -> None:
    for name, value in _ENVIRONMENT.items():  # before the import: Ray reads them once
        os.environ.setdefault(name, value)
    try:
        import ray  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"--engine ray needs the package {error.name}; install it: pip install 'siglip-stage0[ray]'"
        ) from None


def _start(workers: int, cleanup: contextlib.ExitStack) -> None:
    """A cluster of this machine alone, with its files in a folder of its own."""
    import ray

    if "RAY_AUTH_TOKEN" not in os.environ:  # Ray would write one into the home folder.
        os.environ["RAY_AUTH_TOKEN"] = _SECRET
        cleanup.callback(os.environ.pop, "RAY_AUTH_TOKEN", None)
    folder = _make_folder(cleanup)
    cleanup.callback(ray.shutdown)
    ray.init(
        address="local", num_cpus=workers, object_store_memory=_OBJECT_STORE_BYTES, include_dashboard=False,
        log_to_driver=False, logging_level="ERROR", _temp_dir=folder,
    )  # fmt: skip


def _make_folder(cleanup: contextlib.ExitStack) -> str:
    """One for the files of a cluster, locked for as long as it is in use; those that killed processes left are removed."""
    # Paths of sockets have at most 107 characters: TMPDIR may be too deep.
    for left in Path("/tmp").glob(f"{_TEMPORARY}*"):
        if (lock := _lock(left)) is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
    while True:
        folder = tempfile.mkdtemp(prefix=_TEMPORARY, dir="/tmp")
        if (lock := _lock(folder)) is not None:  # else another took it for one that was left
            break
    cleanup.callback(os.close, lock)
    cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _lock(folder: str | os.PathLike) -> int | None:
    """A descriptor that locks a folder of this user until it is closed, or its process killed; None if it is in use or gone."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_uid == os.getuid() and os.path.samestat(os.fstat(lock), os.stat(folder)):
            return lock
    os.close(lock)
    return None


def _join(address: str, cleanup: contextlib.ExitStack) -> None:
    import ray

    _check_address(address)
    cleanup.callback(ray.shutdown)  # leaves a cluster that was joined running
    ray.init(address, log_to_driver=False, logging_level="ERROR")


def _check_address(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    fix = "start one with `ray start --head`, or give --address HOST:PORT of its head"
    if address != "auto":
        if not host or not port.isdigit():
            raise UserError(f"address={address!r} is neither HOST:PORT nor ray://HOST:PORT nor auto; {fix}")
        try:
            socket.create_connection((host, int(port)), timeout=_ANSWER_S / 3).close()
        except (OSError, OverflowError) as error:
            raise UserError(f"no Ray cluster answers at {address!r} ({error}); {fix}") from None
    try:
        command = [sys.executable, "-c", _PROBE, address]
        subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=True)
    except subprocess.TimeoutExpired:
        raise UserError(f"no Ray cluster answers at {address!r} within {_ANSWER_S} s; {fix}") from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"cannot join a Ray cluster at {address!r} ({_last_line(error.stderr)}); {fix}") from None


def _check_nodes(marker: Path) -> None:
    """Raises ValueError naming a machine that does not share the marker's folder or cannot run the code."""
    import ray
    import ray.exceptions
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(max_retries=0, num_cpus=0)(_leave_mark)
    marks = {}
    for node in _nodes():
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        reference = remote.options(scheduling_strategy=there).remote(str(marker), os.getcwd(), node["NodeID"])
        marks[reference] = node
    if marks:  # a cluster that grows on demand may have none yet
        ray.wait(list(marks), num_returns=len(marks), timeout=_NODE_S)
    for reference, node in marks.items():
        address = node["NodeManagerAddress"]
        try:
            ray.get(reference, timeout=0)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, ValueError) else _last_line(str(error))
            raise UserError(f"machine {address} cannot take part: {cause}") from None
        except ray.exceptions.RayError:
            continue  # slow to start, or gone by now: its processes look for themselves
        if not _appears(Path(f"{marker}-{node['NodeID']}")):
            raise UserError(
                f"what machine {address} writes to {str(marker.parent)!r} is not seen here; "
                f"--out must be on storage that every machine of the cluster shares"
            )


def _appears(path: Path) -> bool:
    """Network file systems may take a moment."""
    deadline = time.monotonic() + _RECOUNT_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _nodes() -> list[dict]:
    """The machines that compute: a head often does not."""
    import ray

    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


def _slots() -> int:
    import ray

    return _TASKS_PER_CPU * int(ray.cluster_resources().get("CPU", 0))


def _remove_markers(folder: Path) -> None:
    for path in folder.glob(f"{_MARKER}*"):
        path.unlink(missing_ok=True)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
