"""What data say of themselves becomes the settings of a task: each layout from a small generated set."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.image_ops import resize, resize_and_crop
from data_pipelines.loader import make_eval_batches
from data_pipelines.sources.opening import open_source
from siglip.cli.data_sets import complete, protocol
from siglip.cli.evaluation import first_values
from siglip.evaluation.class_files import read_classes, read_templates
from siglip.evaluation.linear_probe import LinearProbe
from siglip.evaluation.retrieval import Retrieval
from siglip.evaluation.selection import Selection
from siglip.evaluation.verification import Verification
from siglip.evaluation.zeroshot import ZeroShot
from tests.data_pipelines.shards import encode, write_tar

PNG = encode(np.full((4, 4, 3), 9, np.uint8))


def completed(task):
    """The task with what its data tell, after its check."""
    task = complete(task)
    task.check(first_values)
    return task


def names(task) -> list[str]:
    return read_classes(task.classes).names


def write_wds(folder: Path, label: str = "cls", **files: str) -> Path:
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        values = {"cls": b"1", "npy": npy([0, 1]), "txt": b"a cat\nthe cat\n"}
        write_tar(folder / split / "0.tar", {"s0000000.png": PNG, f"s0000000.{label}": values[label]})
        (folder / split / "nshards.txt").write_text("1")
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def npy(numbers: list) -> bytes:
    import io

    file = io.BytesIO()
    np.save(file, np.array(numbers))
    return file.getvalue()


def write_folders(folder: Path, *classes: str) -> Path:
    for name in classes:
        (folder / name).mkdir(parents=True)
        (folder / name / "1.png").write_bytes(PNG)
    return folder


def test_clip_benchmarks_classes_and_templates(tmp_path):
    files = {"classnames": "cat\npolar bear\n", "zeroshot_classification_templates": "a {c}\nthe {c}\n"}
    folder = write_wds(tmp_path / "wds_pets", **files)
    for data in (str(folder), f"{folder}#test", str(folder / "test"), f"{folder}/test/*.tar"):
        task = completed(ZeroShot(data))
        assert names(task) == ["cat", "polar bear"] and read_templates(task.templates) == ["a {c}", "the {c}"]
    assert completed(ZeroShot(str(folder))).dataset == "wds_pets" and task.label == "cls"
    own = tmp_path / "own.txt"
    own.write_text("a {}\nb {}")
    assert completed(ZeroShot(str(folder), str(own), templates=str(own), label="cls")).classes == str(own)
    (folder / "classnames.txt").write_text("cat\n\ndog\n")
    with pytest.raises(ValueError, match="line 2 of .*classnames.txt' is blank"):
        complete(ZeroShot(str(folder)))


def test_clip_benchmarks_other_kinds(tmp_path):
    files = {"classnames": "cat\ndog\n", "dataset_type": "multilabel\n"}
    assert complete(ZeroShot(str(write_wds(tmp_path / "voc", "npy", **files)))).label == "npy"
    task = completed(Retrieval(str(write_wds(tmp_path / "flickr", "txt", dataset_type="retrieval"))))
    assert task.captions == ("txt",) and task.data.endswith("flickr#test")
    with pytest.raises(ValueError, match="these data bring no class names; name a file .* --classes"):
        completed(ZeroShot(str(write_wds(tmp_path / "bare"))))


def write_parquet(folder: Path, *, metadata: dict | None, **columns) -> Path:
    (folder / "data").mkdir(parents=True)
    table = pa.table({"image": [{"bytes": PNG, "path": "1.png"}], **{name: [value] for name, value in columns.items()}})
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": metadata}})})
    for split in ("train", "test"):
        pq.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def test_hugging_faces_class_labels(tmp_path):
    features = {"image": {"_type": "Image"}, "fine_label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    features["coarse_label"] = {"_type": "ClassLabel", "names": ["pet"]}
    folder = write_parquet(tmp_path / "cifar", metadata=features, fine_label=1, coarse_label=0)
    task = completed(ZeroShot(str(folder)))
    assert (task.label, names(task)) == ("fine_label", ["cat", "dog"]) and task.data == f"{folder}#test"
    assert names(completed(ZeroShot(str(folder), label="coarse_label"))) == ["pet"]
    card = "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n      class_label:\n"
    folder = write_parquet(tmp_path / "card", metadata=None, label=0)
    (folder / "README.md").write_text(card + "        names:\n          '1': dog\n          '0': cat\n---\n# Cats\n")
    task = completed(ZeroShot(str(folder)))
    assert (task.label, names(task)) == ("label", ["cat", "dog"])


def test_caption_columns(tmp_path):
    folder = write_parquet(tmp_path / "mscoco", metadata=None, caption=["a cat", "the cat"])
    assert completed(Retrieval(str(folder))).captions == ("caption",)
    assert completed(Retrieval(str(folder), captions=("caption",))).captions == ("caption",)
    with pytest.raises(ValueError, match="has no field 'title'; there are caption, image"):
        completed(Retrieval(str(folder), captions=("title",)))


def test_pairs_that_cannot_be_read_are_not_blamed_on_the_field(tmp_path):
    pq.write_table(pa.table({"image": [b"i"] * 3, "txt": ["a", "b", "c"]}), path := tmp_path / "a.parquet")
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)
    path.write_bytes(content)
    with pytest.raises(OSError, match="row group 0 of .*a.parquet'"):
        first_values(str(path), ("txt",))


def test_each_usual_field_has_its_stand_in(tmp_path):
    (tmp_path / "1.png").write_bytes(PNG)
    entry = {"filename": "1.png", "caption": "a cat", "negative_caption": "a dog"}
    (tmp_path / "add_obj.json").write_text(json.dumps({"0": entry}))
    data = str(tmp_path / "add_obj.json")
    assert complete(Selection(data)).captions == ("caption", "negative_caption")
    assert complete(Verification(data)).captions == "caption"
    assert complete(Selection(data, ("caption", "x"))).captions == ("caption", "x")
    (tmp_path / "one.json").write_text(json.dumps([{"filename": "1.png", "caption": "a cat"}]))
    assert complete(Selection(str(tmp_path / "one.json"))).captions == ("txt", "negative")  # half of it is no answer


def test_folders_as_classes(tmp_path):
    folder = write_folders(tmp_path / "pets", "dog", "cat")
    assert names(completed(ZeroShot(str(folder)))) == ["cat", "dog"]
    (tmp_path / "more.txt").write_text("hen\ndog\ncat")
    assert names(completed(ZeroShot(str(folder), str(tmp_path / "more.txt")))) == ["hen", "dog", "cat"]
    (tmp_path / "others.txt").write_text("a feline\na canine")
    task = completed(ZeroShot(str(folder), str(tmp_path / "others.txt")))
    assert read_classes(task.classes).numbers() == {"a feline": 0, "cat": 0, "a canine": 1, "dog": 1}
    (tmp_path / "wrong.txt").write_text("a feline\ndogs\nhens")
    with pytest.raises(ValueError, match="the folder 'cat' of .* is not one of the 3 classes"):
        complete(ZeroShot(str(folder), str(tmp_path / "wrong.txt")))


def test_wordnet_ids_are_a_subset_of_imagenet(tmp_path):
    folder = write_folders(tmp_path / "imagenet-a", "n02099601", "n01440764", "n04356056")
    for classes in (None, "imagenet"):
        task = completed(ZeroShot(str(folder), classes, templates="imagenet"))
        assert names(task) == ["tench", "Golden Retriever", "sunglasses"]
    (tmp_path / "map.txt").write_text("n02099601 a dog\nn01440764 a fish\nn04356056 glasses\nn04356057 more\n")
    assert names(completed(ZeroShot(str(folder), str(tmp_path / "map.txt")))) == ["a fish", "a dog", "glasses"]


def test_folders_that_are_numbers(tmp_path):
    folder = write_folders(tmp_path / "imagenetv2", "0", "10", "9")
    numbers = read_classes(completed(ZeroShot(str(folder), "imagenet")).classes).numbers()
    assert numbers["tench"] == 0 and "10" not in numbers  # so that a label is the number that it is
    assert names(completed(ZeroShot(str(folder)))) == ["0", "9", "10"]
    (tmp_path / "three.txt").write_text("nil\nnine\nten")
    numbers = read_classes(completed(ZeroShot(str(folder), str(tmp_path / "three.txt"))).classes).numbers()
    assert (numbers["9"], numbers["10"]) == (1, 2)


def test_all_languages_of_crossmodal_3600(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "k.jpg").write_bytes(PNG)
    texts = {language: {"caption": ["a", "b"]} for language in ("th", "de")}
    (tmp_path / "captions.jsonl").write_text(json.dumps({"image/key": "k", "image/locale": "de"} | texts))
    assert completed(Retrieval(str(tmp_path))).captions == ("captions.de", "captions.th")
    assert completed(Retrieval(str(tmp_path), captions=("captions.th",))).captions == ("captions.th",)


def test_the_protocol_in_one_line(tmp_path):
    task = ZeroShot("a.tar", "imagenet", "imagenet")
    prepared = {"pixels": "square875", "size": "224 x 224", "resample": "bilinear"}
    told = "protocol: pixels square875, 224 x 224, bilinear; 1000 classes, 80 templates; prompts "
    assert protocol(task, **prepared, canonical=True) == told + "canonical"
    assert protocol(dataclasses.replace(task, canonical=False), **prepared, canonical=True) == told + "as written"
    own = ZeroShot("a.tar", '["a", "b"]', '{"a": ["x"], "b": ["y", "z"]}')
    assert "2 classes, prompts for each class;" in protocol(own, **prepared, canonical=True)
    assert "2 classes, names alone;" in protocol(dataclasses.replace(own, templates=None), **prepared, canonical=True)
    assert protocol(Retrieval("a.tar"), **prepared, canonical=True) == "protocol: pixels square875, 224 x 224, bilinear"


def test_tfds_as_a_source_of_evaluations(tmp_path):
    from tests.data_pipelines.test_tf_examples import write_tfds

    folder = write_tfds(tmp_path / "cars196", {"train": [1], "test": [3]})
    (folder / "n.labels.txt").write_text("sedan\nsuv\ntruck\n")
    task = completed(ZeroShot(str(folder)))
    assert (task.label, names(task), task.data) == ("n", ["sedan", "suv", "truck"], f"{folder}#test")


def test_splits_of_training(tmp_path):
    folder = write_wds(tmp_path / "wds_pets", classnames="cat\ndog")
    task = complete(LinearProbe(str(folder), str(folder)))
    assert (task.data, task.train, task.label) == (f"{folder}#test", f"{folder}#train", "cls")


def test_pixels_by_protocol(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (60, 90, 3), np.uint8)
    whole = resize(image, (32, 32))
    np.testing.assert_array_equal(resize_and_crop(image, (28, 28), "square875"), whole[2:30, 2:30])
    np.testing.assert_array_equal(resize_and_crop(image, (28, 28), "squash"), resize(image, (28, 28)))
    aspect = resize(image, (37, 56))  # int(28 / .75) = 37, 37 / 60 * 90 = 55.5
    np.testing.assert_array_equal(resize_and_crop(image, (28, 28), "aspect75"), aspect[4:32, 14:42])
    source = open_source(write_tar(tmp_path / "a.tar", {"1.png": encode(image)}))
    (batch,) = make_eval_batches(source, batch_size=1, image_size=(28, 28), protocol="square875")
    np.testing.assert_array_equal(batch["image"][0], whole[2:30, 2:30])


@pytest.mark.parametrize("pairs", ["shop.csv", "shop.tar"])
def test_an_evaluation_set_of_its_own_image_column_is_protected(pairs, tmp_path, capsys):
    from siglip.cli import run

    rng = np.random.default_rng(0)
    images = [encode(np.kron(rng.integers(0, 255, (8, 8, 3), np.uint8), np.ones((8, 8, 1), np.uint8))) for _ in "12"]
    for number, image in enumerate(images):
        (tmp_path / f"{number}.png").write_bytes(image)
    write_tar(
        tmp_path / "shop.tar", {"0.png": images[0], "0.txt": b"a red shoe", "1.png": images[1], "1.txt": b"a hat"}
    )
    (tmp_path / "shop.csv").write_text("photo,txt\n0.png,a red shoe\n1.png,a hat\n")
    (tmp_path / "held.csv").write_text("photo,title\n0.png,a shoe\n")
    flags = ["--against", str(tmp_path / "held.csv"), "--image-column", "photo", "--out", str(tmp_path / "out")]
    assert run(["data", "curate", str(tmp_path / pairs), *flags, "--workers", "1"]) == 0
    assert pq.read_table(tmp_path / "out" / "manifest.parquet")["reason"].to_pylist() == ["eval_leak", None]
    assert run(["data", "curate", str(tmp_path / pairs), *flags[:3], "phtoo", "--out", str(tmp_path / "typo")]) == 2
    assert "phtoo" in capsys.readouterr().err


def test_columns_are_named_by_flags_and_checked_before_a_list_is_scanned(tmp_path, capsys, monkeypatch):
    from data_pipelines.sources.listing import ListSource
    from siglip.cli import run

    (tmp_path / "1.png").write_bytes(PNG)
    (tmp_path / "shop.csv").write_text("photo,title\n1.png,a red shoe\n1.png,a hat\n")
    flags = ["--image-column", "photo", "--captions", "title"]
    assert run(["data", "stats", str(tmp_path / "shop.csv"), *flags]) == 0
    assert "2 pairs" in capsys.readouterr().out
    keep = ["--min-side-px", "0", "--duplicates", "off", "--materialize", "tar"]
    assert run(["data", "curate", str(tmp_path / "shop.csv"), "--out", str(tmp_path / "out"), *flags, *keep]) == 0
    assert [pair.fields["txt"] for pair in open_source(tmp_path / "out" / "shards")] == ["a red shoe", "a hat"]
    capsys.readouterr()
    (tmp_path / "other.csv").write_text("photo,title\n1.png,a red shoe\n")
    monkeypatch.setattr(ListSource, "build", None)
    there = "; there are photo, title, did you mean"
    for command, out in (("stats", []), ("curate", ["--out", "new"]), ("tokenizer", ["--out", "t.model"])):
        for wrong, message in (
            (["--image-column", "foto", "--captions", "title"], "has no image column 'foto'"),
            (["--image-column", "photo", "--captions", "titel"], "has no field 'titel'"),
        ):
            assert run(["data", command, str(tmp_path / "other.csv"), *out, *wrong]) == 2
            assert message + there in capsys.readouterr().err
    assert not Path("new").exists()
