"""Starting from a trained model: what is taken, from any source, into any layout, and every way in which it cannot be."""

import dataclasses
import json
import logging
import shutil

import jax
import numpy as np
import pytest

import siglip
from siglip import trees
from siglip.encoder import Encoder
from siglip.formats import big_vision, containers, hugging_face
from siglip.models.two_tower import ModelConfig, TextConfig, param_shapes
from siglip.parallel.sharding import MeshConfig
from siglip.training import warm_start
from siglip.training.config import from_json, resolve, to_json
from siglip.training.loop import make_program, train
from siglip.training.optim import OptimConfig
from siglip.training.warm_start import InitConfig, SourceImage, SourceModel, SourceText, read_initial
from siglip.workdir.checkpoint import CheckpointConfig, read_run_params
from siglip.workdir.files import CONFIG_FILE
from tests.siglip.rounding import towers_apart
from tests.siglip.tiny import random_inputs, random_params, square_model
from tests.siglip.tiny_run import MODEL, TinyBatches, drifting_program, tiny_config, use_devices

TOKENIZER = b"the pieces"
NEW_TEXT = TextConfig(variant="mu", vocab_size=50, length=6, mlp_dim=64)


@pytest.fixture(autouse=True)
def two_devices(monkeypatch):
    use_devices(monkeypatch, 2)


@pytest.fixture(scope="module")
def program():
    """Of tiny_run.MODEL, wherever its run starts."""
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, 2)
        return drifting_program(tiny_config("unused"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, program):
    """Workdir of a short run of tiny_run.MODEL."""
    workdir = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, 2)
        train(tiny_config(workdir), TinyBatches(), tokenizer=TOKENIZER, program=program)
    return workdir


def start(config):
    """The state that a run of this config would take its first step from."""
    config = resolve(config)
    program = make_program(config)
    with jax.set_mesh(program.mesh):
        return program.init(read_initial(config.init, config.model))


def start_from(src, *, model=MODEL, only=(".*",), skip=(), **overrides):
    """The parameters, by path, that a run starts with."""
    state = start(tiny_config("new", model=model, init=InitConfig(str(src), only, skip), **overrides))
    return flat_params(state.params)


def flat_params(params):
    return {path: np.asarray(leaf) for path, leaf in trees.flatten(params).items()}


def assert_equal(actual, expected, paths=None):
    for path in expected if paths is None else paths:
        np.testing.assert_array_equal(actual[path], expected[path], err_msg=path)


def params_of(src):
    return flat_params(siglip.load(str(src)).params)


def test_a_run_starts_with_all_of_its_source_and_steps_anew(trained, program, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "siglip"):
        train_until(tiny_config(tmp_path, init=InitConfig(str(trained))), 1, program)
    params, _, step = read_run_params(tmp_path)
    # The first step adds nothing: what is saved is what training started with.
    assert_equal(flat_params(params), params_of(trained))
    assert step == 1 and f"M parameters from {trained}; fresh: none" in caplog.text
    stored = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert stored["init"] == {"src": str(trained), "only": [".*"], "skip": []}


def test_the_running_average_starts_where_the_parameters_do(trained):
    optim = OptimConfig(ema=0.9)
    state = start(tiny_config("new", init=InitConfig(str(trained / "checkpoints/8")), optim=optim))
    assert_equal(flat_params(state.params), params_of(trained))
    assert_equal(flat_params(state.ema), params_of(trained))


