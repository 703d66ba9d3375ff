"""The training loop, top to bottom.

    restore, or init.src, or init -> [next batch -> step -> log? evaluate? checkpoint?]
                                     until total_steps, a signal, or a non-finite loss

Nothing is read from the device except when logging (divergence.py). A non-finite loss stops the run before its state is saved.
Several processes run this same loop; what they must decide alike they ask of each other (siglip/parallel).

The trap: the loader runs ahead of training. Its position is asked for after `next`, when it has counted exactly the batches
that were handed out, and saved together with the state those batches made.
"""

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from siglip.errors import RunFailed
from siglip.models.two_tower import param_shapes
from siglip.parallel import sharding
from siglip.parallel.peers import Alone
from siglip.training import optim, warm_start
from siglip.training.config import BAD_INPUT, TrainConfig, resolve, to_json
from siglip.training.divergence import NonFiniteLoss
from siglip.training.hooks import Batches, Bookkeeping, Evaluate
from siglip.training.signals import Interrupted, SignalFlag
from siglip.training.step import TrainState, init_state, make_train_step, state_like
from siglip.workdir.checkpoint import Checkpointer, has_checkpoint, newest_step
from siglip.workdir.files import check_same_run, open_workdir

logger = logging.getLogger(__name__)

# Called once before the first step, with the step behind it, the parameters, and what tells the number of a signal received.
Prepare = Callable[[int, Mapping[str, Any], Callable[[], int | None]], None]


def train(
    config: TrainConfig,
    batches: Batches,
    *,
    prepare: Prepare | None = None,
    evaluate: Evaluate | None = None,
    tokenizer: bytes | None = None,
    peers: Alone | None = None,
) -> TrainState:
    """Trains until `config.total_steps`, from the workdir's newest checkpoint; without one, from `config.init.src`.

    Args:
        batches: this process's share of each batch: image uint8 [bl, h, w, 3] or zimg float32 [bl, e], text int32 [bl, l],
            key list[str].
        prepare: makes `batches` ready, where that takes the parameters that training starts with.
        evaluate: run every `config.eval.every_steps` and at the end.
        tokenizer: content of the SentencePiece model, kept in the workdir for evaluation and export.
        peers: the other processes (siglip.parallel.launch.joined); None: there are none.

    Returns:
        The final state.

    Raises:
        FileNotFoundError: if there is nothing at `init.src`.
        ValueError: for settings that do not fit each other, the devices, the workdir or `init.src`.
        NonFiniteLoss: the last good checkpoint is intact.
        Interrupted: after SIGTERM or SIGINT; the state is saved.
    """
    peers = Alone() if peers is None else peers
    if jax.process_count() != peers.count:
        raise ValueError(
            f"jax runs on {jax.process_count()} processes; train needs peers=, from siglip.parallel.launch.joined"
        )
    config, workdir = resolve(config), Path(config.workdir)
    mesh = sharding.make_mesh(config.mesh)
    program = _build(config, mesh)
    given = _read_initial(config, tokenizer, peers)
    _agree(config, batches, tokenizer, given, peers)
    agreed: Interrupted | NonFiniteLoss | None = None
    with jax.set_mesh(mesh), SignalFlag() as signals:
        checkpointer = Checkpointer(workdir, config.checkpoint)
        peers.on_loss(lambda: f"start the same command again on every host: it goes on from {newest_step(workdir)}")
        state, start_step = _restore_or_init(config, program, checkpointer, batches, peers, given)
        del given
        book = Bookkeeping(config, batches, checkpointer, evaluate, workdir, start_step, peers)
        try:
            if prepare is not None and start_step < config.total_steps:
                prepare(start_step, state.params, lambda: signals.received)
            state = _steps(config, program, state, start_step, batches, book, signals, peers)
        except (Interrupted, NonFiniteLoss) as error:
            agreed = error  # the other processes raise it at the same step
        except (*BAD_INPUT, OSError) as error:
            # What was good enough to start with is not bad input now: whoever starts failed jobs again is to do so.
            raise RunFailed(str(error)) from error
        finally:
            book.close()
        peers.finish()
    if agreed is not None:
        raise agreed
    return state


def _agree(
    config: TrainConfig, batches: Batches, tokenizer: bytes | None, given: Mapping[str, np.ndarray], peers: Alone
) -> None:
    """All processes start the same run, and the workdir is that run's; raises ValueError or OSError where not."""
    check_same_run(
        peers,
        config=to_json(config),
        data_state=batches.state(),
        tokenizer=tokenizer,
        initial=warm_start.digest(given) if given and peers.count > 1 else None,
    )
    open_workdir(Path(config.workdir), to_json(config), tokenizer=tokenizer, peers=peers)


