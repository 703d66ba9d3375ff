"""A tower of ViT-22B's shape (PaLI-X's encoder; arXiv:2302.05442) at 224 px, trained with the sigmoid loss.

    siglip train configs/palix_22b.py --data.sources.0.shards 'webli/*.tar' --data.tokenizer c4_en_32k.model

Attention and MLP side by side, LayerNorm of queries and keys, no biases in query, key, value and LayerNorms. ViT-22B itself
was a JFT classifier, and no sigmoid run of this size is published: batch and pairs are those of the smaller ones.

Devices and time: v5p:8x8x16, 22.4 of 95.7 GiB, 2,386.9 h, 2,444,187 device hours (siglip plan, MFU 45%).
"""

from data_pipelines.loader import DataConfig
from data_pipelines.order.mixture import SourceConfig
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.models.variants import BlockConfig
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
            image=ImageConfig("22B/14", block=BlockConfig(parallel=True, qk_norm=True, bias=False), **towers),
            text=TextConfig("g-opt", **towers),
            out_dim=(None, 6144),
        ),
        total_steps=1_220_703,
        batch_size=32_768,
        workdir="runs/palix_22b",
        optim=OptimConfig(name="adafactor", lr=1e-3, weight_decay=1e-4, warmup_steps=20_000),
        mesh=MeshConfig(fsdp=128),
        checkpoint=CheckpointConfig(every_steps=5000),
    )
