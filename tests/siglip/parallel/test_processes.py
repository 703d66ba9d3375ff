"""Several processes as one run: the same pairs and losses as one process, and how they stop together."""

import signal

import numpy as np
import pytest
from siglip.parallel.hub import listen

from siglip.cli import run
from siglip.workdir.checkpoint import read_run_params
from siglip.workdir.metrics import read_metrics
from tests.siglip.jobs import HEARTBEAT_S, LOSS_RTOL, STEPS, Jobs, free_ports, losses, params

# Where a gradient is almost zero, Adam makes a step of some size of its rounding. For the keys' bias, which softmax cancels,
# rounding is all there is: it is left out.
PARAM_ATOL = 1e-5
NOISE = "key/bias"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    jobs = Jobs(tmp_path_factory.mktemp("jobs"), evaluate=True)
    yield jobs
    jobs.close()


@pytest.fixture(scope="module")
def reference(jobs):
    """Two processes of two devices that nothing happens to."""
    return jobs.run("2x2", processes=2, devices=2)


def assert_same_run(job, reference):
    """The same pairs in the same steps, the same losses, evaluation and parameters."""
    assert len(reference.keys()) == STEPS
    for step, shares in reference.keys().items():
        assert sorted(sum(job.keys()[step], [])) == sorted(sum(shares, [])), step
    expected, actual = losses(reference.workdir), losses(job.workdir)
    assert list(actual) == list(expected)
    np.testing.assert_allclose(list(actual.values()), list(expected.values()), rtol=LOSS_RTOL)
    results = [read_metrics(one.workdir)[-1] for one in (job, reference)]
    assert len(results[1]) > 20 and results[0] == results[1]
    theirs = params(reference.workdir)
    for path, leaf in params(job.workdir).items():
        if not path.endswith(NOISE):
            np.testing.assert_allclose(leaf, theirs[path], atol=PARAM_ATOL, err_msg=path)


@pytest.mark.slow
def test_two_processes_train_as_one_does(jobs, reference):
    one = jobs.run("1x4", processes=1, devices=4)
    assert_same_run(one, reference)
    first, second = reference.reads()
    assert first and second and not first & second
    assert all([len(share) for share in shares] == [4, 4] for shares in reference.keys().values())
    checkpoints = [sorted(path.name for path in (job.workdir / "checkpoints").iterdir()) for job in (one, reference)]
    assert checkpoints == [["12", "8"]] * 2
    assert "pairs" not in reference.output(1).read_text()  # only process 0 reports


@pytest.mark.slow
def test_four_processes_train_as_two_do(jobs, reference):
    four = jobs.run("4x1", processes=4, devices=1)
    assert_same_run(four, reference)
    reads = four.reads()
    assert sum(map(len, reads)) == len(set.union(*reads))


@pytest.mark.slow
def test_stopped_killed_and_started_again_it_goes_on_exactly(jobs, reference):
    signalled = jobs.start("cut", processes=2, devices=2, at={1: f"5:{signal.SIGTERM}"})
    lines = signalled.ends_with(128 + signal.SIGTERM)
    step = read_run_params(signalled.workdir)[2]
    assert 5 <= step < STEPS and all(f"at step {step}, which is saved" in line for line in lines), lines

    killed = jobs.start("cut", processes=2, devices=2, at={1: "11:hold"})
    took_s = killed.kill(1, saved=8)
    line, _ = killed.ends_with(1, -signal.SIGKILL)
    assert took_s < HEARTBEAT_S / 2  # its connection closes: nobody has to wait for its heartbeats
    assert "process 1 of 2 is gone" in line and "it goes on from step 8 of" in line, line

    jobs.run("cut", processes=2, devices=2)
    assert losses(killed.workdir) == losses(reference.workdir)
    expected = params(reference.workdir)
    for path, leaf in params(killed.workdir).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


@pytest.mark.slow
def test_the_others_outlive_process_0_long_enough_to_say_so(jobs):
    job = jobs.start("headless", processes=2, devices=1, at={0: "10:hold"})
    assert job.kill(0, saved=8) < HEARTBEAT_S / 2
    _, line = job.ends_with(-signal.SIGKILL, 1)
    assert "process 0 of 2 is gone" in line and "it goes on from step 8 of" in line, line


@pytest.mark.slow
def test_a_loader_that_fails_in_one_process_ends_all(jobs):
    job = jobs.start("broken", processes=2, devices=1, at={1: "6:fail"})
    lines = job.ends_with(1)
    assert "process 1 stopped: the disk is on fire" in lines[0] and lines[1] == "siglip: error: the disk is on fire"


@pytest.mark.slow
def test_an_evaluation_that_fails_in_one_process_ends_all_and_keeps_what_was_trained(jobs):
    job = jobs.start("evaluated", processes=2, devices=1, at={1: "evaluated:fail"})
    lines = job.ends_with(1)
    assert all("the disk is on fire" in line for line in lines), lines
    # Saved by both together, though the evaluation came before the save.
    assert read_run_params(job.workdir)[2] == STEPS


@pytest.mark.slow
def test_an_evaluation_that_one_process_leaves_in_the_middle_does_not_hang_the_other(jobs):
    # Process 0 waits in a collective for embeddings that never come; process 1 waits for it for a minute.
    job = jobs.start("evaluating", processes=2, devices=1, at={1: "evaluating:fail"})
    lines = job.ends_with(1)
    assert all("the disk is on fire" in line for line in lines), lines
    assert read_run_params(job.workdir)[2] == 8  # the checkpoint before


def test_processes_with_other_settings_or_another_workdir_do_not_start(jobs):
    job = jobs.start("other", processes=2, devices=1, process1=["--optim.lr", "0.1"])
    for line in job.ends_with(2):
        assert "optim.lr is 0.003 in process 0 and 0.1 in process 1; start the same command" in line
    assert not job.workdir.exists()


def fails_to_join(capsys, jobs, *flags):
    capsys.readouterr()
    assert run(["train", str(jobs.recipe), "--distributed.timeout-s", "1", *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_a_host_that_never_joins(jobs, capsys):
    port = free_ports()
    flags = [
        "--distributed.coordinator",
        f"localhost:{port}",
        "--distributed.processes",
        "3",
        "--distributed.process-id",
    ]
    line = fails_to_join(capsys, jobs, *flags, "0")
    assert "2 of 3 processes did not join process 0" in line and f":{port + 1} within 1 s (missing: 1, 2)" in line
    line = fails_to_join(capsys, jobs, *flags, "2")
    assert f"process 2 of 3 found no process 0 at localhost:{port + 1} within 1 s" in line


def test_flags_that_do_not_fit_together(jobs, capsys):
    line = fails_to_join(capsys, jobs, "--distributed.processes", "2")
    assert "give distributed.coordinator, .processes and .process_id together" in line
    flags = ["--distributed.coordinator", "localhost:1", "--distributed.processes", "2", "--distributed.process-id"]
    assert "must be from 0 to 1" in fails_to_join(capsys, jobs, *flags, "2")
    flags[1] = "localhost"
    assert "must be HOST:PORT" in fails_to_join(capsys, jobs, *flags, "1")
    flags[1] = f"localhost:{(taken := free_ports())}"
    with listen(taken):
        assert f"port {taken} of this host cannot be used" in fails_to_join(capsys, jobs, *flags, "0")
