"""Micro-batches give the gradients of the one big batch, in the memory of one micro-batch."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from siglip import trees
from siglip.losses import sigmoid_loss
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig, init_params, param_shapes
from siglip.parallel.sharding import MeshConfig, Placement, check_micro_batch_size, make_mesh, put_batch
from siglip.training.accumulation import make_value_and_grad
from siglip.training.loop import make_program
from siglip.training.step import LossConfig, init_state, make_embed, make_pair_loss, make_train_step, state_like
from tests.siglip.tiny_run import tiny_config

MODEL = ModelConfig(
    ImageConfig("mu", depth=2, patch_size=(8, 8), image_size=(16, 16), pool="gap", scan=True, remat="full"),
    TextConfig("mu", depth=2, vocab_size=50, length=6, scan=True, remat="dots"),
    out_dim=(None, 32),
)
# One layer, nothing scanned: what suffices where only the sums are looked at, and compiles faster.
SMALL = dataclasses.replace(
    MODEL,
    image=dataclasses.replace(MODEL.image, depth=1, scan=False, remat="none"),
    text=dataclasses.replace(MODEL.text, depth=1, scan=False, remat="none"),
)
PAIRS = 32
# Code that runs once need not be fast: half the time of these tests would be LLVM's.
QUICK = {"xla_backend_optimization_level": 0}


def batch_of(pairs=PAIRS):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (pairs, 16, 16, 3), dtype=np.uint8)
    return {"image": image, "text": rng.integers(0, 50, (pairs, 6), dtype=np.int32)}


def mesh_of(devices, fsdp=1):
    return make_mesh(MeshConfig(fsdp=fsdp, fsdp_min_size_bytes=1024), jax.devices()[:devices])


def program(model, mesh, *, micro=None, loss=None, frozen="nothing"):
    """The jitted (params, batch, key) -> (loss, gradients) of a model's step, and parameters for it."""
    loss = dataclasses.replace(loss or LossConfig(), micro_batch_size=micro)
    like = state_like(
        model, optax.sgd(0.1), mesh=mesh, mesh_config=MeshConfig(fsdp=mesh.shape["fsdp"], fsdp_min_size_bytes=1024)
    )
    placement = Placement.of(mesh, like.params)
    function = make_value_and_grad(
        make_embed(model, placement=placement),
        make_pair_loss(model, mesh=mesh, loss=loss),
        frozen=trees.map_with_path(lambda path, _: bool(re.fullmatch(frozen, path)), like.params),
        placement=placement,
        micro_batch_size=micro,
    )
    where = jax.tree.map(lambda leaf: leaf.sharding, like.params)
    return jax.jit(function, compiler_options=QUICK), jax.device_put(fresh_params(model), where)


@functools.cache
def fresh_params(model):
    return jax.jit(lambda: init_params(model, jax.random.key(0)), compiler_options=QUICK)()


def gradients(model, mesh, **kwargs):
    function, params = program(model, mesh, **kwargs)
    value, grads = function(params, put_batch(batch_of(), mesh), jax.random.key(3))
    return float(value), jax.device_get(trees.flatten(grads))


def assert_equal_gradients(found, expected):
    # Unoptimised code adds the 1024 terms of the loss one by one: roundings of 2^-24 grow to 1.5e-6 of it.
    assert found[0] == pytest.approx(expected[0], rel=3e-6)
    # The same float32 products are summed in another order: a few units in the last place of the largest entries.
    for path, grad in expected[1].items():
        # Here terms of both signs cancel, for a key's bias, which shifts all logits of a query alike, to zero: what differs
        # are roundings of the terms, which lie between 0.1 and 1.
        scale = 0.1 if path == "t" or path.endswith("key/bias") else np.abs(grad).max()
        np.testing.assert_allclose(found[1][path], grad, rtol=0, atol=3e-6 * scale, err_msg=path)


@functools.cache
def whole_batch(kind):
    return gradients(SMALL, mesh_of(1), loss=LossConfig(kind))


@pytest.mark.parametrize("kind, micro", [("sigmoid", 4), ("softmax", 16)])
def test_gradients_are_those_of_the_whole_batch_on_one_device(kind, micro):
    assert_equal_gradients(gradients(SMALL, mesh_of(1), micro=micro, loss=LossConfig(kind)), whole_batch(kind))


def test_gradients_are_those_of_the_whole_batch_on_eight_devices():
    found = gradients(SMALL, mesh_of(8, 4), micro=16, loss=LossConfig(impl="ring"))
    assert_equal_gradients(found, whole_batch("sigmoid"))


