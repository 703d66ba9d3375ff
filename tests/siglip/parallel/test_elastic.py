"""A run goes on with other hosts, devices, FSDP and data workers: the same pairs in the same steps, the same losses.

The towers are trained on images of one size in the first steps and then as NaFlex; the toy on images of one size alone, as the
towers of test_processes.py.
"""

import signal

import numpy as np
import pytest

from siglip.workdir.checkpoint import read_run_params
from tests.siglip.jobs import LOSS_RTOL, STEPS, Jobs, losses

ONE_REPLICATED = dict(processes=1, devices=8), ("--data.threads", "2")
TWO_SHARDED = (
    dict(processes=2, devices=2),
    ("--mesh.fsdp", "2", "--data.workers", "1", "--data.threads", "1", "--data.prefetch", "3"),
)
TWO, FOUR = (dict(processes=2, devices=2), ()), (dict(processes=4, devices=1), ())


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    jobs = Jobs(tmp_path_factory.mktemp("elastic"), evaluate=False, naflex=True)
    yield jobs
    jobs.close()


@pytest.mark.slow
def test_a_run_goes_on_after_a_kill_and_in_other_layouts(jobs):
    """One host that is stopped, two with FSDP, of which one is killed, twice, and one host again."""
    whole = jobs.run("whole", processes=1, devices=1)
    lengths = whole.lengths()
    assert [lengths[step] for step in (1, 2, 3)] == [4] * 3 and set(lengths.values()) == {4, 9}

    layout, flags = ONE_REPLICATED
    first = jobs.start("towers", *flags, **layout, at={0: f"2:{int(signal.SIGTERM)}"}, step_s=1.0)
    first.ends_with(128 + signal.SIGTERM)
    one = read_run_params(first.workdir)[2]
    assert 2 <= one < 4
    layout, flags = TWO_SHARDED
    killed = jobs.start("towers", *flags, **layout, at={0: "compiling:late", 1: "8:hold"})
    killed.kill(1, saved=4)
    lost = losses(killed.workdir)
    assert max(lost) > 4
    second = jobs.start("towers", *flags, **layout, at={1: "10:hold"})
    second.kill(1, saved=8)
    again = losses(second.workdir)
    assert {n: again[n] for n in lost} == lost  # in the same layout to the last bit
    third = jobs.run("towers", *ONE_REPLICATED[1], **ONE_REPLICATED[0])

    parts = (first, 0, one), (killed, one, 7), (second, 4, 8), (third, 8, STEPS)
    for part, before, end in parts:
        keys, found = part.keys(), part.lengths()
        assert min(keys) == before + 1 and max(keys) >= end
        for n in range(before + 1, end + 1):
            assert sorted(sum(keys[n], [])) == sorted(sum(whole.keys()[n], [])), n
            assert found[n] == lengths[n]
    np.testing.assert_allclose(
        list(losses(third.workdir).values()), list(losses(whole.workdir).values()), rtol=LOSS_RTOL
    )


@pytest.fixture
def toys(tmp_path):
    jobs = Jobs(tmp_path, evaluate=False)
    yield jobs
    jobs.close()


# A sum of 8 x 16 positive numbers in any order, 127 roundings of 2**-24.
@pytest.mark.slow
def test_four_processes_go_on_as_two(toys):
    whole = toys.run("toy-whole", processes=1, devices=1, toy=True)
    steps, parts = [0], []
    for (layout, flags), stop_at in ((FOUR, 2), (TWO, None)):
        at = {} if stop_at is None else {layout["processes"] - 1: f"{stop_at}:{int(signal.SIGTERM)}"}
        part = toys.start("toy", *flags, **layout, toy=True, step_s=1.5, at=at)
        part.ends_with(0 if stop_at is None else 128 + signal.SIGTERM)
        steps.append(read_run_params(part.workdir)[2])
        parts.append(part.keys())
        assert min(parts[-1]) == steps[-2] + 1 and (stop_at or STEPS) <= steps[-1]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS
    for n, expected in whole.keys().items():
        (shares,) = [part[n] for part, end in zip(parts, steps[1:], strict=True) if n in part and n <= end][:1]
        assert sorted(sum(shares, [])) == sorted(sum(expected, [])), n
    expected, actual = losses(whole.workdir), losses(part.workdir)
    assert list(actual) == list(expected)
    np.testing.assert_allclose(list(actual.values()), list(expected.values()), rtol=127 * 2**-24)
