"""make study: does listening to the reward help? The methods side by side, and under noise.

    python results/study.py --task sentiment --seeds 20 21 22  # the runs that are missing
    python results/compare.py --task sentiment                 # tables and plot of those that are there

Every run is generate.py, score.py, train.py and eval.py, called with flags that the folder's log.txt
shows. results/study/TASK/KIND-SEED.jsonl gets a line a run (settings, versions, the measures of
every group of test prompts), and a run that has a line is not made again. Answers and models stay in
runs/study/TASK/KIND-SEED/; to make a run anew, delete its line, and its folders there. Start as many
of these at once as there is room for, with OMP_NUM_THREADS=1 each: a process takes the first run
that no other makes. Two are a third faster on two cores than one; a GPU has room for a dozen.
Another machine than that which made a seed's pairs rounds otherwise and samples other words: it
cannot add runs to them, and makes pairs of new seeds (0 to 13 are there).

Kinds of pairs. fresh: the reviser does not see the draft, and nearly every revision wins.
conversation: the papers' form, in which a small teacher copies its draft and many revisions fail; of
the first LIMIT instructions only, since it takes three times as long. pooled: the conversation pairs
of three seeds (of seed 0: of seeds 0, 1, 2, and so on), and three times the steps. large, of safety
alone: the papers' form with a teacher of 1.5 billion parameters, which results/teacher.py takes from
PyPI; reward and student are the embedded model there too. Pairs with an answer that was cut off, or a
revision that repeats itself, are left out for all methods; sft imitates all others, dsc and dpo-accept
have those that won, and preference losses those that are no copy of the draft.

All methods have STEPS steps of PAIRS_A_STEP pairs (fewer at an epoch's end), and preference losses the
SFT term of RECIPE (results/pilots.md says why), but for those named -alone. cdpo and robust are told
the share of pairs that lost by the reward. Learning rate and beta are chosen for each method by one
rule: of the settings in TRIALS, those whose student, trained on the conversation pairs of seed 0
(methods named -alone: of seed 9), gives the largest share of positive answers to the training prompts
on films that no such pair is of; of equals the first. Of methods named -alone, whose positive answers
run on, those that end are counted. Rates of preference losses are doubled as long as the last one is
the best; sft and dsc have three. So the test prompts have no part in the choice; it is a coarse one,
since 114 prompts tell some 16 points. Other pairs take the settings so found. From dSC's student on, the
learning rate is half as large. Other tasks than sentiment have few runs, with sentiment's settings:
there the teacher is too weak.

A second reward, on conversation pairs: the lexicon AFINN, which agrees with the metric's more often
than the contrast does, takes the place of an external reward that is good. What a student then gains
by the metric is in part the lexicons' likeness; the contrast is what it did not see.

Two dials. Labels: chosen and rejected of some pairs exchanged, the scores with their texts; rdpo is
the same then by its formula (p becomes 1 - p and z becomes -z), and is not run. Scores: the two scores
of some pairs exchanged; dpo does not see them.
"""

import argparse
import contextlib
import fcntl
import functools
import itertools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from afinn import Afinn
from teacher import FOLDER as TEACHER

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from eval import by_group  # noqa: E402
from kernels.packed import use_packed_attention  # noqa: E402
from prompts import load_task, measure, read_prompts  # noqa: E402
from prompts.chat import load_model, pick_device  # noqa: E402
from prompts.tokens import repetition  # noqa: E402
from prompts.rows import SIDES, BadInput, Rows, lines_of, provenance, read_rows  # noqa: E402
from prompts.rows import text_of  # noqa: E402
from prompts.rows import run as run_stage  # noqa: E402
from score import contrast_reward  # noqa: E402

