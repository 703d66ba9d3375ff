"""Exports appear whole and verified, or not at all."""

import contextlib
import dataclasses
import io
import json
import re
import shutil
import tarfile
from importlib import metadata
from pathlib import Path
from typing import get_args, get_type_hints

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import siglip
from data_pipelines.sources.webdataset import TarSource
from siglip.cli.exporting import ExportArgs, sample_inputs
from siglip.encoder import load
from siglip.errors import UserError
from siglip.exporting.export import FORMATS, export
from siglip.exporting.verification import model_outputs
from siglip.formats import big_vision, containers, hugging_face
from siglip.formats.big_vision import image_only
from siglip.formats.export_format import ExportFormat, ExportMismatch
from siglip.model_source import read_config
from siglip.models.text import TokenConfig
from siglip.models.two_tower import ModelConfig
from siglip.models.vit import PixelConfig
from siglip.trees import flatten
from tests.siglip.exporting.sources import HAS_TRANSFORMERS, samples, written
from tests.siglip.rounding import towers_apart
from tests.siglip.texts import plain_pieces
from tests.siglip.tiny import random_inputs, random_params, square_model

SAMPLE = Path(__file__).parents[3] / "data_pipelines" / "sample"


def few_pieces(folder):
    """A model whose text tower has no room for the tokenizer beside it."""
    folder.mkdir()
    (folder / "spiece.model").write_bytes(plain_pieces())
    return written(folder / "m.npz", square_model())


def test_big_vision_folder(tmp_path, source):
    out = tmp_path / "made" / "on" / "the" / "way"
    report = export(source, format="bigvision", out=out, tower="both")
    assert report.path == out and report.verified
    assert report.differences == {"random": {"image_tokens": 0, "image_embedding": 0, "text_embedding": 0, "logits": 0}}
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "model.npz", "spiece.model"]
    images, ids = random_inputs(load(source).config)
    np.testing.assert_array_equal(load(out).embed_texts(ids), load(source).embed_texts(ids))
    np.testing.assert_array_equal(load(out).image_tokens(images), load(source).image_tokens(images))


def test_npz_alone(tmp_path, source):
    export(source, format="bigvision", out=tmp_path / "a.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "source"]
    with np.load(tmp_path / "a.npz") as stored:
        assert all(key.startswith("params/img/") for key in stored)
    odd = square_model(image={"image_size": (16, 24)}, text={"vocab_size": 4000})
    odd = written(tmp_path / "source" / "odd.npz", odd)
    export(odd, format="bigvision", out=tmp_path / "b.npz", tower="both")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.config.json", "b.npz", "source"]
    assert load(tmp_path / "b.npz").config.image.image_size == (16, 24)


def test_stacked_blocks_and_towers_without_a_head(tmp_path, source):
    export(
        source, format="bigvision", out=tmp_path / "scan", layout="scan", head=False, image_size=48, patch_size=(12, 12)
    )
    with np.load(tmp_path / "scan" / "model.npz") as stored:
        assert stored["params/img/Transformer/encoderblock/LayerNorm_0/scale"].shape == (2, 36)
        assert stored["params/img/embedding/kernel"].shape == (12, 12, 3, 36)
        assert not any("MAPHead" in key or "/head/" in key for key in stored)
    model = load(tmp_path / "scan")
    assert model.config.image.pool == "none" and model.config.image.image_size == (48, 48)
    images = random_inputs(model.config)[0]
    expected = load(source, 48, patch_size=12).image_tokens(images)
    np.testing.assert_allclose(model.image_tokens(images), expected, rtol=0, atol=towers_apart(model.config, expected))


@pytest.mark.parametrize("format", ["bigvision", "stablehlo"])
def test_real_images_and_texts_are_compared_too(tmp_path, real_source, format):
    report = export(real_source, format=format, out=tmp_path / "out", tower="both", samples=samples)
    assert list(report.differences) == ["random", "sample"]
    for found in report.differences.values():
        assert set(found) == {"image_tokens", "image_embedding", "text_embedding", "logits"}
        assert max(found.values()) < 1e-5


@pytest.mark.interop
@pytest.mark.parametrize("tower", ["image", "both"])
@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="needs torch and transformers: pip install '.[interop]'")
def test_hugging_face_is_proved_by_transformers(tmp_path, real_source, tower):
    report = export(real_source, format="hf", out=tmp_path / "hf", tower=tower, image_size=40, samples=samples)
    assert report.verified and (tmp_path / "hf" / "spiece.model").exists() == (tower == "both")
    outputs = {"image_tokens", "image_embedding"}
    outputs |= {"text_embedding", "logits", "probabilities"} if tower == "both" else set()
    assert set(report.differences["random"]) == outputs
    found = report.differences["sample"]
    assert set(found) == outputs | {"pixels"} | ({"tokens"} if tower == "both" else set())
    assert max(found.values()) < 1e-5 and found["pixels"] < 2e-7 and found.get("tokens", 0) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert (
        f"Read back by transformers {metadata.version('transformers')} and torch {metadata.version('torch')}," in card
    )


