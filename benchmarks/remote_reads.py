"""What a stream costs its server: requests per 1000 pairs, bytes fetched over bytes needed, pairs per second.

    python benchmarks/input_pipeline.py --only remote [--latency-ms 20] [--out FILE]

The server is a process on this machine; it answers byte ranges and delays every answer, as an object store does. Each loader
streams one epoch of eight stretches. Only the second half is counted, so that what was fetched ahead for it and what it fetches
ahead cancel out. "pair by pair" is the same order without memory for long reads (`block_bytes=0`). Bytes needed are those of
the shards.

The trap: there is no network in between, so pairs per second show the cost of latency but not of bandwidth.
"""

import contextlib
import http.client
import http.server
import json
import multiprocessing
import os
import pathlib
import tempfile
import time
from urllib.parse import urlsplit

SPIECE = pathlib.Path(__file__).parents[1] / "data_pipelines" / "sample" / "spiece.model"
GROUP_PAIRS = 100
BLOCK_PAIRS, OPEN_BLOCKS, BLOCK_BYTES = 256, 4, 1 << 28  # an eighth of the shards is open at a time
COPIES = 8  # of each shard, under names of their own: painting takes longer than sending
THREADS = 2
ROW = "{:46}{:>16}{:>16}{:>10}{:>10}"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves byte ranges of server.folder, each after server.latency_s; /count returns and resets [requests, bytes]."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if self.path == "/count":
            return self._answer(200, json.dumps(self.server.count).encode(), reset=True)
        time.sleep(self.server.latency_s)
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            return self._answer(404, b"")
        size = path.stat().st_size
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        first, last = int(first), min(int(last), size - 1)
        with path.open("rb") as file:
            body = os.pread(file.fileno(), last + 1 - first, first)
        self._answer(206, body, {"Content-Range": f"bytes {first}-{last}/{size}", "ETag": f'"{size}"'})

    def _answer(self, status: int, body: bytes, headers=(), *, reset: bool = False) -> None:
        requests, sent = self.server.count
        self.server.count = [0, 0] if reset else [requests + 1, sent + len(body)]
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


def serve(folder: str, latency_s: float, connection) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.handle_error = True, lambda *args: None
    server.folder, server.latency_s, server.count = pathlib.Path(folder), latency_s, [0, 0]
    connection.send(f"http://127.0.0.1:{server.server_port}")
    server.serve_forever()


@contextlib.contextmanager
def serving(folder: pathlib.Path, latency_s: float):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=serve, args=(str(folder), latency_s, theirs), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.kill()
        process.join()


def counted(url: str) -> tuple[int, int]:
    """The requests and bytes since the last call."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    connection.request("GET", "/count")
    requests, sent = json.loads(connection.getresponse().read())
    connection.close()
    return requests, sent


def write_parquet(tars: list[str]) -> None:
    """Writes the same pairs in row groups of GROUP_PAIRS, in Hugging Face's layout."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from data_pipelines.sources.webdataset import TarSource

    for tar in tars:
        rows = [
            {"image": {"bytes": pair.image, "path": None}, "txt": pair.fields["txt"], "key": pair.key}
            for pair in TarSource(tar)
        ]
        table = pa.Table.from_pylist(rows)
        path = pathlib.Path(tar)  # not the tar's name: that would make it a side file
        path = path.with_name(f"rows-{path.stem}.parquet")
        pq.write_table(table, path, row_group_size=GROUP_PAIRS, compression="none")


def run(url: str, pattern: str, args, *, blocks: bool, block_bytes: int = BLOCK_BYTES, workers: int = 0) -> dict:
    """Measures the second half of an epoch of a loader."""
    from data_pipelines.loader import DataConfig, make_loader
    from data_pipelines.order.mixture import SourceConfig
    from data_pipelines.order.permutation import BlockShuffle

    config = DataConfig(
        (SourceConfig(f"{url}/{pattern}"),),
        str(SPIECE),
        threads=THREADS,
        workers=workers,
        cache_bytes=0,
        shuffle_blocks=BlockShuffle(BLOCK_PAIRS, OPEN_BLOCKS) if blocks else None,
        block_bytes=block_bytes,
    )
    loader = make_loader(config, batch_size=args.batch_size, image_size=(64, 64), text_length=16, seed=0)
    half = args.remote_pairs // args.batch_size // 2
    for _ in range(half):
        next(loader)
    counted(url)
    begun = time.monotonic()
    pairs = sum(len(next(loader)["key"]) for _ in range(half))
    took_s = time.monotonic() - begun
    requests, sent = counted(url)
    loader.close()
    needed = int(pairs * loader.sources[0].pair_bytes)
    return {"requests": requests / pairs * 1000, "bytes": sent / needed, "per_s": pairs / took_s, "wall_s": took_s}


CASES = {
    "every pair anywhere": {"blocks": False},
    "blocks, pair by pair": {"blocks": True, "block_bytes": 0},
    "blocks, long reads": {"blocks": True},
    "blocks, long reads, 2 processes": {"blocks": True, "workers": 2},
}


def measure(args, make_shards) -> dict:
    """Runs all cases. -> {case: figures}; make_shards(folder, pairs) -> tars"""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = os.path.join(folder, "cache")
        served = pathlib.Path(folder) / "served"
        served.mkdir()
        tars = make_shards(served, args.remote_pairs // COPIES)
        write_parquet(tars)
        for number in range(len(tars), len(tars) * COPIES):
            for name in ("{:05d}.tar", "rows-{:05d}.parquet"):
                os.link(served / name.format(number % len(tars)), served / name.format(number))
        with serving(served, args.latency_ms / 1000) as url:
            for name, pattern in (("tar", "{00000..00031}.tar"), ("parquet", "rows-{00000..00031}.parquet")):
                for case, options in CASES.items():
                    results[f"{name}, {case}"] = run(url, pattern, args, **options)
                    print(f"{name}, {case}: {results[f'{name}, {case}']}", flush=True)
    return results


def print_table(results: dict) -> None:
    print("\n" + ROW.format("stream", "requests/1000", "fetched/needed", "pairs/s", "s"))
    for name, row in results.items():
        figures = f"{row['requests']:.1f}", f"{row['bytes']:.2f}", f"{row['per_s']:.0f}", f"{row['wall_s']:.0f}"
        print(ROW.format(name, *figures))
