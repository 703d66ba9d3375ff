"""One run on several processes: how they find each other, and how they end together.

All of it is jax's: `jax.distributed.initialize` detects SLURM, Open MPI, Cloud TPU and GKE's TPU pods, or takes what the
flags say; its service misses a process that sends no heartbeats and then ends the others. Two things are left to do here:

- a process that never joins: jax would abort with a stack trace of C++, so a timer says it in one line before that;
- a process that fails: leaving Python waits for the others, which wait for it. It tells why and goes at once; they follow.

A process that jax ends gives no reason of its own (SIGABRT, exit code 134): the reason is in the output of the one that failed.
"""

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn, TypeVar

import jax
from orbax.checkpoint import multihost

from siglip.errors import FailedAlone, RunFailed, UserError
from siglip.parallel.collectives import gather_records

logger = logging.getLogger(__name__)
T = TypeVar("T")

_TOGETHER_S = 5  # errors that all processes raise come at the same time
_LAST_WORDS_S = 2  # for the others to say their line before process 0 takes jax's service with it
_PROXIES = re.compile("(grpc|https?|all)_proxy", re.IGNORECASE)
# What jax says where it looks for no cluster because this process has used its devices already, and where it finds none.
_USED = "must be called before any JAX calls"
_ALONE = re.compile(f"should be defined|must be defined|{_USED}")
# What it says, after the name of a status, when a collective fails because a process at the other end is gone. On CPUs it
# comes as a ValueError.
_LOST = re.compile(r"[A-Z_]+: .*(?i:gloo|nccl|unavailable|connection|heartbeat|barrier|another task died)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Which processes make up the job, and how patient they are with each other.

    Attributes:
        coordinator: HOST:PORT of process 0, the same everywhere. None: detected.
        processes: how many there are; 1 turns detection off.
        process_id: which one this is, from 0.
        timeout_s: how long to wait for all processes to join, and to leave.
        heartbeat_timeout_s: a process that is silent for so long is taken for dead, and the job stops.
    """

    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None
    timeout_s: int = 300
    heartbeat_timeout_s: int = 15

    def __post_init__(self) -> None:
        for name, least in (("timeout_s", 1), ("heartbeat_timeout_s", 5), ("processes", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"distributed.{name}={value} must be at least {least}")
        given = {name: getattr(self, name) for name in ("coordinator", "processes", "process_id")}
        missing = [f"distributed.{name}" for name, value in given.items() if value is None]
        if self.processes != 1 and 0 < len(missing) < 3:
            raise UserError(
                f"{' and '.join(missing)} missing beside {', '.join(f'{n}={v}' for n, v in given.items() if v is not None)}; "
                f"give distributed.coordinator, .processes and .process_id together, or none of them to have them detected"
            )
        if self.process_id is not None and not 0 <= self.process_id < (self.processes or 1):
            raise UserError(
                f"distributed.process_id={self.process_id} must be from 0 to {(self.processes or 1) - 1}, "
                f"one for each of distributed.processes={self.processes}"
            )
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdigit() or not 0 < int(port) < 65536:
                raise UserError(
                    f"distributed.coordinator={self.coordinator!r} must be HOST:PORT with a port from 1 to 65535"
                )


@contextlib.contextmanager
def joined(
    config: DistributedConfig, *, describe: Callable[[BaseException], tuple[int, str]], asks_for_signals: bool = False
) -> Iterator[None]:
    """Within it this process is joined with the others of its job, if there are any. To be entered before a device is touched.

    An error that all processes raise leaves it as usual. One that only this process raises ends this process at once, and
    jax ends the others.

    Args:
        describe: the exit code and the line for an error.
        asks_for_signals: whether what runs inside asks for SIGTERM (siglip.training.signals); if not, the signal ends it.

    Raises:
        UserError: if the processes disagree about who they are, or the port of process 0 is taken.
    """
    jax.config.update("jax_enable_preemption_service", asks_for_signals)
    if not _join(config):
        check_backend()
        yield
        return
    try:
        check_backend()
        _check_devices(config)
        if jax.process_index() > 0:
            logging.getLogger("siglip").setLevel(logging.WARNING)
        logger.info("%d processes with %d devices", jax.process_count(), jax.device_count())
        yield
    except BaseException as error:
        lost = is_lost_process(error)
        if lost:
            error = RunFailed(f"another process of this job is gone ({str(error).splitlines()[0]})")
        alone = lost or isinstance(error, FailedAlone)
        if alone or not wait_for_all("an error in every process", timeout_s=_TOGETHER_S):
            if jax.process_index() == 0:
                time.sleep(_LAST_WORDS_S)
            end_process(*describe(error))
        raise
    finally:
        jax.distributed.shutdown()


def in_all_or_none(make: Callable[[], T], *, bad_input: tuple[type[BaseException], ...]) -> T:
    """`make()`; where it fails in one process, every process raises.

    Raises:
        UserError: where it raised one of `bad_input` in another process.
        RunFailed: where it raised anything else in another process.
    """
    made, failure, own = None, None, None
    try:
        made = make()
    except Exception as error:
        failure, own = error, [isinstance(error, bad_input), str(error) or repr(error)]
    for index, theirs in enumerate(gather_records([own])):
        if theirs is not None:
            users, line = theirs
            raise failure or (UserError if users else RunFailed)(f"process {index} stopped: {line}")
    return made


def is_lost_process(error: BaseException) -> bool:
    """Whether an operation of several processes failed because one of them is gone."""
    from_jax = isinstance(error, jax.errors.JaxRuntimeError | ValueError) and not isinstance(error, UserError)
    return _several() and from_jax and _LOST.match(str(error)) is not None


def _several() -> bool:
    return jax.distributed.is_initialized() and jax.process_count() > 1


def wait_for_all(name: str, *, timeout_s: float) -> bool:
    """Whether every process comes to this point within `timeout_s`. `name` is used once."""
    try:
        multihost.get_barrier_sync_fn()(key=f"siglip {name}", timeout_ms=int(timeout_s * 1000))
    except (jax.errors.JaxRuntimeError, ValueError):
        return False
    return True


def _join(config: DistributedConfig) -> bool:
    """Whether there is a job of several processes; then this one has joined it."""
    environ, several = os.environ, config.processes is not None
    if config.processes == 1 or (not several and environ.get("SLURM_NTASKS") == "1"):
        return False
    bind_address = _bind_address(config.coordinator) if config.process_id == 0 else None
    # jax aborts the process when its own timeout is over, so ours comes first and says why in one line.
    timer = threading.Timer(config.timeout_s, _nobody_came, [config])
    timer.daemon = True
    timer.start()
    # gRPC would send what the hosts tell each other through a cluster's web proxy.
    proxies = {name: environ.pop(name) for name in list(environ) if _PROXIES.fullmatch(name)}
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.processes,
            config.process_id,
            local_device_ids=local_device_ids(environ),
            cluster_detection_method="deactivate" if several else None,
            initialization_timeout=config.timeout_s + 60,
            heartbeat_timeout_seconds=config.heartbeat_timeout_s,
            shutdown_timeout_seconds=config.timeout_s,
            coordinator_bind_address=bind_address,
        )
    except Exception as error:
        _raise_unless_alone(error, config)
        return False  # jax finds no cluster here
    finally:
        timer.cancel()
        environ.update(proxies)
    return True


def _raise_unless_alone(error: Exception, config: DistributedConfig) -> None:
    """Raises UserError if this process could not join a job of several; says so where one might have been meant."""
    environ, told = os.environ, " ".join(str(error).split())
    tasks, no_cluster = config.processes or _tasks_started(environ), _ALONE.search(told)
    if tasks > 1 and _USED in told:
        raise UserError(
            f"this job has {tasks} processes, but this one has used its devices before it could join the others; the recipe "
            f"must not use jax in get_config() or at import (no jax.devices(), no jnp arrays)"
        ) from error
    # jax takes every pod for one of a job where its package for Kubernetes is installed.
    lone_pod = "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" not in environ
    if tasks > 1 or not (no_cluster or lone_pod):
        raise UserError(
            f"jax cannot join the processes of this job ({told}); give distributed.coordinator, .processes and "
            f".process_id, or distributed.processes=1 to train alone"
        ) from error
    if not no_cluster:
        logger.warning("this pod is not one of an indexed job, so it trains alone (%s)", told)
    elif int(environ.get("SLURM_NTASKS", 1)) > 1:
        alone = "SLURM has %s tasks for this job, but this process was not started by srun: it trains alone"
        logger.warning(alone, environ["SLURM_NTASKS"])


def _tasks_started(environ: Mapping[str, str]) -> int:
    """How many processes srun, mpirun or GKE says that it has started together with this one; 1 if none says so."""
    slurm = int(environ.get("SLURM_NTASKS", 1)) if "SLURM_STEP_NODELIST" in environ else 1
    hosts = environ.get("TPU_WORKER_HOSTNAMES", "").count(",") + 1
    return max(slurm, int(environ.get("OMPI_COMM_WORLD_SIZE", 1)), hosts)


def check_backend() -> None:
    """Has jax find its devices.

    Raises:
        UserError: JAX_PLATFORMS names a platform that this machine, or this installation of jax, does not have.
        RuntimeError: jax's own, where a platform is there and does not start.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # jax asserts that some platform is left where no GPU is seen
        if isinstance(error, RuntimeError) and "known backends" not in str(error):
            raise
        reason = str(error).partition(": ")[2].partition(" (set")[0].rstrip(".") or "no such device is seen here"
        raise UserError(
            f"JAX_PLATFORMS={jax.config.jax_platforms} cannot be used: {reason}; choose among cpu, cuda, rocm and tpu what this "
            f"machine has, install jax with it (pip install 'jax[cuda13]'), or unset JAX_PLATFORMS"
        ) from error


def local_device_ids(environ: Mapping[str, str]) -> list[int] | None:
    """[] for all GPUs that this process sees; None for jax's rule, which in SLURM gives a task the GPU of its number.

    One process a node drives all its GPUs. With several tasks a node, each takes one, unless SLURM dealt them out.
    """
    tasks_per_node = set(re.sub(r"\(x\d+\)", "", environ.get("SLURM_STEP_TASKS_PER_NODE", "")).split(","))
    return [] if tasks_per_node == {"1"} or "SLURM_GPUS_PER_TASK" in environ else None


def _bind_address(coordinator: str) -> str | None:
    """Where process 0 listens; None for jax's [::], which not every machine has. Raises UserError if the port is taken."""
    port, dual = int(coordinator.rpartition(":")[2]), socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
    except OSError as error:
        raise UserError(
            f"port {port} of this host cannot be used ({error.strerror}); another job may run here: "
            f"give another port in distributed.coordinator"
        ) from None
    return None if dual else f"0.0.0.0:{port}"


def _check_devices(config: DistributedConfig) -> None:
    if config.process_id not in (None, jax.process_index()):
        raise UserError(
            f"distributed.process_id={config.process_id}, but by its devices this is process {jax.process_index()} of "
            f"{jax.process_count()}; number the processes as the hosts of the accelerators are numbered"
        )
    counts = Counter(device.process_index for device in jax.devices())
    local = [counts[index] for index in range(jax.process_count())]
    if len(set(local)) > 1:
        raise UserError(f"the processes see {local} devices each; every process needs the same number of devices")


def _nobody_came(config: DistributedConfig) -> NoReturn:
    who = (
        f"process {config.process_id} of {config.processes} waits at {config.coordinator}: " if config.processes else ""
    )
    end_process(
        1,
        f"{who}not all processes of this job joined within {config.timeout_s} s; start the same command on every host, check "
        f"that each reaches the port of process 0, raise distributed.timeout_s, or give distributed.processes=1 to train alone",
    )


def end_process(code: int, line: str) -> NoReturn:
    """Says why and ends this process, whatever its other threads are doing; its data workers go with it."""
    try:
        for child in multiprocessing.active_children():
            child.kill()
        print(f"siglip: error: {line}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    finally:  # also when nobody reads its output any more
        os._exit(code)
