"""The workdir's log: what goes on where a run resumes."""

import sys
import types

from siglip.workdir.metrics import LogConfig, MetricsWriter


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
