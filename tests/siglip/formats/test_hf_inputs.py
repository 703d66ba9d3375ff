"""What a Hugging Face folder says of pixels and ids is followed, kept and written again; what cannot be followed is named."""

import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from PIL import Image

from data_pipelines.image_ops import resize
from data_pipelines.tokenizers import SentencePieceTokenizer
from siglip.cli.evaluation import embedder_of
from siglip.encoder import load
from siglip.errors import UserError
from siglip.evaluation.class_files import make_prompts
from siglip.exporting.verification import TOLERANCE
from siglip.formats import big_vision, hugging_face
from siglip.formats.hf_inputs import preprocessor_json, read_pixels, read_tokens, tokenizer_file
from siglip.formats.hf_tokenizer import convert
from siglip.formats.hf_tokenizer.from_json import sentencepiece_model
from siglip.model_source import read_config
from siglip.models.text import TokenConfig
from siglip.models.two_tower import make_model
from siglip.models.vit import ImageConfig, PixelConfig
from tests.siglip.rounding import towers_apart
from tests.siglip.texts import HAND_PICKED, SPIECE, captions
from tests.siglip.tiny import random_inputs, random_params, square_model

SIGLIP2 = TokenConfig(pad_id=0, lower="character", canonical="none")
GEMMA_CONFIG = {
    "tokenizer_class": "GemmaTokenizer", "add_bos_token": False, "add_eos_token": True, "padding_side": "right",
    "eos_token": "<eos>", "pad_token": "<pad>",
}  # fmt: skip
TEXTS = [text for text in HAND_PICKED if "▁" not in text] + captions(every=400) + ["A RED Cat, isn't it?", "  a\n\nb "]


