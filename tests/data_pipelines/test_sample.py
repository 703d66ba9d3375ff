"""The shipped sample: what is in it and what must not be, and that it can be remade."""

import importlib.util
import json
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_pipelines.errors import UserError
from data_pipelines.sample import LANGUAGES, packages
from data_pipelines.sample.ideas import EVALUATION_LANGUAGES, family, unseen, words
from data_pipelines.sample.packages import PACKAGES, Package
from data_pipelines.sources.opening import open_source
from tests.data_pipelines import http_server
from tests.data_pipelines.shards import SAMPLE

EVALUATED = ("unseen-style.parquet", "unseen-ideas.parquet", "flags.parquet")

TRAIN = [*sorted(SAMPLE.glob("emoji-*.parquet")), *sorted(SAMPLE.glob("icons-*.parquet"))]
PERMISSIVE = {"Apache-2.0", "MIT", "ISC", "Unicode-3.0", "CC-PDDC"}
MAX_SHIPPED_BYTES = 25_000_000


def column(shard: Path, name: str) -> list:
    return pq.read_table(shard, columns=[name])[name].to_pylist()


def ideas(shard: Path) -> list[str]:
    return column(shard, "idea") if "idea" in pq.read_schema(shard).names else []


def test_the_sample_is_small_and_under_permissive_licences():
    assert sum(path.stat().st_size for path in SAMPLE.glob("*.parquet")) < MAX_SHIPPED_BYTES
    text = (SAMPLE / "LICENSE").read_text("utf-8")
    assert {package.licence for package in PACKAGES.values()} <= PERMISSIVE
    styles = [path.stem.partition("-")[2] for path in TRAIN]
    assert len(styles) >= 16 and all(style in text for style in styles)
    assert all(package.licence in text for package in PACKAGES.values())


def test_training_pairs_show_no_idea_and_no_style_of_the_evaluation():
    held = {family(idea) for idea in unseen()}
    assert column(SAMPLE / "unseen-ideas.parquet", "idea") == unseen() and len(unseen()) == 312
    seen = {idea for shard in TRAIN for idea in ideas(shard)}
    assert len(seen) > 1300 and not held & {family(idea) for idea in seen}
    assert not {"emoji-noto.parquet", "emoji-flagpack.parquet"} & {path.name for path in TRAIN}
    for name in ("unseen-style", "flags"):
        shown = column(SAMPLE / f"{name}.parquet", "idea")
        assert len(set(shown)) == len(shown) and set(shown) <= seen
    assert words("Guitars, electric-guitar") == {"guitar", "electric"}
    icons = next(path for path in TRAIN if path.stem == "icons-lucide")
    assert not any(
        {"megaphone"} <= words(f"{pair.fields['txt']} {pair.fields['keywords']}") for pair in open_source(str(icons))
    )


@pytest.mark.parametrize("kind", ["emoji", "icons"])
def test_every_evaluation_image_has_a_closest_one_among_the_kept(kind):
    closest, manifest = (
        pq.read_table(SAMPLE / f"curated-{kind}" / f"{name}.parquet") for name in ("closest", "manifest")
    )
    places = zip(closest["eval_shard"].to_pylist(), closest["eval_index"].to_pylist(), strict=True)
    sizes = {name: pq.read_metadata(SAMPLE / name).num_rows for name in EVALUATED}
    assert sorted(places) == sorted((name, index) for name, size in sizes.items() for index in range(size))
    rows = zip(*(manifest[name].to_pylist() for name in ("shard", "index", "keep")), strict=True)
    kept = {(shard, index) for shard, index, keep in rows if keep}
    assert set(zip(closest["shard"].to_pylist(), closest["index"].to_pylist(), strict=True)) <= kept


@pytest.mark.parametrize(
    ("idea", "expected"),
    [
        ("1F468 1F3FD 200D 1F3EB", "1F9D1 200D 1F3EB"),  # man teacher: medium skin tone
        ("1F647 200D 2640", "1F647"),  # woman bowing
        ("1F467 1F3FC", "1F9D2"),  # girl
        ("1F1EB 1F1EF", "1F1EB 1F1EF"),  # flag: Fiji
    ],
)
def test_variants_of_an_idea_are_one_family(idea, expected):
    assert family(idea) == expected


