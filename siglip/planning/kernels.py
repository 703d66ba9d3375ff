"""The kernels of a program compiled for a GPU, and how long they take at least.

    seconds of a kernel = max(FLOPs / rate of the matrix products, bytes / rate of the memory)        (roofline)

A kernel is what the device is given at a time: a fusion, a library call, a copy. It is taken to read its operands and to write
its results once, from and to the device's memory: of an array that it slices only the slice, of one that it updates in place
only the update. No time passes between kernels. The default rates are assumptions; benchmarks/on_gpu.py measures them.

The trap: a fusion is one kernel with one name; what else was fused into it is booked under that name.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from siglip.planning.compile import COLLECTIVES, Instruction, Program, array_bytes

# What costs nothing: names for arrays that are there already.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "async-done")
_VIEWS = ("bitcast", "convert", "reshape", "copy")
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = ("dynamic-update-slice", "scatter")
_ON_CHIP = re.compile(r"\w+\[[\d,]*\]\{[^}]*S\(1\)[^}]*\}")  # a TPU's vector memory
# What a kernel that repeats a few values consists of; smaller arrays than these are bookkeeping.
_FILLERS, _FILL_MIN_BYTES = {"parameter", "constant", "broadcast", *_VIEWS, "tuple"}, 2**20

# Kinds by the path of what a kernel computes, the first that matches.
_KINDS = (
    ("optimizer, norms", r"^jit\(\w+\)/(?!.*jvp)"),
    ("loss", r"jvp\(\)"),
    ("MAP head", r"MAPHead|/head/"),
    ("LayerNorm, residual stream", r"LayerNorm|encoder_norm|encoderblock.*/(add_any|add|convert_element_type)$"),
    ("GELU", r"MlpBlock_0/(?!Dense_1)"),
    ("attention, plain", r"MultiHeadDotProductAttention(?!.*reduce_sum)"),
    ("bias gradients", r"encoderblock.*reduce_sum"),
    ("embeddings", r"/(img|txt)/"),
)


class Kernel(NamedTuple):
    """A kernel of the program: its name, what it computes (a path of the model's modules), and its cost per run."""

    name: str
    path: str
    library_call: str
    shape: str
    runs: int
    flops: int
    bytes: int
    has_float32_operands: bool
    fills: bool  # a large array with zeros or a small array's values repeated

    @property
    def is_transpose(self) -> bool:
        """Whether it moves elements to another order of the axes."""
        return "transpose" in self.name and not self.flops

    @property
    def is_in_a_block(self) -> bool:
        """Whether it belongs to the towers' transformer blocks."""
        return "encoderblock" in self.path

    @property
    def kind(self) -> str:
        """One of few names, for tables."""
        if self.library_call.startswith("__cudnn$fmha"):
            return "attention, cuDNN"
        if self.flops:
            where = "blocks" if self.is_in_a_block else "MAP head" if "MAPHead" in self.path else "others"
            return f"matrix products, {where}" + (" (again)" if "rematted" in self.path else "")
        if self.name.removesuffix("-start").rstrip(".0123456789") in COLLECTIVES:
            return "collectives"
        if self.fills:
            return "fills"
        if re.search(r"dynamic.update.slice", self.name) or re.search(r"while/body/jit\(dynamic_", self.path):
            return "stacks of a scan"
        if self.is_transpose:
            return "transposes"
        if "copy" in self.name:
            return "copies"
        return next((kind for kind, pattern in _KINDS if re.search(pattern, self.path)), "others")


class Rates(NamedTuple):
    """What the device reaches: FLOP/s of matrix products and of cuDNN's attention, bytes/s of its memory."""

    matmul: float = 700e12
    attention: float = 400e12
    memory: float = 2.85e12

    def seconds(self, kernel: Kernel) -> float:
        """All runs of a kernel."""
        rate = self.attention if kernel.library_call.startswith("__cudnn$fmha") else self.matmul
        return kernel.runs * max(kernel.flops / rate, kernel.bytes / self.memory)


class Total(NamedTuple):
    """Sums over kernels and their runs."""

    runs: int
    flops: int
    bytes: int
    seconds: float


def by_kind(kernels: Iterable[Kernel], rates: Rates) -> dict[str, Total]:
    """The totals of every kind, the longest first."""
    totals = defaultdict(lambda: Total(0, 0, 0, 0.0))
    for k in kernels:
        more = (k.runs, k.runs * k.flops, k.runs * k.bytes, rates.seconds(k))
        totals[k.kind] = Total(*(a + b for a, b in zip(totals[k.kind], more, strict=True)))
    return dict(sorted(totals.items(), key=lambda item: -item[1].seconds))


def read_kernels(text: str) -> list[Kernel]:
    """The kernels of a compiled program's text (`jax.stages.Compiled.as_text`), in their order.

    Raises:
        ValueError: if the program has a loop whose number of turns its text does not give.
    """
    program = Program(text)
    return [_kernel(program, runs, instruction) for runs, instruction in _launched(program, program.entry, 1)]


def _launched(program: Program, name: str, runs: int) -> Iterator[tuple[int, Instruction]]:
    """(how often it runs, instruction) of everything that is not inside a kernel."""
    for i in program.computations[name]:
        if i.opcode == "while":
            (body,) = re.findall(r"body=%([\w.\-]+)", i.rest)
            yield from _launched(program, body, runs * program.turns(i))
        elif i.opcode in ("call", "conditional", "async-start"):
            branches = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
            for called in re.findall(r"%([\w.\-]+)", branches[1]) if branches else i.called:
                yield from _launched(program, called, runs)
        elif i.opcode not in _FREE and not i.opcode.endswith("-done"):
            yield runs, i


def _kernel(program: Program, runs: int, i: Instruction) -> Kernel:
    inside = program.computations[i.called[0]] if i.opcode == "fusion" else []
    operands = [program.shapes[name] for name in i.operands]
    # What only starts has its operands among its results.
    given = 0 if i.opcode.endswith("-start") and i.opcode != "all-reduce-start" else sum(map(_hbm_bytes, operands))
    written, opcodes = _hbm_bytes(i.shape), {j.opcode for j in inside or [i]}
    return Kernel(
        name=i.name,
        path=_path(i) or next((path for j in reversed(inside) if (path := _path(j))), ""),
        library_call=i.library_call,
        shape=i.shape,
        runs=runs,
        flops=program.matmul_flops(i) + sum(program.matmul_flops(j) for j in inside),
        bytes=_fusion_bytes(program, inside) if inside else given + written - _workspace(i),
        has_float32_operands=any(shape.startswith("f32[") for shape in operands[:2]),
        fills=written >= _FILL_MIN_BYTES and opcodes <= _FILLERS and "broadcast" in opcodes,
    )


def _path(i: Instruction) -> str:
    match = re.search(r'op_name="([^"]*)"', i.rest)
    return match[1] if match else ""


def _workspace(i: Instruction) -> int:
    """Bytes of scratch memory that a library call may use: the last of its results."""
    scratch = re.search(r"s8\[(\d+)\]\{0\}\)$", i.shape) if i.library_call else None
    return int(scratch[1]) if scratch else 0


def _hbm_bytes(shape: str) -> int:
    return sum(array_bytes(_ON_CHIP.sub("", shape)))


def _fusion_bytes(program: Program, body: list[Instruction]) -> int:
    users: dict[str, list[tuple[Instruction, int]]] = defaultdict(list)
    for i in body:
        for position, operand in enumerate(i.operands):
            users[operand].append((i, position))

    def read(name: str, whole: int) -> int:
        """Of an array of `whole` bytes what its users take."""
        total = 0
        for user, position in users[name]:
            if user.opcode in _SLICES and position == 0:
                total += _hbm_bytes(user.shape)
            elif user.opcode in _VIEWS and users[user.name]:
                total += read(user.name, whole)
            elif user.opcode not in _UPDATES or position != 0:
                return whole
        return min(total, whole)

    def written(i: Instruction) -> int:
        if i.opcode == "tuple":
            return sum(written(_find(body, name)) for name in i.operands)
        if i.opcode in ("bitcast", "convert"):
            source = _find(body, i.operands[0])
            if source.opcode in ("dynamic-update-slice", "bitcast"):
                return min(written(source), _hbm_bytes(i.shape))
        if i.opcode == "dynamic-update-slice":
            return _hbm_bytes(program.shapes[i.operands[1]])
        return _hbm_bytes(i.shape)

    root = next(i for i in body if i.is_root)
    parameters = [i for i in body if i.opcode == "parameter"]
    return sum(read(i.name, _hbm_bytes(i.shape)) for i in parameters) + written(root)


def _find(body: list[Instruction], name: str) -> Instruction:
    return next(i for i in body if i.name == name)
