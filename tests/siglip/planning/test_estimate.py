"""What a plan says, against the state that training makes, programs that were compiled, and arithmetic."""

import dataclasses
import math

import jax
import pytest

from data_pipelines.order.lengths import LengthConfig
from siglip.errors import UserError
from siglip.models.naflex import NaflexConfig
from siglip.parallel.sharding import MeshConfig
from siglip.planning import compile
from siglip.planning.accelerators import parse_topology
from siglip.planning.estimate import Shapes, estimate, shapes_of
from siglip.planning.search import search
from siglip.training import flops
from siglip.training.lengths import batch_shapes
from siglip.training.loop import make_program
from tests.siglip.planning.plans import make_config, tiny

B16 = make_config("B/16", "B", batch_size=4096)


@pytest.fixture(scope="module")
def b16() -> Shapes:
    return shapes_of(B16)


def test_state_and_batch_are_those_of_the_program_that_trains():
    """Eight CPU devices stand for eight GPUs: what jax lays out on them is what the plan says of one."""
    mesh = MeshConfig(fsdp=4, fsdp_min_size_bytes=1024)
    config = dataclasses.replace(tiny(B16), mesh=mesh, batch_size=64)
    plan = estimate(config, parse_topology("h100:8"))
    program = make_program(config, jax.devices())

    def shard_bytes(tree):
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    batch = batch_shapes(config, program.mesh)
    assert plan.mesh == (2, 4)
    assert plan.bytes_per_device["parameters"] == shard_bytes(program.abstract_state.params)
    assert plan.bytes_per_device["optimizer"] == shard_bytes(program.abstract_state.opt_state)
    assert plan.bytes_per_device["gradients"] == shard_bytes(program.abstract_state.params)
    assert plan.bytes_per_device["batch"] == 2 * shard_bytes(batch)  # this one, and the next
    assert plan.parameters["total"] == sum(x.size for x in jax.tree.leaves(program.abstract_state.params))


def test_bytes_add_up_and_have_the_promised_names(b16):
    plan = estimate(B16, parse_topology("h100:8"), b16)
    memory = plan.bytes_per_device
    assert {"parameters", "optimizer", "gradients", "activations", "loss", "batch", "total", "usable"} <= set(memory)
    assert memory["total"] == sum(n for name, n in memory.items() if name not in ("total", "usable"))
    assert memory["usable"] == pytest.approx(0.92 * 84_942_979_072, rel=1e-9)
    assert memory["optimizer"] > 2 * memory["parameters"] - 2**20  # both moments in float32
    kept = plan.activations_by_remat
    assert kept["full"] == memory["activations"] < kept["dots"] < kept["none"]


def test_a_naflex_run_costs_the_mean_over_its_lengths():
    """Two lengths, half of the steps each: work and traffic are the mean of those of either alone; memory is that of the longer,
    but for activations: 32 pairs of 256 patches have the image tokens of 8 pairs of 1024, and more text."""
    topology, model = parse_topology("h100:8"), tiny(B16).model
    image = dataclasses.replace(model.image, patch_size=(16, 16), image_size=(256, 256), naflex=NaflexConfig(256, 1024))
    loss = dataclasses.replace(B16.loss, micro_batch_size=32)
    config = dataclasses.replace(B16, model=dataclasses.replace(model, image=image), batch_size=64, loss=loss)
    config = dataclasses.replace(config, mesh=MeshConfig(fsdp=8, fsdp_min_size_bytes=1024))

    def plan(*patches):
        data = dataclasses.replace(config.data, lengths=LengthConfig(patches))
        return estimate(dataclasses.replace(config, data=data), topology, shapes)

    shapes = shapes_of(config)
    short, long, both = plan(256), plan(1024), plan(256, 1024)
    # 1024 patches of 16 x 16 px take .85 of a JPEG of 640 x 480 px: no length needs larger ones here.
    assert both.storage_bytes_per_s / both.pairs_per_s == pytest.approx(short.storage_bytes_per_s / short.pairs_per_s)
    assert both.flops_per_pair == pytest.approx((short.flops_per_pair + long.flops_per_pair) / 2)
    executed = [one.recomputed * one.flops_per_pair for one in (short, long, both)]
    assert executed[2] == pytest.approx((executed[0] + executed[1]) / 2)
    for kind, size in both.collective_bytes.items():  # two micro-batches of 32 pairs, and eight of 8
        assert size == pytest.approx((short.collective_bytes[kind] + long.collective_bytes[kind]) / 2, abs=1)
    assert short.collective_bytes["all-gather"] * 2 < long.collective_bytes["all-gather"]
    memory = both.bytes_per_device
    assert memory["activations"] == short.bytes_per_device["activations"] > long.bytes_per_device["activations"]
    same = memory.keys() - {"activations", "total"}
    assert {name: memory[name] for name in same} == {name: long.bytes_per_device[name] for name in same}


