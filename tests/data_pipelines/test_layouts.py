"""Data sets as people have them, each made small and read: folders, annotation files, and what they say of classes."""

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.errors import UserError
from data_pipelines.sources import layouts
from data_pipelines.sources.layouts import with_split
from data_pipelines.sources.opening import open_source
from tests.data_pipelines.shards import encode, write_pairs, write_tar


def png(number: int) -> bytes:
    return encode(np.full((4, 4, 3), number, np.uint8))


def write_images(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return folder


def read(data) -> list[tuple]:
    return [(pair.key, pair.image is not None, dict(pair.fields)) for pair in open_source(data)]


def test_a_folder_per_class(tmp_path):
    folder = write_images(tmp_path / "pets", "dog/b.PNG", "cat/2.png", "cat/10.png", "cat/deeper/a.png", ".git/x.png")
    (folder / "cat" / "notes.txt").write_text("no image")
    (folder / "cat" / "._2.png").write_bytes(b"what macOS leaves")
    source = open_source(folder)
    assert [(pair.key, pair.fields["cls"]) for pair in source] == [
        ("cat/10.png", "cat"), ("cat/2.png", "cat"), ("cat/deeper/a.png", "cat"), ("dog/b.PNG", "dog")
    ]  # fmt: skip
    assert source[3].image == png(0) and source.notes(0)["classes"] == ["cat", "dog"]
    assert source.columns == ("image", "cls") and not list(tmp_path.glob("*.idx"))
    copied = pickle.loads(pickle.dumps(source))
    assert copied[1].image == source[1].image
    shutil.copytree(folder, tmp_path / "moved" / "pets")
    assert open_source(tmp_path / "moved" / "pets").fingerprint == source.fingerprint
    (folder / "cat" / "2.png").unlink()
    assert source[1].image is None and source[1].problems == ("missing_image",)
    changed = open_source(folder)
    assert len(changed) == 3 and changed.fingerprint != source.fingerprint


def test_the_index_of_a_folder_is_kept(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "pets", "dog/b.png", "cat/2.png")
    (tmp_path / "links").mkdir()
    os.symlink(folder / "dog", tmp_path / "links" / "hund")
    os.symlink(tmp_path / "links", tmp_path / "links" / "again")
    assert [key for key, _, _ in read(tmp_path / "links")] == ["hund/b.png"]
    first = read(folder)
    monkeypatch.setattr("data_pipelines.sources.annotations.read_annotations", None)
    assert read(folder) == first


def test_images_without_classes_and_with_a_list(tmp_path):
    folder = write_images(tmp_path / "shop", "1.png", "img/2.png")
    assert read(folder) == [("1.png", True, {}), ("img/2.png", True, {"cls": "img"})]
    (folder / "products.csv").write_text("filepath,title\n1.png,a shoe\nimg/2.png,a hat\nnone.png,a glove\n")
    assert [(key, there) for key, there, _ in read(folder)] == [
        ("1.png", True),
        ("img/2.png", True),
        ("none.png", False),
    ]
    (folder / "more.csv").write_text("filepath,title\n1.png,a shoe\n")
    assert read(folder)[0] == ("1.png", True, {})  # two lists: neither is meant for sure


def test_splits_are_named_and_evaluations_take_the_test_set(tmp_path):
    folder = write_images(tmp_path / "flowers", "train/rose/1.png", "test/rose/2.png", "test/lily/3.png")
    with pytest.raises(ValueError, match="holds the splits test, train; name one: .*flowers#test"):
        open_source(folder)
    assert [key for key, _, _ in read(f"{folder}#train")] == ["rose/1.png"]
    assert with_split(str(folder)) == f"{folder}#test" and with_split(f"{folder}#train") == f"{folder}#train"
    assert [key for key, _, _ in read(with_split(str(folder)))] == ["lily/3.png", "rose/2.png"]
    with pytest.raises(ValueError, match="has no split 'tset'; there are test, train"):
        open_source(f"{folder}#tset")
    assert [key for key, _, _ in read(write_images(tmp_path / "a#b", "x/1.png"))] == ["x/1.png"]


def test_nothing_that_is_known(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.pdf").write_text("")
    for name in ("x", "x/"):
        with pytest.raises(ValueError, match="holds neither images nor shards of a known layout"):
            open_source(tmp_path / name)


def write_wds(folder: Path, **files: str) -> Path:
    """CLIP_benchmark's layout: three test shards, one for training."""
    for split, shards in (("test", 3), ("train", 1)):
        (folder / split).mkdir(parents=True)
        for number in range(shards):
            write_pairs(folder / split / f"{number}.tar", 2, first=2 * number)
        (folder / split / "nshards.txt").write_text(f"{shards}\n")
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def test_clip_benchmarks_folders(tmp_path):
    folder = write_wds(tmp_path / "wds_things")
    assert [len(open_source(f"{folder}{end}")) for end in ("#test", "#train", "/test")] == [6, 2, 6]
    assert with_split(str(folder)) == f"{folder}#test"
    assert [Path(path).name for path in open_source(f"{folder}#test").paths] == ["0.tar", "1.tar", "2.tar"]
    (folder / "test" / "nshards.txt").write_text("many")
    with pytest.raises(ValueError, match="holds 'many', not the number of shards"):
        open_source(f"{folder}#test")
    (folder / "test" / "nshards.txt").write_text("4")
    with pytest.raises(FileNotFoundError, match="3.tar"):
        open_source(f"{folder}#test")


def test_labels_in_npy(tmp_path):
    def npy(array) -> bytes:
        file = io.BytesIO()
        np.save(file, array)
        return file.getvalue()

    members = {
        "0.png": png(0),
        "0.npy": npy(np.array([0, 1, 1])),
        "1.png": png(1),
        "1.npy": b"damaged",
        "1.txt": b"one",
    }
    members |= {"2.png": png(2), "2.npy": npy(np.zeros(20_000)), "3.png": png(3), "3.npy": npy(np.array(7))}
    with pytest.warns(UserWarning, match="members of no pair are not read: 1, such as '2.npy'"):
        source = open_source(write_tar(tmp_path / "a.tar", members))
    assert [dict(pair.fields) for pair in source] == [{"npy": [0, 1, 1]}, {"txt": "one"}, {}, {"npy": [7]}]


def test_shards_in_a_folder(tmp_path):
    for number in range(2):
        write_pairs(tmp_path / f"{number:05d}.tar", 2, first=2 * number)
        (tmp_path / f"{number:05d}_stats.json").write_text('{"successes": 2}')
    assert [key for key, _, _ in read(tmp_path)] == ["000000", "000001", "000002", "000003"]


KARPATHY = {
    "images": [
        {"filename": f"{n}.png", "split": split, "cocoid": n, "sentences": [{"raw": f"a {n} "}, {"raw": f"the\n{n}"}]}
        for n, split in enumerate(["train", "restval", "test", "val", "test"])
    ],
    "dataset": "flickr8k",
}


def test_karpathys_json(tmp_path):
    write_images(tmp_path / "images", *[f"{n}.png" for n in range(5)])
    path = tmp_path / "dataset_flickr8k.json"
    path.write_text(json.dumps(KARPATHY))
    expected = [(f"{n}.png", True, {"split": "test", "cocoid": n, "txt": [f"a {n}", f"the {n}"]}) for n in (2, 4)]
    assert read(f"{path}#test") == read(with_split(str(path))) == expected
    assert len(open_source(f"{path}#train")) == 2  # with restval
    with pytest.raises(ValueError, match="holds the splits test, train, val; name one"):
        open_source(path)
    with pytest.raises(ValueError, match="has no split 'dev'"):
        open_source(f"{path}#dev")
    images = [image | {"filepath": "val2014"} for image in KARPATHY["images"]]
    path.write_text(json.dumps(KARPATHY | {"images": images}))
    with pytest.raises(
        FileNotFoundError, match="'val2014/2.png', the first image of .* is not beside it, nor in 'images'"
    ):
        open_source(f"{path}#test")
    os.rename(tmp_path / "images", tmp_path / "val2014")
    assert [key for key, _, _ in read(f"{path}#test")] == ["val2014/2.png", "val2014/4.png"]


def test_cocos_json(tmp_path):
    write_images(tmp_path / "val2014", "COCO_1.png", "COCO_2.png")
    images = [{"id": n, "file_name": f"COCO_{n}.png", "height": 4} for n in (2, 1)]
    captions = [{"image_id": n % 2 + 1, "id": n, "caption": f"caption {n}\n"} for n in range(5)]
    path = tmp_path / "annotations" / "captions_val2014.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": captions}))
    assert read(path) == [
        ("COCO_2.png", True, {"txt": ["caption 1", "caption 3"], "cocoid": 2}),
        ("COCO_1.png", True, {"txt": ["caption 0", "caption 2", "caption 4"], "cocoid": 1}),
    ]
    path.write_text(json.dumps({"images": images, "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]}))
    with pytest.raises(ValueError, match="has no captions in its annotations"):
        open_source(path)
    for change, told in (
        ({"images": [{"file_name": "COCO_1.png", "id": [1]}]}, "has an image whose id is not a number"),
        ({"annotations": [{"image_id": {}, "caption": "a"}]}, "has a caption whose image_id is not a number"),
        ({"images": [{"filename": "COCO_1.png", "sentences": ["a"]}]}, "not one of Karpathy's"),
        ({"images": [{"file_name": "COCO_1.png", "sentences": [{"raw": "a"}]}]}, "not one of Karpathy's"),
        ({"images": [{"filename": "COCO_1.png", "filepath": 3, "sentences": []}]}, "not one of Karpathy's"),
    ):
        path.write_text(json.dumps({"images": images, "annotations": captions} | change))
        with pytest.raises(ValueError, match=told):
            open_source(path)


@pytest.mark.parametrize(
    "lines",
    [
        'image,caption\n1.png,a cat, asleep\n2.png,"a dog"\n1.png,the cat\n',
        "1.png#0\ta cat, asleep\n2.png#0\ta dog\n1.png#1\tthe cat\n",
    ],
)
def test_flickrs_text_files(tmp_path, lines):
    write_images(tmp_path / "Images", "1.png", "2.png")
    (tmp_path / "captions.txt").write_text(lines)
    assert read(tmp_path / "captions.txt") == [
        ("1.png", True, {"txt": ["a cat, asleep", "the cat"]}),
        ("2.png", True, {"txt": ["a dog"]}),
    ]
    (tmp_path / "captions.txt").write_text("image,caption\n1.png,x\nsome other text\n")
    with pytest.raises(ValueError, match="line 3 of .* is not 'NAME.jpg,caption'"):
        open_source(tmp_path / "captions.txt")
    (tmp_path / "words.txt").write_text("a list of words")
    with pytest.raises(ValueError, match="names no images with captions"):
        open_source(tmp_path / "words.txt")


def test_objects_in_json(tmp_path):
    write_images(tmp_path, "1.png", "2.png")
    entries = [{"filename": f"{n}.png", "caption": "a cat", "negative_caption": "a dog"} for n in (1, 2)]
    for content in (entries, {"0": entries[0], "5": entries[1]}):
        (tmp_path / "add_obj.json").write_text(json.dumps(content))
        assert read(tmp_path / "add_obj.json")[1] == ("2.png", True, {"caption": "a cat", "negative_caption": "a dog"})
    for content, message in (("[{}]", "image without its path"), ("{", "is not JSON"), ("[3]", "names no images")):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            open_source(tmp_path / "bad.json")


def test_crossmodal_3600(tmp_path):
    write_images(tmp_path / "images", "k1.jpg", "k2.jpg")
    texts = {"de": {"caption": ["eins", "zwei"], "caption/tokenized": []}, "en": {"caption": ["a"]}}
    lines = [{"image/key": key, "image/locale": "de"} | texts for key in ("k2", "k1")]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert read(tmp_path)[0] == ("k2.jpg", True, {"captions": {"de": ["eins", "zwei"], "en": ["a"]}})
    for line in ("{}", "[[1]]", "7"):
        (tmp_path / "captions.jsonl").write_text(f"{line}\n")
        with pytest.raises(UserError, match="line 1 of .* is not one of Crossmodal-3600"):
            open_source(tmp_path)


def test_hugging_faces_folders(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00001", "test-00000-of-00002", "test-00001-of-00002"):
        images = [{"bytes": png(1), "path": "1.png"}]
        pq.write_table(
            pa.table({"image": images, "label": [1], "caption": [["a", "b"]]}), tmp_path / "data" / f"{name}.parquet"
        )
    assert len(open_source(with_split(str(tmp_path)))) == 2
    assert read(f"{tmp_path}#train") == [("train-00000-of-00001.parquet/0", True, {"label": 1, "caption": ["a", "b"]})]
    assert layouts.expand(f"{tmp_path}#train") == [str(tmp_path / "data" / "train-00000-of-00001.parquet")]
    shutil.copy(tmp_path / "data" / "train-00000-of-00001.parquet", tmp_path / "data" / "extra-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="holds the splits extra, test, train; name one"):
        open_source(tmp_path)
    assert len(open_source(with_split(str(tmp_path)))) == 2


def test_training_reads_folders_and_annotation_files(tmp_path):
    from data_pipelines.loader import DataConfig, make_loader
    from data_pipelines.order.mixture import SourceConfig
    from tests.data_pipelines.shards import SPIECE

    write_images(tmp_path / "pets", "dog/b.png", "cat/2.png")
    write_images(tmp_path / "images", *[f"{n}.png" for n in range(5)])
    images = [{"filename": f"{n}.png", "split": "train", "sentences": [{"raw": f"a {n}"}]} for n in range(5)]
    (tmp_path / "dataset.json").write_text(json.dumps({"images": images}))
    folder = SourceConfig(str(tmp_path / "pets"), captions=(("cls", 1.0),))
    listed = SourceConfig(f"{tmp_path}/dataset.json#train", captions=(("txt", 1.0),))
    config = DataConfig(sources=(folder, listed), tokenizer=SPIECE, threads=1)
    loader = make_loader(config, batch_size=8, image_size=(8, 8), text_length=4, seed=0)
    batch = next(loader)
    loader.close()
    assert batch["image"].shape == (8, 8, 8, 3) and {"dog/b.png", "cat/2.png"} < set(batch["key"]) and not loader.counts


def test_names_that_are_not_utf8(tmp_path):
    """Linux allows any bytes. Images under such names are read, with an escape in the key; shards are refused in one line."""
    bad, image = os.fsdecode(b"b\xff"), encode(np.zeros((4, 4, 3), np.uint8))
    for folder in ("a", bad):
        (tmp_path / "images" / folder).mkdir(parents=True)
        (tmp_path / "images" / folder / f"{bad}.png").write_bytes(image)
    source = open_source(tmp_path / "images")
    assert [(pair.key, pair.image, dict(pair.fields)) for pair in source] == [
        (r"a/b\xff.png", image, {"cls": "a"}),
        (r"b\xff/b\xff.png", image, {"cls": r"b\xff"}),
    ]
    assert source.notes(0)["classes"] == ["a", r"b\xff"]
    write_tar(tmp_path / f"{bad}.tar", [("1.png", image), ("1.txt", b"a")])
    with pytest.raises(UserError, match=r"the name of shard '.*b\\xff.tar' is not UTF-8.* rename it"):
        open_source(f"{tmp_path}/*.tar")


def test_halves_of_surrogate_pairs_in_annotations_are_left_out(tmp_path):
    images = [{"file_name": "a.png", "id": 1}]
    (tmp_path / "a.json").write_text(
        json.dumps({"images": images, "annotations": [{"image_id": 1, "caption": "cut \ud83d"}]})
    )
    (tmp_path / "a.png").write_bytes(encode(np.zeros((4, 4, 3), np.uint8)))
    (pair,) = open_source(tmp_path / "a.json")
    assert pair.fields["txt"] == ["cut"]
