"""Whole remote files on this machine, for libraries that read local files only; together at most SIGLIP_COPIES_GIB.

    ~/.cache/siglip/copies/…copy       the latest used ones, that is the newest by modification time
    ~/.cache/siglip/copies/…partial    one on its way, locked by whoever fetches it

Any number of processes share the folder. A file is fetched once: who wants one that is on its way waits at its lock. The
copies used longest ago make room for a new one; one that is being opened is locked, and stays. Files on their way come on top.

The trap: a lock belongs to a file, not to its name. Who got the lock looks whether the name still means that file.
"""

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator

from data_pipelines.errors import UserError
from data_pipelines.sources import files, remote

DEFAULT_GIB = 64.0
_FETCHED_BYTES = 1 << 23
_ABANDONED_S = 3600.0  # Longer than a read takes whose storage stalls in every retry.


@contextlib.contextmanager
def local_copy(path: str, size: int, version: str) -> Iterator[str]:
    """The path of a file on this machine: its own, or that of a copy, which stays there at least until the block ends.

    Raises:
      FileNotFoundError, PermissionError, UserError, OSError: it cannot be read, or not be kept.
    """
    if not files.is_remote(path):
        yield path
        return
    copy = files.cache_path(path, f".{hashlib.sha256(f'{size} {version}'.encode()).hexdigest()[:8]}.copy", "copies")
    os.makedirs(os.path.dirname(copy), exist_ok=True)
    while (held := _hold_whole(copy, size)) is None:
        _fetch(path, size, version, copy)
    with held:
        now = time.time_ns()
        os.utime(held.fileno(), ns=(now, now))
        yield copy


def limit_bytes() -> int:
    """How much all copies may take. Raises UserError: SIGLIP_COPIES_GIB is not a positive number."""
    told = os.environ.get("SIGLIP_COPIES_GIB", str(DEFAULT_GIB))
    try:
        gib = float(told)
    except ValueError:
        gib = 0.0
    if not 0 < gib < float("inf"):
        raise UserError(f"SIGLIP_COPIES_GIB={told} must be a positive number of GiB, such as {DEFAULT_GIB:g}")
    return int(gib * 2**30)


def _hold(name: str, flags: int, lock: int):
    """The file of this name, opened and locked; None when there is none."""
    while True:
        try:
            file = open(os.open(name, flags, 0o666), "r+b" if flags & os.O_RDWR else "rb", buffering=0)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(file, lock)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(name)):
                return file
        except FileNotFoundError:
            pass  # The name is gone, or another file's, and so is the lock.
        except BaseException:
            file.close()
            raise
        file.close()


def _hold_whole(copy: str, size: int):
    """A copy, opened and locked; None when there is none, or one that a crash of the machine has cut."""
    held = _hold(copy, os.O_RDONLY, fcntl.LOCK_SH)
    if held is None or os.fstat(held.fileno()).st_size == size:
        return held
    held.close()
    return None


def _fetch(path: str, size: int, version: str, copy: str) -> None:
    """Leaves the copy in its place, or finds it there once the lock is ours."""
    partial = f"{copy.removesuffix('.copy')}.partial"
    with _hold(partial, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX) as file:
        try:
            if held := _hold_whole(copy, size):  # another has brought it while we waited
                held.close()
                os.unlink(partial)
                return
            _make_room(os.path.dirname(copy), size)
            file.truncate()  # What is there is of one who was killed.
            for offset in range(0, size, _FETCHED_BYTES):
                wanted = min(_FETCHED_BYTES, size - offset)
                file.write(remote.read_range(path, offset, wanted, total=size, version=version))
            if (written := file.tell()) != size:  # A disk that is full takes a part, without an error.
                raise OSError(
                    f"only {written} of {size} bytes of {path!r} fit into {os.path.dirname(copy)!r}; make room there"
                )
            os.replace(partial, copy)
            _make_room(os.path.dirname(copy), 0)  # Others may have fetched at the same time.
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
            raise


def _make_room(folder: str, needed: int) -> None:
    """Deletes what was used longest ago, but nothing that is locked."""
    found = []
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            told = entry.stat()
            abandoned = entry.name.endswith(".partial") and told.st_mtime < time.time() - _ABANDONED_S
            found.append((told.st_mtime_ns, told.st_size, entry.path, abandoned or entry.name.endswith(".copy")))
    used, limit = sum(size for _, size, _, _ in found), limit_bytes()
    for _, size, name, may_go in sorted(found):
        if used + needed <= limit:
            return
        if may_go and _delete(name):
            used -= size


def _delete(name: str) -> bool:
    try:
        with _hold(name, os.O_RDONLY, fcntl.LOCK_EX | fcntl.LOCK_NB) or contextlib.nullcontext():
            os.unlink(name)
    except FileNotFoundError:
        return True
    except OSError:  # locked: in use
        return False
    return True
