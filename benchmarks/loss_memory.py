"""What the sigmoid loss costs per device as the global batch grows: temporaries, bytes moved, FLOPs, compile time.

    python benchmarks/loss_memory.py --out loss_memory.json                                    # 8 devices of this CPU
    python benchmarks/loss_memory.py --pairs 8192 --turns 5                                    # and how long they take
    python -m pip install -c constraints.txt 'jax[tpu]'                                        # about 135 MB
    python benchmarks/loss_memory.py --topology v5e:16x16 --dtype bfloat16 --out loss_memory.json

Value and gradients for [pairs, width] embeddings are compiled, not run, for 8 forced host devices or ahead of time for a TPU
topology; no TPU is needed. It prints a table; --out writes every number, and a plot next to it.

dense        sigmoid_loss under GSPMD, as public trainers do it: all [b, b] logits spread over the devices
gathered     every device gathers all texts: [b / devices, b] logits, autodiff
scan         chunks are gathered one after the other under autodiff: every tile is kept for the backward pass
all_gather   chunked_sigmoid_loss, chunks gathered, gradients in the same pass
ring         chunked_sigmoid_loss, chunks passed around a ring, gradients in the same pass

matmuls: how many products of a tile per logit the compiled program computes, by its own FLOP count (3: none is computed twice).
moved: the larger side of every collective. in flight: the share of it that the schedule hides behind matrix products.
A ! marks a program that the compiler refuses because it does not fit.
"""

import argparse
import functools
import json
import pathlib
import re
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from siglip.losses import chunked_sigmoid_loss, sigmoid_loss
from siglip.planning import ahead_of_time, compile
from siglip.planning.accelerators import parse_topology

AXIS = "data"
ROW = "{:12}{:>9}{:>10}  {:11}{:>11}{:>9}{:>11}{:>11}{:>11}{:>8}"
HEADER = ROW.format(
    "topology", "devices", "pairs", "loss", "temp MiB", "matmuls", "moved MiB", "in flight", "compile s", "run s"
)
SCAN_CHUNK = 64


def gathered(zimg, ztxt, t, b, *, mesh):
    """Every device gathers all texts at once; autodiff saves the block of logits."""

    @functools.partial(_shard_map, mesh=mesh)
    def per_device(zimg, ztxt, t, b):
        return lax.psum(_block(zimg, lax.all_gather(ztxt, AXIS, tiled=True), _own(zimg), t, b), AXIS)

    return per_device(zimg, ztxt, t, b) / zimg.shape[0]


def scan(zimg, ztxt, t, b, *, mesh):
    """One chunk of every device at a time, under autodiff: the loop saves what every iteration computed."""

    @functools.partial(_shard_map, mesh=mesh)
    def per_device(zimg, ztxt, t, b):
        devices, block = lax.axis_size(AXIS), ztxt.shape[0]
        chunk = min(SCAN_CHUNK, block)
        assert block % chunk == 0, f"{block} pairs a device are not whole chunks of {chunk}"

        def turn(total, j):
            texts = lax.all_gather(lax.dynamic_slice_in_dim(ztxt, j * chunk, chunk), AXIS, tiled=True)
            rows = (jnp.arange(devices)[:, None] * block + j * chunk + jnp.arange(chunk)).reshape(-1)
            own = _own(zimg)[:, None] == rows[None, :]
            return total + _block(zimg, texts, own, t, b), None

        total = jnp.float32(0) + 0 * jnp.sum(zimg[:1, :1]).astype(jnp.float32)
        return lax.psum(lax.scan(turn, total, jnp.arange(block // chunk))[0], AXIS)

    return per_device(zimg, ztxt, t, b) / zimg.shape[0]


def _shard_map(function, *, mesh):
    batch = PartitionSpec(AXIS)
    specs = (batch, batch, PartitionSpec(), PartitionSpec())
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())


def _own(zimg):
    return lax.axis_index(AXIS) * zimg.shape[0] + jnp.arange(zimg.shape[0])


def _block(zimg, ztxt, own, t, b):
    logits = jnp.exp(t) * jnp.matmul(zimg, ztxt.T, preferred_element_type=jnp.float32) + b
    positive = own if own.ndim == 2 else own[:, None] == jnp.arange(ztxt.shape[0])[None, :]
    return -jnp.sum(jax.nn.log_sigmoid(jnp.where(positive, logits, -logits)))


LOSSES = {
    "dense": lambda *args, mesh: sigmoid_loss(*args),
    "gathered": gathered,
    "scan": scan,
    "all_gather": functools.partial(chunked_sigmoid_loss, impl="all_gather"),
    "ring": functools.partial(chunked_sigmoid_loss, impl="ring"),
}


def measure(name, mesh, pairs, args):
    """Compiles value and gradients. -> the program's own figures, and the program, or None if it does not fit"""
    batch, replicated = NamedSharding(mesh, PartitionSpec(AXIS)), NamedSharding(mesh, PartitionSpec())
    z = jax.ShapeDtypeStruct((pairs, args.width), args.dtype, sharding=batch)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated)
    row = {"loss": name, "pairs": pairs, "devices": mesh.size, "width": args.width, "dtype": args.dtype}
    function = jax.value_and_grad(functools.partial(LOSSES[name], mesh=mesh), argnums=(0, 1, 2, 3))
    # By default the dense loss returns the texts' gradient whole on every device.
    outputs = (replicated, (batch, batch, replicated, replicated))
    start = time.monotonic()
    try:
        program = jax.jit(function, out_shardings=outputs).lower(z, z, scalar, scalar).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"temporaries \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", str(error))
        if needed is None:
            raise
        return row | {"needs_gib": float(needed[1]), "compile_s": time.monotonic() - start}, None
    row["compile_s"] = time.monotonic() - start
    stats = compile.read(program)
    moved = sum(stats.collective_bytes.values())
    row |= {
        "temp_bytes": stats.temp_bytes,
        "matmuls": stats.matmul_flops / (2 * pairs**2 * args.width / mesh.size),
        "collective_bytes": stats.collective_bytes,
        "in_flight": sum(f.bytes * f.runs for f in stats.in_flight if f.matmuls) / moved if moved else 0.0,
        "in_flight_collectives": [f._asdict() for f in stats.in_flight],
    }
    return row, program


