"""The last steps of a pretraining: both towers at a higher resolution, a hundredth of the learning rate, no weight decay.

    siglip train configs/higher_resolution.py                             after configs/quickstart.py: 24 -> 48 px
    siglip train configs/higher_resolution.py --init.src siglip_b16_224.npz --model.image.image-size 448 448 --workdir DIR

The published SigLIP models reached their higher resolutions like this: 5 of 45 billion examples at a hundredth of the learning
rate, without weight decay (arXiv:2303.15343). Learned positions are resampled to the new grid; everything else is taken over,
the tokenizer too.

Expect R@10 in English on the held-out emoji to stay where it was (.31 both ways after a quick start of 1600 steps) from the first
step on: at 48 px, emoji show no more than at 24 (docs/log.md).
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
    captions = (("captions.en", 0.25), ("captions.*", 0.15), ("keywords", 0.3), ("captions.en+keywords", 0.3))
    return TrainConfig(
        init=InitConfig(src="runs/quickstart"),
        data=DataConfig(
            sources=(SourceConfig(str(SAMPLE / "emoji-train-*.tar"), captions=captions),),
            tokenizer=None,
            augment=AugmentConfig(scale=(0.82, 1.42), aspect=0.12, shift=0.1, flip=0.5),
            threads=1,
        ),
        model=SourceModel(image=SourceImage(image_size=(48, 48))),
        total_steps=300,
        batch_size=64,
        workdir="runs/higher_resolution",
        optim=OptimConfig(
            lr=LEARNING_RATE,
            weight_decay=0.0,
            lr_mults=(("t|b", 10.0), ("txt/(Embed_0/embedding|pos_embedding)", 0.05), ("txt/.*", 0.25)),
            warmup_steps=30,
        ),
        eval=EvalConfig(
            tasks=(
                Retrieval(
                    str(SAMPLE / "emoji-heldout-*.tar"),
                    captions=tuple(f"captions.{language}" for language in LANGUAGES),
                ),
            ),
        ),
        checkpoint=CheckpointConfig(every_steps=100),
        log=LogConfig(every_steps=25),
    )
