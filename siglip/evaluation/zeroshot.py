"""Zero-shot classification: a class is the mean of its prompts' normalised embeddings, normalised again.

    w_k = normalise(mean_m normalise(text(template_m(class_k))));    prediction = argmax_k  zimg . w_k

Images with several labels each are not predicted but ranked: mean average precision over the classes.
"""

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import numpy as np

from siglip.array_types import Bool, Float, Int
from siglip.errors import UserError
from siglip.evaluation.class_files import Classes, make_prompts, read_classes, read_templates, shown
from siglip.evaluation.embed import EmbeddedImages, Embedder, FirstValues
from siglip.evaluation.labels import are_multi_label, multi_hot, number_of, read_label_map, read_subset
from siglip.evaluation.metrics import accuracies, jackknife_error, mean_average_precision, mean_recall
from siglip.evaluation.ranking import Ranks, rank_right_candidates
from siglip.evaluation.results import Evaluation, Result
from siglip.trees import did_you_mean

logger = logging.getLogger(__name__)

_SHOWN_NAMES = 5
_SHOWN_CHARS = 80


@dataclasses.dataclass(frozen=True)
class ZeroShot(Evaluation):
    """Zero-shot classification: acc1, acc5, mean recall per class; of images with several labels, mean average precision.

    Attributes:
        data: shards, as for training: tar files as img2dataset writes them, Parquet, ArrayRecord, TFRecord, lists.
        classes: file of class names, one per line or JSON, or "imagenet" for CLIP's; labels are numbers of its lines from 0, or
            names in it. Without one the names are those that the data bring.
        templates: file of prompts with {} for the class name, one per line or a JSON list, or a JSON object with prompts for
            each class name, or "imagenet" for CLIP's 80; without one those that the data bring, or the class name itself.
        label: field that holds the label; a list of labels, or a zero or one for each class, where images show several.
        subset: file of the classes that take part, a name, an id or a number on each line: ImageNet-A, -R and -O have 200 of
            ImageNet's. Images of other classes are left out.
        label_map: JSON object {label in the data: class}, or ObjectNet's folder of mappings; what it lacks is left out.
        canonical: whether prompts lose punctuation, underscores and capitals; None does what the model's own pipeline does.
        name: name of the data set in the result; without one it is taken from the names of the shards.
        task: the kind of evaluation.
    """

    data: str
    classes: str | None = None
    templates: str | None = None
    label: str = "cls"
    subset: str | None = None
    label_map: str | None = None
    canonical: bool | None = None
    name: str | None = None
    task: Literal["zeroshot"] = "zeroshot"

    BENCHMARK_TASK: ClassVar[str] = "zeroshot_classification"

    def check(self, first_values: FirstValues) -> None:
        """Opens every file and looks for the label of the first pair.

        Raises:
            FileNotFoundError, UserError: for what would fail later.
        """
        classes = read_classes(self.classes)
        make_prompts(classes.names, read_templates(self.templates))
        if self.subset is not None:
            read_subset(self.subset, classes.numbers(), len(classes.names))
        labels = first_values(self.data, (self.label,))[self.label]
        if are_multi_label([labels]):
            multi_hot([labels], classes.numbers(), len(classes.names), pairs=[f"the first pair of {self.data}"])
            return
        outside, (labels,) = self._mapped([labels])
        if not outside:
            self._number(labels, "the first pair", classes.numbers())

    def run(self, embedder: Embedder) -> list[Result]:
        """One result.

        Raises:
            UserError: a label is not a class, no image has one, or nothing can be decoded.
        """
        classes, weights, texts = self.class_weights(embedder)
        images = embedder.embed_shards(self.data, (self.label,))
        return [Result(self, self.dataset, "", self.score(images, classes, weights, texts))]

    def _name_equal_classes(self, names: Sequence[str], prompts: Sequence[Sequence[str]], embedder: Embedder) -> None:
        """Says which classes the text tower cannot tell apart, and what that costs. Raises UserError: it can tell none."""
        tokens = embedder.tokenize([own[0] for own in prompts])
        starts = [row.tobytes() for row in tokens]
        counts, first = Counter(starts), {}
        keys = [
            embedder.tokenize(own).tobytes() if counts[start] > 1 else start
            for own, start in zip(prompts, starts, strict=True)
        ]
        pairs = [(first.setdefault(key, number), number) for number, key in enumerate(keys)]
        later = [(early, late) for early, late in pairs if early != late]
        cut = [late for early, late in later if prompts[early] != prompts[late]]
        if cut and len(first) == 1:
            raise UserError(
                f"the text tower takes {tokens.shape[1]} tokens, and all {len(names)} classes have the same ones, such as "
                f"{prompts[0][0]!r} and {prompts[cut[0]][0]!r}; use shorter templates, or other names"
            )
        if later and jax.process_index() == 0:
            what = f"tokens (at most {tokens.shape[1]})" if cut else "prompts"
            told = "%d of %d classes have the %s of an earlier one, such as %r (no. %d and %d): their images count as wrong"
            logger.warning(told, len(later), len(names), what, names[later[0][1]], *later[0])

    def class_weights(self, embedder: Embedder) -> tuple[Classes, Float[np.ndarray, "k e"], list[tuple[str, ...]]]:
        """The classes, their vectors, and the prompts of each."""
        classes = read_classes(self.classes)
        canonical = embedder.canonical_prompts if self.canonical is None else self.canonical
        prompts = make_prompts(classes.names, read_templates(self.templates), canonical=canonical)
        self._name_equal_classes(classes.names, prompts, embedder)
        return classes, class_embeddings(embedder.embed_texts, prompts), [tuple(own) for own in prompts]

    def score(
        self,
        images: EmbeddedImages,
        classes: Classes,
        weights: Float[np.ndarray, "k e"],
        texts: Sequence[Hashable],
    ) -> dict[str, float]:
        """The metrics of embedded images. texts: classes of equal ones are not tied, which the encoder could not avoid."""
        values = images.values[self.label]
        if are_multi_label(values):
            if self.subset is not None or self.label_map is not None:
                raise UserError(
                    f"images of {self.data} have several labels; subset and label_map are for one label each"
                )
            rows = np.flatnonzero([len(own) > 0 for own in values])
            if len(rows) < len(values) and jax.process_index() == 0:
                told = "%d images of %s left out because they have no label %r"
                logger.warning(told, len(values) - len(rows), self.data, self.label)
            pairs = [f"image {images.keys[row]} of {self.data}" for row in rows]
            positive = multi_hot([values[row] for row in rows], classes.numbers(), len(classes.names), pairs=pairs)
            return multi_label(images.zimg[rows], weights, positive)
        rows, labels, taken = self.taking_part(images, classes)
        texts = [texts[number] for number in taken]
        return classification(images.zimg[rows], weights[taken], labels, texts=texts)

    def taking_part(
        self, images: EmbeddedImages, classes: Classes
    ) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], list[int]]:
        """(rows of the images of classes in `subset`, places of their classes among these, numbers of these classes)."""
        rows, labels = self.labels_of(images, classes)
        if self.subset is None:
            return rows, labels, list(range(len(classes.names)))
        taken = read_subset(self.subset, classes.numbers(), len(classes.names))
        inside = np.isin(labels, taken)
        if not inside.all() and jax.process_index() == 0:
            logger.warning("%d images of %s are of classes outside %s", (~inside).sum(), self.data, self.subset)
        return rows[inside], np.searchsorted(taken, labels[inside]), taken

    def labels_of(
        self, images: EmbeddedImages, classes: Classes
    ) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """(rows of the images that have a label, their classes)."""
        index = classes.numbers()
        outside, values = self._mapped(images.values[self.label])
        pairs = enumerate(zip(images.keys, values, strict=True))
        numbers = [None if n in outside else self._number(own, f"image {key}", index) for n, (key, own) in pairs]
        unlabelled = [n for n, number in enumerate(numbers) if number is None and n not in outside]
        if unlabelled and jax.process_index() == 0:
            told = "%d images of %s left out because they have no label %r, such as %s"
            logger.warning(told, len(unlabelled), self.data, self.label, images.keys[unlabelled[0]])
        if outside and jax.process_index() == 0:
            logger.warning(
                "%d images of %s left out: %s has no class for them", len(outside), self.data, self.label_map
            )
        labels = np.asarray([number for number in numbers if number is not None], int)
        if len(labels) and (labels.min() < 0 or labels.max() >= len(classes.names)):
            fix = "a line is missing" if labels.min() >= 0 else "leave out images without a label"
            raise UserError(
                f"{shown(self.classes)} has {len(classes.names)} classes, but {self.data} has labels from {labels.min()} to "
                f"{labels.max()}; {fix}"
            )
        return np.flatnonzero([number is not None for number in numbers]), labels

    def _mapped(self, values: Sequence[Sequence[Any]]) -> tuple[set[int], list[Sequence[Any]]]:
        """(places of the labels that `label_map` lacks, all labels as it has them)."""
        if self.label_map is None:
            return set(), list(values)
        names = read_label_map(self.label_map)
        mapped = [[names[str(own[0])]] if own and str(own[0]) in names else own for own in values]
        return {n for n, own in enumerate(values) if own and str(own[0]) not in names}, mapped

    def _number(self, values: Sequence[Any], pair: str, index: Mapping[str, int]) -> int | None:
        """The class of a pair; None if it has no label. Raises UserError: that is neither a number nor a name."""
        label = values[0] if len(values) == 1 else values
        if not values or (isinstance(label, float) and not math.isfinite(label)):
            return None
        number = None if len(values) > 1 else number_of(label, index)
        if number is not None:
            return number
        label = str(label)[:_SHOWN_CHARS]
        names = ", ".join(list(index)[:_SHOWN_NAMES]) + (", …" if len(index) > _SHOWN_NAMES else "")
        raise UserError(
            f"{pair} of {self.data} has {self.label}={label!r}, which is neither a number nor a name in "
            f"{shown(self.classes)} ({names})"
            f"{did_you_mean(str(label), index)}; names must match exactly: correct the file, or name another field with --label"
        )


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
    """{"acc1", "acc5" (for 5 classes or more), "mean_per_class_recall" and "…_se", "tied_fraction"} of n images.

    Args:
        texts: of the classes; those of equal text are not counted as tied. None: all differ.

    Raises:
        UserError: as `rank_right_classes`.
    """
    ranks, tied = rank_right_classes(zimg, classes, labels, texts=texts)
    metrics = accuracies(np.where(ranks == 1, labels, -1), labels)
    metrics["mean_per_class_recall_se"] = mean_recall(ranks == 1, labels)[1]
    acc5 = {"acc5": float(np.mean(ranks <= 5))} if len(classes) >= 5 else {}
    return metrics | acc5 | {"tied_fraction": float(np.mean(tied))}


