"""Pairs per second and memory of every stage of a curation, and, if the truth is known, how much of each fault it found.

    python benchmarks/curate.py 'noisy-*.tar' --against 'eval-*.tar' --truth truth.jsonl --out curate.json
    python benchmarks/curate.py … --model runs/alignment --trained-on 'clean/*.tar' 'data_pipelines/sample/emoji-*.parquet'

A row of the truth: {"key", "faults": [...], "image_decodable": bool or null, "caption_matches_image": bool, "src_set", "src_key",
"dup_group", "detail": {"of", "heldout_key"}}.
`named`: the rule for this fault is among the pair's reasons. `dropped`: the pair is not kept.
Duplicates are found if the pair or its original is called the other's duplicate; precision is the share of all pairs called
duplicates whose named original is of the same group.
Alignment, with a model: the AUC of its score, the probability that a pair with its own readable caption scores above one with
another image's caption. `unseen`: only pairs whose source is not in the shards that the model was trained on.

The trap: memory is resident, so what processes share is counted in each of them; the pool's start and the import of its
libraries are part of the first stage.
"""

import argparse
import collections
import json
import os
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from data_pipelines.curate.config import DUPLICATES, REPAIRS, CurateConfig
from data_pipelines.curate.engine import LocalEngine
from data_pipelines.curate.run import curate
from data_pipelines.sources.opening import open_source
from siglip.cli.curating import ModelScorer

# Which rules are meant for a fault.
RULES_OF = {
    "truncated_jpeg": {"truncated", "corrupt_image"},
    "zero_byte_image": {"empty_image"},
    "not_an_image": {"not_an_image"},
    "decompression_bomb": {"bomb"},
    "missing_image": {"missing_image"},
    "missing_txt": {"missing_text"},
    "missing_json": {"missing_json"},
    "invalid_json": {"invalid_json"},
    "invalid_utf8": {"invalid_utf8"},
    "mojibake": {"mojibake"},
    "control_chars": {"control_chars"},
    "html_markup": {"markup", "html_entities"},
    "boilerplate_caption": {"boilerplate", "too_short"},
    "empty_caption": {"empty_text"},
    "very_long_caption": {"too_long"},
    "animated_gif": {"animated"},
    "image_1x1": {"too_small"},
    "extreme_aspect": {"extreme_aspect"},
}
UNREADABLE = {"invalid_utf8", "mojibake"}  # faults after which a caption no longer belongs to the image
RESAMPLINGS = 1000
SIMILARITIES = (0.8, 0.85, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995)
COPY_FAULTS = ("exact_duplicate", "near_duplicate_rejpeg", "near_duplicate_rescaled", "near_duplicate_cropped")


class Clock:
    """Seconds per stage, from the end of the previous stage to its own end."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, stage: str, done: int, of: int) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


class Memory(threading.Thread):
    """Sampled peak memory in MiB: of all processes of this process group together, and of the largest one."""

    def __init__(self):
        super().__init__(daemon=True)
        self.together, self.largest = 0.0, 0.0
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(0.05):
            held = list(self._held())
            self.together, self.largest = max(self.together, sum(held)), max(self.largest, *held)

    def stop(self) -> None:
        self._stopped.set()
        self.join()

    def _held(self) -> Iterator[float]:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.getpgid(int(folder.name)) == os.getpgrp():
                    yield int((folder / "statm").read_text().split()[1]) * resource.getpagesize() / 2**20
            except (OSError, IndexError):  # it ended meanwhile
                continue


def detection(rows: list[dict], truth: dict[str, dict], protected: set[str]) -> dict[str, dict]:
    """{fault: {pairs, named, dropped}} from the rows of a manifest. protected: keys of the evaluation sets."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for row in rows:
        known = truth.get(row["key"], {"faults": []})
        for fault in known["faults"]:
            meant = RULES_OF.get(fault, set())
            if fault == "eval_leak":
                given = known["detail"]["heldout_key"] in protected
                fault, meant = f"eval_leak{'' if given else ' (set not given)'}", {"eval_leak"}
            named = bool(meant.intersection(row["reasons"]))
            counts[fault].update({"pairs": 1, "named": int(named), "dropped": int(not row["keep"])})
    return {fault: dict(found) for fault, found in counts.items()}


def copies(rows: list[dict], truth: dict[str, dict]) -> dict[str, float]:
    """Recall for each kind of duplicate, and precision over all."""
    by_key = {row["key"]: row for row in rows}
    places = {f"{row['shard']}#{row['index']}": row["key"] for row in rows}
    group = {key: known.get("dup_group") for key, known in truth.items()}
    called = [(row["key"], places[row["duplicate_of"]]) for row in rows if row["duplicate_of"]]
    right = sum(group[key] is not None and group[key] == group[of] for key, of in called)
    found = {"called copies": len(called), "precision": right / max(1, len(called))}
    for fault in COPY_FAULTS:
        pairs = [(key, known["detail"]["of"]) for key, known in truth.items() if fault in known["faults"]]
        shown = [pair for pair in pairs if all(key in by_key and by_key[key]["pixel_hash"] for key in pair)]
        hits = sum(any(by_key[key]["duplicate_of"] for key in pair) for pair in shown)
        found[fault] = hits / max(1, len(shown))
    return found


