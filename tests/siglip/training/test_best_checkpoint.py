"""Which checkpoint is the best, when it is marked, and when a run that no longer improves ends."""

import dataclasses
import math
import signal

import pytest

from siglip.evaluation.retrieval import Retrieval
from siglip.training.config import EvalConfig
from siglip.training.loop import Interrupted
from siglip.workdir.checkpoint import CheckpointConfig
from siglip.workdir.metrics import read_metrics
from tests.siglip.tiny_run import StopsAt, TinyBatches, scored, tiny_config, train_toy, with_task
from tests.siglip.training.test_loop import two_devices  # noqa: F401


def best_config(workdir, **kwargs):
    checkpoint = CheckpointConfig(every_steps=100, keep=1, best_metric="eval/retrieval/toy/score")
    return tiny_config(workdir, checkpoint=checkpoint, **with_task(every_steps=2), **kwargs)


def kept(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_the_best_checkpoint_survives_a_preemption_at_its_evaluation(tmp_path):
    # Stopped at step 4, before its evaluation; the next start makes it up: 0.9 is the best there will be.
    config = best_config(tmp_path)
    with pytest.raises(Interrupted, match="at step 4"):
        train_toy(config, StopsAt(4, signal.SIGTERM), evaluate=scored([0.1]))
    with pytest.raises(Interrupted, match="at step 7"):
        train_toy(config, StopsAt(7, signal.SIGTERM), evaluate=scored([0.9, 0.5]))
    assert kept(tmp_path) == [4, 7]  # 0.5 at step 6 was not a new best
    train_toy(config, TinyBatches(), evaluate=scored([0.6]))
    assert kept(tmp_path) == [4, 8]  # nor is 0.6, as a start after that one knows


def test_a_run_that_no_longer_improves_ends_and_stays_ended(tmp_path, caplog):
    caplog.set_level("INFO", logger="siglip")
    config = best_config(tmp_path)
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, patience=2))
    train_toy(config, TinyBatches(), evaluate=scored([0.5, math.nan, 0.5]))  # a fourth evaluation would have no score
    assert kept(tmp_path) == [2, 6] and "was not higher for 2 evaluations" in caplog.text
    batches = TinyBatches()
    train_toy(config, batches, evaluate=scored([]))  # the same command again has nothing to do
    assert kept(tmp_path) == [2, 6] and not batches.seen
    more = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, patience=4))
    train_toy(more, TinyBatches(), evaluate=scored([0.9]))
    assert kept(tmp_path) == [8]
    with pytest.raises(ValueError, match="patience=1 must be at least 0, and needs checkpoint.best_metric"):
        CheckpointConfig(patience=1)


@pytest.mark.parametrize("metric", ["image_retrieval_median_rank", "ece_shifted@0.5", "brier@0.1", "mce", "acc1_gap"])
def test_the_best_metric_is_one_that_is_better_when_higher(metric):
    with pytest.raises(ValueError, match=f"{metric} is better when lower"):
        CheckpointConfig(best_metric=f"eval/task/mce-data/{metric}")
    CheckpointConfig(best_metric="eval/robustness/mce/acc1_corrupted")


@pytest.mark.parametrize("metric", ["acc1_se", "knn_acc1_map_chance", "average_precision_se@0.1"])
def test_an_error_or_a_chance_level_is_no_best_metric(metric):
    with pytest.raises(ValueError, match=f"{metric} does not measure the model"):
        CheckpointConfig(best_metric=f"eval/task/data/{metric}")


