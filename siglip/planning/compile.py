"""What a compiled program costs, read from it: memory, matmul FLOPs, bytes of collectives, and what overlaps.

    stats = read(jax.jit(f).lower(*shapes).compile())

XLA's own cost analysis counts the body of a loop once, and a GPU's library calls not at all; here every computation is counted
as often as it runs. The text of an optimized program is scheduled, so whatever stands between a collective's start and its done
runs while it is in flight. The program's kernels one by one are in kernels.py.

The trap: the text is an interface for people. What it reads is asserted to be there: a loop of unknown length is an error,
not a guess.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", re.M | re.S)
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[sufb]\w*\d+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%([\w.\-]+)")


class InFlight(NamedTuple):
    """A collective that was started before, and finished after, `matmuls` matrix products of the same schedule."""

    kind: str
    bytes: int
    matmuls: int
    runs: int


class CompiledStats(NamedTuple):
    """Per device. Bytes of a collective are those of its larger side; `in_flight` are the asynchronous ones."""

    temp_bytes: int
    argument_bytes: int
    output_bytes: int
    matmul_flops: int
    collective_bytes: dict[str, int]
    collective_runs: dict[str, int]
    in_flight: list[InFlight]


class Instruction(NamedTuple):
    """A line of the program: `%name = shape opcode(rest`."""

    is_root: bool
    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of what it reads."""
        depth = 1
        for end, letter in enumerate(self.rest):
            depth += (letter == "(") - (letter == ")")
            if depth == 0:
                return re.findall(r"%([\w.\-]+)", self.rest[:end])
        raise ValueError(f"%{self.name} of the compiled program has no end")

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs."""
        return _CALLED.findall(self.rest)

    @property
    def library_call(self) -> str:
        """The function of a library that it calls, as XLA names it; empty for what XLA compiles itself."""
        target = re.search(r'custom_call_target="([^"]+)"', self.rest) if self.opcode == "custom-call" else None
        return target[1] if target else ""


def read(compiled: Any) -> CompiledStats:
    """The stats of a `jax.stages.Compiled`.

    Raises:
        ValueError: if the program has a loop whose number of turns its text does not give.
    """
    memory = compiled.memory_analysis()
    program = Program(compiled.as_text())
    flops = sum(runs * program.matmul_flops(i) for runs, i in program.walk())
    sizes, times = defaultdict(int), defaultdict(int)
    for runs, kind, size in program.collectives():
        sizes[kind] += runs * size
        times[kind] += runs
    return CompiledStats(
        temp_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        matmul_flops=flops,
        collective_bytes=dict(sizes),
        collective_runs=dict(times),
        in_flight=list(program.in_flight()),
    )


class Program:
    """The computations of an HLO module, each with how often it runs."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        entry = None
        for match in _COMPUTATION.finditer(text):
            lines = [_INSTRUCTION.match(line) for line in match[3].splitlines()]
            self.computations[match[2]] = [Instruction(bool(line[1]), *line.groups()[1:]) for line in lines if line]
            entry = match[2] if match[1] else entry
        assert entry is not None, "no ENTRY computation in the compiled text"
        self.entry = entry
        self.shapes = {i.name: i.shape for body in self.computations.values() for i in body}
        self._runs: dict[str, int] = defaultdict(int)
        self._count(entry, 1)

    def _count(self, name: str, runs: int) -> None:
        self._runs[name] += runs
        for instruction in self.computations[name]:
            turns = self.turns(instruction) if instruction.opcode == "while" else 1
            for called in instruction.called:
                self._count(called, runs * turns)

    def turns(self, loop: Instruction) -> int:
        """How often the body of a while loop runs."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
        if known:
            return int(known[1])
        # lax.scan counts from 0 to a constant that its condition compares with.
        condition = re.search(r"condition=%([\w.\-]+)", loop.rest)
        limits = [
            int(value)
            for i in (self.computations[condition[1]] if condition else ())
            for value in re.findall(r"^(\d+)\)", i.rest)
            if i.opcode == "constant"
        ]
        if len(limits) != 1:
            raise ValueError(f"loop %{loop.name} of the compiled program does not tell how often it runs")
        return limits[0]

    def walk(self) -> Iterator[tuple[int, Instruction]]:
        """(how often it runs, instruction) for all of them."""
        for name, runs in self._runs.items():
            for instruction in self.computations[name]:
                yield runs, instruction

    def matmul_flops(self, instruction: Instruction) -> int:
        """2 m n k of a dot, of a convolution that is one (TPU) and of a cuBLAS call (GPU); the products in cuDNN's attention;
        0 for everything else."""
        if instruction.library_call.startswith("__cudnn$fmha"):
            query, key = (array_dims(self.shapes[name])[0] for name in instruction.operands[:2])  # [b, n, heads, depth]
            # Forward logits and their mean of values; backward the logits again and four more.
            return (5 if "Backward" in instruction.library_call else 2) * 2 * math.prod(query) * key[1]
        if instruction.opcode == "dot":
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)[1]
        elif instruction.library_call.startswith("__cublas$"):
            contracted = re.search(r'"lhs_contracting_dimensions":\[([\d",]*)\]', instruction.rest)[1]
        elif instruction.opcode == "convolution":
            contracted = str(re.search(r"dim_labels=(\w+)_", instruction.rest)[1].index("f"))
        else:
            return 0
        left = array_dims(self.shapes[instruction.operands[0]])[0]
        inner = math.prod(left[int(axis)] for axis in re.findall(r"\d+", contracted))
        return 2 * math.prod(array_dims(instruction.shape)[0]) * inner

    def collectives(self) -> Iterator[tuple[int, str, int]]:
        """(runs, kind, bytes received) of every collective; one that is spread over fusions is counted where it starts."""
        spread = {
            called
            for _, i in self.walk()
            if i.opcode == "fusion" and not i.name.startswith("async-collective-start")
            for called in i.called
        }
        for name, runs in self._runs.items():
            for i in self.computations[name] if name not in spread else ():
                kind = i.opcode.removesuffix("-start")
                if kind in COLLECTIVES and runs:
                    yield runs, kind, self._moved_bytes(i)

    def in_flight(self) -> Iterator[InFlight]:
        """Asynchronous collectives, with the matrix products scheduled while they are in flight."""
        for name, runs in self._runs.items():
            body = self.computations[name]
            for start, i in enumerate(body):
                kind = self._started(i)
                if kind is None:
                    continue
                done_name = i.name.replace("-start", "-done")
                done = next(
                    k
                    for k, other in enumerate(body)
                    if other.name == done_name or (other.opcode.endswith("-done") and i.name in other.operands)
                )
                matmuls = sum(self._has_matmul(other) for other in body[start:done])
                yield InFlight(kind, self._moved_bytes(i), matmuls, runs)

    def _moved_bytes(self, instruction: Instruction) -> int:
        """Bytes of the larger side: what is gathered, what is reduced, what is sent."""
        result = array_bytes(instruction.shape)
        if instruction.name.startswith("async-collective-start"):
            return max(result[:2])  # (operand, result, bookkeeping …)
        if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
            # (operands, results, bookkeeping …), and bookkeeping is scalars
            arrays = [n for n, dims in zip(result, array_dims(instruction.shape), strict=True) if dims]
            given = len(instruction.operands)
            return max(sum(arrays[:given]), sum(arrays[given:]))
        return max(sum(result), sum(sum(array_bytes(self.shapes[name])) for name in instruction.operands))

    def _started(self, instruction: Instruction) -> str | None:
        if instruction.opcode.endswith("-start") and instruction.opcode.removesuffix("-start") in COLLECTIVES:
            return instruction.opcode.removesuffix("-start")
        if instruction.opcode != "async-start" and not instruction.name.startswith("async-collective-start"):
            return None
        inside = [i.opcode for called in instruction.called for i in self.computations[called]]
        return next((opcode for opcode in inside if opcode in COLLECTIVES), None)

    def _has_matmul(self, instruction: Instruction) -> bool:
        if self.matmul_flops(instruction):
            return True
        called = instruction.called if instruction.opcode in ("fusion", "call") else ()
        return any(self._has_matmul(i) for name in called for i in self.computations[name])


def array_dims(shape: str) -> list[list[int]]:
    """The dimensions of every array in a shape, which may be a tuple's."""
    return [[int(n) for n in dims.split(",") if n] for _, dims in _ARRAY.findall(shape)]


def array_bytes(shape: str) -> list[int]:
    """The bytes of every array in a shape."""
    arrays = _ARRAY.findall(shape)
    return [_BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in arrays]
