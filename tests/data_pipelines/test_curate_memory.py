"""How much memory curation takes: no more for a larger corpus, and none for decompression bombs."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data_pipelines.shards import encode, write_tar

ROOT = Path(__file__).parents[2]
PAIRS_PER_SHARD = 200
MAX_MIB = 500
GROWTH_MIB = 4  # 2400 scanned pairs, kept, would be 6
CURATE = """
import json, sys
import psutil
from data_pipelines.curate.config import CurateConfig
from data_pipelines.curate.engine import LocalEngine
from data_pipelines.curate.run import curate

def peak_mib(pid):
    return next(int(line.split()[1]) for line in open(f"/proc/{pid}/status") if line.startswith("VmHWM")) / 1024

with LocalEngine(2) as engine:
    funnel = curate(sys.argv[1], __import__("pathlib").Path(sys.argv[2]), config=CurateConfig(), engine=engine)
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    print(json.dumps([funnel["pairs"], funnel["taken"], [peak_mib(process.pid) for process in family]]))
"""


def write_shard(path: Path, number: int, bomb: bytes) -> None:
    """Images that are all different, a bomb of 600 megapixels among every hundred, an image of 12 in each shard."""
    rng, members = np.random.default_rng(number), {}
    for row in range(PAIRS_PER_SHARD):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        image = small.resize((4000, 3000) if row == 7 else (64, 64))
        members[f"{number:03d}{row:05d}.jpg"] = bomb if row % 100 == 50 else encode(image, "JPEG")
        members[f"{number:03d}{row:05d}.txt"] = f"a picture of the number {number * PAIRS_PER_SHARD + row}".encode()
    write_tar(path, members)


def curated(shards: Path, pattern: str, out: Path) -> tuple[int, dict, list[float]]:
    """Pairs, what the rules took, and the peak memory of each process."""
    command = [sys.executable, "-c", CURATE, str(shards / pattern), str(out)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    assert done.returncode == 0
    return tuple(json.loads(done.stdout))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    file = io.BytesIO()
    Image.new("1", (30_000, 20_000)).save(file, "PNG")
    for number in range(16):
        write_shard(tmp_path / f"{number:02d}.tar", number, file.getvalue())
    few = curated(tmp_path, "0[0-3].tar", tmp_path / "few")
    all_of_them = curated(tmp_path, "*.tar", tmp_path / "all")
    for (pairs, taken, peaks), shards in ((few, 4), (all_of_them, 16)):
        assert pairs == shards * PAIRS_PER_SHARD and taken["bomb"] == shards * 2
        assert len(peaks) >= 3 and max(peaks) < MAX_MIB
    assert max(all_of_them[2]) - max(few[2]) < GROWTH_MIB
