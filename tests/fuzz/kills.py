"""Runs and curations that are ended again and again: each must finish as if nothing had happened, and leave no process behind.

    python -m tests.fuzz.kills --kills 30 --signals 10 --curations 10 --seed 0 [--only kill curate]

A run is killed (SIGKILL) at random moments, or gets SIGTERM in each phase, is started again, and finished after every few times;
its losses and parameters are then compared, bit by bit, with those of a run that nobody ended. So are manifests. Exit code 1 if
one differs, or if a process of it is still there LIMIT_S after its end.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from siglip.workdir.checkpoint import whole_steps
from tests.siglip.jobs import ROOT, SAMPLE, Job, Jobs, children_of, losses, params

LIMIT_S = 10
PHASES = ("start", "compile", "training", "evaluation", "saving")
_TIMES_A_RUN = 5
_STEPS = 60
_FLAGS = ("--total-steps", str(_STEPS), "--optim.warmup-steps", "1")


class Ending(NamedTuple):
    """code: the exit code; ended_s: until the process ended; left: processes of it that were there LIMIT_S later."""

    code: int
    ended_s: float
    left: int


class Row(NamedTuple):
    """What became of one kind of ending. differ: finished runs that differ; codes: exit codes that came."""

    kind: str
    times: int
    finished: int
    differ: int
    left: int
    slowest_s: float
    codes: set[int]


def end(process: subprocess.Popen, signum: int) -> Ending:
    """Signals a process; its children are to go with it."""
    children, began = children_of(process.pid), time.monotonic()
    process.send_signal(signum)
    process.wait(120)
    ended_s = time.monotonic() - began
    while (
        left := sum(Path(f"/proc/{pid}").exists() for pid in children)
    ) and time.monotonic() - began < ended_s + LIMIT_S:
        time.sleep(0.05)
    return Ending(process.returncode, ended_s, left)


def in_runs(kind: str, times: int, end_once: Callable[[int], Ending], finish: Callable[[int], bool]) -> Row:
    """Ends run 0 a few times, finishes it, then run 1, … finish: run -> whether it is as it should be."""
    endings, same = [], []
    for number in range(times):
        endings.append(end_once(number // _TIMES_A_RUN))
        if number + 1 == times or (number + 1) % _TIMES_A_RUN == 0:
            same.append(finish(number // _TIMES_A_RUN))
    left, slowest = sum(ending.left for ending in endings), max(ending.ended_s for ending in endings)
    return Row(kind, times, len(same), same.count(False), left, slowest, {ending.code for ending in endings})


def of_training(jobs: Jobs, kind: str, times: int, rng: random.Random) -> Row:
    """kind: "kill" of a toy with data workers, or one of PHASES of two small towers with an evaluation, with SIGTERM."""
    toy, flags = (
        kind == "kill",
        [*_FLAGS, *(["--data.workers", "2"] if kind == "kill" else ["--eval.every-steps", "20"])],
    )
    options = {"processes": 1, "devices": 1, "toy": toy}
    reference = jobs.folder / f"whole-{toy}"
    if not reference.exists():
        jobs.run(reference.name, *flags, **options)

    def end_once(run: int) -> Ending:
        at = {0: "evaluating:hold"} if kind == "evaluation" else None
        job = jobs.start(f"{kind}-{run}", *flags, step_s=0.05, at=at, **options)
        wait_for(kind, job, rng)
        return end(job.processes[0], signal.SIGKILL if toy else signal.SIGTERM)

    def finish(run: int) -> bool:
        job = jobs.run(f"{kind}-{run}", *flags, **options)
        ours, theirs = params(job.workdir), params(reference)
        equal = all(np.array_equal(ours[path], theirs[path]) for path in theirs)
        return equal and losses(job.workdir) == losses(reference)

    return in_runs(kind, times, end_once, finish)


def wait_for(kind: str, job: Job, rng: random.Random) -> None:
    """Until a run is in its phase."""
    folder = job.workdir / "checkpoints"
    done = max(whole_steps(job.workdir), default=0) if folder.exists() else 0
    before = {path.name for path in folder.glob("*")}
    if kind == "start":
        time.sleep(rng.uniform(0, 5))
    elif kind == "evaluation":
        job.wait_until_held(0)
    elif kind == "saving":
        job.wait_until(0, lambda: {path.name for path in folder.glob("*")} - before)
    else:
        job.wait_for_batch(0, done + 1 if kind == "compile" else min(_STEPS, done + rng.randrange(2, 12)))
        time.sleep(0 if kind == "compile" else rng.uniform(0, 0.1))


def of_curation(folder: Path, times: int, rng: random.Random) -> Row:
    """Curations of the shipped sample with two workers, killed."""

    def start(out: Path) -> subprocess.Popen:
        command = [
            sys.executable,
            "-m",
            "siglip.cli",
            "data",
            "curate",
            f"{SAMPLE}/emoji-*.tar",
            "--out",
            str(out),
            "--workers",
            "2",
        ]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    began = time.monotonic()
    assert start(folder / "whole").wait(600) == 0
    took_s = time.monotonic() - began

    def end_once(run: int) -> Ending:
        process = start(folder / f"curation-{run}")
        time.sleep(rng.uniform(0.2, 0.9) * took_s)
        return end(process, signal.SIGKILL)

    def finish(run: int) -> bool:
        assert start(folder / f"curation-{run}").wait(600) == 0
        whole, ours = (pq.read_table(folder / name / "manifest.parquet") for name in ("whole", f"curation-{run}"))
        return ours.equals(whole)

    return in_runs("curate", times, end_once, finish)


def campaign(*, kills: int, signals: int, curations: int, seed: int = 0, only: tuple[str, ...] = ()) -> list[Row]:
    """Prints a table, and returns its rows."""
    times = {"kill": kills, **dict.fromkeys(PHASES, signals), "curate": curations}
    rows = []
    print(f"{'':12}{'times':>6}{'finished':>9}{'differ':>7}{'left':>5}{'slowest, s':>11}  exit codes")
    with tempfile.TemporaryDirectory() as folder:
        jobs = Jobs(Path(folder), evaluate=True)
        try:
            for kind, count in times.items():
                if not count or (only and kind not in only):
                    continue
                rng = random.Random(f"{kind} {seed}")
                row = of_curation(Path(folder), count, rng) if kind == "curate" else of_training(jobs, kind, count, rng)
                told = f"{row.kind:12}{row.times:6}{row.finished:9}{row.differ:7}{row.left:5}{row.slowest_s:11.1f}"
                print(f"{told}  {' '.join(map(str, sorted(row.codes)))}", flush=True)
                rows.append(row)
        finally:
            jobs.close()
    return rows


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("kills", 30), ("signals", 10), ("curations", 10), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", choices=["kill", *PHASES, "curate"], nargs="+", default=())
    return int(any(row.differ or row.left for row in campaign(**vars(parser.parse_args(args)))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
