"""What the tests of the stream share: a small config, and the first batches of a loader."""

import itertools
from dataclasses import replace

from data_pipelines.augment import AugmentConfig
from data_pipelines.loader import DataConfig, make_loader
from data_pipelines.order.mixture import SourceConfig
from tests.data_pipelines.shards import SAMPLE_TRAIN, SPIECE

AUGMENT = AugmentConfig(scale=(0.7, 1.3), aspect=0.1, shift=0.1, brightness=0.1, color=0.1)
CAPTIONS = (("captions.en", 0.4), ("captions.en+keywords", 0.4), ("captions.*", 0.2))
SAMPLE_CONFIG = DataConfig((SourceConfig(SAMPLE_TRAIN, captions=CAPTIONS),), SPIECE, augment=AUGMENT)
SHAPES = {"batch_size": 8, "image_size": (8, 8), "text_length": 8, "seed": 0}


def take(config, count, **changes):
    """The first batches of a loader, and the loader, closed."""
    loader = make_loader(config, **(SHAPES | changes))
    batches = list(itertools.islice(loader, count))
    loader.close()
    return batches, loader


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one["key"] == other["key"]
        assert (one["image"] == other["image"]).all() and (one["text"] == other["text"]).all()


def config_of(*patterns, **changes):
    sources = tuple(SourceConfig(str(pattern)) for pattern in patterns)
    return replace(DataConfig(sources, SPIECE), **changes)
