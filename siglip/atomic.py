"""Files and folders that appear whole or not at all; data_pipelines/atomic.py is its twin.

A process that is killed cannot clean up. What it leaves has a name that starts with a dot, beside the file it would have become.
Folders that are being written are locked: one that is not is a leftover, and the next one of its name removes it.
"""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

_PARTIAL = ".partial"
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the path to an OSError without one, as a full disk gives it while an open file is written, and makes one of what a
    library's error says of the disk in words."""
    try:
        yield
    except Exception as error:
        if getattr(error, "filename", None) is not None:
            raise
        told = (code for code in _OF_THE_DISK if os.strerror(code) in str(error))
        if code := getattr(error, "errno", None) or next(told, None):
            raise OSError(code, getattr(error, "strerror", None) or os.strerror(code), str(path)) from error
        raise


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; it replaces `path` when the block succeeds and is removed when it fails."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")  # hosts may share the folder
    try:
        with naming(path):
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
    partial = lock = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=_PARTIAL))
        lock = _lock(partial)
        partial.chmod(0o755)
        with naming(out):
            yield partial
        publish(partial, out)
        made = []
    finally:
        if lock is not None:
            os.close(lock)
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # somebody else has put something there
                folder.rmdir()


def _lock(folder: Path) -> int | None:
    """A descriptor that locks a folder until it is closed or its process ends; None where it is locked, or has no locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sweep(out: Path) -> None:
    """Removes what processes that were killed have left of `out`."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.*{_PARTIAL}"):
        with contextlib.suppress(OSError):  # gone by now, or a file
            if (lock := _lock(left)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)
