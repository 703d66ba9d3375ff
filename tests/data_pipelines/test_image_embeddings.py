"""Embeddings on disk: whole parts or none, and a stream that is the same with them as with images."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.image_embeddings import ImageEmbeddings, make_key, open_image_embeddings
from data_pipelines.loader import DataConfig, make_loader
from data_pipelines.order.mixture import SourceConfig
from data_pipelines.sources.webdataset import TarSource
from tests.data_pipelines.shards import SPIECE, encode, write_pairs

SHAPES = {"batch_size": 8, "image_size": (4, 4), "text_length": 8, "seed": 0}
WIDTH = 5


def open_small(folder: Path, pairs: int = 13, part_pairs: int = 4) -> ImageEmbeddings:
    return open_image_embeddings(folder, pairs=pairs, width=WIDTH, about={"tower": "x"}, part_pairs=part_pairs)


def rows_of(store: ImageEmbeddings, part: int) -> np.ndarray:
    return np.array([[record] * WIDTH for record in store.records(part)], np.float32)


def test_parts_are_written_found_and_read(tmp_path):
    store = open_small(tmp_path / "a" / "b")
    assert store.parts == 4 and [len(store.records(part)) for part in range(5)] == [4, 4, 4, 1, 0]
    assert store.missing() == [0, 1, 2, 3]
    for part in (3, 1):
        store.write(part, rows_of(store, part), {5: "truncated"} if part == 1 else {})
    again = pickle.loads(pickle.dumps(open_small(tmp_path / "a" / "b", part_pairs=999)))
    assert again == store and again.missing() == [0, 2]
    assert again.get(5) == "truncated" and again.count_broken() == {"truncated": 1}
    for record in (4, 6, 7, 12):
        assert again.get(record).tolist() == [record] * WIDTH and again.get(record).dtype == np.float32
    assert json.loads((tmp_path / "a/b/meta.json").read_text())["tower"] == "x"


def test_a_small_source_is_one_part(tmp_path):
    assert open_small(tmp_path, pairs=3, part_pairs=100).part_pairs == 3


def test_half_a_part_is_none(tmp_path, monkeypatch):
    store = open_small(tmp_path)
    store.write(0, rows_of(store, 0), {})
    file = tmp_path / "00000.npy"
    file.write_bytes(file.read_bytes()[:-20])  # what a crash of the machine may leave
    assert store.missing() == [0, 1, 2, 3]
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        store.write(1, rows_of(store, 1), {})
    assert not list(tmp_path.glob(".*")) and store.missing() == [0, 1, 2, 3]


def test_what_killed_processes_left_is_swept_up(tmp_path):
    store = open_small(tmp_path)
    (tmp_path / ".00001.npy.abc.partial").write_bytes(b"half")
    store.sweep()
    assert [path.name for path in tmp_path.iterdir()] == ["meta.json"]


def test_a_folder_of_other_pairs_or_a_damaged_one_is_refused(tmp_path):
    open_small(tmp_path)
    with pytest.raises(
        ValueError, match="describes 13 pairs and embeddings of width 5, but there are 14 of 5; remove that"
    ):
        open_small(tmp_path, pairs=14)
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(ValueError, match="meta.json is damaged .*; remove that folder"):
        open_small(tmp_path)


def test_the_key_covers_all_that_embeddings_depend_on(tmp_path):
    sources = [TarSource(write_pairs(tmp_path / f"{n}.tar", n)) for n in (3, 4)]
    base = {"tower": "a", "source": sources[0], "image_size": (4, 4), "max_image_pixels": 9}
    changes = ({}, {"tower": "b"}, {"source": sources[1]}, {"image_size": (4, 5)}, {"max_image_pixels": 8})
    keys = {make_key(**(base | change)) for change in changes}
    assert len(keys) == len(changes) and make_key(**base) in keys


BROKEN = {3: b"no picture", 7: encode(np.zeros((4, 4, 3), np.uint8))[:30], 11: b"", 15: None}


@pytest.fixture
def config(tmp_path) -> DataConfig:
    """Two sources; four images of the first are broken."""
    write_pairs(tmp_path / "a.tar", 29, broken=BROKEN)
    write_pairs(tmp_path / "b.tar", 10, first=100)
    sources = tuple(SourceConfig(str(tmp_path / name), weight) for name, weight in (("a.tar", 2.0), ("b.tar", 1.0)))
    return DataConfig(sources, SPIECE)


def first_pixels(images: np.ndarray) -> np.ndarray:
    """An embedding that tells which image it is of."""
    return images[:, 0, 0].astype(np.float32)


def compute(loader, folder: Path, *, rows: int, part_pairs: int = 8) -> list[ImageEmbeddings]:
    """What training does, with `first_pixels` as the tower."""
    stores = []
    for index, source in enumerate(loader.sources):
        store = open_image_embeddings(folder / str(index), pairs=len(source), width=3, about={}, part_pairs=part_pairs)
        parts = store.missing()
        batches = list(loader.part_images(index, store, parts, rows=rows))
        each = -(-store.part_pairs // rows)
        assert len(batches) == each * len(parts)
        for n, part in enumerate(parts):
            own = batches[n * each : (n + 1) * each]
            broken = {record: reason for batch in own for record, reason in batch["broken"].items()}
            store.write(part, np.concatenate([first_pixels(batch["image"]) for batch in own]), broken)
        stores.append(store)
    return stores


def take(loader, count: int) -> list[dict]:
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


def assert_same_stream(with_images: list[dict], with_embeddings: list[dict]) -> None:
    for one, other in zip(with_images, with_embeddings, strict=True):
        assert one["key"] == other["key"] and "image" not in other
        np.testing.assert_array_equal(one["text"], other["text"])
        np.testing.assert_array_equal(first_pixels(one["image"]), other["zimg"])


def test_the_same_pairs_captions_and_substitutes_as_with_images(config, tmp_path):
    images, embeddings = make_loader(config, **SHAPES), make_loader(config, **SHAPES)
    stores = compute(embeddings, tmp_path / "store", rows=3)
    assert stores[0].count_broken() == {"not_an_image": 1, "corrupt_image": 1, "empty_image": 1, "missing_image": 1}
    embeddings.use_image_embeddings(stores)
    assert_same_stream(take(images, 12), take(embeddings, 12))
    assert images.counts == embeddings.counts and sum(images.counts.values()) > 4
    # The position is the same one: either goes on from where the other stopped.
    later = make_loader(config, **SHAPES)
    later.restore(json.loads(json.dumps(images.state())))
    assert_same_stream(take(later, 3), take(embeddings, 3))


def test_no_image_is_decoded(config, tmp_path, monkeypatch):
    from data_pipelines.samples.pairs import ImageDecoder

    loader = make_loader(config, **SHAPES)
    loader.use_image_embeddings(compute(loader, tmp_path / "store", rows=4))
    monkeypatch.setattr(ImageDecoder, "decode", lambda *_: pytest.fail("an image was decoded"))
    assert len(take(loader, 6)) == 6


@pytest.mark.slow
def test_workers_read_the_same(config, tmp_path):
    loader = make_loader(replace(config, workers=2, threads=1), **SHAPES)
    stores = compute(loader, tmp_path / "store", rows=3)
    loader.use_image_embeddings(stores)
    assert_same_stream(take(make_loader(config, **SHAPES), 4), take(loader, 4))
