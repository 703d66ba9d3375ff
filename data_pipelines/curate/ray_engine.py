"""An engine on many machines: tasks on a running Ray cluster (Moritz et al., arXiv 1712.05889).

Ray's own commands start and stop the cluster (docs/data.md). Through Ray go a function's name, an item and a small result;
rows go through files in a folder that all machines share, which every worker process checks with a marker file.

The trap: Ray retries a task that runs out of memory without end, so one image could hold up a billion others. Here its
retries are off; a task that kills its process twice fails.
"""

import contextlib
import functools
import os
import pickle
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from data_pipelines.curate.engine import Item, WorkerDied, use_one_thread
from data_pipelines.errors import UserError

_MARKER, _TASKS_PER_CPU = ".cluster-", 2  # of two tasks on a CPU one runs, one is on its way
# Tasks with strikes come last, about one on a machine; one that is out fails. A lost machine is seldom its task's fault.
_PROCESS_STRIKES, _MACHINE_STRIKES, _OUT = 2, 1, 4
# Ray reads these once, when imported: one attempt to connect, not 20 of 40 s; deaths are told of here, in one line.
_ENVIRONMENT = {"RAY_gcs_server_port_wait_time_s": "1", "RAY_DEDUP_LOGS_SKIP_REGEX": "."}
_KILLED = "its worker process was killed twice; the log of the kernel or of Ray may say why"


class RayEngine:
    """Tasks on a Ray cluster, for as long as the `with` block lasts; the cluster goes on running.

    folder: on storage that all machines share, at the same path; made if it is not there.
    address: HOST:PORT of the cluster's head, `auto` on one of its machines, ray://HOST:PORT from elsewhere.
    gpus_per_task: for each task that uses a model; with 0 as many run as there are machines.
    """

    def __init__(self, folder: Path, *, address: str = "auto", gpus_per_task: float = 0):
        if gpus_per_task < 0:
            raise UserError(f"gpus_per_task={gpus_per_task} must be at least 0 (0: none)")
        self._folder, self._address, self._gpus_per_task = folder.absolute(), address, gpus_per_task

    def __enter__(self) -> "RayEngine":
        """Raises: UserError if Ray is not installed, no cluster answers, or the cluster has no GPU but tasks want one."""
        with contextlib.ExitStack() as cleanup:
            self._ray = _connect(self._address)
            cleanup.callback(self._ray.shutdown)
            if self._gpus_per_task and not self._slots_with_model():
                raise UserError(f"gpus_per_task={self._gpus_per_task} but no machine of the cluster has a GPU; use 0")
            self._cleanup = cleanup.pop_all()
        return self

    @functools.cached_property
    def _marker(self) -> str:
        """A file that tasks find where they share the folder. Made for the first task: from then on the run holds the folder."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for left in self._folder.glob(f"{_MARKER}*"):  # by a run that was killed
            left.unlink(missing_ok=True)
        return self._cleanup.enter_context(NamedTemporaryFile(prefix=_MARKER, dir=self._folder)).name

    def __exit__(self, *error) -> None:
        self._cleanup.close()

    def map(self, function: Callable[[Item], Any], items: Iterable[Item]) -> Iterator[tuple[Item, Any]]:
        """Yields (item, result or exception). Raises: UserError naming a machine that does not share the folder."""
        return self._map(function, items, lambda: int(_TASKS_PER_CPU * self._ray.cluster_resources().get("CPU", 0)))

    def map_with_model(self, function: Callable[[Item], Any], items: Iterable[Item]) -> Iterator[tuple[Item, Any]]:
        """`map` for items that bring a model: about one task at a time on each GPU, or on each machine."""
        # Ray ends a process that used a GPU after its task, and the model with it, unless max_calls is 0.
        return self._map(function, items, self._slots_with_model, num_gpus=self._gpus_per_task, max_calls=0)

    def _slots_with_model(self) -> int:
        if self._gpus_per_task:
            return int(self._ray.cluster_resources().get("GPU", 0) / self._gpus_per_task)
        return sum(1 for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))

    def _map(self, function: Callable, items: Iterable[Item], slots: Callable[[], int], **resources) -> Iterator:
        remote = self._ray.remote(max_retries=0, num_cpus=1, scheduling_strategy="SPREAD", **resources)(_compute)
        waiting, running = deque((item, 0) for item in items), {}
        while waiting or running:
            limits = slots(), self._slots_with_model()  # machines come and go
            while waiting and len(running) < max(1, limits[waiting[0][1] > 0]):
                item, strikes = waiting.popleft()
                running[remote.remote(pickle.dumps((function, item)), self._marker, os.getcwd())] = item, strikes
            for reference in self._ray.wait(list(running), num_returns=1, timeout=5)[0]:
                item, strikes = running.pop(reference)
                result, struck = self._outcome(reference)
                if isinstance(result, _NotSharedError):
                    raise result
                if struck and strikes + struck < _OUT:
                    waiting.append((item, strikes + struck))
                else:
                    yield item, WorkerDied(f"{_KILLED}: {item!r:.200}") if struck else result

    def _outcome(self, reference: Any) -> tuple[Any, int]:
        """(result, or the exception in its place; strikes of a task that was killed)."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference), 0
        except (errors.WorkerCrashedError, errors.OutOfMemoryError):
            return None, _PROCESS_STRIKES
        except (errors.NodeDiedError, errors.LocalRayletDiedError, errors.ObjectLostError):
            return None, _MACHINE_STRIKES
        except errors.RayError as error:
            if not (isinstance(error, errors.RayTaskError) and isinstance(error.cause, Exception)):
                return error, 0
            error.cause.__cause__ = error  # with the traceback on that machine
            return error.cause, 0


class _NotSharedError(UserError):
    """A machine does not see the driver's folder."""


def _compute(payload: bytes, marker: str, folder: str) -> Any:
    _prepare(marker, folder)  # on a worker
    function, item = pickle.loads(payload)
    return function(item)


@functools.lru_cache(1)
def _prepare(marker: str, folder: str) -> None:
    """Runs once per worker process, so that machines that join later are checked too."""
    if not Path(marker).exists():
        raise _NotSharedError(f"machine {socket.gethostname()} does not see {marker!r}; --out needs shared storage")
    with contextlib.suppress(OSError):  # relative names of shards mean what they mean to the driver
        os.chdir(folder)
    use_one_thread()


def _connect(address: str) -> Any:
    fix = "start a cluster with `ray start --head`, or give --address HOST:PORT of its head"
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address != "auto" and not (host and port.isdigit()):
        raise UserError(f"address={address!r} is neither HOST:PORT nor ray://HOST:PORT nor auto; {fix}")
    os.environ |= _ENVIRONMENT | dict(os.environ)
    try:
        import ray

        if address != "auto":  # where nobody listens, even one attempt is slow
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, log_to_driver=False, logging_level="ERROR")
        return ray
    except ModuleNotFoundError as error:
        raise UserError(f"--engine ray needs {error.name}; install it: pip install 'siglip-stage0[ray]'") from None
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster answers at {address!r} ({error}); {fix}") from None
