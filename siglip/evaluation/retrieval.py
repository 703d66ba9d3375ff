"""Retrieval both ways: R@1, R@5, R@10 and the median rank, with one or several captions per image.

`text_retrieval_*` starts from each image and looks for its captions; `image_retrieval_*` starts from each caption and looks
for its image. A query is a hit at k if *any* of its positives is among the k best (CLIP_benchmark's definition). Ties: see
ranking.py.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import ClassVar, Literal

import jax
import numpy as np

from siglip.array_types import Float, Int
from siglip.errors import UserError
from siglip.evaluation.embed import EmbeddedImages, Embedder, FirstValues
from siglip.evaluation.ranking import rank_both_ways
from siglip.evaluation.results import Evaluation, Result

logger = logging.getLogger(__name__)

RECALL_AT = (1, 5, 10)


@dataclasses.dataclass(frozen=True)
class Retrieval(Evaluation):
    """Image-to-text and text-to-image retrieval: R@1, R@5, R@10, median rank.

    Attributes:
        data: shards, as for training: tar files as img2dataset writes them, Parquet, ArrayRecord, TFRecord, lists.
        captions: fields that hold captions ("txt", "captions.de"). Each is evaluated on its own; with several, their mean
            is added under the name <name>-mean. A field whose value is a list holds several captions of one image.
        name: name of the data set in the result; without one it is taken from the names of the shards.
        lines: each line of a `txt` is a caption of its own, as CLIP_benchmark writes them; False: a text is one caption.
        first_caption: whether an image's other captions are left out, as CLIP_benchmark does for Crossmodal-3600; in the papers
            all count, and the two differ by several points.
        task: the kind of evaluation.
    """

    data: str
    captions: tuple[str, ...] = ("txt",)
    name: str | None = None
    lines: bool = True
    first_caption: bool = False
    task: Literal["retrieval"] = "retrieval"

    BENCHMARK_TASK: ClassVar[str] = "zeroshot_retrieval"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.captions:
            raise UserError(f"evaluation {self.dataset!r}: captions must name at least one text field, such as 'txt'")

    def check(self, first_values: FirstValues) -> None:
        """Raises FileNotFoundError or UserError for what would fail later."""
        first_values(self.data, self.captions)

    def run(self, embedder: Embedder) -> list[Result]:
        """One result for each caption field, and their mean when there are several.

        Raises:
            UserError: a field is in no pair, or nothing can be decoded.
        """
        images = embedder.embed_shards(self.data, self.captions)
        results = []
        for field in self.captions:
            captions = [own[:1] if self.first_caption else own for own in self.captions_in(images, field)]
            texts = [text for own in captions for text in own]
            if not texts:
                raise UserError(
                    f"no image of {self.data} has the caption field {field!r}; look at a member's .json for its fields"
                )
            missing = sum(not own for own in captions)
            if missing and jax.process_index() == 0:
                told = "%s: %d images have no caption in %r: nothing is asked for them, but they can be found"
                logger.warning(told, self.data, missing, field)
            image_of_text = np.repeat(np.arange(len(captions)), [len(own) for own in captions])
            metrics = retrieval(images.zimg, embedder.embed_texts(texts), image_of_text, texts=texts)
            language = field.partition("captions.")[2]
            dataset = f"{self.dataset}-{language or field}" if len(self.captions) > 1 else self.dataset
            results.append(Result(self, dataset, language, metrics))
        if len(results) > 1:
            results.append(Result(self, f"{self.dataset}-mean", "mean", mean_of([r.metrics for r in results])))
        return results

    def captions_in(self, images: EmbeddedImages, field: str) -> list[list[str]]:
        """The captions of each image in a field; says so where texts of several lines are taken apart."""
        captions = [[v for v in values if isinstance(v, str)] for values in images.values[field]]
        if field != "txt" or not self.lines:
            return captions
        split = [[line.strip() for text in own for line in text.splitlines() if line.strip()] for own in captions]
        several = sum(len(lines) > len(own) for lines, own in zip(split, captions, strict=True))
        if several and jax.process_index() == 0:
            told = (
                "%s: the texts of %d images have several lines; each line counts as a caption (lines=False: each text)"
            )
            logger.warning(told, self.data, several)
        return split


def retrieval(
    zimg: Float[np.ndarray, "n e"],
    ztxt: Float[np.ndarray, "m e"],
    image_of_text: Int[np.ndarray, " m"],
    *,
    texts: Sequence[str] | None = None,
) -> dict[str, float]:
    """Metrics of n images and m captions; caption j describes image `image_of_text[j]`.

    Args:
        texts: the captions, so that equal ones are not counted as tied. None: all differ.

    Returns:
        {"text_retrieval_recall@k", "image_retrieval_recall@k" for k in 1, 5, 10, "…_median_rank", "tied_fraction"}; ranks count
        from 1, and tied_fraction is the share of all queries that a tie between different texts or images decided.

    Raises:
        UserError: if there is nothing to retrieve, a caption points to no image, or an embedding is not finite.
    """
    if len(zimg) == 0 or len(ztxt) == 0:
        raise UserError(f"retrieval needs images and captions, got {len(zimg)} and {len(ztxt)}")
    if len(image_of_text) != len(ztxt) or image_of_text.min() < 0 or image_of_text.max() >= len(zimg):
        raise ValueError(f"image_of_text must name one of {len(zimg)} images for each of {len(ztxt)} captions")
    of_images, of_texts = rank_both_ways(zimg, ztxt, np.arange(len(zimg)), image_of_text, column_texts=texts)
    described = of_images.ranks > 0  # an image whose captions are all missing is a candidate, but no query
    tied = float(np.mean(np.concatenate([of_images.tied[described], of_texts.tied])))
    return _summary("text", of_images.ranks[described]) | _summary("image", of_texts.ranks) | {"tied_fraction": tied}


def mean_of(results: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over several results, for instance one per language."""
    return {name: float(np.mean([result[name] for result in results])) for name in results[0]}


def _summary(side: str, ranks: Int[np.ndarray, " q"]) -> dict[str, float]:
    recalls = {f"{side}_retrieval_recall@{k}": float(np.mean(ranks <= k)) for k in RECALL_AT}
    return recalls | {f"{side}_retrieval_median_rank": float(np.median(ranks))}
