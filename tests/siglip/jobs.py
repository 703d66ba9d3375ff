"""Jobs of several real processes on this machine: `siglip train` on the shipped sample, each process with a few CPU devices."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from siglip import trees
from siglip.workdir.checkpoint import read_run_params
from siglip.workdir.metrics import read_metrics
from tests.siglip.rounding import rounding

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data_pipelines" / "sample"
STEPS = 12
ANY = None
HEARTBEAT_S = 10
GONE_S = 30  # what is promised: when one process is lost, the others have ended after so long
# On another layout the pairs of a batch come in another order, and so do the sums over them. A loss is a sum over 8 pairs of sums
# over 8 texts, all of one sign, so two of them differ by 1.9e-6 of it at most; what the parameters differ by after a few steps
# adds less (measured in all: 3e-7 after twelve steps).
LOSS_RTOL = 2 * rounding(8 + 8)

RECIPE = f"""
    from data_pipelines.augment import AugmentConfig
    from data_pipelines.loader import DataConfig
    from data_pipelines.order.lengths import LengthConfig
    from data_pipelines.order.mixture import SourceConfig
    from siglip.workdir.checkpoint import CheckpointConfig
    from siglip.evaluation.retrieval import Retrieval
    from siglip.training.config import EvalConfig, TrainConfig
    from siglip.parallel.launch import DistributedConfig
    from siglip.workdir.metrics import LogConfig
    from siglip.models.naflex import NaflexConfig
    from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
    from siglip.training.optim import OptimConfig
    from siglip.parallel.sharding import MeshConfig

    EVALUATE, NAFLEX = {{evaluate}}, NaflexConfig(4, 9) if {{naflex}} else None
    TASK = Retrieval("{SAMPLE}/emoji-heldout-00000.tar", captions=("captions.en", "captions.de"), name="toy")

    def get_config():
        return TrainConfig(
            data=DataConfig(
                sources=(SourceConfig("{SAMPLE}/emoji-train-00000.tar", captions=(("captions.*", 1.0),)),),
                tokenizer="{SAMPLE}/spiece.model",
                augment=AugmentConfig(scale=(0.8, 1.2), aspect=1.0 if NAFLEX else 0.0, shift=0.1),
                lengths=LengthConfig((4, 9), start=0.25) if NAFLEX else None,
                prefetch=2,
            ),
            model=ModelConfig(
                image=ImageConfig(variant="mu", patch_size=(8, 8), image_size=(16, 16), naflex=NAFLEX),
                text=TextConfig(variant="mu", vocab_size=4000, length=8),
                out_dim=(None, 32),
            ),
            total_steps={STEPS},
            batch_size=8,
            workdir="unused",
            optim=OptimConfig(lr=3e-3, warmup_steps=4),
            mesh=MeshConfig(fsdp_min_size_bytes=4096),
            eval=EvalConfig(tasks=(TASK,) if EVALUATE else (), batch_size=64),
            checkpoint=CheckpointConfig(every_steps=4),
            log=LogConfig(every_steps=1, progress=False),
            distributed=DistributedConfig(timeout_s=120, heartbeat_timeout_s={HEARTBEAT_S}),
        )
