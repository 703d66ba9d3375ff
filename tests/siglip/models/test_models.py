"""The towers against big_vision's numbers, against an independent float64 forward pass, and in all their layouts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from siglip.formats.key_maps import stack_blocks, unstack_blocks
from siglip.losses import sigmoid_loss
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig, init_params, make_model, param_shapes
from siglip.models.variants import BlockConfig
from siglip.models.vit import normalize_pixels, sincos2d
from siglip.trees import flatten, unflatten
from tests.siglip import numpy_model
from tests.siglip.rounding import rounding, towers_apart
from tests.siglip.tiny import ODD_IMAGE, ODD_TEXT, QUICK, random_batch, random_inputs, random_params

PUBLISHED = {
    "a": ModelConfig(
        ImageConfig("mu/8", depth=2, mlp_dim=64, image_size=(32, 32)),
        TextConfig("mu", depth=2, mlp_dim=64, vocab_size=64, length=16),
        out_dim=(32, 32),
    ),
    "c": ModelConfig(
        ImageConfig("mu/16", num_heads=4, image_size=(64, 64), pool="tok"),
        TextConfig("mu", width=16, mlp_dim=48, vocab_size=50, length=8, pool="map"),
        out_dim=(24, 24),
    ),
}
OUTPUTS = {
    "img_stem": "img/stem",
    "img_with_posemb": "img/with_posemb",
    "img_tokens": "img/encoded",
    "img_head_input": "img/head_input",
    "img_norm": "img/norm",
    "txt_tokens": "txt/encoded",
    "txt_pre_logits": "txt/pre_logits",
    "txt_norm": "txt/norm",
    "t": "temperature",
    "b": "b",
}


def in_layout(config: ModelConfig, *, scan: bool, **fields) -> ModelConfig:
    image = dataclasses.replace(config.image, scan=scan, **fields)
    return dataclasses.replace(config, image=image, text=dataclasses.replace(config.text, scan=scan, **fields))


def close(found, expected, config, *, passes=1):
    """To rounding; passes: 2 for a gradient, which is a sum of terms of size 1, however small it is itself."""
    atol = towers_apart(config, np.append(expected, 1), passes=passes)
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name, scan", [pytest.param("a", False, marks=pytest.mark.slow), ("a", True), ("c", False)])
def test_outputs_loss_and_every_gradient_of_big_vision(fixtures, name, scan):
    stored = dict(np.load(fixtures / f"bv_tiny_{name}.npz"))
    config = in_layout(PUBLISHED[name], scan=scan)
    flat = {key.removeprefix("params/"): a for key, a in stored.items() if key.startswith("params/")}
    params = unflatten(stack_blocks(flat) if scan else flat)

    images, ids = jnp.asarray(stored["input/image"]), jnp.asarray(stored["input/text"])

    def loss(params):
        zimg, ztxt, out = make_model(config).apply({"params": params}, {"image": images, "text": ids})
        return sigmoid_loss(zimg, ztxt, params["t"], params["b"]), (zimg, ztxt, out)

    (value, (zimg, ztxt, out)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    close(zimg, stored["out/zimg"], config)
    close(ztxt, stored["out/ztxt"], config)
    close(value, stored["out/loss"], config)
    for theirs, ours in OUTPUTS.items():
        close(out[ours], stored[f"out/{theirs}"], config)
    grads = unstack_blocks(flatten(grads))
    assert {f"grad/params/{path}" for path in grads} == {key for key in stored if key.startswith("grad/params/")}
    for path, grad in grads.items():
        close(grad, stored[f"grad/params/{path}"], config, passes=2)


ODD = [
    ModelConfig(ImageConfig(**ODD_IMAGE, image_size=(21, 27)), TextConfig(**ODD_TEXT), out_dim=(None, 36)),
    ModelConfig(
        ImageConfig(**ODD_IMAGE, image_size=(12, 35), pool="gap"),
        TextConfig(**ODD_TEXT, pool="map"),
        out_dim=(20, 20),
    ),
    ModelConfig(
        ImageConfig(**ODD_IMAGE, image_size=(18, 16), pool="tok", posemb="sincos2d"),
        TextConfig(**ODD_TEXT, pool="mean"),
        out_dim=(27, None),
    ),
    ModelConfig(ImageConfig(**ODD_IMAGE, image_size=(6, 40), pool="none", posemb="sincos2d"), TextConfig(**ODD_TEXT)),
    ModelConfig(
        ImageConfig(**ODD_IMAGE, image_size=(13, 24), pool="0"),
        TextConfig(**ODD_TEXT, pool="first"),
        out_dim=(27, None),
    ),
    ModelConfig(ImageConfig(**ODD_IMAGE, image_size=(18, 9)), TextConfig(**ODD_TEXT, pool="max"), out_dim=(None, 36)),
    ModelConfig(
        ImageConfig(**ODD_IMAGE, image_size=(21, 18), pool="gap", block=BlockConfig(True, True, False)),
        TextConfig(**ODD_TEXT, embed_bottleneck=5, block=BlockConfig(qk_norm=True)),
        out_dim=(20, 20),
    ),
]


@pytest.mark.parametrize("index", range(len(ODD)), ids=lambda i: f"{ODD[i].image.pool}-{ODD[i].text.pool}")
def test_odd_sizes_against_float64_numpy(index):
    config = in_layout(ODD[index], scan=index % 2 == 0)
    params, (images, ids) = random_params(config), map(jnp.asarray, random_inputs(config))
    with jax.numpy_rank_promotion("raise"):
        zimg, ztxt, out = jax.jit(make_model(config).apply)({"params": params}, {"image": images, "text": ids})
    flat = {path: a.astype(np.float64) for path, a in unstack_blocks(flatten(params)).items()}

    tokens, expected = numpy_model.image_tower(flat, config, np.asarray(images, np.float64))
    close(out["img/encoded"], tokens, config)
    assert (zimg is None) == (expected is None)
    if zimg is not None:
        close(zimg, expected, config)
    tokens, expected = numpy_model.text_tower(flat, config, np.asarray(ids))
    close(out["txt/encoded"], tokens, config)
    close(ztxt, expected, config)


@pytest.mark.parametrize("scan, remat", [(False, "full"), (True, "dots"), (False, "dots+gelu")])
def test_remat_computes_products_again_and_changes_no_gradient(scan, remat):
    def grads(remat):
        image = ImageConfig(**ODD_IMAGE, image_size=(12, 16), pool="gap", scan=scan, remat=remat)
        config = ModelConfig(image, text=None)
        batch = jax.tree.map(jnp.asarray, random_batch(config))
        model = make_model(config)
        traced = jax.jit(jax.grad(lambda p: model.apply({"params": p}, batch)[0][:, 0].sum())).trace(
            random_params(config)
        )
        products = str(traced.jaxpr).count("dot_general[")
        return flatten(traced.lower().compile(QUICK)(random_params(config))), products

    (plain, products), (recomputed, more_products) = grads("none"), grads(remat)
    # "full" computes all eight products of a block again but the last, the others the logits; a scan has one block, the loop two.
    assert more_products - products == {"full": 2 * 7, "dots": 1, "dots+gelu": 2 * 1}[remat]
    for path in plain:
        close(recomputed[path], plain[path], ODD[0], passes=2)


def test_bfloat16_keeps_parameters_residuals_and_outputs_in_float32():
    config = in_layout(ODD[1], scan=False, dtype="bfloat16")
    params, (images, ids) = random_params(config), map(jnp.asarray, random_inputs(config))
    assert {str(leaf.dtype) for leaf in flatten(param_shapes(config)).values()} == {"float32"}
    with jax.numpy_dtype_promotion("strict"):
        zimg, ztxt, out = jax.jit(make_model(config).apply)({"params": params}, {"image": images, "text": ids})
    exact, exact_text, _ = jax.jit(make_model(in_layout(ODD[1], scan=False)).apply)(
        {"params": params}, {"image": images, "text": ids}
    )
    assert {str(leaf.dtype) for leaf in (zimg, ztxt, *out.values())} == {"float32"}
    # Some thirty roundings to bfloat16's 8 bits, on the way to one of 20 entries of a vector of length 1, may add up to
    # 6 sqrt(30) 2^-8 / sqrt(20) = 0.029 (rounding.py); 0.02 holds with SSE4_2, AVX2 and AVX512 (`make isa`).
    np.testing.assert_allclose(zimg, exact, rtol=0, atol=0.02)
    np.testing.assert_allclose(ztxt, exact_text, rtol=0, atol=0.02)
    assert float(jnp.max(jnp.abs(zimg - exact))) > 0


@pytest.mark.parametrize("layout", ["loop", "scan"])
def test_keys_of_a_published_base_model(fixtures, layout):
    config = in_layout(ModelConfig(), scan=layout == "scan")
    found = [f"params/{path}\t{leaf.shape}\t{leaf.dtype}" for path, leaf in flatten(param_shapes(config)).items()]
    expected = (fixtures / f"bv_keys_siglip_b16_224_{layout}.txt").read_text().splitlines()
    assert sorted(found) == sorted(expected)


BLOCK = {
    "LayerNorm_0/bias": (32,),
    "LayerNorm_0/scale": (32,),
    "LayerNorm_1/bias": (32,),
    "LayerNorm_1/scale": (32,),
    "MlpBlock_0/Dense_0/bias": (128,),
    "MlpBlock_0/Dense_0/kernel": (32, 128),
    "MlpBlock_0/Dense_1/bias": (32,),
    "MlpBlock_0/Dense_1/kernel": (128, 32),
    "MultiHeadDotProductAttention_0/key/bias": (2, 16),
    "MultiHeadDotProductAttention_0/key/kernel": (32, 2, 16),
    "MultiHeadDotProductAttention_0/out/bias": (32,),
    "MultiHeadDotProductAttention_0/out/kernel": (2, 16, 32),
    "MultiHeadDotProductAttention_0/query/bias": (2, 16),
    "MultiHeadDotProductAttention_0/query/kernel": (32, 2, 16),
    "MultiHeadDotProductAttention_0/value/bias": (2, 16),
    "MultiHeadDotProductAttention_0/value/kernel": (32, 2, 16),
}
MAP_HEAD = {path: shape for path, shape in BLOCK.items() if "LayerNorm_1" not in path} | {"probe": (1, 1, 32)}
AROUND = {
    "b": (1,),
    "img/Transformer/encoder_norm/bias": (32,),
    "img/Transformer/encoder_norm/scale": (32,),
    "img/embedding/bias": (32,),
    "img/embedding/kernel": (8, 4, 3, 32),
    "img/head/bias": (24,),
    "img/head/kernel": (32, 24),
    "img/pos_embedding": (1, 8, 32),
    "t": (1,),
    "txt/Embed_0/embedding": (50, 32),
    "txt/Encoder_0/encoder_norm/bias": (32,),
    "txt/Encoder_0/encoder_norm/scale": (32,),
    "txt/head/bias": (24,),
    "txt/head/kernel": (32, 24),
    "txt/pos_embedding": (1, 5, 32),
}


@pytest.mark.parametrize("layout", ["loop", "scan"])
@pytest.mark.parametrize("pool", ["map", "tok", "gap"])
def test_every_path_and_shape_of_a_tiny_model(layout, pool):
    """Golden: a reordered or renamed submodule must not rename weights."""
    scan = layout == "scan"
    config = ModelConfig(
        ImageConfig("mu", depth=2, patch_size=(8, 4), image_size=(16, 16), pool=pool, scan=scan),
        TextConfig("mu", depth=2, vocab_size=50, length=5, pool="map" if pool == "map" else "last", scan=scan),
        out_dim=(24, 24),
    )
    expected = dict(AROUND)
    for encoder in ("img/Transformer", "txt/Encoder_0"):
        for path, shape in BLOCK.items():
            if scan:
                expected[f"{encoder}/encoderblock/{path}"] = (2, *shape)
            else:
                expected |= {f"{encoder}/encoderblock_{i}/{path}": shape for i in range(2)}
    if pool == "map":
        expected |= {f"{tower}/MAPHead_0/{path}": shape for tower in ("img", "txt") for path, shape in MAP_HEAD.items()}
    if pool == "tok":
        expected["img/cls"] = (1, 1, 32)
    assert {path: leaf.shape for path, leaf in flatten(param_shapes(config)).items()} == expected


def test_fresh_parameters():
    image = ImageConfig(**ODD_IMAGE, image_size=(12, 16), pool="gap", scan=True)
    config = ModelConfig(image, TextConfig(**(ODD_TEXT | {"depth": 1})), out_dim=(20, 20))
    params = jax.jit(lambda key: init_params(config, key), compiler_options=QUICK)(jax.random.key(0))
    flat = flatten(params)
    assert params["t"] == pytest.approx(np.log(10)) and params["b"] == -10
    assert {str(leaf.dtype) for leaf in flat.values()} == {"float32"}
    # A zero image head makes the embedding 0 and its gradient NaN.
    matrices = [leaf for path, leaf in flat.items() if path.endswith(("kernel", "embedding", "probe"))]
    assert all(float(jnp.std(leaf)) > 0 for leaf in matrices)
    kernel = flat["img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel"]
    assert float(jnp.max(jnp.abs(kernel[0] - kernel[1]))) > 0, "layers of a scan start from different numbers"
    assert float(jnp.std(flat["txt/Embed_0/embedding"])) == pytest.approx(27**-0.5, rel=0.1)
    wide = dataclasses.replace(config, text=dataclasses.replace(config.text, embed_std=2.0))

    def table_and_positions(key):
        params = init_params(wide, key)["txt"]
        return params["Embed_0"]["embedding"], params["pos_embedding"]

    table, positions = jax.jit(table_and_positions, compiler_options=QUICK)(jax.random.key(0))
    assert float(jnp.std(table)) == pytest.approx(2.0, rel=0.1)
    assert float(jnp.std(positions)) == pytest.approx(27**-0.5, rel=0.15)


def test_a_tower_without_input_is_skipped():
    config = in_layout(ODD[0], scan=True)  # as above: compiled already
    params, (images, ids) = random_params(config), map(jnp.asarray, random_inputs(config))
    apply = jax.jit(make_model(config).apply)
    both = apply({"params": params}, {"image": images, "text": ids})
    zimg, nothing, out = apply({"params": params}, {"image": images})
    assert nothing is None and not any(key.startswith("txt") for key in out)
    close(zimg, both[0], config)
    nothing, ztxt, _ = apply({"params": params}, {"text": ids})
    assert nothing is None
    close(ztxt, both[1], config)


def test_stored_embeddings_are_handed_through_and_the_image_tower_does_not_run():
    config = ODD[0]
    params, batch = random_params(config), random_batch(config)
    stored = jnp.asarray(np.random.default_rng(0).normal(size=(3, 36)), jnp.float32)
    without_image = {name: tree for name, tree in params.items() if name != "img"}
    zimg, ztxt, out = jax.jit(make_model(config).apply)({"params": without_image}, {"zimg": stored} | batch)
    np.testing.assert_array_equal(zimg, stored)
    assert ztxt is not None and not any(key.startswith("img") for key in out)


def test_bytes_are_normalised_inside_and_float_pixels_taken_as_they_are():
    config = ModelConfig(ODD[0].image, text=None)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 21, 27, 3), dtype=np.uint8)
    apply = jax.jit(make_model(config).apply)
    params = random_params(config)
    zimg = apply({"params": params}, {"image": pixels})[0]
    close(zimg, apply({"params": params}, {"image": normalize_pixels(pixels)})[0], config)
    ends = normalize_pixels(np.array([0, 255, 255], np.uint8).reshape(1, 1, 1, 3))
    np.testing.assert_array_equal(ends.ravel(), [-1, 1, 1])


@pytest.mark.parametrize("grid, width", [((4, 6), 16), ((3, 3), 8)])
def test_fixed_positions_of_moco(fixtures, grid, width):
    expected = np.load(fixtures / "bv_posemb.npz")[f"sincos2d/{grid[0]}x{grid[1]}x{width}"]
    # Sines of angles of up to 5 radians, each of which three operations made.
    np.testing.assert_allclose(sincos2d(grid, width), expected, rtol=0, atol=2 * rounding(4, 5))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: ImageConfig(image_size=(8, 224)), "holds no patch"),
        (lambda: ImageConfig("mu/8", width=30, posemb="sincos2d"), "divides by 4"),
        (lambda: TextConfig("B/16"), "no patches; use 'B'"),
        (lambda: TextConfig(vocab_size=0), "vocab_size=0 must be at least 1"),
        (lambda: ModelConfig(out_dim=(None, 512)), r"image embedding is 768 wide .* set out_dim=\(None, 768\)"),
        (lambda: ModelConfig(temperature_init=0.0), "must be positive"),
        (lambda: ModelConfig(ImageConfig(pool="none"), out_dim=(768, 768)), "leaves no vector for a head"),
    ],
)
def test_configs_that_cannot_be(make, words):
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


def test_inputs_of_another_size_are_named():
    config = ODD[0]
    params, (images, ids) = random_params(config), map(jnp.asarray, random_inputs(config))
    with pytest.raises(ValueError, match="images are 3x20x27x3 but the model takes bx21x27x3"):
        make_model(config).apply({"params": params}, {"image": images[:, :20]})
    with pytest.raises(ValueError, match="texts are 3x6 but the model takes bx7"):
        make_model(config).apply({"params": params}, {"text": ids[:, :6]})
