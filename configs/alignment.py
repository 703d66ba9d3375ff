"""A model that scores web pairs for `siglip data curate`: the quick start's, on the shipped sample and your own clean pairs.

    siglip train configs/alignment.py --data.sources.1.shards 'clean/*.tar'
    siglip data curate 'web/*.tar' --out curated --model runs/alignment --min-score 0.1

With 1600 clip-art drawings and 803 stamps as the clean pairs, expect an AUC of .93 between captions that belong to their image
and captions that belong to another, if the model was trained on the corpus's images, and .83 if it was not (docs/log.md).
`--data.sources.1.weight` is the share of your pairs against 1 for the sample's 1850; 1.3 fits 2400 pairs.

The model is the quick start's; only the data differ. Captions have up to 32 pieces instead of 12, since web captions are lists
of words, and there are half as many steps. Your pairs need a caption (`txt`); captions in other languages, keywords and a
descriptive file name (`captions`, `keywords`, `name` in the json) are used where a pair has them.
"""

from pathlib import Path

import data_pipelines
from data_pipelines.augment import AugmentConfig
from data_pipelines.loader import DataConfig
from data_pipelines.order.mixture import SourceConfig
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
    return TrainConfig(
        data=DataConfig(
            sources=(
                SourceConfig(str(SAMPLE / "emoji-train-*.tar"), captions=emoji),
                SourceConfig("clean/*.tar", weight=1.3, captions=clean),
            ),
            tokenizer=str(SAMPLE / "spiece.model"),
            augment=AugmentConfig(scale=(0.82, 1.42), aspect=0.12, shift=0.1, flip=0.5),
            threads=1,
        ),
        model=ModelConfig(
            image=ImageConfig(
                width=96, depth=1, mlp_dim=384, num_heads=3, patch_size=(2, 2), image_size=(24, 24), patch_dropout=0.87
            ),
            text=TextConfig(
                width=192, depth=1, mlp_dim=192, num_heads=3, vocab_size=4000, length=32, pool="mean", embed_std=1.0
            ),
            out_dim=(None, 96),
            bias_init=-4.0,
        ),
        total_steps=3200,
        batch_size=64,
        workdir="runs/alignment",
        optim=OptimConfig(
            lr=LEARNING_RATE,
            weight_decay=1.0 * LEARNING_RATE,
            weight_decay_mults=(("txt/.*/kernel", 0.25), (".*/kernel", 1.0)),
            lr_mults=(("t|b", 10.0), ("txt/(Embed_0/embedding|pos_embedding)", 0.05), ("txt/.*", 0.25)),
            warmup_steps=300,
        ),
        checkpoint=CheckpointConfig(every_steps=1000),
        log=LogConfig(every_steps=50),
    )
