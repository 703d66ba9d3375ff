"""Parts A, H and I of on_gpu.py: kernels of the training step by themselves, the loss by itself, and numbers against the CPU.

A function takes on_gpu.Run, and emits its rows.
"""

import dataclasses
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import sides

# Slower ones have to be tuned before another change to the step is worth its while.
STOP_TFLOP_PER_S = 550
LOSS_PAIRS = (4096, 16384, 32768, 65536, 131072)
TOY = {"width": 64, "depth": 2, "mlp_dim": 128, "num_heads": 1}


def seconds_of(function, *args, at_least_s=0.05):
    """Median over three turns of the seconds of one call; compiled and warm before."""
    jax.block_until_ready(function(*args))
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    calls = max(1, int(at_least_s / (time.perf_counter() - start)))
    turns = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(calls):
            result = function(*args)
        jax.block_until_ready(result)
        turns.append((time.perf_counter() - start) / calls)
    return statistics.median(turns)


def products(run):
    """Part A: the rates that every estimate rests on."""
    normal = functools.partial(jax.random.normal, jax.random.key(0), dtype=jnp.bfloat16)
    narrow, slow = [], 32 if run.toy else 768
    for pairs, tokens, width, mlp_dim in (
        [(2, 24, 32, 64)] if run.toy else [(512, 196, 768, 3072), (256, 256, 1152, 4304)]
    ):
        for inner, outer in ((width, width), (width, mlp_dim), (mlp_dim, width)):
            rows, flops = pairs * tokens, 2 * pairs * tokens * inner * outer
            x, w, g, bias = normal((rows, inner)), normal((inner, outer)), normal((rows, outer)), normal((outer,))
            products = {  # with what is summed over, K
                "forward": (inner, lambda x, w, bias: x @ w, (x, w, bias)),
                "forward, bias": (inner, lambda x, w, bias: x @ w + bias, (x, w, bias)),
                "forward, bias, GELU": (
                    inner, lambda x, w, bias: jax.nn.gelu(x @ w + bias, approximate=True), (x, w, bias),
                ),
                "dgrad": (outer, lambda g, w: g @ w.T, (g, w)),
                "wgrad": (rows, lambda x, g: x.T @ g, (x, g)),
            }  # fmt: skip
            for name, (over, function, args) in products.items():
                with run.row(f"GEMM {name}"):
                    seconds = seconds_of(jax.jit(function), *args)
                    sizes = {"m": rows, "k": inner, "n": outer}
                    run.emit(f"GEMM {name}", **sizes, ms=1e3 * seconds, tflop_per_s=flops / seconds / 1e12)
                    narrow += [(flops, seconds)] if over == slow else []
    with run.row("verdict"):
        flops, seconds = map(sum, zip(*narrow, strict=True))
        rate = flops / seconds / 1e12
        told = "autotuning first" if rate < STOP_TFLOP_PER_S else "fast enough"
        run.emit(f"verdict, GEMMs over K = {slow}", tflop_per_s=rate, least=STOP_TFLOP_PER_S, verdict=told)
    attention(run, normal)
    memory(run)


