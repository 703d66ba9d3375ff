"""Folders of timm and open_clip: their keys and configs always, the libraries themselves where they are installed."""

import json
import logging

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from siglip import encoder
from siglip.encoder import Encoder
from siglip.errors import UserError
from siglip.formats import open_clip
from siglip.formats.big_vision import image_only
from siglip.model_source import read_config, read_model
from siglip.models.naflex import NaflexConfig, Patches
from siglip.models.text import TokenConfig
from siglip.models.two_tower import ModelConfig
from siglip.models.vit import PixelConfig
from siglip.trees import flatten
from tests.siglip import numpy_model
from tests.siglip.formats.test_big_vision import same
from tests.siglip.formats.timm_folders import (
    ARGS,
    CONFIG,
    PIXELS,
    TEXT,
    TIMM,
    naflex_folder,
    open_clip_folder,
    timm_folder,
)
from tests.siglip.rounding import towers_apart
from tests.siglip.texts import SPIECE
from tests.siglip.tiny import random_inputs, random_params, square_model


@pytest.fixture
def tiny(monkeypatch):
    """A size of timm's names that is as small as CONFIG."""
    monkeypatch.setitem(open_clip.VARIANTS, "tiny", CONFIG.image.spec)
    monkeypatch.setitem(open_clip._SIZES, "tiny", ("tiny", 128 / 36))


def test_both_towers_of_open_clip(tmp_path, tiny):
    params = random_params(CONFIG)
    found, config, tokenizer = read_model(open_clip_folder(tmp_path, params))
    same(found, params)
    assert (config.image.spec, config.text.spec) == (CONFIG.image.spec, CONFIG.text.spec) and tokenizer is None
    assert (config.text.length, config.text.vocab_size, config.out_dim) == (7, 61, (None, 36))
    assert config.image.pixels == PixelConfig((0.4, 0.5, 0.6), (0.5, 0.5, 0.25), "bicubic")
    assert config.text.tokens == TokenConfig(canonical="texts")
    found, config, _ = read_model(tmp_path, only_image=True)
    same(found, {"img": params["img"]})
    assert config.text is None


def test_the_towers_compute_what_the_file_says(tmp_path, tiny):
    """Against the papers' equations in float64, over the arrays that the file was written from."""
    params = random_params(CONFIG)
    images, ids = random_inputs(CONFIG)
    model = encoder.load(open_clip_folder(tmp_path, params, pixels={"mean": [0.5] * 3, "std": [0.5] * 3}))
    p = {path: np.asarray(array, np.float64) for path, array in flatten(params).items()}
    tokens, zimg = numpy_model.image_tower(p, CONFIG, images.astype(np.float64))
    for found, expected in (
        (model.image_tokens(images), tokens),
        (model.embed_images(images), zimg),
        (model.embed_texts(ids), numpy_model.text_tower(p, CONFIG, ids)[1]),
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=towers_apart(CONFIG, expected))


@pytest.mark.parametrize("pool, named", [("map", "map"), ("gap", "avg"), ("none", "")])
def test_an_image_tower_of_timm(tmp_path, pool, named, caplog):
    config = image_only(square_model(image={"pool": pool}))
    params = random_params(config)
    with caplog.at_level(logging.WARNING):
        found, read, _ = read_model(timm_folder(tmp_path, params, global_pool=named))
    same(found, params)
    assert read.image.pool == pool and read.image.image_size == (32, 32) and read.text is None
    assert read.image.pixels.resample == "bicubic" and "crop_pct=0.9" in caplog.text


def test_a_naflex_tower_of_timm(tmp_path, caplog):
    config = image_only(CONFIG)
    params = random_params(config)
    with caplog.at_level(logging.WARNING):
        found, read, _ = read_model(naflex_folder(tmp_path, params))
    same(found, params)
    assert read.image.naflex == NaflexConfig() and read.image.grid == (4, 4) and read.text is None
    assert "positions are resized bicubic there" in caplog.text
    caplog.clear()
    read_model(naflex_folder(tmp_path, params, pos_embed_interp_mode="bilinear"))
    assert "positions" not in caplog.text


