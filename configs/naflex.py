"""The last steps of a pretraining with images of their own aspect ratio and of several lengths: NaFlex, on the quick start.

    siglip train configs/naflex.py                                after configs/quickstart.py: 24 x 24 px -> any shape
    siglip eval runs/naflex --task retrieval --data 'data_pipelines/sample/emoji-heldout-*.tar' \\
        --captions captions.en --max-patches 64 144 256

SigLIP 2 forks a run of one image size at 90 % of its examples (arXiv:2502.14786, section 2.4.2). Every step draws one length for
its images, whose patches keep the aspect ratio; the pairs of a step do not depend on it. The positions, 12 x 12 here, are
resampled to 16 x 16 at the start, and to each image's grid from then on.

Emoji are square, so R@10 in English can only show that nothing is lost (.34 both ways after the quick start). What keeping the
aspect ratio gains on lines of text and on rows of shapes is what benchmarks/naflex.py measures.
"""

from pathlib import Path

import data_pipelines
from data_pipelines.augment import AugmentConfig
from data_pipelines.loader import DataConfig
from data_pipelines.order.lengths import LengthConfig
from data_pipelines.order.mixture import SourceConfig
from siglip.evaluation.retrieval import Retrieval
from siglip.models.naflex import NaflexConfig
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
            lengths=LengthConfig(patches=(64, 144, 256)),
        ),
        model=SourceModel(image=SourceImage(image_size=(32, 32), patch_dropout=0.0, naflex=NaflexConfig(144, 256))),
        total_steps=300,
        batch_size=64,
        workdir="runs/naflex",
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
