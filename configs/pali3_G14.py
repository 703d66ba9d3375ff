"""G/14 at 224 px, the 2 10^9 encoder of PaLI-3 (arXiv:2310.09199), by SigLIP's recipe.

    siglip train configs/pali3_G14.py --data.sources.0.shards 'webli/*.tar' --data.tokenizer c4_en_32k.model

PaLI-3 takes the tokens before pooling: `siglip export runs/pali3_G14 --format bigvision --tower image`, or
siglip.load_encoder. Batch and number of pairs of its encoder are not published: these are So400m's. Expect less on ImageNet
than a classifier of this size and more as an encoder (the paper's finding, on TextVQA and RefCOCO above all). Then
configs/pali3_G14_812.py.

Devices and time: v5e:16x16, 9.6 of 15.8 GiB, 1,991.6 h, 509,846 device hours (siglip plan, MFU 45%).
"""

from data_pipelines.loader import DataConfig
from data_pipelines.order.mixture import SourceConfig
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.parallel.sharding import MeshConfig
from siglip.training.config import TrainConfig
from siglip.training.objective import LossConfig
from siglip.training.optim import OptimConfig
from siglip.workdir.checkpoint import CheckpointConfig


def get_config() -> TrainConfig:
    towers = {"scan": True, "remat": "dots", "dtype": "bfloat16"}
    return TrainConfig(
        data=DataConfig(
            sources=(SourceConfig("data/pairs/*.tar"),),
            tokenizer="data/c4_en_32k.model",
            workers=16,
            threads=1,
            cache_bytes=0,
        ),
        model=ModelConfig(
            image=ImageConfig("G/14", **towers),
            text=TextConfig("So400m", **towers),
            out_dim=(None, 1664),
        ),
        total_steps=1_220_703,
        batch_size=32_768,
        workdir="runs/pali3_G14",
        # The whole batch at once takes 17 GiB of a v5e chip (remat full, libtpu 0.0.42.1), and no less time.
        loss=LossConfig(micro_batch_size=4096),
        optim=OptimConfig(name="adafactor", lr=1e-3, weight_decay=1e-4, warmup_steps=20_000),
        mesh=MeshConfig(fsdp=64),
        checkpoint=CheckpointConfig(every_steps=5000),
    )
