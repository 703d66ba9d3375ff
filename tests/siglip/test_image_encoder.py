"""The encoder that a later stage trains with: the reference's tokens, through jit, grad, optax and a mesh."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

import siglip
from siglip import image_encoder as encoder_module
from siglip import trees
from siglip.errors import UserError
from siglip.formats import big_vision, containers, hugging_face, key_maps
from siglip.image_encoder import EncoderSpec, ImageEncoder, load_encoder
from siglip.models.two_tower import ModelConfig
from siglip.parallel import sharding
from tests.siglip import numpy_model
from tests.siglip.rounding import towers_apart
from tests.siglip.tiny import random_inputs, random_params, square_model


@pytest.fixture
def source(tmp_path):
    return written(tmp_path / "m.npz")


def written(path, **image):
    config = square_model(image={"depth": 3} | image)
    big_vision.write(path, random_params(config), config)
    return path


def test_spec_and_outputs_are_the_models(source):
    encoder, model = siglip.load_encoder(source), siglip.load(source)
    images, _ = random_inputs(model.config)
    assert encoder.spec == EncoderSpec(16, 36, (4, 4), (32, 32), (8, 8), (-1.0, 1.0), 36, class_token=False)
    np.testing.assert_array_equal(encoder.tokens(images), model.image_tokens(images))
    pooled = encoder.pooled(images)
    unit = pooled / jnp.linalg.norm(pooled, axis=1, keepdims=True)
    np.testing.assert_allclose(unit, model.embed_images(images), rtol=0, atol=towers_apart(model.config))
    assert not any(path.startswith("txt") for path in trees.flatten(encoder.params))


@pytest.mark.parametrize("name", ["a", "c"])
def test_tokens_are_big_visions(fixtures, name):
    stored = np.load(fixtures / f"bv_tiny_{name}.npz")
    encoder = load_encoder(fixtures / f"bv_tiny_{name}.npz")
    tokens = encoder.tokens(stored["input/image"])
    atol = towers_apart(siglip.load(fixtures / f"bv_tiny_{name}.npz").config, stored["out/img_tokens"])
    np.testing.assert_allclose(tokens, stored["out/img_tokens"], rtol=0, atol=atol)
    assert tokens.shape[1:] == (encoder.spec.tokens, encoder.spec.width)
    pooled = encoder.pooled(stored["input/image"])
    norms = jnp.linalg.norm(pooled, axis=1, keepdims=True)
    np.testing.assert_allclose(norms, stored["out/img_norm"], rtol=0, atol=atol * pooled.shape[1] ** 0.5)
    assert pooled.shape[1] == encoder.spec.pooled_width and encoder.spec.class_token == (name == "c")


def test_other_resolutions(source):
    encoder = load_encoder(source, 64, patch_size=(16, 8))
    assert encoder.spec.grid == (4, 8) and encoder.tokens(np.zeros((1, 64, 64, 3), np.float32)).shape == (1, 32, 36)
    assert load_encoder(f"{source}:img", (16, 24)).spec.tokens == 6


@pytest.mark.parametrize(
    "layout, scan",
    [
        ({}, True),
        ({"pool": "tok"}, False),
        pytest.param({}, False, marks=pytest.mark.slow),
        pytest.param({"pool": "tok"}, True, marks=pytest.mark.slow),
        pytest.param({"posemb": "sincos2d"}, False, marks=pytest.mark.slow),
        pytest.param({"posemb": "sincos2d"}, True, marks=pytest.mark.slow),
    ],
)
def test_earlier_layers_are_what_their_blocks_return(tmp_path, layout, scan):
    config = square_model(image={"depth": 3} | layout)
    flat = {key: np.asarray(leaf, np.float64) for key, leaf in trees.flatten(random_params(config)).items()}
    stored = key_maps.stack_blocks(flat) if scan else flat
    np.savez(tmp_path / "m.npz", **{key: array.astype(np.float32) for key, array in stored.items()})
    images, _ = random_inputs(config)
    size = config.image.image_size if "posemb" in layout else None
    for layer in (-2, -3):
        encoder = load_encoder(tmp_path / "m.npz", size, layer=layer)
        blocks = 3 + layer + 1
        expected = _blocks(flat, config, images, blocks)
        np.testing.assert_allclose(encoder.tokens(images), expected, rtol=0, atol=towers_apart(config, expected))
        assert not any("encoder_norm" in path or "MAPHead" in path for path in trees.flatten(encoder.params))
        with pytest.raises(ValueError, match="has no pooled output; use tokens"):
            encoder.pooled(images)
    for layer in (0, -4):
        with pytest.raises(
            ValueError, match=f"layer={layer}: the tower has 3 blocks; count them from the end, -1 to -3"
        ):
            load_encoder(tmp_path / "m.npz", size, layer=layer)


def _blocks(flat, config, images, depth):
    """What the tower's first `depth` blocks return: the last LayerNorm is made the identity by undoing it in float64."""
    shallow = dataclasses.replace(config, image=dataclasses.replace(config.image, depth=depth))
    seen = []
    real = numpy_model._layer_norm
    numpy_model._layer_norm = lambda p, prefix, x: (
        (seen.append(x) or x) if prefix.endswith("encoder_norm/") else real(p, prefix, x)
    )
    try:
        numpy_model.image_tower(flat, shallow, np.asarray(images, np.float64))
    finally:
        numpy_model._layer_norm = real
    return seen[0]


