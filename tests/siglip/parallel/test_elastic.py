"""A run goes on with other hosts, devices, FSDP and data workers: the same pairs in the same steps, the same losses."""

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
    jobs = Jobs(tmp_path_factory.mktemp("elastic"), evaluate=False)
    yield jobs
    jobs.close()


# Of the toy: a sum of 8 x 16 positive numbers in any order, 127 roundings of 2**-24.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, layouts, loss_rtol",
    [("towers", (ONE_REPLICATED, TWO_SHARDED, ONE_REPLICATED), LOSS_RTOL), ("toy", (FOUR, TWO), 127 * 2**-24)],
)
def test_a_run_goes_on_in_other_layouts(jobs, name, layouts, loss_rtol):
    toy = name == "toy"
    whole = jobs.run(f"{name}-whole", processes=1, devices=1, toy=toy)
    steps, parts, stops = [0], [], [2, 7][: len(layouts) - 1]
    for (layout, flags), stop_at in zip(layouts, [*stops, None], strict=True):
        at = {} if stop_at is None else {layout["processes"] - 1: f"{stop_at}:{int(signal.SIGTERM)}"}
        part = jobs.start(name, *flags, **layout, toy=toy, step_s=1.5, at=at)
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
    np.testing.assert_allclose(list(actual.values()), list(expected.values()), rtol=loss_rtol)
