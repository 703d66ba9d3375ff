"""The program that a run compiles: learning, resuming bit for bit, meshes, frozen parameters, the running average."""

import dataclasses
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from siglip import trees
from siglip.evaluation.retrieval import Retrieval
from siglip.evaluation.suite import EvalConfig
from siglip.parallel.sharding import MeshConfig, put_batch
from siglip.training.loop import Interrupted, make_program, train
from siglip.training.objective import LossConfig
from siglip.training.optim import OptimConfig
from siglip.workdir.checkpoint import read_run_params
from siglip.workdir.metrics import LogConfig, read_metrics
from tests.siglip.tiny_run import StopsAt, TinyBatches, assert_bit_equal, tiny_config, use_devices

FSDP = MeshConfig(fsdp=4, fsdp_min_size_bytes=1024)
OPTIM = {"lr": 1e-2, "warmup_steps": 3}


@pytest.fixture(autouse=True)
def two_devices(monkeypatch):
    """Two devices show all that eight would, in a fraction of the time."""
    use_devices(monkeypatch, 2)


def config_of(workdir, **optim):
    log = LogConfig(every_steps=1, progress=False)
    return tiny_config(workdir, total_steps=30, optim=OptimConfig(**OPTIM, **optim), log=log)


@pytest.fixture(scope="module")
def program():
    """Of `config_of`, traced once."""
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, 2)
        return make_program(config_of("unused"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, program):
    """(workdir, final state, batches) of a run that nothing interrupted."""
    workdir, batches = tmp_path_factory.mktemp("run"), TinyBatches()
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, 2)
        state = train(config_of(workdir), batches, program=program)
    return workdir, state, batches


def test_the_loss_falls_and_metrics_are_written(run):
    lines = read_metrics(run[0])
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert lines[-1]["train/loss"] < 0.7 * lines[0]["train/loss"]
    for name in ("train/temperature", "train/bias", "train/pairs_per_s", "train/data_wait", "train/grad_norm"):
        assert np.isfinite(lines[-1][name])
    # t and b are logged before the update of their step: at step 2 the warm-up's first update, which is zero, is all there was.
    assert lines[1]["train/temperature"] == pytest.approx(10, rel=1e-6) and lines[1]["train/bias"] == -10


def test_stopped_and_resumed_is_bit_equal_to_uninterrupted(run, program, tmp_path):
    _, expected, whole = run
    first, second = StopsAt(5, signal.SIGTERM), TinyBatches()
    with pytest.raises(Interrupted, match="at step 5, which is saved"):
        train(config_of(tmp_path), first, program=program)
    assert_bit_equal(train(config_of(tmp_path), second, program=program), expected)
    assert first.seen + second.seen == whole.seen


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_under_fsdp_moments_are_sharded_and_the_step_compiles_once(monkeypatch, name):
    use_devices(monkeypatch, 8)
    config = tiny_config("unused", mesh=FSDP, loss=LossConfig(impl="ring", chunk_size=1))
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, name=name))
    program = make_program(config)
    sharded = {
        leaf.shape for leaf in jax.tree.leaves(program.abstract_state.params) if not leaf.sharding.is_fully_replicated
    }
    moments = [leaf for leaf in jax.tree.leaves(program.abstract_state.opt_state) if leaf.shape in sharded]
    assert sharded and moments and not any(leaf.sharding.is_fully_replicated for leaf in moments)
    with jax.set_mesh(program.mesh):
        state = program.init({})
        batch = {name: rows for name, rows in next(TinyBatches()).items() if name != "key"}
        for _ in range(3):
            state, _ = program.step(state, put_batch(batch, program.mesh))
    assert program.step._cache_size() == 1
    for leaf, like in zip(jax.tree.leaves(state), jax.tree.leaves(program.abstract_state), strict=True):
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    """Parameters after a run."""
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, 1)
        return jax.device_get(train(tiny_config(tmp_path_factory.mktemp("one")), TinyBatches()).params)