@pytest.mark.parametrize(
    "args, words",
    [
        ({"pos_embed_grid_size": [2, 8]}, r"pos_embed_grid_size=\[2, 8\] is not square"),
        ({"rope_type": "axial"}, "rope_type='axial' cannot be followed here"),
        ({"pos_embed_grid_size": [3, 3]}, r"has embeds.pos_embed of shape \(1, 4, 4, 36\) instead of \(1, 3, 3, 36\)"),
    ],
)
def test_naflex_towers_of_timm_that_cannot_be_read(tmp_path, args, words):
    with pytest.raises(UserError, match=words) as error:
        read_model(naflex_folder(tmp_path, random_params(image_only(CONFIG)), **args))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size, variant", [("base", "B"), ("so400m", "So400m")])
def test_published_naflex_names(tmp_path, size, variant):
    tree = {"architecture": f"naflexvit_{size}_patch16_siglip", "pretrained_cfg": TIMM["pretrained_cfg"]}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    image = read_config(tmp_path)[0].image
    assert image.variant == f"{variant}/16" and image.grid == (16, 16) and image.naflex == NaflexConfig()


def test_a_classifier_of_timm_is_left_out(tmp_path):
    config = image_only(CONFIG)
    params = random_params(config)
    folder = timm_folder(tmp_path, params, num_classes=5)
    head = {"head.weight": np.zeros((5, 36), np.float32), "head.bias": np.zeros(5, np.float32)}
    save_file(load_file(folder / "model.safetensors") | head, folder / "model.safetensors")
    same(read_model(folder)[0], params)


@pytest.mark.parametrize(
    "name, variant, patch, size, pool",
    [
        ("vit_base_patch32_siglip_256", "B", 32, 256, "map"),
        ("vit_large_patch16_siglip_384.webli", "L", 16, 384, "map"),
        ("vit_so400m_patch14_siglip_378", "So400m", 14, 378, "map"),
        ("vit_so400m_patch14_siglip_gap_896", "So400m", 14, 896, "gap"),
        ("vit_giantopt_patch16_siglip_256", "g-opt", 16, 256, "map"),
    ],
)
def test_published_names(tmp_path, name, variant, patch, size, pool):
    tree = {"architecture": name, "pretrained_cfg": TIMM["pretrained_cfg"] | {"input_size": [3, size, size]}}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    image = read_config(tmp_path)[0].image
    assert (image.variant, image.patch, image.image_size, image.pool) == (
        f"{variant}/{patch}",
        (patch,) * 2,
        (size,) * 2,
        pool,
    )


def test_the_published_text_towers(tmp_path):
    """So400m: its ratio makes 4304; the vocabulary of 256,000 is Gemma's, padded with 0."""
    sizes = {"width": 1152, "heads": 16, "layers": 27, "mlp_ratio": 3.7362, "vocab_size": 256_000, "context_length": 64}
    vision = {
        "timm_model_name": "vit_giantopt_patch16_siglip_256",
        "image_size": 256,
        "timm_pool": "map",
        "timm_proj": "none",
    }
    model = {"embed_dim": 1536, "vision_cfg": vision, "text_cfg": TEXT | sizes}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": PIXELS}))
    config = read_config(tmp_path)[0]
    assert (config.text.variant, config.text.tokens.pad_id, config.out_dim) == ("So400m", 0, (None, 1536))


