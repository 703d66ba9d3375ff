"""What a GPU has to say about the training step, in one run of under nine minutes on one H100 or H200.

    python benchmarks/on_gpu.py --out OUT                      # every part, the most valuable first
    python benchmarks/on_gpu.py --out OUT --parts C D E        # some of them
    python benchmarks/on_gpu.py --out OUT --rehearse           # every part at toy size on a CPU

Each part is a process with a time limit of its own. A row is printed and appended to OUT/on_gpu.jsonl as soon as it is
measured, so a part that fails, or is cut off, loses only what it had not measured yet. OUT/trace.xplane.pb: three steps' profile.

    A  products of the step (forward, dgrad, wgrad, bias, GELU), attention, LayerNorm, a copy, scatter-add; the row "verdict" says
       "autotuning first" where products over K = 768 run at less than 550 TFLOP/s
    C  the step as it is, B/16 and 512 pairs, and its profile
    B  the step before: a rolled scan with full remat, or the sources of --baseline with their defaults
    D  C with a residual stream in bfloat16
    E  open_clip under torch.compile, same model and batch (torch, --packages)
    I  loss and gradients of a small model against float32 on the CPU
    G  So400m/14, 256 pairs; and with a residual stream in bfloat16
    F  C without command buffers;  F-triton  C with Triton's products
    H  the loss alone, 4k to 128k pairs: ours and dense;  H-torch  torch's

The limits add up to 795 s, and the run ends after 530. If every part took all of its time, G would have 105 s of its 120, and
F and H would not begin. The last line names what is unfinished; name it in --parts of a second run.

A bare CUDA machine is enough: Python 3.12, jax 0.11 with CUDA 13, flax, optax, orbax, torch 2.11; no tensorflow, grain or tyro.
Part E skips itself with one line unless open_clip is there; where there is no network, bring it in a folder:

    python -m pip install --no-deps --target build/open_clip open_clip_torch ftfy wcwidth regex huggingface_hub safetensors tqdm
    git archive --prefix=build/before/ fc2f6a7 siglip | tar x   # for --baseline: the step before any change for GPUs
    python benchmarks/on_gpu.py --out OUT --packages build/open_clip --baseline build/before

Triton's products are off but in F-triton: tuning them can take longer than a part has. MFU is of the card's dense bfloat16 peak.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import time
from importlib import util

import sides

TRITON_OFF = "--xla_gpu_enable_triton_gemm=false"
BUDGET_S = 530
TOY = {"width": 64, "depth": 2, "mlp_dim": 128, "num_heads": 1}
MAX_TRACE_BYTES = 15 * 2**20


@dataclasses.dataclass(frozen=True)
class Run:
    """Where a part writes its rows, and at which sizes it runs."""

    part: str
    out: pathlib.Path
    toy: bool
    baseline: str | None

    def emit(self, name, **values):
        """Prints a row and writes it."""
        row = {"part": self.part, "name": name} | values
        print("  ", json.dumps(row), flush=True)
        with open(self.out / "on_gpu.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    @contextlib.contextmanager
    def row(self, name):
        """What fails inside becomes a row that says so: the next one may still work."""
        try:
            yield
        except Exception as error:
            self.emit(name, failed=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def make_case(run, variant, batch_size, **tower):
    """The case of a row; of toy size in a rehearsal."""
    if run.toy:
        small = {"image_size": 32, "text_length": 8, "batch_size": 4, "text": {"vocab_size": 64}}
        return sides.make_case("B/16", dtype="bfloat16", **small, **TOY, **tower)
    return sides.make_case(variant, batch_size=batch_size, dtype="bfloat16", **tower)


def step(run, name, variant, batch_size, profile=False, **tower):
    """A row for our step."""
    with run.row(name):
        case = make_case(run, variant, batch_size, **tower)
        time_steps(run, name, case, *sides.ours(case), profile=profile)


def time_steps(run, name, case, facts, advance, profile=False):
    """Three steps to settle, then turns of ten: their median."""
    advance(3)
    turns = []
    for _ in range(2 if run.toy else 4):
        start = time.perf_counter()
        advance(2 if run.toy else 10)
        turns.append((time.perf_counter() - start) / (2 if run.toy else 10))
    step_s = statistics.median(turns)
    rate = case.batch_size / step_s
    mfu = rate * facts["flops"] / facts["peak_flops"] if facts["peak_flops"] else None
    facts = {key: facts[key] for key in ("device", "version", "compile_s", "memory_bytes")}
    run.emit(
        name, batch_size=case.batch_size, step_ms=1e3 * step_s, turns_ms=[1e3 * s for s in turns], mfu=mfu, **facts
    )
    if profile:
        with run.row(f"{name}, profile"):
            profile_steps(run, name, advance)


def profile_steps(run, name, advance):
    """The kernels of three steps by the time they take."""
    import jax

    folder = run.out / "profile"
    with jax.profiler.trace(folder):
        advance(3)
    path = next(folder.rglob("*.xplane.pb"))
    spent, runs = {}, {}
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if not plane.name.startswith("/device:") and not run.toy:
            continue
        for line in plane.lines:
            for event in line.events if "Stream" in line.name or run.toy else ():
                spent[event.name] = spent.get(event.name, 0) + event.duration_ns / 3e6
                runs[event.name] = runs.get(event.name, 0) + 1
    longest = sorted(spent, key=spent.get, reverse=True)[: 5 if run.toy else 40]
    run.emit(f"{name}, profile", busy_ms=sum(spent.values()), kernels=[[k[:80], runs[k], spent[k]] for k in longest])
    if path.stat().st_size < MAX_TRACE_BYTES:
        shutil.copyfile(path, run.out / "trace.xplane.pb")
    shutil.rmtree(folder)


def before(run):
    """Part B. With --baseline the modules come from there, and so do the defaults."""
    from siglip.models.two_tower import ImageConfig

    tower = {} if run.baseline else {"scan": True, "remat": "full"}
    if not run.baseline and "unroll" in {field.name for field in dataclasses.fields(ImageConfig)}:
        tower["unroll"] = False
    step(run, "step before", "B/16", 512, **tower)


def now(run):
    """Parts C and F: the step as it is, under the flags of the part."""
    name = "step" if run.part == "C" else f"step, {os.environ.get('XLA_FLAGS', 'no flags')}"
    step(run, name, "B/16", 512, profile=run.part == "C", scan=True)


def bfloat16_stream(run):
    """Part D: the step with a residual stream in bfloat16."""
    step(run, "step, bfloat16 stream", "B/16", 512, scan=True, residual_dtype="bfloat16")


def open_clip(run):
    """Part E: open_clip."""
    missing = [name for name in ("torch", "open_clip") if util.find_spec(name) is None]
    if missing:
        return run.emit(
            "open_clip", skipped=f"no {', '.join(missing)}; the first lines of on_gpu.py say what to bring along"
        )
    case = make_case(run, "B/16", 512)
    for name, compiled in (("open_clip", False),) if run.toy else (("open_clip, torch.compile", True),):
        with run.row(name):
            time_steps(run, name, case, *sides.theirs(case, compiled))


def so400m(run):
    """Part G: the step of So400m/14, with either residual stream."""
    step(run, "So400m/14", "So400m/14", 256, scan=True, remat="dots")
    step(run, "So400m/14, bfloat16 stream", "So400m/14", 256, scan=True, remat="dots", residual_dtype="bfloat16")


def products(run):
    """Part A: the rates that every estimate rests on."""
    import on_gpu_kernels

    on_gpu_kernels.products(run)


def numbers(run):
    """Part I: loss and gradients against float32 on the CPU."""
    import on_gpu_kernels

    on_gpu_kernels.numbers(run)


def losses(run):
    """Part H: the loss by itself."""
    import on_gpu_kernels

    on_gpu_kernels.losses(run)


def torch_losses(run):
    """Part H: the loss by itself in torch, which shares no memory with jax."""
    import on_gpu_kernels

    on_gpu_kernels.torch_losses(run)


# name: (function, seconds, flags of XLA), the most valuable first.
PARTS = {
    "A": (products, 70, TRITON_OFF),
    "C": (now, 80, TRITON_OFF),
    "B": (before, 70, TRITON_OFF),
    "D": (bfloat16_stream, 70, TRITON_OFF),
    "E": (open_clip, 90, ""),
    "I": (numbers, 45, TRITON_OFF),
    "G": (so400m, 120, TRITON_OFF),
    "F": (now, 60, f"{TRITON_OFF} --xla_gpu_enable_command_buffer="),
    "F-triton": (now, 90, "--xla_gpu_enable_triton_gemm=true"),
    "H": (losses, 60, TRITON_OFF),
    "H-torch": (torch_losses, 40, ""),
}


def run_part(name, args, limit_s):
    """A part in a process group of its own, ended when its time is over."""
    command = [sys.executable, __file__, *sys.argv[1:], "--part", name]
    paths = [args.baseline if name == "B" else None, str(pathlib.Path(__file__).parents[1]), args.packages]
    path = os.pathsep.join([*filter(None, paths), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = os.environ | {"PYTHONPATH": path, "XLA_PYTHON_CLIENT_MEM_FRACTION": ".93"}
    environment |= {"JAX_PLATFORMS": "cpu" if args.rehearse else "cuda,cpu", "XLA_FLAGS": PARTS[name][2]}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def parse():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for on_gpu.jsonl and the profile")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--packages", help="folder with packages to bring along, such as open_clip's")
    parser.add_argument("--baseline", help="part B: an older checkout's folder")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    """Runs the parts one after the other until the time is over."""
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        return PARTS[args.part][0](Run(args.part, args.out, args.rehearse, args.baseline))
    start, bad = time.monotonic(), []
    for name in args.parts:
        limit_s = 600 if args.rehearse else min(PARTS[name][1], BUDGET_S - (time.monotonic() - start))
        print(f"{name}: {PARTS[name][0].__doc__.splitlines()[0]} ({limit_s:.0f} s)", flush=True)
        if limit_s < 15:
            bad.append(f"{name} (not begun)")
            continue
        code = run_part(name, args, limit_s)
        bad += [f"{name} ({'cut off' if code is None else f'exit {code}'})"] if code != 0 else []
    print(f"{time.monotonic() - start:.0f} s; unfinished: {', '.join(bad) or 'none'}", flush=True)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
