"""The optimizer step by step against recorded numbers of google-research/big_vision (tests/fixtures/README.md)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from siglip import trees
from siglip.parallel.sharding import MeshConfig, make_mesh
from siglip.training import optim
from siglip.training.optim import OptimConfig, frozen_mask, make_optimizer, make_schedule
from tests.siglip.rounding import likely_rounding, rounding

CONFIGS = {
    "adafactor_default_cosine": OptimConfig("adafactor", weight_decay=1e-2, b2=0.999, warmup_steps=2),
    "lit_adam_frozen_img": OptimConfig(weight_decay=1e-2, b2=0.999, warmup_steps=2, lr_mults=(("img/.*", 0.0),)),
    "adafactor_b95_rsqrt": OptimConfig(
        "adafactor", schedule="rsqrt", timescale_steps=3, warmup_steps=2, cooldown_steps=2
    ),
    "adam_b95_bf16mu_rsqrt": OptimConfig(
        schedule="rsqrt", timescale_steps=3, warmup_steps=2, cooldown_steps=2, momentum_dtype="bfloat16"
    ),
    "adafactor_plain": OptimConfig(
        "adafactor", lr=1.0, weight_decay=0, clip_norm=0, momentum_dtype="float32",
        schedule="linear", lr_mults=(("img/.*", 0.1),),
    ),
}  # fmt: skip
TOTAL_STEPS = {"adafactor_b95_rsqrt": 5, "adam_b95_bf16mu_rsqrt": 5, "adafactor_plain": 100}
# The momentum in bfloat16 has 8 bits: one rounding that falls the other way is 4e-3 of an entry.
TOLERANCE = {"adafactor_default_cosine": 1e-2, "adafactor_b95_rsqrt": 1e-2, "adam_b95_bf16mu_rsqrt": 1e-2}


def tree_at(data, prefix):
    return trees.unflatten({k[len(prefix) :]: data[k] for k in data.files if k.startswith(prefix)})


@pytest.mark.parametrize("name", CONFIGS)
def test_updates_parameters_and_schedule_agree(fixtures, name):
    data = np.load(fixtures / "bv_optim.npz")
    config, total_steps = CONFIGS[name], TOTAL_STEPS.get(name, 10)
    np.testing.assert_allclose(
        [make_schedule(config, total_steps)(i) for i in range(total_steps + 1)],
        data[f"{name}/schedule"],
        rtol=0,
        atol=2 * rounding(8),  # eight operations on numbers of at most 1
    )
    params, moved = tree_at(data, "params/"), 0.0
    # The norm to clip to sums all squares; 20 operations more make an update.
    exact = 2 * likely_rounding(sum(leaf.size for leaf in jax.tree.leaves(params)) + 20)
    optimizer = make_optimizer(config, params, total_steps=total_steps)
    state = optimizer.init(params)
    step = jax.jit(optimizer.update)
    for i in range(5):
        updates, state = step(tree_at(data, f"grads/{i}/"), state, params)
        params = optax.apply_updates(params, updates)
        expected = {kind: trees.flatten(tree_at(data, f"{name}/{kind}/{i}/")) for kind in ("updates", "params")}
        assert trees.flatten(updates).keys() == expected["updates"].keys() == expected["params"].keys()
        moved += max(np.max(np.abs(value)) for value in expected["updates"].values())
        for path, value in trees.flatten(updates).items():
            wanted = expected["updates"][path]
            atol = TOLERANCE.get(name, exact) * np.max(np.abs(wanted))
            np.testing.assert_allclose(value, wanted, rtol=0, atol=atol + 1e-12, err_msg=path)
        for path, value in trees.flatten(params).items():
            wanted = expected["params"][path]
            atol = TOLERANCE.get(name, exact) * moved + 2 * rounding(i + 1, np.max(np.abs(wanted)))
            np.testing.assert_allclose(value, wanted, rtol=0, atol=atol, err_msg=path)


def test_the_paper_convention_is_adamw_with_decay_divided_by_lr():
    params = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
    grads = jax.tree.map(lambda p: jnp.cos(p), params)
    ours = make_optimizer(
        OptimConfig(lr=1e-3, weight_decay=1e-4, clip_norm=0, schedule="linear"), params, total_steps=9
    )
    theirs = optax.adamw(lambda i: 1e-3 * (1 - i / 9), b2=0.95, weight_decay=0.1)
    a, b = ours.init(params), theirs.init(params)
    p, q = params, params
    for _ in range(4):
        updates, a = ours.update(grads, a, p)
        p = optax.apply_updates(p, updates)
        updates, b = theirs.update(grads, b, q)
        q = optax.apply_updates(q, updates)
    np.testing.assert_allclose(
        p["a"]["kernel"], q["a"]["kernel"], rtol=2 * rounding(4 * 20)
    )  # four updates of 20 operations


def test_frozen_parameters_keep_no_moments_and_do_not_count_in_the_norm():
    params = {"img": {"kernel": jnp.ones((4, 4))}, "txt": {"kernel": jnp.ones((2, 2))}}
    config = OptimConfig(lr_mults=(("img/.*", 0.0),), clip_norm=1.0, weight_decay=0, schedule="linear")
    assert frozen_mask(config, params) == {"img": {"kernel": True}, "txt": {"kernel": False}}
    optimizer = make_optimizer(config, params, total_steps=10)
    state = optimizer.init(params)
    assert all(leaf.shape != (4, 4) for leaf in jax.tree.leaves(state))
    huge = {"img": {"kernel": jnp.full((4, 4), 1e6)}, "txt": {"kernel": jnp.full((2, 2), 0.1)}}
    updates, state = optimizer.update(huge, state, params)
    assert not np.any(updates["img"]["kernel"])
    # The text gradient's own norm is 0.2 < 1, so its moments must see it unclipped.
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2, 2)]
    np.testing.assert_allclose(moments[0], 0.1 * 0.1, rtol=2 * rounding(4))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptimConfig(lr_mults=(("image/.*", 0.1),)), "matches no parameter"),
        (OptimConfig(lr_mults=((".*", 0.0),)), "freeze every parameter"),
        (OptimConfig(warmup_steps=11), "exceed total_steps=10"),
        (OptimConfig(warmup_steps=10), "warmup_steps=10 is all of total_steps=10"),
    ],
)
def test_bad_settings_are_named(config, message):
    params = {"img": {"kernel": jnp.ones((2, 2))}}
    with pytest.raises(ValueError, match=message):
        make_optimizer(config, params, total_steps=10)


def test_negative_values_are_refused():
    with pytest.raises(ValueError, match=r"optim\.lr=-1"):
        OptimConfig(lr=-1)


def orthogonal_by_the_published_iteration(matrix):
    """`newtonschulz5` of https://kellerjordan.github.io/posts/muon in float64."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("stacked_bytes", [0, 2**20])
