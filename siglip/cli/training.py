"""`siglip train`: recipe file and flags -> config, loader and evaluations -> the loop."""

import contextlib
import dataclasses
import functools
import logging
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from data_pipelines.loader import make_loader
from data_pipelines.order.lengths import Lengths
from data_pipelines.tokenizers import SentencePieceTokenizer
from siglip.cli import BAD_INPUT, describe
from siglip.cli.arguments import parse
from siglip.cli.evaluation import completed, format_table, make_embedder, settings_of
from siglip.cli.frozen_images import make_prepare
from siglip.errors import UserError
from siglip.evaluation.suite import Task, named_metrics, run_due, task_classes
from siglip.models.two_tower import TextConfig
from siglip.parallel import launch, sharding
from siglip.training.config import TrainConfig, load_config_file, resolve
from siglip.training.lengths import length_shares
from siglip.training.loop import Evaluate, train
from siglip.training.step import TrainState
from siglip.trees import did_you_mean
from siglip.workdir.checkpoint import whole_steps
from siglip.workdir.checksums import checksums

if TYPE_CHECKING:
    from data_pipelines.samples.patches import Patches

logger = logging.getLogger(__name__)
_ADD = "--eval.add"
# Large pages for malloc, where the system gives them to those who ask.
_LARGE_PAGES, _LARGE_PAGES_MODE = "glibc.malloc.hugetlb=1", Path("/sys/kernel/mm/transparent_hugepage/enabled")
Metrics = Mapping[str, float]

USAGE = """usage: siglip train CONFIG [flags]

CONFIG is a Python file with `def get_config() -> TrainConfig`, such as configs/quickstart.py.
`siglip train CONFIG --help` lists every field of that config as a flag.
`--init.src SRC` starts from a trained model: a run, a checkpoint in it, FILE.npz, or a Hugging Face folder.
`--eval.add 'TASK --data DATA …'` adds an evaluation; its flags: `siglip eval --task TASK --help`. It may be given several times.
The same command in the same workdir goes on where it stopped. On several hosts, start it on each (launch/)."""


def train_command(args: list[str]) -> None:
    """Parses and trains."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return
    config = parse_run(args, prog="siglip train")
    with launch.joined(config.distributed, describe=describe, asks_for_signals=True):
        # What only one process finds bad, such as a missing file, must end all of them.
        start_training = launch.in_all_or_none(functools.partial(_prepare, config), bad_input=BAD_INPUT)
        start_training()


def parse_run(args: list[str], *, prog: str) -> TrainConfig:
    """The recipe args[0], changed as the flags after it say.

    Raises:
        FileNotFoundError, UserError: there is no such recipe, or a flag is wrong.
    """
    config, rest, added = load_config_file(args[0]), [], []
    for place, arg in enumerate(args[1:], 1):
        flag, equals, value = arg.partition("=")
        if flag == _ADD:
            added.append(_parse_task(value if equals else "".join(args[place + 1 : place + 2])))
        elif args[place - 1] != _ADD:
            rest.append(arg)
    evals = dataclasses.replace(config.eval, tasks=(*config.eval.tasks, *added))
    return parse(
        TrainConfig,
        rest,
        prog=f"{prog} {args[0]}",
        default=dataclasses.replace(config, eval=evals) if added else config,
    )


def _parse_task(text: str) -> Task:
    """ "retrieval --data DATA --captions txt" as `siglip eval --task retrieval` takes it."""
    try:
        name, *flags = shlex.split(text) or [""]
    except ValueError as error:  # an open quote
        raise UserError(f"{_ADD} {text!r}: {error}") from None
    classes = task_classes()
    if name not in classes:
        hint = did_you_mean(name, classes) or f"; there are {', '.join(classes)}"
        raise UserError(f"{_ADD} {text!r}: begin with the name of a task{hint}")
    return parse(classes[name], flags, prog=f"{_ADD} {name}")


def _prepare(config: TrainConfig) -> Callable[[], None]:
    """Opens everything that training reads; returns the function that trains."""
    config = resolve(config)
    length_shares(config)  # raises on lengths that the tower does not take
    image, text = config.model.image, config.model.text
    has_table = config.init.src is not None or bool(whole_steps(Path(config.workdir)))
    tokenizer = load_tokenizer(config.data.tokenizer, text, may_be_smaller=has_table)
    sharding.check_batch_size(config.batch_size, sharding.make_mesh(config.mesh))
    loader = make_loader(
        config.data,
        batch_size=config.batch_size,
        image_size=image.image_size,
        text_length=text.length,
        seed=config.seed,
        tokens=vars(text.tokens),
        resample=image.pixels.resample,
        patches=make_patches(config),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    _advise_large_pages()
    newest: dict[str, Metrics] = {}
    start = functools.partial(
        train,
        config,
        loader,
        prepare=make_prepare(config, loader) if config.data.image_embeddings else None,
        evaluate=make_evaluate(config, tokenizer, newest) if config.eval.tasks else None,
        tokenizer=Path(config.data.tokenizer).read_bytes(),
    )
    return functools.partial(_train_and_tell, start, newest)


def _advise_large_pages() -> None:
    """XLA gives a step's memory back to the system after each one; on a CPU, faulting it in again is a quarter of the time."""
    if jax.default_backend() != "cpu" or "hugetlb" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    with contextlib.suppress(OSError):  # no Linux, or a sandbox
        if "[madvise]" in _LARGE_PAGES_MODE.read_text():
            logger.info("a step on this CPU is up to a quarter faster with GLIBC_TUNABLES=%s", _LARGE_PAGES)


