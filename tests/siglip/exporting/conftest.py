"""Models to export: random ones with a tokenizer beside them, and a trained one."""

import pytest

from siglip.training.loop import train
from tests.siglip.exporting.sources import written
from tests.siglip.texts import SPIECE, plain_pieces
from tests.siglip.tiny import square_model
from tests.siglip.tiny_run import TinyBatches, drifting_program, tiny_config, use_devices


@pytest.fixture
def source(tmp_path):
    """A two-tower npz in bfloat16 compute and scan layout, with a tokenizer beside it."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "spiece.model").write_bytes(plain_pieces())
    return written(folder / "m.npz", square_model(image={"scan": True}, text={"vocab_size": 4000}))


@pytest.fixture
def real_source(tmp_path):
    """A two-tower npz of 64 tokens that knows the shipped tokenizer."""
    folder = tmp_path / "real"
    folder.mkdir()
    (folder / "spiece.model").write_bytes(SPIECE.read_bytes())
    return written(folder / "m.npz", square_model(text={"vocab_size": 4000, "length": 64}))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Workdir of a short run."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, 1)
        train(tiny_config(workdir), TinyBatches(), program=drifting_program(tiny_config(workdir)))
    return workdir
