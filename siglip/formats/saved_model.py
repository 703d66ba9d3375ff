"""TensorFlow SavedModel: encoded images and raw text in, embeddings and probabilities out; everything between is in the graph.

    serving_default   images: string [b], texts: string [k] -> probabilities, logits [b, k], image_embedding, text_embedding
    embed_images      images -> image_embedding [b, e]           embed_texts   texts -> text_embedding [k, e]
    image_tokens      images -> image_tokens [b, n, d]
    pixels            images -> pixels uint8 [b, h, w, 3]        tokens        texts -> tokens int32 [k, l]

    import tensorflow as tf, tensorflow_text                      # the second one only for its ops
    model = tf.saved_model.load(folder)
    model.signatures["serving_default"](images=tf.constant([jpeg]), texts=tf.constant(["a dog"]))["probabilities"]

A NaFlex tower takes patches: float32 [b, n, p] in [-1, 1] and grid: int32 [b, 2] in place of images, for any n, and its tokens
come with mask: bool [b, n]; it has no `pixels`.

For an image tower alone, `serving_default` is images -> image_tokens and, where it pools, image_embedding. Images are decoded
and resized as Pillow does it (siglip.formats.tf_pixels), texts prepared and tokenized as in training (tf_tokens). The towers
are StableHLO for CPU, CUDA and TPU with float32 products (jax2tf), for any b and k above 0; loading them needs neither jax nor
this package.

The trap: weights that a traced function merely closes over become constants, once for each signature, of a graph that ends at
2 GiB. Here they are variables.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from siglip.errors import UserError
from siglip.formats import tf_pixels, tf_tokens
from siglip.formats.export_format import ExportFormat, Inputs, in_folder
from siglip.formats.hf_tokenizer.convert import read_pieces, read_sentencepiece
from siglip.formats.stablehlo import PLATFORMS, towers
from siglip.models.naflex import Patches
from siglip.models.two_tower import ModelConfig


def write(folder: Path, params: Mapping[str, Any], config: ModelConfig, *, tokenizer: Path | None) -> None:
    """Writes both towers with the tokenizer in the graph, or the image tower alone when `config.text` is None.

    Raises:
        UserError: there is a text tower but no tokenizer for it, or one with more pieces than the tower has.
    """
    if config.text is not None and tokenizer is None:
        raise UserError(
            "a SavedModel takes raw texts, but the source has no tokenizer; put its spiece.model beside it, "
            "or export with --tower image"
        )
    pieces = None if config.text is None else read_pieces(tokenizer, room=config.text.vocab_size)
    tf = _tensorflow()
    module = tf.Module()
    with jax.default_matmul_precision("highest"):
        graphs = (_image_graphs if config.image.naflex is None else _patch_graphs)(module, params, config)
        if pieces is not None:
            graphs |= _text_graphs(module, params, config, pieces=pieces)
        graphs["serving_default"] = _default(module, params, config, graphs)
        inputs = _inputs(config)
        signatures = {
            name: _of(*(inputs[name] for name in arguments))(graph).get_concrete_function()
            for name, (arguments, graph) in graphs.items()
        }
    tf.saved_model.save(module, str(folder), signatures=signatures)


def outputs(
    folder: Path, files: Sequence[bytes], texts: Sequence[str], *, patches: Patches | None = None
) -> dict[str, np.ndarray]:
    """Everything that a written model gives for images and texts: what the signatures return, probabilities included.

    `pixels` come as the tower takes them, float32 in [-1, 1]. Outputs that need texts, or files, are left out without them.

    Args:
        patches: in place of files, for a NaFlex model, whose padding is then zeros.
    """
    tf = _tensorflow()
    model = tf.saved_model.load(str(folder))
    given = {"images": tf.constant(list(files), tf.string), "texts": tf.constant(list(texts), tf.string)}
    given |= {} if patches is None else {name: tf.constant(np.asarray(a)) for name, a in patches._asdict().items()}
    found = {}
    # The default one first: every other that has something to add compiles a tower again.
    for name in sorted(model.signatures, key="serving_default".__ne__):
        signature = model.signatures[name]
        wanted = signature.structured_input_signature[1]
        if all(given[name].shape[0] for name in wanted) and not signature.structured_outputs.keys() <= found.keys():
            found |= signature(**{name: given[name] for name in wanted})
    found = {name: tensor.numpy() for name, tensor in found.items()}
    if "pixels" in found:
        found["pixels"] = found["pixels"].astype(np.float32) / np.float32(127.5) - 1
    if (mask := found.pop("mask", None)) is not None:
        found["image_tokens"] = np.where(mask[..., None], found["image_tokens"], 0)
    return found


# Names of the arguments, and the function of them.
_Graph = tuple[tuple[str, ...], Callable[..., dict[str, Any]]]


def _image_graphs(module: Any, params: Mapping[str, Any], config: ModelConfig) -> dict[str, _Graph]:
    import tensorflow as tf

    size_px, resample = config.image.image_size, config.image.pixels.resample
    embed, weights = towers(params, config)[0]
    run = _lower(module, "image_weights", embed, weights, batches={"b": tf.TensorSpec((None, *size_px, 3), tf.uint8)})

    @_of(_inputs(config)["images"])
    def pixels(images: tf.Tensor) -> tf.Tensor:
        shape = tf.TensorSpec((*size_px, 3), tf.uint8)
        return tf.map_fn(lambda data: tf_pixels.pixels(data, size_px, resample), images, fn_output_signature=shape)

    graphs: dict[str, _Graph] = {
        "pixels": (("images",), lambda images: {"pixels": pixels(images)}),
        "image_tokens": (("images",), lambda images: {"image_tokens": run(pixels(images))["image_tokens"]}),
    }
    if config.embedding_dims[0] is not None:
        graphs["embed_images"] = ("images",), lambda images: {"image_embedding": run(pixels(images))["image_embedding"]}
    graphs["serving_default"] = ("images",), lambda images: run(pixels(images))
    return graphs


def _patch_graphs(module: Any, params: Mapping[str, Any], config: ModelConfig) -> dict[str, _Graph]:
    embed, weights = towers(params, config)[0]
    embed_patches = lambda params, *arrays: embed(params, Patches(*arrays))  # noqa: E731
    inputs = _inputs(config)
    names, batches = Patches._fields, {"b, n": inputs["patches"], "b": inputs["grid"]}
    run = _lower(module, "image_weights", embed_patches, weights, batches=batches)

    def only(*outputs: str) -> Callable[..., dict[str, Any]]:
        return lambda *patches: {name: tensor for name, tensor in run(*patches).items() if name in outputs}

    graphs: dict[str, _Graph] = {"image_tokens": (names, only("image_tokens", "mask")), "serving_default": (names, run)}
    if config.embedding_dims[0] is not None:
        graphs["embed_images"] = names, only("image_embedding")
    return graphs


def _text_graphs(module: Any, params: Mapping[str, Any], config: ModelConfig, *, pieces: bytes) -> dict[str, _Graph]:
    import tensorflow as tf
    import tensorflow_text as tf_text

    embed, weights = towers(params, config)[1]
    eos = read_sentencepiece(pieces, source="the tokenizer").trainer_spec.eos_id
    module.sentencepiece = tf_text.SentencepieceTokenizer(model=pieces, out_type=tf.int32)

    run = _lower(
        module, "text_weights", embed, weights, batches={"k": tf.TensorSpec((None, config.text.length), tf.int32)}
    )

    @_of(_inputs(config)["texts"])
    def tokens(texts: tf.Tensor) -> tf.Tensor:
        return tf_tokens.tokens(texts, module.sentencepiece, config.text, eos=eos)

    return {
        "tokens": (("texts",), lambda texts: {"tokens": tokens(texts)}),
        "embed_texts": (("texts",), lambda texts: run(tokens(texts))),
    }


def _default(module: Any, params: Mapping[str, Any], config: ModelConfig, graphs: Mapping[str, _Graph]) -> _Graph:
    """Pairs of images and texts if both have embeddings, else the outputs of the image tower."""
    import tensorflow as tf

    if not {"embed_images", "embed_texts"} <= graphs.keys():
        return graphs["serving_default"]
    (names, embed_images), (_, embed_texts) = graphs["embed_images"], graphs["embed_texts"]

    def compare(scalars: Any, zimg: jax.Array, ztxt: jax.Array) -> dict[str, jax.Array]:
        t, b = (scalars[name].reshape(1, 1) for name in "tb")
        logits = jnp.exp(t) * (zimg @ ztxt.T) + b
        return {"logits": logits, "probabilities": jax.nn.sigmoid(logits)}

    scalars = {name: params[name] for name in ("t", "b")}
    batches = {
        axis: tf.TensorSpec((None, width), tf.float32) for axis, width in zip("bk", config.embedding_dims, strict=True)
    }
    run = _lower(module, "scalars", compare, scalars, batches=batches)

    def pairs(*inputs: Any) -> dict[str, Any]:
        *images, texts = inputs
        found = embed_images(*images) | embed_texts(texts)
        return found | run(found["image_embedding"], found["text_embedding"])

    return (*names, "texts"), pairs


def _inputs(config: ModelConfig) -> dict[str, Any]:
    """What the signatures take, by name."""
    import tensorflow as tf

    found = {name: tf.TensorSpec([None], tf.string, name) for name in ("images", "texts")}
    found["patches"] = tf.TensorSpec([None, None, math.prod(config.image.patch) * 3], tf.float32, "patches")
    return found | {"grid": tf.TensorSpec([None, 2], tf.int32, "grid")}


def _of(*inputs: Any) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function of such tensors a function of the graph: stored once, however often it is called."""
    import tensorflow as tf

    return lambda function: tf.function(function, autograph=False, input_signature=inputs)


