"""One stage of training and what is measured after it.

    stage 1   native resolution, encoder frozen: connector and decoder learn            (PaLI-3, arXiv:2310.09199)
    stage 2   higher resolution, encoder trained, its learning rate warmed up by itself and slowly     (PaliGemma)

AdamW, each part with its own schedule and its own gradient clipping: linear from 0, then a cosine to 0.

The trap: a decoder that has not learnt to read pictures sends gradients into the encoder that have nothing to do with what
is wrong with the encoder. Warmed up at the decoder's pace, the encoder moves before these make sense.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from examples.captioner.data import CAPTION_LENGTH, Heldout, texts_of
from examples.captioner.model import Captioner, caption_loss, caption_losses, write_captions
from siglip.parallel.sharding import P_REPLICATED, put_batch

_WEIGHT_DECAY = 0.05
_B2 = 0.95
_CLIP_NORM = 1.0


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """A stretch of training.

    Attributes:
        steps: batches.
        lr: peak learning rate of the decoder and the connector.
        warmup_steps: of that learning rate, linear from 0.
        encoder_lr: peak learning rate of the encoder; 0 keeps it frozen.
        encoder_warmup_steps: of the encoder's.
    """

    steps: int
    lr: float
    warmup_steps: int = 20
    encoder_lr: float = 0.0
    encoder_warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")
        if not self.lr > 0 or not self.encoder_lr >= 0:
            raise ValueError(f"lr={self.lr} must be positive and encoder_lr={self.encoder_lr} not negative")
        for name in ("warmup_steps", "encoder_warmup_steps"):
            if not 0 <= getattr(self, name) < self.steps:
                raise ValueError(f"{name}={getattr(self, name)} must be less than steps={self.steps}")


def make_optimizer(stage: StageConfig, captioner: Captioner) -> optax.GradientTransformation:
    """One chain for each of encoder, connector and decoder; none for a frozen encoder."""
    learned = _adamw(stage.lr, stage.warmup_steps, stage.steps, weight_decay=_WEIGHT_DECAY)
    chains = {"connector": learned, "decoder": learned, "encoder": optax.set_to_zero()}
    if stage.encoder_lr:
        # A pretrained tower does not decay: SigLIP (arXiv:2303.15343, section 4.5) found that it only loses by it.
        chains["encoder"] = _adamw(stage.encoder_lr, stage.encoder_warmup_steps, stage.steps, weight_decay=0.0)
    parts = {name: jax.tree.map(lambda _, name=name: name, getattr(captioner, name)) for name in chains}
    return optax.partition(chains, dataclasses.replace(captioner, **parts))


def _adamw(lr: float, warmup_steps: int, steps: int, *, weight_decay: float) -> optax.GradientTransformation:
    schedule = optax.schedules.warmup_cosine_decay_schedule(0.0 if warmup_steps else lr, lr, warmup_steps, steps)
    return optax.chain(optax.clip_by_global_norm(_CLIP_NORM), optax.adamw(schedule, b2=_B2, weight_decay=weight_decay))


def make_step(optimizer: optax.GradientTransformation) -> Callable[..., tuple[Captioner, Any, jax.Array]]:
    """(captioner, optimizer state, images, prompt, suffix) -> the next two and the loss; the first two are consumed."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(captioner: Captioner, state: Any, images: Any, prompt: Any, suffix: Any) -> tuple[Captioner, Any, Any]:
        loss, gradients = jax.value_and_grad(caption_loss)(captioner, images, prompt, suffix)
        updates, state = optimizer.update(gradients, state, captioner)
        return optax.apply_updates(captioner, updates), state, loss

    return step


