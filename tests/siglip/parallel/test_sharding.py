"""Who lives where: rules, what the compiled step gathers and when, and the same numbers on every mesh."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from siglip import trees
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig, param_shapes
from siglip.parallel.sharding import MeshConfig, ParamLayout, like_params, make_mesh, param_shardings, put_batch
from siglip.training import optim
from siglip.training.objective import LossConfig, make_objective
from siglip.training.step import make_abstract_state, make_init, make_train_step
from tests.siglip.rounding import rounding
from tests.siglip.tiny import QUICK

# Different sizes everywhere, so that a shape in the compiled program names its parameter.
MODEL = ModelConfig(
    ImageConfig("mu", depth=3, mlp_dim=96, patch_size=(8, 8), image_size=(16, 16), pool="gap", scan=True, remat="full"),
    TextConfig("mu", depth=5, mlp_dim=64, vocab_size=72, length=6, scan=True, remat="none"),
    out_dim=(None, 32),
)
# Scanned and single blocks, and what compiles fastest.
SMALL = ModelConfig(
    dataclasses.replace(MODEL.image, depth=2),
    TextConfig("mu", vocab_size=72, length=6, pool="mean"),
    out_dim=(None, None),
)


def shapes(**leaves):
    return trees.unflatten({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in leaves.items()})


def specs(leaves, config, devices=8):
    mesh = make_mesh(config, jax.devices()[:devices])
    return {path: s.spec for path, s in trees.flatten(param_shardings(shapes(**leaves), mesh, config)).items()}


def test_the_largest_dimension_that_divides_and_never_the_layers_of_a_stack():
    found = specs(
        {
            "img/Transformer/encoderblock/kernel": (64, 12, 20),
            "img/Transformer/encoderblock_0/kernel": (64, 12, 20),
            "img/head/kernel": (30, 8),
            "txt/Embed_0/embedding": (4000, 8),
            "t": (1,),
        },
        MeshConfig(fsdp=4, fsdp_min_size_bytes=128),
    )
    assert found == {
        "img/Transformer/encoderblock/kernel": P(None, None, "fsdp"),
        "img/Transformer/encoderblock_0/kernel": P("fsdp"),
        "img/head/kernel": P(None, "fsdp"),
        "txt/Embed_0/embedding": P(None, "fsdp"),  # by columns: see EMBEDDING_TABLE
        "t": P(),
    }


def test_the_first_rule_that_matches_wins():
    rules = ((".*/whole", "replicate"), ("a/.*", "fsdp:-1"), ("b/first", "fsdp:0"), (".*", "fsdp"))
    leaves = {"a/whole": (8, 4), "a/last": (8, 4), "b/first": (4, 8), "b/rest": (4, 8)}
    config = MeshConfig(fsdp=4, fsdp_min_size_bytes=1, rules=rules)
    expected = {"a/whole": P(), "a/last": P(None, "fsdp"), "b/first": P("fsdp"), "b/rest": P(None, "fsdp")}
    assert specs(leaves, config) == expected
    assert set(specs(leaves, dataclasses.replace(config, fsdp=1)).values()) == {P()}


STACK = {"img/encoderblock/a/kernel": (8, 6, 10), "img/b": (8, 64), "t": (1,)}


@pytest.mark.parametrize(
    "rules, fsdp, words",
    [
        (((".*", "fsdp"),), 8, r"fsdp=8 divides no dimension of img/encoderblock/a/kernel \(8, 6, 10\); use mesh.fsdp=2, "
         r"or put \('img/encoderblock/a/kernel', 'replicate'\) first in mesh.rules"),
        ((("img/.*", "fsdp:-2"), (".*", "fsdp")), 4, r"divides not the dimension of 'fsdp:-2' of img/encoderblock/a/kernel"),
        ((("img/encoderblock/.*", "fsdp:0"), (".*", "fsdp")), 2, r"the dimension of 'fsdp:0' .*use mesh.fsdp=1"),
        ((("img/.*", "fsdp"),), 2, r"mesh.rules have none for 't'; end them with"),
        ((("img/bb", "fsdp"), (".*", "fsdp")), 2, r"mesh.rules: pattern 'img/bb' matches no parameter; did you mean 'img/b'"),
        (((".*", "replicate"),), 2, "mesh.fsdp=2 shards no parameter: mesh.rules replicate them all"),
    ],
)  # fmt: skip
def test_rules_that_would_not_do_what_they_say_are_errors(rules, fsdp, words):
    with pytest.raises(ValueError, match=words) as error:
        specs(STACK, MeshConfig(fsdp=fsdp, fsdp_min_size_bytes=64, rules=rules))
    assert "\n" not in str(error.value)


def test_actions_are_checked_and_a_model_of_small_parameters_is_not_sharded_silently():
    with pytest.raises(ValueError, match=r"'fdsp' of pattern '\.\*' is none of .*did you mean 'fsdp'"):
        MeshConfig(rules=((".*", "fdsp"),))
    with pytest.raises(ValueError, match="shards no parameter: none has 1048576 bytes; use mesh.fsdp=1 or lower"):
        specs(STACK, MeshConfig(fsdp=2))


def test_blocks_of_every_tower_and_head_are_left_to_the_module_that_runs_them():
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    paths = {
        "img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel": P(None, "fsdp"),
        "caption/Decoder_0/decoderblock/MlpBlock_0/Dense_0/kernel": P(None, "fsdp"),
        "caption/Decoder_0/decoderblock_3/MlpBlock_0/Dense_0/kernel": P("fsdp"),
        "img/MAPHead_0/MlpBlock_0/Dense_0/kernel": P("fsdp"),
        "caption/head/kernel": P("fsdp"),
    }
    leaf = np.arange(2 * 4 * 6, dtype=np.float32).reshape(2, 4, 6)
    params = {path: jax.device_put(leaf, jax.NamedSharding(mesh, spec)) for path, spec in paths.items()}
    layout = ParamLayout.of(trees.unflatten(params))
    gathered = trees.flatten(jax.jit(layout.gather_outside_blocks)(trees.unflatten(params)))
    assert {path for path, x in gathered.items() if x.sharding.is_fully_replicated} == {
        "img/MAPHead_0/MlpBlock_0/Dense_0/kernel", "caption/head/kernel"
    }  # fmt: skip
    caption, inner = layout.within("caption"), "MlpBlock_0/Dense_0/kernel"
    gather = functools.partial(caption.gather_block, prefix="Decoder_0/decoderblock_3/", dtype=jnp.float32)
    whole = jax.jit(gather)(trees.unflatten({inner: params["caption/Decoder_0/decoderblock_3/" + inner]}))
    assert trees.flatten(whole)[inner].sharding.is_fully_replicated
    with pytest.raises(AssertionError, match="Decoder_0/layer_3/ is not named as a block"):
        caption.gather_block({}, prefix="Decoder_0/layer_3/", dtype=jnp.float32)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_the_optimizer_state_follows_the_parameters(name):
    model = dataclasses.replace(MODEL, image=dataclasses.replace(MODEL.image, width=48, num_heads=2), out_dim=(32, 32))
    config, params = MeshConfig(fsdp=4, fsdp_min_size_bytes=1024), param_shapes(model)
    mesh = make_mesh(config, jax.devices())
    optimizer = optim.make_optimizer(optim.OptimConfig(name), params, total_steps=5)
    state = jax.eval_shape(optimizer.init, params)
    found = like_params(state, params, param_shardings(params, mesh, config), mesh)
    kernel = "img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel"
    by_name = {}
    for path, sharding in jax.tree_util.tree_leaves_with_path(found):
        if jax.tree_util.keystr(path, simple=True, separator="/").endswith(kernel):
            by_name[re.findall(r"\.(\w+)\[", jax.tree_util.keystr(path))[-1]] = sharding.spec
    moment = P(None, None, "fsdp")  # of [3, 48, 96]
    if name == "adamw":
        assert by_name == {"mu": moment, "nu": moment}
    else:  # rows lack the 96, columns the 48
        assert by_name == {"v_row": P(), "v_col": P(None, "fsdp"), "v": P(), "ema": moment}


SGD = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.05, momentum=0.9))


def make(mesh_config, devices, *, model=MODEL, ema=0.0):
    """A step, with its state's shapes and a fresh one. SGD: see test_five_steps_agree_on_every_mesh."""
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    abstract = make_abstract_state(model, SGD, mesh=mesh, mesh_config=mesh_config, ema=ema > 0)
    frozen = jax.tree.map(lambda _: False, abstract.params)
    objective = make_objective(model, LossConfig(), layout=ParamLayout.of(abstract.params))
    step = make_train_step(objective, SGD, lambda _: 1.0, frozen=frozen, abstract_state=abstract, ema=ema)
    return mesh, abstract, step


