"""Near copies and leaks from end to end: what is found, what stays, and what a crowd of look-alikes costs."""

import io
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from data_pipelines.curate import duplicates, layout, pixel_match
from data_pipelines.curate.config import CurateConfig
from data_pipelines.curate.engine import LocalEngine
from data_pipelines.curate.run import curate
from tests.data_pipelines.shards import encode, write_tar


def drawings(count: int, *, seed: int = 0) -> list[Image.Image]:
    """Images of 96 px that have nothing in common: shapes of any colour on any ground."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(count):
        image = Image.new("RGB", (96, 96), tuple(rng.integers(120, 240, 3).tolist()))
        draw = ImageDraw.Draw(image)
        for _ in range(9):
            x, y = rng.integers(0, 70, 2).tolist()
            shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
            shape((x, y, *(rng.integers(8, 40, 2) + (x, y)).tolist()), fill=tuple(rng.integers(20, 240, 3).tolist()))
        found.append(image)
    return found


def placeholders(count: int) -> list[bytes]:
    """One image as many servers give it: other noise, another quality, every tenth smaller."""
    rng = np.random.default_rng(1)
    image = Image.new("RGB", (128, 128), (230, 230, 230))
    draw = ImageDraw.Draw(image)
    draw.ellipse((30, 20, 98, 88), fill=(150, 150, 150))
    draw.text((20, 100), "image not available", fill=(60, 60, 60))
    found = []
    for number in range(count):
        noise = rng.integers(-3, 4, (128, 128, 3))
        noisy = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
        side = 128 if number % 10 else 100
        found.append(encode(noisy.resize((side, side)), "JPEG", quality=int(rng.integers(60, 95))))
    return found


def shard(path: Path, files: list[bytes]) -> str:
    members = {}
    for number, data in enumerate(files):
        members |= {f"{number:06d}.jpg": data, f"{number:06d}.txt": f"a thing with the number {number}".encode()}
    return str(write_tar(path, members))


def rows_of(out: Path) -> list[dict]:
    return pq.read_table(out / "manifest.parquet").to_pylist()


def curated(files: list[bytes], folder: Path, *, against: list[bytes] = ()) -> list[dict]:
    protected = shard(folder / "held.tar", list(against)) if against else ()
    name = shard(folder / "a.tar", files)
    curate(name, folder / "out", config=CurateConfig(), engine=LocalEngine(1), against=protected)
    return rows_of(folder / "out")


def cut(image: Image.Image, top: float, bottom: float, left: float, right: float) -> Image.Image:
    width, height = image.size
    box = (left * width, top * height, (1 - right) * width, (1 - bottom) * height)
    return image.crop(tuple(round(edge) for edge in box))


def framed(image: Image.Image) -> Image.Image:
    frame = Image.new("RGB", (106, 106))
    frame.paste(image, (5, 5))
    return frame


def marked(image: Image.Image) -> Image.Image:
    copy = image.copy()
    copy.paste((200, 200, 200), (0, 90, 32, 96))
    return copy


NEAR = {
    "cut of all sides": lambda image: cut(image, 0.1, 0.09, 0.08, 0.1),
    "cut more": lambda image: cut(image, 0.11, 0.11, 0.11, 0.11),
    "cut of one side": lambda image: cut(image, 0, 0, 0, 0.12),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.88),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.12),
    "framed": framed,
    "small": lambda image: image.resize((56, 56)),
}
LEAKED = NEAR | {
    "grey": lambda image: image.convert("L"),
    "marked": marked,
    "cut and small": lambda image: cut(image, 0.05, 0.05, 0.05, 0.05).resize((52, 52)),
}


@pytest.mark.slow
def test_changed_copies_are_found_and_strangers_and_other_colours_are_not(tmp_path):
    originals = drawings(7 * 8)
    files = [encode(image, "JPEG", quality=92) for image in originals]
    kinds = [kind for kind in NEAR for _ in range(8)]
    copies = [encode(NEAR[kind](image), "JPEG", quality=85) for kind, image in zip(kinds, originals, strict=True)]
    recoloured = [encode(Image.merge("RGB", image.split()[::-1]), "JPEG") for image in drawings(20, seed=1)]
    strangers = [encode(image, "JPEG") for image in drawings(20, seed=1)]
    rows = curated(files + copies + recoloured + strangers, tmp_path)
    count = len(files)
    names = {f"{row['shard']}#{row['index']}": row["index"] for row in rows}
    pairs = {frozenset((row["index"], names[row["duplicate_of"]])) for row in rows if row["duplicate_of"]}
    assert pairs <= {frozenset((number, number + count)) for number in range(count)}
    missed = [kind for number, kind in enumerate(kinds) if frozenset((number, number + count)) not in pairs]
    assert all(missed.count(kind) <= 2 for kind in NEAR) and len(missed) <= 4, missed


@pytest.mark.slow
def test_changed_leaks_are_found_and_strangers_are_not(tmp_path):
    held = drawings(40, seed=2)
    kinds = [kind for kind in LEAKED for _ in range(4)]
    leaks = [encode(LEAKED[kind](held[n]), "JPEG", quality=60) for n, kind in enumerate(kinds)]
    strangers = [encode(image, "JPEG") for image in drawings(40, seed=3)]
    rows = curated(leaks + strangers, tmp_path, against=[encode(image, "PNG") for image in held])
    assert not any("eval_leak" in row["reasons"] for row in rows[len(leaks) :])
    missed = [kind for row, kind in zip(rows, kinds, strict=False) if "eval_leak" not in row["reasons"]]
    assert len(missed) <= 1, missed
    for number, row in enumerate(rows[: len(leaks)]):
        assert row["leak_of"] is None or row["leak_of"].endswith(f"held.tar#{number}")


@pytest.mark.slow
def test_a_crowd_of_look_alikes_costs_a_few_comparisons_each(tmp_path):
    count = 800
    with mock.patch.object(pixel_match, "same_image", side_effect=pixel_match.same_image) as compare:
        rows = curated([encode(image) for image in drawings(5)] + placeholders(count), tmp_path)
    assert sum(len(call.args[0]) for call in compare.call_args_list) < 1.1 * count
    assert [row["index"] for row in rows if row["keep"]] == [0, 1, 2, 3, 4, 6]  # 5 is one of the small ones
    assert {row["duplicate_of"] for row in rows[7:]} == {f"{tmp_path / 'a.tar'}#6"}


def test_the_best_of_a_crowd_stays_however_the_work_is_divided(tmp_path):
    files = placeholders(40)
    larger = Image.open(io.BytesIO(files[29])).resize((150, 150))
    files[29] = encode(larger, "JPEG", quality=90)
    names = [shard(tmp_path / f"{n}.tar", files[8 * n : 8 * n + 8]) for n in range(5)]
    found = []
    for groups, rows_per_bucket in ((1, 10**6), (3, 500)):
        with mock.patch.multiple(layout, MIN_GROUPS=groups, ROWS_PER_BUCKET=rows_per_bucket):
            curate(names, tmp_path / "out", config=CurateConfig(), engine=LocalEngine(1))
        found.append(rows_of(tmp_path / "out"))
    assert found[0] == found[1]
    best = f"{names[3]}#{29 - 24}"
    assert [f"{row['shard']}#{row['index']}" for row in found[0] if row["keep"]] == [best]
    assert {row["duplicate_of"] for row in found[0] if not row["keep"]} == {best}


def bucket(hashes: np.ndarray, identity: np.ndarray) -> dict[str, np.ndarray]:
    return {"hash": hashes.astype(np.uint64), "identity": identity}


def test_few_rows_meet_all_better_ones_that_are_close():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 4, 300).astype(np.uint64) << np.uint64(20) | rng.integers(0, 1 << 9, 300).astype(np.uint64)
    identity = np.sort(rng.integers(0, 200, 300))
    queries = np.flatnonzero(rng.random(300) < 0.5)
    with mock.patch.multiple(duplicates, _BEST=400, _OF_ONE_HASH=400):
        found = np.concatenate(
            duplicates._close_and_better(bucket(hashes, identity), queries, np.arange(300), 3), axis=1
        )
    expected = {
        (lesser, better, (int(hashes[lesser]) ^ int(hashes[better])).bit_count())
        for lesser in queries.tolist()
        for better in range(lesser)
        if identity[lesser] != identity[better] and (int(hashes[lesser]) ^ int(hashes[better])).bit_count() <= 3
    }
    assert set(map(tuple, found.T.tolist())) == expected and found.shape[1] == len(expected)


def test_in_a_crowd_the_best_and_the_nearest_are_met():
    rng = np.random.default_rng(0)
    distance = rng.integers(3, 12, (20, 500)).astype(np.uint8)
    distance[:, 100:300] = duplicates._FAR
    row, column = duplicates._best_and_nearest(distance)
    for number in range(20):
        chosen, values = column[row == number].tolist(), distance[number].astype(int)
        rest = sorted(range(duplicates._BEST, 500), key=lambda place: (values[place], place))  # noqa: B023
        assert chosen == sorted([*range(duplicates._BEST), *rest[: duplicates._NEAREST]])


def test_rows_of_one_hash_leave_room_for_others():
    hashes = np.concatenate([np.zeros(10_000, np.uint64), np.arange(1, 100, dtype=np.uint64)])
    few = duplicates._few_of_each(hashes, np.arange(len(hashes)))
    assert few.tolist() == [*range(duplicates._OF_ONE_HASH), *range(10_000, 10_099)]


def test_candidates_are_once_a_pair_the_best_first():
    columns = {"bits": [5, 2, 9, 1], "is_part": [True, False, True, True], "crop": [1, 2, 3, 0]}
    columns |= {"shard": [0, 0, 0, 0], "index": [7, 7, 7, 4], "of_shard": [1, 1, 0, 0], "of_index": [3, 3, 2, 2]}
    columns["of_rank"] = np.array([50, 50, 90, 90], np.uint64)
    arrays = {name: pa.array(np.asarray(values)) for name, values in columns.items()}
    found = duplicates._choose(pa.table(arrays)).to_pylist()
    assert [(row["index"], row["of_index"], row["bits"]) for row in found] == [(4, 2, 1), (7, 2, 9), (7, 3, 2)]
    assert len(duplicates._choose(pa.table(arrays).slice(0, 0))) == 0
    many = {name: pa.array(np.repeat(np.asarray(values)[:1], 100)) for name, values in columns.items()}
    many |= {"of_index": pa.array(np.arange(100)), "of_rank": pa.array(np.arange(100, 0, -1).astype(np.uint64))}
    many["bits"] = pa.array(np.arange(100, 0, -1).astype(np.uint8))
    found = duplicates._choose(pa.table(many))["of_index"].to_pylist()
    assert found == [*range(duplicates._BEST), *range(100 - duplicates._NEAREST, 100)]
