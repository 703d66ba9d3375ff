"""The last steps of a pretraining: both towers at a higher resolution, a hundredth of the learning rate, no weight decay.

    siglip train configs/higher_resolution.py                             after configs/quickstart.py: 32 -> 64 px
    siglip train configs/higher_resolution.py --init.src siglip_b16_224.npz --model.image.image-size 448 448 --workdir DIR

The published SigLIP models reached their higher resolutions like this: 5 of 45 billion examples at a hundredth of the learning
rate, without weight decay (arXiv:2303.15343). Learned positions are resampled to the new grid; everything else is taken over,
the tokenizer too.
"""

from pathlib import Path

import data_pipelines
from data_pipelines.augment import AugmentConfig
from data_pipelines.loader import DataConfig
from data_pipelines.order.mixture import SourceConfig
from siglip.evaluation.retrieval import Retrieval
from siglip.training.config import EvalConfig, TrainConfig
from siglip.training.optim import OptimConfig
from siglip.training.warm_start import InitConfig, SourceImage, SourceModel
from siglip.workdir.checkpoint import CheckpointConfig
from siglip.workdir.metrics import LogConfig

SAMPLE = Path(data_pipelines.__file__).parent / "sample"
LANGUAGES = ("en", "ar", "de", "es", "fr", "hi", "ja", "ru", "sw", "te", "th", "zh")
LEARNING_RATE = 2e-3 / 100


def get_config() -> TrainConfig:
    emoji = (("captions.en", 0.3), ("captions.*", 0.4), ("keywords", 0.1), ("captions.en+keywords", 0.2))
    icons = (("txt", 0.5), ("keywords", 0.2), ("txt+keywords", 0.3))
    emoji_kept, icons_kept = (str(SAMPLE / f"curated-{kind}" / "manifest.parquet") for kind in ("emoji", "icons"))
    return TrainConfig(
        init=InitConfig(src="runs/quickstart"),
        data=DataConfig(
            sources=(
                SourceConfig(str(SAMPLE / "emoji-*.parquet"), captions=emoji, manifest=emoji_kept),
                SourceConfig(str(SAMPLE / "icons-*.parquet"), weight=0.25, captions=icons, manifest=icons_kept),
            ),
            tokenizer=None,
            augment=AugmentConfig(scale=(0.82, 1.42), aspect=0.12, shift=0.1, flip=0.5),
            threads=1,
        ),
        model=SourceModel(image=SourceImage(image_size=(64, 64))),
        total_steps=200,
        batch_size=256,
        workdir="runs/higher_resolution",
        optim=OptimConfig(
            lr=LEARNING_RATE,
            weight_decay=0.0,
            warmup_steps=20,
        ),
        eval=EvalConfig(
            tasks=(
                Retrieval(
                    str(SAMPLE / "unseen-style.parquet"),
                    captions=tuple(f"captions.{language}" for language in LANGUAGES),
                ),
            ),
        ),
        checkpoint=CheckpointConfig(every_steps=100),
        log=LogConfig(every_steps=25),
    )