STEPS, PAIRS_A_STEP, POOLED = 24, 8, 3
LATER = 9  # the seed of the trials of methods named -alone, which were added later
LEXICON = Afinn()
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
    "dpo-alone": ["--loss", "dpo", "--sft-weight", 0],
    "rdpo-margin-alone": ["--loss", "rdpo-margin", "--sft-weight", 0],
}
IMITATION, UNTRAINED = ("sft", "dsc"), ("base", "self-refine")
SHORT = ("dpo", "rdpo", "rdpo-margin", "dsc")
RECIPE = ["--sft-weight", 1]  # of preference methods
# learning rate and beta that are tried, the first five always
TRIALS = ((1e-5, 0.1), (2e-5, 0.1), (1e-5, 0.3), (4e-5, 0.1), (8e-5, 0.1))
TRIALS += ((1.6e-4, 0.1), (3.2e-4, 0.1), (6.4e-4, 0.1))
ALWAYS = 5
IMITATION_TRIALS = ((1e-5, None), (2e-5, None), (4e-5, None))
MAX_REPEATS = 0.05  # of a revision, see train.py
LIMIT = {"conversation": 384, "fresh": 644, "large": 128}  # instructions
KINDS = ("conversation", "pooled", "fresh", "large")
ROWS = 256 if torch.cuda.is_available() else 160  # that are sampled together
# % of the pairs with labels or scores exchanged, what tells most first
FLIPS = dict.fromkeys(("dpo", "rdpo-margin", "dpo-accept", "cdpo", "robust"), (40, 20, 10, 30))
SWAPS = dict.fromkeys(("rdpo", "rdpo-margin", "dsc", "dpo-accept"), (50, 25, 10, 40))
MADE = ("commit", "date", "hardware", "torch", "transformers")

# the principle of prompts/sentiment.toml in words that no training saw
SYSTEM = {
    "principle": "You recommend films warmly and find something good in each.",
    "opposite": "You advise against films coldly and find fault with each.",
}
OTHER_WORDS = {
    side: [{"role": "system", "content": text}, {"role": "user", "content": "{request}"}]
    for side, text in SYSTEM.items()
}


class Run(NamedTuple):
    """One trained and evaluated student, or an untrained answerer."""

    kind: str  # of pairs
    method: str
    seed: int
    start: str = "base"  # or dsc, from whose student training goes on
    flips: int = 0  # % of the pairs with chosen and rejected exchanged, the scores with their texts
    swaps: int = 0  # % of the pairs with their two scores exchanged
    reward: str = "contrast"  # or afinn: the lexicon's score, a word
    trial: int | None = None  # number of the settings that are tried, on films of their own

    @property
    def name(self):
        parts = [self.method, *["from-dsc"] * (self.start == "dsc")]
        parts += [f"flips{self.flips}"] * (self.flips > 0)
        parts += [f"swaps{self.swaps}"] * (self.swaps > 0)
        parts += [self.reward] * (self.reward != "contrast")
        parts += [f"trial{self.trial}"] * (self.trial is not None)
        return "-".join(parts)


def settings_of(method):
    """The settings that are tried for a method: [(learning rate, beta)]."""
    return IMITATION_TRIALS if method in IMITATION else TRIALS


def plan_of(task, seeds):
    """All runs in the order in which they are made: what tells most comes first."""
    if task != "sentiment":
        few = [Run("fresh", method, 0) for method in (*UNTRAINED, *SHORT)]
        if task == "safety":
            few += [Run("large", method, 0) for method in (*UNTRAINED, *SHORT, "dpo-accept", "sft")]
        return [run._replace(seed=seed) for seed in seeds for run in few]

    def trials(method):
        seed = LATER if method.endswith("-alone") else 0
        return [Run("conversation", method, seed, trial=i) for i in range(len(settings_of(method)))]

    # on conversation pairs, from the base model
    alone = [method for method in METHODS if method.endswith("-alone")]
    full = [method for method in METHODS if method not in (*SHORT, *alone)]
    runs = [trial for method in SHORT for trial in trials(method)]
    for seed in seeds:
        runs += [Run("conversation", m, seed) for m in (*UNTRAINED, *SHORT)]
        runs += [Run("fresh", m, seed) for m in SHORT]
        runs += [
            Run("fresh", m, seed, flips=f) for m in ("dpo", "rdpo-margin") for f in FLIPS[m][:2]
        ]
        runs += [Run("fresh", m, seed, swaps=s) for m in SHORT[1:] for s in SWAPS[m][:2]]
        runs += [Run("conversation", m, seed, reward="afinn") for m in ("rdpo", "dsc")]
    for seed, method in itertools.product(seeds, alone):
        runs += [*trials(method), Run("conversation", method, seed)]
    for seed, method in itertools.product(seeds, full):
        runs += [*trials(method), Run("conversation", method, seed)]
    for seed in seeds:
        runs += [Run("conversation", m, seed, "dsc") for m in (*SHORT, *full) if m != "sft"]
        runs += [Run("fresh", m, seed) for m in ("self-refine", *full)]
        runs += [Run("fresh", m, seed, "dsc") for m in SHORT]
        runs += [Run("pooled", m, seed) for m in SHORT]
        runs += [Run("fresh", m, seed, flips=f) for m, levels in FLIPS.items() for f in levels]
        runs += [Run("fresh", m, seed, swaps=s) for m, levels in SWAPS.items() for s in levels]
    return list(dict.fromkeys(runs))


