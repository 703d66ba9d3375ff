"""What an evaluation returns, the name of the data set in it, and CLIP_benchmark's JSON."""

import math
import re
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from siglip.errors import UserError

_PATTERN_OR_ENDING = re.compile(r"[.*?#\[{]")
_SHARD_NUMBER = re.compile(r"((^|[-_])(0\d*|\d{5,}))?[-_]*$")


class Result(NamedTuple):
    """The metrics of one data set.

    Attributes:
        task: the evaluation that was run: an instance of one of `suite.Task`.
        dataset: name of the data set; with the language or the field at its end when there are several.
        language: such as "de"; "mean" for the mean over several; "" where there is none.
        metrics: under CLIP_benchmark's names.
    """

    task: Any
    dataset: str
    language: str
    metrics: dict[str, float]

    def to_clip_benchmark(self, model: str) -> dict[str, Any]:
        """The keys of CLIP_benchmark's result files."""
        return {
            "dataset": self.dataset,
            "model": model,
            "pretrained": "",
            "task": self.task.BENCHMARK_TASK,
            "language": self.language,
            "metrics": {name: v if math.isfinite(v) else None for name, v in self.metrics.items()},  # JSON has no NaN
        }


def dataset_name(name: str | None, data: str) -> str:
    """`name`, or without one that of the shards.

    "sets/coco-test-{000..009}.tar" -> "coco-test", "sets/cifar10/00000.tar" -> "cifar10"
    """
    if name is not None:
        return name
    parts = reversed(PurePosixPath(data).parts)
    names = (_SHARD_NUMBER.sub("", _PATTERN_OR_ENDING.split(part)[0]) for part in parts)
    return next((found for found in names if re.search(r"[^\W\d_]", found)), "data")


def check_name(name: str | None) -> None:
    """Raises UserError for a name that cannot be part of a metric's name."""
    if name is not None and (not name or "/" in name):
        raise UserError(f"evaluation name {name!r} must be non-empty and without '/'; None takes it from the shards")
