"""Every task from files to metrics, on generated shapes and a model with random parameters."""

import csv
import dataclasses
import functools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from siglip.cli import reporting, run
from siglip.cli.evaluation import embedder_of, first_values
from siglip.errors import UserError
from siglip.evaluation.association import Association
from siglip.evaluation.attentive_probe import AttentiveProbe
from siglip.evaluation.class_files import Classes
from siglip.evaluation.embed import EmbeddedImages, Embedder
from siglip.evaluation.fewshot import FewShot
from siglip.evaluation.groups import Groups
from siglip.evaluation.knn import Knn
from siglip.evaluation.linear_probe import LinearProbe
from siglip.evaluation.retrieval import Retrieval
from siglip.evaluation.segmentation import Segmentation
from siglip.evaluation.selection import Selection
from siglip.evaluation.text_cache import caching
from siglip.evaluation.verification import Verification
from siglip.evaluation.zeroshot import ZeroShot
from siglip.formats import big_vision
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.training.config import EvalConfig
from tests.siglip.jobs import SAMPLE
from tests.siglip.rounding import rounding
from tests.siglip.shapes import CLASSES, write_shapes
from tests.siglip.tiny import random_params

SPIECE = str(SAMPLE / "spiece.model")
MODEL = ModelConfig(
    image=ImageConfig(variant="mu", patch_size=(8, 8), image_size=(32, 32)),
    text=TextConfig(variant="mu", vocab_size=4000, length=8),
    out_dim=(24, 24),
)
TRAIN, TEST = 48, 30