# ---- one run: the four stages --------------------------------------------------------------------


class Cell:
    """The runs on the pairs of one kind and seed: a folder, and a file with a line a run."""

    def __init__(self, task, kind, seed):
        self.task, self.kind, self.seed = task, kind, seed
        self.folder = Path(f"runs/study/{task}/{kind}-{seed}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = ROOT / f"results/study/{task}/{kind}-{seed}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def made(self):
        """{name of a run: its line}."""
        return {line["id"]: line for line in read_lines(self.path)}

    def add(self, line):
        with claim(self.folder / "line.claim", wait=True):
            lines = Rows(self.path)
            lines.add(line)
            lines.file.close()

    def call(self, script, *flags):
        """Runs a stage, whose output goes to the folder's log; the seconds that it took. Stages
        know what is done. Status 1, of failed rows, is no failure."""
        began = time.time()
        command = [sys.executable, script, "--task", self.task, *map(str, flags)]
        with open(self.folder / "log.txt", "a") as log:
            print("\n$", *command[1:], file=log, flush=True)
            code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log).returncode
        if code not in (0, 1):
            text = (self.folder / "log.txt").read_text()[-600:]
            raise BadInput(f"{script}: status {code}, {self.folder}/log.txt ends with:\n{text}")
        return time.time() - began

    def prepare(self):
        """Makes pairs and prompts, and the base model's answers, unless another process does; whether
        they are there."""
        ready = self.folder / "test/report.md"
        if not ready.exists():
            with claim(self.folder / "pairs.claim") as mine:
                if mine:
                    seeds = range(POOLED * self.seed, POOLED * (self.seed + 1))
                    pooled = seeds if self.kind == "pooled" else ()
                    parts = [Cell(self.task, "conversation", seed) for seed in pooled]
                    if not all([part.prepare() for part in parts]):
                        return False
                    self.pool(parts) if parts else self.make_pairs()
                    self.call("eval.py", *self.asking("test"), "--models", "smollm2")
        return ready.exists()

    def make_pairs(self):
        """Scored training pairs, and what students are asked, in trials and at last."""
        file = pairs_file(self.task, self.kind, self.seed)
        there = json.loads(file.read_text()) if file.exists() else {}
        # batches of another size round otherwise, and sample other words within some sentences
        size = there.get("batch_size", ROWS)
        form = ["--form", self.kind, "--seed", self.seed, "--limit", LIMIT[self.kind]]
        if self.kind == "large":
            form[1:2] = ["conversation", "--model", TEACHER]
            with claim(self.folder.parent / "teacher.claim", wait=True):
                subprocess.run([sys.executable, "results/teacher.py"], check=True)
        self.call("generate.py", *form, "--batch-size", size, "--out", self.folder / "pairs.jsonl")
        made = {row["id"]: row for row in read_rows(self.folder / "pairs.jsonl", "id")}
        usable = [row for row in made.values() if row["split"] == "train" and is_usable(row)]
        source, scored = (self.folder / f"{name}.jsonl" for name in ("usable", "scored"))
        write(source, usable)
        self.call("score.py", "--in", source, "--out", scored, "--batch-size", 64)
        if self.task in FACTS:
            facts = FACTS[self.task](read_rows(scored, "id"))
            if not there:
                said = {"made": provenance(pick_device()[0]), "batch_size": size} | facts
                file.write_text(json.dumps(said, indent=1) + "\n")
            elif any(there[k] != facts[k] for k in there.keys() & facts.keys()):
                raise BadInput(f"{file}: is of other pairs than {scored}; take other --seeds")
        prompts = read_prompts(ROOT / f"prompts/{self.task}.jsonl", self.task)
        test, rest = ([row for row in prompts if row["split"] == s] for s in ("test", "train"))
        seen = {row["group"] for row in prompts[: LIMIT["conversation"]]}
        trial = [r | {"split": "test"} for r in rest if r["group"] not in seen]
        write(self.folder / "trial.jsonl", trial)
        # with what self-refine answers
        write(self.folder / "test.jsonl", [made.get(row["id"], row) for row in test])

    def pool(self, parts):
        """The pairs of several seeds as one; the prompts of the first."""
        rows = [row | {"id": f"{row['id']} {p.seed}"} for p in parts for row in p.rows("scored")]
        write(self.folder / "scored.jsonl", rows)
        for name in ("trial", "test"):
            write(self.folder / f"{name}.jsonl", parts[0].rows(name))

    @functools.cache  # noqa: B019, the cells live as long as the process
    def rows(self, name):
        """The training pairs "scored", or the rows "trial" or "test" that students are asked."""
        return read_rows(self.folder / f"{name}.jsonl", "id")

    def asking(self, name, out=None):
        """Flags of eval.py for the prompts "test" or "trial"."""
        flags = ["--in", self.folder / f"{name}.jsonl", "--out", out or self.folder / name]
        return [*flags, "--seed", self.seed, "--batch-size", ROWS]

    def training_pairs(self, run):
        """The scored pairs, with the run's reward and noise."""
        rows = [dict(row) for row in self.rows("scored")]
        for row, side in itertools.product(rows if run.reward == "afinn" else (), SIDES):
            text = text_of(row[side])
            row[f"score_{side}"] = LEXICON.score(text) / len(text.split())
        order = random.Random(f"noise {run.seed}").sample(range(len(rows)), len(rows))
        for i in order[: round(len(rows) * run.flips / 100)]:
            exchange(rows[i], "chosen", "rejected")
            exchange(rows[i], "score_chosen", "score_rejected")
        for i in order[: round(len(rows) * run.swaps / 100)]:
            exchange(rows[i], "score_chosen", "score_rejected")
        return rows

    def make(self, run, shares):
        """Trains with the settings that the trials say, evaluates, adds the line."""
        asked = self.rows("test" if run.trial is None else "trial")
        student = Path("smollm2" if run.method == "base" else "self-refine")
        line, seconds = {"id": run.name, **run._asdict(), "made": provenance(pick_device()[0])}, 0.0
        if run.method not in UNTRAINED:
            student, facts, seconds = self.train(run, shares)
            line |= facts
        answers, more = self.answer(run, student)
        line |= {"seconds": round(seconds + more), "threads": os.environ.get("OMP_NUM_THREADS")}
        line |= measures(self.task, run, answers, {row["id"]: row for row in asked})
        self.add(line)
        print(f"{time.strftime('%H:%M:%S')} {self.kind} {self.seed} {run.name}: "
              f"{line['seconds']} s, metric {mean(line['values']['metric']):.3f}, "
              f"words {mean(line['values']['words']):.0f}", flush=True)  # fmt: skip
        if run.method in METHODS and run != Run(
            self.kind, "dsc", self.seed
        ):  # others go on from it
            (student / "model.safetensors").unlink(missing_ok=True)  # half a gigabyte

    def train(self, run, shares):
        """Calls train.py: (the student's folder, what is to be known of it, seconds)."""
        rows, start = self.training_pairs(run), "smollm2"
        lr, beta = best_settings(run, shares)
        if run.start == "dsc":  # which is only looked for, if it is there
            with claim(self.folder / "start.claim", wait=True):
                start, _, _ = self.train(Run(self.kind, "dsc", self.seed), shares)
        gaps = np.array([row["score_chosen"] - row["score_rejected"] for row in rows])
        rate = float(np.clip(np.mean(gaps[gaps != 0] < 0), 0.01, 0.45))  # of flipped labels
        student, source = self.folder / run.name, self.folder / f"{run.name}.jsonl"
        write(source, rows)
        flags = ["--in", source, "--out", student, "--model", start, "--lr", lr]
        flags += [] if run.method in IMITATION else ["--beta", beta, *RECIPE]
        flags += ["--label-smoothing", round(rate, 3)] if run.method in ("cdpo", "robust") else []
        flags += [*METHODS[run.method], "--seed", self.seed, "--batch-size", PAIRS_A_STEP]
        steps = STEPS * POOLED if run.kind == "pooled" else STEPS
        flags += f"--max-steps {steps} --epochs 1000 --save-every 1000 --pack-tokens 2048".split()
        seconds = self.call("train.py", *flags)
        record = json.loads((student / "run.json").read_text())
        facts = {name: record[name] for name in ("lr", "beta", "pairs")}
        facts["epsilon"] = record["label_smoothing"]  # its name when the first lines were made
        facts |= {"won": float(np.mean(gaps > 0)), "lost": float(np.mean(gaps < 0))}
        facts["made"] = {name: record[name] for name in (*MADE, "command")}
        return student, facts, seconds

    def answer(self, run, student):
        """Calls eval.py: (its rows of this run's answers, seconds). The base model has answered."""
        base = read_rows(self.folder / "test/eval.jsonl", "id") if run.trial is None else []
        base = [row for row in base if row["model"] == "smollm2"]
        if run.method == "base":
            return base, 0.0
        out = self.folder / "answers" / run.name
        out.mkdir(parents=True, exist_ok=True)
        if base and not (out / "eval.jsonl").exists():
            write(out / "eval.jsonl", base)
        flags = self.asking("test" if run.trial is None else "trial", out)
        seconds = self.call("eval.py", *flags, "--models", *["smollm2"] * bool(base), student)
        rows = read_rows(out / "eval.jsonl", "id")
        return [row for row in rows if row["model"] == student.name], seconds


