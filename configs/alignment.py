"""A model that scores web pairs for `siglip data curate`: the quick start's, on the shipped sample and your own clean pairs.

    siglip train configs/alignment.py --data.sources.1.shards 'clean/*.tar'
    siglip data curate 'web/*.tar' --out curated --model runs/alignment --min-score 0.1

`--data.sources.1.weight` is the share of your pairs against 1 for the sample's emoji; 0.5 fits some 2500 pairs.

The model is the quick start's; only the data differ. Captions have up to 32 pieces instead of 16, since web captions are lists
of words. Your pairs need a caption (`txt`); captions in other languages, keywords and a
descriptive file name (`captions`, `keywords`, `name` in the json) are used where a pair has them.
"""

from pathlib import Path

import data_pipelines
from data_pipelines.augment import AugmentConfig
from data_pipelines.loader import DataConfig
from data_pipelines.order.mixture import SourceConfig
from siglip.models.text import TokenConfig
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.training.config import TrainConfig
from siglip.training.optim import OptimConfig
from siglip.workdir.checkpoint import CheckpointConfig
from siglip.workdir.metrics import LogConfig

SAMPLE = Path(data_pipelines.__file__).parent / "sample"
LEARNING_RATE = 2e-3


def get_config() -> TrainConfig:
    emoji = (("captions.en", 0.4), ("captions.*", 0.2), ("keywords", 0.2), ("captions.en+keywords", 0.2))
    clean = (("txt", 0.6), ("captions.*", 0.2), ("keywords", 0.1), ("name", 0.1))
    kept = str(SAMPLE / "curated-emoji" / "manifest.parquet")
    return TrainConfig(
        data=DataConfig(
            sources=(
                SourceConfig(str(SAMPLE / "emoji-*.parquet"), captions=emoji, manifest=kept),
                SourceConfig("clean/*.tar", weight=0.5, captions=clean),
            ),
            tokenizer=str(SAMPLE / "sample.model"),
            augment=AugmentConfig(scale=(0.82, 1.42), aspect=0.12, shift=0.1, flip=0.5),
            threads=1,
        ),
        model=ModelConfig(
            image=ImageConfig(width=128, depth=3, mlp_dim=512, num_heads=4, patch_size=(8, 8), image_size=(32, 32)),
            text=TextConfig(
                width=128,
                depth=2,
                mlp_dim=512,
                num_heads=4,
                vocab_size=8000,
                length=32,
                tokens=TokenConfig(canonical="texts"),
            ),
            out_dim=(None, 128),
        ),
        total_steps=1000,
        batch_size=256,
        workdir="runs/alignment",
        optim=OptimConfig(lr=LEARNING_RATE, weight_decay=0.1 * LEARNING_RATE, warmup_steps=100),
        checkpoint=CheckpointConfig(every_steps=500),
        log=LogConfig(every_steps=50),
    )