@pytest.fixture(scope="module")
def src(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m.npz"
    big_vision.write(path, random_params(MODEL), MODEL)
    return path


@pytest.fixture(scope="module")
def embedder(src) -> Embedder:
    return embedder_of(src, tokenizer=SPIECE, batch_size=16)


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> str:
    return str(write_shapes(tmp_path_factory.mktemp("train") / "train.parquet", count=TRAIN, seed=0))


@pytest.fixture(scope="module")
def test(tmp_path_factory) -> str:
    return str(write_shapes(tmp_path_factory.mktemp("test") / "shapes.parquet", count=TEST, seed=1))


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("classes") / "classes.txt"
    path.write_text("\n".join(CLASSES))
    return str(path)


def metrics_of(task, embedder) -> dict[str, float]:
    task.check(first_values)
    (result,) = task.run(embedder)
    assert result.dataset == "shapes" and all(np.isfinite(list(result.metrics.values())))
    return result.metrics


def test_features_by_their_names(embedder, test):
    found = {
        feature: embedder.embed_shards(test, feature=feature).zimg
        for feature in ("embedding", "map", "patch_mean", "head", "tokens")
    }
    width, patches = MODEL.image.spec.width, 16
    assert found["tokens"].shape == (TEST, patches, width) and found["map"].shape == (TEST, width)
    assert found["head"].shape == found["embedding"].shape == (TEST, 24)
    # Sums of the same numbers, each in an order of its own.
    close = functools.partial(np.testing.assert_allclose, rtol=0)
    size = np.abs(found["tokens"]).mean(axis=1).max()
    close(found["tokens"].mean(axis=1), found["patch_mean"], atol=2 * rounding(patches, size))
    head = random_params(MODEL)["img"]["head"]
    size = (np.abs(found["map"]) @ np.abs(head["kernel"]) + np.abs(head["bias"])).max()
    close(found["map"] @ head["kernel"] + head["bias"], found["head"], atol=2 * rounding(width + 1, size))
    # A norm is off by half as much as its sum of 24 squares; then come its root and a division.
    norm, size = np.linalg.norm(found["head"], axis=1, keepdims=True), np.abs(found["embedding"]).max()
    close(found["head"] / norm, found["embedding"], atol=2 * rounding(24 // 2 + 2, size))


def test_probes_read_colours_off_random_features(embedder, train, test):
    knn = metrics_of(Knn(test, train, k=3, feature="patch_mean"), embedder)
    parts = {"knn_acc1_patch_mean", "knn_acc1_patch_mean_se", "knn_acc1_patch_mean_chance"}
    parts |= {f"knn_mean_per_class_recall_patch_mean{end}" for end in ("", "_se", "_chance")}
    assert set(knn) == parts and knn["knn_acc1_patch_mean_chance"] == 1 / 6
    assert knn["knn_acc1_patch_mean"] > 0.4  # chance 1/6, the colour alone 1/2
    names = metrics_of(Knn(test, train, label="name", k=3, feature="patch_mean"), embedder)
    assert names == pytest.approx(knn)
    fewshot = metrics_of(FewShot(test, train, shots=(1, 5), seeds=(0, 1), feature="patch_mean"), embedder)
    ends = ("", "_se", "_chance", "_seed0", "_seed1")
    assert set(fewshot) == {f"fewshot_acc1_patch_mean_{s}shot{e}" for s in (1, 5) for e in ends}
    assert fewshot["fewshot_acc1_patch_mean_5shot"] > 0.4


def test_a_linear_and_an_attentive_probe(embedder, train, test):
    linear = metrics_of(LinearProbe(test, train, c=(0.01, 1.0), feature="patch_mean"), embedder)
    assert linear["lp_acc1_patch_mean"] > 0.45 and linear["lp_acc5_patch_mean"] > linear["lp_acc1_patch_mean"]
    assert linear["c"] in (0.01, 1.0)
    # One value is not chosen; features of length one are another protocol.
    task = LinearProbe(test, train, c=(1.0,), feature="patch_mean", l2_normalise=True)
    assert metrics_of(task, embedder)["lp_acc1_patch_mean"] > 0.4
    attentive = metrics_of(
        AttentiveProbe(test, train, heads=4, epochs=30, images_per_step=16, learning_rate=0.01), embedder
    )
    parts = {"ap_acc1_tokens", "ap_acc1_tokens_se", "ap_acc1_tokens_chance"}
    parts |= {f"ap_mean_per_class_recall_tokens{end}" for end in ("", "_se", "_chance")}
    assert set(attentive) == parts and attentive["ap_acc1_tokens"] > 0.4


def test_a_probe_needs_labels_of_one_kind_and_of_two_classes(embedder, train, tmp_path):
    names, path = [f"{n}.png" for n in range(8)], tmp_path / "shapes.jsonl"
    for name, image in zip(names, pq.read_table(train)["image"].to_pylist(), strict=False):
        (tmp_path / name).write_bytes(image["bytes"] if isinstance(image, dict) else image)
    for labels, message in ((["cat"] * 8, "all images of .* have the label 'cat'"), ([1, "a"] * 4, "numbers mixed")):
        rows = [json.dumps({"image": name, "cls": label}) for name, label in zip(names, labels, strict=True)]
        path.write_text("\n".join(rows))
        for task in (Knn(str(path), str(path)), AttentiveProbe(str(path), str(path), heads=4)):
            with pytest.raises(UserError, match=message):
                task.run(embedder)
    with pytest.raises(UserError, match="heads=12 does not divide the width 32"):  # before an image is read
        AttentiveProbe(str(path), str(tmp_path / "gone.tar")).run(embedder)


def test_pixels_of_coloured_shapes_are_told_apart(embedder, train, test):
    found = metrics_of(Segmentation(test, train, steps=120, learning_rate=0.03), embedder)
    # All background is 1/4 of the classes at the share of the background, about .75.
    assert found["mean_iou_tokens"] > 0.35 and found["pixel_acc_tokens"] > 0.8


def test_masks_go_with_images_that_are_resized_whole(src, train, test):
    cropping = embedder_of(src, tokenizer=SPIECE, batch_size=16, pixels="aspect75")
    with pytest.raises(ValueError, match="masks are resized whole, but pixels=aspect75 cuts images; use pixels=squash"):
        Segmentation(test, train).run(cropping)


def test_images_without_labels_are_left_out_of_a_mean_average_precision(embedder, caplog):
    z = np.eye(3, dtype=np.float32)
    task, classes = ZeroShot("x.tar"), Classes(["a", "b", "c"])
    labelled = EmbeddedImages(z[:2], [0, 1], ["0", "1"], {"cls": [[1, 0, 1], [0, 1, 0]]})
    gaps = EmbeddedImages(z, [0, 1, 2], ["0", "1", "2"], {"cls": [[1, 0, 1], [0, 1, 0], []]})
    assert task.score(gaps, classes, z, "abc") == task.score(labelled, classes, z, "abc")
    assert "1 images of x.tar left out because they have no label 'cls'" in caplog.text


def test_classes_of_equal_prompts_are_named(embedder, caplog):
    task = ZeroShot("x.tar", json.dumps(["missile", "crane", "Missile", "crane!"]), json.dumps(["a {}"]))
    task.class_weights(embedder)
    told = "2 of 4 classes have the prompts of an earlier one, such as 'Missile' (no. 0 and 2): their images count as wrong"
    assert told in caplog.text
    caplog.clear()
    dataclasses.replace(task, canonical=False).class_weights(embedder)  # the tokenizer makes all of it lower case
    assert (
        "1 of 4 classes have the tokens (at most 8) of an earlier one, such as 'Missile' (no. 0 and 2)" in caplog.text
    )


def test_classes_that_the_text_tower_cuts_to_the_same_tokens(embedder, caplog):
    """This one takes 8 tokens."""
    long = "photo of a very large and rather old {}"
    names = ["cat", "dog"]
    with pytest.raises(
        UserError, match="the text tower takes 8 tokens, and all 2 classes have the same ones, such as 'ph"
    ):
        ZeroShot("x.tar", json.dumps(names), json.dumps([long])).class_weights(embedder)
    prompts = {"cat": ["a cat"], "dog": [long.format("dog")], "cow": [long.format("cow")]}
    ZeroShot("x.tar", json.dumps([*prompts]), json.dumps(prompts)).class_weights(embedder)
    assert "1 of 3 classes have the tokens (at most 8) of an earlier one, such as 'cow' (no. 1 and 2)" in caplog.text
    caplog.clear()
    ZeroShot("x.tar", json.dumps(names), json.dumps([long, "a {}"])).class_weights(
        embedder
    )  # one prompt tells them apart
    assert not caplog.text


def test_a_probe_needs_neither_text_tower_nor_tokenizer(src, train, test, tmp_path, capsys):
    params = random_params(MODEL)
    image_only = dataclasses.replace(MODEL, text=None, out_dim=(24, None))
    big_vision.write(tmp_path / "image.npz", {"img": params["img"]}, image_only)
    tables = []
    for model in (src, tmp_path / "image.npz"):
        assert run(["eval", str(model), "--task", "knn", "--data", test, "--train", train, "--batch-size", "16"]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
    entries = [{"task": "knn", "data": test, "train": train}]
    (tmp_path / "suite.yaml").write_text(json.dumps({"entries": entries}))
    flags = ["--suite", str(tmp_path / "suite.yaml"), "--out", str(tmp_path / "out"), "--batch-size", "16"]
    assert run(["eval", str(tmp_path / "image.npz"), *flags]) == 0
    (tmp_path / "suite.yaml").write_text(json.dumps({"entries": [*entries, {"task": "retrieval", "data": train}]}))
    assert run(["eval", str(tmp_path / "image.npz"), *flags]) == 2
    assert "the model has no text tower" in capsys.readouterr().err


def test_groups(embedder, test, classes):
    found = metrics_of(Groups(test, "place", classes, min_images=5), embedder)
    assert {"n_north", "n_south", "n_west"} <= set(found) and found["n_north"] + found["n_south"] + found[
        "n_west"
    ] == 30
    found = metrics_of(Groups(test, "place", classes, min_images=5, left_out=("west",)), embedder)
    assert "n_west" not in found
    diverged = dataclasses.replace(embedder, embed=lambda batch: jnp.full((16, 24), jnp.nan), text_embeddings={})
    with pytest.raises(ValueError, match="some embeddings are not finite"):
        Groups(test, "place", classes, min_images=5).run(diverged)


def test_several_labels_are_ranked_and_subsets_and_maps_take_part(embedder, test, classes, tmp_path, caplog):
    found = metrics_of(ZeroShot(test, classes, label="colours"), embedder)
    name = "mean_average_precision"
    assert set(found) == {name, f"{name}_se", f"{name}_chance"} and found[f"{name}_chance"] < found[name] < 1
    subset = tmp_path / "subset.txt"
    subset.write_text("red square\n2\n")
    found = metrics_of(ZeroShot(test, classes, subset=str(subset)), embedder)
    parts = {"acc1", "mean_per_class_recall", "mean_per_class_recall_se", "tied_fraction"}
    assert set(found) == parts  # two classes: no acc5
    assert f"20 images of {test} are of classes outside" in caplog.text
    of_two = tmp_path / "two.txt"
    of_two.write_text("red square\ngreen square\n")
    mapping = tmp_path / "map.json"
    mapping.write_text(json.dumps({"0": "red square", "2": 1}))
    assert metrics_of(ZeroShot(test, str(of_two), label_map=str(mapping)), embedder) == found
    assert "has no class for them" in caplog.text


def test_captions_are_selected_and_pairs_verified(embedder, test, tmp_path):
    found = metrics_of(Selection(test), embedder)
    parts = {"text_acc", "text_acc_se", "text_acc_chance", "tied_fraction"}
    assert set(found) == parts and 0 < found["text_acc"] < 1
    pairs = metrics_of(Selection(test, captions=("txt",), instance="pair"), embedder)
    assert set(pairs) > parts | {"image_acc", "acc"}
    assert pairs["acc"] <= min(pairs["text_acc"], pairs["image_acc"])
    found = metrics_of(Verification(test, priors=(0.5, 0.1), train_batch_size=256, negatives=3), embedder)
    assert 0 < found["roc_auc"] < 1 and found["average_precision@0.1"] < found["average_precision@0.5"]
    assert found["roc_auc_chance"] == 0.5 and found["average_precision@0.1_chance"] == 0.1
    assert min(found["roc_auc_se"], found["average_precision_se@0.1"], found["brier_se@0.5"]) > 0
    assert {"ece@0.1", "ece_shifted@0.1", "ece_shifted_se@0.5", "observed_over_expected@0.5"} <= set(found)
    found = metrics_of(Verification(test, match="match"), embedder)
    assert 0 < found["roc_auc"] < 1
    table = pq.read_table(test)
    texts = table["match"].cast(pa.string())  # as CSV files have them
    pq.write_table(table.set_column(table.column_names.index("match"), "match", texts), tmp_path / "shapes.parquet")
    assert metrics_of(Verification(str(tmp_path / "shapes.parquet"), match="match"), embedder) == found


def test_images_that_go_with_a_cue(embedder, test, tmp_path, caplog):
    rows = [
        {"cue": "orange\u2028disc", "candidates": [f"1-{n}" for n in range(5)], "associations": ["1-1", "1-3"]},
        {"cue": "red_thing", "candidates": [f"1-{n}" for n in range(5, 15)], "associations": ["1-6"]},
        {"cue": "away", "candidates": ["1-0", "gone"], "associations": ["gone"]},
    ]
    (tmp_path / "i.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    with (tmp_path / "i.csv").open("w") as file:  # as the published table has its lists
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({name: repr(value) if name != "cue" else value for name, value in row.items()} for row in rows)
    found = metrics_of(Association(test, str(tmp_path / "i.jsonl")), embedder)
    assert metrics_of(Association(test, str(tmp_path / "i.csv")), embedder) == found
    assert "1 of 3 instances of" in caplog.text
    with pytest.raises(UserError, match="2 images of .* are called 'x'; give each a name"):
        Association(test, "i.csv")._rows(["a/x", "b/x", "a/y"], {"x", "y"})
    assert Association(test, "i.csv")._rows(["a/x", "b/x", "a/y"], {"y", "b/x"})["y"] == 2
    with pytest.raises(UserError, match="2 images of .* are called 'b/x'"):  # as in two shards
        Association(test, "i.csv")._rows(["b/x", "b/x", "a/y"], {"y", "b/x"})
    images = dict(zip((own := embedder.embed_shards(test)).keys, own.zimg, strict=True))
    ztxt = embedder.embed_texts(["an orange disc", "a red thing"])  # canonical
    jaccard = []
    for row, z in zip(rows, ztxt, strict=False):
        best = sorted(row["candidates"], key=lambda name: -images[name] @ z)[: len(row["associations"])]
        right = set(row["associations"])
        jaccard.append(len(right & {*best}) / len(right | {*best}))
    assert found["jaccard_5-6"] == jaccard[0] and found["jaccard_10-12"] == jaccard[1]
    assert found["jaccard"] == np.mean(jaccard)


def test_the_first_caption_alone(embedder, test, tmp_path):
    table = pq.read_table(test)
    both = [list(own) for own in zip(table["txt"].to_pylist(), table["negative"].to_pylist(), strict=True)]
    pq.write_table(table.append_column("both", pa.array(both)), tmp_path / "shapes.parquet")
    two = Retrieval(str(tmp_path / "shapes.parquet"), ("both",))
    one = metrics_of(Retrieval(test), embedder)
    assert metrics_of(dataclasses.replace(two, first_caption=True), embedder) == one != metrics_of(two, embedder)


def test_the_report_confuses_only_the_classes_of_a_subset(embedder, test, classes, tmp_path, monkeypatch):
    subset = tmp_path / "subset.txt"
    subset.write_text("red square\n2\n")
    task = ZeroShot(test, classes, subset=str(subset))
    monkeypatch.setattr(reporting, "embedder_of", lambda *args, **more: embedder)
    findings = reporting._compute(tmp_path, {"batch_size": 16}, EvalConfig(tasks=(task,)))
    found = findings["zeroshot"]["shapes"]
    assert found["names"] == ["red square", CLASSES[2]] and found["images"] == np.sum(found["matrix"]) == TEST // 3
    assert np.trace(found["matrix"]) / found["images"] == metrics_of(task, embedder)["acc1"]


def test_a_text_is_embedded_once(src):
    embedder = embedder_of(src, tokenizer=SPIECE, batch_size=16)
    asked = []
    counting = dataclasses.replace(embedder, tokenize=lambda texts: asked.extend(texts) or embedder.tokenize(texts))
    first = counting.embed_texts(["a cat", "a dog", "a cat"])
    again = counting.embed_texts(["a cow", "a dog"])
    assert asked == ["a cat", "a dog", "a cow"]
    np.testing.assert_array_equal(again[1], first[1])
    np.testing.assert_allclose(
        again, embedder_of(src, tokenizer=SPIECE, batch_size=16).embed_texts(["a cow", "a dog"]), atol=1e-6
    )


def test_no_texts_and_texts_that_are_not_kept(src, tmp_path, monkeypatch):
    embedder = embedder_of(src, tokenizer=SPIECE, batch_size=16)
    for own in (embedder, caching(embedder, tmp_path, "tower")):
        assert own.embed_texts([]).shape == (0, 24)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("siglip.evaluation.embed._MAX_KEPT_BYTES", 3 * 24 * 4)
    embedder.embed_texts(["a cat", "a dog"])
    embedder.embed_texts(["a cow", "a hen"])
    assert set(embedder.text_embeddings) == {"a cat", "a dog"}
    tokens = lambda batch: jnp.zeros((len(batch["text"]), 8, 24))  # noqa: E731
    dataclasses.replace(embedder, embed=tokens).embed_texts(["a cow"])
    assert set(embedder.text_embeddings) == {"a cat", "a dog"}


def one_line(args: list[str], capsys) -> str:
    capsys.readouterr()
    assert run(args) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--task knn --train {train} --label size", "has no field 'size'; there are"),
        ("--task knn --train {train} --k 0", "k=0 must be at least 1"),
        ("--task knn --train {train} --feature tokens", "is not one vector per image"),
        ("--task knn --train {train} --label colours", "several labels in 'colours'"),
        ("--task fewshot --train {train} --shots 0", "shots=(0,)"),
        ("--task fewshot --train {train} --label txt", "has the label 'a "),
        ("--task linear_probe --train {train} --c 0", "c=(0.0,)"),
        ("--task attentive_probe --train {train}", "heads=12 does not divide the width 32; use 8"),
        ("--task segmentation --train {train} --mask txt", "no image that can be used"),
        ("--task segmentation --train {train} --ignore 0 1 2 255", "hold 1 classes"),
        ("--task robustness --classes {classes} --severities 6", "severities=(6,)"),
        ("--task robustness --classes {classes} --label colours", "robustness takes one label"),
        ("--task robustness --classes {classes} --reference alexnet", "{test} has 6; leave it out, or give errors"),
        ("--task robustness --classes {classes} --reference {folder}/0.json", "0.json has no error of 'pixelate'"),
        (
            "--task robustness --classes {classes} --reference {folder}/1.json",
            "'pixelate' is '.5'; an error is a number",
        ),
        ("--task robustness --classes {classes} --reference {folder}/2.json", "must be above the clean error 0.6"),
        ("--task groups --classes {classes} --group region", "has no field 'region'; there are"),
        ("--task groups --classes {classes} --group number", "0 groups have 10 images or more"),
        ("--task selection --captions txt", "name the right caption's field and those of wrong ones"),
        ("--task selection --captions txt wrong", "no field 'wrong'"),
        ("--task selection --captions txt cls", "something else than a text in one of ('txt', 'cls')"),
        (
            "--task groups --classes {classes} --group place --label minus",
            "6 classes, but {test} has labels from -1 to",
        ),
        ("--task zeroshot --classes {folder}/blank.txt", "class no. 1 (from 0) has no name"),
        ("--task selection --captions txt --instance number", "no instance of {test} is whole"),
        ("--task verification --priors 1.5", "priors=(1.5,) must be shares"),
        ("--task verification --match cls", "cls=2; it must be 0 or 1"),
        ("--task zeroshot --classes {classes} --label mask", "neither a number nor a name"),
        (
            "--task zeroshot --classes {classes} --subset {classes} --label colours",
            "subset and label_map are for one label",
        ),
        ("--task zeroshot --classes {classes} --subset none.txt", "none.txt"),
    ],
)
def test_mistakes_are_told_in_one_line(src, train, test, classes, tmp_path, capsys, flags, told):
    if "--label txt" in flags:  # a class that no training image has
        train = str(write_shapes(tmp_path / "few.parquet", count=2, seed=0))
    names = ("gaussian_noise", "gaussian_blur", "brightness", "jpeg_compression")
    for n, more in enumerate(({}, {"pixelate": ".5"}, {"pixelate": 0.5, "clean": 0.6})):
        (tmp_path / f"{n}.json").write_text(json.dumps(dict.fromkeys(names, 0.7) | more))
    (tmp_path / "blank.txt").write_text("\n\n".join(CLASSES))
    paths = {"train": train, "test": test, "classes": classes, "folder": tmp_path}
    line = one_line(["eval", str(src), "--data", test, "--tokenizer", SPIECE, *flags.format(**paths).split()], capsys)
    assert told.format(**paths) in line
