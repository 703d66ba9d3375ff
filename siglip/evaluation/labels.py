"""Labels of images: names or numbers, one or several; maps and subsets of classes; features of a labelled set for the probes."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from siglip.array_types import Bool, Int
from siglip.errors import UserError
from siglip.evaluation.class_files import load_json, read_lines_or_json
from siglip.evaluation.embed import Embedder, Feature, FirstValues
from siglip.evaluation.results import Evaluation
from siglip.trees import did_you_mean, regular

logger = logging.getLogger(__name__)

_SHOWN_NAMES, _SHOWN_CHARS = 5, 80
_WHOLE, _MAX_NUMBER = re.compile(r"-?\d{1,18}"), 2**53
_OBJECTNET = ("folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json")


def read_label_map(path: str) -> dict[str, str]:
    """{label in the data: class name or number}: a JSON object, or the folder of ObjectNet's mappings.

    ObjectNet's: the 113 folders of 313 that ImageNet has classes for; their classes are ObjectNet's names in lower case.

    Raises:
        FileNotFoundError, UserError: there is no file, or it holds something else.
    """
    if Path(path).is_dir():
        folders, imagenet = (read_object(Path(path) / name) for name in _OBJECTNET)
        return {folder: str(name).lower() for folder, name in folders.items() if name in imagenet}
    found = read_object(Path(path))
    if not all(isinstance(value, str | int) and not isinstance(value, bool) for value in found.values()):
        raise UserError(f"{path} must map each label to the name or the number of one class")
    return {label: str(value) for label, value in found.items()}


def read_object(path: Path, entry: str = "{label: class}") -> dict[str, Any]:
    """A JSON object that is not empty; `entry` shows one in a message. Raises FileNotFoundError, UserError."""
    regular(path)
    try:
        found = load_json(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); write an object, {entry}") from None
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path} must be a JSON object with at least one entry, {entry}")
    return found


def read_subset(path: str, index: Mapping[str, int], classes: int) -> list[int]:
    """The numbers of some of the classes, in order: a file with a name, an id or a number on each line, or a JSON list.

    Raises:
        FileNotFoundError, UserError: there is no file, or it names no class, or one that there is not.
    """
    entries = read_lines_or_json(path)
    if not isinstance(entries, list) or not all(isinstance(entry, str | int) for entry in entries):
        raise UserError(f"{path} must be a list of classes; write a name, an id or a number on each line")
    entries, numbers = [str(entry).strip() for entry in entries if str(entry).strip()], set()
    for entry in entries:
        number = index.get(entry, int(entry) if entry.isdecimal() and len(entry) < 10 else None)
        if number is None or number >= classes:
            raise UserError(f"{path}: {entry!r} is none of the {classes} classes{did_you_mean(entry, index)}")
        numbers.add(number)
    if not numbers:
        raise UserError(f"{path} names no class; write a name, an id or a number on each line")
    return sorted(numbers)


def are_multi_label(values: Sequence[Sequence[Any]]) -> bool:
    """Whether an image has several labels, or all of them as zeros and ones."""
    return any(len(own) > 1 for own in values)


def number_of(label: Any, index: Mapping[str, int]) -> int | None:
    """The class of a label: a text that names one, else a number, which may be that of no class; None: it is neither."""
    if isinstance(label, str) and label in index:
        return index[label]
    # Of a number column with gaps, 3.0 is a number and nan none.
    whole = _WHOLE.fullmatch(label) if isinstance(label, str) else isinstance(label, int) or float(label).is_integer()
    return int(label) if whole and abs(int(label)) < _MAX_NUMBER else None


def multi_hot(
    values: Sequence[Sequence[Any]], index: Mapping[str, int], classes: int, *, pairs: Sequence[str]
) -> Bool[np.ndarray, "n k"]:
    """Which classes each image shows: of a zero or a one for each class, or of a list of their names or numbers.

    Args:
        values: of each image; none where it has no label.
        pairs: what to call each image in a message.

    Raises:
        UserError: a label is not a class.
    """
    positive = np.zeros((len(values), classes), bool)
    as_vectors = all(len(own) == classes and set(own) <= {0, 1} for own in values if own)
    for row, own in enumerate(values):
        if as_vectors and own:
            positive[row] = np.asarray(own) == 1
            continue
        for label in own:
            number = number_of(label, index)
            if number is None or not 0 <= number < classes:
                names = ", ".join(sorted(index, key=index.__getitem__)[:_SHOWN_NAMES])
                names += ", …" if len(index) > _SHOWN_NAMES else ""
                raise UserError(
                    f"{pairs[row]} has the label {str(label)[:_SHOWN_CHARS]!r}, which is neither a number below {classes} nor a "
                    f"name in ({names}){did_you_mean(str(label), index)}"
                )
            positive[row, number] = True
    return positive


class Labelled(NamedTuple):
    """features: [n, d], or rows of them; labels: numbers of `names`, the distinct labels of the training set in order."""

    features: np.ndarray
    labels: Int[np.ndarray, " n"]
    names: list[Any]


def train_and_test(
    embedder: Embedder, train: str, test: str, label: str, *, feature: Feature
) -> tuple[Labelled, Labelled]:
    """The features and labels of every image of both sets that has one.

    Raises:
        UserError: no image has a label, features are not finite, or a label is not in the training set.
    """

    def read(data: str, names: Sequence[Any] | None) -> Labelled:
        images = embedder.embed_shards(data, (label,), feature=feature)
        return keep_labelled(images.zimg, images.keys, images.values[label], data=data, label=label, names=names)

    fitted = read(train, None)
    return fitted, read(test, fitted.names)


def keep_labelled(
    features: np.ndarray,
    keys: Sequence[str],
    values: Sequence[Sequence[Any]],
    *,
    data: str,
    label: str,
    names: Sequence[Any] | None = None,
) -> Labelled:
    """Of some images, rows of `features`, those with one label each, and their numbers; see `train_and_test`.

    Args:
        names: the labels of the training set; None: this is it.
    """
    several = next((key for key, own in zip(keys, values, strict=True) if len(own) > 1), None)
    if several is not None:
        raise UserError(f"image {several} of {data} has several labels in {label!r}; a probe takes one per image")
    there = np.asarray([len(own) == 1 for own in values], bool)
    if not there.any():
        raise UserError(f"no image of {data} has a label {label!r}; name the field of the labels with --label")
    if not there.all() and jax.process_index() == 0:
        logger.warning("%d images of %s left out because they have no label %r", (~there).sum(), data, label)
    if not np.isfinite(features).all():
        raise UserError("some features are not finite; the model has diverged or its file is damaged")
    own = [v[0] for v in values if v]
    names = names_of(own, data=data, label=label) if names is None else names
    number = {name: k for k, name in enumerate(names)}
    strange = next((name for name in own if name not in number), None)
    if strange is not None:
        hint = did_you_mean(str(strange), map(str, number))
        raise UserError(f"{data} has the label {strange!r}, which no training image has{hint}")
    return Labelled(features[there], np.asarray([number[name] for name in own]), list(names))


def names_of(labels: Iterable[Any], *, data: str, label: str) -> list[Any]:
    """The distinct labels of a training set, in order. Raises UserError: they cannot be ordered, or are all the same."""
    try:
        names = sorted(set(labels))
    except TypeError:
        raise UserError(f"labels {label!r} of {data} are texts and numbers mixed; use one of them") from None
    if len(names) == 1:
        raise UserError(f"all images of {data} have the label {names[0]!r}; a probe needs two classes or more")
    return names


class Supervised(Evaluation):
    """An evaluation that learns from labelled images."""

    train: str
    label: str
    EMBEDS_TEXTS = False

    def check(self, first_values: FirstValues) -> None:
        """Raises FileNotFoundError or UserError for what would fail later."""
        for shards in (self.train, self.data):
            first_values(shards, (self.label,))


def check_feature(task: str, feature: Feature) -> None:
    """Raises UserError if it is not one vector per image."""
    if feature == "tokens":
        raise UserError(f"{task}: feature='tokens' is not one vector per image; use map, patch_mean, head or embedding")
