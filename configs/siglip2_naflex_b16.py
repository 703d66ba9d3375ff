"""B/16 NaFlex, the smallest of SigLIP 2 (arXiv:2502.14786, section 2.4.2): the last tenth of a run, with images of any shape.

    siglip train configs/siglip2_naflex_b16.py --init.src RUN --data.sources.0.shards 'webli/*.tar'

RUN is one at 256 px, stopped at 90 % of its steps. The last 4 of 40 billion examples become 15 billion (3.75 x), at lengths of
128, 256, 576, 784 and 1024 patches, each in a fifth of the steps. Learning rate and weight decay go on where a cosine to zero is
at 90 %, .024 of its peak; the moments start afresh, hence some steps of warm-up. The paper halves the batch at 1024 patches; here
it stays, in micro-batches, so that negatives and the loss's scale are those of every other step.

The published 78.5 % on ImageNet at 256 patches come after a first stage with captioning, which is not in this recipe.

Devices and time: v5e:16x16, 6.2 of 15.8 GiB, 138.6 h, 35,491 device hours (siglip plan, MFU 35%).
"""

from data_pipelines.loader import DataConfig
from data_pipelines.order.lengths import LengthConfig
from data_pipelines.order.mixture import SourceConfig
from siglip.models.naflex import NaflexConfig
from siglip.models.text import TokenConfig
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.parallel.sharding import MeshConfig
from siglip.training.config import TrainConfig
from siglip.training.objective import LossConfig
from siglip.training.optim import OptimConfig
from siglip.training.warm_start import InitConfig
from siglip.workdir.checkpoint import CheckpointConfig

LEFT = 0.024  # of the peaks of learning rate and weight decay, at 90 % of a cosine


def get_config() -> TrainConfig:
    towers = {"scan": True, "remat": "full", "dtype": "bfloat16"}
    return TrainConfig(
        init=InitConfig(src="runs/siglip2_b16"),
        data=DataConfig(
            sources=(SourceConfig("data/webli_multi/*.tar"),),
            tokenizer="data/gemma.model",
            workers=16,
            threads=1,
            cache_bytes=0,
            lengths=LengthConfig(),
        ),
        model=ModelConfig(
            image=ImageConfig("B/16", image_size=(256, 256), naflex=NaflexConfig(), **towers),
            text=TextConfig("B", vocab_size=256_000, tokens=TokenConfig(pad_id=0, canonical="none"), **towers),
            out_dim=(None, 768),
        ),
        total_steps=457_764,
        batch_size=32_768,
        workdir="runs/siglip2_naflex_b16",
        optim=OptimConfig(lr=1e-3 * LEFT, weight_decay=1e-4 * LEFT, warmup_steps=1_000),
        mesh=MeshConfig(fsdp=4),
        loss=LossConfig(micro_batch_size=32_768),
        checkpoint=CheckpointConfig(every_steps=5000),
    )
