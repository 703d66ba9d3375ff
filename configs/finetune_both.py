"""A trained image tower trains on slowly beside a new text tower: a tenth of the learning rate and no weight decay on it.

    siglip train configs/finetune_both.py                              after configs/quickstart.py
    siglip train configs/finetune_both.py --init.src SRC --workdir DIR     from any other run, FILE.npz or Hugging Face folder

This is how the SigLIP paper fine-tunes public image towers (arXiv:2303.15343, section 4.5): with weight decay the tower forgets
what it knew and ends up hardly better than from scratch. To start from both towers, leave out `init.only` and `model.text`.
"""

from pathlib import Path

import data_pipelines
from data_pipelines.augment import AugmentConfig
from data_pipelines.loader import DataConfig
from data_pipelines.order.mixture import SourceConfig
from siglip.evaluation.retrieval import Retrieval
from siglip.models.text import TokenConfig
from siglip.models.two_tower import TextConfig
from siglip.training.config import EvalConfig, TrainConfig
from siglip.training.optim import OptimConfig
from siglip.training.warm_start import InitConfig, SourceModel
from siglip.workdir.checkpoint import CheckpointConfig
from siglip.workdir.metrics import LogConfig

SAMPLE = Path(data_pipelines.__file__).parent / "sample"
LANGUAGES = ("en", "ar", "de", "es", "fr", "hi", "ja", "ru", "sw", "te", "th", "zh")
LEARNING_RATE = 2e-3


def get_config() -> TrainConfig:
    emoji = (("captions.en", 0.3), ("captions.*", 0.4), ("keywords", 0.1), ("captions.en+keywords", 0.2))
    icons = (("txt", 0.5), ("keywords", 0.2), ("txt+keywords", 0.3))
    emoji_kept, icons_kept = (str(SAMPLE / f"curated-{kind}" / "manifest.parquet") for kind in ("emoji", "icons"))
    return TrainConfig(
        init=InitConfig(src="runs/quickstart", only=("img/.*",)),
        data=DataConfig(
            sources=(
                SourceConfig(str(SAMPLE / "emoji-*.parquet"), captions=emoji, manifest=emoji_kept),
                SourceConfig(str(SAMPLE / "icons-*.parquet"), weight=0.25, captions=icons, manifest=icons_kept),
            ),
            tokenizer=str(SAMPLE / "sample.model"),
            augment=AugmentConfig(scale=(0.82, 1.42), aspect=0.12, shift=0.1, flip=0.5),
            threads=1,
        ),
        model=SourceModel(
            text=TextConfig(
                width=128,
                depth=2,
                mlp_dim=512,
                num_heads=4,
                vocab_size=8000,
                length=16,
                tokens=TokenConfig(canonical="texts"),
            ),
            temperature_init=10.0,
            bias_init=-10.0,
        ),
        total_steps=500,
        batch_size=256,
        workdir="runs/finetune_both",
        seed=1,  # the quick start's seed would draw the text tower that its image tower was trained with
        optim=OptimConfig(
            lr=LEARNING_RATE,
            weight_decay=0.1 * LEARNING_RATE,
            weight_decay_mults=(("img/.*", 0.0), (".*/kernel", 1.0)),
            lr_mults=(("img/.*", 0.1),),
            warmup_steps=50,
        ),
        eval=EvalConfig(
            tasks=(
                Retrieval(
                    str(SAMPLE / "unseen-style.parquet"),
                    captions=tuple(f"captions.{language}" for language in LANGUAGES),
                ),
            ),
        ),
        checkpoint=CheckpointConfig(every_steps=250),
        log=LogConfig(every_steps=50),
    )
