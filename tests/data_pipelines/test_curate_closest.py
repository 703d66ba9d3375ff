"""The kept image that is closest to each evaluation image, against a loop over all pairs of them."""

import io
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipelines.curate import closest, layout
from data_pipelines.curate.closest import CLOSEST_SCHEMA
from data_pipelines.curate.config import CurateConfig
from data_pipelines.curate.engine import LocalEngine
from data_pipelines.curate.image_hashes import examine, read_thumbnail
from data_pipelines.curate.pixel_match import Tolerance, distances
from data_pipelines.curate.run import curate
from tests.data_pipelines.shards import encode
from tests.data_pipelines.test_curate_copies import drawings, shard

HELD = [encode(image, "PNG") for image in drawings(5, seed=4)]
TOLERANCE = Tolerance(0.25, 60.0, spot_share=0.03, grey=True)  # what docs/data.md says of leaks


def like(file: bytes) -> bytes:
    """The same drawing with a disc over a part of it: another image, but closer to it than any stranger."""
    image = Image.open(io.BytesIO(file)).convert("RGB")
    image.paste((20, 200, 90), (34, 34, 62, 62))
    return encode(image, "JPEG", quality=90)


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    """Strangers, a copy of one evaluation image (a leak), and a drawing that is like another."""
    strangers = [encode(image, "JPEG") for image in drawings(12, seed=5)]
    copy = encode(Image.open(io.BytesIO(HELD[3])), "JPEG", quality=70)
    return [*strangers[:6], copy, like(HELD[1]), *strangers[6:], b"no image"]


def curated(files: list[bytes], folder: Path, groups: int) -> tuple[list[dict], list[dict]]:
    """Rows of the manifest and of the closest images, in three shards and a few groups of them."""
    names = [shard(folder / f"{n}.tar", files[5 * n : 5 * n + 5]) for n in range(3)]
    held = [shard(folder / "held-0.tar", HELD[:2]), shard(folder / "held-1.tar", HELD[2:])]
    every = mock.patch.object(closest, "_OF_GROUP", len(files))  # of so few all are compared by pixels
    with every, mock.patch.multiple(layout, MIN_GROUPS=groups, ROWS_PER_BUCKET=16):
        curate(names, folder / "out", config=CurateConfig(), engine=LocalEngine(1), against=held)
    table = pq.read_table(folder / "out" / "closest.parquet")
    assert table.schema == CLOSEST_SCHEMA
    return pq.read_table(folder / "out" / "manifest.parquet").to_pylist(), table.to_pylist()


def thumbnails(files: list[bytes]) -> tuple[np.ndarray, list[int]]:
    found = [examine(file, max_pixels=1 << 26) for file in files]
    return np.stack([read_thumbnail(one.thumbnail) for one in found]), [int(one.hashes[0]) for one in found]


@pytest.mark.parametrize(("groups", "compared"), [pytest.param(1, 16, marks=pytest.mark.slow), (3, 16), (3, 2)])
def test_the_closest_kept_image_is_that_of_a_loop_over_all_pairs(files, tmp_path, groups, compared):
    """Over those pairs, that is, whose hashes differ in the fewest bits."""
    with mock.patch.object(closest, "_COMPARED", compared):
        manifest, rows = curated(files, tmp_path, groups)
    assert [row["reason"] for row in manifest if not row["keep"]] == ["eval_leak", "not_an_image"]
    kept = [number for number, row in enumerate(manifest) if row["keep"]]
    images, hashes = thumbnails([files[number] for number in kept])
    held, held_hashes = thumbnails(HELD)
    assert [(Path(row["eval_shard"]).name, row["eval_index"], row["eval_key"]) for row in rows] == [
        *((f"held-{n // 2}.tar", n % 2, f"{n % 2:06d}") for n in range(2)),
        *(("held-1.tar", n, f"{n:06d}") for n in range(3)),
    ]
    for number, row in enumerate(rows):
        same = np.broadcast_to(held[number], images.shape)
        apart = distances(images, same, np.zeros((len(images), 4), np.float32), TOLERANCE)
        bits = [bin(held_hashes[number] ^ own).count("1") for own in hashes]
        apart[sorted(range(len(kept)), key=lambda n: (bits[n], n))[compared:]] = np.inf
        found = manifest[kept[int(np.argmin(apart))]]
        assert (row["shard"], row["index"], row["key"]) == (found["shard"], found["index"], found["key"])
        assert abs(row["distance"] - apart.min()) <= 0.0006  # rounded to .001; the last bits depend on the batch
        assert row["bits"] == bits[int(np.argmin(apart))]
        assert row["distance"] > 1  # else it would be a leak
    assert rows[1]["index"] + 5 * int(Path(rows[1]["shard"]).stem) == 7  # what is like it, not a stranger
    assert rows[1]["distance"] == min(row["distance"] for row in rows)


