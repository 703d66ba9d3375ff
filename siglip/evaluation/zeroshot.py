"""Zero-shot classification: a class is the mean of its prompts' normalised embeddings, normalised again.

    w_k = normalise(mean_m normalise(text(template_m(class_k))));    prediction = argmax_k  zimg . w_k

Prompts are canonicalised first, as big_vision's evaluator does for SigLIP: "_" becomes a space, punctuation goes, everything is
lower case. Without it published models lose up to 12 points on class names with underscores. A model whose own pipeline does
nothing of the kind (TokenConfig.canonical) gets its prompts as they are written.
"""

import dataclasses
import json
import logging
import math
import re
import string
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import numpy as np

from siglip.array_types import Float, Int
from siglip.errors import UserError
from siglip.evaluation.embed import EmbeddedImages, Embedder, FirstValues
from siglip.evaluation.ranking import rank_right_candidates
from siglip.evaluation.results import Result, check_name, dataset_name
from siglip.trees import did_you_mean

logger = logging.getLogger(__name__)

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LAMBDA = re.compile(r"\blambda\s+\w+\s*:")
_JSON = re.compile(r"\s*(\[|\{(?!c?\}))")  # a template may begin with {} or {c}
_SHOWN_NAMES = 5
_SHOWN_CHARS, _MAX_DIGITS = 80, 18


class Classes(NamedTuple):
    """The classes of a data set, by their numbers."""

    names: list[str]


@dataclasses.dataclass(frozen=True)
class ZeroShot:
    """Zero-shot classification: acc1, acc5, mean recall per class.

    Attributes:
        data: shards, as for training: tar files as img2dataset writes them, Parquet, ArrayRecord, TFRecord, lists.
        classes: file of class names, one per line or a JSON list; labels are numbers of its lines from 0, or names in it.
        templates: file of prompts with {} for the class name, one per line or a JSON list, or a JSON object with prompts for
            each class name; without one the prompt is the class name itself.
        label: field that holds the label.
        canonical: whether prompts lose punctuation, underscores and capitals; None does what the model's own pipeline does.
        name: name of the data set in the result; without one it is taken from the names of the shards.
        task: the kind of evaluation.
    """

    data: str
    classes: str
    templates: str | None = None
    label: str = "cls"
    canonical: bool | None = None
    name: str | None = None
    task: Literal["zeroshot"] = "zeroshot"

    BENCHMARK_TASK: ClassVar[str] = "zeroshot_classification"

    def __post_init__(self) -> None:
        check_name(self.name)

    @property
    def dataset(self) -> str:
        """Name of the data set in the result."""
        return dataset_name(self.name, self.data)

    def check(self, first_values: FirstValues) -> None:
        """Opens every file and looks for the label of the first pair.

        Raises:
            FileNotFoundError, UserError: for what would fail later.
        """
        names = read_names(self.classes)
        make_prompts(names, read_templates(self.templates))
        labels = first_values(self.data, (self.label,))[self.label]
        if self._number(labels, "the first pair", dict.fromkeys(names, 0)) is None:
            raise UserError(
                f"the first pair of {self.data} has no field {self.label!r}; name the field of the labels with --label"
            )

    def run(self, embedder: Embedder) -> list[Result]:
        """One result.

        Raises:
            UserError: a label is not a class, no image has one, or nothing can be decoded.
        """
        classes, weights, texts = self.class_weights(embedder)
        images = embedder.embed_shards(self.data, (self.label,))
        rows, labels = self.labels_of(images, classes)
        return [Result(self, self.dataset, "", classification(images.zimg[rows], weights, labels, texts=texts))]

    def class_weights(self, embedder: Embedder) -> tuple[Classes, Float[np.ndarray, "k e"], list[tuple[str, ...]]]:
        """The classes, their vectors, and the prompts of each."""
        names = read_names(self.classes)
        canonical = embedder.canonical_prompts if self.canonical is None else self.canonical
        prompts = make_prompts(names, read_templates(self.templates), canonical=canonical)
        # Classes of one name have the same prompts: a tie between them is none that the encoder could avoid.
        return Classes(names), class_embeddings(embedder.embed_texts, prompts), [tuple(own) for own in prompts]

    def labels_of(
        self, images: EmbeddedImages, classes: Classes
    ) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """(rows of the images that have a label, their classes)."""
        index = {name: classes.names.index(name) for name in classes.names}
        pairs = zip(images.keys, images.values[self.label], strict=True)
        numbers = [self._number(values, f"image {key}", index) for key, values in pairs]
        labelled = np.asarray([number is not None for number in numbers])
        if not labelled.all() and jax.process_index() == 0:
            example = images.keys[labelled.argmin()]
            told = "%d images of %s left out because they have no label %r, such as %s"
            logger.warning(told, (~labelled).sum(), self.data, self.label, example)
        return np.flatnonzero(labelled), np.asarray([number for number in numbers if number is not None], int)

    def _number(self, values: Sequence[Any], pair: str, index: Mapping[str, int]) -> int | None:
        """The class of a pair; None if it has no label, or a number that no list of classes reaches."""
        label = values[0] if len(values) == 1 else values
        if not values or (isinstance(label, float) and not math.isfinite(label)):
            return None
        if isinstance(label, str) and label in index:
            return index[label]
        if isinstance(label, str) and label.isdecimal():
            return int(label) if len(label) <= _MAX_DIGITS else None
        if isinstance(label, int) or (isinstance(label, float) and label.is_integer()):  # a number column with gaps
            return int(label) if abs(label) < 10**_MAX_DIGITS else None
        label = str(label)[:_SHOWN_CHARS]
        names = ", ".join(list(index)[:_SHOWN_NAMES]) + (", …" if len(index) > _SHOWN_NAMES else "")
        raise UserError(
            f"{pair} of {self.data} has {self.label}={label!r}, which is neither a number nor a name in {self.classes} ({names})"
            f"{did_you_mean(str(label), index)}; names must match exactly: correct the file, or name another field with --label"
        )


