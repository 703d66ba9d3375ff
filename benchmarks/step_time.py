"""Time, pairs/s, MFU and memory of one training step, and open_clip (PyTorch) beside it at the same model and batch.

    python benchmarks/step_time.py --variant B/16 --image-size 224 --batch-size 512 --remat none dots --attention xla auto
    python benchmarks/step_time.py --config configs/quickstart.py --open-clip compiled --alternations 6 --out step.json

    python -m pip install torch ftfy regex huggingface_hub safetensors tqdm     # and a C++ compiler for torch.compile
    python -m pip install --no-deps open_clip_torch                             # torchvision and timm are not needed

Every combination of --loss, --remat, --attention and --micro-batch-size is a row, on all devices. A step is forward, backward
and optimizer on random pairs that are in memory before the clock starts. Each side is a process and compiles once. On a CPU the
sides then run N steps in turn, in another order each time, since other work slows one side or the other; on an accelerator, whose
memory two processes cannot share, they run one after the other. A ratio above 1 is faster than open_clip.

Ours is the jitted step of `siglip train` on uint8 images. Theirs is CustomTextCLIP + SigLipLoss with fused AdamW on normalised
float images, under autocast for bfloat16. Both have the same batch, widths, depths, heads, kept patches, tanh GELU, unmasked
texts and gradient clipping. MFU counts each side's own matrix products once (siglip/training/flops.py).

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
from importlib import machinery, util
from typing import Any
from unittest import mock

TORCHVISION = [f"torchvision{name}" for name in ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional")]
ROW = "{:40}{:>9}{:>9}{:>8}{:>8}{:>7}{:>10}{:>7}{:>7}{:>11}"
BATCHES, SETTLE_STEPS, PAUSE_S = 4, 3, 1.0
OPEN_CLIP = {"compiled": "open_clip, torch.compile", "eager": "open_clip, eager"}


@dataclasses.dataclass(frozen=True)
class Case:
    """What one side trains."""

    model: Any
    optim: Any
    loss: Any
    batch_size: int


def make_case(args, options):
    """The recipe's model and batch, or the variant's, with the row's options."""
    from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
    from siglip.training.objective import LossConfig
    from siglip.training.optim import OptimConfig

    if args.config:
        from siglip.training.config import load_config_file

        config = load_config_file(args.config)
        case = Case(config.model, config.optim, config.loss, args.batch_size or config.batch_size)
    else:
        tower = {"scan": not args.loop, "dtype": args.dtype}
        image = ImageConfig(args.variant, image_size=(args.image_size,) * 2, **tower)
        text = TextConfig(args.variant.split("/")[0], length=args.text_length, **tower)
        model = ModelConfig(image, text, (None, image.spec.width))
        case = Case(model, OptimConfig(), LossConfig(), args.batch_size or 256)
    tower = {name: options[name] for name in ("remat", "attention") if options.get(name)}
    image, text = (dataclasses.replace(t, **tower) for t in (case.model.image, case.model.text))
    loss = {"kind": "softmax"} if options.get("loss") == "softmax" else {"impl": options.get("loss") or case.loss.impl}
    loss |= {"micro_batch_size": options.get("micro_batch_size") or case.loss.micro_batch_size}
    loss = dataclasses.replace(case.loss, **loss)
    return dataclasses.replace(case, model=dataclasses.replace(case.model, image=image, text=text), loss=loss)


def ours(case, args):
    """(facts, run): `run(n)` takes n steps and waits for them."""
    import jax
    import numpy as np

    from siglip.models.two_tower import param_shapes
    from siglip.parallel import sharding
    from siglip.training import flops, optim
    from siglip.training.objective import make_objective
    from siglip.training.step import init_state, make_abstract_state, make_train_step

    model, ema, shapes = case.model, case.optim.ema, param_shapes(case.model)
    mesh_config = sharding.MeshConfig(fsdp=args.fsdp)
    mesh = sharding.make_mesh(mesh_config)
    optimizer = optim.make_optimizer(case.optim, shapes, total_steps=10**6)
    schedule, frozen = optim.make_schedule(case.optim, 10**6), optim.frozen_mask(case.optim, shapes)
    jax.set_mesh(mesh)
    abstract_state = make_abstract_state(model, optimizer, mesh=mesh, mesh_config=mesh_config, ema=ema > 0)
    objective = make_objective(model, case.loss, layout=sharding.ParamLayout.of(abstract_state.params))
    options = {"abstract_state": abstract_state, "micro_batch_size": case.loss.micro_batch_size, "ema": ema}
    step = make_train_step(objective, optimizer, schedule, frozen=frozen, **options)
    state = init_state(model, optimizer, abstract_state=abstract_state, seed=0)
    rng, size = np.random.default_rng(0), (BATCHES, case.batch_size)
    images = rng.integers(0, 256, (*size, *model.image.image_size, 3), np.uint8)
    texts = rng.integers(0, model.text.vocab_size, (*size, model.text.length), np.int32)
    batches = [sharding.put_batch({"image": i, "text": t}, mesh) for i, t in zip(images, texts, strict=True)]
    start = time.perf_counter()
    program = step.lower(state, batches[0]).compile()
    facts, memory = {"compile_s": time.perf_counter() - start}, program.memory_analysis()
    facts["memory_bytes"] = memory.argument_size_in_bytes + memory.temp_size_in_bytes

    def run(steps):
        nonlocal state
        for i in range(steps):
            state, _ = program(state, batches[i % BATCHES])
        jax.block_until_ready(state)

    device = mesh.devices.flat[0]
    if mesh.size > 1 and args.open_clip:
        raise ValueError(
            f"open_clip runs on one device, this process sees {mesh.size}; show it one, or leave out --open-clip"
        )
    peak = flops.peak_flops(device.device_kind)
    facts |= {"version": f"jax {jax.__version__}", "device": f"{mesh.size} x {device.device_kind}"}
    facts |= {"peak_flops": peak and peak * mesh.size, "parameters": sum(x.size for x in jax.tree.leaves(shapes))}
    return facts | {"flops": flops.train_flops_per_pair(model, batch_size=case.batch_size)}, run


