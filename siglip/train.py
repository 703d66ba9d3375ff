"""The training loop, top to bottom.

    restore or init -> [next batch -> step -> log? evaluate? checkpoint?] until total_steps, a signal, or a non-finite loss

The device is waited for only when logging, so losses are looked at in groups; the keys of every batch in the group are kept
until then. A non-finite loss stops the run before anything of it is saved.

The trap: the loader runs ahead of training. Its position is asked for after `next`, when it has counted exactly the batches
that were handed out, and saved together with the state those batches made.
"""

import json
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import optax

from siglip import optim, sharding
from siglip.checkpoint import TOKENIZER_FILE, Checkpointer, open_workdir, write_atomically
from siglip.config import TrainConfig, to_json
from siglip.metrics import MetricsWriter, Progress, Throughput, read_metrics
from siglip.models.two_tower import param_shapes
from siglip.signals import Interrupted, SignalFlag
from siglip.step import TrainState, init_state, make_train_step, state_like

BAD_BATCH_FILE = "non_finite_batch.json"

logger = logging.getLogger(__name__)

# Called with the parameters; returns {"eval/<task>/<name>/<metric>": value}.
Evaluate = Callable[[Mapping[str, Any]], Mapping[str, float]]


@runtime_checkable
class Batches(Protocol):
    """What the loop needs of a data pipeline; data_pipelines.loader.Loader is one.

    `counts` are the substitutions so far, by reason; they are part of `state`.
    """

    counts: Mapping[str, int]

    def __next__(self) -> Mapping[str, Any]: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class NonFiniteLoss(RuntimeError):
    """The run diverged; the message names the step and where the batch's keys are."""


class _Pending(NamedTuple):
    """One step whose loss has not been looked at."""

    step: int
    metrics: Mapping[str, jax.Array]
    keys: list[str]


def train(
    config: TrainConfig,
    batches: Batches,
    *,
    evaluate: Evaluate | None = None,
    tokenizer: bytes | None = None,
) -> TrainState:
    """Trains until `config.total_steps`, going on from the workdir's newest checkpoint if there is one.

    Args:
        batches: this process's share of each batch: image uint8 [bl, h, w, 3], text int32 [bl, l], key list[str].
        evaluate: run every `config.eval.every_steps` and at the end.
        tokenizer: content of the SentencePiece model, kept in the workdir for evaluation and export.

    Returns:
        The final state.

    Raises:
        ValueError: for settings that do not fit each other, the devices or the workdir.
        NonFiniteLoss: the last good checkpoint is intact.
        Interrupted: after SIGTERM or SIGINT; the state is saved.
    """
    mesh = sharding.make_mesh(config.mesh)
    program = _build(config, mesh)
    workdir = _open(config, tokenizer)
    with jax.set_mesh(mesh), SignalFlag() as signals:
        checkpointer = Checkpointer(workdir, config.checkpoint)
        state, start_step = _restore_or_init(config, program, checkpointer, batches)
        run = _Run(config, batches, checkpointer, evaluate, workdir, start_step)
        try:
            run.make_up_for_a_missed_evaluation(start_step, state)
            for step in range(start_step + 1, config.total_steps + 1):
                try:
                    with run.throughput.waiting_for_data():
                        batch = dict(next(batches))
                except Exception:
                    # A terminal sends Ctrl-C to data workers too: their death is then no failure of the run.
                    if signals.received is None:
                        raise
                    run.save(step - 1, state)
                    raise Interrupted(signals.received, step - 1, workdir) from None
                keys = list(batch.pop("key", ()))
                state, metrics = program.step(state, sharding.put_batch(batch, mesh))
                stop = signals.received
                run.after_step(step, state, metrics, keys, stop=stop is not None)
                if stop is not None:
                    raise Interrupted(stop, step, workdir)
        finally:
            run.close()
    return state


class _Program(NamedTuple):
    """The optimizer, the state's shapes and layout, and the jitted step."""

    optimizer: optax.GradientTransformation
    like: TrainState
    step: Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]


def _build(config: TrainConfig, mesh: jax.sharding.Mesh) -> _Program:
    sharding.check_batch_size(config.batch_size, mesh)
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
    return _Program(optimizer, like, step)


def _open(config: TrainConfig, tokenizer: bytes | None) -> Path:
    """The workdir, with config.json and tokenizer in it, or an error if it belongs to another run."""
    workdir = Path(config.workdir)
    path = workdir / TOKENIZER_FILE
    if tokenizer is not None and path.exists() and path.read_bytes() != tokenizer:
        raise ValueError(
            f"workdir {workdir} was trained with another tokenizer than {config.data.tokenizer}; "
            f"use --data.tokenizer {path}, or another --workdir"
        )
    open_workdir(workdir, to_json(config))
    if tokenizer is not None and not path.exists():
        write_atomically(path, tokenizer)
    return workdir


def _restore_or_init(
    config: TrainConfig, program: _Program, checkpointer: Checkpointer, batches: Batches
) -> tuple[TrainState, int]:
    step = checkpointer.latest_step()
    if step is None:
        return init_state(config.model, program.optimizer, like=program.like, seed=config.seed), 0
    state, data_state = checkpointer.restore(step, program.like)
    batches.restore(data_state)
    finished = step == config.total_steps
    logger.info("%s step %d of %s", "nothing to do after" if finished else "going on from", step, config.workdir)
    return state, step


