"""Where the members of each pair lie in a tar shard: the tables that `index_file` keeps.

    rows      one per pair: its key, and offset (-1: no such member) and size of image, txt, json and cls
    captions  one per further caption (KEY.0.txt, KEY.1.txt, …): the pair, offset and size
    arrays    one per KEY.npy of a few numbers, where there are any: the labels of an image with several
    side      one per pair: its row in the Parquet file that img2dataset writes beside the shard, see `side_files`

The traps: the members of a key may come in any order and apart from each other. Of several images of a key the first counts;
a file name that comes again begins a new pair; a pair that the end of the file cuts is left out.

A key ends at the first dot of the file name (WebDataset's rule). Where that leaves a key without image and text of its own, the
dots belong to the names: 1.5x.jpg and 1.5x.txt are the pair 1.5x, and 1.input.jpg is the image of 1.txt. Members that belong to
no pair are counted (`unused` in the notes: how many, and one of them).
"""

import collections
import hashlib
import re
from collections.abc import Mapping, Sequence

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
_ARRAY = _MORE_CAPTIONS + 1
_MAX_ARRAY_BYTES = 1 << 16  # CLIP_benchmark's labels, not someone's embeddings of all tokens
_MIN_ROOM_BYTES, _MAX_KEY_BYTES, _SHOWN_BYTES, _MAX_JSON_BYTES = 256, 1024, 80, 1 << 24
_Used = list[tuple[int, int, int, int, int]]  # pair, slot, number, offset, bytes
_SLOT_OF = {slot.encode(): index for index, slot in enumerate(SLOTS) if slot != "image"}
_SLOT_OF |= {extension.encode(): 0 for extension in IMAGE_EXTENSIONS}
_SLOT_OF[b"npy"] = _ARRAY
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
    keys, used, cut_pair, strangers = _group(members, {})
    if strangers and (moved := _dotted_names(members.names, strangers, keys, used)):
        keys, used, cut_pair, strangers = _group(members, moved)
    tables, second = _tables(keys, used, cut_pair, stat.size)
    rows, unused = tables["rows"], [*strangers, *members.dangling]
    if len(second):
        unused += [name for name, offset in zip(members.names, members.offsets, strict=True) if offset in second]
    if not len(rows):
        example = f", only members such as {_shown(unused[0])!r}" if unused else ""
        raise UserError(f"shard {shard!r} holds no image-text pairs ({stat.size} bytes{example}); leave it out")
    notes: dict[str, object] = {"truncated": members.truncated}
    notes |= {"unused": [len(unused), _shown(unused[0])]} if unused else {}
    due = side_files.successes(shard)
    if due is not None and due > len(rows):
        notes |= {"truncated": True, "pairs_due": due}
    offset, size = rows["json"][0].item(), rows["json_bytes"][0].item()
    side = side_files.match(
        shard, rows, window.fetch(offset, size)[:size] if offset >= 0 and size < _MAX_JSON_BYTES else None
    )
    if side is not None:
        tables["side"], notes["side_columns"] = side
    arrays = [tables["arrays"]] if "arrays" in tables else []
    return Contents(len(rows), tables, notes, index_file.digest(stat, rows, tables["captions"], *arrays))


def _group(members: Members, moved: Mapping[bytes, tuple[bytes, bytes]]) -> tuple[list[bytes], _Used, int | None, list]:
    """The key of each pair; what is used of it; the pair that the end cuts; names of members that are in none.

    moved: key and extension of names for which they are not those of `_split`.
    """
    keys: list[bytes] = []
    open_pairs: dict[bytes, int] = {}
    seen: dict[bytes, set[bytes]] = {}
    used, strangers = [], []
    for name, offset, size in zip(members.names, members.offsets, members.sizes, strict=True):
        key, extension = (moved and moved.get(name)) or _split(name)
        slot, number = _SLOT_OF.get(extension), 0
        if slot is None:
            slot, number = _unusual_slot(extension)
        if slot is None or not key or (slot == _ARRAY and size > _MAX_ARRAY_BYTES):
            strangers += [name] if key else []
            continue
        names = seen.get(key)
        if names is None or extension in names:
            seen[key] = names = set()
            open_pairs[key] = len(keys)
            keys.append(key)
        names.add(extension)
        used.append((open_pairs[key], slot, number, offset, size))
    cut_key = _split(members.cut_name)[0] if members.cut_name is not None else b""
    return keys, used, open_pairs.get(cut_key) if cut_key else None, strangers