def batch_of(step=0, pairs=16):
    rng = np.random.default_rng(step)
    image = rng.integers(0, 256, (pairs, 16, 16, 3), dtype=np.uint8)
    return {"image": image, "text": rng.integers(0, 72, (pairs, 6), dtype=np.int32)}


def computations(hlo):
    """{name: lines} of the computations of a compiled program."""
    found, name = {}, None
    for line in hlo.splitlines():
        if line.endswith("{") and (" -> " in line or line.startswith("ENTRY")):
            name = line.split("(")[0].strip()
            found[name] = []
        elif name is not None:
            found[name].append(line)
    return found


def results(lines, operation):
    """Shapes of the results of an operation, tuples taken apart."""
    found = [re.search(rf"= (.*?) {operation}(?:-start)?\(", line) for line in lines]
    return [tuple(map(int, s.split(","))) for m in found if m for s in re.findall(r"\w\[([\d,]+)\]", m[1])]


@pytest.fixture(scope="module")
def compiled():
    mesh, abstract, step = make(MeshConfig(fsdp=4, fsdp_min_size_bytes=4096), 8, ema=0.9)
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in put_batch(batch_of(), mesh).items()
    }
    return abstract, step.lower(abstract, batch).compile(QUICK)


def test_one_block_is_gathered_at_a_time_inside_the_loop_and_again_in_the_backward_pass(compiled):
    abstract, program = compiled
    stacked = {
        path: leaf.shape
        for path, leaf in trees.flatten(abstract.params).items()
        if "/encoderblock/" in path and not leaf.sharding.is_fully_replicated
    }
    by_body = {name: results(lines, "all-gather") for name, lines in computations(program.as_text()).items()}
    for tower, depth, mlp_dim in (("img", 3, 96), ("txt", 5, 64)):
        kernels = sorted(shape[1:] for path, shape in stacked.items() if path.startswith(tower))
        assert len(kernels) == 6 and all(shape[0] == depth for path, shape in stacked.items() if path.startswith(tower))
        bodies = [shapes for shapes in by_body.values() if (32, mlp_dim) in shapes]
        # A block's six kernels and nothing else, in the forward and in the backward loop.
        assert [sorted(shapes) for shapes in bodies] == [kernels, kernels]
    gathered = [shape for shapes in by_body.values() for shape in shapes]
    assert not {*stacked.values()} & {*gathered}, "a whole stack"
    assert not any(shape[0] in (3, 5) and len(shape) > 2 for shape in gathered), "several layers at once"


