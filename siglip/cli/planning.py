"""`siglip plan`: does a run fit on hardware that is not there, how long does it take, what has to be changed."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping

import jax

from siglip.cli.training import parse_run
from siglip.errors import UserError
from siglip.planning import ahead_of_time, estimate
from siglip.planning.accelerators import Topology, parse_topology
from siglip.planning.search import Candidate, search
from siglip.training.config import TrainConfig, resolve

USAGE = """usage: siglip plan CONFIG --topology T [--compile] [--search] [--json] [any flag of siglip train]

T is a slice of TPUs (v4:2x2x1, v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:2x2x1) or GPUs (a100:8, h100:8, h200:8, b200:8;
h100:8x128 are 128 hosts of 8). Prints memory per device, FLOPs, traffic, a range of step times, and the cores that decode.
Nothing is compiled, and no device is needed.
  --compile   compiles the real step for T and reports the compiler's memory, in minutes. TPUs need the extra [tpu]; GPUs
              need [gpu], or without CUDA [aot] in a folder of its own: `make aot`, then PYTHONPATH=build/aot siglip plan …
              A step whose estimate is more than 1.25 times the memory of a GPU is not compiled: it does not fit
  --search    tries mesh.fsdp, remat and loss.micro_batch_size, and plans the fastest of those that leave a tenth of the
              memory free; if there is none, the fastest that fits
  --json      one JSON object instead of lines; `to_make_it_fit`, where the plan does not fit, has the flags to add, or null
Exit code 0 whether it fits or not; 2 if --search finds nothing that fits."""

_SWITCHES = ("--compile", "--search", "--json")
_MAX_SHOWN = 5
# Estimates are at most a fifth above the compiler (docs/scaling.md); this many times the memory needs no compiler, which on GPUs
# finds out only at its end. TPUs' refuses within seconds, and says by how much.
_BEYOND_DOUBT = 1.25


def plan_command(args: list[str]) -> None:
    """Parses, plans and prints."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return
    jax.config.update("jax_platforms", "cpu")  # where there is an accelerator, it is left alone
    switches = {name: name in args for name in _SWITCHES}
    name, flags = _take_topology([arg for arg in args[1:] if arg not in _SWITCHES])
    topology = parse_topology(name)
    config = resolve(parse_run([args[0], *flags], prog="siglip plan"))
    shapes = estimate.shapes_of(config)
    candidates = None
    if switches["--search"]:
        candidates = search(config, topology, shapes)
        if not candidates:
            raise UserError(_nothing_fits(config, topology))
        config = candidates[0].config
    if switches["--compile"] and not topology.accelerator.sides:
        config = ahead_of_time.with_plain_attention(config)  # what is compiled is what is planned
    plan = estimate.estimate(config, topology, shapes)
    compiled = None
    if switches["--compile"]:
        compiled = _compile(config, topology, plan)
    better = [] if plan.fits else [candidate.flags for candidate in search(config, topology, shapes)]
    if switches["--json"]:
        tree = to_json(plan, compiled, candidates)
        print(json.dumps(tree if plan.fits else tree | {"to_make_it_fit": next(iter(better), None)}, indent=1))
        return
    print("\n".join(to_lines(plan, config)))
    if candidates:
        print("\n".join(_search_lines(candidates)))
    elif not plan.fits:
        print(f"to make it fit     {better[0]}" if better else _nothing_fits(config, topology))
    if compiled:
        print("\n".join(_compiled_lines(compiled, plan)))


def _compile(config: TrainConfig, topology: Topology, plan: estimate.Estimate) -> ahead_of_time.CompiledStep:
    times = plan.bytes_per_device["total"] / plan.bytes_per_device["usable"]
    if times > _BEYOND_DOUBT and not topology.accelerator.sides:
        return ahead_of_time.CompiledStep(
            False, None, None, f"not compiled, as the estimate is {times:.1f} times what a device has"
        )
    with _quiet_stderr():
        return ahead_of_time.compile_step(config, topology)


def _take_topology(args: list[str]) -> tuple[str, list[str]]:
    for place, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name == "--topology":
            rest = args[:place] + args[place + (1 if equals else 2) :]
            if value := value if equals else "".join(args[place + 1 : place + 2]):
                return value, rest
    raise UserError(
        "--topology is missing; name the devices to plan for, e.g. --topology h100:8 or --topology v5e:16x16"
    )


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The plugins' own messages, from C++, are not for users; what fails is raised."""
    if os.environ.get("SIGLIP_TRACEBACK"):
        yield
        return
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _nothing_fits(config: TrainConfig, topology: Topology) -> str:
    advice = "" if config.optim.name == "adafactor" else ", --optim.name adafactor, or --optim.momentum-dtype bfloat16"
    return f"no mesh, remat or micro-batch makes this fit on {topology.name}; use more or larger devices{advice}"


