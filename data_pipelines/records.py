"""What a source holds: image-text pairs as they lie on disk, undecoded.

The trap: a pair is allowed to be broken. A missing or damaged member is stated (`image is None`, `problems`),
never raised, because the position arithmetic of the stream needs every index of a source to answer. A shard
that is gone is another matter: see `ShardLost`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from data_pipelines.errors import RunFailed


@dataclass(frozen=True, slots=True)
class Pair:
    """One image with its texts.

    Attributes:
      key: the name of the pair in its shard (`000012345`).
      image: the encoded file, or None when the pair has no image member.
      fields: `txt` and `cls` when the pair has these members, and every field of its `json`; of the other formats
        every column or feature but the image. A field with several captions is a list.
      problems: what could not be read: "invalid_utf8" (a text), "invalid_json", "invalid_cls", "invalid_csv" (a row of a list),
        "missing_image" (the file that a list names); or was repaired: "control_chars" (half a surrogate pair).
    """

    key: str
    image: bytes | None
    fields: Mapping[str, object]
    problems: tuple[str, ...] = ()


class ShardLost(RunFailed):
    """A shard that was there when its source was opened is gone or has been replaced: no fault of one pair, so it stops."""


@runtime_checkable
class Source(Protocol):
    """Random access to pairs; safe to call from several threads, and picklable for worker processes.

    `fingerprint` changes when the pairs or their order do, and stays when the files are only copied
    elsewhere. An index outside raises IndexError; storage that fails for one pair, after retries, OSError; a
    shard that vanished, `ShardLost`.
    """

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...
