"""SigLIT: a trained image tower stays frozen, and a new text tower learns to match it; each image is embedded only once.

    siglip train configs/siglit.py                              after configs/quickstart.py
    siglip train configs/siglit.py --init.src SRC --workdir DIR     from any other run, FILE.npz or Hugging Face folder

The paper's cheapest recipe (arXiv:2303.15343, section 4.1; locked-image tuning, arXiv:2111.07991). A frozen tower always gives an
image the same embedding, so the embeddings of all images are computed before the first step and stored in
runs/image_embeddings, where any run with the same tower and shards finds them. Training then decodes no image and runs no image
forward. This rules out augmentation.
"""

from dataclasses import replace
from pathlib import Path

from siglip.training.config import EvalConfig, TrainConfig, load_config_file
from siglip.training.warm_start import InitConfig, SourceModel
from siglip.workdir.checkpoint import CheckpointConfig

QUICKSTART = Path(__file__).with_name("quickstart.py")


def get_config() -> TrainConfig:
    quickstart = load_config_file(str(QUICKSTART))
    return replace(
        quickstart,
        init=InitConfig(src="runs/quickstart", only=("img/.*",)),
        data=replace(quickstart.data, augment=None, image_embeddings="runs/image_embeddings"),
        model=SourceModel(text=quickstart.model.text, temperature_init=10.0, bias_init=quickstart.model.bias_init),
        total_steps=300,
        workdir="runs/siglit",
        seed=1,  # the quick start's seed would draw the text tower that its image tower was trained with
        optim=replace(quickstart.optim, lr_mults=(("img/.*", 0.0), ("t|b", 10.0)), warmup_steps=30),
        eval=EvalConfig(tasks=quickstart.eval.tasks[:1]),
        checkpoint=CheckpointConfig(every_steps=150),
    )
