"""NaFlex pixels and lengths: the published grid, patches bit for bit, and the same pairs whatever the lengths are."""

import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from data_pipelines import image_ops
from data_pipelines.errors import UserError
from data_pipelines.loader import make_eval_batches, make_loader
from data_pipelines.order.lengths import LengthConfig, Lengths
from data_pipelines.patch_ops import cut_patches, fit_grid, join_patches
from data_pipelines.samples.noise import NoiseConfig
from data_pipelines.samples.pairs import SamplePair
from data_pipelines.samples.patches import Patches
from data_pipelines.sources.webdataset import TarSource
from data_pipelines.tokenizers import SentencePieceTokenizer
from tests.data_pipelines.shards import SAMPLE_TRAIN
from tests.data_pipelines.streams import SAMPLE_CONFIG, SHAPES, take

LENGTHS = (64, 128, 256, 576, 784, 1024)


def reference_grid(height, width, patch, limit, eps=1e-5):
    """transformers' get_image_size_for_max_num_patches, in its words, in patches."""

    def scaled(scale, size):
        return int(max(patch, math.ceil(size * scale / patch) * patch))

    low, high = eps / 10, 100.0
    while (high - low) >= eps:
        scale = (low + high) / 2
        patches = (scaled(scale, height) / patch) * (scaled(scale, width) / patch)
        low, high = (scale, high) if patches <= limit else (low, scale)
    return scaled(low, height) // patch, scaled(low, width) // patch


def test_grids_of_ten_thousand_sizes():
    """As published; within N; hardly any patch more would fit; and the aspect ratio is kept to what whole patches allow."""
    rng, fill = np.random.default_rng(0), []
    for i, (height, width) in enumerate(np.exp(rng.uniform(np.log(1), np.log(4000), (10_000, 2))).astype(int).tolist()):
        patch, limit = (14, 16)[i % 2], LENGTHS[i % 6]
        down, across = fit_grid((height, width), (patch, patch), limit)
        assert (down, across) == reference_grid(height, width, patch, limit)
        assert down >= 1 and across >= 1 and down * across <= limit
        # One ratio serves both sides: (down - 1) / h < ratio / patch <= down / h.
        ratios = [((n - 1) * patch / side, n * patch / side) for n, side in ((down, height), (across, width))]
        low, high = max(r[0] for r in ratios), min(r[1] for r in ratios)
        assert low < high + 1e-5 or max(down, across) == 1
        if min(height, width) >= 64:
            fill.append(down * across / limit)
    assert np.mean(fill) > 0.95


def test_the_vector_of_the_reference():
    assert fit_grid((63, 241), (16, 16), 16) == (2, 8)
    assert fit_grid((4, 4), (16, 16), 625) == (25, 25)
    # Where the published bisection and exact arithmetic part.
    assert fit_grid((2588, 2941), (16, 16), 576) == (22, 25)


@pytest.mark.parametrize("size", [(1, 1000), (65_536, 1), (3, 3), (1, 1), (20_000, 20)], ids=str)
def test_extreme_images_stay_within_their_patches(size):
    for limit in (1, 7, 1024):
        down, across = fit_grid(size, (16, 16), limit)
        assert 1 <= down * across <= limit
    image = np.broadcast_to(np.uint8(9), (*size, 3))
    made = Patches((16, 16), 256).make(SamplePair(0, 0, "", {}, (), image), None)
    assert made["patches"].shape == (256, 768) and made["grid"].prod() <= 256


def test_patches_are_row_column_channel_and_padded_at_the_end():
    image = np.arange(4 * 9 * 3, dtype=np.uint8).reshape(4, 9, 3)
    patches, grid = cut_patches(image, (2, 3), 8)
    assert grid.tolist() == [2, 3] and patches.shape == (8, 18) and not patches[6:].any()
    for i in range(2):
        for j in range(3):
            assert (patches[3 * i + j] == image[2 * i : 2 * i + 2, 3 * j : 3 * j + 3].reshape(-1)).all()
    assert (join_patches(patches, (2, 3), (2, 3)) == image).all()


def test_pixels_are_one_resize_by_pillow():
    image = np.random.default_rng(0).integers(256, size=(63, 241, 3), dtype=np.uint8)
    made = Patches((16, 16), 16, exact=True).make(SamplePair(0, 0, "", {}, (), image), None)
    expected = np.asarray(Image.fromarray(image).resize((128, 32), Image.Resampling.BILINEAR))
    assert (join_patches(made["patches"], (2, 8), (16, 16)) == expected).all()


def scaled_then_resized_by_pillow(image, size_px):
    channels = [Image.fromarray(np.ascontiguousarray(image[..., n] / 127.5 - 1, np.float32)) for n in range(3)]
    return np.stack([np.asarray(one.resize(size_px[::-1], Image.Resampling.BILINEAR)) for one in channels], axis=-1)


