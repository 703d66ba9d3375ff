"""Files of class names and of templates, and the prompts that they make.

Prompts are canonicalised, as big_vision's evaluator does for SigLIP: "_" becomes a space, punctuation goes, everything is
lower case. Without it published models lose up to 12 points on class names with underscores. A model whose own pipeline does
nothing of the kind (TokenConfig.canonical) gets its prompts as they are written.
"""

import io
import json
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from siglip.errors import UserError
from siglip.trees import did_you_mean, regular

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LAMBDA = re.compile(r"\blambda\s+\w+\s*:")
_JSON = re.compile(r"\s*(\[|\{(?!c?\}))")  # a template may begin with {} or {c}
_WORDNET_ID, _WORDNET_LINE = re.compile(r"n\d{8}"), re.compile(r"(n\d{8})[\s:]+([^\s\d].*)")
# "12,tench", "0: 'tench'", "- tench", "'tench',", rows with tabs, and WordNet ids without names
_OF_ANOTHER_FORM = re.compile(r"""n\d{8}(?!\w)|\d+\s*[:;,]|-\s|["'].*["'],?$|.*\t|.*["'],$""")
_NUMBERED = (
    re.compile(r"(?P<number>\d{1,9})[\s.,;:|)]+(?P<name>.+)"),
    re.compile(r"(?P<name>.+?)[\s,;:|]+(?P<number>\d{1,9})"),
)
_SHOWN_CHARS = 100


class Classes(NamedTuple):
    """Class names in the order of their numbers, and by what else a label may name them: WordNet ids, names of folders; or ()."""

    names: list[str]
    ids: tuple[str, ...] = ()

    def numbers(self) -> dict[str, int]:
        """The class of each name and id; of equal names the first."""
        numbers: dict[str, int] = {}
        for number, label in [*enumerate(self.names), *enumerate(self.ids)]:
            numbers.setdefault(label, number)
        return numbers

    def to_json(self) -> str:
        """A text that `read_classes` takes in place of a file."""
        if not self.ids:
            return json.dumps(self.names, ensure_ascii=False)
        pairs = zip(self.ids, self.names, strict=True)
        return json.dumps({str(k): pair for k, pair in enumerate(pairs)}, ensure_ascii=False)


def read_names(source: str | None) -> list[str]:
    """The names of `read_classes`. Raises as that does."""
    return read_classes(source).names


def read_classes(source: str | None) -> Classes:
    """The classes of a file, of a JSON text itself, or of ImageNet.

    Args:
        source: "imagenet" for CLIP's names of its 1000 classes; or a file, or a text that is JSON itself. A file has one name
            per line; a WordNet id and a name per line; a JSON list; or a JSON object, either {"0": name, …} or, as
            ImageNet's index file, {"0": [id, name], …}, or {id: name, …} with WordNet ids, sorted.

    Raises:
        FileNotFoundError, UserError: there is no file, or it holds no names.
    """
    if source is None:
        raise UserError("these data bring no class names; name a file with one per line: --classes FILE")
    where, names = shown(source), read_lines_or_json(source, "classes.json", blank=True)
    ids: list[str] = []
    if isinstance(names, Mapping) and names and all(_WORDNET_ID.fullmatch(key) for key in names):
        ids, names = sorted(names), [names[key] for key in sorted(names)]
    elif isinstance(names, Mapping):
        if set(names) != {str(k) for k in range(len(names))}:
            raise UserError(f'{where}: a JSON object of class names must have the keys "0" to "{len(names) - 1}"')
        names = [names[str(k)] for k in range(len(names))]
        if names and all(_is_pair(name) for name in names):
            ids, names = [entry[0] for entry in names], [entry[1] for entry in names]
    elif names and all(isinstance(name, str) and _WORDNET_LINE.fullmatch(name) for name in names):
        pairs = sorted(_WORDNET_LINE.fullmatch(name).groups() for name in names)
        ids, names = [pair[0] for pair in pairs], [pair[1].partition(",")[0] for pair in pairs]
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where} holds no class names; write one name per line, or a JSON list of strings")
    nameless = next((number for number, name in enumerate(names) if not _encodable(name).strip()), None)
    if nameless is not None:
        raise UserError(f"{where}: class no. {nameless} (from 0) has no name, and labels count lines; fill it")
    _refuse_markup(where, names)
    return Classes([_encodable(name) for name in names], tuple(ids))


def shown(source: str) -> str:
    """A file's name, or the beginning of a JSON text, for messages."""
    return source if len(source) <= _SHOWN_CHARS else source[:_SHOWN_CHARS] + "…"


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)


def _refuse_markup(where: str, lines: Sequence[str]) -> None:
    """Raises UserError where every line, or every one below a head, is an entry of something else: a table, code, YAML."""
    for rows in (lines, lines[1:]):
        if len(rows) > 1 and (
            all(map(_OF_ANOTHER_FORM.match, rows)) or any(_are_numbered(rows, form) for form in _NUMBERED)
        ):
            raise UserError(
                f"{where} is a table or code, such as {rows[0]!r}; write the text alone on each line, or JSON"
            )


