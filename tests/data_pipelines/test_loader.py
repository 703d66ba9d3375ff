"""The stream: the same pairs whatever the processes, workers and threads; resume; substitutes; evaluation."""

import collections
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shards import SAMPLE, SAMPLE_TRAIN, SPIECE, encode, write_pairs, write_tar

from data_pipelines.augment import AugmentConfig, apply_flip, apply_gain, draw_box, draw_flip
from data_pipelines.draws import Draws
from data_pipelines.loader import DataConfig, make_eval_batches, make_loader
from data_pipelines.mixture import SourceConfig
from data_pipelines.noise import NoiseConfig
from data_pipelines.order import BlockShuffle
from data_pipelines.sources.webdataset import TarSource

AUGMENT = AugmentConfig(scale=(0.7, 1.3), aspect=0.1, shift=0.1, brightness=0.1, color=0.1)
CAPTIONS = (("captions.en", 0.4), ("captions.en+keywords", 0.4), ("captions.*", 0.2))
SAMPLE_CONFIG = DataConfig((SourceConfig(SAMPLE_TRAIN, captions=CAPTIONS),), SPIECE, augment=AUGMENT)
SHAPES = {"batch_size": 8, "image_size": (8, 8), "text_length": 8, "seed": 0}


def take(config, count, **changes):
    """The first batches of a loader, and the loader, closed."""
    loader = make_loader(config, **(SHAPES | changes))
    batches = list(itertools.islice(loader, count))
    loader.close()
    return batches, loader


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one["key"] == other["key"]
        assert (one["image"] == other["image"]).all() and (one["text"] == other["text"]).all()


@pytest.fixture
def shards(tmp_path):
    """13 and 29 pairs."""
    write_pairs(tmp_path / "a.tar", 13)
    write_pairs(tmp_path / "b.tar", 29, first=100)
    return tmp_path


def config_of(*patterns, **changes):
    sources = tuple(SourceConfig(str(pattern)) for pattern in patterns)
    return replace(DataConfig(sources, SPIECE), **changes)


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


def test_picture_and_caption_stay_together(shards):
    batches, _ = take(config_of(shards / "*.tar"), 5)
    source = {pair.key: pair for pair in TarSource(str(shards / "*.tar"))}
    tokenizer = make_loader(config_of(shards / "a.tar"), **SHAPES)._batches.tokenizer
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
    with pytest.raises(ValueError, match="saved with fingerprint="):
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
    with pytest.raises(ValueError, match="'missing_text'.*captions.sw"):
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
    images = np.array([[[[0, 100, 200]]]], np.uint8)
    assert apply_gain(images, np.array([[2.0, 1.25, 1.5]])).tolist() == [[[[0, 125, 255]]]]
    assert (apply_gain(images, np.ones((1, 3))) == images).all()


def test_flips():
    images = np.arange(2 * 1 * 3 * 3, dtype=np.uint8).reshape(2, 1, 3, 3)
    mirrored = apply_flip(images, np.array([False, True]))
    assert (mirrored[0] == images[0]).all() and (mirrored[1, 0] == images[1, 0, ::-1]).all()
    assert apply_flip(images, np.zeros(2, bool)) is images
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


def keys_of(batches):
    return [key for batch in batches for key in batch["key"]]


def test_a_manifest_leaves_out_what_it_drops(shards):
    rows = [("a", 0, n) for n in range(13)] + [("b", 100, n) for n in range(29)]
    columns = {
        "shard": [str(shards / f"{name}.tar") for name, _, _ in rows],
        "index": [index for _, _, index in rows],
        "key": [f"{first + index:06d}" for _, first, index in rows],
        "keep": [index % 3 != 0 for _, _, index in rows],
    }
    pq.write_table(pa.table(columns), shards / "manifest.parquet")
    source = SourceConfig(str(shards / "*.tar"), manifest=str(shards / "manifest.parquet"))
    batches, loader = take(DataConfig((source,), SPIECE), 9, batch_size=6)
    kept = {key for key, keep in zip(columns["key"], columns["keep"], strict=True) if keep}
    keys = keys_of(batches)
    assert set(keys[:27]) == kept == set(keys[27:]) and len(kept) == 27
    assert loader.progress() == {"source_0/pairs": 54, "source_0/epochs": 2.0}
    with pytest.raises(ValueError, match="saved with fingerprint="):
        make_loader(config_of(shards / "*.tar"), **(SHAPES | {"batch_size": 6})).restore(loader.state())
    with pytest.raises(FileNotFoundError, match="no manifest at"):
        make_loader(replace(DataConfig((replace(source, manifest="none.parquet"),), SPIECE)), **SHAPES)


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_blocks_give_the_same_global_batches_and_neighbours_to_a_process(shards, process_count):
    config = config_of(shards / "*.tar", shuffle_blocks=BlockShuffle(block_pairs=6, open_blocks=3))
    whole, _ = take(config, 21, batch_size=4)
    parts = [
        take(config, 21, batch_size=4, process_index=index, process_count=process_count)[0]
        for index in range(process_count)
    ]
    for step, batch in enumerate(whole):
        assert sum((part[step]["key"] for part in parts), []) == batch["key"] == sorted(batch["key"])
    assert set(collections.Counter(keys_of(whole)).values()) == {2} and len(set(keys_of(whole))) == 42
    with pytest.raises(ValueError, match="saved with fingerprint="):
        make_loader(config_of(shards / "*.tar"), **SHAPES).restore(make_loader(config, **SHAPES).state())


def reweighted(config, *weights):
    return replace(config, sources=tuple(replace(s, weight=w) for s, w in zip(config.sources, weights, strict=True)))


