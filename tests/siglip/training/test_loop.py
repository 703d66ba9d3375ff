"""The loop around a toy program: resuming bit for bit, signals, bad numbers, bad workdirs."""

import dataclasses
import gzip
import json
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from siglip import trees
from siglip.errors import RunFailed, UserError
from siglip.evaluation.retrieval import Retrieval
from siglip.parallel import launch
from siglip.parallel.sharding import MeshConfig
from siglip.training.config import EvalConfig
from siglip.training.loop import Interrupted, NonFiniteLoss, train
from siglip.training.optim import OptimConfig
from siglip.workdir.checkpoint import CheckpointConfig, read_run_params
from siglip.workdir.metrics import PROFILE_FOLDER, LogConfig, read_metrics
from tests.siglip.tiny_run import (
    StopsAt,
    TinyBatches,
    assert_bit_equal,
    tiny_config,
    toy_program,
    train_toy,
    use_devices,
    with_task,
)

FSDP = MeshConfig(fsdp=4, fsdp_min_size_bytes=1024)


@pytest.fixture(autouse=True)
def two_devices(monkeypatch):
    """Two devices show all that eight would, in a fraction of the time."""
    use_devices(monkeypatch, 2)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_stopped_and_resumed_is_bit_equal_to_uninterrupted(tmp_path, signum):
    whole = TinyBatches()
    expected = train_toy(tiny_config(tmp_path / "a"), whole)

    first, second = StopsAt(5, signum), TinyBatches()
    with pytest.raises(Interrupted, match="at step 5, which is saved") as stopped:
        train_toy(tiny_config(tmp_path / "b"), first)
    assert stopped.value.signum == signum
    assert_bit_equal(train_toy(tiny_config(tmp_path / "b"), second), expected)
    assert first.seen + second.seen == whole.seen
    steps = [line["step"] for line in read_metrics(tmp_path / "b") if "train/loss" in line]
    assert steps == sorted(set(steps)) and steps[-1] == 8


def test_a_signal_during_an_evaluation_saves_and_the_run_goes_on(tmp_path):
    expected = train_toy(tiny_config(tmp_path / "whole"), TinyBatches())
    config = tiny_config(tmp_path / "run", **with_task(every_steps=3))
    calls = []

    def interrupted(params, due):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"eval/retrieval/toy/score": 1.0}

    with pytest.raises(Interrupted) as stopped:
        train_toy(config, TinyBatches(), evaluate=interrupted)
    assert read_run_params(tmp_path / "run")[2] == int(re.search(r"at step (\d+)", str(stopped.value))[1])
    assert_bit_equal(train_toy(config, TinyBatches(), evaluate=interrupted).params, expected.params)


def test_a_signal_in_the_last_step_leaves_its_evaluation_to_the_next_start(tmp_path):
    config = tiny_config(tmp_path, **with_task())
    evaluations = []

    def evaluate(params, due):
        evaluations.append(1)
        return {"eval/retrieval/toy/score": 1.0}

    with pytest.raises(Interrupted, match="at step 8"):
        train_toy(config, StopsAt(8, signal.SIGTERM), evaluate=evaluate)
    assert not evaluations
    for _ in range(2):
        train_toy(config, TinyBatches(), evaluate=evaluate)
    assert len(evaluations) == 1 and "eval/retrieval/toy/score" in read_metrics(tmp_path)[-1]


def test_what_a_caller_evaluates_needs_no_task_in_the_config(tmp_path):
    steps = []
    config = tiny_config(tmp_path, eval=EvalConfig(every_steps=3))
    for _ in range(2):
        train_toy(
            config, TinyBatches(), evaluate=lambda params, due: {"eval/mine/toy/score": steps.append(due.step) or 1.0}
        )
    assert steps == [3, 6, 8]


@pytest.mark.parametrize("raised, seen", [(UserError, RunFailed), (OSError, RunFailed), (ValueError, ValueError)])
def test_what_was_trained_outlives_a_broken_evaluation(tmp_path, raised, seen):
    def broken(params, due):
        raise raised("labels are missing")

    with pytest.raises(seen, match="labels are missing") as failed:
        train_toy(tiny_config(tmp_path, **with_task()), TinyBatches(), evaluate=broken)
    assert failed.type is seen
    assert read_run_params(tmp_path)[2] == 8


