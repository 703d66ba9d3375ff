"""Where the time of a training image goes, and our loader beside others: images per CPU second and per second of wall time.

    python benchmarks/input_pipeline.py --out benchmarks/results/input_pipeline.json     # ours and tf.data
    python -m pip install webdataset                                                      # with it and torch, that loader too

Pictures of 640 x 480 px are painted (noise with the spectrum of photographs), stored as JPEGs of about 60 KB with captions in tar
shards and read from the page cache; every loader makes uint8 batches at --image-size from the same shards. All peers decode
whole images and reduce them with antialias, bilinear: that is the work, and a loader that skips it is another loader.

decode ceiling   the fastest decoder alone, one thread, into memory that is there already (simplejpeg)
stages           what our loader does to a batch, each alone, in CPU microseconds per image
remote           streams from a server with latency, alone with --only remote: see remote_reads.py
memory           a large first batch, and the peak memory of all processes, alone with --only memory: see first_batch.py
loaders          --turns rounds through all of them, in a new order each time; medians. Every loader runs in a process of its own;
                 CPU seconds are those of all its processes, once it is warm; start s is from its first import to its first batch

A loader's share is its images per CPU second over the ceiling's, both from the same round, so that other load on the machine
cancels out. The trap: hyperthreads share a core, so two busy processes of one core take more CPU seconds for the same work.
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import statistics
import sys
import tarfile
import tempfile
import time

import first_batch
import numpy as np
import remote_reads
from process_memory import family_mib

HEIGHT, WIDTH, QUALITY = 480, 640, 87
TEXT_LENGTH = 64
SPIECE = pathlib.Path(__file__).parents[1] / "data_pipelines" / "sample" / "spiece.model"
CAPTION = "a photograph of a harbour at dusk, boats along the quay, number {}"
ROW = "{:34}{:>12}{:>12}{:>10}{:>10}{:>10}"


def paint(seed: int) -> np.ndarray:
    """Noise with a power law's spectrum, channels correlated as in photographs: uint8 [h, w, 3]."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None, :])
    frequency[0, 0] = 1
    layers = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((3, HEIGHT, WIDTH))) / frequency**1.6, s=(HEIGHT, WIDTH))
    layers /= layers.std(axis=(1, 2), keepdims=True)
    mixed = 0.85 * layers[:1] + 0.35 * layers
    return np.clip(128 + 60 * mixed, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def make_shards(folder: pathlib.Path, pairs: int) -> list[str]:
    """Four shards; each image is there four times under four names, painting takes longer than decoding."""
    from PIL import Image

    files = []
    for seed in range(pairs // 4):
        file = io.BytesIO()
        Image.fromarray(paint(seed)).save(file, "JPEG", quality=QUALITY)
        files.append(file.getvalue())
    shards = []
    for shard in range(4):
        path = folder / f"{shard:05d}.tar"
        with tarfile.open(path, "w") as archive:
            for number, data in enumerate(files):
                for name, content in (("jpg", data), ("txt", CAPTION.format(number).encode())):
                    info = tarfile.TarInfo(f"{shard:02d}{number:07d}.{name}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        shards.append(str(path))
    return shards


# Stages


def cpu_us(function, items, *, turns: int) -> float:
    """Median CPU time of this thread per item."""
    function(items[0])
    times = []
    for _ in range(turns):
        start = time.thread_time()
        for item in items:
            function(item)
        times.append((time.thread_time() - start) / len(items) * 1e6)
    return statistics.median(times)


def ceiling_us(files: list[bytes], turns: int) -> float:
    """CPU time of decoding one image and nothing else."""
    import simplejpeg

    out = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    return cpu_us(lambda file: simplejpeg.decode_jpeg(file, buffer=out), files, turns=turns)


def stages(shards: list[str], args) -> dict[str, float]:
    """CPU microseconds per image of each step of ours, and of other ways to do it."""
    import simplejpeg
    from PIL import Image

    from data_pipelines import image_ops, workers
    from data_pipelines.sources.webdataset import TarSource
    from data_pipelines.tokenizers import SentencePieceTokenizer

    workers.keep_freed_memory()
    source, tokenizer = TarSource(shards), SentencePieceTokenizer(str(SPIECE))
    records = list(range(0, len(source), max(1, len(source) // 64)))
    pairs = [source[record] for record in records]
    files, size = [pair.image for pair in pairs], (args.image_size,) * 2
    images = [image_ops.decode_image(file, max_pixels=1 << 24) for file in files]
    pixels = [np.asarray(image) for image in images]
    small = [image_ops.resize(array, size) for array in pixels]

    def pillow_decode(file):
        Image.open(io.BytesIO(file)).load()

    def pillow_resize(image):
        return np.asarray(image.resize(size, Image.Resampling.BILINEAR))

    def batch(_):
        images = np.empty((len(small), *small[0].shape), np.uint8)
        for row, image in enumerate(small):
            images[row] = image

    timed = {
        "read": (source.__getitem__, records),
        "decode (ours)": (lambda file: image_ops.decode_pixels(file, max_pixels=1 << 24), files),
        "decode (Pillow)": (pillow_decode, files),
        "decode (simplejpeg, new memory)": (simplejpeg.decode_jpeg, files),
        "resize (ours)": (lambda array: image_ops.resize(array, size, exact=False), pixels),
        "resize (Pillow)": (pillow_resize, images),
        "tokenize": (lambda pair: tokenizer.encode(pair.fields["txt"], TEXT_LENGTH), pairs),
        "batch": (batch, [None]),
    }
    results = {name: cpu_us(function, items, turns=args.turns) for name, (function, items) in timed.items()}
    results["batch"] /= len(small)
    off = [np.abs(mine.astype(int) - pillow_resize(image)) for mine, image in zip(small, images, strict=True)]
    results["pixels more than 1/255 off Pillow's, %"] = float(np.mean(np.stack(off) > 1) * 100)
    return results


# Loaders: each yields batches {"image": uint8 [b, h, w, 3], …} without end.


def ours(shards, args, *, workers, threads):
    from data_pipelines.loader import DataConfig, make_loader
    from data_pipelines.order.mixture import SourceConfig

    sources = (SourceConfig(shards[0].replace("00000", "{00000..00003}")),)
    # Without a cache: every image is read and decoded, as in the first epoch of a large set.
    config = DataConfig(sources, str(SPIECE), workers=workers, threads=threads, cache_bytes=0)
    size = (args.image_size,) * 2
    return make_loader(config, batch_size=args.batch_size, image_size=size, text_length=TEXT_LENGTH, seed=0)


def webdataset_loader(shards, args, *, workers):
    import torch
    import webdataset
    from PIL import Image

    from data_pipelines.tokenizers import SentencePieceTokenizer

    torch.set_num_threads(1)
    tokenizer, size = SentencePieceTokenizer(str(SPIECE)), (args.image_size,) * 2

    def prepare(sample):
        image, caption = sample
        image = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
        return image, tokenizer.encode(caption, TEXT_LENGTH)

    dataset = (
        webdataset.WebDataset(shards, shardshuffle=4, empty_check=False)
        .repeat()
        .shuffle(256)
        .decode("pilrgb")
        .to_tuple("jpg", "txt")
        .map(prepare)
    )
    fork = "fork" if workers else None  # DataLoader's own choice here, if this process had not been spawned itself.
    loader = torch.utils.data.DataLoader(dataset, args.batch_size, num_workers=workers, multiprocessing_context=fork)
    for images, texts in loader:
        yield {"image": images.numpy(), "text": texts.numpy()}


def tf_data(shards, args, *, threads):
    import tensorflow as tf

    from data_pipelines.sources.webdataset import TarSource
    from data_pipelines.tokenizers import SentencePieceTokenizer

    tf.config.threading.set_inter_op_parallelism_threads(threads)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    records = pathlib.Path(shards[0]).with_suffix(".tfrecord")
    if not records.exists():
        tokenizer = SentencePieceTokenizer(str(SPIECE))
        with tf.io.TFRecordWriter(str(records)) as writer:
            for pair in TarSource(shards):  # Captions as ids already: its tokenizer would be another one.
                text = tokenizer.encode(pair.fields["txt"], TEXT_LENGTH)
                feature = {
                    "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[pair.image])),
                    "text": tf.train.Feature(int64_list=tf.train.Int64List(value=text)),
                }
                writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())
    description = {
        "image": tf.io.FixedLenFeature([], tf.string),
        "text": tf.io.FixedLenFeature([TEXT_LENGTH], tf.int64),
    }

    def prepare(example):
        parsed = tf.io.parse_single_example(example, description)
        image = tf.io.decode_jpeg(parsed["image"], channels=3)
        image = tf.image.resize(image, (args.image_size,) * 2, antialias=True)
        return {"image": tf.cast(image + 0.5, tf.uint8), "text": parsed["text"]}

    dataset = tf.data.TFRecordDataset(str(records)).repeat().shuffle(256)
    dataset = dataset.map(prepare, num_parallel_calls=threads).batch(args.batch_size).prefetch(2)
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    yield from dataset.with_options(options).as_numpy_iterator()


LOADERS = {
    "ours, 1 thread": (ours, {"workers": 0, "threads": 1}),
    "ours, 2 threads": (ours, {"workers": 0, "threads": 2}),
    "ours, 1 process": (ours, {"workers": 1, "threads": 1}),
    "ours, 2 processes": (ours, {"workers": 2, "threads": 1}),
    "webdataset + DataLoader, 0 workers": (webdataset_loader, {"workers": 0}),
    "webdataset + DataLoader, 1 worker": (webdataset_loader, {"workers": 1}),
    "webdataset + DataLoader, 2 workers": (webdataset_loader, {"workers": 2}),
    "tf.data, 1 thread": (tf_data, {"threads": 1}),
    "tf.data, 2 threads": (tf_data, {"threads": 2}),
}
NEEDS = {ours: (), webdataset_loader: ("torch", "webdataset"), tf_data: ("tensorflow",)}


def missing(name: str) -> list[str]:
    return [module for module in NEEDS[LOADERS[name][0]] if importlib.util.find_spec(module) is None]


def family_cpu_s() -> float:
    """CPU seconds of this process and of its children that are alive."""
    import psutil

    process = psutil.Process()
    return sum(sum(member.cpu_times()[:2]) for member in (process, *process.children(recursive=True)))


def run_loader(name: str, shards: list[str], args, connection) -> None:
    """In a process of its own: throughput from the end of warm-up, start-up until the first batch."""
    make, options = LOADERS[name]
    files = [pair.image for pair in itertools.islice(_pairs(shards), 32)]
    batches = args.pairs_timed // args.batch_size
    begun = time.monotonic()
    loader = make(shards, args, **options)
    with contextlib.closing(loader):
        iterator = iter(loader)
        next(iterator)
        started_s = time.monotonic() - begun
        for _ in range(args.warm_up):
            next(iterator)
        wall, cpu = time.monotonic(), family_cpu_s()
        for _ in range(batches):
            batch = next(iterator)
        wall, cpu = time.monotonic() - wall, family_cpu_s() - cpu
        mib = family_mib()
    assert batch["image"].shape == (args.batch_size, args.image_size, args.image_size, 3)
    assert batch["image"].dtype == np.uint8
    images = batches * args.batch_size
    ceiling = 1e6 / ceiling_us(files, 5)
    connection.send(
        {"cpu": images / cpu, "wall": images / wall, "share": images / cpu / ceiling, "start_s": started_s, "mib": mib}
    )


def _pairs(shards):
    from data_pipelines.sources.webdataset import TarSource

    return iter(TarSource(shards))


def run_in_process(name: str, shards: list[str], args) -> dict:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=run_loader, args=(name, shards, args, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise RuntimeError(f"{name} failed, see above") from None
    finally:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=512, help="in the shards")
    parser.add_argument("--pairs-timed", type=int, default=1536, help="per loader and turn")
    parser.add_argument("--warm-up", type=int, default=4, help="batches before the clock starts")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", help="loaders whose name contains this; or remote; or memory")
    parser.add_argument("--latency-ms", type=float, default=20, help="of each answer of the server, for --only remote")
    parser.add_argument("--remote-pairs", type=int, default=8192, help="in the shards, for --only remote")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    if args.only == "remote":
        results = remote_reads.measure(args, make_shards)
        remote_reads.print_table(results)
        return write(args.out, results)
    names = [name for name in LOADERS if not args.only or args.only in name]
    for name in list(names):
        if missing(name):
            print(f"left out: {name}, {' and '.join(missing(name))} not installed", file=sys.stderr)
            names.remove(name)
    with tempfile.TemporaryDirectory() as folder:
        shards = make_shards(pathlib.Path(folder), args.pairs)
        if args.only == "memory":
            results = first_batch.measure(args, shards, str(SPIECE))
            first_batch.print_table(results)
            return write(args.out, results)
        results = measure(names, shards, args)
    print_table(results)
    write(args.out, results)


def write(out: pathlib.Path | None, results: dict) -> None:
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")


def measure(names: list[str], shards: list[str], args) -> dict:
    files = [pair.image for pair in itertools.islice(_pairs(shards), 64)]
    rows = {name: [] for name in names}
    for turn in range(args.turns):
        for name in random.Random(turn).sample(names, len(names)):
            rows[name].append(run_in_process(name, shards, args))
            print(f"turn {turn + 1}: {name}: {rows[name][-1]['cpu']:.0f} images/CPU s", file=sys.stderr)
    loaders = {
        name: {key: statistics.median(row[key] for row in turns) for key in turns[0]} | {"turns": turns}
        for name, turns in rows.items()
    }
    return {
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg()[0], "python": sys.version.split()[0]},
        "image": {"px": [HEIGHT, WIDTH], "bytes": int(np.mean([len(file) for file in files])), "to": args.image_size},
        "ceiling_images_per_cpu_s": 1e6 / ceiling_us(files, 2 * args.turns),
        "stages_cpu_us": stages(shards, args),
        "loaders": loaders,
    }


def print_table(results: dict) -> None:
    ceiling = results["ceiling_images_per_cpu_s"]
    print(f"decode ceiling {ceiling:.0f} images/CPU s; {results['image']}, {results['machine']}\n")
    for name, value in results["stages_cpu_us"].items():
        print(f"{name:40}{value:10.2f}")
    print("\n" + ROW.format("loader", "per CPU s", "of ceiling", "per s", "start s", "MiB"))
    for name, row in results["loaders"].items():
        figures = f"{row['cpu']:.0f}", f"{row['share']:.0%}", f"{row['wall']:.0f}", f"{row['start_s']:.1f}"
        print(ROW.format(name, *figures, f"{row['mib']:.0f}"))


if __name__ == "__main__":
    main()
