"""Damaged files for every reader: thousands of mutations, each of which must be read, or refused in one line.

    python -m tests.fuzz.readers --mutations 1500 --seed 0 [--only tar]          # of each kind; a few minutes in all

A mutation flips bits, cuts, repeats, moves, blanks or inserts bytes, or writes a number of the kind that breaks arithmetic. What
is read of the damaged file is one of

    same       what the sound file gives, or a part of it whose rest is counted as broken
    other      something else: fine where the format has no checksum of that part
    refused    an error for people: one line, as the command line prints it
    fault      any other exception, more than LIMIT_S seconds, or more than LIMIT_BYTES beside what the process had

Faults end the script with exit code 1; so does "other" for the kinds in CHECKED, which can tell. Each worker process counts its
own memory, so what one mutation takes is seen.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from data_pipelines import errors as data_errors
from data_pipelines import image_ops
from siglip import errors

LIMIT_S, LIMIT_BYTES = 10, 1 << 30
PAIRS = 12
NUMBERS = (
    b"\xff" * 4,
    b"\0" * 8,
    b"\x7f" + b"\xff" * 7,
    b"\x80" + b"\0" * 7,
    b"-1",
    b"1e999",
    b"9" * 400,
    b"NaN",
    b"\xed\xa0\xbd",
    b'"',
)
REFUSALS = (
    errors.UserError,
    errors.RunFailed,
    data_errors.UserError,
    data_errors.RunFailed,
    OSError,
    image_ops.DecodeError,
)


class Kind(NamedTuple):
    """A file and how it is read. make: folder -> the file to damage; read: file -> what is in it, as a list of hashables."""

    make: Callable[[pathlib.Path], pathlib.Path]
    read: Callable[[pathlib.Path], list]
    checked: bool = False


# Files of pairs


def _members() -> list[tuple[str, bytes]]:
    from tests.data_pipelines.shards import encode, quadrants

    image, members = encode(quadrants()), []
    for n in range(PAIRS):
        members += [
            (f"{n:04d}.png", image),
            (f"{n:04d}.txt", f"caption {n}".encode()),
            (f"{n:04d}.json", b'{"a": %d}' % n),
        ]
    return members


def make_pairs(name: str, folder: pathlib.Path) -> pathlib.Path:
    from tests.data_pipelines import shards, test_parquet, test_tf_examples

    path, members = folder / name, _members()
    if name.endswith(".tar"):
        return shards.write_tar(path, members)
    if name.endswith(".parquet"):
        rows = [
            {"image": {"bytes": members[3 * n][1], "path": None}, "txt": f"caption {n}", "n": n} for n in range(PAIRS)
        ]
        return test_parquet.write(path, rows, row_group_size=5)
    if name.endswith(".tfrecord"):
        return test_tf_examples.write_records(path, PAIRS)
    if name.endswith(".array_record"):
        return test_tf_examples.write_array(path, PAIRS)
    (folder / "1.png").write_bytes(members[0][1])
    rows = [{"image": "1.png", "txt": f"caption {n}, it is", "n": n} for n in range(PAIRS)]
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text("image,txt,n\n" + "".join(f'1.png,"{row["txt"]}",{row["n"]}\n' for row in rows))
    return path


def read_pairs(path: pathlib.Path) -> list:
    from data_pipelines.sources.opening import open_source

    source, found = open_source(path), []
    for n in range(len(source)):
        try:
            pair = source[n]
            pixels = image_ops.decode_image(pair.image or b"", max_pixels=1 << 24)
            found.append(
                (pair.key, hashlib.md5(pixels.tobytes()).hexdigest(), repr(sorted(pair.fields.items())), pair.problems)
            )
        except (OSError, image_ops.DecodeError):
            continue  # counted as broken where pairs are used
    return found


def make_index(folder: pathlib.Path) -> pathlib.Path:
    from data_pipelines.sources.opening import open_source

    open_source(make_pairs("a.tar", folder))
    (index,) = [*pathlib.Path(os.environ["XDG_CACHE_HOME"]).rglob("*.idx"), *folder.glob("*.idx")]
    return index


def read_index(path: pathlib.Path) -> list:
    return read_pairs(next(pathlib.Path(os.environ["FUZZ_FOLDER"]).glob("*.tar")))


# Single images, models and texts


def make_image(format: str, folder: pathlib.Path) -> pathlib.Path:
    from tests.data_pipelines.shards import encode

    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    path = folder / f"a.{format.lower()}"
    path.write_bytes(encode(pixels, format, **({"progressive": True} if format == "JPEG" else {})))
    return path


def read_image(path: pathlib.Path) -> list:
    image = image_ops.decode_image(path.read_bytes(), max_pixels=1 << 24)
    return [hashlib.md5(image.tobytes()).hexdigest()]


def _arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a/kernel": rng.normal(size=(5, 7)).astype(np.float32),
        "a/bias": np.arange(7, dtype=np.float32),
        "t": np.ones(1, np.float32),
    }


def make_arrays(name: str, folder: pathlib.Path) -> pathlib.Path:
    if name.endswith(".npz"):
        np.savez(folder / name, **_arrays())
    else:
        from safetensors.numpy import save_file

        save_file(_arrays(), folder / name)
    return folder / name


def read_arrays(path: pathlib.Path) -> list:
    from siglip.formats.containers import open_npz, open_safetensors

    with open_npz(path) if path.suffix == ".npz" else open_safetensors([path]) as arrays:
        return [(name, arrays[name].shape, arrays[name].read().tobytes()) for name in sorted(arrays)]


def make_tokenizer(folder: pathlib.Path) -> pathlib.Path:
    sample = pathlib.Path(__file__).parents[2] / "data_pipelines" / "sample"
    return pathlib.Path(shutil.copy(sample / "spiece.model", folder / "spiece.model"))


def read_tokenizer(path: pathlib.Path) -> list:
    from data_pipelines.tokenizers import SentencePieceTokenizer

    return SentencePieceTokenizer(path).encode("a red apple, Ａ café 🍎", 16).tolist()


def make_text(content: str, folder: pathlib.Path) -> pathlib.Path:
    (folder / "text.json").write_text(content)
    return folder / "text.json"


def read_templates(path: pathlib.Path) -> list:
    from siglip.evaluation import class_files

    return class_files.make_prompts(class_files.read_names(str(path)), ["a {}"])


def read_run_metrics(path: pathlib.Path) -> list:
    from siglip.workdir.metrics import METRICS_FILE, read_metrics

    shutil.copy(path, path.with_name(METRICS_FILE))
    return [sorted(line) for line in read_metrics(path.parent)]


METRICS = "".join(json.dumps({"step": n, "train/loss": 1 / n, "eval/retrieval/a/b": 0.5}) + "\n" for n in range(1, 9))

KINDS = {
    **{
        name.rpartition(".")[2]: Kind(functools.partial(make_pairs, name), read_pairs)
        for name in ("a.tar", "a.parquet", "a.tfrecord", "a.array_record", "a.csv", "a.jsonl")
    },
    "idx": Kind(make_index, read_index, checked=True),
    **{
        format: Kind(functools.partial(make_image, format), read_image)
        for format in ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP")
    },
    "npz": Kind(functools.partial(make_arrays, "a.npz"), read_arrays),
    "safetensors": Kind(functools.partial(make_arrays, "a.safetensors"), read_arrays),
    "spiece": Kind(make_tokenizer, read_tokenizer),
    "classes": Kind(functools.partial(make_text, '["cat", "polar bear", "dog"]'), read_templates),
    "metrics": Kind(functools.partial(make_text, METRICS), read_run_metrics),
}


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to three damages."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        size = max(1, len(data))
        # Headers are where the numbers are.
        at = rng.randrange(size) if rng.random() < 0.5 else rng.randrange(min(size, 600))
        length = rng.choice((1, 4, 16, rng.randrange(1, 600)))
        match rng.randrange(7):
            case 0:
                data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)] if data else []) + data[at + 1 :]
            case 1:
                data = data[:at]
            case 2:
                data = data[:at] + data[at : at + length] * rng.choice((2, 5)) + data[at + length :]
            case 3:
                data = data[:at] + data[at + length :]
            case 4:
                data = data[:at] + bytes(length) + data[at + length :]
            case 5:
                number = rng.choice(NUMBERS)
                data = data[:at] + number + data[at + (len(number) if rng.random() < 0.5 else 0) :]
            case 6:
                other = rng.randrange(size)
                data = data[:at] + data[other : other + length] + data[at + length :]
    return data


class TooLong(BaseException):
    """LIMIT_S seconds are over."""


def _ring(*_) -> None:
    raise TooLong


def judge(kind: Kind, path: pathlib.Path, sound: list) -> tuple[str, str]:
    """(what became of it, what to tell of a fault)"""
    signal.signal(signal.SIGALRM, _ring)
    signal.alarm(LIMIT_S)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            found = kind.read(path)
        outcome = "same" if all(one in sound for one in found) else "other"
        return ("fault", "other than what the checksum says") if kind.checked and outcome == "other" else (outcome, "")
    except REFUSALS as error:
        return ("refused", "") if "\n" not in str(error).strip() else ("fault", f"several lines: {error}")
    except TooLong:
        return "fault", f"more than {LIMIT_S} s"
    except Exception:
        return "fault", traceback.format_exc()
    finally:
        signal.alarm(0)


def campaign(task: tuple[str, int, int]) -> tuple[str, Counter, list[str]]:
    """Some mutations of one kind, in a process of its own."""
    name, seed, mutations = task
    kind, counts, faults = KINDS[name], Counter(), []
    with tempfile.TemporaryDirectory() as root:
        folder = pathlib.Path(root) / "data"
        folder.mkdir()
        os.environ |= {"XDG_CACHE_HOME": f"{root}/cache", "FUZZ_FOLDER": str(folder)}
        path = kind.make(folder)
        data, sound, rng = path.read_bytes(), kind.read(path), random.Random(f"{name} {seed}")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(mutations):
            damaged = mutate(data, rng)
            path.write_bytes(damaged)
            outcome, told = judge(kind, path, sound)
            now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if (now - peak) * 1024 > LIMIT_BYTES:
                outcome, told, peak = "fault", f"{(now - peak) >> 10} MiB", now
            counts[outcome] += 1
            if outcome == "fault":
                faults.append(f"{name}, seed {seed}, number {number}: {told}")
    return name, counts, faults


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=1500, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(KINDS), nargs="+", default=list(KINDS))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args(args)
    tasks, all_faults = [(name, options.seed, options.mutations) for name in options.only], []
    print(f"{'':14}{'same':>8}{'other':>8}{'refused':>9}{'fault':>7}")
    with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=1) as pool:
        for name, counts, faults in pool.imap(campaign, tasks, chunksize=1):
            print(f"{name:14}{counts['same']:8}{counts['other']:8}{counts['refused']:9}{counts['fault']:7}", flush=True)
            all_faults += faults
    print(*all_faults[:20], sep="\n")
    return int(bool(all_faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