class DyingWorkers(TinyBatches):
    """Ctrl-C reaches the data workers as well: the batch after the signal never comes."""

    def __next__(self):
        if self.position == 4:
            os.kill(os.getpid(), signal.SIGINT)
            raise RuntimeError("worker died")
        return super().__next__()


def test_data_workers_that_die_of_the_signal_lose_nothing(tmp_path):
    with pytest.raises(Interrupted, match="at step 4"):
        train_toy(tiny_config(tmp_path / "run"), DyingWorkers())
    expected = train_toy(tiny_config(tmp_path / "whole"), TinyBatches())
    assert_bit_equal(train_toy(tiny_config(tmp_path / "run"), TinyBatches()), expected)


def test_parameters_ruined_by_a_gradient_are_not_saved(tmp_path):
    # A finite loss with a gradient that is not: the norm of an embedding of exactly zero has one.
    config = tiny_config(tmp_path)
    program = toy_program(config, penalty=lambda params: jnp.linalg.norm(0 * params["b"]))
    with pytest.raises(NonFiniteLoss, match=r"norm of the update nan at step 1; .*checkpoint is none"):
        train(config, TinyBatches(), program=program)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_another_tokenizer_in_the_same_workdir_is_refused(tmp_path):
    train_toy(tiny_config(tmp_path), TinyBatches(), tokenizer=b"one")
    with pytest.raises(ValueError, match="trained with another tokenizer"):
        train_toy(tiny_config(tmp_path), TinyBatches(), tokenizer=b"two")
    assert (tmp_path / "tokenizer.model").read_bytes() == b"one"


def test_lines_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    config = tiny_config(tmp_path, checkpoint=CheckpointConfig(every_steps=4))
    with pytest.raises(NonFiniteLoss):
        train_toy(config, TinyPoison(7))
    assert [line["step"] for line in read_metrics(tmp_path)] == [2, 4, 6]
    train_toy(config, TinyBatches())
    assert [line["step"] for line in read_metrics(tmp_path)] == [2, 4, 6, 8]


class TinyPoison(TinyBatches):
    """Its batch number `poison_at` has token ids out of range, which embed as NaN."""

    def __init__(self, poison_at):
        super().__init__()
        self.poison_at = poison_at

    def __next__(self):
        batch = super().__next__()
        if self.position == self.poison_at:
            batch["text"] = np.full_like(batch["text"], 10_000)
        return batch


def test_a_non_finite_loss_stops_the_run_with_the_keys_and_the_last_checkpoint(tmp_path):
    config = tiny_config(
        tmp_path, checkpoint=CheckpointConfig(every_steps=2), log=LogConfig(every_steps=8, progress=False)
    )
    batches = TinyPoison(5)
    with pytest.raises(NonFiniteLoss, match=r"loss is nan, .* at step 5; .*last good checkpoint is step 4"):
        train_toy(config, batches)
    saved = json.loads((tmp_path / "non_finite_batch.json").read_text())
    assert saved["step"] == 5 and saved["keys"] == batches.seen[4 * 16 : 5 * 16]
    params, _, step = read_run_params(tmp_path)
    assert step == 4 and all(np.all(np.isfinite(leaf)) for leaf in trees.flatten(params).values())
    reference = train_toy(tiny_config(tmp_path / "clean"), TinyBatches())
    assert_bit_equal(train_toy(config, TinyBatches()), reference)


def test_the_last_k_and_the_best_checkpoint_are_kept(tmp_path):
    scores = iter([0.1, 0.9, 0.2, 0.3])
    config = tiny_config(
        tmp_path,
        eval=EvalConfig(tasks=(Retrieval("unused.tar", name="toy"),), every_steps=2),
        checkpoint=CheckpointConfig(every_steps=1, keep=2, best_metric="eval/retrieval/toy/score"),
    )
    train_toy(config, TinyBatches(), evaluate=lambda params, due: {"eval/retrieval/toy/score": next(scores)})
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [4, 7, 8]
    values = [line["eval/retrieval/toy/score"] for line in read_metrics(tmp_path) if "eval/retrieval/toy/score" in line]
    assert values == [0.1, 0.9, 0.2, 0.3]


