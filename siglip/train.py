"""The training loop, top to bottom.

    restore or init -> [next batch -> step -> log? evaluate? checkpoint?] until total_steps, a signal, or a non-finite loss

The device is waited for only when logging (siglip/divergence.py). A non-finite loss stops the run before anything of it is
saved. Several processes run this same loop; what they must not decide differently they ask of each other (siglip/peers.py).

The trap: the loader runs ahead of training. Its position is asked for after `next`, when it has counted exactly the batches
that were handed out, and saved together with the state those batches made.
"""

import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import optax

from siglip import optim, sharding
from siglip.checkpoint import Checkpointer, check_same_run, newest_step, open_workdir
from siglip.config import TrainConfig, to_json
from siglip.divergence import LossWatch, NonFiniteLoss
from siglip.metrics import MetricsWriter, Progress, Throughput, read_metrics
from siglip.models.two_tower import param_shapes
from siglip.peers import Alone
from siglip.signals import Interrupted, SignalFlag
from siglip.step import TrainState, init_state, make_train_step, state_like

_PATIENCE_S = 60

logger = logging.getLogger(__name__)

# Called with the parameters; returns {"eval/<task>/<name>/<metric>": value}.
Evaluate = Callable[[Mapping[str, Any]], Mapping[str, float]]


@runtime_checkable
class Batches(Protocol):
    """What the loop needs of a data pipeline; data_pipelines.loader.Loader is one.

    `counts` are the substitutions so far, by reason; they are part of `state`, where each process counts its own.
    """

    counts: Mapping[str, int]

    def __next__(self) -> Mapping[str, Any]: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


def train(
    config: TrainConfig,
    batches: Batches,
    *,
    evaluate: Evaluate | None = None,
    tokenizer: bytes | None = None,
    peers: Alone | None = None,
) -> TrainState:
    """Trains until `config.total_steps`, going on from the workdir's newest checkpoint if there is one.

    Args:
        batches: this process's share of each batch: image uint8 [bl, h, w, 3], text int32 [bl, l], key list[str].
        evaluate: run every `config.eval.every_steps` and at the end.
        tokenizer: content of the SentencePiece model, kept in the workdir for evaluation and export.
        peers: the other processes (siglip.distributed.joined); None: there are none.

    Returns:
        The final state.

    Raises:
        ValueError: for settings that do not fit each other, the devices or the workdir.
        NonFiniteLoss: the last good checkpoint is intact.
        Interrupted: after SIGTERM or SIGINT; the state is saved.
    """
    peers = Alone() if peers is None else peers
    if jax.process_count() != peers.count:
        raise ValueError(
            f"jax runs on {jax.process_count()} processes; train needs peers=, from siglip.distributed.joined"
        )
    mesh = sharding.make_mesh(config.mesh)
    program = _build(config, mesh)
    check_same_run(peers, config=to_json(config), data_state=batches.state(), tokenizer=tokenizer)
    workdir = Path(config.workdir)
    open_workdir(workdir, to_json(config), tokenizer=tokenizer, peers=peers)
    agreed: Interrupted | NonFiniteLoss | None = None
    with jax.set_mesh(mesh), SignalFlag() as signals:
        checkpointer = Checkpointer(workdir, config.checkpoint)
        peers.on_loss(lambda: f"start the same command again on every host: it goes on from {newest_step(workdir)}")
        state, start_step = _restore_or_init(config, program, checkpointer, batches, peers)
        run = _Run(config, batches, checkpointer, evaluate, workdir, start_step, peers)
        try:
            run.make_up_for_a_missed_evaluation(start_step, state)
            peers.begin(start_step)
            for step in range(start_step + 1, config.total_steps + 1):
                try:
                    with run.throughput.waiting_for_data():
                        batch = dict(next(batches))
                except StopIteration:
                    raise RuntimeError(f"the data ended before step {step} of {config.total_steps}") from None
                except Exception:
                    # A terminal sends Ctrl-C to data workers too: their death is then no failure of the run.
                    if signals.received is None or peers.count > 1:
                        raise
                    run.save(step - 1, state)
                    raise Interrupted(signals.received, step - 1, workdir) from None
                keys = list(batch.pop("key", ()))
                state, metrics = program.step(state, sharding.put_batch(batch, mesh))
                stop = peers.stop_after(step, signals.received)
                run.after_step(step, state, metrics, keys, stop=stop is not None)
                if stop is not None:
                    raise Interrupted(stop, step, workdir)
        except (Interrupted, NonFiniteLoss) as error:
            agreed = error  # the other processes raise it at the same step
        finally:
            run.close()
        peers.finish()
    if agreed is not None:
        raise agreed
    return state


