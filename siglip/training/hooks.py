"""What happens beside the training step itself: checking losses, logging, evaluating, saving.

Every process calls the same methods in the same order. Process 0 writes; what only one of them knows is gathered first
(siglip/parallel/collectives.py).

The trap: a method that gathers must be called by all processes or by none: never inside a branch that only one may take.
"""

import functools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax

from siglip.errors import BAD_PATH, RunFailed, UserError
from siglip.evaluation.suite import Due
from siglip.parallel.collectives import gather_records
from siglip.parallel.launch import in_all_or_none, wait_for_all
from siglip.training import flops
from siglip.training.config import TrainConfig, to_json
from siglip.training.divergence import LossMonitor
from siglip.training.lengths import length_shares
from siglip.training.signals import Interrupted, WaitedTooLong
from siglip.training.step import TrainState
from siglip.workdir.checkpoint import Checkpointer
from siglip.workdir.metrics import PROFILE_FOLDER, MetricsWriter, Progress, Throughput, read_metrics

# How long a process whose evaluation failed waits for the others: they may be in a collective that never ends.
_AFTER_FAILURE_S = 10
_EVALUATION_S = 86400  # how long the others wait for the slowest one

# Called with the parameters and what is due; returns {"eval/<task>/<name>/<metric>": value} of the tasks that were evaluated.
Evaluate = Callable[[Mapping[str, Any], Due], Mapping[str, float]]


