"""The least there is to a recipe: S/16 on shards whose pairs have a `txt`. Everything else is a flag: siglip train … --help.

    siglip train configs/minimal.py --data.sources.0.shards 'pairs/*.tar' --data.tokenizer pieces.model

Devices and time: h100:1, 28.0 of 72.8 GiB, 0.6 h, 1 device hours (siglip plan, MFU 35%).
"""

from data_pipelines.loader import DataConfig
from data_pipelines.order.mixture import SourceConfig
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.training.config import TrainConfig
from siglip.training.optim import OptimConfig


def get_config() -> TrainConfig:
    towers = {"dtype": "bfloat16", "remat": "dots"}
    model = ModelConfig(ImageConfig("S/16", **towers), TextConfig("S", **towers), out_dim=(None, 384))
    data = DataConfig(sources=(SourceConfig("pairs/*.tar"),), tokenizer="pieces.model")
    optim = OptimConfig(warmup_steps=1_000)
    return TrainConfig(data, model, total_steps=20_000, batch_size=1_024, workdir="runs/minimal", optim=optim)
