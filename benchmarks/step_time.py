"""Time, pairs/s, MFU and memory of one training step, and open_clip (PyTorch) beside it at the same model and batch.

    python benchmarks/step_time.py --variant B/16 --image-size 224 --batch-size 512 --remat none dots --attention xla auto
    python benchmarks/step_time.py --config configs/quickstart.py --open-clip compiled --alternations 6 --out step.json

    python -m pip install torch ftfy regex huggingface_hub safetensors tqdm     # and a C++ compiler for torch.compile
    python -m pip install --no-deps open_clip_torch                             # torchvision and timm are not needed

Every combination of --loss, --remat, --attention and --micro-batch-size is a row, on all devices. A step is forward, backward
and optimizer on random pairs that are in memory before the clock starts. Each side is a process and compiles once. On a CPU the
sides then run N steps in turn, in another order each time, since other work slows one side or the other; on an accelerator, whose
memory two processes cannot share, they run one after the other. A ratio above 1 is faster than open_clip.

Ours is the jitted step of `siglip train` on uint8 images. Theirs is CustomTextCLIP + SigLipLoss with fused AdamW (whatever the
recipe's optimizer) on normalised float images, under autocast for bfloat16. Both have the same batch, widths, depths, heads,
kept patches, tanh GELU, unmasked texts and gradient clipping. MFU counts each side's own matrix products once
(siglip/training/flops.py).

The models differ: their image tower has a class token, no bias in the patch embedding, an attention pool with LayerNorms on the
query and after it but *no* MLP, and a projection without bias; ours pools with an MLP and projects if the recipe does. They pool
texts at the last token; a recipe may take the mean. Ours has learning-rate multipliers, norms to log, and dropout and a running
average if the recipe does.

The trap: beside another busy process PyTorch's threads wait for each other, and its rate can fall several times over. Believe a
CPU run only if both sides had nearly all "cores" (CPU seconds per second) and "least" is near "most".
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
import typing

import sides

from siglip.models.layers import Remat

ROW = "{:40}{:>9}{:>9}{:>8}{:>8}{:>7}{:>10}{:>7}{:>7}{:>11}"
SETTLE_STEPS, PAUSE_S = 3, 1.0
OPEN_CLIP = {"compiled": "open_clip, torch.compile", "eager": "open_clip, eager"}


def case_of(args, options):
    """The recipe's model and batch, or the variant's, with the row's options."""
    if args.config:
        from siglip.training.config import load_config_file

        config = load_config_file(args.config)
        case = sides.Case(config.model, config.optim, config.loss, args.batch_size or config.batch_size)
    else:
        tower = {"scan": not args.loop, "dtype": args.dtype}
        sizes = {"image_size": args.image_size, "text_length": args.text_length, "batch_size": args.batch_size or 256}
        case = sides.make_case(args.variant, **sizes, **tower)
    tower = {name: options[name] for name in ("remat", "attention") if options.get(name)}
    image, text = (dataclasses.replace(t, **tower) for t in (case.model.image, case.model.text))
    loss = {"kind": "softmax"} if options.get("loss") == "softmax" else {"impl": options.get("loss") or case.loss.impl}
    loss |= {"micro_batch_size": options.get("micro_batch_size") or case.loss.micro_batch_size}
    loss = dataclasses.replace(case.loss, **loss)
    return dataclasses.replace(case, model=dataclasses.replace(case.model, image=image, text=text), loss=loss)


