"""All evaluations there are, and how several of them are run.

An evaluation is a frozen dataclass in a file of its own, an `Evaluation`; its fields are its settings. To add one, write that
file and put its name into `Task`: `siglip eval --task`, the config and its flags, config.json and the names of the metrics
follow. It needs

- `data`: shards; `name` of their data set, or None for one taken from the shards;
- `task`: its kind, a Literal of one value, by which config.json tells the classes apart; `BENCHMARK_TASK`, CLIP_benchmark's;
- `EMBEDS_TEXTS = False` where the model needs neither a text tower nor a tokenizer;
- `check(first_values)`: finds what is wrong with the files before a model is run;
- `run(embedder)`: a list of `Result`; called by all processes, with the same result in all of them.
"""

import dataclasses
import logging
import time
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from siglip.errors import UserError
from siglip.evaluation.association import Association
from siglip.evaluation.attentive_probe import AttentiveProbe
from siglip.evaluation.embed import Embedder
from siglip.evaluation.fewshot import FewShot
from siglip.evaluation.groups import Groups
from siglip.evaluation.knn import Knn
from siglip.evaluation.linear_probe import LinearProbe
from siglip.evaluation.results import Result
from siglip.evaluation.retrieval import Retrieval
from siglip.evaluation.robustness import Robustness
from siglip.evaluation.segmentation import Segmentation
from siglip.evaluation.selection import Selection
from siglip.evaluation.verification import Verification
from siglip.evaluation.zeroshot import ZeroShot
from siglip.parallel.collectives import gather_records
from siglip.trees import did_you_mean

logger = logging.getLogger(__name__)

Task = (
    Retrieval | ZeroShot | Knn | FewShot | LinearProbe | AttentiveProbe | Segmentation | Selection | Verification
    | Robustness | Groups | Association
)  # fmt: skip


def task_classes() -> dict[str, type]:
    """{"retrieval": Retrieval, …}: every evaluation by its kind."""
    return {cls.task: cls for cls in typing.get_args(Task)}


def metric_prefix(task: Task, dataset: str) -> str:
    """The beginning of the names of a result's metrics in metrics.jsonl."""
    return f"eval/{task.task}/{dataset}"


def check_names(tasks: Sequence[Task]) -> None:
    """Raises UserError if two evaluations of one kind would write the same metrics."""
    for prefix, count in Counter(metric_prefix(task, task.dataset) for task in tasks).items():
        if count > 1:
            raise UserError(f"{count} evaluations have the metrics {prefix}/…; give each of them a name of its own")


def run_tasks(tasks: Sequence[Task], embedder: Embedder) -> list[Result]:
    """Runs one task after the other; every process gets all results. Raises UserError as the tasks' `run` do."""
    # In a training run a mesh is set: a program for one of its devices would be refused.
    with jax.set_mesh(Mesh(np.empty((), object), ())):
        return [result for task in tasks for result in task.run(embedder.with_image_column(task.image_column))]


# The prefix of all tasks' metrics, for a run that has none of its own.
_CALLERS_OWN = ("eval/",)


class Due(NamedTuple):
    """What is evaluated after a step: indices into the run's tasks, in order; last: no evaluation comes after this one."""

    step: int
    tasks: tuple[int, ...]
    last: bool = False


def run_due(tasks: Sequence[Task], embedder: Embedder, due: Due, *, max_s: float) -> list[Result]:
    """As `run_tasks`, those that are due: at least one, and no further one is begun after `max_s`, unless it is the last time."""
    start, results, left = time.monotonic(), [], list(due.tasks)
    while left:
        results += run_tasks([tasks[left.pop(0)]], embedder)
        # Process 0's clock counts for all.
        if not due.last and gather_records([0 < max_s <= time.monotonic() - start])[0]:
            break
    if left and jax.process_index() == 0:
        told = "eval.max_s=%g is used up: %d evaluations wait for the next time, first %s"
        logger.info(told, max_s, len(left), tasks[left[0]].dataset)
    return results


