"""A small SigLIP from scratch on the shipped sample: 1000 steps of 256 pairs, 25 TFLOP, for two CPU cores.

    siglip train configs/quickstart.py

A ViT of three blocks and a text tower of two learn from drawings of many styles with names in twelve languages
(`data_pipelines/sample`, kept by `siglip data curate`) and are evaluated on what they have never seen: the same ideas in Noto's
style (chance of R@10 is .006), 312 ideas in any style (.03), and by class names: emoji by group and subgroup, flags by country,
and handwritten digits, which are like nothing in training. Both towers can be exported to Hugging Face.
"""

from pathlib import Path

import data_pipelines
from data_pipelines.augment import AugmentConfig
from data_pipelines.loader import DataConfig
from data_pipelines.order.mixture import SourceConfig
from siglip.evaluation.retrieval import Retrieval
from siglip.evaluation.zeroshot import ZeroShot
from siglip.models.text import TokenConfig
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.training.config import EvalConfig, TrainConfig
from siglip.training.optim import OptimConfig
from siglip.workdir.checkpoint import CheckpointConfig
from siglip.workdir.metrics import LogConfig

SAMPLE = Path(data_pipelines.__file__).parent / "sample"
CLASSES = Path(__file__).parent / "suites"
LANGUAGES = ("en", "ar", "de", "es", "fr", "hi", "ja", "ru", "sw", "te", "th", "zh")
LEARNING_RATE = 2e-3


def get_config() -> TrainConfig:
    emoji = (("captions.en", 0.3), ("captions.*", 0.4), ("keywords", 0.1), ("captions.en+keywords", 0.2))
    icons = (("txt", 0.5), ("keywords", 0.2), ("txt+keywords", 0.3))
    emoji_kept, icons_kept = (str(SAMPLE / f"curated-{kind}" / "manifest.parquet") for kind in ("emoji", "icons"))
    return TrainConfig(
        data=DataConfig(
            sources=(
                SourceConfig(str(SAMPLE / "emoji-*.parquet"), captions=emoji, manifest=emoji_kept),
                SourceConfig(str(SAMPLE / "icons-*.parquet"), weight=0.25, captions=icons, manifest=icons_kept),
            ),
            tokenizer=str(SAMPLE / "sample.model"),
            augment=AugmentConfig(scale=(0.82, 1.42), aspect=0.12, shift=0.1, flip=0.5),
            threads=1,
        ),
        model=ModelConfig(
            image=ImageConfig(width=128, depth=3, mlp_dim=512, num_heads=4, patch_size=(8, 8), image_size=(32, 32)),
            text=TextConfig(
                width=128,
                depth=2,
                mlp_dim=512,
                num_heads=4,
                vocab_size=8000,
                length=16,
                tokens=TokenConfig(canonical="texts"),
            ),
            out_dim=(None, 128),
        ),
        total_steps=1000,
        batch_size=256,
        workdir="runs/quickstart",
        optim=OptimConfig(lr=LEARNING_RATE, weight_decay=0.1 * LEARNING_RATE, warmup_steps=100),
        eval=EvalConfig(
            tasks=(
                Retrieval(
                    str(SAMPLE / "unseen-style.parquet"), captions=tuple(f"captions.{lang}" for lang in LANGUAGES)
                ),
                Retrieval(
                    str(SAMPLE / "unseen-ideas.parquet"), captions=tuple(f"captions.{lang}" for lang in LANGUAGES)
                ),
                ZeroShot(
                    str(SAMPLE / "unseen-style.parquet"),
                    classes=str(CLASSES / "emoji_groups.txt"),
                    label="group",
                    name="groups",
                ),
                ZeroShot(
                    str(SAMPLE / "unseen-style.parquet"),
                    classes=str(CLASSES / "emoji_subgroups.txt"),
                    label="subgroup",
                    name="subgroups",
                ),
                ZeroShot(
                    str(SAMPLE / "flags.parquet"), classes=str(CLASSES / "emoji_flags.txt"), label="txt", name="flags"
                ),
                ZeroShot(
                    str(SAMPLE / "digits.parquet"), classes=str(CLASSES / "digits.txt"), label="label", name="digits"
                ),
            ),
        ),
        checkpoint=CheckpointConfig(every_steps=500),
        log=LogConfig(every_steps=50),
    )
