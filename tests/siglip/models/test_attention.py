"""Every attention kernel against the plain form, and which one is taken where."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from siglip.models.attention import SPLASH_MIN_TOKENS, attention_fn, attention_on, choose_kernel
from siglip.models.naflex import NaflexConfig, Patches, mask_of
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig, _training_attention, make_model, param_shapes
from siglip.models.vit import ViT
from siglip.parallel.sharding import MeshConfig, ParamLayout, make_mesh, put_batch
from siglip.trees import flatten
from tests.siglip.rounding import likely_rounding, towers_apart
from tests.siglip.tiny import QUICK, random_batch, random_params


def inputs(batch, tokens, heads, depth, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(x, dtype) for x in rng.normal(size=(4, batch, tokens, heads, depth))]


def value_and_gradients(function, query, key, value, weight):
    weighted = lambda *qkv: (weight * function(*qkv)).sum()  # noqa: E731
    both = jax.jit(lambda *qkv: (function(*qkv), *jax.grad(weighted, (0, 1, 2))(*qkv)))
    return [np.asarray(x, np.float32) for x in both(query, key, value)]


def in_float64(query, key, value, weight):
    """The equation and its derivative, by hand."""
    query, key, value, weight = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (query, key, value, weight))
    scale = query.shape[-1] ** -0.5
    logits = scale * query @ key.swapaxes(2, 3)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    dweights = weight @ value.swapaxes(2, 3)
    dlogits = weights * (dweights - (weights * dweights).sum(-1, keepdims=True))
    found = (
        weights @ value,
        scale * dlogits @ key,
        scale * dlogits.swapaxes(2, 3) @ query,
        weights.swapaxes(2, 3) @ weight,
    )
    return [x.swapaxes(1, 2) for x in found]


def assert_close(found, expected, *, tokens, depth):
    """To float32's rounding: sums over depth and tokens, of logits and of values, forward and back."""
    atol = 2 * likely_rounding(4 * (tokens + depth), np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("depth", [12, 64])
def test_the_plain_form_is_the_equation_and_jax_nn(depth):
    args = inputs(2, 10, 3, depth)
    found = value_and_gradients(attention_fn, *args)
    theirs = value_and_gradients(functools.partial(jax.nn.dot_product_attention, implementation="xla"), *args)
    for x, y, exact in zip(found, theirs, in_float64(*args), strict=True):
        assert_close(x, exact, tokens=10, depth=depth)
        assert_close(x, y, tokens=10, depth=depth)


@pytest.mark.parametrize("tokens, depth, devices", [(128, 64, 1), (131, 72, 1), (40, 24, 2)])
def test_splash_emulated_is_the_equation(tokens, depth, devices):
    """131 and 40 tokens are padded to 256 and 128: the padding must neither be seen nor leave a gradient."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    args = inputs(2, tokens, 2, depth)
    splash = functools.partial(attention_fn, kernel="splash", mesh=mesh, interpret=True)
    for x, exact in zip(value_and_gradients(splash, *args), in_float64(*args), strict=True):
        assert_close(x, exact, tokens=tokens, depth=depth)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN runs on NVIDIA GPUs")
@pytest.mark.parametrize("tokens, depth", [(196, 64), (729, 72)])
def test_cudnn_is_the_equation(tokens, depth):
    args = inputs(2, tokens, 4, depth, jnp.bfloat16)
    found = value_and_gradients(functools.partial(attention_fn, kernel="cudnn"), *args)
    for x, exact in zip(found, in_float64(*args), strict=True):
        np.testing.assert_allclose(x, exact, rtol=0, atol=0.02 * np.abs(exact).max())  # bfloat16 keeps 8 bits


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN runs on NVIDIA GPUs")
def test_cudnn_leaves_out_padding_and_gives_zeros_for_it():
    args, lengths = inputs(2, 196, 4, 64, jnp.bfloat16), jnp.array([196, 50])
    found = value_and_gradients(functools.partial(attention_fn, kernel="cudnn", lengths=lengths), *args)
    for i, n in enumerate(lengths.tolist()):
        for x, exact in zip(found, in_float64(*(arg[i : i + 1, :n] for arg in args)), strict=True):
            np.testing.assert_allclose(x[i : i + 1, :n], exact, rtol=0, atol=0.02 * np.abs(exact).max())
            assert not x[i, n:].any()


def test_what_cudnn_leaves_in_padding_goes_no_further(monkeypatch):
    """It runs on GPUs alone: here XLA's attention stands for it, with rows of padding as undefined memory may be."""

    def undefined_padding(query, key, value, *, query_seq_lengths, key_value_seq_lengths, implementation):
        out = attention(
            query, key, value, query_seq_lengths=query_seq_lengths, key_value_seq_lengths=key_value_seq_lengths
        )
        return jnp.where(mask_of(query_seq_lengths, out.shape[1])[..., None, None], out, jnp.nan)

    attention, args, lengths = jax.nn.dot_product_attention, inputs(2, 10, 3, 12), jnp.array([10, 4])
    monkeypatch.setattr(jax.nn, "dot_product_attention", undefined_padding)
    found = value_and_gradients(functools.partial(attention_fn, kernel="cudnn", lengths=lengths), *args)
    for x in found:
        assert np.isfinite(x).all() and not x[1, 4:].any()
    for x, exact in zip(found, in_float64(*(arg[1:, :4] for arg in args)), strict=True):
        assert_close(x[1:, :4], exact, tokens=10, depth=12)


CPU = types.SimpleNamespace(platform="cpu", device_kind="cpu")
TPU = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
H100 = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0")
T4 = types.SimpleNamespace(platform="gpu", device_kind="Tesla T4", compute_capability="7.5")
MI300 = types.SimpleNamespace(platform="gpu", device_kind="AMD Instinct MI300X", compute_capability="gfx942")
SIZES = {"tokens": 256, "head_dim": 64, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    "device, sizes, expected",
    [
        (CPU, {}, "xla"),
        (CPU, {"tokens": 4096}, "xla"),
        (H100, {}, "cudnn"),
        (H100, {"head_dim": 72}, "cudnn"),
        (H100, {"head_dim": 100}, "xla"),
        (H100, {"head_dim": 136}, "xla"),
        (H100, {"dtype": "float32"}, "xla"),
        (T4, {}, "xla"),
        (MI300, {}, "xla"),
        (TPU, {"tokens": SPLASH_MIN_TOKENS - 1}, "xla"),
        (TPU, {"tokens": SPLASH_MIN_TOKENS}, "splash"),
    ],
)
def test_auto_takes_what_the_device_and_the_sizes_allow(device, sizes, expected):
    assert choose_kernel("auto", device=device, **(SIZES | sizes)) == expected
    assert choose_kernel("xla", device=device, **(SIZES | sizes)) == "xla"


def test_a_run_on_a_gpu_without_flash_attention_says_why(caplog):
    def make(device, **fields):
        _training_attention(ImageConfig("B/16", **fields), "model.image.attention", device, None)

    make(H100, dtype="bfloat16"), make(CPU), make(H100, attention="xla")
    assert choose_kernel("auto", device=H100, **(SIZES | {"dtype": "float32"})) == "xla"
    assert not caplog.records
    make(H100)
    needs = "not flash attention, which needs dtype 'bfloat16', not 'float32'"
    assert caplog.messages == [f"model.image.attention='auto' takes 'xla', {needs}"]


@pytest.mark.parametrize("choice", ["auto", "xla", "splash"])
@pytest.mark.parametrize("patches", [64, SPLASH_MIN_TOKENS - 1, SPLASH_MIN_TOKENS])
def test_each_length_of_a_naflex_run_takes_its_own_kernel(choice, patches):
    """On a TPU, by a tower for up to 1024 patches: traced, as it compiles nowhere else."""
    config = dataclasses.replace(model(attention=choice).image, pool="gap", naflex=NaflexConfig(64, 1024))
    tower = ViT(config, None, _training_attention(config, "model.image.attention", TPU, None))
    images = Patches(jnp.zeros((2, patches, 48)), jnp.full((2, 2), 8))
    traced = str(jax.make_jaxpr(tower.init)(jax.random.key(0), images))
    is_splash = choice == "splash" or (choice == "auto" and patches == SPLASH_MIN_TOKENS)
    assert ("pallas_call" in traced) == is_splash


def test_a_length_that_an_exported_program_leaves_open_takes_xla():
    (n,) = jax.export.symbolic_shape("n")
    attention = attention_on("auto", device=TPU, head_dim=64, dtype="float32")
    x = jax.ShapeDtypeStruct((2, n, 1, 64), jnp.float32)
    assert "pallas_call" not in str(jax.make_jaxpr(attention)(x, x, x))


@pytest.mark.parametrize(
    "choice, device, sizes, words",
    [
        ("cudnn", CPU, {}, "x='cudnn' needs an NVIDIA GPU, not cpu; use 'auto' or 'xla'"),
        ("cudnn", H100, {"head_dim": 100}, r"needs a head dimension .* that 8 divides, at most 128, not 100"),
        ("cudnn", H100, {"head_dim": 136}, r"at most 128, not 136"),
        ("cudnn", H100, {"dtype": "float32"}, "needs dtype 'bfloat16', not 'float32'"),
        ("cudnn", T4, {}, "needs compute capability 8.0 or later, not 7.5"),
        ("splash", H100, {}, "x='splash' needs a TPU, not gpu"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(choice, device, sizes, words):
    with pytest.raises(ValueError, match=words) as error:
        choose_kernel(choice, device=device, where="x", **(SIZES | sizes))
    assert "\n" not in str(error.value)


def on_device(tree):
    return jax.tree.map(jnp.asarray, tree)


def model(**fields):
    image = ImageConfig("mu", depth=1, patch_size=(4, 4), image_size=(16, 16), scan=True, remat="full", **fields)
    return ModelConfig(image, TextConfig("mu", vocab_size=20, length=5, pool="map", **fields), out_dim=(None, 32))


def test_training_checks_the_choice_and_everything_else_ignores_it():
    """A checkpoint that was trained with cuDNN is evaluated and exported on any machine."""
    config = model(attention="splash")
    with pytest.raises(ValueError, match=r"model.image.attention='splash' needs a TPU, not cpu; use 'auto' or 'xla'"):
        make_model(config, layout=ParamLayout(make_mesh(MeshConfig(), jax.devices()[:1])))
    assert flatten(param_shapes(config)) == flatten(param_shapes(model()))
    inputs = {"params": param_shapes(config)}, random_batch(config)
    programs = [jax.jit(make_model(each).apply).lower(*inputs).as_text() for each in (config, model())]
    assert programs[0] == programs[1]


def test_both_towers_run_on_their_kernel_but_for_the_heads_with_one_query():
    seen = []

    def spy(tower, query, key, value, lengths):
        seen.append((tower, query.shape[1]))
        return attention_fn(query, key, value, lengths=lengths)

    config = model()
    params, batch = on_device(random_params(config)), on_device(random_batch(config))
    module = dataclasses.replace(make_model(config), attention=tuple(functools.partial(spy, t) for t in ("img", "txt")))
    jax.eval_shape(module.apply, {"params": params}, batch)
    assert set(seen) == {("img", 16), ("txt", 5)}


@pytest.mark.parametrize(
    "patch_dropout, pool, tokens", [(0.0, "map", 16), (0.75, "map", 4), (0.75, "tok", 5), (0.99, "gap", 1)]
)
def test_a_config_knows_how_many_tokens_training_sees(patch_dropout, pool, tokens):
    config = ModelConfig(dataclasses.replace(model().image, patch_dropout=patch_dropout, pool=pool), text=None)
    params = on_device(random_params(config))
    apply = functools.partial(
        make_model(config).apply, {"params": params}, train=True, rngs={"dropout": jax.random.key(0)}
    )
    _, _, out = jax.eval_shape(apply, {"image": jnp.zeros((2, 16, 16, 3))})
    assert out["img/encoded"].shape[1] == tokens == config.image.train_tokens


def test_splash_under_scan_remat_and_a_mesh_gives_the_same_gradients():
    mesh = make_mesh(MeshConfig(), jax.devices()[:2])
    config = ModelConfig(dataclasses.replace(model().image, pool="gap"), text=None)
    params, batch = on_device(random_params(config)), put_batch(random_batch(config, batch=4), mesh)
    grads = {}
    for kernel in ("xla", "splash"):
        attention = functools.partial(attention_fn, kernel=kernel, mesh=mesh, interpret=True)
        module = dataclasses.replace(make_model(config, layout=ParamLayout(mesh)), attention=(attention, attention))
        loss = lambda p: module.apply({"params": p}, batch)[0][:, 0].sum()  # noqa: E731, B023
        grads[kernel] = flatten(jax.jit(jax.grad(loss), compiler_options=QUICK)(params))
    for path, grad in grads["xla"].items():
        atol = towers_apart(config, np.append(grad, 1), passes=2)  # sums of terms of size 1
        np.testing.assert_allclose(grads["splash"][path], grad, rtol=0, atol=atol, err_msg=path)
