"""Files that appear whole or not at all: a file that a killed run left half-written must not be taken for a result.

siglip/atomic.py is its twin; the two sides share no code.
"""

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

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
    """A temporary path beside `path`; it replaces `path` when the block succeeds and is removed when it fails.

    The folder is made where it does not exist.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")  # hosts may share the folder
    try:
        with naming(path):
            yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
