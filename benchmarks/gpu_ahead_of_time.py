"""The training step compiled for an H100 that is not there: its kernels by kind, and what they take at least.

    make aot                        # the extra `aot`, the compiler without CUDA's libraries, into build/aot
    export PYTHONPATH=build/aot
    python benchmarks/gpu_ahead_of_time.py --variant B/16 --batch 512 --remat none
    python benchmarks/gpu_ahead_of_time.py --variant So400m/14 --batch 256 --scan --remat full --layers 3

Prints a table by kind of kernel and, last, one line of JSON: `ms`, `mfu`, `gb` (read and written), `temp_gib`, and what else
the tests look at. The time is a roofline (siglip/planning/kernels.py) with the rates of --rates: nothing runs.

`image_layer_gb` is what one block of the image tower reads and writes, forward and backward, outside of matrix products and
cuDNN: of the middle block where each has its name (without --scan), else the mean over all.

`float32_matmuls` counts the products of float32 arrays in the blocks, where there are none; `float32_matmuls_elsewhere` names the
others. Those are of the heads: what attention pooling makes of its one query, the gradients of its logits with respect to tokens
and query, and the linear head of an embedding.

The traps: cuBLAS and cuDNN choose their kernels on a device, so nothing is timed or tuned here; `xla_gpu_enable_triton_gemm`
has to be off, or XLA looks for a device to tune Triton's kernels on. Three questions that jax asks a device and the library
before it lowers cuDNN's attention are answered in their place: this is for looking at programs, never for running them.
"""

import argparse
import collections
import contextlib
import json
import os
import re
import sys
import time
import typing
from unittest import mock

import sides

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from siglip.models.layers import Remat
from siglip.parallel import sharding
from siglip.planning import ahead_of_time, compile, kernels
from siglip.planning.accelerators import parse_topology
from siglip.training import flops

# Where jax asks a device and the library; no public name leads there.
FUSED_ATTENTION = "jax._src.cudnn.fused_attention_stablehlo"
ANSWERS = {"check_cudnn_version": 91002, "check_compute_capability": True, "is_cuda_compute_capability_equal": False}
ROW = "{:32}{:>7}{:>9}{:>9}{:>9}{:>7}"


def compile_step(case, devices=1):
    """(compiled step, seconds) for `devices` H100s of one host."""
    described = ahead_of_time.devices_of(parse_topology(f"h100:{devices}"))
    step, abstract_state, _, mesh = sides.make_step(case, devices=described)
    model, where = case.model, NamedSharding(mesh, sharding.P_BATCH)
    batch = {
        "image": jax.ShapeDtypeStruct((case.batch_size, *model.image.image_size, 3), jnp.uint8, sharding=where),
        "text": jax.ShapeDtypeStruct((case.batch_size, model.text.length), jnp.int32, sharding=where),
    }
    start = time.perf_counter()
    with jax.set_mesh(mesh), contextlib.ExitStack() as answers:
        for name, answer in ANSWERS.items():
            answers.enter_context(mock.patch(f"{FUSED_ATTENTION}.{name}", return_value=answer))
        compiled = step.lower(abstract_state, batch).compile(compiler_options=ahead_of_time.GPU_OPTIONS)
    return compiled, time.perf_counter() - start