def _steps(
    config: TrainConfig,
    program: "_Program",
    state: TrainState,
    start_step: int,
    batches: Batches,
    book: Bookkeeping,
    signals: SignalFlag,
    peers: Alone,
) -> TrainState:
    """The loop itself, from the step after `start_step` to the last one."""
    workdir, before = Path(config.workdir), None
    book.make_up_for_a_missed_evaluation(start_step, state)
    peers.begin(start_step)
    for step in range(start_step + 1, config.total_steps + 1):
        try:
            with book.throughput.waiting_for_data():
                batch = dict(next(batches))
        except StopIteration:
            raise RunFailed(f"the data ended before step {step} of {config.total_steps}") from None
        except Exception:
            # A terminal sends Ctrl-C to data workers too: their death is then no failure of the run.
            if signals.received is None or peers.count > 1:
                raise
            book.save(step - 1, state)
            raise Interrupted(signals.received, step - 1, workdir) from None
        keys = list(batch.pop("key", ()))
        state, metrics = program.step(state, sharding.put_batch(batch, program.mesh))
        # The device always has the next step waiting, and never more: every waiting step holds its batch in its memory.
        jax.block_until_ready(before)
        before = metrics
        stop = peers.stop_after(step, signals.received)
        book.after_step(step, state, metrics, keys, stop=stop is not None)
        if stop is not None:
            raise Interrupted(stop, step, workdir)
    return state


class _Program(NamedTuple):
    """The mesh, the optimizer, the state's shapes and layout, and the jitted step."""

    mesh: jax.sharding.Mesh
    optimizer: optax.GradientTransformation
    like: TrainState
    step: Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]


def _build(config: TrainConfig, mesh: jax.sharding.Mesh) -> _Program:
    sharding.check_batch_size(config.batch_size, mesh)
    if config.loss.micro_batch_size is not None:
        sharding.check_micro_batch_size(config.loss.micro_batch_size, config.batch_size, mesh)
    shapes = param_shapes(config.model)
    optimizer = optim.make_optimizer(config.optim, shapes, total_steps=config.total_steps)
    like = state_like(config.model, optimizer, mesh=mesh, mesh_config=config.mesh, ema=config.optim.ema > 0)
    step = make_train_step(
        config.model,
        optimizer,
        optim.make_schedule(config.optim, config.total_steps),
        mesh=mesh,
        loss=config.loss,
        frozen=optim.frozen_mask(config.optim, shapes),
        like=like,
        ema=config.optim.ema,
        seed=config.seed,
    )
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    total = f"{config.total_steps} steps of {config.batch_size} pairs"
    kind = mesh.devices.flat[0].device_kind
    logger.info("%.1f M parameters, %s on %d x %s -> %s", parameters / 1e6, total, mesh.size, kind, config.workdir)
    return _Program(mesh, optimizer, like, step)


def _read_initial(config: TrainConfig, tokenizer: bytes | None, peers: Alone) -> dict[str, np.ndarray]:
    """The parameters of `init.src`, in this process's memory; none where there is a checkpoint to go on from."""
    # Asked in every process, whatever its settings are: whether these agree is found out later.
    goes_on = peers.gather("has a checkpoint", has_checkpoint(Path(config.workdir)))[0]
    if config.init.src is None or goes_on:
        return {}
    return warm_start.read_initial(config.init, config.model, tokenizer=tokenizer)


def _restore_or_init(
    config: TrainConfig,
    program: _Program,
    checkpointer: Checkpointer,
    batches: Batches,
    peers: Alone,
    given: Mapping[str, np.ndarray],
) -> tuple[TrainState, int]:
    step = peers.gather("newest step", checkpointer.latest_step())[0]
    if step is None:
        on_devices = warm_start.put(given, program.like.params)
        return init_state(config.model, program.optimizer, like=program.like, seed=config.seed, given=on_devices), 0
    state, data_state = checkpointer.restore(step, program.like)
    if "counts" in data_state and not peers.is_first:
        data_state = data_state | {"counts": {}}  # they are everyone's, and process 0 goes on with them
    batches.restore(data_state)
    finished = step == config.total_steps
    logger.info("%s step %d of %s", "nothing to do after" if finished else "going on from", step, config.workdir)
    return state, step
