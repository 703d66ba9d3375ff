"""Exact quantiles without sorting, concepts and their balance; the engine and the shuffle of rows."""

import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.curate import scores
from data_pipelines.curate.engine import LocalEngine, WorkerDied
from data_pipelines.curate.shuffle import Shuffle


@settings(deadline=None)
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=50), st.data())
def test_the_kth_largest_score_from_two_histograms(values, data):
    values = np.array(values, np.float32)
    largest = data.draw(st.integers(1, len(values)))
    upper, rank = scores.bin_of(scores.upper_histogram(values), largest)
    lower, _ = scores.bin_of(scores.lower_histogram(values, upper), rank)
    found = scores.unsortable(upper << 16 | lower)
    assert found == np.sort(values)[-largest] and (values >= np.float32(found)).sum() >= largest


def test_sortable_keeps_the_order():
    values = np.array([-1, -0.5, -1e-30, 0, 1e-30, 0.25, 1], np.float32)
    keys = scores.sortable(values)
    assert (np.diff(keys.astype(np.int64)) > 0).all()
    assert [scores.unsortable(int(key)) for key in keys] == values.tolist()


@pytest.mark.parametrize(
    ("score", "edge"), [(-0.001, "-0.02"), (0.0, "0.00"), (0.0199, "0.00"), (0.51, "0.50"), (1, "1.00")]
)
def test_classes_of_scores(score, edge):
    assert scores.score_label(score) == edge


def test_concepts(tmp_path):
    path = tmp_path / "concepts.txt"
    path.write_text("Dog\nhot dog\n猫\n\ndog\nSan José\n", encoding="utf-8")
    concepts, longest = scores.read_concepts(str(path))
    assert (concepts, longest) == ({"dog": 0, "hot dog": 1, "猫": 2, "san josé": 3}, 2)
    match = lambda text: scores.match_concepts(text, concepts, longest)  # noqa: E731
    assert match("A hot dog, and another DOG!") == [0, 1]
    assert match("dogma") == [] and match("可愛い猫です") == [2] and match("in San José.") == [3]
    (tmp_path / "list.json").write_text('["a", "b c"]')
    assert scores.read_concepts(str(tmp_path / "list.json")) == ({"a": 0, "b c": 1}, 2)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "names no concept"), (b"\n \n", "names no concept"), (b"[1, 2]", "names no concept"), (b"[]", "names no concept"),
        (b"\x89PNG\xff\x00", "can't decode byte"), (b'["a", "b"', "delimiter"), (b"[" * 100_000, "recursion"),
        (None, "no such file"),
    ],
)  # fmt: skip
def test_a_bad_file_of_concepts_is_named_in_one_line(tmp_path, content, message):
    path = tmp_path / "concepts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        scores.read_concepts(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_balance():
    counts = np.array([1000, 10])
    keep = lambda matched, draw: scores.keep_in_balance(matched, counts, 100, draw)  # noqa: E731
    assert keep([0], 0.0999) and not keep([0], 0.1001) and keep([1], 0.9999) and not keep([], 0.0)
    draws = [scores.uniform_of("seed", str(n)) for n in range(4000)]
    assert abs(np.mean(draws) - 0.5) < 0.02 and 0 <= min(draws) and max(draws) < 1


def square(value: int) -> int:
    if value == 3:
        raise ValueError("three")
    return value * value


def die(task: tuple[int, str]) -> int:
    """Kills its process for 2, and for 5 the first time."""
    value, folder = task
    mark = Path(folder) / str(value)
    if value == 2 or (value == 5 and not mark.exists()):
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return value


@pytest.mark.parametrize("workers", [1, 2])
def test_an_engine_maps(workers):
    with LocalEngine(workers) as engine:
        found = dict(engine.map(square, range(6)))
        assert isinstance(found.pop(3), ValueError) and found == {n: n * n for n in (0, 1, 2, 4, 5)}
        assert dict(engine.map(square, [7])) == {7: 49} and dict(engine.map(square, [])) == {}


def test_a_worker_that_dies_costs_its_own_task_only(tmp_path):
    found = {}
    with LocalEngine(2) as engine:
        for numbers in ((0, 1, 2, 3, 4), (5, 6, 7, 8)):  # 2 and 5 apart: the death of one must not be the other's first
            tasks = [(number, str(tmp_path)) for number in numbers]
            found |= {task[0]: result for task, result in engine.map(die, tasks)}
    assert isinstance(found.pop(2), WorkerDied)
    assert found == {n: n for n in (0, 1, 3, 4, 5, 6, 7, 8)}


def test_shuffle(tmp_path):
    shuffle = Shuffle(tmp_path / "rows", map_tasks=3, buckets=4)
    for source in range(3):
        values = np.arange(source * 10, source * 10 + source * 5)
        shuffle.write(source, pa.table({"value": values}), values % 4)
    everything = np.concatenate([np.arange(10, 15), np.arange(20, 30)])
    for bucket in range(4):
        assert shuffle.read(bucket)["value"].to_pylist() == everything[everything % 4 == bucket].tolist()
