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
from siglip.parallel.sharding import MeshConfig, ParamLayout, check_micro_batch_size, make_mesh, put_batch
from siglip.training.accumulation import make_value_and_grad
from siglip.training.loop import make_program
from siglip.training.objective import LossConfig, Objective, Parts, make_objective, make_pair_loss
from siglip.training.step import make_abstract_state, make_init, make_train_step
from tests.siglip.rounding import rounding
from tests.siglip.tiny import QUICK
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
# The longest chain of float32 operations behind an entry of a gradient of SMALL: a patch (192), forward and back through a
# block (450 each: sums of 32 and 128 terms) and the loss (64), then a sum over 32 pairs of 6 tokens (192).
CHAIN = 1350


def batch_of(pairs=PAIRS):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (pairs, 16, 16, 3), dtype=np.uint8)
    return {"image": image, "text": rng.integers(0, 50, (pairs, 6), dtype=np.int32)}


def mesh_of(devices, fsdp=1):
    return make_mesh(MeshConfig(fsdp=fsdp, fsdp_min_size_bytes=1024), jax.devices()[:devices])


def program(model, mesh, *, micro=None, loss=None, frozen="nothing"):
    """The jitted (params, batch, key) -> (loss, gradients) of a model's step, and parameters for it."""
    loss = dataclasses.replace(loss or LossConfig(), micro_batch_size=micro)
    mesh_config = MeshConfig(fsdp=mesh.shape["fsdp"], fsdp_min_size_bytes=1024)
    shapes = make_abstract_state(model, optax.sgd(0.1), mesh=mesh, mesh_config=mesh_config).params
    layout = ParamLayout.of(shapes)
    value_and_grad = make_value_and_grad(
        make_objective(model, loss, layout=layout),
        frozen=trees.map_with_path(lambda path, _: bool(re.fullmatch(frozen, path)), shapes),
        layout=layout,
        micro_batch_size=micro,
    )

    def function(params, batch, key):
        loss, _, grads = value_and_grad(params, batch, key, jnp.int32(0))
        return loss, grads

    where = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    return jax.jit(function, compiler_options=QUICK), jax.device_put(fresh_params(model), where)


@functools.cache
def fresh_params(model):
    return jax.jit(lambda: init_params(model, jax.random.key(0)), compiler_options=QUICK)()


def gradients(model, mesh, *, batch=None, **kwargs):
    function, params = program(model, mesh, **kwargs)
    value, grads = function(params, put_batch(batch or batch_of(), mesh), jax.random.key(3))
    return float(value), jax.device_get(trees.flatten(grads))


def assert_equal_gradients(found, expected, *, chain=CHAIN):
    # Two sums of 1024 terms, each in an order of its own.
    assert found[0] == pytest.approx(expected[0], rel=2 * rounding(PAIRS**2))
    for path, grad in expected[1].items():
        # Here terms of both signs cancel, for a key's bias, which shifts all logits of a query alike, to zero: what differs
        # are roundings of the terms, which lie between 0.1 and 1.
        scale = 1 if path == "t" or path.endswith("key/bias") else np.abs(grad).max()
        np.testing.assert_allclose(found[1][path], grad, rtol=0, atol=2 * rounding(chain, scale), err_msg=path)


@functools.cache
def whole_batch(kind):
    return gradients(SMALL, mesh_of(1), loss=LossConfig(kind))


