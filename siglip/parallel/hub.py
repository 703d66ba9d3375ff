"""The middle of the star that the processes of a job form (siglip/parallel/peers.py), and the wires it is made of.

It knows nothing of training: it lets in, hands out what everyone has sent under one name, passes on, and notices who is gone.

The trap: it lives in process 0 and dies with it. That is fine: everyone sees their wire to it close.
"""

import contextlib
import json
import selectors
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from siglip.errors import UserError

_CHUNK_BYTES = 1 << 16
_STRANGER_BYTES = 1 << 12  # enough to say hello


class Hub:
    """The middle of the star, a thread of process 0: lets in, passes on, and notices who is missing."""

    def __init__(self, port: int, *, count: int, timeout_s: float, heartbeat_timeout_s: float) -> None:
        """Raises ValueError if the port is taken."""
        self._count, self._timeout_s, self._limit_s = count, timeout_s, heartbeat_timeout_s
        self._server = listen(port)
        self.port = self._server.getsockname()[1]
        self._guests: dict[int, Wire] = {}  # by index
        self._complete = self._stopping = False
        self._values: dict[str, dict[int, Any]] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        threading.Thread(target=self._run, name="siglip-hub", daemon=True).start()

    def _run(self) -> None:
        pause_s, deadline, beat_at = interval_s(self._limit_s), time.monotonic() + self._timeout_s, 0.0
        while not self._complete or self._guests:
            for key, _ in self._selector.select(pause_s / 2):
                if key.data is None:
                    self._let_in()
                else:
                    self._hear(key.data)
            now = time.monotonic()
            if not self._complete and now > deadline:
                return self._refuse_all(self._who_is_missing())
            if self._complete and now >= beat_at:
                self._tell_all({"kind": "beat"})
                beat_at = now + pause_s
            for guest in list(self._guests.values()):
                if self._complete and now - guest.heard > self._limit_s:
                    self._drop(guest, f"no heartbeat for {self._limit_s:g} s")
        self._server.close()

    def _let_in(self) -> None:
        with contextlib.suppress(OSError):  # it may have gone again already
            connection, _ = self._server.accept()
            try:
                connection.settimeout(self._limit_s / 4)  # a guest that does not read must not stop the others
                self._selector.register(connection, selectors.EVENT_READ, Wire(connection))
            except OSError:
                connection.close()

    def _hear(self, guest: "Wire") -> None:
        """Takes in what a guest sends; anybody may send anything, and this thread has to outlive it."""
        try:
            messages = guest.receive()
            for message in messages or ():
                self._handle(guest, message)
                if guest.dropped:
                    return
            if guest.index is None and guest.pending_bytes > _STRANGER_BYTES:
                raise UserError("a line without an end")
        except OSError as error:
            return self._drop(guest, f"connection lost: {error.strerror or error}")
        except (KeyError, TypeError, ValueError, RecursionError) as error:  # the last for JSON that is nested too deep
            return self._drop(guest, f"it sent what is no message: {error!r}")
        if messages is None:
            self._drop(guest, "it was killed or its host is down")

    def _handle(self, guest: "Wire", message: Mapping[str, Any]) -> None:
        kind = message["kind"]
        if kind == "hello" and guest.index is None:  # once: a guest has one index
            self._welcome(guest, message.get("index"), message.get("count"))
        elif guest.index is None:
            self._drop(guest, "")
        elif kind == "gather":
            values = self._values.setdefault(message["name"], {})
            values[guest.index] = message["value"]
            if len(values) == self._count:
                del self._values[message["name"]]
                ordered = [values[index] for index in range(self._count)]
                self._tell_all({"kind": "gathered", "name": message["name"], "values": ordered})
        elif kind == "stop" and not self._stopping:
            self._stopping = True  # the first one counts
            self._tell_all(message)
        elif kind == "failed":
            # The sender last: it goes once it hears this, and if it is process 0, this hub goes with it.
            self._tell_all(message, last=guest)
        elif kind == "bye":
            guest.said_bye = True

    def _welcome(self, guest: "Wire", index: Any, count: Any) -> None:
        fix = "give every process the same distributed.processes and its own distributed.process_id"
        if count != self._count or index not in range(self._count):
            line = f"process {index} was told that there are {count} processes, process 0 that there are {self._count}; {fix}"
        elif index in self._guests:
            line = f"two processes say that they are process {index} of {count}; {fix}"
        else:
            guest.index, line = index, None
            self._guests[index] = guest
        if line is not None:
            guest.send({"kind": "refused", "line": line})
            if not self._complete:  # a stranger does not stop a job that runs
                self._refuse_all(line)
        elif len(self._guests) == self._count:
            self._complete = True
            for other in self._guests.values():
                other.heard = time.monotonic()
            self._tell_all({"kind": "welcome"})

    def _who_is_missing(self) -> str:
        missing = sorted(set(range(self._count)) - self._guests.keys())
        names = ", ".join(map(str, missing[:8])) + (" …" if len(missing) > 8 else "")
        return (
            f"{len(missing)} of {self._count} processes did not join process 0 at {socket.gethostname()}:{self.port} within "
            f"{self._timeout_s:g} s (missing: {names}); start the same command on every host, check that they reach that "
            f"port and the one before it, or raise distributed.timeout_s"
        )

    def _refuse_all(self, line: str) -> None:
        self._tell_all({"kind": "refused", "line": line})

    def _tell_all(self, *messages: Mapping[str, Any], last: "Wire | None" = None) -> None:
        news = list(messages)
        for message in news:  # it grows when somebody is dropped: a loop, so that a lost network is no deep recursion
            line = encode(message)
            for guest in sorted(self._guests.values(), key=lambda guest: guest is last):
                try:
                    guest.send_line(line)
                except ConnectionError:
                    pass  # it is gone, which is noticed when reading, after what it said last
                except OSError as error:
                    # It may have half a line, so whatever came next would be garbled.
                    news += self._close(guest, f"it takes in no messages: {error.strerror or error}")

    def _drop(self, guest: "Wire", why: str) -> None:
        self._tell_all(*self._close(guest, why))

    def _close(self, guest: "Wire", why: str) -> list[dict[str, Any]]:
        """Parts with a guest, once; returns what the others have to be told."""
        if guest.dropped:
            return []
        guest.dropped = True
        self._selector.unregister(guest.socket)
        guest.socket.close()
        if guest.index is None:
            return []
        del self._guests[guest.index]
        return [{"kind": "lost", "index": guest.index, "why": why}] if self._complete and not guest.said_bye else []


