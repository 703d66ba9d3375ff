"""From image files to probabilities: here, and in transformers' zero-shot pipeline on our export."""

import importlib.util

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from siglip.cli.evaluation import embedder_of
from siglip.evaluation.class_files import make_prompts
from siglip.evaluation.zeroshot import class_embeddings
from siglip.exporting.export import export
from siglip.exporting.verification import TOLERANCE
from siglip.formats import big_vision
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from tests.siglip.jobs import SAMPLE
from tests.siglip.shapes import CLASSES, draw, png
from tests.siglip.tiny import random_params

HAS_TRANSFORMERS = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
MODEL = ModelConfig(
    image=ImageConfig(variant="mu", patch_size=(8, 8), image_size=(32, 32)),
    text=TextConfig(variant="mu", vocab_size=4000, length=64),
    out_dim=(None, 32),
)


@pytest.mark.interop
@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="needs torch and transformers: pip install '.[interop]'")
def test_files_give_the_probabilities_of_the_zero_shot_pipeline(tmp_path):
    from transformers import SiglipImageProcessor, pipeline

    (tmp_path / "spiece.model").write_bytes((SAMPLE / "spiece.model").read_bytes())
    # Without the bias of training, which is -10, probabilities are far from 0 and show what differs.
    big_vision.write(tmp_path / "m.npz", random_params(MODEL) | {"b": np.zeros(1, np.float32)}, MODEL)
    export(tmp_path / "m.npz", format="hf", out=tmp_path / "hf", tower="both")
    rng, files = np.random.default_rng(0), []
    for n, size in enumerate([(32, 32), (75, 48), (20, 27)]):
        pixels, _ = draw(*CLASSES[n].split(), rng)
        files.append(tmp_path / f"{n}.png")
        Image.fromarray(pixels).resize(size).save(files[-1])
    pq.write_table(pa.table({"image": [png(np.asarray(Image.open(file))) for file in files]}), tmp_path / "x.parquet")
    template = "This is a photo of {}."
    # Where torchvision is installed the pipeline resizes with it, which rounds otherwise: 1/255 a pixel, 3e-4 in the end.
    processor = SiglipImageProcessor.from_pretrained(tmp_path / "hf")
    theirs = pipeline("zero-shot-image-classification", model=str(tmp_path / "hf"), image_processor=processor)
    found = [theirs(str(file), candidate_labels=CLASSES, hypothesis_template=template) for file in files]
    expected = [[{one["label"]: one["score"] for one in own}[name] for name in CLASSES] for own in found]
    for src in (tmp_path / "hf", tmp_path / "m.npz"):
        embedder = embedder_of(src, batch_size=8)
        # The exported tokenizer keeps the full stop that canonical prompts lose: that is `--canonical False`.
        weights = class_embeddings(embedder.embed_texts, make_prompts(CLASSES, [template], canonical=False))
        zimg = embedder.embed_shards(str(tmp_path / "x.parquet")).zimg
        logits = embedder.temperature * zimg @ weights.T + embedder.bias
        np.testing.assert_allclose(1 / (1 + np.exp(-logits)), expected, rtol=0, atol=TOLERANCE)
        assert np.ptp(expected) > 0.01  # they are not all one number