@pytest.mark.parametrize("scanned", ["source", "run"])
def test_scan_and_loop_layouts_meet(tmp_path, scanned):
    loop = dataclasses.replace(MODEL, image=dataclasses.replace(MODEL.image, depth=2))
    scan = dataclasses.replace(loop, image=dataclasses.replace(loop.image, scan=True))
    theirs, ours = (scan, loop) if scanned == "source" else (loop, scan)
    source = random_params(theirs)
    big_vision.write(tmp_path / "m.npz", source, theirs)
    flat = start_from(tmp_path / "m.npz", model=ours)
    for i in range(2):
        stack, single = (trees.flatten(source), flat) if scanned == "source" else (flat, trees.flatten(source))
        path = "MlpBlock_0/Dense_1/kernel"
        np.testing.assert_array_equal(
            stack[f"img/Transformer/encoderblock/{path}"][i], single[f"img/Transformer/encoderblock_{i}/{path}"]
        )
    images, tokens = random_inputs(loop)
    a, b = siglip.load(str(tmp_path / "m.npz")), Encoder(trees.unflatten(flat), ours)
    np.testing.assert_allclose(a.embed_images(images), b.embed_images(images), rtol=0, atol=towers_apart(loop))
    np.testing.assert_allclose(a.embed_texts(tokens), b.embed_texts(tokens), rtol=0, atol=towers_apart(loop))


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_another_resolution_and_patch_equal_what_load_makes_of_them(tmp_path, kind):
    config = square_model()
    if kind == "npz":
        big_vision.write(src := tmp_path / "m.npz", random_params(config), config)
    else:
        (src := tmp_path / "folder").mkdir()
        hugging_face.write(src, random_params(config), config)
    for image_size, patch_size in (((64, 48), (8, 8)), ((48, 48), (6, 12))):
        image = dataclasses.replace(config.image, image_size=image_size, patch_size=patch_size)
        model = dataclasses.replace(config, image=image)
        class_of = SourceModel(SourceImage(image_size=image_size, patch_size=patch_size))
        for name, recipe in (("spelled", model), ("open", class_of)):
            found = resolve(tiny_config(tmp_path / name, model=recipe, init=InitConfig(str(src))))
            assert (found.model.image.grid, found.model.text.spec) == (image.grid, config.text.spec)
            params = read_initial(found.init, found.model)
            expected = siglip.load(str(src), image_size, patch_size=patch_size)
            assert_equal(params, trees.flatten(jax.tree.map(np.asarray, expected.params)))


@pytest.mark.parametrize("kind", [big_vision, hugging_face], ids=["npz", "folder"])
def test_the_arrays_of_a_source_are_read_once(tmp_path, monkeypatch, kind):
    config, arrays, wholes = square_model(), [], []
    if kind is big_vision:
        big_vision.write(src := tmp_path / "m.npz", random_params(config), config)
    else:
        (src := tmp_path / "folder").mkdir()
        hugging_face.write(src, random_params(config), config)
    init, read = containers.LazyArray.__init__, kind.read

    def counting(self, shape, make, dtype="float32"):
        init(self, shape, lambda: arrays.append(shape) or make(), dtype)

    monkeypatch.setattr(containers.LazyArray, "__init__", counting)
    monkeypatch.setattr(kind, "read", lambda *args, **more: wholes.append(args) or read(*args, **more))
    model = SourceModel(SourceImage(patch_size=(4, 4)))  # another patch size than the source's
    found = resolve(tiny_config("new", model=model, init=InitConfig(str(src))))
    assert found.model.image.patch == (4, 4) and not arrays
    read_initial(found.init, found.model)
    assert arrays and len(wholes) == 1


def test_a_run_starts_with_its_sources_outputs(trained):
    config = tiny_config("new", model=SourceModel(SourceImage(image_size=(32, 24))), init=InitConfig(str(trained)))
    run, source = Encoder(start(config).params, resolve(config).model), siglip.load(str(trained), image_size=(32, 24))
    images, tokens = random_inputs(run.config)
    np.testing.assert_array_equal(run.embed_images(images), source.embed_images(images))
    np.testing.assert_array_equal(run.embed_texts(tokens), source.embed_texts(tokens))


