"""Tiny models with every parameter random, for the tests of the towers, the formats and the exports."""

import jax
import numpy as np

from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig, param_shapes
from siglip.trees import flatten, unflatten

# Options of a program that runs once or twice, where the sums are looked at and not what LLVM makes of them: it would take most
# of the time.
QUICK = {"xla_backend_optimization_level": 0}
# Non-square grid and patches, pixels left over, head widths 12 and 9: nothing here is a power of two.
ODD_IMAGE = {"variant": "mu", "width": 36, "depth": 2, "mlp_dim": 50, "num_heads": 3, "patch_size": (6, 8)}
ODD_TEXT = {"variant": "mu", "width": 27, "depth": 2, "mlp_dim": 40, "num_heads": 3, "vocab_size": 61, "length": 7}


def square_model(*, image: dict | None = None, text: dict | None = None) -> ModelConfig:
    """A model that every format can express: square, pooled as published, no image head."""
    image = {"variant": "mu/8", "width": 36, "num_heads": 3, "depth": 2, "image_size": (32, 32)} | (image or {})
    return ModelConfig(ImageConfig(**image), TextConfig(**(ODD_TEXT | (text or {}))), out_dim=(None, image["width"]))


def random_params(config: ModelConfig, *, seed: int = 0) -> dict:
    """Parameters of plausible size, none zero: a bias or a scale that is mixed up with another must show."""
    rng = np.random.default_rng(seed)

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path in ("t", "b"):
            return np.full(leaf.shape, {"t": 2.3, "b": -7.5}[path], np.float32)
        fan_in = np.prod(leaf.shape[-3:-1]) if path.endswith("kernel") else 10
        centre = 1.0 if path.endswith("scale") else 0.0
        return (centre + rng.normal(size=leaf.shape) / np.sqrt(fan_in)).astype(np.float32)

    return unflatten({path: draw(path, leaf) for path, leaf in flatten(param_shapes(config)).items()})


def random_batch(config: ModelConfig, *, batch: int = 3) -> dict[str, np.ndarray]:
    """`random_inputs` as the towers take them."""
    images, ids = random_inputs(config, batch=batch)
    return {"image": images} | ({} if ids is None else {"text": ids})


def random_inputs(config: ModelConfig, *, batch: int = 3) -> tuple[np.ndarray, np.ndarray | None]:
    """Images in [-1, 1] and token ids."""
    rng, text = np.random.default_rng(1), config.text
    images = rng.uniform(-1, 1, (batch, *config.image.image_size, 3)).astype(np.float32)
    return images, text and rng.integers(text.vocab_size, size=(batch, text.length), dtype=np.int32)
