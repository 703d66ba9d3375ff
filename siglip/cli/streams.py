"""Standard output and standard error that never end a run.

When the reader goes away (`| head`, an ssh that drops), what comes after is dropped. A character that the encoding lacks
(PYTHONIOENCODING=ascii) is written as its escape.
"""

import errno
import io
import os
import sys
from typing import TextIO

_NO_READER = {errno.EPIPE, errno.EIO, errno.ENXIO, errno.ECONNRESET}
_STDERR = 2


def make_robust() -> None:
    """Replaces `sys.stdout` and `sys.stderr`, before anything else is written or opened."""
    sys.stdout, sys.stderr = _robust(sys.stdout, 1), _robust(sys.stderr, _STDERR)


def _robust(stream: TextIO | None, number: int) -> TextIO:
    if stream is None:  # started with it closed: no file that is opened later may get its number
        _discard(number)
    else:
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(number, "w", closefd=False)),
        encoding=getattr(stream, "encoding", "utf-8"),
        errors="backslashreplace",
        line_buffering=number == _STDERR
        or getattr(stream, "line_buffering", False)
        or "PYTHONUNBUFFERED" in os.environ,
    )


class _Output(io.FileIO):
    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            gone = error.errno in _NO_READER
            is_result = self.fileno() != _STDERR  # one that does not fit on a disk is a failure, a message is not
            if gone or is_result:
                _discard(self.fileno())  # what jax writes to it as well, and what Python still does when it ends
            if is_result and not gone:
                raise OSError(error.errno, error.strerror, "standard output") from error
            return len(data)


def _discard(number: int) -> None:
    sink = os.open(os.devnull, os.O_WRONLY)
    if sink != number:
        os.dup2(sink, number)
        os.close(sink)
