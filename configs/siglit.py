"""SigLIT: a trained image tower stays frozen, and a new text tower learns to match it; each image is embedded only once.

    siglip train configs/siglit.py                              after configs/quickstart.py
    siglip train configs/siglit.py --init.src SRC --workdir DIR     from any other run, FILE.npz or Hugging Face folder

The paper's cheapest recipe (arXiv:2303.15343, section 4.1; locked-image tuning, arXiv:2111.07991). A frozen tower always gives an
image the same embedding, so the embeddings of all images are computed before the first step and stored in
runs/image_embeddings, where any run with the same tower and shards finds them. Training then decodes no image and runs no image
forward. This rules out augmentation.

On pairs of your own: `--data.sources.0.shards 'pairs/*.tar' --data.sources.0.manifest None --data.sources.0.captions txt 1`.
"""

from data_pipelines import sample
from data_pipelines.loader import DataConfig
from siglip.evaluation.retrieval import Retrieval
from siglip.models.text import TokenConfig
from siglip.models.two_tower import TextConfig
from siglip.training.config import EvalConfig, TrainConfig
from siglip.training.optim import OptimConfig
from siglip.training.warm_start import InitConfig, SourceImage, SourceModel
from siglip.workdir.checkpoint import CheckpointConfig
from siglip.workdir.metrics import LogConfig

LEARNING_RATE = 6e-3


def get_config() -> TrainConfig:
    return TrainConfig(
        init=InitConfig(src="runs/quickstart", only=("img/.*",)),
        data=DataConfig(
            sources=sample.sources(icons=0),
            tokenizer=sample.TOKENIZER,
            image_embeddings="runs/image_embeddings",
            threads=1,
        ),
        model=SourceModel(
            image=SourceImage(dropout=0.0, patch_dropout=0.0),
            text=TextConfig(
                width=128,
                depth=1,
                mlp_dim=512,
                num_heads=4,
                vocab_size=8000,
                length=16,
                tokens=TokenConfig(canonical="texts"),
            ),
            temperature_init=10.0,
            bias_init=-5.5,
        ),
        total_steps=300,
        batch_size=256,
        workdir="runs/siglit",
        seed=1,  # the quick start's seed would draw the text tower that its image tower was trained with
        optim=OptimConfig(
            "muon",
            lr=LEARNING_RATE,
            weight_decay=0.1 * LEARNING_RATE,
            lr_mults=(("img/.*", 0.0), ("t|b", 10.0)),
            warmup_steps=30,
        ),
        eval=EvalConfig(tasks=(Retrieval(sample.path("unseen-style.parquet"), captions=sample.CAPTIONS),)),
        checkpoint=CheckpointConfig(every_steps=150),
        log=LogConfig(every_steps=25),
    )
