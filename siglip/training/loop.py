"""The training loop, top to bottom.

    restore, or init.src, or init -> [next batch -> step -> log? evaluate? checkpoint?]
                                     until total_steps, a signal, or a non-finite loss

Nothing is read from the device except when logging (divergence.py). A non-finite loss stops the run before its state is saved.
Several processes run this same loop; what they must decide alike they gather first (siglip/parallel/collectives.py).

The trap: the loader runs ahead of training. Its position is asked for after `next`, when it has counted exactly the batches
that were handed out, and saved together with the state those batches made.
"""

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from siglip.errors import BAD_PATH, FailedAlone, RunFailed
from siglip.parallel import sharding
from siglip.parallel.collectives import gather_records
from siglip.parallel.launch import in_all_or_none, is_lost_process, wait_for_all
from siglip.training import flops, optim, warm_start
from siglip.training.config import BAD_INPUT, TrainConfig, from_json, resolve, to_json
from siglip.training.divergence import NonFiniteLoss
from siglip.training.hooks import Batches, Evaluate, RunHooks
from siglip.training.lengths import Step, StepOfLength, compile_lengths, micro_batch_sizes
from siglip.training.objective import all_param_shapes, make_objective
from siglip.training.signals import Interrupted, LeftAlone, SignalFlag, WaitedTooLong
from siglip.training.step import TrainState, make_abstract_state, make_init, make_train_step
from siglip.workdir.checkpoint import Checkpointer, whole_steps
from siglip.workdir.files import CONFIG_FILE, check_same_run, open_workdir, read_config

logger = logging.getLogger(__name__)

_COMPILED_S = 86400  # that the others may take for longer; a process that is lost ends them at once
_NO_DATA_S = 2  # between the moments at which processes find out that no data come: all got the signal together

# Called once before the first step, with the step behind it, the parameters, and SignalFlag.stop_now.
Prepare = Callable[[int, Mapping[str, Any], Callable[[], int | None]], None]


class Program(NamedTuple):
    """What the loop runs. abstract_state: shapes, types and layout of the state; init: some parameters -> a fresh state."""

    mesh: jax.sharding.Mesh
    abstract_state: TrainState
    init: Callable[[Mapping[str, np.ndarray]], TrainState]
    step: Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]


def train(
    config: TrainConfig,
    batches: Batches,
    *,
    prepare: Prepare | None = None,
    evaluate: Evaluate | None = None,
    tokenizer: bytes | None = None,
    program: Program | None = None,
) -> TrainState:
    """Trains until `config.total_steps`, from the workdir's newest checkpoint; without one, from `config.init.src`.

    Args:
        batches: this process's share of each batch: image uint8 [bl, h, w, 3], patches uint8 [bl, n, p] with grid int32 [bl, 2],
            or zimg float32 [bl, e]; text int32 [bl, l], key list[str].
        prepare: makes `batches` ready, where that takes the parameters that training starts with.
        evaluate: run at the steps that `config.eval` says, and at the end.
        tokenizer: content of the SentencePiece model, kept in the workdir for evaluation and export.
        program: what is trained; None: the two towers of `config`.

    Returns:
        The final state.

    Raises:
        FileNotFoundError: if there is nothing at `init.src`.
        UserError: for settings that do not fit each other, the devices, the workdir or `init.src`.
        NonFiniteLoss: the last good checkpoint is intact.
        Interrupted: after SIGTERM, SIGHUP or SIGINT; the state is saved.
        RunFailed: if the data, a disk or another process fails while training.
    """
    config, workdir = resolve(config), Path(config.workdir)
    # What only one process finds bad must end all of them in one line.
    program = in_all_or_none(lambda: program or make_program(config), bad_input=BAD_INPUT)
    try:
        given, settings = _read_initial(config, tokenizer), to_json(config)
        initial = warm_start.digest(given) if given and jax.process_count() > 1 else None
        check_same_run(config=settings, data_state=batches.state(), tokenizer=tokenizer, initial=initial)
        planned = in_all_or_none(lambda: _planned_steps(workdir), bad_input=BAD_INPUT)
        complete = lambda saved: to_json(from_json(saved, where=str(workdir / CONFIG_FILE)))  # noqa: E731
        opened = open_workdir(workdir, settings, tokenizer=tokenizer, complete=complete)
        with opened, jax.set_mesh(program.mesh), SignalFlag() as signals:
            checkpointer = Checkpointer(workdir, config.checkpoint)
            state, start_step = _restore_or_init(config, program, checkpointer, batches, given)
            del given
            if start_step and planned not in (None, config.total_steps):
                _tell_longer(config, planned, start_step)
            if evaluate is not None:
                evaluate = signals.limited_wait()(evaluate)
            frozen = optim.frozen_mask(config.optim, program.abstract_state.params)
            passes = flops.tower_passes(frozen, stored=config.data.image_embeddings is not None)
            with _closing(RunHooks(config, batches, checkpointer, evaluate, start_step, passes=passes)) as hooks:
                if prepare is not None and start_step < config.total_steps:
                    with contextlib.suppress(WaitedTooLong), signals.limited_wait():
                        prepare(start_step, state.params, signals.stop_now)
                return _steps(config, program, state, start_step, batches, hooks, signals)
    except Exception as error:
        if is_lost_process(error):
            raise _failed_alone(workdir, error) from error
        raise


