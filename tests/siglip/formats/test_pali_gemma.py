"""The vision tower out of a PaliGemma: npz and folders of both key layouts, without reading the language model."""

import json
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from siglip.encoder import Encoder
from siglip.formats import big_vision, hugging_face, key_maps
from siglip.models.two_tower import ImageConfig, ModelConfig
from siglip.models.variants import VARIANTS
from siglip.trees import flatten
from tests.siglip.formats.test_big_vision import same
from tests.siglip.rounding import towers_apart
from tests.siglip.tiny import random_inputs, random_params

TOWER = ModelConfig(
    ImageConfig("mu/14", width=36, depth=3, num_heads=4, image_size=(56, 56), pool="none", scan=True),
    None,
    (None, None),
)
PREFIXES = {
    "v4": "vision_tower.vision_model.",
    "v5": "vision_tower.",
    "v4 module": "model.vision_tower.vision_model.",
    "v5 module": "model.vision_tower.",
}


def pali_gemma_npz(params: dict, *, llm: int = 16) -> dict[str, np.ndarray]:
    """As published: blocks stacked, the connector as the tower's head."""
    rng = np.random.default_rng(0)
    connector = {"img/head/kernel": rng.normal(size=(36, 16)), "img/head/bias": rng.normal(size=16)}
    language = {"llm/embedder/input_embedding": np.zeros((llm, 16), np.float32), "llm/final_norm/scale": np.ones(16)}
    return {f"params/{path}": array for path, array in (flatten(params) | connector | language).items()}


@pytest.mark.parametrize("subtree", ["", ":img"])
@pytest.mark.parametrize("prefix", ["params/", ""])
def test_npz(tmp_path, subtree, prefix):
    params = random_params(TOWER)
    flat = pali_gemma_npz(params)
    np.savez(tmp_path / "m.npz", **{prefix + key.removeprefix("params/"): array for key, array in flat.items()})
    found, config = big_vision.read(f"{tmp_path}/m.npz{subtree}")
    same(found, params)
    assert config.text is None and config.image.pool == "none" and config.image.scan
    assert (config.image.spec, config.image.image_size) == (TOWER.image.spec, (56, 56))


