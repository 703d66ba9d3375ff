"""Pairs per second of one training step on the CPU: a recipe of ours against open_clip (PyTorch), side by side.

    python -m pip install torch ftfy regex huggingface_hub safetensors tqdm     # and a C++ compiler for torch.compile
    python -m pip install --no-deps open_clip_torch                             # torchvision and timm are not needed
    python benchmarks/step_vs_open_clip.py --out step.json

Forward + backward + optimizer on random pairs that are in memory before the clock starts. Each side is a process with
its default threads and compiles once; then they run N steps in turn, changing places every turn. A ratio above 1: ours
is faster. Ours is the jitted step of `siglip train` on uint8 pictures, theirs CustomTextCLIP + SigLipLoss under
torch.compile with fused AdamW on float pictures already normalised. Both: float32, the recipe's batch, widths, depths,
heads, patches kept, tanh GELU, texts unmasked, gradient clipping.
What differs: their image tower has a class token, no bias in the patch embedding, an attention pool with LayerNorms on
the query and after it but *no* MLP, and a projection without bias; ours pools with an MLP and projects if the recipe
does. They pool texts at the last token, a recipe may take the mean. Ours has learning-rate multipliers, norms to log,
dropout and a running average if the recipe does. Parameters and FLOPs (forward matrix products, times 3) are printed.
The trap: beside another busy process PyTorch's threads wait for each other and its rate can fall several times over.
Believe a run only if both sides had nearly all "cores" (CPU seconds per second) and least is near most.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from importlib import machinery, util
from unittest import mock

TORCHVISION = [f"torchvision{name}" for name in ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional")]
ROW = "{:12}{:7.0f}{:7.0f}{:7.0f}{:7.2f}{:9.1f}{:12.1f}{:12}  {}"
BATCHES, SETTLE_STEPS, PAUSE_S = 8, 3, 1.0


def ours(config):
    """(facts, run): `run(n)` takes n steps and waits for them."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import numpy as np

    from siglip import optim, sharding
    from siglip.models.two_tower import param_shapes
    from siglip.step import init_state, make_train_step, state_like

    model, ema, seed, shapes = config.model, config.optim.ema, config.seed, param_shapes(config.model)
    mesh = sharding.make_mesh(config.mesh, jax.devices("cpu")[:1])
    optimizer = optim.make_optimizer(config.optim, shapes, total_steps=config.total_steps)
    schedule, frozen = optim.make_schedule(config.optim, config.total_steps), optim.frozen_mask(config.optim, shapes)
    jax.set_mesh(mesh)
    like = state_like(model, optimizer, mesh=mesh, mesh_config=config.mesh, ema=ema > 0)
    step = make_train_step(
        model, optimizer, schedule, mesh=mesh, loss=config.loss, frozen=frozen, like=like, ema=ema, seed=seed
    )
    state = init_state(model, optimizer, like=like, seed=seed)
    rng, size = np.random.default_rng(0), (BATCHES, config.batch_size)
    images = rng.integers(0, 256, (*size, *model.image.image_size, 3), np.uint8)
    texts = rng.integers(0, model.text.vocab_size, (*size, model.text.length), np.int32)
    batches = [sharding.put_batch({"image": i, "text": t}, mesh) for i, t in zip(images, texts, strict=True)]

    def run(steps):
        nonlocal state
        for i in range(steps):
            state, _ = step(state, batches[i % BATCHES])
        jax.block_until_ready(state)

    return {"version": f"jax {jax.__version__}", "parameters": sum(x.size for x in jax.tree.leaves(shapes))}, run


