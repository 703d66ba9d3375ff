"""docs/your-own-data.md as a reader goes through it: every command, one after the other, on the shipped sample."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import siglip

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_command_of_the_page_runs(tmp_path):
    page = (ROOT / "docs" / "your-own-data.md").read_text()
    commands = "\n".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL))
    assert commands.count("siglip ") >= 9 and "export OUT=runs/own " in commands
    script = "set -eux\n" + commands.replace("export OUT=runs/own ", f"export OUT={tmp_path}/own ")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("curated/manifest.parquet", "own.model", "run/report.html", "retrieval.json", "hf/model.safetensors"):
        assert (tmp_path / "own" / name).stat().st_size > 0, name
    assert siglip.load_encoder(tmp_path / "own" / "tower.npz").spec.image_size == (48, 48)