def faultless(rows: list[dict], truth: dict[str, dict]) -> dict:
    """Pairs without a fault, how many were dropped, and how many of those are not duplicates."""
    sound = [row for row in rows if not truth.get(row["key"], {"faults": [""]})["faults"]]
    dropped = [row for row in sound if not row["keep"]]
    wrong = [row for row in dropped if row["reason"] not in DUPLICATES or not truth[row["key"]].get("dup_group")]
    return {
        "pairs": len(sound),
        "dropped": len(dropped),
        "wrongly": len(wrong),
        "wrong": [f"{row['key']} {row['reason']}: {row['caption']}" for row in wrong],
    }


def alignment(rows: list[dict], truth: dict[str, dict], trained_on: set[str]) -> dict[str, dict]:
    """{group of pairs: {matched, mismatched, auc, error, score_at_95, below_it}} of the scored pairs.

    trained_on: keys of the training pairs, as in `src_key`; without any there are no groups of unseen ones.
    """
    sides: dict[str, tuple[list, list]] = collections.defaultdict(lambda: ([], []))
    for row in rows:
        pair = truth.get(row["key"])
        if pair is None or row["score"] is None or np.isnan(row["score"]):
            continue
        is_mismatched = "mismatched_caption" in pair["faults"]
        is_own = pair["caption_matches_image"] and not UNREADABLE.intersection(pair["faults"])
        if is_mismatched or (is_own and pair["image_decodable"]):
            for name in _groups(pair, trained_on):
                sides[name][is_mismatched].append(row["score"])
    found = {}
    for name in sorted(sides, key=lambda name: (name.startswith("unseen"), -len(sides[name][0]))):
        matched, mismatched = map(np.array, sides[name])
        found[name] = {"matched": len(matched), "mismatched": len(mismatched)}
        if len(matched) and len(mismatched):
            found[name] |= _separation(matched, mismatched)
    return found


def _groups(pair: dict, trained_on: set[str]) -> list[str]:
    names = ["all", pair["src_set"]]
    if set(pair["faults"]) <= {"mismatched_caption"}:
        names.append("no other fault")
    is_unseen = trained_on and pair["src_key"] not in trained_on
    return names + [f"unseen: {name}" for name in names] if is_unseen else names


def _separation(matched: np.ndarray, mismatched: np.ndarray) -> dict[str, float]:
    """The area under the curve, ties half, with its bootstrap standard error over both sides; the score that 95 % of
    the matched reach, and the share of the mismatched below it.
    """
    rng = np.random.default_rng(0)
    resampled = [
        _area(rng.choice(matched, len(matched)), rng.choice(mismatched, len(mismatched))) for _ in range(RESAMPLINGS)
    ]
    least = float(np.quantile(matched, 0.05))
    return {
        "auc": _area(matched, mismatched),
        "error": float(np.std(resampled)),
        "score_at_95": least,
        "below_it": float((mismatched < least).mean()),
    }


def _area(matched: np.ndarray, mismatched: np.ndarray) -> float:
    below = np.sort(mismatched)
    wins = np.searchsorted(below, matched, "left") + np.searchsorted(below, matched, "right")
    return float(wins.mean() / (2 * len(below)))


