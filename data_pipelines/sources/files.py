"""Files by path or URL: which ones a pattern names, how large they are, and byte ranges of them.

Local files are read with `pread`, URLs through `remote`. Readers keep no position and no lock, so any number of threads
reads at once.

The trap: a file that was cut after it was indexed returns fewer bytes than asked for, without an error; here that is one.
"""

import codecs
import functools
import glob
import hashlib
import io
import os
import re
from collections.abc import Sequence
from typing import BinaryIO

from data_pipelines.errors import LFS_NOTE, UserError, check_fetched
from data_pipelines.records import ShardLost
from data_pipelines.sources import remote
from data_pipelines.sources.remote import FileStat

_OPEN_FILES = 128
_LOCAL_WINDOW_BYTES = 1 << 20
_REMOTE_WINDOW_BYTES = 1 << 23
_MAX_WHOLE_BYTES = 1 << 30
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)(?:\.\.(\d+))?")
_MAX_RANGE = 10_000_000
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::|://)")
# WebDataset's way to name several shards in one text. fsspec's chains of file systems look alike, but have no file before `::`,
# unless it is one inside an archive.
_SEVERAL = re.compile(r"(?<=\.tar)::")
_IN_ARCHIVE = ("zip://", "tar://", "libarchive://")


def is_remote(path: str) -> bool:
    """Whether a shard is named by a URL."""
    return _URL.match(path) is not None