def _dotted_names(
    names: Sequence[bytes], strangers: Sequence[bytes], keys: Sequence[bytes], used: _Used
) -> dict[bytes, tuple[bytes, bytes]]:
    """Key and extension of the names whose key does not end at the first dot, and of a.input.jpg beside a.txt."""
    slots, dotted = collections.defaultdict(set), collections.defaultdict(list)
    for pair, slot, *_ in used:
        slots[keys[pair]].add(slot)
    no_images, beside = not any(0 in own for own in slots.values()), set()
    for name in strangers:
        (key, extension), (stem, _, last) = _split(name), name.rpartition(b".")
        if last.lower() in _SLOT_OF:
            dotted[key].append((name, extension, stem, last.lower()))
            beside |= {extension} if not slots[key] <= {_MORE_CAPTIONS} else set()
    for name in names if dotted else ():
        key, extension = _split(name)
        if key in dotted and slots[key] == {_MORE_CAPTIONS} and _NUMBERED_CAPTION.fullmatch(extension.lower()):
            dotted[key].append((name, extension, name.rpartition(b".")[0], b"txt"))
    moved = {}
    for key, parts in dotted.items():
        kinds = collections.defaultdict(set)
        for _, _, stem, last in parts:
            kinds[stem].add(_SLOT_OF[last])
        own = slots[key] - {_MORE_CAPTIONS}
        if not own and beside.issuperset(extension for _, extension, _, _ in parts):
            continue  # masks and the like, whose image is missing
        if not own and (any({0} < kind for kind in kinds.values()) or all(0 in kind for kind in kinds.values())):
            moved |= {name: (stem, last) for name, _, stem, last in parts}
        elif not own or no_images:
            for name, extension, _, last in parts:
                if _SLOT_OF[last] not in own and not _NUMBERED_CAPTION.fullmatch(extension.lower()):
                    own.add(_SLOT_OF[last])
                    moved[name] = key, last
    return moved


def _shown(name: bytes) -> str:
    return name[-_SHOWN_BYTES:].decode("utf-8", "replace")


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


def _shortened(key: bytes, room: int) -> bytes:
    return key if len(key) <= room else key[: room - 32] + hashlib.sha256(key).hexdigest()[:32].encode()


def _tables(
    keys: list[bytes], used: _Used, cut_pair: int | None, shard_bytes: int
) -> tuple[dict[str, np.ndarray], set[int]]:
    """The tables, and where the members lie in whose place their pair has another, such as a second image."""
    # Every row has room for the longest key. That is at most as much again as the shard, however many empty members it has.
    room = min(_MAX_KEY_BYTES, max(_MIN_ROOM_BYTES, shard_bytes // max(1, len(keys))))
    keys = [_shortened(key, room) for key in keys]
    columns = [(name, "<i8") for slot in SLOTS for name in (slot, f"{slot}_bytes")]
    rows = np.zeros(len(keys), [("key", f"S{max(map(len, keys), default=1)}"), *columns])
    rows["key"] = keys
    pair, slot, number, offset, size = np.array(used, np.int64).reshape(-1, 5).T
    second: set[int] = set()
    for index, name in enumerate(SLOTS):
        rows[name] = -1
        mine = np.flatnonzero(slot == index)[::-1]  # the first of a slot is written last and stays
        rows[name][pair[mine]], rows[f"{name}_bytes"][pair[mine]] = offset[mine], size[mine]
        second.update(offset[mine][rows[name][pair[mine]] != offset[mine]].tolist())
    tables = {"rows": rows}
    for name, kind in (("captions", _MORE_CAPTIONS), ("arrays", _ARRAY)):
        more = np.flatnonzero((slot == kind) & (pair != (-1 if cut_pair is None else cut_pair)))
        more = more[np.lexsort((number[more], pair[more]))]
        tables[name] = np.empty(len(more), [("pair", "<i8"), ("offset", "<i8"), ("bytes", "<i8")])
        tables[name]["pair"], tables[name]["offset"], tables[name]["bytes"] = pair[more], offset[more], size[more]
        if cut_pair is not None:
            tables[name]["pair"] -= tables[name]["pair"] > cut_pair
    if cut_pair is not None:
        tables["rows"] = np.delete(rows, cut_pair)
    if not len(tables["arrays"]):
        del tables["arrays"]
    return tables, second