def test_captions_are_in_all_languages():
    for name, languages in (("emoji-noto-v1", LANGUAGES), ("unseen-style", EVALUATION_LANGUAGES)):
        pairs = list(open_source(str(SAMPLE / f"{name}.parquet")))
        assert set(pairs[0].fields["captions"]) == set(languages) and len(languages) >= 12
        for language in languages:
            share = sum(bool(pair.fields["captions"][language]) for pair in pairs) / len(pairs)
            assert share > (0.6 if language == "mi" else 0.97), (name, language)


def test_a_package_that_is_gone_or_changed_is_told_in_one_line(tmp_path, monkeypatch):
    gone = Package("no-such-icons", "1.0.0", "MIT", "")
    monkeypatch.setitem(PACKAGES, gone.name, gone)
    monkeypatch.setattr(packages, "_NPM", "http://127.0.0.1:9")
    with pytest.raises(
        UserError, match=r"no-such-icons 1\.0\.0 cannot be fetched .* put the file into .*no-such-icons-1"
    ):
        with packages.opened(gone.name, tmp_path):
            pass
    assert not list(tmp_path.iterdir())
    (tmp_path / gone.file_name).write_bytes(b"another file")
    with pytest.raises(UserError, match="another sha512"):
        with packages.opened(gone.name, tmp_path):
            pass


def reset(handler: http_server.Handler, data: bytes, first: int) -> bool:
    """Sends a part of the file, then resets the connection."""
    http_server.drop(handler, data, first)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    return True


@pytest.mark.parametrize(("fault", "told"), [(http_server.drop, "IncompleteRead"), (reset, "reset by peer")])
def test_a_download_that_breaks_off_is_told_in_one_line(tmp_path, monkeypatch, fault, told):
    icons = Package("icons", "1.0.0", "MIT", "")
    file = tmp_path / "registry" / "icons" / "-" / icons.file_name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x" * 100)
    with http_server.serving(tmp_path / "registry") as server:
        server.always = fault
        monkeypatch.setitem(PACKAGES, icons.name, icons)
        monkeypatch.setattr(packages, "_NPM", server.url)
        with pytest.raises(UserError, match=rf"icons 1\.0\.0 cannot be fetched .*{told}.*; try again"):
            with packages.opened(icons.name, tmp_path):
                pass
    assert not (tmp_path / icons.file_name).exists()


def test_the_command_ends_with_one_line_and_code_2(tmp_path):
    command = [
        sys.executable,
        "-m",
        "data_pipelines.sample.build",
        "--out",
        str(tmp_path / "out"),
        "--packages",
        str(tmp_path),
    ]
    env = {"npm_config_registry": "http://127.0.0.1:9", "PATH": "", "PYTHONPATH": str(SAMPLE.parents[1])}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_kept_shows_no_image_of_the_evaluation():
    every = 0
    for kind in ("emoji", "icons"):
        rows = pq.read_table(SAMPLE / f"curated-{kind}" / "manifest.parquet").to_pylist()
        kept = [row for row in rows if row["keep"]]
        assert len(rows) == sum(pq.read_metadata(shard).num_rows for shard in SAMPLE.glob(f"{kind}-*.parquet"))
        assert not any(row["leak_of"] or row["duplicate_of"] for row in kept)
        assert any(row["leak_of"] for row in rows) or kind == "icons"
        funnel = json.loads((SAMPLE / f"curated-{kind}" / "funnel.json").read_text())
        assert (funnel["pairs"], funnel["kept"]) == (len(rows), len(kept))
        every += len(kept)
    assert 10_000 <= every <= 25_000


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("resvg_py") is None, reason="needs the extra `sample`")
def test_the_sample_is_remade_byte_for_byte(tmp_path):
    subprocess.run([sys.executable, "-m", "data_pipelines.sample.build", "--out", str(tmp_path)], check=True)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made.keys() == {path.name for path in SAMPLE.glob("*.parquet")}
    assert not [name for name, data in made.items() if data != (SAMPLE / name).read_bytes()]
