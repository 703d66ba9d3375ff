"""The stream: the same pairs whatever the processes, workers and threads; resume; substitutes; evaluation."""

import itertools
import json
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.augment import AugmentConfig, apply_flip, apply_gain, draw_box, draw_flip
from data_pipelines.counter_rng import Draws
from data_pipelines.errors import UserError
from data_pipelines.loader import DataConfig, make_eval_batches, make_loader
from data_pipelines.order.mixture import SourceConfig
from data_pipelines.samples.pixels import Pixels
from data_pipelines.samples.reading import open_config
from data_pipelines.sources.webdataset import TarSource
from data_pipelines.tokenizers import SentencePieceTokenizer
from tests.data_pipelines.shards import SAMPLE, SPIECE, encode, write_pairs, write_tar
from tests.data_pipelines.streams import AUGMENT, SAMPLE_CONFIG, SHAPES, assert_same, config_of, take


def test_a_batch():
    (batch,), loader = take(SAMPLE_CONFIG, 1, image_size=(8, 12))
    assert set(batch) == {"image", "text", "key"}
    assert batch["image"].shape == (8, 8, 12, 3) and batch["image"].dtype == np.uint8
    assert batch["text"].shape == (8, 8) and batch["text"].dtype == np.int32 and (batch["text"][:, -1] == 1).all()
    assert len(batch["key"]) == 8 and all(isinstance(key, str) for key in batch["key"])
    assert loader.counts == {} and loader.state()["position"] == 1
    json.dumps(loader.state())


def test_an_epoch_holds_every_pair_once(shards):
    batches, _ = take(config_of(shards / "*.tar"), 21, batch_size=4)
    keys = [key for batch in batches for key in batch["key"]]
    assert len(set(keys[:42])) == len(set(keys[42:])) == 42 and keys[:42] != keys[42:]


