"""Folders that appear whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that gets its name when the block succeeds; else nothing is left, parents included.

    Raises:
        FileExistsError: `out` exists.
    """
    if out.exists():
        raise FileExistsError(f"{str(out)!r} exists; name a new folder, or remove it first")
    made = [folder for folder in out.absolute().parents if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        partial.chmod(0o755)
        yield partial
        os.rename(partial, out)
        made = []
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in made:
            folder.rmdir()