def test_a_micro_batch_of_the_whole_batch_is_the_plain_step():
    function, params = program(SMALL, mesh_of(1), micro=PAIRS)
    args = params, put_batch(batch_of(), mesh_of(1)), jax.random.key(3)
    plain, _ = program(SMALL, mesh_of(1))
    assert function.lower(*args).as_text() == plain.lower(*args).as_text()


@pytest.mark.parametrize("devices", [1, 8])
def test_exact_in_float64(devices):
    """Towers of one layer, where nothing rounds to float32: the identity itself, positives where they belong."""
    with jax.enable_x64(True):
        rng, mesh = np.random.default_rng(0), mesh_of(devices)
        params = {
            "w": rng.normal(size=(5, 4)),
            "v": rng.normal(size=(3, 4)),
            "t": np.array([0.7]),
            "b": np.array([-1.3]),
        }
        params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
        batch = put_batch({"image": rng.normal(size=(48, 5)), "text": rng.normal(size=(48, 3))}, mesh)

        def embed(params, rows, key):
            return jnp.tanh(rows["image"] @ params["w"]), jnp.tanh(rows["text"] @ params["v"])

        def pair_loss(zimg, ztxt, params):
            return sigmoid_loss(zimg, ztxt, params["t"], params["b"])

        make = functools.partial(
            make_value_and_grad,
            embed,
            pair_loss,
            frozen=dict.fromkeys(params, False),
            placement=Placement(mesh),
        )
        value, grads = jax.jit(make())(params, batch, jax.random.key(0))
        for micro in (8, 16, 24):
            found, found_grads = jax.jit(make(micro_batch_size=micro))(params, batch, jax.random.key(0))
            np.testing.assert_allclose(found, value, rtol=1e-13)
            for name, grad in grads.items():
                # The cotangents of float64 matrix products may pass through their float32 accumulation dtype.
                np.testing.assert_allclose(found_grads[name], grad, rtol=1e-12, atol=1e-14, err_msg=name)


def test_both_passes_drop_the_same_and_every_micro_batch_something_else():
    model = dataclasses.replace(
        SMALL,
        image=dataclasses.replace(SMALL.image, dropout=0.3, patch_dropout=0.5),
        text=dataclasses.replace(SMALL.text, dropout=0.3),
    )
    mesh, key = mesh_of(1), jax.random.key(3)
    function, params = program(model, mesh, micro=8)
    embed, pair_loss = make_embed(model, placement=Placement(mesh)), make_pair_loss(model, mesh=mesh, loss=LossConfig())
    batch = batch_of()
    batch = {name: np.tile(rows[:8], (2, *[1] * (rows.ndim - 1))) for name, rows in batch.items()}

    def embeddings(params):
        parts = [{name: jnp.asarray(rows[8 * j : 8 * j + 8]) for name, rows in batch.items()} for j in range(2)]
        found = [embed(params, part, jax.random.fold_in(key, j)) for j, part in enumerate(parts)]
        return [jnp.concatenate(z) for z in zip(*found, strict=True)]

    def loss(params):
        z = embeddings(params)
        return pair_loss(*z, params), z

    (value, (zimg, ztxt)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)(params)
    found = function(params, put_batch(batch, mesh), key)
    assert_equal_gradients(*((float(v), jax.device_get(trees.flatten(g))) for v, g in (found, (value, grads))))
    assert all(np.abs(z[:8] - z[8:]).max() > 1e-2 for z in (zimg, ztxt))


def test_a_frozen_tower_runs_once_and_only_forward():
    function, params = program(SMALL, mesh_of(1), micro=8, frozen="img/.*")
    args = params, put_batch(batch_of(), mesh_of(1)), jax.random.key(3)
    products = [
        line for line in function.lower(*args).compile().as_text().splitlines() if re.search(r"= .* dot\(", line)
    ]
    image, text = (sum(f"/{tower}/" in line for line in products) for tower in ("img", "txt"))
    forward = [line for line in products if "/img/" in line and "transpose(" not in line]
    # Forward of a block: query, key, value, out, two of the attention, two of the MLP; before it the patches.
    assert image == len(forward) == 9 and text > 2 * image
    value, grads = function(*args)
    flat = trees.flatten(grads)
    assert not any(np.any(grad) for path, grad in flat.items() if path.startswith("img/"))
    trained = {path: grad for path, grad in flat.items() if not path.startswith("img/")}
    expected = {path: grad for path, grad in whole_batch("sigmoid")[1].items() if path in trained}
    assert_equal_gradients((float(value), jax.device_get(trained)), (whole_batch("sigmoid")[0], expected))