def test_gradients_stop_until_it_is_unfrozen(source):
    encoder = load_encoder(source)
    images, _ = random_inputs(square_model())
    connector = jnp.full((36, 5), 0.1)

    @jax.jit
    def gradients(encoder: ImageEncoder, connector, images):
        return jax.grad(lambda e, c, i: jnp.sum((e.tokens(i) @ c) ** 2), argnums=(0, 1, 2))(encoder, connector, images)

    frozen, to_connector, to_images = gradients(encoder, connector, images)
    assert isinstance(frozen, ImageEncoder) and not any(np.any(leaf) for leaf in jax.tree.leaves(frozen))
    assert np.any(to_connector) and not np.any(to_images)
    free, *_, to_images = gradients(encoder.unfrozen(), connector, images)
    trained = {path for path, leaf in trees.flatten(free.params).items() if np.any(leaf)}
    assert np.any(to_images) and trained == {p for p in trees.flatten(free.params) if not p.startswith("MAPHead_0")}

    # Optimizers take it as any other tree.
    optimizer = optax.sgd(1e-3)
    updates, _ = optimizer.update(free, optimizer.init(encoder.unfrozen()))
    stepped = optax.apply_updates(encoder.unfrozen(), updates)
    assert isinstance(stepped, ImageEncoder) and not stepped.frozen
    assert np.any(stepped.tokens(images) != encoder.tokens(images))


@pytest.mark.parametrize(
    ("layer", "scan"),
    [(-1, False), (-2, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((-1, True), (-2, False)))],
)
def test_an_encoder_that_was_trained_is_saved_and_read_again(source, tmp_path, layer, scan):
    encoder = load_encoder(source, layer=layer, scan=scan).unfrozen()
    encoder = jax.tree.map(lambda leaf: leaf * 1.25, encoder)
    images, _ = random_inputs(square_model())
    encoder.save(tmp_path / "tuned.npz")
    again = load_encoder(tmp_path / "tuned.npz", scan=scan)
    np.testing.assert_array_equal(again.tokens(images), encoder.tokens(images))
    assert again.spec == encoder.spec and again.layer == -1
    if layer == -1:
        np.testing.assert_array_equal(again.pooled(images), encoder.pooled(images))
    else:  # what is cut once more is the block before
        before, expected = load_encoder(tmp_path / "tuned.npz", layer=-2), load_encoder(source, layer=-3)
        expected = jax.tree.map(lambda leaf: leaf * 1.25, expected)
        np.testing.assert_array_equal(before.tokens(images), expected.tokens(images))
    tokens = siglip.load(tmp_path / "tuned.npz").image_tokens(images)
    np.testing.assert_allclose(tokens, encoder.tokens(images), rtol=0, atol=towers_apart(square_model(), tokens))


def test_nothing_is_left_of_an_encoder_that_cannot_be_saved(source, tmp_path):
    encoder = load_encoder(source, layer=-2)
    (tmp_path / "out").mkdir()
    for out in ("out", "out/tower.pt", "absent/tower.npz"):
        with pytest.raises(UserError, match="name a FILE.npz in a folder that exists"):
            encoder.save(tmp_path / out)
    gradients_of_a_part = dataclasses.replace(encoder, params={"embedding": encoder.params["embedding"]})
    with pytest.raises(UserError, match="lacks .*img/Transformer/encoderblock_0"):
        gradients_of_a_part.save(tmp_path / "out" / "tower.npz")
    assert not list((tmp_path / "out").iterdir())


def test_a_tower_that_was_cut_is_no_hugging_face_model(source):
    config = ModelConfig(load_encoder(source, layer=-2).config, None, (None, None))
    with pytest.raises(UserError, match="ends in a LayerNorm.*--format bigvision"):
        hugging_face.check_expressible(config)


def test_pixels_outside_their_range_are_refused(source):
    encoder, model = load_encoder(source), siglip.load(source)
    images, _ = random_inputs(square_model())
    mean, deviation = np.float32([0.48, 0.46, 0.41]), np.float32([0.27, 0.26, 0.28])
    wrong = {
        "8 bits": (images + 1) * 127.5,
        "another mean and deviation": ((images + 1) / 2 - mean) / deviation,
        "not a number": np.where(images == images.max(), np.nan, images),
    }
    for name, pixels in wrong.items():
        for call in (encoder.tokens, encoder.pooled, model.embed_images, model.image_tokens):
            with pytest.raises(UserError, match=r"pixels lie in \[.*\]; pass float32 in \[-1, 1\]"):
                call(pixels)
                pytest.fail(name)
    encoder.tokens(np.float16(images))