@pytest.mark.interop
@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="needs torch and transformers: pip install '.[interop]'")
def test_inputs_that_are_prepared_otherwise_are_proved_too(tmp_path):
    pixels = PixelConfig((0.4, 0.45, 0.5), (0.2, 0.25, 0.3), "bicubic")
    tokens = TokenConfig(pad_id=0, lower="character", canonical="texts")
    (tmp_path / "spiece.model").write_bytes((SAMPLE / "spiece.model").read_bytes())
    config = square_model(image={"pixels": pixels}, text={"vocab_size": 4000, "length": 64, "tokens": tokens})
    source = written(tmp_path / "m.npz", config)
    first, again = tmp_path / "hf", tmp_path / "again"
    for src, out in ((source, first), (first, again)):
        found = export(src, format="hf", out=out, tower="both", samples=samples).differences["sample"]
        assert found["tokens"] == 0 and found["pixels"] < 3e-7
    assert (read_config(again)[0].image.pixels, read_config(again)[0].text.tokens) == (pixels, tokens)


def test_images_that_consumers_prepare_otherwise_are_no_samples(tmp_path):
    def member(mode, format, **options):
        file = io.BytesIO()
        Image.new(mode, (9, 7), 200 if mode == "L" else (1, 2, 3, 4)[: len(mode)]).save(file, format, **options)
        return file.getvalue()

    turned = Image.Exif()
    turned[0x0112] = 6
    images = [
        b"none",
        member("RGB", "JPEG", exif=turned),
        member("RGBA", "PNG"),
        member("RGB", "JPEG"),
        member("L", "PNG"),
    ]
    with tarfile.open(tmp_path / "few.tar", "w") as tar:
        for number, content in enumerate(images):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    pairs = TarSource(str(tmp_path / "few.tar"))
    assert list(sample_inputs(pairs, image_only(square_model()), None).files) == images[3:]
    with pytest.raises(ValueError, match="have images but no captions"):
        sample_inputs(pairs, square_model(), SAMPLE / "spiece.model")


@pytest.mark.slow
def test_a_saved_model_is_compared_on_files_and_strings(tmp_path, real_source):
    report = export(real_source, format="savedmodel", out=tmp_path / "out", tower="both", samples=samples)
    assert list(report.differences) == ["sample"] and max(report.differences["sample"].values()) < 1e-5
    assert {"image_tokens", "text_embedding", "probabilities"} <= set(report.differences["sample"])
    with pytest.raises(ValueError, match="pass samples="):
        export(real_source, format="savedmodel", out=tmp_path / "other")
    (real_source.parent / "spiece.model").unlink()
    with pytest.raises(ValueError, match="a SavedModel takes raw texts, but the source has no tokenizer"):
        export(real_source, format="savedmodel", out=tmp_path / "other", tower="both", samples=samples)


def test_without_transformers_it_says_so(tmp_path, source):
    report = export(source, format="hf", out=tmp_path / "hf", tower="both")
    assert not report.verified and "pip install" in report.message and "\n" not in report.message
    assert "call it with `tokenizer_kwargs={'max_length': 7}`" in report.message
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"Read back by siglip-stage0 {siglip.__version__} alone, not by transformers, and" in card


@pytest.mark.parametrize("own", [True, pytest.param(False, marks=pytest.mark.interop)])
def test_bfloat16_is_half_the_size_and_the_rounded_model(tmp_path, source, own):
    """Fixed positions, which are not parameters, temperature and bias are stored as they are."""
    config = square_model(image={"posemb": "sincos2d"}, text={"vocab_size": 4000})
    params = random_params(config)
    big_vision.write(source, params, config)
    if not own and not HAS_TRANSFORMERS:
        pytest.skip("needs torch and transformers: pip install '.[interop]'")
    report = export(source, format="hf", out=tmp_path / "hf", tower="both", dtype="bfloat16")
    assert report.verified != own and max(report.differences["random"].values()) < 1e-5
    rounding = report.differences["rounding"]
    assert 1e-4 < rounding["image_embedding"] < 0.1 and "rounding changes the outputs by up to" in report.message
    assert "| rounding |" in (tmp_path / "hf" / "README.md").read_text()
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with containers.open_safetensors([tmp_path / "hf" / "model.safetensors"]) as stored:
        exact = {"logit_scale", "logit_bias", "vision_model.embeddings.position_embedding.weight"}
        assert {key for key, array in stored.items() if array.dtype != "bfloat16"} == exact
    found = flatten(hugging_face.read(tmp_path / "hf")[0])
    for path, array in flatten(params).items():
        rounded = array if path in ("t", "b") else np.asarray(jnp.asarray(array, jnp.bfloat16), np.float32)
        np.testing.assert_array_equal(found[path], rounded)


