"""make study: does listening to the reward help? The methods side by side, and under noise.

    python results/study.py --task sentiment --seeds 0 1 2     # what is missing of it, then the report
    python results/study.py --task sentiment --report          # the report of what is there

Every run is generate.py, score.py, train.py and eval.py, called with the flags that it prints to its
log. results/study/TASK.jsonl gets a line a run (settings, versions, the measures of every group of
test prompts) and is what the study continues from: a run that has a line is not made again, so to
make all of them anew, move the file away. Answers and models stay in runs/study/. TASK.md, TASK.png
and the README's table are made of the lines alone.

Kinds of pairs. fresh: the reviser does not see the draft, and nearly every revision wins.
conversation: the papers' form, in which a small teacher copies its draft and many revisions fail.

The rule for learning rate and beta, written before the first run: each family of methods is tried
with the settings of GRID on two thirds of the training groups (pairs of the kind conversation, seed
0, TUNE_STEPS steps). Of those whose answers to 48 prompts of the other third have at least three
quarters of the base model's words (of all, if none has), the one with the highest task metric is
taken, at equal metric the one with the higher reward. Training that goes on from dSC takes half the
learning rate.
"""

import argparse
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

from eval import by_group  # noqa: E402
from generate import lines_of, load_model, pick_device, provenance  # noqa: E402
from kernels.packed import check_model  # noqa: E402
from prompts import load_task, read_rows  # noqa: E402
from score import contrast_reward  # noqa: E402

STEPS, TUNE_STEPS, PAIRS_A_STEP = 32, 16, 8
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
FAMILY = {"dsc": "sft", "dpo-accept": "dpo", "cdpo": "dpo", "robust": "dpo"}  # others: themselves
GRID = {"sft": [(1e-5, 0.3), (2e-5, 0.3)]}  # (learning rate, beta); sft has no beta
GRID |= {m: [(1e-5, 0.3), (1e-5, 0.1), (2e-5, 0.1)] for m in PREFERENCE if m not in FAMILY}
UNTRAINED = ("base", "self-refine")
FLIPS, SWAPS = (0, 40, 20, 10, 30), (50, 25, 10, 40)  # % of the pairs, the most telling ones first
DIAL = ("dpo", "rdpo", "dpo-accept", "cdpo", "robust")

# the principle of prompts/sentiment.toml in words that no training saw
OTHER_WORDS = {
    "principle": [
        {"role": "system", "content": "You recommend films warmly and find something good in each."},
        {"role": "user", "content": "{request}"},
    ],
    "opposite": [
        {"role": "system", "content": "You advise against films coldly and find fault with each."},
        {"role": "user", "content": "{request}"},
    ],
}


class Run(NamedTuple):
    """One trained and evaluated student, or an untrained answerer."""

    kind: str  # of pairs
    method: str
    seed: int
    start: str = "base"  # or dsc, from whose student training goes on
    flips: int = 0  # % of the pairs with chosen and rejected exchanged, the scores with their texts
    swaps: int = 0  # % of the pairs with their two scores exchanged
    tune: tuple = ()  # (learning rate, beta) on trial

    @property
    def name(self):
        parts = [self.method, *["from-dsc"] * (self.start == "dsc")]
        parts += [f"flips{self.flips}"] * (self.flips > 0) + [f"swaps{self.swaps}"] * (self.swaps > 0)
        parts += [f"lr{self.tune[0]:g}-beta{self.tune[1]:g}"] if self.tune else []
        return "-".join(parts)

    @property
    def key(self):
        return f"{self.kind}/{self.seed}/{'tune/' * bool(self.tune)}{self.name}"


def plan_of(task, seeds):
    """All runs in the order in which they are made: what tells most comes first."""
    if task != "sentiment":  # the recipe alone, where the teacher is too weak for a study
        few = ["sft", "dsc", "dpo", "rdpo"]
        return [Run("fresh", m, s) for s in seeds for m in (*UNTRAINED, *few)] + [
            Run("fresh", m, s, "dsc") for s in seeds for m in ("dpo", "rdpo")
        ]
    runs = []
    for seed in seeds:
        runs += [Run("conversation", m, seed) for m in (*UNTRAINED, *METHODS)]
        runs += [Run("fresh", m, seed) for m in (*UNTRAINED, "dsc")]
        runs += [Run("fresh", m, seed, flips=share) for share in FLIPS[:3] for m in DIAL]
        runs += [Run("fresh", "rdpo", seed, swaps=share) for share in SWAPS[:2]]
        for kind in ("conversation", "fresh"):
            runs += [Run(kind, m, seed, "dsc") for m in (*PREFERENCE, "dsc")]
        runs += [Run("fresh", m, seed) for m in METHODS]
        runs += [Run("fresh", m, seed, flips=share) for share in FLIPS[3:] for m in DIAL]
        for m in ("rdpo", "rdpo-margin", "rdpo-weight"):
            runs += [Run("fresh", m, seed, swaps=share) for share in SWAPS]
    return list(dict.fromkeys(runs))