def to_json(
    plan: estimate.Estimate, compiled: ahead_of_time.CompiledStep | None, candidates: list[Candidate] | None = None
) -> dict:
    """The plan as JSON values."""
    tree = dataclasses.asdict(plan)
    tree |= {"topology": plan.topology.name, "devices": plan.topology.devices, "fits": plan.fits}
    tree["mesh"] = {"data": plan.mesh[0], "fsdp": plan.mesh[1]}
    if candidates:
        tree["search"] = [
            {"flags": c.flags, "step_s": c.estimate.step_s, "total_bytes": c.estimate.bytes_per_device["total"]}
            for c in candidates[:_MAX_SHOWN]
        ]
    if compiled is not None:
        stats = compiled.stats
        tree["compiled"] = {
            "fits": compiled.fits,
            "temp_bytes": stats and stats.temp_bytes,
            "argument_bytes": stats and stats.argument_bytes,
            "peak_bytes": compiled.peak_bytes,
            "collective_bytes": stats and stats.collective_bytes,
            "in_flight_bytes": stats and _in_flight(stats),
            "refusal": compiled.refusal,
            "compiler": compiled.compiler,
        }
    return tree


def _in_flight(stats) -> dict[str, int]:
    """Of each kind of collective the bytes that travel while matrix products run."""
    kinds = {flight.kind for flight in stats.in_flight}
    return {kind: sum(f.bytes * f.runs for f in stats.in_flight if f.kind == kind and f.matmuls) for kind in kinds}


def to_lines(plan: estimate.Estimate, config: TrainConfig) -> list[str]:
    """The plan for people."""
    (data, fsdp), (low, expected, high), (fast, slow) = plan.mesh, plan.mfu, plan.step_range_s
    accelerator, hosts, memory = plan.topology.accelerator, plan.topology.hosts, plan.bytes_per_device
    image, text, pairs = config.model.image, config.model.text, config.total_steps * config.batch_size
    sizes = {name: n for name, n in memory.items() if name not in ("total", "usable")}
    fraction = "" if accelerator.sides else " (XLA_PYTHON_CLIENT_MEM_FRACTION=.92)"
    again = f", {plan.recomputed:.2f} times that with what is computed again" if plan.recomputed > 1 else ""
    rows = {
        "devices": f"{data * fsdp} x {accelerator.device_kind} on {hosts} host(s), mesh data={data} fsdp={fsdp}",
        "parameters": ", ".join(f"{part} {_fixed(n / 1e6, 1)} M" for part, n in plan.parameters.items()),
        "memory per device": f"{_gib(memory['total'])} of {_gib(memory['usable'])} GiB{fraction}: {_verdict(plan.fits)}",
        "  GiB": _listed(sizes),
        "  activations": f"remat {_listed(plan.activations_by_remat)}; now image {image.remat}, text {text.remat}",
        "FLOPs": f"{_fixed(plan.flops_per_pair / 1e9, 1)} G a pair, {_fixed(plan.flops_per_step / 1e12, 1)} T a step{again}",
        "traffic, GiB": f"{_listed(plan.collective_bytes) or 'none'}: at least {_fixed(plan.collective_s, 3)} s a step",
        "step": f"{_fixed(plan.step_s, 3)} s at an MFU of {expected:.0%}; "
        f"{_fixed(fast, 3)} to {_fixed(slow, 3)} s at {high:.0%} to {low:.0%}",
        "run": f"{config.total_steps} steps, {_fixed(pairs / 1e9, 2)} 10^9 pairs: {_fixed(plan.run_s / 3600, 1)} h, "
        f"{_fixed(plan.device_hours, 0)} device hours",
        "input": f"{plan.pairs_per_s:.0f} pairs/s: {plan.decoding_cores:.0f} cores decoding, "
        f"{plan.storage_bytes_per_s / 1e6:.0f} MB/s from storage, over all hosts",
    }
    return [f"{name:18} {value}" for name, value in rows.items()]


def _verdict(fits: bool) -> str:
    return "fits" if fits else "DOES NOT FIT"


def _fixed(value: float, decimals: int) -> str:
    """With so many decimals; with more where these would be zeros."""
    return f"{value:.{decimals}f}" if round(value, decimals) else f"{value:.1g}"


def _listed(sizes: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {_gib(n)}" for name, n in sizes.items() if n)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _search_lines(candidates: list[Candidate]) -> list[str]:
    lines = ["best that fit      step s   GiB   flags to add"]
    for c in candidates[:_MAX_SHOWN]:
        total = _gib(c.estimate.bytes_per_device["total"])
        lines.append(f"                   {c.estimate.step_s:6.3f} {total:>6}  {c.flags or '(as it is)'}")
    return lines


def _compiled_lines(compiled: ahead_of_time.CompiledStep, plan: estimate.Estimate) -> list[str]:
    usable, stats = _gib(plan.bytes_per_device["usable"]), compiled.stats
    if stats is None:
        needed = f"{_gib(compiled.peak_bytes)} of {usable} GiB" if compiled.peak_bytes else compiled.refusal
        by = f" ({compiled.compiler})" if compiled.compiler else ""
        return [f"compiled           {_verdict(False)}: {needed}{by}"]
    flights, parts = _in_flight(stats), (_gib(stats.argument_bytes), _gib(stats.temp_bytes))
    moved = [
        f"{kind} {_gib(n)} ({flights.get(kind, 0) / n:.0%} in flight)" for kind, n in stats.collective_bytes.items()
    ]
    return [
        f"compiled           {_gib(compiled.peak_bytes)} of {usable} GiB: {_verdict(compiled.fits)} "
        f"(arguments {parts[0]}, temporaries {parts[1]}; {compiled.compiler})",
        f"  traffic, GiB     {', '.join(moved) or 'none'}; in flight: while matrix products run",
    ]
