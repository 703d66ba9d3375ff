"""Where the members of each pair lie in a tar shard: the tables that `index_file` keeps.

    rows      one per pair: its key, and offset (-1: no such member) and size of image, txt, json and cls
    captions  one per further caption (KEY.0.txt, KEY.1.txt, …): the pair, offset and size
    side      one per pair: its row in the Parquet file that img2dataset writes beside the shard, see `side_files`

The trap: the members of a key may come in any order and apart from each other. Of several images of a key the first counts;
a file name that comes again begins a new pair; a pair that the end of the file cuts is left out.
"""

import re

import numpy as np

from data_pipelines.errors import UserError
from data_pipelines.sources import index_file, side_files
from data_pipelines.sources.files import Window
from data_pipelines.sources.index_file import Contents
from data_pipelines.sources.remote import FileStat
from data_pipelines.sources.tar_headers import Members, NotATar, walk_members

SLOTS = ("image", "txt", "json", "cls")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "avif")
_MORE_CAPTIONS = len(SLOTS)
_SLOT_OF = {slot.encode(): index for index, slot in enumerate(SLOTS) if slot != "image"}
_SLOT_OF |= {extension.encode(): 0 for extension in IMAGE_EXTENSIONS}
_NUMBERED_CAPTION = re.compile(rb"(\d{1,6})\.txt")
_PACKED_AS = (
    (b"\x1f\x8b", "gzip"),
    (b"PK", "zip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
)


def build(shard: str, stat: FileStat) -> Contents:
    """The index of a shard. Raises UserError: it is not an uncompressed tar archive, or holds no pairs."""
    window = Window(shard, stat.size)
    try:
        members = walk_members(window)
    except NotATar as error:
        packed = next((name for magic, name in _PACKED_AS if window.fetch(0).startswith(magic)), None)
        found = f"it is packed with {packed}; unpack it" if packed else f"{error}; fetch it again"
        raise UserError(f"shard {shard!r} is not an uncompressed tar archive ({found})") from error
    keys, used, cut_pair = _group(members)
    tables = _tables(keys, used, cut_pair)
    rows = tables["rows"]
    if not len(rows):
        raise UserError(f"shard {shard!r} holds no image-text pairs ({stat.size} bytes); leave it out")
    notes: dict[str, object] = {"truncated": members.truncated}
    due = side_files.successes(shard)
    if due is not None and due > len(rows):
        notes |= {"truncated": True, "pairs_due": due}
    offset, size = rows["json"][0].item(), rows["json_bytes"][0].item()
    side = side_files.match(shard, rows, window.fetch(offset, size)[:size] if offset >= 0 else None)
    if side is not None:
        tables["side"], notes["side_columns"] = side
    return Contents(len(rows), tables, notes, index_file.digest(stat, rows, tables["captions"]))


def _group(members: Members) -> tuple[list[bytes], list[tuple[int, int, int, int, int]], int | None]:
    """The key of each pair; (pair, slot, number, offset, bytes) of each member used; the pair that the end cuts."""
    keys: list[bytes] = []
    open_pairs: dict[bytes, int] = {}
    seen: dict[bytes, set[bytes]] = {}
    used = []
    for name, offset, size in zip(members.names, members.offsets, members.sizes, strict=True):
        key, extension = _split(name)
        slot, number = _SLOT_OF.get(extension), 0
        if slot is None:
            slot, number = _unusual_slot(extension)
        if slot is None or not key:
            continue
        names = seen.get(key)
        if names is None or extension in names:
            seen[key] = names = set()
            open_pairs[key] = len(keys)
            keys.append(key)
        names.add(extension)
        used.append((open_pairs[key], slot, number, offset, size))
    cut_key = _split(members.cut_name)[0] if members.cut_name is not None else b""
    return keys, used, open_pairs.get(cut_key) if cut_key else None


def _split(name: bytes) -> tuple[bytes, bytes]:
    """Key and extension: the key ends at the base name's first dot. Hidden files and names without a dot have none."""
    base = name.rfind(b"/") + 1
    dot = name.find(b".", base)
    return (name[:dot], name[dot + 1 :]) if dot > base else (b"", b"")


def _unusual_slot(extension: bytes) -> tuple[int | None, int]:
    """The slot of an extension in capitals, or of a numbered caption with its number."""
    extension = extension.lower()
    if numbered := _NUMBERED_CAPTION.fullmatch(extension):
        return _MORE_CAPTIONS, int(numbered[1])
    return _SLOT_OF.get(extension), 0


def _tables(keys: list[bytes], used: list, cut_pair: int | None) -> dict[str, np.ndarray]:
    columns = [(name, "<i8") for slot in SLOTS for name in (slot, f"{slot}_bytes")]
    rows = np.zeros(len(keys), [("key", f"S{max(map(len, keys), default=1)}"), *columns])
    rows["key"] = keys
    pair, slot, number, offset, size = np.array(used, np.int64).reshape(-1, 5).T
    for index, name in enumerate(SLOTS):
        rows[name] = -1
        mine = np.flatnonzero(slot == index)[::-1]  # the first of a slot is written last and stays
        rows[name][pair[mine]], rows[f"{name}_bytes"][pair[mine]] = offset[mine], size[mine]
    more = np.flatnonzero((slot == _MORE_CAPTIONS) & (pair != (-1 if cut_pair is None else cut_pair)))
    more = more[np.lexsort((number[more], pair[more]))]
    captions = np.empty(len(more), [("pair", "<i8"), ("offset", "<i8"), ("bytes", "<i8")])
    captions["pair"], captions["offset"], captions["bytes"] = pair[more], offset[more], size[more]
    if cut_pair is not None:
        rows = np.delete(rows, cut_pair)
        captions["pair"] -= captions["pair"] > cut_pair
    return {"rows": rows, "captions": captions}
