"""Hugging Face folders of NaFlex models: our own round trip always, `transformers` itself where it is installed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import siglip
from siglip.formats import hugging_face
from siglip.formats.big_vision import image_only
from siglip.models.naflex import NaflexConfig
from siglip.models.two_tower import ModelConfig, make_model
from tests.siglip.formats.test_big_vision import same
from tests.siglip.formats.test_hugging_face import written
from tests.siglip.tiny import random_inputs, square_model


def naflex_model(*, text: bool = True, **image) -> ModelConfig:
    fields = {"image_size": (48, 48), "patch_size": (16, 16), "naflex": NaflexConfig(40, 90)} | image
    config = square_model(image=fields)
    return config if text else image_only(config)


@pytest.mark.parametrize("text", [True, False], ids=["both", "image"])
def test_a_naflex_model_there_and_back(tmp_path, text):
    config = naflex_model(text=text)
    params = written(tmp_path, config)
    tree = json.loads((tmp_path / "config.json").read_text())
    vision = tree["vision_config"] if text else tree
    assert vision["model_type"] == "siglip2_vision_model" and vision["num_patches"] == 9 and "image_size" not in vision
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert processor["image_processor_type"] == "Siglip2ImageProcessor" and processor["max_num_patches"] == 40
    found, found_config = hugging_face.read(tmp_path)
    same(found, params)
    assert (found_config.image.naflex, found_config.image.grid) == (NaflexConfig(40, 90), (3, 3))
    assert vision["siglip_max_patches"] == 90
    del vision["siglip_max_patches"]  # as published folders are
    (tmp_path / "config.json").write_text(json.dumps(tree))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor | {"max_num_patches": 2048}))
    assert hugging_face.read_config(tmp_path).image.naflex == NaflexConfig(2048, 2048)


def test_a_naflex_tower_inside_another_model_and_a_classifier_s(tmp_path):
    config = naflex_model(text=False, pool="none")
    params = written(tmp_path, config)
    tree = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "lfm2_vl", "vision_config": tree}))
    state = load_file(tmp_path / "model.safetensors")
    around = {f"model.vision_tower.{key}": array for key, array in state.items()}
    save_file(around | {"lm_head.weight": np.zeros((4, 4), np.float32)}, tmp_path / "model.safetensors")
    found, found_config = hugging_face.read(tmp_path)
    same(found, params)
    assert found_config.image.naflex == config.image.naflex and found_config.image.pool == "none"

    config = naflex_model(text=False)
    params = written(tmp_path, config)
    vision = json.loads((tmp_path / "config.json").read_text())
    kind = {"model_type": "siglip2", "architectures": ["Siglip2ForImageClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(kind | {"vision_config": vision, "text_config": {}}))
    state = load_file(tmp_path / "model.safetensors") | {"classifier.weight": np.zeros((2, 36), np.float32)}
    save_file(state, tmp_path / "model.safetensors")
    found, found_config = hugging_face.read(tmp_path)
    same(found, params)
    assert found_config.text is None


@pytest.mark.parametrize(
    "file, changes, words",
    [
        ("config.json", {"num_patches": 10}, "num_patches=10 is not a square"),
        (
            "config.json",
            {"num_patches": 16},
            r"has vision_model.embeddings.position_embedding.weight of shape \(9, 36\)",
        ),
        ("config.json", {"num_patches": None, "image_size": 48}, "mixes images of one size and NaFlex"),
        (
            "config.json",
            {"model_type": "siglip_vision_model", "num_patches": None, "image_size": 48},
            r"shape \(36, 768\)",
        ),
        ("preprocessor_config.json", {"image_processor_type": "SiglipImageProcessor"}, "type='SiglipImageProcessor'"),
        ("preprocessor_config.json", {"max_num_patches": 0}, "max_num_patches=0 is not a positive number"),
        ("preprocessor_config.json", {"patch_size": 14}, "patch_size=14, but config.json has patch_size=16"),
    ],
)
def test_naflex_folders_that_cannot_be_read(tmp_path, file, changes, words):
    written(tmp_path, naflex_model(text=False))
    if changes.get("model_type") == "siglip_vision_model":
        (tmp_path / "preprocessor_config.json").unlink()
    tree = json.loads((tmp_path / file).read_text()) | changes
    (tmp_path / file).write_text(json.dumps({name: value for name, value in tree.items() if value is not None}))
    with pytest.raises(ValueError, match=words) as error:
        hugging_face.read(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.interop
@pytest.mark.parametrize("text", [True, False], ids=["both", "image"])
def test_transformers_computes_the_same_of_a_naflex_model(tmp_path, text):
    """Wide, tall, square, one row, one patch, beyond the 64 patches on a side where other ports end; padded, and exactly full.

    No column of several patches: torch 2.14's antialiased resize to one column is wrong on a CPU, by the size of its values, in
    float64 too; big_vision's, Pillow's and ours are not (tests/siglip/models/test_naflex.py).
    """
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = naflex_model(text=text, width=48, num_heads=4, naflex=NaflexConfig(40, 1024))
    params, rng = written(tmp_path, config), np.random.default_rng(0)
    model, loading = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert type(model).__name__ == ("Siglip2Model" if text else "Siglip2VisionModel")
    cases = [([(3, 3), (5, 2), (1, 9)], 10), ([(1, 80), (40, 2), (8, 10), (1, 1)], 90), ([(4, 16)], 64)]
    # SigLIP 2's usual lengths, and the longest.
    cases += [([(16, 16), (9, 28)], 256), ([(32, 32), (18, 56)], 1024)]
    for grids, length in cases:
        patches = rng.uniform(-1, 1, (len(grids), length, 768)).astype(np.float32)
        lengths = np.prod(grids, axis=1)
        mask = np.arange(length) < lengths[:, None]
        batch = {"patches": jnp.asarray(patches), "grid": jnp.asarray(grids, jnp.int32)}
        theirs = {
            "pixel_values": torch.tensor(patches),
            "pixel_attention_mask": torch.tensor(mask, dtype=torch.int32),
            "spatial_shapes": torch.tensor(grids),
        }
        if text:
            ids = np.resize(random_inputs(config)[1], (len(grids), 7))
            batch, theirs = batch | {"text": jnp.asarray(ids)}, theirs | {"input_ids": torch.tensor(ids).long()}
        with torch.no_grad():
            both = model(**theirs)
        zimg, ztxt, out = make_model(config).apply({"params": jax.device_put(params)}, batch)
        vision = both.vision_model_output if text else both
        pairs = [(vision.last_hidden_state.numpy()[mask], np.asarray(out["img/encoded"])[mask])]
        pairs += [(torch.nn.functional.normalize(vision.pooler_output).numpy(), zimg)]
        if text:
            logits = np.exp(params["t"]) * np.asarray(zimg, np.float64) @ np.asarray(ztxt).T + params["b"]
            pairs += [(both.image_embeds.numpy(), zimg), (both.text_embeds.numpy(), ztxt)]
            pairs += [(both.logits_per_image.numpy(), logits)]
        for found, expected in pairs:
            difference = np.abs(found - np.asarray(expected)).max() / np.abs(expected).max()
            assert difference <= 1e-5, difference


@pytest.mark.interop
@pytest.mark.parametrize("kind", ["both", "image", "image without head"])
def test_what_transformers_saves_of_a_naflex_model_is_read(tmp_path, kind):
    """The folder of its model and its image processor; then images of several shapes through either."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    siglip2 = pytest.importorskip("transformers.models.siglip2")
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    vision = sizes | {"num_patches": 9, "patch_size": 8, "vision_use_head": kind != "image without head"}
    text = sizes | {"hidden_size": 20, "num_attention_heads": 5, "vocab_size": 50, "max_position_embeddings": 9}
    text |= {"projection_size": 24, "bos_token_id": 1, "eos_token_id": 1}
    if kind == "both":
        model = transformers.Siglip2Model(transformers.Siglip2Config(vision_config=vision, text_config=text))
    else:
        model = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**vision))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.eval().save_pretrained(tmp_path)
    processor = getattr(siglip2, "Siglip2ImageProcessorPil", None) or siglip2.Siglip2ImageProcessor
    processor = processor(patch_size=8, max_num_patches=20)
    processor.save_pretrained(tmp_path)

    ours, rng = siglip.load(tmp_path), np.random.default_rng(0)
    assert ours.config.image.naflex == NaflexConfig(20, 1024) and ours.config.image.grid == (3, 3)
    images = [
        Image.fromarray(rng.integers(256, size=(*size, 3), dtype=np.uint8))
        for size in ((24, 24), (30, 90), (70, 31), (9, 200))
    ]
    inputs = processor(images, return_tensors="pt")
    ids = rng.integers(50, size=(4, 9), dtype=np.int32)
    with torch.no_grad():
        both = model(**inputs, input_ids=torch.tensor(ids).long()) if kind == "both" else model(**inputs)
    tokens, mask = map(np.asarray, ours.image_tokens(images))
    np.testing.assert_array_equal(mask, inputs["pixel_attention_mask"].numpy().astype(bool))
    vision = both.vision_model_output if kind == "both" else both
    pairs = [(vision.last_hidden_state.numpy()[mask], tokens[mask])]
    if kind == "both":
        zimg, ztxt = ours.embed_images(images), ours.embed_texts(ids)
        pairs += [(both.image_embeds, zimg), (both.text_embeds, ztxt), (both.logits_per_image, ours.logits(zimg, ztxt))]
    elif kind == "image":
        pairs += [(torch.nn.functional.normalize(vision.pooler_output), ours.embed_images(images))]
    for theirs, found in pairs:
        assert np.abs(np.asarray(theirs) - found).max() <= 1e-5 * np.abs(found).max()