class _Run:
    """What happens beside the step itself: looking at losses, logging, evaluating, saving."""

    def __init__(
        self,
        config: TrainConfig,
        batches: Batches,
        checkpointer: Checkpointer,
        evaluate: Evaluate | None,
        workdir: Path,
        start_step: int,
    ) -> None:
        self._config, self._batches, self._checkpointer = config, batches, checkpointer
        self._evaluate, self._workdir = evaluate, workdir
        self._writer = MetricsWriter(workdir, config.log, run_config=to_json(config), start_step=start_step)
        self._progress = Progress(config.total_steps, start_step=start_step, enabled=config.log.progress)
        self._pending: list[_Pending] = []
        self._first_step = start_step + 1
        self._best = checkpointer.best_value()
        self.throughput = Throughput(config.batch_size)

    def after_step(
        self, step: int, state: TrainState, metrics: Mapping[str, jax.Array], keys: list[str], *, stop: bool
    ) -> None:
        """Everything that is due after `step`; `stop`: save now, there will be no other step."""
        config, last = self._config, step == self._config.total_steps
        self._pending.append(_Pending(step, metrics, keys))
        if step == self._first_step:
            jax.block_until_ready(metrics)
            self._progress.begin(step)
            self.throughput.restart()  # it compiled
        else:
            self.throughput.step()
        eval_due = self._eval_due(step) and not stop
        save_due = last or stop or _due(step, config.checkpoint.every_steps)
        if last or stop or _due(step, config.log.every_steps):
            self._log(step)
        elif eval_due or save_due:
            self._check_losses()
        best = None
        if eval_due:
            try:
                best = self._run_evaluation(step, state)
            except BaseException:
                self.save(step, state)  # what was trained must outlive a broken evaluation
                raise
        if save_due or best is not None:
            self.save(step, state, best=best)

    def make_up_for_a_missed_evaluation(self, step: int, state: TrainState) -> None:
        """Evaluates the restored state when that was due but the run was stopped before."""
        if step == 0 or not self._eval_due(step):
            return
        lines = read_metrics(self._workdir)
        if not any(line["step"] == step and any(name.startswith("eval/") for name in line) for line in lines):
            self._run_evaluation(step, state)

    def save(self, step: int, state: TrainState, *, best: float | None = None) -> None:
        """Starts a checkpoint of `step`, unless there is one; raises NonFiniteLoss instead of saving a bad state."""
        self._check_losses()
        self._checkpointer.save(
            step, state, data_state=self._batches.state(), config=to_json(self._config), best_metric=best
        )
        self.throughput.restart()

    def close(self) -> None:
        """Lets the last checkpoint finish, whatever happened."""
        self._progress.close()
        self._writer.close()
        self._batches.close()
        self._checkpointer.close()

    def _eval_due(self, step: int) -> bool:
        config = self._config
        return self._evaluate is not None and (step == config.total_steps or _due(step, config.eval.every_steps))

    def _log(self, step: int) -> None:
        values = self._check_losses()
        values |= self.throughput.read()
        values |= {f"train/substituted/{reason}": n for reason, n in sorted(self._batches.counts.items())}
        self._writer.write(step, values)
        self._progress.update(step, values)

    def _check_losses(self) -> dict[str, float]:
        """Waits for the pending steps and returns the last one's metrics; raises NonFiniteLoss at the first bad one."""
        pending, self._pending = jax.device_get(self._pending), []
        for step, metrics, keys in pending:
            # A finite loss can have a gradient that is not: the parameters are ruined one step before the loss is.
            if not (math.isfinite(metrics["train/loss"]) and math.isfinite(metrics["train/update_norm"])):
                path = self._workdir / BAD_BATCH_FILE
                write_atomically(
                    path, json.dumps({"step": step, "loss": repr(metrics["train/loss"].item()), "keys": keys})
                )
                saved = self._checkpointer.latest_step()
                raise NonFiniteLoss(
                    f"loss is {metrics['train/loss']}, norm of the update {metrics['train/update_norm']} at step {step}; "
                    f"the keys of its batch are in {path}; "
                    f"the last good checkpoint is {'none' if saved is None else f'step {saved}'}; "
                    f"lower optim.lr, lengthen the warm-up or look at those pairs"
                )
        return {name: float(value) for name, value in pending[-1].metrics.items()} if pending else {}

    def _run_evaluation(self, step: int, state: TrainState) -> float | None:
        """Writes the metrics; the value of `checkpoint.best_metric` if it is a new best, else None."""
        assert self._evaluate is not None
        results = dict(self._evaluate(state.eval_params))
        self._writer.write(step, results)
        self.throughput.restart()
        name = self._config.checkpoint.best_metric
        if name is None:
            return None
        if name not in results:
            warnings.warn(
                f"checkpoint.best_metric={name!r} was not evaluated; there are {sorted(results)}", stacklevel=2
            )
            return None
        if not results[name] > self._best:
            return None
        self._best = results[name]
        return self._best


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
