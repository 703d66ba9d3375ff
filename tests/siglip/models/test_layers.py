"""How blocks are stacked, what remat keeps, and in which dtype the residual stream runs: the same function each time."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from siglip.models.attention import attention_fn
from siglip.models.layers import Encoder, PoolingAttention
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig, make_model
from siglip.models.variants import Variant
from siglip.parallel.sharding import P_BATCH, MeshConfig, ParamLayout, make_mesh
from siglip.planning import compile
from siglip.trees import flatten
from tests.siglip.rounding import towers_apart
from tests.siglip.tiny import ODD_IMAGE, ODD_TEXT, QUICK, random_batch, random_params

CONFIG = ModelConfig(ImageConfig(**ODD_IMAGE, image_size=(12, 16), pool="gap", scan=True), text=None)
FLOAT32, BFLOAT16 = jnp.dtype("float32"), jnp.dtype("bfloat16")


class OnGpu(ParamLayout):
    """This machine's devices, taken for GPUs."""

    platform = "gpu"


def of_image(**fields):
    return dataclasses.replace(CONFIG, image=dataclasses.replace(CONFIG.image, **fields))


def traced(config, *, layout=None):
    """A gradient of a model's parameters."""
    module, batch = make_model(config, layout=layout), jax.tree.map(jnp.asarray, random_batch(config))
    loss = lambda params: module.apply({"params": params}, batch)[0][:, 0].sum()  # noqa: E731
    return jax.jit(jax.grad(loss)).trace(random_params(config))


@functools.cache
def gradients(config, *, layout=None):
    """(the traced program of a gradient, the compiled one, what it gives)."""
    program = traced(config, layout=layout)
    compiled = program.lower().compile(QUICK)
    return str(program.jaxpr), compiled.as_text(), flatten(compiled(random_params(config)))


def assert_same(found, expected):
    for path, grad in expected.items():
        atol = towers_apart(CONFIG, np.append(grad, 1), passes=2)  # sums of terms of size 1
        np.testing.assert_allclose(found[path], grad, rtol=0, atol=atol, err_msg=path)


def products(function, *args):
    """The matrix products that `function` traces to."""
    return [eqn for eqn in jax.make_jaxpr(function)(*args).jaxpr.eqns if eqn.primitive.name == "dot_general"]


def test_what_the_probe_makes_of_the_keys_is_exact_in_bfloat16():
    head, x = PoolingAttention(3, BFLOAT16), jnp.ones((2, 5, 36), BFLOAT16)
    params = jax.eval_shape(head.init, jax.random.key(0), jnp.ones((1, 1, 36)), x)
    with jax.default_matmul_precision("bfloat16"):
        found = products(head.apply, params, jnp.ones((1, 1, 36)), x)
    exact = [eqn for eqn in found if eqn.invars[0].aval.dtype == FLOAT32]
    assert len(exact) == 2 < len(found)
    assert {eqn.params["precision"] for eqn in exact} == {(jax.lax.Precision.HIGHEST,) * 2}


def test_a_narrow_table_is_widened_in_the_dtype_of_products():
    text = TextConfig(**ODD_TEXT, embed_bottleneck=5, dtype="bfloat16", pool="mean")
    config = ModelConfig(ImageConfig(**ODD_IMAGE), text, out_dim=(None, 36))
    tower = lambda params, ids: make_model(config).apply({"params": params}, {"text": ids})[1]  # noqa: E731
    found = products(tower, random_params(config), jnp.zeros((2, 7), jnp.int32))
    (widening,) = [eqn for eqn in found if eqn.invars[1].aval.shape == (5, 27)]
    assert widening.outvars[0].aval.dtype == BFLOAT16


def test_an_unrolled_scan_is_the_same_function_without_a_loop():
    _, loop, expected = gradients(of_image(remat="full", unroll=False))
    _, straight, found = gradients(of_image(remat="full", unroll=True))
    assert " while(" in loop and " while(" not in straight
    assert_same(found, expected)