def work(args, parser):
    """A worker: facts as JSON on stdout, then [seconds, cores, memory] of every number of steps that comes on stdin."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print
    side, options = json.loads(args.worker)
    case = case_of(args, options)
    image, text = case.model.image, case.model.text
    kinds = image.pool, text.pool == "map", image.dtype == text.dtype, case.loss.kind
    if side != "ours" and kinds != ("map", False, True, "sigmoid"):
        parser.exit(2, "open_clip has no match; use pools map and last or mean, one dtype, the sigmoid loss\n")
    try:
        facts, run = sides.ours(case, fsdp=args.fsdp) if side == "ours" else sides.theirs(case, side == "compiled")
    except ImportError as error:
        parser.exit(2, f"{side}: {error}; the first lines of {__file__} say what to install\n")
    print(json.dumps(facts | {"batch_size": case.batch_size}), file=channel)
    run(SETTLE_STEPS)
    for line in sys.stdin:
        run(SETTLE_STEPS if args.alternations > 1 else 0)
        start, start_cpu = time.perf_counter(), time.process_time()
        run(int(line))
        seconds = time.perf_counter() - start
        print(json.dumps([seconds, (time.process_time() - start_cpu) / seconds, facts["memory_bytes"]]), file=channel)


class Worker:
    """A side in its own process."""

    def __init__(self, side, options):
        self.side, self.options, self.seconds, self.cores = side, options, [], []
        shown = [f"{name} {value}" for name, value in options.items() if value]
        self.label = " ".join(["ours", *shown]) if side == "ours" else OPEN_CLIP[side]
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", json.dumps([side, options])]
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.facts = self._receive()

    def _receive(self):
        line = self._process.stdout.readline()
        if not line:  # it has said why
            self.close()
            return None
        return json.loads(line)

    def measure(self, steps):
        if self._process.stdin.closed:
            return  # it ran out of memory, say: its row will tell that it failed
        try:
            print(steps, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            return self.close()
        answer = self._receive()
        if answer is not None:
            self.seconds.append(answer[0] / steps)
            self.cores.append(answer[1])
            self.facts["memory_bytes"] = answer[2]

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()

    def row(self, turns):
        """The results of so many turns as JSON values."""
        if len(self.seconds) < turns:
            return {"label": self.label, "side": self.side, **self.options, "failed": True}
        step_s, facts = statistics.median(self.seconds), self.facts
        rate = facts["batch_size"] / step_s
        row = {
            "label": self.label,
            "side": self.side,
            **self.options,
            **facts,
            "seconds": self.seconds,
            "cores": self.cores,
        }
        row |= {"step_s": step_s, "pairs_per_s": rate, "flop_per_s": rate * facts["flops"]}
        return row | {"mfu": row["flop_per_s"] / facts["peak_flops"] if facts["peak_flops"] else None}


def show(row, reference):
    """The row as a line of the table; `reference`: the row that ratios are to."""
    if "failed" in row:
        print(ROW.format(row["label"], "failed", *[""] * 8), flush=True)
        return
    seconds, ratio = sorted(row["seconds"]), ""
    if reference is not None and reference is not row and "failed" not in reference:
        turns = [theirs / ours for theirs, ours in zip(reference["seconds"], row["seconds"], strict=True)]
        ratio = f"{statistics.median(turns):.2f}"
    rate = f"{row['mfu']:.1%}" if row["mfu"] else f"{row['flop_per_s'] / 1e9:.0f} G/s"
    memory = f"{row['memory_bytes'] / 2**30:.2f}" if row["memory_bytes"] else ""
    timing = [f"{1e3 * s:.1f}" for s in (row["step_s"], seconds[0], seconds[-1])]
    cells = (timing[0], f"{row['pairs_per_s']:.0f}", timing[1], timing[2], ratio, rate, memory)
    print(
        ROW.format(row["label"], *cells, f"{statistics.median(row['cores']):.1f}", f"{row['compile_s']:.0f}"),
        flush=True,
    )


def parse():
    """The command line, and its parser."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", help="recipe file; else --variant, --image-size, …")
    parser.add_argument("--variant", default="B/16", help="image tower; the text tower is of the same size")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--text-length", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--loop", action="store_true", help="unrolled blocks instead of a scan over them")
    parser.add_argument("--batch-size", type=int, help="default: the recipe's, or 256")
    parser.add_argument("--fsdp", type=int, default=1)
    parser.add_argument("--loss", nargs="+", default=[None], help="auto all_gather ring softmax")
    parser.add_argument("--remat", nargs="+", choices=typing.get_args(Remat), default=[None])
    parser.add_argument("--attention", nargs="+", default=[None], help="auto xla cudnn splash")
    parser.add_argument("--micro-batch-size", nargs="+", type=int, default=[None])
    parser.add_argument("--open-clip", nargs="+", choices=list(OPEN_CLIP), default=[])
    parser.add_argument("--steps", type=int, default=60, help="steps of one turn")
    parser.add_argument("--alternations", type=int, default=5, help="turns of each side")
    parser.add_argument("--out", type=pathlib.Path, help="also write the results to this JSON file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(), parser


def main():
    """Prints a row per side."""
    args, parser = parse()
    if args.worker:
        return work(args, parser)
    grid = itertools.product(args.loss, args.remat, args.attention, args.micro_batch_size)
    names = ("loss", "remat", "attention", "micro_batch_size")
    wanted = [(side, {}) for side in args.open_clip] + [
        ("ours", dict(zip(names, values, strict=True))) for values in grid
    ]
    load, rows = os.getloadavg(), []
    workers = []
    for side, options in wanted:
        worker = Worker(side, options)
        workers.append(worker)
        if worker.facts and not worker.facts["device"].startswith(("cpu", "1 x cpu")):
            for _ in range(args.alternations):
                worker.measure(args.steps)
            worker.close()
    in_turn = [worker for worker in workers if worker.facts and not worker.seconds]
    for turn in range(args.alternations if in_turn else 0):
        for worker in in_turn[:: 1 if turn % 2 else -1]:
            time.sleep(PAUSE_S)  # until the threads of the one before no longer spin
            worker.measure(args.steps)
    rows = [worker.row(args.alternations) for worker in workers]
    print(ROW.format("side", "step ms", "pairs/s", "least", "most", "ratio", "MFU", "GiB", "cores", "compile s"))
    for row in rows:
        show(row, rows[0] if args.open_clip else None)
    done = next((row for row in rows if "failed" not in row), {})
    about = {"steps": args.steps, "cpus": os.cpu_count(), "load before": load}
    print(about | {row["side"]: f"{row['version']} on {row['device']}" for row in rows if "failed" not in row})
    if args.out and done:
        result = about | {
            "arguments": {k: v for k, v in vars(args).items() if k not in ("out", "worker")},
            "rows": rows,
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
