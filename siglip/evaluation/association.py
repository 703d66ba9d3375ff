"""Which images go with a cue, WinoGAViL (arXiv:2207.12576): the k nearest to "A {cue}" or "An {cue}".

    jaccard = |chosen and right| / |chosen or right|,  k = number of right ones

as DataComp scores it, whose number is `jaccard_10-12`: over the instances of 10 to 12 candidates.
"""

import ast
import collections
import csv
import dataclasses
import io
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import numpy as np

from siglip.array_types import Bool, Float
from siglip.errors import UserError
from siglip.evaluation.class_files import canonicalize, load_json
from siglip.evaluation.embed import Embedder, FirstValues
from siglip.evaluation.metrics import with_error
from siglip.evaluation.results import Evaluation, Result
from siglip.trees import regular

logger = logging.getLogger(__name__)

_GROUPS = ((5, 6), (10, 12))


class Instance(NamedTuple):
    """A cue, the names of the images to choose from, and those of the right ones."""

    cue: str
    candidates: list[str]
    associations: list[str]


@dataclasses.dataclass(frozen=True)
class Association(Evaluation):
    """Which images people associate with a cue, among a few: Jaccard index

    Attributes:
        data: the images, as for training; an image's name is its key, of a file its name without folder and ending.
        instances: CSV with a header, JSON list or JSON Lines with `cue`, `candidates` and `associations`, two lists of names.
        canonical: whether prompts lose punctuation, underscores and capitals; None does what the model's own pipeline does.
        name: name of the data set in the result; without one it is taken from the names of the shards.
        task: the kind of evaluation.
    """

    data: str
    instances: str
    canonical: bool | None = None
    name: str | None = None
    task: Literal["association"] = "association"

    BENCHMARK_TASK: ClassVar[str] = "image_association"

    def check(self, first_values: FirstValues) -> None:
        """Raises FileNotFoundError or UserError for what would fail later."""
        read_instances(self.instances)
        first_values(self.data, ())

    def run(self, embedder: Embedder) -> list[Result]:
        """One result. Raises UserError: no instance has all its images, or nothing can be decoded."""
        instances, images = read_instances(self.instances), embedder.embed_shards(self.data, ())
        row_of = self._rows(images.keys, {name for own in instances for name in own.candidates})
        whole = [own for own in instances if all(name in row_of for name in own.candidates)]
        if not whole:
            missing = next(name for own in instances for name in own.candidates if name not in row_of)
            raise UserError(
                f"no instance of {self.instances} has all its images in {self.data}, such as {missing!r}; their names must be "
                f"keys, such as {images.keys[0]!r}"
            )
        if len(whole) < len(instances) and jax.process_index() == 0:
            told = "%d of %d instances of %s left out because an image is missing"
            logger.warning(told, len(instances) - len(whole), len(instances), self.instances)
        canonical = embedder.canonical_prompts if self.canonical is None else self.canonical
        prompts = [prompt(own.cue) for own in whole]
        ztxt = embedder.embed_texts([canonicalize(text) if canonical else text for text in prompts])
        scores = [
            images.zimg[[row_of[name] for name in own.candidates]] @ z for own, z in zip(whole, ztxt, strict=True)
        ]
        right = [np.isin(own.candidates, own.associations) for own in whole]
        return [Result(self, self.dataset, "", association(scores, right))]

    def _rows(self, keys: Sequence[str], names: set[str]) -> dict[str, int]:
        """The image of each name: of its key, or of a file of this name in any folder. Raises UserError: two files have it."""
        rows = {key: row for row, key in enumerate(keys)}
        stems, whole = collections.Counter(Path(key).stem for key in keys), collections.Counter(keys)
        counts = {name: whole[name] or stems[name] for name in names}
        twice = next((name for name in sorted(names) if counts[name] > 1), None)
        if twice is not None:
            raise UserError(f"{counts[twice]} images of {self.data} are called {twice!r}; give each a name of its own")
        return {Path(key).stem: row for key, row in rows.items()} | rows


def prompt(cue: str) -> str:
    """The cue with its article."""
    return f"{'An' if cue.lstrip()[0].lower() in 'aeiou' else 'A'} {cue}"


def association(scores: Sequence[Float[np.ndarray, " _"]], right: Sequence[Bool[np.ndarray, " _"]]) -> dict[str, float]:
    """{"jaccard", "jaccard_5-6", "jaccard_10-12", "tied_fraction"}, the groups where they have instances.

    Args:
        scores: of each instance's candidates; of equal scores the first is chosen. right: which of them are.

    Raises:
        UserError: a score is not finite.
    """
    if not all(np.isfinite(own).all() for own in scores):
        raise UserError("some embeddings are not finite; the model has diverged or its file is damaged")
    found, tied, chance = [], [], []
    for own, expected in zip(scores, right, strict=True):
        order, count = np.argsort(-own, kind="stable"), int(expected.sum())
        hits = int(expected[order[:count]].sum())
        found.append(hits / (2 * count - hits))
        chance.append(_jaccard_of_chance(len(own), count))
        tied.append(count < len(own) and own[order[count - 1]] == own[order[count]])
    sizes = np.asarray([len(own) for own in scores])
    groups = {"jaccard": sizes > 0} | {
        f"jaccard_{low}-{high}": (low <= sizes) & (sizes <= high) for low, high in _GROUPS
    }
    metrics = {"tied_fraction": float(np.mean(tied))}
    for name, inside in groups.items():
        if inside.any():
            metrics |= with_error(name, np.asarray(found)[inside], chance=float(np.mean(np.asarray(chance)[inside])))
    return metrics


def _jaccard_of_chance(candidates: int, right: int) -> float:
    """What `right` of the candidates, drawn at random, get on average."""
    ways = [math.comb(right, hits) * math.comb(candidates - right, right - hits) for hits in range(right + 1)]
    return sum(n * hits / (2 * right - hits) for hits, n in enumerate(ways)) / math.comb(candidates, right)


def read_instances(path: str) -> list[Instance]:
    """The instances of a file.

    Raises:
        FileNotFoundError, UserError: there is no file, or a row lacks something.
    """
    file = regular(Path(path))
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() == ".csv":
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
        elif text.lstrip().startswith("["):
            rows = load_json(text)
        else:
            rows = [load_json(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"{path} is neither CSV nor JSON in UTF-8 ({error})") from None
    instances = [_instance(path, number, row) for number, row in enumerate(rows, 1)]
    if not instances:
        raise UserError(f"{path} holds no instances")
    return instances


def _instance(path: str, number: int, row: Any) -> Instance:
    row = row if isinstance(row, dict) else {}
    cue, lists = row.get("cue"), [_names(row.get(name)) for name in ("candidates", "associations")]
    if not isinstance(cue, str) or not cue.strip() or not all(lists) or not set(lists[1]) <= set(lists[0]):
        raise UserError(
            f"row {number} of {path} must have a text `cue` and two lists of names: `candidates`, and `associations`, "
            "those of them that are right"
        )
    if len(set(lists[0])) < len(lists[0]):
        raise UserError(f"row {number} of {path} has a candidate twice; each counts once")
    return Instance(cue, *lists)


def _names(value: Any) -> list[str]:
    """A list of texts; in CSV it is written as in JSON or Python. Empty if it is none."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return []
    return value if isinstance(value, list) and all(isinstance(name, str) for name in value) else []