def _train_and_tell(start: Callable[[], TrainState], newest: Mapping[str, Metrics]) -> None:
    start()
    if newest and jax.process_index() == 0:
        print(format_table(newest))


def make_patches(config: TrainConfig) -> "Patches | None":
    """What becomes of an image for a NaFlex tower; None for one that takes images of one size."""
    from data_pipelines.samples.patches import Patches  # it imports Pillow

    image, data = config.model.image, config.data
    if image.naflex is None:
        return None
    lengths = data.lengths and Lengths.of(data.lengths, total_steps=config.total_steps, seed=config.seed)
    options = {"augment": data.augment, "resample": image.pixels.resample}
    return Patches(image.patch, image.naflex.patches, lengths=lengths, square_px=image.image_size, **options)


def load_tokenizer(path: str, text: TextConfig, *, may_be_smaller: bool) -> SentencePieceTokenizer:
    """Raises UserError when its ids do not fit the text tower.

    Args:
        may_be_smaller: than the vocabulary, as of published models whose table of embeddings is padded, and of runs that were
            started so.
    """
    tokenizer, vocab_size = SentencePieceTokenizer(path, **vars(text.tokens)), text.vocab_size
    if tokenizer.vocab_size > vocab_size or (tokenizer.vocab_size < vocab_size and not may_be_smaller):
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


def make_evaluate(config: TrainConfig, tokenizer: SentencePieceTokenizer, newest: dict[str, Metrics]) -> Evaluate:
    """The config's evaluation tasks as one function of the parameters and what is due; `newest` then holds each one's metrics.

    Their files are opened now: a missing one must not wait for the end of training to be found.
    """
    tasks = [completed(task) for task in config.eval.tasks]
    mesh, settings = sharding.make_mesh(config.mesh), settings_of(config.eval)
    kept, tower = {}, None

    def evaluate(params, due):
        nonlocal tower
        now = checksums(params["txt"])
        if now != tower:  # a text tower that stands still embeds each text once in the whole run
            kept.clear()
        tower = now
        embedder = make_embedder(params, config.model, mesh=mesh, tokenizer=tokenizer, **settings)
        embedder = dataclasses.replace(embedder, text_embeddings=kept)
        results = run_due(tasks, embedder, due, max_s=config.eval.max_s)
        for one in results:
            newest.pop(name := f"{one.task.task}/{one.dataset}", None)  # the newest comes last
            newest[name] = one.metrics
        return named_metrics(results)

    return evaluate
