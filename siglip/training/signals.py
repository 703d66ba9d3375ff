"""SIGTERM and SIGINT as a question that the loop asks once a step, so that a run can save before it stops.

One process notes them itself. Of several, jax's preemption service takes SIGTERM: all processes stop after the same step, a
second or two later. SIGINT is passed on to it, so that Ctrl-C on one host stops all of them.
"""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from siglip.errors import RunFailed


class Interrupted(RunFailed):
    """SIGTERM or SIGINT arrived; everything up to `step` is saved."""

    def __init__(self, signum: int, step: int, workdir: Path) -> None:
        self.signum, self.exit_code = signum, 128 + signum
        super().__init__(
            f"stopped by {signal.Signals(signum).name} at step {step}, which is saved; "
            f"the same command goes on from there (workdir {workdir})"
        )


class SignalFlag:
    """Notes the first SIGTERM or SIGINT instead of dying; a second one has its usual effect (SIGTERM: of one process only).

    Outside the main thread Python allows no handlers: then signals do what they always do.

    Attributes:
        received: number of the signal that this process noted, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._asked = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "SignalFlag":
        noted = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else (signal.SIGINT,)
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

    def _note(self, signum: int, _: FrameType | None) -> None:
        self.received = signum
        self._restore()
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}
