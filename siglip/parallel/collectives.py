"""What the processes of a job tell each other: rows of arrays and small JSON values, gathered on every process."""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from siglip.parallel.sharding import P_BATCH


def own_rows(batch: jax.Array, mesh: jax.sharding.Mesh) -> np.ndarray:
    """This process's rows of a global array (leading axis), in the order in which `sharding.put_batch` was given them."""
    if jax.process_count() == 1:
        return np.asarray(batch)
    batch = jax.device_put(batch, NamedSharding(mesh, P_BATCH))
    shards = sorted(batch.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


def gather_rows(rows: np.ndarray) -> np.ndarray:
    """Every process's rows (leading axis; numbers may differ), one after the other, on every process."""
    if jax.process_count() == 1:
        return rows
    counts = multihost_utils.process_allgather(np.asarray(len(rows), np.int32))
    padded = np.zeros((int(counts.max()), *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    parts = multihost_utils.process_allgather(padded)
    return np.concatenate([part[:n] for part, n in zip(parts, counts.tolist(), strict=True)])


def gather_records(records: list[Any]) -> list[Any]:
    """Every process's JSON values, one after the other, on every process."""
    if jax.process_count() == 1:
        return records
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    # Every length is a program to compile: empty lines make few of them.
    lines = lines.ljust(1 << max(10, (len(lines) - 1).bit_length()), b"\n")
    return [json.loads(line) for line in gather_rows(np.frombuffer(lines, np.uint8)).tobytes().splitlines() if line]