@pytest.mark.parametrize("attention, highest", [("auto", 448), ("splash", 512), ("xla", 512)])
def test_a_naflex_run_needs_the_memory_of_the_length_that_needs_most(attention, highest):
    """On a TPU 448 patches keep logits, 512 do not: `auto` takes splash for them."""
    model = B16.model
    towers = {"attention": attention, "remat": "none", "naflex": NaflexConfig(256, 1024)}
    image = dataclasses.replace(model.image, image_size=(256, 256), **towers)
    config = dataclasses.replace(B16, model=dataclasses.replace(model, image=image))

    def plan(*patches):
        data = dataclasses.replace(config.data, lengths=LengthConfig(patches))
        plan = estimate(dataclasses.replace(config, data=data), parse_topology("v5e:4x4"), shapes)
        return plan.bytes_per_device["activations"]

    shapes = shapes_of(config)
    alone = {patches: plan(patches) for patches in (256, 448, 512)}
    assert plan(*alone) == max(alone.values()) == alone[highest]


def test_decoding_goes_by_the_pixels_of_a_naflex_run():
    topology = parse_topology("h100:8")

    def cores_per_pair(max_patches, image_size):
        image = dataclasses.replace(
            tiny(B16).model.image,
            patch_size=(16, 16),
            image_size=(image_size,) * 2,
            naflex=NaflexConfig(1, max_patches),
        )
        config = dataclasses.replace(B16, model=dataclasses.replace(tiny(B16).model, image=image), batch_size=64)
        data = dataclasses.replace(config.data, lengths=LengthConfig((max_patches,)))
        plan = estimate(dataclasses.replace(config, data=data), topology)
        return plan.decoding_cores / plan.pairs_per_s

    assert cores_per_pair(4800, 16) == pytest.approx(4 * cores_per_pair(1200, 16))  # 4800 are 4 x 640 x 480 px
    assert cores_per_pair(1200, 1024) == pytest.approx(cores_per_pair(1200, 16))  # the table's size is not the images'


@pytest.mark.slow
def test_flops_are_those_of_the_compiler_on_an_unrolled_step():
    """Every product of a whole step, forward and backward, and XLA's own count, which has what is elementwise too.

    The stem has no gradient with respect to pixels (one product of three is not there), and the MAP head projects its query
    once for all images: with these sizes less than 1 % of the step. Elementwise, a token costs some 100 operations for each
    number of its width in both passes, products 3 x 24 widths of them: at width 384 1 %.
    """
    sizes = {"width": 384, "depth": 2, "mlp_dim": 1536, "num_heads": 6}
    plain = {"scan": False, "remat": "none", "dtype": "float32"}
    image = dataclasses.replace(B16.model.image, **sizes, **plain, image_size=(96, 96), patch_size=(16, 16))
    text = dataclasses.replace(B16.model.text, **sizes, **plain, length=32, vocab_size=64)
    model = dataclasses.replace(B16.model, image=image, text=text, out_dim=(None, 384))
    config = dataclasses.replace(B16, model=model, batch_size=32)
    program = make_program(config, jax.devices()[:1])
    with jax.set_mesh(program.mesh):
        batch = batch_shapes(config, program.mesh)
        compiled = program.step.lower(program.abstract_state, batch).compile()
    expected = flops.train_flops_per_pair(model, batch_size=32) * 32
    assert compile.read(compiled).matmul_flops == pytest.approx(expected, rel=0.02)
    assert compiled.cost_analysis()["flops"] == pytest.approx(expected, rel=0.02)
    assert estimate(config, parse_topology("h100:1")).flops_per_step == expected


def test_a_frozen_tower_costs_a_forward_pass_and_one_that_is_stored_nothing(b16):
    """The image tower of a SigLiT run."""
    freeze = dataclasses.replace(B16.optim, lr_mults=(("img/.*", 0.0),))
    frozen = dataclasses.replace(B16, optim=freeze)
    stored = dataclasses.replace(frozen, data=dataclasses.replace(B16.data, image_embeddings="embeddings"))
    topology, shapes = parse_topology("h100:8"), shapes_of(frozen)
    whole, less, least = (
        estimate(B16, topology, b16),
        estimate(frozen, topology, shapes),
        estimate(stored, topology, shapes),
    )
    text = flops.train_flops_per_pair(B16.model, batch_size=4096, passes=(0, 3))
    image = flops.train_flops_per_pair(B16.model, batch_size=4096, passes=(1, 3)) - text
    assert least.flops_per_pair == text
    assert less.flops_per_pair == text + image
    assert whole.flops_per_pair == pytest.approx(text + 3 * image)
    memories = [plan.bytes_per_device for plan in (whole, less, least)]
    for name in ("gradients", "optimizer", "activations"):
        assert memories[0][name] > memories[1][name] >= memories[2][name]
    assert least.decoding_cores == 0 < less.decoding_cores
    assert memories[2]["batch"] == 2 * 512 * 4 * (768 + 64)


