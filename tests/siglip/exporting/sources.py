"""What the tests of exports export."""

import importlib.util

from data_pipelines.sources.webdataset import TarSource
from siglip.cli.exporting import sample_inputs
from siglip.formats import big_vision
from siglip.models.two_tower import ModelConfig
from tests.siglip.texts import SAMPLE
from tests.siglip.tiny import random_params

HAS_TRANSFORMERS = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def written(path, config: ModelConfig):
    big_vision.write(path, random_params(config), config)
    return path


def samples(config, tokenizer):
    return sample_inputs(TarSource(f"{SAMPLE}/emoji-heldout-*.tar"), config, tokenizer)