def test_a_workdir_of_another_config_is_refused_and_untouched(tmp_path):
    train_toy(tiny_config(tmp_path), TinyBatches())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match=r"belongs to another run: optim.lr is 0.003 there and 0.01 here"):
        train_toy(tiny_config(tmp_path, optim=OptimConfig(lr=0.01, warmup_steps=2)), TinyBatches())
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_workdir_from_before_a_field_existed_goes_on_with_its_default(tmp_path):
    train_toy(tiny_config(tmp_path), TinyBatches())
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["terms"], config["data"]["jpeg_scaling"]
    path.write_text(json.dumps(config))
    train_toy(tiny_config(tmp_path), TinyBatches())
    assert json.loads(path.read_text())["data"]["jpeg_scaling"] is False
    path.write_text(json.dumps(config))
    data = dataclasses.replace(tiny_config(tmp_path).data, jpeg_scaling=True)
    with pytest.raises(ValueError, match=r"another run: data.jpeg_scaling is False there and True here"):
        train_toy(dataclasses.replace(tiny_config(tmp_path), data=data), TinyBatches())


def test_what_only_reports_may_change_between_starts(tmp_path):
    train_toy(tiny_config(tmp_path), TinyBatches())
    train_toy(tiny_config(tmp_path, log=LogConfig(every_steps=1, progress=False)), TinyBatches())


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_left(tmp_path):
    config = tiny_config(tmp_path, checkpoint=CheckpointConfig(every_steps=4))
    train_toy(config, TinyBatches())
    for file in (tmp_path / "checkpoints" / "8" / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"checkpoints/8 cannot be read .* move that folder away"):
        train_toy(config, TinyBatches())
    assert (tmp_path / "checkpoints" / "4").is_dir()


def test_a_half_written_checkpoint_is_not_taken_for_one(tmp_path):
    config = tiny_config(tmp_path)
    expected = train_toy(config, TinyBatches())
    # What a kill in the middle of saving leaves behind: a folder that was never renamed, or one without its last file.
    (tmp_path / "checkpoints" / "10.orbax-checkpoint-tmp-0" / "state").mkdir(parents=True)
    (tmp_path / "checkpoints" / "9").mkdir()
    assert read_run_params(tmp_path)[2] == 8
    with pytest.raises(ValueError, match=r"checkpoints/9 cannot be read .* move that folder away"):
        train_toy(config, TinyBatches())
    (tmp_path / "checkpoints" / "9").rmdir()
    assert_bit_equal(train_toy(config, TinyBatches()), expected)


def test_a_batch_that_does_not_divide_is_named(tmp_path, monkeypatch):
    use_devices(monkeypatch, 8)
    with pytest.raises(ValueError, match="batch_size=12 does not divide over 8 devices; use 8 or 16"):
        train(tiny_config(tmp_path, batch_size=12), TinyBatches(12))
    assert not (tmp_path / "config.json").exists()


def test_substitutions_appear_in_the_metrics(tmp_path):
    batches = TinyBatches()
    batches.counts = {"truncated": 3}
    train_toy(tiny_config(tmp_path), batches)
    assert read_metrics(tmp_path)[-1]["train/substituted/truncated"] == 3


def test_wandb_runs_offline_without_a_login(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    pytest.importorskip("wandb")
    config = tiny_config(tmp_path, log=LogConfig(every_steps=4, progress=False, wandb="online"))
    with pytest.warns(UserWarning, match="logging offline"):
        train_toy(config, TinyBatches())
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))


def test_a_broken_wandb_does_not_stop_the_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def explode(**_):
        raise OSError("disk full")

    monkeypatch.setattr(wandb, "init", explode)
    config = tiny_config(tmp_path, log=LogConfig(every_steps=4, progress=False, wandb="offline"))
    with pytest.warns(UserWarning, match="wandb.init failed and is skipped: disk full"):
        train_toy(config, TinyBatches())
    assert len(read_metrics(tmp_path)) == 2


def test_a_file_that_goes_missing_while_training_is_a_failed_run_not_bad_input(tmp_path):
    class Missing(TinyBatches):
        def __next__(self):
            if self.state()["position"] == 3:
                raise FileNotFoundError("the shards are gone")
            return super().__next__()

    with pytest.raises(RunFailed, match="the shards are gone"):
        train_toy(tiny_config(tmp_path), Missing())


def test_a_bug_while_training_keeps_its_type_and_place(tmp_path):
    def mistaken(state, batch):
        return jnp.zeros(3) + jnp.zeros(4)

    config = tiny_config(tmp_path)
    with pytest.raises(TypeError, match="incompatible shapes") as failed:
        train(config, TinyBatches(), program=toy_program(config)._replace(step=mistaken))
    assert any(entry.name == "mistaken" for entry in failed.traceback)


