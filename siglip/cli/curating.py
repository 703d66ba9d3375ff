"""`siglip data curate` and `siglip data stats`: the rules of `data_pipelines.curate`, with a model if one is named."""

import dataclasses
import functools
import hashlib
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from data_pipelines.curate.config import PRESETS, REPAIRS, CurateConfig
from data_pipelines.curate.engine import LocalEngine
from data_pipelines.curate.materialize import check_place, materialize
from data_pipelines.curate.ray_engine import RayEngine
from data_pipelines.curate.run import FUNNEL_FILE, curate
from data_pipelines.curate.stats import describe
from data_pipelines.lock import hold
from data_pipelines.samples.patches import Patches
from data_pipelines.samples.pixels import Pixels
from data_pipelines.sources.files import expand_shards
from data_pipelines.sources.opening import check_columns
from siglip.cli.arguments import find_flag, parse
from siglip.errors import UserError
from siglip.trees import did_you_mean

_SECONDS_BETWEEN_LINES = 10.0
_SHOWN_COUNTS = 12


@dataclasses.dataclass(frozen=True)
class CurateArgs:
    """Decide which pairs of some shards to keep: writes DIR/manifest.parquet with a reason for each, funnel.json, report.html.

    Attributes:
        shards: tar, Parquet, ArrayRecord or TFRecord files, or lists of files; *, {00000..00009} and {a,b} expand.
        out: required; the folder to write. Run again with the same one to resume after a stop.
        rules: the thresholds.
        against: shards of evaluation sets; pairs that show one of their images are dropped.
        preset: thresholds to start from: datacomp-basic, clip-top-30, metaclip-balance or pali-top-10.
        model: scores pairs and finds leaks: a run's workdir, a checkpoint, a big_vision .npz, or a Hugging Face folder.
        tokenizer: SentencePiece model, if the model has none.
        concepts: file of concepts for --concept-cap, one per line or a JSON list.
        batch_size: pairs per forward pass of the model.
        workers: number of processes on this machine; 0 is one per core.
        engine: local computes on this machine, ray on a running Ray cluster; then --out is on storage that all machines share.
        address: the cluster's head: HOST:PORT, ray://HOST:PORT from outside the cluster, or auto (the default) on one of its
            machines.
        gpus_per_task: GPUs of the cluster for each task that uses the model; with 0, about one task runs per machine.
        materialize: also write the kept pairs as shards to DIR/shards.
    """

    shards: tyro.conf.Positional[tuple[str, ...]]
    out: str = ""
    rules: tyro.conf.OmitArgPrefixes[CurateConfig] = dataclasses.field(default_factory=CurateConfig)
    against: tuple[str, ...] = ()
    preset: str | None = None
    model: str | None = None
    tokenizer: str | None = None
    concepts: str | None = None
    batch_size: int = 256
    workers: int = 0
    engine: Literal["local", "ray"] = "local"
    address: str | None = None
    gpus_per_task: float = 0
    materialize: Literal["tar", "arrayrecord"] | None = None


@dataclasses.dataclass(frozen=True)
class StatsArgs:
    """What a curation found, or what shards hold before one.

    Attributes:
        paths: the folder of a curation, or shards.
        captions: fields to take the caption from, the first that a pair has.
        image_column: the column that holds the image, or its path; without it the usual names are looked for.
    """

    paths: tyro.conf.Positional[tuple[str, ...]]
    captions: tuple[str, ...] = ("txt",)
    image_column: str | None = None


