"""The launch files parse, start commands that exist, and say who each process is where jax cannot see it."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from siglip.cli.arguments import parse
from siglip.training.config import TrainConfig, load_config_file

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SHELL = ["slurm.sbatch", "tpu-pod.sh"]


def check_command(words):
    """`siglip train RECIPE flags…` as the command line reads it."""
    assert Path(words[0]).name == "siglip" and words[1] == "train"
    return parse(TrainConfig, words[3:], prog="siglip", default=load_config_file(str(ROOT / words[2])))


def read_jobset(text):
    yaml = pytest.importorskip("yaml")
    (document,) = yaml.safe_load_all(text)
    return document


@pytest.fixture
def jobset():
    return read_jobset((LAUNCH / "gke-jobset.yaml").read_text())


@pytest.mark.parametrize("name", SHELL)
def test_shell_files_parse(name):
    subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)


@pytest.mark.parametrize("name, launcher", [("slurm.sbatch", "srun"), ("tpu-pod.sh", "gcloud")])
def test_shell_files_start_a_command_that_exists(name, launcher, tmp_path):
    # The launcher is replaced by one that prints what it was to start.
    fake = tmp_path / launcher
    fake.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TPU": "t", "ZONE": "z", "SLURM_JOB_ID": "7"}
    args = ["configs/quickstart.py", "/shared/a run", "--optim.lr", "1e-4"]
    ran = subprocess.run(["bash", str(LAUNCH / name), *args], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    words = ran.stdout.splitlines()
    if launcher == "gcloud":
        assert "--worker=all" in words
        words = shlex.split(words[-1])
        words = words[words.index("exec") + 1 :]
    else:
        words = words[1:]
    config = check_command(words)
    assert config.workdir == "/shared/a run" and config.optim.lr == 1e-4
    assert config.log.progress  # plain lines, where there is no terminal: the loss is in the job's output


@pytest.mark.parametrize("code, again", [(0, False), (1, True), (2, False), (143, True)])
def test_slurm_queues_the_job_again_unless_it_is_done_or_wrong(code, again, tmp_path):
    for name, body in (("srun", f"exit {code}"), ("scontrol", "echo $@")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    script = ["bash", str(LAUNCH / "slurm.sbatch"), "c.py", "/w"]
    ran = subprocess.run(script, env=env, capture_output=True, text=True)
    assert ran.returncode == code and ("requeue 7" in ran.stdout) == again


def test_slurm_signals_the_steps_and_leaves_time_to_save():
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", (LAUNCH / "slurm.sbatch").read_text(), re.M))
    assert options["signal"].startswith("TERM@") and int(options["signal"][5:]) >= 60 and "requeue" in options


def parts_of(jobset):
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    return job, spec, container


def test_on_tpus_the_jobset_leaves_it_to_jax(jobset):
    _, spec, container = parts_of(jobset)
    config = check_command(container["command"] + container["args"])
    assert config.distributed.processes is None and config.log.progress
    assert spec["parallelism"] == spec["completions"] and spec["completionMode"] == "Indexed"
    assert jobset["spec"]["network"]["enableDNSHostnames"]


def test_on_gpus_the_jobset_says_who_each_pod_is():
    text = re.sub(r"(?m)^ *(cloud.google.com/gke-tpu|google.com/tpu).*\n", "", (LAUNCH / "gke-jobset.yaml").read_text())
    jobset = read_jobset(text.replace("#gpu ", ""))
    job, spec, container = parts_of(jobset)
    (process_id,) = [variable for variable in container["env"] if variable["name"] == "PROCESS_ID"]
    assert "job-completion-index" in process_id["valueFrom"]["fieldRef"]["fieldPath"]
    words = [word.replace("$(PROCESS_ID)", "3") for word in container["command"] + container["args"]]
    config = check_command(words).distributed
    # The name that a JobSet gives its first pod; jax listens there.
    name = jobset["metadata"]["name"]
    assert config.coordinator == f"{name}-{job['name']}-0-0.{name}:{container['ports'][-1]['containerPort']}"
    assert config.processes == spec["parallelism"] * job["replicas"] and config.process_id == 3
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}


def test_the_jobset_gives_up_on_bad_input_only(jobset):
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2]
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0 and spec["backoffLimit"] == 0
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    mounts = {mount["name"] for mount in spec["template"]["spec"]["containers"][0]["volumeMounts"]}
    assert mounts == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
