"""How a run begins and ends among other processes: its workdir's lock, signals, a kill, a reader that goes away."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import lock
from data_pipelines.lock import LOCK_FILE, hold
from siglip import trees
from siglip.cli import run
from siglip.workdir.checkpoint import read_run_params, whole_steps
from siglip.workdir.metrics import read_metrics
from tests.siglip.cli.test_commands import fails, shard, write_recipe  # noqa: F401
from tests.siglip.jobs import ANY, ROOT, STEPS, Jobs, children_of

GONE_S = 40  # ten are promised on a machine that is not overloaded; other tests run beside these


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    jobs = Jobs(tmp_path_factory.mktemp("jobs"), evaluate=False)
    yield jobs
    jobs.close()


def contents(folder: Path) -> dict:
    """Of all files but the lock, which its holder touches."""
    paths = [path for path in folder.rglob("*") if path.name != LOCK_FILE]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


def all_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + GONE_S
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.slow
def test_a_second_run_in_one_workdir_is_refused_and_a_killed_one_is_followed(jobs):
    first = jobs.start("two", processes=1, devices=1, toy=True, at={0: "11:hold"})
    first.wait_until_held(0)
    while whole_steps(first.workdir) != [4, 8]:
        time.sleep(0.05)
    before = contents(first.workdir)
    (line,) = jobs.start("two", processes=1, devices=1, toy=True).ends_with(1)
    assert f"two is in use by process {first.processes[0].pid} on " in line and "give another --workdir" in line
    assert contents(first.workdir) == before
    first.processes[0].kill()
    jobs.run("two", processes=1, devices=1, toy=True)
    assert whole_steps(first.workdir)[-1] == STEPS
    assert not (first.workdir / LOCK_FILE).exists()


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_data_hang_saves_what_was_trained(jobs, signum):
    job = jobs.start(f"hang-{signum}", processes=1, devices=1, toy=True, at={0: "7:hold"})
    job.wait_until_held(0)
    began = time.monotonic()
    job.processes[0].send_signal(signum)
    (line,) = job.ends_with(128 + signum, within_s=60)
    assert f"stopped by {signal.Signals(signum).name} at step 6, which is saved" in line
    assert whole_steps(job.workdir)[-1] == 6 and time.monotonic() - began < GONE_S


@pytest.mark.slow
@pytest.mark.parametrize("hanging", [(1,), (0,), (0, 1)])
def test_a_signal_while_data_hang_on_some_of_two_processes(jobs, hanging):
    """All hang: what was trained is saved. One does: the other waits for it in the step, and both end."""
    at = dict.fromkeys(hanging, "7:hold")
    job = jobs.start("some-" + "".join(map(str, hanging)), processes=2, devices=1, toy=True, at=at)
    for index in hanging:
        job.wait_until_held(index)
    for index in {0, 1} - set(hanging):
        job.wait_for_batch(index, 7)
    job.wait_until(0, lambda: whole_steps(job.workdir) == [4])
    for process in job.processes:
        process.send_signal(signal.SIGTERM)
    if len(hanging) == 2:
        lines = job.ends_with(128 + signal.SIGTERM, within_s=60)
        assert all("stopped by SIGTERM at step 6, which is saved" in line for line in lines)
        assert whole_steps(job.workdir)[-1] == 6
    else:
        (index,) = hanging
        lines = job.ends_with(*(1 if own == index else ANY for own in range(2)), within_s=60)
        assert f"the data of step 7 did not come to process {index}" in lines[index] and "from step 4" in lines[index]
        assert whole_steps(job.workdir) == [4]


@pytest.mark.slow
def test_a_signal_while_workers_are_stopped_leaves_no_process(jobs):
    flags = ["--data.workers", "2", "--total-steps", "100000", "--checkpoint.every-steps", "100000"]
    job = jobs.start("stopped", *flags, processes=1, devices=1, toy=True, step_s=0.05)
    job.wait_for_batch(0, 5)
    pids = children_of(job.processes[0].pid)
    workers = [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    job.processes[0].send_signal(signal.SIGTERM)
    (line,) = job.ends_with(128 + signal.SIGTERM, within_s=60)
    assert "which is saved" in line and all_gone(pids) and time.monotonic() - began < GONE_S
    assert whole_steps(job.workdir)


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_no_run(jobs):
    job = jobs.start("piped", "--log.progress", "True", processes=1, devices=1, toy=True, step_s=0.1, piped=True)
    process = job.processes[0]
    assert any(
        line.startswith("step 1/12 ") for line in iter(process.stderr.readline, "")
    )  # after advice, where there is some
    process.stderr.close()
    assert process.wait(240) == 0 and whole_steps(job.workdir)[-1] == STEPS


def test_a_folder_that_another_curation_holds_is_refused(tmp_path, shard, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(lock, "PATIENCE_S", 0.3)
    out = tmp_path / "out"
    with hold(out, fix="wait"):
        before = contents(out)
        fails(
            ["data", "curate", str(shard), "--out", str(out)],
            capsys,
            f"{out} is in use by process {os.getpid()} ",
            code=1,
        )
        assert contents(out) == before
    assert run(["data", "curate", str(shard), "--out", str(out), "--workers", "1"]) == 0
    assert (out / "manifest.parquet").exists() and not (out / LOCK_FILE).exists()


def start_training(recipe: Path, *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "siglip.cli", "train", str(recipe), *flags],
        cwd=ROOT, env={**os.environ, "JAX_NUM_CPU_DEVICES": "2"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_step(workdir: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if (workdir / "metrics.jsonl").exists() and any(line["step"] >= step for line in read_metrics(workdir)):
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate()[1])


@pytest.fixture(scope="module")
def whole(shard, tmp_path_factory) -> Path:  # noqa: F811
    """Workdir of a run of forty steps that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    process = start_training(write_recipe(folder, shard))
    assert process.wait(300) == 0, process.stderr.read()
    return folder / "run"


@pytest.mark.slow
def test_forty_steps_are_a_few_a_signal_a_kill_and_the_rest(shard, whole, tmp_path):  # noqa: F811
    recipe = write_recipe(tmp_path, shard)
    for step, signum, code in ((10, signal.SIGTERM, 128 + signal.SIGTERM), (20, signal.SIGKILL, -signal.SIGKILL)):
        killed = start_training(recipe)
        wait_for_step(tmp_path / "run", step, killed)
        killed.send_signal(signum)
        message = killed.communicate(timeout=240)[1]
        assert killed.returncode == code and (signum == signal.SIGKILL or "goes on from there" in message), message
    resumed = start_training(recipe)
    assert resumed.wait(300) == 0, resumed.stderr.read()

    expected, actual = (trees.flatten(read_run_params(workdir)[0]) for workdir in (whole, tmp_path / "run"))
    for path, leaf in expected.items():
        np.testing.assert_array_equal(actual[path], leaf, err_msg=path)
    losses = [
        {line["step"]: line["train/loss"] for line in read_metrics(workdir) if "train/loss" in line}
        for workdir in (whole, tmp_path / "run")
    ]
    shared = losses[0].keys() & losses[1].keys()
    assert len(shared) >= 8 and all(losses[0][step] == losses[1][step] for step in shared)
