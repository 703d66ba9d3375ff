"""What emoji show: their names and keywords in many languages (Unicode CLDR), their groups, and which are kept out of training.

An idea is a sequence of code points, "1F346", without variation selectors. Icon sets name their files after it in ways of
their own ("eggplant", "flag-for-flag-china", "aerialtramway"), which `Ideas.find` undoes.
"""

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data_pipelines.sample import LANGUAGES, packages

# Those of Crossmodal-3600 (arXiv:2205.12522); CLDR's qu is its quz.
EVALUATION_LANGUAGES = (
    *LANGUAGES, "bn", "cs", "da", "el", "fa", "fi", "fil", "he", "hr", "hu", "id", "it", "ko", "mi", "nl", "no", "pl", "pt",
    "qu", "ro", "sv", "tr", "uk", "vi",
)  # fmt: skip
UNSEEN = Path(__file__).with_name("unseen_ideas.txt")
_TONES = {f"1F3F{digit}" for digit in "BCDEF"}
_GENDERS = {"2640", "2642"}
_PERSON = {"1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2"}


def to_idea(text: str) -> str:
    """An emoji as its code points in hexadecimal, without the selector that only asks for colour: "1F468 200D 1F33E"."""
    return " ".join(f"{ord(char):04X}" for char in text if char != "\ufe0f")


def family(idea: str) -> str:
    """What it is a variant of: without skin tones, women and men as persons. A family is never on both sides of a split."""
    points = [point for point in idea.split() if point not in _TONES]
    if len(points) > 2 and points[-2] == "200D" and points[-1] in _GENDERS:
        points = points[:-2]
    return " ".join(_PERSON.get(point, point) for point in points)


def words(text: str) -> frozenset[str]:
    """Lower-case words without a plural s, to find a name within another."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return frozenset(word.removesuffix("s") for word in re.findall("[a-z0-9]+", plain))


@dataclass(frozen=True)
class Ideas:
    """Names of every emoji. annotations: language -> text -> CLDR's entry; classes: idea -> (group, subgroup)."""

    annotations: dict[str, dict[str, dict]]
    classes: dict[str, tuple[str, str]]

    @staticmethod
    def read(folder: Path) -> "Ideas":
        """From the packages, see `packages.opened`."""
        annotations = {language: {} for language in EVALUATION_LANGUAGES}
        for name, path in (
            ("cldr-annotations-derived-full", "annotationsDerived"),
            ("cldr-annotations-full", "annotations"),
        ):
            with packages.opened(name, folder) as files:
                for language, entries in annotations.items():
                    told = json.load(files.extractfile(f"package/{path}/{language}/annotations.json"))
                    entries.update(told[path]["annotations"])
        with packages.opened("emojibase-data", folder) as files:
            emoji = json.load(files.extractfile("package/en/data.json"))
            groups = json.load(files.extractfile("package/meta/groups.json"))
        classes = {}
        for it in emoji:
            if "group" in it:
                names = groups["groups"][str(it["group"])], groups["subgroups"][str(it["subgroup"])]
                for text in (it["emoji"], *(skin["emoji"] for skin in it.get("skins", ()))):
                    classes[to_idea(text)] = tuple(name.replace("-", " ") for name in names)
        return Ideas(annotations, classes)

    def name(self, idea: str, language: str = "en") -> str | None:
        entry = self._entry(idea, language)
        return entry.get("tts", [None])[0]

    def captions(self, idea: str, languages: Sequence[str]) -> dict[str, str]:
        named = {language: self.name(idea, language) for language in languages}
        return {language: name for language, name in named.items() if name}

    def keywords(self, idea: str) -> list[str]:
        return list(self._entry(idea, "en").get("default", ()))

    def find(self, file_name: str) -> str | None:
        """The idea that an icon is named after, or None."""
        return self._by_name.get(_squeezed(file_name)) or self._by_name.get(_squeezed(file_name) + "face")

    def _entry(self, idea: str, language: str) -> dict:
        return self.annotations[language].get("".join(chr(int(point, 16)) for point in idea.split()), {})

    @cached_property
    def _by_name(self) -> dict[str, str]:
        found = {"keycapasterisk": "002A 20E3", "keycappound": "0023 20E3"}
        for idea in self.classes:
            name, text = self.name(idea), "".join(chr(int(point, 16)) for point in idea.split())
            for known in (name or "", unicodedata.name(text, "") if len(text) == 1 else ""):
                squeezed = _squeezed(known)
                if squeezed and squeezed != "keycap":
                    found.setdefault(squeezed, idea)
                    if squeezed.startswith("flag"):
                        found.setdefault("flagfor" + squeezed, idea)
        return found


def _squeezed(name: str) -> str:
    return re.sub("[^a-z0-9]", "", unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower())


def unseen() -> list[str]:
    """The ideas of the evaluation of ideas that are never seen: `unseen_ideas.txt`, one a line, then its name."""
    return [line.partition("\t")[0] for line in UNSEEN.read_text("utf-8").splitlines()]
