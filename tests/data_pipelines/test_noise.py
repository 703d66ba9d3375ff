"""Corruptions come as often as asked, the same everywhere, and more of them contain fewer."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import sample
from data_pipelines.samples import noise
from data_pipelines.samples.noise import NoiseConfig
from data_pipelines.tokenizers import SentencePieceTokenizer

POSITIONS = np.arange(10**9, 10**9 + 20_000)


@pytest.mark.parametrize("field, pick", [("image", noise.noisy_images), ("text", noise.noisy_texts)])
def test_the_share_is_the_asked_one_and_grows_by_adding(field, pick):
    half, third = (pick(NoiseConfig(**{field: share}), POSITIONS, seed=3) for share in (0.5, 0.3))
    assert abs(half.mean() - 0.5) < 0.02 and abs(third.mean() - 0.3) < 0.02
    assert (half | ~third).all()
    assert (pick(NoiseConfig(**{field: 0.5}), POSITIONS[77:90], seed=3) == half[77:90]).all()
    assert (
        not pick(NoiseConfig(), POSITIONS, seed=3).any() and pick(NoiseConfig(**{field: 1.0}), POSITIONS, seed=3).all()
    )
    assert (pick(NoiseConfig(**{field: 0.5}), POSITIONS, seed=4) != half).mean() > 0.4


def test_corruptions_are_independent():
    config = NoiseConfig(0.5, 0.5, 0.5)
    moved = noise.text_positions(config, range(10**9, 10**9 + 20_000), seed=0) != POSITIONS
    drawn = [pick(config, POSITIONS, seed=0) for pick in (noise.noisy_images, noise.noisy_texts)] + [moved]
    assert np.abs(np.corrcoef(drawn) - np.eye(3)).max() < 0.03


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.floats(0, 1), st.integers(0, 9), st.integers(0, 10**9))
def test_texts_go_round_and_none_keeps_its_own(size, share, seed, batch):
    positions = range(batch * size, (batch + 1) * size)
    shown = noise.text_positions(NoiseConfig(alignment=share), positions, seed=seed)
    assert sorted(shown.tolist()) == list(positions)
    moved = noise._uniform(np.array(positions), seed, noise._ALIGNMENT_STREAM) < share
    if moved.sum() != 1:
        assert ((shown != np.array(positions)) == moved).all()


def test_images_and_tokens_of_noise():
    image = noise.random_image(5, (30, 40), seed=0)
    assert image.shape == (30, 40, 3) and image.dtype == np.uint8 and 120 < image.mean() < 135
    assert (image == noise.random_image(5, (30, 40), seed=0)).all()
    assert (image != noise.random_image(6, (30, 40), seed=0)).any()
    tokenizer = SentencePieceTokenizer(Path(sample.__file__).parent / "spiece.model")
    drawn = [noise.random_ids(n, 16, vocab_size=1000, seed=0) for n in range(3000)]
    tokens = np.stack([tokenizer.padded(ids, 16) for ids in drawn])
    assert tokens.dtype == np.int32 and tokens.min() >= 0 and tokens.max() < 1000 and (tokens[:, -1] == 1).all()
    lengths = (tokens != 1).sum(1)
    assert lengths.min() <= 1 and lengths.max() == 15 and 7 < lengths.mean() < 9
    assert tokenizer.padded(noise.random_ids(0, 1, vocab_size=1000, seed=0), 1).tolist() == [1]


@pytest.mark.parametrize("field", ["image", "text", "alignment"])
def test_nonsense_shares(field):
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"data.noise.{field}=.* is a share"):
            NoiseConfig(**{field: share})
