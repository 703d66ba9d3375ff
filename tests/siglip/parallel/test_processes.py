"""Several processes as one run: the same pairs and losses as one process, and how they stop together.

Where a process is lost, jax ends the others from C++ unless an error reaches Python first: their exit code is then any but 0
and 2, and the line that says how to go on is there if Python still ran.
"""

import json
import signal
import socket
import time

import numpy as np
import pytest

from siglip.cli import run
from siglip.workdir.checkpoint import read_run_params
from siglip.workdir.metrics import read_metrics
from tests.siglip.jobs import ANY, GONE_S, LOSS_RTOL, STEPS, Jobs, free_port, losses, params

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


@pytest.fixture(scope="module")
def toy_reference(jobs):
    """The same with the toy: what processes read, add up and save is not the model's affair."""
    return jobs.run("toy-2x2", processes=2, devices=2, toy=True)


# The first pair: every process looks for the caption fields in it when it opens the shards.
OPENED = "200000000"


def assert_same_run(job, reference, *, loss_rtol=LOSS_RTOL):
    """The same pairs in the same steps, the same losses and parameters."""
    assert len(reference.keys()) == STEPS
    for step, shares in reference.keys().items():
        assert sorted(sum(job.keys()[step], [])) == sorted(sum(shares, [])), step
    expected, actual = losses(reference.workdir), losses(job.workdir)
    assert list(actual) == list(expected)
    np.testing.assert_allclose(list(actual.values()), list(expected.values()), rtol=loss_rtol)
    theirs = params(reference.workdir)
    for path, leaf in params(job.workdir).items():
        if not path.endswith(NOISE):
            np.testing.assert_allclose(leaf, theirs[path], atol=PARAM_ATOL, err_msg=path)


@pytest.mark.slow
def test_two_processes_train_as_one_does(jobs, reference):
    one = jobs.run("1x4", processes=1, devices=4)
    assert_same_run(one, reference)
    # A tie is an equality of floats: parameters that differ in their last bits do not tie alike.
    results = [
        {name: value for name, value in read_metrics(job.workdir)[-1].items() if not name.endswith("/tied_fraction")}
        for job in (one, reference)
    ]
    assert len(results[1]) > 20 and results[0] == results[1]
    first, second = reference.reads()
    assert first - {OPENED} and second - {OPENED} and first & second <= {OPENED}
    assert all([len(share) for share in shares] == [4, 4] for shares in reference.keys().values())
    checkpoints = [sorted(path.name for path in (job.workdir / "checkpoints").iterdir()) for job in (one, reference)]
    assert checkpoints == [["12", "8"]] * 2
    assert "pairs" not in reference.output(1).read_text()  # only process 0 reports


@pytest.mark.slow
def test_four_processes_train_as_two_do(jobs, toy_reference):
    four = jobs.run("4x1", processes=4, devices=1, toy=True, at={3: "compiling:late"})
    # A sum of 8 x 16 positive numbers in any order: 127 roundings of 2**-24.
    assert_same_run(four, toy_reference, loss_rtol=127 * 2**-24)
    reads = four.reads()
    own = [read - {OPENED} for read in reads]
    assert sum(map(len, own)) == len(set.union(*own))


@pytest.mark.slow
def test_stopped_killed_and_started_again_it_goes_on_exactly(jobs, toy_reference):
    # A step takes long enough for jax to pass the signal on before the last one.
    layout = dict(processes=2, devices=2, toy=True)
    signalled = jobs.start("cut", **layout, at={1: f"5:{signal.SIGTERM}"}, step_s=1.0)
    lines = signalled.ends_with(128 + signal.SIGTERM)
    step = read_run_params(signalled.workdir)[2]
    assert 5 <= step < STEPS and all(f"at step {step}, which is saved" in line for line in lines), lines

    killed = jobs.start("cut", **layout, at={1: "11:hold"})
    assert killed.kill(1, saved=8) < GONE_S
    line, _ = killed.ends_with(ANY, -signal.SIGKILL)
    assert not line or "another process of this job is gone" in line and "it goes on from step 8 of" in line

    jobs.run("cut", **layout)
    assert losses(killed.workdir) == losses(toy_reference.workdir)
    expected = params(toy_reference.workdir)
    for path, leaf in params(killed.workdir).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 2])
def test_when_one_of_four_is_killed_the_others_end(jobs, lost):
    job = jobs.start(f"lost-{lost}", processes=4, devices=1, toy=True, at={lost: "11:hold"})
    assert job.kill(lost, saved=8) < GONE_S
    lines = job.ends_with(*[-signal.SIGKILL if index == lost else ANY for index in range(4)])
    assert all(not line or "it goes on from step 8 of" in line for line in lines), lines


