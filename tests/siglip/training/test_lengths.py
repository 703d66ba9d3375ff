"""A NaFlex run: its lengths, a program for each before the first step; micro-batches; resume; from images of one size."""

import dataclasses
import logging

import jax
import numpy as np
import pytest

from data_pipelines.order.lengths import LengthConfig, Lengths
from siglip.errors import UserError
from siglip.formats import big_vision
from siglip.models.naflex import NaflexConfig
from siglip.models.resample import resample
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.parallel.sharding import MeshConfig, make_mesh, put_batch
from siglip.planning.accelerators import parse_topology
from siglip.planning.estimate import shapes_of
from siglip.planning.search import search
from siglip.training.flops import train_flops_per_pair
from siglip.training.lengths import (
    StepOfLength,
    batch_shapes,
    compile_lengths,
    length_shares,
    micro_batch_size,
    micro_batch_sizes,
)
from siglip.training.loop import make_program, train
from siglip.training.objective import LossConfig
from siglip.training.signals import Interrupted
from siglip.training.warm_start import InitConfig, read_initial
from siglip.trees import flatten
from tests.siglip.tiny import random_params
from tests.siglip.tiny_run import (
    MODEL,
    StopsAt,
    TinyBatches,
    assert_bit_equal,
    tiny_config,
    toy_program,
    use_devices,
)
from tests.siglip.training.test_accumulation import CHAIN, assert_equal_gradients, gradients, mesh_of

NAFLEX = dataclasses.replace(MODEL, image=dataclasses.replace(MODEL.image, naflex=NaflexConfig(4, 9)))
LENGTHS = LengthConfig((4, 9), start=0.25)


def naflex_config(workdir, *, lengths=LENGTHS, **changes):
    config = tiny_config(workdir, model=NAFLEX, **changes)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, lengths=lengths))