def test_a_new_text_tower_is_what_it_would_be_without_a_source(trained):
    model = dataclasses.replace(MODEL, text=NEW_TEXT, bias_init=-3.0)
    params = start_from(trained, model=model, only=("img/.*",))
    config = tiny_config("new", model=model)
    fresh = flat_params(make_program(config).init({}).params)
    image = [path for path in params if path.startswith("img/")]
    assert_equal(params, params_of(trained), image)
    assert_equal(params, fresh, params.keys() - set(image))
    assert params["b"] == -3.0


def test_t_and_b_are_taken_with_the_towers_unless_told_otherwise(trained):
    source = params_of(trained)
    assert source["t"] != np.log(np.float32(10.0))
    params = start_from(trained, skip=("t|b", "txt/head/.*"))
    assert params["t"] == np.log(np.float32(10.0)) and params["b"] == -10.0
    assert np.any(params["txt/head/kernel"] != source["txt/head/kernel"])
    assert_equal(params, source, [p for p in source if p not in ("t", "b") and not p.startswith("txt/head/")])


def test_what_the_source_lacks_starts_fresh(trained, tmp_path, caplog):
    big_vision.write(tmp_path / "m.npz", read_run_params(trained)[0], MODEL)
    with caplog.at_level(logging.INFO, "siglip"):
        params = start_from(f"{tmp_path / 'm.npz'}:img")
    assert "fresh: b, t, txt" in caplog.text
    assert_equal(params, params_of(trained), [path for path in params if path.startswith("img/")])
    assert params["b"] == -10.0


def test_parameters_arrive_sharded(trained, monkeypatch):
    use_devices(monkeypatch, 8)
    put, shares = warm_start.put, []

    def spy(params, like):
        arrays = put(params, like)
        for path, array in arrays.items():
            assert array.sharding == trees.flatten(like)[path].sharding
            shares.append(max(shard.data.size for shard in array.addressable_shards) / array.size)
        return arrays

    monkeypatch.setattr(warm_start, "put", spy)
    assert_equal(start_from(trained, mesh=MeshConfig(fsdp=4, fsdp_min_size_bytes=1024)), params_of(trained))
    assert min(shares) == 0.25


@pytest.mark.slow
def test_a_run_that_has_a_checkpoint_needs_its_source_no_more(trained, program, tmp_path):
    shutil.copytree(trained, tmp_path / "src")
    model = SourceModel(text=SourceText(dropout=0.0))

    def config(steps):
        return tiny_config(tmp_path / "run", model=model, init=InitConfig(str(tmp_path / "src")), total_steps=steps)

    train_until(config(8), 4, program)
    shutil.rmtree(tmp_path / "src")
    resumed = train(config(8), TinyBatches(), program=program)
    whole = train(tiny_config(tmp_path / "whole", init=InitConfig(str(trained))), TinyBatches(), program=program)
    assert_equal(flat_params(resumed.params), flat_params(whole.params))
    with pytest.raises(ValueError, match=r"belongs to another run: init.skip.0 is 'absent' there and 't' here"):
        train(dataclasses.replace(config(8), init=InitConfig(str(tmp_path / "src"), skip=("t",))), TinyBatches())
    with pytest.raises(FileNotFoundError, match=f"nothing at '{tmp_path / 'src'}'"):
        train(dataclasses.replace(config(8), workdir=str(tmp_path / "new")), TinyBatches())
    assert not (tmp_path / "new").exists()


def train_until(config, stop_at, program):
    """Trains and saves at every step, until batch `stop_at` does not come."""

    class Ends(TinyBatches):
        def __next__(self):
            if self.position == stop_at:
                raise KeyError("the end")
            return super().__next__()

    with pytest.raises(KeyError, match="the end"):
        train(dataclasses.replace(config, checkpoint=CheckpointConfig(every_steps=1)), Ends(), program=program)


def refused(init, model=MODEL, *, match, tokenizer=None):
    with pytest.raises(ValueError, match=match) as error:
        read_initial(init, model, tokenizer=tokenizer)
    assert "\n" not in str(error.value)


