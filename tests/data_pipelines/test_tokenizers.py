"""Token ids: the layout of the published models, a sticky end, byte fallback, and agreement with tensorflow_text."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from data_pipelines.errors import UserError
from data_pipelines.records import ShardLost
from data_pipelines.sources.webdataset import TarSource
from data_pipelines.text_ops import iter_captions
from data_pipelines.tokenizers import SentencePieceTokenizer, train_tokenizer
from tests.data_pipelines.shards import SAMPLE_TRAIN, SPIECE


@pytest.fixture(scope="module")
def tokenizer():
    return SentencePieceTokenizer(SPIECE)


def test_ids_of_the_sample_tokenizer(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (4000, 1)
    ids = tokenizer.encode("Flag: San Marino", 16)
    assert ids.dtype == np.int32 and ids[-1] == 1
    assert (tokenizer.encode("flag: san marino", 16) == ids).all()


@settings(deadline=None)
@given(text=st.text(max_size=60), length=st.integers(1, 24))
def test_the_end_is_sticky_at_every_length(text, length):
    tokenizer = SentencePieceTokenizer(SPIECE)
    ids, untruncated = tokenizer.encode(text, length), tokenizer.encode(text, 1000)
    pieces = int((untruncated != 1).sum())
    assert ids.shape == (length,) and (ids >= 0).all() and (ids < 4000).all()
    assert (ids[: min(pieces, length - 1)] == untruncated[: min(pieces, length - 1)]).all()
    assert (ids[min(pieces, length - 1) :] == 1).all()


@pytest.mark.parametrize("text", ["☃", "𓀀", "ᚠᚢᚦ", "\u200d"])
def test_bytes_stand_in_for_unseen_characters(tokenizer, text):
    assert 2 not in tokenizer.encode(text, 32)  # 2 is <unk>


def test_control_pieces_cannot_be_typed(tokenizer):
    ids = tokenizer.encode("</s> dog <pad>", 32)
    assert (ids == 0).sum() == 0 and ids[0] != 1


def test_training_again_gives_the_same_file(tmp_path):
    texts = iter_captions(TarSource(SAMPLE_TRAIN), repeat={"captions.en": 6, "keywords": 6})
    train_tokenizer(texts, tmp_path / "again.model", vocab_size=4000)
    remade = SentencePieceTokenizer(tmp_path / "again.model")._processor
    shipped = SentencePieceTokenizer(SPIECE)._processor
    assert [remade.id_to_piece(i) for i in range(4000)] == [shipped.id_to_piece(i) for i in range(4000)]
    assert [shipped.id_to_piece(i) for i in range(4)] == ["<pad>", "</s>", "<unk>", "<0x00>"]
    assert [path.name for path in tmp_path.iterdir()] == ["again.model"]


def test_of_more_texts_some_are_drawn_and_none_is_kept(tmp_path):
    """One half of the texts has a "g", the other a "z"."""
    alive = [0]

    class Text(str):
        def __init__(self, *_):
            alive[0] += 1

        def __del__(self):
            alive[0] -= 1

        def lower(self):
            assert alive[0] < 100  # a list of all would hold them
            return super().lower()

    def texts():
        return (Text(f"a dog on {n} roads" if n < 5000 else f"zebra number {n}") for n in range(10_000))

    for name in "ab":
        train_tokenizer(texts(), tmp_path / name, vocab_size=310, max_texts=500, threads=2)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    processor = SentencePieceTokenizer(tmp_path / "a")._processor
    letters = set("".join(processor.id_to_piece(n) for n in range(259, 310)))
    assert {"g", "z"} <= letters


def test_a_limit_that_is_not_reached_changes_nothing(tmp_path):
    texts = [f"a dog on {n} roads" for n in range(2000)]
    for name, limit in (("a", 2000), ("b", 10**6)):
        train_tokenizer(texts, tmp_path / name, vocab_size=300, max_texts=limit)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_reading_the_texts_raises_is_raised(tmp_path):
    def texts():
        yield "a dog"
        raise ShardLost("shard a.tar vanished")

    with pytest.raises(ShardLost, match="^shard a.tar vanished$"):
        train_tokenizer(texts(), tmp_path / "x.model", vocab_size=300)
    assert not list(tmp_path.iterdir())


def test_pickles(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert (copy.encode("dog", 8) == tokenizer.encode("dog", 8)).all()


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at .*siglip data tokenizer"):
        SentencePieceTokenizer(tmp_path / "none.model")
    (tmp_path / "text.model").write_text("not a model")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        SentencePieceTokenizer(tmp_path / "text.model")
    (tmp_path / "empty.model").write_bytes(b"")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        SentencePieceTokenizer(tmp_path / "empty.model")


def test_bad_training(tmp_path):
    with pytest.raises(ValueError, match="no texts"):
        train_tokenizer([], tmp_path / "x.model", vocab_size=300)
    with pytest.raises(ValueError, match="vocab_size=100000 does not fit 1 texts"):
        train_tokenizer(["a dog"], tmp_path / "x.model", vocab_size=100_000)
    with pytest.raises(ValueError, match="vocab_size=20 does not fit 1 texts: Vocabulary size is smaller"):
        train_tokenizer(["a dog"], tmp_path / "x.model", vocab_size=20)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_tensorflow_text_agrees(tokenizer):
    text = pytest.importorskip("tensorflow_text")
    captions = list(iter_captions(TarSource(SAMPLE_TRAIN)))[::20]
    with open(SPIECE, "rb") as file:
        theirs = text.SentencepieceTokenizer(file.read(), add_eos=True)
    ids = theirs.tokenize([caption.lower() for caption in captions]).to_list()
    for caption, expected in zip(captions, ids, strict=True):
        assert tokenizer.encode(caption, len(expected)).tolist() == expected


def model_with_table(path, units: list[int], text: bytes = b"x"):
    """The shipped model with another table of normalisation."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(Path(SPIECE).read_bytes())
    array = np.array(units, "<u4").tobytes()
    proto.normalizer_spec.precompiled_charsmap = len(array).to_bytes(4, "little") + array + text + b"\0"
    path.write_bytes(proto.SerializeToString())
    return path


def test_a_table_that_runs_in_circles_is_refused(tmp_path):
    units = [0] * 256
    units[0], units[96] = 1 << 10, 97 << 10 | 97  # "a" leads back to the place that it was read at
    with pytest.raises(UserError, match="a.model' is damaged: its normalisation table runs in circles"):
        SentencePieceTokenizer(model_with_table(tmp_path / "a.model", units))
    units[96] = 2 << 10 | 1 << 8 | 97  # "a" becomes "x"
    units[96 ^ 2] = 1 << 31
    tokenizer = SentencePieceTokenizer(model_with_table(tmp_path / "a.model", units))
    assert (tokenizer.encode("a a", 8) == tokenizer.encode("x x", 8)).all()
    with pytest.raises(UserError, match="has a text of more than 256 bytes"):
        SentencePieceTokenizer(model_with_table(tmp_path / "a.model", units, b"x" * 100_000))


def test_the_end_of_an_endless_text_costs_nothing(tokenizer):
    text = "a dog and a cat " * 1000
    assert (tokenizer.encode(text * 2000, 8) == tokenizer.encode(text, 8)).all()
    assert (tokenizer.encode("half \ud83d", 8) == tokenizer.encode("half", 8)).all()
