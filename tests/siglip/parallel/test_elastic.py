"""A run goes on with other hosts, devices, FSDP and data workers: the same pairs in the same steps, the same losses."""

import signal

import numpy as np
import pytest

from siglip.workdir.checkpoint import read_run_params
from tests.siglip.jobs import LOSS_RTOL, STEPS, Jobs, losses

LAYOUTS = {
    "one host, replicated": (dict(processes=1, devices=8), ("--data.threads", "2")),
    "two hosts, sharded": (
        dict(processes=2, devices=2),
        ("--mesh.fsdp", "2", "--data.workers", "1", "--data.threads", "1", "--data.prefetch", "3"),
    ),
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    jobs = Jobs(tmp_path_factory.mktemp("elastic"), evaluate=False)
    yield jobs
    jobs.close()


@pytest.fixture(scope="module")
def whole(jobs):
    """Never interrupted, on one device."""
    return jobs.run("whole", processes=1, devices=1)


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [tuple(LAYOUTS), tuple(reversed(LAYOUTS))])
def test_a_run_goes_on_in_another_layout(jobs, whole, before, after):
    (first_layout, first_flags), (second_layout, second_flags) = LAYOUTS[before], LAYOUTS[after]
    name = f"from-{first_layout['processes']}"
    first = jobs.start(name, *first_flags, **first_layout, at={0: f"6:{signal.SIGTERM}"}, step_s=0.5)
    first.ends_with(128 + signal.SIGTERM)
    step = read_run_params(first.workdir)[2]
    assert 6 <= step < STEPS
    second = jobs.run(name, *second_flags, **second_layout)

    first_keys, second_keys, expected = first.keys(), second.keys(), whole.keys()
    assert min(second_keys) == step + 1 and max(second_keys) == STEPS
    for n in expected:
        shares = first_keys[n] if n <= step else second_keys[n]
        assert sorted(sum(shares, [])) == sorted(sum(expected[n], [])), n
    np.testing.assert_allclose(
        list(losses(first.workdir).values()), list(losses(whole.workdir).values()), rtol=LOSS_RTOL
    )
