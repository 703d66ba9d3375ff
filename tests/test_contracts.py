"""The import contracts of setup.cfg catch what they are there for: shown on a copy of the sources with one file changed."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(find_spec("importlinter") is None, reason="the extra `test` has import-linter")


def lint(folder: Path) -> tuple[int, str]:
    """Exit code and output of the linter in a folder that holds both packages."""
    program = "import sys; from importlinter.cli import lint_imports_command as run; sys.path.insert(0, '.'); run()"
    command = [sys.executable, "-c", program, "--config", "setup.cfg", "--no-cache"]
    done = subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path):
    for package in ("siglip", "data_pipelines"):
        shutil.copytree(
            ROOT / package,
            tmp_path / package,
            ignore=lambda folder, names: [n for n in names if "." in n and not n.endswith(".py")],
        )
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    return tmp_path


def test_the_sources_keep_every_contract(copy):
    code, told = lint(copy)
    assert code == 0 and "0 broken" in told, told
    (copy / "siglip" / "cli" / "__init__.py").write_text("import data_pipelines.errors\n")
    code, told = lint(copy)  # the composition root itself may name both sides
    assert code == 0, told


def test_what_a_contract_forbids_fails_the_lint(copy):
    forbidden = {
        ("siglip/losses.py", "import data_pipelines.order"): "siglip.losses -> data_pipelines.order",
        ("siglip/training/optim.py", "import data_pipelines.loader"): "siglip.training.optim -> data_pipelines.loader",
        ("siglip/workdir/files.py", "import siglip.training.step"): "siglip.workdir.files -> siglip.training.step",
        ("siglip/encoder.py", "import flax"): "siglip.encoder -> flax",
        ("siglip/training/loop.py", "import configs.quick"): "siglip.training.loop -> configs",
        ("data_pipelines/loader.py", "import jax"): "data_pipelines.loader -> jax",
        ("data_pipelines/records.py", "import siglip.trees"): "data_pipelines.records -> siglip.trees",
    }
    for file, line in forbidden:
        with (copy / file).open("a") as source:
            source.write(f"\n{line}\n")
    for package in ("siglip", "data_pipelines"):  # a module outside every layer
        (copy / package / "stray.py").touch()
    code, told = lint(copy)
    assert code == 1
    for words in [*forbidden.values(), "siglip.stray", "data_pipelines.stray"]:
        assert words in told, (words, told)
