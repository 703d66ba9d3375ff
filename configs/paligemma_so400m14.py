"""So400m/14 at 224 px, the encoder of PaliGemma and PaliGemma 2: 40 10^9 pairs at a batch of 32k.

    siglip train configs/paligemma_so400m14.py --data.sources.0.shards 'webli/*.tar' --data.tokenizer c4_en_32k.model

Expect 82.2 % on ImageNet zero-shot, 69.0 / 50.8 % R@1 on COCO (SigLIP 2, arXiv:2502.14786, Table 1). 16 tokens, as the published
checkpoint at this resolution has. The shape is SoViT's (arXiv:2305.13035): siglip.models.variants.sovit.

Devices and time: v5e:16x16, 9.1 of 15.8 GiB, 454.9 h, 116,442 device hours (siglip plan, MFU 45%).
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
            image=ImageConfig("So400m/14", **towers),
            text=TextConfig("So400m", length=16, **towers),
            out_dim=(None, 1152),
        ),
        total_steps=1_220_703,
        batch_size=32_768,
        workdir="runs/paligemma_so400m14",
        optim=OptimConfig(name="adafactor", lr=1e-3, weight_decay=1e-4, warmup_steps=20_000),
        mesh=MeshConfig(fsdp=16),
        checkpoint=CheckpointConfig(every_steps=5000),
    )
