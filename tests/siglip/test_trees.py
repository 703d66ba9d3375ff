import dataclasses
import os
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siglip import trees
from siglip.errors import UserError
from siglip.evaluation import association, class_files, labels
from siglip.evaluation.suite_file import read_suite

names = st.text("abc", min_size=1, max_size=3)
nested = st.recursive(st.integers(), lambda leaf: st.dictionaries(names, leaf, min_size=1, max_size=3), max_leaves=8)


@given(st.dictionaries(names, nested, max_size=4))
def test_unflatten_inverts_flatten(tree):
    assert trees.unflatten(trees.flatten(tree)) == tree


def test_unflatten_refuses_a_leaf_that_is_also_a_folder():
    with pytest.raises(ValueError, match="a/b"):
        trees.unflatten({"a": 1, "a/b": 2})


def test_first_match_wins_and_must_match_the_whole_path():
    matches = trees.first_matches(["img/.*", ".*/kernel"], ["img/kernel", "txt/kernel", "txt/kernel2"], what="x")
    assert matches == {"img/kernel": 0, "txt/kernel": 1, "txt/kernel2": None}


def test_a_pattern_that_matches_nothing_is_an_error_with_a_suggestion():
    with pytest.raises(ValueError, match=r"lr_mults: pattern 'imgs/kernel'.*did you mean 'img/kernel'"):
        trees.first_matches(["imgs/kernel"], ["img/kernel"], what="lr_mults")


def test_a_broken_pattern_is_named():
    with pytest.raises(ValueError, match="not a regular expression"):
        trees.first_matches(["img/("], ["img/kernel"], what="lr_mults")


@dataclasses.dataclass(frozen=True)
class Inner:
    size: tuple[int, int] = (1, 2)
    kind: Literal["a", "b"] = "a"


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    inners: tuple[Inner, ...] = ()
    rules: tuple[tuple[str, float], ...] = ()
    width: int | None = None
    augment: Inner | None = None


@pytest.mark.parametrize(
    "config",
    [
        Outer(),
        Outer(
            inner=Inner((3, 4), "b"), inners=(Inner(), Inner(kind="b")), rules=((".*", 1.0),), width=3, augment=Inner()
        ),
    ],
)
def test_build_dataclass_inverts_asdict_through_json(config):
    import json

    assert trees.build_dataclass(Outer, json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"inner": {"sise": [1, 2]}}, "config.inner has no field 'sise'; did you mean 'size'"),
        ({"inner": {"kind": "c"}}, "config.inner.kind='c'"),
        ({"width": "wide"}, "config.width='wide'"),
        ({"inner": {"size": [1, 2, 3]}}, "config.inner.size"),
    ],
)
def test_build_dataclass_names_what_does_not_fit(tree, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        trees.build_dataclass(Outer, tree)


@dataclasses.dataclass(frozen=True)
class Positive:
    x: float = 1.0

    def __post_init__(self):
        if not self.x > 0:
            raise UserError(f"x={self.x} must be positive")


@dataclasses.dataclass(frozen=True)
class Needy:
    width: tuple[int, ...]
    kind: Literal["shore", "sea"] = "sea"


@pytest.mark.parametrize(
    ("cls", "tree", "message"),
    [
        (Outer, [1], r"run.json: model=\[1\] is not an object with the fields of Outer"),
        (Outer, {"inner": 3}, "run.json: model.inner=3"),
        (Positive, {"x": -1}, r"run.json: model: x=-1.0 must be positive"),
        (Positive, {"x": 10**400}, "run.json: model.x=1000"),
        (Positive, {"x": float("nan")}, "run.json: model.x=nan"),
        (Positive, {"x": True}, "run.json: model.x=True is not a float"),
        (Positive, {"x": 1.0, 3: 4}, "run.json: model has no field 3"),
        (Needy, {}, "run.json: model is incomplete: add width"),
        (Needy, {"width": 3}, "run.json: model.width=3 is not a list"),
        (
            Needy,
            {"width": [3], "kind": "short"},
            "model.kind='short' must be one of 'shore', 'sea'; did you mean 'shore'",
        ),
    ],
)
def test_odd_numbers_and_types_are_told_with_their_file(cls, tree, message):
    with pytest.raises(UserError, match=message):
        trees.build_dataclass(cls, tree, where="run.json: model")


@pytest.mark.parametrize("content", ["{", "[1]", "1" * 5000, "[" * 100_000, "\x00\xff", ""])
def test_what_is_no_json_object_is_told_with_its_file(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.json .*; copy it again") as error:
        trees.read_json(tmp_path / "a.json", fix="copy it again")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "read",
    [
        lambda path: trees.read_json(path, fix="fix it"),
        class_files.read_text,
        read_suite,
        lambda path: association.read_instances(str(path)),
        labels.read_object,
    ],
)
def test_a_device_or_a_pipe_is_no_file_of_a_user(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("pipe", "endless"):
        with pytest.raises(UserError, match=f"{name} is a device or a pipe; write it to a file") as error:
            read(tmp_path / name)
        assert "JSON" not in str(error.value)
