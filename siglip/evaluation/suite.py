"""All evaluations there are, and how several of them are run.

An evaluation is a frozen dataclass in a file of its own. Its fields are its settings; besides `data`, `name` and its kind,

    task: Literal["retrieval"] = "retrieval"

it has `BENCHMARK_TASK` (CLIP_benchmark's word for it), `dataset` (the name of its data set), `check(first_values)`, which finds
what is wrong before a model is run, and `run(embedder)`, which returns results. To add one, write that file and put its name
into `Task`: `siglip eval --task`, the config and its flags, config.json and the metrics' names follow.
"""

import typing
from collections import Counter
from collections.abc import Sequence

from siglip.errors import UserError
from siglip.evaluation.embed import Embedder
from siglip.evaluation.results import Result
from siglip.evaluation.retrieval import Retrieval
from siglip.evaluation.zeroshot import ZeroShot

Task = Retrieval | ZeroShot


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
    """Runs one task after the other; every process gets all results.

    Raises:
        UserError: as the tasks' `run`.
    """
    return [result for task in tasks for result in task.run(embedder)]