def test_gradients_are_summed_block_by_block_and_activations_stay_where_they_are(compiled):
    abstract, program = compiled
    stacked = {leaf.shape for path, leaf in trees.flatten(abstract.params).items() if "/encoderblock/" in path}
    hlo = program.as_text().splitlines()
    # Over `fsdp` a gradient is reduce-scattered; the CPU's compiler writes that as an all-reduce and a slice.
    reduced = results(hlo, "all-reduce") + results(hlo, "reduce-scatter")
    assert (32, 96) in reduced or (32, 24) in reduced
    assert not stacked & {*reduced}
    # Tokens [16 / 2 or 16 / 8, patches or length, …] would travel if the compiler chose to split products by their columns.
    moved = [shape for kind in ("all-gather", "all-reduce", "all-to-all") for shape in results(hlo, kind)]
    activations = [shape for shape in moved if shape[0] in (2, 8, 16) and len(shape) == 3 and shape[1] in (4, 6)]
    assert not activations
    assert (72, 32) not in moved, "the table of token embeddings is looked up in place"


def test_every_buffer_of_the_state_is_reused(compiled):
    abstract, program = compiled
    leaves = jax.tree.leaves(abstract)
    table = re.search(r"input_output_alias=\{(.*?)\}, entry", program.as_text(), re.DOTALL)[1]
    assert len(re.findall(r"\(\d+, \{\}, (?:may|must)-alias\)", table)) == len(leaves)
    shard_bytes = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    assert program.memory_analysis().alias_size_in_bytes >= shard_bytes


