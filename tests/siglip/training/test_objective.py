"""A loss term with a head of its own, added from outside: its class would be one file, its head another."""

import dataclasses
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import siglip
from siglip import trees
from siglip.exporting.export import export
from siglip.models.layers import Encoder
from siglip.models.two_tower import param_shapes
from siglip.models.variants import Variant
from siglip.parallel.sharding import MeshConfig, ParamLayout, make_mesh, put_batch
from siglip.training.accumulation import make_value_and_grad
from siglip.training.loop import make_program, train
from siglip.training.objective import LossConfig, Term, all_param_shapes, make_objective
from siglip.training.optim import OptimConfig
from siglip.training.signals import Interrupted
from siglip.training.step import make_abstract_state, make_init
from siglip.training.warm_start import InitConfig, put, read_initial
from siglip.workdir.checkpoint import CheckpointConfig, read_run_params
from siglip.workdir.metrics import read_metrics
from tests.siglip.jobs import RECIPE, ROOT
from tests.siglip.tiny_run import MODEL, TinyBatches, tiny_config, use_devices


class ColourHead(nn.Module):
    """[b, n, d] -> [b, 3]: a transformer block, the mean and a linear map."""

    layout: ParamLayout | None = None

    @nn.compact
    def __call__(self, tokens):
        encoder = (Variant(32, 2, 64, 2), True, "none", jnp.dtype("float32"))
        x = Encoder(*encoder, layout=self.layout, name="Encoder_0")(tokens)
        return nn.Dense(3, name="head")(nn.Dropout(0.1, deterministic=False)(x.mean(axis=1)))


@dataclasses.dataclass(frozen=True)
class Colour(Term):
    """Squared error of the image's mean colour, from the image tokens."""

    name: Literal["colour"] = "colour"

    def init(self, model, key):
        tokens = jnp.zeros((1, 1, model.image.spec.width))
        return ColourHead().init({"params": key, "dropout": key}, tokens)["params"]

    def forward(self, params, batch, key, *, towers, model, layout):
        head = ColourHead(layout)
        found = head.apply({"params": params}, towers.out["img/encoded"], rngs={"dropout": key})
        error = found - batch["colour"]
        return jnp.sum(error**2), {"absolute": jnp.sum(jnp.abs(error))}


class ColourBatches(TinyBatches):
    def __next__(self):
        batch = super().__next__()
        return batch | {"colour": batch["image"].mean(axis=(1, 2), dtype=np.float32) / 255}


class Stops(ColourBatches):
    """A signal before batch `position`: that step is the last."""

    def __init__(self, position):
        super().__init__()
        self.at = position

    def __next__(self):
        if self.position == self.at:
            signal.raise_signal(signal.SIGTERM)
        return super().__next__()


LATE = (Colour(weight=0.5, start=0.5),)


def config_of(workdir, terms, **fields):
    optim = OptimConfig(lr=3e-3, weight_decay=0.1)
    return tiny_config(workdir, terms=terms, optim=optim, checkpoint=CheckpointConfig(keep=20), **fields)


def flat(params):
    return trees.flatten(jax.device_get(params))


@pytest.fixture(scope="module")
def program():
    """Of a run with the term, on one device: every run here is of this one."""
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, 1)
        return make_program(config_of("unused", LATE))


@pytest.fixture(scope="module")
def fresh(program):
    """The parameters that a run with the term starts with."""
    with jax.set_mesh(program.mesh):
        return flat(program.init({}).params)


@pytest.fixture(scope="module")
def run(tmp_path_factory, program):
    """(workdir, final state) of eight steps, of which the term has the last four."""
    patch = pytest.MonkeyPatch()
    use_devices(patch, 1)
    workdir = tmp_path_factory.mktemp("run")
    config = config_of(workdir, LATE)
    config = dataclasses.replace(config, log=dataclasses.replace(config.log, every_steps=1))
    state = train(config, ColourBatches(), program=program)
    patch.undo()
    return workdir, state


def test_a_term_counts_from_its_start_and_is_in_the_metrics_by_name(run):
    lines = read_metrics(run[0])
    assert [line["train/colour"] > 0 for line in lines] == [line["step"] > 4 for line in lines]
    for line in lines:
        assert line["train/loss"] == pytest.approx(line["train/pair_loss"] + 0.5 * line["train/colour"], rel=1e-6)
        assert line["train/colour/absolute"] <= 3**0.5 * line["train/colour"] ** 0.5 + 1e-6  # Cauchy-Schwarz