def test_a_run_that_ends_early_evaluates_what_waits_for_the_end(tmp_path):
    """The first task is the metric's; of the others one was put off at step 2, and one runs at the end only."""
    names = ("toy", "late", "last")
    tasks = tuple(Retrieval("unused.tar", name=name) for name in names)
    evals = EvalConfig(tasks=tasks, every_steps=2, every_steps_of=(("retrieval/last", 0),))
    config = dataclasses.replace(best_config(tmp_path), eval=evals)
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, patience=1))
    asked = []

    def evaluate(params, due):
        asked.append((due.step, [names[n] for n in due.tasks], due.last))
        begun = due.tasks if due.last else due.tasks[:1]  # as if the time was used up
        return {f"eval/retrieval/{names[n]}/score": 0.5 for n in begun}

    train_toy(config, TinyBatches(), evaluate=evaluate)
    assert asked == [(2, ["toy", "late"], False), (4, ["toy", "late"], False), (4, ["late", "last"], True)]
    assert kept(tmp_path) == [2, 4]
    train_toy(config, TinyBatches(), evaluate=evaluate)  # nothing is left to do
    assert len(asked) == 3
    # As after a kill between the two evaluations: the rest is made up for.
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if "last" not in line))
    train_toy(config, TinyBatches(), evaluate=evaluate)
    assert asked[3:] == [(4, ["late", "last"], True)] and "eval/retrieval/last/score" in read_metrics(tmp_path)[-1]


def test_what_was_put_off_is_still_first_after_a_restart(tmp_path):
    names = "abc"
    tasks = tuple(Retrieval("unused.tar", name=name) for name in names)
    asked = []

    def evaluate(params, due):
        asked.append((due.step, "".join(names[n] for n in due.tasks)))
        return {f"eval/retrieval/{names[n]}/score": 0.5 for n in due.tasks[: 3 if due.last else 2]}

    for workdir, stops in ((tmp_path / "whole", ()), (tmp_path / "stopped", (3, 5))):
        config = tiny_config(workdir, eval=EvalConfig(tasks=tasks, every_steps=2))
        for step in stops:
            with pytest.raises(Interrupted):
                train_toy(config, StopsAt(step, signal.SIGTERM), evaluate=evaluate)
        train_toy(config, TinyBatches(), evaluate=evaluate)
    assert asked == [(2, "abc"), (4, "acb"), (6, "abc"), (8, "abc")] * 2


def test_an_evaluation_made_up_for_that_is_not_the_best_marks_nothing(tmp_path):
    config = best_config(tmp_path)
    with pytest.raises(Interrupted, match="at step 4"):
        train_toy(config, StopsAt(4, signal.SIGTERM), evaluate=scored([0.9]))
    train_toy(config, TinyBatches(), evaluate=scored([0.5, 0.6, 0.7]))
    assert kept(tmp_path) == [2, 8]


def test_only_evaluations_that_have_the_metric_count(tmp_path, recwarn):
    """Another task is evaluated in every step, the metric's in every third and at the end."""
    other = Retrieval("unused.tar", name="toy-v2")  # its name begins with the other one's
    evals = with_task(every_steps=1, every_steps_of=(("retrieval/toy", 3),))["eval"]
    checkpoint = CheckpointConfig(every_steps=100, keep=1, best_metric="eval/retrieval/toy/score", patience=2)
    config = tiny_config(tmp_path, eval=dataclasses.replace(evals, tasks=(other, *evals.tasks)), checkpoint=checkpoint)
    assert config.eval.cadences == (1, 3)
    scores = {3: 0.5, 6: 0.4, 8: 0.45}

    def evaluate(params, due):
        assert due.tasks == ((0, 1) if due.step in scores else (0,))
        own = {"eval/retrieval/toy/score": scores[due.step]} if 1 in due.tasks else {}
        return {"eval/retrieval/toy-v2/score": 1 - due.step / 10} | own

    train_toy(config, TinyBatches(), evaluate=evaluate)  # patience 2 would end it at step 5 if all evaluations counted
    assert kept(tmp_path) == [3, 8]
    steps = {line["step"] for line in read_metrics(tmp_path) if "eval/retrieval/toy-v2/score" in line}
    assert steps == set(range(1, 9)) and not [one for one in recwarn if "best_metric" in str(one.message)]


@pytest.mark.parametrize(
    "pairs, words",
    [
        ((("retrieval/toi", 3),), "'retrieval/toi', which .* did you mean 'retrieval/toy'"),
        ((("retrieval/toy", -1),), "-1 steps of retrieval/toy must be at least 0"),
        ((("retrieval/toy", 1), ("retrieval/toy", 2)), "names 'retrieval/toy' more than once"),
    ],
)
def test_cadences_of_tasks_that_cannot_be(pairs, words):
    with pytest.raises(ValueError, match=words):
        with_task(every_steps_of=pairs)
