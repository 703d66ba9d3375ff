"""B/16 on a set of CC12M's size, for one node: 10 10^6 pairs, 32 epochs at a batch of 4096.

    siglip train configs/cc12m.py --data.sources.0.shards 'cc12m/*.tar' --data.tokenizer c4_en_32k.model

No ImageNet number of a sigmoid run on CC12M was found to check against; DataComp medium saw fewer pairs of worse quality and has
17.6 to 29.7 %. Light crops and flips: every pair is seen 32 times.

Devices and time: h100:8, 30.1 of 72.8 GiB, 4.4 h, 35 device hours (siglip plan, MFU 35%).
"""

from data_pipelines.augment import AugmentConfig
from data_pipelines.loader import DataConfig
from data_pipelines.order.mixture import SourceConfig
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.training.config import TrainConfig
from siglip.training.optim import OptimConfig
from siglip.workdir.checkpoint import CheckpointConfig


def get_config() -> TrainConfig:
    towers = {"scan": True, "remat": "dots", "dtype": "bfloat16"}
    return TrainConfig(
        data=DataConfig(
            sources=(SourceConfig("data/cc12m/*.tar"),),
            tokenizer="data/c4_en_32k.model",
            workers=32,
            threads=1,
            cache_bytes=0,
            augment=AugmentConfig(scale=(0.9, 1.0), shift=0.05, flip=0.5),
        ),
        model=ModelConfig(
            image=ImageConfig("B/16", **towers),
            text=TextConfig("B", **towers),
            out_dim=(None, 768),
        ),
        total_steps=78_125,
        batch_size=4_096,
        workdir="runs/cc12m",
        optim=OptimConfig(lr=1e-3, weight_decay=1e-4, warmup_steps=4_000),
        checkpoint=CheckpointConfig(every_steps=2000),
    )