def test_one_program_for_every_encoder_of_a_shape(source, tmp_path):
    step = jax.jit(lambda encoder, images: encoder.tokens(images))
    images, _ = random_inputs(square_model())
    step(load_encoder(source), images)
    step(load_encoder(source), images)
    assert step._cache_size() == 1
    step(load_encoder(source, 16), images[:, :16, :16])
    assert step._cache_size() == 2


def test_sharded_over_devices(source):
    encoder = load_encoder(source, dtype="float32")
    images = np.tile(random_inputs(square_model())[0][:2], (4, 1, 1, 1))
    config = sharding.MeshConfig(fsdp=4, fsdp_min_size_bytes=1024)
    mesh = sharding.make_mesh(config)
    layout = dataclasses.replace(encoder, params=sharding.param_shardings(encoder.params, mesh, config))
    spread = jax.device_put(encoder, layout)
    assert len(spread.params["embedding"]["kernel"].addressable_shards[0].data.ravel()) == 8 * 8 * 3 * 36 // 4
    batch = jax.device_put(images, NamedSharding(mesh, sharding.P_BATCH))
    tokens = jax.jit(lambda e, i: e.tokens(i))(spread, batch)
    expected = encoder.tokens(images)
    np.testing.assert_allclose(tokens, expected, rtol=0, atol=towers_apart(square_model(), expected))
    assert len({shard.device for shard in tokens.addressable_shards}) == 8


def test_bfloat16_products_keep_float32_tokens(source):
    images, _ = random_inputs(square_model())
    exact, coarse = load_encoder(source).tokens(images), load_encoder(source, dtype="bfloat16").tokens(images)
    assert coarse.dtype == jnp.float32 and 1e-4 < np.abs(coarse - exact).max() < 0.2


def test_images_that_do_not_fit_are_named(source):
    encoder = load_encoder(source)
    with pytest.raises(ValueError, match=r"shape \(2, 16, 16, 3\) but the model takes \[b, 32, 32, 3\]"):
        encoder.tokens(np.zeros((2, 16, 16, 3), np.float32))
    with pytest.raises(ValueError, match="uint8; pass float32"):
        encoder.pooled(np.zeros((2, 32, 32, 3), np.uint8))
    with pytest.raises(FileNotFoundError, match="no file"):
        encoder_module.load_encoder("absent.npz")


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True])
def test_memory_and_speed_change_neither_tokens_nor_gradients(source, scan):
    images, _ = random_inputs(square_model())
    plain = load_encoder(source).unfrozen()
    options = load_encoder(source, remat="full", attention="auto", scan=scan).unfrozen()

    def gradient(encoder):
        free = jax.jit(jax.grad(lambda e: jnp.mean(e.tokens(images) ** 2)))(encoder)
        return key_maps.unstack_blocks(trees.flatten(free.params))

    assert any("encoderblock/" in path for path in trees.flatten(options.params)) == scan
    np.testing.assert_allclose(options.tokens(images), plain.tokens(images), rtol=0, atol=towers_apart(square_model()))
    expected = gradient(plain)
    for path, leaf in gradient(options).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=0, atol=1e-6, err_msg=path)
    with pytest.raises(ValueError, match="attention='cudnn' needs an NVIDIA GPU"):
        load_encoder(source, attention="cudnn")


def test_a_backward_pass_keeps_less_where_it_computes_again(source):
    def kept_bytes(**options):
        encoder = load_encoder(source, 256, **options).unfrozen()
        images = jnp.zeros((1, 256, 256, 3))
        compiled = jax.jit(jax.grad(lambda e: jnp.sum(e.tokens(images)))).lower(encoder).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert kept_bytes(remat="full", scan=True) < 0.7 * kept_bytes(scan=True)


def test_it_reads_the_image_tower_alone(source, monkeypatch):
    read, real = [], containers._read_array
    monkeypatch.setattr(
        containers, "_read_array", lambda stream, *args: read.append(stream.name) or real(stream, *args)
    )
    load_encoder(source)
    assert read and all(name.startswith("params/img/") for name in read)


def test_it_is_pickled_and_shown_in_one_line(source):
    encoder, (images, _) = load_encoder(source), random_inputs(square_model())
    again = pickle.loads(pickle.dumps(encoder))
    np.testing.assert_array_equal(again.tokens(images), encoder.tokens(images))
    assert repr(encoder) == (
        "ImageEncoder(B/8, 32 x 32 px in patches of (8, 8) -> 16 tokens of width 36, layer -1, frozen)"
    )
