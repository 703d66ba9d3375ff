"""Hugging Face's tokenizer gives the ids of training, for any text; its preprocessor and pipeline give our pixels and scores."""

import io
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image

from data_pipelines.image_ops import decode_image
from data_pipelines.sources.webdataset import TarSource
from data_pipelines.tokenizers import SentencePieceTokenizer
from siglip.encoder import Encoder
from siglip.errors import UserError
from siglip.formats import hugging_face
from siglip.formats.hf_tokenizer import convert
from siglip.formats.hf_tokenizer.charsmap import read_charsmap, write_charsmap
from siglip.formats.hf_tokenizer.lower_case import lower_case_rules
from siglip.models.text import TokenConfig
from tests.siglip.texts import HAND_PICKED, KINDS, SAMPLE, SPIECE, STRINGS, captions, plain_pieces, trained_pieces
from tests.siglip.tiny import random_params, square_model

LENGTH = 64
# As their models prepare texts; the others do as we do.
TOKENS = {
    "c4": TokenConfig(canonical="texts"),
    "gemma": TokenConfig(pad_id=0, lower="character", canonical="none"),
    "bpe": TokenConfig(pad_id=0, end=False, lower="none"),
}


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """Kind -> a SentencePiece model's file, trained when it is first asked for."""
    files = {"sample": SPIECE}

    def file_of(kind: str) -> Path:
        if kind not in files:
            files[kind] = tmp_path_factory.mktemp("pieces") / f"{kind}.model"
            files[kind].write_bytes(trained_pieces(kind))
        return files[kind]

    return file_of