def test_other_architectures_are_named_field_by_field(trained):
    deeper = dataclasses.replace(
        MODEL,
        image=dataclasses.replace(MODEL.image, depth=2, pool="gap"),
        text=dataclasses.replace(MODEL.text, mlp_dim=64, pool="map", vocab_size=51),
    )
    refused(
        InitConfig(str(trained)),
        deeper,
        match=r"of another architecture: model.image.depth is 1 there and 2 here; model.image.pool is 'map' there and 'gap' "
        r"here; model.text.mlp_dim is 128 there and 64 here; model.text.vocab_size is 50 there and 51 here; model.text.pool is "
        r"'last' there and 'map' here; take over the source's with model=SourceModel\(\) .*--init.only 'img/\.\*' does",
    )
    # Heads can differ where widths do not: the shapes would tell, the config says it better.
    heads = dataclasses.replace(MODEL, image=dataclasses.replace(MODEL.image, num_heads=4))
    refused(InitConfig(str(trained)), heads, match="model.image.num_heads is 2 there and 4 here")
    assert read_initial(InitConfig(str(trained), only=("txt/.*",)), heads)


def test_differences_that_are_meant_are_let_through(trained):
    gap = dataclasses.replace(MODEL, image=dataclasses.replace(MODEL.image, pool="gap"))
    taken = read_initial(InitConfig(str(trained), skip=("img/MAPHead_0/.*",)), gap)
    assert taken.keys() == trees.flatten(param_shapes(gap)).keys()
    longer = dataclasses.replace(MODEL, text=dataclasses.replace(MODEL.text, length=9, vocab_size=77))
    taken = read_initial(InitConfig(str(trained), skip=("txt/pos_embedding", "txt/Embed_0/.*")), longer)
    assert "txt/head/kernel" in taken and "txt/pos_embedding" not in taken


def test_left_over_and_misshapen_arrays_are_all_named_with_the_fix(trained):
    model = ModelConfig(MODEL.image, MODEL.text, out_dim=(16, 16))
    refused(
        InitConfig(str(trained), skip=("b",)),
        model,
        match=r"does not fit the model: txt/head/bias is \(32,\) there and \(16,\) here; txt/head/kernel is \(32, 32\) there and "
        r"\(32, 16\) here; change the model, or leave them out: --init.skip 'b' 'txt/head/\.\*'$",
    )
    headless = ModelConfig(MODEL.image, MODEL.text, out_dim=(None, None))
    refused(InitConfig(str(trained)), headless, match=r"txt/head/bias \(32,\) is not in the model; txt/head/kernel")
    assert "txt/head/bias" not in read_initial(InitConfig(str(trained), skip=("txt/head/.*",)), headless)


def test_patterns_that_do_nothing(trained):
    refused(
        InitConfig(str(trained), only=("image/.*",)),
        match=r"init.only, of init.src=.*'image/\.\*' matches no parameter",
    )
    refused(InitConfig(str(trained), skip=("txt/heads/.*",)), match="init.skip: pattern 'txt/heads")
    refused(InitConfig(str(trained), only=("t",), skip=("t",)), match="take nothing of init.src")
    refused(InitConfig(str(trained), only=("img(",)), match="is not a regular expression")
    with pytest.raises(ValueError, match="init.only is empty"):
        InitConfig("x", only=())


def test_token_embeddings_of_another_tokenizer(trained):
    refused(
        InitConfig(str(trained)),
        tokenizer=b"other pieces",
        match=r"another tokenizer than data.tokenizer; use --data.tokenizer .*tokenizer.model, or a new text tower",
    )
    for init in (InitConfig(str(trained), only=("img/.*",)), InitConfig(str(trained), skip=("txt/Embed_0/.*",))):
        assert read_initial(init, MODEL, tokenizer=b"other pieces")
    assert read_initial(InitConfig(str(trained)), MODEL, tokenizer=TOKENIZER)


