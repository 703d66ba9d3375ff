"""Image files and what is known of them: folders of images, and the annotation files of the usual data sets.

    FOLDER/CLASS/NAME.jpg                 a folder per class
    Karpathy's JSON                       images[]: filename, filepath, split, sentences[].raw
    COCO's JSON                           images[]: id, file_name; annotations[]: image_id, caption
    a list, or {id: object} in JSON       objects with an image's path and other fields (SugarCrepe; BLIP's files)
    Flickr's text file                    a header, then NAME.jpg,caption or NAME.jpg#0<tab>caption
    FOLDER/captions.jsonl and images/     Crossmodal-3600: image/key, and {language: {"caption": […]}}

Each is read into rows, one per image in the order of the file: the image's path and the fields of the pair. Captions are the
list `txt`, or `captions` by language; the class is `cls`.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from data_pipelines.errors import UserError
from data_pipelines.sources import files
from data_pipelines.sources.columns import load_json

IMAGE_COLUMNS = ("image", "file_name", "filename", "filepath", "image_path", "path", "file", "img")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".avif")
CROSSMODAL = "captions.jsonl"
_FLICKR_LINE = re.compile(r"(?P<name>.+?\.(?:jpe?g|png))(?:#\d+\s*\t|,\s*)(?P<caption>.*)", re.IGNORECASE)
_SUBFOLDERS = ("", "images", "Images", "flickr30k-images", "flickr30k_images", "Flicker8k_Dataset")


class Annotations(NamedTuple):
    """rows: {"image": path, field: value, …} of each image; root: where the paths count from, relative to the file's folder."""

    rows: list[dict[str, Any]]
    root: str
    classes: list[str] | None = None


def split_name(path: str) -> tuple[str, str]:
    """ "coco.json#test" -> ("coco.json", "test"); a file or folder that exists under the whole name is taken by it."""
    place, mark, split = path.rpartition("#")
    return (place, split) if mark and place and not os.path.exists(path) else (path, "")


def splits_of(path: str) -> list[str]:
    """The splits that a JSON file names, [] if it names none. Raises UserError: it is not JSON."""
    images = _images_of(_read_json(path))
    return sorted({_split_of(image) for image in images} - {""})


def read_annotations(path: str) -> Annotations:
    """The images of a folder, or of an annotation file and the split after its name's `#`.

    Raises:
      FileNotFoundError: there is no such file, or not where its images are looked for.
      UserError: it is none of the formats above, has several splits, or no image.
    """
    place, split = split_name(path)
    if not files.is_remote(place) and os.path.isdir(place):
        crossmodal = os.path.exists(os.path.join(place, CROSSMODAL))
        return _read_crossmodal(place) if crossmodal else _walk_classes(place)
    rows = list(_flickr_rows(place) if place.lower().endswith((".txt", ".token")) else _json_rows(place, split))
    if not rows:
        raise UserError(f"{path!r} names no images with captions; see docs/data.md for the formats that are read")
    return Annotations(rows, _find_root(place, rows[0]["image"]))


def _walk_classes(folder: str) -> Annotations:
    """Every image under a folder, sorted by its path; the first folder on the way is its class."""
    found = []
    for parent, names in walk(folder):
        images = [name for name in names if is_image_name(name)]
        found += [os.path.relpath(os.path.join(parent, name), folder) for name in images]
    found.sort(key=lambda path: path.split(os.sep))
    if not found:
        raise UserError(f"folder {folder!r} holds no images ({', '.join(IMAGE_SUFFIXES)}); name its shards")
    classes = sorted({files.printable(path.split(os.sep)[0]) for path in found if os.sep in path})
    classes.sort(key=int if all(name.isdecimal() for name in classes) else str)
    rows = []
    for path in found:
        key = files.printable(path)
        row = {"image": path} | ({"cls": key.split(os.sep)[0]} if os.sep in path else {})
        rows.append(row if key == path else row | {"key": key})
    return Annotations(rows, "", classes or None)


def walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Each folder below this one, also where links lead, once, with the names of its files; hidden folders are left out."""
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        found = os.stat(parent)
        if (found.st_dev, found.st_ino) in seen:
            folders.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield parent, names


def is_image_name(name: str) -> bool:
    """Whether a file looks like an image; hidden files, such as those that macOS leaves, do not."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _read_crossmodal(folder: str) -> Annotations:
    rows, path = [], os.path.join(folder, CROSSMODAL)
    for number, line in enumerate(files.lines(files.read_whole(path), "replace"), 1):
        try:
            entry = load_json(line.encode())[0] if line.strip() else None
            if entry is not None:
                captions = {
                    key: own["caption"] for key, own in entry.items() if isinstance(own, dict) and "caption" in own
                }
                rows.append({"image": f"{entry['image/key']}.jpg", "captions": captions})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"line {number} of {path!r} is not one of Crossmodal-3600 ({error!r})") from error
    if not rows:
        raise UserError(f"{path!r} holds no captions; copy it again")
    return Annotations(rows, "images")


