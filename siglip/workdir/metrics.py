"""What a run tells: metrics.jsonl (always), a progress bar or plain lines, wandb when asked.

metrics.jsonl has one JSON object per line, each with `step`. When a run goes on from an earlier checkpoint, the lines
after that checkpoint are dropped first, so the file never tells one step twice. wandb goes on in the same run, whose id the
workdir keeps.

The trap: a logging service must never stop a run. wandb is offline unless asked, is never given the chance to prompt for
a login, and any error of it is one warning.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import sys
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from siglip.atomic import naming, write_atomically
from siglip.errors import UserError

METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb_id.txt"
PROFILE_FOLDER = "profile"
CHANCE = "_chance"  # ends the name of what random scores get in a metric


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """How often and where to.

    Attributes:
        every_steps: steps between lines of metrics.jsonl; the device is waited for only then.
        profile_steps: steps that process 0 traces once they are compiled, into WORKDIR/profile, which XProf (TensorBoard) and
            Perfetto open; 0 for none. Tracing slows them down.
        progress: the bar (on a terminal) or a plain line per log (elsewhere), on standard error.
        wandb: "disabled", "offline" (files under the workdir, to be synced by hand) or "online".
        wandb_project: project name there.
    """

    every_steps: int = 50
    profile_steps: int = 0
    progress: bool = True
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "siglip"

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise UserError(f"log.every_steps={self.every_steps} must be at least 1")
        if self.profile_steps < 0:
            raise UserError(f"log.profile_steps={self.profile_steps} must not be negative")


class MetricsWriter:
    """Appends to metrics.jsonl, and to wandb when the config asks; `enabled=False`, of all processes but the first: nothing."""

    def __init__(
        self,
        workdir: Path,
        config: LogConfig,
        *,
        run_config: Mapping[str, Any],
        start_step: int,
        enabled: bool = True,
    ) -> None:
        self.path = workdir / METRICS_FILE
        self._file, self._wandb = None, None
        if not enabled:
            return
        _drop_lines_after(self.path, start_step)
        self._file = self.path.open("a")
        self._wandb = _start_wandb(workdir, config, run_config)

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """One line: {"step": step, **values}; non-finite numbers become null, which strict JSON readers accept."""
        if self._file is None:
            return
        line = {name: v if math.isfinite(v) else None for name, v in values.items()}
        with naming(self.path):
            self._file.write(json.dumps({"step": step, **line}) + "\n")
            self._file.flush()
        if self._wandb is not None:
            with _warn_only("wandb.log"):
                self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        """Flushes; further writes are errors."""
        if self._file is not None:
            with naming(self.path):  # what could not be flushed before fails once more
                self._file.close()
        if self._wandb is not None:
            with _warn_only("wandb.finish"):
                self._wandb.finish()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl in order; a line cut by a kill, or otherwise damaged, is left out.

    Raises:
        FileNotFoundError: if the run has none.
        UserError: if a value is not a number, or the name of an evaluation's is not one.
    """
    path = workdir / METRICS_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; is {workdir} the workdir of a run?")
    lines = [line for _, line in _whole_lines(path)]
    for line in lines:
        for name, value in line.items():
            short = name.startswith("eval/") and name.count("/") < 3
            if short or not (value is None or (_is_number(value) or not name.startswith(("train/", "eval/")))):
                wrong = "is not called eval/TASK/DATA/METRIC" if short else f"is not a number but {value!r:.40}"
                raise UserError(f"{path}: {name!r} of step {line['step']} {wrong}; correct or remove that line")
    return lines


def _is_number(value: Any) -> bool:
    # JSON's integers have no largest one, floats do.
    return type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)


def error_of(metric: str) -> str:
    """The name of its standard error, where the evaluation computes that: "ece@0.1" -> "ece_se@0.1"."""
    name, at, prior = metric.partition("@")
    return f"{name}_se{at}{prior}"


def short_name(metric: str) -> str:
    """A column's head: "text_retrieval_recall@1" -> "i2t R@1"."""
    name = metric.replace("text_retrieval_", "i2t ").replace("image_retrieval_", "t2i ").replace("_fraction", "")
    return name.replace("recall@", "R@").replace("median_rank", "rank").replace("mean_per_class_recall", "per class")


def format_value(value: float | None, *, rank: bool = False) -> str:
    """Three digits, one for ranks, a dash for what is missing."""
    return "-" if value is None or math.isnan(value) else f"{value:.{1 if rank else 3}f}"


