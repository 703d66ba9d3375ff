"""Dropout and patch dropout act in training only, and draw from (seed, step) alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig, init_params, make_model

IMAGE = ImageConfig(variant="mu", patch_size=(4, 4), image_size=(16, 16))
TEXT = TextConfig(variant="mu", vocab_size=20, length=5)


def model(*, scan: bool = False, remat: str = "none", **image) -> ModelConfig:
    rates = {"dropout": image.get("dropout", 0.0)}
    shared = {"scan": scan, "remat": remat, "depth": 2 if scan else 1}  # what is scanned compiles once
    return ModelConfig(
        dataclasses.replace(IMAGE, **shared, **image),
        dataclasses.replace(TEXT, **shared, **rates),
        out_dim=(None, 32),
    )


def start(config):
    return fresh_params(config.image.scan)  # neither dropping nor rematerialising changes the parameters


@functools.cache
def fresh_params(scan):
    return jax.jit(lambda: init_params(model(scan=scan), jax.random.key(1)))()


@functools.cache
def program(config, train):
    def apply(params, batch, key):
        return make_model(config).apply({"params": params}, batch, train=train, rngs={"dropout": key})

    return jax.jit(apply)


def outputs(config, *, train, seed=0):
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(-1, 1, (3, 16, 16, 3)), jnp.float32)
    texts = jnp.asarray(rng.integers(20, size=(3, 5)), jnp.int32)
    return program(config, train)(start(config), {"image": images, "text": texts}, jax.random.key(seed))


@pytest.mark.parametrize(
    "scan, remat",
    [
        (False, "none"),
        (True, "full"),
        pytest.param(True, "none", marks=pytest.mark.slow),
        pytest.param(False, "full", marks=pytest.mark.slow),
    ],
)
def test_dropout_acts_in_training_only_and_repeats_with_its_key(scan, remat):
    config, plain = model(scan=scan, remat=remat, dropout=0.5), model(scan=scan, remat=remat)
    still, dropped = outputs(config, train=False), outputs(config, train=True)
    for tower in (0, 1):
        np.testing.assert_array_equal(still[tower], outputs(plain, train=True)[tower])
        assert np.max(np.abs(dropped[tower] - still[tower])) > 1e-2
        np.testing.assert_array_equal(dropped[tower], outputs(config, train=True)[tower])
        assert np.any(dropped[tower] != outputs(config, train=True, seed=1)[tower])


def test_patch_dropout_keeps_some_patches_with_their_positions():
    config = model(patch_dropout=0.75)
    _, _, still = outputs(config, train=False)
    assert still["img/encoded"].shape == (3, 16, 32)
    _, _, dropped = outputs(config, train=True)
    assert dropped["img/encoded"].shape == (3, 4, 32)
    zimg = outputs(config, train=True)[0]
    assert np.max(np.abs(zimg - outputs(config, train=False)[0])) > 1e-3
    assert outputs(model(patch_dropout=0.99), train=True)[2]["img/encoded"].shape == (3, 1, 32)


def test_a_patch_is_kept_as_often_as_any_other():
    config = model(patch_dropout=0.75)
    params = start(config)
    images = jnp.zeros((256, 16, 16, 3))

    def kept(key):
        module = make_model(config)
        _, state = module.apply(
            {"params": params}, {"image": images}, train=True, rngs={"dropout": key},
            capture_intermediates=lambda m, name: name == "_some_patches", mutable=["intermediates"],
        )  # fmt: skip
        return jax.tree.leaves(state["intermediates"])[0]

    chosen = np.asarray(jax.jit(kept)(jax.random.key(0)))
    assert all(len(set(row)) == 4 for row in chosen)
    counts = np.bincount(chosen.ravel(), minlength=16)
    assert counts.sum() == 1024 and counts.min() > 30 and counts.max() < 105  # 64 each, 5 standard deviations


def test_kept_patches_are_embedded_as_without_dropping():
    config = model(patch_dropout=0.75)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(-1, 1, (3, 16, 16, 3)), jnp.float32)
    params = start(config)
    apply = jax.jit(make_model(config).apply, static_argnames="train")
    every = np.asarray(apply({"params": params}, {"image": images})[2]["img/with_posemb"])
    some = apply({"params": params}, {"image": images}, train=True, rngs={"dropout": jax.random.key(0)})[2][
        "img/with_posemb"
    ]
    for n in range(3):
        distance = np.abs(np.asarray(some)[n][:, None] - every[n][None]).max(-1)
        assert np.all(distance.min(1) < 1e-6) and len(set(distance.argmin(1))) == 4


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_rates_are_checked(rate):
    for field in ("dropout", "patch_dropout"):
        with pytest.raises(ValueError, match=rf"image\.{field}={rate}"):
            dataclasses.replace(IMAGE, **{field: rate})
