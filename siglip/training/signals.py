"""SIGTERM, SIGHUP and SIGINT as a question that the loop asks once a step, so that a run can save before it stops.

One process notes them itself. Of several, jax's preemption service takes SIGTERM: all processes stop after the same step, a
second or two later. SIGHUP and SIGINT are passed on to it, so that Ctrl-C on one host stops all of them.

The trap: data that never come, or a long evaluation, would keep the question from being asked. In one process both are left
`WAIT_S` after the signal. Of several processes none can leave alone: what hangs there is ended by its scheduler.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from siglip.errors import RunFailed

WAIT_S = 3.0


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


class SignalFlag:
    """Notes the first signal instead of dying; a second one has its usual effect (SIGTERM: of one process only).

    A run that was told to ignore SIGHUP (nohup) does. Outside the main thread Python allows no handlers: then signals do
    what they always do.

    Attributes:
        received: number of the signal that this process noted, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._asked, self._waiting = 0, False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "SignalFlag":
        noted = [signal.SIGINT] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGINT, signal.SIGHUP]
        noted += [signal.SIGTERM] if jax.process_count() == 1 else []
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._note) for s in noted}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def stop_now(self) -> int | None:
        """The number of the signal if all processes are to stop here, else None. Every process asks equally often."""
        self._asked += 1
        if jax.process_count() == 1:
            return self.received
        return int(signal.SIGTERM) if multihost_utils.reached_preemption_sync_point(self._asked) else None

    @contextlib.contextmanager
    def limited_wait(self) -> Iterator[None]:
        """What may wait for ever. Raises WaitedTooLong in it, WAIT_S after the signal; never in one process of several."""
        self._waiting = True
        if self.received is not None:
            self._set_alarm()
        try:
            yield
        finally:
            self._waiting = False
            if self.received is not None:
                signal.setitimer(signal.ITIMER_REAL, 0)

    @contextlib.contextmanager
    def nothing_to_save(self) -> Iterator[None]:
        """Signals have their usual effect: Python answers none while a program compiles, and here that would save nothing."""
        noted = list(self._previous)
        self._restore()
        try:
            yield
        finally:
            self._previous = {s: signal.signal(s, self._note) for s in noted}

    def _set_alarm(self) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGALRM, self._ring)
            signal.setitimer(signal.ITIMER_REAL, WAIT_S)

    def _ring(self, *_: object) -> None:
        if self._waiting:
            raise WaitedTooLong(self.received)

    def _note(self, signum: int, _: FrameType | None) -> None:
        self.received = signum
        self._restore()
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        elif self._waiting:
            self._set_alarm()

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}
