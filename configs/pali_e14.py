"""e/14 at 224 px, the 4 10^9 encoder of PaLI (arXiv:2209.06794), trained with the sigmoid loss.

    siglip train configs/pali_e14.py --data.sources.0.shards 'webli/*.tar' --data.tokenizer c4_en_32k.model

PaLI's own ViT-e was a JFT classifier; locked and given a text tower it has 28.5 % R@1 on XM3600 text to image (LiT, in
arXiv:2303.15343). No sigmoid run of this size is published: batch and pairs are So400m's.

Devices and time: v5p:8x8x4, 25.2 of 95.7 GiB, 1,703.7 h, 436,141 device hours (siglip plan, MFU 45%).
"""

from data_pipelines.loader import DataConfig
from data_pipelines.order.mixture import SourceConfig
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.parallel.sharding import MeshConfig
from siglip.training.config import TrainConfig
from siglip.training.optim import OptimConfig
from siglip.workdir.checkpoint import CheckpointConfig


def get_config() -> TrainConfig:
    towers = {"scan": True, "remat": "full", "dtype": "bfloat16"}
    return TrainConfig(
        data=DataConfig(
            sources=(SourceConfig("data/pairs/*.tar"),),
            tokenizer="data/c4_en_32k.model",
            workers=16,
            threads=1,
            cache_bytes=0,
        ),
        model=ModelConfig(
            image=ImageConfig("e/14", **towers),
            text=TextConfig("So400m", **towers),
            out_dim=(None, 1792),
        ),
        total_steps=1_220_703,
        batch_size=32_768,
        workdir="runs/pali_e14",
        optim=OptimConfig(name="adafactor", lr=1e-3, weight_decay=1e-4, warmup_steps=20_000),
        mesh=MeshConfig(fsdp=32),
        checkpoint=CheckpointConfig(every_steps=5000),
    )