def test_image_and_caption_stay_together(shards):
    batches, _ = take(config_of(shards / "*.tar"), 5)
    source = {pair.key: pair for pair in TarSource(str(shards / "*.tar"))}
    tokenizer = SentencePieceTokenizer(SPIECE)
    for batch in batches:
        for image, text, key in zip(batch["image"], batch["text"], batch["key"], strict=True):
            assert image[0, 0].tolist() == [int(key) % 256, int(key) // 256, 7]
            assert (text == tokenizer.encode(source[key].fields["txt"], 8)).all()


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_each_global_batch(process_count):
    whole, _ = take(SAMPLE_CONFIG, 3)
    parts = [
        take(SAMPLE_CONFIG, 3, process_index=index, process_count=process_count)[0] for index in range(process_count)
    ]
    for step in range(3):
        split = {
            key: (image.tobytes(), text.tobytes())
            for part in parts
            for key, image, text in zip(*(part[step][name] for name in ("key", "image", "text")), strict=True)
        }
        batch = whole[step]
        assert {
            key: (i.tobytes(), t.tobytes()) for key, i, t in zip(*map(batch.get, ("key", "image", "text")), strict=True)
        } == split


def test_threads_prefetch_and_cache_change_nothing():
    reference, _ = take(replace(SAMPLE_CONFIG, threads=1, prefetch=1, cache_bytes=0), 6)
    assert_same(take(replace(SAMPLE_CONFIG, threads=4, prefetch=8), 6)[0], reference)
    assert_same(take(replace(SAMPLE_CONFIG, cache_bytes=200_000), 6)[0], reference)


@pytest.mark.slow
def test_workers_change_nothing():
    reference, _ = take(SAMPLE_CONFIG, 7)
    assert_same(take(replace(SAMPLE_CONFIG, workers=2, threads=1), 7)[0], reference)
    assert_same(take(replace(SAMPLE_CONFIG, workers=2, threads=1), 4, position=3)[0], reference[3:])


def test_position_by_arithmetic_equals_replay():
    replay, _ = take(SAMPLE_CONFIG, 9)
    assert_same(take(SAMPLE_CONFIG, 2, position=7)[0], replay[7:])
    (far,), loader = take(SAMPLE_CONFIG, 1, position=10**9)
    assert len(far["key"]) == 8 and loader.state()["position"] == 10**9 + 1


def test_resume_goes_on_where_it_stopped():
    replay, loader = take(SAMPLE_CONFIG, 5)
    state = json.loads(json.dumps(loader.state()))
    assert_same(list(itertools.islice(loader, 2)), take(SAMPLE_CONFIG, 7)[0][5:])  # after close() as well
    resumed = make_loader(replace(SAMPLE_CONFIG, threads=1), **SHAPES)
    next(resumed)
    resumed.restore(state)
    following = list(itertools.islice(resumed, 2))
    assert resumed.state() == state | {"position": 7}
    resumed.close()
    loader.close()
    assert_same(following, take(SAMPLE_CONFIG, 7)[0][5:])


@pytest.mark.parametrize("change, name", [({"seed": 1}, "seed"), ({"batch_size": 16}, "batch_size")])
def test_a_state_of_another_stream_is_refused(change, name):
    state = make_loader(SAMPLE_CONFIG, **SHAPES).state()
    with pytest.raises(ValueError, match=f"saved with {name}="):
        make_loader(SAMPLE_CONFIG, **(SHAPES | change)).restore(state)


def test_a_state_of_other_data_is_refused(shards):
    state = make_loader(config_of(shards / "a.tar"), **SHAPES).state()
    told = (
        r"the data changed since this run was saved \(was: a.tar, 13 pairs; now: a.tar … b.tar, 42 pairs\); resume with"
    )
    with pytest.raises(ValueError, match=told):
        make_loader(config_of(shards / "*.tar"), **SHAPES).restore(state)


def test_sources_are_mixed_by_weight(shards):
    sources = (SourceConfig(str(shards / "a.tar"), weight=3.0), SourceConfig(str(shards / "b.tar"), weight=1.0))
    batches, _ = take(DataConfig(sources, SPIECE), 20)
    for batch in batches:
        assert abs(sum(int(key) < 100 for key in batch["key"]) - 6) <= 1


@pytest.fixture
def broken(tmp_path):
    """40 pairs, six of them broken in six ways."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    images = {
        3: b"<html>",
        7: encode(noise, "JPEG")[:700],
        11: b"",
        15: None,
        19: encode(np.zeros((64, 64), np.uint8)),
    }
    shard = write_pairs(tmp_path / "broken.tar", 40, broken=images)
    pairs = {pair.key: pair for pair in TarSource(shard)}
    members = {f"{key}.txt": pair.fields["txt"].encode() for key, pair in pairs.items()}
    members |= {f"{key}.png": pair.image for key, pair in pairs.items() if pair.image is not None}
    members["000023.txt"] = b" "
    return write_tar(shard, members)


REASONS = ["not_an_image", "truncated", "empty_image", "missing_image", "bomb", "empty_text"]


def test_broken_pairs_are_replaced_and_counted(broken):
    config = config_of(broken, max_image_pixels=1000)
    batches, loader = take(config, 10)  # two epochs
    keys = [key for batch in batches for key in batch["key"]]
    assert loader.counts == dict.fromkeys(REASONS, 2)
    assert not {int(key) for key in keys} & {3, 7, 11, 15, 19, 23}
    assert_same(take(replace(config, threads=1, prefetch=1), 10)[0], batches)
    assert_same(take(config, 5, position=5)[0], batches[5:])


def test_counts_are_of_what_was_handed_out(broken):
    loader = make_loader(config_of(broken, max_image_pixels=1000, prefetch=8), **SHAPES)
    assert loader.counts == {}
    totals = []
    for _ in range(5):
        next(loader)
        totals.append(sum(loader.counts.values()))
    loader.close()
    assert totals == sorted(totals) and totals[-1] == 6
    resumed = make_loader(config_of(broken, max_image_pixels=1000), **SHAPES)
    resumed.restore(loader.state())
    assert resumed.counts == loader.counts


def test_counts_of_processes_add_up(broken):
    config = config_of(broken, max_image_pixels=1000)
    loaders = [take(config, 5, process_index=index, process_count=2)[1] for index in range(2)]
    assert loaders[0].counts + loaders[1].counts == dict.fromkeys(REASONS, 1)


def test_a_source_without_usable_pairs_stops(shards):
    sources = (SourceConfig(str(shards / "a.tar"), captions=(("captions.sw", 1.0),)),)
    loader = make_loader(DataConfig(sources, SPIECE), **SHAPES)
    told = "field 'captions.sw' is in none of the first 13 pairs of '.*a.tar'; they have captions.en, txt; set data.sources.0"
    with pytest.raises(UserError, match=told):
        next(loader)
    loader.close()
    write_pairs(shards / "broken.tar", 9, broken=dict.fromkeys(range(9), b"<html>"))
    loader = make_loader(config_of(shards / "broken.tar"), **SHAPES)
    with pytest.raises(
        UserError, match="100 pairs drawn from '.*broken.tar' cannot be used, the first for 'not_an_image'"
    ):
        next(loader)
    loader.close()


def test_bad_configs(shards, tmp_path):
    config = config_of(shards / "a.tar")
    with pytest.raises(ValueError, match="batch_size=9 does not divide over 2 processes"):
        make_loader(config, **(SHAPES | {"batch_size": 9}), process_count=2)
    with pytest.raises(ValueError, match="text_length=0"):
        make_loader(config, **(SHAPES | {"text_length": 0}))
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        make_loader(replace(config, tokenizer=str(tmp_path / "none.model")), **SHAPES)
    with pytest.raises(FileNotFoundError, match="no shard at"):
        make_loader(config_of(tmp_path / "none.tar"), **SHAPES)
    for field, value in [
        ("workers", -1),
        ("threads", 0),
        ("prefetch", 0),
        ("sources", ()),
        ("max_image_pixels", 1 << 30),
    ]:
        with pytest.raises(ValueError, match=f"data.{field}"):
            replace(config, **{field: value})
    for field, value in [("scale", (1.2, 0.8)), ("scale", (0.0, 1.0)), ("shift", -0.1), ("color", 9.0)]:
        with pytest.raises(ValueError, match=f"augment.{field}"):
            AugmentConfig(**{field: value})


def test_the_config_is_read_without_grain_pillow_and_sentencepiece():
    script = (
        "import sys\n"
        "for name in ('grain', 'PIL', 'sentencepiece', 'tensorflow', 'absl', 'jax'): sys.modules[name] = None\n"
        "from data_pipelines.loader import AugmentConfig, DataConfig, SourceConfig\n"
        "DataConfig((SourceConfig('a.tar'),), 'spiece.model', augment=AugmentConfig())\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=SAMPLE.parents[1])


def test_boxes_and_gains():
    plain = AugmentConfig()
    assert draw_box(plain, (30, 20), Draws(0)) == (0, 0, 30, 20)
    for seed in range(200):
        left, top, right, bottom = draw_box(AUGMENT, (100, 100), Draws(seed))
        side = ((right - left) * (bottom - top)) ** 0.5
        assert 70 <= side <= 130 and abs(np.log((right - left) / (bottom - top))) <= 0.1
        assert abs((left + right) / 2 - 50) <= 10 and abs((top + bottom) / 2 - 50) <= 10
    image = np.array([[[0, 100, 200]]], np.uint8)
    assert apply_gain(image, (2.0, 1.25, 1.5)).tolist() == [[[0, 125, 255]]]
    assert (apply_gain(image, (1.0, 1.0, 1.0)) == image).all()


def test_flips():
    image = np.arange(1 * 3 * 3, dtype=np.uint8).reshape(1, 3, 3)
    assert (apply_flip(image, True)[0] == image[0, ::-1]).all() and apply_flip(image, False) is image
    flips = [draw_flip(AugmentConfig(flip=0.25), Draws(seed)) for seed in range(2000)]
    assert abs(sum(flips) - 500) < 80 and not draw_flip(AugmentConfig(), Draws(0))


def test_evaluation_sees_every_pair_once_in_order():
    source = TarSource(SAMPLE / "emoji-heldout-00000.tar")
    batches = list(make_eval_batches(source, batch_size=100, image_size=(8, 8)))
    assert [len(batch["key"]) for batch in batches] == [100, 100, 100, 12]
    assert [key for batch in batches for key in batch["key"]] == [pair.key for pair in source]
    assert batches[0]["image"].shape == (100, 8, 8, 3) and batches[0]["fields"][0] == source[0].fields


def test_processes_share_an_evaluation(broken):
    source = TarSource(broken)
    whole = make_eval_batches(source, batch_size=10, image_size=(4, 4), max_image_pixels=1000)
    every = [(index, key) for batch in whole for index, key in zip(batch["index"], batch["key"], strict=True)]
    shares = [
        make_eval_batches(
            source, batch_size=10, image_size=(4, 4), max_image_pixels=1000, process_index=i, process_count=3
        )
        for i in range(3)
    ]
    parts = [[(i, k) for b in share for i, k in zip(b["index"], b["key"], strict=True)] for share in shares]
    assert sorted(sum(parts, [])) == every and all(index % 3 == n for n, part in enumerate(parts) for index, _ in part)
    assert sum((share.counts for share in shares), whole.counts - whole.counts) == whole.counts


def test_evaluation_leaves_out_and_counts_what_does_not_decode(broken):
    batches = make_eval_batches(TarSource(broken), batch_size=10, image_size=(4, 4), max_image_pixels=1000)
    for _ in range(2):
        assert [len(batch["key"]) for batch in batches] == [10, 10, 10, 5]
        assert batches.counts == dict.fromkeys(REASONS[:5], 1)
    with pytest.raises(ValueError, match="batch_size=0"):
        make_eval_batches(TarSource(broken), batch_size=0, image_size=(4, 4))


def test_evaluation_by_workers_or_threads_and_with_fewer_fields(broken):
    source = TarSource(broken)
    shape = {"batch_size": 7, "image_size": (4, 4), "max_image_pixels": 1000}
    whole = list(make_eval_batches(source, threads=1, **shape))
    for options in ({}, {"threads": 3}, {"workers": 2}, {"workers": 1, "threads": 2, "fields": ("txt",)}):
        batches = make_eval_batches(source, **shape, **options)
        for batch, expected in zip(batches, whole, strict=True):
            assert (batch["image"] == expected["image"]).all()
            assert batch["key"] == expected["key"] and batch["index"] == expected["index"]
            told = [{"txt": it["txt"]} for it in expected["fields"]] if "fields" in options else expected["fields"]
            assert batch["fields"] == told
        assert batches.counts == dict.fromkeys(REASONS[:5], 1)
    assert next(iter(make_eval_batches(source, fields=(), **shape)))["fields"][0] == {}
    iterator = iter(make_eval_batches(source, workers=1, **shape))
    next(iterator)
    iterator.close()  # leaves no process: pytest would wait for it


def test_scaled_jpegs_are_the_same_stream_of_nearly_the_same_pixels(tmp_path):
    y, x = np.mgrid[:160, :160] / 160
    members = {}
    for number in range(12):
        image = (255 * np.stack([x, y, 0.5 + 0.5 * np.sin(number * x)], axis=-1)).astype(np.uint8)
        members |= {f"{number:03d}.jpg": encode(image, "JPEG", quality=95), f"{number:03d}.txt": b"a slope"}
    config = replace(config_of(write_tar(tmp_path / "large.tar", members)), augment=AUGMENT)
    full, _ = take(config, 3, image_size=(16, 16))
    scaled, loader = take(replace(config, jpeg_scaling=True), 3, image_size=(16, 16))
    cached = loader._batches.cache
    assert {pair.pixels.shape for pair in cached._kept.values()} == {(40, 40, 3)}  # at least 16 / 0.7 * exp(0.05)
    for one, other in zip(full, scaled, strict=True):
        assert one["key"] == other["key"] and (one["text"] == other["text"]).all()
        off = np.abs(one["image"].astype(int) - other["image"])
        assert 0 < off.max() and off.mean() < 3
    assert Pixels((16, 16), AUGMENT).min_decoded_px == (25, 25) and Pixels((16, 20)).min_decoded_px == (16, 20)


def test_a_source_names_its_image_column(tmp_path):
    table = pa.table({"first": [b"1"] * 2, "second": [b"2"] * 2, "txt": ["a", "b"]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no column with images"):
        open_config(SourceConfig(str(tmp_path / "a.parquet")))
    assert open_config(SourceConfig(str(tmp_path / "a.parquet"), image="second"))[0].image == b"2"


@pytest.mark.parametrize("workers", [0, 1])
def test_texts_of_several_lines_are_told_once(tmp_path, workers):
    """As CLIP_benchmark writes several captions. Under `txt` they are one; `txt.*` draws a line, of which nothing is told."""
    image = encode(np.zeros((8, 8, 3), np.uint8))
    members = [
        (f"{n}.{kind}", data) for n in range(8) for kind, data in (("png", image), ("txt", b"red\nblue" * (n % 2)))
    ]
    members = [(name, data or b"red") for name, data in members]
    shard = str(write_tar(tmp_path / "a.tar", members))
    with pytest.warns(UserWarning, match=r"4 of 8 captions of a batch have several lines.* 'txt\.\*'") as told:
        both, _ = take(config_of(shard, workers=workers), 3)
    assert sum("several lines" in str(warning.message) for warning in told) == 1 and set(both[0]) == {
        "image",
        "text",
        "key",
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*several lines")
        take(config_of(shard, workers=workers), 1, process_index=1, process_count=2)  # the first process has told it
        drawn, _ = take(DataConfig((SourceConfig(shard, captions=(("txt.*", 1.0),)),), SPIECE, workers=workers), 4)
    tokenizer = SentencePieceTokenizer(SPIECE)
    lines = {tuple(tokenizer.encode(line, 8)) for line in ("red", "blue")}
    assert {tuple(text) for batch in drawn for text in batch["text"]} == lines
    assert {tuple(text) for batch in both for text in batch["text"]} == {
        tuple(tokenizer.encode(text, 8)) for text in ("red", "red\nblue")
    }
