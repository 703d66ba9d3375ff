"""`siglip plan` as a user calls it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from siglip import cli
from siglip.training.config import load_config_file

CONFIGS = Path(__file__).parents[3] / "configs"
QUICKSTART = str(CONFIGS / "quickstart.py")
BYTES = {"parameters", "optimizer", "gradients", "activations", "loss", "batch", "total", "usable"}


def plan(capfd, *args: str) -> str:
    assert cli.run(["plan", QUICKSTART, *args]) == 0
    return capfd.readouterr().out


def refusal(capfd, *args: str) -> str:
    assert cli.run(["plan", *args]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("siglip: error: "), lines
    return lines[0]


def test_json_has_the_promised_keys(capfd):
    tree = json.loads(plan(capfd, "--topology", "h100:8", "--json", "--batch-size", "128"))
    assert tree["fits"] is True and set(tree["bytes_per_device"]) >= BYTES
    assert tree["flops_per_step"] == 128 * tree["flops_per_pair"] > 0
    steps = load_config_file(QUICKSTART).total_steps
    assert tree["device_hours"] == pytest.approx(8 * steps * tree["step_s"] / 3600)
    assert tree["mesh"] == {"data": 8, "fsdp": 1} and tree["devices"] == 8 and tree["topology"] == "h100:8"
    assert tree["step_range_s"][0] <= tree["step_s"] <= tree["step_range_s"][1]


def test_lines_say_what_does_not_fit_and_how_it_would(capfd):
    large = ["--topology=h100:1", "--batch-size=2048", "--model.image.image-size", "512", "512"]
    told = plan(capfd, *large)
    assert "DOES NOT FIT" in told
    flags = next(line for line in told.splitlines() if line.startswith("to make it fit")).split()[4:]
    assert "DOES NOT FIT" not in plan(capfd, *large, *flags)
    assert "(as it is)" in plan(capfd, *large, *flags, "--search")
    assert json.loads(plan(capfd, *large, "--json"))["to_make_it_fit"].split() == flags
    assert "to_make_it_fit" not in json.loads(plan(capfd, *large, *flags, "--json"))


def test_where_nothing_fits(capfd):
    hopeless = ["--topology=h100:1", "--batch-size=2", "--model.image.image-size", "16384", "16384"]
    tree = json.loads(plan(capfd, *hopeless, "--json"))
    assert tree["fits"] is False and tree["to_make_it_fit"] is None
    assert "makes this fit on h100:1" in plan(capfd, *hopeless)
    assert "makes this fit on h100:1" in refusal(capfd, QUICKSTART, *hopeless, "--search")


def test_small_numbers_are_not_printed_as_zeros(capfd):
    told = {line[:18].strip(): line for line in plan(capfd, "--topology", "h100:8").splitlines()}
    numbers = re.findall(
        r"(?<!\S)[\d.]+(?:e-\d+)?", " ".join(told[name][18:] for name in ("parameters", "FLOPs", "step", "run"))
    )
    assert len(numbers) > 15 and all(map(float, numbers))


def test_what_is_far_too_large_for_a_gpu_is_not_compiled(capfd):
    large = ["--topology=h100:1", "--batch-size=16384", "--model.image.image-size", "512", "512", "--compile"]
    compiled = json.loads(plan(capfd, *large, "--json"))["compiled"]
    assert compiled["fits"] is False and "not compiled" in compiled["refusal"]
    assert "DOES NOT FIT: not compiled" in plan(capfd, *large)


def test_an_instant_plan_loads_no_accelerator_library(tmp_path):
    program = """
import sys, time
from siglip import cli
assert cli.run(["plan", sys.argv[1], "--topology", "h100:8"]) == 0
print(time.process_time(), *sys.modules, file=open(sys.argv[2], "w"))
"""
    recipe, out = str(CONFIGS / "b16_own_data.py"), tmp_path / "told"
    subprocess.run([sys.executable, "-c", program, recipe, str(out)], capture_output=True, check=True)
    cpu_s, *modules = out.read_text().split()
    assert float(cpu_s) < 5
    assert not [name for name in modules if re.match("libtpu|jax_plugins|jax_cuda|tensorflow|torch", name)]


def test_bad_input_is_one_line(capfd):
    assert "known are" in refusal(capfd, QUICKSTART, "--topology", "z100:8")
    assert "--topology is missing" in refusal(capfd, QUICKSTART)
    assert "does not exist" in refusal(capfd, "no.py", "--topology", "h100:8")
    assert "does not cover 8 devices" in refusal(capfd, QUICKSTART, "--topology", "h100:8", "--mesh.fsdp", "3")
    assert "batch_size=100 does not divide" in refusal(capfd, QUICKSTART, "--topology", "h100:8", "--batch-size", "100")
    few = ["--mesh.fsdp", "8", "--mesh.fsdp-min-size-bytes", "1"]
    assert "divides no dimension of" in refusal(capfd, QUICKSTART, "--topology", "h100:8", *few)


def test_a_missing_plugin_is_named(capfd):
    program = """
import importlib.util, sys
for name in ("jax_plugins", "jax_cuda13_plugin", "libtpu"):
    sys.modules[name] = None
from siglip import cli
assert [cli.run(["plan", sys.argv[1], "--topology", topology, "--compile"]) for topology in sys.argv[2:]] == [2, 2]
"""
    command = [sys.executable, "-c", program, QUICKSTART, "h100:8", "v5e:2x2"]
    # jax has said where libtpu lies, if there is one.
    env = {name: value for name, value in os.environ.items() if name != "TPU_LIBRARY_PATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    gpu, tpu = done.stderr.splitlines()
    assert "[aot]" in gpu and "make aot" in gpu and "PYTHONPATH=build/aot" in gpu and "pip install" not in gpu
    assert "pip install -c constraints.txt -e '.[tpu]'" in tpu
