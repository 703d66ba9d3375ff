"""Training batches with label noise, see noise.py: made like others, and then corrupted row by row.

Noise wraps the batch, not single fields: a wrong caption is that of another pair of the batch, which no field sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipelines.samples import noise
from data_pipelines.samples.batches import TrainBatches
from data_pipelines.samples.noise import NoiseConfig
from data_pipelines.samples.pixels import Pixels
from data_pipelines.samples.reading import Place
from data_pipelines.samples.tokens import Tokens


@dataclass(frozen=True)
class NoisyBatches(TrainBatches):
    """Training batches whose images and texts are then corrupted."""

    config: NoiseConfig = NoiseConfig()

    def fill(self, places: Sequence[Place], arrays: dict[str, np.ndarray]) -> tuple:
        notes = super().fill(places, arrays)
        for place in places:
            for field in self.fields:
                if isinstance(field, Tokens):
                    self._corrupt_text(field, place, arrays["text"])
                if isinstance(field, Pixels) and noise.noisy_images(
                    self.config, _array(place.position), seed=self.seed
                ):
                    arrays["image"][place.row] = noise.random_image(place.position, field.size_px, seed=self.seed)
        return notes

    def _corrupt_text(self, field: Tokens, place: Place, texts: np.ndarray) -> None:
        first = place.position // self.reader.batch_pairs * self.reader.batch_pairs
        batch = range(first, first + self.reader.batch_pairs)
        shown = int(noise.text_positions(self.config, batch, seed=self.seed)[place.position - first])
        if shown != place.position:
            ((source, record),) = self.reader.locate(_array(shown))
            values, _, _ = self.sample(Place(place.row, shown, source, record), (field,))
            texts[place.row] = values["text"]
        if noise.noisy_texts(self.config, _array(place.position), seed=self.seed):
            size = field.tokenizer.vocab_size
            ids = noise.random_ids(place.position, field.length, vocab_size=size, seed=self.seed)
            texts[place.row] = field.tokenizer.padded(ids, field.length)


def _array(position: int) -> np.ndarray:
    return np.array([position])
