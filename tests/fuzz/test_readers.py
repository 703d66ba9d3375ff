"""A short form of the campaign over damaged files; `python -m tests.fuzz.readers` is the long one."""

import pytest

from tests.fuzz import readers


@pytest.mark.slow
@pytest.mark.parametrize("name", readers.KINDS)
def test_damaged_files_are_read_or_refused_in_one_line(name, monkeypatch, tmp_path):
    for variable in ("XDG_CACHE_HOME", "FUZZ_FOLDER"):
        monkeypatch.setenv(variable, str(tmp_path))  # and so what the campaign sets does not stay
    _, counts, faults = readers.campaign((name, 1, 120))
    assert counts.total() == 120 and not faults, faults[0]