def _flickr_rows(path: str) -> Iterator[dict[str, Any]]:
    """The captions of an image need not follow each other."""
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(files.lines(files.read_whole(path), "replace"), 1):
        matched = _FLICKR_LINE.fullmatch(line.strip())
        if matched:
            captions.setdefault(matched["name"], []).append(matched["caption"].strip().strip('"').strip())
        elif line.strip() and number > 1:
            raise UserError(
                f"line {number} of {path!r} is not 'NAME.jpg,caption': {line[:80]!r}; fix it, or name shards"
            )
    return ({"image": name, "txt": own} for name, own in captions.items())


def _json_rows(path: str, split: str) -> Iterator[dict[str, Any]]:
    tree = _read_json(path)
    images = _images_of(tree)
    splits = sorted({_split_of(image) for image in images} - {""})
    if split and split not in splits:
        raise UserError(f"{path!r} has no split {split!r}; there are {', '.join(splits) or 'none'}")
    if len(splits) > 1 and not split:
        raise UserError(f"{path!r} holds the splits {', '.join(splits)}; name one: {path}#{splits[0]}")
    annotations = tree.get("annotations") if isinstance(tree, dict) else None
    captions: dict[Any, list[str]] = {}
    for annotation in annotations if isinstance(annotations, list) else ():
        if isinstance(annotation, dict) and isinstance(annotation.get("caption"), str):
            if isinstance(annotation.get("image_id"), list | dict):
                raise UserError(f"{path!r} has a caption whose image_id is not a number: {str(annotation)[:80]}")
            captions.setdefault(annotation.get("image_id"), []).append(" ".join(annotation["caption"].split()))
    if isinstance(annotations, list) and not captions:
        raise UserError(f"{path!r} has no captions in its annotations; take COCO's captions_*.json")
    for image in images:
        if split in ("", _split_of(image)):
            yield _json_row(path, image, captions)


def _json_row(path: str, image: Mapping[str, Any], captions: Mapping[Any, list[str]]) -> dict[str, Any]:
    name = next((image[name] for name in IMAGE_COLUMNS if isinstance(image.get(name), str)), None)
    if name is None:
        raise UserError(
            f"{path!r} has an image without its path ({', '.join(IMAGE_COLUMNS[:4])}, …): {str(image)[:80]}"
        )
    rest = {
        key: value for key, value in image.items() if key not in IMAGE_COLUMNS and key not in ("sentences", "sentids")
    }
    if isinstance(image.get("sentences"), list):  # Karpathy's
        try:
            rest["txt"] = [" ".join(str(own["raw"]).split()) for own in image["sentences"]]
            name = os.path.join(image.get("filepath", ""), image["filename"])
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{path!r} has an image that is not one of Karpathy's, with sentences and a filename ({error!r}): "
                f"{str(image)[:80]}"
            ) from None
    elif captions:
        number = image.get("id")
        if isinstance(number, list | dict):
            raise UserError(f"{path!r} has an image whose id is not a number: {str(image)[:80]}")
        rest = {"txt": captions.get(number, []), "cocoid": number}
    return {"image": name} | rest


def _images_of(tree: Any) -> list[Mapping[str, Any]]:
    if isinstance(tree, dict):
        images = tree["images"] if isinstance(tree.get("images"), list) else list(tree.values())
    else:
        images = tree
    return [image for image in images if isinstance(image, dict)] if isinstance(images, list) else []


def _split_of(image: Mapping[str, Any]) -> str:
    """COCO's `restval` is part of the training split, as in all papers that use Karpathy's."""
    split = str(image.get("split", "") or "")
    return "train" if split == "restval" else split


def _read_json(path: str) -> Any:
    try:
        return load_json(files.read_whole(path))[0]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path!r} is not JSON ({' '.join(str(error).split())}); copy it again") from error


def _find_root(path: str, image: str) -> str:
    """The folder, relative to that of the file, in which its first image is."""
    year = re.search(r"(train|val|test)20\d\d", os.path.basename(path))
    names = [*_SUBFOLDERS, *([year[0], f"images/{year[0]}"] if year else [])]
    places = [os.path.join(up, name) for up in ("", "..") for name in names]
    for place in places:
        if files.exists(join(path, os.path.join(place, image))):
            return place
    shown = ", ".join(repr(name) for name in names if name)
    raise FileNotFoundError(f"{image!r}, the first image of {path!r}, is not beside it, nor in {shown} there or above")


def join(beside: str, name: str) -> str:
    """The path or URL of a file that is named relative to another."""
    if files.is_remote(name):
        return name
    if not files.is_remote(beside):
        return os.path.join(os.path.dirname(beside), os.path.expanduser(name))
    return f"{beside.rpartition('/')[0]}/{name}"


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names of all fields, in the order in which they appear."""
    return list(dict.fromkeys(name for row in rows for name in row))