def named_metrics(results: Sequence[Result]) -> dict[str, float]:
    """The metrics of all results under their names in metrics.jsonl."""
    return {
        f"{metric_prefix(result.task, result.dataset)}/{name}": value
        for result in results
        for name, value in result.metrics.items()
    }


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The evaluations of a training run.

    Attributes:
        tasks: what is evaluated; metrics are called eval/<task>/<name>/<metric>.
        every_steps: steps between evaluations; 0 evaluates at the end only.
        every_steps_of: steps between evaluations of single tasks, by the beginning of their metrics:
            (("zeroshot/imagenet-val", 20000), …); 0 evaluates them at the end only.
        max_s: seconds after which no further task is begun; those left out come first the next time. The first task, when due,
            never waits, and at the end none does. 0: no limit.
        batch_size: images or texts per forward pass, over all devices and hosts.
        threads: threads per process that decode images; 0 takes one per core that the process may use.
        workers: processes per process that decode images; with 0, threads alone do it.
    """

    tasks: tuple[Task, ...] = ()
    every_steps: int = 0
    every_steps_of: tuple[tuple[str, int], ...] = ()
    max_s: float = 0.0
    batch_size: int = 256
    threads: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        for name, least in (("every_steps", 0), ("max_s", 0), ("batch_size", 1), ("threads", 0), ("workers", 0)):
            if getattr(self, name) < least:
                raise UserError(f"eval.{name}={getattr(self, name)} must be at least {least}")
        check_names(self.tasks)
        known = {prefix.removeprefix("eval/") for prefix in self.prefixes}
        names = [name for name, _ in self.every_steps_of]
        for name, steps in self.every_steps_of:
            if names.count(name) > 1:
                raise UserError(f"eval.every_steps_of names {name!r} more than once; name it once")
            if name not in known:
                hint = did_you_mean(name, known) or f"; there are {', '.join(sorted(known)) or 'none'}"
                raise UserError(f"eval.every_steps_of names {name!r}, which is not an evaluation of this run{hint}")
            if steps < 0:
                raise UserError(f"eval.every_steps_of: {steps} steps of {name} must be at least 0")

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The beginning of the names of each task's metrics."""
        return tuple(metric_prefix(task, task.dataset) for task in self.tasks)

    def prefix_of(self, metric: str) -> str | None:
        """The task that a metric is of: one name may begin with another."""
        return max(filter(metric.startswith, self.prefixes or _CALLERS_OWN), key=len, default=None)

    @property
    def cadences(self) -> tuple[int, ...]:
        """Steps between the evaluations of each task; 0 evaluates it at the end only."""
        own = dict(self.every_steps_of)
        return tuple(own.get(prefix.removeprefix("eval/"), self.every_steps) for prefix in self.prefixes)

    def due(self, step: int, evaluated: Mapping[str, int], *, last: bool = False) -> Due:
        """What is evaluated after `step`: the tasks whose turn it is, and before them those that were put off.

        Without tasks, what a caller of `train` evaluates counts as one.
        The first task, when due, never waits: that of `checkpoint.best_metric` belongs there.

        Args:
            evaluated: {prefix: the step after which the task was evaluated for the last time}.
            last: the run ends here: all tasks are due that were not evaluated after this step.
        """
        before = [evaluated.get(prefix, 0) for prefix in self.prefixes or _CALLERS_OWN]
        cadences = self.cadences or (self.every_steps,)
        if last:
            return Due(step, tuple(n for n, done in enumerate(before) if done != step), last)
        turns = {n: (before[n] // every + 1) * every for n, every in enumerate(cadences) if every}
        if all(step % cadences[n] for n in turns):
            return Due(step, ())
        return Due(step, tuple(sorted((n for n in turns if turns[n] <= step), key=lambda n: (n > 0, turns[n], n))))
