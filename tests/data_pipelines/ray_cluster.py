"""A small Ray cluster on this machine, through Ray's own API: what `ray start --head` and `ray start --address` do."""

import contextlib
import os

from data_pipelines.curate import ray_engine

_MACHINE = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}


@contextlib.contextmanager
def running(cpus: int):
    """Yields the cluster: its `address`, `add_node` and `remove_node`. Workers inherit this process's environment."""
    os.environ |= ray_engine._ENVIRONMENT | dict(os.environ)  # before the import: Ray reads it once
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=_MACHINE | {"num_cpus": cpus})
    try:
        yield cluster
    finally:
        cluster.shutdown()
