"""A real HTTP server on localhost that serves a folder by byte ranges and misbehaves as told, for the tests of this folder."""

import collections
import contextlib
import http.server
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

Fault = Callable[["Handler", bytes, int], bool]


class Server(http.server.ThreadingHTTPServer):
    """faults: one for each request to come (None: no fault), after these `always`; requests: what was asked for, each answered
    after latency_s; validator: the header that tells a file's version.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.faults: list[Fault | None] = []
        self.always: Fault | None = None
        self.latency_s = 0.0
        self.validator = "ETag"
        self._contents: dict[tuple[Path, str], bytes] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def content(self, path: Path) -> tuple[bytes, str]:
        """The bytes of a file and its entity tag."""
        version = f'"{path.stat().st_mtime_ns}"'
        if (path, version) not in self._contents:
            self._contents[path, version] = path.read_bytes()
        return self._contents[path, version], version

    def handle_error(self, request, client_address) -> None:
        pass  # a client that hangs up is part of the game


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # Headers and body go in two parts: the second would wait 40 ms.
    server: Server

    def do_GET(self) -> None:
        if self.server.latency_s:
            time.sleep(self.server.latency_s)
        asked = self.headers.get("Range")
        self.server.requests.append((self.path, asked))
        fault = self.server.faults.pop(0) if self.server.faults else self.server.always
        path = self.server.folder / self.path.lstrip("/").partition("?")[0]
        if path.is_dir():
            return self.answer(
                200, "".join(f'<a href="{name.name}">x</a>\n' for name in path.iterdir()).encode(), html=True
            )
        if not path.exists():
            return self.answer(404, b"")
        data, version = self.server.content(path)
        first, last = asked.removeprefix("bytes=").split("-") if asked else (0, len(data) - 1)
        first, last = int(first), min(int(last), len(data) - 1)
        if fault and fault(self, data, first):
            return None
        if asked and first > last:
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        told = {"Content-Range": f"bytes {first}-{last}/{len(data)}"} if asked else {}
        self.answer(206 if asked else 200, data[first : last + 1], told | {self.server.validator: version})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, html: bool = False) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        if html:
            self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


def refuse(status: int, **headers: str) -> Fault:
    def fault(handler: Handler, data: bytes, first: int) -> bool:
        handler.answer(status, b"no", {name.replace("_", "-"): value for name, value in headers.items()})
        return True

    return fault


def stall(seconds: float) -> Fault:
    """Headers and some bytes, then silence."""

    def fault(handler: Handler, data: bytes, first: int) -> bool:
        drop(handler, data, first)
        time.sleep(seconds)
        return True

    return fault


def meet(others: threading.Barrier) -> Fault:
    """No answer either, and not before as many requests are there as `others` waits for."""

    def fault(handler: Handler, data: bytes, first: int) -> bool:
        others.wait(timeout=60)
        handler.close_connection = True
        return True

    return fault


def be_silent(seconds: float) -> Fault:
    """Not even headers."""

    def fault(handler: Handler, data: bytes, first: int) -> bool:
        time.sleep(seconds)
        handler.close_connection = True
        return True

    return fault


def drop(handler: Handler, data: bytes, first: int) -> bool:
    """Promises the rest of the file, sends a bit of it and hangs up."""
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
    handler.send_header("Content-Length", str(len(data) - first))
    handler.end_headers()
    handler.wfile.write(data[first : first + 5])
    handler.wfile.flush()
    handler.close_connection = True
    return True


def send_too_little(handler: Handler, data: bytes, first: int) -> bool:
    """A whole answer, with fewer bytes than were asked for."""
    handler.answer(206, data[first : first + 3], {"Content-Range": f"bytes {first}-{first + 2}/{len(data)}"})
    return True


def send_another_range(handler: Handler, data: bytes, first: int) -> bool:
    handler.answer(206, data[first + 1 :], {"Content-Range": f"bytes {first + 1}-{len(data) - 1}/{len(data)}"})
    return True


def ignore_range(handler: Handler, data: bytes, first: int) -> bool:
    handler.answer(200, data)
    return True


class OfEachFile:
    """Of the requests for each file this fault is answered from number `first` on (from 0), `times` times."""

    def __init__(self, fault: Fault, *, first: int = 0, times: int = 1, only: str = ""):
        self._fault, self._numbers, self._only = fault, range(first, first + times), only
        self.asked: collections.Counter[str] = collections.Counter()

    def __call__(self, handler: Handler, data: bytes, first: int) -> bool:
        number, self.asked[handler.path] = self.asked[handler.path], self.asked[handler.path] + 1
        return number in self._numbers and self._only in handler.path and self._fault(handler, data, first)


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