def run_in_turn(programs, mesh, pairs, args):
    """Seconds per run of every program, run in turn `args.turns` times."""
    rng, batch = np.random.default_rng(0), NamedSharding(mesh, PartitionSpec(AXIS))
    z = rng.normal(size=(2, pairs, args.width))
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    replicated = NamedSharding(mesh, PartitionSpec())
    inputs = [jax.device_put(jnp.asarray(side, args.dtype), batch) for side in z]
    inputs += [jax.device_put(jnp.float32(value), replicated) for value in (np.log(10.0), -10.0)]
    seconds = {name: [] for name in programs}
    for turn in range(args.turns + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*inputs))
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def show(topology, row):
    """Prints a row as a line of the table."""
    if "needs_gib" in row:
        cells = (f"{row['needs_gib']:.1f} GiB!", "", "", "")
    else:
        moved = sum(row["collective_bytes"].values()) / 2**20
        cells = (f"{row['temp_bytes'] / 2**20:.2f}", f"{row['matmuls']:.2f}", f"{moved:.0f}", f"{row['in_flight']:.0%}")
    run_s = f"{statistics.median(row['run_s']):.2f}" if "run_s" in row else ""
    cells = (row["devices"], row["pairs"], row["loss"], *cells, f"{row['compile_s']:.1f}", run_s)
    print(ROW.format(topology, *cells), flush=True)


def plot(rows, path):
    """Plots temporaries against the batch, one panel per topology; a cross marks what a program that does not fit would need."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(row["topology"] for row in rows))
    figure, panels = plt.subplots(1, len(names), figsize=(1.5 + 4 * len(names), 4), sharey=True, squeeze=False)
    for panel, topology in zip(panels[0], names, strict=True):
        for name in LOSSES:
            mine = [row for row in rows if row["topology"] == topology and row["loss"] == name]
            fits = sorted((row["pairs"], row["temp_bytes"] / 2**20) for row in mine if "temp_bytes" in row)
            refused = [(row["pairs"], row["needs_gib"] * 2**10) for row in mine if "needs_gib" in row]
            if mine:
                (line,) = panel.plot(*zip(*fits, strict=True) if fits else ((), ()), marker="o", label=name)
                panel.scatter(*zip(*refused, strict=True) if refused else ((), ()), marker="x", color=line.get_color())
        panel.set(xscale="log", yscale="log", xlabel="pairs in the global batch", title=topology)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("loss temporaries per device, MiB")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def devices_of(topology):
    """The devices of a TPU topology such as v5e:16x16, or host devices for cpu:8."""
    if topology.startswith("cpu"):
        return jax.devices("cpu")[: int(topology.split(":")[1])]
    return ahead_of_time.devices_of(parse_topology(topology))


def parse():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--topology", nargs="+", default=["cpu:8"], help="cpu:N, or TPU topologies: v5e:16x16 v5p:4x4x4 …"
    )
    parser.add_argument("--pairs", nargs="+", type=int, default=[4096, 32768, 262144, 1048576], help="global batches")
    parser.add_argument("--pairs-per-device", type=int, help="instead of --pairs: the batch grows with the devices")
    parser.add_argument("--loss", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument(
        "--turns", type=int, default=0, help="on host devices: also run each program this many times, in turn"
    )
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--out", type=pathlib.Path, help="JSON file, and a .png of the same name; new rows are added to the file's"
    )
    return parser.parse_args()


def main():
    """Prints a row per topology, batch and loss."""
    args = parse()
    jax.config.update("jax_platforms", "cpu")
    host = [int(topology.split(":")[1]) for topology in args.topology if topology.startswith("cpu")]
    jax.config.update("jax_num_cpu_devices", max(host, default=1))
    jax.config.update("jax_enable_compilation_cache", False)
    rows = json.loads(args.out.read_text()) if args.out and args.out.exists() else []
    print(f"jax {jax.__version__}, width {args.width}, {args.dtype}\n{HEADER}")
    for topology in args.topology:
        devices = devices_of(topology)
        mesh = Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))
        for pairs in [args.pairs_per_device * mesh.size] if args.pairs_per_device else args.pairs:
            measured = {name: measure(name, mesh, pairs, args) for name in args.loss}
            programs = {name: program for name, (_, program) in measured.items() if program is not None}
            on_host = args.turns and topology.startswith("cpu")
            seconds = run_in_turn(programs, mesh, pairs, args) if on_host else {}
            for name, (row, _) in measured.items():
                row = {"topology": topology, "jax": jax.__version__} | row
                row |= {"run_s": seconds[name]} if name in seconds else {}
                show(topology, row)
                key = ("topology", "pairs", "loss", "width", "dtype")
                rows = [r for r in rows if any(r[k] != row[k] for k in key)] + [row]
                if args.out:
                    args.out.write_text(json.dumps(rows, indent=1))
    if args.out:
        plot(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
