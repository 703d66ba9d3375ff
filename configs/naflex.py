"""The last steps of a pretraining with images of their own aspect ratio and of several lengths: NaFlex, on the quick start.

    siglip train configs/naflex.py                                after configs/quickstart.py: 32 x 32 px -> any shape
    siglip eval runs/naflex --task retrieval --data data_pipelines/sample/unseen-style.parquet \\
        --captions captions.en --max-patches 16 36 64

SigLIP 2 forks a run of one image size at 90 % of its examples (arXiv:2502.14786, section 2.4.2). Every step draws one length for
its images, whose patches keep the aspect ratio; the pairs of a step do not depend on it. The positions, 4 x 4 here, are
resampled to 8 x 8 at the start, and to each image's grid from then on.

Emoji are square, so retrieval of emoji can only show that nothing is lost. What keeping the aspect ratio gains on lines of text
and on rows of shapes is what benchmarks/naflex.py measures.
"""

from dataclasses import replace
from pathlib import Path

from data_pipelines.order.lengths import LengthConfig
from siglip.models.naflex import NaflexConfig
from siglip.training.config import EvalConfig, TrainConfig, load_config_file
from siglip.training.warm_start import InitConfig, SourceImage, SourceModel
from siglip.workdir.checkpoint import CheckpointConfig
from siglip.workdir.metrics import LogConfig

QUICKSTART = Path(__file__).with_name("quickstart.py")


def get_config() -> TrainConfig:
    quickstart = load_config_file(str(QUICKSTART))
    return replace(
        quickstart,
        init=InitConfig(src="runs/quickstart"),
        data=replace(quickstart.data, tokenizer=None, lengths=LengthConfig(patches=(16, 36, 64))),
        model=SourceModel(image=SourceImage(image_size=(64, 64), naflex=NaflexConfig(36, 64))),
        total_steps=150,
        workdir="runs/naflex",
        optim=replace(quickstart.optim, lr=quickstart.optim.lr / 100, weight_decay=0.0, warmup_steps=30),
        eval=EvalConfig(tasks=quickstart.eval.tasks[:1]),
        checkpoint=CheckpointConfig(every_steps=50),
        log=LogConfig(every_steps=25),
    )
