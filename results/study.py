"""make study: does listening to the reward help? The methods side by side, and under noise.

    python results/study.py --task sentiment --seeds 0 1 2     # what is missing of it, then the report
    python results/study.py --task sentiment --report          # the report of what is there

Every run is generate.py, score.py, train.py and eval.py, called with the flags that it prints to its
log. results/study/TASK.jsonl gets a line a run (settings, versions, the measures of every group of
test prompts) and is what the study continues from: a run that has a line is not made again, so to
make all of them anew, move the file away. Answers and models stay in runs/study/. TASK.md, TASK.png
and the README's table are made of the lines alone.

Kinds of pairs. fresh: the reviser does not see the draft, and nearly every revision wins.
conversation: the papers' form, in which a small teacher copies its draft and many revisions fail; of
the first LIMIT instructions only, since it takes three times as long.

All methods have the same pairs, STEPS steps of PAIRS_A_STEP pairs, and the flags of RECIPE, which the
pilots of results/pilots.md are the reason for. Learning rate and beta are chosen for each method by one
rule: of the settings in TRIALS, those whose student, trained on the conversation pairs of seed 0, gives
the largest share of positive answers to the training prompts on films that no such pair is of; of
equals the first. So the test prompts have no part in the choice. Half of that learning rate is taken by
what goes on from dSC's student.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from afinn import Afinn
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from eval import by_group, interval  # noqa: E402
from generate import lines_of, load_model, pick_device, provenance  # noqa: E402
from kernels.packed import check_model  # noqa: E402
from prompts import load_task, read_prompts, read_rows  # noqa: E402
from score import contrast_reward, repetition, text_of  # noqa: E402

STEPS, PAIRS_A_STEP = 24, 8
METHODS = {  # flags of train.py
    "sft": ["--loss", "sft"],
    "dsc": ["--loss", "sft", "--accept"],
    "dpo": ["--loss", "dpo"],
    "dpo-accept": ["--loss", "dpo", "--accept"],
    "cdpo": ["--loss", "cdpo"],
    "robust": ["--loss", "robust"],
    "rdpo": ["--loss", "rdpo"],
    "rdpo-margin": ["--loss", "rdpo-margin"],
    "rdpo-weight": ["--loss", "rdpo-weight"],
}
PREFERENCE = [method for method in METHODS if method not in ("sft", "dsc")]
RECIPE = ["--sft-weight", 1]  # of preference methods
TRIALS = ((1e-5, 0.1), (2e-5, 0.1), (1e-5, 0.3))  # learning rate and beta of preference methods
SFT_TRIALS = ((1e-5, 0), (2e-5, 0), (4e-5, 0))
MAX_REPEATS = 0.05  # of a revision, see train.py
UNTRAINED = ("base", "self-refine")
LIMIT = {"conversation": 384}  # instructions: there each call reads the calls before it
FLIPS, SWAPS = (40, 20, 10, 30), (50, 25, 10, 40)  # % of the pairs, the most telling ones first
DIAL = ("dpo", "rdpo", "dpo-accept", "cdpo", "robust")

# the principle of prompts/sentiment.toml in words that no training saw
OTHER_WORDS = {
    "principle": [
        {
            "role": "system",
            "content": "You recommend films warmly and find something good in each.",
        },
        {"role": "user", "content": "{request}"},
    ],
    "opposite": [
        {"role": "system", "content": "You advise against films coldly and find fault with each."},
        {"role": "user", "content": "{request}"},
    ],
}


class Run(NamedTuple):
    """One trained and evaluated student, or an untrained answerer. With lr a trial of settings."""

    kind: str  # of pairs
    method: str
    seed: int
    start: str = "base"  # or dsc, from whose student training goes on
    flips: int = 0  # % of the pairs with chosen and rejected exchanged, the scores with their texts
    swaps: int = 0  # % of the pairs with their two scores exchanged
    lr: float = 0.0
    beta: float = 0.0

    @property
    def name(self):
        parts = [self.method, *["from-dsc"] * (self.start == "dsc")]
        parts += [f"flips{self.flips}"] * (self.flips > 0)
        parts += [f"swaps{self.swaps}"] * (self.swaps > 0)
        parts += [f"lr{self.lr:g}"] * (self.lr > 0) + [f"beta{self.beta:g}"] * (self.beta > 0)
        return "-".join(parts)

    @property
    def key(self):
        return f"{self.kind}/{self.seed}/{self.name}"


def trials_of(method):
    """The runs by which learning rate and beta of a method are chosen."""
    trials = TRIALS if method in PREFERENCE else SFT_TRIALS
    return [Run("conversation", method, 0, lr=lr, beta=beta) for lr, beta in trials]


def plan_of(task, seeds):
    """All runs in the order in which they are made: what tells most comes first."""
    if task != "sentiment":  # the recipe alone, where the teacher is too weak for a study
        few = ["sft", "dsc", "dpo", "rdpo"]
        return [Run("fresh", m, s) for s in seeds for m in (*UNTRAINED, *few)] + [
            Run("fresh", m, s, "dsc") for s in seeds for m in ("dpo", "rdpo")
        ]
    short = ("dpo", "rdpo", "dsc")
    runs = [trial for method in short for trial in trials_of(method)]
    for seed in seeds:
        runs += [Run("conversation", m, seed) for m in (*UNTRAINED, *short)]
        if seed == seeds[0]:
            runs += [Run("fresh", m, seed, flips=FLIPS[0]) for m in short[:2]]
            runs += [Run("fresh", m, seed) for m in short]
            runs += [Run("fresh", "rdpo", seed, swaps=swaps) for swaps in SWAPS[:2]]
            runs += [Run("fresh", m, seed, flips=FLIPS[1]) for m in short[:2]]
    for seed, method in itertools.product(seeds, ("rdpo-weight", "rdpo-margin", *METHODS)):
        runs += [*trials_of(method), Run("conversation", method, seed)]
    for seed in seeds:
        for flips, swaps in zip(FLIPS, SWAPS, strict=True):
            runs += [Run("fresh", m, seed, flips=flips) for m in DIAL]
            runs += [Run("fresh", "rdpo", seed, swaps=swaps)]
        runs += [Run("fresh", m, seed) for m in (*UNTRAINED, *METHODS)]
        for kind in ("conversation", "fresh"):
            runs += [Run(kind, m, seed, "dsc") for m in ("dpo", "rdpo", "dsc", *PREFERENCE)]
        for swaps, method in itertools.product(SWAPS, ("rdpo-margin", "rdpo-weight")):
            runs += [Run("fresh", method, seed, swaps=swaps)]
    return list(dict.fromkeys(runs))


# ---- one run: the four stages --------------------------------------------------------------------


class Study:
    """The study of one task: its lines, and what is needed to make the ones that are missing."""

    def __init__(self, args, task=None):
        self.task, self.threads = task or args.task, max(1, (os.cpu_count() or 1) // args.jobs)
        self.path = ROOT / f"results/study/{self.task}.jsonl"
        self.path.parent.mkdir(exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.lines = {line["key"]: line for line in map(json.loads, lines)}
        self.tuned = self if self.task == "sentiment" else Study(args, "sentiment")
        self.guard, self.guards = threading.Lock(), {}

    def folder(self, run):
        return Path(f"runs/study/{self.task}/{run.kind}-{run.seed}")

    def call(self, folder, script, *flags, may=(0,)):
        """Runs a stage; its output goes to the folder's log."""
        command = [sys.executable, script, "--task", self.task, *map(str, flags)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        with open(folder / "log.txt", "a") as log:
            print("\n$", *command[1:], file=log, flush=True)
            code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        if code.returncode not in may:
            text = (folder / "log.txt").read_text()[-600:]
            raise SystemExit(
                f"{script} ended with status {code.returncode}, {folder}/log.txt:\n{text}"
            )

    def lock(self, name):
        with self.guard:
            return self.guards.setdefault(str(name), threading.Lock())

    def once(self, path, make):
        """Makes a file or folder where it is not there yet; two workers do not make the same."""
        with self.lock(path):
            if not path.exists():
                make()
        return path

    def ensure(self, run):
        """The line of a run, which is made if there is none yet."""
        with self.lock(run.key):
            if run.key not in self.lines:
                self.make(run)
        return self.lines[run.key]

    def settings(self, method):
        """(learning rate, beta) of a method, by the rule of this file's beginning."""
        trials = trials_of(method)
        best = max(trials, key=lambda trial: mean(self.tuned.ensure(trial), "metric"))
        for trial in trials:
            if trial != best:
                shutil.rmtree(self.tuned.folder(trial) / trial.name, ignore_errors=True)
        return best.lr, best.beta

    def scored(self, run):
        """Pairs of a kind and seed: whole ones to train on, scored, and those of the test prompts."""
        folder = self.folder(run)

        def make():
            folder.mkdir(parents=True, exist_ok=True)
            form = ["--form", run.kind, "--seed", run.seed, "--batch-size", 128]
            form += ["--limit", LIMIT[run.kind]] if run.kind in LIMIT else []
            self.call(folder, "generate.py", *form, "--out", folder / "pairs.jsonl", may=(0, 1))
            rows = read_rows(folder / "pairs.jsonl", "id")
            train = [row for row in rows if row["split"] == "train" and is_whole(row)]
            write(folder / "train.jsonl", train)
            files = ["--in", folder / "train.jsonl", "--out", folder / "scoring.jsonl"]
            self.call(folder, "score.py", *files, "--batch-size", 64, may=(0, 1))
            made = {row["id"]: row for row in rows}  # revisions, for self-refine
            test = read_prompts(ROOT / f"prompts/{self.task}.jsonl", self.task)
            test = [made.get(row["id"], row) for row in test if row["split"] == "test"]
            write(folder / "scored.part", read_rows(folder / "scoring.jsonl", "id") + test)
            os.replace(folder / "scored.part", folder / "scored.jsonl")

        return self.once(folder / "scored.jsonl", make)

    def rows(self, run):
        """(rows to train on, rows to test on), noise included."""
        rows = read_rows(self.scored(run), "id")
        train, test = ([r for r in rows if r["split"] == split] for split in ("train", "test"))
        if run.lr:  # a trial is tested on films of the training split that its pairs are not of
            prompts = read_prompts(ROOT / f"prompts/{self.task}.jsonl", self.task)
            seen = {row["group"] for row in prompts[: LIMIT[run.kind]]}
            test = [r for r in prompts if r["split"] == "train" and r["group"] not in seen]
            test = [row | {"split": "test"} for row in test]
        order = random.Random(f"noise {run.seed}").sample(range(len(train)), len(train))
        for i in order[: round(len(train) * run.flips / 100)]:
            exchange(train[i], "chosen", "rejected")
            exchange(train[i], "score_chosen", "score_rejected")
        for i in order[: round(len(train) * run.swaps / 100)]:
            exchange(train[i], "score_chosen", "score_rejected")
        return train, test

    def make(self, run):
        """Trains and evaluates, and adds the line."""
        began, folder, facts = time.time(), self.folder(run), {}
        folder.mkdir(parents=True, exist_ok=True)
        train, test = self.rows(run)
        student = Path("smollm2" if run.method == "base" else "self-refine")
        if run.method not in UNTRAINED:
            student, facts = self.train(run, train)
        answers = self.evaluate(run, test, student)
        made = provenance()
        made = {k: made[k] for k in ("commit", "date", "hardware", "torch", "transformers")}
        line = {"key": run.key, **run._asdict(), **facts, "made": made}
        line |= {"seconds": round(time.time() - began), "threads": self.threads}
        line |= self.measures(run, answers, {row["id"]: row for row in test})
        with self.guard:
            self.lines[run.key] = line
            with open(self.path, "ab") as file:
                file.write(lines_of([line]))
        print(f"{time.strftime('%H:%M:%S')} {run.key}: {line['seconds']} s, "
              f"metric {mean(line, 'metric'):.3f}, words {mean(line, 'words'):.0f}", flush=True)  # fmt: skip
        kept = run.lr or (run.method == "dsc" and run.start == "base")  # others go on from these
        if not (kept or run.method in UNTRAINED):
            (folder / "reference").mkdir(exist_ok=True)
            for path in student.glob("reference-*"):  # train.py finds it there, and makes it once
                os.replace(path, folder / "reference" / path.name)
            shutil.rmtree(student, ignore_errors=True)  # half a gigabyte; the answers stay

    def train(self, run, rows):
        """Calls train.py: (the student's folder, what is to be known of it)."""
        lr, beta = (run.lr, run.beta) if run.lr else self.settings(run.method)
        # named by its settings, so that the student of the best trial is not trained again
        folder, start = self.folder(run), "smollm2"
        student = folder / run._replace(lr=lr, beta=beta).name
        if run.start == "dsc":
            first, lr = Run(run.kind, "dsc", run.seed), lr / 2
            start, _ = self.train(first, self.rows(first)[0])
        gaps = np.array([row["score_chosen"] - row["score_rejected"] for row in rows])
        rate = float(np.clip(np.mean(gaps < 0), 0.01, 0.45))
        source = student.with_name(f"{student.name}.jsonl")
        write(source, rows)
        flags = [*METHODS[run.method], "--in", source, "--out", student, "--model", start]
        flags += ["--lr", lr, *(["--beta", beta, *RECIPE] if run.method in PREFERENCE else [])]
        flags += ["--seed", run.seed, "--batch-size", PAIRS_A_STEP, "--max-steps", STEPS]
        flags += "--epochs 1000 --save-every 1000 --pack-tokens 2048".split()
        flags += ["--epsilon", round(rate, 3)] if run.method in ("cdpo", "robust") else []
        made = student / "model.safetensors"
        self.once(made, lambda: self.call(folder, "train.py", *flags))
        record = json.loads((student / "run.json").read_text())
        facts = {"steps": record["steps"], "pairs": record["pairs"]}
        flags = " ".join(map(str, ["python train.py --task", self.task, *flags]))
        return student, facts | {"won": float(np.mean(gaps > 0)), "epsilon": rate, "command": flags}

    def evaluate(self, run, test, student):
        """Calls eval.py; its rows of this run's answers. The base model's answers are made once."""
        folder, asked = self.folder(run), "trial" if run.lr else "test"
        base = Path(f"runs/study/{self.task}/base-{asked}-{run.seed}")
        source = self.once(
            folder / f"{asked}.jsonl", lambda: write(folder / f"{asked}.jsonl", test)
        )
        flags = ["--in", source, "--seed", run.seed, "--batch-size", 160]

        def make():
            part = base.with_suffix(".part")
            part.mkdir(parents=True, exist_ok=True)
            self.call(folder, "eval.py", *flags, "--models", "smollm2", "--out", part, may=(0, 1))
            os.replace(part, base)

        self.once(base, make)
        if run.method == "base":
            return read_rows(base / "eval.jsonl", "id")
        out = folder / f"eval-{run.name}"
        self.once(out, lambda: shutil.copytree(base, out))
        models = ["--models", "smollm2", student]
        self.call(folder, "eval.py", *flags, *models, "--out", out, may=(0, 1))
        rows = read_rows(out / "eval.jsonl", "id")
        return [row for row in rows if row["model"] == student.name]

    def measures(self, run, answers, rows):
        """The measures of each group of test prompts, and three samples."""
        kind, answers = load_task(self.task)["metric"]["kind"], [dict(row) for row in answers]
        vader, afinn = SentimentIntensityAnalyzer(), Afinn()
        for row in answers:
            if self.task == "sentiment":
                row["vader"] = vader.polarity_scores(row["answer"])["compound"]
                row["afinn"] = float(afinn.score(row["answer"]) > 0)
        if self.task == "sentiment" and not (run.flips or run.swaps or run.lr):
            spoken = [row for row in answers if row["answer"]]
            given = [rows[row["prompt_id"]] for row in spoken]
            for row, score in zip(spoken, other_words(given, spoken), strict=True):
                row["other"] = score.value
        names = "score words repeats base_logp cut vader afinn other".split()
        values = {name: by_group([{name: None} | row for row in answers], name) for name in names}
        asked = [row for row in answers if not row["control"]]  # not the harmless look-alikes
        values["metric"] = by_group(asked, "metric", kind)
        values["reward"] = values.pop("score")
        groups = sorted({row["group"] for row in rows.values()})
        table = {
            n: [round(v[g], 3) if g in v else None for g in groups] for n, v in values.items() if v
        }
        samples = {row["prompt_id"]: row["answer"] for row in answers[:3]}
        return {"groups": groups, "values": table, "samples": samples}


def is_whole(row):
    """Whether neither answer of a pair was cut off, and the revision does not repeat itself."""
    finish = row["teacher"]["finish"]
    if row.get("error") or "length" in (finish["answer"], finish["revision"]):
        return False
    return repetition(text_of(row["chosen"])) <= MAX_REPEATS


def exchange(row, one, other):
    row[one], row[other] = row[other], row[one]


def write(path, rows):
    path.write_bytes(lines_of(rows))


def mean(line, name):
    return float(np.mean([value for value in line["values"][name] if value is not None]))


def other_words(rows, answers, loaded=[], guard=threading.Lock()):  # noqa: B006, B008 (once)
    """Scores of answers by the principle in other words."""
    with guard:
        if not loaded:
            model, tokenizer = load_model("smollm2", *pick_device())
            loaded.append((model, tokenizer, check_model(model)))
        texts = [row["answer"] for row in answers]
        return contrast_reward(rows, texts, *loaded[0], OTHER_WORDS, 1024)


# ---- the report ----------------------------------------------------------------------------------

RIVALS = ("dpo", "dsc")
SHOWN = {  # key of a row: heading, format
    "method": ("method", ""),
    "seeds": ("seeds", ""),
    "metric": ("metric", ".0%"),
    "less dpo": ("less dpo", "+.0%"),
    "less dsc": ("less dsc", "+.0%"),
    "afinn": ("AFINN positive", ".0%"),
    "other": ("other words", ".3f"),
    "reward": ("reward", ".3f"),
    "words": ("words", ".0f"),
    "repeats": ("repeats", ".1%"),
    "base_logp": ("log-prob", ".2f"),
    "cut": ("cut off", ".0%"),
}


def pick(lines, kind, method, start="base", flips=0, swaps=0):
    """The lines of one method, a seed each."""
    wanted = {"kind": kind, "method": method, "start": start, "flips": flips, "swaps": swaps}
    wanted["lr"] = 0
    found = [line for line in lines if wanted.items() <= line.items()]
    return sorted(found, key=lambda line: line["seed"])


def matrix(lines, name):
    """(seeds, groups) of a measure; NaN where there is none."""
    return np.array([line["values"][name] for line in lines], dtype=float)


def resample(values, draws=10_000):
    """(mean, low, high, p): the mean over seeds and groups, its 95 % interval by a bootstrap that
    draws seeds and groups with replacement, and p, two-sided, of the mean being 0."""
    rng, there = np.random.default_rng(0), ~np.isnan(values)
    # how often each seed and each group is drawn, (draws, seeds) and (draws, groups)
    seeds, groups = (rng.multinomial(n, np.full(n, 1 / n), draws) for n in values.shape)
    sums, counts = (((seeds @ part) * groups).sum(1) for part in (np.nan_to_num(values), there))
    means = sums / np.maximum(counts, 1)
    p = 2 * min(np.mean(means <= 0), np.mean(means >= 0))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(np.nanmean(values)), float(low), float(high), float(np.clip(p, 1 / draws, 1))


def holm(ps):
    """p-values adjusted by Holm's method (1979) for the family that they are."""
    order, adjusted, highest = np.argsort(ps), [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = highest
    return adjusted


def compare(found):
    """{(method, rival): (mean, low, high, p, p by Holm)} of the differences in the metric, paired
    by seed and group; the family is one table. found: {method: lines}."""
    tests = {}
    for rival, method in itertools.product(RIVALS, found):
        both = [{x["seed"]: x for x in found.get(name, [])} for name in (method, rival)]
        seeds = sorted(both[0].keys() & both[1].keys())
        if seeds and method != rival:
            one, other = (matrix([lines[seed] for seed in seeds], "metric") for lines in both)
            tests[method, rival] = resample(one - other)
    adjusted = holm([test[3] for test in tests.values()])
    return {both: (*tests[both], p) for both, p in zip(tests, adjusted, strict=True)}


def summarise(lines):
    """Rows of the tables: dictionaries of numbers."""
    rows = []
    for kind, start in itertools.product(("conversation", "fresh"), ("base", "dsc")):
        found = {method: pick(lines, kind, method) for method in UNTRAINED}
        found |= {"dsc, the start": pick(lines, kind, "dsc")} if start == "dsc" else {}
        found |= {method: pick(lines, kind, method, start) for method in METHODS}
        found = {method: mine for method, mine in found.items() if mine}
        tests = compare(found)
        for method, mine in found.items() if found.keys() - {*UNTRAINED, "dsc, the start"} else ():
            row = {"kind": kind, "start": start, "method": method}
            row |= {"seeds": [line["seed"] for line in mine]}
            there = [m for m in SHOWN if all(m in line["values"] for line in mine)]
            row |= {measure: resample(matrix(mine, measure)) for measure in there}
            row |= {f"less {r}": tests[method, r] for r in RIVALS if (method, r) in tests}
            rows.append(row)
    return rows


def dials_of(lines):
    """The points of the plot: dictionaries of numbers."""
    points = []
    for dial, methods in (("flips", DIAL), ("swaps", PREFERENCE)):
        for method, share in itertools.product(methods, (0, *sorted({*FLIPS, *SWAPS} - {0}))):
            mine = pick(lines, "fresh", method, **{dial: share})
            if mine:
                point = {"dial": dial, "method": method, "share": share}
                point |= {"seeds": [line["seed"] for line in mine]}
                points.append(point | {"metric": resample(matrix(mine, "metric"))})
    return points


def draw(points, path):
    """The plot of the two dials."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True, layout="constrained")
    titles = {
        "flips": "labels exchanged, % of the pairs",
        "swaps": "scores exchanged, % of the pairs",
    }
    for axis, (dial, title) in zip(axes, titles.items(), strict=True):
        for number, method in enumerate(PREFERENCE):
            mine = [p for p in points if (p["dial"], p["method"]) == (dial, method)]
            at = np.array([point["share"] for point in mine]) + 0.4 * number  # side by side
            means, low, high = (np.array([100 * p["metric"][k] for p in mine]) for k in range(3))
            if len(mine) > 1:  # else there is no line yet
                ends = [means - low, high - means]
                axis.errorbar(at, means, ends, fmt="o-", ms=3, capsize=2, label=method)
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=8)
    axes[0].set_ylabel("positive answers, %")
    figure.savefig(path, dpi=110)


def table_of(rows, columns):
    """Markdown. columns: {key of the rows: (heading, format)}."""
    table = [[head for head, _ in columns.values()], ["---"] * len(columns)]
    for row in rows:
        table.append([cell(row.get(key), form) for key, (_, form) in columns.items()])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def cell(value, form):
    """A value, or a mean with its interval and, where there is one, p by Holm."""
    if not isinstance(value, tuple):
        return "-" if value is None else str(value)
    return interval(value[:3], form) + (f", p {value[4]:.2g}" if len(value) == 5 else "")


def report(study):
    """TASK.md, TASK.png and TASK.summary.json beside the lines, and the table of the README."""
    lines = list(study.lines.values())
    rows, points = summarise(lines), dials_of(lines)
    command = f"python results/study.py --task {study.task}"
    facts = [line["made"] | {"date": line["made"]["date"][:10]} for line in lines]
    made = sorted({json.dumps(fact, sort_keys=True) for fact in facts})
    summary = {
        "command": command,
        "made": list(map(json.loads, made)),
        "rows": rows,
        "dials": points,
    }
    study.path.with_suffix(".summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    parts = [f"# The study of the task {study.task}", f"Made by `{command}`."]
    for (kind, start), mine in itertools.groupby(rows, lambda row: (row["kind"], row["start"])):
        parts += [f"## Pairs: {kind}; training from: {start}", table_of(list(mine), SHOWN)]
    if any(point["share"] for point in points):
        draw(points, study.path.with_suffix(".png"))
        parts += ["## Dials", f"![metric under noise]({study.task}.png)"]
        columns = {"dial": ("exchanged", ""), "share": ("% of the pairs", "")}
        columns |= {key: SHOWN[key] for key in ("method", "seeds", "metric")}
        parts += [table_of(points, columns)]
    trials = [{key: line[key] for key in ("method", "lr", "beta")} for line in lines if line["lr"]]
    for trial in trials:
        line = study.lines[Run("conversation", **trial, seed=0).key]
        trial |= {name: resample(matrix([line], name)) for name in ("metric", "words")}
    if trials:
        parts += ["## Settings: trials on training prompts whose films no pair is of"]
        columns = {"method": ("method", ""), "lr": ("learning rate", ""), "beta": ("beta", "")}
        columns |= {key: SHOWN[key] for key in ("metric", "words")}
        parts += [table_of(sorted(trials, key=lambda trial: trial["method"]), columns)]
    hours = sum(line["seconds"] * line["threads"] for line in lines) / 3600
    parts += ["## How it was made"]
    parts += [f"{len(lines)} runs, {hours:.1f} core-hours and those of the pairs.", *made]
    study.path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    if study.task == "sentiment" and study.path.is_relative_to(ROOT):
        mine = [row for row in rows if (row["kind"], row["start"]) == ("conversation", "base")]
        columns = ("method", "metric", "less dpo", "less dsc", "afinn", "words", "repeats", "cut")
        table = table_of(mine, {key: SHOWN[key] for key in columns})
        mark, readme = "<!-- the study's table -->\n", ROOT / "README.md"
        before, _, after = readme.read_text().split(mark)
        readme.write_text(f"{before}{mark}{table}\n{mark}{after}")
    print("\n\n".join(parts))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--task", default="sentiment")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="runs at once (default: one a core)"
    )
    parser.add_argument("--report", action="store_true", help="make no run, write the report")
    args = parser.parse_args()
    os.chdir(ROOT)
    study = Study(args)
    if not args.report:
        runs = plan_of(args.task, args.seeds)
        missing = [run for run in runs if run.key not in study.lines]
        print(f"{len(missing)} of {len(runs)} runs are missing", flush=True)
        with ThreadPoolExecutor(args.jobs) as pool:
            waiting = [pool.submit(study.ensure, run) for run in missing]
            try:
                for run in waiting:
                    run.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    report(study)


if __name__ == "__main__":
    main()
