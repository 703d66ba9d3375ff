"""Captions that stand under many different pictures and so say nothing about any.

ALIGN (Jia et al., arXiv 2102.05918) drops alt-texts of more than 10 pictures, of 1.8 billion; "untitled" and a theme's
name repeat in small corpora too, but so does "dog".

The trap: copies of one picture are one picture. Different pixels are counted, not pairs.
"""

import numpy as np
import pyarrow as pa
import xxhash

from data_pipelines.curate.layout import Work, read_pictures, starts_of_runs, verdicts
from data_pipelines.curate.shuffle import Exchange


def captions_exchange(work: Work) -> Exchange:
    """Rows by caption, one a pair."""
    return work.by_key("captions", rows=work.pairs)


def repeat_verdicts(work: Work) -> Exchange:
    """Pairs whose caption repeats too often, by group."""
    return work.to_groups("repeats", sources=captions_exchange(work).buckets)


def scatter_captions(task: tuple[Work, int]) -> None:
    """Map: the pictures of one group by caption."""
    work, group = task
    tables = []
    for shard in work.layout.members(group):
        table = read_pictures(work.layout.tables[shard], ["caption"])
        keys = [xxhash.xxh3_64_intdigest(text.lower().encode()) if text else 0 for text in table["caption"].to_pylist()]
        pixels = np.frombuffer(b"".join(table["pixel_hash"].to_pylist()), np.uint64)[::2]
        columns = {"caption": np.array(keys, np.uint64), "pixels": pixels, "index": table["index"].to_numpy()}
        table = pa.table(columns | {"shard": np.full(len(table), shard, np.int32)})
        tables.append(table.filter(pa.array(columns["caption"] != 0)))
    table = pa.concat_tables(tables)
    exchange = captions_exchange(work)
    exchange.scatter(group, table, (table["caption"].to_numpy() % np.uint64(exchange.buckets)).astype(np.int64))


def judge_captions(task: tuple[Work, int]) -> None:
    """Reduce: captions with too many different pictures."""
    work, bucket = task
    table = captions_exchange(work).gather(bucket)
    caption, pixels = table["caption"].to_numpy(), table["pixels"].to_numpy()
    order = np.lexsort((pixels, caption))
    first = starts_of_runs(caption[order])
    run = np.cumsum(first) - 1
    different = np.bincount(run, weights=starts_of_runs(caption[order], pixels[order])) if len(order) else np.zeros(0)
    crowded = np.sort(order[different[run] > work.config.max_caption_pictures])
    columns = {name: table[name].to_numpy()[crowded] for name in ("shard", "index")}
    repeat_verdicts(work).scatter(bucket, verdicts(columns, "repeated_caption"), work.group_of(columns["shard"]))