def multi_label(
    zimg: Float[np.ndarray, "n e"], classes: Float[np.ndarray, "k e"], positive: Bool[np.ndarray, "n k"]
) -> dict[str, float]:
    """Mean average precision, its standard error over images, and what scores get that know nothing: the mean prevalence."""
    measure = lambda kept: mean_average_precision(zimg[kept], classes, positive[kept])  # noqa: E731
    name, images = "mean_average_precision", np.arange(len(zimg))
    error = jackknife_error(measure, images)
    return {name: measure(images), f"{name}_se": error, f"{name}_chance": float(np.mean(positive))}


def rank_right_classes(
    zimg: Float[np.ndarray, "n e"],
    classes: Float[np.ndarray, "k e"],
    labels: Int[np.ndarray, " n"],
    *,
    texts: Sequence[Hashable] | None = None,
) -> Ranks:
    """The rank of each image's class among the k; texts: as for `classification`.

    Raises:
        UserError: if a label is not one of the k classes, there is no image, or an embedding is not finite.
    """
    if len(zimg) == 0:
        raise UserError("zero-shot classification needs at least one image, got none")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise UserError(f"labels reach from {labels.min()} to {labels.max()}, but there are {len(classes)} classes")
    return rank_right_candidates(zimg, classes, labels, np.arange(len(classes)), texts=texts)


def _normalise(z: Float[np.ndarray, "... e"]) -> Float[np.ndarray, "... e"]:
    return z / (np.linalg.norm(z, axis=-1, keepdims=True) + 1e-8)
