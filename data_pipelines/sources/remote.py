"""Files behind a URL, through fsspec: size, listing, byte ranges; tried again while there is hope.

    wait before try k:  min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**k) * uniform(0.5, 1), or what the server asks for

Timeouts, dropped connections, short bodies, 408, 425, 429 and 5xx are tried again; 403, 404 and the like are not.
What fails for good is one line: which bytes of which URL, what failed, how often.

HTTP is spoken here, over fsspec's session, because `fsspec` reads a body to its end before it looks at the
status: a server that ignores the Range header would send the whole shard for every image.

fsspec is imported with the first URL: local files are read on machines that have none of this.

The trap: a stalled connection raises nothing. Every step has a deadline, so it counts as dropped.
"""

import asyncio
import contextlib
import random
import re
import sys
import time
import warnings
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from data_pipelines.errors import UserError

TRIES = 6
FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 20.0
STALL_S = 20.0  # without a byte, or without an answer
SLOWEST_BYTES_PER_S = 1 << 18
LOOK_AGAIN_S = 60.0  # between two looks at the version of a file whose reads do not tell it
_CHUNK_BYTES = 1 << 20
_TRANSIENT_STATUS = frozenset((408, 425, 429))
_VERSION_FIELDS = (
    "ETag",
    "etag",
    "generation",
    "md5Hash",
    "LastModified",
    "last_modified",
    "updated",
    "mtime",
    "created",
)
_CLIENT_ERRORS = {
    "botocore.exceptions": "BotoCoreError",
    "google.auth.exceptions": "GoogleAuthError",
    "gcsfs.retry": "HttpError",
}
_NO_CREDENTIALS = re.compile("Credential|Token|SSO")
_jitter = random.SystemRandom()  # Worker processes forked from one parent must not wait in step.
_warned_hosts: set[str] = set()
_looked_at: dict[str, float] = {}


class RemoteError(OSError):
    """A remote read that failed after every retry."""


class BadAnswer(OSError):
    """An HTTP answer without the bytes that were asked for. status: of the answer, 0 when the body is at fault."""

    def __init__(self, message: str, *, status: int = 0, retry_after_s: float | None = None):
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class FileStat:
    """Size and version (an entity tag or a time, "" when neither is told) of a file, and the versions of those beside it."""

    size: int
    version: str
    beside: str = ""


def stat(url: str) -> FileStat:
    """Raises FileNotFoundError, PermissionError, ValueError (a URL that cannot be), RemoteError."""

    async def over_http(fs) -> FileStat:
        async with _get(fs, url, "bytes=0-0") as response:
            whole = re.fullmatch(r"bytes .*/(\d+)", response.headers.get("Content-Range", ""))
            if response.status == 416 and whole:
                return FileStat(0, "")
            _check_status(response)
            size = int(whole[1]) if whole else response.content_length
            if size is None:
                raise BadAnswer("the answer does not tell the size")
            return FileStat(size, _version_of(response))

    def attempt() -> FileStat:
        fs, path = _open(url)
        return _run(fs, over_http(fs), STALL_S) if _is_http(fs) else _stat_over_others(fs, url, path)

    return _retried(attempt, f"asking for the size of {url!r}")


def _stat_over_others(fs, url: str, path: str) -> FileStat:
    fs.invalidate_cache(path)  # A listing that this process made before tells old versions.
    info = _run(fs, fs._info(path), STALL_S) if _is_async(fs) else fs.info(path)
    if info.get("type") == "directory" or info.get("size") is None:
        raise UserError(f"{url!r} is a folder; name its files, e.g. '{url.rstrip('/')}/*.tar'")
    return FileStat(info["size"], str(next((info[name] for name in _VERSION_FIELDS if info.get(name)), "")))


def read_range(url: str, offset: int, size: int, *, total: int, version: str = "") -> bytes:
    """Exactly `size` bytes from `offset` of a file of `total` bytes and this version, as `stat` tells it ("": any).

    HTTP tells the version with every answer; elsewhere it is asked for after the first read, then every `LOOK_AGAIN_S`.

    Raises:
      FileNotFoundError, PermissionError: it is gone, or not to be read.
      RemoteError: it could not be read after every retry.
      UserError: it has another size or version by now, or the URL cannot be.
    """
    if size == 0:
        return b""
    deadline_s = STALL_S + size / SLOWEST_BYTES_PER_S

    def attempt() -> bytes:
        fs, path = _open(url)
        if _is_http(fs):
            answer = _http_range(fs, url, offset, size, FileStat(total, version))
            return _run(fs, answer, deadline_s + total / SLOWEST_BYTES_PER_S)
        ends = {"start": offset, "end": offset + size}
        data = _run(fs, fs._cat_file(path, **ends), deadline_s) if _is_async(fs) else fs.cat_file(path, **ends)
        if len(data) != size:
            raise BadAnswer(f"{len(data)} bytes came, {size} were due")
        if version and time.monotonic() > _looked_at.get(url, -LOOK_AGAIN_S) + LOOK_AGAIN_S:
            _check_version(url, version, _stat_over_others(fs, url, path).version)
            _looked_at[url] = time.monotonic()
        return data

    return _retried(attempt, f"reading bytes {offset} to {offset + size - 1} of {url!r}")


def listing(pattern: str) -> list[str]:
    """The URLs that a pattern with `*` and `[…]` in it names, sorted. Raises as `stat`; [] when there are none."""

    def attempt() -> list[str]:
        fs, path = _open(pattern)
        fs.invalidate_cache()
        try:
            return sorted(fs.unstrip_protocol(name) for name in fs.glob(path))
        except FileNotFoundError:  # the folder
            return []

    return _retried(attempt, f"listing {pattern!r}")