def read_names(path: str) -> list[str]:
    """Class names: one per line, a JSON list, or a JSON object {"0": name, …} with the numbers of the classes.

    Raises:
        FileNotFoundError, UserError: there is no file, or it holds no names.
    """
    names = _read_lines_or_json(path)
    if isinstance(names, Mapping):
        if set(names) != {str(k) for k in range(len(names))}:
            raise UserError(f'{path}: a JSON object of class names must have the keys "0" to "{len(names) - 1}"')
        names = [names[str(k)] for k in range(len(names))]
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} holds no class names; write one name per line, or a JSON list of strings")
    return [_encodable(name) for name in names]


def read_templates(path: str | None) -> Sequence[str] | Mapping[str, Sequence[str]]:
    """Prompts for every class: one per line or a JSON list; or for each class its own, a JSON object (CuPL).

    Raises:
        FileNotFoundError, UserError: there is no file, or it holds no templates.
    """
    if path is None:
        return ["{}"]
    templates = _read_lines_or_json(path)
    if isinstance(templates, Mapping) and all(isinstance(value, Mapping) for value in templates.values()):
        if len(templates) != 1:  # CLIP_benchmark's files have the data set's name on top
            raise UserError(f"{path} holds templates of {len(templates)} data sets: {', '.join(templates)}; keep one")
        (templates,) = templates.values()
    lists = list(templates.values()) if isinstance(templates, Mapping) else [templates]
    prompts = [prompt for own in lists if isinstance(own, list) for prompt in own]
    if not prompts or not all(isinstance(own, list) for own in lists) or not all(isinstance(p, str) for p in prompts):
        raise UserError(f"{path} holds no templates; write one per line, such as 'a photo of a {{}}', or a JSON list")
    code = next((prompt for prompt in prompts if _LAMBDA.search(prompt)), None)
    if code is not None:
        raise UserError(f"{path}: {code!r} is Python code; write the template alone, such as 'a photo of a {{}}'")
    return templates