def curate_command(args: list[str]) -> None:
    """Writes the manifest, the funnel and the report, and prints the funnel."""
    start = CurateArgs(shards=(), rules=_preset_rules(args))
    options = parse(CurateArgs, args, prog="siglip data curate", default=start)
    if not options.shards:
        raise UserError("no shards given; name them, for instance 'data/train-*.tar'")
    if not options.out:
        raise UserError("no folder given for the manifest; name one with --out DIR")
    if options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size} must be at least 1; 256 fits most accelerators")
    if options.tokenizer is not None and options.model is None:
        raise UserError(f"--tokenizer {options.tokenizer} belongs to a model; add --model SRC")
    out, paths = Path(options.out), []
    if "://" in options.out or (out.exists() and not out.is_dir()):
        raise UserError(f"--out {options.out} is not a folder of a file system; name a local or mounted one")
    check_columns(options.shards, image=options.rules.image_column, fields=_named(options.rules.captions))
    if options.materialize is not None:
        check_place(out / "shards", expand_shards([*options.shards, *options.against]))
    with Watch() as watch, _engine(options) as engine:
        scorer = None if options.model is None else ModelScorer(options.model, options.tokenizer, options.batch_size)
        funnel = curate(
            options.shards,
            out,
            config=options.rules,
            engine=engine,
            against=options.against,
            scorer=scorer,
            concepts=options.concepts,
            progress=watch,
        )
        if options.materialize is not None:
            settings = {"image": options.rules.image_column, "progress": watch}
            with hold(out, fix="give another --out"):
                paths = materialize(out / "manifest.parquet", out / "shards", options.materialize, **settings)
    print(format_funnel(funnel))
    if options.materialize is not None:
        print(f"{funnel['kept']} pairs in {len(paths)} shards -> {out / 'shards'}")
    print(f"manifest: {out / 'manifest.parquet'}\nreport: {out / 'report.html'}")


def stats_command(args: list[str]) -> None:
    """Prints the funnel of a curation, or what some shards hold."""
    options = parse(StatsArgs, args, prog="siglip data stats")
    if not options.paths:
        raise UserError("no path given; name the folder of a curation, or shards")
    if len(options.paths) == 1 and (Path(options.paths[0]) / FUNNEL_FILE).is_file():
        path = Path(options.paths[0]) / FUNNEL_FILE
        try:
            print(format_funnel(json.loads(path.read_text())))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not the funnel of a curation ({error!r}); curate again") from error
        return
    check_columns(options.paths, image=options.image_column, fields=_named(options.captions))
    settings = {"captions": options.captions, "image_column": options.image_column}
    with Watch() as watch, LocalEngine() as engine:
        stats = describe(options.paths, **settings, engine=engine, progress=watch)
    print(format_stats(stats))


def _named(captions: tuple[str, ...]) -> tuple[str, ...]:
    """The caption fields that were asked for; the usual one may be missing."""
    return () if captions == CurateConfig().captions else captions


def _engine(options: CurateArgs) -> LocalEngine | RayEngine:
    if options.engine == "ray":
        if options.workers:
            raise UserError(
                f"--workers {options.workers} is for this machine; a Ray cluster has its own number of them"
            )
        address = options.address or "auto"
        return RayEngine(Path(options.out), address=address, gpus_per_task=options.gpus_per_task)
    for flag, value in (("--address", options.address), ("--gpus-per-task", options.gpus_per_task)):
        if value:
            raise UserError(f"{flag} {value} is for a cluster; add --engine ray")
    return LocalEngine(options.workers)


class ModelScorer:
    """A model as the scorer that `curate` takes. Loaded here, so that only a run that asks for it pays for jax.

    Pickled it is what it was made from: a process that unpickles it loads the model, once, and keeps it.
    """

    def __init__(self, src: str, tokenizer: str | None, batch_size: int):
        from siglip.cli.evaluation import embedder_of

        self._made_from = (src, tokenizer, batch_size)
        embedder = embedder_of(src, tokenizer=tokenizer, batch_size=batch_size)
        self.embed_images, self.embed_texts = embedder.embed_images, embedder.embed_texts
        resample, max_patches = embedder.resample, embedder.max_patches
        if max_patches is None:
            self.pixels = Pixels(embedder.image_size, resample=resample, exact=True)
        else:
            self.pixels = Patches(embedder.patch_px, max_patches, resample=resample, exact=True)
        # What the probe, one square image, cannot tell. Nothing for "bilinear" and one size, as in older manifests.
        told = ("" if resample == "bilinear" else resample) + (f" {max_patches} patches" if max_patches else "")
        self.fingerprint = hashlib.sha256(self._probe(embedder.image_size).tobytes() + told.encode()).hexdigest()

    def __reduce__(self):
        return _unpickled_scorer, (*self._made_from, self.fingerprint)

    def _probe(self, size: tuple[int, int]) -> np.ndarray:
        """What the model makes of a fixed image and text: other weights, another answer."""
        ramp = np.arange(math.prod(size) * 3, dtype=np.uint32).astype(np.uint8).reshape(*size, 3)
        image = {name: array[None] for name, array in self.pixels.pack(self.pixels.draw(ramp)).items()}
        return np.concatenate([self.embed_images(image), self.embed_texts(["a probe"])])