async def _http_range(fs, url: str, offset: int, size: int, whole: FileStat) -> bytes:
    async with _get(fs, url, f"bytes={offset}-{offset + size - 1}") as response:
        _check_status(response)
        skip = 0
        if response.status == 206:
            told = response.headers.get("Content-Range", "")
            if not told.startswith(f"bytes {offset}-"):
                raise BadAnswer(f"the answer is for another range ({told!r})", status=206)
            if told.rpartition("/")[2] not in ("*", str(whole.size)):
                raise UserError(f"{url!r} had {whole.size} bytes when it was opened, now it is {told!r}; start again")
        else:
            skip = offset
            _warn_no_ranges(url)
        _check_version(url, whole.version, _version_of(response))
        data = bytearray()
        while len(data) < size:
            chunk = await asyncio.wait_for(response.content.read(_CHUNK_BYTES), STALL_S)
            if not chunk:
                raise BadAnswer(f"the body ended after {len(data)} of {size} bytes")
            data += chunk[skip : skip + size - len(data)]
            skip = max(0, skip - len(chunk))
        return bytes(data)


@contextlib.asynccontextmanager
async def _get(fs, url: str, byte_range: str):
    """The answer to a request for a byte range, its body unread."""
    headers = dict(fs.kwargs.get("headers", {})) | {"Range": byte_range, "Accept-Encoding": "identity"}
    session = await fs.set_session()
    request = session.get(fs.encode_url(url), **{**fs.kwargs, "headers": headers})
    response = await asyncio.wait_for(request, STALL_S)
    try:
        yield response
    finally:
        response.close()  # A body read to its end has given its connection back; of another the rest is not wanted.


def _check_status(response) -> None:
    if response.status in (200, 206):
        return
    asked = response.headers.get("Retry-After", "")
    wait_s = float(asked) if asked.isdecimal() else None
    raise BadAnswer(f"{response.status} {response.reason}", status=response.status, retry_after_s=wait_s)


def _version_of(response) -> str:
    return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""


def _check_version(url: str, opened: str, now: str) -> None:
    if opened and now and now != opened:
        raise UserError(
            f"{url!r} was replaced: its version was {opened} when it was opened, now it is {now}; start again"
        )


def _warn_no_ranges(url: str) -> None:
    host = urlsplit(url).netloc
    if host not in _warned_hosts:
        _warned_hosts.add(host)
        warnings.warn(
            f"the server of {url!r} ignores byte ranges, so every read starts at the first byte: slow; "
            "serve the files with ranges, or copy them",
            stacklevel=2,
        )


def _open(url: str):
    """The fsspec file system for a URL (it keeps one in each process) and the path in it."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url!r} cannot be opened: {error}") from error
    except ValueError as error:
        raise UserError(f"{url!r} cannot be opened: {error}; name a path or a URL that fsspec knows") from error


def _is_http(fs) -> bool:
    return "http" in fs.protocol if isinstance(fs.protocol, tuple | list) else fs.protocol == "http"


def _is_async(fs) -> bool:
    from fsspec.asyn import AsyncFileSystem

    return isinstance(fs, AsyncFileSystem)


def _run(fs, work: Awaitable, deadline_s: float):
    """Runs a coroutine on fsspec's loop, and cancels it at the deadline."""
    from fsspec.asyn import sync

    return sync(fs.loop, asyncio.wait_for, work, deadline_s)


def _retried(attempt: Callable, doing: str):
    started_s = time.monotonic()
    for number in range(TRIES):
        try:
            return attempt()
        except Exception as error:  # file systems raise kinds of their own; what is not worth a retry goes on below
            _raise_if_permanent(error, doing)
            last = error
        if number < TRIES - 1:
            wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**number) * _jitter.uniform(0.5, 1)
            asked_s = getattr(last, "retry_after_s", None) or 0
            time.sleep(max(wait_s, min(asked_s, LONGEST_WAIT_S)))
    took_s = time.monotonic() - started_s
    raise RemoteError(
        f"{doing} failed {TRIES} times in {took_s:.0f} s, at last with: {_describe(last)}; check server and network"
    ) from last


def _raise_if_permanent(error: Exception, doing: str) -> None:
    status = getattr(error, "status", None) or getattr(error, "code", None) or 0
    if status == 404 or status == 410 or isinstance(error, FileNotFoundError):
        raise FileNotFoundError(f"{doing}: there is no such file ({_describe(error)}); check the URL") from error
    no_credentials = isinstance(error, _client_errors()) and _NO_CREDENTIALS.search(type(error).__name__)
    if status in (401, 403) or isinstance(error, PermissionError) or no_credentials:
        raise PermissionError(f"{doing}: not permitted ({_describe(error)}); check the credentials") from error
    if isinstance(status, int) and 400 <= status < 500 and status not in _TRANSIENT_STATUS:
        raise UserError(f"{doing}: the server refuses ({_describe(error)})") from error
    if not isinstance(error, (OSError, EOFError, *_client_errors())):
        raise error


def _client_errors() -> tuple[type[Exception], ...]:
    """What the clients beneath fsspec raise beside OSError: aiohttp, and those of the cloud file systems that are in use."""
    import aiohttp

    loaded = [(sys.modules[module], name) for module, name in _CLIENT_ERRORS.items() if module in sys.modules]
    return (aiohttp.ClientError, *(vars(module)[name] for module, name in loaded))


def _describe(error: Exception) -> str:
    name = "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__
    text = " ".join(str(error).split())
    return text if isinstance(error, BadAnswer) else f"{name}: {text}" if text else name
