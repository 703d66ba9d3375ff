"""StableHLO programs: our outputs, for any batch, on three platforms, in a process that has jax and not siglip."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
from jax import export

from siglip.formats import stablehlo
from siglip.formats.big_vision import image_only
from siglip.formats.key_maps import unstack_blocks
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from siglip.trees import flatten
from tests.siglip import numpy_model
from tests.siglip.rounding import towers_apart
from tests.siglip.tiny import ODD_IMAGE, ODD_TEXT, random_inputs, random_params, square_model

ODD = ModelConfig(
    ImageConfig(**ODD_IMAGE, image_size=(20, 34), scan=True, pool="tok"), TextConfig(**ODD_TEXT, pool="map"), (21, 21)
)


@pytest.mark.parametrize("config", [pytest.param(square_model(), marks=pytest.mark.slow), ODD], ids=["square", "odd"])
def test_programs_give_the_equations_numbers(tmp_path, config):
    params = random_params(config)
    stablehlo.write(tmp_path, params, config)
    images, tokens = random_inputs(config, batch=5)
    flat = {path: np.asarray(a, np.float64) for path, a in unstack_blocks(flatten(params)).items()}
    image_tokens, zimg = numpy_model.image_tower(flat, config, np.asarray(images, np.float64))
    ztxt = numpy_model.text_tower(flat, config, tokens)[1]
    logits = np.exp(flat["t"]) * zimg @ ztxt.T + flat["b"]
    found = stablehlo.outputs(tmp_path, images, tokens)
    wanted = {"image_tokens": image_tokens, "image_embedding": zimg, "text_embedding": ztxt, "logits": logits}
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], array, rtol=0, atol=towers_apart(config, array), err_msg=name)


def test_one_program_for_every_batch_and_platform(tmp_path):
    config = square_model()
    stablehlo.write(tmp_path, random_params(config), config)
    program = export.deserialize(bytearray((tmp_path / "image.stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu") and str(program.in_avals[-1].shape) == "(b, 32, 32, 3)"
    images, tokens = random_inputs(config, batch=4)
    four = stablehlo.outputs(tmp_path, images, tokens)
    one = stablehlo.outputs(tmp_path, images[:1], tokens[:1])
    four = four["image_tokens"][:1]
    np.testing.assert_allclose(one["image_tokens"], four, rtol=0, atol=towers_apart(config, four))
    # The weights are no part of the program, whatever their size.
    assert (tmp_path / "image.stablehlo").stat().st_size < 100_000


def test_a_tower_for_a_language_model_is_tokens_alone(tmp_path):
    config = image_only(square_model(image={"pool": "none"}))
    stablehlo.write(tmp_path, random_params(config), config)
    images, _ = random_inputs(config)
    assert list(stablehlo.outputs(tmp_path, images, None)) == ["image_tokens"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.npz", "image.stablehlo"]


def test_a_process_without_siglip_calls_them(tmp_path):
    config = square_model()
    stablehlo.write(tmp_path, random_params(config), config)
    images, tokens = random_inputs(config)
    np.savez(tmp_path / "inputs.npz", images=images, tokens=tokens)
    script = """
        import sys
        import jax.export, numpy
        images, tokens = numpy.load("inputs.npz").values()
        outputs = {}
        for name, batch in (("image", images), ("text", tokens)):
            program = jax.export.deserialize(bytearray(open(f"{name}.stablehlo", "rb").read()))
            outputs |= program.call(dict(numpy.load(f"{name}.npz")), batch)
        assert not {"siglip", "flax"} & sys.modules.keys()
        numpy.savez("outputs.npz", **outputs)
    """
    command = [sys.executable, "-I", "-c", textwrap.dedent(script)]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    expected = stablehlo.outputs(tmp_path, images, tokens)
    with np.load(tmp_path / "outputs.npz") as found:
        assert {*found} == expected.keys() - {"logits"}
        for name in found:
            atol = towers_apart(config, expected[name])
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=atol, err_msg=name)