def test_the_tokenizer_beside_it_is_followed(tmp_path, tiny, caplog):
    folder = open_clip_folder(tmp_path, random_params(CONFIG))
    (folder / "spiece.model").write_bytes(SPIECE.read_bytes())
    settings = {"tokenizer_class": "T5Tokenizer", "pad_token": "</s>", "eos_token": "</s>", "add_eos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config, tokenizer = read_config(folder)
    assert tokenizer == folder / "spiece.model" and config.text.tokens == TokenConfig(canonical="texts")
    assert not caplog.records


def test_a_leftover_and_a_lost_tensor_are_named(tmp_path, tiny):
    folder = open_clip_folder(tmp_path, random_params(CONFIG))
    state = load_file(folder / "open_clip_model.safetensors")
    state["visual.trunk.fc_norm.weight"] = state.pop("visual.trunk.norm.weight")
    del state["logit_bias"]
    save_file(
        {key: a for key, a in state.items() if ".resblocks.1." not in key}, folder / "open_clip_model.safetensors"
    )
    with pytest.raises(UserError) as error:
        read_model(folder)
    for part in (
        "layer 1 of 2 (12 arrays, text.transformer.resblocks.1)",
        "logit_bias",
        "unknown visual.trunk.fc_norm.weight",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"architecture": "vit_base_patch16_clip_224"}, "'vit_base_patch16_clip_224' cannot be read"),
        ({"architecture": "vit_tiny_patch16_siglip_224"}, "cannot be read; of timm's models only"),
        ({"model_args": ARGS | {"act_layer": "quick_gelu"}}, "act_layer='quick_gelu'"),
        ({"model_args": ARGS | {"pre_norm": True}}, "pre_norm=True cannot be followed"),
        ({"model_args": ARGS | {"embed_dim": "36"}}, "embed_dim='36' is not a positive number"),
        ({"model_args": ARGS | {"num_heads": 5}}, "width=36 is not divisible by num_heads=5"),
        ({"model_args": [1]}, r"model_args=\[1\] is not an object"),
        ({"global_pool": "token"}, "pooled by 'token'"),
        ({"pretrained_cfg": {"mean": [0.5], "std": [0.5] * 3}}, r"mean=\[0.5\] is not three numbers"),
        ({"pretrained_cfg": PIXELS | {"interpolation": "lanczos"}}, "interpolation='lanczos'"),
    ],
)
def test_models_of_timm_that_cannot_be_read(tmp_path, changes, words):
    folder = timm_folder(tmp_path, random_params(image_only(CONFIG)), **changes)
    with pytest.raises(UserError, match=f"config.json: .*{words}") as error:
        read_model(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, vision, pixels, words",
    [
        ({"no_causal_mask": False, "pool_type": "argmax"}, {}, {}, "no_causal_mask=False .*; pool_type='argmax'"),
        ({"norm_kwargs": None}, {}, {}, "eps of 1e-6"),
        ({"hf_model_name": "xlm-roberta-base"}, {}, {}, "hf_model_name='xlm-roberta-base'"),
        ({"tokenizer_kwargs": {"clean": "bleach"}}, {}, {}, "cleaned by 'bleach'"),
        ({}, {"timm_model_name": None, "layers": 12}, {}, "'None' cannot be read"),
        ({}, {}, {"resize_mode": "shortest"}, "resize_mode='shortest'"),
    ],
)
def test_models_of_open_clip_that_cannot_be_read(tmp_path, tiny, text, vision, pixels, words):
    folder = open_clip_folder(tmp_path, random_params(CONFIG), text=text, vision=vision, pixels=pixels)
    with pytest.raises(UserError, match=f"open_clip_config.json: .*{words}") as error:
        read_model(folder)
    assert "\n" not in str(error.value)


