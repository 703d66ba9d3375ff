"""What an evaluation returns, the name of the data set in it, and CLIP_benchmark's JSON."""

import dataclasses
import math
import re
from pathlib import PurePosixPath
from typing import Any, ClassVar, NamedTuple

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


@dataclasses.dataclass(frozen=True)
class _Columns:
    """The columns of an evaluation's data that no metric depends on.

    Attributes:
        image_column: the column that holds the image; without one it is found.
    """

    image_column: str | None = dataclasses.field(default=None, kw_only=True)


class Evaluation(_Columns):
    """What all evaluations have; each is a frozen dataclass with `data` and `name` among its fields (see suite.py)."""

    data: str
    name: str | None
    BENCHMARK_TASK: ClassVar[str]
    EMBEDS_TEXTS: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.name is not None and (not self.name or "/" in self.name):
            raise UserError(
                f"evaluation name {self.name!r} must be non-empty and without '/'; None takes it from the shards"
            )

    @property
    def dataset(self) -> str:
        """Name of the data set in the result."""
        return self.name or dataset_name(self.data)


def dataset_name(data: str) -> str:
    """The name of the data set that some shards are of.

    "sets/coco-test-{000..009}.tar" -> "coco-test", "sets/cifar10/00000.tar" -> "cifar10"
    """
    parts = reversed(PurePosixPath(data).parts)
    names = (_SHARD_NUMBER.sub("", _PATTERN_OR_ENDING.split(part)[0]) for part in parts)
    return next((found for found in names if re.search(r"[^\W\d_]", found)), "data")
