"""g-opt/16 at 256 px, the giant of SigLIP 2 (arXiv:2502.14786), with its sigmoid loss alone.

    siglip train configs/siglip2_gopt16.py --data.sources.0.shards 'webli/*.tar' --data.tokenizer gemma.model

40 10^9 pairs at 32k, 90 % English, lr 1e-3, clipping at 1, 20k steps of warm-up; Gemma's 256k pieces, lower case, pads of 0.
The published 84.5 % on ImageNet come with captioning, self-distillation and masked prediction, which are not in this recipe:
expect less, no ablation is published. The text tower is So400m, as there.

Devices and time: v5e:16x16, 15.2 of 15.8 GiB, 1,272.6 h, 325,780 device hours (siglip plan, MFU 45%).
"""

from data_pipelines.loader import DataConfig
from data_pipelines.order.mixture import SourceConfig
from siglip.models.text import TokenConfig
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.parallel.sharding import MeshConfig
from siglip.training.config import TrainConfig
from siglip.training.optim import OptimConfig
from siglip.workdir.checkpoint import CheckpointConfig


def get_config() -> TrainConfig:
    towers = {"scan": True, "remat": "full", "dtype": "bfloat16"}
    return TrainConfig(
        data=DataConfig(
            sources=(SourceConfig("data/webli_multi/*.tar"),),
            tokenizer="data/gemma.model",
            workers=16,
            threads=1,
            cache_bytes=0,
        ),
        model=ModelConfig(
            image=ImageConfig("g-opt/16", image_size=(256, 256), **towers),
            text=TextConfig("So400m", vocab_size=256_000, tokens=TokenConfig(pad_id=0, canonical="none"), **towers),
            out_dim=(None, 1536),
        ),
        total_steps=1_220_703,
        batch_size=32_768,
        workdir="runs/siglip2_gopt16",
        optim=OptimConfig(lr=1e-3, weight_decay=1e-4, warmup_steps=20_000, momentum_dtype="bfloat16"),
        mesh=MeshConfig(fsdp=32),
        checkpoint=CheckpointConfig(every_steps=5000),
    )
