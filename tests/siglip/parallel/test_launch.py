"""What is asked of jax to join the processes of a job, from flags, SLURM's variables or what it detects itself."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from siglip.errors import UserError
from siglip.parallel import launch
from siglip.parallel.launch import DistributedConfig, joined, local_device_ids

ROOT = Path(__file__).parents[3]
SLURM = {
    "SLURM_JOB_ID": "1234567", "SLURM_STEP_NODELIST": "gpu[07-09,12]", "SLURM_NTASKS": "4", "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """What jax.distributed.initialize is called with; nothing is joined."""
    calls = []
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)
    return calls


def join(**kwargs):
    with joined(DistributedConfig(**kwargs), describe=lambda error: (1, str(error))):
        pass


def test_one_process_is_left_alone(asked, monkeypatch):
    join(processes=1)
    for name, value in (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}).items():
        monkeypatch.setenv(name, value)
    join()
    assert not asked


@pytest.mark.parametrize("before", ["", "jax.devices(); "])
def test_where_jax_detects_nothing_the_process_trains_alone(before):
    # jax's own detection, whose answers are known by their words: in a fresh process, and in one that has used its devices.
    code = f"import jax; {before}from tests.siglip.parallel.test_launch import join; join(); print(jax.process_count())"
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | {"SLURM_NTASKS": "4"}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=ROOT)
    assert ran.stdout == "1\n" and "was not started by srun: it trains alone" in ran.stderr, ran.stderr


def test_what_jax_detects_and_cannot_join_is_told_in_one_line(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Kubernetes API Error: 403")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    with pytest.raises(ValueError, match=r"API Error: 403.*distributed.processes=1 to train alone"):
        join()


def test_a_pod_that_is_not_one_of_several_trains_alone(monkeypatch, caplog):
    def refuse(*_, **__):
        raise RuntimeError("Kubernetes API Error: 403 - Forbidden\nIt appears that the service account …")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
    join()
    assert "not one of an indexed job, so it trains alone (Kubernetes API Error: 403" in caplog.text
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "host-0,host-1")
    with pytest.raises(ValueError, match="cannot join the processes of this job"):
        join()


@pytest.mark.parametrize("started", [SLURM, {"OMPI_COMM_WORLD_SIZE": "2"}], ids=["srun", "mpirun"])
def test_devices_that_are_used_before_a_job_of_several_is_joined(monkeypatch, started):
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    jax.devices()  # as a recipe might in get_config()
    with pytest.raises(
        UserError, match=r"this job has \d processes, but this one has used its devices .* get_config\(\)"
    ):
        join()


@pytest.mark.parametrize("platforms", ["gpuu", "cuda"])
def test_a_backend_that_is_not_there_is_named(platforms):
    code = "from siglip.parallel import launch; launch.check_backend()"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"JAX_PLATFORMS": platforms},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if platforms == "cuda" and not ran.returncode:
        pytest.skip("this machine has a GPU")
    assert f"UserError: JAX_PLATFORMS={platforms} cannot be used: " in ran.stderr, ran.stderr


def test_flags_go_before_everything(asked):
    join(coordinator="node1:4000", processes=2, process_id=0)
    ((args, kwargs),) = asked
    assert args == ("node1:4000", 2, 0) and kwargs["cluster_detection_method"] == "deactivate"


def test_the_timeouts_are_jaxs(asked):
    join(timeout_s=70, heartbeat_timeout_s=20)
    ((args, kwargs),) = asked
    assert args == (None, None, None) and kwargs["cluster_detection_method"] is None
    assert kwargs["heartbeat_timeout_seconds"] == 20
    assert kwargs["initialization_timeout"] > 70  # ours speaks first


def test_flags_that_do_not_fit():
    with pytest.raises(ValueError, match=r"distributed.process_id missing beside coordinator=a:1, processes=2; give"):
        DistributedConfig(coordinator="a:1", processes=2)
    with pytest.raises(ValueError, match="heartbeat_timeout_s=1 must be at least 5"):
        DistributedConfig(heartbeat_timeout_s=1)
    for address in ("node1", "node1:0", "node1:65536", ":80"):
        with pytest.raises(ValueError, match="must be HOST:PORT"):
            DistributedConfig(coordinator=address, processes=2, process_id=0)


@pytest.mark.parametrize(
    "environ, ids",
    [
        (SLURM, []),  # one process a node drives all of its GPUs
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1"}, []),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8(x4)"}, None),  # a task per GPU: jax gives each its own
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x2),2"}, None),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8(x4)", "SLURM_GPUS_PER_TASK": "1"}, []),  # SLURM has dealt them out
        ({}, None),
    ],
)
def test_which_gpus_of_a_node_are_this_processes(environ, ids):
    assert local_device_ids(environ) == ids


def test_proxies_are_hidden_from_grpc_only_while_joining(asked, monkeypatch):
    seen = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: seen.append(dict(os.environ)))
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:1")
    join()
    assert "HTTPS_PROXY" not in seen[0] and os.environ["HTTPS_PROXY"] == "http://proxy:1"


def test_who_fails_says_so_in_every_process(monkeypatch):
    # What process 1 gathers when process 0 failed, and the other way round.
    def fail():
        raise OSError("no such file")

    monkeypatch.setattr(launch, "gather_records", lambda own: [[True, "bad recipe"], *own])
    with pytest.raises(launch.UserError, match="process 0 stopped: bad recipe"):
        launch.in_all_or_none(lambda: 1, bad_input=(OSError,))
    monkeypatch.setattr(launch, "gather_records", lambda own: [[False, "a bug"], *own])
    with pytest.raises(launch.RunFailed, match="process 0 stopped: a bug"):
        launch.in_all_or_none(lambda: 1, bad_input=(OSError,))
    monkeypatch.setattr(launch, "gather_records", lambda own: [None, *own])
    with pytest.raises(OSError, match="no such file"):
        launch.in_all_or_none(fail, bad_input=(OSError,))
    monkeypatch.undo()
    assert launch.in_all_or_none(lambda: 1, bad_input=(OSError,)) == 1


@pytest.mark.slow
def test_two_tasks_of_a_slurm_step_find_each_other():
    # Two processes with the variables of srun, on this machine; a record longer than one message's padding.
    code = (
        "import jax; from siglip.parallel import launch; from siglip.parallel.collectives import gather_records\n"
        "with launch.joined(launch.DistributedConfig(timeout_s=240), describe=lambda error: (1, repr(error))):\n"
        "    texts = gather_records(['x' * (3000 + jax.process_index()), ''])\n"
        "    print(jax.process_index(), [len(text) for text in texts], launch.in_all_or_none(lambda: 7, bad_input=()))"
    )
    step = SLURM | {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **step, "SLURM_PROCID": str(index), "JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0].splitlines()[-1] for process in started]
    assert outputs == [f"{index} [3000, 0, 3001, 0] 7" for index in range(2)]