def test_muon_is_the_published_algorithm_at_the_size_of_adamws_updates(monkeypatch, stacked_bytes):
    monkeypatch.setattr(optim, "_MUON_STACKED_BYTES", stacked_bytes)
    rng = np.random.default_rng(0)
    block = {"MlpBlock_0": {"Dense_0": {"kernel": (8, 12), "bias": (12,)}}, "MultiHeadDotProductAttention_0": {}}
    for name, shape in {"query": (8, 2, 4), "key": (8, 2, 4), "out": (2, 4, 8)}.items():
        block["MultiHeadDotProductAttention_0"][name] = {"kernel": shape}
    shapes = {"txt": {"Encoder_0": {"encoderblock_0": block}, "Embed_0": {"embedding": (5, 8)}}, "b": (1,)}
    params = jax.tree.map(lambda shape: jnp.ones(shape), shapes, is_leaf=lambda x: isinstance(x, tuple))
    options = {"lr": 1.0, "weight_decay": 0, "clip_norm": 0, "schedule": "linear"}
    grads = [jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), params) for _ in range(2)]
    updates = {}
    for name in ("adamw", "muon"):
        optimizer = make_optimizer(OptimConfig(name, **options), params, total_steps=10**9)
        state = optimizer.init(params)
        for grad in grads:
            updates[name], state = jax.jit(optimizer.update)(grad, state, params)
    first, second = map(trees.flatten, grads)
    adamw, muon = (trees.flatten(updates[name]) for name in ("adamw", "muon"))
    for path, update in muon.items():
        if "encoderblock" not in path or not path.endswith("kernel"):
            np.testing.assert_allclose(update, adamw[path], rtol=2 * rounding(20))  # two programs
            continue
        inputs = 8  # the width, on either side of attention
        g1, g2 = (grad[path].astype(np.float64).reshape(inputs, -1) for grad in (first, second))
        momentum = 0.05 * (0.95 * g1 + g2)
        matrix = 0.95 * momentum / (1 - 0.95**3) + 0.05 * g2 / (1 - 0.95**2)  # Nesterov's, both without their bias
        wanted = -0.2 * np.sqrt(max(matrix.shape)) * orthogonal_by_the_published_iteration(matrix)
        # An iteration lengthens what is off by at most its slope at 0, and has three products of 12 terms.
        atol = 2 * sum(3.4445**i * likely_rounding(3 * 12) for i in range(6)) * np.max(np.abs(wanted))
        np.testing.assert_allclose(update.reshape(matrix.shape), wanted, rtol=0, atol=atol, err_msg=path)


