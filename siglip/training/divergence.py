"""Losses are checked in groups, because reading one waits for the device; a bad one is traced to its step and its pairs.

The trap: a finite loss can have a gradient that is not. The parameters are then ruined one step before the loss is, so the
norm of the update is checked as well.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from siglip.atomic import write_atomically
from siglip.errors import RunFailed
from siglip.parallel.collectives import gather_records


class NonFiniteLoss(RunFailed):
    """The run diverged; the message names the step and where the batch's keys are."""


class LossMonitor:
    """Steps whose losses have not been checked, with the keys of their batches."""

    def __init__(self, workdir: Path, *, saved_step: Callable[[], int | None]) -> None:
        self._path, self._saved_step = workdir / "non_finite_batch.json", saved_step
        self._pending: list[tuple[int, Mapping[str, jax.Array], list[str]]] = []

    def add(self, step: int, metrics: Mapping[str, jax.Array], keys: list[str]) -> None:
        """Notes a step that is still being computed; `keys`: of this process's pairs."""
        self._pending.append((step, metrics, keys))

    def check(self) -> dict[str, float]:
        """Waits for the steps and returns the last one's metrics, {} if there was none.

        Raises:
            NonFiniteLoss: at the first bad one, in every process.
        """
        pending, self._pending = self._pending, []
        values = jax.device_get([metrics for _, metrics, _ in pending])
        for (step, _, keys), metrics in zip(pending, values, strict=True):
            if not (math.isfinite(metrics["train/loss"]) and math.isfinite(metrics["train/update_norm"])):
                self._report(step, metrics, keys)
        return {name: float(value) for name, value in values[-1].items()} if values else {}

    def _report(self, step: int, metrics: Mapping[str, Any], keys: list[str]) -> None:
        everyones = gather_records(keys)
        if jax.process_index() == 0:
            content = {"step": step, "loss": repr(metrics["train/loss"].item()), "keys": everyones}
            write_atomically(self._path, json.dumps(content))
        saved = self._saved_step()
        raise NonFiniteLoss(
            f"loss is {metrics['train/loss']}, norm of the update {metrics['train/update_norm']} at step {step}; "
            f"the keys of its batch are in {self._path}; "
            f"the last good checkpoint is {'none' if saved is None else f'step {saved}'}; "
            f"lower optim.lr, lengthen the warm-up or look at those pairs"
        )
