"""SigLIP B/16 at 224 px from scratch, 9 10^9 English pairs: the paper's batch-size study (arXiv:2303.15343, Tables 1 and 5).

    siglip train configs/siglip_b16.py --data.sources.0.shards 'webli/*.tar' --data.tokenizer c4_en_32k.model
    … --batch-size 4096 --total-steps 2197266          the same pairs at 4k; 16384 and 549316 at 16k

Expect on ImageNet zero-shot 68.4 % at 4k, 72.3 % at 16k, 73.4 % at 32k (Table 5; WebLI, 16 tokens, Adafactor with b2 .95).
The paper took 5 days on 32 TPU v4. The published B/16 saw 40 10^9 pairs with 64 tokens and has 76.2 %:
--total-steps 1220703 --model.text.length 64. The paper does not print its warm-up.

Devices and time: v4:2x4x4, 27.1 of 30.8 GiB, 122.5 h, 3,920 device hours (siglip plan, MFU 35%).
"""

from data_pipelines.loader import DataConfig
from data_pipelines.order.mixture import SourceConfig
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
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
            image=ImageConfig("B/16", **towers),
            text=TextConfig("B", length=16, **towers),
            out_dim=(None, 768),
        ),
        total_steps=274_658,
        batch_size=32_768,
        workdir="runs/siglip_b16",
        optim=OptimConfig(name="adafactor", lr=1e-3, weight_decay=1e-4, warmup_steps=10_000),
        checkpoint=CheckpointConfig(every_steps=5000),
    )
