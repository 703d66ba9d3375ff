"""What ends in one line and what keeps its traceback, through the real command line; and advice that is no error."""

import inspect
import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from data_pipelines import errors as data_errors
from data_pipelines.loader import DataConfig
from data_pipelines.order.mixture import SourceConfig
from data_pipelines.records import ShardLost
from siglip import cli, losses
from siglip.cli import training
from siglip.errors import RunFailed, UserError
from siglip.evaluation.zeroshot import ZeroShot
from siglip.training.config import EvalConfig, resolve, to_json
from siglip.training.signals import Interrupted
from siglip.training.warm_start import InitConfig
from tests.siglip.cli.test_commands import fails, recipe, shard  # noqa: F401
from tests.siglip.tiny_run import tiny_config, use_devices


def mismatched(zimg, ztxt, positive_row, temperature, bias):
    return zimg + jnp.zeros(3)


def test_the_shape_error_of_a_new_loss_is_seen_with_its_line(recipe, capsys, monkeypatch):  # noqa: F811
    use_devices(monkeypatch, 2)
    monkeypatch.setattr(losses, "_tile", mismatched)
    assert cli.run(["train", str(recipe)]) == 1
    error = capsys.readouterr().err
    line = inspect.getsourcelines(mismatched)[1] + 1
    assert f'{__file__}", line {line}, in mismatched' in error
    assert "zimg + jnp.zeros(3)" in error and "Traceback" in error and "shapes" in error


def raising(error: BaseException):
    def command(*_):
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("x=1 must be 2"), 2),
        (data_errors.UserError("x=1 must be 2"), 2),
        (FileNotFoundError("no shard at x"), 2),
        (PermissionError(13, "Permission denied", "x"), 2),
        (OSError(28, "No space left on device", "x"), 1),
        (OSError(30, "Read-only file system", "x"), 2),
        (MemoryError(), 1),
        (MemoryError("Unable to allocate 3 TiB"), 1),
        (RunFailed("the loss is nan at step 3"), 1),
        (ShardLost("shard x vanished"), 1),
        (Interrupted(15, 7, Path("runs/x")), 143),
        (KeyboardInterrupt(), 130),
        (ModuleNotFoundError("No module named 'notinstalled'", name="notinstalled.sub"), 1),
        (RuntimeError("Unable to initialize backend 'cuda': no GPU"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_what_is_expected_is_one_line(error, code, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_dispatch", raising(error))
    fails(["train"], capsys, code=code)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Incompatible shapes for broadcasting: (8, 32) and (3,)"),
        RuntimeError("generator raised StopIteration"),
        TypeError("unsupported operand"),
        KeyError("image"),
        AssertionError(),
        ModuleNotFoundError("No module named 'siglip.training.term'", name="siglip.training.term"),
        ModuleNotFoundError("No module named 'jax.gone'", name="jax.gone"),
        ImportError("cannot import name 'gone' from 'jax'", name="jax"),
    ],
    ids=repr,
)
def test_anything_else_keeps_its_traceback(error, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_dispatch", raising(error))
    assert cli.run(["train"]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed and "in command" in printed and type(error).__name__ in printed


def test_a_missing_package_is_named_with_its_command(capsys, monkeypatch):
    error = ModuleNotFoundError("No module named 'notinstalled'", name="notinstalled.sub")
    monkeypatch.setattr(cli, "_dispatch", raising(error))
    fails(["eval"], capsys, "python -m pip install notinstalled$", code=1)


def test_the_traceback_of_bad_input_on_request(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_dispatch", raising(UserError("x=1 must be 2")))
    monkeypatch.setenv("SIGLIP_TRACEBACK", "1")
    assert cli.run(["train"]) == 2
    assert "in command" in capsys.readouterr().err


def test_home_is_expanded_in_every_flag_and_in_recipes(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for flags in (["--out", "~/no/z.npz"], ["--out=~/no/z.npz"]):
        fails(["embed", "~/m.npz", "--data", "~/x.tar", *flags], capsys, f"the folder {tmp_path}/no of --out")
    fails(["train", "~/none.py"], capsys, f"{tmp_path}/none.py does not exist")
    source = SourceConfig("~/x.tar", manifest="~/m.parquet")
    data = DataConfig(sources=(source,), tokenizer="~/t.model", image_embeddings="~/z")
    task = ZeroShot("~/x.tar", classes="~/c.txt")
    config = resolve(tiny_config("~/run", data=data, eval=EvalConfig(tasks=(task,)), init=InitConfig("~/m.npz")))
    assert json.dumps(to_json(config)).count(f'"{tmp_path}/') == 8 and "~" not in json.dumps(to_json(config))
    assert resolve(config) is config


@pytest.mark.parametrize(
    ("mode", "tunables", "advised"),
    [
        ("always [madvise] never", None, True),
        ("always [madvise] never", "glibc.malloc.arena_max=1", True),
        ("always [madvise] never", "glibc.malloc.hugetlb=1", False),
        ("[always] madvise never", None, False),  # malloc has them without asking
        (None, None, False),
    ],
)
def test_large_pages_are_advised_where_they_help(tmp_path, monkeypatch, caplog, mode, tunables, advised):
    path = tmp_path / "enabled"
    if mode is not None:
        path.write_text(mode + "\n")
    monkeypatch.setattr(training, "_LARGE_PAGES_MODE", path)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if tunables is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    with caplog.at_level("INFO", logger="siglip"):
        training._advise_large_pages()
    assert ("GLIBC_TUNABLES=glibc.malloc.hugetlb=1" in caplog.text) == advised


@pytest.mark.parametrize(
    "data", [None, 7, [1], {"sources": None}, {"sources": 3}, {"sources": ["a"]}, {"sources": [{"manifest": 5}]}]
)
def test_damaged_sources_in_the_config_of_a_run_are_told_by_report(tmp_path, capsys, data):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    config = to_json(tiny_config(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.run(["report", str(tmp_path)]) == 0
    capsys.readouterr()
    (tmp_path / "config.json").write_text(json.dumps(config | {"data": data}))
    assert "config.json: data has no list of sources" in fails(["report", str(tmp_path)], capsys, code=2)


@pytest.mark.parametrize("field", ["total_steps", "batch_size", "seed"])
def test_numbers_that_no_run_has(tmp_path, field):
    for value in (-1, 2**63, 10**400):
        with pytest.raises(UserError, match=f"^{field}=-?[0-9]+ must "):
            tiny_config(tmp_path, **{field: value})
