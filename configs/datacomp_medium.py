"""DataComp medium: B/32, 128 10^6 pairs seen at a batch of 4096 (arXiv:2304.14108), with the sigmoid loss.

    siglip train configs/datacomp_medium.py --data.sources.0.manifest curated/manifest.parquet

Expect with CLIP's loss on ImageNet zero-shot 17.6 % unfiltered, 22.6 % with the basic filter, 29.7 % with image clusters and CLIP
score (Table 3). Learning rate, decay and warm-up are DataComp's.

Devices and time: h100:8, 11.3 of 72.8 GiB, 0.5 h, 4 device hours (siglip plan, MFU 35%).
"""

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
            sources=(SourceConfig("data/datacomp_medium/*.tar"),),
            tokenizer="data/c4_en_32k.model",
            workers=16,
            threads=1,
            cache_bytes=0,
        ),
        model=ModelConfig(
            image=ImageConfig("B/32", **towers),
            text=TextConfig("M", **towers),
            out_dim=(None, 768),
        ),
        total_steps=31_250,
        batch_size=4_096,
        workdir="runs/datacomp_medium",
        optim=OptimConfig(lr=5e-4, weight_decay=1e-4, warmup_steps=500, b2=0.98),
        checkpoint=CheckpointConfig(every_steps=2000),
    )