def scaled_then_resized_by_tensorflow(image, size_px):
    """big_vision's `value_range(-1, 1)`, then its resize."""
    tf = pytest.importorskip("tensorflow")
    return tf.image.resize(image.astype(np.float32) / 127.5 - 1, size_px, method="bilinear", antialias=True).numpy()


@pytest.mark.parametrize(
    "reference",
    [scaled_then_resized_by_pillow, pytest.param(scaled_then_resized_by_tensorflow, marks=pytest.mark.slow)],
)
def test_bytes_are_within_a_level_of_big_vision_s_floats(reference):
    """A half for each of the two passes after which Pillow rounds: .004 from black to white."""
    rng, differences = np.random.default_rng(0), []
    for size, limit in (((63, 241), 16), ((250, 333), 256), ((32, 750), 100), ((7, 9), 64)):
        image = rng.integers(256, size=(*size, 3), dtype=np.uint8)
        made = Patches((16, 16), limit, exact=True).make(SamplePair(0, 0, "", {}, (), image), None)
        ours = join_patches(made["patches"], tuple(made["grid"]), (16, 16))
        differences.append(np.abs(ours / 255 - (reference(image, ours.shape[:2]) + 1) / 2))
    assert max(found.max() for found in differences) <= 0.004
    assert np.concatenate([found.ravel() for found in differences]).mean() <= 0.0012


@pytest.mark.interop
def test_transformers_makes_the_same_patches():
    """Its processor with Pillow ("slow" in version 4), bit for bit, before pixels are scaled."""
    siglip2 = pytest.importorskip("transformers.models.siglip2")
    make = getattr(siglip2, "Siglip2ImageProcessorPil", None) or siglip2.Siglip2ImageProcessor
    processor = make(do_rescale=False, do_normalize=False)
    rng = np.random.default_rng(1)
    for size, limit in (((63, 241), 16), ((500, 333), 256), ((32, 1500), 100), ((900, 40), 1024), ((7, 9), 64)):
        image = rng.integers(256, size=(*size, 3), dtype=np.uint8)
        theirs = processor(Image.fromarray(image), max_num_patches=limit, return_tensors="np")
        ours = Patches((16, 16), limit, exact=True).make(SamplePair(0, 0, "", {}, (), image), None)
        assert (theirs["pixel_values"][0] == ours["patches"]).all()
        assert (theirs["spatial_shapes"][0] == ours["grid"]).all()
        assert theirs["pixel_attention_mask"][0].sum() == ours["grid"].prod()


PATCHES = Patches((8, 8), 16, augment=SAMPLE_CONFIG.augment, square_px=(16, 16))
SCHEDULE = LengthConfig((4, 9, 16), (1.0, 2.0, 1.0), start=0.25)


def lengths(config=SCHEDULE, *, total_steps=8, seed=0):
    return Lengths.of(config, total_steps=total_steps, seed=seed)


def naflex(count, *, config=SAMPLE_CONFIG, **changes):
    return take(config, count, patches=replace(PATCHES, lengths=lengths()), **changes)


def same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert one["key"] == other["key"]
        for name in ("patches", "grid", "text"):
            np.testing.assert_array_equal(one[name], other[name])


def test_lengths_are_drawn_by_seed_and_step_with_their_weights():
    schedule = lengths(total_steps=8000)
    drawn = [schedule.at(step) for step in range(8000)]
    assert drawn[:2000] == [None] * 2000 and None not in drawn[2000:]
    counts = [drawn.count(n) for n in SCHEDULE.patches]
    # Six standard deviations of a binomial count.
    for count, share in zip(counts, (0.25, 0.5, 0.25), strict=True):
        assert abs(count - 6000 * share) < 6 * math.sqrt(6000 * share * (1 - share))
    assert drawn == [lengths(total_steps=8000).at(step) for step in range(8000)]
    assert drawn != [lengths(total_steps=8000, seed=1).at(step) for step in range(8000)]


def test_one_length_per_step_and_the_pairs_of_a_run_with_images():
    batches, loader = naflex(8)
    assert set(batches[0]) == {"patches", "grid", "text", "key"}
    plain, _ = take(SAMPLE_CONFIG, 8)
    for step, (batch, other) in enumerate(zip(batches, plain, strict=True)):
        expected = lengths().at(step) or 4  # 16 px are two patches of 8 px
        assert batch["patches"].shape == (8, expected, 192) and batch["patches"].dtype == np.uint8
        assert batch["grid"].shape == (8, 2) and (batch["grid"].prod(axis=1) <= expected).all()
        assert batch["key"] == other["key"] and (batch["text"] == other["text"]).all()
    assert (batches[0]["grid"] == 2).all() and (batches[1]["grid"] == 2).all()
    assert len({batch["patches"].shape for batch in batches[2:]}) > 1 and loader.state()["position"] == 8


