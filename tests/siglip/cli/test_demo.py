"""`siglip demo`: what the server answers, what it refuses, and the page in a browser where there is one."""

import asyncio
import contextlib
import dataclasses
import io
import json
import math
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web
from PIL import Image

import siglip
from data_pipelines.sources.webdataset import TarSource
from siglip.cli import run
from siglip.cli.demo import DemoArgs, make_index
from siglip.cli.demo_server import make_app
from siglip.formats import big_vision
from siglip.models.naflex import NaflexConfig
from siglip.models.two_tower import ImageConfig, ModelConfig, TextConfig
from tests.siglip.jobs import ROOT, SAMPLE
from tests.siglip.tiny import random_params

MODEL = ModelConfig(
    image=ImageConfig(variant="mu", patch_size=(8, 8), image_size=(16, 16)),
    text=TextConfig(variant="mu", vocab_size=4000, length=8),
    out_dim=(None, 32),
)
IMAGES = 12
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    big_vision.write(out / "m.npz", random_params(MODEL), MODEL)
    (out / "spiece.model").write_bytes((SAMPLE / "spiece.model").read_bytes())
    return out


@pytest.fixture(scope="module")
def index(folder):
    data = str(SAMPLE / "emoji-heldout-00000.tar")
    return make_index(
        DemoArgs(src=str(folder / "m.npz"), data=data, max_images=IMAGES, trained_batch_size=64, batch_size=8)
    )


@contextlib.contextmanager
def served(index):
    """The server in a thread, at a free port."""
    loop, app = asyncio.new_event_loop(), make_app(index, about={"images": IMAGES, "prior": index.prior, "model": "mu",
        "src": "m.npz", "data": "emoji", "batch_size": 64}, hosts=("localhost", "127.0.0.1"))  # fmt: skip
    runner = web.AppRunner(app)
    loop.run_until_complete(runner.setup())
    listening = socket.create_server(("127.0.0.1", 0))
    loop.run_until_complete(web.SockSite(runner, listening).start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(scope="module")
def address(index):
    with served(index) as address:
        yield address


def ask(address: str, path: str, body: bytes | None = None, **headers: str):
    request = urllib.request.Request(address + path, data=body, headers=headers)
    with contextlib.closing(urllib.request.urlopen(request, timeout=60)) as answer:
        return json.load(answer)


def refused(address: str, path: str, body: bytes | None = None, *, status: int = 400, **headers: str) -> str:
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(address, path, body, **headers)
    with caught.value as error:
        assert error.code == status
        return json.load(error)["error"]


def test_a_text_finds_images_with_the_probability_at_the_given_prior(folder, index, address):
    model, pairs = siglip.load(folder / "m.npz"), list(TarSource(SAMPLE / "emoji-heldout-00000.tar"))[:IMAGES]
    images = [Image.open(io.BytesIO(pair.image)) for pair in pairs]
    trained = np.asarray(model.probabilities(images, ["ein rotes Herz"]), np.float64)[:, 0]
    for prior, query in ((1 / IMAGES, ""), (0.25, "&prior=0.25")):
        found = ask(address, f"/api/search?q={quote('ein rotes Herz')}&count=5{query}")
        odds = trained / (1 - trained) * (prior / (1 - prior)) / ((1 / 64) / (63 / 64))
        expected = odds / (1 + odds)
        order = np.argsort(-expected)[:5]
        assert [r["row"] for r in found["results"]] == order.tolist() and found["prior"] == prior
        np.testing.assert_allclose([r["p"] for r in found["results"]], expected[order], rtol=1e-3)
        assert [r["caption"] for r in found["results"]] == [pairs[n].fields["captions"]["en"] for n in order]
        assert [r["rank"] for r in found["results"]] == [1, 2, 3, 4, 5]


def test_an_image_finds_images_and_is_compared_with_labels(index, address):
    found = ask(address, "/api/search?row=3&count=20&labels=" + quote("cat, ein Hund\n車"))
    assert len(found["results"]) == IMAGES - 1 and 3 not in [r["row"] for r in found["results"]]
    cosine = index.zimg @ index.zimg[3]
    np.testing.assert_allclose([r["cosine"] for r in found["results"]], np.sort(np.delete(cosine, 3))[::-1], atol=1e-6)
    assert {r["text"] for r in found["labels"]} == {"cat", "ein Hund", "車"}
    captions = ask(address, "/api/search?row=3")["labels"]
    assert len(captions) == 8 and [r["p"] for r in captions] == sorted((r["p"] for r in captions), reverse=True)
    sent = ask(address, "/api/search?count=1", index.read(3))
    assert sent["results"][0]["row"] == 3 and math.isclose(sent["results"][0]["cosine"], 1, abs_tol=1e-5)
    for body, query in ((None, "&row=3"), (index.read(3), "")):
        grid = np.array(ask(address, "/api/heat?q=cat" + query, body)["grid"])
        z, zcat = index.model.embed_patches([Image.open(io.BytesIO(index.read(3)))]), index.model.embed_texts(["cat"])
        np.testing.assert_allclose(grid, np.asarray(z[0] @ zcat[0]).reshape(2, 2), atol=1e-5)
    with urllib.request.urlopen(address + "/image/3") as answer:
        assert answer.headers["Content-Type"] == "image/png" and Image.open(io.BytesIO(answer.read())).size == (72, 72)


def test_a_naflex_model_is_asked_at_the_length_that_is_told(folder, tmp_path):
    """Nine patches an image, where its own number is four."""
    config = dataclasses.replace(MODEL, image=dataclasses.replace(MODEL.image, naflex=NaflexConfig(4, 9)))
    big_vision.write(tmp_path / "m.npz", random_params(config), config)
    shutil.copy(folder / "spiece.model", tmp_path)
    shard = SAMPLE / "emoji-heldout-00000.tar"
    args = DemoArgs(src=str(tmp_path / "m.npz"), data=str(shard), max_images=IMAGES, batch_size=8, max_patches=9)
    model, pairs = siglip.load(tmp_path / "m.npz"), list(TarSource(shard))[:IMAGES]
    images, ztxt = [Image.open(io.BytesIO(pair.image)) for pair in pairs], model.embed_texts(["cat"])
    scores = {n: np.asarray(model.logits(model.embed_images(images, max_patches=n), ztxt))[:, 0] for n in (4, 9)}
    with served(make_index(args)) as address:
        found = ask(address, f"/api/search?q=cat&count={IMAGES}")["results"]
        np.testing.assert_allclose([r["logit"] for r in found], scores[9][[r["row"] for r in found]], atol=1e-4)
        assert np.abs(scores[9] - scores[4]).max() > 1e-2
        sent = ask(address, "/api/search?count=1", pairs[3].image)["results"][0]
        assert sent["row"] == 3 and math.isclose(sent["cosine"], 1, abs_tol=1e-5)
        assert np.shape(ask(address, "/api/heat?q=cat&row=3")["grid"]) == (3, 3)


def test_what_the_server_refuses(address):
    assert "q is a text of 1 to 2000" in refused(address, "/api/search?q=%20")
    assert "prior='2' must be a number between 0 and 1" in refused(address, "/api/search?q=a&prior=2")
    assert "there is no image 99; they are 0 to 11" in refused(address, "/api/search?row=99")
    assert "row='-1' must be a number" in refused(address, "/api/search?row=-1")
    assert "not_an_image" in refused(address, "/api/search", b"no image")
    assert "101 labels are more than 100" in refused(address, "/api/search?row=1&labels=" + "a," * 101)
    assert "needs an image" in refused(address, "/api/heat?q=cat")
    told = refused(address, "/api/search?q=a", status=403, Host="evil.example")
    assert told == "this server answers for localhost only"


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
@pytest.mark.parametrize(
    "query, expected", [("?q=heart", ("no. 1",)), ("?row=3&labels=cat,%E8%BB%8A", ("車", "cosine"))]
)
def test_the_page_in_a_browser(address, tmp_path, query, expected):
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=20000",
    ]
    done = subprocess.run(
        [BROWSER, *flags, "--dump-dom", address + "/" + query], capture_output=True, text=True, timeout=120
    )
    for text in expected:
        assert text in done.stdout, done.stdout[-3000:]
    assert 'class="error"' not in done.stdout and done.stdout.count("/image/") >= IMAGES - 1


