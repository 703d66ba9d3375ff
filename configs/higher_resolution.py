"""The last steps of a pretraining: both towers at a higher resolution, a hundredth of the learning rate, no weight decay.

    siglip train configs/higher_resolution.py                             after configs/quickstart.py: 32 -> 64 px
    siglip train configs/higher_resolution.py --init.src siglip_b16_224.npz --model.image.image-size 448 448 --workdir DIR

The published SigLIP models reached their higher resolutions like this: 5 of 45 billion examples at a hundredth of the learning
rate, without weight decay (arXiv:2303.15343). Learned positions are resampled to the new grid; everything else is taken over,
the tokenizer too.
"""

from dataclasses import replace
from pathlib import Path

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
        data=replace(quickstart.data, tokenizer=None),
        model=SourceModel(image=SourceImage(image_size=(64, 64))),
        total_steps=100,
        workdir="runs/higher_resolution",
        optim=replace(quickstart.optim, lr=quickstart.optim.lr / 100, weight_decay=0.0, warmup_steps=20),
        eval=EvalConfig(tasks=quickstart.eval.tasks[:1]),
        checkpoint=CheckpointConfig(every_steps=50),
        log=LogConfig(every_steps=25),
    )
