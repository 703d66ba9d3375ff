"""The small real corpus of the quick start: drawings in many styles, with names in twelve languages; LICENSE says whose they are.

    DataConfig(sources=sample.sources(), tokenizer=sample.TOKENIZER)
    Retrieval(sample.path("unseen-style.parquet"), captions=sample.CAPTIONS)

docs/data.md says what is in it; build.py makes it anew.
"""

from pathlib import Path

from data_pipelines.order.mixture import SourceConfig

LANGUAGES = ("en", "ar", "de", "es", "fr", "hi", "ja", "ru", "sw", "te", "th", "zh")
CAPTIONS = tuple(f"captions.{language}" for language in LANGUAGES)
_EMOJI = (("captions.en", 0.2), ("captions.*", 0.55), ("keywords", 0.1), ("captions.en+keywords", 0.15))
_ICONS = (("txt", 0.5), ("keywords", 0.2), ("txt+keywords", 0.3))


def path(name: str) -> str:
    """The path of a file of the sample."""
    return str(Path(__file__).parent / name)


TOKENIZER = path("sample.model")


def sources(*, emoji: str = "*", icons: float = 0.1) -> tuple[SourceConfig, ...]:
    """What training streams: the pairs that `siglip data curate` kept.

    emoji: the styles of emoji, as a pattern of file names.
    icons: the weight of icons and clip art, against 1 of emoji; 0 leaves them out.
    """
    kept = {kind: path(f"curated-{kind}/manifest.parquet") for kind in ("emoji", "icons")}
    drawn = SourceConfig(path(f"emoji-{emoji}.parquet"), captions=_EMOJI, manifest=kept["emoji"])
    if not icons:
        return (drawn,)
    return (drawn, SourceConfig(path("icons-*.parquet"), weight=icons, captions=_ICONS, manifest=kept["icons"]))
