"""SigLiT B/8: a public ViT-B/8 stays frozen, its embeddings are computed once, a text tower learns (arXiv:2303.15343, Table 1).

    siglip train configs/siglit_b8.py --data.sources.0.shards 'webli/*.tar' --data.tokenizer c4_en_32k.model

Expect 79.7 % on ImageNet zero-shot after one day on four TPU v4 (65k steps of 32k pairs, text tower of 12 layers of L). The paper
used LION at 1e-4; this is Adafactor as for its other runs. Stored embeddings are 3 KB an image: 3 TB for 10^9.

Devices and time: v4:2x2x1, 6.6 of 30.8 GiB, 37.5 h, 150 device hours (siglip plan, MFU 35%).
"""

from data_pipelines.loader import DataConfig
from data_pipelines.order.mixture import SourceConfig
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.training.config import TrainConfig
from siglip.training.objective import LossConfig
from siglip.training.optim import OptimConfig
from siglip.training.warm_start import InitConfig
from siglip.workdir.checkpoint import CheckpointConfig


def get_config() -> TrainConfig:
    towers = {"scan": True, "remat": "full", "dtype": "bfloat16"}
    return TrainConfig(
        init=InitConfig(src="vit_b8.npz:img", only=("img/.*",)),
        data=DataConfig(
            sources=(SourceConfig("data/pairs/*.tar"),),
            tokenizer="data/c4_en_32k.model",
            image_embeddings="runs/image_embeddings",
            workers=16,
            threads=1,
            cache_bytes=0,
        ),
        model=ModelConfig(
            image=ImageConfig("B/8", pool="tok", **towers),
            text=TextConfig("L", depth=12, length=16, **towers),
            out_dim=(None, 768),
        ),
        total_steps=65_000,
        batch_size=32_768,
        workdir="runs/siglit_b8",
        optim=OptimConfig(
            name="adafactor", lr=1e-3, weight_decay=1e-4, warmup_steps=6_500, lr_mults=(("img/.*", 0.0),)
        ),
        loss=LossConfig(micro_batch_size=8_192),
        checkpoint=CheckpointConfig(every_steps=2000),
    )
