"""Memory of a process and its children, in MiB, with the shared memory of the machine that came since this was imported."""

import contextlib
import pathlib


def read_kib(path: str) -> dict[str, int]:
    """The lines "Name:  123 kB" of a file of the kernel."""
    lines = (line.split() for line in pathlib.Path(path).read_text().splitlines() if line.endswith(" kB"))
    return {name.rstrip(":"): int(kib) for name, kib, _ in lines}


def shared_kib() -> int:
    return read_kib("/proc/meminfo")["Shmem"]


SHARED_BEFORE_KIB = shared_kib()  # a process that is started later begins to count then


def family_mib() -> float:
    """Memory of this process and its children, pages that they share counted once, and the machine's shared memory.

    A batch that no process has mapped, because it waits for its reader, is in none of them: only the machine knows it.
    """
    import psutil

    process = psutil.Process()
    kib = shared_kib() - SHARED_BEFORE_KIB
    for member in (process, *process.children(recursive=True)):
        with contextlib.suppress(OSError):  # it is gone
            sizes = read_kib(f"/proc/{member.pid}/smaps_rollup")
            kib += sizes["Pss"] - sizes["Pss_Shmem"]
    return kib / 2**10
