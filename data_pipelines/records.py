"""What a source holds: image-text pairs as they lie on disk, undecoded.

The trap: a pair is allowed to be broken. A missing or damaged member is stated (`image is None`, `problems`),
never raised, because the position arithmetic of the stream needs every index of a source to answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Pair:
    """One image with its texts.

    Attributes:
      key: the name of the pair in its shard (`000012345`).
      image: the encoded file, or None when the pair has no image member.
      fields: `txt` and `cls` when the pair has these members, and every field of its `json`.
      problems: what could not be read of the texts: "invalid_utf8" (txt), "invalid_json".
    """

    key: str
    image: bytes | None
    fields: Mapping[str, object]
    problems: tuple[str, ...] = ()


class Source(Protocol):
    """Random access to pairs; safe to call from several threads, and picklable for worker processes.

    `fingerprint` changes when the pairs or their order do, and stays when the files are only copied
    elsewhere.
    """

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...
