"""Hugging Face folders: our own round trip always, `transformers` itself where it is installed."""

import json

import jax
import numpy as np
import pytest

from siglip.encoder import Encoder
from siglip.formats import hugging_face, names
from siglip.formats.big_vision import image_only
from siglip.models.two_tower import ModelConfig
from siglip.models.vit import sincos2d
from siglip.trees import flatten

from .test_big_vision import same
from .tiny import random_inputs, random_params, square_model


def written(tmp_path, config: ModelConfig) -> dict:
    params = random_params(config)
    hugging_face.write(tmp_path, params, config)
    return params


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_both_towers_there_and_back(tmp_path, scan):
    config = square_model(image={"scan": scan}, text={"scan": scan})
    params = written(tmp_path, config)
    found, found_config = hugging_face.read(tmp_path)
    same(found, names.unstack_blocks(flatten(params)))
    assert (found_config.image.spec, found_config.text.spec) == (config.image.spec, config.text.spec)
    assert found_config.out_dim == (None, 36)


def test_vision_tower_alone_in_both_key_layouts(tmp_path):
    from safetensors.numpy import load_file, save_file

    config = image_only(square_model(image={"pool": "none"}))
    params = written(tmp_path, config)
    same(hugging_face.read(tmp_path)[0], params)
    assert json.loads((tmp_path / "config.json").read_text())["vision_use_head"] is False
    state = load_file(tmp_path / "model.safetensors")
    assert all(key.startswith("vision_model.") for key in state)
    save_file({k.removeprefix("vision_model."): v for k, v in state.items()}, tmp_path / "model.safetensors")
    same(hugging_face.read(tmp_path)[0], params)


def test_shards_and_reduced_precision(tmp_path):
    from safetensors.numpy import load_file, save_file

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
    tokenizer = tmp_path / "t.model"
    tokenizer.write_bytes(b"pieces")
    folder = tmp_path / "out"
    folder.mkdir()
    config = square_model()
    hugging_face.write(folder, random_params(config), config, tokenizer=tokenizer)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "model.safetensors", "preprocessor_config.json", "special_tokens_map.json", "spiece.model",
        "tokenizer_config.json",
    ]  # fmt: skip
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 32, "width": 32} and processor["resample"] == 2
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokens["model_max_length"] == 7 and tokens["model_input_names"] == ["input_ids"] and tokens["do_lower_case"]
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
    fails(ValueError, "has unknown 16 keys: vision_model.encoder.layers.1.layer_norm1.bias")
    (tmp_path / "config.json").write_text(config.replace("gelu_pytorch_tanh", "gelu", 1))
    fails(ValueError, "hidden_act='gelu' is not supported")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    fails(ValueError, "model_type='bert' cannot be read")
    (tmp_path / "config.json").write_text("{")
    fails(ValueError, "is not JSON")
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    fails(ValueError, "not a whole safetensors file")
    (tmp_path / "model.safetensors").unlink()
    fails(FileNotFoundError, "pickled ones never")


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
        np.testing.assert_allclose(found.numpy(), np.asarray(expected), rtol=0, atol=1e-5)
