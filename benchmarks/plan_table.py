"""Plans of all recipes on some topologies, as docs/scaling.md shows them, and estimated memory beside the compiler's.

    python benchmarks/plan_table.py                      # the table of recipes and topologies
    python benchmarks/plan_table.py --write              # the same into docs/scaling.md, and the plan into every recipe's header
    python benchmarks/plan_table.py --compile h100       # compiles those CASES whose topology starts so, and keeps what it finds
    python benchmarks/plan_table.py --compare            # estimate / compiler of all that were compiled

A cell is the fastest plan that fits, by `siglip plan --search`: device hours of the whole run at the expected MFU, and what the
recipe needs changed. Memory that was compiled is in benchmarks/results/plan_compiled.json; tests compare estimates with it.
"""

import argparse
import json
import re
from pathlib import Path

import jax

from data_pipelines.loader import DataConfig
from data_pipelines.order.mixture import SourceConfig
from siglip.errors import UserError
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.parallel.sharding import MeshConfig
from siglip.planning.accelerators import parse_topology
from siglip.planning.ahead_of_time import compile_step, with_plain_attention
from siglip.planning.estimate import Estimate, estimate, shapes_of
from siglip.planning.search import search
from siglip.training.config import TrainConfig, load_config_file
from siglip.training.objective import LossConfig
from siglip.training.optim import OptimConfig

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "plan_compiled.json"
SCALING = ROOT / "docs" / "scaling.md"
TOPOLOGIES = ("h100:8", "h100:8x8", "v4:2x4x4", "v5e:16x16", "v5p:8x8x8")
BEGIN, END = "<!-- benchmarks/plan_table.py writes from here -->", "<!-- to here -->"
HEADER = re.compile(r"^(?:PLAN|Devices and time:) (\S+?)(?:,.*)?$", re.M)
# Compiled for memory: "topology image text px batch remat fsdp micro". The first lines were used to fit, the others not.
FITTED = """
v4:2x2x1   B/16      B      224  4096  full 1  -
v5e:16x16  So400m/14 So400m 224 32768  full 16 -
h100:8     B/16      B      224  4096  full 1  -
h100:8     B/16      B      224  4096  dots 1  -
h100:8     B/16      B      224  2048  none 1  -
"""
UNSEEN = """
v5e:16x16  G/14      So400m 224 32768  full 64 -
v5e:4x4    B/16      B      224  1024  dots 1  -
v5e:8x8    L/16      L      256  8192  full 8  -
h100:8     So400m/14 So400m 224  2048  full 8  -
h100:8     L/16      L      256  2048  dots 1  -
h100:8x8   So400m/14 So400m 384  8192  full 8  -
h100:1     B/16      B      224  4096  full 1  512
"""


def cases() -> list[str]:
    """The lines above, one space between words."""
    return [" ".join(line.split()) for line in (FITTED + UNSEEN).strip().splitlines() if line.strip()]


def make_config(case: str) -> tuple[TrainConfig, str]:
    """The run and topology of a line: bfloat16, scanned blocks, AdamW in float32, 64 tokens."""
    topology, image, text, px, batch_size, remat, fsdp, micro = case.split()
    towers = {"scan": True, "remat": remat, "dtype": "bfloat16"}
    vit = ImageConfig(image, image_size=(int(px), int(px)), **towers)
    config = TrainConfig(
        data=DataConfig(sources=(SourceConfig("pairs.tar"),), tokenizer="pieces.model"),
        model=ModelConfig(vit, TextConfig(text, **towers), (None, vit.spec.width)),
        total_steps=100_000,
        batch_size=int(batch_size),
        workdir="runs/plan",
        mesh=MeshConfig(fsdp=int(fsdp)),
        loss=LossConfig(micro_batch_size=None if micro == "-" else int(micro)),
        optim=OptimConfig(warmup_steps=1000),
    )
    return config, topology


def estimated_peak(case: str) -> int:
    """Of what the compiler counted: one batch, not the next one that waits, and on GPUs attention without cuDNN."""
    config, topology = make_config(case)
    is_gpu = not parse_topology(topology).accelerator.sides
    plan = estimate(with_plain_attention(config) if is_gpu else config, parse_topology(topology))
    return plan.bytes_per_device["total"] - plan.bytes_per_device["batch"] // 2


