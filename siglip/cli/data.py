"""`siglip data index|pack|tokenizer|curate|stats`: preparing data without training."""

import collections
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import tyro

from data_pipelines.records import Pair, Source
from data_pipelines.sources.blocks import InOrder
from data_pipelines.sources.opening import check_columns, open_source
from data_pipelines.text_ops import ALL_FIELDS, iter_captions
from data_pipelines.tokenizers import SentencePieceTokenizer, train_tokenizer
from siglip.cli.arguments import parse
from siglip.errors import UserError
from siglip.trees import did_you_mean

logger = logging.getLogger(__name__)

USAGE = """usage: siglip data index SHARDS…
       siglip data pack FOLDER|FILE.json|FILE.csv|SHARDS… --out DIR [--captions FIELD] [--label FIELD] [--image-column NAME]
       siglip data tokenizer SHARDS… --out FILE [--vocab-size N] [--captions FIELD …] [--repeat FIELD N …]
       siglip data curate SHARDS… --out DIR [--against SHARDS…] [--preset NAME] [--model SRC] [--materialize tar|arrayrecord] …
       siglip data stats DIR|SHARDS… [--captions FIELD …]
"""


@dataclasses.dataclass(frozen=True)
class IndexArgs:
    """Build the offset index of shards now instead of at first use.

    Attributes:
        shards: paths or URLs of tar, Parquet, ArrayRecord, TFRecord, CSV or JSONL files; *, {00000..00009} and {a,b} expand.
    """

    shards: tyro.conf.Positional[tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class TokenizerArgs:
    """Train a SentencePiece tokenizer on the captions of some shards: lower case, byte fallback, </s> at id 1.

    Attributes:
        shards: paths or URLs of tar, Parquet, ArrayRecord, TFRecord, CSV or JSONL files; *, {00000..00009} and {a,b} expand.
        out: the model file to write, for instance spiece.model.
        vocab_size: pieces in all.
        captions: fields to take the texts from.
        image_column: the column that holds the image, or its path; without it the usual names are looked for.
        repeat: FIELD N pairs: texts of that field count N times, so that a language among many gets pieces of its own.
        max_texts: of more texts than this, so many are drawn.
        threads: more are faster; the same number gives the same file.
    """

    shards: tyro.conf.Positional[tuple[str, ...]]
    out: str
    vocab_size: int = 4000
    captions: tuple[str, ...] = ALL_FIELDS
    image_column: str | None = None
    repeat: tuple[tuple[str, int], ...] = ()
    max_texts: int = 2_000_000
    threads: int = 1


def data_command(args: list[str]) -> None:
    """Dispatches to the subcommand."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    if args[0] == "index":
        call = index_command
    elif args[0] == "tokenizer":
        call = tokenizer_command
    elif args[0] == "pack":
        from siglip.cli.packing import pack_command as call
    elif args[0] == "curate":
        from siglip.cli.curating import curate_command as call
    elif args[0] == "stats":
        from siglip.cli.curating import stats_command as call
    else:
        commands = ["index", "pack", "tokenizer", "curate", "stats"]
        hint = did_you_mean(args[0], commands) or f"; there are {', '.join(commands)}"
        raise UserError(f"unknown command 'data {args[0]}'{hint}")
    call(args[1:])


def index_command(args: list[str]) -> None:
    """Prints how many pairs the shards hold."""
    options = parse(IndexArgs, args, prog="siglip data index")
    print(f"{len(_open(options.shards))} pairs")


def tokenizer_command(args: list[str]) -> None:
    """Writes the model and prints how many pieces it has."""
    options = parse(TokenizerArgs, args, prog="siglip data tokenizer")
    if any(times < 1 for _, times in options.repeat):
        raise UserError(f"--repeat {options.repeat}: a field counts at least once; leave it out instead")
    if min(options.max_texts, options.threads, options.vocab_size) < 1 or not options.captions:
        raise UserError("--max-texts, --threads and --vocab-size must be at least 1, and --captions must name a field")
    names = (*options.captions, *(name for name, _ in options.repeat))
    check_columns(options.shards, image=options.image_column, fields=() if options.captions == ALL_FIELDS else names)
    source = _open(
        options.shards, image=options.image_column, fields={name.partition(".")[0] for name in names}, required=False
    )
    counts: collections.Counter[str] = collections.Counter()
    texts = iter_captions(_readable(source, counts), fields=options.captions, repeat=dict(options.repeat))
    sizes = {"vocab_size": options.vocab_size, "max_texts": options.max_texts, "threads": options.threads}
    train_tokenizer(texts, options.out, **sizes)
    print(f"{SentencePieceTokenizer(options.out).vocab_size} pieces -> {options.out}")
    if counts:
        logger.warning("pairs that could not be read in full, or were repaired: %s", dict(counts))


def _readable(source: Source, counts: collections.Counter[str]) -> Iterator[Pair]:
    """The pairs of a source but for those that storage does not deliver; what is wrong with pairs is counted."""
    pairs = InOrder(source)
    for index in range(len(source)):
        try:
            pair = pairs[index]
        except OSError:
            counts["unreadable"] += 1
            continue
        counts.update(pair.problems)
        yield pair


def _open(shards: tuple[str, ...], **settings: Any) -> Source:
    if not shards:
        raise UserError("no shards given; name some, for instance 'data/train-*.tar'")
    return open_source(shards, **settings)