def _lower(
    module: Any, name: str, function: Callable[..., Any], weights: Any, *, batches: Mapping[str, Any]
) -> Callable[..., dict[str, Any]]:
    """A function of weights and batches as one of TensorFlow batches; the weights become variables of the module.

    batches: the names of each one's first axes, which may have any size -> its TensorSpec.
    """
    import tensorflow as tf
    from jax.experimental import jax2tf

    variables = jax.tree.map(lambda leaf: tf.Variable(np.asarray(leaf, np.float32), trainable=False), weights)
    setattr(module, name, jax.tree.leaves(variables))
    converted = jax2tf.convert(
        function,
        polymorphic_shapes=[None, *(f"({axis}, ...)" for axis in batches)],
        native_serialization_platforms=PLATFORMS,
        with_gradient=False,
    )
    return tf.function(
        lambda *arrays: converted(variables, *arrays), autograph=False, input_signature=list(batches.values())
    )


def _tensorflow() -> Any:
    """TensorFlow and its text ops, on the CPU: an export needs no accelerator, and jax may have taken it."""
    import tensorflow as tf
    import tensorflow_text  # noqa: F401

    with contextlib.suppress(RuntimeError):  # TensorFlow is running already and has taken its devices.
        tf.config.set_visible_devices([], "GPU")
    return tf