def recipes() -> dict[str, TrainConfig]:
    """Those that name a topology in their header, by name; the others train on the shipped sample."""
    paths = sorted((ROOT / "configs").glob("*.py"))
    return {path.stem: load_config_file(str(path)) for path in paths if HEADER.search(path.read_text())}


def header(plan: Estimate) -> str:
    """The line of a recipe's docstring that says what it takes."""
    memory, topology = plan.bytes_per_device, plan.topology.name
    assert plan.fits, f"does not fit on {topology}: {memory['total'] / 2**30:.2f} GiB"
    return (
        f"Devices and time: {topology}, {memory['total'] / 2**30:.1f} of {memory['usable'] / 2**30:.1f} GiB, "
        f"{plan.run_s / 3600:,.1f} h, {plan.device_hours:,.0f} device hours (siglip plan, MFU {plan.mfu[1]:.0%})."
    )


def table() -> list[str]:
    """Rows of recipes, columns of topologies."""
    lines = [f"| recipe | {' | '.join(TOPOLOGIES)} |", f"|---|{'---|' * len(TOPOLOGIES)}"]
    for name, config in recipes().items():
        shapes = shapes_of(config)
        lines.append(f"| {name} | {' | '.join(_cell(config, shapes, topology) for topology in TOPOLOGIES)} |")
        print(lines[-1], flush=True)
    return lines


def _cell(config: TrainConfig, shapes, topology: str) -> str:
    try:
        found = search(config, parse_topology(topology), shapes)
    except UserError:  # the batch does not divide
        return "–"
    if not found:
        return "does not fit"
    plan, changed = found[0].estimate, re.sub(r"--model\.text\.remat \S+ ?", "", found[0].flags)
    changed = re.sub(r"--(mesh|model\.image|loss)\.", "", changed).strip()
    cell = f"{plan.device_hours:,.0f} h, {plan.bytes_per_device['total'] / 2**30:.1f} GiB"
    return f"{cell}, {changed}" if changed else cell


def write() -> None:
    """The table into docs/scaling.md, and headers into recipes."""
    lines, text = table(), SCALING.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    SCALING.write_text(f"{before}{BEGIN}\n" + "\n".join([*lines, "", *compare()]) + f"\n{END}{after}")
    for name, config in recipes().items():
        path = ROOT / "configs" / f"{name}.py"
        match = HEADER.search(path.read_text())
        path.write_text(path.read_text().replace(match[0], header(estimate(config, parse_topology(match[1])))))


def compile_cases(start: str) -> None:
    """Compiles, and keeps bytes of arguments, temporaries and peak."""
    for case in (case for case in cases() if case.startswith(start)):
        config, topology = make_config(case)
        found = compile_step(config, parse_topology(topology))
        stats = found.stats
        known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}  # others compile, too
        known[case] = {
            "peak_bytes": found.peak_bytes,
            "temp_bytes": stats and stats.temp_bytes,
            "argument_bytes": stats and stats.argument_bytes,
            "collective_bytes": stats and stats.collective_bytes,
        }
        RESULTS.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
        print(case, f"{(found.peak_bytes or 0) / 2**30:.2f} GiB", flush=True)


def compare() -> list[str]:
    """Estimate, compiler and their ratio."""
    known = json.loads(RESULTS.read_text())
    lines = [
        "| topology, image, text, px, batch, remat, fsdp, micro-batch | estimate GiB | compiler GiB | ratio | |",
        "|---|---|---|---|---|",
    ]
    for case in (case for case in cases() if case in known):
        estimated, compiled = estimated_peak(case), known[case]["peak_bytes"]
        used = "fitted" if case in cases()[: len(FITTED.strip().splitlines())] else "unseen"
        lines.append(
            f"| {case} | {estimated / 2**30:.2f} | {compiled / 2**30:.2f} | {estimated / compiled:.2f} | {used} |"
        )
    return lines


def main() -> None:
    """Parses the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--compile", metavar="START")
    parser.add_argument("--compare", action="store_true")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if args.compile is not None:
        compile_cases(args.compile)
    elif args.compare:
        print("\n".join(compare()))
    elif args.write:
        write()
    else:
        table()


if __name__ == "__main__":
    main()