@pytest.fixture(scope="module")
def gemma() -> bytes:
    """A SentencePiece model of Gemma's kind: bytes, no normalisation, <pad> 0, <eos> 1, <bos> 2, <unk> 3."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions(every=20)), model_writer=model, vocab_size=900, model_type="bpe", byte_fallback=True,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, eos_piece="<eos>", bos_piece="<bos>", normalization_rule_name="identity",
        add_dummy_prefix=False, remove_extra_whitespaces=False, user_defined_symbols=["\n", "\n\n", "<img>"],
        character_coverage=0.99, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return model.getvalue()


def gemma_json(model: bytes) -> dict:
    """The tokenizer.json that transformers makes of such a model."""
    proto = convert.read_sentencepiece(model, source="")
    kinds = {i: piece.type for i, piece in enumerate(proto.pieces) if piece.type in (3, 4)}
    return {
        "added_tokens": [
            convert._added_token(i, proto.pieces[i].piece, special=kind == 3) for i, kind in kinds.items()
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<eos>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<eos>": {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}},
        },
        "model": convert._bpe(proto),
    }


def write_files(folder: Path, **files: dict | bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("_json", ".json").replace("_model", ".model")
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def preprocessor(**changes: object) -> dict:
    return preprocessor_json(ImageConfig("mu/8", image_size=(32, 32)), with_texts=False) | changes


NORM = {"image_mean": [0.4, 0.45, 0.5], "image_std": [0.2, 0.25, 0.3]}


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"resample": 3}, PixelConfig(resample="bicubic")),
        (NORM, PixelConfig((0.4, 0.45, 0.5), (0.2, 0.25, 0.3))),
        ({"image_mean": 0.25, "do_center_crop": None}, PixelConfig((0.25,) * 3)),
        ({"do_normalize": False}, PixelConfig((0.0,) * 3, (1.0,) * 3)),
        ({"rescale_factor": 1 / 510}, PixelConfig((1.0,) * 3, (1.0,) * 3)),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3}, PixelConfig()),
        ({"size": 32, "image_processor_type": "SiglipImageProcessorFast"}, PixelConfig()),
    ],
)
def test_a_preprocessor_is_followed(tmp_path, changes, expected):
    folder = write_files(tmp_path / "f", preprocessor_config_json=preprocessor(**changes))
    assert read_pixels(folder, image_size=(32, 32)) == expected
    nested = write_files(tmp_path / "g", processor_config_json={"image_processor": preprocessor(**changes)})
    assert read_pixels(nested, image_size=(32, 32)) == expected


def test_what_a_preprocessor_leaves_out_is_its_class_default(tmp_path):
    folder = write_files(
        tmp_path, preprocessor_config_json={"image_processor_type": "SiglipImageProcessor", "size": 32}
    )
    assert read_pixels(folder, image_size=(32, 32)) == PixelConfig(resample="bicubic")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"resample": 1}, "resample=1"),
        ({"do_resize": False}, "do_resize=false"),
        ({"do_center_crop": True}, "do_center_crop=True"),
        ({"do_pad": True, "resample": 0}, "do_pad=True; resample=0"),
        ({"size": {"shortest_edge": 32}}, "shortest_edge.*image_size=32"),
        ({"size": {"height": 64, "width": 64}}, "image_size=32"),
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor"),
        ({"image_mean": [0.5, 0.5]}, "image_mean="),
        ({"image_std": [0.5, 0, 0.5]}, "image_std="),
        ({"rescale_factor": "x"}, "rescale_factor='x'"),
    ],
)
def test_a_preprocessor_that_cannot_be_followed_is_named(tmp_path, changes, words):
    folder = write_files(tmp_path, preprocessor_config_json=preprocessor(**changes))
    with pytest.raises(UserError, match=words) as error:
        read_pixels(folder, image_size=(32, 32))
    assert "\n" not in str(error.value) and "preprocessor_config.json" in str(error.value)


def test_a_tower_inside_of_another_model_is_read_whatever_that_does(tmp_path, caplog):
    changes = {"image_processor_type": "Idefics3ImageProcessor", "do_image_splitting": True, "resample": 1} | NORM
    folder = write_files(tmp_path, preprocessor_config_json=preprocessor(**changes))
    assert read_pixels(folder, image_size=(32, 32), inside=True).mean == (0.4, 0.45, 0.5)
    assert "do_image_splitting=True" in caplog.text and "resample=1" in caplog.text


@pytest.mark.parametrize("name", ["tokenizer_model", "tokenizer_json", "spiece_model"])
def test_the_ids_of_siglip_2(tmp_path, gemma, name, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = gemma_json(gemma) if name.endswith("json") else gemma
    folder = write_files(tmp_path / "f", tokenizer_config_json=GEMMA_CONFIG, **{name: content})
    assert read_tokens(folder) == TokenConfig(pad_id=0, lower="none", canonical="none")
    ours = SentencePieceTokenizer(tokenizer_file(folder), **vars(read_tokens(folder)))
    processor = sentencepiece.SentencePieceProcessor(model_proto=gemma)
    for text in TEXTS:
        assert ours.encode(text, 16).tolist() == (processor.encode(text)[:15] + [1] + [0] * 16)[:16], text
    lowered = write_files(folder, tokenizer_config_json=GEMMA_CONFIG | {"tokenizer_class": "Siglip2Tokenizer"})
    assert read_tokens(lowered) == SIGLIP2


def test_a_normaliser_that_lower_cases(tmp_path, gemma, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tree = gemma_json(gemma)
    tree["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, tree["normalizer"]]}
    folder = write_files(tmp_path / "f", tokenizer_config_json=GEMMA_CONFIG, tokenizer_json=tree)
    assert read_tokens(folder) == SIGLIP2


def test_the_tokenizer_of_siglip_removes_punctuation(tmp_path):
    settings = {"tokenizer_class": "SiglipTokenizer", "pad_token": "</s>"}
    folder = write_files(tmp_path, tokenizer_config_json=settings, spiece_model=SPIECE.read_bytes())
    assert read_tokens(folder) == TokenConfig(canonical="texts")
    ours, plain = SentencePieceTokenizer(SPIECE, **vars(read_tokens(folder))), SentencePieceTokenizer(SPIECE)
    assert ours.encode(" A dog's life; ΑΣ!\n", 16).tolist() == plain.encode("a dogs life ας", 16)[:-1].tolist() + [1]
    write_files(tmp_path, tokenizer_config_json=settings | {"do_lower_case": False})
    assert read_tokens(tmp_path).lower == "none"


def test_without_a_word_on_the_tokenizer(tmp_path, gemma):
    assert read_tokens(write_files(tmp_path / "a", spiece_model=SPIECE.read_bytes())) == TokenConfig()
    assert read_tokens(write_files(tmp_path / "b", tokenizer_model=gemma)) == TokenConfig(pad_id=0)
    assert read_tokens(write_files(tmp_path / "c")) == TokenConfig() and tokenizer_file(tmp_path / "c") is None
    # Handed to a tokenizer alone, the file itself tells the kind.
    found = [SentencePieceTokenizer(path).encode("a", 9)[-1] for path in (SPIECE, tmp_path / "b" / "tokenizer.model")]
    assert found == [1, 0]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"padding_side": "left"}, "padding_side='left'"),
        ({"padding_side": None, "truncation_side": "left"}, "padding_side=None; truncation_side='left'"),
        ({"add_bos_token": True, "bos_token": "<bos>"}, "<bos> before a text"),
        ({"pad_token": {"content": "<none>"}}, "pad_token='<none>'"),
        ({"eos_token": "<bos>"}, "<bos> after a text"),
    ],
)
def test_a_tokenizer_that_cannot_be_followed_is_named(tmp_path, gemma, changes, words):
    folder = write_files(tmp_path, tokenizer_config_json=GEMMA_CONFIG | changes, tokenizer_model=gemma)
    with pytest.raises(UserError, match=words) as error:
        read_tokens(folder)
    assert "\n" not in str(error.value) and "tokenizer_config.json" in str(error.value)


@pytest.mark.parametrize(
    "part, content, words",
    [
        ("model", {"type": "WordPiece", "vocab": {}}, "'WordPiece' is neither BPE nor Unigram"),
        ("normalizer", {"type": "BertNormalizer"}, "BertNormalizer"),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}, "ByteLevel"),
        ("model.merges", "again", "not in the order of a SentencePiece model"),
        ("model.merges", "drop", "does not merge"),
        ("model.ignore_merges", True, "ignore_merges"),
        ("model.vocab", None, "not a tokenizer as Hugging Face writes it"),
    ],
)
def test_a_tokenizer_json_that_sentencepiece_cannot_be_is_named(gemma, part, content, words):
    tree = gemma_json(gemma)
    if part == "model.merges":
        first, *merges = tree["model"]["merges"]
        tree["model"]["merges"] = merges if content == "drop" else [first, *merges, first]
    elif part.startswith("model."):
        tree["model"][part.removeprefix("model.")] = content
    else:
        tree[part] = content
    with pytest.raises(UserError, match=words) as error:
        sentencepiece_model(tree, {"eos": "<eos>"}, source="t/tokenizer.json")
    assert "\n" not in str(error.value) and "t/tokenizer.json" in str(error.value)


@pytest.mark.parametrize("tokens", [TokenConfig(), SIGLIP2, TokenConfig(end=False, lower="none", canonical="texts")])
def test_what_we_write_says_it_again(tmp_path, gemma, tokens):
    path = tmp_path / "t.model"
    path.write_bytes(gemma)
    pixels = PixelConfig((0.4, 0.45, 0.5), (0.2, 0.25, 0.3), "bicubic")
    config = square_model(image={"pixels": pixels}, text={"vocab_size": 900, "tokens": tokens})
    params = random_params(config)
    for name, write in {"hf": hugging_face.write, "m.npz": big_vision.write}.items():
        (tmp_path / "hf").mkdir(exist_ok=True)
        write(tmp_path / name, params, config, **({"tokenizer": path} if name == "hf" else {}))
        found, _ = read_config(tmp_path / name)
        assert found.image.pixels == pixels and found.text.tokens == tokens
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["text_config"]["pad_token_id"] == (
        tokens.pad_id is None
    )
    written = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert (written["resample"], written["image_mean"]) == (3, [0.4, 0.45, 0.5])
    assert read_config(tmp_path / "hf")[1].read_bytes() == gemma


def test_a_vocabulary_of_gemma_is_padded_as_big_vision_does(tmp_path):
    config = square_model(text={"width": 4, "num_heads": 1, "mlp_dim": 4, "depth": 1, "vocab_size": 256_000})
    big_vision.write(tmp_path / "m.npz", random_params(config), config)
    assert read_config(tmp_path / "m.npz")[0].text.tokens == TokenConfig()  # said beside the file
    big_vision.sidecar(tmp_path / "m.npz").unlink()
    assert read_config(tmp_path / "m.npz")[0].text.tokens == TokenConfig(pad_id=0)


def test_mean_and_deviation_are_inside_the_tower():
    pixels = PixelConfig((0.4, 0.45, 0.5), (0.2, 0.25, 0.3))
    config = square_model(image={"pixels": pixels})
    params = jax.tree.map(jnp.asarray, random_params(config))
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    theirs = (images / np.float32(255) - np.float32(pixels.mean)) / np.float32(pixels.std)
    plain = square_model()

    def embedded(config, images):
        return make_model(config).apply({"params": params}, {"image": jnp.asarray(images)})[0]

    expected = embedded(plain, theirs)
    for given in (images, images / np.float32(127.5) - 1):
        np.testing.assert_allclose(embedded(config, given), expected, rtol=0, atol=towers_apart(config, expected))
    assert np.abs(embedded(plain, images) - expected).max() > 0.01


def test_evaluation_prepares_inputs_as_the_model_says(tmp_path, gemma):
    (tmp_path / "t.model").write_bytes(gemma)
    config = square_model(
        image={"pixels": PixelConfig(resample="bicubic")}, text={"vocab_size": 900, "tokens": SIGLIP2}
    )
    hugging_face.write(tmp_path, random_params(config), config, tokenizer=tmp_path / "t.model")
    embedder = embedder_of(tmp_path)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=gemma).encode("a.")
    for tokenize in (embedder.tokenize, load(tmp_path).tokenize):
        assert tokenize(["A."])[0].tolist() == (pieces + [1] + [0] * 7)[:7] and len(pieces) < 6
    assert embedder.resample == "bicubic" and not embedder.canonical_prompts
    assert make_prompts(["Polar_Bear"], ["A {}."], canonical=False) == [["A Polar_Bear."]]
    assert make_prompts(["Polar_Bear"], ["A {}."]) == [["a polar bear"]]


def test_bicubic_is_pillows():
    image = np.random.default_rng(0).integers(0, 256, (41, 67, 3), np.uint8)
    for size in ((16, 16), (64, 80)):
        theirs = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)).astype(int)
        np.testing.assert_array_equal(resize(image, size, resample="bicubic"), theirs)
        assert np.abs(resize(image, size).astype(int) - theirs).mean() > 2


@pytest.mark.interop
@pytest.mark.parametrize("kind", ["GemmaTokenizerFast", "SiglipTokenizer", "tokenizer.json"])
def test_ids_and_embeddings_are_those_of_transformers(tmp_path, gemma, kind, monkeypatch):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    is_siglip, vocab = kind == "SiglipTokenizer", 4000 if kind == "SiglipTokenizer" else 900
    config = square_model(text={"vocab_size": vocab, "length": 16})
    params = random_params(config)
    hugging_face.write(tmp_path, params, config)
    if is_siglip:
        (tmp_path / "spiece.model").write_bytes(SPIECE.read_bytes())
        tokenizer = transformers.SiglipTokenizer(str(tmp_path / "spiece.model"), model_max_length=16)
        tokenizer.save_pretrained(tmp_path)
    else:
        write_files(
            tmp_path, tokenizer_model=gemma, tokenizer_config_json=GEMMA_CONFIG, tokenizer_json=gemma_json(gemma)
        )
        if kind == "tokenizer.json":
            (tmp_path / "tokenizer.model").unlink()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    found, path = read_config(tmp_path)
    ours = SentencePieceTokenizer(path, **vars(found.text.tokens))
    specials = ("<pad>", "</s>", "<unk>", "<s>", "<eos>", "<bos>")  # typed ones are text here, and tokens there
    old = is_siglip and transformers.__version__ < "5"  # lower-cases characters one by one: no sigma is final
    texts = [text for text in TEXTS if not any(token in text for token in (*specials, *["Σ"] * old))]
    theirs = tokenizer(texts, padding="max_length", max_length=16, truncation=True, return_tensors="np")["input_ids"]
    ids = np.stack([ours.encode(text, 16) for text in texts])
    wrong = [text for text, a, b in zip(texts, ids, theirs, strict=True) if (a != b).any()]
    assert not wrong, wrong[:3]
    model = transformers.SiglipModel.from_pretrained(tmp_path).eval()
    images, _ = random_inputs(config)
    with torch.no_grad():
        pixels = torch.tensor(images.transpose(0, 3, 1, 2))
        theirs = model(pixel_values=pixels, input_ids=torch.tensor(theirs[:8]).long()).text_embeds
    z = make_model(found).apply({"params": jax.tree.map(jnp.asarray, params)}, {"text": jnp.asarray(ids[:8])})[1]
    np.testing.assert_allclose(np.asarray(z), theirs.numpy(), rtol=0, atol=TOLERANCE)