class PatchBatches(TinyBatches):
    """The same pairs as `TinyBatches`, each an image of its own grid, of the step's length."""

    lengths = Lengths.of(LENGTHS, total_steps=8, seed=0)

    def __next__(self):
        length = self.lengths.at(self.position) or 4
        batch = super().__next__()
        image = batch.pop("image")
        rng = np.random.default_rng(self.position)
        grid = np.stack(
            [rng.integers(1, 3, self.batch_size), rng.integers(1, length // 2 + 1, self.batch_size)], axis=1
        )
        patches = np.repeat(image[:, :1, :8].reshape(self.batch_size, 1, 24), length * 8, 1).reshape(-1, length, 192)
        return batch | {"patches": patches, "grid": grid.astype(np.int32)}


class StopsPatches(PatchBatches, StopsAt):
    pass


@pytest.fixture(autouse=True)
def two_devices(monkeypatch):
    use_devices(monkeypatch, 2)


def test_every_length_is_compiled_before_the_first_step(tmp_path, caplog):
    config, program = naflex_config(tmp_path), toy_program(naflex_config(tmp_path))

    def step(state, batch):
        calls.append(batch["patches"].shape[1])  # once, when it is traced
        return state, {"sum": batch["patches"].sum()}

    calls, steps = [], StepOfLength({patches: jax.jit(step) for patches in (9, 4)})
    with caplog.at_level(logging.INFO, logger="siglip"):
        compiled = compile_lengths(steps, config, program.abstract_state, program.mesh)
    assert [line.split(" in ")[0] for line in caplog.messages] == [
        "compiled the step for images of 4 patches (1 of 2)", "compiled the step for images of 9 patches (2 of 2)",
    ]  # fmt: skip
    batches, state, found = PatchBatches(), program.init({}), []
    for _ in range(8):
        batch = {name: rows for name, rows in next(batches).items() if name != "key"}
        found.append((int(compiled(state, put_batch(batch, program.mesh))[1]["sum"]), batch["patches"].sum()))
    assert calls == [4, 9] and all(ours == theirs for ours, theirs in found)


@pytest.mark.slow
def test_a_run_compiles_every_length_first_and_resumes_bit_for_bit(tmp_path, caplog):
    program = make_program(naflex_config(tmp_path))
    with caplog.at_level(logging.INFO, logger="siglip"):
        expected = train(naflex_config(tmp_path / "whole"), PatchBatches(), program=program)
    told = [message for message in caplog.messages if message.startswith("compiled the step")]
    assert [line.split(" in ")[0] for line in told] == [
        "compiled the step for images of 4 patches (1 of 2)", "compiled the step for images of 9 patches (2 of 2)",
    ]  # fmt: skip
    with pytest.raises(Interrupted):
        train(naflex_config(tmp_path / "run"), StopsPatches(5, 15), program=program)
    assert_bit_equal(train(naflex_config(tmp_path / "run"), PatchBatches(), program=program), expected)


@pytest.mark.slow
def test_longer_steps_take_smaller_micro_batches_and_give_the_same(tmp_path, monkeypatch):
    use_devices(monkeypatch, 4)
    config = naflex_config(tmp_path, loss=LossConfig(micro_batch_size=16))
    assert micro_batch_sizes(config, devices=2) == {4: 16, 9: 4} and micro_batch_size(config, 1, devices=2) == 16
    assert micro_batch_size(naflex_config(tmp_path), 9, devices=2) is None
    batches = PatchBatches()
    batch = next(batch for batch in iter(batches.__next__, None) if batch["patches"].shape[1] == 9)
    del batch["key"]
    model = dataclasses.replace(NAFLEX, image=dataclasses.replace(NAFLEX.image, scan=True))
    found = gradients(model, mesh_of(4, fsdp=2), batch=batch, micro=4)
    whole = gradients(model, mesh_of(1), batch=batch)
    # SMALL's chain and, forward and back, the pooling's block.
    assert_equal_gradients(found, whole, chain=CHAIN + 900)


def test_a_step_without_a_pair_for_each_device_is_refused(tmp_path):
    """24 pairs of 4 patches on 8 devices, 8 at a time: of 9 patches 3 would fit."""
    config = naflex_config(tmp_path, batch_size=24, loss=LossConfig(micro_batch_size=8))
    with pytest.raises(
        UserError, match="micro_batch_size=8 .* are 3 of 9, fewer than one for each of 8 devices"
    ) as error:
        micro_batch_sizes(config, devices=8)
    assert "set at least 18" in str(error.value) and "\n" not in str(error.value)
    shape = dataclasses.replace(config, mesh=MeshConfig(), batch_size=64)
    found = search(shape, parse_topology("h100:8"), shapes_of(shape))
    assert {8, 16} >= {one.config.loss.micro_batch_size for one in found} - {None, 32}


def test_a_longer_run_says_where_its_images_keep_their_aspect_ratio(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="siglip")
    for total_steps in (8, 12):
        config = naflex_config(tmp_path / "run", total_steps=total_steps)
        train(config, TinyBatches(), program=toy_program(config))
    assert "aspect ratio from step 4 on, no longer from step 3 on (data.lengths.start=0.25)" in caplog.text


def test_shares_of_the_steps(tmp_path):
    assert length_shares(tiny_config(tmp_path)) == {}
    assert length_shares(naflex_config(tmp_path, lengths=None)) == {4: 1.0}
    assert length_shares(naflex_config(tmp_path)) == {4: 0.25 + 0.375, 9: 0.375}
    assert length_shares(naflex_config(tmp_path, lengths=LengthConfig((5, 9), (1.0, 3.0)))) == {5: 0.25, 9: 0.75}
    with pytest.raises(UserError, match="data.lengths.patches=10 must lie in 1 … 9"):
        length_shares(naflex_config(tmp_path, lengths=LengthConfig((10,))))
    with pytest.raises(UserError, match=r"image_size=\(16, 16\): the number of patches=4 must lie in 1 … 3"):
        image = dataclasses.replace(NAFLEX.image, naflex=NaflexConfig(3, 3))
        length_shares(dataclasses.replace(naflex_config(tmp_path), model=dataclasses.replace(NAFLEX, image=image)))
    with pytest.raises(
        UserError, match=r"image_size=\(20, 16\) must be whole patches of \(8, 8\) px.*start=0.25"
    ) as error:
        image = dataclasses.replace(NAFLEX.image, image_size=(20, 16))
        length_shares(dataclasses.replace(naflex_config(tmp_path), model=dataclasses.replace(NAFLEX, image=image)))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="data.lengths is for NaFlex models"):
        length_shares(dataclasses.replace(naflex_config(tmp_path), model=MODEL))


def test_the_longest_batch_is_what_is_planned(tmp_path):
    config = naflex_config(tmp_path)
    shapes = batch_shapes(config, make_mesh(config.mesh))
    assert shapes["patches"].shape == (16, 9, 192) and shapes["grid"].shape == (16, 2) and "image" not in shapes
    assert batch_shapes(config, make_mesh(config.mesh), patches=4)["patches"].shape == (16, 4, 192)


def test_flops_are_those_of_the_lengths():
    fixed = ModelConfig(ImageConfig("B/16", image_size=(256, 256)), TextConfig("B"))
    naflex = dataclasses.replace(fixed, image=dataclasses.replace(fixed.image, naflex=NaflexConfig(256, 1024)))
    at = lambda n: train_flops_per_pair(naflex, batch_size=8, shares={n: 1.0})  # noqa: E731
    assert at(256) == train_flops_per_pair(fixed, batch_size=8)
    assert train_flops_per_pair(naflex, batch_size=8) == at(1024)
    mixed = train_flops_per_pair(naflex, batch_size=8, shares={256: 0.5, 1024: 0.5})
    assert mixed == pytest.approx((at(256) + at(1024)) / 2)


def test_a_run_with_images_of_one_size_is_continued_as_naflex(tmp_path):
    """Its positions are resampled to the new table, its patches to the new size; everything else is taken as it is."""
    params = random_params(MODEL)
    big_vision.write(tmp_path / "fixed.npz", params, MODEL)
    image = dataclasses.replace(MODEL.image, image_size=(36, 36), patch_size=(12, 12), naflex=NaflexConfig(9, 16))
    model = dataclasses.replace(MODEL, image=image)
    found = read_initial(InitConfig(str(tmp_path / "fixed.npz")), model)
    expected = flatten(resample(params, MODEL, image_size=(36, 36), patch_size=(12, 12))[0])
    assert found["img/pos_embedding"].shape == (1, 9, 32) and found["img/embedding/kernel"].shape == (12, 12, 3, 32)
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)


def test_a_program_is_made_without_data(tmp_path):
    program = make_program(naflex_config(tmp_path))
    assert sorted(program.step.steps) == [4, 9]
