"""The last steps of a pretraining with images of their own aspect ratio and of several lengths: NaFlex, on the quick start.

    siglip train configs/naflex.py                                after configs/quickstart.py: 32 x 32 px -> any shape
    siglip eval runs/naflex --task retrieval --data data_pipelines/sample/unseen-style.parquet \\
        --captions captions.en --max-patches 4 9 16

SigLIP 2 forks a run of one image size at 90 % of its examples (arXiv:2502.14786, section 2.4.2). Every step draws one length for
its images, whose patches keep the aspect ratio; the pairs of a step do not depend on it. The positions, 2 x 2 here, are
resampled to 4 x 4 at the start, and to each image's grid from then on.

Emoji are square, and a tower of four patches an image has to learn anew what a smaller part of the image shows: R@10 on the
unseen style is .51 and .52 afterwards (one seed), after .62 and .64 of the quick start itself. What keeping the aspect ratio
gains on lines of text and on rows of shapes is what benchmarks/naflex.py measures.
"""

from data_pipelines import sample
from data_pipelines.augment import AugmentConfig
from data_pipelines.loader import DataConfig
from data_pipelines.order.lengths import LengthConfig
from siglip.evaluation.retrieval import Retrieval
from siglip.models.naflex import NaflexConfig
from siglip.training.config import EvalConfig, TrainConfig
from siglip.training.optim import OptimConfig
from siglip.training.warm_start import InitConfig, SourceImage, SourceModel
from siglip.workdir.checkpoint import CheckpointConfig
from siglip.workdir.metrics import LogConfig

LEARNING_RATE = 1e-3


def get_config() -> TrainConfig:
    return TrainConfig(
        init=InitConfig(src="runs/quickstart"),
        data=DataConfig(
            sources=sample.sources(icons=0),
            tokenizer=None,
            augment=AugmentConfig((0.82, 1.42), aspect=0.12, shift=0.1, brightness=0.15, color=0.15, flip=0.5),
            threads=1,
            lengths=LengthConfig(patches=(4, 9, 16)),
        ),
        model=SourceModel(image=SourceImage(image_size=(64, 64), patch_dropout=0.0, naflex=NaflexConfig(9, 16))),
        total_steps=200,
        batch_size=256,
        workdir="runs/naflex",
        optim=OptimConfig("muon", lr=LEARNING_RATE, weight_decay=0.0, lr_mults=(("t|b", 10.0),), warmup_steps=30),
        eval=EvalConfig(tasks=(Retrieval(sample.path("unseen-style.parquet"), captions=sample.CAPTIONS),)),
        checkpoint=CheckpointConfig(every_steps=50),
        log=LogConfig(every_steps=25),
    )