def test_muon_takes_each_of_stacked_blocks_alone():
    rng = np.random.default_rng(0)
    grads = {
        "query": rng.standard_normal((3, 8, 2, 4), np.float32),
        "Dense_1": rng.standard_normal((3, 12, 8), np.float32),
    }
    stacked = {"img": {"encoderblock": {name: {"kernel": grad} for name, grad in grads.items()}}}
    alone = {"img": {f"encoderblock_{i}": {n: {"kernel": g[i]} for n, g in grads.items()} for i in range(3)}}
    found = []
    for tree in (stacked, alone):
        optimizer = make_optimizer(OptimConfig("muon", clip_norm=0), tree, total_steps=10)
        found.append(jax.jit(optimizer.update)(tree, optimizer.init(tree), tree)[0]["img"])
    for i in range(3):
        for name, grad in grads.items():
            one, other = found[0]["encoderblock"][name]["kernel"][i], found[1][f"encoderblock_{i}"][name]["kernel"]
            assert one.shape == grad.shape[1:]
            atol = 2 * sum(3.4445**k * likely_rounding(3 * 12) for k in range(6)) * np.max(np.abs(other))
            np.testing.assert_allclose(one, other, rtol=0, atol=atol)


def test_muon_of_sharded_matrices_is_that_of_whole_ones():
    rng, mesh = np.random.default_rng(0), make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    kernels = {"query": rng.standard_normal((8, 2, 4), np.float32), "Dense_0": rng.standard_normal((8, 12), np.float32)}
    whole = {"img": {"encoderblock_0": {name: {"kernel": kernel} for name, kernel in kernels.items()}}}
    cut = jax.device_put(whole, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp")))
    optimizer = make_optimizer(OptimConfig("muon"), whole, total_steps=10)
    one, other = (jax.jit(optimizer.update)(tree, optimizer.init(tree), tree)[0] for tree in (whole, cut))
    for path, update in trees.flatten(one).items():
        atol = 2 * sum(3.4445**k * likely_rounding(3 * 12) for k in range(6)) * np.max(np.abs(update))
        np.testing.assert_allclose(trees.flatten(other)[path], update, rtol=0, atol=atol)