def expand_shards(shards: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """The paths and URLs that patterns name, in the order of the patterns, sorted within a glob.

    A pattern is a path or URL with `*`, `?` (not in HTTP URLs), `[…]`, `{00000..00003}`, `{0..8..2}` or `{a,b}` in it, or several
    of tars with `::` between them. Folders and files that exist under such a name are taken by that name.

    Raises:
      FileNotFoundError: a pattern names no file.
      UserError: there is no pattern, a name is not UTF-8, or a URL cannot be opened.
      OSError: a server does not answer.
    """
    patterns = [shards] if isinstance(shards, str | os.PathLike) else list(shards)
    if not patterns or not all(os.fspath(pattern) for pattern in patterns):
        raise UserError(f"shards={shards!r} names nothing; give a path such as 'data/{{00000..00009}}.tar'")
    paths = []
    for several in map(os.fspath, patterns):
        for pattern in [several] if several.startswith(_IN_ARCHIVE) else _SEVERAL.split(several):
            paths += _expand(os.path.expanduser(pattern.removeprefix("file://")))
    for path in paths:
        if printable(path) != path:
            raise UserError(
                f"the name of shard '{printable(path)}' is not UTF-8, as manifests and reports are; rename it"
            )
    return list(dict.fromkeys(paths))


def printable(name: str) -> str:
    """The name of a file with escapes in place of bytes that are not UTF-8, which Linux allows and no text file can hold."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _expand(pattern: str) -> list[str]:
    if pattern.startswith("pipe:"):
        raise UserError(
            f"shards {pattern!r} are the output of a command, which can only be read from front to back; name the files, or "
            "their URLs (https://, s3://, gs://, hf://)"
        )
    if "{" not in pattern and not glob.has_magic(pattern):
        return [pattern]
    folder = ""
    if not is_remote(pattern):
        if os.path.exists(pattern):
            return [pattern]
        ends = [end for end, character in enumerate(pattern, 1) if character == "/"]
        folder = next((pattern[:end] for end in reversed(ends) if os.path.isdir(pattern[:end])), "")
    return [path for rest in _expand_braces(pattern[len(folder) :]) for path in _expand_glob(folder, rest)]


def _expand_glob(folder: str, pattern: str) -> list[str]:
    """folder: one that exists, taken as it is; "" for URLs."""
    path = folder + pattern
    if is_remote(path):
        magic = "*[" if path.startswith("http") else "*[?"
        found = remote.listing(path) if any(character in path for character in magic) else [path]
    else:
        has_magic = glob.has_magic(pattern) and not os.path.exists(path)
        # An index or a file that is still being written is not a shard.
        found = sorted(glob.glob(glob.escape(folder) + pattern, recursive=True)) if has_magic else [path]
    if found != [path]:
        found = [name for name in found if not name.endswith((".idx", ".partial"))]
    if not found:
        raise FileNotFoundError(f"no shard matches {path!r}; check the path and the pattern")
    return found


def _expand_braces(pattern: str) -> list[str]:
    matched = _BRACES.search(pattern)
    if not matched:
        return [pattern]
    if bounds := _RANGE.fullmatch(matched[1]):
        first, last, step = bounds.groups(default="1")
        numbers = range(int(first), int(last) + 1, max(1, int(step)))
        if int(step) == 0 or not numbers or int(last) - int(first) > _MAX_RANGE * int(step):
            raise UserError(
                f"range {{{matched[1]}}} in {pattern!r} must run upwards, over at most {_MAX_RANGE} numbers in steps of 1 or more"
            )
        choices = [f"{number:0{len(first)}d}" for number in numbers]
    elif ".." in matched[1] and "," not in matched[1]:
        raise UserError(
            f"{{{matched[1]}}} in {pattern!r} is not a range of numbers, as {{00000..00009}} and {{0..8..2}} are"
        )
    else:
        choices = matched[1].split(",")
    head, tail = pattern[: matched.start()], pattern[matched.end() :]
    return [expanded for choice in choices for expanded in _expand_braces(head + choice + tail)]


def stat(path: str) -> FileStat:
    """Size and version of a shard.

    Raises:
      FileNotFoundError, PermissionError: it is not there, or not to be read.
      UserError: it is a folder, empty, or a URL that cannot be opened.
      OSError: a server does not answer.
    """
    if is_remote(path):
        found = remote.stat(path)
    else:
        try:
            with open_regular(path) as file:
                local, start = os.fstat(file.fileno()), file.read(len(LFS_NOTE))
        except FileNotFoundError as error:
            found = "" if error.errno else ", but a device or a pipe"
            raise FileNotFoundError(f"no shard at {path!r}{found}; check the path") from error
        except IsADirectoryError as error:
            raise UserError(f"shard {path!r} is a folder; name its files, e.g. '{path}/*.tar'") from error
        except PermissionError as error:
            raise PermissionError(f"no permission to read shard {path!r}; try chmod a+r on it") from error
        check_fetched(path, start)
        found = FileStat(local.st_size, str(local.st_mtime_ns))
    if found.size == 0:
        raise UserError(f"shard {path!r} is empty (0 bytes); fetch it again or leave it out")
    return found


def exists(path: str) -> bool:
    """Whether there is such a file that may be read. Raises OSError when a server does not answer."""
    if not is_remote(path):
        return os.path.isfile(path)
    try:
        return remote.stat(path).size > 0
    except (FileNotFoundError, PermissionError, UserError):
        return False


def read_whole(path: str) -> bytes:
    """A small file. Raises as `stat`, or OSError."""
    if is_remote(path):
        found = remote.stat(path)
        check_fits(path, found.size)
        return remote.read_range(path, 0, found.size, total=found.size, version=found.version)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size  # 0 for most files of /proc, which may be endless
        check_fits(path, size)
        return file.read(size)


def lines(text: bytes, errors: str = "strict") -> list[str]:
    """The lines of a text in UTF-8; str.splitlines would end one at some rare spaces too. Raises UnicodeDecodeError."""
    return [line.decode("utf-8", errors) for line in text.removeprefix(codecs.BOM_UTF8).splitlines()]


def check_fits(path: str, size: int) -> None:
    """Raises OSError where one image, text or record is larger than any is."""
    if size > _MAX_WHOLE_BYTES:
        raise OSError(f"{path!r} has {size} bytes, more than {_MAX_WHOLE_BYTES}")


def open_regular(path: str) -> BinaryIO:
    """A local file for reading. Raises FileNotFoundError also for a device or a pipe, which opening may wait for."""
    if not os.path.isfile(path) and not os.path.isdir(path) and os.path.exists(path):
        raise FileNotFoundError(f"{path!r} is not a regular file")
    return open(path, "rb")


class Reader:
    """Byte ranges of files that are there; picklable. sizes: in bytes, one per path; versions: as `stat` tells, if known."""

    def __init__(self, paths: Sequence[str], sizes: Sequence[int], versions: Sequence[str] = ()):
        self._paths, self._sizes, self._versions = list(paths), list(sizes), list(versions)
        self._remote = [is_remote(path) for path in self._paths]
        # A file that the cache drops is closed with its last reference, so never under a thread that reads it.
        self._file = functools.lru_cache(_OPEN_FILES)(self._open)

    def __reduce__(self):
        return Reader, (self._paths, self._sizes, self._versions)

    def read(self, file: int, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`.

        Raises:
          ShardLost: the file is gone, or another by now.
          OSError: it cannot be read here and now, retries included.
        """
        path = self._paths[file]
        try:
            if self._remote[file]:
                version = self._versions[file] if self._versions else ""
                return remote.read_range(path, offset, size, total=self._sizes[file], version=version)
            opened = self._file(file)  # Held by this name while its descriptor is used.
        except FileNotFoundError as error:
            raise ShardLost(f"shard {path!r} vanished while it was in use; put it back and resume") from error
        except (PermissionError, UserError) as error:
            raise ShardLost(f"shard {path!r} cannot be read any more: {error}") from error
        data = os.pread(opened.fileno(), size, offset)
        if len(data) != size:
            raise ShardLost(f"shard {path!r} was cut while it was in use: it ends before byte {offset + size}")
        return data

    def _open(self, file: int) -> io.FileIO:
        """A local file, the one whose size and version are known: the places in another mean nothing."""
        opened = open(self._paths[file], "rb", buffering=0)
        local = os.fstat(opened.fileno())
        changed = self._versions and str(local.st_mtime_ns) != self._versions[file]
        if local.st_size != self._sizes[file] or changed:
            opened.close()
            raise ShardLost(f"shard {self._paths[file]!r} was replaced while it was in use; start again")
        return opened


class Window:
    """One file from front to back, or in leaps ahead: `at` fetches a window when a place lies outside of it."""

    def __init__(self, path: str, size: int):
        self._reader = Reader([path], [size])
        self._window_bytes = _REMOTE_WINDOW_BYTES if is_remote(path) else _LOCAL_WINDOW_BYTES
        self.size = size

    def fetch(self, offset: int, least: int = 0) -> bytes:
        """A window from `offset` on, `least` bytes or longer, but not beyond the end."""
        wanted = max(least, self._window_bytes)
        return self._reader.read(0, offset, max(0, min(wanted, self.size - offset)))


def cache_path(path: str, suffix: str, folder: str = "index") -> str:
    """Where in a folder of the user's cache something about a file is kept."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = path if is_remote(path) else os.path.abspath(path)
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return os.path.join(root, "siglip", folder, f"{digest}-{os.path.basename(path)[-80:]}{suffix}")
