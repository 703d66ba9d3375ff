"""A small SigLIP from scratch on the shipped sample: 1300 steps of 256 pairs, 12 TFLOP, six minutes of two CPU cores.

    siglip train configs/quickstart.py

A ViT of three blocks and a text tower of one learn from drawings in many styles with names in twelve languages (24 000 in
`data_pipelines/sample`, kept by `siglip data curate`) and are evaluated on what they have never seen: the same ideas in Noto's
style, 312 ideas that training has in no style, and by class names: emoji by group and subgroup, another set's flags by country,
and handwritten digits, which are like nothing in training. Both towers can be exported to Hugging Face.

Expect R@10 of .64 in English and .38 in the other languages on the unseen style (three seeds; chance is .006), .28 and .25 on
unseen ideas (chance .03). How the settings were chosen is in docs/log.md. Four patches an image see no detail, but a step with
sixteen takes twice as long, and learns less in six minutes. `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`, which `make quickstart`
sets, saves a quarter of the time.
"""

from pathlib import Path

from data_pipelines import sample
from data_pipelines.augment import AugmentConfig
from data_pipelines.loader import DataConfig
from siglip.evaluation.retrieval import Retrieval
from siglip.evaluation.zeroshot import ZeroShot
from siglip.models.text import TokenConfig
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.training.config import EvalConfig, TrainConfig
from siglip.training.optim import OptimConfig
from siglip.workdir.checkpoint import CheckpointConfig
from siglip.workdir.metrics import LogConfig

CLASSES = Path(__file__).parent / "suites"
LEARNING_RATE = 6e-3


def get_config() -> TrainConfig:
    style, flags, digits = (sample.path(f"{name}.parquet") for name in ("unseen-style", "flags", "digits"))
    classes = {
        name: str(CLASSES / f"{name}.txt") for name in ("emoji_groups", "emoji_subgroups", "emoji_flags", "digits")
    }
    return TrainConfig(
        data=DataConfig(
            sources=sample.sources(),
            tokenizer=sample.TOKENIZER,
            augment=AugmentConfig((0.82, 1.42), aspect=0.12, shift=0.1, brightness=0.15, color=0.15, flip=0.5),
            threads=1,
        ),
        model=ModelConfig(
            image=ImageConfig(width=128, depth=3, mlp_dim=512, num_heads=4, patch_size=(16, 16), image_size=(32, 32)),
            text=TextConfig(
                width=128,
                depth=1,
                mlp_dim=512,
                num_heads=4,
                vocab_size=8000,
                length=16,
                tokens=TokenConfig(canonical="texts"),
            ),
            out_dim=(None, 128),
            bias_init=-5.5,  # about -log(batch size): the loss of a constant score is least there
        ),
        total_steps=1300,
        batch_size=256,
        workdir="runs/quickstart",
        optim=OptimConfig(
            "muon",
            lr=LEARNING_RATE,
            weight_decay=0.1 * LEARNING_RATE,
            lr_mults=(("t|b", 10.0),),
            warmup_steps=60,
        ),
        eval=EvalConfig(
            tasks=(
                Retrieval(style, captions=sample.CAPTIONS),
                Retrieval(sample.path("unseen-ideas.parquet"), captions=sample.CAPTIONS),
                ZeroShot(style, classes=classes["emoji_groups"], label="group", name="groups"),
                ZeroShot(style, classes=classes["emoji_subgroups"], label="subgroup", name="subgroups"),
                ZeroShot(flags, classes=classes["emoji_flags"], label="txt", name="flags"),
                ZeroShot(digits, classes=classes["digits"], label="label", name="digits"),
            ),
        ),
        checkpoint=CheckpointConfig(every_steps=650),
        log=LogConfig(every_steps=50),
    )
