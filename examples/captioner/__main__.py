"""python -m examples.captioner SRC --out DIR: both stages on the shipped sample, and the captions that come of it.

blind     the decoder alone, on captions without images: what a caption's beginning says about its end
stage 1   images as large as the encoder knows them, the encoder frozen
stage 2   larger images, positions resampled, everything trained
"""

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from examples.captioner import data
from examples.captioner.decoder import DecoderConfig
from examples.captioner.model import Captioner, init_captioner
from examples.captioner.saved import save_captioner
from examples.captioner.train import StageConfig, evaluate, train_stage
from siglip.cli import describe
from siglip.cli.arguments import parse
from siglip.errors import UserError
from siglip.image_encoder import load_encoder
from siglip.parallel.sharding import MeshConfig, check_batch_size, make_mesh

PROMPT = "caption en"
_LOG_EVERY = 50
_SHOWN = 12


@dataclasses.dataclass(frozen=True)
class CaptionerArgs:
    """Train a captioner on an encoder, in two stages.

    Attributes:
        src: a run's workdir, a checkpoint inside it, a big_vision .npz, or a Hugging Face folder.
        out: folder to make; must not exist.
        image_size: side of stage 2's images in pixels; 0 takes 1.5 times the patches of stage 1 on each side.
        stage1: connector and decoder learn, the encoder is frozen.
        stage2: everything learns, the encoder slowly.
        batch_size: pairs per step, split over all devices.
        seed: seed of the decoder's first parameters and of the order of pairs.
        train: tar shards with English captions.
        heldout: tar shards to measure on.
    """

    src: tyro.conf.Positional[str]
    out: str
    image_size: int = 0
    stage1: StageConfig = StageConfig(steps=150, lr=2e-3)
    stage2: StageConfig = StageConfig(steps=80, lr=3e-4, warmup_steps=10, encoder_lr=1e-4, encoder_warmup_steps=40)
    batch_size: int = 32
    seed: int = 0
    train: str = f"{data.SAMPLE}/emoji-train-*.tar"
    heldout: str = f"{data.SAMPLE}/emoji-heldout-*.tar"

    def __post_init__(self) -> None:
        if self.stage1.encoder_lr or not self.stage2.encoder_lr:
            raise UserError(
                "stage 1 keeps the encoder frozen, stage 2 trains it: --stage1.encoder-lr 0, --stage2.… above 0"
            )


def main(args: list[str]) -> int:
    """Returns the exit code: 0, 1 for a failed run, 2 for bad input."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax logs much
    try:
        run(parse(CaptionerArgs, args, prog="python -m examples.captioner"))
    except (Exception, KeyboardInterrupt) as error:
        code, line = describe(error)
        print(f"captioner: error: {line}", file=sys.stderr)
        return code
    return 0


def run(args: CaptionerArgs) -> dict[str, dict[str, float]]:
    """Trains, measures, prints and saves. {stage: {metric: value}}

    Raises:
        FileExistsError, FileNotFoundError, ValueError: no encoder, no pairs, or numbers that cannot be used.
    """
    if Path(args.out).exists():
        raise FileExistsError(f"{args.out!r} exists; name a new folder, or remove it first")
    mesh = make_mesh(MeshConfig())
    check_batch_size(args.batch_size, mesh)
    encoder = load_encoder(args.src)
    # Stage 1 leaves the encoder as it is, so stage 2's can be read and resampled before.
    larger = load_encoder(args.src, args.image_size or _half_again(encoder.config), frozen=False)
    start = init_captioner(encoder, DecoderConfig(data.vocab_size()), seed=args.seed)
    trained = Measured(args, mesh)

    trained.stage("blind", start, args.stage1, blind=True)
    first = trained.stage("stage 1", start, args.stage1)
    first = dataclasses.replace(first, encoder=jax.device_put(larger, jax.tree.leaves(first)[0].sharding))
    second = trained.stage("stage 2", first, args.stage2)
    save_captioner(Path(args.out), second, prompt=PROMPT, metrics=trained.metrics)
    trained.show()
    print(f"wrote {args.out}")
    return trained.metrics


class Measured:
    """The stages of one run: trains each, measures it, and remembers the numbers for the table."""

    def __init__(self, args: CaptionerArgs, mesh: Any) -> None:
        self.args, self.mesh, self.prompt = args, mesh, data.prompt_tokens(PROMPT)
        self.metrics: dict[str, dict[str, float]] = {}
        self.captions: list[tuple[str, str]] = []

    def stage(self, name: str, captioner: Captioner, stage: StageConfig, *, blind: bool = False) -> Captioner:
        """One stage at the resolution of the captioner's encoder, and its numbers on the held-out images."""
        args, spec = self.args, captioner.encoder.spec
        images = {"image_size": spec.image_size, "resample": captioner.encoder.config.pixels.resample}
        print(f"{name}: {stage.steps} steps" + ("" if blind else f", {spec.image_size} px, {spec.tokens} image tokens"))
        heldout = data.read_heldout(args.heldout, **images)
        batches = data.training_batches(args.train, batch_size=args.batch_size, seed=args.seed, **images)
        try:
            captioner, losses = train_stage(
                captioner, stage, batches=batches, prompt=self.prompt, mesh=self.mesh, blind=blind, log_every=_LOG_EVERY
            )
        finally:
            batches.close()
        found, written = evaluate(
            captioner, heldout, self.prompt, mesh=self.mesh, batch_size=args.batch_size, blind=blind
        )
        self.metrics[name] = {"train_loss": float(np.mean(losses[-_LOG_EVERY:])), **found}
        print("  held out: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()), flush=True)
        self.captions = list(zip(written, heldout.captions, strict=True))
        return captioner

    def show(self) -> None:
        """The table, and what the last stage wrote for some held-out images."""
        print(f"\n{'held out':<10}" + "".join(f"{name:>15}" for name in next(iter(self.metrics.values()))))
        for name, found in self.metrics.items():
            print(f"{name:<10}" + "".join(f"{value:>15.3f}" for value in found.values()))
        print(f"\n{'written':<44}truth")
        step = max(1, len(self.captions) // _SHOWN)
        for ours, theirs in self.captions[::step][:_SHOWN]:
            print(f"{ours[:42]:<44}{theirs}")


def _half_again(config: Any) -> tuple[int, int]:
    """(height, width) in pixels of a grid with 1.5 times the patches on each side."""
    return tuple(patch * (side + max(1, side // 2)) for side, patch in zip(config.grid, config.patch, strict=True))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
