"""What is remembered of images, and when two are the same."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy.fft import dctn

from data_pipelines.curate import duplicates, image_hashes
from data_pipelines.curate.image_hashes import CROPS, EVAL_CROPS, examine, perceptual_hashes, read_thumbnail
from data_pipelines.curate.pixel_match import Tolerance, same_image
from data_pipelines.sources.webdataset import TarSource
from tests.data_pipelines.shards import SAMPLE, encode, quadrants

LIMIT = 1 << 20
TOLERANCE = Tolerance(0.15, 40)


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    source = TarSource(SAMPLE / "emoji-train-00001.tar")
    return [Image.open(io.BytesIO(source[index].image)).convert("RGB") for index in range(0, 900, 30)]


def describe(image: Image.Image, **options) -> image_hashes.ImageInfo:
    return examine(encode(image, "JPEG", **({"quality": 90} | options)), max_pixels=LIMIT)


def thumbnails(shown: list[image_hashes.ImageInfo]) -> np.ndarray:
    return np.stack([read_thumbnail(image.thumbnail) for image in shown])


def test_hashes_are_those_of_cropped_images(photos):
    grey = np.asarray(photos[0].convert("L").resize((64, 64)), np.float64)
    hashes = perceptual_hashes(grey, CROPS)
    assert hashes.shape == (21,) and hashes.dtype == np.uint64
    fine = np.kron(grey, np.ones((20, 20)))  # 5 % of a side are 64 of these, and every crop divides into 32 cells
    for cut, found in zip((np.array(CROPS) * 1280).round().astype(int).tolist(), hashes.tolist(), strict=True):
        part = fine[cut[0] : 1280 - cut[1], cut[2] : 1280 - cut[3]]
        shrunk = part.reshape(32, part.shape[0] // 32, 32, part.shape[1] // 32).mean((1, 3))
        spectrum = dctn(shrunk, norm="ortho")[:8, :8].ravel()[1:]
        bits = np.array([int(digit) for digit in f"{found:064b}"][1:])
        assert (bits == (spectrum > np.median(spectrum) + 0.05 * np.abs(spectrum).mean())).all()


def test_hash_of_a_copy_is_close_and_of_a_crop_closest_to_that_crop(photos):
    whole = np.array([describe(photo).hashes for photo in photos])
    again = np.array([describe(photo.resize((50, 60)), quality=60).hashes[0] for photo in photos])
    assert np.median(np.bitwise_count(whole[:, 0] ^ again)) <= 3
    cut = np.array([describe(photo.crop((4, 0, 72, 68))).hashes[0] for photo in photos])
    place = CROPS.index((0.0, 0.05, 0.05, 0.0))
    assert np.bitwise_count(whole[:, place] ^ cut).mean() < np.bitwise_count(whole[:, 0] ^ cut).mean() / 2


def test_bands_are_bits_of_the_hash():
    hashes = np.array([0b1011 | 1 << 62, 0], np.uint64)
    assert duplicates.band_of(hashes, 0, 4).tolist() == [0b1011, 0]
    assert duplicates.band_of(hashes, 7, 32)[0] == (int(hashes[0]) >> 55 | (0b1011 << 8))
    assert [duplicates.band_bits(n) for n in (0, 1000, 1 << 24, 1 << 34, 1 << 50)] == [8, 8, 16, 26, 32]


def test_copies_are_the_same_and_others_are_not(photos):
    whole = thumbnails([describe(photo) for photo in photos])
    copies = {
        "small": [photo.resize((40, 47), Image.Resampling.BICUBIC) for photo in photos],
        "cut": [photo.crop((2 + n % 4, n % 6, 72 - n % 3, 70)) for n, photo in enumerate(photos)],
        "wide": [photo.crop((4, 4, 70, 70)).resize((96, 50)) for photo in photos],
    }
    cut = np.zeros((len(photos), 4), np.float32)
    found = []
    for copy in copies.values():
        shown = thumbnails([describe(image, quality=70) for image in copy])
        found.append(same_image(shown, whole, cut, TOLERANCE))
        found.append(same_image(whole, shown, cut, TOLERANCE))
        assert not same_image(shown, np.roll(whole, 1, axis=0), cut, TOLERANCE).any()
    assert np.mean(found) > 0.95 and min(map(np.mean, found)) > 0.9


def test_a_changed_place_or_colour_is_another_image(photos):
    whole = thumbnails([describe(photo) for photo in photos])
    spots = []
    for photo in photos:
        changed = photo.copy()
        changed.paste((0, 160, 60), (30, 30, 42, 42))
        spots.append(describe(changed))
    tinted = [describe(Image.merge("RGB", photo.split()[::-1])) for photo in photos]
    cut = np.zeros((len(photos), 4), np.float32)
    for others in (spots, tinted):
        assert same_image(thumbnails(others), whole, cut, TOLERANCE).mean() < 0.15


def test_light_may_change_and_colour_only_for_a_leak(photos):
    cut = np.zeros((len(photos), 4), np.float32)
    whole = thumbnails([describe(photo) for photo in photos])
    for change in (0.88, 1.12):
        lit = thumbnails([describe(ImageEnhance.Brightness(photo).enhance(change)) for photo in photos])
        assert same_image(lit, whole, cut, TOLERANCE).mean() >= 0.9
    grey = thumbnails([describe(photo.convert("L")) for photo in photos])
    coloured = np.ptp(whole.astype(int), axis=3).mean((1, 2)) > 15
    assert coloured.sum() > 10 and not same_image(grey, whole, cut, TOLERANCE)[coloured].any()
    assert same_image(grey, whole, cut, Tolerance(0.25, 60, spot_share=0.03, grey=True)).mean() > 0.95
    assert not same_image(grey, np.roll(whole, 1, axis=0), cut, Tolerance(0.25, 60, spot_share=0.03, grey=True)).any()


def test_no_pairs():
    nothing = np.zeros((0, 64, 64, 3), np.uint8)
    assert same_image(nothing, nothing, np.zeros((0, 4), np.float32), TOLERANCE).shape == (0,)


def test_files_that_show_nothing():
    cases = {b"": "empty_image", b"<html>": "not_an_image", encode(quadrants())[:60]: "truncated"}
    for data, reason in cases.items():
        found = examine(data, max_pixels=LIMIT)
        assert found.reason in (reason, "corrupt_image") and found.hashes is None
    bomb = examine(encode(Image.new("1", (30_000, 30_000))), max_pixels=LIMIT)
    assert bomb.reason == "bomb"


def test_formats_sizes_and_animations():
    image = Image.fromarray(quadrants(32))
    still, moving = encode(image, "GIF"), encode(image, "GIF", save_all=True, append_images=[image.rotate(90)])
    assert not examine(still, max_pixels=LIMIT).animated and examine(moving, max_pixels=LIMIT).animated
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = examine(encode(image.resize((40, 20)), "JPEG", exif=exif), max_pixels=LIMIT)
    assert (turned.format, turned.width, turned.height) == ("JPEG", 20, 40)


def test_pixels_are_one_hash_in_any_lossless_file():
    image = Image.fromarray(quadrants(32))
    same = {examine(encode(image, kind), max_pixels=LIMIT).pixels for kind in ("PNG", "BMP", "GIF")}
    assert len(same) == 1
    assert examine(encode(np.zeros((2, 8, 3), np.uint8)), max_pixels=LIMIT).pixels != (
        examine(encode(np.zeros((8, 2, 3), np.uint8)), max_pixels=LIMIT).pixels
    )
    assert len(examine(encode(image), max_pixels=LIMIT, crops=EVAL_CROPS).hashes) == 81