def attention(run, normal):
    """cuDNN's attention beside XLA's, and with a length for each image."""
    from siglip.models.attention import attention_fn

    shapes = [(2, 16, 1, 64)] if run.toy else [(512, 196, 12, 64), (512, 64, 12, 64), (256, 256, 16, 72)]
    kernels = ("xla",) if run.toy else ("cudnn", "xla")
    cases = [(shape, kernel, None) for shape in shapes for kernel in kernels]
    naflex = (2, 16, 1, 64) if run.toy else (512, 256, 12, 64)
    cases.append((naflex, kernels[0], jnp.linspace(naflex[1] // 2, naflex[1], naflex[0]).astype(jnp.int32)))
    for shape, kernel, lengths in cases:
        b, n, heads, depth = shape
        forward = functools.partial(attention_fn, kernel=kernel, lengths=lengths)
        backward = jax.grad(lambda q, k, v, f=forward: jnp.sum(f(q, k, v).astype(jnp.float32)), (0, 1, 2))
        for name, function, products in (("forward", forward, 2), ("forward and backward", backward, 7)):
            name = f"attention {kernel} {name}{'' if lengths is None else ', lengths'}"
            with run.row(name):
                seconds = seconds_of(jax.jit(function), *[normal(shape)] * 3)
                rate = products * 2 * b * heads * n * n * depth / seconds / 1e12  # padding counts
                run.emit(name, shape=shape, ms=1e3 * seconds, tflop_per_s=rate)


def memory(run):
    """Bytes per second of a copy, of LayerNorm, and of the embedding's gradient where 60 % of the tokens are padding."""
    from flax import linen as nn

    pairs, tokens, width = (2, 16, 32) if run.toy else (512, 196, 768)
    x, norm = jnp.ones((pairs, tokens, width)), nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32)
    params = norm.init(jax.random.key(0), x)
    forward = jax.jit(lambda params, x: norm.apply(params, x).astype(jnp.bfloat16))
    backward = jax.jit(jax.grad(lambda params, x: jnp.sum(forward(params, x).astype(jnp.float32) ** 2), (0, 1)))
    ids = jnp.where(jax.random.uniform(jax.random.key(1), (pairs * 64,)) < 0.6, 1, jnp.arange(pairs * 64) % 32000)
    rows = jnp.ones((pairs * 64, width))
    cases = {  # bytes that have to move
        "copy": (jax.jit(lambda x: x + 1), (x,), 2 * x.nbytes),
        "LayerNorm forward": (forward, (params, x), 1.5 * x.nbytes),
        "LayerNorm forward and backward": (backward, (params, x), 3 * x.nbytes),
        "scatter-add, 60 % of one row": (
            jax.jit(lambda ids, rows: jnp.zeros((32000, width)).at[ids].add(rows)), (ids, rows), 2 * rows.nbytes,
        ),
    }  # fmt: skip
    for name, (function, args, moved) in cases.items():
        with run.row(name):
            seconds = seconds_of(function, *args)
            run.emit(name, ms=1e3 * seconds, tb_per_s=moved / seconds / 1e12)


def losses(run):
    """Part H: value and gradients of the loss alone at width 768."""
    from siglip.losses import chunked_sigmoid_loss, sigmoid_loss

    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    candidates = {"ours": functools.partial(chunked_sigmoid_loss, mesh=mesh), "dense": sigmoid_loss}
    scalars = (jnp.log(jnp.float32(10)), jnp.float32(-10))
    for pairs in (64,) if run.toy else LOSS_PAIRS:
        z = [jax.random.normal(jax.random.key(i), (pairs, 768)) for i in range(2)]
        z = [(x / jnp.linalg.norm(x, axis=-1, keepdims=True)).astype(jnp.bfloat16) for x in z]
        for name, function in candidates.items():
            with run.row(f"loss, {name}, {pairs} pairs"):
                program = jax.jit(jax.value_and_grad(function, argnums=(0, 1, 2, 3))).lower(*z, *scalars).compile()
                temp_bytes = program.memory_analysis().temp_size_in_bytes
                row = {"ms": 1e3 * seconds_of(program, *z, *scalars), "temp_mib": temp_bytes / 2**20}
                run.emit(f"loss, {name}, {pairs} pairs", **row)


def torch_losses(run):
    """Part H in torch."""
    for pairs in (64,) if run.toy else LOSS_PAIRS:
        with run.row(f"loss, torch, {pairs} pairs"):
            run.emit(f"loss, torch, {pairs} pairs", **torch_loss(pairs))


def torch_loss(pairs):
    """Milliseconds and peak MiB of value and gradients of the dense loss, in bfloat16 as under autocast."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    zimg, ztxt = (
        torch.nn.functional.normalize(torch.randn(pairs, 768, device=device)).bfloat16().requires_grad_()
        for _ in range(2)
    )
    signs = 2 * torch.eye(pairs, device=device, dtype=torch.bfloat16) - 1

    def value_and_grad():
        loss = -torch.nn.functional.logsigmoid(signs * (10 * zimg @ ztxt.T - 10)).sum() / pairs
        loss.backward()

    turns = []
    for _ in range(4):
        start = time.perf_counter()
        value_and_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        turns.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None  # of the largest batch so far
    return {"ms": 1e3 * statistics.median(turns[1:]), "peak_mib": peak}


def numbers(run):
    """Part I: loss and gradients of a small model on this device against float32 on the CPU, computed here and now."""
    small = {"image_size": 64, "text_length": 16, "batch_size": 32, "text": {"vocab_size": 100}, **TOY}
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 256, (32, 64, 64, 3), np.uint8), "text": rng.integers(0, 100, (32, 16), np.int32)}
    cases = {"float32": {}, "float32, scan": {"scan": True}, "bfloat16": {"dtype": "bfloat16"}}
    # Some twenty roundings in a row, 6e-8 each, and sums over 500 tokens; bfloat16 is shown, not judged.
    limit = 1e-4
    with jax.default_matmul_precision("highest"):
        loss, grads = value_and_grad(sides.make_case("B/16", **small), batch, jax.devices("cpu")[0])
        for name, tower in cases.items():
            with run.row(f"gradients, {name}"):
                got_loss, got = value_and_grad(sides.make_case("B/16", **small, **tower), batch, jax.devices()[0])
                # Softmax cancels the keys' bias: its gradient is rounding and nothing else.
                counted = {path: g for path, g in grads.items() if not path.endswith("key/bias")}
                errors = {path: float(np.linalg.norm(got[path] - g) / np.linalg.norm(g)) for path, g in counted.items()}
                worst, loss_error = max(errors, key=errors.get), abs(got_loss - loss) / loss
                row = {"loss_error": loss_error, "gradient_error": errors[worst], "worst": worst}
                run.emit(f"gradients, {name}", **row, equal=max(loss_error, errors[worst]) < limit)


def value_and_grad(case, batch, device):
    """(loss, gradients by path) as numpy. A scan's parameters are those of the loop, stacked."""
    from siglip import trees
    from siglip.formats import key_maps
    from siglip.models.two_tower import init_params
    from siglip.parallel import sharding
    from siglip.training.accumulation import make_value_and_grad
    from siglip.training.objective import make_objective

    loop = dataclasses.replace(case.model, image=dataclasses.replace(case.model.image, scan=False))
    loop = dataclasses.replace(loop, text=dataclasses.replace(loop.text, scan=False))
    with jax.default_device(jax.devices("cpu")[0]):
        flat = trees.flatten(jax.jit(functools.partial(init_params, loop))(jax.random.key(0)))
    flat = {path: np.asarray(leaf) for path, leaf in flat.items()}
    params = trees.unflatten(key_maps.stack_blocks(flat) if case.model.image.scan else flat)
    mesh = sharding.make_mesh(sharding.MeshConfig(), [device])
    with jax.set_mesh(mesh):
        params = jax.device_put(params, jax.NamedSharding(mesh, sharding.P_REPLICATED))
        layout, frozen = sharding.ParamLayout.of(params), jax.tree.map(lambda _: False, params)
        function = make_value_and_grad(
            make_objective(case.model, case.loss, layout=layout), frozen=frozen, layout=layout
        )
        loss, _, grads = jax.jit(function)(params, sharding.put_batch(batch, mesh), jax.random.key(0), 0)
    grads = {path: np.asarray(leaf, np.float64) for path, leaf in trees.flatten(grads).items()}
    return float(loss), key_maps.unstack_blocks(grads)
