"""What the README installs can be installed: the versions of constraints.txt go together in every extra of setup.cfg."""

import configparser
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
# To know what CUDA's wheels need, pip fetches them whole from some registries: gigabytes.
EXTRAS = [extra for extra in SETUP["options.extras_require"] if extra != "gpu"]


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="constraints.txt is of Python 3.11")
@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_can_be_installed(extra):
    """pip resolves it, and installs nothing."""
    command = ["install", "--dry-run", "--quiet", "--no-build-isolation", "--constraint", "constraints.txt"]
    command = [sys.executable, "-m", "pip", *command, "--editable", f".[{extra}]"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
