"""Flags to frozen dataclasses with tyro, and tyro's error boxes to one line."""

import contextlib
import functools
import io
import os
from collections.abc import Callable
from typing import TypeVar

import tyro

from siglip.cli import expand_home
from siglip.errors import UserError

T = TypeVar("T")
_BOOLS = ("True", "False")


def parse(cls: Callable[..., T], args: list[str], *, prog: str, default: T | None = None) -> T:
    """Parses `args` into `cls`; with `default`, every field of that instance is an optional flag. `~` is expanded.

    Raises:
        UserError: one line, for an unknown flag (with a suggestion), a wrong value or a missing one.
        SystemExit: with code 0, after --help.
    """
    given, args = {} if default is None else {"default": default}, [expand_home(arg) for arg in args]
    config = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    call = functools.partial(tyro.cli, cls, args=args, prog=prog, config=config, **given)
    printed = io.StringIO()
    try:
        # Error boxes are drawn as wide as the terminal: wide enough here that no message is broken.
        with contextlib.redirect_stderr(printed), _columns(2000):
            if "-h" not in args and "--help" not in args:
                return call()
    except SystemExit as stop:
        if stop.code:
            raise UserError(_one_line(printed.getvalue())) from None
        raise
    return call()


def find_flag(args: list[str], flag: str) -> str | None:
    """The value of a flag that has to be known before the flags are parsed, or None."""
    for place, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name == flag:
            return value if equals else "".join(args[place + 1 : place + 2])
    return None


def spell_out(args: list[str], flag: str) -> list[str]:
    """`--tokens` alone is `--tokens True`, as every other flag that is true or false is given."""
    after = zip(args, [*args[1:], ""], strict=True)
    return [word for arg, value in after for word in ([arg, "True"] if arg == flag and value not in _BOOLS else [arg])]


def _one_line(box: str) -> str:
    lines = [line.strip("│╭╮╰╯─ \t") for line in box.splitlines()]
    # Where the terminal's encoding has no boxes, they are dashes.
    lines = [line for line in lines if line.strip("-") and not line.startswith(("For full help", "Argument help"))]
    hints = next((i for i, line in enumerate(lines) if line.startswith("Perhaps you meant")), None)
    if hints is not None:  # what follows are options with their whole helptexts
        options = [line.split()[0] for line in lines[hints + 1 :] if line.startswith("--")]
        lines[hints:] = [f"perhaps you meant {' or '.join(options[:3])}"] if options else []
    # The first line is the box's title.
    return "; ".join(lines[1:] if len(lines) > 1 else lines)


@contextlib.contextmanager
def _columns(width: int):
    before = {name: value for name, value in os.environ.items() if name == "COLUMNS"}
    os.environ["COLUMNS"] = str(width)
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        os.environ.update(before)
