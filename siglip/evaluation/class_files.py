"""Files of class names and of templates, and the prompts that they make.

Prompts are canonicalised, as big_vision's evaluator does for SigLIP: "_" becomes a space, punctuation goes, everything is
lower case. Without it published models lose up to 12 points on class names with underscores. A model whose own pipeline does
nothing of the kind (TokenConfig.canonical) gets its prompts as they are written.
"""

import json
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from siglip.errors import UserError
from siglip.trees import did_you_mean

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LAMBDA = re.compile(r"\blambda\s+\w+\s*:")
_JSON = re.compile(r"\s*(\[|\{(?!c?\}))")  # a template may begin with {} or {c}


def read_names(path: str) -> list[str]:
    """Class names: one per line, a JSON list, or a JSON object {"0": name, …} with the numbers of the classes.

    Raises:
        FileNotFoundError, UserError: there is no file, or it holds no names.
    """
    names = _read_lines_or_json(path)
    if isinstance(names, Mapping):
        if set(names) != {str(k) for k in range(len(names))}:
            raise UserError(f'{path}: a JSON object of class names must have the keys "0" to "{len(names) - 1}"')
        names = [names[str(k)] for k in range(len(names))]
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} holds no class names; write one name per line, or a JSON list of strings")
    return [_encodable(name) for name in names]


def read_templates(path: str | None) -> Sequence[str] | Mapping[str, Sequence[str]]:
    """Prompts for every class: one per line or a JSON list; or for each class its own, a JSON object (CuPL).

    Raises:
        FileNotFoundError, UserError: there is no file, or it holds no templates.
    """
    if path is None:
        return ["{}"]
    templates = _read_lines_or_json(path)
    if isinstance(templates, Mapping) and all(isinstance(value, Mapping) for value in templates.values()):
        if len(templates) != 1:  # CLIP_benchmark's files have the data set's name on top
            raise UserError(f"{path} holds templates of {len(templates)} data sets: {', '.join(templates)}; keep one")
        (templates,) = templates.values()
    lists = list(templates.values()) if isinstance(templates, Mapping) else [templates]
    prompts = [prompt for own in lists if isinstance(own, list) for prompt in own]
    if not prompts or not all(isinstance(own, list) for own in lists) or not all(isinstance(p, str) for p in prompts):
        raise UserError(f"{path} holds no templates; write one per line, such as 'a photo of a {{}}', or a JSON list")
    code = next((prompt for prompt in prompts if _LAMBDA.search(prompt)), None)
    if code is not None:
        raise UserError(f"{path}: {code!r} is Python code; write the template alone, such as 'a photo of a {{}}'")
    return templates


def _read_lines_or_json(path: str) -> Any:
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); write one entry per line, or JSON") from None
    if "\0" in content:
        raise UserError(f"{path} is not text; write one entry per line, or JSON")
    if not _JSON.match(content):
        return [line.strip() for line in content.splitlines() if line.strip()]
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} starts like JSON but is not ({error}); write one entry per line, or JSON") from None


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
        UserError: a template for all classes has no {}, or a class has no prompts of its own.
    """
    if isinstance(templates, Mapping):
        missing = next((name for name in classnames if not templates.get(name)), None)
        if missing is not None:
            raise UserError(f"the templates have no prompts for class {missing!r}{did_you_mean(missing, templates)}")
    else:
        for template in templates:
            if "{}" not in template and "{c}" not in template:
                raise UserError(f"template {template!r} has no {{}} for the class name")
        templates = dict.fromkeys(classnames, templates)
    finish = canonicalize if canonical else str
    return [
        [finish(template.replace("{c}", "{}").replace("{}", name)) for template in templates[name]]
        for name in classnames
    ]
