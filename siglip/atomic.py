"""Files and folders that appear whole or not at all; data_pipelines/atomic.py is its twin.

A process that is killed cannot clean up. What it leaves has a name that starts with a dot, beside the file it would have become.
"""

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; it replaces `path` when the block succeeds and is removed when it fails."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")  # hosts may share the folder
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Readers of the file see the old content or the new, nothing between."""
    with new_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def new_folder(out: Path, *, publish: Callable[[Path, Path], None] = os.rename) -> Iterator[Path]:
    """A temporary folder beside `out` that is renamed to it when the block succeeds; else nothing is left, parents included.

    Args:
        publish: (temporary folder, out) -> None: the renaming.

    Raises:
        FileExistsError: `out` exists.
    """
    if out.exists():
        raise FileExistsError(f"{str(out)!r} exists; name a new one, or remove it first")
    made = [folder for folder in out.absolute().parents if not folder.exists()]
    partial = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        partial.chmod(0o755)
        yield partial
        publish(partial, out)
        made = []
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # somebody else has put something there
                folder.rmdir()