def _read_lines_or_json(path: str) -> Any:
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); write one entry per line, or JSON") from None
    if "\0" in content:
        raise UserError(f"{path} is not text; write one entry per line, or JSON")
    if not _JSON.match(content):
        return [line.strip() for line in content.splitlines() if line.strip()]
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} starts like JSON but is not ({error}); write one entry per line, or JSON") from None


def canonicalize(text: str) -> str:
    """ "Polar_Bear!" -> "polar bear"."""
    return " ".join(_encodable(text).replace("_", " ").translate(_PUNCTUATION).lower().split())


def _encodable(text: str) -> str:
    """A text of a JSON file without half an emoji ("\\ud83d"), which cannot be tokenized."""
    return text.encode("utf-8", "ignore").decode()


def make_prompts(
    classnames: Sequence[str], templates: Sequence[str] | Mapping[str, Sequence[str]], *, canonical: bool = True
) -> list[list[str]]:
    """The prompts of each class; "{}" in a template (or "{c}", as CLIP_benchmark writes) is the class name.

    Raises:
        UserError: a template for all classes has no {}, or a class has no prompts of its own.
    """
    if isinstance(templates, Mapping):
        missing = next((name for name in classnames if not templates.get(name)), None)
        if missing is not None:
            raise UserError(f"the templates have no prompts for class {missing!r}{did_you_mean(missing, templates)}")
    else:
        for template in templates:
            if "{}" not in template and "{c}" not in template:
                raise UserError(f"template {template!r} has no {{}} for the class name")
        templates = dict.fromkeys(classnames, templates)
    finish = canonicalize if canonical else str
    return [
        [finish(template.replace("{c}", "{}").replace("{}", name)) for template in templates[name]]
        for name in classnames
    ]


def class_embeddings(
    embed_texts: Callable[[list[str]], Float[np.ndarray, "m e"]], prompts: Sequence[Sequence[str]]
) -> Float[np.ndarray, "k e"]:
    """One unit vector per class; all prompts of all classes go through `embed_texts` together."""
    z = _normalise(embed_texts([prompt for own in prompts for prompt in own]))
    ends = np.cumsum([len(own) for own in prompts])
    return _normalise(np.stack([own.mean(axis=0) for own in np.split(z, ends[:-1])]))


def classification(
    zimg: Float[np.ndarray, "n e"],
    classes: Float[np.ndarray, "k e"],
    labels: Int[np.ndarray, " n"],
    *,
    texts: Sequence[Hashable] | None = None,
) -> dict[str, float]:
    """{"acc1", "acc5" (for 5 classes or more), "mean_per_class_recall", "tied_fraction"} of n images.

    Args:
        texts: of the classes; those of equal text are not counted as tied. None: all differ.

    Raises:
        UserError: if a label is not one of the k classes, there is no image, or an embedding is not finite.
    """
    if len(zimg) == 0:
        raise UserError("zero-shot classification needs at least one image, got none")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise UserError(f"labels reach from {labels.min()} to {labels.max()}, but there are {len(classes)} classes")
    ranks, tied = rank_right_candidates(zimg, classes, labels, np.arange(len(classes)), texts=texts)
    top1 = ranks == 1
    metrics = {
        "acc1": float(np.mean(top1)),
        "mean_per_class_recall": float(np.mean([np.mean(top1[labels == k]) for k in np.unique(labels)])),
    }
    acc5 = {"acc5": float(np.mean(ranks <= 5))} if len(classes) >= 5 else {}
    return metrics | acc5 | {"tied_fraction": float(np.mean(tied))}


def _normalise(z: Float[np.ndarray, "... e"]) -> Float[np.ndarray, "... e"]:
    return z / (np.linalg.norm(z, axis=-1, keepdims=True) + 1e-8)
