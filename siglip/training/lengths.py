"""A NaFlex run's lengths: the shapes of its batches, and one compiled step for each.

A step takes images of one length, so there are as many programs as lengths; all are compiled before the first step, none in the
middle of a run. The global batch is the same at every length, and so are negatives and the loss's normaliser; where a long step
needs more memory than `loss.micro_batch_size` pairs at the tower's own length, it passes in proportionally smaller micro-batches.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from siglip.errors import UserError
from siglip.parallel import sharding
from siglip.training.config import TrainConfig
from siglip.training.step import TrainState

logger = logging.getLogger(__name__)

Step = Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]


def length_shares(config: TrainConfig) -> dict[int, float]:
    """The patches that images of a step may have, with their share of the run's steps; {} for images of one size.

    Raises:
        UserError: the tower does not take such a length.
    """
    image, lengths = config.model.image, config.data.lengths
    if image.naflex is None:
        if lengths is not None:
            raise UserError("data.lengths is for NaFlex models; set model.image.naflex, or leave data.lengths out")
        return {}
    if lengths is None:
        return {image.naflex.patches: 1.0}
    if lengths.start and any(side % patch for side, patch in zip(image.image_size, image.patch, strict=True)):
        raise UserError(
            f"model.image.image_size={image.image_size} must be whole patches of {image.patch} px: images have that size before "
            f"data.lengths.start={lengths.start}"
        )
    weights = lengths.weights or (1.0,) * len(lengths.patches)
    shares = {}
    if lengths.start:
        name = f"model.image.image_size={image.image_size}: the number of patches"
        shares[image.naflex.check_length(math.prod(image.grid), name)] = lengths.start
    for patches, weight in zip(lengths.patches, weights, strict=True):
        patches = image.naflex.check_length(patches, "data.lengths.patches")
        shares[patches] = shares.get(patches, 0.0) + (1 - lengths.start) * weight / sum(weights)
    return shares


def micro_batch_size(config: TrainConfig, patches: int, *, devices: int) -> int | None:
    """Pairs that pass through the towers at a time in a step of such a length: those that memory allows at the tower's own.

    Raises:
        UserError: not even one pair per device fits, or none that the batch divides by.
    """
    size, batch, naflex = config.loss.micro_batch_size, config.batch_size, config.model.image.naflex
    if size is None or naflex is None or patches <= naflex.patches:
        return size
    most = size * naflex.patches // patches
    fitting = [n for n in range(devices, most + 1, devices) if batch % n == 0]
    if not fitting:
        least = -(-devices * patches // naflex.patches)
        raise UserError(
            f"loss.micro_batch_size={size} pairs of {naflex.patches} patches are {most} of {patches}, fewer than one for each of "
            f"{devices} devices; set at least {least}, take fewer devices, or leave {patches} out of data.lengths.patches"
        )
    return fitting[-1]


def micro_batch_sizes(config: TrainConfig, *, devices: int) -> dict[int, int | None]:
    """`micro_batch_size` of every length of the run; {} for images of one size. Raises: as that and `length_shares`."""
    return {patches: micro_batch_size(config, patches, devices=devices) for patches in length_shares(config)}


def batch_shapes(config: TrainConfig, mesh: Any, *, patches: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of one global batch, laid out as the loop puts them; `patches`: of a NaFlex run, None for its longest."""
    model, rows = config.model, config.batch_size
    where = NamedSharding(mesh, sharding.P_BATCH)
    shapes = {"text": ((rows, model.text.length), jnp.int32)}
    if config.data.image_embeddings is not None:
        shapes["zimg"] = ((rows, model.embedding_dims[0]), jnp.float32)
    elif model.image.naflex is not None:
        n = patches or max(length_shares(config))
        shapes |= {"patches": ((rows, n, math.prod(model.image.patch) * 3), jnp.uint8), "grid": ((rows, 2), jnp.int32)}
    else:
        shapes["image"] = ((rows, *model.image.image_size, 3), jnp.uint8)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=where) for name, (shape, dtype) in shapes.items()}


class StepOfLength:
    """The step of a NaFlex run: calls the one for the length of the batch.

    Attributes:
        steps: jitted, by length.
    """

    def __init__(self, steps: Mapping[int, Any]) -> None:
        self.steps = dict(steps)

    def __call__(self, state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        return self._of(batch)(state, batch)

    def lower(self, state: Any, batch: Mapping[str, Any]) -> Any:
        """As that of a jitted function, for one length."""
        return self._of(batch).lower(state, batch)

    def _of(self, batch: Mapping[str, Any]) -> Any:
        return self.steps[batch["patches"].shape[1]]

    def compiled(self, abstract_state: TrainState, shapes_of: Callable[[int], Mapping[str, Any]]) -> "StepOfLength":
        """Every length's step compiled now, with a line for each. shapes_of: length -> the shapes of its batches."""
        programs = {}
        for number, patches in enumerate(sorted(self.steps), start=1):
            start = time.monotonic()
            programs[patches] = self.steps[patches].lower(abstract_state, shapes_of(patches)).compile()
            told = "compiled the step for images of %d patches (%d of %d) in %.0f s"
            logger.info(told, patches, number, len(self.steps), time.monotonic() - start)
        return StepOfLength(programs)


def compile_lengths(step: Step, config: TrainConfig, abstract_state: TrainState, mesh: Mesh) -> Step:
    """The step with all of its programs compiled; of a run with images of one size, as it is: it compiles when first called."""
    if not isinstance(step, StepOfLength):
        return step
    return step.compiled(abstract_state, lambda patches: batch_shapes(config, mesh, patches=patches))
