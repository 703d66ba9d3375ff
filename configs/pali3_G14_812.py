"""G/14 from 224 to 812 px, and to 1064: the resolutions of PaLI-3's last stage (arXiv:2310.09199).

    siglip train configs/pali3_G14_812.py --data.sources.0.shards 'webli/*.tar' --data.tokenizer c4_en_32k.model
    … --init.src runs/pali3_G14_812 --model.image.image-size 1064 1064 --workdir runs/pali3_G14_1064

PaLI-3 raised the resolution while training the whole model; this does it for the encoder alone, with SigLIP's recipe for higher
resolutions: a hundredth of the learning rate, no weight decay. No number is published for that.

Devices and time: v5p:8x8x4, 26.1 of 95.7 GiB, 27.6 h, 7,076 device hours (siglip plan, MFU 45%).
"""

from data_pipelines.loader import DataConfig
from data_pipelines.order.mixture import SourceConfig
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.parallel.sharding import MeshConfig
from siglip.training.config import TrainConfig
from siglip.training.optim import OptimConfig
from siglip.training.warm_start import InitConfig
from siglip.workdir.checkpoint import CheckpointConfig


def get_config() -> TrainConfig:
    towers = {"scan": True, "remat": "full", "dtype": "bfloat16"}
    return TrainConfig(
        init=InitConfig(src="runs/pali3_G14"),
        data=DataConfig(
            sources=(SourceConfig("data/pairs/*.tar"),),
            tokenizer="data/c4_en_32k.model",
            workers=16,
            threads=1,
            cache_bytes=0,
        ),
        model=ModelConfig(
            image=ImageConfig("G/14", image_size=(812, 812), **towers),
            text=TextConfig("So400m", **towers),
            out_dim=(None, 1664),
        ),
        total_steps=20_000,
        batch_size=4_096,
        workdir="runs/pali3_G14_812",
        optim=OptimConfig(name="adafactor", lr=1e-5, weight_decay=0.0, warmup_steps=1_000),
        mesh=MeshConfig(fsdp=32),
        checkpoint=CheckpointConfig(every_steps=1000),
    )
