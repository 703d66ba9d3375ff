"""A trained image tower trains on slowly beside a new text tower: a tenth of the learning rate and no weight decay on it.

    siglip train configs/finetune_both.py                              after configs/quickstart.py
    siglip train configs/finetune_both.py --init.src SRC --workdir DIR     from any other run, FILE.npz or Hugging Face folder

This is how the SigLIP paper fine-tunes public image towers (arXiv:2303.15343, section 4.5): with weight decay the tower forgets
what it knew and ends up hardly better than from scratch. To start from both towers, leave out `init.only` and `model.text`.

Expect R@10 in English on the held-out emoji of .33 and .32 after 800 steps (.31 for its starting point, the quick start cut to
1600 steps), and .27 / .28 after 200 steps, where a run from scratch has .20 / .22 (docs/log.md).
"""

from pathlib import Path

import data_pipelines
from data_pipelines.augment import AugmentConfig
from data_pipelines.loader import DataConfig
from data_pipelines.order.mixture import SourceConfig
from siglip.evaluation.retrieval import Retrieval
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
    captions = (("captions.en", 0.25), ("captions.*", 0.15), ("keywords", 0.3), ("captions.en+keywords", 0.3))
    return TrainConfig(
        init=InitConfig(src="runs/quickstart", only=("img/.*",)),
        data=DataConfig(
            sources=(SourceConfig(str(SAMPLE / "emoji-train-*.tar"), captions=captions),),
            tokenizer=str(SAMPLE / "spiece.model"),
            augment=AugmentConfig(scale=(0.82, 1.42), aspect=0.12, shift=0.1, flip=0.5),
            threads=1,
        ),
        model=SourceModel(
            text=TextConfig(
                width=192, depth=1, mlp_dim=192, num_heads=3, vocab_size=4000, length=12, pool="mean", embed_std=1.0
            ),
            temperature_init=10.0,
            bias_init=-4.0,
        ),
        total_steps=800,
        batch_size=64,
        workdir="runs/finetune_both",
        seed=1,  # the quick start's seed would draw the text tower that its image tower was trained with
        optim=OptimConfig(
            lr=LEARNING_RATE,
            weight_decay=1.0 * LEARNING_RATE,
            weight_decay_mults=(("img/.*", 0.0), ("txt/.*/kernel", 0.25)),
            lr_mults=(
                ("img/.*", 0.1),
                ("t|b", 10.0),
                ("txt/(Embed_0/embedding|pos_embedding)", 0.05),
                ("txt/.*", 0.25),
            ),
            warmup_steps=100,
        ),
        eval=EvalConfig(
            tasks=(
                Retrieval(
                    str(SAMPLE / "emoji-heldout-*.tar"),
                    captions=tuple(f"captions.{language}" for language in LANGUAGES),
                ),
            ),
        ),
        checkpoint=CheckpointConfig(every_steps=400),
        log=LogConfig(every_steps=50),
    )