def _failed_alone(workdir: Path, error: Exception) -> FailedAlone:
    steps, reason = whole_steps(workdir), str(error).splitlines()[0]
    where = f"step {steps[-1]} of" if steps else "the beginning, there is no checkpoint yet in"
    advice = f"start the same command again on every host: it goes on from {where} {workdir}"
    return FailedAlone(f"another process of this job is gone ({reason}); {advice}")


@contextlib.contextmanager
def _closing(hooks: RunHooks) -> Iterator[RunHooks]:
    """Closes the hooks after the run; raises RunFailed for what was bad input before the run began."""
    together = False
    try:
        yield hooks
        together = True
    except (Interrupted, NonFiniteLoss):
        together = True  # the other processes raise it at the same step
        raise
    except (*BAD_INPUT, OSError) as error:
        # What was good enough to start with is not bad input now: whoever starts failed jobs again is to do so.
        raise RunFailed(str(error)) from error
    finally:
        hooks.close(together=together or jax.process_count() == 1)


def _steps(
    config: TrainConfig,
    program: Program,
    state: TrainState,
    start_step: int,
    batches: Batches,
    hooks: RunHooks,
    signals: SignalFlag,
) -> TrainState:
    """The loop itself, from the step after `start_step` to the last one."""
    workdir, before = Path(config.workdir), None
    hooks.run_missed_evaluation(start_step, state)
    stop = signals.stop_now() if start_step < config.total_steps else None
    if stop is not None:  # before a program is compiled for a step that nobody waits for
        hooks.save(start_step, state)
        raise Interrupted(stop, start_step, workdir)
    last = start_step if hooks.out_of_patience else config.total_steps
    if start_step < last:
        with signals.nothing_to_save():
            run_step = compile_lengths(program.step, config, program.abstract_state, program.mesh)
    for step in range(start_step + 1, last + 1):
        try:
            with hooks.throughput.waiting_for_data(), signals.limited_wait(of_several=True):
                batch = dict(next(batches))
        except StopIteration:
            raise RunFailed(f"the data ended before step {step} of {config.total_steps}") from None
        except (Exception, WaitedTooLong) as error:
            # A terminal sends Ctrl-C to data workers too: their death is then no failure of the run.
            several = jax.process_count() > 1
            if signals.received is None or (several and not isinstance(error, WaitedTooLong)):
                raise
            if several and not wait_for_all(f"no data for step {step}", timeout_s=_NO_DATA_S):
                saved = max(whole_steps(workdir), default=None)
                raise LeftAlone(signals.received, step, saved, workdir) from None
            hooks.save(step - 1, state)
            raise Interrupted(signals.received, step - 1, workdir) from None
        keys = list(batch.pop("key", ()))
        first = step == start_step + 1
        with signals.nothing_to_save() if first else contextlib.nullcontext():
            on_devices = sharding.put_batch(batch, program.mesh)
            if first and jax.process_count() > 1:
                run_step = _compiled_by_all(run_step, state, on_devices, step)
            state, metrics = run_step(state, on_devices)
            del on_devices
        # The device always has the next step waiting, and never more: every waiting step holds its batch in its memory.
        jax.block_until_ready(before)
        before = metrics
        stop = signals.stop_now()
        hooks.after_step(step, state, metrics, keys, stop=stop is not None)
        if stop is not None:
            raise Interrupted(stop, step, workdir)
        if hooks.out_of_patience:
            break
    if hooks.out_of_patience:
        told = "%s was not higher for %d evaluations: the run ends before its step %d; the best checkpoint is kept"
        logger.info(told, config.checkpoint.best_metric, config.checkpoint.patience, config.total_steps)
    return state


def _compiled_by_all(run_step: Step, state: TrainState, batch: Mapping[str, Any], step: int) -> Step:
    """The program of `step`, once all processes have it.

    Its first collective waits for the others for half a minute, and they may compile for longer: a new host has nothing cached.
    """
    if not isinstance(run_step, StepOfLength):
        run_step = run_step.lower(state, batch).compile()
    wait_for_all(f"compiled for step {step}", timeout_s=_COMPILED_S)
    return run_step


