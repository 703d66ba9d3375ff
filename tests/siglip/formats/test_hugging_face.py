"""Hugging Face folders: our own round trip always, `transformers` itself where it is installed."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from siglip.encoder import Encoder
from siglip.formats import containers, hugging_face, key_maps
from siglip.formats.big_vision import image_only
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.models.vit import sincos2d
from siglip.trees import flatten
from tests.siglip.formats.test_big_vision import same
from tests.siglip.rounding import towers_apart
from tests.siglip.texts import plain_pieces
from tests.siglip.tiny import random_inputs, random_params, square_model


def written(tmp_path, config: ModelConfig) -> dict:
    params = random_params(config)
    hugging_face.write(tmp_path, params, config)
    return params


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_both_towers_there_and_back(tmp_path, scan):
    config = square_model(image={"scan": scan}, text={"scan": scan})
    params = written(tmp_path, config)
    found, found_config = hugging_face.read(tmp_path)
    same(found, key_maps.unstack_blocks(flatten(params)))
    assert (found_config.image.spec, found_config.text.spec) == (config.image.spec, config.text.spec)
    assert found_config.out_dim == (None, 36)


def test_vision_tower_alone_in_both_key_layouts(tmp_path):
    config = image_only(square_model(image={"pool": "none"}))
    params = written(tmp_path, config)
    same(hugging_face.read(tmp_path)[0], params)
    assert json.loads((tmp_path / "config.json").read_text())["vision_use_head"] is False
    state = load_file(tmp_path / "model.safetensors")
    assert all(key.startswith("vision_model.") for key in state)
    save_file({k.removeprefix("vision_model."): v for k, v in state.items()}, tmp_path / "model.safetensors")
    same(hugging_face.read(tmp_path)[0], params)


def test_shards_and_reduced_precision(tmp_path):
    params = written(tmp_path, square_model())
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    index = {key: f"part-{i % 2}.safetensors" for i, key in enumerate(state)}
    for name in set(index.values()):
        part = {k: np.asarray(jax.numpy.asarray(v, "bfloat16")) for k, v in state.items() if index[k] == name}
        save_file(part, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    same(hugging_face.read(tmp_path)[0], params, atol=0.02)  # bfloat16 keeps 8 bits of values below 4


def test_fixed_positions_become_a_table_and_no_head_the_identity(tmp_path):
    config = square_model(image={"posemb": "sincos2d"}, text={"width": 36})
    config = ModelConfig(config.image, config.text, out_dim=(None, None))
    written(tmp_path, config)
    params, found = hugging_face.read(tmp_path)
    assert found.image.posemb == "learn" and found.out_dim == (None, 36)
    np.testing.assert_array_equal(params["img"]["pos_embedding"], sincos2d((4, 4), 36))
    np.testing.assert_array_equal(params["txt"]["head"]["kernel"], np.eye(36))


def test_files_that_a_consumer_reads(tmp_path):
    config, tokenizer = square_model(), tmp_path / "pieces"
    tokenizer.write_bytes(plain_pieces())
    folder = tmp_path / "hf"
    folder.mkdir()
    hugging_face.write(folder, random_params(config), config, tokenizer=tokenizer)
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json", "spiece.model", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert (folder / "spiece.model").read_bytes() == plain_pieces()
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 32, "width": 32} and processor["resample"] == 2
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"image": {"pool": "gap"}}, "not 'gap'"),
        ({"image": {"pool": "tok"}}, "not 'tok'"),
        ({"image": {"image_size": (32, 40)}}, "square images"),
        ({"text": {"pool": "map"}}, "not 'map'"),
        ({"text": {"pool": "mean"}}, "--tower image"),
        ({"image": {"pool": "none"}}, "no image embedding"),
    ],
)
def test_what_cannot_be_expressed_is_refused(tmp_path, change, words):
    with pytest.raises(ValueError, match=words) as error:
        written(tmp_path, square_model(**change))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_an_image_head_is_refused():
    config = square_model()
    with pytest.raises(ValueError, match="no linear image head"):
        hugging_face.check_expressible(ModelConfig(config.image, config.text, out_dim=(36, 36)))


def config_of(tmp_path, **changes) -> ModelConfig:
    return hugging_face.model_config(changes, source=f"{tmp_path}/config.json")


def test_a_config_in_the_style_of_siglip_2(tmp_path):
    """g-opt/16 at 384 px: the text tower is another size, most fields are left to their defaults."""
    vision = {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 40, "num_attention_heads": 16}
    text = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    text |= {
        "projection_size": 1536,
        "vocab_size": 256_000,
        "torch_dtype": "float32",
        "model_type": "siglip_text_model",
    }
    config = config_of(
        tmp_path,
        model_type="siglip",
        initializer_factor=1.0,
        vision_config=vision | {"image_size": 384},
        text_config=text,
    )
    assert config == ModelConfig(
        ImageConfig("g-opt/16", image_size=(384, 384)), TextConfig("So400m", vocab_size=256_000), (None, 1536)
    )
    assert config_of(tmp_path, model_type="siglip", vision_config={}, text_config=None) == ModelConfig()


@pytest.mark.parametrize(
    "tree, words",
    [
        ({"model_type": "siglip_text_model"}, "a text tower alone; take the folder of the whole model"),
        (
            {"model_type": "clip"},
            "'siglip', 'siglip_vision_model' and 'paligemma' can",
        ),
        ({}, "model_type=None cannot be read"),
        ({"model_type": "siglip", "vision_config": [768]}, "vision_config and text_config are objects"),
        (
            {"model_type": "paligemma", "vision_config": {"image_size": 224.5}},
            "image_size=224.5 is not a positive number",
        ),
        (
            {
                "model_type": "siglip_vision_model",
                "num_channels": 1,
                "hidden_act": "gelu",
                "hidden_size": "768",
                "patch_size": 0,
            },
            "vision hidden_act='gelu' is .*; vision num_channels=1 is not supported, only 3; vision hidden_size='768' is not a "
            "positive number; vision patch_size=0 is not a positive number",
        ),
        ({"model_type": "siglip_vision_model", "num_attention_heads": 7}, "width=768 is not divisible by num_heads=7"),
        ({"model_type": "siglip", "vision_config": {"vision_use_head": "no"}}, "vision_use_head='no' is neither true"),
        (
            {"model_type": "siglip", "text_config": {"projection_size": "768"}},
            "projection_size='768' is not a positive",
        ),
        ({"model_type": "siglip", "text_config": {"vocab_size": True}}, "vocab_size=True is not a positive number"),
        ({"model_type": "siglip", "vision_config": {"hidden_size": 10**30}}, "width=10*0 must be at most"),
        ({"model_type": "siglip", "vision_config": {"image_size": 10**12}}, "image_size=.* patches=.* must be at most"),
        ({"model_type": "paligemma", "vision_config": [1]}, r"vision_config=\[1\] is not an object"),
        (
            {"model_type": "siglip", "text_config": {"layer_norm_eps": 1e-5}},
            "text layer_norm_eps=1e-05 is not supported",
        ),
    ],
)
def test_configs_that_cannot_be_read(tmp_path, tree, words):
    with pytest.raises(ValueError, match=f"config.json: .*{words}") as error:
        config_of(tmp_path, **tree)
    assert "\n" not in str(error.value)


def test_every_bad_key_is_named_at_once(tmp_path):
    written(tmp_path, square_model(image={"depth": 5}))
    state = load_file(tmp_path / "model.safetensors")
    state = {key: array for key, array in state.items() if "vision_model.encoder.layers.3." not in key}
    state["text_model.final_layernorm.bias"] = state.pop("text_model.final_layer_norm.bias")
    state["vision_model.head.attention.in_proj_bias"] = np.zeros(36, np.float32)
    state["text_model.head.bias"] = np.zeros(36, np.int64)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        hugging_face.read(tmp_path)
    for part in (
        "lacks 2 keys: layer 3 of 5 (16 arrays, vision_model.encoder.layers.3), text_model.final_layer_norm.bias",
        "has unknown text_model.final_layernorm.bias; did you mean 'text_model.final_layer_norm.bias'?",
        "has vision_model.head.attention.in_proj_bias of shape (36,) instead of (108,)",
        "has text_model.head.bias of type I64",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_folders_are_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        hugging_face.read(tmp_path)
    written(tmp_path, square_model())
    whole, config = (tmp_path / "model.safetensors").read_bytes(), (tmp_path / "config.json").read_text()

    def fails(error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words) as info:
            hugging_face.read(tmp_path)
        assert "\n" not in str(info.value)

    (tmp_path / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 1', 1))
    fails(ValueError, r"has unknown layer 1 \(16 arrays, vision_model.encoder.layers.1\)")
    (tmp_path / "config.json").write_text(config.replace("gelu_pytorch_tanh", "gelu", 1))
    fails(ValueError, "hidden_act='gelu' is not supported")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    fails(
        ValueError,
        "model_type='bert' cannot be read: 'siglip', 'siglip_vision_model' and 'paligemma' can",
    )
    (tmp_path / "config.json").write_text("{")
    fails(ValueError, "config.json is not valid JSON")
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    fails(ValueError, "cannot be read at its header .* copy it again")
    (tmp_path / "model.safetensors").unlink()
    fails(FileNotFoundError, "pickled ones never")


@pytest.mark.interop
@pytest.mark.parametrize("grid", [(4, 4), (3, 3)])
def test_transformers_computes_the_same(tmp_path, grid):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    # 35 px in patches of 8 leave 3 px over, as 384 px in patches of 14 do.
    config = square_model(image={"image_size": (8 * grid[0] + 3,) * 2})
    params, (images, ids) = written(tmp_path, config), random_inputs(config)
    model, loading = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    with torch.no_grad():
        theirs = model(pixel_values=torch.tensor(images.transpose(0, 3, 1, 2)), input_ids=torch.tensor(ids).long())
    ours = Encoder(params, config)
    zimg, ztxt = ours.embed_images(images), ours.embed_texts(ids)
    for found, expected in (
        (theirs.vision_model_output.last_hidden_state, ours.image_tokens(images)),
        (theirs.image_embeds, zimg),
        (theirs.text_embeds, ztxt),
        (theirs.logits_per_image, ours.logits(zimg, ztxt)),
    ):
        np.testing.assert_allclose(found.numpy(), np.asarray(expected), rtol=0, atol=towers_apart(config, expected))


@pytest.mark.interop
@pytest.mark.parametrize("kind", ["both", "vision", "vision without head", "bfloat16 shards"])
def test_what_transformers_saves_is_read(tmp_path, kind):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    text = vision | {"hidden_size": 20, "num_attention_heads": 5, "vocab_size": 50, "max_position_embeddings": 9}
    text |= {"projection_size": 24, "bos_token_id": 1, "eos_token_id": 1}
    vision |= {"image_size": 31, "patch_size": 6, "vision_use_head": kind != "vision without head"}
    if kind.startswith("vision"):
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision))
    else:
        model = transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision, text_config=text))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    shards = kind == "bfloat16 shards"
    model = (model.bfloat16() if shards else model).eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB" if shards else "5GB")
    assert shards == (tmp_path / "model.safetensors.index.json").exists()
    model = model.float()

    params, config = hugging_face.read(tmp_path)
    ours, (images, ids) = Encoder(params, config), random_inputs(config)
    pixels = torch.tensor(images.transpose(0, 3, 1, 2))
    with torch.no_grad():
        if config.text is None:
            tokens = model(pixel_values=pixels).last_hidden_state
        else:
            both = model(pixel_values=pixels, input_ids=torch.tensor(ids).long())
            tokens = both.vision_model_output.last_hidden_state
            for found, theirs in (
                (ours.embed_images(images), both.image_embeds),
                (ours.embed_texts(ids), both.text_embeds),
            ):
                np.testing.assert_allclose(found, theirs.numpy(), rtol=0, atol=towers_apart(config))
    tokens = tokens.numpy()
    np.testing.assert_allclose(ours.image_tokens(images), tokens, rtol=0, atol=towers_apart(config, tokens))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_keys_as_wrappers_of_torch_write_them(tmp_path, prefix):
    params = written(tmp_path, square_model())
    state = load_file(tmp_path / "model.safetensors")
    save_file({prefix + key: array for key, array in state.items()}, tmp_path / "model.safetensors")
    same(hugging_face.read(tmp_path)[0], params)


def test_the_image_tower_alone_reads_nothing_else(tmp_path, monkeypatch):
    params, read = written(tmp_path, square_model()), []
    real = containers._read_tensor
    monkeypatch.setattr(containers, "_read_tensor", lambda *args: read.append(args[4]) or real(*args))
    found, config = hugging_face.read(tmp_path, only_image=True)
    same(found, {"img": params["img"]})
    assert config.text is None and read and all(key.startswith("vision_model.") for key in read)


def test_an_image_classifier_is_read_without_its_classifier(tmp_path):
    config = square_model()
    params = written(tmp_path, config)
    state = {key: a for key, a in load_file(tmp_path / "model.safetensors").items() if key.startswith("vision_model.")}
    state |= {"classifier.weight": np.zeros((5, 36), np.float32), "classifier.bias": np.zeros(5, np.float32)}
    save_file(state, tmp_path / "model.safetensors")
    tree = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(tree | {"architectures": ["SiglipForImageClassification"]}))
    found, config = hugging_face.read(tmp_path)
    same(found, {"img": params["img"]})
    assert config.text is None and config.image.pool == "map"