def embedding_leaks(rows: list[dict], truth: dict[str, dict], protected: set[str]) -> dict[str, dict[str, int]]:
    """{similarity: {leaks, found, called}}: how many true leaks and how many pairs are above each similarity."""
    scored = [row for row in rows if row["leak_similarity"] is not None and not np.isnan(row["leak_similarity"])]
    similarity = np.array([row["leak_similarity"] for row in scored])
    leaks = np.array([_leaks_from(truth.get(row["key"]), protected) for row in scored], bool)
    found = {}
    for least in SIMILARITIES:
        above = similarity > least
        found[f"{least}"] = {
            "leaks": int(leaks.sum()),
            "found": int((above & leaks).sum()),
            "called": int(above.sum()),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+")
    parser.add_argument("--against", nargs="*", default=[])
    parser.add_argument("--truth", type=Path)
    parser.add_argument("--model", help="model that scores pairs: a run, FILE.npz or a Hugging Face folder")
    parser.add_argument("--trained-on", nargs="*", default=[], help="shards that the model was trained on")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    scorer = None if args.model is None else ModelScorer(args.model, None, 256)
    trained_on = {pair.key for shards in args.trained_on for pair in open_source(shards)}
    result, rows, protected = _measured(args, scorer)
    if args.truth is not None:
        truth = {row["key"]: row for row in map(json.loads, args.truth.read_text().splitlines())}
        result |= _compared(rows, truth, protected)
        if scorer is not None:
            result["alignment"] = alignment(rows, truth, trained_on)
            _print_alignment(result["alignment"])
        if scorer is not None and protected:
            result["embedding_leaks"] = embedding_leaks(rows, truth, protected)
            _print_leaks(result["embedding_leaks"])
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def _measured(args: argparse.Namespace, scorer: ModelScorer | None) -> tuple[dict, list[dict], set[str]]:
    """Curates. -> the costs, the rows of the manifest, the keys of the evaluation sets"""
    clock, memory, began = Clock(), Memory(), time.perf_counter()
    memory.start()
    with tempfile.TemporaryDirectory(prefix="curate-") as name, LocalEngine(args.workers) as engine:
        folder = Path(name)
        funnel = curate(
            args.shards,
            folder,
            config=CurateConfig(),
            engine=engine,
            against=args.against,
            scorer=scorer,
            progress=clock,
        )
        rows = pq.read_table(folder / "manifest.parquet").to_pylist()
        keys = [pq.read_table(path, columns=["key"])["key"].to_pylist() for path in folder.glob("against/*")]
    seconds = time.perf_counter() - began
    memory.stop()
    result = {"pairs": funnel["pairs"], "kept": funnel["kept"], "seconds": seconds, "workers": engine.workers}
    result |= {"stages_s": clock.seconds, "peak_process_mib": memory.largest, "peak_together_mib": memory.together}
    print(
        f"{funnel['pairs']} pairs, {engine.workers} workers: {seconds:.1f} s, {funnel['pairs'] / seconds:.0f} pairs/s"
    )
    for stage, taken in clock.seconds.items():
        print(f"  {stage:20}{taken:8.2f} s{funnel['pairs'] / max(taken, 1e-3):12.0f} pairs/s")
    print(f"memory: {memory.largest:.0f} MiB in the largest process, {memory.together:.0f} MiB in all")
    return result, rows, {key for some in keys for key in some}


def _compared(rows: list[dict], truth: dict[str, dict], protected: set[str]) -> dict:
    """Prints what was found of each fault."""
    result = {"faults": detection(rows, truth, protected), "undecodable": _undecodable(rows, truth)}
    result |= {"copies": copies(rows, truth), "faultless": faultless(rows, truth)}
    print(f"{'fault':32}{'pairs':>7}{'named':>9}{'dropped':>9}")
    for fault, found in sorted(result["faults"].items()):
        named = f"{found['named'] / found['pairs']:9.1%}" if found["named"] else f"{'-':>9}"
        print(f"{fault:32}{found['pairs']:7}{named}{found['dropped'] / found['pairs']:9.1%}")
    print("undecodable or bomb: {dropped} of {pairs} dropped".format(**result["undecodable"]))
    print("duplicates: " + ", ".join(f"{name} {value:.4g}" for name, value in result["copies"].items()))
    print("faultless: {pairs}, dropped {dropped}, of them not duplicates {wrongly}".format(**result["faultless"]))
    print("".join(f"  {line}\n" for line in result["faultless"]["wrong"]), end="")
    return result


def _print_alignment(found: dict[str, dict]) -> None:
    print(f"{'alignment':32}{'matched':>9}{'mismatched':>12}{'AUC':>8}{'':10}{'95 % reach':>12}{'below it':>10}")
    for name, group in found.items():
        line = f"{name:32}{group['matched']:9}{group['mismatched']:12}"
        if "auc" in group:
            line += "{auc:8.3f} +- {error:.3f}{score_at_95:14.3f}{below_it:10.1%}".format(**group)
        print(line)


def _print_leaks(found: dict[str, dict[str, int]]) -> None:
    print(f"{'leaks by embedding, above':32}{'found':>9}{'called':>9}")
    for least, counts in found.items():
        print(f"{least:32}{counts['found'] / max(1, counts['leaks']):9.1%}{counts['called']:9}")


def _leaks_from(known: dict | None, protected: set[str]) -> bool:
    return known is not None and "eval_leak" in known["faults"] and known["detail"]["heldout_key"] in protected


def _undecodable(rows: list[dict], truth: dict[str, dict]) -> dict[str, int]:
    broken = [row for row in rows if truth.get(row["key"], {"image_decodable": True})["image_decodable"] is not True]
    return {"pairs": len(broken), "dropped": sum(not set(REPAIRS).issuperset(row["reasons"]) for row in broken)}


if __name__ == "__main__":
    main()