def trials_of(task):
    """The runs by which learning rate and beta are chosen."""
    kind = "conversation" if task == "sentiment" else "fresh"
    families = GRID if task == "sentiment" else ("sft", "dpo", "rdpo")
    runs = [Run(kind, family, 0, tune=setting) for family in families for setting in GRID[family]]
    return [Run(kind, "base", 0, tune=(0, 0)), *runs]


# ---- one run: the four stages --------------------------------------------------------------------


class Study:
    """The study of one task: its lines, and what is needed to make the ones that are missing."""

    def __init__(self, args):
        self.task, self.threads = args.task, max(1, (os.cpu_count() or 1) // args.jobs)
        self.path = ROOT / f"results/study/{args.task}.jsonl"
        self.path.parent.mkdir(exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.lines = {line["key"]: line for line in map(json.loads, lines)}
        self.guard, self.guards = threading.Lock(), {}

    def folder(self, run):
        return Path(f"runs/study/{self.task}/{run.kind}-{run.seed}{'-tune' * bool(run.tune)}")

    def call(self, folder, script, *flags, may=(0,)):
        """Runs a stage; its output goes to the folder's log."""
        command = [sys.executable, script, "--task", self.task, *map(str, flags)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        with open(folder / "log.txt", "a") as log:
            print("\n$", *command[1:], file=log, flush=True)
            code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        if code.returncode not in may:
            text = (folder / "log.txt").read_text()[-600:]
            raise SystemExit(f"{script} ended with status {code.returncode}, {folder}/log.txt:\n{text}")

    def once(self, path, make):
        """Makes a file or folder where it is not there yet; two workers do not make the same."""
        with self.guard:
            lock = self.guards.setdefault(str(path), threading.Lock())
        with lock:
            if not path.exists():
                make()
        return path

    def scored(self, run):
        """The scored pairs of a kind and seed, training and test prompts."""
        folder = Path(f"runs/study/{self.task}/{run.kind}-{run.seed}")

        def make():
            folder.mkdir(parents=True, exist_ok=True)
            form = ["--form", run.kind, "--seed", run.seed, "--batch-size", 128]
            self.call(folder, "generate.py", *form, "--out", folder / "pairs.jsonl", may=(0, 1))
            files = ["--in", folder / "pairs.jsonl", "--out", folder / "scoring.jsonl"]
            self.call(folder, "score.py", *files, "--batch-size", 64, may=(0, 1))
            os.replace(folder / "scoring.jsonl", folder / "scored.jsonl")

        return self.once(folder / "scored.jsonl", make)

    def rows(self, run):
        """(rows to train on, rows to test on), noise included."""
        rows = read_rows(self.scored(run), "id")
        train, test = ([r for r in rows if r["split"] == split] for split in ("train", "test"))
        if run.tune:
            groups = sorted({row["group"] for row in train})
            random.Random("tune").shuffle(groups)
            kept = set(groups[len(groups) // 3 :])
            test = [row | {"split": "test"} for row in train if row["group"] not in kept][:48]
            train = [row for row in train if row["group"] in kept]
        usable = [row for row in train if not row.get("error") and "length" not in ends_of(row)]
        order = random.Random(f"noise {run.seed}").sample(range(len(usable)), len(usable))
        for i in order[: round(len(usable) * run.flips / 100)]:
            exchange(usable[i], "chosen", "rejected")
            exchange(usable[i], "score_chosen", "score_rejected")
        for i in order[: round(len(usable) * run.swaps / 100)]:
            exchange(usable[i], "score_chosen", "score_rejected")
        return usable, test

    def settings(self, run):
        """(learning rate, beta) by the rule above."""
        if run.tune:
            return run.tune
        family = FAMILY.get(run.method, run.method)
        trials = [self.lines[r.key] for r in trials_of(self.task) if r.method == family]
        (base,) = (self.lines[r.key] for r in trials_of(self.task) if r.method == "base")
        long = [t for t in trials if mean(t, "words") >= 0.75 * mean(base, "words")]
        sign = 1 if load_task(self.task)["metric"]["better"] == "higher" else -1
        best = max(long or trials, key=lambda t: (sign * mean(t, "metric"), mean(t, "reward")))
        return (best["lr"] / 2 if run.start == "dsc" else best["lr"]), best["beta"]

    def make(self, run):
        """Trains and evaluates, and adds the line."""
        began, folder, facts = time.time(), self.folder(run), {}
        folder.mkdir(parents=True, exist_ok=True)
        train, test = self.rows(run)
        student = folder / run.name
        if run.method not in UNTRAINED:
            facts = self.train(run, train, student)
        elif run.method == "base":
            student = Path("smollm2")
        answers = self.evaluate(run, test, student)
        made = {key: provenance()[key] for key in ("commit", "date", "hardware", "torch", "transformers")}
        line = {"key": run.key, **run._asdict(), **facts, "made": made}
        line |= {"seconds": round(time.time() - began), "threads": self.threads}
        line |= self.measures(run, answers, {row["id"]: row for row in test})
        shutil.rmtree(folder / f"{student.name}.bak", ignore_errors=True)
        if run.method not in (*UNTRAINED, "dsc") or run.tune or run.start == "dsc":
            shutil.rmtree(student, ignore_errors=True)  # half a gigabyte; the answers stay
        with self.guard:
            self.lines[run.key] = line
            with open(self.path, "ab") as file:
                file.write(lines_of([line]))
        print(f"{time.strftime('%H:%M:%S')} {run.key}: {line['seconds']} s, "
              f"metric {mean(line, 'metric'):.3f}, words {mean(line, 'words'):.0f}", flush=True)  # fmt: skip

    def train(self, run, rows, student):
        """Calls train.py; what is to be known of it."""
        lr, beta = self.settings(run)
        gaps = np.array([row["score_chosen"] - row["score_rejected"] for row in rows])
        rate = float(np.clip(np.mean(gaps < 0), 0.01, 0.45))
        start = "smollm2"
        if run.start == "dsc":
            first, start = Run(run.kind, "dsc", run.seed), self.folder(run) / "dsc"
            self.train(first, self.rows(first)[0], start)
        steps = TUNE_STEPS if run.tune else STEPS
        source = student.with_suffix(".jsonl")
        source.write_bytes(lines_of(rows))
        flags = [*METHODS[run.method], "--in", source, "--out", student, "--model", start]
        flags += ["--lr", lr, "--beta", beta, "--seed", run.seed, "--max-steps", steps]
        flags += ["--epochs", 1000, "--batch-size", PAIRS_A_STEP, "--save-every", 1000]
        flags += ["--epsilon", round(rate, 3)] if run.method in ("cdpo", "robust") else []
        self.once(student / "model.safetensors", lambda: self.call(self.folder(run), "train.py", *flags))
        record = json.loads((student / "run.json").read_text())
        facts = {"lr": lr, "beta": beta, "steps": record["steps"], "pairs": record["pairs"]}
        flags = " ".join(map(str, ["python train.py --task", self.task, *flags]))
        return facts | {"won": float(np.mean(gaps > 0)), "epsilon": rate, "command": flags}

    def evaluate(self, run, test, student):
        """Calls eval.py; its rows of this run's answers. The base model's answers are made once."""
        folder = self.folder(run)
        base = Path(f"runs/study/{self.task}/base-{run.seed}{'-tune' * bool(run.tune)}")
        source = self.once(folder / "test.jsonl", lambda: write(folder / "test.jsonl", test))
        flags = ["--in", source, "--seed", run.seed, "--batch-size", 160]

        def make():
            part = base.with_suffix(".part")
            part.mkdir(parents=True, exist_ok=True)
            self.call(folder, "eval.py", *flags, "--models", "smollm2", "--out", part, may=(0, 1))
            os.replace(part, base)

        self.once(base, make)
        if run.method == "base":
            return read_rows(base / "eval.jsonl", "id")
        out, names = folder / f"eval-{run.name}", ["smollm2", student]
        self.once(out, lambda: shutil.copytree(base, out))
        if run.method == "self-refine":
            names = ["smollm2", "self-refine"]
        self.call(folder, "eval.py", *flags, "--models", *names, "--out", out, may=(0, 1))
        rows = read_rows(out / "eval.jsonl", "id")
        return [row for row in rows if row["model"] == Path(names[1]).name]

    def measures(self, run, answers, rows):
        """The measures of each group of test prompts, and three samples."""
        kind, answers = load_task(self.task)["metric"]["kind"], [dict(row) for row in answers]
        vader, afinn = SentimentIntensityAnalyzer(), Afinn()
        for row in answers:
            row["cut"] = float(row["finish"] == "length")
            if self.task == "sentiment":
                row["vader"] = vader.polarity_scores(row["answer"])["compound"]
                row["afinn"] = float(afinn.score(row["answer"]) > 0)
        if self.task == "sentiment" and not (run.flips or run.swaps or run.tune):
            spoken = [row for row in answers if row["answer"]]
            given = [rows[row["prompt_id"]] for row in spoken]
            for row, score in zip(spoken, other_words(given, spoken), strict=True):
                row["other"] = score.value
        names = ["metric", "score", "words", "repeats", "base_logp", "cut", "vader", "afinn", "other"]
        values = {name: by_group([{name: None} | row for row in answers], name, kind if name == "metric" else "mean")
                  for name in names}  # fmt: skip
        values["reward"] = values.pop("score")
        groups = sorted(values["words"])
        table = {n: [round(v[g], 3) if g in v else None for g in groups] for n, v in values.items() if v}
        samples = {row["prompt_id"]: row["answer"] for row in answers[:3]}
        return {"groups": groups, "values": table, "samples": samples}


def ends_of(row):
    finish = row["teacher"]["finish"]
    return {finish["answer"], finish["revision"]}


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


def matrix(lines, name):
    """(seeds, groups) of a measure; NaN where there is none."""
    return np.array([line["values"][name] for line in lines], dtype=float)


def resample(values, draws=10_000):
    """(mean, low, high, p): mean over seeds and groups with its 95 % interval, from a bootstrap that
    draws seeds and groups with replacement; p, two-sided, of the mean being 0."""
    rng, (seeds, groups) = np.random.default_rng(0), values.shape
    means = np.empty(draws)
    for k in range(draws):
        picks = values[rng.integers(seeds, size=seeds)][:, rng.integers(groups, size=groups)]
        means[k] = np.nanmean(picks)
    low, high = np.percentile(means, [2.5, 97.5])
    p = 2 * min(np.mean(means <= 0), np.mean(means >= 0))
    return float(np.nanmean(values)), float(low), float(high), max(float(p), 1 / draws)


def holm(ps):
    """p-values adjusted by Holm's method (1979) for the family that they are."""
    order, adjusted, highest = np.argsort(ps), [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = highest
    return adjusted


def paired(lines, others, name):
    """Differences of two methods, (seeds, groups), over the seeds that both have."""
    seeds = {line["seed"] for line in lines} & {line["seed"] for line in others}
    one, other = ([x for x in both if x["seed"] in seeds] for both in (lines, others))
    return matrix(one, name) - matrix(other, name) if seeds else None


def shown(triple, form):
    mean, low, high = (format(value, form) for value in triple[:3])
    return f"{mean} [{low}, {high}]"


SHARE = {"metric": ".0%", "afinn": ".0%", "cut": ".0%", "repeats": ".1%"}
COLUMNS = {"afinn": "AFINN positive", "other": "other words", "reward": "reward", "words": "words",
           "repeats": "repeats", "base_logp": "log-prob", "cut": "cut off"}  # fmt: skip


def table_of(lines, kind, start):
    """(Markdown table, rows as data) of the methods on one kind of pairs, from one start."""
    def of(method, start=start):
        rows = [x for x in lines if (x["kind"], x["method"]) == (kind, method)]
        rows = [x for x in rows if x["start"] == start and not (x["flips"] or x["swaps"])]
        return sorted(rows, key=lambda x: x["seed"])

    found = {m: of(m, "base") for m in (*UNTRAINED, "dsc")} if start == "dsc" else {}
    found |= {m: of(m, "base") for m in UNTRAINED} | ({} if start == "base" else {"dsc (start)": found["dsc"]})
    found.pop("dsc", None)
    found |= {m: of(m) for m in METHODS}
    found = {m: rows for m, rows in found.items() if rows}
    rivals = [m for m in ("dpo", "dsc") if m in found]
    tests = {(m, r): paired(found[m], found[r], "metric") for m in found for r in rivals if m != r}
    tests = {both: resample(values) for both, values in tests.items() if values is not None}
    ps = dict(zip(tests, holm([t[3] for t in tests.values()]), strict=True))
    measures = [m for m in COLUMNS if any(m in x["values"] for rows in found.values() for x in rows)]
    head = ["method", "seeds", "metric", *(f"less {r}; p" for r in rivals), *(COLUMNS[m] for m in measures)]
    table, data = [head, ["---"] * len(head)], []
    for method, rows in found.items():
        cells = [method, str(len(rows)), shown(resample(matrix(rows, "metric")), SHARE["metric"])]
        row = {"method": method, "kind": kind, "start": start, "seeds": [x["seed"] for x in rows]}
        for rival in rivals:
            test = tests.get((method, rival))
            cells.append(f"{shown(test, '+.0%')}; {ps[method, rival]:.2g}" if test else "-")
            if test:
                row[f"less {rival}"] = [*test, ps[method, rival]]
        for m in measures:
            there = all(m in x["values"] for x in rows)
            row[m] = resample(matrix(rows, m)) if there else None
            cells.append(shown(row[m], SHARE.get(m, ".0f" if m == "words" else ".2f")) if there else "-")
        row["metric"] = resample(matrix(rows, "metric"))
        table.append(cells)
        data.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in table), data


def dials(lines, path):
    """The plot of the two dials; the numbers in it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    data = []
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for axis, dial, other in zip(axes, ("flips", "swaps"), ("swaps", "flips"), strict=True):
        for number, method in enumerate(DIAL if dial == "flips" else PREFERENCE):
            points = []
            rows = [x for x in lines if x["kind"] == "fresh" and x["method"] == method]
            rows = [x for x in rows if x["start"] == "base" and not x[other]]
            for share in sorted({x[dial] for x in rows}):
                here = [x for x in rows if x[dial] == share]
                points.append((share, *resample(matrix(here, "metric"))[:3]))
                data.append({"dial": dial, "method": method, "seeds": [x["seed"] for x in here]})
                data[-1] |= dict(zip(("share", "mean", "low", "high"), points[-1], strict=True))
            if len(points) > 1:
                at, means, low, high = np.array(points, dtype=float).T
                axis.errorbar(at + number / 3, means, [means - low, high - means], fmt="o-", capsize=2, label=method)
        axis.set_xlabel({"flips": "% of the labels exchanged", "swaps": "% of the scores exchanged"}[dial])
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("share of positive answers")
    figure.savefig(path, dpi=120)
    return data


def report(study):
    """TASK.md, TASK.png and TASK.summary.json beside the lines."""
    lines = [line for line in study.lines.values() if not line["tune"]]
    parts, summary = [f"# The study of `{study.task}`"], []
    for kind in ("conversation", "fresh"):
        for start in ("base", "dsc"):
            if any((x["kind"], x["start"]) == (kind, start) and x["method"] in METHODS for x in lines):
                table, data = table_of(lines, kind, start)
                parts += [f"## Pairs: {kind}; start: {start}", table]
                summary += data
    if any(line["flips"] or line["swaps"] for line in lines):
        summary += dials(lines, study.path.with_suffix(".png"))
        parts += ["## Dials", f"![metric over noise]({study.task}.png)"]
    chosen = [f"{m}: {study.settings(Run('fresh', m, 0))}" for m in METHODS if m in {x["method"] for x in lines}]
    hours = sum(x["seconds"] * x["threads"] for x in study.lines.values()) / 3600
    made = {json.dumps(x["made"] | {"date": x["made"]["date"][:10]}, sort_keys=True) for x in study.lines.values()}
    parts += ["## How it was made", f"Learning rate and beta by the rule of study.py: {'; '.join(chosen)}.",
              f"{len(study.lines)} runs, {hours:.1f} core-hours.", *sorted(made)]  # fmt: skip
    study.path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    summary = {"command": f"python results/study.py --task {study.task}", "made": sorted(made), "rows": summary}
    study.path.with_suffix(".summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print("\n\n".join(parts))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--task", default="sentiment")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once (default: one a core)")
    parser.add_argument("--report", action="store_true", help="make no run, write the report")
    args = parser.parse_args()
    os.chdir(ROOT)
    study = Study(args)
    for runs in () if args.report else (trials_of(args.task), plan_of(args.task, args.seeds)):
        missing = [run for run in runs if run.key not in study.lines]
        print(f"{len(missing)} of {len(runs)} runs are missing", flush=True)
        with ThreadPoolExecutor(args.jobs) as pool:
            waiting = [pool.submit(study.make, run) for run in missing]
            try:
                for run in waiting:
                    run.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    report(study)


if __name__ == "__main__":
    main()
