"""What data say of themselves, put in place of what a task leaves open: the split, class names, templates, fields.

A task that was completed names everything that it reads, so its `check` and `run` need to know nothing of layouts.
"""

import dataclasses
import itertools
import json
from collections.abc import Collection, Sequence
from typing import TypeVar

from data_pipelines.sources.described import Description, describe
from data_pipelines.sources.layouts import TRAINED, with_split
from data_pipelines.sources.opening import open_source
from siglip.errors import UserError
from siglip.evaluation.class_files import Classes, read_classes, read_templates
from siglip.trees import did_you_mean

TaskT = TypeVar("TaskT")
_ALIASES = {"negative": ("negative_caption",)}  # SugarCrepe's


def complete(task: TaskT) -> TaskT:
    """The task with the test split of its data, and with what the data tell about the fields that have their default.

    Raises:
        FileNotFoundError, UserError: the data cannot be opened, or their folders are none of the task's classes.
    """
    data = with_split(task.data)
    source = open_source(data, image=task.image_column, required=False)
    about, columns = describe(source), source.columns
    changes = {"data": data} | ({"train": with_split(task.train, TRAINED)} if "train" in _names(task) else {})
    changes |= _complete_fields(task, about, columns)
    # A map of labels to classes says all that there is to say of folders.
    if "classes" in _names(task) and about.classes and getattr(task, "label_map", None) is None:
        label = changes.get("label", task.label)
        changes |= _complete_classes(task.classes, about, about.classes.get(label, []), data)
    if "templates" in _names(task) and task.templates is None and about.templates:
        changes["templates"] = json.dumps(about.templates, ensure_ascii=False)
    return dataclasses.replace(task, **changes)


def protocol(task: object, *, pixels: str, size: str, resample: str, canonical: bool) -> str:
    """What a number depends on beside model and data, in one line.

    Args:
        size: of the images, in words. canonical: what the model's own pipeline does.
    """
    parts, names = [f"pixels {pixels}, {size}, {resample}"], _names(task)
    if "classes" in names:
        templates = read_templates(task.templates)
        count = f"{len(templates)} templates" if isinstance(templates, list) else "prompts for each class"
        parts.append(f"{len(read_classes(task.classes).names)} classes, {count if task.templates else 'names alone'}")
    if "canonical" in names:
        parts.append(
            "prompts canonical" if (canonical if task.canonical is None else task.canonical) else "prompts as written"
        )
    return "protocol: " + "; ".join(parts)


def _names(task: object) -> set[str]:
    return {field.name for field in dataclasses.fields(task)}


def _complete_fields(task: object, about: Description, columns: Sequence[str] | None) -> dict[str, object]:
    """The fields of labels and captions, where those of the task are its defaults and the data have others."""
    defaults = {field.name: field.default for field in dataclasses.fields(task)}
    roots = None if columns is None else {column.partition(".")[0] for column in columns}
    is_default = {name: getattr(task, name) == default for name, default in defaults.items()}
    changes = {}
    if about.label and is_default.get("label") and (about.label == "npy" or (roots and task.label not in roots)):
        changes["label"] = about.label
    if roots and is_default.get("captions"):
        captions = defaults["captions"]
        names = [captions] if isinstance(captions, str) else list(captions)
        found = [_field_of(name, roots, about) for name in names]
        if found != [(name,) for name in names] and all(found):
            changes["captions"] = found[0][0] if isinstance(captions, str) else tuple(itertools.chain(*found))
    return changes


def _field_of(name: str, roots: Collection[str], about: Description) -> tuple[str, ...]:
    """The fields of data that stand for a task's usual one; () where there is none."""
    if name in roots:
        return (name,)
    return about.captions if name == "txt" else tuple(other for other in _ALIASES.get(name, ()) if other in roots)


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