@pytest.mark.parametrize("own", [True, pytest.param(False, marks=pytest.mark.interop)])
def test_weights_in_several_files(tmp_path, source, own):
    if not own and not HAS_TRANSFORMERS:
        pytest.skip("needs torch and transformers: pip install '.[interop]'")
    limit, folder = 100_000, tmp_path / "hf"
    report = export(source, format="hf", out=folder, tower="both", shard_bytes=limit)
    assert report.verified != own and max(report.differences["random"].values()) < 1e-5
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    count = len(files)
    assert files == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)] and count > 2
    sizes = dict.fromkeys(files, 0)
    for name in files:
        with containers.open_safetensors([folder / name]) as stored:
            assert sorted(stored) == sorted(key for key, file in index["weight_map"].items() if file == name)
            sizes[name] = sum(array.read().nbytes for array in stored.values())
            assert sizes[name] <= limit or len(stored) == 1
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    expected = flatten(big_vision.read(source)[0])
    for path, array in flatten(hugging_face.read(folder)[0]).items():
        np.testing.assert_array_equal(array, expected[path])
    export(source, format="hf", out=tmp_path / "one", shard_bytes=10**9)
    assert (tmp_path / "one" / "model.safetensors").exists()


def test_only_some_formats_have_bfloat16_and_several_files(tmp_path, source):
    for bad, format in ((0, "hf"), (100, "bigvision")):
        with pytest.raises(
            UserError, match=f"shard_bytes={bad} must be a positive number, and only --format hf has it"
        ):
            export(source, format=format, out=tmp_path / "out", shard_bytes=bad)
    with pytest.raises(UserError, match="dtype='bfloat16': --format bigvision has float32; take one of these"):
        export(source, format="bigvision", out=tmp_path / "out", dtype="bfloat16")


def test_a_source_without_tokenizer_is_mentioned(tmp_path, source):
    (source.parent / "spiece.model").unlink()
    assert "no tokenizer" in export(source, format="hf", out=tmp_path / "hf", tower="both").message


