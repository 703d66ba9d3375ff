"""What the studies share: the shipped sample in memory, two small towers, a run as one program, and the page of results.

    python -m benchmarks.studies.batch_size        # any of the files beside this one; minutes on a CPU

A run sees `PAIRS` pairs of the quick start's training stream (its shards, captions, tokenizer and crops, at 24 px) and is judged
by retrieval among the held-out pairs: the share of queries whose pair is among the first ten, both ways, by English name. Seeds
change the order of the pairs, the crops, the captions, the parameters and the dropped patches. A number is the mean of `SEEDS`
runs; ± is the standard error of that mean.
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from data_pipelines import sample
from data_pipelines.loader import make_eval_batches, make_loader
from data_pipelines.sources.opening import open_source
from data_pipelines.text_ops import captions_of
from data_pipelines.tokenizers import SentencePieceTokenizer
from siglip.losses import sigmoid_loss, softmax_loss
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig, init_params, make_model
from siglip.training import optim
from siglip.training.config import TrainConfig, load_config_file

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "studies"
PAIRS, SEEDS, LENGTH = 12_288, (0, 1, 2), 12

Array = jax.Array
# (zimg, ztxt, t, b, random key, knobs) -> the loss of a batch. Knobs are not compiled in: one program serves all their values.
Loss = Callable[[Array, Array, Array, Array, Array, Array], Array]
SIGMOID, SOFTMAX, SIGMOID_WITHOUT_BIAS = (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)
LOSSES = {"sigmoid": SIGMOID, "softmax": SOFTMAX}


def pair_loss(zimg: Array, ztxt: Array, t: Array, b: Array, key: Array, knobs: Array) -> Array:
    """SigLIP's loss or CLIP's. knobs: share of the softmax loss, factor of the bias."""
    return (1 - knobs[0]) * sigmoid_loss(zimg, ztxt, t, knobs[1] * b) + knobs[0] * softmax_loss(zimg, ztxt, t)


@dataclasses.dataclass(frozen=True)
class Run:
    """What a study may change. `bias` None is -log(batch_size), the log odds of a match; lr is that of 64 pairs a batch, and
    grows with the root of the batch."""

    batch_size: int = 64
    knobs: tuple[float, ...] = SIGMOID
    loss: Loss = pair_loss
    lr: float = 2e-3
    b2: float = 0.95
    temperature: float = 10.0
    bias: float | None = None


class Pairs(NamedTuple):
    """image uint8 [n, h, w, 3], text int32 [n, l]."""

    image: np.ndarray
    text: np.ndarray


@functools.cache
def recipe() -> TrainConfig:
    """The quick start's: where the sample lies and how it is read."""
    return load_config_file(str(ROOT / "configs" / "quickstart.py"))


@functools.cache
def model() -> ModelConfig:
    """Image tower of 36 patches, half of them dropped in training; text tower that averages its tokens."""
    pieces = SentencePieceTokenizer(recipe().data.tokenizer).vocab_size
    image = ImageConfig("mu", width=64, depth=1, mlp_dim=256, num_heads=2, patch_size=(4, 4), image_size=(24, 24))
    text = TextConfig("mu", width=64, depth=1, mlp_dim=128, num_heads=2, vocab_size=pieces, length=LENGTH, pool="mean")
    return ModelConfig(dataclasses.replace(image, patch_dropout=0.5), text, out_dim=(None, 64))