_CONTRACT = (
    "- all of it happens inside the graph: it takes encoded files (JPEG, PNG, WebP, GIF's first frame, 24-bit BMP; EXIF turned "
    "but in WebP, transparency over white but in GIF) and raw UTF-8 texts; a damaged file is an InvalidArgumentError",
)
_PATCH_CONTRACT = (
    "- patches and grids go in, as they are described above: a NaFlex model's images have no one size that a graph could make; "
    "texts are raw UTF-8, and are tokenized inside",
)
_IMAGES = """
import tensorflow as tf

model = tf.saved_model.load(".")
image = tf.io.encode_png(tf.zeros((480, 640, 3), tf.uint8))
print(model.signatures["image_tokens"](images=tf.stack([image]))["image_tokens"].shape)
"""
_TEXTS = """
outputs = model.signatures["serving_default"](images=tf.stack([image]), texts=tf.constant(["a red wall", "two cats"]))
print(outputs["probabilities"].numpy())
"""


_PATCHES = """
import tensorflow as tf

model = tf.saved_model.load(".")
images = {"patches": tf.zeros((1, 128, PATCH)), "grid": tf.constant([[8, 16]])}
print(model.signatures["image_tokens"](**images)["image_tokens"].shape)
"""


def _example(config: ModelConfig, has_tokenizer: bool) -> str:
    naflex = config.image.naflex is not None
    images = _PATCHES if naflex else _IMAGES
    if config.text is None:
        return in_folder("tensorflow", images)
    texts = _TEXTS.replace("images=tf.stack([image])", "**images") if naflex else _TEXTS
    return in_folder("tensorflow tensorflow-text", f"import tensorflow_text  # for its ops{images}{texts.lstrip()}")


def _outputs(folder: Path, case: Inputs) -> dict[str, np.ndarray]:
    if isinstance(case.images, Patches):
        return outputs(folder, [], case.texts, patches=case.images)
    return outputs(folder, case.files, case.texts)


EXPORT = ExportFormat(
    library="tensorflow",
    write=lambda folder, params, config, *, tokenizer, layout: write(folder, params, config, tokenizer=tokenizer),
    example=_example,
    outputs=lambda folder, cases: [_outputs(folder, case) for case in cases],
    contract=lambda config, has_tokenizer: _CONTRACT if config.image.naflex is None else _PATCH_CONTRACT,
    takes_files=True,
)