"""


class Jobs:
    """Starts jobs whose files all lie in `folder`; kills what is left of them at the end."""

    def __init__(self, folder: Path, *, evaluate: bool, naflex: bool = False) -> None:
        self.folder = folder
        self.recipe = folder / "recipe.py"
        self.recipe.write_text(textwrap.dedent(RECIPE.format(evaluate=evaluate, naflex=naflex)))
        self._started: list[subprocess.Popen] = []

    def start(
        self,
        run: str,
        *flags: str,
        processes: int,
        devices: int,
        at: dict[int, str] | None = None,
        started: int | None = None,
        toy: bool = False,
        step_s: float = 0.0,
        piped: bool = False,
        env: dict[str, str] | None = None,
        **own: list[str],
    ) -> "Job":
        """`siglip train` in workdir `run`.

        Args:
            at: {process: "STEP:EVENT"}, see train_worker.py.
            started: how many of the processes come; None: all.
            toy: train a linear toy, which compiles at once, in place of the two towers.
            step_s: time that every step takes at least.
            piped: standard error is a pipe to this process.
            own: flags of one process, process0=[...].
        """
        port, job = free_port(), Job(self.folder, run, processes if started is None else started)
        for index in range(processes if started is None else started):
            who = ["--distributed.coordinator", f"localhost:{port}", "--distributed.processes", str(processes)]
            who = [*who, "--distributed.process-id", str(index)] if processes > 1 else []
            environ = {
                **os.environ,
                "JAX_NUM_CPU_DEVICES": str(devices),
                "SIGLIP_TEST_RECORD": str(job.record(index)),
                "SIGLIP_TEST_AT": (at or {}).get(index, ""),
                "SIGLIP_TEST_TOY": str(int(toy)),
                "SIGLIP_TEST_STEP_S": str(step_s),
                **(env or {}),
            }
            command = [sys.executable, "-m", "tests.siglip.train_worker", "train", str(self.recipe)]
            command += ["--workdir", str(self.folder / run), *who, *flags, *own.get(f"process{index}", [])]
            with job.output(index).open("w") as output:
                streams = {"stdout": output, "stderr": subprocess.PIPE if piped else output}
                job.processes.append(subprocess.Popen(command, cwd=ROOT, env=environ, text=True, **streams))
        self._started += job.processes
        return job

    def run(self, run: str, *flags: str, **kwargs) -> "Job":
        """Starts, waits, and asserts that every process ended well."""
        job = self.start(run, *flags, **kwargs)
        job.ends_with(0)
        return job

    def close(self) -> None:
        """Kills, because a mere SIGTERM would have them save first."""
        for process in self._started:
            process.kill()
            process.wait()


class Job:
    """The processes of one start of a run, in their order."""

    def __init__(self, folder: Path, run: str, count: int) -> None:
        self.workdir, self.processes, self._count = folder / run, [], count
        start = len(list(folder.glob(f"{run}.*.0.out")))
        self._name = f"{run}.{start}"
        self._folder = folder

    def record(self, index: int) -> Path:
        return self._folder / f"{self._name}.{index}.jsonl"

    def output(self, index: int) -> Path:
        return self._folder / f"{self._name}.{index}.out"

    def ends_with(self, *codes: int | None, within_s: float = 480) -> list[str]:
        """Asserts the processes' exit codes (one for all, or each); returns what each said went wrong: one line, or "".

        ANY stands for any code but 0 and 2: by jax (SIGABRT) or by an error of Python, whichever comes first. Such a process
        may have been saving, and orbax then prints the traceback of its thread; of the others none does.
        """
        deadline = time.monotonic() + within_s
        for process in self.processes:
            process.wait(max(0.1, deadline - time.monotonic()))
        outputs = [self.output(index).read_text() for index in range(self._count)]
        expected = list(codes) * (self._count if len(codes) == 1 else 1)
        for process, code in zip(self.processes, expected, strict=True):
            assert process.returncode == code or (code is ANY and process.returncode not in (0, 2, None)), outputs
        lines = [[line for line in output.splitlines() if line.startswith("siglip: error: ")] for output in outputs]
        assert all(len(own) <= 1 for own in lines), outputs
        assert not any("Traceback" in text for text, code in zip(outputs, expected, strict=True) if code is not ANY), (
            outputs
        )
        return [own[0] if own else "" for own in lines]

    def wait_until_held(self, index: int) -> None:
        """Until a process has come to its "STEP:hold"."""
        self.wait_until(index, self.record(index).with_suffix(".holding").exists)

    def wait_for_batch(self, index: int, step: int) -> None:
        """Until a process has its batch of a step."""
        record = self.record(index)
        self.wait_until(index, lambda: record.exists() and f"[{step}, " in record.read_text())

    def wait_until(self, index: int, over: Callable[[], bool]) -> None:
        """While a process runs; never for ever."""
        deadline = time.monotonic() + 480
        while not over():
            assert self.processes[index].poll() is None and time.monotonic() < deadline, self.output(index).read_text()
            time.sleep(0.05)

    def kill(self, index: int, *, saved: int) -> float:
        """Kills a process that holds, once step `saved` is on disk; the seconds until the last of the others has ended."""
        self.wait_until_held(index)
        deadline = time.monotonic() + 120  # saving goes on beside the steps: how long it takes is the machine's affair
        while not (self.workdir / "checkpoints" / str(saved)).exists():
            assert time.monotonic() < deadline, f"step {saved} was not saved"
            time.sleep(0.05)
        began = time.monotonic()
        self.processes[index].send_signal(signal.SIGKILL)
        for process in self.processes:
            process.wait(120)
        return time.monotonic() - began

    def keys(self) -> dict[int, list[list[str]]]:
        """Step -> the keys that each process was handed."""
        steps: dict[int, list[list[str]]] = {}
        for index in range(self._count):
            for step, keys, *_ in self._lines(index):
                if step != "read":
                    steps.setdefault(step, []).append(keys)
        return steps

    def lengths(self) -> dict[int, int]:
        """Step -> how many patches the images of a NaFlex run have; the same in every process."""
        lines = [line for index in range(self._count) for line in self._lines(index) if line[0] != "read"]
        found = {(step, length) for step, _, length in lines}
        assert len(found) == len(dict(found)), found
        return dict(found)

    def reads(self) -> list[set[str]]:
        """The keys of the training pairs that each process read; those of the evaluation start with 21."""
        reads = [{key for step, key, *_ in self._lines(index) if step == "read"} for index in range(self._count)]
        return [{key for key in own if key.startswith("20")} for own in reads]

    def _lines(self, index: int) -> list:
        return [json.loads(line) for line in self.record(index).read_text().splitlines()]


def losses(workdir: Path) -> dict[int, float]:
    """Step -> loss, of every step that metrics.jsonl tells."""
    return {line["step"]: line["train/loss"] for line in read_metrics(workdir) if "train/loss" in line}


def params(workdir: Path) -> dict[str, np.ndarray]:
    """The newest checkpoint's."""
    return trees.flatten(read_run_params(workdir)[0])


def free_port() -> int:
    """A port that is free."""
    with socket.socket() as server:
        server.bind(("", 0))
        return server.getsockname()[1]


def children_of(pid: int) -> list[int]:
    """Of a process, and theirs."""
    own = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            own += map(int, file.read_text().split())
    return own + [pid for child in own for pid in children_of(child)]
