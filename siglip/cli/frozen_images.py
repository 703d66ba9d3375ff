"""A frozen image tower gives every image one embedding, for good: computed once, kept on disk, trained on without images.

    for every part that is missing:  decode -> image tower -> FOLDER/KEY/PART.npy          (data_pipelines/image_embeddings.py)

LiT (arXiv:2111.07991) and SigLiT (SigLIP, arXiv:2303.15343, section 4.1) are trained so. KEY covers the tower's parameters and
whatever else the embeddings depend on: with another tower they are computed anew, beside the old ones.

The trap: of several processes all take part in every forward pass, also those that have no part left to compute. Hence the
rounds: in each, every process has one part or none, and the same number of passes.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.image_embeddings import ImageEmbeddings, make_key, open_image_embeddings
from data_pipelines.loader import Loader
from siglip import trees
from siglip.errors import RunFailed, UserError
from siglip.evaluation.embed import embed_rows, embeddings, rows_per_process
from siglip.models.two_tower import ImageConfig, ModelConfig
from siglip.parallel import sharding
from siglip.parallel.collectives import gather_records
from siglip.training import optim
from siglip.training.config import TrainConfig
from siglip.training.loop import Prepare
from siglip.training.objective import all_param_shapes
from siglip.training.signals import Interrupted

logger = logging.getLogger(__name__)

_TELL_EVERY_S = 10.0
_SHARED_FILES_S = 10.0  # a network folder may be slow to show what another host wrote
_ONLY_MEMORY_AND_SPEED = ("scan", "unroll", "remat", "attention", "dropout", "patch_dropout")
# Settings that are younger than the first stores: at their defaults a tower has the fingerprint that it had without them.
_YOUNGER = ("residual_dtype", "block", "naflex", "final_norm")


class StoppedComputing(Interrupted):
    """SIGTERM or SIGINT arrived between two parts; the finished ones are kept."""

    def __init__(self, signum: int, left: int, folder: Path) -> None:
        self.signum, self.exit_code = signum, 128 + signum
        RuntimeError.__init__(
            self,
            f"stopped by {signal.Signals(signum).name} with {left} parts of the image embeddings left to compute; the same "
            f"command goes on from there ({folder})",
        )


def check_frozen(config: TrainConfig) -> None:
    """Checks that every image has one embedding throughout training, so that `data.image_embeddings` can hold it.

    Raises:
        UserError: if images change, or the image tower does.
    """
    image, found = config.model.image, None
    mask = trees.flatten(optim.frozen_mask(config.optim, all_param_shapes(config.model, config.terms)))
    trained = [path for path, frozen in mask.items() if path.startswith("img/") and not frozen]
    if config.data.augment is not None:
        found = "data.augment changes images every time", "set data.augment to None in the recipe"
    elif image.dropout or image.patch_dropout:
        name = "dropout" if image.dropout else "patch_dropout"
        found = f"model.image.{name}={getattr(image, name)} does so", f"use --model.image.{name.replace('_', '-')} 0"
    elif trained:
        more = f" and {len(trained) - 1} more" if len(trained) > 1 else ""
        found = f"{trained[0]}{more} trains", "freeze the whole image tower: --optim.lr-mults 'img/.*' 0 …"
    elif config.terms:
        names = ", ".join(term.name for term in config.terms)
        found = f"the image tower does not run then, which the terms {names} may read", "leave out the terms"
    elif image.pool == "none":
        found = "model.image.pool='none' leaves none", "choose a pooling, or train on images"
    if found is not None:
        raise UserError(
            f"data.image_embeddings needs one embedding of an image throughout training, but {found[0]}; {found[1]}, "
            f"or leave data.image_embeddings out"
        )


def make_prepare(config: TrainConfig, loader: Loader) -> Prepare:
    """Computes what is missing of the image embeddings and has the loader use them.

    Raises:
        UserError: as `check_frozen`.
    """
    check_frozen(config)
    model, mesh = config.model, sharding.make_mesh(config.mesh)
    rows = rows_per_process(config.eval.batch_size, mesh)
    image_model = dataclasses.replace(model, text=None, out_dim=(model.out_dim[0], None))

    def prepare(step: int, params: Mapping[str, Any], interrupted: Callable[[], int | None]) -> None:
        del step
        tower = fingerprint(params["img"], model)
        forward = functools.partial(embeddings, image_model, {"img": params["img"]})
        embed = functools.partial(embed_rows, forward, mesh=mesh, rows_per_pass=rows)
        stores = []
        for index, source in enumerate(config.data.sources):
            store = _open(config, loader, index, tower)
            _Computation(store, loader, index, embed, rows, source.shards).run(interrupted)
            stores.append(store)
        loader.use_image_embeddings(stores)

    return prepare


def fingerprint(image_params: Mapping[str, Any], model: ModelConfig) -> str:
    """Of an image tower as a function. Parameters stay on their devices, however they are laid out there."""
    sums = {path: np.asarray(leaf).tolist() for path, leaf in trees.flatten(_checksums(dict(image_params))).items()}
    fields = dataclasses.asdict(model.image) | dataclasses.asdict(model.image.spec) | {"patch_size": model.image.patch}
    as_before = [name for name in _YOUNGER if getattr(model.image, name) == getattr(ImageConfig(), name)]
    left_out = (*_ONLY_MEMORY_AND_SPEED, *as_before, "variant")
    tower = {name: value for name, value in fields.items() if name not in left_out}
    return hashlib.sha256(json.dumps([tower, sums], sort_keys=True).encode()).hexdigest()[:16]


@jax.jit
def _checksums(params: dict[str, Any]) -> dict[str, Any]:
    """Two 32-bit sums of every array, over its bits mixed with their places: integer sums have no order, so sharding does
    not matter."""

    def of(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
        strides = [math.prod(leaf.shape[axis + 1 :]) for axis in range(leaf.ndim)]
        places = sum(
            jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride % 2**32)
            for axis, stride in enumerate(strides)
        )
        mixed = _mix(bits ^ _mix(places + jnp.uint32(1)))
        return jnp.stack([mixed.sum(dtype=jnp.uint32), _mix(mixed + jnp.uint32(0x9E3779B9)).sum(dtype=jnp.uint32)])

    return jax.tree.map(of, params)


def _mix(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3: every bit of the input reaches every bit of the output."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def _open(config: TrainConfig, loader: Loader, index: int, tower: str) -> ImageEmbeddings:
    source, data, image_size = loader.sources[index], config.data, config.model.image.image_size
    key = make_key(tower, source=source, image_size=image_size, max_image_pixels=data.max_image_pixels)
    shards, width = data.sources[index].shards, config.model.embedding_dims[0]
    about = {"shards": shards, "source": source.fingerprint, "tower": tower, "image_size": image_size}
    # Every process may make the folder: they write the same.
    return open_image_embeddings(Path(data.image_embeddings) / key, pairs=len(source), width=width, about=about)


@dataclasses.dataclass(frozen=True)
class _Computation:
    """What is left to compute of one source. embed: uint8 [n, h, w, 3] -> float32 [n, e], by all processes at once."""

    store: ImageEmbeddings
    loader: Loader
    index: int
    embed: Callable[[np.ndarray], np.ndarray]
    rows: int
    shards: str

    def run(self, interrupted: Callable[[], int | None]) -> None:
        """Every process computes its share of the parts.

        Raises:
            StoppedComputing: a process received a signal.
            OSError: the folder is full, or not shared by all hosts.
        """
        store, index, count = self.store, jax.process_index(), jax.process_count()
        missing = gather_records([store.missing() if index == 0 else None])[0]
        if missing:
            own = missing[index::count]
            rounds = -(-len(missing) // count)
            own += [store.parts] * (rounds - len(own))  # a part behind the last one has no images
            began = told = time.monotonic()
            with contextlib.closing(self.loader.part_images(self.index, store, own, rows=self.rows)) as batches:
                for n, part in enumerate(own):
                    signum = interrupted()
                    if signum is not None:
                        raise StoppedComputing(signum, len(missing) - n * count, store.folder)
                    self._compute(part, batches)
                    if time.monotonic() > told + _TELL_EVERY_S or n + 1 == rounds:
                        told = time.monotonic()
                        self._tell(missing[: (n + 1) * count], missing, told - began)
        gather_records([])  # all parts are written
        self._finish(computed=bool(missing))

    def _compute(self, part: int, batches: Iterator[dict]) -> None:
        store, embeddings, broken = self.store, [], {}
        for _ in range(-(-store.part_pairs // self.rows)):
            batch = next(batches)
            embeddings.append(self.embed({"image": batch["image"]}))
            broken |= batch["broken"]
        records = store.records(part)
        rows = np.concatenate(embeddings)
        rows[[record - records.start for record in broken]] = 0.0
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if bad.size:
            raise RunFailed(
                f"the image tower makes NaN of pair {records[bad[0]]} of {self.shards}; look at that image and the tower"
            )
        if records:
            store.write(part, np.asarray(rows, np.float32), broken)

    def _tell(self, done: list[int], missing: list[int], took_s: float) -> None:
        images, all_images = (sum(len(self.store.records(part)) for part in parts) for parts in (done, missing))
        per_s = images / max(took_s, 1e-9)
        logger.info(
            "image embeddings of %s: %d of %d, %.0f images/s, %.0f s left",
            self.shards, images, all_images, per_s, (all_images - images) / per_s,
        )  # fmt: skip

    def _finish(self, *, computed: bool) -> None:
        deadline = time.monotonic() + _SHARED_FILES_S
        while missing := self.store.missing():
            if time.monotonic() > deadline:
                raise OSError(
                    f"{len(missing)} parts that other hosts computed do not appear in {self.store.folder}; "
                    f"name a folder that all hosts share with --data.image-embeddings"
                )
            time.sleep(0.2)
        if jax.process_index() > 0:
            return
        if computed:
            self.store.sweep()
        broken = self.store.count_broken()
        if broken:
            logger.warning(
                "images of %s without an embedding, replaced in training: %s; remove %s to try them again",
                self.shards, dict(broken), self.store.folder,
            )  # fmt: skip