def _whole_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(where it ends in the file, the line) of every line that is whole."""
    end = 0
    for line in path.read_bytes().splitlines(keepends=True):
        end += len(line)
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(values := json.loads(line), dict) and type(values.get("step")) is int:
                yield end, values


def _drop_lines_after(path: Path, step: int) -> None:
    """Cuts the file in place: who has it open, such as `tail -f`, goes on with the same file."""
    if not path.exists():
        return
    kept = itertools.takewhile(lambda found: found[1]["step"] <= step, _whole_lines(path))
    with path.open("r+b") as file:
        file.truncate(end := max((end for end, _ in kept), default=0))
        file.seek(max(0, end - 1))
        if file.read(1) not in (b"", b"\n"):  # a kill has cut it there
            file.write(b"\n")


def _start_wandb(workdir: Path, config: LogConfig, run_config: Mapping[str, Any]) -> Any:
    if config.wandb == "disabled":
        return None
    mode = config.wandb
    if mode == "online" and not _has_wandb_login():
        warnings.warn(
            "log.wandb=online, but there is no WANDB_API_KEY and no netrc entry: logging offline", stacklevel=2
        )
        mode = "offline"
    with _warn_only("wandb.init"):
        import wandb

        path = workdir / WANDB_ID_FILE
        if not path.exists():
            write_atomically(path, uuid.uuid4().hex)
        return wandb.init(
            project=config.wandb_project,
            id=path.read_text().strip(),
            resume="allow",
            mode=mode,
            dir=str(workdir),
            config=dict(run_config),
            settings=wandb.Settings(silent=True, console="off"),
        )
    return None


def _has_wandb_login() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return netrc.exists() and "wandb" in netrc.read_text()


@contextlib.contextmanager
def _warn_only(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a logging service throws, the run goes on
        warnings.warn(f"{what} failed and is skipped: {error}", stacklevel=3)


class Throughput:
    """Pairs per second, the share of time spent waiting for data, and MFU (siglip/training/flops.py), since the last `read`.

    `peak_pairs_per_s` is what the devices could do at most; None if that is not known.
    """

    def __init__(self, batch_size: int, *, peak_pairs_per_s: float | None = None) -> None:
        self._batch_size, self._peak_pairs_per_s = batch_size, peak_pairs_per_s
        self.restart()

    def restart(self) -> None:
        """Forgets what came before: after an evaluation or a checkpoint, whose time is not training time."""
        self._start, self._wait_s, self._steps = time.perf_counter(), 0.0, 0

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Times the body as waiting."""
        start = time.perf_counter()
        yield
        self._wait_s += time.perf_counter() - start

    def step(self) -> None:
        """Counts one step."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """{"train/pairs_per_s", "train/step_s", "train/data_wait", "train/mfu" if the peak is known} and starts over.

        Nothing when there was no step.
        """
        if not self._steps:
            return {}
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        values = {
            "train/pairs_per_s": self._steps * self._batch_size / elapsed,
            "train/step_s": elapsed / self._steps,
            "train/data_wait": self._wait_s / elapsed,
        }
        if self._peak_pairs_per_s is not None:
            values["train/mfu"] = values["train/pairs_per_s"] / self._peak_pairs_per_s
        self.restart()
        return values


class Progress:
    """A bar with loss, pairs/s, time left and data wait on a terminal; one plain line per update elsewhere."""

    def __init__(self, total_steps: int, *, start_step: int, enabled: bool) -> None:
        self._total = total_steps
        self.begin(start_step)
        self._enabled, self._bar = enabled, None
        if enabled and sys.stderr.isatty():
            self._bar, self._task = _make_bar(total_steps, start_step)
            self._bar.start()

    def begin(self, step: int) -> None:
        """Counts the time left from here: after the first step, which compiles."""
        self._first, self._began = step, time.perf_counter()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows `train/loss`, and `train/pairs_per_s` and `train/data_wait` of the last interval if there are any."""
        text = f"loss {values['train/loss']:.3f}"
        if "train/pairs_per_s" in values:
            text += f"  {values['train/pairs_per_s']:.0f} pairs/s  data wait {values['train/data_wait']:.0%}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif self._enabled:
            left_s = (time.perf_counter() - self._began) / max(step - self._first, 1) * (self._total - step)
            print(f"step {step}/{self._total}  {text}  {left_s:.0f} s left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.stop()


def _make_bar(total_steps: int, start_step: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True))
    return bar, bar.add_task("train", total=total_steps, completed=start_step, text="compiling")
