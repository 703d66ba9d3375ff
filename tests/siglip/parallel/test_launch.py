"""Where a process stands, from flags, SLURM's or JobSet's variables or a TPU VM's metadata."""

import logging

import pytest

from siglip.parallel.launch import PORT, DistributedConfig, Place, detect, first_host

NONE = DistributedConfig()
SLURM = {
    "SLURM_JOB_ID": "1234567", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[07-09,12]", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}  # fmt: skip
JOBSET = {
    "JOBSET_NAME": "siglip", "REPLICATED_JOB_NAME": "slice", "JOB_INDEX": "1", "JOBS": "2", "PODS_PER_JOB": "4",
    "JOB_COMPLETION_INDEX": "3",
}  # fmt: skip


def test_one_machine_is_left_alone():
    assert detect({}, NONE) is None
    assert detect(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, NONE) is None
    assert detect(SLURM, DistributedConfig(processes=1)) is None
    assert detect({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, NONE) is None


def test_flags_go_before_everything():
    config = DistributedConfig(coordinator="node1:4000", processes=2, process_id=1)
    assert detect(SLURM | JOBSET, config) == Place("node1", 4000, 2, 1, None, "flags")
    with pytest.raises(ValueError, match=r"distributed.process_id missing beside coordinator=a:1, processes=2; give"):
        DistributedConfig(coordinator="a:1", processes=2)
    with pytest.raises(ValueError, match="heartbeat_timeout_s=1 must be at least 5"):
        DistributedConfig(heartbeat_timeout_s=1)
    for address in ("node1", "node1:0", "node1:65535", ":80"):
        with pytest.raises(ValueError, match="must be HOST:PORT"):
            DistributedConfig(coordinator=address, processes=2, process_id=0)


def test_slurm():
    place = detect(SLURM, NONE)
    assert place[2:] == (4, 2, None, "SLURM") and place.host == "gpu07"
    assert place.port == detect(SLURM | {"SLURM_PROCID": "0"}, NONE).port and 61440 <= place.port < 65534
    assert place.port != detect(SLURM | {"SLURM_JOB_ID": "1234568"}, NONE).port
    # A task per GPU: each takes its own, unless SLURM has dealt them out.
    crowded = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x2),2", "SLURM_LOCALID": "1"}
    assert detect(crowded, NONE).local_devices == (1,)
    assert detect(crowded | {"SLURM_GPUS_PER_TASK": "1"}, NONE).local_devices is None
    with pytest.raises(ValueError, match="SLURM does not say SLURM_PROCID in the environment"):
        detect({name: value for name, value in SLURM.items() if name != "SLURM_PROCID"}, NONE)


def test_slurm_without_srun_is_told(caplog):
    with caplog.at_level(logging.WARNING, logger="siglip"):
        assert detect({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, NONE) is None
    assert "was not started by srun" in caplog.text


@pytest.mark.parametrize(
    "nodes, first",
    [("n1", "n1"), ("n1,n2", "n1"), ("n[001-015],m2", "n001"), ("n[7,9-12]", "n7"), ("a-b[2]-ib,c", "a-b2-ib")],
)
def test_the_first_node_of_a_compressed_list(nodes, first):
    assert first_host(nodes) == first


def test_jobset():
    assert detect(JOBSET, NONE) == Place("siglip-slice-0-0.siglip", PORT, 8, 7, None, "JobSet")
    assert detect(JOBSET | {"SUBDOMAIN": "net"}, NONE).host == "siglip-slice-0-0.net"
    with pytest.raises(ValueError, match="JobSet .* does not say JOBS, PODS_PER_JOB in the environment"):
        detect({"JOBSET_NAME": "siglip", "JOB_INDEX": "0", "JOB_COMPLETION_INDEX": "1"}, NONE)
    with pytest.raises(ValueError, match="JobSet calls this process 8 of 8"):
        detect(JOBSET | {"JOB_COMPLETION_INDEX": "4"}, NONE)


def test_tpu():
    gke = {"TPU_WORKER_HOSTNAMES": "t-0.net,t-1.net", "TPU_WORKER_ID": "1"}
    assert detect(gke, NONE) == Place("t-0.net", PORT, 2, 1, None, "TPU")
    slices = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "t-0.net:8080"}
    assert detect(gke | slices, NONE)[:4] == ("t-0.net", PORT, 4, 3)
    old = {"agent-worker-number": "1", "worker-network-endpoints": "a:1:10.0.0.2,b:2:10.0.0.3"}
    assert detect({}, NONE, metadata=old.get)[:4] == ("10.0.0.2", PORT, 2, 1)
    new = {"agent-worker-number": "0", "worker-network-endpoints": "10.0.0.2"}
    assert detect({}, NONE, metadata=new.get) is None