@functools.lru_cache(1)
def _unpickled_scorer(src: str, tokenizer: str | None, batch_size: int, fingerprint: str) -> ModelScorer:
    scorer = ModelScorer(src, tokenizer, batch_size)
    scorer.fingerprint = fingerprint  # of the process that pickled it: another accelerator's last digits differ
    return scorer


class Watch:
    """Shows the progress of each stage: a bar on a terminal, elsewhere a line every few seconds."""

    def __init__(self):
        self._stage, self._bar, self._task = "", None, None

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, done: int, of: int) -> None:
        now = time.perf_counter()
        if stage != self._stage:
            self._stage, self._began, self._printed = stage, now, now
        if sys.stderr.isatty():
            self._draw(stage, done, of)
        elif now - self._printed > _SECONDS_BETWEEN_LINES:
            self._printed, left_s = now, (now - self._began) / done * (of - done)
            print(f"{stage} {done}/{of}  {left_s:.0f} s left", file=sys.stderr, flush=True)

    def _draw(self, stage: str, done: int, of: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self._bar is None:
            columns = (TextColumn("{task.description:18}"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
        if self._task is None:
            self._task = self._bar.add_task(stage, total=of)
        self._bar.update(self._task, description=stage, completed=done, total=of)
        if done == of:
            self._task = None


def format_funnel(funnel: Mapping) -> str:
    """The rules in the order in which they decide, with how many pairs each drops and leaves."""
    left = funnel["pairs"]
    lines = [f"{'':22}{'applies':>10}{'drops':>10}{'left':>12}", f"{'all':22}{'':10}{'':10}{left:12}"]
    for rule, applied in funnel["applied"].items():
        taken = funnel["taken"].get(rule, 0)
        left -= taken
        lines.append(f"{rule:22}{applied:10}{'repaired' if rule in REPAIRS else taken:>10}{left:12}")
    lines += [f"shard: {shard['problem']}" for shard in funnel["shards"] + funnel["against"] if shard["problem"]]
    return "\n".join([*lines, f"{funnel['kept']} of {funnel['pairs']} pairs kept"])


def format_stats(stats: Mapping) -> str:
    """Counts, the most frequent first."""
    lines = [f"{stats['pairs']} pairs in {stats['shards']} shards"]
    for name in ("formats", "languages", "sides_px", "words", "faults"):
        counts = sorted(stats[name].items(), key=lambda item: (-item[1], item[0]))[:_SHOWN_COUNTS]
        lines.append(f"{name:10} " + "  ".join(f"{value or 'none'} {count}" for value, count in counts))
    return "\n".join([*lines, *(f"shard: {problem}" for problem in stats["problems"])])


def _preset_rules(args: list[str]) -> CurateConfig:
    """The rules of --preset, found before the flags are parsed, since these change them."""
    name = find_flag(args, "--preset")
    if name is None:
        return CurateConfig()
    if name not in PRESETS:
        hint = did_you_mean(name, PRESETS) or f"; there are {', '.join(PRESETS)}"
        raise UserError(f"unknown preset {name!r}{hint}")
    return PRESETS[name]()
