"""One training step at given sizes, ours and open_clip's, for the scripts that time or compile it: step_time.py, on_gpu.py,
gpu_ahead_of_time.py; and open_clip's model for learning.py. What the two sides have in common and where they differ stands in
step_time.py.
"""

import dataclasses
import sys
import time
from importlib import machinery, util
from typing import Any
from unittest import mock

TORCHVISION = [f"torchvision{name}" for name in ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional")]
BATCHES = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """What one side trains."""

    model: Any
    optim: Any
    loss: Any
    batch_size: int


def make_case(variant, *, image_size=224, text_length=64, batch_size=256, text=None, **tower):
    """Both towers of `variant`; `tower`: fields that ImageConfig and TextConfig share, `text`: others of TextConfig."""
    from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
    from siglip.training.objective import LossConfig
    from siglip.training.optim import OptimConfig

    image = ImageConfig(variant, image_size=(image_size,) * 2, **tower)
    text = TextConfig(variant.split("/")[0], length=text_length, **tower, **(text or {}))
    return Case(ModelConfig(image, text, (None, image.spec.width)), OptimConfig(), LossConfig(), batch_size)


def make_step(case, *, devices=None, fsdp=1):
    """(step, abstract state, optimizer, mesh) of `siglip train` on these devices, or on all of the process.

    The step is to be lowered and run inside `jax.set_mesh(mesh)`.
    """
    import jax

    from siglip.models.two_tower import param_shapes
    from siglip.parallel import sharding
    from siglip.training import optim
    from siglip.training.objective import make_objective
    from siglip.training.step import make_abstract_state, make_train_step

    model, ema, shapes = case.model, case.optim.ema, param_shapes(case.model)
    mesh_config = sharding.MeshConfig(fsdp=fsdp)
    mesh = sharding.make_mesh(mesh_config, devices)
    optimizer = optim.make_optimizer(case.optim, shapes, total_steps=10**6)
    schedule, frozen = optim.make_schedule(case.optim, 10**6), optim.frozen_mask(case.optim, shapes)
    with jax.set_mesh(mesh):
        abstract_state = make_abstract_state(model, optimizer, mesh=mesh, mesh_config=mesh_config, ema=ema > 0)
        objective = make_objective(model, case.loss, layout=sharding.ParamLayout.of(abstract_state.params))
        options = {"abstract_state": abstract_state, "micro_batch_size": case.loss.micro_batch_size, "ema": ema}
        return (
            make_train_step(objective, optimizer, schedule, frozen=frozen, **options),
            abstract_state,
            optimizer,
            mesh,
        )


def ours(case, *, fsdp=1):
    """(facts, run): `run(n)` takes n steps and waits for them."""
    import jax
    import numpy as np

    from siglip.parallel import sharding
    from siglip.training import flops
    from siglip.training import step as steps

    model = case.model
    step, abstract_state, optimizer, mesh = make_step(case, fsdp=fsdp)
    jax.set_mesh(mesh)
    options = {"abstract_state": abstract_state, "seed": 0}
    if hasattr(steps, "make_init"):
        state = steps.make_init(model, optimizer, **options)({})
    else:  # --baseline of on_gpu.py
        state = steps.init_state(model, optimizer, **options)
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

    device, parameters = mesh.devices.flat[0], jax.tree.leaves(abstract_state.params)
    peak = flops.peak_flops(device.device_kind)
    facts |= {"version": f"jax {jax.__version__}", "device": f"{mesh.size} x {device.device_kind}"}
    facts |= {"peak_flops": peak and peak * mesh.size, "parameters": sum(x.size for x in parameters)}
    return facts | {"flops": flops.train_flops_per_pair(model, batch_size=case.batch_size)}, run


def their_model(model, **start):
    """(open_clip, its CustomTextCLIP of the towers of `model`). start: its init_logit_scale, init_logit_bias."""
    absent = () if util.find_spec("torchvision") else TORCHVISION
    for name in absent:  # open_clip imports it for its data transforms only: names that do nothing stand in
        sys.modules[name] = mock.MagicMock(__spec__=machinery.ModuleSpec(name, None))
    import open_clip

    [sys.modules.pop(name) for name in absent]
    image, text, spec = model.image, model.text, model.image.spec
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
        proj_bias=True, proj_type="linear" if model.out_dim[1] else "none", **common,
    )  # fmt: skip
    built = open_clip.CustomTextCLIP(model.embedding_dims[0], vision, words, **start)
    # Its option for this pool makes it as wide as the embedding; ours is as wide as the tower.
    built.visual.attn_pool = open_clip.transformer.AttentionalPooler(spec.width, spec.width, spec.num_heads, 1)
    built.visual.attn_pool_contrastive = None
    return open_clip, built


def theirs(case, compiled):
    """The same of open_clip at the same numbers."""
    import torch

    torch.manual_seed(0)
    image, text, optim = case.model.image, case.model.text, case.optim
    device = "cuda" if torch.cuda.is_available() else "cpu"
    open_clip, model = their_model(case.model, init_logit_bias=-10.0)
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
