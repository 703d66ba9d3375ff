"""benchmarks/on_gpu.py at toy size: a prepared script has to run the first time, on a machine that is lent for minutes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "on_gpu.py"


def rehearse(out, *parts):
    """Rows by part."""
    command = [sys.executable, str(SCRIPT), "--rehearse", "--out", str(out), *(["--parts", *parts] if parts else [])]
    env = {name: value for name, value in os.environ.items() if name != "JAX_NUMPY_RANK_PROMOTION"}  # as users run it
    run = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = {}
    for line in (out / "on_gpu.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows.setdefault(row["part"], []).append(row)
    return rows


def test_a_part_leaves_its_rows(tmp_path):
    rows = {row["name"]: row for row in rehearse(tmp_path, "H")["H"]}
    assert list(rows) == ["loss, ours, 64 pairs", "loss, dense, 64 pairs"]
    assert rows["loss, ours, 64 pairs"]["ms"] > 0


@pytest.mark.slow
def test_every_part_runs(tmp_path):
    rows = rehearse(tmp_path)
    assert sorted(rows) == sorted(["A", "B", "C", "D", "E", "F", "F-triton", "G", "H", "H-torch", "I"])
    failed = [row for part in rows.values() for row in part if "failed" in row]
    assert all("No module named 'torch'" in row["failed"] for row in failed), failed
    verdict = next(row for row in rows["A"] if row["name"].startswith("verdict"))
    assert verdict["verdict"] == "autotuning first"  # a CPU's products are
    assert any(row["name"].endswith("lengths") for row in rows["A"])
    assert "stream" in rows["G"][1]["name"] and "triton_gemm=true" in rows["F-triton"][0]["name"]
    assert [row["equal"] for row in rows["I"] if "float32" in row["name"]] == [True, True]
