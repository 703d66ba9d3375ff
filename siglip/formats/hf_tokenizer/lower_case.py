"""Python's `str.lower`, as data: for graphs and files that have to lower-case as training did, without Python.

The lower-case form of a character does not depend on its neighbours, with one exception: the capital sigma becomes "ς" when a
cased character comes before it and none after it, case-ignorable characters not counted (Unicode 3.13, Final_Sigma).

The trap: ICU, Rust and Python each follow their own version of Unicode. These rules come from the Python that runs.
"""

import dataclasses
import string
import sys
import unicodedata
from collections.abc import Iterable, Mapping
from functools import cache


@dataclasses.dataclass(frozen=True)
class LowerCase:
    """The rules.

    Attributes:
        mapping: every character that changes, and what it becomes away from words ("Σ" to "σ").
        cased: inside of a character class: what makes a sigma after it final, or one before it not final.
        skipped: likewise: what does not count between such a character and the sigma.
    """

    mapping: Mapping[str, str]
    cased: str
    skipped: str


@cache
def lower_case_rules() -> LowerCase:
    """The rules of this Python."""
    mapping, cased, skipped = {}, [], []
    for code in range(sys.maxunicode + 1):
        c = chr(code)
        if unicodedata.category(c) in ("Cn", "Co", "Cs"):  # unassigned, private, surrogates: none has a case
            continue
        if c.lower() != c:
            mapping[c] = c.lower()
        if f"{c}Σ".lower().endswith("ς"):
            cased.append(c)
        elif f"A{c}Σ".lower().endswith("ς"):
            skipped.append(c)
    return LowerCase(mapping, character_class(cased), character_class(skipped))


def character_class(characters: Iterable[str]) -> str:
    """The inside of a character class, neighbours as ranges."""
    ranges: list[list[int]] = []
    for code in sorted(map(ord, set(characters))):
        if ranges and code == ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(escape(chr(a)) if a == b else f"{escape(chr(a))}-{escape(chr(b))}" for a, b in ranges)


def escape(text: str) -> str:
    """Literally, inside and outside of a class, in Oniguruma and RE2 alike; `re.escape` knows Python's dialect only."""
    return "".join(f"\\{c}" if c in "\\[](){}^$.|?*+-&" else c for c in text)


# Insides of character classes: what Python's `string.punctuation` and `str.split` mean, which every engine counts otherwise.
PUNCTUATION = character_class(string.punctuation)
WHITE_SPACE = character_class(chr(code) for code in range(0x3001) if chr(code).isspace())
