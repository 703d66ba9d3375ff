"""Configs with one value of another type, of another sign or far too large: each is read, or refused in one line."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from siglip.errors import UserError
from siglip.formats.hf_tokenizer.from_json import sentencepiece_model
from siglip.formats.hugging_face import config_json
from siglip.model_source import read_config
from tests.siglip.formats.timm_folders import PIXELS, TEXT, TIMM
from tests.siglip.texts import SPIECE
from tests.siglip.tiny import square_model

ODD = (None, -1, 2.5, float("nan"), "x", [], {"a": 1}, [None], True, 10**400, 10**99)
CONFIG = config_json(square_model())
SPECIAL = {"SpecialToken": {"id": "</s>", "type_id": 0}}
GEMMA = {
    "tokenizer_class": "GemmaTokenizer", "eos_token": "</s>", "pad_token": {"content": "<pad>"}, "padding_side": "right",
    "add_bos_token": False, "add_eos_token": True, "added_tokens_decoder": {"0": {"content": "<pad>"}},
}  # fmt: skip
POST = {
    "post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}, SPECIAL]},
    "added_tokens": [{"id": 1, "content": "</s>", "special": True}],
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]},
}
PREPROCESSOR = {"size": {"height": 32, "width": 32}, "resample": 3, "rescale_factor": 1 / 255, "image_mean": [0.5] * 3}
OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 768,
        "vision_cfg": {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map"},
        "text_cfg": TEXT,
    },
    "preprocess_cfg": PIXELS,
}
LLAVA = {"model_type": "llava", "vision_config": CONFIG["vision_config"] | {"model_type": "siglip_vision_model"}}


def places(tree: Any) -> Iterator[tuple[Any, ...]]:
    """The path of every value below the top."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (key,)
        yield from ((key, *rest) for rest in places(value))


def variants(tree: dict) -> Iterator[tuple[tuple, Any, dict]]:
    """The tree with one odd value in each of its places."""
    for *path, last in places(tree):
        for value in ODD:
            changed = inside = copy.deepcopy(tree)
            for key in path:
                inside = inside[key]
            inside[last] = value
            yield (*path, last), value, changed


@pytest.mark.parametrize(
    ("name", "tree", "beside"),
    [
        ("config.json", CONFIG, {}),
        ("config.json", LLAVA, {}),
        ("config.json", TIMM, {}),
        ("open_clip_config.json", OPEN_CLIP, {}),
        ("preprocessor_config.json", PREPROCESSOR, {"config.json": CONFIG}),
        ("tokenizer_config.json", GEMMA, {"config.json": CONFIG, "tokenizer.json": POST}),
        ("tokenizer.json", POST, {"config.json": CONFIG, "tokenizer_config.json": GEMMA}),
    ],
    ids=["siglip", "llava", "timm", "open_clip", "preprocessor", "tokenizer_config", "tokenizer"],
)
def test_an_odd_value_is_read_or_refused_in_one_line(tmp_path, name, tree, beside):
    (tmp_path / "tokenizer.model").write_bytes(SPIECE.read_bytes())
    for other, content in beside.items():
        (tmp_path / other).write_text(json.dumps(content))
    refused = 0
    for path, value, changed in variants(tree):
        (tmp_path / name).write_text(json.dumps(changed))
        try:
            read_config(tmp_path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and str(tmp_path) in str(error), (path, value)
        except Exception as error:
            raise AssertionError(f"{path} = {value!r:.30}") from error
    assert refused


def test_an_odd_value_in_the_pieces_of_a_tokenizer(tmp_path):
    model = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]], "byte_fallback": False}
    tree = {"model": model, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}
    for path, value, changed in variants(tree):
        try:
            sentencepiece_model(changed, dict.fromkeys(("unk", "bos", "eos", "pad")), source="it")
        except UserError as error:
            assert str(error).startswith("it"), (path, value)


def test_a_number_that_no_float_holds_is_named(tmp_path):
    path: Path = tmp_path / "config.json"
    path.write_text('{"model_type": "siglip", "n": 1' + "0" * 400 + "}")
    with pytest.raises(UserError, match="config.json is not valid JSON .1000000000… is a number of 401 digits"):
        read_config(tmp_path)
