"""`siglip train`: recipe file and flags -> config, loader and evaluations -> the loop."""

import logging
from pathlib import Path

from data_pipelines.loader import make_loader
from data_pipelines.tokenizers import SentencePieceTokenizer
from siglip.cli import describe
from siglip.cli.arguments import parse
from siglip.cli.evaluation import Tower, check_task, evaluate_task
from siglip.cli.frozen_images import make_prepare
from siglip.errors import UserError
from siglip.parallel import collectives, launch, sharding
from siglip.parallel.peers import Alone
from siglip.training.config import TrainConfig, load_config_file, resolve
from siglip.training.loop import Evaluate, train
from siglip.training.step import make_embed_fns

logger = logging.getLogger(__name__)

USAGE = """usage: siglip train CONFIG [flags]

CONFIG is a Python file with `def get_config() -> TrainConfig`, such as configs/quickstart.py.
`siglip train CONFIG --help` lists every field of that config as a flag.
`--init.src SRC` starts from a trained model: a run, a checkpoint in it, FILE.npz, or a Hugging Face folder.
The same command in the same workdir goes on where it stopped. On several hosts, start it on each (launch/)."""


def train_command(args: list[str]) -> None:
    """Parses and trains."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return
    config = parse(TrainConfig, args[1:], prog=f"siglip train {args[0]}", default=load_config_file(args[0]))
    with launch.joined(config.distributed, describe=describe) as peers:
        _train(config, peers)


def _train(config: TrainConfig, peers: Alone) -> None:
    config = resolve(config)
    tokenizer = load_tokenizer(config.data.tokenizer, vocab_size=config.model.text.vocab_size)
    sharding.check_batch_size(config.batch_size, sharding.make_mesh(config.mesh))
    loader = make_loader(
        config.data,
        batch_size=config.batch_size,
        image_size=config.model.image.image_size,
        text_length=config.model.text.length,
        seed=config.seed,
        process_index=peers.index,
        process_count=peers.count,
    )
    train(
        config,
        loader,
        prepare=make_prepare(config, loader, peers) if config.data.image_embeddings else None,
        evaluate=make_evaluate(config, tokenizer, peers) if config.eval.tasks else None,
        tokenizer=Path(config.data.tokenizer).read_bytes(),
        peers=peers,
    )


def load_tokenizer(path: str, *, vocab_size: int) -> SentencePieceTokenizer:
    """Raises ValueError when its ids do not fit a text tower of `vocab_size`."""
    tokenizer = SentencePieceTokenizer(path)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"tokenizer {path} has {tokenizer.vocab_size} pieces, but model.text.vocab_size={vocab_size}; "
            f"use --model.text.vocab-size {tokenizer.vocab_size} or another tokenizer"
        )
    if tokenizer.vocab_size < vocab_size:
        logger.warning(
            "tokenizer %s has %d pieces, model.text.vocab_size=%d: %d token embeddings will never be trained",
            path, tokenizer.vocab_size, vocab_size, vocab_size - tokenizer.vocab_size,
        )  # fmt: skip
    return tokenizer


def make_evaluate(config: TrainConfig, tokenizer: SentencePieceTokenizer, peers: Alone) -> Evaluate:
    """All of the config's evaluation tasks as one function of the parameters.

    Their files are opened now: a missing one must not wait for the end of training to be found.
    """
    for task in config.eval.tasks:
        check_task(task)
    fns = make_embed_fns(config.model)
    mesh = sharding.make_mesh(config.mesh)
    batch_size = -(-config.eval.batch_size // mesh.size) * mesh.size

    def evaluate(params):
        def images(rows):
            return collectives.own_rows(fns.images(params, sharding.put_batch({"image": rows}, mesh)["image"]), mesh)

        def texts(rows):
            return collectives.own_rows(fns.texts(params, sharding.put_batch({"text": rows}, mesh)["text"]), mesh)

        tower = Tower(
            images=images,
            texts=texts,
            tokenizer=tokenizer,
            image_size=config.model.image.image_size,
            text_length=config.model.text.length,
            batch_size=batch_size // peers.count,
            process_index=peers.index,
            process_count=peers.count,
        )
        results = [result for task in config.eval.tasks for result in evaluate_task(task, tower)]
        return {
            f"eval/{result.task}/{result.dataset}/{name}": value
            for result in results
            for name, value in result.metrics.items()
        }

    return evaluate