def train_stage(
    captioner: Captioner,
    stage: StageConfig,
    *,
    batches: Iterable[dict[str, Any]],
    prompt: np.ndarray,
    mesh: Mesh,
    blind: bool = False,
    log_every: int = 0,
) -> tuple[Captioner, list[float]]:
    """The captioner after a stage, and the loss of every step.

    Args:
        captioner: with its encoder frozen or not, as the stage has it.
        batches: as `training_batches` gives them.
        mesh: of the devices that share each batch; every device holds all parameters.
        blind: leave the pictures out: what a decoder learns from the captions alone.
        log_every: steps between two printed lines; 0 for none.

    Raises:
        ValueError: the stage trains an encoder that is frozen, or the other way round.
    """
    if captioner.encoder.frozen != (stage.encoder_lr == 0):
        state = "frozen" if captioner.encoder.frozen else "not frozen"
        raise ValueError(
            f"encoder_lr={stage.encoder_lr} but the encoder is {state}; use encoder.unfrozen() to train it"
        )
    # A copy: the step consumes its arguments, and the caller's encoder may be in use elsewhere.
    captioner = jax.device_put(jax.tree.map(jnp.copy, captioner), NamedSharding(mesh, P_REPLICATED))
    optimizer = make_optimizer(stage, captioner)
    state, step = jax.jit(optimizer.init)(captioner), make_step(optimizer)
    losses, start = [], time.perf_counter()
    for number, batch in zip(range(1, stage.steps + 1), batches, strict=False):
        arrays = put_batch({"image": batch["image"], "text": batch["text"]}, mesh)
        images = None if blind else arrays["image"]
        captioner, state, loss = step(captioner, state, images, prompt, arrays["text"])
        losses.append(loss)
        if log_every and number % log_every == 0:
            mean = float(np.mean(jax.device_get(losses[-log_every:])))
            print(f"  step {number}/{stage.steps}  loss {mean:.3f}  {time.perf_counter() - start:.0f} s", flush=True)
    return captioner, [float(loss) for loss in losses]


def evaluate(
    captioner: Captioner, heldout: Heldout, prompt: np.ndarray, *, mesh: Mesh, batch_size: int, blind: bool = False
) -> tuple[dict[str, float], list[str]]:
    """Numbers on pictures that were not trained on, and the captions written for them.

    "loss": nats a token. "wrong_picture": the same with each picture exchanged for another's. "first_word", "exact": how
    many captions begin with the right word, or are right altogether.
    """
    losses = jax.jit(caption_losses)

    def mean_loss(images: np.ndarray) -> float:
        rows = _in_batches(images, heldout.suffix, batch_size)
        found = []
        for image, suffix in rows:
            arrays = put_batch({"image": image, "suffix": suffix}, mesh)
            found.append(losses(captioner, None if blind else arrays["image"], prompt, arrays["suffix"]))
        nats, tokens = (np.concatenate(part)[: len(images)] for part in zip(*found, strict=True))
        return float(nats.sum() / tokens.sum())

    written = []
    for image, _ in _in_batches(heldout.images, heldout.suffix, batch_size):
        pictures = put_batch({"image": image}, mesh)["image"]
        tokens = write_captions(captioner, None if blind else pictures, prompt, batch=batch_size, length=CAPTION_LENGTH)
        written += texts_of(np.asarray(tokens))
    written = written[: len(heldout.captions)]
    pairs = list(zip(written, heldout.captions, strict=True))
    metrics = {
        "loss": mean_loss(heldout.images),
        # By half the set: neighbours may be variants of one thing.
        "wrong_picture": mean_loss(np.roll(heldout.images, len(heldout.images) // 2, axis=0)),
        "first_word": float(np.mean([ours.split()[:1] == theirs.split()[:1] for ours, theirs in pairs])),
        "exact": float(np.mean([ours == theirs for ours, theirs in pairs])),
    }
    return metrics, written


def _in_batches(images: np.ndarray, suffix: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Full batches: the last is filled up with the first rows, whose results are then surplus."""
    rows = np.arange(-(-len(images) // size) * size) % len(images)
    for chosen in rows.reshape(-1, size):
        yield images[chosen], suffix[chosen]
