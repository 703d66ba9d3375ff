"""The workdir's log: what goes on where a run resumes."""

import os
import sys
import types

from siglip.workdir.metrics import LogConfig, MetricsWriter, read_metrics


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