@pytest.mark.parametrize("kind, micro", [("sigmoid", 4), pytest.param("softmax", 16, marks=pytest.mark.slow)])
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
def test_exact_in_float64_for_what_couples_pairs_and_for_what_adds_up(devices):
    """TowerOutputs of one layer, where nothing rounds to float32, and a term with a head and dropout of its own."""
    with jax.enable_x64(True):
        rng, mesh = np.random.default_rng(0), mesh_of(devices)
        params = {
            "w": rng.normal(size=(5, 4)),
            "v": rng.normal(size=(3, 4)),
            "head": rng.normal(size=(4, 2)),
            "t": np.array([0.7]),
            "b": np.array([-1.3]),
        }
        params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
        batch = {name: rng.normal(size=(48, n)) for name, n in {"image": 5, "text": 3, "target": 2}.items()}

        def forward(params, rows, key, step):
            zimg, ztxt = jnp.tanh(rows["image"] @ params["w"]), jnp.tanh(rows["text"] @ params["v"])
            kept = zimg * jax.random.bernoulli(key, 0.5, zimg.shape)
            error = kept @ params["head"] - rows["target"]
            return Parts({"zimg": kept, "nested": [ztxt]}, 0.3 * jnp.sum(error**2), {"error": jnp.sum(jnp.abs(error))})

        def couple(coupled, params):
            # sigmoid_loss itself accumulates in float32.
            t, b = params["t"][0], params["b"][0]
            logits = jnp.exp(t) * coupled["zimg"] @ coupled["nested"][0].T + b
            return jnp.sum(jax.nn.softplus((1 - 2 * jnp.eye(48)) * logits)) / 48, {"bias": params["b"][0]}

        def by_hand(params, steps):
            """One plain function of the parameters, whose rows go by as those of the micro-batches do."""
            order = np.arange(48).reshape(devices, steps, -1)
            parts = []
            for j in range(steps):
                rows = {name: x[order[:, j].ravel()] for name, x in batch.items()}
                draws = jax.random.key(3) if steps == 1 else jax.random.fold_in(jax.random.key(3), j)
                parts.append(forward(params, rows, draws, None))
            back = np.argsort(np.concatenate([order[:, j].ravel() for j in range(steps)]))
            coupled = jax.tree.map(lambda *z: jnp.concatenate(z)[back], *(part.coupled for part in parts))
            error = sum(part.metrics["error"] for part in parts) / 48
            return couple(coupled, params)[0] + sum(part.separate for part in parts) / 48, error

        for steps in (1, 2, 3):
            value_and_grad = make_value_and_grad(
                Objective(forward, couple),
                frozen=dict.fromkeys(params, False),
                layout=ParamLayout(mesh),
                micro_batch_size=48 // steps,
            )
            found = jax.jit(value_and_grad)(params, put_batch(batch, mesh), jax.random.key(3), jnp.int32(0))
            (loss, error), grads = jax.jit(jax.value_and_grad(by_hand, has_aux=True), static_argnums=1)(params, steps)
            np.testing.assert_allclose(found[0], loss, rtol=1e-13)
            np.testing.assert_allclose(found[1]["error"], error, rtol=1e-13)
            assert found[1]["bias"] == -1.3
            for name, grad in grads.items():
                assert np.all(np.asarray(grad) != 0), name
                # Sums of at most 48 * 48 terms in another order: 2304 * 2^-53 of their magnitude, at most 10 here.
                np.testing.assert_allclose(found[2][name], grad, rtol=0, atol=2304 * 2**-53 * 10, err_msg=name)


@pytest.mark.slow  # in a model; of the equations: test_exact_in_float64…
def test_both_passes_drop_the_same_and_every_micro_batch_something_else():
    model = dataclasses.replace(
        SMALL,
        image=dataclasses.replace(SMALL.image, dropout=0.3, patch_dropout=0.5),
        text=dataclasses.replace(SMALL.text, dropout=0.3),
    )
    mesh, key = mesh_of(1), jax.random.key(3)
    function, params = program(model, mesh, micro=8)
    objective = make_objective(model, LossConfig(), layout=ParamLayout(mesh))
    batch = batch_of()
    batch = {name: np.tile(rows[:8], (2, *[1] * (rows.ndim - 1))) for name, rows in batch.items()}

    def embeddings(params):
        parts = [{name: jnp.asarray(rows[8 * j : 8 * j + 8]) for name, rows in batch.items()} for j in range(2)]
        found = [
            objective.forward(params, part, jax.random.fold_in(key, j), jnp.int32(0)) for j, part in enumerate(parts)
        ]
        return jax.tree.map(lambda *z: jnp.concatenate(z), *(parts.coupled for parts in found))

    def loss(params):
        z = embeddings(params)
        return objective.couple(z, params)[0], z

    (value, z), grads = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)(params)
    found = function(params, put_batch(batch, mesh), key)
    assert_equal_gradients(*((float(v), jax.device_get(trees.flatten(g))) for v, g in (found, (value, grads))))
    assert all(np.abs(each[:8] - each[8:]).max() > 1e-2 for each in z.values())


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
    abstract = make_abstract_state(MODEL, optimizer, mesh=mesh, mesh_config=mesh_config, ema=True)
    objective = make_objective(MODEL, LossConfig(), layout=ParamLayout.of(abstract.params))
    frozen = jax.tree.map(lambda _: False, param_shapes(MODEL))
    states = []
    for micro in (None, 8):
        options = {"abstract_state": abstract, "micro_batch_size": micro, "ema": 0.5}
        step = make_train_step(objective, optimizer, lambda _: 1.0, frozen=frozen, **options)
        state = make_init(MODEL, optimizer, abstract_state=abstract, seed=0)({})
        step = step.lower(state, put_batch(batch_of(), mesh)).compile(QUICK)
        for _ in range(3):
            state, _ = step(state, put_batch(batch_of(), mesh))
        states.append(jax.device_get(state))
        for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
            assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    # Three steps with momentum add up 5.6 gradients at 0.5, whose entries are below 1, through blocks twice as deep.
    atol = 5.6 * 0.5 * 2 * rounding(2 * CHAIN)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), *states)


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
    pair_loss = make_pair_loss(model, LossConfig(dtype=asked), layout=ParamLayout(mesh_of(1)))
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
        # Sums of 32 products, then of 8 pairs, and the four operations of a sigmoid; bfloat16 keeps 8 bits of each factor.
        tolerance = 2 * rounding(32 + 8 + 4) if expected == "float32" else 0.02
        np.testing.assert_allclose(grad, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())