def test_token_embeddings_of_an_unknown_tokenizer_are_taken_with_a_warning(trained, tmp_path, caplog):
    source = str(tmp_path / "m.npz")
    big_vision.write(tmp_path / "m.npz", siglip.load(str(trained)).params, MODEL)
    for only in ((".*",), ("img/.*", "t", "b")):
        assert read_initial(InitConfig(source, only), MODEL, tokenizer=TOKENIZER)
    assert read_initial(InitConfig(str(trained)), MODEL, tokenizer=TOKENIZER)
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert message.startswith(f"init.src={source!r} does not say which tokenizer its token embeddings are of")


def open_config(src, model, workdir="new", *, tokenizer="unused.model"):
    config = tiny_config(workdir, init=InitConfig(str(src)), model=model)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=tokenizer))


def test_a_source_model_is_the_sources_with_what_differs(trained, tmp_path):
    found = resolve(open_config(trained, SourceModel(), tokenizer=None))
    assert found.model == MODEL and found.data.tokenizer == str(trained / "tokenizer.model")
    image = SourceImage(image_size=(32, 32), scan=True, dtype="bfloat16", patch_dropout=0.5, pool="gap")
    found = resolve(open_config(trained, SourceModel(image, NEW_TEXT, bias_init=0.0))).model
    assert found == ModelConfig(
        dataclasses.replace(
            MODEL.image, image_size=(32, 32), scan=True, dtype="bfloat16", patch_dropout=0.5, pool="gap"
        ),
        NEW_TEXT,
        out_dim=(None, 32),
        bias_init=0.0,
    )
    # The workdir knows it as well, and what differs from that is refused like any other setting.
    (tmp_path / CONFIG_FILE).write_text((trained / CONFIG_FILE).read_text())
    assert resolve(open_config(tmp_path / "gone", SourceModel(), tmp_path)).model == MODEL
    assert resolve(open_config(tmp_path / "gone", SourceModel(image), tmp_path)).model.image.dtype == "bfloat16"


def test_open_ends_that_stay_open(trained, tmp_path):
    big_vision.write(tmp_path / "m.npz", read_run_params(trained)[0], MODEL)
    with pytest.raises(ValueError, match=r"brings no tokenizer; .* --data.tokenizer FILE"):
        resolve(open_config(tmp_path / "m.npz", SourceModel(), tokenizer=None))
    with pytest.raises(ValueError, match=r"has no text tower; describe a new one in the recipe: model.text=TextConfig"):
        resolve(open_config(f"{tmp_path / 'm.npz'}:img", SourceModel()))
    assert resolve(open_config(f"{tmp_path / 'm.npz'}:img", SourceModel(text=NEW_TEXT))).model.text == NEW_TEXT
    with pytest.raises(ValueError, match="model is a SourceModel.*--init.src SRC"):
        tiny_config("new", model=SourceModel())
    with pytest.raises(ValueError, match="data.tokenizer is None.*--data.tokenizer FILE"):
        config = tiny_config("new")
        dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=None))
    with pytest.raises(ValueError, match="init.only and init.skip.*--init.src SRC"):
        tiny_config("new", init=InitConfig(skip=("t",)))
    with pytest.raises(FileNotFoundError, match="nothing at"):
        resolve(open_config(tmp_path / "none", SourceModel()))


def test_configs_with_open_ends_survive_json(trained):
    config = open_config(trained, SourceModel(SourceImage(image_size=(32, 32)), NEW_TEXT), tokenizer=None)
    assert from_json(to_json(config)) == config
    assert from_json(to_json(tiny_config("new"))) == tiny_config("new")


def test_processes_that_read_other_parameters_do_not_start(trained):
    params = read_initial(InitConfig(str(trained)), MODEL)
    other = params | {"img/MAPHead_0/probe": params["img/MAPHead_0/probe"] + 1e-7}
    assert warm_start.digest(params) == warm_start.digest(dict(reversed(params.items()))) != warm_start.digest(other)
