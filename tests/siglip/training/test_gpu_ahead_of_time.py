"""The training step compiled for an H100 ahead of time, without one: what XLA makes of the towers' blocks.

Needs jax's CUDA plugin (`make aot`), not CUDA. B/16 at 224 px, 512 pairs, three layers a tower.
"""

import functools
import json
import os
import re
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.interop,
    pytest.mark.slow,
    pytest.mark.skipif(util.find_spec("jax_plugins") is None, reason="needs the extra `aot`: jax-cuda13-plugin"),
]

EMBEDDING_GB = 0.1  # the gradient of 32 000 rows begins with zeros, 98 MB
ROOT = Path(__file__).parents[3]


@functools.cache
def compiled_step(*options):
    """The last line of the benchmark, for three layers."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_ahead_of_time.py"), "--layers", "3", *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_DEFAULT_MATMUL_PRECISION", None)  # the tests' own: the benchmark's program is the trainer's
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_attention_is_cudnns_and_products_are_bfloat16():
    step = compiled_step()
    assert step["cudnn_calls"] == 2 * 3 * 2  # towers, layers, forward and backward
    assert step["float32_matmuls"] == 0


def test_float32_products_are_the_heads_alone():
    heads = re.compile(r"/img/MAPHead_0/MultiHeadDotProductAttention_0/|/txt/head/")
    paths = compiled_step()["float32_matmuls_elsewhere"]
    assert [path for path in paths if not heads.search(path)] == []


def test_every_product_is_counted():
    # Three layers of both towers, patch embedding, heads and loss, forward and backward; nothing again.
    assert compiled_step()["matmul_tflop"] == pytest.approx(compiled_step()["model_tflop"], rel=0.01)


def test_the_residual_stream_is_never_transposed():
    assert compiled_step()["transposed_gb"] == 0


def test_no_bias_is_broadcast_to_memory():
    assert compiled_step()["filled_gb"] <= EMBEDDING_GB


def test_a_layer_moves_what_a_float32_stream_needs():
    assert compiled_step()["image_layer_gb"] <= 9.2


def test_a_layer_moves_what_a_bfloat16_stream_needs():
    assert compiled_step("--residual-dtype", "bfloat16")["image_layer_gb"] <= 5.7


def test_a_scan_keeps_no_stacks():
    step = compiled_step("--scan")
    assert step["stacked_gb"] == 0 and step["filled_gb"] <= EMBEDDING_GB
