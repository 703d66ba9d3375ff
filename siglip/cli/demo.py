"""`siglip demo`: a collection of images to search in the browser, by text in any language or by another image."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import tyro
from jax.sharding import NamedSharding

from data_pipelines.records import Source
from data_pipelines.sources.opening import Stretch, open_source
from data_pipelines.text_ops import captions_of
from siglip.cli.arguments import parse
from siglip.cli.evaluation import make_embedder
from siglip.encoder import Encoder
from siglip.errors import UserError
from siglip.model_source import read_model
from siglip.parallel import sharding
from siglip.workdir.checkpoint import run_of
from siglip.workdir.files import read_config

logger = logging.getLogger(__name__)

_CAPTION_FIELDS = ("txt", "caption", "text", "captions.en", "captions", "title")
_PUBLISHED_BATCH_PAIRS = 32768
_LOOKED_AT_PAIRS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoArgs:
    """Search a collection of images in the browser.

    Attributes:
        src: a run's workdir, a checkpoint inside it, a big_vision .npz, or a Hugging Face folder.
        data: shards, as for training, or a folder of image files.
        image_column: the column that holds the image; without one it is found.
        captions: the field that is shown below an image ("txt", "captions.de"); found if not given.
        max_images: so many, the first ones, are embedded when the demo starts.
        trained_batch_size: pairs in a training batch of the model; of a run it is known, else 32768, as of published models.
        tokenizer: SentencePiece model, when SRC does not bring one.
        batch_size: images per forward pass.
        max_patches: of an image, for a NaFlex model; without one the model's own number.
        host: address to serve on; "0.0.0.0" lets other machines in.
        port: 0 takes a free one.
    """

    src: tyro.conf.Positional[str]
    data: str
    image_column: str | None = None
    captions: str | None = None
    max_images: int = 20_000
    trained_batch_size: int | None = None
    tokenizer: str | None = None
    batch_size: int = 256
    max_patches: int | None = None
    host: str = "localhost"
    port: int = 8000


def demo_command(args: list[str]) -> None:
    """Embeds the images, then serves the page."""
    options = parse(DemoArgs, args, prog="siglip demo")
    try:
        from siglip.cli.demo_server import serve
    except ModuleNotFoundError as error:
        raise UserError(f"the demo needs the package {error.name}: python -m pip install {error.name}") from None
    if options.max_images < 1:
        raise UserError(f"max_images={options.max_images} must be at least 1")
    if options.trained_batch_size is not None and options.trained_batch_size < 2:
        raise UserError(f"trained_batch_size={options.trained_batch_size} must be at least 2")
    index = make_index(options)
    about = {
        "model": repr(index.model)[len("Encoder(") : -1], "src": options.src, "data": options.data, "images": len(index.keys),
        "prior": index.prior, "batch_size": index.batch_size,
    }  # fmt: skip
    serve(index, about=about, host=options.host, port=options.port, say=lambda line: print(line, flush=True))


def make_index(options: DemoArgs) -> Any:
    """The model and the embedded images.

    Raises:
        FileNotFoundError, UserError: it is not a model with two towers and a tokenizer, or there are no images.
    """
    from siglip.cli.demo_index import DemoIndex

    params, config, own_tokenizer = read_model(options.src)
    tokenizer = options.tokenizer or own_tokenizer
    if config.text is None or tokenizer is None:
        lacks = "text tower" if config.text is None else "tokenizer (name one with --tokenizer FILE)"
        raise UserError(f"{options.src} has no {lacks}, so nothing can be searched by text")
    mesh = sharding.make_mesh(sharding.MeshConfig())
    replicated = jax.device_put(params, NamedSharding(mesh, sharding.P_REPLICATED))
    sizes = {"batch_size": options.batch_size, "max_patches": options.max_patches}
    embedder = make_embedder(replicated, config, mesh=mesh, tokenizer=None, **sizes)
    column = options.image_column
    field = options.captions or _caption_field(open_source(options.data, image=column))
    fields = [field] if field else []
    source = open_source(options.data, image=column, fields=[own.partition(".")[0] for own in fields])
    count = min(len(source), options.max_images)
    if count < len(source):
        logger.info("the first %d of %d images are searched; --max-images takes more", count, len(source))
    found, broken = embedder.embed_batches(*embedder.read(Stretch(source, range(count)), fields), fields)
    if not found.keys:
        raise UserError(f"{options.data} holds no image that can be decoded ({dict(broken)}); check the data")
    captions = [str(own[0]) if own else "" for own in found.values[field]] if field else [""] * len(found.keys)
    model = Encoder(params, config, tokenizer=Path(tokenizer))
    read = lambda row: source[found.index[row]].image  # noqa: E731
    batch = options.trained_batch_size or _trained_batch_size(options.src)
    return DemoIndex(model, read, found.zimg, found.keys, captions, batch, options.max_patches)


def _caption_field(source: Source) -> str | None:
    """The first usual field that one of the first pairs has a caption in."""
    records = [source[n].fields for n in range(min(_LOOKED_AT_PAIRS, len(source)))]
    return next((name for name in _CAPTION_FIELDS if any(captions_of(record, name) for record in records)), None)


def _trained_batch_size(src: str) -> int:
    """Pairs in a batch of the run at `src`; that of published models for anything else."""
    if Path(src).expanduser().is_dir() and (run := run_of(Path(src).expanduser())):
        batch_size = read_config(run[0], fields=("batch_size",))["batch_size"]
        return batch_size if isinstance(batch_size, int) and batch_size > 1 else _PUBLISHED_BATCH_PAIRS
    return _PUBLISHED_BATCH_PAIRS