def test_memory_is_that_of_a_micro_batch():
    mesh, temporaries = mesh_of(1), {}
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, batch_of(4096)))
    for micro in (None, 256):
        function, params = program(SMALL, mesh, micro=micro)
        compiled = function.lower(params, batch, jax.random.key(0)).compile()
        temporaries[micro] = compiled.memory_analysis().temp_size_in_bytes
    # What remains of the whole batch are its embeddings and their gradients, 4 x 4096 x 32 float32, and the loss.
    assert temporaries[256] < temporaries[None] / 8


@pytest.mark.slow
def test_a_run_in_micro_batches_is_the_run_of_whole_batches():
    """Together with FSDP, remat, a running average and the optimizer."""
    mesh, mesh_config = mesh_of(8, 2), MeshConfig(fsdp=2, fsdp_min_size_bytes=1024)
    # Linear in the gradient: Adam divides by it and would blow up the rounding of entries that are nearly zero.
    optimizer = optax.sgd(0.5, momentum=0.9)
    like = state_like(MODEL, optimizer, mesh=mesh, mesh_config=mesh_config, ema=True)
    frozen = jax.tree.map(lambda _: False, param_shapes(MODEL))
    states = []
    for micro in (None, 8):
        loss = LossConfig(micro_batch_size=micro)
        step = make_train_step(MODEL, optimizer, lambda _: 1.0, mesh=mesh, loss=loss, frozen=frozen, like=like, ema=0.5)
        state = init_state(MODEL, optimizer, like=like, seed=0)
        step = step.lower(state, put_batch(batch_of(), mesh)).compile(QUICK)
        for _ in range(3):
            state, _ = step(state, put_batch(batch_of(), mesh))
        states.append(jax.device_get(state))
        for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
            assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    # Entries of size 1 after three steps: two roundings of such an entry, 2^-23 each, are seen; eight may add up.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), *states)


@pytest.mark.parametrize(
    "micro, fix",
    [(12, "use 8 or 16"), (4, "use 8"), (48, "use 32"), (24, "use 16 or 32")],
)
def test_micro_batches_that_do_not_fit_are_refused_with_sizes_that_do(micro, fix):
    with pytest.raises(
        ValueError, match=rf"loss.micro_batch_size={micro} must divide batch_size=32 .* 8 devices; {fix}$"
    ):
        check_micro_batch_size(micro, 32, mesh_of(8))


def test_sizes_are_checked_before_anything_compiles():
    with pytest.raises(ValueError, match=r"loss.micro_batch_size=0 must be at least 1, or None"):
        LossConfig(micro_batch_size=0)
    config = tiny_config("unused", loss=LossConfig(micro_batch_size=12))
    with pytest.raises(ValueError, match=r"micro_batch_size=12 .* use 8 or 16"):
        make_program(config)


@pytest.mark.parametrize("asked, tower, expected", [
    ("auto", "float32", "float32"), ("auto", "bfloat16", "bfloat16"), ("float32", "bfloat16", "float32"),
    ("bfloat16", "float32", "bfloat16"),
])  # fmt: skip
def test_the_loss_multiplies_in_the_dtype_of_the_step(asked, tower, expected):
    model = dataclasses.replace(MODEL, text=dataclasses.replace(MODEL.text, dtype=tower))
    pair_loss = make_pair_loss(model, mesh=mesh_of(1), loss=LossConfig(dtype=asked))
    rng = np.random.default_rng(0)
    zimg, ztxt = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in rng.normal(size=(2, 8, 32)).astype(np.float32))
    params = {"t": jnp.array([2.3]), "b": jnp.array([-5.0])}
    text = jax.jit(pair_loss).lower(zimg, ztxt, params).as_text()
    products = re.findall(r"stablehlo.dot_general.*", text)
    assert products and all(("bf16" in line) == (expected == "bfloat16") for line in products)
    assert all(
        line.rstrip().split("->")[1].strip().startswith("tensor<") and "xf32>" in line.split("->")[1]
        for line in products
    )
    grads = jax.jit(jax.grad(pair_loss, (0, 1)))(zimg, ztxt, params)
    exact = jax.jit(jax.grad(lambda a, b: sigmoid_loss(a, b, params["t"], params["b"]), (0, 1)))(zimg, ztxt)
    for grad, wanted in zip(grads, exact, strict=True):
        assert grad.dtype == jnp.float32
        # bfloat16 keeps 8 bits of each factor.
        np.testing.assert_allclose(
            grad, wanted, rtol=0, atol=(1e-6 if expected == "float32" else 0.02) * np.abs(wanted).max()
        )
