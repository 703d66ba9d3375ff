"""So400m/14 from 224 to 384 px: 5 10^9 more pairs at a hundredth of the learning rate without weight decay.

    siglip train configs/paligemma_so400m14_384.py --data.sources.0.shards 'webli/*.tar' --data.tokenizer c4_en_32k.model
    … --init.src runs/paligemma_so400m14_384 --init.skip --model.image.image-size 448 448 --batch-size 16384
      --total-steps 3052 --workdir runs/paligemma_so400m14_448                  50 10^6 pairs at 448 px, text positions kept
    … --init.src runs/paligemma_so400m14_448 --init.skip --model.image.image-size 896 896 --batch-size 16384
      --loss.micro-batch-size 4096 --total-steps 611 --optim.warmup-steps 60 --workdir runs/paligemma_so400m14_896

Expect 83.2 % on ImageNet zero-shot, 70.2 / 52.0 % R@1 on COCO (arXiv:2303.15343, Table 3; that model has 64 tokens, so the
text's positions start fresh). Image positions are resampled to 27 x 27 patches. PaliGemma (arXiv:2407.07726) went to 448 and
896 px together with its language model, 50 and 10 10^6 examples.

Devices and time: v5e:16x16, 11.1 of 15.8 GiB, 220.2 h, 56,378 device hours (siglip plan, MFU 45%).
"""

from data_pipelines.loader import DataConfig
from data_pipelines.order.mixture import SourceConfig
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.parallel.sharding import MeshConfig
from siglip.training.config import TrainConfig
from siglip.training.objective import LossConfig
from siglip.training.optim import OptimConfig
from siglip.training.warm_start import InitConfig
from siglip.workdir.checkpoint import CheckpointConfig


def get_config() -> TrainConfig:
    towers = {"scan": True, "remat": "full", "dtype": "bfloat16"}
    return TrainConfig(
        init=InitConfig(src="runs/paligemma_so400m14", skip=("txt/pos_embedding",)),
        data=DataConfig(
            sources=(SourceConfig("data/pairs/*.tar"),),
            tokenizer="data/c4_en_32k.model",
            workers=16,
            threads=1,
            cache_bytes=0,
        ),
        model=ModelConfig(
            image=ImageConfig("So400m/14", image_size=(384, 384), **towers),
            text=TextConfig("So400m", length=64, **towers),
            out_dim=(None, 1152),
        ),
        total_steps=152_588,
        batch_size=32_768,
        workdir="runs/paligemma_so400m14_384",
        optim=OptimConfig(name="adafactor", lr=1e-5, weight_decay=0.0, warmup_steps=2_000),
        mesh=MeshConfig(fsdp=16),
        loss=LossConfig(micro_batch_size=16_384),
        checkpoint=CheckpointConfig(every_steps=5000),
    )