@runtime_checkable
class Batches(Protocol):
    """What the loop needs of a data pipeline; data_pipelines.loader.Loader is one.

    `counts` are the substitutions so far, by reason; they are part of `state`, where each process counts its own. `progress` is
    what all processes together have seen, for metrics.jsonl: {"source_0/epochs": 1.5, …}.
    """

    counts: Mapping[str, int]

    def __next__(self) -> Mapping[str, Any]: ...
    def state(self) -> dict[str, Any]: ...
    def progress(self) -> Mapping[str, float]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class RunHooks:
    """What happens beside the step itself: checking losses, logging, evaluating, saving."""

    def __init__(
        self,
        config: TrainConfig,
        batches: Batches,
        checkpointer: Checkpointer,
        evaluate: Evaluate | None,
        start_step: int,
        *,
        passes: flops.Passes = (3, 3),
    ) -> None:
        self._config, self._batches, self._checkpointer = config, batches, checkpointer
        self._evaluate, self._workdir = evaluate, (workdir := Path(config.workdir))
        first = jax.process_index() == 0
        options = {"run_config": to_json(config), "start_step": start_step, "enabled": first}
        self._writer = in_all_or_none(lambda: MetricsWriter(workdir, config.log, **options), bad_input=BAD_PATH)
        self._progress = Progress(config.total_steps, start_step=start_step, enabled=config.log.progress and first)
        self._losses = LossMonitor(workdir, saved_step=checkpointer.latest_step)
        self._first_step = start_step + 1
        self._best = gather_records([checkpointer.best_value()])[0]
        told = in_all_or_none(
            lambda: self._evaluations_before() if first and evaluate is not None else ({}, 0),
            bad_input=(UserError, *BAD_PATH),
        )
        self._evaluated, self._without_best = gather_records([told])[0]
        options = {"batch_size": config.batch_size, "passes": passes, "shares": length_shares(config)}
        peak = flops.peak_pairs_per_s(config.model, **options)
        self.throughput = Throughput(config.batch_size, peak_pairs_per_s=peak)
        self._tracing = False

    def after_step(
        self, step: int, state: TrainState, metrics: Mapping[str, jax.Array], keys: list[str], *, stop: bool
    ) -> None:
        """Everything that is due after `step`; `stop`: save now, there will be no other step."""
        config, last = self._config, step == self._config.total_steps
        self._losses.add(step, metrics, keys)
        if step == self._first_step:
            jax.block_until_ready(metrics)
            self._progress.begin(step)
            self.throughput.restart()  # it compiled
        else:
            self.throughput.step()
        self._trace(step - self._first_step, metrics)
        due = None if stop else self._due(step)
        save_due = last or stop or _due(step, config.checkpoint.every_steps)
        if last or stop or _due(step, config.log.every_steps):
            self._log(step)
        elif due or save_due:
            self._losses.check()
        best = self._run_evaluation(state, due) if due else None
        if self.out_of_patience and not last and (rest := self._due(step)):  # the run ends here, as at its last step
            self._run_evaluation(state, rest)
        if save_due or best is not None or self.out_of_patience:
            self.save(step, state, best=best)

    @property
    def out_of_patience(self) -> bool:
        """Whether `checkpoint.patience` evaluations in a row were no new best."""
        return 0 < self._config.checkpoint.patience <= self._without_best

    def _evaluations_before(self) -> tuple[dict[str, int], int]:
        """As metrics.jsonl has them: each task's newest one, by its step; and how many had `best_metric` since it was best."""
        name, since, best, evaluated = self._config.checkpoint.best_metric, 0, -math.inf, {}
        prefix_of = functools.cache(self._config.eval.prefix_of)
        for line in read_metrics(self._workdir):
            evaluated |= dict.fromkeys(filter(None, map(prefix_of, line)), line["step"])
            if name in line:
                value = -math.inf if line[name] is None else line[name]  # None stands for one that is not finite
                since, best = (0, value) if value > best else (since + 1, best)
        return evaluated, since

    def _trace(self, done: int, metrics: Mapping[str, jax.Array]) -> None:
        """Begins a trace after the second step of this start, when all is compiled, and ends it `log.profile_steps` later."""
        steps = self._config.log.profile_steps
        if not steps or jax.process_index() > 0 or done not in (1, 1 + steps):
            return
        jax.block_until_ready(metrics)
        if done == 1:
            jax.profiler.start_trace(self._workdir / PROFILE_FOLDER)
        elif self._tracing:
            jax.profiler.stop_trace()
        self._tracing = done == 1

    def run_missed_evaluation(self, step: int, state: TrainState) -> None:
        """Evaluates the restored state when that was due but the run was stopped before; it may be the best one so far."""
        due = self._due(step)
        if due and (due.last or step not in self._evaluated.values()):
            self._run_evaluation(state, due, saved=True)

    def save(self, step: int, state: TrainState, *, best: float | None = None) -> None:
        """Starts a checkpoint of `step`, unless there is one; raises NonFiniteLoss instead of saving a bad state."""
        self._losses.check()
        states = gather_records([self._batches.state()])
        counts = sum((Counter(state.get("counts")) for state in states), Counter())
        data_state = states[0] | ({"counts": dict(counts)} if "counts" in states[0] else {})
        self._checkpointer.save(step, state, data_state=data_state, config=to_json(self._config), best_metric=best)
        self.throughput.restart()

    def close(self, *, together: bool) -> None:
        """Lets the last checkpoint finish, unless other processes would have to help and may not: `together` False."""
        try:
            if together:
                self._checkpointer.close()
                gather_records([])  # nobody leaves while another one still writes
        finally:
            if self._tracing:  # the run ended before its last step to be traced
                jax.profiler.stop_trace()
            self._progress.close()
            self._writer.close()
            self._batches.close()

    def _due(self, step: int) -> Due | None:
        last = step == self._config.total_steps or self.out_of_patience
        due = self._config.eval.due(step, self._evaluated, last=last)
        return due if due.tasks and self._evaluate is not None else None

    def _log(self, step: int) -> None:
        values = self._losses.check() | self.throughput.read()
        own = {"counts": dict(self._batches.counts), "data_wait": values.get("train/data_wait", 0.0)}
        everyones = gather_records([own])
        counts = sum((Counter(one["counts"]) for one in everyones), Counter())
        values |= {f"train/substituted/{reason}": n for reason, n in sorted(counts.items())}
        values |= {f"data/{name}": value for name, value in self._batches.progress().items()}
        if "train/data_wait" in values:
            values["train/data_wait"] = max(one["data_wait"] for one in everyones)  # all wait for the slowest
        self._writer.write(step, values)
        self._progress.update(step, values)

    def _run_evaluation(self, state: TrainState, due: Due, *, saved: bool = False) -> float | None:
        """Writes the metrics; the value of `checkpoint.best_metric` if it is a new best, else None.

        Args:
            saved: whether there is a checkpoint of this step, which is then marked if it is the best.
        """
        results = self._evaluate_everywhere(state, due)
        self._evaluated |= dict.fromkeys(filter(None, map(self._config.eval.prefix_of, results)), due.step)
        best = self._new_best(results)
        if saved and best is not None:
            self._checkpointer.mark_best(due.step, best)
        self._writer.write(due.step, results)
        self.throughput.restart()
        return best

    def _new_best(self, results: Mapping[str, float]) -> float | None:
        name, prefix_of = self._config.checkpoint.best_metric, self._config.eval.prefix_of
        if name is not None and name not in results and prefix_of(name) in map(prefix_of, results):
            warnings.warn(
                f"checkpoint.best_metric={name!r} was not evaluated; there are {sorted(results)}", stacklevel=2
            )
        if name not in results:
            return None
        if not results[name] > self._best:
            self._without_best += 1
            return None
        self._best, self._without_best = results[name], 0
        return self._best

    def _evaluate_everywhere(self, state: TrainState, due: Due) -> dict[str, float]:
        """Process 0's results, which all go by; what was trained outlives an evaluation that fails."""
        assert self._evaluate is not None
        results, failure, step = {}, None, due.step
        try:
            results = dict(self._evaluate(state.eval_params, due))
        except WaitedTooLong as waited:
            self.save(step, state)
            raise Interrupted(waited.signum, step, self._workdir) from None
        except BaseException as error:
            failure = error
        # Nothing is gathered before all have left the evaluation: this process's collective would meet another one of theirs.
        timeout_s = _EVALUATION_S if failure is None else _AFTER_FAILURE_S
        if not wait_for_all(f"after the evaluation of step {step}", timeout_s=timeout_s):
            raise failure or RunFailed("the evaluation failed in another process; its output says why")
        everyones = gather_records([{"results": results, "failure": None if failure is None else str(failure)}])
        failures = [f"process {i}: {one['failure']}" for i, one in enumerate(everyones) if one["failure"] is not None]
        if failures:
            self.save(step, state)
            self._checkpointer.wait()  # the last thing that the processes do together
            raise failure or RunFailed(f"the evaluation failed in {failures[0]}")
        return everyones[0]["results"]


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