@functools.lru_cache(len(SEEDS))
def training_pairs(seed: int) -> Pairs:
    """`PAIRS` pairs of the stream, in its order."""
    loader = make_loader(
        recipe().data, batch_size=1024, image_size=model().image.image_size, text_length=LENGTH, seed=seed
    )
    batches = [next(loader) for _ in range(PAIRS // 1024)]
    loader.close()
    return Pairs(*(np.concatenate([batch[name] for batch in batches]) for name in Pairs._fields))


@functools.cache
def held_out() -> Pairs:
    """Drawings of ideas that training does not have, with their English names."""
    source = open_source(sample.path("unseen-ideas.parquet"))
    tokenizer = SentencePieceTokenizer(recipe().data.tokenizer)
    texts = [captions_of(source[i].fields, "captions.en")[0] for i in range(len(source))]
    batches = make_eval_batches(source, batch_size=len(source), image_size=model().image.image_size)
    return Pairs(next(iter(batches))["image"], np.stack([tokenizer.encode(text, LENGTH) for text in texts]))


def train(run: Run, seed: int, pairs: Pairs) -> dict[str, float]:
    """One run: recall@10 on the held-out pairs, and the last temperature, bias and loss."""
    steps = len(pairs.image) // run.batch_size
    bias = -math.log(run.batch_size) if run.bias is None else run.bias
    start = dataclasses.replace(model(), temperature_init=run.temperature, bias_init=bias)
    params = jax.jit(functools.partial(init_params, start))(jax.random.key(seed))
    batches = jax.tree.map(
        lambda x: x[: steps * run.batch_size].reshape(steps, run.batch_size, *x.shape[1:]), pairs._asdict()
    )
    lr = run.lr * math.sqrt(run.batch_size / 64)
    params, losses = _train(
        params, batches, jax.random.key(seed), jnp.asarray(run.knobs), loss=run.loss, lr=lr, b2=run.b2
    )
    return {
        "recall@10": float(_recall(params, held_out()._asdict())),
        "temperature": float(jnp.exp(params["t"][0])),
        "bias": float(params["b"][0]),
        "loss": float(losses[-max(1, steps // 10) :].mean()),
        "worst_loss_after_half": float(losses[steps // 2 :].max()),
    }


@functools.partial(jax.jit, static_argnames=("loss", "lr", "b2"))
def _train(params: dict, batches: dict[str, Array], key: Array, knobs: Array, *, loss: Loss, lr: float, b2: float):
    steps, module = batches["text"].shape[0], make_model(model())
    config = optim.OptimConfig(lr=lr, weight_decay=0.1 * lr, b2=b2, warmup_steps=steps // 10)
    optimizer = optim.make_optimizer(config, params, total_steps=steps)

    def value(params: dict, batch: dict[str, Array], key: Array) -> Array:
        dropped, drawn = jax.random.split(key)
        zimg, ztxt, _ = module.apply({"params": params}, batch, train=True, rngs={"dropout": dropped})
        return loss(zimg, ztxt, params["t"], params["b"], drawn, knobs)

    def step(carry, batch):
        params, state, key = carry
        key, own = jax.random.split(key)
        found, grads = jax.value_and_grad(value)(params, batch, own)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state, key), found

    (params, *_), losses = jax.lax.scan(step, (params, optimizer.init(params), key), batches)
    return params, losses


@jax.jit
def _recall(params: dict, pairs: dict[str, Array]) -> Array:
    zimg, ztxt, _ = make_model(model()).apply({"params": params}, pairs)
    scores = zimg @ ztxt.T
    own = jnp.diag(scores)
    ranks = jnp.stack([(scores > own[:, None]).sum(1), (scores > own[None]).sum(0)])
    return (ranks < 10).mean()


def study(
    name: str, lines: Mapping[str, Mapping[str, Run]], pairs_of: Callable[[str, str, int], Pairs] | None = None
) -> dict:
    """Trains every run of every line with every seed; prints rows and keeps them as JSON at once.

    Args:
        lines: {curve: {place on the axis: run}}.
        pairs_of: (curve, place, seed) -> what it trains on; None for the stream as it is.

    Returns:
        {curve: {place: {metric: [one for each seed]}}}
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    found: dict = {}
    for curve, runs in lines.items():
        for place, run in runs.items():
            began = time.process_time()
            rows = [
                train(run, seed, training_pairs(seed) if pairs_of is None else pairs_of(curve, place, seed))
                for seed in SEEDS
            ]
            found.setdefault(curve, {})[place] = {metric: [row[metric] for row in rows] for metric in rows[0]}
            mean, error = mean_and_error(found[curve][place]["recall@10"])
            spent = time.process_time() - began
            print(f"{curve:24} {place:>8}  R@10 {mean:.3f} ± {error:.3f}   {spent:.0f} CPU s", flush=True)
            (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean, and the standard error of it."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))


def plot(name: str, found: dict, *, axis: str, source: str, paper: Mapping[str, Mapping[str, float]] | str) -> None:
    """Ours with ± 1 standard error, and beside it what the paper has.

    Args:
        axis: what places are. source: where the paper has it. paper: {curve: {place: accuracy}}; or what it says, where its
            numbers are in no table.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for curve, places in found.items():
        values = [mean_and_error(metrics["recall@10"]) for metrics in places.values()]
        left.errorbar(list(places), *zip(*values, strict=True), marker="o", capsize=3, label=curve)
    left.axhline(10 / len(held_out().image), color="grey", linestyle=":", label="chance")
    left.set(title=f"ours: {PAIRS:,} pairs, {len(SEEDS)} seeds", xlabel=axis, ylabel="held-out R@10")
    right.set(title=f"paper: {source}", xlabel=axis)
    if isinstance(paper, str):
        right.text(0.5, 0.5, paper, ha="center", va="center", wrap=True, transform=right.transAxes)
        right.set(xticks=[], yticks=[])
    else:
        for curve, accuracies in paper.items():
            right.plot(list(accuracies), list(accuracies.values()), marker="o", label=curve)
        right.set(ylabel="ImageNet zero-shot, %")
    for axes in (left, right)[: 1 if isinstance(paper, str) else 2]:
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(RESULTS / f"{name}.png", dpi=110)
    plt.close(figure)
