"""Hugging Face's PaliGemma sees with our tower: the same tokens, the same features, and they matter."""

import numpy as np
import pytest
from safetensors import safe_open

from examples import hf_paligemma
from siglip.exporting.verification import compare
from siglip.formats import big_vision
from siglip.image_encoder import load_encoder
from tests.siglip.exporting.sources import HAS_TRANSFORMERS
from tests.siglip.tiny import random_params, square_model

# Not `importorskip`: every worker of every run would import them, to collect this file.
pytestmark = [pytest.mark.interop, pytest.mark.skipif(not HAS_TRANSFORMERS, reason="needs torch and transformers")]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path, config = tmp_path_factory.mktemp("encoder") / "m.npz", square_model()
    big_vision.write(path, random_params(config), config)
    return path


@pytest.fixture(scope="module")
def built(source):
    """The example's folder, at a higher resolution than its source's."""
    out = source.parent / "out"
    assert hf_paligemma.main([str(source), "--out", str(out), "--image-size", "48"]) == 0
    return out


def noise(count=2, size=48):
    return np.random.default_rng(0).uniform(-1, 1, (count, size, size, 3)).astype(np.float32)


def test_features_are_ours(source, built):
    model, encoder = hf_paligemma.load(built / "paligemma"), load_encoder(source, 48)
    found = hf_paligemma.image_features(model, noise())
    differences = compare(hf_paligemma.expected_features(encoder, model, noise()), found)
    assert set(differences) == {"image_tokens", "features"} and max(differences.values()) <= 1e-5
    assert found["image_tokens"].shape == (2, 36, 36) and np.abs(found["features"]).max() > 0.1


def test_what_it_writes_depends_on_the_image(built):
    import torch

    model = hf_paligemma.load(built / "paligemma")
    assert hf_paligemma.generate(model, noise()).shape == (2, hf_paligemma.NEW_TOKENS)
    ids = torch.tensor([[model.config.image_token_id] * 36 + [2, 17]] * 2)
    pixels = torch.from_numpy(noise().transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits[:, -1]
    assert (logits[0] - logits[1]).abs().max() > 1e-4


def test_names_are_version_4s_and_ours_reads_them(source, built):
    with safe_open(built / "paligemma/model.safetensors", "np") as stored:
        tower = [key for key in stored.keys() if "vision_tower" in key]  # noqa: SIM118 (it is no dict)
        assert stored.metadata() == {"format": "pt"}
    assert tower and all(key.startswith("vision_tower.vision_model.") for key in tower)
    assert not any("head" in key for key in tower)
    tokens = load_encoder(built / "paligemma").tokens(noise())
    np.testing.assert_allclose(tokens, load_encoder(source, 48).tokens(noise()), rtol=0, atol=1e-5)


def test_lost_weights_are_an_error(built, tmp_path):
    from safetensors.numpy import load_file, save_file

    lost = "vision_tower.vision_model.post_layernorm.bias"
    for file in ("config.json", "generation_config.json"):
        (tmp_path / file).write_bytes((built / "paligemma" / file).read_bytes())
    state = load_file(built / "paligemma/model.safetensors")
    del state[lost]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="did not load the weights as they are.*post_layernorm.bias"):
        hf_paligemma.load(tmp_path)


def test_bad_input_leaves_nothing(source, built, tmp_path, capsys):
    assert hf_paligemma.main([str(source), "--out", str(built)]) == 2
    assert "exists; name a new one" in capsys.readouterr().err
    config = square_model(image={"pool": "tok"})
    big_vision.write(tmp_path / "tok.npz", random_params(config), config)
    assert hf_paligemma.main([str(tmp_path / "tok.npz"), "--out", str(tmp_path / "deep/out")]) == 2
    assert "class token" in capsys.readouterr().err
    assert not (tmp_path / "deep").exists()
