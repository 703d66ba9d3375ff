"""SIGTERM, SIGHUP and SIGINT as a question that the loop asks once a step, so that a run can save before it stops.

One process notes them itself. Several pass each on to jax's preemption service, as SIGTERM: all processes stop after the same
step, a second or two later, also where Ctrl-C reaches one host alone.

The first trap: data that never come, or a long evaluation, would keep the question from being asked. In one process both are left
`WAIT_S` after the signal. Several processes can leave the data together, where these come to none of them; where one alone has
no data, the others are in the step already and what they trained since the last checkpoint is lost.

The second trap: Python answers a signal when the main thread runs next. One that comes just before that thread begins to wait,
or that the system hands to another thread, does not wake it. So who waits for a batch is woken every `_WAKE_S`, and an
evaluation, which calls much that may not like it, once a signal has come.
"""

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from siglip.errors import FailedAlone, RunFailed

WAIT_S = 3.0
_WAKE_S = 0.5
_WAKE = signal.SIGURG  # the one signal that nobody sends for a reason of ours and that does nothing by default


class WaitedTooLong(BaseException):
    """WAIT_S ago a signal came. Not an Exception: nothing that is waited for shall take it for an error of its own."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


class Interrupted(RunFailed):
    """SIGTERM, SIGHUP or SIGINT arrived; everything up to `step` is saved."""

    def __init__(self, signum: int, step: int, workdir: Path) -> None:
        self.signum, self.exit_code = signum, 128 + signum
        super().__init__(
            f"stopped by {signal.Signals(signum).name} at step {step}, which is saved; "
            f"the same command goes on from there (workdir {workdir})"
        )


class LeftAlone(FailedAlone):
    """A signal arrived while this process had no data and others had begun the step; nothing can be saved."""

    def __init__(self, signum: int, step: int, saved: int | None, workdir: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name} while the data of step {step} did not come to process "
            f"{jax.process_index()} and others had begun it: the same command goes on from "
            f"{'the beginning' if saved is None else f'step {saved}'} (workdir {workdir})"
        )


class SignalFlag:
    """Notes the first signal instead of dying; a second one has its usual effect (SIGTERM: of one process only).

    A run that was told to ignore SIGHUP (nohup) does. Outside the main thread Python allows no handlers: then signals do
    what they always do.

    Attributes:
        received: number of the signal that this process noted, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._asked, self._waiting, self._only_waits, self._noted_at = 0, False, False, 0.0
        self._left = threading.Event()
        self._of_jax: ctypes.Array | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "SignalFlag":
        noted = [signal.SIGINT] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGINT, signal.SIGHUP]
        if threading.current_thread() is threading.main_thread():
            self._of_jax = _sigterm_handler() if jax.process_count() > 1 else None
            self._previous = {s: signal.signal(s, self._note) for s in [*noted, signal.SIGTERM]}
            self._usual_wake = signal.signal(_WAKE, self._look)
            threading.Thread(target=self._wake, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._restore()
        if threading.current_thread() is threading.main_thread():
            signal.signal(_WAKE, self._usual_wake)

    def stop_now(self) -> int | None:
        """The number of the signal if all processes are to stop here, else None. Every process asks equally often."""
        self._asked += 1
        if jax.process_count() == 1:
            return self.received
        return int(signal.SIGTERM) if multihost_utils.reached_preemption_sync_point(self._asked) else None

    @contextlib.contextmanager
    def limited_wait(self, *, of_several: bool = False) -> Iterator[None]:
        """What may wait for ever. Raises WaitedTooLong in it, WAIT_S after the signal.

        of_several: also in one process of several, which must then find out whether the others wait as well; nothing else is
            done in this wait.
        """
        self._only_waits = of_several
        self._waiting = of_several or jax.process_count() == 1
        try:
            yield
        finally:
            self._waiting = False

    @contextlib.contextmanager
    def nothing_to_save(self) -> Iterator[None]:
        """Signals have their usual effect: Python answers none while a program compiles, and here that would save nothing."""
        noted = list(self._previous)
        self._restore()
        try:
            yield
        finally:
            self._previous = {s: signal.signal(s, self._note) for s in noted}

    def _wake(self) -> None:
        main = threading.main_thread().ident
        while not self._left.wait(_WAKE_S):
            if self._waiting and (self._only_waits or self.received is not None):
                signal.pthread_kill(main, _WAKE)

    def _look(self, *_: object) -> None:
        if self._waiting and self.received is not None and time.monotonic() - self._noted_at >= WAIT_S:
            raise WaitedTooLong(self.received)

    def _note(self, signum: int, _: FrameType | None) -> None:
        self.received, self._noted_at = signum, time.monotonic()
        self._restore()
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        if self._previous and self._of_jax is not None:
            _sigterm_handler(self._of_jax)
        self._previous = {}


def _sigterm_handler(handler: ctypes.Array | None = None) -> ctypes.Array:
    """The C handler of SIGTERM before this call. handler: one to put in its place. Python knows of its own handlers only."""
    before = ctypes.create_string_buffer(1024)  # struct sigaction has 152 bytes on Linux
    ctypes.CDLL(None).sigaction(int(signal.SIGTERM), handler, before)
    return before