def theirs(config, kept, patches, compiled):
    """The same of open_clip at the same numbers."""
    import torch

    absent = () if util.find_spec("torchvision") else TORCHVISION
    for name in absent:  # open_clip imports it for its data transforms only: names that do nothing stand in
        sys.modules[name] = mock.MagicMock(__spec__=machinery.ModuleSpec(name, None))
    import open_clip

    [sys.modules.pop(name) for name in absent]
    torch.manual_seed(0)
    image, text, optim, spec = config.model.image, config.model.text, config.optim, config.model.image.spec
    common = {"norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}}
    vision = open_clip.CLIPVisionCfg(
        layers=spec.depth, width=spec.width, head_width=spec.width // spec.num_heads, patch_size=image.patch,
        mlp_ratio=spec.mlp_dim / spec.width, image_size=image.image_size, no_ln_pre=True,
        patch_dropout=1 - (kept + 0.5) / patches if kept < patches else 0.0, **common,  # it keeps int(n (1 - rate))
    )  # fmt: skip
    words = open_clip.CLIPTextCfg(
        context_length=text.length, vocab_size=text.vocab_size, width=text.spec.width, heads=text.spec.num_heads,
        layers=text.spec.depth, mlp_ratio=text.spec.mlp_dim / text.spec.width, no_causal_mask=True, pool_type="last",
        proj_bias=True, proj_type="linear" if config.model.out_dim[1] else "none", **common,
    )  # fmt: skip
    model = open_clip.CustomTextCLIP(config.model.embedding_dims[0], vision, words, init_logit_bias=-10.0)
    # Its option for this pool makes it as wide as the embedding; ours is as wide as the tower.
    model.visual.attn_pool = open_clip.transformer.AttentionalPooler(spec.width, spec.width, spec.num_heads, 1)
    model.visual.attn_pool_contrastive = None
    betas, decay = (optim.b1, optim.b2), optim.weight_decay / optim.lr  # torch multiplies it by lr, we do not
    optimizer = torch.optim.AdamW(model.parameters(), optim.lr, betas, weight_decay=decay, fused=True)
    forward = torch.compile(lambda *pair: open_clip.loss.SigLipLoss()(*model(*pair)), disable=not compiled)
    images = torch.rand(BATCHES, config.batch_size, 3, *image.image_size) * 2 - 1
    texts = torch.randint(text.vocab_size, (BATCHES, config.batch_size, text.length))

    def run(steps):
        for i in range(steps):
            forward(images[i % BATCHES], texts[i % BATCHES]).backward()
            if optim.clip_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
            optimizer.step()
            optimizer.zero_grad()

    version = f"open_clip {open_clip.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    return {"version": version, "parameters": sum(p.numel() for p in model.parameters())}, run


def flops(config, kept, patches, open_clip):
    """Matrix products of one pair, forward and backward: about 3 times the forward pass."""
    image, text, spec = config.model.image, config.model.text, config.model.image.spec
    n, d, e = kept + open_clip, spec.width, config.model.embedding_dims[0]  # its class token is never dropped
    total = 6 * patches * image.patch[0] * image.patch[1] * d + 2 * text.spec.width * (config.model.out_dim[1] or 0)
    for length, s in ((n, spec), (text.length, text.spec)):
        total += s.depth * 4 * length * s.width * (2 * s.width + length + s.mlp_dim)
    total += 4 * n * d * d + 4 * n * d + 2 * d * d  # pool: keys and values, attention of one query, output
    total += 2 * d * d + 2 * d * e if open_clip else 4 * d * spec.mlp_dim + 2 * d * (config.model.out_dim[0] or 0)
    return 3 * (total + 2 * config.batch_size * e)


def work(side, path, parser):
    """A worker: facts as JSON on stdout, then the seconds of every number of steps that comes on stdin."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print
    from siglip.config import load_config_file

    config = load_config_file(path)
    model, optim = config.model, config.optim
    kinds = (model.image.pool, model.text.pool == "map", model.image.dtype, config.loss.kind, optim.name)
    if kinds != ("map", False, "float32", "sigmoid", "adamw"):
        raise ValueError(f"{path}: open_clip has no match; use pools map and last or mean, float32, sigmoid, adamw")
    patches = model.image.grid[0] * model.image.grid[1]
    kept = max(1, round(patches * (1 - model.image.patch_dropout)))
    try:
        facts, run = ours(config) if side == "ours" else theirs(config, kept, patches, side == "open_clip")
    except ImportError as error:
        parser.exit(2, f"{side}: {error}; the first lines of {__file__} say what to install\n")
    work_per_pair = flops(config, kept, patches, side != "ours")
    facts |= {"batch_size": config.batch_size, "patches": patches, "patches kept": kept, "flops": work_per_pair}
    facts |= {"dropout": [model.image.dropout, model.text.dropout], "ema": optim.ema}
    run(SETTLE_STEPS)
    print(json.dumps(facts), file=channel)
    for line in sys.stdin:
        run(SETTLE_STEPS)
        start, start_cpu = time.perf_counter(), time.process_time()
        run(int(line))
        seconds = time.perf_counter() - start
        print(json.dumps([seconds, (time.process_time() - start_cpu) / seconds]), file=channel)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/quickstart.py", help="recipe file")
    parser.add_argument("--steps", type=int, default=60, help="steps of one run")
    parser.add_argument("--alternations", type=int, default=5, help="runs of each side")
    parser.add_argument("--eager", action="store_true", help="also open_clip without torch.compile")
    parser.add_argument("--out", type=pathlib.Path, help="also write the results to this JSON file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.config, parser)

    def receive(side):
        return json.loads(workers[side].stdout.readline() or sys.exit(workers[side].wait()))  # it has said why

    load, workers, facts = os.getloadavg(), {}, {}
    for side in ("open_clip", "eager", "ours") if args.eager else ("open_clip", "ours"):
        command = [sys.executable, __file__, "--worker", side, "--config", args.config]
        workers[side] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        facts[side] = receive(side)
    rates, cores = {side: [] for side in workers}, {side: [] for side in workers}
    for turn in range(args.alternations):
        for side in list(workers)[:: 1 if turn % 2 else -1]:
            time.sleep(PAUSE_S)  # until the threads of the one before no longer spin
            print(args.steps, file=workers[side].stdin, flush=True)
            seconds, used = receive(side)
            rates[side].append(args.steps * facts[side]["batch_size"] / seconds)
            cores[side].append(used)
    ratios = {s: [a / b for a, b in zip(rates["ours"], rates[s], strict=True)] for s in rates if s != "ours"}

    print("pairs/s      median  least   most  cores  GFLOP/s  MFLOP/pair  parameters  version")
    for side, row in rates.items():
        middle, used, mega = statistics.median(row), statistics.median(cores[side]), facts[side]["flops"] / 1e6
        rest = facts[side]["parameters"], facts[side]["version"]
        print(ROW.format(side, middle, min(row), max(row), used, middle * mega / 1e3, mega, *rest))
    for side, row in ratios.items():
        print(f"ours / {side}: median {statistics.median(row):.2f} of", *(f"{ratio:.2f}" for ratio in row))
    about = {"steps": args.steps, "cores": os.cpu_count(), "load before": load}
    print(about | {name: facts["ours"][name] for name in ("batch_size", "patches", "patches kept", "dropout", "ema")})
    if args.out:
        result = about | {"pairs_per_s": rates, "cores_used": cores, "ratios": ratios, "sides": facts}
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
