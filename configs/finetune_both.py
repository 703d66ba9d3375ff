"""A trained image tower trains on slowly beside a new text tower: a tenth of the learning rate and no weight decay on it.

    siglip train configs/finetune_both.py                              after configs/quickstart.py
    siglip train configs/finetune_both.py --init.src SRC --workdir DIR     from any other run, FILE.npz or Hugging Face folder

This is how the SigLIP paper fine-tunes public image towers (arXiv:2303.15343, section 4.5): with weight decay the tower forgets
what it knew and ends up hardly better than from scratch. To start from both towers, leave out `init.only` and `model.text`.
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
        model=SourceModel(text=quickstart.model.text, temperature_init=10.0, bias_init=quickstart.model.bias_init),
        total_steps=300,
        workdir="runs/finetune_both",
        seed=1,  # the quick start's seed would draw the text tower that its image tower was trained with
        optim=replace(
            quickstart.optim,
            weight_decay_mults=(("img/.*", 0.0), (".*/kernel", 1.0)),
            lr_mults=(("img/.*", 0.1), ("t|b", 10.0)),
            warmup_steps=30,
        ),
        eval=EvalConfig(tasks=quickstart.eval.tasks[:1]),
        checkpoint=CheckpointConfig(every_steps=150),
    )
