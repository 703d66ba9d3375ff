"""What data say of themselves beside their pairs: class names, templates, and which fields hold labels and captions.

CLIP_benchmark   classnames.txt, zeroshot_classification_templates.txt, dataset_type.txt beside the shards or one folder up
Hugging Face     ClassLabel in the metadata of a Parquet file, or class_label in the README.md of its folder
TFDS             FEATURE.labels.txt beside the shards
folders          the names of the folders, sorted
"""

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from data_pipelines.errors import UserError
from data_pipelines.sources import files, tfds
from data_pipelines.sources.shards import ShardedSource

CAPTIONS = ("txt", "caption", "captions", "text", "captions/text", "sentences", "raw")
LABELS = ("cls", "label", "labels", "fine_label")
_CLASSES, _TEMPLATES, _TYPE = "classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"


@dataclass(frozen=True)
class Description:
    """What was found.

    Attributes:
      classes: for each field that holds labels the names of the classes, in the order of their numbers.
      templates: the prompts of the data set; () if it brings none.
      captions: the field that holds captions, those of all languages where they are apart, or ().
      are_folders: whether labels are the names of folders instead of numbers.
    """

    classes: dict[str, list[str]] = field(default_factory=dict)
    templates: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    are_folders: bool = False

    @property
    def label(self) -> str | None:
        """The field of the labels: one of the usual names, else the first."""
        return next((name for name in LABELS if name in self.classes), next(iter(self.classes), None))


def describe(source: ShardedSource) -> Description:
    """What the files of a source tell. Raises UserError: one of them cannot be read."""
    captions = _captions_of(source)
    if source.kind == "folder":
        classes = source.notes(0).get("classes")
        return Description({"cls": list(classes)} if classes else {}, captions=captions, are_folders=True)
    first = source.paths[0]
    if source.kind == "parquet":
        return Description(
            class_labels(source.schema_metadata.get(b"huggingface")) or _read_card(first), captions=captions
        )
    if found := tfds.class_names(first):
        return Description(found, captions=captions)
    if source.kind != "tar":
        return Description(captions=captions)
    folder = first.rpartition("/")[0] or "."
    for place in (folder, folder.rpartition("/")[0] or ".."):
        if (names := _lines(f"{place}/{_CLASSES}")) is not None:
            kind = (_lines(f"{place}/{_TYPE}") or [""])[0].lower()
            label = "npy" if kind == "multilabel" else "cls"
            return Description({label: names}, tuple(_lines(f"{place}/{_TEMPLATES}") or ()), captions)
    return Description(captions=captions)


def _captions_of(source: ShardedSource) -> tuple[str, ...]:
    if source.columns is None:
        return ("txt",)
    found = tuple(name for name in CAPTIONS if name in source.columns)[:1]
    if found == ("captions",):
        with contextlib.suppress(OSError):  # storage fails for a pair now and then
            first = source[0].fields.get("captions")
            return tuple(f"captions.{language}" for language in sorted(first)) if isinstance(first, dict) else found
    return found


def _lines(path: str) -> list[str] | None:
    """The lines of a text file beside shards; None if there is none. Blank lines at its end do not count."""
    if not files.exists(path):
        return None
    try:
        lines = [line.strip() for line in files.lines(files.read_whole(path).rstrip())]
    except UnicodeDecodeError as error:
        raise UserError(f"{path!r} is not UTF-8 text ({error}); fetch it again") from error
    if "" in lines:
        raise UserError(
            f"line {lines.index('') + 1} of {path!r} is blank, and each line stands for one class or template; fill it"
        )
    return lines


def class_labels(metadata: bytes | None) -> dict[str, list[str]]:
    """The ClassLabel columns in what Hugging Face's `datasets` writes into the schema of a Parquet file."""
    try:
        features = json.loads(metadata or b"{}").get("info", {}).get("features", {})
        return {name: list(own["names"]) for name, own in features.items() if _is_class_label(own)}
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        return {}


def _is_class_label(feature: object) -> bool:
    return isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list)


def _read_card(path: str) -> dict[str, list[str]]:
    """The class labels in the front matter of the README.md in the folder of a file, or one or two above."""
    folder = path.rpartition("/")[0] or "."
    for up in ("", "/..", "/../.."):
        card = f"{folder}{up}/README.md"
        if files.is_remote(path) or not os.path.isfile(card):
            continue
        parts = files.read_whole(card).decode("utf-8", "replace").split("---\n", 2)
        if len(parts) == 3 and not parts[0].strip() and (found := _card_labels(parts[1])):
            return found
    return {}


def _card_labels(front_matter: str) -> dict[str, list[str]]:
    import yaml

    try:
        info = yaml.safe_load(front_matter)["dataset_info"]
        features = (info if isinstance(info, Sequence) else [info])[0]["features"]
        dtypes = {own["name"]: own.get("dtype") for own in features}
        found = {name: dtype["class_label"]["names"] for name, dtype in dtypes.items() if isinstance(dtype, dict)}
        return {name: [str(names[key]) for key in sorted(names, key=int)] for name, names in found.items()}
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError, IndexError):
        return {}
