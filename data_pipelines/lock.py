"""One run at a time holds a folder.

    FOLDER/.lock    {"host": …, "pid": …, "since": …, "machine": …}, there as long as a run holds the folder

The kernel's lock on that file (flock) goes when its process ends, however that ends, and most network folders pass it on to
other hosts. Some do not (mounted buckets, Lustre without -o flock): so the holder also touches the file every few seconds. A
file left behind on this machine is taken over at once; one that another machine left is watched first.

A scheduler may start a run again while the one that it has stopped still saves. So the next one waits a little, and a folder that
is held even then is not bad input: whoever starts failed runs again is to try once more.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from data_pipelines.errors import RunFailed

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
BEAT_S = 10.0
PATIENCE_S = 15.0
WATCH_S = 60.0  # network folders show a new modification time that late
_DEAD_S = 600.0  # after so long without a touch there is nothing to watch, even if the clocks differ a little


@contextlib.contextmanager
def hold(folder: Path, *, fix: str) -> Iterator[None]:
    """Holds a folder, which is made if it is not there; one that was made here and stays empty is removed.

    Raises:
        RunFailed: another process holds it, and does so after PATIENCE_S. `fix`: what to do then.
        PermissionError, NotADirectoryError: the folder cannot be made or written.
    """
    made = [parent for parent in (folder.absolute(), *folder.absolute().parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path, stop = folder / LOCK_FILE, threading.Event()
    file = None
    try:
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is not writable; {fix}")
        file = _acquire(path, fix)
        me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T"), "machine": _machine()}
        file.truncate(0)
        file.write(json.dumps(me))
        file.flush()
        threading.Thread(target=_beat, args=(path, stop), daemon=True).start()
        yield
    finally:
        stop.set()
        if file is not None:
            path.unlink(missing_ok=True)
            file.close()
        for parent in made:
            with contextlib.suppress(OSError):  # it holds something
                parent.rmdir()


def _acquire(path: Path, fix: str) -> TextIO:
    deadline, told = time.monotonic() + PATIENCE_S, False
    while True:
        file = path.open("a+")
        try:
            exclusive = _flock(file)
            if exclusive is None:
                line = _told(path, _holder(path), fix)
                if time.monotonic() > deadline:
                    raise RunFailed(line)
                if not told:
                    logger.warning("waiting up to %.0f s: %s", PATIENCE_S, line)
                told = True
                file.close()
                time.sleep(min(0.2, PATIENCE_S / 10))
                continue
            if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
                file.close()  # whoever held it has removed it meanwhile
                continue
            holder = _holder(path)
            # Of this machine, the kernel has told the truth.
            if holder and not (exclusive and holder.get("machine") == _machine()) and _is_touched(path):
                raise RunFailed(_told(path, holder, fix))
            return file
        except BaseException:
            file.close()
            raise


def _flock(file: TextIO) -> bool | None:
    """Whether the file is locked now; False where the folder knows no locks, None where another process has the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError:
        return False
    return True


def _is_touched(path: Path) -> bool:
    """Whether somebody touches the file within WATCH_S."""
    first = _touched_ns(path)
    if abs(time.time() - first / 1e9) > _DEAD_S:
        return False
    logger.warning("%s is of another machine: waiting up to %.0f s for a sign of life", path, WATCH_S)
    deadline = time.monotonic() + WATCH_S
    while time.monotonic() < deadline:
        time.sleep(min(1.0, WATCH_S / 10))
        if _touched_ns(path) != first:
            return True
    return False


def _touched_ns(path: Path) -> int:
    try:
        with path.open() as file:  # a network folder tells news when a file is opened
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT_S):
        with contextlib.suppress(OSError):
            os.utime(path)


def _holder(path: Path) -> dict[str, Any]:
    try:
        holder = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _told(path: Path, holder: dict[str, Any], fix: str) -> str:
    who = "another process"
    if {"pid", "host", "since"} <= holder.keys():
        who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    return f"{path.parent} is in use by {who}; wait until it ends, or {fix}"


def _machine() -> str:
    """Identifies the running kernel: host names repeat, and containers have their own."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
