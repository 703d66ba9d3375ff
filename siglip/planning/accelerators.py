"""Accelerators by name, and the topologies made of them: what a plan has to know of hardware that is not there.

    v5e:16x16   a slice of TPU chips: v4, v5e, v5p, v6e, tpu7x
    h100:8      GPUs of one host: a100, h100, h200, b200, gb200;  h100:8x128   128 such hosts

Memory is what a program may use: on TPUs what the compiler refuses to exceed (libtpu 0.0.52), on GPUs the device's memory as the
driver reports it (XLA's target configurations). Bandwidths are those of the vendors' data sheets.

The trap: jax takes 75 % of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise. A plan counts with .92.
"""

import re
from typing import NamedTuple

from siglip.errors import UserError
from siglip.training import flops
from siglip.trees import did_you_mean

GPU_MEMORY_FRACTION = 0.92
_GIB = 2**30


class Accelerator(NamedTuple):
    """One jax device: a TPU chip (of tpu7x half a chip), or a GPU.

    Attributes:
        device_kind: as jax names it; siglip/training/flops.py knows its peak.
        memory_bytes: of its HBM, all that a program can be given.
        hbm: bytes/s to and from its memory.
        links: bytes/s each way over all of its links to neighbours (TPU) or to the other GPUs of its host.
        network: bytes/s each way to other hosts, its share; None where the links reach all.
        per_host: devices that one host drives, at most.
        sides: of a TPU slice, the largest in each dimension; () for a GPU.
        per_chip: jax devices on one chip.
    """

    device_kind: str
    memory_bytes: int
    hbm: float
    links: float
    network: float | None = None
    per_host: int = 8
    sides: tuple[int, ...] = ()
    per_chip: int = 1

    @property
    def peak_flops(self) -> float:
        """Dense bfloat16 FLOP/s."""
        peak = flops.peak_flops(self.device_kind)
        assert peak is not None, self.device_kind
        return peak

    @property
    def usable_bytes(self) -> int:
        """What a training step may take."""
        return self.memory_bytes if self.sides else int(GPU_MEMORY_FRACTION * self.memory_bytes)


ACCELERATORS = {
    "v4": Accelerator("TPU v4", int(30.75 * _GIB), 1228e9, 6 * 45e9, per_host=4, sides=(16, 16, 16)),
    "v5e": Accelerator("TPU v5 lite", int(15.75 * _GIB), 819e9, 4 * 45e9, sides=(16, 16)),
    "v5p": Accelerator("TPU v5", int(95.73 * _GIB), 2765e9, 6 * 90e9, per_host=4, sides=(16, 16, 24)),
    "v6e": Accelerator("TPU v6 lite", int(31.24 * _GIB), 1640e9, 4 * 90e9, sides=(16, 16)),
    "tpu7x": Accelerator("TPU7x", int(94.74 * _GIB), 3690e9, 300e9, sides=(16, 24, 24), per_chip=2),
    "a100": Accelerator("NVIDIA A100-SXM4-80GB", 85_100_068_864, 2039e9, 300e9, 25e9),
    "h100": Accelerator("NVIDIA H100 80GB HBM3", 84_942_979_072, 3352e9, 450e9, 50e9),
    "h200": Accelerator("NVIDIA H200 141GB HBM3e", 151_397_597_184, 4800e9, 450e9, 50e9),
    "b200": Accelerator("NVIDIA B200", 191_514_411_008, 7672e9, 900e9, 50e9),
    "gb200": Accelerator("NVIDIA GB200", 197_897_748_480, 7928e9, 900e9, 50e9, per_host=72),
}  # fmt: skip
# Of GB200 "host" means the 72 GPUs that NVLink joins. 2-D slices come in these shapes; sides of 3-D ones are 1, 2 or 4, 8, 12, …
_PLANES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CHIPS_OF_A_HOST = 4


class Topology(NamedTuple):
    """Devices that train together. hosts: machines that feed them; shape: of the slice, or (GPUs a host, hosts)."""

    name: str
    accelerator: Accelerator
    shape: tuple[int, ...]
    devices: int
    hosts: int

    @property
    def link_bytes_per_s(self) -> float:
        """Bytes/s each way that collectives over all devices get at most, for one device."""
        within = self.accelerator.network is None or self.hosts == 1
        return self.accelerator.links if within else self.accelerator.network


def parse_topology(name: str) -> Topology:
    """Raises UserError, with what is known, for a name that is not a topology."""
    kind, _, sides = name.partition(":")
    accelerator = ACCELERATORS.get(kind)
    if accelerator is None:
        known = "v4:2x2x1, v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:2x2x1, a100:8, h100:8, h100:8x128, h200:8, b200:8, gb200:72"
        raise UserError(
            f"topology {name!r} is unknown{did_you_mean(kind, ACCELERATORS)}; known are, in any size, {known}"
        )
    shape = tuple(map(int, sides.split("x"))) if re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})*", sides) else ()
    return (_slice if accelerator.sides else _cluster)(name, accelerator, shape)


def _slice(name: str, accelerator: Accelerator, shape: tuple[int, ...]) -> Topology:
    if len(accelerator.sides) == 2:
        if tuple(sorted(shape)) not in _PLANES:
            raise UserError(f"topology {name!r} is not a slice; use one of {', '.join(f'{a}x{b}' for a, b in _PLANES)}")
    else:
        fits = len(shape) == 3 and all(n <= most for n, most in zip(sorted(shape), accelerator.sides, strict=True))
        if not fits or any(n > 2 and n % 4 for n in shape):
            most = "x".join(map(str, accelerator.sides))
            raise UserError(
                f"topology {name!r} is not a slice; use three sides of 1, 2 or a multiple of 4 chips, up to {most}, such as 4x4x4"
            )
    chips = 1
    for side in shape:
        chips *= side
    return Topology(name, accelerator, shape, chips * accelerator.per_chip, -(-chips // _CHIPS_OF_A_HOST))


def _cluster(name: str, accelerator: Accelerator, shape: tuple[int, ...]) -> Topology:
    most = accelerator.per_host
    if not 1 <= len(shape) <= 2 or shape[0] > most or (len(shape) == 2 and shape[0] != most and shape[1] > 1):
        kind = name.partition(":")[0]
        raise UserError(
            f"topology {name!r} is not a cluster; use {kind}:N with 1 to {most} GPUs, or {kind}:{most}xHOSTS for many hosts"
        )
    hosts = shape[1] if len(shape) == 2 else 1
    return Topology(name, accelerator, (shape[0], hosts), shape[0] * hosts, hosts)
