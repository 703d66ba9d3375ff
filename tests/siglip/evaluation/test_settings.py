"""The settings of evaluations: in config.json, old and new, and those that do not fit."""

import dataclasses
import json
from typing import Literal

import numpy as np
import pytest

from siglip.errors import UserError
from siglip.evaluation.association import Association, association
from siglip.evaluation.retrieval import Retrieval
from siglip.evaluation.zeroshot import ZeroShot
from siglip.training.config import EvalConfig, from_json, to_json
from siglip.trees import build_dataclass
from tests.siglip.tiny_run import tiny_config


def test_tasks_in_config_json_old_and_new(tmp_path):
    tasks = (
        Retrieval("a.tar", captions=("captions.en", "captions.de")),
        ZeroShot("b.tar", "names.txt", label="y", name="b"),
    )
    config = tiny_config(tmp_path, eval=EvalConfig(tasks=tasks, threads=3))
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    # As written when one dataclass held the settings of both.
    old = {
        "task": "zeroshot",
        "name": "b",
        "data": "b.tar",
        "captions": ["txt"],
        "classes": "names.txt",
        "templates": None,
    }
    tree = {"tasks": [old | {"label": "y"}], "every_steps": 0, "batch_size": 256}
    assert build_dataclass(EvalConfig, tree).tasks == tasks[1:]
    tree = {
        "tasks": [
            {"task": "retrieval", "name": "a", "data": "a.tar", "captions": ["txt"], "classes": None, "label": "cls"}
        ]
    }
    assert build_dataclass(EvalConfig, tree).tasks == (Retrieval("a.tar", name="a"),)
    for changed, message in (
        (
            {"task": "retreival"},
            r"tasks\.0\.task='retreival' must be one of 'retrieval', 'zeroshot', .*; did you mean 'retrieval'",
        ),
        ({"caption": "x"}, r"config\.tasks\.0 has no field 'caption'; did you mean 'captions'"),
        ({"data": 3}, r"config\.tasks\.0\.data=3 is not a str"),
    ):
        with pytest.raises(ValueError, match=message):
            build_dataclass(EvalConfig, {"tasks": [tree["tasks"][0] | changed]})


@dataclasses.dataclass(frozen=True)
class Left:
    a: int = 1
    crop: Literal["square", "none"] = "none"
    kind: Literal["left"] = "left"


@dataclasses.dataclass(frozen=True)
class Right(Left):
    b: int = 2
    kind: Literal["right"] = "right"


@dataclasses.dataclass(frozen=True)
class Sides:
    sides: tuple[Left | Right, ...]


def test_the_literal_that_differs_tells_dataclasses_apart():
    sides = Sides((Right(b=3, crop="square"), Left(a=2)))
    assert build_dataclass(Sides, json.loads(json.dumps(dataclasses.asdict(sides)))) == sides
    assert build_dataclass(Sides, {"sides": [{"kind": "left", "a": 5, "b": 3}]}) == Sides((Left(5),))
    with pytest.raises(ValueError, match="kind=None must be one of 'left', 'right'"):
        build_dataclass(Sides, {"sides": [{"a": 5}]})


def test_settings_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="2 evaluations have the metrics eval/retrieval/a/…; give each"):
        EvalConfig(tasks=(Retrieval("x/a.tar"), Retrieval("y/a.tar")))
    EvalConfig(tasks=(Retrieval("a.tar"), ZeroShot("a.tar", "names.txt")))
    with pytest.raises(ValueError, match=r"name 'a/b' must be non-empty and without '/'"):
        Retrieval("x.tar", name="a/b")
    with pytest.raises(ValueError, match="captions must name at least one"):
        Retrieval("x.tar", captions=())
    with pytest.raises(ValueError, match=r"eval\.threads=-1 must be at least 0"):
        EvalConfig(threads=-1)


@pytest.mark.parametrize(
    "file, told",
    [
        ("cue,candidates,associations\na,\"['x']\",\"['y']\"\n", "row 1 of .* must have a text `cue` and two lists"),
        ("cue,candidates,associations\n", "holds no instances"),
        ("cue,candidates,associations\na,\"['x', 'x']\",\"['x']\"\n", "row 1 of .* has a candidate twice"),
        ("cue,candidates,associations\n ,\"['x', 'y']\",\"['x']\"\n", "must have a text `cue`"),
        ("cue,candidates,associations\na,[[[,[\n", "row 1 of"),
    ],
)
def test_instances_that_are_none(tmp_path, file, told):
    (tmp_path / "i.csv").write_text(file)
    with pytest.raises(UserError, match=told):
        Association("x", str(tmp_path / "i.csv")).check(lambda data, fields: {})
    with pytest.raises(UserError, match="are not finite"):
        association([np.array([1.0, np.nan])], [np.array([True, False])])
    # Collapsed: the first of equal scores are chosen, and it is said.
    found = association([np.ones(5)], [np.array([False, True, False, True, False])])
    assert found["jaccard"] == found["jaccard_5-6"] == pytest.approx(1 / 3) and found["tied_fraction"] == 1