def theirs(case, compiled):
    """The same of open_clip at the same numbers."""
    import torch

    absent = () if util.find_spec("torchvision") else TORCHVISION
    for name in absent:  # open_clip imports it for its data transforms only: names that do nothing stand in
        sys.modules[name] = mock.MagicMock(__spec__=machinery.ModuleSpec(name, None))
    import open_clip

    [sys.modules.pop(name) for name in absent]
    torch.manual_seed(0)
    image, text, optim, spec = case.model.image, case.model.text, case.optim, case.model.image.spec
    device = "cuda" if torch.cuda.is_available() else "cpu"
    patches, kept = image.grid[0] * image.grid[1], image.kept_patches
    common = {"norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}}
    vision = open_clip.CLIPVisionCfg(
        layers=spec.depth, width=spec.width, head_width=spec.width // spec.num_heads, patch_size=image.patch,
        mlp_ratio=spec.mlp_dim / spec.width, image_size=image.image_size, no_ln_pre=True,
        patch_dropout=1 - (kept + 0.5) / patches if kept < patches else 0.0, **common,  # it keeps int(n (1 - rate))
    )  # fmt: skip
    words = open_clip.CLIPTextCfg(
        context_length=text.length, vocab_size=text.vocab_size, width=text.spec.width, heads=text.spec.num_heads,
        layers=text.spec.depth, mlp_ratio=text.spec.mlp_dim / text.spec.width, no_causal_mask=True, pool_type="last",
        proj_bias=True, proj_type="linear" if case.model.out_dim[1] else "none", **common,
    )  # fmt: skip
    model = open_clip.CustomTextCLIP(case.model.embedding_dims[0], vision, words, init_logit_bias=-10.0)
    # Its option for this pool makes it as wide as the embedding; ours is as wide as the tower.
    model.visual.attn_pool = open_clip.transformer.AttentionalPooler(spec.width, spec.width, spec.num_heads, 1)
    model.visual.attn_pool_contrastive = None
    model.to(device)
    betas, decay = (optim.b1, optim.b2), optim.weight_decay / optim.lr  # torch multiplies it by lr, we do not
    optimizer = torch.optim.AdamW(model.parameters(), optim.lr, betas, weight_decay=decay, fused=True)
    forward = torch.compile(lambda *pair: open_clip.loss.SigLipLoss()(*model(*pair)), disable=not compiled)
    images = (torch.rand(BATCHES, case.batch_size, 3, *image.image_size) * 2 - 1).to(device)
    texts = torch.randint(text.vocab_size, (BATCHES, case.batch_size, text.length)).to(device)
    low = torch.autocast(device, torch.bfloat16, enabled=image.dtype == "bfloat16")
    torch.set_float32_matmul_precision("highest" if image.dtype == "float32" else "high")

    def run(steps):
        for i in range(steps):
            with low:
                loss = forward(images[i % BATCHES], texts[i % BATCHES])
            loss.backward()
            if optim.clip_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
            facts["memory_bytes"] = torch.cuda.max_memory_allocated()

    from siglip.training import flops

    facts = {"version": f"torch {torch.__version__}, open_clip {open_clip.__version__}", "memory_bytes": None}
    facts |= {"flops": flops_of_theirs(case)}
    facts["device"] = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    facts |= {"peak_flops": flops.peak_flops(facts["device"]), "parameters": sum(p.numel() for p in model.parameters())}
    start = time.perf_counter()
    run(1)
    facts["compile_s"] = time.perf_counter() - start
    return facts, run


def flops_of_theirs(case):
    """Our count of a step's FLOPs per pair, corrected by what their model has in other sizes."""
    from siglip.training import flops

    spec, tokens = case.model.image.spec, case.model.image.kept_patches
    width, out_dim = spec.width, case.model.out_dim[0] or 0
    # A class token that is never dropped attends as well.
    extra = spec.depth * 4 * width * (2 * width + 2 * tokens + 1 + spec.mlp_dim) + 4 * width**2
    # The pool computes keys and values of all tokens, where ours attends without, and has no MLP; the image head is always there.
    extra += 4 * tokens * width * (width + 1 - spec.num_heads)
    extra += 2 * width * (case.model.embedding_dims[0] - out_dim) - 4 * width * spec.mlp_dim
    return flops.train_flops_per_pair(case.model, batch_size=case.batch_size) + 3 * extra


def work(args, parser):
    """A worker: facts as JSON on stdout, then [seconds, cores, memory] of every number of steps that comes on stdin."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print
    side, options = json.loads(args.worker)
    case = make_case(args, options)
    image, text = case.model.image, case.model.text
    kinds = (image.pool, text.pool == "map", image.dtype == text.dtype, case.loss.kind, case.optim.name)
    if side != "ours" and kinds != ("map", False, True, "sigmoid", "adamw"):
        parser.exit(2, "open_clip has no match; use pools map and last or mean, one dtype, the sigmoid loss, adamw\n")
    try:
        facts, run = ours(case, args) if side == "ours" else theirs(case, side == "compiled")
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
    parser.add_argument("--remat", nargs="+", default=[None], help="none dots full")
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
    sides = [(side, {}) for side in args.open_clip] + [
        ("ours", dict(zip(names, values, strict=True))) for values in grid
    ]
    load, rows = os.getloadavg(), []
    workers = []
    for side, options in sides:
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