def test_nothing_stays_behind(tmp_path, source, monkeypatch):
    head = ModelConfig(square_model().image, square_model().text, out_dim=(36, 36))
    alone = tmp_path / "source" / "alone.npz"
    export(source, format="bigvision", out=alone)
    cases = [
        (written(tmp_path / "source" / "head.npz", head), "hf", "both", "no linear image head"),
        (alone, "bigvision", "both", "only the image tower"),
        (tmp_path / "absent.npz", "hf", "image", "no file"),
        (few_pieces(tmp_path / "source" / "few"), "hf", "both", "has 4000 pieces, the text tower room for 61"),
    ]
    for src, format, tower, words in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            export(src, format=format, out=tmp_path / "x" / "y", tower=tower)
    with pytest.raises(FileExistsError, match="export to a new name"):
        export(source, format="hf", out=tmp_path / "source")
    with pytest.raises(ValueError, match="only --format bigvision writes a lone npz"):
        export(source, format="hf", out=tmp_path / "x.npz")
    with pytest.raises(ValueError, match="layout='scan': --format hf has loop"):
        export(source, format="hf", out=tmp_path / "x", layout="scan")
    with pytest.raises(ValueError, match="format='onnx' is not one of hf, bigvision, stablehlo, savedmodel"):
        export(source, format="onnx", out=tmp_path / "x")
    # A config file that is left from another npz would be believed.
    (tmp_path / "x.config.json").touch()
    with pytest.raises(FileExistsError, match="x.config.json"):
        export(source, format="bigvision", out=tmp_path / "x.npz")
    (tmp_path / "x.config.json").unlink()

    real = hugging_face.key_maps.to_hugging_face
    monkeypatch.setattr(hugging_face.key_maps, "to_hugging_face", lambda a, kind: real(a * np.float32(1.001), kind))
    with pytest.raises(ExportMismatch, match="image_tokens differs from its source by"):
        export(source, format="hf", out=tmp_path / "x" / "y", tower="image")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_new_format_is_a_description_and_a_line_in_the_list(tmp_path, source, monkeypatch):
    """What a contributor writes: how it is written, how its users read it, and an example."""

    def write(folder, params, config, *, tokenizer, layout):
        np.save(folder / "kernel.npy", params["img"]["embedding"]["kernel"])

    def outputs(folder, cases):
        found = [model_outputs(load(source), image_alone(case)) for case in cases]
        return [{name: array * scale for name, array in case.items()} for case in found]

    def example(config, has_tokenizer):
        return f"```python\nimport numpy\n\nprint(numpy.load('kernel.npy').shape, HEIGHT, WIDTH, {has_tokenizer})\n```"

    toy = ExportFormat("numpy", write, example, outputs, contract=lambda config, has_tokenizer: ["- only a kernel"])
    monkeypatch.setitem(FORMATS, "toy", toy)
    scale = 1
    report = export(source, format="toy", out=tmp_path / "out")
    assert report.verified and report.differences == {"random": {"image_tokens": 0, "image_embedding": 0}}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: numpy" in card and "- only a kernel" in card
    monkeypatch.chdir(tmp_path / "out")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(re.search(r"```python\n(.*?)```", card, re.S)[1], {})
    assert out.getvalue() == "(8, 8, 3, 36) 32 32 False\n"

    scale = 1 + 1e-4  # what its users read is held against the source, as for every other format
    with pytest.raises(ExportMismatch, match="image_tokens differs"):
        export(source, format="toy", out=tmp_path / "other")
    scale = 1
    monkeypatch.setitem(FORMATS, "toy", dataclasses.replace(toy, needs=("no_such_package",)))
    with pytest.raises(ValueError, match="is not a model"):  # then our own reader has to read it
        export(source, format="toy", out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def image_alone(case):
    return dataclasses.replace(case, tokens=None)


def test_the_command_line_offers_every_format():
    assert get_args(get_type_hints(ExportArgs)["format"]) == tuple(FORMATS)


@pytest.mark.parametrize(
    ("src", "out"),
    [
        ("source/m.npz", "run/out"),
        ("source/m.npz", "run/checkpoints/out.npz"),
        ("run/checkpoints/8", "run/checkpoints/8/out"),
        ("source/m.npz", "link/a/out"),
        ("hf", "hf/out"),
    ],
)
def test_nothing_is_exported_into_a_run_or_into_its_source(tmp_path, source, src, out):
    (tmp_path / "hf").mkdir()
    hugging_face.write(tmp_path / "hf", random_params(square_model()), square_model())
    (tmp_path / "run" / "checkpoints" / "8").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(UserError, match="lies inside the model .*; name a folder elsewhere") as error:
        export(tmp_path / src, format="bigvision", out=tmp_path / out)
    elsewhere = re.search("such as (.*)$", str(error.value))[1]
    assert not any(Path(elsewhere).is_relative_to(tmp_path / name) for name in ("run", "hf"))
    assert not (tmp_path / out).exists()


def test_the_image_tower_is_exported_without_reading_the_other(tmp_path, source, monkeypatch):
    read, real = [], containers._read_array
    monkeypatch.setattr(
        containers, "_read_array", lambda stream, *args: read.append(stream.name) or real(stream, *args)
    )
    export(source, format="bigvision", out=tmp_path / "a.npz")
    assert read and all(name.startswith("params/img/") for name in read)


def test_a_run_whose_config_was_changed_is_named(tmp_path, trained):
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    whole = json.loads(path.read_text())
    for field, value, words in (
        (("model", "image", "mlp_dim"), 64, "does not fit the model it describes: .* of shape"),
        (("model", "image", "width"), 10**30, "config.json: model.*width"),
        (("model", "temperature_init"), -1, "config.json: model: temperature_init=-1.0"),
        (("model", "text"), 7, "config.json: model.text=7"),
        (("model",), None, "config.json: model=None is not an object"),
        (("optim", "lr"), "fast", "config.json is not the config of a run"),
        (("data", "sources"), {"a": 1}, "config.json is not the config of a run"),
    ):
        tree = json.loads(json.dumps(whole))
        part = tree
        for name in field[:-1]:
            part = part[name]
        part[field[-1]] = value
        path.write_text(json.dumps(tree))
        with pytest.raises(UserError, match=words) as error:
            export(tmp_path / "run", format="bigvision", out=tmp_path / "out")
        assert "\n" not in str(error.value)
