"""What the processes of one job tell each other besides arrays: who joined, who is gone, after which step all of them stop.

    process 0 runs a Hub (a thread); every process, 0 included, holds one TCP connection to it, with JSON lines both ways

The connection is what proves that a process lives: when one is killed its kernel closes it, and the others know within
milliseconds; when a whole host vanishes its heartbeats stop. Then a thread here ends the process, for the main thread may sit
in a collective that never finishes. jax's own coordination service is too late for that (it counts missed heartbeats), too
rude (it aborts from C++ with a stack trace, also when a process merely never joins), and its key-value store is private.

The trap: processes run ahead of each other. "Stop now" would be another step for each; instead all freeze, each says which
step it is committed to, and everyone stops after the largest.
"""

import contextlib
import multiprocessing
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from siglip.errors import UserError
from siglip.parallel.hub import Wire, interval_s

_GRACE_S = 3.0  # for a message to have gone round
_ADVICE_S = 5.0  # for the advice, which may look into a shared folder that hangs
_ADVICE = "start the same command again on every host"


class Alone:
    """The only process of its job: everything is agreed at once."""

    index, count = 0, 1

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which writes files and reports."""
        return self.index == 0

    def gather(self, name: str, value: Any, *, timeout_s: float | None = None) -> list[Any]:
        """The values (as JSON) of all processes in their order; blocks until each has called it with this name.

        Raises:
            TimeoutError: if that takes longer than `timeout_s`.
        """
        del name, timeout_s
        return [value]

    def begin(self, step: int) -> None:
        """The loop begins: `step` is the last one behind this process."""

    def stop_after(self, step: int, signum: int | None) -> int | None:
        """To be called after every step: the number of the signal if all processes stop after `step`, else None.

        Args:
            signum: of a signal that this process received.
        """
        del step
        return signum

    def on_loss(self, advice: Callable[[], str]) -> None:
        """`advice()` ends the message when a process is lost: how to go on."""

    def finish(self) -> None:
        """Waits until all processes have come to the end of the run: from here on nobody misses anybody."""

    def leave(self, code: int, line: str) -> None:
        """To be called with the error that ends this process: ends all of them. Returns after `finish`, or if alone."""


class Peers(Alone):
    """This process among others; made when all have joined."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        index: int,
        count: int,
        timeout_s: float,
        heartbeat_timeout_s: float,
        end: Callable[[int, str], None] | None = None,
    ) -> None:
        """Joins the Hub at `host` and `port`.

        Args:
            end: what to do with (exit code, message) when the job is over; `end_process` unless a test says otherwise.

        Raises:
            ValueError: if process 0 or one of the others does not come within `timeout_s`, or two disagree about the job.
        """
        self.index, self.count = index, count
        self._limit_s, self._end = heartbeat_timeout_s, end or end_process
        self._advice: Callable[[], str] = lambda: _ADVICE
        self._changed = threading.Condition()
        self._gathered: dict[str, list[Any]] = {}
        self._calls: dict[str, int] = {}
        self._committed: int | None = None  # the step that this process will certainly take
        self._frozen, self._last_step, self._signum = False, None, None
        self._asked_to_stop = self._finished = False
        self._echo, self._ending = threading.Event(), threading.Lock()
        self._wire = Wire(self._connect(host, port, timeout_s))
        self._join(f"{host}:{port}", timeout_s)
        self._wire.socket.settimeout(heartbeat_timeout_s)
        threading.Thread(target=self._watch, name="siglip-peers", daemon=True).start()

    def gather(self, name: str, value: Any, *, timeout_s: float | None = None) -> list[Any]:
        self._calls[name] = self._calls.get(name, 0) + 1
        key = f"{name} {self._calls[name]}"
        self._wire.send({"kind": "gather", "name": key, "value": value})
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._gathered, timeout_s):
                raise TimeoutError(f"not every process has come to {name!r} within {timeout_s} s")
            return self._gathered.pop(key)

    def begin(self, step: int) -> None:
        with self._changed:
            self._committed = step + 1
            if self._frozen:
                self._tell_committed()

    def stop_after(self, step: int, signum: int | None) -> int | None:
        if signum is not None and not self._asked_to_stop:
            self._asked_to_stop = True
            self._wire.send({"kind": "stop", "signum": signum})
        with self._changed:
            # Also the process that asked goes on until its own request comes back: one rule for all.
            self._changed.wait_for(lambda: not self._frozen or self._last_step is not None)
            if self._last_step is None:
                self._committed = step + 1
                return None
            return self._signum if step == self._last_step else None

    def on_loss(self, advice: Callable[[], str]) -> None:
        self._advice = advice

    def finish(self) -> None:
        self.gather("finish", None)
        with contextlib.suppress(OSError):
            self._wire.send({"kind": "bye"})

    def leave(self, code: int, line: str) -> None:
        if self._finished:
            return
        if code == 1:
            # It may be the consequence of another process's end, which the watching thread is about to tell better.
            time.sleep(_GRACE_S / 2)
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # the watching thread is ending this process
        with contextlib.suppress(OSError):
            self._wire.send({"kind": "failed", "from": self.index, "code": code, "line": line})
            self._echo.wait(_GRACE_S)
        self._end(code, line)

    def _connect(self, host: str, port: int, timeout_s: float) -> socket.socket:
        deadline, error = time.monotonic() + timeout_s, None
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                return socket.create_connection((host, port), timeout=left_s)
            except OSError as failure:  # not started yet, or its name not known yet
                error = failure
                time.sleep(0.2)
        raise UserError(
            f"process {self.index} of {self.count} found no process 0 at {host}:{port} within {timeout_s:g} s ({error}); "
            f"start the same command on every host, check that this one reaches that port and the one before it, or raise "
            f"distributed.timeout_s"
        )

    def _join(self, address: str, timeout_s: float) -> None:
        """Waits for the hub's word that everybody is here; the hub's patience ends first."""
        deadline, messages = time.monotonic() + timeout_s + _GRACE_S, []
        try:
            self._wire.send({"kind": "hello", "index": self.index, "count": self.count})
            while messages == []:  # a message may come in pieces
                self._wire.socket.settimeout(max(deadline - time.monotonic(), 0.001))
                messages = self._wire.receive()
            answer, *self._early = messages or [{"kind": "nothing"}]
        except (OSError, ValueError) as error:
            answer = {"kind": "nothing", "why": error}
        if answer["kind"] == "refused":
            raise UserError(answer["line"])
        if answer["kind"] != "welcome":
            raise UserError(
                f"process {self.index} of {self.count} was turned away at {address} ({answer.get('why', 'closed')}); "
                f"look at the output of process 0, or give another port of its host in distributed.coordinator"
            )

    def _watch(self) -> None:
        """Listens until the end of the job; the silence of process 0 is news as well."""
        pause_s, heard, beat_at = interval_s(self._limit_s), time.monotonic(), 0.0
        messages: list[dict[str, Any]] | None = self._early
        with selectors.DefaultSelector() as selector:
            selector.register(self._wire.socket, selectors.EVENT_READ)
            while True:
                try:
                    for message in messages:
                        self._handle(message)  # which may have to answer
                    if time.monotonic() >= beat_at:
                        self._wire.send({"kind": "beat"})
                        beat_at = time.monotonic() + pause_s
                    messages = self._wire.receive() if selector.select(pause_s) else []
                except (OSError, ValueError) as error:
                    return self._lost(0, f"connection lost: {getattr(error, 'strerror', None) or error}")
                if messages is None:
                    return self._lost(0, "it was killed or its host is down")
                heard = time.monotonic() if messages else heard
                if time.monotonic() - heard > self._limit_s:
                    return self._lost(0, f"no heartbeat for {self._limit_s:g} s")

    def _handle(self, message: Mapping[str, Any]) -> None:
        kind = message["kind"]
        if kind == "gathered":
            with self._changed:
                if message["name"] == "stop":
                    self._last_step = max(message["values"])
                self._finished = self._finished or message["name"].startswith("finish ")
                self._gathered[message["name"]] = message["values"]
                self._changed.notify_all()
        elif kind == "stop":
            with self._changed:
                self._frozen, self._signum = True, message["signum"]
                if self._committed is not None:
                    self._tell_committed()
        elif kind == "lost":
            self._lost(message["index"], message["why"])
        elif kind == "failed" and message["from"] == self.index:
            self._echo.set()
        elif kind == "failed":
            self._end_because(message["code"], f"process {message['from']} stopped: {message['line']}")

    def _tell_committed(self) -> None:
        self._wire.send({"kind": "gather", "name": "stop", "value": self._committed})

    def _lost(self, index: int, why: str) -> None:
        # The end is claimed before the advice is asked for: that takes time, and nobody else is to end this process meanwhile.
        if not self._finished and self._ending.acquire(blocking=False):
            self._end(1, f"process {index} of {self.count} is gone ({why}); {self._advised()}")

    def _advised(self) -> str:
        """The advice, or the general one if it fails or does not come: this process has to end all the same."""
        lines = [_ADVICE]

        def ask() -> None:
            with contextlib.suppress(Exception):
                lines.append(self._advice())

        with contextlib.suppress(RuntimeError):  # no thread to be had
            thread = threading.Thread(target=ask, name="siglip-advice", daemon=True)
            thread.start()
            thread.join(_ADVICE_S)
        return lines[-1]

    def _end_because(self, code: int, line: str) -> None:
        if self._ending.acquire(blocking=False):
            self._end(code, line)


def end_process(code: int, line: str) -> None:
    """Says why and ends this process, whatever its other threads are doing; its data workers go with it."""
    try:
        for child in multiprocessing.active_children():
            child.kill()
        print(f"siglip: error: {' '.join(line.split())}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    finally:  # also when nobody reads its output any more
        os._exit(code)
