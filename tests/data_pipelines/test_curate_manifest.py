"""Shares of a language and of the corpus, against a sort of the scores."""

import collections
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.curate.config import PRESETS, CurateConfig
from data_pipelines.curate.engine import LocalEngine
from data_pipelines.curate.layout import Work, write_layout
from data_pipelines.curate.manifest import JoinTask
from data_pipelines.curate.run import _Run
from data_pipelines.curate.scores import scores_path
from data_pipelines.curate.tables import SCAN_SCHEMA, write_table

LANGUAGES = ("en", "de", "ja")


@pytest.fixture
def scanned():
    """The pairs of four shards: some have no score, some a rule that drops them, languages differ in their scores."""
    rng = np.random.default_rng(0)
    rows = []
    for shard in range(4):
        for index in range(50):
            language = LANGUAGES[rng.integers(3)]
            score = rng.normal(LANGUAGES.index(language) / 4, 0.2) if rng.random() > 0.1 else np.nan
            rules = ["too_small"] if rng.random() < 0.2 else ["mojibake"] if rng.random() < 0.2 else []
            row = {"shard": shard, "index": index, "caption": "a caption", "language": language, "reasons": rules}
            rows.append(row | {"score": float(np.float32(score))})
    rows[-1] |= {"language": "fr", "score": np.nan, "reasons": []}  # a language without any score
    return rows


def decide(rows: list[dict], config: CurateConfig, folder: Path) -> list[dict]:
    """The rows of the manifest of scans and scores like these."""
    names = [f"{shard}.tar" for shard in range(4)]
    work = Work(folder / "work", config, scored=True)
    work.folder.mkdir()
    write_layout(work, names, [folder / f"{name}.parquet" for name in names], [50] * 4)
    for shard in range(4):
        some = [row for row in rows if row["shard"] == shard]
        scan = {field.name: pa.array([row.get(field.name) for row in some], field.type) for field in SCAN_SCHEMA}
        write_table(work.layout.tables[shard], pa.table(scan, SCAN_SCHEMA))
        score = pa.array([row["score"] for row in some], pa.float32())
        write_table(scores_path(work, shard), pa.table({"score": score, "similarity": score}))
    join = JoinTask(work, (), ())
    with LocalEngine(1) as engine:
        _Run(folder, engine, lambda stage, done, of: None).finalize(join, None)
    return [row for shard in range(4) for row in pq.read_table(join.final(shard)).to_pylist()]


@pytest.mark.parametrize("preset", ["clip-top-30", "pali-top-10"])
def test_the_best_share(scanned, tmp_path, preset):
    config = PRESETS[preset]()
    decided = decide(scanned, config, tmp_path)
    assert len(decided) == len(scanned)
    left = [row for row in scanned if "too_small" not in row["reasons"] and not np.isnan(row["score"])]
    least = {}
    for language in LANGUAGES:
        among = [row["score"] for row in left if config.share_per == "corpus" or row["language"] == language]
        least[language] = sorted(among)[-max(1, round(config.top_share * len(among)))]
    for before, after in zip(scanned, decided, strict=True):
        scored = not np.isnan(before["score"])
        assert ("low_score" in after["reasons"]) == (scored and before["score"] < least[before["language"]])
    kept = collections.Counter()
    for row in decided:
        kept[row["language"]] += row["keep"] and not np.isnan(row["score"])
    if preset == "clip-top-30":  # one threshold: nearly all of the language that scores best, nearly none of the worst
        assert len(set(least.values())) == 1 and sum(kept.values()) == round(0.3 * len(left))
        assert kept["ja"] > 3 * kept["en"]
    else:
        assert len(set(least.values())) == 3
        assert kept == {"fr": 0} | {
            name: round(0.1 * sum(row["language"] == name for row in left)) for name in LANGUAGES
        }