@pytest.mark.parametrize("unroll, turns_of_the_loop", [(None, 2), (True, 2), (False, 1)])
def test_on_a_gpu_a_scan_is_unrolled_and_its_layout_pinned(unroll, turns_of_the_loop):
    layout = OnGpu(make_mesh(MeshConfig(), jax.devices()[:1]))
    program, _, found = gradients(of_image(unroll=unroll), layout=layout)
    assert f"unroll={turns_of_the_loop}" in program and "layout_constraint" in program
    plain, _, expected = gradients(of_image())
    assert "unroll=1" in plain and "layout_constraint" not in plain
    assert_same(found, expected)


@pytest.mark.parametrize("remat, devices, turns", [("full", 1, 2), ("full", 2, 1), ("dots", 2, 1), ("none", 2, 2)])
def test_on_several_gpus_blocks_that_are_to_save_memory_stay_a_loop(remat, devices, turns):
    model = make_model(of_image(remat=remat), layout=OnGpu(make_mesh(MeshConfig(), jax.devices()[:devices])))
    batch = {"image": jnp.zeros((2, *CONFIG.image.image_size, 3), jnp.uint8)}
    with jax.set_mesh(model.layout.mesh):
        program = jax.make_jaxpr(model.apply)({"params": random_params(of_image())}, batch)
    assert f"unroll={turns}" in str(program)


@pytest.mark.parametrize("remat, runs", [("none", 2), ("dots+gelu", 2), ("dots", 2), ("full", 3)])
def test_remat_by_name_keeps_what_flash_attention_gives_its_backward_pass(remat, runs):
    attention = functools.partial(attention_fn, kernel="splash", interpret=True)
    module = Encoder(Variant(16, 1, 24, 2), False, remat, BFLOAT16, FLOAT32, attention=attention)
    x = jnp.zeros((1, 8, 16))
    params = jax.eval_shape(module.init, jax.random.key(0), x)
    program = str(jax.make_jaxpr(jax.grad(lambda params: module.apply(params, x).sum()))(params))
    # Forward and backward, each a call; a forward pass whose results are all kept is left behind without any, and dropped.
    assert len(re.findall(r"= jit\[\s*name=_splash_attention\b", program)) == runs


def test_dots_keep_gelu_out_of_memory_and_dots_gelu_do_not_compute_it_again():
    tanhs = {r: str(traced(of_image(remat=r)).jaxpr).count("= tanh") for r in ("none", "dots", "dots+gelu")}
    # GELU's backward pass has a tanh of its own; "dots" computes the forward one again for Dense_1's kernel.
    assert tanhs == {"none": 2, "dots+gelu": 2, "dots": 3}


def test_a_bfloat16_stream_has_the_parameters_and_outputs_of_the_float32_one():
    """It rounds the stream twice a block, to 8 bits; LayerNorm's input is then off by that much."""
    params, batch = random_params(CONFIG), jax.tree.map(jnp.asarray, random_batch(CONFIG))

    def tokens(**fields):
        with jax.numpy_dtype_promotion("strict"):
            return jax.jit(make_model(of_image(**fields)).apply, compiler_options=QUICK)({"params": params}, batch)[2][
                "img/encoded"
            ]

    exact, products = tokens(), tokens(dtype="bfloat16")
    stream = tokens(dtype="bfloat16", residual_dtype="bfloat16")
    assert stream.dtype == jnp.float32
    errors = [float(jnp.sqrt(jnp.mean((each - exact) ** 2))) for each in (products, stream)]
    roundings = 1 + 2 * CONFIG.image.spec.depth
    assert errors[0] < errors[1] < errors[0] + np.sqrt(roundings) * 2.0**-8


def test_a_pinned_layout_moves_no_activation():
    """The partitioner does not know the constraint: alone, it would gather the whole batch for it."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:2])
    layout, x = OnGpu(mesh), jax.ShapeDtypeStruct((4, 8, 16), jnp.float32, sharding=NamedSharding(mesh, P_BATCH))
    module = Encoder(Variant(16, 1, 24, 2), False, "none", FLOAT32, FLOAT32, layout=layout)
    params = jax.eval_shape(module.init, jax.random.key(0), x)
    gradient = jax.jit(jax.grad(lambda params, x: module.apply(params, x).sum()))
    stats = compile.read(gradient.lower(params, x).compile())
    assert set(stats.collective_bytes) == {"all-reduce"}  # of the gradients