@pytest.mark.slow
def test_a_killed_process_is_missed_by_its_heartbeats(jobs):
    # The others wait for nothing: no collective fails, only the heartbeats tell.
    job = jobs.start("idle", processes=2, devices=1, toy=True, at={0: "11:hold", 1: "11:hold"})
    job.wait_until_held(0)
    assert job.kill(1, saved=8) < GONE_S
    job.ends_with(ANY, -signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("signum, index", [(signal.SIGTERM, 0), (signal.SIGTERM, 3), (signal.SIGINT, 1)])
def test_a_signal_to_any_process_stops_all_at_the_same_step(jobs, signum, index):
    job = jobs.start(
        f"signal-{signum}-{index}", processes=4, devices=1, toy=True, step_s=1.0, at={index: f"3:{int(signum)}"}
    )
    lines = job.ends_with(128 + signal.SIGTERM)  # SIGINT is passed on as SIGTERM
    step = read_run_params(job.workdir)[2]
    assert 3 <= step < STEPS and all(f"stopped by SIGTERM at step {step}, which is saved" in line for line in lines), (
        lines
    )


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_loader_that_fails_in_one_process_ends_all(jobs, failing):
    job = jobs.start(f"broken-{failing}", processes=2, devices=1, toy=True, at={failing: "6:missing"})
    began = time.monotonic()
    # Files that are gone after the run began are a failed run: a launcher starts it again.
    lines = job.ends_with(*[1 if index == failing else ANY for index in range(2)])
    assert lines[failing] == "siglip: error: the shards are gone" and time.monotonic() - began < 240


@pytest.mark.slow
def test_a_bug_in_one_process_ends_all_and_shows_its_traceback(jobs):
    job = jobs.start("bug", processes=2, devices=1, toy=True, at={1: "6:bug"})
    job.processes[1].wait(240)
    began = time.monotonic()
    job.processes[0].wait(GONE_S)
    assert job.processes[1].returncode == 1 and job.processes[0].returncode not in (0, 2), time.monotonic() - began
    output = job.output(1).read_text()
    assert "Traceback" in output and "in happen" in output and "ZeroDivisionError" in output


@pytest.mark.slow
def test_an_evaluation_that_fails_in_one_process_ends_all_and_keeps_what_was_trained(jobs):
    job = jobs.start("evaluated", processes=2, devices=2, at={1: "evaluated:missing"})
    lines = job.ends_with(1)
    assert all("the shards are gone" in line for line in lines), lines
    # Saved by both together, though the evaluation came before the save.
    assert read_run_params(job.workdir)[2] == STEPS


@pytest.mark.slow
def test_an_evaluation_that_one_process_leaves_in_the_middle_does_not_hang_the_other(jobs):
    # Process 0 waits in a collective for embeddings that never come.
    job = jobs.start("evaluating", processes=2, devices=2, at={1: "evaluating:missing"})
    lines = job.ends_with(ANY, 1)
    assert lines[1] == "siglip: error: the shards are gone", lines
    assert read_run_params(job.workdir)[2] == 8  # the checkpoint before


# A web proxy, which gRPC would ask.
PROXY = {"https_proxy": "http://localhost:9", "http_proxy": "http://localhost:9"}


def test_processes_join_past_a_web_proxy_and_do_not_start_with_other_settings(jobs):
    job = jobs.start("other", processes=2, devices=1, toy=True, env=PROXY, process1=["--optim.lr", "0.1"])
    for line in job.ends_with(2):
        assert "optim.lr is 0.003 in process 0 and 0.1 in process 1; start the same command" in line
    assert not job.workdir.exists()


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--data.tokenizer", "--init.src"])
def test_bad_input_that_only_one_process_sees_ends_all_with_2(jobs, flag):
    job = jobs.start(f"bad{flag}", processes=2, devices=1, toy=True, process1=[flag, "nix.npz"])
    first, second = job.ends_with(2)
    assert "process 1 stopped: " in first and "nix.npz" in first and "nix.npz" in second


@pytest.mark.slow
def test_a_workdir_that_one_process_does_not_see_is_told_by_all(jobs):
    job = jobs.start("blind", processes=2, devices=1, toy=True, process1=["--workdir", str(jobs.folder / "elsewhere")])
    for line in job.ends_with(2):
        assert f"process 1 does not see, or may not write, what process 0 writes to workdir {job.workdir}" in line


@pytest.mark.slow
def test_of_a_batch_that_makes_nan_the_keys_of_every_process_are_kept(jobs):
    job = jobs.start("poisoned", processes=2, devices=1, toy=True, at={1: "6:poison"})
    assert all("non_finite_batch.json" in line for line in job.ends_with(1))
    kept = json.loads((job.workdir / "non_finite_batch.json").read_text())
    assert kept["step"] == 6 and sorted(kept["keys"]) == sorted(sum(job.keys()[6], []))


@pytest.mark.slow
def test_a_step_that_only_one_process_cannot_make_ends_all_with_2(jobs):
    job = jobs.start("step", processes=2, devices=1, process1=["--loss.micro-batch-size", "3"])
    first, second = job.ends_with(2)
    assert "process 1 stopped: " in first and "micro_batch_size=3" in first and "micro_batch_size=3" in second


def test_a_host_that_never_joins(jobs):
    job = jobs.start("lonely", "--distributed.timeout-s", "10", processes=3, started=2, devices=1, toy=True, env=PROXY)
    for index, line in enumerate(job.ends_with(1)):  # a launcher starts it again: not 2
        assert (
            f"process {index} of 3 waits at localhost:" in line
            and "not all processes of this job joined within 10 s" in line
        )


def fails_to_start(capsys, jobs, *flags):
    capsys.readouterr()
    assert run(["train", str(jobs.recipe), *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_flags_that_do_not_fit_together(jobs, capsys):
    line = fails_to_start(capsys, jobs, "--distributed.processes", "2")
    assert "give distributed.coordinator, .processes and .process_id together" in line
    flags = ["--distributed.coordinator", "localhost:1", "--distributed.processes", "2", "--distributed.process-id"]
    assert "must be from 0 to 1" in fails_to_start(capsys, jobs, *flags, "2")
    flags[1] = "localhost"
    assert "must be HOST:PORT" in fails_to_start(capsys, jobs, *flags, "1")
    flags[1] = f"localhost:{(taken := free_port())}"
    with socket.create_server(("", taken), family=socket.AF_INET6, dualstack_ipv6=True):
        assert f"port {taken} of this host cannot be used" in fails_to_start(capsys, jobs, *flags, "0")
