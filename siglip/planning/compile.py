"""What a compiled program costs, read from it: memory, matmul FLOPs, bytes of collectives, and what overlaps.

    stats = read(jax.jit(f).lower(*shapes).compile())

XLA's own cost analysis counts the body of a loop once; here every computation is counted as often as it runs. The text of an
optimized program is scheduled, so whatever stands between a collective's start and its done runs while it is in flight.

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
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
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


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    rest: str


def read(compiled: Any) -> CompiledStats:
    """The stats of a `jax.stages.Compiled`.

    Raises:
        ValueError: if the program has a loop whose number of turns its text does not give.
    """
    memory = compiled.memory_analysis()
    program = _Program(compiled.as_text())
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


class _Program:
    """The computations of an HLO module, each with how often it runs."""

    def __init__(self, text: str) -> None:
        self._computations: dict[str, list[_Instruction]] = {}
        entry = None
        for match in _COMPUTATION.finditer(text):
            lines = [_INSTRUCTION.match(line) for line in match[3].splitlines()]
            self._computations[match[2]] = [_Instruction(*line.groups()) for line in lines if line]
            entry = match[2] if match[1] else entry
        assert entry is not None, "no ENTRY computation in the compiled text"
        self._shapes = {i.name: i.shape for body in self._computations.values() for i in body}
        self._runs: dict[str, int] = defaultdict(int)
        self._count(entry, 1)

    def _count(self, name: str, runs: int) -> None:
        self._runs[name] += runs
        for instruction in self._computations[name]:
            turns = self._turns(instruction) if instruction.opcode == "while" else 1
            for called in _CALLED.findall(instruction.rest):
                self._count(called, runs * turns)

    def _turns(self, loop: _Instruction) -> int:
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
        if known:
            return int(known[1])
        # lax.scan counts from 0 to a constant that its condition compares with.
        condition = re.search(r"condition=%([\w.\-]+)", loop.rest)
        limits = [
            int(value)
            for i in (self._computations[condition[1]] if condition else ())
            for value in re.findall(r"^(\d+)\)", i.rest)
            if i.opcode == "constant"
        ]
        if len(limits) != 1:
            raise ValueError(f"loop %{loop.name} of the compiled program does not tell how often it runs")
        return limits[0]

    def walk(self) -> Iterator[tuple[int, _Instruction]]:
        """(how often it runs, instruction) for all of them."""
        for name, runs in self._runs.items():
            for instruction in self._computations[name]:
                yield runs, instruction

    def matmul_flops(self, instruction: _Instruction) -> int:
        """2 m n k of a dot, or of a convolution that is one (TPU); 0 for everything else."""
        if instruction.opcode not in ("dot", "convolution"):
            return 0
        left = _dims(self._shapes[re.findall(r"%([\w.\-]+)", instruction.rest)[0]])[0]
        if instruction.opcode == "dot":
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
            axes = [int(axis) for axis in contracted[1].split(",") if axis]
        else:
            labels = re.search(r"dim_labels=(\w+)_", instruction.rest)[1]
            axes = [labels.index("f")]
        return 2 * math.prod(_dims(instruction.shape)[0]) * math.prod(left[axis] for axis in axes)

    def collectives(self) -> Iterator[tuple[int, str, int]]:
        """(runs, kind, bytes received) of every collective; one that is spread over fusions is counted where it starts."""
        spread = {
            called
            for _, i in self.walk()
            if i.opcode == "fusion" and not i.name.startswith("async-collective-start")
            for called in _CALLED.findall(i.rest)
        }
        for name, runs in self._runs.items():
            for i in self._computations[name] if name not in spread else ():
                kind = i.opcode.removesuffix("-start")
                if kind in COLLECTIVES and runs:
                    yield runs, kind, self._moved_bytes(i)

    def in_flight(self) -> Iterator[InFlight]:
        """Asynchronous collectives, with the matrix products scheduled while they are in flight."""
        for name, runs in self._runs.items():
            body = self._computations[name]
            for start, i in enumerate(body):
                kind = self._started(i)
                if kind is None:
                    continue
                done_name = i.name.replace("-start", "-done")
                done = next(k for k, other in enumerate(body) if other.name == done_name)
                matmuls = sum(self._has_matmul(other) for other in body[start:done])
                yield InFlight(kind, self._moved_bytes(i), matmuls, runs)

    def _moved_bytes(self, instruction: _Instruction) -> int:
        """Bytes of the larger side: what is gathered, what is reduced, what is sent."""
        result = _array_bytes(instruction.shape)
        if instruction.opcode.endswith("-start") or instruction.name.startswith("async-collective-start"):
            return max(result[:2])  # (operand, result, bookkeeping …)
        operands = re.findall(r"%([\w.\-]+)", instruction.rest.split(")")[0])
        return max(sum(result), sum(sum(_array_bytes(self._shapes[name])) for name in operands))

    def _started(self, instruction: _Instruction) -> str | None:
        if instruction.opcode.endswith("-start") and instruction.opcode.removesuffix("-start") in COLLECTIVES:
            return instruction.opcode.removesuffix("-start")
        if not instruction.name.startswith("async-collective-start"):
            return None
        inside = [i.opcode for called in _CALLED.findall(instruction.rest) for i in self._computations[called]]
        return next((opcode for opcode in inside if opcode in COLLECTIVES), None)

    def _has_matmul(self, instruction: _Instruction) -> bool:
        if instruction.opcode in ("dot", "convolution"):
            return True
        called = _CALLED.findall(instruction.rest) if instruction.opcode in ("fusion", "call") else ()
        return any(self._has_matmul(i) for name in called for i in self._computations[name])


def _dims(shape: str) -> list[list[int]]:
    return [[int(n) for n in dims.split(",") if n] for _, dims in _ARRAY.findall(shape)]


def _array_bytes(shape: str) -> list[int]:
    arrays = _ARRAY.findall(shape)
    return [_BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in arrays]