def test_what_a_tower_that_does_not_train_moves():
    """Weights of the image tower are gathered in both passes, in the forward pass alone, not at all."""
    sharded = MeshConfig(fsdp=8, fsdp_min_size_bytes=1024)
    small, freeze = tiny(B16), dataclasses.replace(B16.optim, lr_mults=(("img/.*", 0.0),))
    whole = dataclasses.replace(small, mesh=sharded, batch_size=64)
    frozen = dataclasses.replace(whole, optim=freeze)
    stored = dataclasses.replace(frozen, data=dataclasses.replace(B16.data, image_embeddings="embeddings"))
    shapes, topology = shapes_of(frozen), parse_topology("h100:8")
    plans = [estimate(config, topology, shapes) for config in (frozen, stored)]
    plans.insert(0, estimate(whole, topology))
    both, once, never = (plan.collective_bytes["all-gather"] for plan in plans)
    kernels = (
        2 * small.model.image.spec.depth * (4 * 64 * 64 + 2 * 64 * 128)
    )  # bytes of the blocks' kernels in bfloat16
    assert both - once == pytest.approx(kernels, rel=0.05)
    assert once - never > kernels
    gathered = [plan.bytes_per_device["gathered"] for plan in plans]
    assert gathered[0] == gathered[1] > gathered[2]


def test_a_bfloat16_stream_keeps_two_bytes_less_of_every_number(b16):
    def activations(dtype):
        image, text = (dataclasses.replace(t, residual_dtype=dtype) for t in (B16.model.image, B16.model.text))
        config = dataclasses.replace(B16, model=dataclasses.replace(B16.model, image=image, text=text))
        return estimate(config, parse_topology("h100:8"), b16).bytes_per_device["activations"]

    assert activations("float32") - activations("bfloat16") == 512 * 12 * (196 + 64) * 768 * 2


def test_the_loss_of_a_million_pairs_costs_a_mebibyte_and_little_time():
    config = make_config("So400m/14", "So400m", batch_size=2**20, fsdp=16, micro=2**16)
    topology = parse_topology("v5e:16x16")
    plan = estimate(config, topology)
    assert plan.bytes_per_device["loss"] <= 2**20
    loss_flops = 3 * 2 * config.batch_size * 1152
    assert loss_flops / plan.flops_per_pair < 0.03
    # Its traffic runs beside its products, on the links of a ring: both ways, of four links one pair.
    assert plan.collective_bytes["loss"] / (2 * 45e9) / plan.step_s < 0.03


def test_a_weight_that_cannot_be_sharded_is_named():
    config = make_config("So400m/14", "So400m", batch_size=32768, fsdp=256)
    with pytest.raises(UserError, match=r"mesh.fsdp=256 divides no dimension of img/\S+ .* use mesh.fsdp=\d+"):
        estimate(config, parse_topology("v5e:16x16"))


def test_settings_that_do_not_fit_the_devices_are_refused(b16):
    topology = parse_topology("h100:8")
    for change, words in (
        ({"batch_size": 4100}, "does not divide over 8 devices"),
        ({"mesh": MeshConfig(fsdp=3)}, "does not cover 8 devices"),
        ({"loss": dataclasses.replace(B16.loss, micro_batch_size=100)}, "micro_batch_size=100"),
    ):
        with pytest.raises(UserError, match=words):
            estimate(dataclasses.replace(B16, **change), topology, b16)


def test_the_search_finds_the_fastest_that_fits(b16):
    """B/16 at 32k on one GPU fits as it is in no way, in micro-batches it does."""
    config, topology = dataclasses.replace(B16, batch_size=32768), parse_topology("h100:1")
    assert not estimate(config, topology, b16).fits
    found = search(config, topology, b16)
    assert all(candidate.estimate.fits for candidate in found)
    times = [candidate.estimate.step_s for candidate in found]
    assert times[0] == pytest.approx(min(times), rel=0.01)
    assert "--loss.micro-batch-size" in found[0].flags
    # Computing nothing again is faster: where memory allows it, nothing is.
    roomy = search(dataclasses.replace(B16, batch_size=512), parse_topology("h100:8"), b16)
    assert roomy[0].config.model.image.remat != "full" and roomy[0].config.loss.micro_batch_size is None