class _Program(NamedTuple):
    """The optimizer, the state's shapes and layout, and the jitted step."""

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
    return _Program(optimizer, like, step)


def _restore_or_init(
    config: TrainConfig, program: _Program, checkpointer: Checkpointer, batches: Batches, peers: Alone
) -> tuple[TrainState, int]:
    step = peers.gather("newest step", checkpointer.latest_step())[0]
    if step is None:
        return init_state(config.model, program.optimizer, like=program.like, seed=config.seed), 0
    state, data_state = checkpointer.restore(step, program.like)
    if "counts" in data_state and not peers.is_first:
        data_state = data_state | {"counts": {}}  # they are everyone's, and process 0 goes on with them
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
        peers: Alone,
    ) -> None:
        self._config, self._batches, self._checkpointer = config, batches, checkpointer
        self._evaluate, self._workdir, self._peers = evaluate, workdir, peers
        first, run_config = peers.is_first, to_json(config)
        self._writer = MetricsWriter(workdir, config.log, run_config=run_config, start_step=start_step, enabled=first)
        self._progress = Progress(config.total_steps, start_step=start_step, enabled=config.log.progress and first)
        self._losses = LossWatch(workdir, peers, saved_step=checkpointer.latest_step)
        self._first_step = start_step + 1
        self._best = peers.gather("best", checkpointer.best_value())[0]
        self.throughput = Throughput(config.batch_size)

    def after_step(
        self, step: int, state: TrainState, metrics: Mapping[str, jax.Array], keys: list[str], *, stop: bool
    ) -> None:
        """Everything that is due after `step`; `stop`: save now, there will be no other step."""
        config, last = self._config, step == self._config.total_steps
        self._losses.add(step, metrics, keys)
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
            self._losses.look()
        best = self._run_evaluation(step, state) if eval_due else None
        if save_due or best is not None:
            self.save(step, state, best=best)

    def make_up_for_a_missed_evaluation(self, step: int, state: TrainState) -> None:
        """Evaluates the restored state when that was due but the run was stopped before."""
        if step == 0 or not self._eval_due(step):
            return
        lines = read_metrics(self._workdir) if self._peers.is_first else []
        missed = not any(line["step"] == step and any(name.startswith("eval/") for name in line) for line in lines)
        if self._peers.gather("missed an evaluation", missed)[0]:
            self._run_evaluation(step, state)

    def save(self, step: int, state: TrainState, *, best: float | None = None) -> None:
        """Starts a checkpoint of `step`, unless there is one; raises NonFiniteLoss instead of saving a bad state."""
        self._losses.look()
        states = self._peers.gather("data position", self._batches.state())
        counts = sum((Counter(state.get("counts")) for state in states), Counter())
        data_state = states[0] | ({"counts": dict(counts)} if "counts" in states[0] else {})
        self._checkpointer.save(step, state, data_state=data_state, config=to_json(self._config), best_metric=best)
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
        values = self._losses.look() | self.throughput.read()
        own = {"counts": dict(self._batches.counts), "data_wait": values.get("train/data_wait", 0.0)}
        everyones = self._peers.gather("log", own)
        counts = sum((Counter(one["counts"]) for one in everyones), Counter())
        values |= {f"train/substituted/{reason}": n for reason, n in sorted(counts.items())}
        if "train/data_wait" in values:
            values["train/data_wait"] = max(one["data_wait"] for one in everyones)  # all wait for the slowest
        self._writer.write(step, values)
        self._progress.update(step, values)

    def _run_evaluation(self, step: int, state: TrainState) -> float | None:
        """Writes the metrics; the value of `checkpoint.best_metric` if it is a new best, else None."""
        assert self._evaluate is not None
        results = self._evaluate_everywhere(step, state)
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

    def _evaluate_everywhere(self, step: int, state: TrainState) -> dict[str, float]:
        """Process 0's results, which all go by; what was trained outlives an evaluation that fails."""
        results, failure = {}, None
        try:
            results = dict(self._evaluate(state.eval_params))
        except BaseException as error:
            failure = error
        own = {"results": results, "failure": None if failure is None else str(failure)}
        try:
            # The others may be waiting for this process inside the evaluation, where they would stay.
            everyones = self._peers.gather("evaluation", own, timeout_s=None if failure is None else _PATIENCE_S)
        except TimeoutError:
            raise failure from None
        failures = [f"process {i}: {one['failure']}" for i, one in enumerate(everyones) if one["failure"] is not None]
        if failures:
            self.save(step, state)
            raise failure or RuntimeError(f"the evaluation failed in {failures[0]}")
        return everyones[0]["results"]


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
