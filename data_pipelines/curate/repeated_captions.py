"""Captions that stand under many different images and so say nothing about any of them.

ALIGN (Jia et al., arXiv 2102.05918) drops alt-texts shared by more than 10 images, of 1.8 billion; "untitled" and a theme's
name repeat in small corpora too, but so does "dog".

The trap: duplicates of one image are one image. So images are counted by their pixels, and not by pairs.
"""

import numpy as np
import pyarrow as pa
import xxhash

from data_pipelines.curate.layout import Stage, Work, read_images, starts_of_runs, verdict_table
from data_pipelines.curate.shuffle import Shuffle


def by_caption(work: Work) -> Shuffle:
    """Pairs by caption, one row each."""
    return work.to_buckets("captions", rows=work.pairs)


def caption_verdicts(work: Work) -> Shuffle:
    """Pairs whose caption repeats too often, by group."""
    return work.to_groups("caption-verdicts", map_tasks=by_caption(work).buckets)


def write_captions(work: Work, group: int) -> None:
    """Writes the captions and images of one group, by caption."""
    tables = []
    for shard in work.layout.members(group):
        table = read_images(work.layout.tables[shard], ["caption"])
        keys = [xxhash.xxh3_64_intdigest(text.lower().encode()) if text else 0 for text in table["caption"].to_pylist()]
        pixels = np.frombuffer(b"".join(table["pixel_hash"].to_pylist()), np.uint64)[::2]
        columns = {"caption": np.array(keys, np.uint64), "pixels": pixels, "index": table["index"].to_numpy()}
        table = pa.table(columns | {"shard": np.full(len(table), shard, np.int32)})
        tables.append(table.filter(pa.array(columns["caption"] != 0)))
    by_caption(work).write_by_key(group, pa.concat_tables(tables), "caption")


def find_repeated(work: Work, bucket: int) -> None:
    """Finds the captions in a bucket that have too many different images."""
    table = by_caption(work).read(bucket)
    caption, pixels = table["caption"].to_numpy(), table["pixels"].to_numpy()
    order = np.lexsort((pixels, caption))
    first = starts_of_runs(caption[order])
    run = np.cumsum(first) - 1
    images = np.bincount(run, weights=starts_of_runs(caption[order], pixels[order])) if len(order) else np.zeros(0)
    repeated = np.sort(order[images[run] > work.config.max_caption_pictures])
    found = {name: table[name].to_numpy()[repeated] for name in ("shard", "index")}
    caption_verdicts(work).write(bucket, verdict_table(found, "repeated_caption"), work.group_of(found["shard"]))


STAGES = (Stage("captions", write_captions), Stage("captions: repeated", find_repeated, by_caption))