@pytest.mark.slow  # of single steps: test_sharding.py and test_accumulation.py
@pytest.mark.parametrize(
    "mesh, impl",
    [
        (MeshConfig(), "all_gather"),
        (FSDP, "ring"),
        (MeshConfig(), "ring"),
        (FSDP, "all_gather"),
    ],
)
def test_any_mesh_and_loss_gives_the_same_run(tmp_path, mesh, impl, monkeypatch, on_one_device):
    use_devices(monkeypatch, 8)
    config = tiny_config(tmp_path, mesh=mesh, loss=LossConfig(impl=impl, chunk_size=1))
    actual = train(config, TinyBatches())
    # Sums over devices are added in another order; Adam divides by the root of small second moments. The bias of a key
    # shifts all logits of a query alike: its gradient is zero but for rounding, which Adam makes as large as any other.
    for path, leaf in trees.flatten(on_one_device).items():
        if path.endswith("key/bias"):
            continue
        np.testing.assert_allclose(trees.flatten(actual.params)[path], leaf, rtol=0, atol=2e-5, err_msg=path)


def test_softmax_frozen_parameters_and_a_running_average_that_is_evaluated_saved_and_resumed(tmp_path):
    evaluations = EvalConfig(tasks=(Retrieval("unused.tar", name="toy"),))
    config = dataclasses.replace(config_of(tmp_path, lr_mults=(("img/.*", 0.0),), ema=0.5), loss=LossConfig("softmax"))
    config = dataclasses.replace(config, eval=evaluations)
    program, seen = make_program(config), []
    start = jax.device_get(trees.flatten(program.init({}).params))
    with pytest.raises(Interrupted):
        train(config, StopsAt(5, signal.SIGTERM), program=program)
    evaluate = lambda params, due: seen.append(np.asarray(params["t"])[0]) or {}  # noqa: E731
    state = train(config, TinyBatches(), evaluate=evaluate, program=program)
    lines = [line for line in read_metrics(tmp_path) if "train/loss" in line]
    assert lines[-1]["train/loss"] < 0.8 * lines[0]["train/loss"]
    assert {line["train/bias"] for line in lines} == {-10.0}
    for path, leaf in trees.flatten(state.params).items():
        moved = np.any(np.asarray(leaf) != start[path])
        assert moved != (path.startswith("img/") or path == "b"), path  # softmax has no use for the bias
    exported, _, _ = read_run_params(tmp_path)
    assert_bit_equal(exported, state.ema)
    assert np.any(exported["t"] != np.asarray(state.params["t"])) and seen == [exported["t"][0]]
    # decay min(0.5, (1 + step) / (10 + step)), by hand from t, which is logged before every update
    logged = [np.log(line["train/temperature"]) for line in lines]
    assert [line["step"] for line in lines] == list(range(1, 31))
    average = logged[0]
    for step, t in enumerate([*logged[1:], np.float64(state.params["t"])[0]]):
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * t
    assert exported["t"][0] == pytest.approx(average, abs=1e-6)


def test_the_loop_reads_from_the_device_only_to_log(tmp_path, monkeypatch, program):
    reads = []
    array = type(jnp.zeros(()))
    value = array.__array__
    # The guard sees accelerators; on a CPU, whose memory is the host's, only the array itself knows that it was read.
    monkeypatch.setattr(
        array, "__array__", lambda self, *args, **kwargs: reads.append(self.shape) or value(self, *args, **kwargs)
    )
    at_batch = []

    class Watched(TinyBatches):
        def __next__(self):
            at_batch.append(len(reads))
            return super().__next__()

    config = dataclasses.replace(config_of(tmp_path), log=LogConfig(every_steps=2, progress=False))
    with jax.set_mesh(program.mesh), jax.transfer_guard_device_to_host("disallow_explicit"):
        state = program.init({})
        batch = {name: rows for name, rows in next(TinyBatches()).items() if name != "key"}
        for _ in range(2):
            state, _ = program.step(state, put_batch(batch, program.mesh))
    assert not reads
    with jax.transfer_guard_device_to_host("disallow"):
        train(config, Watched(), program=program)
    per_step = np.diff([*at_batch, len(reads)])
    assert not np.any(per_step[::2]) and np.all(per_step[1:-1:2])
