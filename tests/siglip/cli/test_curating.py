"""`siglip data curate` and `stats` as a user types them, with a model and with mistakes."""

import io
import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from data_pipelines.image_ops import decode_image, resize
from data_pipelines.sources.webdataset import TarSource
from siglip.cli import run
from siglip.cli.evaluation import embedder_of
from siglip.formats import big_vision
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig, init_params
from tests.siglip.rounding import towers_apart

SAMPLE = Path(__file__).parents[3] / "data_pipelines" / "sample"
SPIECE = str(SAMPLE / "spiece.model")
MODEL = ModelConfig(
    image=ImageConfig(variant="mu", patch_size=(8, 8), image_size=(16, 16)),
    text=TextConfig(variant="mu", vocab_size=4000, length=8),
    out_dim=(None, 32),
)


def first_pairs(path: Path, shard: str, count: int) -> Path:
    with tarfile.open(SAMPLE / shard) as sample, tarfile.open(path, "w") as small:
        for member in sample.getmembers()[: 3 * count]:
            small.addfile(member, io.BytesIO(sample.extractfile(member).read()))
    return path


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    return first_pairs(tmp_path_factory.mktemp("shards") / "toy-00000.tar", "emoji-train-00000.tar", 40)


@pytest.mark.slow
def test_with_a_model_a_preset_and_new_shards(shard, tmp_path, capsys):
    params = init_params(MODEL, jax.random.key(0))
    big_vision.write(tmp_path / "m.npz", params, MODEL)
    held = first_pairs(tmp_path / "held.tar", "emoji-heldout-00000.tar", 10)
    out = tmp_path / "out"
    flags = ["--preset", "pali-top-10", "--top-share", "0.5", "--model", str(tmp_path / "m.npz"), "--tokenizer", SPIECE]
    flags += ["--leak-similarity", "2.0", "--batch-size", "16", "--materialize", "tar", "--workers", "1"]
    assert run(["data", "curate", str(shard), "--out", str(out), "--against", str(held), *flags]) == 0
    assert "pairs kept" in capsys.readouterr().out
    rows = pq.read_table(out / "manifest.parquet").to_pylist()
    embedder = embedder_of(tmp_path / "m.npz", tokenizer=SPIECE, batch_size=16)
    pairs = list(TarSource(shard))
    images = np.stack([resize(decode_image(pair.image, max_pixels=1 << 20), (16, 16)) for pair in pairs])
    zimg = embedder.embed_images({"image": images})
    ztxt = embedder.embed_texts([pair.fields["txt"] for pair in pairs])
    np.testing.assert_allclose(
        [row["score"] for row in rows], (zimg * ztxt).sum(1), rtol=0, atol=2 * towers_apart(MODEL)
    )
    assert {row["reason"] for row in rows} <= {None, "low_score", "near_duplicate"}
    for language in {row["language"] for row in rows}:
        left = [row for row in rows if row["language"] == language and "near_duplicate" not in row["reasons"]]
        assert sum(row["keep"] for row in left) == max(1, round(len(left) / 2))
    assert len(TarSource(out / "shards" / "00000.tar")) == sum(row["keep"] for row in rows)
    before = [path.stat().st_mtime_ns for path in (out / "scores").iterdir()]
    assert (
        run(["data", "curate", str(shard), "--out", str(out), "--against", str(held), *flags[:-4], "--workers", "1"])
        == 0
    )
    assert [path.stat().st_mtime_ns for path in (out / "scores").iterdir()] == before
    capsys.readouterr()
    assert run(["data", "stats", str(out)]) == 0
    funnel = json.loads((out / "funnel.json").read_text())
    assert f"{funnel['kept']} of 40 pairs kept" in capsys.readouterr().out


def test_stats_of_shards(shard, capsys):
    assert run(["data", "stats", str(shard)]) == 0
    told = capsys.readouterr().out
    assert "40 pairs in 1 shards" in told and "sides_px   64 40" in told and "missing_text" not in told
    assert run(["data", "stats", str(shard), "--captions", "alt"]) == 0
    assert "missing_text 40" in capsys.readouterr().out


def test_mistakes(shard, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    cases = [
        (["curate", str(shard)], "--out"),
        (["curate", *out], "no shards given"),
        (["curate", str(tmp_path / "nothing-*.tar"), *out], "no shard matches"),
        (["curate", str(tmp_path / "nothing.tar"), *out], "1 of 1 shards failed"),
        (["curate", str(shard), *out, "--preset", "datacomp-basics"], "datacomp-basic"),
        (["curate", str(shard), *out, "--min-side", "3"], "--min-side-px"),
        (["curate", str(shard), *out, "--max-aspect", "0.5"], "max_aspect=0.5"),
        (["curate", str(shard), *out, "--top-share", "0.3"], "--model SRC"),
        (["curate", str(shard), *out, "--concept-cap", "10"], "--concepts FILE"),
        (["curate", str(shard), *out, "--concept-cap", "10", "--concepts", str(tmp_path / "none")], "no such file"),
        (["curate", str(shard), *out, "--concepts", SPIECE], "--concept-cap"),
        (["curate", str(shard), *out, "--batch-size", "0"], "--batch-size 0"),
        (["curate", str(shard), *out, "--tokenizer", SPIECE], "--model SRC"),
        (["curate", str(shard), *out, "--max-aspect", "nan"], "max_aspect=nan"),
        (["curate", str(shard), *out, "--min-chars", "50", "--max-chars", "10"], "min_chars=50"),
        (["curate", str(shard), *out, "--workers", "-1"], "workers=-1"),
        (["curated"], "curate"),
        (["stats"], "no path given"),
        (["stats", str(tmp_path / "text.tar")], "no pair in 1 shards can be read: shard"),
        (["stats", str(tmp_path / "curated")], "funnel.json is not the funnel of a curation"),
        (["tokenizer", str(shard), "--out", str(tmp_path / "x"), "--captions", "nix"], "no captions in these fields"),
        (["tokenizer", str(shard), "--out", str(tmp_path / "x"), "--threads", "0"], "--threads"),
    ]
    (tmp_path / "text.tar").write_text("not a tar" * 1000)
    (tmp_path / "curated").mkdir()
    (tmp_path / "curated" / "funnel.json").write_text("{}")
    for arguments, message in cases:
        assert run(["data", *arguments]) == 2, arguments
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1, told
    assert not (tmp_path / "out" / "manifest.parquet").exists()