@pytest.mark.parametrize("stop", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_checkpoint_restores_across_the_start_of_a_term_bit_for_bit(run, program, fresh, stop, tmp_path, monkeypatch):
    use_devices(monkeypatch, 1)
    config = config_of(tmp_path, LATE)
    with pytest.raises(Interrupted):
        train(config, Stops(stop - 1), program=program)
    saved, _, step = read_run_params(tmp_path)
    assert step == stop
    moved = {path for path, leaf in trees.flatten(saved).items() if np.any(leaf != fresh[path])}
    # Before its start nothing of a term moves, by weight decay either.
    assert any(path.startswith("colour/") for path in moved) == (stop > 4)
    assert any(path.startswith("img/") for path in moved)
    state = train(config, ColourBatches(), program=program)
    for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(run[1]), strict=True):
        np.testing.assert_array_equal(leaf, expected)


@pytest.mark.slow
def test_a_term_that_waits_changes_no_other_parameter(run, fresh, tmp_path, monkeypatch):
    use_devices(monkeypatch, 1)
    config = config_of(tmp_path, ())
    program = make_program(config)
    with jax.set_mesh(program.mesh):
        plain = flat(program.init({}).params)
    assert {path for path in fresh if path not in plain} == {path for path in fresh if path.startswith("colour/")}
    for path, leaf in plain.items():
        np.testing.assert_array_equal(fresh[path], leaf)
    config = dataclasses.replace(config, log=dataclasses.replace(config.log, every_steps=1))
    train(config, TinyBatches(), program=program)
    for with_term, without in zip(read_metrics(run[0])[:5], read_metrics(tmp_path)[:5], strict=True):
        # The state before step 5 is that of four steps without the term; the program is another one, so float32 rounds
        # differently, and Adam passes on a relative error of 2^-23 a step.
        assert with_term["train/pair_loss"] == pytest.approx(without["train/loss"], rel=1e-5)


def test_what_is_loaded_and_exported_is_the_model_alone(run, tmp_path):
    model = siglip.load(run[0])
    assert set(model.params) == {"img", "txt", "t", "b"}
    report = export(run[0], format="bigvision", out=tmp_path / "out", tower="both")
    assert report.verified
    with np.load(tmp_path / "out" / "model.npz") as stored:
        assert stored.files and not any("colour" in name for name in stored.files)


def test_another_run_starts_from_the_model_and_draws_the_terms_afresh(run, fresh):
    found = read_initial(InitConfig(str(run[0])), MODEL)
    assert found.keys() == trees.flatten(param_shapes(MODEL)).keys()
    optimizer, mesh_config = optax.sgd(0.1), MeshConfig(data=1)
    mesh = make_mesh(mesh_config, jax.devices()[:1])
    abstract = make_abstract_state(MODEL, optimizer, mesh=mesh, mesh_config=mesh_config, terms=LATE)
    given = put(found, abstract.params)
    start = flat(make_init(MODEL, optimizer, abstract_state=abstract, seed=0, terms=LATE)(given).params)
    trained, drawn = flat(run[1].params), fresh
    for path, leaf in start.items():
        np.testing.assert_array_equal(leaf, (drawn if path.startswith("colour/") else trained)[path])


def gradients(params, devices, fsdp):
    terms = (dataclasses.replace(LATE[0], start=0.0),)
    mesh_config = MeshConfig(fsdp=fsdp, fsdp_min_size_bytes=1024)
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    shapes = make_abstract_state(MODEL, optax.sgd(0.1), mesh=mesh, mesh_config=mesh_config, terms=terms).params
    layout = ParamLayout.of(shapes)
    assert (fsdp > 1) == layout.within("colour").shards("Encoder_0/encoderblock/.*kernel")
    value_and_grad = make_value_and_grad(
        make_objective(MODEL, LossConfig(), layout=layout, terms=terms, total_steps=8),
        frozen=jax.tree.map(lambda _: False, shapes),
        layout=layout,
        micro_batch_size=None,
    )
    params = jax.device_put(trees.unflatten(params), jax.tree.map(lambda leaf: leaf.sharding, shapes))
    batch = {name: rows for name, rows in next(ColourBatches()).items() if name != "key"}
    loss, metrics, grads = jax.jit(value_and_grad)(params, put_batch(batch, mesh), jax.random.key(1), jnp.int32(0))
    return float(loss), jax.device_get(metrics), flat(grads)


