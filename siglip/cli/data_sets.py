"""What data say of themselves, put in place of what a task leaves open: the split, class names, templates, fields.

A task that was completed names everything that it reads, so its `check` and `run` need to know nothing of layouts.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import TypeVar

from data_pipelines.sources.described import Description, describe
from data_pipelines.sources.layouts import TRAINED, with_split
from data_pipelines.sources.opening import open_source
from siglip.errors import UserError
from siglip.evaluation.class_files import Classes, read_classes
from siglip.trees import did_you_mean

TaskT = TypeVar("TaskT")


def complete(task: TaskT, *, image_column: str | None = None) -> TaskT:
    """The task with the test split of its data, and with what the data tell about the fields that have their default.

    Args:
        image_column: the column that holds the image, where the data have such.

    Raises:
        FileNotFoundError, UserError: the data cannot be opened, or their folders are none of the task's classes.
    """
    data = with_split(task.data)
    source = open_source(data, image=image_column, required=False)
    about, columns = describe(source), source.columns
    changes = {"data": data} | ({"train": with_split(task.train, TRAINED)} if "train" in _names(task) else {})
    changes |= _complete_fields(task, about, columns)
    if "classes" in _names(task) and about.classes:
        label = changes.get("label", task.label)
        changes |= _complete_classes(task.classes, about, about.classes.get(label, []), data)
    if "templates" in _names(task) and task.templates is None and about.templates:
        changes["templates"] = json.dumps(about.templates, ensure_ascii=False)
    return dataclasses.replace(task, **changes)


def _names(task: object) -> set[str]:
    return {field.name for field in dataclasses.fields(task)}


def _complete_fields(task: object, about: Description, columns: Sequence[str] | None) -> dict[str, object]:
    """The fields of labels and captions, where those of the task are its defaults and the data have others."""
    defaults, changes = {field.name: field.default for field in dataclasses.fields(task)}, {}
    roots = None if columns is None else {column.partition(".")[0] for column in columns}

    def is_open(name: str, *fields: str) -> bool:
        unknown = roots is not None and roots.isdisjoint(field.partition(".")[0] for field in fields)
        return getattr(task, name, None) == defaults.get(name) and unknown

    if "label" in defaults and about.label and (is_open("label", str(task.label)) or about.label == "npy"):
        changes["label"] = about.label
    if "captions" in defaults and about.captions and is_open("captions", *task.captions):
        changes["captions"] = about.captions
    return changes


def _complete_classes(given: str | None, about: Description, own: list[str], data: str) -> dict[str, str]:
    if not own or (given is not None and not about.are_folders):
        return {}
    if given is not None:
        return {"classes": match_folders(read_classes(given), own, data).to_json()}
    imagenet = read_classes("imagenet")
    if about.are_folders and set(own) <= set(imagenet.ids):
        return {"classes": match_folders(imagenet, own, data).to_json()}
    return {"classes": Classes(own, tuple(own) if about.are_folders else ()).to_json()}


def match_folders(classes: Classes, folders: Sequence[str], data: str) -> Classes:
    """The classes that folders stand for, so that a folder's name is a label.

    Folders that are called by ids (WordNet's) are the only classes: ImageNet-A and -R have 200 of the 1000. Folders that are
    called by class names, or by their numbers as in ImageNetV2, leave all classes as they are. As many folders as classes, of
    other names, are in the same order.

    Raises:
        UserError: a folder is no class.
    """
    if set(folders) <= set(classes.ids):
        name_of = dict(zip(classes.ids, classes.names, strict=True))
        return Classes([name_of[folder] for folder in folders], tuple(folders))
    are_numbers = all(name.isdecimal() and int(name) < len(classes.names) for name in folders)
    if set(folders) <= set(classes.names) or are_numbers:
        return classes
    if len(folders) == len(classes.names):
        return Classes(classes.names, tuple(folders))
    missing = next(name for name in folders if name not in classes.numbers())
    raise UserError(
        f"the folder {missing!r} of {data} is not one of the {len(classes.names)} classes{did_you_mean(missing, classes.names)}; "
        "name folders as the classes are, or give as many classes as there are folders, in the folders' order"
    )
