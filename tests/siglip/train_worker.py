"""`siglip`, with a loader that writes down what it reads and hands out, and in which something can happen at a batch.

    SIGLIP_TEST_RECORD=FILE SIGLIP_TEST_AT=STEP:EVENT python -m tests.siglip.train_worker train …

FILE gets a JSON line [step, keys, patches of an image] for every batch and ["read", key] for every training pair that is
read. EVENT: "hold" touches FILE.holding and sleeps for ever, "missing" raises what a lost file does, "bug" what a mistake does,
"poison" gives the batch tokens out of range, which embed as NaN, a number is a signal that the process sends itself. STEP may
be "evaluating" or "evaluated": EVENT then comes before an evaluation's first forward pass, or when its results are there.
"compiling:late" compiles the step a while later than others.
SIGLIP_TEST_STEP_S: every batch takes so long. SIGLIP_TEST_TOY=1: a linear toy is trained in place of the two towers.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from data_pipelines.loader import Loader
from data_pipelines.sources.webdataset import TarSource
from siglip.cli import main, training
from siglip.evaluation.embed import Embedder
from siglip.evaluation.suite import Due, Task
from siglip.training import loop
from tests.siglip.tiny_run import toy_program

LATE_S = 40  # Gloo waits for 30


def record(path: Path, at: str) -> None:
    """Puts itself between the loader and its users."""
    event_step, _, event = at.partition(":")
    file = path.open("a", buffering=1)
    hand_out, read = Loader.__next__, TarSource.__getitem__

    def hand_out_and_tell(self: Loader) -> dict:
        time.sleep(float(os.environ.get("SIGLIP_TEST_STEP_S", 0)))
        step = self.state()["position"] + 1
        if str(step) == event_step and event != "poison":
            happen(event, path)
        batch = hand_out(self)
        if at == f"{step}:poison":
            batch["text"] = np.full_like(batch["text"], 1 << 20)
        length = batch["patches"].shape[1] if "patches" in batch else None
        file.write(json.dumps([step, batch["key"], length]) + "\n")
        return batch

    def read_and_tell(self: TarSource, index: int):
        pair = read(self, index)
        file.write(json.dumps(["read", pair.key]) + "\n")
        return pair

    def evaluate_and_fail(tasks: Sequence[Task], embedder: Embedder, due: Due, **options) -> list:
        if event_step == "evaluating":
            happen(event, path)
        results = evaluate(tasks, embedder, due, **options)
        if event_step == "evaluated":
            happen(event, path)
        return results

    if event_step == "compiling":
        jax.stages.Lowered.compile = compile_late(jax.stages.Lowered.compile)
    evaluate, training.run_due = training.run_due, evaluate_and_fail
    Loader.__next__, TarSource.__getitem__ = hand_out_and_tell, read_and_tell


def compile_late(compile: Callable) -> Callable:
    def compile_later(self: jax.stages.Lowered, *args, **kwargs):
        time.sleep(0 if compiled else LATE_S)
        compiled.append(1)
        return compile(self, *args, **kwargs)

    compiled = []
    return compile_later


def happen(event: str, path: Path) -> None:
    if event == "hold":
        path.with_suffix(".holding").touch()
        time.sleep(3600)
    if event == "bug":
        print(1 // 0)
    if event == "missing":
        raise FileNotFoundError("the shards are gone")
    os.kill(os.getpid(), int(event))


if __name__ == "__main__":
    if os.environ.get("SIGLIP_TEST_TOY") == "1":
        loop.make_program, training.make_evaluate = toy_program, lambda *_: None
    record(Path(os.environ["SIGLIP_TEST_RECORD"]), os.environ.get("SIGLIP_TEST_AT", ""))
    main()
