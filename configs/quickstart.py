"""A small SigLIP from scratch on the shipped emoji sample: about five minutes on two CPU cores.

siglip train configs/quickstart.py
"""

from pathlib import Path

import data_pipelines
from data_pipelines.augment import AugmentConfig
from data_pipelines.loader import DataConfig
from data_pipelines.mixture import SourceConfig
from siglip.checkpoint import CheckpointConfig
from siglip.config import EvalConfig, EvalTask, TrainConfig
from siglip.metrics import LogConfig
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.optim import OptimConfig

SAMPLE = Path(data_pipelines.__file__).parent / "sample"
LANGUAGES = ("en", "ar", "de", "es", "fr", "hi", "ja", "ru", "sw", "te", "th", "zh")


def get_config() -> TrainConfig:
    return TrainConfig(
        data=DataConfig(
            sources=(
                SourceConfig(
                    shards=str(SAMPLE / "emoji-train-*.tar"),
                    captions=(("captions.en", 0.4), ("captions.en+keywords", 0.4), ("captions.*", 0.2)),
                ),
            ),
            tokenizer=str(SAMPLE / "spiece.model"),
            augment=AugmentConfig(scale=(0.7, 1.2), aspect=0.12, shift=0.1),
            threads=1,
        ),
        model=ModelConfig(
            image=ImageConfig(width=96, depth=3, mlp_dim=384, num_heads=3, patch_size=(8, 8), image_size=(32, 32)),
            text=TextConfig(width=96, depth=1, mlp_dim=384, num_heads=3, vocab_size=4000, length=12),
            out_dim=(None, 96),
        ),
        total_steps=4000,
        batch_size=64,
        workdir="runs/quickstart",
        optim=OptimConfig(lr=2e-3, weight_decay=1e-4, warmup_steps=300),
        eval=EvalConfig(
            tasks=(
                EvalTask(
                    "retrieval", "emoji", str(SAMPLE / "emoji-heldout-*.tar"),
                    captions=tuple(f"captions.{language}" for language in LANGUAGES),
                ),
            ),
        ),
        checkpoint=CheckpointConfig(every_steps=1000),
        log=LogConfig(every_steps=100),
    )  # fmt: skip
