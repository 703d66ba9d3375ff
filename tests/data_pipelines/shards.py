"""Small shards and images made in memory, for the tests of this folder."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SAMPLE = Path(__file__).parents[2] / "data_pipelines" / "sample"
SAMPLE_TRAIN = str(SAMPLE / "emoji-train-{00000..00001}.tar")
SPIECE = str(SAMPLE / "spiece.model")


def quadrants(size_px: int = 16) -> np.ndarray:
    """Red, green / blue, black: an image with no symmetry. uint8 [size, size, 3]."""
    half = size_px // 2
    image = np.zeros((size_px, size_px, 3), np.uint8)
    image[:half, :half, 0] = image[:half, half:, 1] = image[half:, :half, 2] = 255
    return image


def encode(image: np.ndarray | Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, format, **options)
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]], **options) -> Path:
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_pairs(path: Path, count: int, *, first: int = 0, broken: dict[int, bytes | None] | None = None) -> Path:
    """A shard of images whose colour says which they are; `broken` replaces (or with None removes) images."""
    members = {}
    for number in range(first, first + count):
        image = encode(np.full((4, 4, 3), (number % 256, number // 256, 7), np.uint8))
        image = (broken or {}).get(number, image)
        if image is not None:
            members[f"{number:06d}.png"] = image
        members[f"{number:06d}.txt"] = f"caption {number}".encode()
        members[f"{number:06d}.json"] = json.dumps({"captions": {"en": f"en {number}"}}).encode()
    return write_tar(path, members)


def keys(source) -> list[str]:
    """Of all its pairs, in order."""
    return [pair.key for pair in source]
