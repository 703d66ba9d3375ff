"""The losses and the noise that the studies add to the product's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.studies import label_noise, negative_ratio
from benchmarks.studies.driver import Pairs
from siglip.losses import sigmoid_loss


def embeddings(pairs: int = 12, width: int = 8) -> tuple[jax.Array, jax.Array]:
    drawn = np.random.default_rng(0).normal(size=(2, pairs, width)).astype(np.float32)
    return tuple(jnp.asarray(drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)))


def knobs(kind: str, kept: int) -> jax.Array:
    return jnp.asarray((kept, *negative_ratio.KINDS[kind]))


@pytest.mark.parametrize("kind", negative_ratio.KINDS)
def test_with_all_negatives_a_masked_loss_is_the_sigmoid_loss(kind):
    (zimg, ztxt), t, b = embeddings(), jnp.float32(2.0), jnp.float32(-2.5)
    masked = negative_ratio.masked(zimg, ztxt, t, b, jax.random.key(0), knobs(kind, 11))
    # 144 terms of size up to 10 and their sum, in float32: 144 roundings of 6e-8 of a sum below 100.
    np.testing.assert_allclose(masked, sigmoid_loss(zimg, ztxt, t, b), rtol=1e-5)


def test_the_hardest_negatives_cost_most_and_the_easiest_least():
    (zimg, ztxt), key = embeddings(), jax.random.key(0)
    easy, random, hard = (
        float(negative_ratio.masked(zimg, ztxt, jnp.float32(2.0), jnp.float32(0.0), key, knobs(kind, 3)))
        for kind in ("easy", "random", "hard")
    )
    assert easy < random < hard


def test_that_share_of_the_captions_is_at_another_image_of_its_batch(monkeypatch):
    pairs = Pairs(np.zeros((512, 1, 1, 3), np.uint8), np.arange(512)[:, None])
    monkeypatch.setattr(label_noise, "training_pairs", lambda seed: pairs)
    shown = label_noise.misaligned.__wrapped__(0.3, 0).text[:, 0]
    assert (
        sorted(shown) == list(range(512)) and (shown // label_noise.BATCH == np.arange(512) // label_noise.BATCH).all()
    )
    moved = (shown != np.arange(512)).mean()
    assert abs(moved - 0.3) < 4 * (0.3 * 0.7 / 512) ** 0.5