def summary(case, compiled, rates, devices=1):
    """(totals by kind, what the last line says)."""
    found = kernels.read_kernels(compiled.as_text())
    kinds, stats = kernels.by_kind(found, rates), compile.read(compiled)
    seconds = sum(total.seconds for total in kinds.values())
    model_flops = flops.train_flops_per_pair(case.model, batch_size=case.batch_size) * case.batch_size / devices
    blocks, elsewhere = [k for k in found if k.is_in_a_block], collections.Counter()
    for k in found:
        if k.flops and k.has_float32_operands and not k.is_in_a_block:
            elsewhere[k.path] += k.runs
    result = {
        "ms": 1e3 * seconds,
        "mfu": model_flops / seconds / flops.peak_flops("NVIDIA H100"),
        "gb": sum(total.bytes for total in kinds.values()) / 1e9,
        "temp_gib": stats.temp_bytes / 2**30,
        "kernels": sum(total.runs for total in kinds.values()),
        "matmul_tflop": stats.matmul_flops / 1e12,
        "model_tflop": model_flops / 1e12,
        "cudnn_calls": sum(k.runs for k in found if k.library_call.startswith("__cudnn$fmha")),
        "image_layer_gb": image_layer_bytes(blocks, case.model.image.spec.depth) / 1e9,
        "transposed_gb": sum(k.runs * k.bytes for k in blocks if k.is_transpose) / 1e9,
        "filled_gb": sum(k.runs * k.bytes for k in found if k.fills) / 1e9,
        "stacked_gb": sum(k.runs * k.bytes for k in found if k.kind == "stacks of a scan") / 1e9,
        "float32_matmuls": sum(k.runs for k in blocks if k.flops and k.has_float32_operands),
        "float32_matmuls_elsewhere": dict(elsewhere),
        "in_flight": [f._asdict() for f in stats.in_flight],
    }
    return kinds, result


def image_layer_bytes(blocks, depth):
    """Bytes of one block of the image tower, forward and backward, but for matrix products and attention."""
    moving = [k for k in blocks if "/img/" in k.path and not k.flops]
    middle = [k for k in moving if re.search(rf"encoderblock_{depth // 2}\b", k.path)]
    return sum(k.runs * k.bytes for k in middle or moving) / (1 if middle else depth)


def parse():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="B/16", help="image tower; the text tower is of the same size")
    parser.add_argument("--batch", type=int, default=512, help="pairs on each device")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--remat", choices=typing.get_args(Remat), default="none")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--residual-dtype", help="of the residual stream; default: the model's")
    parser.add_argument("--scan", action="store_true", help="one compiled block for all, with stacked parameters")
    parser.add_argument("--layers", type=int, help="blocks of each tower instead of the variant's")
    parser.add_argument("--devices", type=int, default=1, help="of one host")
    parser.add_argument(
        "--rates", type=float, nargs=3, default=[700, 400, 2.85], metavar=("MATMUL", "ATTENTION", "MEMORY"),
        help="TFLOP/s of matrix products and of attention, TB/s of the memory",
    )  # fmt: skip
    parser.add_argument("--hlo", help="also write the compiled program to this file")
    return parser.parse_args()


def main():
    """Prints the table and the line."""
    args = parse()
    jax.config.update("jax_enable_compilation_cache", False)  # a program from the cache has no text to read
    tower = {"scan": args.scan, "dtype": "bfloat16", "remat": args.remat, "attention": args.attention}
    tower |= {"depth": args.layers} if args.layers else {}
    tower |= {"residual_dtype": args.residual_dtype} if args.residual_dtype else {}
    case = sides.make_case(args.variant, image_size=args.image_size, batch_size=args.batch * args.devices, **tower)
    compiled, compile_s = compile_step(case, args.devices)
    if args.hlo:
        with open(args.hlo, "w", encoding="utf-8") as file:
            file.write(compiled.as_text())
    kinds, result = summary(case, compiled, kernels.Rates(*(1e12 * rate for rate in args.rates)), args.devices)
    print(ROW.format("kind of kernel", "runs", "TFLOP", "GB", "ms", ""))
    for kind, total in kinds.items():
        cells = (total.runs, f"{total.flops / 1e12:.2f}", f"{total.bytes / 1e9:.1f}", f"{1e3 * total.seconds:.2f}")
        print(ROW.format(kind, *cells, f"{1e3 * total.seconds / result['ms']:.1%}"))
    print(json.dumps(result | {"compile_s": compile_s, "jax": jax.__version__}))


if __name__ == "__main__":
    sys.exit(main())
