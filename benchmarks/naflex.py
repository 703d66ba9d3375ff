"""What keeping the aspect ratio gains: NaFlex against squashing, at equal tokens; and what a token costs beside a fixed tower's.

    python benchmarks/naflex.py                      # the table, and benchmarks/results/naflex.json and .png: an hour
    python benchmarks/naflex.py --seeds 1 --steps 50 --out naflex.json     # a try

Images are made here: two to four words in a line (2.8:1 to 5.6:1) or four in a column (1:2.7), four coloured shapes in a row or a
column (4:1, 1:4) or in a square. A caption names all in reading order. Both ways train one and the same NaFlex tower on the same
pairs in the same order; one gets each image in a grid of its own shape, the other in a square. Accuracy is the share of held-out
images that find their own caption among 256, all of the same kind; equal captions count as one. As seeds are shared, the standard
error of a difference is that of its values by seed.

Time is that of a training step of both towers on square images: the median ratio of two steps, one right after the other.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.patch_ops import fit_size
from data_pipelines.samples.pairs import SamplePair
from data_pipelines.samples.patches import Patches
from siglip.losses import sigmoid_loss
from siglip.models.naflex import NaflexConfig
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig, init_params, make_model

RESULTS = Path(__file__).parent / "results" / "naflex.json"
KINDS = ("text line", "text column", "row or column", "square")
WORDS = ("cat", "dog", "sun", "ink", "hat", "owl", "jam", "fig")
COLOURS, SHAPES = ((210, 40, 30), (40, 170, 60), (50, 70, 220)), ("disc", "square", "bar")
PAD = len(WORDS) + len(COLOURS) * len(SHAPES)  # the number after the last symbol
CELL_PX, PATCH_PX, SIDE = 16, 8, 6  # SIDE * SIDE patches at most
TRAIN, HELD_OUT, CANDIDATES = 4096, 2048, 256


def draw(kind: str, rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """An image and the numbers of its symbols, four with PAD."""
    if kind.startswith("text"):
        words = rng.integers(len(WORDS), size=4 if kind == "text column" else rng.integers(2, 5)).tolist()
        down, across = (len(words), 1) if kind == "text column" else (1, len(words))
        gap = 2 + 6 * across
        image = Image.new("RGB", (CELL_PX * across + gap, CELL_PX * down), (245, 245, 240))
        pen, font = ImageDraw.Draw(image), ImageFont.load_default(10)
        lines = [words] if down == 1 else [[n] for n in words]
        for row, line in enumerate(lines):
            pen.text((2, row * CELL_PX + 2), " ".join(WORDS[n] for n in line), fill=(20, 20, 20), font=font)
        return np.asarray(image), words + [PAD] * (4 - len(words))
    down, across = (2, 2) if kind == "square" else ((1, 4) if rng.random() < 0.5 else (4, 1))
    image = Image.new("RGB", (across * CELL_PX, down * CELL_PX), (128, 128, 128))
    pen, drawn = ImageDraw.Draw(image), rng.integers(len(COLOURS) * len(SHAPES), size=4)
    for place, n in enumerate(drawn):
        left, top = place % across * CELL_PX, place // across * CELL_PX
        box, colour = (left + 3, top + 3, left + 12, top + 12), COLOURS[n // len(SHAPES)]
        match SHAPES[n % len(SHAPES)]:
            case "disc":
                pen.ellipse(box, fill=colour)
            case "square":
                pen.rectangle(box, fill=colour)
            case "bar":
                pen.rectangle((box[0] + 3, box[1], box[2] - 3, box[3]), fill=colour)
    return np.asarray(image), (drawn + len(WORDS)).tolist()


def make_set(count: int, seed: int) -> dict[str, np.ndarray]:
    """`count` images of each kind: ids [n, 4], and for "naflex" and "squash" patches and grids."""
    rng, length = np.random.default_rng(seed), SIDE * SIDE
    drawn = [draw(kind, rng) for kind in KINDS for _ in range(count)]
    found = {"text": np.array([ids for _, ids in drawn], np.int32)}
    ways = {"naflex": None, "squash": (SIDE * PATCH_PX,) * 2}
    for way, size_px in ways.items():
        field = Patches((PATCH_PX, PATCH_PX), length, size_px=size_px)
        made = [field.make(SamplePair(0, 0, "", {}, (), image), None) for image, _ in drawn]
        found |= {f"{way}/{name}": np.stack([one[name] for one in made]) for name in ("patches", "grid")}
    return found


def model_config() -> ModelConfig:
    size = SIDE * PATCH_PX
    image = ImageConfig(
        width=96, depth=3, mlp_dim=256, num_heads=4, patch_size=(PATCH_PX, PATCH_PX), image_size=(size, size),
        naflex=NaflexConfig(SIDE * SIDE, SIDE * SIDE),
    )  # fmt: skip
    text = TextConfig(width=96, depth=1, mlp_dim=256, num_heads=4, vocab_size=PAD + 1, length=4, pool="mean")
    return ModelConfig(image, text, (None, 96))


def make_step(config: ModelConfig, optimizer: optax.GradientTransformation):
    """(params, state, batch) -> the same after a step."""
    model = make_model(config)

    def loss(params, batch):
        zimg, ztxt, _ = model.apply({"params": params}, batch)
        return sigmoid_loss(zimg, ztxt, params["t"], params["b"])

    @jax.jit
    def step(params, state, batch):
        updates, state = optimizer.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    return step, jax.jit(lambda params, batch: model.apply({"params": params}, batch)[:2])


def train_and_test(way: str, seed: int, data: tuple[dict, dict], program, *, steps: int, batch: int) -> list[float]:
    """Accuracy of each kind."""
    train, test = data
    (step, embed), config, optimizer = program
    rows = lambda of, index: {  # noqa: E731
        "patches": of[f"{way}/patches"][index], "grid": of[f"{way}/grid"][index], "text": of["text"][index]
    }  # fmt: skip
    params = jax.jit(lambda: init_params(config, jax.random.key(seed)))()
    state, rng = optimizer.init(params), np.random.default_rng(seed)
    for _ in range(steps):
        params, state = step(
            params, state, jax.tree.map(jnp.asarray, rows(train, rng.integers(len(train["text"]), size=batch)))
        )
    slices = [slice(start, start + batch) for start in range(0, len(test["text"]), batch)]
    parts = [embed(params, jax.tree.map(jnp.asarray, rows(test, part))) for part in slices]
    zimg, ztxt = (np.concatenate(z) for z in zip(*parts, strict=True))
    accuracies = []
    for kind in range(len(KINDS)):
        right = []
        for start in range(kind * HELD_OUT, (kind + 1) * HELD_OUT, CANDIDATES):
            own = slice(start, start + CANDIDATES)
            scores, ids = zimg[own] @ ztxt[own].T, test["text"][own]
            right += [(ids[n] == ids[best]).all() for n, best in enumerate(scores.argmax(axis=1))]
        accuracies.append(float(np.mean(right)))
    return accuracies


def time_of_a_token(*, turns: int = 31, rows: int = 2) -> float:
    """Time of a training step of a NaFlex tower of two blocks over that of the one for one size, on square images."""
    fixed = ImageConfig("S/16", depth=2, image_size=(256, 256))
    rng, steps = np.random.default_rng(0), []
    images = rng.uniform(-1, 1, (rows, 256, 256, 3)).astype(np.float32)
    patches = images.reshape(rows, 16, 16, 16, 16, 3).swapaxes(2, 3).reshape(rows, 256, 768)
    batches = {"image": images}, {"patches": patches, "grid": np.full((rows, 2), 16, np.int32)}
    for image, batch in zip((fixed, dataclasses.replace(fixed, naflex=NaflexConfig())), batches, strict=True):
        model = make_model(ModelConfig(image, None, (None, None)))
        params = init_params(ModelConfig(image, None, (None, None)), jax.random.key(0))
        grad = jax.jit(jax.grad(lambda p, b, model=model: model.apply({"params": p}, b)[0].sum()))
        steps.append((grad, params, jax.tree.map(jnp.asarray, batch)))
    jax.block_until_ready([grad(params, batch) for grad, params, batch in steps])
    ratios = []
    for turn in range(turns):
        seconds = {}
        for n in (0, 1) if turn % 2 else (1, 0):
            grad, params, batch = steps[n]
            start = time.perf_counter()
            jax.block_until_ready(grad(params, batch))
            seconds[n] = time.perf_counter() - start
        ratios.append(seconds[1] / seconds[0])
    return float(np.median(ratios))


def mean_and_error(values: np.ndarray) -> list[float]:
    return [float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0]


def plot(accuracy: dict, path: Path) -> None:
    """An image of each kind as both ways see it, and its accuracies."""
    figure, axes = plt.subplots(3, len(KINDS), figsize=(12, 5.5), layout="constrained")
    for column, kind in enumerate(KINDS):
        image = Image.fromarray(draw(kind, np.random.default_rng(3))[0])
        wide = fit_size(image.size[::-1], (PATCH_PX, PATCH_PX), SIDE * SIDE)
        for row, (way, (high, across)) in enumerate({"NaFlex": wide, "squash": (SIDE * PATCH_PX,) * 2}.items()):
            axes[row, column].imshow(image.resize((across, high), Image.Resampling.BILINEAR), interpolation="nearest")
            axes[row, column].set(xticks=[], yticks=[], title=f"{kind}, {way}: {across} × {high} px")
        means, errors = zip(*accuracy[kind].values(), strict=True)
        axes[2, column].bar(list(accuracy[kind]), means, yerr=errors, color=["tab:blue", "tab:gray"], capsize=4)
        axes[2, column].set(ylim=(0, 1), ylabel="finds its own caption of 256" if column == 0 else "")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON; the plot gets its name")
    options = parser.parse_args()
    data, config = (make_set(TRAIN, 0), make_set(HELD_OUT, 1)), model_config()
    optimizer = optax.contrib.muon(optax.warmup_cosine_decay_schedule(0, 5e-3, options.steps // 10, options.steps))
    program = make_step(config, optimizer), config, optimizer
    found: dict[str, list] = {"naflex": [], "squash": []}
    for seed in range(options.seeds):
        for way, results in found.items():
            results.append(train_and_test(way, seed, data, program, steps=options.steps, batch=options.batch))
            print(way, seed, *(f"{a:.3f}" for a in results[-1]), flush=True)
    table, differences = {}, {}
    heads = "".join(name.rjust(17) for name in ("NaFlex", "squash", "difference"))
    print(f"{'':>14}{heads}  mean and standard error over {options.seeds} seeds")
    for kind, name in enumerate(KINDS):
        values = {way: np.array(results)[:, kind] for way, results in found.items()}
        table[name] = {way: mean_and_error(own) for way, own in values.items()}
        differences[name] = mean_and_error(values["naflex"] - values["squash"])
        cells = (f"{mean:.3f} ± {error:.3f}".rjust(17) for mean, error in (*table[name].values(), differences[name]))
        print(f"{name:>14}{''.join(cells)}")
    fill = {way: float(data[0][f"{way}/grid"].prod(axis=1).mean() / SIDE**2) for way in found}
    ratio = time_of_a_token()
    print(f"valid tokens of {SIDE * SIDE}: {fill}; time of a step, NaFlex / one size: {ratio:.3f}")
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    result = settings | {"accuracy": table, "difference": differences, "runs": found, "fill": fill, "time": ratio}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    plot(table, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
