"""How fast a recipe learns from the same data in the same time: ours, also with softmax and with AdamW; open_clip's SigLIP.

    python benchmarks/learning.py --config configs/quickstart.py --seconds 310 --seeds 1 --side open_clip --lr 5e-4 1e-3 2e-3
    python benchmarks/learning.py --config configs/quickstart.py --seconds 310 --seeds 3 --side ours open_clip softmax adamw
    python benchmarks/learning.py --seconds 10 --marks 2 --seeds 1 --side ours       # a try

It needs what step_time.py needs for open_clip. Every run is a process of its own on all cores, one after the other, seed by seed.
A run compiles, measures its rate on the first batches, and starts anew with as many steps as fit into the seconds, so that each
schedule ends with the time. The clock stands still while it compiles and while a mark is evaluated.

The same for all: the recipe's loader (pairs, their order, augmented pixels and tokens are equal at equal seeds), its batch size,
the widths and depths of its towers, and large pages of memory; what differs in the two models stands in step_time.py. Ours and
"softmax" train as `siglip train` does, with the recipe's share of warm-up; the softmax has the rate and the start of t that were
chosen for the sigmoid. "adamw" is ours with that optimizer, --adamw-lr, and a tenth of it as decay. open_clip is CustomTextCLIP +
SigLipLoss under torch.compile, started as its `--siglip` does (scale 10, bias -10), with fused AdamW (betas .9 and .98, eps 1e-6,
weight decay on matrices, no clipping) and a cosine after a warm-up. --lr, --bias, --weight-decay and --warmup are its settings:
every combination of their values is a row, so that it can be tuned as ours was. Choosing among such rows favours it, as they are
scored on what is held out, which our recipe was not chosen on.

R@10 is the mean of both ways, by English names, among all images of each retrieval set of the recipe and among a fixed few. The
time to a target is read off the straight line between two marks. Ties count as misses.

The trap: beside other work neither side gets its time; believe rows whose "cores" are near the machine's and whose steps are
alike for all seeds.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import sides

from data_pipelines.loader import make_eval_batches, make_loader
from data_pipelines.sources.opening import open_source
from data_pipelines.text_ops import captions_of
from data_pipelines.tokenizers import SentencePieceTokenizer
from siglip.evaluation.retrieval import Retrieval
from siglip.training.config import load_config_file

SETTLE_STEPS, RATE_SHARE = 5, 0.1
EVAL_ROWS = 256
# Nothing reuses what an earlier run compiled; large pages as in `make quickstart`.
ENVIRONMENT = {
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
THEIR_SETTINGS = ("lr", "bias", "weight_decay", "warmup")
ROW = "{:28}{:>12}{:>15}{:>15}{:>15}{:>15}{:>8}{:>8}{:>7}{:>11}"


class Ours:
    """The two towers, the loss and the optimizer of the recipe."""

    def __init__(self, config):
        import jax

        self._config, self._before = config, None
        self.version = f"jax {jax.__version__}"

    def start(self, batch, total_steps):
        """Compiles the step of a run of so many steps, and draws new parameters."""
        import jax

        from siglip.training.loop import make_program

        optim, share = self._config.optim, total_steps / self._config.total_steps
        parts = {name: round(share * getattr(optim, name)) for name in ("warmup_steps", "cooldown_steps")}
        config = dataclasses.replace(self._config, total_steps=total_steps, optim=dataclasses.replace(optim, **parts))
        self._program = program = make_program(config)
        jax.set_mesh(program.mesh)
        self._state = program.init({})
        self._step = program.step.lower(self._state, self._put(batch)).compile()

    def _put(self, batch):
        from siglip.parallel import sharding

        return sharding.put_batch({name: batch[name] for name in ("image", "text")}, self._program.mesh)

    def step(self, batch):
        import jax

        self._state, metrics = self._step(self._state, self._put(batch))
        jax.block_until_ready(self._before)  # as the training loop: one step waits on the device
        self._before = metrics

    def wait(self):
        import jax

        jax.block_until_ready(self._state)

    def embed(self, name, rows):
        """Unit vectors of rows of "image" or "text". -> float32 [n, e]"""
        from siglip.evaluation.embed import embed_rows, embeddings

        embed = lambda batch: embeddings(self._config.model, self._state.eval_params, batch)  # noqa: E731
        return embed_rows(embed, {name: rows}, mesh=self._program.mesh, rows_per_pass=EVAL_ROWS)


class Theirs:
    """open_clip's model and loss at the sizes of the recipe."""

    def __init__(self, config, lr, bias, weight_decay, warmup):
        import torch

        if config.model.image.pool != "map" or config.model.text.pool == "map":
            sys.exit("open_clip has no match for these towers; use pool map for images, last or mean for texts")
        torch.manual_seed(config.seed)
        start = {"init_logit_scale": math.log(10), "init_logit_bias": bias}
        open_clip, self._model = sides.their_model(config.model, **start)
        self._initial = {name: value.clone() for name, value in self._model.state_dict().items()}
        model, loss = self._model, open_clip.loss.SigLipLoss()
        self._forward = torch.compile(lambda image, text: loss(*model(image, text)))
        self._lr, self._decay, self._warmup = lr, weight_decay, warmup
        self._low = torch.autocast("cpu", torch.bfloat16, enabled=config.model.image.dtype == "bfloat16")
        self.version = (
            f"torch {torch.__version__}, open_clip {open_clip.__version__}, {torch.get_num_threads()} threads"
        )

    def start(self, batch, total_steps):
        """Puts the first parameters back; the first call compiles."""
        import torch

        named = list(self._model.named_parameters())
        matrices = [p for _, p in named if p.ndim >= 2]
        groups = [
            {"params": matrices, "weight_decay": self._decay},
            {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, self._lr, (0.9, 0.98), 1e-6, fused=True)
        self._done, self._total = 0, total_steps
        self.step(batch)
        self._model.load_state_dict(self._initial)
        self._optimizer.state.clear()
        self._done = 0

    def step(self, batch):
        import torch

        warmup = self._warmup * self._total
        after = (self._done - warmup) / max(self._total - warmup, 1)
        factor = (self._done + 1) / warmup if self._done < warmup else 0.5 * (1 + math.cos(math.pi * min(after, 1)))
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * factor
        with self._low:
            loss = self._forward(_pixels(batch["image"]), torch.from_numpy(batch["text"]).long())
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            self._model.logit_scale.clamp_(0, math.log(100))
        self._done += 1

    def wait(self):
        """PyTorch on a CPU has done what it was asked."""

    def embed(self, name, rows):
        import torch

        encode = self._model.encode_image if name == "image" else self._model.encode_text
        self._model.eval()
        with torch.no_grad(), self._low:
            parts = [
                encode(_pixels(part) if name == "image" else torch.from_numpy(part).long(), normalize=True).float()
                for part in np.split(rows, range(EVAL_ROWS, len(rows), EVAL_ROWS))
            ]
        self._model.train()
        return torch.cat(parts).numpy()


def _pixels(images):
    import torch

    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def read_sets(config):
    """{name: (image uint8 [n, h, w, 3], text int32 [n, l])} of the recipe's retrieval sets, by the first caption field."""
    model, sets = config.model, {}
    tokenizer = SentencePieceTokenizer(config.data.tokenizer, **vars(model.text.tokens))
    size = {"image_size": model.image.image_size, "resample": model.image.pixels.resample}
    for task in config.eval.tasks:
        if isinstance(task, Retrieval):
            batches = list(make_eval_batches(open_source(task.data), batch_size=EVAL_ROWS, **size))
            fields = [fields for batch in batches for fields in batch["fields"]]
            texts = [captions_of(one, task.captions[0])[0] for one in fields]
            text = np.stack([tokenizer.encode(text, model.text.length) for text in texts])
            sets[task.dataset] = np.concatenate([batch["image"] for batch in batches]), text
    return sets


def recall(zimg, ztxt):
    """R@10 both ways, the mean; row n of one belongs to row n of the other. Equal scores, and NaN, are before one's own."""
    scores = zimg @ ztxt.T
    own = np.diag(scores)
    return float(np.mean([(~(scores < own[:, None])).sum(1) <= 10, (~(scores < own[None])).sum(0) <= 10]))


def evaluate(side, sets, few):
    """{"set/few": R@10 among `few` images, "set/all": among all}."""
    found = {}
    for name, (images, texts) in sets.items():
        zimg, ztxt = side.embed("image", images), side.embed("text", texts)
        some = np.linspace(0, len(images) - 1, min(few, len(images))).astype(int)
        found |= {f"{name}/{few}": recall(zimg[some], ztxt[some]), f"{name}/all": recall(zimg, ztxt)}
    return found


def work(args):
    """A worker: one run, as JSON on stdout."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print
    name, settings, seed = json.loads(args.worker)
    config = dataclasses.replace(load_config_file(args.config), seed=seed)
    if name == "softmax":
        config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, kind="softmax"))
    if name == "adamw":
        lr = args.adamw_lr
        config = dataclasses.replace(
            config, optim=dataclasses.replace(config.optim, name="adamw", lr=lr, weight_decay=0.1 * lr)
        )
    side = Theirs(config, **settings) if name == "open_clip" else Ours(config)
    print(json.dumps(learn(side, config, read_sets(config), args)), file=channel, flush=True)


def learn(side, config, sets, args):
    """Trains for so many seconds and evaluates at the marks."""
    image, text = config.model.image, config.model.text

    def batches():
        options = {"tokens": vars(text.tokens), "resample": image.pixels.resample, "seed": config.seed}
        size = {"image_size": image.image_size, "text_length": text.length}
        return make_loader(config.data, batch_size=config.batch_size, **size, **options)

    loader, began = batches(), time.perf_counter()
    side.start(next(loader), config.total_steps)
    compile_s = time.perf_counter() - began
    evaluate(side, sets, args.few)  # compiles too
    steps, began = -SETTLE_STEPS, 0.0
    while steps <= 0 or time.perf_counter() - began < RATE_SHARE * args.seconds:
        if steps == 0:
            side.wait()
            began = time.perf_counter()
        side.step(next(loader))
        steps += 1
    side.wait()
    total = max(1, round(args.seconds * steps / (time.perf_counter() - began)))
    loader.close()
    loader = batches()
    side.start(next(loader), total)
    loader.close()
    loader, marks, spent, cpu = batches(), [], 0.0, 0.0
    for step in range(1, total + 1):
        began, began_cpu = time.perf_counter(), time.process_time()
        side.step(next(loader))
        due = step == total or spent >= args.seconds * (len(marks) + 1) / args.marks
        if due:
            side.wait()
        spent, cpu = spent + time.perf_counter() - began, cpu + time.process_time() - began_cpu
        if due:
            marks.append({"seconds": spent, "step": step} | evaluate(side, sets, args.few))
    loader.close()
    found = {"version": side.version, "compile_s": compile_s, "steps": total, "seconds": spent, "cores": cpu / spent}
    return found | {"pairs_per_s": total * config.batch_size / spent, "marks": marks}


def seconds_to(marks, name, target):
    """When the recall is first there, on the line between two marks; None if it never is."""
    before = {"seconds": 0.0, name: 0.0}
    for mark in marks:
        if mark[name] >= target:
            share = (target - before[name]) / (mark[name] - before[name])
            return before["seconds"] + share * (mark["seconds"] - before["seconds"])
        before = mark
    return None


def value_at(marks, name, seconds):
    """The recall at a time, on the line between two marks."""
    return float(np.interp(seconds, [0, *(mark["seconds"] for mark in marks)], [0, *(mark[name] for mark in marks)]))


def mean_and_error(values, digits):
    """ "mean ± standard error" of what several seeds gave."""
    if None in values:
        return f"{len(values) - values.count(None)} of {len(values)}"
    error = f" ± {np.std(values, ddof=1) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{error}"


def show(rows, args):
    """The table: last results of each side, then its curve on the first set."""
    names = [name for name in rows[0]["marks"][0] if "/" in name]
    shown = [*names[:4], *[""] * (4 - len(names[:4]))]
    print("\nR@10 at the end, mean of both ways ± 1 standard error over seeds")
    head = f"s to {args.target:g}"
    print(
        ROW.format("", head, *(name.replace("unseen-", "") for name in shown), "steps", "pairs/s", "cores", "compile s")
    )
    labels = dict.fromkeys(row["label"] for row in rows)
    own = {label: [row for row in rows if row["label"] == label] for label in labels}
    for label, runs in own.items():
        times = mean_and_error([seconds_to(run["marks"], names[0], args.target) for run in runs], 0)
        last = [mean_and_error([run["marks"][-1][name] for run in runs], 3) if name else "" for name in shown]
        facts = [np.mean([run[name] for run in runs]) for name in ("steps", "pairs_per_s", "cores", "compile_s")]
        print(
            ROW.format(
                label, times, *last, *(f"{fact:.{digits}f}" for fact, digits in zip(facts, (0, 0, 1, 0), strict=True))
            )
        )
    print(f"\n{names[0]} by seconds\n{'':10}" + "".join(f"{label:>28}" for label in own))
    last = min(run["marks"][-1]["seconds"] for run in rows)
    for seconds in np.linspace(0, last, args.marks + 1)[1:]:
        cells = (
            mean_and_error([value_at(run["marks"], names[0], seconds) for run in runs], 3) for runs in own.values()
        )
        print(f"{seconds:8.0f}  " + "".join(f"{cell:>28}" for cell in cells))


def parse():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/quickstart.py", help="recipe file")
    parser.add_argument(
        "--side", nargs="+", choices=["ours", "open_clip", "softmax", "adamw"], default=["ours", "open_clip"]
    )
    parser.add_argument("--seconds", type=float, default=310, help="of training, without compilation and evaluation")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--marks", type=int, default=22, help="evaluations of a run")
    parser.add_argument("--few", type=int, default=225, help="images of the smaller gallery")
    parser.add_argument("--target", type=float, default=0.7, help="R@10 among the few that the time is taken to")
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-3], help="open_clip's; a row for each")
    parser.add_argument("--bias", nargs="+", type=float, default=[-10.0], help="open_clip's, at the start; the same")
    parser.add_argument("--weight-decay", nargs="+", type=float, default=[0.2], help="open_clip's; the same")
    parser.add_argument(
        "--warmup", nargs="+", type=float, default=[0.1], help="open_clip's, a share of the run; the same"
    )
    parser.add_argument("--adamw-lr", type=float, default=2e-3, help="of the side adamw")
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def told(args, name):
    """Whether a row's label names this setting: the rate always, others where rows differ in them."""
    return name == "lr" or len(getattr(args, name)) > 1


def main():
    """Prints a line per run, then the table."""
    args = parse()
    if args.worker:
        return work(args)
    rows, failed, load = [], 0, os.getloadavg()
    theirs = [
        dict(zip(THEIR_SETTINGS, values, strict=True))
        for values in itertools.product(*(getattr(args, name) for name in THEIR_SETTINGS))
    ]
    wanted = [(side, settings) for side in args.side for settings in (theirs if side == "open_clip" else [{}])]
    for seed in range(args.seeds):
        for side, settings in wanted[:: -1 if seed % 2 else 1]:
            label = ", ".join([side, *(f"{name} {value:g}" for name, value in settings.items() if told(args, name))])
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", json.dumps([side, settings, seed])]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=os.environ | ENVIRONMENT)
            if run.returncode:
                failed += 1
                print(f"{label}, seed {seed}: failed; the first lines of {__file__} say what to install", flush=True)
                continue
            rows.append({"label": label, "seed": seed} | settings | json.loads(run.stdout))
            last = ", ".join(f"{name} {value:.3f}" for name, value in rows[-1]["marks"][-1].items() if "/" in name)
            print(f"{label}, seed {seed}: {rows[-1]['steps']} steps in {rows[-1]['seconds']:.0f} s: {last}", flush=True)
            if args.out:
                about = {"cpus": os.cpu_count(), "load before": load}
                settings = {k: v for k, v in vars(args).items() if k not in ("out", "worker")}
                args.out.write_text(json.dumps(about | {"arguments": settings, "rows": rows}, indent=1) + "\n")
    if rows:
        show(rows, args)
        print({"cpus": os.cpu_count(), "load before": load} | {row["label"]: row["version"] for row in rows})
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
