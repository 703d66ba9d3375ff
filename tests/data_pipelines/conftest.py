"""Shards that several test files stream from."""

import pytest

from tests.data_pipelines.shards import write_pairs


@pytest.fixture
def shards(tmp_path):
    """13 and 29 pairs."""
    write_pairs(tmp_path / "a.tar", 13)
    write_pairs(tmp_path / "b.tar", 29, first=100)
    return tmp_path