@pytest.mark.slow
def test_a_term_and_its_head_on_a_mesh_that_shards_them(fresh):
    """Dropout of the term draws by the whole batch, so the mesh does not matter; micro-batches are in test_accumulation."""
    loss, metrics, grads = gradients(fresh, 1, 1)
    found_loss, found_metrics, found = gradients(fresh, 4, 2)
    assert found_loss == pytest.approx(loss, rel=3e-6)
    assert found_metrics["colour"] == pytest.approx(metrics["colour"], rel=3e-6)
    assert np.any(grads["colour/head/kernel"])
    for path, grad in grads.items():
        # Of a key's bias and of t, terms of both signs between 0.1 and 1 cancel: see test_accumulation.
        scale = max(0.1, np.abs(grad).max()) if path == "t" or path.endswith("key/bias") else np.abs(grad).max()
        np.testing.assert_allclose(found[path], grad, rtol=0, atol=3e-6 * scale, err_msg=path)


def test_terms_are_checked():
    with pytest.raises(ValueError, match=r"colour.start=1.0 is a fraction of the run; use 0 <= start < 1"):
        Colour(start=1.0)
    with pytest.raises(ValueError, match=r"colour.weight=0.0 must be positive"):
        Colour(weight=0.0)
    with pytest.raises(ValueError, match=r"the name 'colour' is taken"):
        config_of("unused", (Colour(), Colour()))
    with pytest.raises(ValueError, match=r"the name 't' is taken"):
        config_of("unused", (Term("t"),))


def test_patterns_reach_the_parameters_of_a_term():
    shapes = all_param_shapes(MODEL, LATE)
    assert "colour/head/kernel" in trees.flatten(shapes)
    assert trees.flatten(all_param_shapes(MODEL, ())).keys() < trees.flatten(shapes).keys()


HEAD = """
import jax.numpy as jnp
from flax import linen as nn
from siglip.models.layers import Encoder
from siglip.models.variants import Variant
from siglip.parallel.sharding import ParamLayout

"""
TERM = """
import dataclasses
from typing import Literal
import jax.numpy as jnp
from siglip.models.colour import ColourHead
from siglip.training.objective import Term

"""
FIELD = """
from dataclasses import dataclass
import numpy as np

@dataclass(frozen=True)
class MeanColour:
    arrays = {"colour": ((3,), np.float32)}
    reads_pixels = True

    def make(self, pair, rng):
        return {"colour": pair.pixels.mean(axis=(0, 1), dtype=np.float32) / 255}
"""
WITH_COLOUR = """
import dataclasses
from siglip.training.colour import Colour

plain = get_config

def get_config():
    return dataclasses.replace(plain(), terms=(Colour(),))
"""
# Trained; nothing to do when the same command comes again; refused with another setting, since config.json has the term.
USE_COLOUR = """
import sys
from siglip.cli import run

command = ["train", *sys.argv[1:], "--terms.0.weight", "0.5", "--terms.0.start", "0.25"]
assert run(command) == 0 and run(command) == 0
assert run([*command[:-1], "0.5"]) == 2
"""


@pytest.mark.slow
def test_a_new_term_is_a_head_a_field_and_its_name_in_the_config(tmp_path):
    """Five files: then recipes, flags, the loader's batches, config.json, metrics and checkpoints have it."""
    for package in ("siglip", "data_pipelines"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("sample"))
    (tmp_path / "siglip/models/colour.py").write_text(HEAD + inspect.getsource(ColourHead))
    (tmp_path / "siglip/training/colour.py").write_text(TERM + inspect.getsource(Colour))
    (tmp_path / "data_pipelines/samples/colour.py").write_text(FIELD)
    (tmp_path / "recipe.py").write_text(textwrap.dedent(RECIPE.format(evaluate=False, naflex=False)) + WITH_COLOUR)
    for file, old, new, imported in (
        ("siglip/training/config.py", "tuple[Term, ", "tuple[Colour, ", "siglip.training.colour import Colour"),
        (
            "data_pipelines/loader.py",
            "resample)\n\n",
            "resample), MeanColour()\n\n",
            "data_pipelines.samples.colour import MeanColour",
        ),
    ):
        text = (tmp_path / file).read_text()
        assert text.count(old) == 1, (file, old)
        (tmp_path / file).write_text(f"from {imported}\n{text.replace(old, new)}")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-c", USE_COLOUR, "recipe.py", "--workdir", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr
    assert "terms.0.start" in done.stderr.splitlines()[-1]
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["terms"] == [{"name": "colour", "weight": 0.5, "start": 0.25}]
    lines = [line for line in read_metrics(tmp_path / "run") if "train/loss" in line]
    assert [line["train/colour"] > 0 for line in lines] == [line["step"] > 3 for line in lines]
    for line in lines:
        assert line["train/loss"] == pytest.approx(line["train/pair_loss"] + 0.5 * line["train/colour"], rel=1e-6)
    assert lines[-1]["train/colour"] < lines[3]["train/colour"]
    assert "colour/head/kernel" in trees.flatten(read_run_params(tmp_path / "run")[0])