# The longest chain of float32 operations through SMALL, one way: a patch (192), two blocks (450 each: sums of 32 and 96
# terms), the embedding and its norm.
CHAIN = 1150
LAYOUTS = [(2, 1), pytest.param(2, 2, marks=pytest.mark.slow), (8, 4)]


@pytest.fixture(scope="module")
def on_one_device():
    return five_steps(1, 1)


@functools.cache
def fresh_state():
    _, abstract, _ = make(MeshConfig(), 1, model=SMALL)
    return jax.device_get(make_init(SMALL, SGD, abstract_state=abstract, seed=0)({}))


def five_steps(devices, fsdp):
    mesh, abstract, step = make(MeshConfig(fsdp=fsdp, fsdp_min_size_bytes=1024), devices, model=SMALL)
    state, losses = jax.device_put(fresh_state(), jax.tree.map(lambda leaf: leaf.sharding, abstract)), []
    step = step.lower(state, put_batch(batch_of(), mesh)).compile(QUICK)
    for number in range(5):
        state, metrics = step(state, put_batch(batch_of(number), mesh))
        losses.append(float(metrics["train/loss"]))
    assert (fsdp > 1) == any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    return losses, jax.device_get(trees.flatten(state.params))


@pytest.mark.parametrize("devices, fsdp", LAYOUTS)
def test_five_steps_agree_on_every_mesh(devices, fsdp, on_one_device):
    """Losses and parameters differ by the order in which float32 numbers are added, and by nothing else.

    The optimizer is SGD with momentum, linear in the gradient, so that rounding stays rounding. Adam divides by the root of the
    second moment: where a gradient is zero but for rounding, its first step is +lr or -lr by chance. (test_train.py compares
    whole runs with Adam, with that in its tolerance.)
    """
    losses, params = five_steps(devices, fsdp)
    # The loss sums 256 terms; each has come through CHAIN operations.
    np.testing.assert_allclose(losses, on_one_device[0], rtol=2 * rounding(256 + CHAIN))
    start = trees.flatten(fresh_state().params)
    moved = {path: np.abs(leaf - start[path]).max() for path, leaf in on_one_device[1].items()}
    for path, leaf in on_one_device[1].items():
        # A key's bias, which shifts all logits of a query alike, moves by nothing but roundings of terms that cancel.
        scale = max(moved.values()) if path.endswith("key/bias") else moved[path]
        atol = 2 * (rounding(2 * CHAIN, scale) + rounding(5, np.abs(leaf).max()))  # of the gradients; of the five sums
        np.testing.assert_allclose(params[path], leaf, rtol=0, atol=atol, err_msg=path)