def test_images_of_the_column_that_is_named(folder, tmp_path):
    pairs = list(TarSource(SAMPLE / "emoji-heldout-00000.tar"))[:3]
    images = [pair.image for pair in pairs]
    pq.write_table(pa.table({"image": images[:2], "photo": images[1:]}), tmp_path / "two.parquet")
    settings = {"src": str(folder / "m.npz"), "data": str(tmp_path / "two.parquet"), "batch_size": 8}
    found = make_index(DemoArgs(**settings))
    other = make_index(DemoArgs(**settings, image_column="photo"))
    assert [index.read(0) for index in (found, other)] == images[:2]


def test_mistakes(folder, tmp_path, capsys):
    src, data = str(folder / "m.npz"), str(SAMPLE / "emoji-heldout-00000.tar")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        base = ["demo", src, "--data", data, "--max-images", "8", "--batch-size", "8"]
        for args, told in (
            ([*base, "--host", "127.0.0.1", "--port", port], f"cannot serve on 127.0.0.1, port {port}"),
            ([*base, "--max-images", "0"], "max_images=0 must be at least 1"),
            ([*base, "--trained-batch-size", "0"], "trained_batch_size=0 must be at least 2"),
            ([*base, "--captions", "captoins"], "has a field 'captoins'"),
            (["demo", src, "--data", str(tmp_path)], "holds neither images nor shards"),
        ):
            capsys.readouterr()
            assert run(args) == 2
            error = capsys.readouterr().err
            assert told in error and error.count("siglip: error: ") == 1 and "Traceback" not in error


@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_stop(folder):
    line = [
        sys.executable,
        "-m",
        "siglip.cli",
        "demo",
        str(folder / "m.npz"),
        "--data",
        str(SAMPLE / "emoji-heldout-00000.tar"),
    ]
    process = subprocess.Popen([*line, "--max-images", "8", "--port", "0"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    address = process.stdout.readline().split()[0].rstrip("/")
    assert ask(address, "/api/info")["images"] == 8
    with urllib.request.urlopen(address + "/") as page:
        assert b"<title>siglip demo</title>" in page.read()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