def make_program(config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> Program:
    """The two towers and the optimizer of `config`, on `devices` (default: all of this job).

    Raises:
        UserError: for settings that do not fit each other or the devices.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_batch_size(config.batch_size, mesh)
    if config.loss.micro_batch_size is not None:
        sharding.check_micro_batch_size(config.loss.micro_batch_size, config.batch_size, mesh)
    shapes = all_param_shapes(config.model, config.terms)
    optimizer = optim.make_optimizer(config.optim, shapes, total_steps=config.total_steps)
    options = {"mesh": mesh, "mesh_config": config.mesh, "terms": config.terms, "ema": config.optim.ema > 0}
    abstract_state = make_abstract_state(config.model, optimizer, **options)
    layout = sharding.ParamLayout.of(abstract_state.params)
    objective = make_objective(
        config.model, config.loss, layout=layout, terms=config.terms, total_steps=config.total_steps
    )
    make_step = functools.partial(
        make_train_step,
        objective,
        optimizer,
        optim.make_schedule(config.optim, config.total_steps),
        frozen=optim.frozen_mask(config.optim, shapes),
        abstract_state=abstract_state,
        ema=config.optim.ema,
        seed=config.seed,
    )
    sizes = micro_batch_sizes(config, devices=mesh.size)
    if sizes:
        step = StepOfLength({patches: make_step(micro_batch_size=size) for patches, size in sizes.items()})
    else:
        step = make_step(micro_batch_size=config.loss.micro_batch_size)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    total = f"{config.total_steps} steps of {config.batch_size} pairs"
    kind = mesh.devices.flat[0].device_kind
    logger.info("%.1f M parameters, %s on %d x %s -> %s", parameters / 1e6, total, mesh.size, kind, config.workdir)

    start = make_init(config.model, optimizer, abstract_state=abstract_state, seed=config.seed, terms=config.terms)

    def init(given: Mapping[str, np.ndarray]) -> TrainState:
        return start(warm_start.put(given, abstract_state.params))

    return Program(mesh, abstract_state, init, step)


def _read_initial(config: TrainConfig, tokenizer: bytes | None) -> dict[str, np.ndarray]:
    """The parameters of `init.src`, in this process's memory; none where there is a checkpoint to go on from."""
    # Asked in every process, whatever its settings are: whether these agree is found out later.
    goes_on = gather_records([bool(whole_steps(Path(config.workdir)))])[0]

    def read() -> dict[str, np.ndarray]:
        if config.init.src is None or goes_on:
            return {}
        return warm_start.read_initial(config.init, config.model, tokenizer=tokenizer)

    return in_all_or_none(read, bad_input=(*BAD_INPUT, *BAD_PATH))


def _planned_steps(workdir: Path) -> int | None:
    """The total_steps that a run was last started with; None of a new one."""
    return read_config(workdir).get("total_steps") if (workdir / CONFIG_FILE).is_file() else None


def _tell_longer(config: TrainConfig, planned: int, step: int) -> None:
    old, new = (float(optim.make_schedule(config.optim, total)(step)) for total in (planned, config.total_steps))
    logger.info(
        "total_steps was %d and is %d: from step %d on, the %s schedule is that of the longer run, at %.3g of its peak where it "
        "was at %.3g; the moments are kept", planned, config.total_steps, step, config.optim.schedule, new, old,
    )  # fmt: skip
    if config.data.lengths is not None and config.data.lengths.start:
        before, after = map(config.data.lengths.start_step, (planned, config.total_steps))
        told = "images keep their aspect ratio from step %d on, no longer from step %d on (data.lengths.start=%g)"
        logger.info(told, after + 1, before + 1, config.data.lengths.start)


def _restore_or_init(
    config: TrainConfig,
    program: Program,
    checkpointer: Checkpointer,
    batches: Batches,
    given: Mapping[str, np.ndarray],
) -> tuple[TrainState, int]:
    step = gather_records([checkpointer.latest_step()])[0]
    if step is None:
        return program.init(given), 0
    state, data_state = checkpointer.restore(step, program.abstract_state)
    if "counts" in data_state and jax.process_index() > 0:
        data_state = data_state | {"counts": {}}  # they are everyone's, and process 0 goes on with them
    in_all_or_none(lambda: batches.restore(data_state), bad_input=BAD_INPUT)
    finished = step == config.total_steps
    logger.info("%s step %d of %s", "nothing to do after" if finished else "going on from", step, config.workdir)
    return state, step
