"""Coloured shapes on grey, with masks: a labelled set that a generator makes."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

COLOURS = {"red": (210, 40, 30), "green": (40, 170, 60), "blue": (50, 70, 220)}
SHAPES = ("square", "disc")
CLASSES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def draw(colour: str, shape: str, rng: np.random.Generator, *, side: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """(pixels, mask): the mask is 1 + the colour's number inside the shape, 0 outside, 255 on its edge."""
    radius = rng.integers(6, 11)
    y, x = rng.integers(radius, side - radius, 2)
    down, across = np.abs(np.mgrid[:side, :side] - np.array([y, x])[:, None, None])
    distance = np.maximum(down, across) if shape == "square" else np.hypot(down, across)
    pixels = rng.normal(128, 12, (side, side, 1)) + np.zeros(3)
    pixels = np.where((distance < radius)[..., None], np.asarray(COLOURS[colour]) + rng.normal(0, 12, 3), pixels)
    mask = np.where(distance < radius, 1 + list(COLOURS).index(colour), 0)
    mask[np.abs(distance - radius) < 0.5] = 255
    return pixels.clip(0, 255).astype(np.uint8), mask.astype(np.uint8)


def write_shapes(path: Path, *, count: int, seed: int) -> Path:
    """Parquet with images of every class in turn.

    cls: number of the class; minus: one less; name: its name; colours: a list of the classes of its colour; txt, negative: the
    right caption and a wrong one; pair: two neighbours share it; place: a group; mask: as `draw` says.
    """
    rng, rows = np.random.default_rng(seed), []
    for n in range(count):
        name = CLASSES[n % len(CLASSES)]
        colour, shape = name.split()
        pixels, mask = draw(colour, shape, rng)
        other = SHAPES[1 - SHAPES.index(shape)]
        rows.append(
            {
                "key": f"{seed}-{n}",
                "number": n,
                "image": png(pixels),
                "cls": n % len(CLASSES),
                "minus": n % len(CLASSES) - 1,
                "name": name,
                "colours": [k for k, own in enumerate(CLASSES) if own.startswith(colour)],
                "txt": f"a {name}",
                "negative": f"a {colour} {other}",
                "match": n % 2,
                "pair": n // 2,
                "place": ("north", "south", "west")[n % 5 % 3],
                "mask": png(mask),
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path
