"""Which mesh, `remat` and micro-batch is fastest among those that fit: all of them, estimated."""

import dataclasses
from collections.abc import Iterator

from siglip.errors import UserError
from siglip.planning.accelerators import Topology
from siglip.planning.estimate import REMATS, Estimate, Shapes, estimate_laid_out, lay_out
from siglip.training.config import TrainConfig
from siglip.training.lengths import micro_batch_sizes


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A config and its plan. flags: what differs from the config searched from, as flags of `siglip train`."""

    config: TrainConfig
    estimate: Estimate
    flags: str


def search(config: TrainConfig, topology: Topology, shapes: Shapes) -> list[Candidate]:
    """Those that fit: first with a tenth of the memory to spare, then the fastest, the fewest changes, the fewest micro-batches.

    Raises:
        UserError: the batch does not divide over the devices.
    """
    return sorted((c for c in _candidates(config, topology, shapes) if c.estimate.fits), key=_rank)


def _rank(candidate: Candidate) -> tuple[bool, float, int, int, int, int]:
    plan = candidate.estimate
    total, usable = plan.bytes_per_device["total"], plan.bytes_per_device["usable"]
    config, changes = candidate.config, candidate.flags.count("--")
    turns = config.batch_size // (config.loss.micro_batch_size or config.batch_size)
    return total > 0.9 * usable, float(f"{plan.step_s:.3g}"), changes, turns, config.mesh.fsdp, total


def _candidates(config: TrainConfig, topology: Topology, shapes: Shapes) -> Iterator[Candidate]:
    micros = [
        None,
        *(n for n in _micro_batch_sizes(config.batch_size, topology.devices) if _serves(config, n, topology)),
    ]
    for fsdp in (n for n in range(1, topology.devices + 1) if topology.devices % n == 0 and n & (n - 1) == 0):
        mesh = dataclasses.replace(config.mesh, data=-1, fsdp=fsdp)
        try:
            state = lay_out(dataclasses.replace(config, mesh=mesh), topology, shapes)
        except UserError:  # some weight does not divide by it
            continue
        for remat in REMATS:
            for micro in micros:
                changed = _change(config, mesh=mesh, remat=remat, micro=micro)
                plan = estimate_laid_out(changed, topology, shapes, state)
                yield Candidate(changed, plan, _flags(config, changed))


def _micro_batch_sizes(batch_size: int, devices: int) -> Iterator[int]:
    size = batch_size
    while size % 2 == 0 and (size := size // 2) % devices == 0:
        yield size


def _serves(config: TrainConfig, micro: int, topology: Topology) -> bool:
    """Whether the longest steps of a NaFlex run have a pair for each device then."""
    try:
        micro_batch_sizes(_with_micro(config, micro), devices=topology.devices)
    except UserError:
        return False
    return True


def _with_micro(config: TrainConfig, micro: int | None) -> TrainConfig:
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, micro_batch_size=micro))


def _change(config: TrainConfig, *, mesh, remat: str, micro: int | None) -> TrainConfig:
    image, text = (dataclasses.replace(tower, remat=remat) for tower in (config.model.image, config.model.text))
    model = dataclasses.replace(config.model, image=image, text=text)
    return dataclasses.replace(_with_micro(config, micro), mesh=mesh, model=model)


def _flags(before: TrainConfig, after: TrainConfig) -> str:
    """What has to be added to a command for `before` to get `after`; "" for the same."""
    settings = {
        "mesh.data": lambda c: c.mesh.data,
        "mesh.fsdp": lambda c: c.mesh.fsdp,
        "model.image.remat": lambda c: c.model.image.remat,
        "model.text.remat": lambda c: c.model.text.remat,
        "loss.micro-batch-size": lambda c: c.loss.micro_batch_size,
    }
    changed = {name: get(after) for name, get in settings.items() if get(after) != get(before)}
    return " ".join(f"--{name} {value}" for name, value in changed.items())
