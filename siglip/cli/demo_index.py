"""What the demo answers: images of a collection ranked by a text or an image, with the sigmoid's probabilities.

    p = sigmoid(logit + logit(prior) - logit(1 / batch))      (siglip.losses.prior_shift)

A pair matches if its p is above the prior: then having looked at it speaks for it. Two images have no such probability, only a
cosine.
"""

import dataclasses
import functools
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data_pipelines.image_ops import decode_image
from siglip.encoder import Encoder
from siglip.errors import UserError
from siglip.losses import prior_shift
from siglip.models.naflex import Patches

MAX_IMAGE_PIXELS = 1 << 26
_SHOWN_PX = 512
_MAX_LABELS = 100


@dataclasses.dataclass(frozen=True, eq=False)
class DemoIndex:
    """A collection of images with their embeddings, and the model.

    Attributes:
        read: row -> encoded file of an image.
        zimg: [n, e], normalised. keys: names of the images. captions: one text of each, or "".
        batch_size: pairs in a batch of the model's training, which its probabilities are about.
        max_patches: of an image, for a NaFlex model; None for its own number.
    """

    model: Encoder
    read: Callable[[int], bytes]
    zimg: np.ndarray
    keys: Sequence[str]
    captions: Sequence[str]
    batch_size: int
    max_patches: int | None = None

    @property
    def prior(self) -> float:
        """One image of the collection is expected to match, of at most a half."""
        return 1 / max(2, len(self.keys))

    def search_text(self, text: str, *, prior: float, count: int) -> dict[str, Any]:
        """The images closest to a text, with probabilities."""
        shift = prior_shift(prior, batch_size=self.batch_size)
        logits = np.asarray(self.model.logits(self.zimg, self.model.embed_texts([text])))[:, 0]
        order = np.argsort(-logits, kind="stable")[:count].tolist()
        p = _sigmoid(logits + shift)
        return {"results": [self._row(row, rank, logit=logits[row], p=p[row]) for rank, row in enumerate(order, 1)]}

    def search_image(self, image: int | bytes, *, labels: Sequence[str], prior: float, count: int) -> dict[str, Any]:
        """The images closest to one of the collection, or to a file, and the probabilities of labels.

        Without labels the captions of the collection that match it best.

        Raises:
            UserError: more labels than fit, or no such image.
            DecodeError: the file is not an image.
        """
        if len(labels) > _MAX_LABELS:
            raise UserError(f"{len(labels)} labels are more than {_MAX_LABELS}; leave some out")
        own = self._check_row(image) if isinstance(image, int) else None
        z = self.zimg[own : own + 1] if own is not None else np.asarray(self.model.embed_images(self._pixels(image)))
        cosine = (self.zimg @ z.T)[:, 0]
        order = [row for row in np.argsort(-cosine, kind="stable")[: count + 1].tolist() if row != own][:count]
        found = {"results": [self._row(row, rank, cosine=cosine[row]) for rank, row in enumerate(order, 1)]}
        texts, ztxt = self._captions if not labels else (list(labels), np.asarray(self.model.embed_texts(list(labels))))
        if texts:
            logits = np.asarray(self.model.logits(z, ztxt))[0]
            p = _sigmoid(logits + prior_shift(prior, batch_size=self.batch_size))
            best = np.argsort(-logits, kind="stable")[: len(texts) if labels else 8].tolist()
            found["labels"] = [{"text": texts[n], "p": float(p[n])} for n in best]
        return found

    def heat(self, image: int | bytes, text: str) -> dict[str, Any]:
        """Cosine of each patch with a text, row by row: where in the image it is. Raises as `search_image`."""
        file = self.read(self._check_row(image)) if isinstance(image, int) else image
        pixels, grid = self._pixels(file), self.model.config.image.grid
        patches = self.model.embed_patches(pixels)
        if isinstance(pixels, Patches):
            patches, grid = patches[0][:, : pixels.lengths[0]], pixels.grid[0]
        cosine = np.asarray(patches)[0] @ np.asarray(self.model.embed_texts([text]))[0]
        return {"grid": cosine.reshape(*grid).tolist()}

    def thumbnail(self, row: int) -> bytes:
        """A PNG of at most 512 px. Raises as `search_image`."""
        image, file = self._decode(self.read(self._check_row(row))), io.BytesIO()
        image.thumbnail((_SHOWN_PX, _SHOWN_PX))
        image.save(file, "png")
        return file.getvalue()

    def _check_row(self, row: int) -> int:
        if not 0 <= row < len(self.keys):
            raise UserError(f"there is no image {row}; they are 0 to {len(self.keys) - 1}")
        return row

    def _pixels(self, file: bytes) -> Any:
        return self.model.pixels([self._decode(file)], max_patches=self.max_patches)

    def _decode(self, file: bytes) -> Any:
        return decode_image(file, max_pixels=MAX_IMAGE_PIXELS)

    def _row(self, row: int, rank: int, **scores: Any) -> dict[str, Any]:
        about = {"row": row, "rank": rank, "key": self.keys[row], "caption": self.captions[row]}
        return about | {name: float(score) for name, score in scores.items()}

    @functools.cached_property
    def _captions(self) -> tuple[list[str], np.ndarray]:
        texts = list(dict.fromkeys(text for text in self.captions if text))
        return texts, np.asarray(self.model.embed_texts(texts)) if texts else self.zimg[:0]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))