def test_only_safetensors(tmp_path, tiny):
    folder = open_clip_folder(tmp_path, random_params(CONFIG))
    (folder / "open_clip_model.safetensors").rename(folder / "open_clip_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="has no open_clip_model.safetensors; .* pickled ones never"):
        read_model(folder)


def randomized(model, torch):
    """Every parameter random, none zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.05 if parameter.ndim > 1 else 0.3))
    return model.eval()


@pytest.mark.interop
@pytest.mark.parametrize("name", ["vit_base_patch32_siglip_256", "vit_base_patch16_siglip_gap_224"])
def test_timm_computes_the_same(tmp_path, name):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    args = ARGS | {"act_layer": "gelu_tanh"}
    model = randomized(timm.create_model(name, num_classes=0, **args), torch)
    timm.models.save_for_hf(model, tmp_path, model_args=args, safe_serialization=True)
    params, config, _ = read_model(tmp_path)
    images = random_inputs(ModelConfig(config.image, None, (None, None)))[0]
    pixels = torch.tensor(images.transpose(0, 3, 1, 2))
    with torch.no_grad():
        tokens, pooled = model.forward_features(pixels).numpy(), torch.nn.functional.normalize(model(pixels)).numpy()
    ours = Encoder(params, config)
    np.testing.assert_allclose(ours.image_tokens(images), tokens, rtol=0, atol=towers_apart(config, tokens))
    np.testing.assert_allclose(ours.embed_images(images), pooled, rtol=0, atol=towers_apart(config))


@pytest.mark.interop
def test_timm_computes_the_same_of_a_naflex_tower(tmp_path):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    args = {name: value for name, value in ARGS.items() if name != "img_size"}
    args |= {"act_layer": "gelu_tanh", "pos_embed_grid_size": [4, 4], "pos_embed_interp_mode": "bilinear"}
    model = randomized(timm.create_model("naflexvit_base_patch16_siglip", num_classes=0, **args), torch)
    timm.models.save_for_hf(model, tmp_path, model_args=args, safe_serialization=True)
    params, config, _ = read_model(tmp_path)
    grids = np.array([(4, 4), (2, 7), (7, 2), (1, 5)], np.int32)
    patches = np.random.default_rng(0).uniform(-1, 1, (4, 17, 192)).astype(np.float32)
    mask, place = np.arange(17) < grids.prod(axis=1)[:, None], np.arange(17)
    coordinates = np.where(mask[..., None], np.stack([place // grids[:, 1:], place % grids[:, 1:]], axis=2), 0)
    batch = {
        "patches": torch.tensor(patches),
        "patch_coord": torch.tensor(coordinates),
        "patch_valid": torch.tensor(mask),
    }
    with torch.no_grad():
        pooled = torch.nn.functional.normalize(model(batch)).numpy()
    ours = Encoder(params, config).embed_images(Patches(patches, grids))
    np.testing.assert_allclose(ours, pooled, rtol=0, atol=towers_apart(config))


@pytest.mark.interop
@pytest.mark.slow
def test_open_clip_computes_the_same(tmp_path):
    """The published ViT-B-32-SigLIP2-256 with a small vocabulary: its image tower cannot be made smaller."""
    torch, library = pytest.importorskip("torch"), pytest.importorskip("open_clip")
    settings = library.get_model_config("ViT-B-32-SigLIP2-256")
    settings["text_cfg"] |= {"vocab_size": 61, "layers": 2}
    model = randomized(library.CustomTextCLIP(**{k: v for k, v in settings.items() if k != "custom_text"}), torch)
    save = {"model_cfg": settings, "preprocess_cfg": PIXELS | {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(save))
    from safetensors.torch import save_model

    save_model(model, str(tmp_path / "open_clip_model.safetensors"))
    params, config, _ = read_model(tmp_path)
    ours, (images, ids) = Encoder(params, config), random_inputs(config, batch=2)
    with torch.no_grad():
        zimg = model.encode_image(torch.tensor(images.transpose(0, 3, 1, 2)), normalize=True).numpy()
        ztxt = model.encode_text(torch.tensor(ids).long(), normalize=True).numpy()
        logits = model.get_logits(torch.tensor(images.transpose(0, 3, 1, 2)), torch.tensor(ids).long())[0].numpy()
    np.testing.assert_allclose(ours.embed_images(images), zimg, rtol=0, atol=towers_apart(config))
    np.testing.assert_allclose(ours.embed_texts(ids), ztxt, rtol=0, atol=towers_apart(config))
    found = ours.logits(ours.embed_images(images), ours.embed_texts(ids))
    np.testing.assert_allclose(found, logits, rtol=0, atol=towers_apart(config, logits))
