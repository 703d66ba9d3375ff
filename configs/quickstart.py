"""A small SigLIP from scratch on the shipped emoji sample: about four minutes of training on two CPU cores.

    siglip train configs/quickstart.py

1850 training images with names in twelve languages, evaluated on 312 images of concepts absent from training. Expect R@10 of
.34 both ways in English (mean of three seeds; chance is .03, ridge regression on hand-made features reaches .48). The same images
are classified too, each as one of their 312 names (chance of acc1 is .003). These choices
overfit least on so few pairs, by cross-validation inside the training shards (docs/log.md):

- small patches of a small image, most of them dropped in training; colours are not jittered, since colour is the best cue here;
- a text tower that starts as a bag of pieces (large token embeddings that hardly move) and learns slowly;
- keywords as further captions.
"""

from pathlib import Path

import data_pipelines
from data_pipelines.augment import AugmentConfig
from data_pipelines.loader import DataConfig
from data_pipelines.order.mixture import SourceConfig
from siglip.evaluation.retrieval import Retrieval
from siglip.evaluation.zeroshot import ZeroShot
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.training.config import EvalConfig, TrainConfig
from siglip.training.optim import OptimConfig
from siglip.workdir.checkpoint import CheckpointConfig
from siglip.workdir.metrics import LogConfig

SAMPLE = Path(data_pipelines.__file__).parent / "sample"
CLASSES = Path(__file__).parent / "suites" / "emoji_heldout_classes.txt"
LANGUAGES = ("en", "ar", "de", "es", "fr", "hi", "ja", "ru", "sw", "te", "th", "zh")
LEARNING_RATE = 2e-3


def get_config() -> TrainConfig:
    captions = (("captions.en", 0.25), ("captions.*", 0.15), ("keywords", 0.3), ("captions.en+keywords", 0.3))
    return TrainConfig(
        data=DataConfig(
            sources=(SourceConfig(str(SAMPLE / "emoji-train-*.tar"), captions=captions),),
            tokenizer=str(SAMPLE / "spiece.model"),
            augment=AugmentConfig(scale=(0.82, 1.42), aspect=0.12, shift=0.1, flip=0.5),
            threads=1,
        ),
        model=ModelConfig(
            image=ImageConfig(
                width=96, depth=1, mlp_dim=384, num_heads=3, patch_size=(2, 2), image_size=(24, 24), patch_dropout=0.87
            ),
            text=TextConfig(
                width=192, depth=1, mlp_dim=192, num_heads=3, vocab_size=4000, length=12, pool="mean", embed_std=1.0
            ),
            out_dim=(None, 96),
            bias_init=-4.0,
        ),
        total_steps=6400,
        batch_size=64,
        workdir="runs/quickstart",
        optim=OptimConfig(
            lr=LEARNING_RATE,
            weight_decay=1.0 * LEARNING_RATE,
            weight_decay_mults=(("txt/.*/kernel", 0.25), (".*/kernel", 1.0)),
            lr_mults=(("t|b", 10.0), ("txt/(Embed_0/embedding|pos_embedding)", 0.05), ("txt/.*", 0.25)),
            warmup_steps=300,
        ),
        eval=EvalConfig(
            tasks=(
                Retrieval(
                    str(SAMPLE / "emoji-heldout-*.tar"),
                    captions=tuple(f"captions.{language}" for language in LANGUAGES),
                ),
                ZeroShot(
                    str(SAMPLE / "emoji-heldout-*.tar"), classes=str(CLASSES), label="caption", name="emoji-names"
                ),
            ),
        ),
        checkpoint=CheckpointConfig(every_steps=1000),
        log=LogConfig(every_steps=50),
    )
