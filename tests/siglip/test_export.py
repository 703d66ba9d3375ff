"""Exports appear whole and verified, or not at all."""

import importlib.util
import re

import numpy as np
import pytest

from siglip import export as export_module
from siglip.encoder import load
from siglip.export import ExportMismatch, export
from siglip.formats import big_vision, hugging_face
from siglip.models.two_tower import ModelConfig

from .tiny import random_inputs, random_params, square_model

HAS_TRANSFORMERS = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


@pytest.fixture
def source(tmp_path):
    """A two-tower npz in bfloat16 compute and scan layout, with a tokenizer beside it."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "spiece.model").write_bytes(b"pieces")
    return written(folder / "m.npz", square_model(image={"scan": True}))


def written(path, config: ModelConfig):
    big_vision.write(path, random_params(config), config)
    return path


def without_transformers(monkeypatch):
    monkeypatch.setattr(export_module, "find_spec", lambda name: None)


def test_big_vision_folder(tmp_path, source):
    out = tmp_path / "made" / "on" / "the" / "way"
    report = export(source, format="bigvision", out=out, tower="both")
    assert report.path == out and report.verified
    assert report.differences == {"image_tokens": 0, "image_embedding": 0, "text_embedding": 0, "logits": 0}
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "model.npz", "spiece.model"]
    images, ids = random_inputs(load(source).config)
    np.testing.assert_array_equal(load(out).embed_texts(ids), load(source).embed_texts(ids))
    np.testing.assert_array_equal(load(out).image_tokens(images), load(source).image_tokens(images))


def test_npz_alone(tmp_path, source):
    export(source, format="bigvision", out=tmp_path / "a.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "source"]
    with np.load(tmp_path / "a.npz") as stored:
        assert all(key.startswith("params/img/") for key in stored)
    odd = written(tmp_path / "source" / "odd.npz", square_model(image={"image_size": (16, 24)}))
    export(odd, format="bigvision", out=tmp_path / "b.npz", tower="both")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.config.json", "b.npz", "source"]
    assert load(tmp_path / "b.npz").config.image.image_size == (16, 24)


@pytest.mark.parametrize("tower", ["image", "both"])
@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="needs torch and transformers: pip install '.[interop]'")
def test_hugging_face_is_proved_by_transformers(tmp_path, source, tower):
    report = export(source, format="hf", out=tmp_path / "hf", tower=tower, image_size=40)
    assert report.verified and max(report.differences.values()) < 1e-5
    assert len(report.differences) == (4 if tower == "both" else 2)
    assert (tmp_path / "hf" / "spiece.model").exists() == (tower == "both")


def test_without_transformers_it_says_so(tmp_path, source, monkeypatch):
    without_transformers(monkeypatch)
    report = export(source, format="hf", out=tmp_path / "hf", tower="both")
    assert not report.verified and "pip install" in report.message and "\n" not in report.message
    assert "pads to 64" in report.message


def test_a_source_without_tokenizer_is_mentioned(tmp_path, source, monkeypatch):
    without_transformers(monkeypatch)
    (source.parent / "spiece.model").unlink()
    assert "no tokenizer" in export(source, format="hf", out=tmp_path / "hf", tower="both").message


def test_nothing_stays_behind(tmp_path, source, monkeypatch):
    without_transformers(monkeypatch)
    head = ModelConfig(square_model().image, square_model().text, out_dim=(36, 36))
    alone = tmp_path / "source" / "alone.npz"
    export(source, format="bigvision", out=alone)
    cases = [
        (written(tmp_path / "source" / "head.npz", head), "hf", "both", "no linear image head"),
        (alone, "bigvision", "both", "only the image tower"),
        (tmp_path / "absent.npz", "hf", "image", "no file"),
    ]
    for src, format, tower, words in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            export(src, format=format, out=tmp_path / "x" / "y", tower=tower)
    with pytest.raises(FileExistsError, match="export to a new name"):
        export(source, format="hf", out=tmp_path / "source")

    real = hugging_face.names.to_hugging_face
    monkeypatch.setattr(hugging_face.names, "to_hugging_face", lambda a, kind: real(a * np.float32(1.001), kind))
    with pytest.raises(ExportMismatch, match="image_tokens differs from its source by"):
        export(source, format="hf", out=tmp_path / "x" / "y", tower="image")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_not_a_number_does_not_pass():
    with pytest.raises(ExportMismatch, match="differs"):
        export_module._compare({"z": np.ones(2)}, {"z": np.array([1, np.nan])})


def test_the_model_card_says_what_to_feed_and_its_example_runs(tmp_path, source, monkeypatch, capsys):
    export(source, format="bigvision", out=tmp_path / "bv", tower="both")
    card = (tmp_path / "bv" / "README.md").read_text()
    for part in ("width 36, depth 2", "32 x 32 px", "16 tokens (4 x 4", "exactly 7", "[-1, 1]"):
        assert part in card
    monkeypatch.chdir(tmp_path / "bv")
    exec(re.search(r"```python\n(.*?)```", card, re.S)[1], {})
    assert "(1, 16, 36)" in capsys.readouterr().out
