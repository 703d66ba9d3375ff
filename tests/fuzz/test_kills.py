"""A short form of the campaign over ended runs; `python -m tests.fuzz.kills` is the long one."""

import pytest

from tests.fuzz import kills


@pytest.mark.slow
def test_ended_runs_go_on_as_if_nothing_had_happened():
    rows = kills.campaign(kills=2, signals=0, curations=1, seed=1)
    assert [row.times for row in rows] == [2, 1] and not any(row.differ or row.left for row in rows)