def _are_numbered(lines: Sequence[str], form: re.Pattern[str]) -> bool:
    """Whether numbers stand beside the texts that only say which line it is: "1. cat", "/b/beach 48". Cars have years."""
    found = [form.fullmatch(line) for line in lines]
    if not all(found) or 2 * len({match["name"] for match in found}) <= len(lines):
        return False
    numbers = sorted(int(match["number"]) for match in found)
    return numbers in ([*range(len(lines))], [*range(1, len(lines) + 1)])


def read_templates(path: str | None) -> Sequence[str] | Mapping[str, Sequence[str]]:
    """Prompts for every class: one per line or a JSON list; or for each class its own, a JSON object (CuPL).

    Args:
        path: a file, JSON itself, or "imagenet" for CLIP's 80; None: the class name alone.

    Raises:
        FileNotFoundError, UserError: there is no file, or it holds no templates.
    """
    if path is None:
        return ["{}"]
    where, templates = shown(path), read_lines_or_json(path, "templates.txt")
    if isinstance(templates, Mapping) and all(isinstance(value, Mapping) for value in templates.values()):
        if len(templates) != 1:  # CLIP_benchmark's files have the data set's name on top
            raise UserError(f"{where} holds templates of {len(templates)} data sets: {', '.join(templates)}; keep one")
        (templates,) = templates.values()
    lists = list(templates.values()) if isinstance(templates, Mapping) else [templates]
    prompts = [prompt for own in lists if isinstance(own, list) for prompt in own]
    if not prompts or not all(isinstance(own, list) for own in lists) or not all(isinstance(p, str) for p in prompts):
        raise UserError(f"{where} holds no templates; write one per line, such as 'a photo of a {{}}', or a JSON list")
    code = next((prompt for prompt in prompts if _LAMBDA.search(prompt)), None)
    if code is not None:
        raise UserError(f"{where}: {code!r} is Python code; write the template alone, such as 'a photo of a {{}}'")
    if isinstance(templates, list):
        _refuse_markup(where, templates)
    return templates


def read_lines_or_json(source: str, shipped: str | None = None, *, blank: bool = False) -> Any:
    """The lines or the JSON of a file, or the JSON that `source` is.

    Args:
        shipped: the file that "imagenet" stands for; None: nothing but a file of that name.
        blank: whether blank lines are kept, but for those at the end.
    """
    path = Path(source)
    if source.lstrip().startswith(("[", "{")):
        content, path = source, shown(source)
    else:
        if shipped is not None and source == "imagenet" and not path.exists():
            path = Path(__file__).parent / "imagenet" / shipped
        content = read_text(path)
    if not _JSON.match(content):
        return [line.strip() for line in io.StringIO(content.rstrip()) if blank or line.strip()]
    try:
        return load_json(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} starts like JSON but is not ({error}); write one entry per line, or JSON") from None


def load_json(content: str) -> Any:
    """As `json.loads`, which drops the first of two values under one key. Raises ValueError, RecursionError."""

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise ValueError(f"the key {twice!r} is there more than once")
        return found

    return json.loads(content, object_pairs_hook=to_dict)


def read_text(path: Path) -> str:
    """A text in UTF-8. Its lines are those of io.StringIO: str.splitlines would end one at some rare spaces too.

    Raises:
        FileNotFoundError, UserError: there is no file, or it holds something else.
    """
    try:
        content = regular(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); write one entry per line, or JSON") from None
    if "\0" in content:
        raise UserError(f"{path} is not text; write one entry per line, or JSON")
    return content


def canonicalize(text: str) -> str:
    """ "Polar_Bear!" -> "polar bear"."""
    return " ".join(_encodable(text).replace("_", " ").translate(_PUNCTUATION).lower().split())


def _encodable(text: str) -> str:
    """A text of a JSON file without half an emoji ("\\ud83d"), which cannot be tokenized."""
    return text.encode("utf-8", "ignore").decode()


def make_prompts(
    classnames: Sequence[str], templates: Sequence[str] | Mapping[str, Sequence[str]], *, canonical: bool = True
) -> list[list[str]]:
    """The prompts of each class; "{}" in a template (or "{c}", as CLIP_benchmark writes) is the class name.

    Raises:
        UserError: a template for all classes has no {}, a class has no prompts of its own, or its name is all punctuation.
    """
    if isinstance(templates, Mapping):
        missing = next((name for name in classnames if not any(map(str.strip, templates.get(name, ())))), None)
        if missing is not None:
            raise UserError(f"the templates have no prompts for class {missing!r}{did_you_mean(missing, templates)}")
    else:
        for template in templates:
            if "{}" not in template and "{c}" not in template:
                raise UserError(f"template {template!r} has no {{}} for the class name")
        templates = dict.fromkeys(classnames, templates)
        empty = next((name for name in classnames if canonical and not canonicalize(name)), None)
        if empty is not None:
            raise UserError(f"class {empty!r} is all punctuation; name it in words, or use --canonical False")
    finish = canonicalize if canonical else str
    return [
        [finish(template.replace("{c}", "{}").replace("{}", name)) for template in templates[name]]
        for name in classnames
    ]