@pytest.fixture(scope="module", params=["sample", *KINDS])
def pair(request, model_file, tmp_path_factory):
    """(our tokenizer, transformers' out of a folder that we wrote)."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp(request.param)
    tokens = TOKENS.get(request.param, TokenConfig())
    ours = SentencePieceTokenizer(model_file(request.param), **vars(tokens))
    config = square_model(text={"length": LENGTH, "vocab_size": ours.vocab_size, "tokens": tokens})
    hugging_face.write(folder, random_params(config), config, tokenizer=model_file(request.param))
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


def check_equal(pair, texts: list[str]) -> None:
    ours, theirs = pair
    found = theirs(texts, padding="max_length", truncation=True, return_tensors="np")
    assert list(found) == ["input_ids"]
    expected = np.stack([ours.encode(text, LENGTH) for text in texts])
    wrong = [text for text, a, b in zip(texts, expected, found["input_ids"], strict=True) if (a != b).any()]
    assert not wrong, wrong[:3]


@pytest.mark.interop
def test_ids_of_hand_picked_texts_and_captions(pair):
    check_equal(pair, HAND_PICKED + captions() + [text.upper() for text in captions(every=200)])


@pytest.mark.interop
def test_ids_of_every_character(pair):
    characters = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")]
    # A few hundred alone, all of them between letters, forty at a time: no text may be longer than what is kept.
    check_equal(
        pair, characters[::611] + [" ".join(characters[i : i + 12]) for i in range(0, len(characters), 12)][::7]
    )


@pytest.mark.interop
@settings(deadline=None, max_examples=150)
@given(text=STRINGS)
def test_ids_of_any_text(pair, text):
    check_equal(pair, [text])


@pytest.mark.interop
def test_keys_of_the_table_are_composed_alike(pair):
    model = convert.read_sentencepiece(pair[0]._model, source="")
    keys = list(read_charsmap(model.normalizer_spec.precompiled_charsmap))[::97]
    check_equal(pair, [f"a{key}b{key}" for key in keys] or ["a"])


@pytest.mark.interop
def test_it_reads_back_as_text(pair):
    ours, theirs = pair
    text = "a dog and a red hat"
    assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.model_max_length) == (ours.pad_id, 1, LENGTH)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """(folder, our model) whose text tower is as long as the pipeline of transformers pads to."""
    folder = tmp_path_factory.mktemp("hf")
    config = square_model(text={"length": LENGTH, "vocab_size": 4000})
    params = random_params(config)
    hugging_face.write(folder, params, config, tokenizer=SPIECE)
    return folder, Encoder(params, config)


@pytest.fixture(scope="module")
def files():
    source = TarSource(str(sorted(SAMPLE.glob("*.tar"))[0]))
    return [source[i].image for i in range(0, 60, 15)]


def our_pixels(file: bytes, size: int) -> np.ndarray:
    """As Pillow resizes; what the training pipeline does may be 1/255 off where it has a faster resizer."""
    image = decode_image(file, max_pixels=1 << 25).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).astype(np.float32) / 127.5 - 1


@pytest.mark.interop
def test_the_preprocessor_gives_our_pixels(folder, files):
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoProcessor.from_pretrained(folder[0])
    for file in files:
        found = processor(images=Image.open(io.BytesIO(file)), return_tensors="np")["pixel_values"][0]
        # Exact in bytes; (x / 255 - 0.5) / 0.5 and x / 127.5 - 1 round differently in float32.
        bytes_found = (np.asarray(found).transpose(1, 2, 0).astype(np.float64) + 1) * 127.5
        np.testing.assert_allclose(bytes_found, (our_pixels(file, 32) + 1) * 127.5, rtol=0, atol=1e-4)


@pytest.mark.interop
def test_the_processor_tokenizes(folder):
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoProcessor.from_pretrained(folder[0])
    ids = processor(text=HAND_PICKED, padding="max_length", truncation=True, return_tensors="np")["input_ids"]
    ours = SentencePieceTokenizer(SPIECE)
    np.testing.assert_array_equal(ids, np.stack([ours.encode(text, LENGTH) for text in HAND_PICKED]))


@pytest.mark.interop
def test_the_pipeline_gives_our_scores(folder, files):
    transformers = pytest.importorskip("transformers")
    path, model = folder
    pipeline = transformers.pipeline("zero-shot-image-classification", model=str(path))
    labels = ["a dog", "the flag of San Marino", "O'Brien's (red) HAT", "日本語"]
    tokenizer = SentencePieceTokenizer(SPIECE)
    ztxt = model.embed_texts(np.stack([tokenizer.encode(f"This is a photo of {label}.", LENGTH) for label in labels]))
    zimg = model.embed_images(np.stack([our_pixels(file, 32) for file in files]))
    expected = 1 / (1 + np.exp(-np.asarray(model.logits(zimg, ztxt), np.float64)))
    for file, row in zip(files, expected, strict=True):
        scores = {
            answer["label"]: answer["score"]
            for answer in pipeline(Image.open(io.BytesIO(file)), candidate_labels=labels)
        }
        np.testing.assert_allclose([scores[label] for label in labels], row, rtol=1e-5, atol=1e-9)


def test_tables_there_and_back():
    table = read_charsmap(
        convert.read_sentencepiece(SPIECE.read_bytes(), source="").normalizer_spec.precompiled_charsmap
    )
    assert len(table) > 200_000 and table["ﬁ"] == "fi" and table["e\u0301"] == "é" and table["\x01"] == ""
    single = {key: value for key, value in table.items() if len(key) == 1}
    assert read_charsmap(write_charsmap(single)) == single
    assert read_charsmap(b"") == {}
    with pytest.raises(ValueError, match="normalisation table has 6 bytes"):
        read_charsmap(b"\x40\0\0\0ab")


def test_lower_case_rules_are_those_of_python():
    rules = lower_case_rules()
    assert rules.mapping["Σ"] == "σ" and rules.mapping["İ"] == "i\u0307" and "a" not in rules.mapping
    assert [c for c, low in rules.mapping.items() if len(low) > 1] == ["İ"]


def test_models_that_cannot_be_expressed_are_refused():
    proto = convert.read_sentencepiece(plain_pieces(), source="sample")

    def refused(words: str, **changes: object) -> None:
        changed = type(proto)()
        changed.CopyFrom(proto)
        for path, value in changes.items():
            part, _, field = path.partition("__")
            setattr(getattr(changed, part), field, value)
        with pytest.raises(ValueError, match=words) as error:
            convert.tokenizer_json(changed.SerializeToString(), TokenConfig(), source="t.model")
        assert "\n" not in str(error.value) and "t.model" in str(error.value)

    refused("neither unigram nor BPE", trainer_spec__model_type=3)
    refused("before words", trainer_spec__treat_whitespace_as_suffix=True)
    refused("no end token", trainer_spec__eos_id=-1)
    for bytes_ in (b"pieces", b""):
        with pytest.raises(ValueError, match="'x' is not a SentencePiece model"):
            convert.tokenizer_json(bytes_, TokenConfig(), source="x")


def test_a_typed_special_piece_with_no_place_to_part_it_is_refused():
    proto = convert.read_sentencepiece(plain_pieces(), source="")
    for text in ("</", "/s", "s>"):
        proto.pieces.add(piece=text, score=-9.0)
    with pytest.raises(ValueError, match="no place to part a typed '</s>'"):
        convert.tokenizer_json(proto.SerializeToString(), TokenConfig(), source="t")


def test_the_folder_names_its_tokenizer(folder):
    config = json.loads((folder[0] / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and config["padding_side"] == "right"
    assert config["model_input_names"] == ["input_ids"] and config["split_special_tokens"] is True
    assert (folder[0] / "spiece.model").read_bytes() == SPIECE.read_bytes()


@pytest.mark.timeout(30)
def test_a_damaged_table_is_told_in_one_line():
    def blob(units: dict[int, int], replacements: bytes = b"x\0") -> bytes:
        array = np.zeros(256, "<u4")
        array[list(units)] = list(units.values())
        return array.nbytes.to_bytes(4, "little") + array.tobytes() + replacements

    leaf = {0: 1 << 10, 96: 2 << 10 | 1 << 8 | 97, 96 ^ 2: 1 << 31}
    assert read_charsmap(blob(leaf)) == {"a": "x"}
    circle = {0: 1 << 10, 96: 97 << 10 | 97}
    far = leaf | {96: 1 << 20 | 1 << 8 | 97}
    for damaged in (
        blob(leaf, b"x" * 1000 + b"\0"),
        blob(circle),
        blob(circle | {1 ^ 98: (1 ^ 98 ^ 1) << 10 | 98}),
        blob(far),
        blob(leaf, b"x"),
    ):
        with pytest.raises(UserError, match="normalisation table is damaged"):
            read_charsmap(damaged)
