"""docs/your-own-data.md as a reader goes through it: every command, one after the other, on the shipped sample."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import siglip
from siglip.cli.training import parse_run
from siglip.models.text import TokenConfig

ROOT = Path(__file__).parents[1]


def test_the_flags_for_gemmas_tokenizer_are_those_of_published_models():
    """Another `text.tokens` than the source's is refused; those of an npz and of a Hugging Face folder differ."""
    page = (ROOT / "docs" / "your-own-data.md").read_text()
    row = next(line for line in page.splitlines() if "gemma_tokenizer.model" in line)
    npz, folder = (flags.split() for flags in re.findall(r"`(--model[^`]*)`", row))
    recipe = str(ROOT / "configs" / "b16_own_data.py")
    text = parse_run([recipe, *npz], prog="siglip train").model.text
    assert text.vocab_size == 256_000 and text.tokens == TokenConfig(pad_id=0)
    text = parse_run([recipe, *npz, *folder], prog="siglip train").model.text
    assert text.tokens == TokenConfig(pad_id=0, lower="character", canonical="none")


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
