"""One run on several processes: finding out about the others, joining them, and moving host arrays between them.

Where a process stands is taken from the first of these that speaks (`detect`); where none does it is alone, nothing is
initialised, and training is what it always was:

    flags     --distributed.coordinator HOST:PORT --distributed.processes N --distributed.process-id I
    SLURM     a step of several tasks (srun)
    JobSet    the variables that launch/gke-jobset.yaml sets
    TPU       what GKE or the metadata server of a TPU VM says

`jax.distributed.initialize` detects much of this too, but not what is needed before it: the address, to wait there with a
message of our own (it kills the process when a peer never joins). Its SLURM rule also gives each task one GPU, unasked.

The trap: PORT is jax's and PORT + 1 is ours (siglip/parallel/peers.py); both have to be reachable.
"""

import contextlib
import dataclasses
import glob
import importlib.util
import logging
import os
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax

from siglip.errors import UserError
from siglip.parallel.hub import Hub, listen
from siglip.parallel.peers import Alone, Peers

PORT = 12380  # where nothing else says; far from the ports of libtpu and of Kubernetes
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"

logger = logging.getLogger(__name__)

# Name of an attribute -> its text, or None.
Metadata = Callable[[str], str | None]


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Which processes make up the job, and how patient they are with each other.

    Attributes:
        coordinator: HOST:PORT of process 0, the same everywhere; PORT + 1 is used as well. None: detected.
        processes: how many there are; 1 turns detection off.
        process_id: which one this is, from 0.
        timeout_s: how long to wait for all processes to join.
        heartbeat_timeout_s: a process whose host is silent for so long is taken for dead and the job stops; one that is
            killed is noticed at once.
    """

    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None
    timeout_s: int = 300
    heartbeat_timeout_s: int = 60

    def __post_init__(self) -> None:
        for name, least in (("timeout_s", 1), ("heartbeat_timeout_s", 5)):
            if getattr(self, name) < least:
                raise UserError(f"distributed.{name}={getattr(self, name)} must be at least {least}")
        if self.processes is not None and self.processes < 1:
            raise UserError(f"distributed.processes={self.processes} must be at least 1")
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
            _split_address(self.coordinator)


class Place(NamedTuple):
    """Where this process stands in its job. local_devices: the GPUs that are its own; None: all that it sees."""

    host: str
    port: int
    count: int
    index: int
    local_devices: tuple[int, ...] | None
    found_in: str


def detect(environ: Mapping[str, str], config: DistributedConfig, *, metadata: Metadata | None = None) -> Place | None:
    """Where this process stands, or None if it is alone.

    Args:
        metadata: of the TPU VM that this is, if it is one.

    Raises:
        ValueError: if what the surroundings say is incomplete or contradicts itself.
    """
    if config.processes is not None:
        place = _from_flags(config)
    elif "SLURM_STEP_NODELIST" in environ:
        place = _from_slurm(environ)
    elif "JOBSET_NAME" in environ:
        place = _from_jobset(environ)
    else:
        place = _from_tpu(environ, metadata)
        if place is None and int(environ.get("SLURM_NTASKS", 1)) > 1:
            logger.warning(
                "SLURM has %s tasks for this job, but this process was not started by srun: it trains alone",
                environ["SLURM_NTASKS"],
            )
    if place is None or place.count == 1:
        return None
    if not 0 <= place.index < place.count:
        raise UserError(f"{place.found_in} calls this process {place.index} of {place.count}; they count from 0")
    return place


def _from_flags(config: DistributedConfig) -> Place | None:
    if config.processes == 1 or config.coordinator is None or config.process_id is None:
        return None
    return Place(*_split_address(config.coordinator), config.processes, config.process_id, None, "flags")


def _from_slurm(environ: Mapping[str, str]) -> Place:
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")
    job, step, count, index, local = _numbers(environ, names, "SLURM")
    # One process a node drives all its GPUs. With several tasks a node, each takes one, unless SLURM dealt them out.
    tasks_per_node = re.sub(r"\(x\d+\)", "", environ.get("SLURM_STEP_TASKS_PER_NODE", "1")).split(",")
    mine = None if set(tasks_per_node) == {"1"} or "SLURM_GPUS_PER_TASK" in environ else (local,)
    # Two jobs that share a node must not share ports, and both ports stay above the range that the kernel deals from.
    port = 61440 + 2 * ((job + step) % 2047)
    return Place(first_host(environ["SLURM_STEP_NODELIST"]), port, count, index, mine, "SLURM")


def first_host(nodes: str) -> str:
    """The first of SLURM's compressed list: "n[007-009,12],login" -> "n007"."""
    name, bracket, suffix = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\])?([^\[,]*)", nodes).groups()
    return f"{name}{bracket or ''}{suffix}"


def _from_jobset(environ: Mapping[str, str]) -> Place:
    numbers = ("JOB_INDEX", "JOBS", "PODS_PER_JOB", "JOB_COMPLETION_INDEX")
    job, jobs, pods, pod = _numbers(
        environ, numbers, "JobSet (JOBSET_NAME is set; launch/gke-jobset.yaml sets them all)"
    )
    name = environ["JOBSET_NAME"]
    host = f"{name}-{environ.get('REPLICATED_JOB_NAME', 'train')}-0-0.{environ.get('SUBDOMAIN', name)}"
    return Place(host, PORT, jobs * pods, job * pods + pod, None, "JobSet")


def _from_tpu(environ: Mapping[str, str], metadata: Metadata | None) -> Place | None:
    """GKE says it in the environment, a TPU VM in its metadata: hosts in the order of the processes."""
    hosts, index = environ.get("TPU_WORKER_HOSTNAMES"), environ.get("TPU_WORKER_ID")
    if hosts is None and metadata is not None:
        hosts, index = metadata("worker-network-endpoints"), metadata("agent-worker-number")
    if hosts is None or index is None:
        return None
    # Older TPU VMs write name:id:address.
    names = [endpoint.rpartition(":")[2] for endpoint in hosts.split(",")]
    slices, this_slice = int(environ.get("MEGASCALE_NUM_SLICES", 1)), int(environ.get("MEGASCALE_SLICE_ID", 0))
    host = environ.get("MEGASCALE_COORDINATOR_ADDRESS", names[0]).partition(":")[0]
    return Place(host, PORT, slices * len(names), this_slice * len(names) + int(index), None, "TPU")


def _numbers(environ: Mapping[str, str], names: tuple[str, ...], what: str) -> list[int]:
    missing = [name for name in names if not environ.get(name, "").isdigit()]
    if missing:
        raise UserError(
            f"{what} does not say {', '.join(missing)} in the environment; give distributed.coordinator, .processes and "
            f".process_id, or distributed.processes=1 to train alone"
        )
    return [int(environ[name]) for name in names]


def _split_address(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65535:
        raise UserError(
            f"distributed.coordinator={address!r} must be HOST:PORT with a port from 1 to 65534; PORT + 1 is used too"
        )
    return host.strip("[]"), int(port)


def tpu_vm_metadata(environ: Mapping[str, str]) -> Metadata | None:
    """The metadata server's attributes, if this is a TPU VM that is to use its TPU."""
    platforms = environ.get("JAX_PLATFORMS") or "tpu"
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    if "tpu" not in platforms or not chips or importlib.util.find_spec("libtpu") is None:
        return None

    def attribute(name: str) -> str | None:
        request = urllib.request.Request(_METADATA + name, headers={"Metadata-Flavor": "Google"})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.read().decode()
        except (urllib.error.URLError, OSError):  # in a container elsewhere, or no pod
            return None

    return attribute


@contextlib.contextmanager
def joined(config: DistributedConfig, *, describe: Callable[[BaseException], tuple[int, str]]) -> Iterator[Alone]:
    """Within it this process is joined with the others of its job, if there are any. To be entered before a device is touched.

    An error that leaves it ends all processes at once, unless they all came to the end of the run together.

    Args:
        describe: the exit code and the line for an error.

    Raises:
        ValueError: if somebody does not come in time, or the processes disagree about who they are.
    """
    place = detect(os.environ, config, metadata=tpu_vm_metadata(os.environ))
    if place is None:
        yield Alone()
        return
    patience = {"timeout_s": config.timeout_s, "heartbeat_timeout_s": config.heartbeat_timeout_s}
    if place.index == 0:
        listen(place.port).close()  # jax would abort
        Hub(place.port + 1, count=place.count, **patience)
    hub_host = "localhost" if place.index == 0 else place.host
    peers = Peers(hub_host, place.port + 1, index=place.index, count=place.count, **patience)
    if not peers.is_first:
        logging.getLogger("siglip").setLevel(logging.WARNING)
    try:
        _initialize(place, config)
        _check_devices(place, peers)
        logger.info("%d processes, as %s says, with %d devices", place.count, place.found_in, jax.device_count())
        yield peers
    except BaseException as error:
        peers.leave(*describe(error))
        raise
    finally:
        jax.distributed.shutdown()


def _initialize(place: Place, config: DistributedConfig) -> None:
    address = f"localhost:{place.port}" if place.index == 0 else _shield(place, config.timeout_s)
    # gRPC would send even this through a cluster's web proxy.
    os.environ["no_grpc_proxy"] = ",".join(filter(None, [os.environ.get("no_grpc_proxy"), "localhost"]))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    jax.distributed.initialize(
        address,
        place.count,
        place.index,
        local_device_ids=place.local_devices,
        cluster_detection_method="deactivate",
        coordinator_bind_address=None if socket.has_dualstack_ipv6() else f"0.0.0.0:{place.port}",
        initialization_timeout=config.timeout_s,
        # Ours is to speak first.
        heartbeat_timeout_seconds=2 * config.heartbeat_timeout_s,
        shutdown_timeout_seconds=config.heartbeat_timeout_s,
    )
    if threading.current_thread() is threading.main_thread():
        for number, handler in before.items():  # jax's preemption service took SIGTERM for itself
            signal.signal(number, handler)


def _shield(place: Place, timeout_s: float) -> str:
    """An address on this machine that passes everything on to jax's service in process 0.

    When that process dies, jax's client would abort this one from C++ as soon as its connection closes. This end of the
    connection stays open, so that the one who speaks is `Peers`.
    """
    server = listen(0, "127.0.0.1")

    def serve() -> None:
        while True:
            here, _ = server.accept()
            there = _connect(place, timeout_s)
            for source, sink in ((here, there), (there, here)):
                threading.Thread(target=_pump, args=(source, sink), name="siglip-shield", daemon=True).start()

    _connect(place, timeout_s).close()  # in this thread, where an error is heard
    threading.Thread(target=serve, name="siglip-shield", daemon=True).start()
    return f"localhost:{server.getsockname()[1]}"


def _connect(place: Place, timeout_s: float) -> socket.socket:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            connection = socket.create_connection((place.host, place.port), timeout=timeout_s)
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"process {place.index} of {place.count} reaches port {place.port + 1} of {place.host} but not "
                    f"{place.port} ({error}); open both"
                ) from None
            time.sleep(0.1)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            sink.sendall(data)
    except OSError:
        pass  # Peers says what that means


def _check_devices(place: Place, peers: Alone) -> None:
    index, local = jax.process_index(), [int(n) for n in peers.gather("devices", jax.local_device_count())]
    if index != place.index or jax.process_count() != place.count:
        raise UserError(
            f"{place.found_in} calls this process {place.index} of {place.count}, its devices say {index} of "
            f"{jax.process_count()}; number the processes as the hosts of the accelerators are numbered"
        )
    if len(set(local)) > 1:
        raise UserError(f"the processes see {local} devices each; every process needs the same number of devices")
