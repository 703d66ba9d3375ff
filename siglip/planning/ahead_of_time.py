"""The real training step, compiled for accelerators that are not there: memory per device, and what travels.

TPUs need libtpu; NVIDIA GPUs the CUDA plugin of jax, without any CUDA library. No device is opened.

The traps: without `xla_gpu_enable_triton_gemm=False` the GPU's compiler fails, as it would time kernels on a device. cuDNN's
attention asks the library itself, so it is compiled as plain XLA, whose memory is larger. A TPU program that fits takes
minutes to compile, one that does not is refused within seconds.
"""

import contextlib
import dataclasses
import os
import re
from importlib import metadata
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from siglip.errors import UserError
from siglip.planning import compile
from siglip.planning.accelerators import Topology
from siglip.training.config import TrainConfig
from siglip.training.lengths import batch_shapes
from siglip.training.loop import make_program

_GIB = {"G": 2**30, "M": 2**20, "K": 2**10, "": 1}
# What a GPU's compiler asks of the device, beside what data sheets say; the same for all since A100.
_GPU = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin} threads_per_core_limit: 2048 core_count: {cores}
  fpus_per_core: {fpus} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {hbm:.0f} l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} }} registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{name}" """
# Triton's products are timed on a device, of which there is none. Nothing runs: LLVM and ptxas need not optimize, and memory is
# planned before them.
GPU_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_autotune_level": 0,
    "xla_gpu_disable_gpuasm_optimizations": True,
}
# (multiprocessors, float32 units in each, shared bytes in each, clock GHz, L2 bytes, compute capability)
_CORES = {
    "a100": (108, 64, 167_936, 1.41, 41_943_040, 8),
    "h100": (132, 128, 233_472, 1.98, 52_428_800, 9),
    "h200": (132, 128, 233_472, 1.98, 52_428_800, 9),
    "b200": (148, 128, 233_472, 1.965, 132_644_864, 10),
    "gb200": (152, 128, 233_472, 2.062, 135_528_448, 10),
}


class CompiledStep(NamedTuple):
    """What the compiler says of one device. peak_bytes: arguments, temporaries and results, less those that share memory.

    stats: None if the program was refused; then `peak_bytes` is what it would need, as far as the compiler tells.
    compiler: name and version: memory differs by a third between versions of libtpu.
    """

    fits: bool
    peak_bytes: int | None
    stats: compile.CompiledStats | None
    refusal: str = ""
    compiler: str = ""


def compile_step(config: TrainConfig, topology: Topology) -> CompiledStep:
    """Lowers and compiles the step of `config` for `topology`.

    Raises:
        UserError: the plugin is missing, another process is using libtpu, or the config does not fit the devices.
    """
    is_gpu = not topology.accelerator.sides
    config = with_plain_attention(config) if is_gpu else config
    program = make_program(config, devices_of(topology))
    with jax.set_mesh(program.mesh):
        lowered = program.step.lower(program.abstract_state, batch_shapes(config, program.mesh))
        try:
            # A program from the cache has no schedule to read.
            jax.config.update("jax_enable_compilation_cache", False)
            options = GPU_OPTIONS if is_gpu else {}
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if not str(error).startswith("RESOURCE_EXHAUSTED"):
                raise
            return CompiledStep(False, _needed_bytes(str(error)), None, str(error).splitlines()[0], _compiler(is_gpu))
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    peak -= memory.alias_size_in_bytes
    fits = peak <= topology.accelerator.usable_bytes
    return CompiledStep(fits, peak, compile.read(compiled), compiler=_compiler(is_gpu))


def _compiler(is_gpu: bool) -> str:
    name = "jax-cuda13-plugin" if is_gpu else "libtpu"
    with contextlib.suppress(metadata.PackageNotFoundError):  # TPU_LIBRARY_PATH may name one that pip did not install
        return f"{name} {metadata.version(name)}"
    return name


def devices_of(topology: Topology) -> list[Any]:
    """Descriptions of the devices, for `jax.jit(…).lower` of shapes laid out on them.

    Raises:
        UserError: the plugin that knows them is missing, or in use by another process.
    """
    kind, plane = topology.name.split(":")
    is_gpu = not topology.accelerator.sides
    try:
        if not is_gpu:
            os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
            # Nothing here opens a chip, so several processes may compile at once, and beside one that trains.
            os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
            options = {"chip_config_name": "megacore"} if kind == "v4" else {}
            return list(topologies.get_topology_desc(f"{kind}:{plane}", "tpu", **options).devices)
        per_host, hosts = topology.shape
        text = _gpu_text(topology)
        return list(
            topologies.get_topology_desc("", "cuda", topology=f"{hosts}x1x{per_host}", target_config=text).devices
        )
    except Exception as error:  # jax and the plugins raise what they like, down to bare RuntimeErrors
        raise UserError(f"--compile for {topology.name}: {_plugin_problem(error, is_gpu)}") from error


def _plugin_problem(error: Exception, is_gpu: bool) -> str:
    message = " ".join(str(error).split())
    if re.search(r"libtpu.*(lockfile|in use|already)|ABORTED", message):
        return "another process is using libtpu, which one at a time may; wait until it has ended and start again"
    gpu = "the extra [aot] in a folder of its own: run `make aot` and start again with PYTHONPATH=build/aot"
    fix = gpu if is_gpu else "the extra [tpu]: python -m pip install -c constraints.txt -e '.[tpu]'"
    return f"the compiler for it is not installed or does not load ({message[:200]}); it is {fix}"


def _gpu_text(topology: Topology) -> str:
    kind, accelerator = topology.name.split(":")[0], topology.accelerator
    cores, fpus, shared, clock, l2, major = _CORES[kind]
    return _GPU.format(
        cores=cores, fpus=fpus, shared=shared, optin=shared - 1024, clock=clock, l2=l2, major=major,
        hbm=accelerator.hbm, memory=accelerator.memory_bytes, name=accelerator.device_kind,
    )  # fmt: skip


def with_plain_attention(config: TrainConfig) -> TrainConfig:
    """The same run, for compilers that cannot ask for a fused kernel's needs."""
    image = dataclasses.replace(config.model.image, attention="xla")
    text = dataclasses.replace(config.model.text, attention="xla")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, image=image, text=text))


def _needed_bytes(message: str) -> int | None:
    """What a refused program would need: "Used 20.65G of 15.75G hbm", "HLO temporaries (37.35G) exceeds"."""
    match = re.search(r"(?:Used |temporaries \()([\d.]+)([GMK]?)", message)
    return int(float(match[1]) * _GIB[match[2]]) if match else None
