"""B/16 at 224 px on your own 10 10^6 pairs, on one to eight GPUs.

    siglip train configs/b16_own_data.py --data.sources.0.shards 'mine/*.tar' --data.tokenizer mine.model
    … --init.src siglip_b16_224.npz --optim.lr 1e-4 --data.tokenizer c4_en_32k.model
                                                            from a published model, with its own tokenizer: the better start
                                                            if its language is yours
    … --init.src siglip_b16_224.npz --init.only 'img/.*' t b
                                                            its image tower, and a new text tower for a tokenizer of yours
    … --loss.micro-batch-size 512                           on one GPU: the same loss and gradients, 512 images at a time

30 epochs at a batch of 4096, where the paper found the sigmoid loss ahead of the softmax (arXiv:2303.15343, Table 5). From
scratch expect on ImageNet zero-shot between DataComp medium's 29.7 % (128 10^6 pairs seen, filtered) and large's 63.1 %
(1.28 10^9); your own retrieval set tells more. `siglip data tokenizer` makes a tokenizer of your captions, `siglip data curate`
cleans them.

Devices and time: h100:8, 30.1 of 72.8 GiB, 4.2 h, 33 device hours (siglip plan, MFU 35%).
"""

from data_pipelines.loader import DataConfig
from data_pipelines.order.mixture import SourceConfig
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.training.config import TrainConfig
from siglip.training.optim import OptimConfig
from siglip.workdir.checkpoint import CheckpointConfig


def get_config() -> TrainConfig:
    towers = {"scan": True, "remat": "dots", "dtype": "bfloat16"}
    return TrainConfig(
        data=DataConfig(
            sources=(SourceConfig("data/mine/*.tar"),),
            tokenizer="data/mine.model",
            workers=32,
            threads=1,
            cache_bytes=0,
        ),
        model=ModelConfig(
            image=ImageConfig("B/16", **towers),
            text=TextConfig("B", **towers),
            out_dim=(None, 768),
        ),
        total_steps=73_242,
        batch_size=4_096,
        workdir="runs/b16_own_data",
        optim=OptimConfig(lr=1e-3, weight_decay=1e-4, warmup_steps=4_000),
        checkpoint=CheckpointConfig(every_steps=2000),
    )
