"""The real step compiled for hardware that is not there. Needs libtpu, and jax's CUDA plugin (`make interop`, `make aot`)."""

import dataclasses
import re
import subprocess
import sys

import pytest

from siglip.parallel.sharding import MeshConfig
from siglip.planning import ahead_of_time
from siglip.planning.accelerators import parse_topology
from siglip.planning.estimate import estimate
from tests.siglip.planning.plans import make_config, tiny

B16 = make_config("B/16", "B", batch_size=4096)
SMALL = dataclasses.replace(tiny(B16), batch_size=64, mesh=MeshConfig(fsdp=2, fsdp_min_size_bytes=1024))
pytestmark = [pytest.mark.interop]


def test_what_a_refusal_says_is_read():
    assert ahead_of_time._needed_bytes("RESOURCE_EXHAUSTED: Used 20.50G of 15.75G hbm.") == int(20.5 * 2**30)
    assert ahead_of_time._needed_bytes("memory required for HLO temporaries (512.5M) exceeds") == int(512.5 * 2**20)
    assert ahead_of_time._needed_bytes("out of memory") is None


def test_a_step_for_four_tpus_while_another_process_holds_the_lock():
    pytest.importorskip("libtpu")
    program = """
import os; os.environ["TPU_SKIP_MDS_QUERY"] = "1"
from jax.experimental import topologies
topologies.get_topology_desc("v5e:2x2", "tpu")
print("held", flush=True); input()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as holder:
        try:
            assert holder.stdout.readline() in ("held\n", "")  # "": yet another process has it
            check(SMALL, "v5e:2x2")
        finally:
            holder.kill()


def test_a_step_for_eight_gpus():
    pytest.importorskip("jax_cuda13_plugin")
    check(SMALL, "h100:8")
    assert len(ahead_of_time.devices_of(parse_topology("b200:8x2"))) == 16


def check(config, topology):
    """It fits, its arguments are the state and one batch, and the collectives are those that the plan expects."""
    compiled, plan = (call(config, parse_topology(topology)) for call in (ahead_of_time.compile_step, estimate))
    memory = plan.bytes_per_device
    assert re.fullmatch(r"(libtpu|jax-cuda13-plugin) \d+\.\d+\.\S+", compiled.compiler)
    assert compiled.fits and compiled.peak_bytes > compiled.stats.temp_bytes > 0
    arguments = memory["parameters"] + memory["optimizer"] + memory["batch"] // 2
    # Small arrays are padded to whole tiles.
    assert arguments <= compiled.stats.argument_bytes < 3 * arguments
    assert {"all-gather", "all-reduce"} <= compiled.stats.collective_bytes.keys()


def test_a_step_that_does_not_fit_is_refused_with_what_it_needs():
    pytest.importorskip("libtpu")
    refused = ahead_of_time.compile_step(dataclasses.replace(B16, batch_size=2**16), parse_topology("v5e:2x2"))
    assert not refused.fits and refused.stats is None
    assert refused.peak_bytes > parse_topology("v5e:2x2").accelerator.usable_bytes
