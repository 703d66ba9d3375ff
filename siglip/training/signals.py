"""SIGTERM and SIGINT as a flag that the loop looks at once a step, so that a run can save before it stops.

The trap: a flag that is read twice in one step may differ. The loop reads it once and acts on what it read.
"""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

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
    """Notes the first SIGTERM or SIGINT instead of dying; a second one has its usual effect.

    Outside the main thread Python allows no handlers: then signals do what they always do.

    Attributes:
        received: number of the signal, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "SignalFlag":
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, signum: int, _: FrameType | None) -> None:
        self.received = signum
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}
