"""Configs to plan with, and what compilers said of them."""

import dataclasses
from typing import NamedTuple

from data_pipelines.loader import DataConfig
from data_pipelines.order.mixture import SourceConfig
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.parallel.sharding import MeshConfig
from siglip.training.config import TrainConfig
from siglip.training.objective import LossConfig
from siglip.training.optim import OptimConfig


def make_config(
    image: str,
    text: str,
    *,
    px: int = 224,
    batch_size: int,
    remat: str = "full",
    fsdp: int = 1,
    micro: int | None = None,
) -> TrainConfig:
    """A run in bfloat16 on scanned blocks, AdamW in float32, 64 tokens."""
    towers = {"scan": True, "remat": remat, "dtype": "bfloat16"}
    vit = ImageConfig(image, image_size=(px, px), **towers)
    return TrainConfig(
        data=DataConfig(sources=(SourceConfig("pairs.tar"),), tokenizer="pieces.model"),
        model=ModelConfig(vit, TextConfig(text, **towers), (None, vit.spec.width)),
        total_steps=100_000,
        batch_size=batch_size,
        workdir="runs/plan",
        mesh=MeshConfig(fsdp=fsdp),
        loss=LossConfig(micro_batch_size=micro),
        optim=OptimConfig(warmup_steps=1000),
    )


def tiny(config: TrainConfig) -> TrainConfig:
    """The same run of towers that trace and compile in no time."""
    sizes = {"width": 64, "depth": 2, "mlp_dim": 128, "num_heads": 2}
    image = dataclasses.replace(config.model.image, **sizes, image_size=(32, 32), patch_size=(8, 8))
    text = dataclasses.replace(config.model.text, **sizes, length=8, vocab_size=512)
    return dataclasses.replace(config, model=ModelConfig(image, text, (None, 64)))


class Compiled(NamedTuple):
    """GiB per device of a compiled step: arguments, temporaries and results, less those that share memory."""

    config: TrainConfig
    topology: str
    peak: float
