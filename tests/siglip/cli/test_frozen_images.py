"""Training on kept image embeddings: the run that images would give, computed once, for one tower, whatever happens."""

import dataclasses
import functools
import io
import signal
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from data_pipelines import image_embeddings
from data_pipelines.augment import AugmentConfig
from data_pipelines.loader import DataConfig, make_loader
from data_pipelines.order.mixture import SourceConfig
from data_pipelines.samples.pairs import ImageDecoder
from siglip import trees
from siglip.cli import frozen_images, run
from siglip.cli.frozen_images import StoppedComputing, check_frozen, fingerprint, make_prepare
from siglip.formats import big_vision
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.models.variants import BlockConfig
from siglip.parallel.sharding import MeshConfig, make_mesh, param_shardings
from siglip.training.config import TrainConfig
from siglip.training.objective import Term
from siglip.training.optim import OptimConfig
from siglip.workdir.metrics import read_metrics
from tests.siglip.jobs import LOSS_RTOL, Jobs, losses, params
from tests.siglip.rounding import rounding, towers_apart
from tests.siglip.tiny import random_params, square_model
from tests.siglip.tiny_run import use_devices

SAMPLE = Path(__file__).parents[3] / "data_pipelines" / "sample"
MODEL = ModelConfig(
    ImageConfig(variant="mu", patch_size=(8, 8), image_size=(16, 16)),
    TextConfig(variant="mu", vocab_size=4000, length=8),
    out_dim=(None, 32),
)
PAIRS, BROKEN = 40, 5
FROZEN = OptimConfig(lr=3e-3, warmup_steps=2, lr_mults=(("img/.*", 0.0),))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """shard.tar: the first pairs of the shipped sample, one image cut off; tower.npz: a model; recipe.py: SigLIT with them."""
    folder = tmp_path_factory.mktemp("frozen")
    with (
        tarfile.open(SAMPLE / "emoji-train-00000.tar") as sample,
        tarfile.open(folder / "shard.tar", "w") as small,
    ):
        for number, member in enumerate(sample.getmembers()[: 3 * PAIRS]):
            content = sample.extractfile(member).read()
            if number // 3 == BROKEN and member.name.endswith(("png", "webp", "jpg")):
                content = content[: len(content) // 2]
                member.size = len(content)
            small.addfile(member, io.BytesIO(content))
    big_vision.write(folder / "tower.npz", random_params(MODEL), MODEL)
    (folder / "recipe.py").write_text(RECIPE.format(folder=folder, tokenizer=SAMPLE / "spiece.model"))
    return folder


RECIPE = """
from data_pipelines.loader import DataConfig
from data_pipelines.order.mixture import SourceConfig
from siglip.evaluation.retrieval import Retrieval
from siglip.training.config import EvalConfig, TrainConfig
from siglip.training.warm_start import InitConfig, SourceModel
from siglip.workdir.metrics import LogConfig
from siglip.models.two_tower import TextConfig
from siglip.training.optim import OptimConfig

def get_config():
    return TrainConfig(
        init=InitConfig("{folder}/tower.npz", only=("img/.*",)),
        data=DataConfig(sources=(SourceConfig("{folder}/shard.tar", captions=(("captions.*", 1.0),)),), tokenizer="{tokenizer}"),
        model=SourceModel(text=TextConfig(variant="mu", vocab_size=4000, length=8)),
        total_steps=8,
        batch_size=16,
        workdir="unused",
        optim=OptimConfig(lr=3e-3, warmup_steps=2, lr_mults=(("img/.*", 0.0),)),
        eval=EvalConfig(tasks=(Retrieval("{folder}/shard.tar", captions=("captions.en",), name="toy"),)),
        log=LogConfig(every_steps=1, progress=False),
    )
"""


def config_of(folder: Path, **overrides) -> TrainConfig:
    """What of the recipe the embeddings depend on, without a file to be read."""
    data = DataConfig(
        sources=(SourceConfig(str(folder / "shard.tar"), captions=(("captions.en", 1.0),)),),
        tokenizer=str(SAMPLE / "spiece.model"),
        image_embeddings=str(folder / "store"),
    )
    config = TrainConfig(data=data, model=MODEL, total_steps=8, batch_size=16, workdir="unused", optim=FROZEN)
    return dataclasses.replace(config, **overrides)


def loader_of(config: TrainConfig):
    size = {"image_size": config.model.image.image_size, "text_length": config.model.text.length}
    return make_loader(config.data, batch_size=config.batch_size, seed=0, **size)


@pytest.mark.slow
def test_the_run_is_that_of_images(folder, tmp_path, monkeypatch):
    use_devices(monkeypatch, 1)
    recipe, store = str(folder / "recipe.py"), ["--data.image-embeddings", str(tmp_path / "store")]
    assert run(["train", recipe, "--workdir", str(tmp_path / "images")]) == 0
    assert run(["train", recipe, "--workdir", str(tmp_path / "kept"), *store]) == 0
    # Found again, on other devices, sharded, and in micro-batches: no image of the training set is looked at.
    use_devices(monkeypatch, 4)
    layout = ["--mesh.fsdp", "2", "--mesh.fsdp-min-size-bytes", "4096", "--loss.micro-batch-size", "8"]
    with monkeypatch.context() as patch:
        patch.setattr(frozen_images._Computation, "_compute", lambda *_: pytest.fail("computed again"))
        assert run(["train", recipe, "--workdir", str(tmp_path / "again"), *store, *layout]) == 0

    expected, source = params(tmp_path / "images"), trees.flatten(random_params(MODEL))
    results = [read_metrics(tmp_path / name)[-1] for name in ("images", "kept", "again")]
    assert results[0]["eval/retrieval/toy/image_retrieval_recall@10"] > 0
    for name in ("kept", "again"):
        found = losses(tmp_path / name)
        np.testing.assert_allclose(list(found.values()), list(losses(tmp_path / "images").values()), rtol=LOSS_RTOL)
        for path, leaf in params(tmp_path / name).items():
            if path.startswith("img/"):
                np.testing.assert_array_equal(leaf, source[path], err_msg=path)
            elif not path.endswith("key/bias"):  # its gradient is rounding, which Adam makes as large as any other
                np.testing.assert_allclose(leaf, expected[path], atol=2e-5, err_msg=path)
    counted = [read_metrics(tmp_path / name)[7] for name in ("images", "kept", "again")]
    assert len({tuple((k, v) for k, v in line.items() if "substituted" in k) for line in counted}) == 1
    assert any("substituted" in name for name in counted[0])


def small_parts(monkeypatch, part_pairs=16):
    opened = functools.partial(image_embeddings.open_image_embeddings, part_pairs=part_pairs)
    monkeypatch.setattr(frozen_images, "open_image_embeddings", opened)


def test_stopped_and_started_again_it_goes_on_with_the_next_part(folder, tmp_path, monkeypatch):
    small_parts(monkeypatch)
    data = dataclasses.replace(config_of(folder).data, image_embeddings=str(tmp_path))
    config, tower = config_of(folder, data=data), {"img": random_params(MODEL)["img"]}
    decoded, decode = [], ImageDecoder.decode

    def count(decoder, pair):
        decoded.append(pair.key)
        return decode(decoder, pair)

    monkeypatch.setattr(ImageDecoder, "decode", count)
    signals = iter([None, signal.SIGTERM])
    with pytest.raises(
        StoppedComputing, match="stopped by SIGTERM with 2 parts of the image embeddings left"
    ) as stopped:
        make_prepare(config, loader_of(config))(0, tower, lambda: next(signals))
    assert stopped.value.signum == signal.SIGTERM
    (store,) = tmp_path.iterdir()
    assert sorted(path.name for path in store.glob("*.npy")) == ["00000.npy"]
    first = (store / "00000.npy").read_bytes()

    decoded.clear()
    loader = loader_of(config)
    make_prepare(config, loader)(0, tower, lambda: None)
    assert len(decoded) == PAIRS - 16 and len(set(decoded)) == len(decoded)
    assert (store / "00000.npy").read_bytes() == first and len(list(store.glob("*.npy"))) == 3
    assert not list(store.glob(".*")) and next(loader)["zimg"].shape == (16, 32)
    loader.close()


def test_another_tower_gets_embeddings_of_its_own(folder, tmp_path):
    data = dataclasses.replace(config_of(folder).data, image_embeddings=str(tmp_path))
    config, seen = config_of(folder, data=data), []
    for seed in (0, 1, 0):
        loader = loader_of(config)
        make_prepare(config, loader)(0, {"img": random_params(MODEL, seed=seed)["img"]}, lambda: None)
        seen.append(next(loader)["zimg"])
        loader.close()
    assert len(list(tmp_path.iterdir())) == 2
    np.testing.assert_array_equal(seen[0], seen[2])
    assert np.abs(seen[0] - seen[1]).max() > 0.1
    np.testing.assert_allclose(np.linalg.norm(seen[0], axis=1), 1, rtol=rounding(32 + 3))  # squares, root, quotient


def test_the_fingerprint_is_of_the_function_not_of_where_it_lies():
    tower = random_params(MODEL)["img"]
    found = fingerprint(tower, MODEL)
    mesh_config = MeshConfig(fsdp=8, fsdp_min_size_bytes=64)
    shardings = param_shardings(tower, make_mesh(mesh_config), mesh_config)
    assert fingerprint(jax.device_put(tower, shardings), MODEL) == found

    def image(**changes):
        return dataclasses.replace(MODEL, image=dataclasses.replace(MODEL.image, **changes))

    assert fingerprint(tower, image(remat="full", attention="xla", patch_dropout=0.5)) == found
    kernel = tower["embedding"]["kernel"]
    one_bit, swapped, negative = kernel.copy(), kernel.copy(), kernel.copy()
    one_bit[0, 0, 0, 0] = np.nextafter(one_bit[0, 0, 0, 0], 1)
    swapped[[0, 1]] = swapped[[1, 0]]
    negative[3, 3, 1, 4] *= -1
    others = [tower | {"embedding": tower["embedding"] | {"kernel": k}} for k in (one_bit, swapped, negative)]
    prints = [fingerprint(other, MODEL) for other in others]
    prints += [fingerprint(tower, model) for model in (image(image_size=(17, 17)), image(dtype="bfloat16"))]
    block = BlockConfig(parallel=True)  # it has fewer parameters, too, but is another function of the same ones
    prints += [fingerprint(tower, model) for model in (image(residual_dtype="bfloat16"), image(block=block))]
    assert len({found, *prints}) == 8


def test_stores_of_before_a_setting_stay_valid():
    """Fingerprints that were written before residual_dtype, block and unroll were there."""
    for change, known in (({}, "c5dd4b629cea2336"), ({"dtype": "bfloat16", "pool": "gap"}, "f9468539e55ecdcb")):
        model = square_model(image=change)
        assert fingerprint(random_params(model)["img"], model) == known


@pytest.mark.parametrize(
    "change, match",
    [
        ({"augment": AugmentConfig()}, "data.augment changes images every time; set data.augment to None"),
        ({"image": {"patch_dropout": 0.5}}, r"model.image.patch_dropout=0.5 does so; use --model.image.patch-dropout 0"),
        ({"image": {"dropout": 0.1}}, r"model.image.dropout=0.1 does so"),
        ({"lr_mults": (("txt/.*", 0.5),)}, r"img/MAPHead_0/LayerNorm_0/bias and \d+ more trains; freeze the whole image tower"),
        ({"lr_mults": (("img/head/.*", 1.0), ("img/.*", 0.0))}, r"img/head/bias and 1 more trains"),
        ({"terms": (Term("depth"),)}, r"the image tower does not run then, which the terms depth may read; leave out"),
    ],
)  # fmt: skip
def test_images_without_one_lasting_embedding_are_refused(tmp_path, change, match):
    config = config_of(tmp_path)
    data = dataclasses.replace(config.data, augment=change.get("augment"))
    image = dataclasses.replace(MODEL.image, **change.get("image", {}))
    model = ModelConfig(image, MODEL.text, out_dim=(32, 32))
    optim = dataclasses.replace(FROZEN, lr_mults=change.get("lr_mults", FROZEN.lr_mults))
    with pytest.raises(ValueError, match=f"throughout training, but {match}") as error:
        terms = change.get("terms", ())
        check_frozen(dataclasses.replace(config, data=data, model=model, optim=optim, terms=terms))
    assert "\n" not in str(error.value)
    check_frozen(config)


def test_a_tower_that_makes_nan_is_not_kept(folder, tmp_path):
    data = dataclasses.replace(config_of(folder).data, image_embeddings=str(tmp_path))
    config, tower = config_of(folder, data=data), random_params(MODEL)["img"]
    tower["embedding"]["bias"][0] = np.nan
    with pytest.raises(RuntimeError, match="the image tower makes NaN of pair 0 of .*shard.tar"):
        make_prepare(config, loader_of(config))(0, {"img": tower}, lambda: None)
    assert not list(tmp_path.rglob("*.npy"))


@pytest.mark.slow
def test_processes_share_the_work_and_train_as_one_does(folder, tmp_path):
    jobs = Jobs(tmp_path, evaluate=False)
    lines = (folder / "recipe.py").read_text().splitlines()
    jobs.recipe.write_text("\n".join(line for line in lines if "eval=" not in line))
    try:
        one = jobs.run("one", "--data.image-embeddings", str(tmp_path / "s1"), processes=1, devices=2)
        two = jobs.run("two", "--data.image-embeddings", str(tmp_path / "s2"), processes=2, devices=1)
    finally:
        jobs.close()
    np.testing.assert_allclose(list(losses(two.workdir).values()), list(losses(one.workdir).values()), rtol=LOSS_RTOL)
    stores = [list((tmp_path / name).rglob("*.npy")) for name in ("s1", "s2")]
    assert [path.relative_to(tmp_path / "s1") for path in stores[0]] == [
        path.relative_to(tmp_path / "s2") for path in stores[1]
    ]
    np.testing.assert_allclose(np.load(stores[0][0]), np.load(stores[1][0]), rtol=0, atol=towers_apart(MODEL))
