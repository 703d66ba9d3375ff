"""Curation with a model: scores, shares of the best, evaluation images found by their embeddings."""

import os

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_pipelines.curate.config import CurateConfig
from data_pipelines.curate.engine import LocalEngine
from data_pipelines.curate.run import curate
from data_pipelines.samples.pixels import Pixels
from data_pipelines.sources.webdataset import TarSource
from tests.data_pipelines.shards import SAMPLE, encode, write_pairs, write_tar


class ColourScorer:
    """Embeds an image by its colour, a caption by the number in it: a model whose scores can be worked out by hand."""

    pixels = Pixels((4, 4))
    fingerprint = "colour"

    def embed_images(self, images):
        angle = images["image"][:, 0, 0, 0].astype(np.float32) / 64
        return np.stack([np.cos(angle), np.sin(angle)], axis=1)

    def embed_texts(self, texts):
        angle = np.array([int(text.split()[-1]) for text in texts], np.float32) / 64
        return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def test_scores_shares_and_leaks_by_embedding(tmp_path):
    members = {}
    for number in range(40):  # every fourth caption belongs to another image
        members[f"{number:06d}.png"] = encode(np.full((4, 4, 3), number, np.uint8))
        members[f"{number:06d}.txt"] = f"caption {number if number % 4 else number + 50}".encode()
    shards = str(write_tar(tmp_path / "a.tar", members))
    held = write_tar(tmp_path / "held.tar", {name: data for name, data in members.items() if name >= "000038"})
    config = CurateConfig(min_side_px=1, top_share=0.5, duplicates="off", leak_similarity=0.99999)
    curate(shards, tmp_path / "out", config=config, engine=LocalEngine(1), scorer=ColourScorer(), against=str(held))
    rows = pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    scored = ColourScorer()
    for number, row in enumerate(rows):
        image = np.full((1, 4, 4, 3), number, np.uint8)
        expected = scored.embed_images({"image": image}) @ scored.embed_texts([row["caption"]]).T
        assert row["score"] == pytest.approx(expected.item(), abs=1e-6)
    assert ["eval_leak_embedding" in row["reasons"] for row in rows[-3:]] == [False, True, True]
    for language in {row["language"] for row in rows}:
        left = [row for row in rows if row["language"] == language and "eval_leak_embedding" not in row["reasons"]]
        ranked = sorted((row["score"] for row in left), reverse=True)
        least = ranked[max(1, round(len(left) / 2)) - 1] if left else 0
        assert all(("low_score" in row["reasons"]) == (row["score"] < least) for row in left)


class Undiscerning(ColourScorer):
    """To whom all images are alike."""

    def embed_images(self, images):
        return super().embed_images({"image": np.zeros_like(images["image"])})


def test_an_embedding_proposes_a_leak_and_pixels_decide(tmp_path):
    source = TarSource(SAMPLE / "emoji-heldout-00000.tar")
    members = [
        (f"{n:03d}.{suffix}", data)
        for n in range(6)
        for suffix, data in (("png", source[n].image), ("txt", b"caption 7"))
    ]
    shard = str(write_tar(tmp_path / "a.tar", members))
    config = CurateConfig(duplicates="off", duplicate_bits=0)
    for shown in (2, 4):  # one evaluation set after the other, under one name and in one process
        held = write_tar(tmp_path / "held.tar", [("0.png", source[shown].image), ("0.txt", b"caption 7")])
        os.utime(held, ns=(shown, shown))
        curate(shard, tmp_path / "out", config=config, engine=LocalEngine(1), scorer=Undiscerning(), against=str(held))
        rows = pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
        assert [n for n, row in enumerate(rows) if "eval_leak_embedding" in row["reasons"]] == [shown]
        assert min(row["leak_similarity"] for row in rows) > 0.99


def test_what_was_not_read_is_scored_when_it_is(tmp_path, monkeypatch):
    shard = str(write_pairs(tmp_path / "a.tar", 5))
    TarSource(shard)
    config, pread = CurateConfig(min_side_px=1, duplicates="off"), os.pread
    for failing in (True, False):
        with monkeypatch.context() as patched:
            if failing:
                patched.setattr(os, "pread", lambda fd, size, at: os.close(-1) if at == 512 else pread(fd, size, at))
            curate(shard, tmp_path / "out", config=config, engine=LocalEngine(1), scorer=ColourScorer())
        rows = pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
        assert [row["reason"] for row in rows] == ["unreadable" if failing else None] + [None] * 4
        assert [np.isnan(row["score"]) for row in rows] == [failing] + [False] * 4