def test_a_row_that_is_too_short_is_no_part_of_a_batch(monkeypatch):
    """The memory of a batch is not cleared: what a field leaves out would be what stood there before."""
    encode = SentencePieceTokenizer.encode
    monkeypatch.setattr(SentencePieceTokenizer, "encode", lambda self, text, length: encode(self, text, length)[:-1])
    with pytest.raises(ValueError, match="could not broadcast"):
        naflex(1)


def test_squares_before_the_start_are_the_images_of_a_run_of_one_size():
    batches, _ = naflex(1)
    plain, _ = take(SAMPLE_CONFIG, 1, image_size=(16, 16))
    for patches, grid, image in zip(batches[0]["patches"], batches[0]["grid"], plain[0]["image"], strict=True):
        assert (join_patches(patches, tuple(grid), (8, 8)) == image).all()


def test_processes_threads_and_resume_change_nothing():
    reference, _ = naflex(6)
    same(naflex(6, config=replace(SAMPLE_CONFIG, threads=4, prefetch=8))[0], reference)
    same(naflex(3, position=3)[0], reference[3:])
    _, loader = naflex(3)
    more = make_loader(SAMPLE_CONFIG, **SHAPES, patches=replace(PATCHES, lengths=lengths()))
    more.restore(loader.state())
    same([next(more) for _ in range(3)], reference[3:])
    more.close()
    parts = [naflex(6, process_index=index, process_count=2)[0] for index in range(2)]
    for step, whole in enumerate(reference):
        rows = {
            key: (p.tobytes(), tuple(g))
            for key, p, g in zip(*(whole[n] for n in ("key", "patches", "grid")), strict=True)
        }
        for part in parts:
            for key, p, g in zip(*(part[step][n] for n in ("key", "patches", "grid")), strict=True):
                assert rows[key] == (p.tobytes(), tuple(g))


@pytest.mark.slow
def test_worker_processes_change_nothing():
    same(naflex(6, config=replace(SAMPLE_CONFIG, workers=2, threads=1))[0], naflex(6)[0])


def test_evaluation_keeps_aspect_ratios_too():
    source = TarSource(SAMPLE_TRAIN)
    batches = make_eval_batches(source, batch_size=4, image_size=(8, 8), patches=Patches((8, 8), 20, exact=True))
    batch = next(iter(batches))
    assert batch["patches"].shape == (4, 20, 192) and "image" not in batch
    image = image_ops.decode_pixels(source[batch["index"][0]].image, max_pixels=1 << 26)
    grid = tuple(batch["grid"][0])
    assert grid == fit_grid(image.shape[:2], (8, 8), 20)
    expected = image_ops.resize(image, (grid[0] * 8, grid[1] * 8))
    assert (join_patches(batch["patches"][0], grid, (8, 8)) == expected).all()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"patches": (0, 4)}, "patches=.* each at least 1"),
        ({"patches": ()}, "patches=.* each at least 1"),
        ({"patches": (4, 4)}, "patches=.* different"),
        ({"weights": (1.0,)}, "weights=.* must be 5 positive numbers"),
        ({"patches": (4,), "weights": (0.0,)}, "weights=.* must be 1 positive"),
        ({"patches": (4, 9), "weights": (1.0, math.nan)}, "weights=.* must be 2 positive"),
        ({"patches": (4, 9), "weights": (math.inf, 1.0)}, "weights=.* must be 2 positive"),
        ({"start": 1.0}, "start=1.0 is a fraction"),
    ],
)
def test_schedules_that_cannot_be(change, words):
    with pytest.raises(UserError, match=words) as error:
        LengthConfig(**change)
    assert "\n" not in str(error.value)


def test_images_without_pixels_and_lengths_below_one_are_one_line():
    with pytest.raises(UserError, match="an image of 0 x 5 px has no pixel for a patch"):
        fit_grid((0, 5), (16, 16), 4)
    with pytest.raises(UserError, match="max_patches=0 must be at least 1"):
        fit_grid((4, 5), (16, 16), 0)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"jpeg_scaling": True}, "data.jpeg_scaling needs images of one size"),
        ({"noise": NoiseConfig(image=0.1)}, "data.noise.image needs"),
        ({"image_embeddings": "x"}, "data.image_embeddings needs"),
    ],
)
def test_settings_that_need_images_of_one_size(change, words):
    with pytest.raises(UserError, match=words):
        make_loader(replace(SAMPLE_CONFIG, **change), **SHAPES, patches=PATCHES)
    with pytest.raises(UserError, match="this model is NaFlex"):
        make_eval_batches(
            TarSource(SAMPLE_TRAIN), batch_size=4, image_size=(8, 8), patches=PATCHES, protocol="square875"
        )
