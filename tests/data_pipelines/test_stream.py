"""What may change along a stream: a manifest, blocks, weights, hosts and threads, workers that die, noise."""

import collections
import contextlib
import itertools
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipelines import workers
from data_pipelines.errors import UserError
from data_pipelines.loader import DataConfig, make_loader
from data_pipelines.order.mixture import SourceConfig
from data_pipelines.order.permutation import BlockShuffle
from data_pipelines.samples.noise import NoiseConfig
from tests.data_pipelines.shards import SPIECE
from tests.data_pipelines.streams import SAMPLE_CONFIG, SHAPES, assert_same, config_of, take


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
    with pytest.raises(ValueError, match="the data changed since this run was saved"):
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
    with pytest.raises(ValueError, match="the data changed since this run was saved"):
        make_loader(config_of(shards / "*.tar"), **SHAPES).restore(make_loader(config, **SHAPES).state())


def test_shards_and_a_manifest_that_were_moved_are_the_same_data(shards, tmp_path):
    rows = [("a", 0, n) for n in range(13)] + [("b", 100, n) for n in range(29)]
    columns = {
        "shard": [str(shards / f"{name}.tar") for name, _, _ in rows],
        "index": [index for _, _, index in rows],
        "key": [f"{first + index:06d}" for _, first, index in rows],
        "keep": [index % 3 != 0 for _, _, index in rows],
    }
    pq.write_table(pa.table(columns), shards / "manifest.parquet")
    before = SourceConfig(str(shards / "*.tar"), manifest=str(shards / "manifest.parquet"))
    expected, _ = take(DataConfig((before,), SPIECE), 6)
    loader = take(DataConfig((before,), SPIECE), 3)[1]
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in (shards / "a.tar", shards / "b.tar"):
        path.rename(moved / path.name)
    (shards / "manifest.parquet").rename(tmp_path / "kept.parquet")
    after = SourceConfig(str(moved / "*.tar"), manifest=str(tmp_path / "kept.parquet"))
    resumed = make_loader(replace(DataConfig((after,), SPIECE), block_bytes=1 << 20), **SHAPES)
    resumed.restore(json.loads(json.dumps(loader.state())))
    assert_same(list(itertools.islice(resumed, 3)), expected[3:])
    resumed.close()


def test_a_state_that_does_not_describe_its_data_is_restored_or_refused(shards):
    state = take(config_of(shards / "a.tar"), 2)[1].state()
    del state["data"]  # as in checkpoints of before
    loader = make_loader(config_of(shards / "a.tar"), **SHAPES)
    loader.restore(state)
    assert loader.state()["position"] == 2
    with pytest.raises(
        UserError, match=r"the data changed since this run was saved \(was: unknown; now: b.tar, 29 pairs\)"
    ):
        make_loader(config_of(shards / "b.tar"), **SHAPES).restore(state)


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
        st.sampled_from([(0, 1), (0, 2), (0, 3), (2, 1), (3, 1)]),  # workers, threads
        st.tuples(st.sampled_from([0.5, 1.0, 4.0]), st.just(1.0)),  # weights
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(histories, st.sampled_from([None, BlockShuffle(5, 2)]), st.integers(1, 9))
def test_any_history_of_stops_hosts_workers_threads_and_chunks_gives_one_stream(
    shards, monkeypatch, history, blocks, chunk_rows
):
    monkeypatch.setattr(workers, "WorkerPool", made_here)
    monkeypatch.setattr(workers, "MIN_CHUNK_ROWS", chunk_rows)
    monkeypatch.setattr(workers, "MAX_CHUNK_ROWS", chunk_rows)
    config = config_of(shards / "a.tar", shards / "b.tar", shuffle_blocks=blocks, noise=NoiseConfig(0.3, 0.3, 0.5))
    done, state, one_state = [], None, None
    for count, process_count, (workers_count, threads), weights in history:
        changed = reweighted(replace(config, workers=workers_count, threads=threads), *weights)
        parts = []
        for index in range(process_count):
            loader = make_loader(changed, **SHAPES, process_index=index, process_count=process_count)
            if state is not None:
                loader.restore(state)
            parts.append(list(itertools.islice(loader, count)))
            loader.close()
        alone = make_loader(replace(changed, workers=0, threads=1), **SHAPES)
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


def made_here(batches, *, workers, threads, prefetch, chunk_rows):
    """What the workers of a pool make, chunks in another order, without their processes."""
    for number in itertools.count():
        arrays = {name: np.empty(*shape) for name, shape in batches.shapes.items()}
        items = [batches.items(number, part, workers) for part in range(workers)]
        chunks = [share[start : start + chunk_rows] for share in items for start in range(0, len(share), chunk_rows)]
        yield batches.finish(number, arrays, [batches.fill(chunk, arrays) for chunk in reversed(chunks)])


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
    with pytest.raises(ValueError, match="data.noise.image=0.5 needs images"):
        replace(config, noise=NoiseConfig(image=0.5), image_embeddings="folder")
