"""The two towers side by side, and the temperature and bias of the sigmoid loss.

    z = tower(x) / (|tower(x)| + 1e-8);   logits = exp(t) * zimg @ ztxt.T + b            (SigLIP, arXiv:2303.15343)

`t` and `b` live here because published checkpoints keep them beside the towers. The parameter `t` is the LOG of the
temperature.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from siglip.array_types import Array, Float
from siglip.errors import UserError
from siglip.models.attention import AttentionFn, attention_fn, attention_on, cudnn_obstacle
from siglip.models.naflex import Patches
from siglip.models.text import TextConfig, TextTransformer
from siglip.models.variants import check_size
from siglip.models.vit import ImageConfig, ViT
from siglip.parallel.sharding import ParamLayout
from siglip.trees import flatten, unflatten

logger = logging.getLogger(__name__)

# The sub-trees of the parameters that are the model; a run may train others beside them (siglip.training.objective.Term).
MODEL_PARTS = ("img", "txt", "t", "b")

# What the image tower reads of a batch: pixels of images of one size, or `Patches`.
IMAGE_ARRAYS = ("image", *Patches._fields)

_NORM_EPS = 1e-8


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Both towers, or the image tower alone when `text` is None.

    `out_dim` = (image, text): the width of a tower's linear head, None for no head. Published models have (None,
    width): the pooled image is the embedding. `temperature_init` and `bias_init` are 10 and -10 in the paper, so that
    at the start every pair looks like a negative, which nearly all are.
    """

    image: ImageConfig = ImageConfig()
    text: TextConfig | None = TextConfig()
    out_dim: tuple[int | None, int | None] = (None, 768)
    temperature_init: float = 10.0
    bias_init: float = -10.0

    def __post_init__(self) -> None:
        if not self.temperature_init > 0:
            raise UserError(f"temperature_init={self.temperature_init} must be positive: its log is the parameter")
        for dim in self.out_dim:
            if dim is not None:
                check_size(f"out_dim={self.out_dim} (None means no head): a width", dim)
        if self.image.pool == "none" and self.out_dim[0] is not None:
            raise UserError(f"out_dim={self.out_dim}: image.pool='none' leaves no vector for a head; use (None, …)")
        zimg, ztxt = self.embedding_dims
        if zimg is not None and ztxt is not None and zimg != ztxt:
            raise UserError(
                f"the image embedding is {zimg} wide and the text embedding {ztxt}; they must be equal: "
                f"set out_dim=({self.out_dim[0]}, {zimg})"
            )

    @property
    def embedding_dims(self) -> tuple[int | None, int | None]:
        """Widths of (zimg, ztxt); None for pool "none" and for an absent text tower."""
        zimg = None if self.image.pool == "none" else self.out_dim[0] or self.image.spec.width
        ztxt = None if self.text is None else self.out_dim[1] or self.text.spec.width
        return zimg, ztxt


class TwoTower(nn.Module):
    """`apply({"params": params}, batch)` -> (zimg, ztxt, out): a tower runs where the batch holds what it reads.

    A batch has any of "image" [b, h, w, 3] (uint8 as decoded, or float32 in [-1, 1]) or, for a NaFlex tower, "patches" [b, n, p]
    and "grid" [b, 2] (`naflex.Patches`); "text" (int32 ids [b, l]); and "zimg" (float32 [b, e], stored normalised embeddings,
    which are handed through instead of running the image tower). With `train=True` the configs' dropout rates apply, and `apply`
    needs `rngs={"dropout": key}` if any is above 0.

    zimg and ztxt are float32 and L2-normalised, or None. `out` holds what each tower returns under "img/…" and "txt/…",
    the norms before dividing ("img/norm", "txt/norm", [b, 1]), "temperature" = exp(t) and the bias "b" ([1] each).
    """

    config: ModelConfig
    attention: tuple[AttentionFn, AttentionFn] = (attention_fn, attention_fn)
    layout: ParamLayout | None = None

    @nn.compact
    def __call__(
        self, batch: Mapping[str, Array], *, train: bool = False
    ) -> tuple[Float[Array, "b e"] | None, Float[Array, "b e"] | None, dict[str, Array]]:
        config, layout, out, zimg, ztxt = self.config, self.layout, {}, batch.get("zimg"), None
        (image_dim, text_dim), (image_attention, text_attention) = config.out_dim, self.attention
        if zimg is None and (images := images_of(batch)) is not None:
            tower = ViT(config.image, image_dim, image_attention, layout, name="img")
            zimg, extras = tower(images, train=train)
            out |= {f"img/{name}": value for name, value in extras.items()}
            if zimg is not None:
                zimg, out["img/norm"] = _normalise(zimg)
        if "text" in batch:
            if config.text is None:
                raise ValueError("this model has no text tower, only the image tower; pass a batch without 'text'")
            tower = TextTransformer(config.text, text_dim, text_attention, layout, name="txt")
            ztxt, extras = tower(batch["text"], train=train)
            out |= {f"txt/{name}": value for name, value in extras.items()}
            ztxt, out["txt/norm"] = _normalise(ztxt)
        if config.text is not None:
            log_temperature = jnp.log(jnp.float32(config.temperature_init))
            out["temperature"] = jnp.exp(self.param("t", nn.initializers.constant(log_temperature), (1,)))
            out["b"] = self.param("b", nn.initializers.constant(config.bias_init), (1,))
        return zimg, ztxt, out


