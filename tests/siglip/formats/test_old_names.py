"""Arrays of older checkpoints, moved to where they belong: the same model as under today's names."""

import numpy as np
import pytest

from siglip.formats import big_vision
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.trees import flatten
from tests.siglip.formats.test_big_vision import same
from tests.siglip.tiny import ODD_TEXT, random_params, square_model

CLASS_TOKEN = square_model(image={"pool": "tok"})


def read(tmp_path, flat: dict, **options):
    np.savez(tmp_path / "m.npz", **{f"opt/target/{path}": array for path, array in flat.items()})
    return big_vision.read(tmp_path / "m.npz", **options)


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize(
    "rename",
    [
        {"img/pos_embedding": "img/Transformer/posembed_input/pos_embedding"},
        {"img/pos_embedding": "img/Transformer/pos_embedding"},
        {"img/MAPHead_0/": "img/"},
        {
            "/LayerNorm_1/": "/LayerNorm_2/",
            "DotProductAttention_0/": "DotProductAttention_1/",
            "MlpBlock_0/": "MlpBlock_3/",
        },
    ],
)
def test_moved_arrays(tmp_path, rename, scan):
    params = random_params(square_model(image={"scan": scan}, text={"scan": scan}))
    flat = flatten(params)
    for new, old in rename.items():
        flat = {
            path.replace(new, old) if "MAPHead_0" not in path or "MAPHead_0" in new else path: a
            for path, a in flat.items()
        }
    assert flat.keys() != flatten(params).keys()
    same(read(tmp_path, flat)[0], params)


def test_positions_that_were_added_twice(tmp_path):
    params = random_params(square_model())
    flat = flatten(params)
    twice = np.full_like(flat["txt/pos_embedding"], 0.25)
    found, _ = read(tmp_path, flat | {"txt/Encoder_0/pos_embedding": twice})
    same(found, flat | {"txt/pos_embedding": flat["txt/pos_embedding"] + twice})


def test_the_class_token_has_a_position_of_its_own(tmp_path):
    params = random_params(CLASS_TOKEN)
    flat = flatten(params)
    position = np.full_like(flat["img/cls"], 0.5)
    joined = np.concatenate([position, flat["img/pos_embedding"]], axis=1)
    found, config = read(tmp_path, flat | {"img/pos_embedding": joined})
    same(found, flat | {"img/cls": flat["img/cls"] + position})
    assert config.image.grid == (4, 4)


def test_ten_patches_are_ten_patches_where_the_size_is_known(tmp_path):
    image = ImageConfig("mu/8", width=36, num_heads=3, image_size=(16, 40), pool="tok")
    config = ModelConfig(image, TextConfig(**ODD_TEXT), (None, 36))
    params = random_params(config)
    found, found_config = read(tmp_path, flatten(params), image_size=(16, 40))
    same(found, params)
    assert found_config.image.grid == (2, 5)


def test_old_and_new_at_once(tmp_path):
    flat = flatten(random_params(square_model()))
    flat["img/Transformer/pos_embedding"] = flat["img/pos_embedding"]
    with pytest.raises(ValueError, match="holds img/pos_embedding twice, as img/"):
        read(tmp_path, flat)
