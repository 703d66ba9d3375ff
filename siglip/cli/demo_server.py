"""The demo's web server: one page, and what it asks for as JSON. Served by aiohttp.

The trap: a page of any site may send requests to localhost. Only requests for the host that this server was started on are
answered, so no other name that leads here (DNS rebinding) gets the images.
"""

import asyncio
import dataclasses
import functools
import importlib.resources
import json
import math
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp import web

from data_pipelines.image_ops import DecodeError
from siglip.cli.demo_index import DemoIndex
from siglip.errors import UserError

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_MAX_UPLOAD_BYTES = 1 << 25
_MAX_RESULTS = 500
_MAX_TEXT_CHARS = 2000
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src 'self' blob: data:",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclasses.dataclass(frozen=True, eq=False)
class _Server:
    index: DemoIndex
    about: dict[str, Any]
    # The model runs in one thread, one request after the other; images are decoded in another, so that they never wait for it.
    model_thread: ThreadPoolExecutor
    image_threads: ThreadPoolExecutor

    async def page(self, request: web.Request) -> web.Response:
        text = importlib.resources.files("siglip.cli").joinpath("demo.html").read_text()
        return web.Response(text=text, content_type="text/html")

    async def info(self, request: web.Request) -> web.Response:
        return web.json_response(self.about)

    async def image(self, request: web.Request) -> web.Response:
        row = _integer(request.match_info["row"], "row")
        png = await _in(self.image_threads, self.index.thumbnail, row)
        return web.Response(body=png, content_type="image/png", headers={"Cache-Control": "max-age=3600"})

    async def search(self, request: web.Request) -> web.Response:
        query = request.query
        prior, count = _prior(query.get("prior"), self.index.prior), _integer(query.get("count", "24"), "count")
        options = {"prior": prior, "count": min(max(count, 1), _MAX_RESULTS)}
        image = await _image(request)
        if image is None:
            call = functools.partial(self.index.search_text, _text(query.get("q")), **options)
        else:
            labels = [label.strip() for label in query.get("labels", "").replace("\n", ",").split(",") if label.strip()]
            call = functools.partial(self.index.search_image, image, labels=labels, **options)
        return web.json_response(await _in(self.model_thread, call) | {"prior": prior})

    async def heat(self, request: web.Request) -> web.Response:
        image = await _image(request)
        if image is None:
            raise UserError("a heat map needs an image: add row=N, or send one")
        text = _text(request.query.get("q"))
        return web.json_response(await _in(self.model_thread, self.index.heat, image, text))


async def _in(threads: ThreadPoolExecutor, call: Callable, *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(threads, call, *args)


async def _image(request: web.Request) -> int | bytes | None:
    if request.method == "POST":
        return await request.read()
    return _integer(request.query["row"], "row") if "row" in request.query else None


def _text(text: str | None) -> str:
    if not text or not text.strip() or len(text) > _MAX_TEXT_CHARS:
        raise UserError(f"q is a text of 1 to {_MAX_TEXT_CHARS} characters")
    return text


def _integer(text: str, name: str) -> int:
    if not text.isdecimal() or len(text) > 12:
        raise UserError(f"{name}={text[:20]!r} must be a number")
    return int(text)


def _prior(text: str | None, default: float) -> float:
    if text is None:
        return default
    try:
        prior = float(text)
    except ValueError:
        prior = math.nan
    if not 0 < prior < 1:
        raise UserError(f"prior={text[:20]!r} must be a number between 0 and 1")
    return prior


def make_app(index: DemoIndex, *, about: dict[str, Any], hosts: tuple[str, ...] | None) -> web.Application:
    """The application. hosts: names that it may be asked under; None for any."""

    @web.middleware
    async def guard(request: web.Request, handler: Callable[[web.Request], Awaitable[web.Response]]):
        if hosts is not None and (request.url.host or "") not in hosts:
            return _error(403, f"this server answers for {hosts[0]} only")
        try:
            response = await handler(request)
        except (UserError, DecodeError) as error:
            return _error(400, str(error))
        response.headers.update(_HEADERS)
        return response

    server = _Server(index, about, ThreadPoolExecutor(1), ThreadPoolExecutor(4))
    app = web.Application(middlewares=[guard], client_max_size=_MAX_UPLOAD_BYTES)
    app.add_routes([
        web.get("/", server.page),
        web.get("/api/info", server.info),
        web.get("/api/search", server.search),
        web.post("/api/search", server.search),
        web.get("/api/heat", server.heat),
        web.post("/api/heat", server.heat),
        web.get("/image/{row}", server.image),
    ])  # fmt: skip
    return app


def _error(status: int, message: str) -> web.Response:
    text = json.dumps({"error": message}, ensure_ascii=False)
    return web.Response(status=status, text=text, content_type="application/json", headers=_HEADERS)


def serve(index: DemoIndex, *, about: dict[str, Any], host: str, port: int, say: Callable[[str], None]) -> None:
    """Serves until SIGINT or SIGTERM.

    Raises:
        UserError: the port is taken, or the host is not this machine.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot serve on {host}, port {port}: {error}; choose another --port (0 takes a free one)"
        ) from None
    hosts = _LOOPBACK if host in _LOOPBACK else None
    shown = f"[{host}]" if ":" in host else host
    say(f"http://{shown}:{listening.getsockname()[1]}/    (Ctrl-C stops it)")
    web.run_app(make_app(index, about=about, hosts=hosts), sock=listening, print=None, access_log=None)