@pytest.mark.parametrize("at_once", [1, 1 << 22])
def test_the_hashes_that_differ_least_are_those_of_a_loop(at_once):
    rng = np.random.default_rng(0)
    wholes, hashes = rng.integers(0, 1 << 63, 7, np.uint64), rng.integers(0, 1 << 63, 40, np.uint64)
    hashes[30:] = hashes[:10]  # of equally close ones the first
    with mock.patch.object(closest, "_COMPARED_AT_ONCE", at_once):
        found = sorted(zip(*map(np.ndarray.tolist, closest._closest(wholes, hashes)), strict=True))
    expected = []
    for image, whole in enumerate(wholes.tolist()):
        bits = [bin(whole ^ other).count("1") for other in hashes.tolist()]
        expected += [(image, row, bits[row]) for row in sorted(range(40), key=lambda n: (bits[n], n))[:8]]
    assert found == sorted(expected)
    assert [len(part) for part in closest._closest(wholes, hashes[:0])] == [0, 0, 0]


def test_thumbnails_are_those_of_the_closest_of_each_shard(files, tmp_path):
    with mock.patch.multiple(closest, SHOWN=1, _COMPARED=2):
        _, rows = curated(files, tmp_path, 3)
    for name in ("held-0.tar", "held-1.tar"):
        own = [row for row in rows if Path(row["eval_shard"]).name == name]
        shown = [row for row in own if row["thumbnail"] is not None]
        assert shown == [min(own, key=lambda row: row["distance"])]
        number = shown[0]["index"] + 5 * int(Path(shown[0]["shard"]).stem)
        images = [read_thumbnail(shown[0][name]) for name in ("thumbnail", "eval_thumbnail")]
        held = HELD[shown[0]["eval_index"] + 2 * (name == "held-1.tar")]
        np.testing.assert_array_equal(images, thumbnails([files[number], held])[0])
    assert all((row["thumbnail"] is None) == (row["eval_thumbnail"] is None) for row in rows)


def test_evaluation_shards_without_an_image(files, tmp_path):
    name = shard(tmp_path / "a.tar", files[:5])
    held = [shard(tmp_path / "broken.tar", [b"no image"]), shard(tmp_path / "held.tar", [b"no image", HELD[0]])]
    for against, count in ((held, 1), (held[:1], 0)):
        curate(name, tmp_path / "out", config=CurateConfig(), engine=LocalEngine(1), against=against)
        rows = pq.read_table(tmp_path / "out" / "closest.parquet").to_pylist()
        assert [(Path(row["eval_shard"]).name, row["eval_index"]) for row in rows] == [("held.tar", 1)] * count


def test_a_damaged_file_has_no_rows(files, tmp_path):
    with mock.patch.object(closest, "_COMPARED", 1):
        curated(files, tmp_path, 1)
    path = tmp_path / "out" / "closest.parquet"
    whole = path.read_bytes()
    assert len(closest.read_closest(path.parent)) == len(HELD)
    for damaged in (b"", whole[:-9], whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        assert closest.read_closest(path.parent) == []
    pq.write_table(pq.read_table(tmp_path / "out" / "manifest.parquet"), path)
    assert closest.read_closest(path.parent) == []


def test_nothing_kept_and_nothing_protected(tmp_path):
    copies = [encode(Image.open(io.BytesIO(file)), "JPEG", quality=70) for file in HELD]
    name, held = shard(tmp_path / "a.tar", copies), shard(tmp_path / "held.tar", HELD)
    out = tmp_path / "out"
    funnel = curate(name, out, config=CurateConfig(), engine=LocalEngine(1), against=held)
    assert funnel["kept"] == 0 and len(pq.read_table(out / "closest.parquet")) == 0
    curate(name, out, config=CurateConfig(), engine=LocalEngine(1))
    assert not (out / "closest.parquet").exists()
