"""Model cards say what to feed a model and where it comes from, and their examples run."""

import re
import shutil

import jax
import pytest

from siglip.exporting.export import export
from tests.siglip.exporting.sources import HAS_TRANSFORMERS, samples, written
from tests.siglip.tiny import square_model


@pytest.mark.interop
@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="needs torch and transformers: pip install '.[interop]'")
def test_both_towers_without_a_tokenizer(tmp_path, monkeypatch, capsys):
    source = written(tmp_path / "m.npz", square_model())
    report = export(source, format="hf", out=tmp_path / "hf", tower="both", samples=samples)
    assert "text_embedding" in report.differences["sample"] and "no tokenizer" in report.message
    assert "use that of training" in (tmp_path / "hf" / "README.md").read_text()
    assert "[1, 16, 36]" in run_example(tmp_path / "hf", monkeypatch, capsys)


def run_example(folder, monkeypatch, capsys) -> str:
    """What the example in a model card prints."""
    card = (folder / "README.md").read_text()
    monkeypatch.chdir(folder)
    capsys.readouterr()
    with jax.numpy_rank_promotion("allow"):  # as users have it
        exec(re.search(r"```python\n(.*?)```", card, re.S)[1], {})
    return capsys.readouterr().out


def test_the_model_card_says_what_to_feed_and_how_far_it_was_checked(tmp_path, source):
    export(source, format="bigvision", out=tmp_path / "bv", tower="both", licence="apache-2.0")
    card = (tmp_path / "bv" / "README.md").read_text()
    parts = (
        "width 36, depth 2", "32 x 32 px", "16 tokens (4 x 4", "exactly 7", "[-1, 1]", "| image_tokens | 0.0e+00 |",
        "Licence: apache-2.0", "license: apache-2.0", "the source is not a training run", "None on record",
    )  # fmt: skip
    for part in parts:
        assert part in card, part


@pytest.mark.parametrize("tower", ["image", "both"])
@pytest.mark.parametrize(
    "format, printed",
    [("bigvision", "(1, 16, 36)"), ("stablehlo", ""), pytest.param("savedmodel", "", marks=pytest.mark.slow)],
)
def test_examples_of_model_cards_run(tmp_path, real_source, monkeypatch, capsys, format, printed, tower):
    export(real_source, format=format, out=tmp_path / "out", tower=tower, samples=samples)
    out = run_example(tmp_path / "out", monkeypatch, capsys)
    assert (printed or ("(1, 16, 36)" if tower == "image" else "[[0.")) in out


@pytest.mark.interop
@pytest.mark.parametrize("tower, length", [("image", 64), ("both", 64), ("both", 12), ("both", 77)])
@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="needs torch and transformers: pip install '.[interop]'")
def test_examples_for_transformers_run(tmp_path, real_source, monkeypatch, capsys, tower, length):
    written(real_source, square_model(text={"vocab_size": 4000, "length": length}))
    export(real_source, format="hf", out=tmp_path / "out", tower=tower)
    out = run_example(tmp_path / "out", monkeypatch, capsys)
    assert {"image": "[1, 16, 36]", "both": "score" if length == 64 else "tensor([["}[tower] in out


def test_the_card_of_a_run_tells_its_recipe_and_evaluation(tmp_path, trained):
    workdir = shutil.copytree(trained, tmp_path / "run")
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "eval/retrieval/toy/image_retrieval_recall@1": 0.125}\n')
        file.write('{"step": 9, "eval/retrieval/toy/image_retrieval_recall@1": 0.5}\n')
    export(workdir, format="bigvision", out=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    parts = (
        "from `run`, step 8",
        "8 of 8 steps",
        "pairs seen",
        "adamw, lr",
        "| retrieval | image retrieval recall@1 |\n|---|---|\n| toy | 0.125 |",
    )
    for part in parts:
        assert part in card, part
    assert "0.500" not in card
