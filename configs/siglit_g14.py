"""SigLiT g/14: a frozen ViT-g/14, stored embeddings, a text tower of size L (arXiv:2303.15343, Table 1).

    siglip train configs/siglit_g14.py --data.sources.0.shards 'webli/*.tar' --data.tokenizer c4_en_32k.model

Expect 84.5 % on ImageNet zero-shot after two days on four TPU v4 (107k steps of 20k pairs). The paper used LION at 1e-4; this
is Adafactor as for its other runs. Stored embeddings are 5.6 KB an image: 5.6 TB for 10^9.

Devices and time: v4:2x2x1, 10.1 of 30.8 GiB, 59.8 h, 239 device hours (siglip plan, MFU 45%).
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
        init=InitConfig(src="vit_g14.npz:img", only=("img/.*",)),
        data=DataConfig(
            sources=(SourceConfig("data/pairs/*.tar"),),
            tokenizer="data/c4_en_32k.model",
            image_embeddings="runs/image_embeddings",
            workers=16,
            threads=1,
            cache_bytes=0,
        ),
        model=ModelConfig(
            image=ImageConfig("g/14", **towers),
            text=TextConfig("L", length=16, **towers),
            out_dim=(None, 1408),
        ),
        total_steps=107_000,
        batch_size=20_480,
        workdir="runs/siglit_g14",
        optim=OptimConfig(
            name="adafactor", lr=1e-3, weight_decay=1e-4, warmup_steps=10_000, lr_mults=(("img/.*", 0.0),)
        ),
        loss=LossConfig(micro_batch_size=4_096),
        checkpoint=CheckpointConfig(every_steps=2000),
    )