def images_of(batch: Mapping[str, Array]) -> Array | Patches | None:
    """What the image tower reads of a batch, or None."""
    return Patches(batch["patches"], batch["grid"]) if "patches" in batch else batch.get("image")


def image_arrays(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the image tower reads of a batch, as the data side gives it: {"image"}, or {"patches", "grid"}."""
    return {name: batch[name] for name in IMAGE_ARRAYS if name in batch}


def batch_of(images: Array | Patches) -> dict[str, Array]:
    """A batch of what the image tower reads."""
    return images._asdict() if isinstance(images, Patches) else {"image": images}


def blank_images(config: ImageConfig, rows: int, *, patches: int | None = None) -> dict[str, np.ndarray]:
    """A batch of zeros as the image tower takes it from the data side, uint8; `patches` of each where it is NaFlex."""
    if config.naflex is None:
        return {"image": np.zeros((rows, *config.image_size, 3), np.uint8)}
    shape = rows, patches or config.naflex.patches, math.prod(config.patch) * 3
    return {"patches": np.zeros(shape, np.uint8), "grid": np.zeros((rows, 2), np.int32)}


def _normalise(z: Float[Array, "b e"]) -> tuple[Float[Array, "b e"], Float[Array, "b 1"]]:
    # The epsilon is added to the norm, not inside the root, as the published weights were trained.
    norm = jnp.linalg.norm(z, axis=-1, keepdims=True)
    return z / (norm + _NORM_EPS), norm


def make_model(config: ModelConfig, *, layout: ParamLayout | None = None) -> TwoTower:
    """The Linen module; its parameters are the nested dict that `init_params` makes or `formats` reads.

    Args:
        layout: of a training run: picks the attention kernels for its devices and has sharded weights gathered block by
            block. Without it the module computes the same function with nothing but plain XLA, anywhere.

    Raises:
        ValueError: if the config asks for an attention kernel that cannot run on the devices of `layout`.
    """
    if layout is None:
        return TwoTower(config)
    device, towers = layout.mesh.devices.flat[0], {"model.image.attention": config.image}
    towers |= {} if config.text is None else {"model.text.attention": config.text}
    functions = [_training_attention(tower, where, device, layout.mesh) for where, tower in towers.items()]
    return TwoTower(config, (functions[0], functions[-1]), layout)


def _training_attention(tower: ImageConfig | TextConfig, where: str, device: Any, mesh: Mesh | None) -> AttentionFn:
    """The choice for `device`; a GPU that gets XLA's attention, which is slower by a third of the step, says why."""
    head_dim = tower.spec.width // tower.spec.num_heads
    needs = cudnn_obstacle(device, head_dim, tower.dtype)
    if tower.attention == "auto" and device.platform == "gpu" and needs is not None:
        logger.warning("%s='auto' takes 'xla', not flash attention, which needs %s", where, needs)
    return attention_on(tower.attention, device=device, head_dim=head_dim, dtype=tower.dtype, where=where, mesh=mesh)


def init_params(config: ModelConfig, rng: Array) -> dict[str, Any]:
    """Fresh float32 parameters as a nested dict. Call it under `jax.jit`: the forward pass that finds the shapes
    is then dropped by the compiler."""
    batch = {name: jnp.asarray(array) for name, array in blank_images(config.image, 1).items()}
    if config.text is not None:
        batch["text"] = jnp.zeros((1, config.text.length), jnp.int32)
    return make_model(config).init(rng, batch)["params"]


def param_shapes(config: ModelConfig) -> dict[str, Any]:
    """The same tree with `jax.ShapeDtypeStruct` leaves; nothing is computed or allocated, and one layer of a tower is traced."""
    shapes = {}
    for path, leaf in _shapes_of_one_layer(*map(_one_layer, (config.image, config.text)), config.out_dim).items():
        tower = config.text if path.startswith("txt/") else config.image
        if "/encoderblock/" not in path:
            shapes[path] = leaf
        elif tower.scan:
            shapes[path] = jax.ShapeDtypeStruct((tower.spec.depth, *leaf.shape[1:]), leaf.dtype)
        else:
            one = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
            shapes |= {path.replace("/encoderblock/", f"/encoderblock_{n}/"): one for n in range(tower.spec.depth)}
    return unflatten(shapes)


def _one_layer(tower: ImageConfig | TextConfig | None) -> ImageConfig | TextConfig | None:
    """The tower with one layer, and without what changes no shape: most configs that a process meets then are the same."""
    same = {"scan": True, "unroll": None, "remat": "none", "dtype": "float32", "residual_dtype": "float32"}
    return tower and dataclasses.replace(tower, depth=1, attention="xla", dropout=0.0, **same)


@functools.lru_cache(maxsize=64)
def _shapes_of_one_layer(
    image: ImageConfig, text: TextConfig | None, out_dim: tuple[int | None, int | None]
) -> Mapping[str, jax.ShapeDtypeStruct]:
    config = ModelConfig(image, text, out_dim)
    return flatten(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
