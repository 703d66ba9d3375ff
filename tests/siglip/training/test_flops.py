"""The analytic count of a step against the matrix products of the compiled forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig, make_model, param_shapes
from siglip.planning import compile
from siglip.training import flops

TINY = {"width": 32, "depth": 3, "mlp_dim": 80, "num_heads": 2}
IMAGE = ImageConfig("B/16", **TINY, image_size=(48, 40), patch_size=(8, 8))
TEXT = TextConfig("B", **(TINY | {"width": 24, "mlp_dim": 56, "depth": 2}), length=7, vocab_size=50)


@pytest.mark.parametrize(
    ("image", "text", "out_dim"),
    [
        (IMAGE, TEXT, (None, 32)),
        (dataclasses.replace(IMAGE, scan=True), dataclasses.replace(TEXT, scan=True, pool="mean"), (16, 16)),
        (dataclasses.replace(IMAGE, pool="gap"), dataclasses.replace(TEXT, pool="map"), (None, 32)),
        (dataclasses.replace(IMAGE, pool="tok"), None, (16, None)),
    ],
)
def test_the_forward_pass_has_a_third_of_a_steps_flops(image, text, out_dim):
    model, batch = ModelConfig(image, text, out_dim), 6
    module = make_model(model)
    inputs = {"image": jax.ShapeDtypeStruct((batch, *image.image_size, 3), jnp.float32)}
    inputs |= {} if text is None else {"text": jax.ShapeDtypeStruct((batch, text.length), jnp.int32)}
    forward = jax.jit(lambda params, batch: module.apply({"params": params}, batch)[:2])
    found = compile.read(forward.lower(param_shapes(model), inputs).compile()).matmul_flops
    # The loss's product of b x b pairs is counted too, but is not in a forward pass.
    pairs = 0 if text is None else 2 * batch * model.embedding_dims[0]
    # The MAP head makes of its one query what the tokens are multiplied with, once for the whole batch: this is not counted.
    once = sum(4 * t.spec.width**2 for t in (image, text) if t is not None and t.pool == "map")
    assert found - once == batch * (flops.train_flops_per_pair(model, batch_size=batch) / 3 - pairs)


def test_dropped_patches_cost_nothing():
    model = ModelConfig(IMAGE, TEXT, (None, 32))
    half = dataclasses.replace(model, image=dataclasses.replace(IMAGE, patch_dropout=0.5))
    whole, less = (flops.train_flops_per_pair(m, batch_size=8) for m in (model, half))
    assert 0.4 < less / whole < 0.7


def test_b16_at_224_is_the_known_size():
    model = ModelConfig(ImageConfig("B/16"), TextConfig("B", length=64), (None, 768))
    # ViT-B/16 forward is 17.5 GMACs (ViT, DeiT tables) with a class token and without a MAP head; the text tower has 64 tokens.
    assert flops.train_flops_per_pair(model, batch_size=1024) == pytest.approx(
        3 * 2 * (17.5e9 + 5.5e9 + 0.3e9), rel=0.03
    )


def test_peaks_are_found_by_kind():
    assert flops.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert flops.peak_flops("TPU v5 lite") == 197e12
    assert flops.peak_flops("TPU v5p") == 459e12
    assert flops.peak_flops("TPU7x") == 2307e12 / 2  # jax shows each half of a chip as a device
    assert flops.peak_flops("cpu") is None