def test_weights_may_change_at_a_resume(shards):
    config, seen, state = config_of(shards / "a.tar", shards / "b.tar"), [], None
    for weights in ((1.0, 1.0), (5.0, 1.0), (1.0, 3.0), (1.0, 3.0)):
        loader = make_loader(reweighted(config, *weights), **SHAPES)
        if state is not None:
            loader.restore(json.loads(json.dumps(state)))
        batches = list(itertools.islice(loader, 10))
        loader.close()
        share = sum(int(key) < 100 for key in keys_of(batches)) / 80
        assert abs(share - weights[0] / sum(weights)) < 0.03
        seen, state = seen + keys_of(batches), loader.state()
    for keys, size in (([k for k in seen if int(k) < 100], 13), ([k for k in seen if int(k) >= 100], 29)):
        for start in range(0, len(keys) - size + 1, size):
            assert len(set(keys[start : start + size])) == size
        index = 0 if size == 13 else 1
        progress = loader.progress()
        assert progress[f"source_{index}/pairs"] == len(keys)
        assert progress[f"source_{index}/epochs"] == pytest.approx(len(keys) / size)
    assert len(json.dumps(state)) < 400


histories = st.lists(
    st.tuples(
        st.integers(0, 5),  # batches until the next stop
        st.sampled_from([1, 2, 4]),  # processes
        st.integers(1, 3),  # threads
        st.tuples(st.sampled_from([0.5, 1.0, 4.0]), st.just(1.0)),  # weights
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(histories, st.sampled_from([None, BlockShuffle(5, 2)]))
def test_any_history_of_stops_hosts_and_threads_gives_one_stream(shards, history, blocks):
    config = config_of(shards / "a.tar", shards / "b.tar", shuffle_blocks=blocks, noise=NoiseConfig(0.3, 0.3, 0.5))
    done, state, one_state = [], None, None
    for count, process_count, threads, weights in history:
        changed = reweighted(replace(config, threads=threads), *weights)
        parts = []
        for index in range(process_count):
            loader = make_loader(changed, **SHAPES, process_index=index, process_count=process_count)
            if state is not None:
                loader.restore(state)
            parts.append(list(itertools.islice(loader, count)))
            loader.close()
        alone = make_loader(replace(changed, threads=1), **SHAPES)
        if one_state is not None:
            alone.restore(one_state)
        for step, batch in enumerate(itertools.islice(alone, count)):
            assert contents([part[step] for part in parts]) == contents([batch])
            done += batch["key"]
        alone.close()
        state, one_state = loader.state(), alone.state()
        assert state["mixture"] == one_state["mixture"] and state["position"] == one_state["position"]
    for first, size in ((0, 13), (100, 29)):  # Nothing lost, nothing twice: no pair is an epoch ahead of another.
        seen = collections.Counter(done)
        times = [seen[f"{first + number:06d}"] for number in range(size)]
        assert max(times) - min(times) <= 1


def contents(batches):
    rows = [zip(b["key"], b["image"], b["text"], strict=True) for b in batches]
    return sorted((key, image.tobytes(), text.tobytes()) for key, image, text in itertools.chain(*rows))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a data worker")
def test_killed_workers_change_nothing():
    reference, _ = take(SAMPLE_CONFIG, 12)
    loader = make_loader(replace(SAMPLE_CONFIG, workers=2, threads=1), **SHAPES)
    batches = []
    for batch in loader:
        batches.append(batch)
        if len(batches) in (2, 5):
            for pid in loader._iterator.pids:
                with contextlib.suppress(ProcessLookupError):  # One that was killed before and not yet missed.
                    os.kill(pid, signal.SIGKILL)
        if len(batches) == 12:
            break
    loader.close()
    assert_same(batches, reference)


@pytest.mark.slow
def test_workers_start_at_once_and_without_tensorflow_grain_and_jax():
    loader = make_loader(replace(SAMPLE_CONFIG, workers=1, threads=1), **SHAPES)
    next(loader)
    (pid,) = loader._iterator.pids
    libraries = Path(f"/proc/{pid}/maps").read_text()
    started = psutil.Process(pid).cpu_times()
    loader.close()
    assert "sentencepiece" in libraries and "numpy" in libraries
    assert not [name for name in ("tensorflow", "jaxlib", "grain", "torch") if f"/{name}/" in libraries]
    assert started.user + started.system < 2  # CPU seconds, with the first batches: the machine may be busy.


def test_noise_corrupts_the_asked_share_and_leaves_the_rest(shards):
    config = config_of(shards / "*.tar")
    clean, _ = take(config, 30)
    for name, field in (("image", "image"), ("text", "text"), ("alignment", "text")):
        noisy, _ = take(replace(config, noise=NoiseConfig(**{name: 0.4})), 30)
        assert keys_of(noisy) == keys_of(clean)
        changed = [
            (one[field][row] != other[field][row]).any()
            for one, other in zip(clean, noisy, strict=True)
            for row in range(8)
        ]
        assert 0.25 < np.mean(changed) < 0.55
        other = "text" if field == "image" else "image"
        assert all((one[other] == two[other]).all() for one, two in zip(clean, noisy, strict=True))
    noisy, _ = take(replace(config, noise=NoiseConfig(alignment=1.0)), 5)
    for one, two in zip(clean, noisy, strict=False):
        texts = [sorted(map(bytes, batch["text"])) for batch in (one, two)]
        assert texts[0] == texts[1] and (one["text"] != two["text"]).any(1).all()
    with pytest.raises(ValueError, match="data.noise.image=0.5 needs pictures"):
        replace(config, noise=NoiseConfig(image=0.5), image_embeddings="folder")
