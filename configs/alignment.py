"""A model that scores web pairs for `siglip data curate`: the quick start's, on the shipped sample and your own clean pairs.

    siglip train configs/alignment.py --data.sources.1.shards 'clean/*.tar'
    siglip data curate 'web/*.tar' --out curated --model runs/alignment --min-score 0.1

`--data.sources.1.weight` is the share of your pairs against 1 for the sample's emoji; 0.5 fits some 2500 pairs.

The model is the quick start's; only the data differ. Captions have up to 32 pieces instead of 16, since web captions are lists of
words. Your pairs need a caption (`txt`); captions in other languages, keywords and a descriptive file name (`captions`,
`keywords`, `name` in the json) are used where a pair has them.
"""

from data_pipelines import sample
from data_pipelines.augment import AugmentConfig
from data_pipelines.loader import DataConfig
from data_pipelines.order.mixture import SourceConfig
from siglip.models.text import TokenConfig
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.training.config import TrainConfig
from siglip.training.optim import OptimConfig
from siglip.workdir.checkpoint import CheckpointConfig
from siglip.workdir.metrics import LogConfig

LEARNING_RATE = 6e-3


def get_config() -> TrainConfig:
    clean = (("txt", 0.6), ("captions.*", 0.2), ("keywords", 0.1), ("name", 0.1))
    return TrainConfig(
        data=DataConfig(
            sources=(*sample.sources(icons=0), SourceConfig("clean/*.tar", weight=0.5, captions=clean)),
            tokenizer=sample.TOKENIZER,
            augment=AugmentConfig((0.82, 1.42), aspect=0.12, shift=0.1, brightness=0.15, color=0.15, flip=0.5),
            threads=1,
        ),
        model=ModelConfig(
            image=ImageConfig(width=128, depth=3, mlp_dim=512, num_heads=4, patch_size=(16, 16), image_size=(32, 32)),
            text=TextConfig(
                width=128,
                depth=1,
                mlp_dim=512,
                num_heads=4,
                vocab_size=8000,
                length=32,
                tokens=TokenConfig(canonical="texts"),
            ),
            out_dim=(None, 128),
            bias_init=-5.5,
        ),
        total_steps=1300,
        batch_size=256,
        workdir="runs/alignment",
        optim=OptimConfig(
            "muon", lr=LEARNING_RATE, weight_decay=0.1 * LEARNING_RATE, lr_mults=(("t|b", 10.0),), warmup_steps=60
        ),
        checkpoint=CheckpointConfig(every_steps=650),
        log=LogConfig(every_steps=50),
    )
