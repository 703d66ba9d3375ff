"""A trained image tower trains on slowly beside a new text tower: a tenth of the learning rate and no weight decay on it.

    siglip train configs/finetune_both.py                              after configs/quickstart.py
    siglip train configs/finetune_both.py --init.src SRC --workdir DIR     from any other run, FILE.npz or Hugging Face folder

This is how the SigLIP paper fine-tunes public image towers (arXiv:2303.15343, section 4.5): with weight decay the tower forgets
what it knew and ends up hardly better than from scratch. To start from both towers, leave out `init.only` and `model.text`.

On pairs of your own: `--data.sources.0.shards 'pairs/*.tar' --data.sources.0.manifest None --data.sources.0.captions txt 1`.
"""

from data_pipelines import sample
from data_pipelines.augment import AugmentConfig
from data_pipelines.loader import DataConfig
from siglip.evaluation.retrieval import Retrieval
from siglip.models.text import TokenConfig
from siglip.models.two_tower import TextConfig
from siglip.training.config import EvalConfig, TrainConfig
from siglip.training.optim import OptimConfig
from siglip.training.warm_start import InitConfig, SourceModel
from siglip.workdir.checkpoint import CheckpointConfig
from siglip.workdir.metrics import LogConfig

LEARNING_RATE = 6e-3


def get_config() -> TrainConfig:
    return TrainConfig(
        init=InitConfig(src="runs/quickstart", only=("img/.*",)),
        data=DataConfig(
            sources=sample.sources(icons=0),
            tokenizer=sample.TOKENIZER,
            augment=AugmentConfig((0.82, 1.42), aspect=0.12, shift=0.1, brightness=0.15, color=0.15, flip=0.5),
            threads=1,
        ),
        model=SourceModel(
            text=TextConfig(
                width=128,
                depth=1,
                mlp_dim=512,
                num_heads=4,
                vocab_size=8000,
                length=16,
                tokens=TokenConfig(canonical="texts"),
            ),
            temperature_init=10.0,
            bias_init=-5.5,
        ),
        total_steps=300,
        batch_size=256,
        workdir="runs/finetune_both",
        seed=1,  # the quick start's seed would draw the text tower that its image tower was trained with
        optim=OptimConfig(
            "muon",
            lr=LEARNING_RATE,
            weight_decay=0.1 * LEARNING_RATE,
            weight_decay_mults=(("img/.*", 0.0), (".*/kernel", 1.0)),
            lr_mults=(("img/.*", 0.1), ("t|b", 10.0)),
            warmup_steps=30,
        ),
        eval=EvalConfig(tasks=(Retrieval(sample.path("unseen-style.parquet"), captions=sample.CAPTIONS),)),
        checkpoint=CheckpointConfig(every_steps=150),
        log=LogConfig(every_steps=25),
    )