@contextlib.contextmanager
def claim(path, wait=False):
    """Whether the file is this process's until the block ends, or the process does."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            mine = True
        except BlockingIOError:
            mine = False
        yield mine


def is_usable(row):
    """Whether neither answer of a pair was cut off, and the revision does not repeat itself."""
    finish = row["teacher"]["finish"]
    if row.get("error") or "length" in (finish["draft"], finish["revision"]):
        return False
    return repetition(text_of(row["chosen"])) <= MAX_REPEATS


def pairs_file(task, kind, seed):
    return ROOT / f"results/study/{task}/{kind}-{seed}.pairs.json"


def facts_of_pairs(rows):
    """What the reward and the lexicon say of scored pairs, without copies of the draft. agree: of
    the pairs whose compound scores differ by more than 0.1, in how many the reward says the same."""
    texts = [(text_of(row["chosen"]), text_of(row["rejected"])) for row in rows]
    kept = [i for i, (revision, draft) in enumerate(texts) if revision != draft]
    gaps = np.array([rows[i]["score_chosen"] - rows[i]["score_rejected"] for i in kept])
    spread = {"kind": "spread"}  # for which measure() gives the compound score
    compound = np.array([[measure(spread, {}, text) for text in texts[i]] for i in kept])
    apart = np.abs(compound[:, 0] - compound[:, 1]) > 0.1
    agree = (compound[:, 0] > compound[:, 1]) == (gaps > 0)
    preferred = compound[np.arange(len(kept)), (gaps <= 0).astype(int)]
    lexicon = np.array([[LEXICON.score(text) for text in texts[i]] for i in kept])
    afinn = np.sign(lexicon[:, 0] - lexicon[:, 1]) == np.sign(compound[:, 0] - compound[:, 1])
    means = {"agree": agree[apart], "afinn agree": afinn[apart], "won": gaps > 0}
    for name, scores in zip(("revisions", "drafts"), compound.T, strict=True):
        means[f"{name} positive"] = scores >= 0.05
    means["preferred positive"] = preferred >= 0.05
    words = np.array([[len(text.split()) for text in texts[i]] for i in kept])
    means |= {"revision words": words[:, 0], "draft words": words[:, 1]}
    return {"pairs": len(kept)} | {name: round(float(np.mean(v)), 3) for name, v in means.items()}


def facts_of_declined(rows):
    """Of scored pairs of safety: of harmful and of harmless requests, what share of the drafts and of
    the revisions declines, and of how many the reward prefers the draft. agree: of the pairs of which
    one answer alone declines, in what share the reward prefers that one if the request is harmful,
    and the other if it is harmless."""
    metric = load_task("safety")["metric"]
    gaps = np.array([row["score_chosen"] - row["score_rejected"] for row in rows])
    harmless = np.array([bool(row.get("control")) for row in rows])
    declines = [[measure(metric, row, text_of(row[side])) for side in SIDES] for row in rows]
    revision, draft = np.array(declines).T
    apart = revision != draft
    agree = ((revision > draft) != harmless) == (gaps > 0)
    facts = {"pairs": len(rows), "one declines": int(apart.sum()), "agree": agree[apart].mean()}
    for name, mine in (("harmful", ~harmless), ("harmless", harmless)):
        facts |= {name: int(mine.sum()), f"{name} drafts decline": draft[mine].mean()}
        facts[f"{name} revisions decline"] = revision[mine].mean()
        facts[f"{name} draft preferred"] = int((gaps[mine] < 0).sum())
    return {k: v if isinstance(v, int) else round(float(v), 3) for k, v in facts.items()}


FACTS = {"sentiment": facts_of_pairs, "safety": facts_of_declined}


def exchange(row, one, other):
    row[one], row[other] = row[other], row[one]


def write(path, rows):
    path.with_suffix(".part").write_bytes(lines_of(rows))
    os.replace(path.with_suffix(".part"), path)


def whole(line):
    """The metric of each group of one prompt, 0 where the answer was cut off."""
    both = zip(line["values"]["metric"], line["values"]["cut"], strict=True)
    return [None if value is None else value * (1 - cut) for value, cut in both]


def shares_of_trials(lines):
    """{method: {number of the settings: share of positive answers}} of the trials in the lines; of
    methods named -alone the share of those that end."""
    shares = {method: {} for method in METHODS}
    trials = [line for line in lines if line["trial"] is not None]
    for line in sorted(trials, key=lambda line: line["trial"]):
        method = line["method"]
        values = whole(line) if method.endswith("-alone") else line["values"]["metric"]
        shares[method][line["trial"]] = mean(values)
    return shares


def next_trial(method, shares):
    """The number of the settings to be tried next, None after the last."""
    shares = shares[method]
    for i in range(len(settings_of(method))):
        if i not in shares:
            return i if i < ALWAYS or max(shares, key=shares.get) == i - 1 else None
    return None


def best_settings(run, shares):
    """(learning rate, beta) of a run, by the rule of this file's beginning; None where a trial is
    missing, or the run a trial that is not wanted."""
    method, number = run.method, run.trial
    if number is None:
        if next_trial(method, shares) is not None:
            return None
        number = max(shares[method], key=shares[method].get)
    elif number >= ALWAYS and number != next_trial(method, shares):
        return None
    lr, beta = settings_of(method)[number]
    return lr / 2 if run.start == "dsc" else lr, beta


def settings_in(line):
    """(learning rate, beta) of a line."""
    return line["lr"], None if line["method"] in IMITATION else line["beta"]


def measures(task, run, answers, rows):
    """The measures of each group of test prompts, and three answers. rows: {id: row} of those."""
    kind, answers = load_task(task)["metric"]["kind"], [dict(row) for row in answers]
    clean = not (run.flips or run.swaps or run.trial is not None)
    for row in answers if task == "sentiment" else ():
        row["afinn"] = float(LEXICON.score(row["answer"]) > 0)
    if task == "sentiment" and clean:
        spoken = [row for row in answers if row["answer"]]
        for row, score in zip(spoken, other_words(spoken, rows), strict=True):
            row["other"] = score.value
    names = "score words repeats base_logp cut afinn other".split()
    if run.trial is not None:  # the first model that eval.py had is the student itself
        names.remove("base_logp")
    values = {name: by_group([{name: None} | row for row in answers], name) for name in names}
    both = ([row for row in answers if row["control"] == c] for c in (False, True))
    values["metric"], values["control"] = (by_group(mine, "metric", kind) for mine in both)
    values["reward"] = values.pop("score")
    groups = sorted({row["group"] for row in rows.values()})
    table = {
        n: [round(v[g], 3) if g in v else None for g in groups] for n, v in values.items() if v
    }
    samples = {row["prompt_id"]: row["answer"] for row in answers[:3]} if clean else {}
    return {"groups": groups, "values": table, "samples": samples}


@functools.cache
def judge_of_other_words():
    model, tokenizer = load_model("smollm2", *pick_device())
    use_packed_attention(model)
    more = {"tokenizer": tokenizer, "table": OTHER_WORDS}
    return functools.partial(contrast_reward, model=model, **more)


def other_words(answers, rows):
    """Scores of answers by the principle in other words."""
    texts = [row["answer"] for row in answers]
    return judge_of_other_words()([rows[row["prompt_id"]] for row in answers], texts)


def mean(values):
    """The mean of those that are there."""
    return float(np.mean([value for value in values if value is not None]))


def lines_of_study(task):
    """All lines of a task."""
    files = sorted((ROOT / f"results/study/{task}").glob("*.jsonl"))
    return [line for file in files for line in read_lines(file)]


def read_lines(path):
    """The lines of a file, or none; one that is still being written is left out."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def make_next(runs, cells):
    """Makes the first of the runs that is missing, that is wanted and that no other process makes:
    True. None if others make what is left, False if nothing is."""
    shares = shares_of_trials(lines_of_study("sentiment"))
    made, result = {key: cell.made() for key, cell in cells.items()}, False
    for run in runs:
        key, start = (run.kind, run.seed), Run(run.kind, "dsc", run.seed)
        ready = run.method in UNTRAINED or best_settings(run, shares)
        ready = ready and (run.start == "base" or start.name in made[key])
        if run.name in made[key] or not ready:
            continue
        result = None
        if cells[key].prepare():
            with claim(cells[key].folder / f"{run.name}.claim") as mine:
                if mine and run.name not in cells[key].made():  # another may have been faster
                    cells[key].make(run, shares)
                    return True
    return result


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--task", default="sentiment")
    parser.add_argument("--seeds", nargs="+", type=int, default=[20, 21, 22])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--only", nargs="+", metavar="RUN", help="names of runs")
    args = parser.parse_args()
    os.chdir(ROOT)
    runs = [run for run in plan_of(args.task, args.seeds) if run.kind in args.kinds]
    runs = [run for run in runs if run.seed in args.seeds or run.trial is not None]
    if unknown := set(args.only or []) - {run.name for run in runs}:
        raise BadInput(f"--only: there is no run {', '.join(sorted(unknown))}")
    runs = [run for run in runs if run.name in (args.only or [run.name])]
    cells = {(run.kind, run.seed): None for run in runs}
    cells = {key: Cell(args.task, *key) for key in cells}
    shares = shares_of_trials(lines_of_study("sentiment"))
    made = {key: cell.made() for key, cell in cells.items()}
    for run in runs:
        cell, line = cells[run.kind, run.seed], made[run.kind, run.seed].get(run.name)
        if line and run.method in METHODS and run.trial is None:
            if best_settings(run, shares) not in (None, settings_in(line)):
                reason = f"{run.name} has other settings than the trials say now"
                raise BadInput(f"{cell.path}: {reason}; make it anew, see --help")
    while (done := make_next(runs, cells)) is not False:
        time.sleep(0 if done else 10)
    made = {key: cell.made() for key, cell in cells.items()}
    left = [run for run in runs if run.name not in made[run.kind, run.seed]]
    print(f"{len(left)} runs are left, which wait for trials or are not wanted by them:")
    print(", ".join(f"{run.kind} {run.seed} {run.name}" for run in left))


if __name__ == "__main__":
    run_stage(main)