def test_data_that_end_early_fail_the_run(tmp_path):
    class Short(TinyBatches):
        def __next__(self):
            if self.position == 3:
                raise StopIteration
            return super().__next__()

    with pytest.raises(RunFailed, match="the data ended before step 4 of 8"):
        train_toy(tiny_config(tmp_path), Short())


def test_a_lost_process_is_told_with_how_to_go_on(tmp_path, monkeypatch):
    # What jax raises is shown by real processes (tests/siglip/parallel/test_processes.py), this is the line.
    class Lost(TinyBatches):
        def __next__(self):
            if self.position == 5:
                raise jax.errors.JaxRuntimeError("UNAVAILABLE: Gloo all-reduce failed: Connection closed by peer\nmore")
            return super().__next__()

    monkeypatch.setattr(launch, "_several", lambda: True)
    config = tiny_config(tmp_path, checkpoint=CheckpointConfig(every_steps=4))
    with pytest.raises(RunFailed) as failed:
        train_toy(config, Lost())
    assert str(failed.value) == (
        "another process of this job is gone (UNAVAILABLE: Gloo all-reduce failed: Connection closed by peer); start the "
        f"same command again on every host: it goes on from step 4 of {tmp_path}"
    )


@pytest.mark.parametrize(
    "error",
    [
        UserError("INTERNAL: connection refused"),
        ValueError("shapes do not fit: no connection between (3,) and (4,)"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 1 GiB"),
    ],
)
def test_other_errors_are_not_taken_for_a_lost_process(error, monkeypatch):
    monkeypatch.setattr(launch, "_several", lambda: True)
    assert not launch.is_lost_process(error)


@pytest.mark.parametrize("name", ["{a,b} #1", "run [1]", "what?", "all*"])
def test_workdirs_with_odd_names_keep_their_checkpoints_or_are_refused(tmp_path, name):
    config = tiny_config(tmp_path / name / "run", total_steps=3)
    if "{" in name:
        train_toy(config, TinyBatches())
        assert read_run_params(tmp_path / name / "run")[2] == 3
        return
    with pytest.raises(UserError, match=r"has one of \* \? \[ in its path, where checkpoints cannot be kept"):
        train_toy(config, TinyBatches())
    assert not (tmp_path / name).exists()


def test_a_run_is_made_longer_and_says_what_its_schedule_does(tmp_path, caplog):
    caplog.set_level("INFO", logger="siglip")
    short, longer = tiny_config(tmp_path / "run"), tiny_config(tmp_path / "run", total_steps=14)
    train_toy(short, TinyBatches())
    batches = TinyBatches()
    state = train_toy(longer, batches)
    assert batches.position == 14 and state.step == 14  # it went on with batch 9
    assert "total_steps was 8 and is 14: from step 8 on, the cosine schedule" in caplog.text
    assert "at 0.5 of its peak where it was at 0; the moments are kept" in caplog.text
    whole = train_toy(tiny_config(tmp_path / "whole", total_steps=14), TinyBatches())
    assert_bit_equal(state, whole)  # the toy has no schedule: with the moments, it is the same run
    with pytest.raises(UserError, match="belongs to another run: total_steps is 14 there and 8 here"):
        train_toy(short, TinyBatches())


@pytest.mark.parametrize("total_steps", [8, 3], ids=["whole", "cut short"])
def test_steps_are_traced_for_xprof_and_perfetto(tmp_path, total_steps):
    """The third and fourth step of a start; a run that ends before still leaves a whole trace."""
    log = LogConfig(every_steps=2, progress=False, profile_steps=2)
    train_toy(tiny_config(tmp_path, log=log, total_steps=total_steps), TinyBatches())
    (trace,) = tmp_path.glob(f"{PROFILE_FOLDER}/plugins/profile/*/*.trace.json.gz")
    assert list(trace.parent.glob("*.xplane.pb"))
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    calls, end = 0, -1.0
    for begin, duration in sorted((e["ts"], e["dur"]) for e in events if e.get("name") == "PjitFunction(step)"):
        calls, end = calls + (begin > end), max(end, begin + duration)  # a call is an event within an event
    assert calls == min(2, total_steps - 2)