def folder(path, params: dict, *, prefix: str, language: int = 16, **vision) -> None:
    """A PaliGemma folder in two shards, the tower spread over both."""
    hugging_face.write(path, params, TOWER)
    state = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    state = {prefix + key.removeprefix("vision_model."): array for key, array in state.items()}
    state |= {
        "multi_modal_projector.linear.weight": np.zeros((16, 36), np.float32),
        "language_model.model.embed_tokens.weight": np.zeros((language, 16), np.float32),
    }
    index = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(state)}
    for name in set(index.values()):
        save_file({key: array for key, array in state.items() if index[key] == name}, path / name, {"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = json.loads((path / "config.json").read_text()) | vision
    tree = {
        "model_type": "paligemma",
        "vision_config": config,
        "text_config": {"model_type": "gemma"},
        "hidden_size": 16,
    }
    (path / "config.json").write_text(json.dumps(tree))


@pytest.mark.parametrize("layout", PREFIXES)
def test_folders(tmp_path, layout):
    params = random_params(TOWER)
    folder(tmp_path, params, prefix=PREFIXES[layout])
    found, config = hugging_face.read(tmp_path)
    same(found, key_maps.unstack_blocks(flatten(params)))
    assert config.text is None and config.image.pool == "none" and config.image.spec == TOWER.image.spec


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_the_language_model_is_not_read(tmp_path, kind):
    params = random_params(TOWER)
    if kind == "npz":
        np.savez(tmp_path / "m.npz", **pali_gemma_npz(params, llm=1 << 20))
    else:
        folder(tmp_path, params, prefix=PREFIXES["v4"], language=1 << 20)
    tracemalloc.start()
    big_vision.read(tmp_path / "m.npz") if kind == "npz" else hugging_face.read(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20  # the language model would be 64 MiB


def test_bad_files_are_one_line(tmp_path):
    params = random_params(TOWER)
    flat = pali_gemma_npz(params)
    bad = {key: array for key, array in flat.items() if "encoder_norm/scale" not in key}
    np.savez(tmp_path / "m.npz", **bad)
    with pytest.raises(ValueError, match="it lacks img/Transformer/encoder_norm/scale$"):
        big_vision.read(tmp_path / "m.npz")
    np.savez(tmp_path / "m.npz", **{key: array for key, array in flat.items() if "img/" not in key})
    with pytest.raises(ValueError, match="lacks img/embedding/kernel; it holds 0 arrays"):
        big_vision.read(tmp_path / "m.npz")

    folder(tmp_path, params, prefix=PREFIXES["v4"])
    shard = tmp_path / "model-00001-of-00002.safetensors"
    state = load_file(shard)
    key = next(key for key in state if key.endswith("layer_norm1.bias"))
    save_file(state | {key.replace("vision_model.", ""): state[key]}, shard)
    with pytest.raises(ValueError, match=r"layers.\d.layer_norm1.bias under two names"):
        hugging_face.read(tmp_path)
    del state[key]
    save_file(state, shard)
    with pytest.raises(ValueError, match=r"it lacks vision_model.encoder.layers.\d.layer_norm1.bias$"):
        hugging_face.read(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="has no model-00001-of-00002.safetensors; only safetensors"):
        hugging_face.read(tmp_path)


@pytest.mark.interop
def test_the_tower_of_transformers_own_pali_gemma(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    vision |= {"model_type": "siglip_vision_model", "image_size": 42, "patch_size": 14, "vision_use_head": False}
    text = {"model_type": "gemma", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 16}
    text |= {"num_key_value_heads": 1, "intermediate_size": 32, "vocab_size": 60}
    config = transformers.PaliGemmaConfig(
        vision_config=vision, text_config=text, projection_dim=16, hidden_size=16, image_token_index=59
    )
    torch.manual_seed(0)
    model = transformers.PaliGemmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").exists()

    params, ours = hugging_face.read(tmp_path)
    images, _ = random_inputs(ours)
    with torch.no_grad():
        theirs = model.model.vision_tower(torch.tensor(images.transpose(0, 3, 1, 2))).last_hidden_state
    found, theirs = Encoder(params, ours).image_tokens(images), theirs.numpy()
    np.testing.assert_allclose(found, theirs, rtol=0, atol=towers_apart(ours, theirs))


@pytest.mark.parametrize(
    ("model", "vision", "prefix"),
    [
        ("gemma3", "siglip_vision_model", "vision_tower.vision_model."),
        ("llava_onevision", "siglip_vision_model", "model.vision_tower."),
        ("idefics3", "idefics3_vision", "model.vision_model."),
        ("smolvlm", "smolvlm_vision", "model.vision_model."),
    ],
)
def test_towers_of_other_vision_language_models(tmp_path, model, vision, prefix):
    params = random_params(TOWER)
    folder(tmp_path, params, prefix=prefix)
    tree = json.loads((tmp_path / "config.json").read_text()) | {"model_type": model}
    del tree["vision_config"]["vision_use_head"]
    tree["vision_config"]["model_type"] = vision
    (tmp_path / "config.json").write_text(json.dumps(tree))
    shard = tmp_path / "model-00001-of-00002.safetensors"
    save_file(load_file(shard) | {f"{prefix}head.probe": np.zeros((1, 1, 36), np.float32)}, shard)  # unused there
    found, config = hugging_face.read(tmp_path)
    same(found, key_maps.unstack_blocks(flatten(params)))
    assert config.text is None and config.image.pool == "none"


def test_sizes_that_another_models_config_leaves_out():
    tree = {
        "model_type": "smolvlm",
        "vision_config": {"model_type": "smolvlm_vision", "hidden_size": 768, "num_attention_heads": 12},
    }
    image = hugging_face.model_config(tree, source="config.json").image
    assert (image.spec, image.patch, image.image_size) == (VARIANTS["B"], (32, 32), (224, 224))


@pytest.mark.interop
@pytest.mark.parametrize(
    "kind", ["Gemma3ForConditionalGeneration", "LlavaForConditionalGeneration", "SiglipForImageClassification"]
)
def test_the_tower_of_what_transformers_builds_around_it(tmp_path, kind):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    vision |= {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, "vision_use_head": False}
    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    text |= {"intermediate_size": 32, "vocab_size": 64}
    if kind.startswith("Gemma3"):
        text["model_type"] = "gemma3_text"
        config = transformers.Gemma3Config(vision_config=vision, text_config=text, mm_tokens_per_image=4)
    elif kind.startswith("Llava"):
        text["model_type"] = "llama"
        config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    else:
        config = transformers.SiglipConfig(vision_config=vision)
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path)
    params, ours = hugging_face.read(tmp_path)
    images, _ = random_inputs(ours)
    tower = model.vision_model if kind.startswith("Siglip") else model.model.vision_tower
    with torch.no_grad():
        theirs = tower(torch.tensor(images.transpose(0, 3, 1, 2))).last_hidden_state.numpy()
    found = Encoder(params, ours).image_tokens(images)
    np.testing.assert_allclose(found, theirs, rtol=0, atol=towers_apart(ours, theirs))
