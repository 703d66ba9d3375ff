"""A model that scores web pairs for `siglip data curate`: the quick start's, on the shipped sample and your own clean pairs.

    siglip train configs/alignment.py --data.sources.1.shards 'clean/*.tar'
    siglip data curate 'web/*.tar' --out curated --model runs/alignment --min-score 0.1

`--data.sources.1.weight` is the share of your pairs against 1 for the sample's emoji; 0.5 fits some 2500 pairs.

The model is the quick start's; only the data differ. Captions have up to 32 pieces instead of 16, since web captions are lists of
words. Your pairs need a caption (`txt`); captions in other languages, keywords and a descriptive file name (`captions`,
`keywords`, `name` in the json) are used where a pair has them.
"""

from dataclasses import replace
from pathlib import Path

from data_pipelines import sample
from data_pipelines.order.mixture import SourceConfig
from siglip.training.config import EvalConfig, TrainConfig, load_config_file

QUICKSTART = Path(__file__).with_name("quickstart.py")


def get_config() -> TrainConfig:
    quickstart = load_config_file(str(QUICKSTART))
    clean = (("txt", 0.6), ("captions.*", 0.2), ("keywords", 0.1), ("name", 0.1))
    return replace(
        quickstart,
        data=replace(
            quickstart.data,
            sources=(*sample.sources(icons=0), SourceConfig("clean/*.tar", weight=0.5, captions=clean)),
        ),
        model=replace(quickstart.model, text=replace(quickstart.model.text, length=32)),
        eval=EvalConfig(),
        workdir="runs/alignment",
    )
