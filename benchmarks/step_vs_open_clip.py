"""Pairs per second of one training step on the CPU: a recipe of ours against open_clip (PyTorch), side by side.

    python -m pip install torch ftfy regex huggingface_hub safetensors tqdm     # torchvision and timm are not needed
    python -m pip install --no-deps open_clip_torch
    python benchmarks/step_vs_open_clip.py --out step.json

Forward + backward + optimizer on random pairs that are in memory before the clock starts; no data loading. Each side has
a process of its own with its default threads and compiles there once; then they run N steps in turn, first and last
changing places every time, while the others wait. A ratio is of two runs of one turn; above 1 we are faster.

Ours: the jitted step of `siglip train` on uint8 pictures. open_clip: CustomTextCLIP + SigLipLoss, model and loss in one
torch.compile, fused AdamW, float pictures already normalised. Both: float32, the recipe's batch, widths, depths, heads,
patches kept, tanh GELU, unmasked text pooled at its last token, gradient clipping.

What differs. open_clip's image tower has a class token, no bias in the patch embedding, an attention pool with
LayerNorms on the query and after it but *no* MLP, and a projection; ours pools with an MLP and projects no picture. We
compute the schedule and norms to log; dropout and the running average, if the recipe has them, are ours only. So
parameters and FLOPs (matrix products of the forward pass, times 3) are printed for both.

The trap: what else runs on the machine. Look at least and most, not at one ratio.
"""

import argparse
import importlib.machinery
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from unittest import mock

