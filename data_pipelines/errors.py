"""What the command line tells in one line; any other exception is a bug and keeps its traceback."""

LFS_NOTE = b"version https://git-lfs"  # git-lfs, docs/spec.md


class UserError(ValueError):
    """Bad input: value, constraint and fix in the message. The command line prints it as one line and exits with 2."""


def check_fetched(path: str, start: bytes) -> None:
    """Raises UserError if a file, of which this is the start, is what Git LFS puts in place of one that it has not fetched."""
    if start.startswith(LFS_NOTE):
        raise UserError(f"{path!r} is not the file, but Git LFS' note of where it is; get it with 'git lfs pull'")


class RunFailed(RuntimeError):
    """A run that started well and cannot go on (a worker killed, a non-finite loss): one line and exit code 1.

    Starting it again may help, so launchers do.
    """


# Paths that a user names wrongly. Other OSErrors (a full disk, a network that is down) are the machine's.
BAD_PATH = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)
