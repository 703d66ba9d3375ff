"""The workdir's log: what goes on where a run resumes."""

import os
import sys
import types

import pytest

from siglip.errors import UserError
from siglip.workdir.metrics import LogConfig, MetricsWriter, read_metrics
from siglip.workdir.report import Run, write_report


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    started = []
    module = types.SimpleNamespace(
        Settings=lambda **settings: settings,
        init=lambda **settings: started.append(settings) or types.SimpleNamespace(log=None, finish=lambda: None),
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    for workdir, start_step in ((tmp_path / "a", 0), (tmp_path / "a", 4), (tmp_path / "b", 0)):
        workdir.mkdir(exist_ok=True)
        MetricsWriter(workdir, LogConfig(wandb="offline"), run_config={"seed": 1}, start_step=start_step).close()
    first, again, other = started
    assert first["id"] == again["id"] != other["id"] and again["resume"] == "allow" and again["mode"] == "offline"


def test_without_wandb_no_id_is_kept(tmp_path):
    MetricsWriter(tmp_path, LogConfig(), run_config={}, start_step=0).close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ('"train/loss": "low"', "'train/loss' of step 3 is not a number but 'low'"),
        ('"train/loss": [1]', "'train/loss' of step 3"),
        ('"train/loss": true', "'train/loss' of step 3"),
        ('"eval/retrieval/toy/score": {}', "'eval/retrieval/toy/score' of step 3"),
        ('"eval/score": 1', "'eval/score' of step 3 is not called eval/TASK/DATA/METRIC"),
        (f'"train/loss": 1{"0" * 400}', "'train/loss' of step 3"),
    ],
)
def test_odd_values_are_told_with_their_file(tmp_path, values, message):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, ' + values + "}\n")
    with pytest.raises(UserError, match=f"metrics.jsonl: {message}.*; correct or remove that line") as error:
        read_metrics(tmp_path)
    assert "\n" not in str(error.value)


def test_lines_that_are_none_are_left_out_and_nulls_are_shown(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "train/loss": null, "train/pairs_per_s": null, "train/substituted/truncated": null, "note": "mine"}\n'
        f'{{"step": {"1" * 5000}}}\n{"[" * 100_000}\n{{"step": true}}\n{{"st'
    )
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    assert "1 steps" in write_report(tmp_path / "report.html", [Run("run", read_metrics(tmp_path), {})]).read_text()


def test_a_disk_that_is_full_is_told_with_the_file(tmp_path):
    writer = MetricsWriter(tmp_path, LogConfig(), run_config={}, start_step=0)
    writer._file.close()
    writer._file = open("/dev/full", "a")
    for call in (lambda: writer.write(1, {"train/loss": 1.0}), writer.close):
        with pytest.raises(OSError, match="No space left on device: .*metrics.jsonl"):
            call()


def test_lines_are_dropped_in_the_same_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "train/loss": 1}\n{"st\n{"step": 4, "train/loss": 1}\n{"step": 6}\n{"step": 4}\n{"ste')
    with path.open("a") as other:
        writer = MetricsWriter(tmp_path, LogConfig(), run_config={}, start_step=4)
        writer.write(5, {"train/loss": 0.5})
        writer.close()
        assert os.fstat(other.fileno()).st_ino == path.stat().st_ino
    assert [line["step"] for line in read_metrics(tmp_path)] == [2, 4, 5]


def test_a_line_without_its_end_is_ended(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n{"step": 4}')
    writer = MetricsWriter(tmp_path, LogConfig(), run_config={}, start_step=4)
    writer.write(5, {"train/loss": 0.5})
    writer.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [2, 4, 5]