RECIPE = pathlib.Path(__file__).parents[1] / "configs" / "quickstart.py"
TORCHVISION = [f"torchvision{name}" for name in ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional")]
BATCHES, SETTLE_STEPS, PAUSE_S = 8, 3, 1.0


def ours(config):
    """(facts, run): `run(n)` takes n steps, waits for them and returns the last loss."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import numpy as np

    from siglip import optim, sharding
    from siglip.models.two_tower import param_shapes
    from siglip.step import init_state, make_train_step

    model, size, shapes, ema = config.model, config.batch_size, param_shapes(config.model), config.optim.ema
    mesh = sharding.make_mesh(config.mesh, jax.devices("cpu")[:1])
    optimizer = optim.make_optimizer(config.optim, shapes, total_steps=config.total_steps)
    schedule, frozen = optim.make_schedule(config.optim, config.total_steps), optim.frozen_mask(config.optim, shapes)
    common = {"mesh": mesh, "seed": config.seed}
    step = make_train_step(model, optimizer, schedule, loss=config.loss, frozen=frozen, ema=ema, **common)
    with jax.set_mesh(mesh):
        state = init_state(model, optimizer, mesh_config=config.mesh, ema=ema > 0, **common)
    rng, batches = np.random.default_rng(0), []
    for _ in range(BATCHES):
        image = rng.integers(0, 256, (size, *model.image.image_size, 3), np.uint8)
        text = rng.integers(0, model.text.vocab_size, (size, model.text.length), np.int32)
        batches.append(sharding.put_batch({"image": image, "text": text}, mesh))

    def run(steps):
        nonlocal state
        with jax.set_mesh(mesh):
            for i in range(steps):
                state, metrics = step(state, batches[i % BATCHES])
            jax.block_until_ready(state)
        return float(metrics["train/loss"])

    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    return {"version": f"jax {jax.__version__}", "parameters": parameters}, run


def theirs(config, compiled):
    """The same of open_clip at the same numbers."""
    import torch

    absent = () if importlib.util.find_spec("torchvision") else TORCHVISION
    for name in absent:  # open_clip imports it for its data transforms only: names that do nothing stand in
        sys.modules[name] = mock.MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None))
    from open_clip import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP, __version__
    from open_clip.loss import SigLipLoss

    for name in absent:
        del sys.modules[name]
    torch.manual_seed(0)
    image, text, optim, spec = config.model.image, config.model.text, config.optim, config.model.image.spec
    kept, patches = kept_patches(image)
    common = {"norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}}
    vision_config = CLIPVisionCfg(
        layers=spec.depth, width=spec.width, head_width=spec.width // spec.num_heads, mlp_ratio=spec.mlp_dim / spec.width,
        patch_size=image.patch, image_size=image.image_size, no_ln_pre=True, attentional_pool=True,
        attn_pooler_queries=1, attn_pooler_heads=spec.num_heads,
        patch_dropout=1 - (kept + 0.5) / patches if kept < patches else 0.0, **common,  # it keeps int(n (1 - rate))
    )  # fmt: skip
    text_config = CLIPTextCfg(
        context_length=text.length, vocab_size=text.vocab_size, width=text.spec.width, heads=text.spec.num_heads,
        layers=text.spec.depth, mlp_ratio=text.spec.mlp_dim / text.spec.width, no_causal_mask=True, pool_type="last",
        proj_bias=True, proj_type="linear" if config.model.out_dim[1] else "none", **common,
    )  # fmt: skip
    model = CustomTextCLIP(spec.width, vision_config, text_config, init_logit_bias=config.model.bias_init).train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": optim.weight_decay / optim.lr},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.b1, optim.b2), fused=True)
    loss = SigLipLoss()

    def forward(pixels, ids):
        return loss(*model(pixels, ids))

    forward = torch.compile(forward) if compiled else forward
    images = torch.rand(BATCHES, config.batch_size, 3, *image.image_size) * 2 - 1
    texts = torch.randint(text.vocab_size, (BATCHES, config.batch_size, text.length))

    def run(steps):
        for i in range(steps):
            optimizer.zero_grad()
            value = forward(images[i % BATCHES], texts[i % BATCHES])
            value.backward()
            if optim.clip_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
            optimizer.step()
        return value.item()

    version = f"open_clip {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    return {"version": version, "parameters": sum(p.numel() for p in model.parameters())}, run


def kept_patches(image):
    patches = image.grid[0] * image.grid[1]
    return max(1, round(patches * (1 - image.patch_dropout))), patches


def flops(config, *, open_clip):
    """Matrix products of one pair, forward and backward: about 3 times the forward pass."""
    image, text, out_dim = config.model.image, config.model.text, config.model.out_dim[1]
    kept, patches = kept_patches(image)
    total = 6 * patches * image.patch[0] * image.patch[1] * image.spec.width + 2 * text.spec.width * (out_dim or 0)
    for n, spec in ((kept + open_clip, image.spec), (text.length, text.spec)):
        d = spec.width
        total += spec.depth * (8 * n * d * d + 4 * n * n * d + 4 * n * d * spec.mlp_dim)
    d, n = image.spec.width, kept + open_clip
    total += 4 * n * d * d + 4 * n * d + 2 * d * d  # pool: keys and values, attention of one query, output
    total += 4 * d * d if open_clip else 4 * d * image.spec.mlp_dim  # query of every picture and projection, or MLP
    return 3 * (total + 2 * config.batch_size * d)


def work(side, path):
    """A worker: facts as JSON on stdout, then the seconds of every number of steps that comes on stdin."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print
    from siglip.config import load_config_file

    config = load_config_file(path)
    model, optim = config.model, config.optim
    kinds = (model.image.pool, model.out_dim[0], model.text.pool, model.image.dtype, config.loss.kind, optim.name)
    if kinds != ("map", None, "last", "float32", "sigmoid", "adamw"):
        raise ValueError(f"pools, head, dtype, loss, optimizer: {kinds}; use map, None, last, float32, sigmoid, adamw")
    try:
        start = time.perf_counter()
        facts, run = ours(config) if side == "ours" else theirs(config, side == "open_clip")
        run(SETTLE_STEPS)
        facts |= {"start_s": time.perf_counter() - start, "flops_per_pair": flops(config, open_clip=side != "ours")}
        facts |= {"batch_size": config.batch_size, "patches (kept, all)": kept_patches(model.image)}
        facts |= {"only ours": {"dropout": (model.image.dropout, model.text.dropout), "ema": optim.ema}}
    except ImportError as error:
        facts = {"missing": str(error)}
    print(json.dumps(facts), file=channel)
    for line in sys.stdin:
        run(SETTLE_STEPS)
        start = time.perf_counter()
        run(int(line))
        print(json.dumps(time.perf_counter() - start), file=channel)


def ask(process, steps=None):
    """What a worker says next, about `steps` steps if given."""
    if steps:
        print(steps, file=process.stdin, flush=True)
    return json.loads(process.stdout.readline() or sys.exit("step_vs_open_clip: a worker died; see above"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(RECIPE), help="recipe file")
    parser.add_argument("--steps", type=int, default=60, help="steps of one run")
    parser.add_argument("--alternations", type=int, default=5, help="runs of each side")
    parser.add_argument("--eager", action="store_true", help="also open_clip without torch.compile")
    parser.add_argument("--out", type=pathlib.Path, help="also write the results to this JSON file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.config)
    if min(args.steps, args.alternations) < 1:
        parser.exit(2, f"--steps {args.steps} and --alternations {args.alternations} must be at least 1\n")

    load, workers, facts = os.getloadavg(), {}, {}
    for side in ("open_clip", "eager", "ours") if args.eager else ("open_clip", "ours"):
        command = [sys.executable, __file__, "--worker", side, "--config", args.config]
        workers[side] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        facts[side] = ask(workers[side])
        if "missing" in facts[side]:
            parser.exit(2, f"{side}: {facts[side]['missing']}; the first lines of {__file__} say what to install\n")
    batch, rates = facts["ours"]["batch_size"], {side: [] for side in workers}
    for turn in range(args.alternations):
        for side in list(workers)[:: 1 if turn % 2 else -1]:
            time.sleep(PAUSE_S)  # until the threads of the one before no longer spin
            rates[side].append(args.steps * batch / ask(workers[side], args.steps))
    ratios = {s: [a / b for a, b in zip(rates["ours"], rates[s], strict=True)] for s in rates if s != "ours"}

    print(f"{'pairs/s':10}{'median':>8}{'least':>7}{'most':>7}{'GFLOP/s':>9}{'MFLOP/pair':>12}{'parameters':>12}")
    for side, row in rates.items():
        middle, mega = statistics.median(row), facts[side]["flops_per_pair"] / 1e6
        print(f"{side:10}{middle:8.0f}{min(row):7.0f}{max(row):7.0f}{middle * mega / 1e3:9.1f}{mega:12.1f}", end="")
        print(f"{facts[side]['parameters']:12}  {facts[side]['version']}")
    for side, row in ratios.items():
        print(f"ours / {side}: median {statistics.median(row):.2f} of", *(f"{ratio:.2f}" for ratio in row))
    about = {name: facts["ours"][name] for name in ("batch_size", "patches (kept, all)", "only ours")}
    about |= {"steps": args.steps, "cores": os.cpu_count(), "load before": load}
    print(about)
    if args.out:
        result = about | {"pairs_per_s": rates, "ratios": ratios, "sides": facts}
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