class Wire:
    """JSON lines over one connection. index: of the process at the other end, once it said so; dropped: closed by the hub."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.index, self.heard, self.said_bye = connection, None, time.monotonic(), False
        self.dropped = False
        self._rest, self._sending = b"", threading.Lock()

    def receive(self) -> list[dict[str, Any]] | None:
        """The next whole messages (at least one unless a chunk ended early); None when the other end is closed.

        Raises:
            ValueError: for what is no message.
        """
        data = self.socket.recv(_CHUNK_BYTES)
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) and "kind" in message for message in messages):
            raise UserError("not a message of this program")
        return messages

    @property
    def pending_bytes(self) -> int:
        """Of a message that has not ended."""
        return len(self._rest)

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends one message, whole: several threads may send."""
        self.send_line(encode(message))

    def send_line(self, line: bytes) -> None:
        """Sends an encoded message."""
        with self._sending:
            self.socket.sendall(line)


def encode(message: Mapping[str, Any]) -> bytes:
    """A message as a line."""
    return json.dumps(message).encode() + b"\n"


def listen(port: int, host: str = "") -> socket.socket:
    """A listening socket on `port` (0: any free one), on all addresses unless `host` is given.

    Raises:
        ValueError: if the port is taken.
    """
    try:
        if not host and socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        return socket.create_server((host, port), backlog=1024)
    except OSError as error:
        raise UserError(
            f"port {port} of this host cannot be used ({error.strerror}); another job may run here: "
            f"give another port in distributed.coordinator"
        ) from None


def interval_s(heartbeat_timeout_s: float) -> float:
    """Between heartbeats: a few may go astray."""
    return min(heartbeat_timeout_s / 5, 10.0)
