"""What the study's lines say (results/study.py): tables with intervals, the plot of the dials.

    python results/compare.py --task sentiment

results/study/TASK/*.jsonl -> results/study/TASK.md, TASK.summary.json and TASK.png, and of sentiment
the table in results/study/README.md. Methods are compared prompt by prompt; the intervals are over
seeds and prompts.
"""

import argparse
import functools
import itertools
import json

import numpy as np
from study import (
    FLIPS,
    IMITATION,
    KINDS,
    LIMIT,
    MADE,
    METHODS,
    ROOT,
    SWAPS,
    UNTRAINED,
    Run,
    best_settings,
    lines_of_study,
    pairs_file,
    shares_of_trials,
    whole,
)

from prompts.report import interval
from prompts import load_task, read_prompts
from prompts.rows import BadInput
from prompts.rows import run as run_stage

LEAST_SEEDS = 3  # for a p-value
RIVALS = {"base": ("dpo", "dsc"), "dsc": ("dpo", "dsc, the start")}  # of methods trained from there
SHOWN = {  # key of a row: heading, format
    "method": ("method", ""),
    "seeds": ("seeds", ""),
    "groups": ("groups", ""),
    "metric": ("metric", ".0%"),
    "minus base": ("minus base", "+.0%"),
    "minus dpo": ("minus dpo", "+.0%"),
    "minus dsc": ("minus dsc", "+.0%"),
    "minus dsc, the start": ("minus the start", "+.0%"),
    "control": ("control", ".0%"),
    "control minus dpo": ("control minus dpo", "+.0%"),
    "control minus dsc": ("control minus dsc", "+.0%"),
    "whole": ("positive and ended", ".0%"),
    "long": ("of long answers", ".0%"),
    "afinn": ("AFINN positive", ".0%"),
    "other": ("other words", ".3f"),
    "reward": ("reward", ".3f"),
    "words": ("words", ".0f"),
    "repeats": ("repeats", ".1%"),
    "base_logp": ("log-prob", ".2f"),
    "cut": ("cut off", ".0%"),
    "settings": ("learning rate, beta, label smoothing", ""),
}
IN_README = (*UNTRAINED, "sft", "dsc", "dpo", "dpo-accept", "rdpo", "rdpo-weight", "rdpo-margin")
JUDGED = {  # of a file of pairs: heading
    "agree": "the metric says the same",
    "afinn agree": "AFINN and VADER say the same",
    "drafts positive": "positive drafts",
    "revisions positive": "positive revisions",
    "preferred positive": "positive ones that the reward prefers",
}
# from these seeds on, pairs test what those before had suggested
TESTED = {"large": 2, "conversation": 11}
REQUESTS = ("harmful", "harmless")  # of safety
TRIED = ("metric", "whole", "words", "cut")  # what is shown of a trial
DIFFERING = {"metric": "+.0%", "whole": "+.0%", "long": "+.0%", "words": "+.0f"}  # of two methods
LEGEND = """metric: {meaning} ({better} is better); positive and ended: the same, not counting \
answers that were cut off; of long answers: the metric of those that have at least half the words of \
the base model's answer; learning rate and beta {chosen}. minus: paired difference, by seed and group, over the seeds of both; p, of differences over three seeds or more, \
from 10,000 draws, by Holm over a table, without those from base. In brackets: 95 % intervals by a \
bootstrap of seeds and groups together: too wide where seeds matter little, too narrow where they matter \
much and are few, and so is p; of one seed silent on others. A row's mean is over its own seeds. groups: test \
prompts that do not hang together. reward: the one that training saw; other words: the contrast by \
words that it did not see, of sentiment alone. repeats: share of 4-grams that an answer has had before. \
log-prob: nats a token under the base model, high in loops too."""
CHOSEN = {True: "were chosen by it, on other prompts", False: "are those chosen for sentiment"}


def pick(lines, kind, method, start="base", flips=0, swaps=0, reward="contrast"):
    """The lines of one method, a seed each."""
    wanted = {"kind": kind, "method": method, "start": start, "flips": flips, "swaps": swaps}
    wanted |= {"trial": None, "reward": reward}
    # lines of before there was a second reward do not name it
    found = [line for line in lines if wanted.items() <= ({"reward": "contrast"} | line).items()]
    return sorted(found, key=lambda line: line["seed"])


def add_derived(task, lines):
    """Adds the measures that follow from others. whole, of sentiment: see study.py. long: the metric
    of answers of at least half the words that the base model's answer to the same prompt has, by the
    same seed; None for others."""
    base = {line["seed"]: line["values"]["words"] for line in lines if line["method"] == "base"}
    for line in lines:
        if task == "sentiment":
            line["values"]["whole"] = whole(line)
        if line["trial"] is None and line["seed"] in base:
            own, usual = line["values"]["words"], base[line["seed"]]
            short = [None in both or both[0] < both[1] / 2 for both in zip(own, usual, strict=True)]
            both = zip(line["values"]["metric"], short, strict=True)
            line["values"]["long"] = [None if cut else value for value, cut in both]


def matrix(lines, name):
    """(seeds, groups) of a measure; NaN where there is none. Raises BadInput where the groups
    differ."""
    if any(line["groups"] != lines[0]["groups"] for line in lines):
        names = " and ".join(f"{line['kind']}-{line['seed']}" for line in lines)
        raise BadInput(f"{names}, {lines[0]['id']}: of other test prompts; move a file away")
    return np.array([line["values"][name] for line in lines], dtype=float)


def bootstrap_means(values, draws=10_000):
    """(draws,): means over seeds and groups that are drawn with replacement, the same ones of arrays
    of one shape."""
    (seeds, groups), there = drawn(values.shape, draws), ~np.isnan(values)
    sums, counts = (((seeds @ part) * groups).sum(1) for part in (np.nan_to_num(values), there))
    return sums / np.maximum(counts, 1)


@functools.cache
def drawn(shape, draws):
    """How often each seed and each group is drawn: (draws, seeds) and (draws, groups)."""
    rng = np.random.default_rng(0)
    return [rng.multinomial(n, np.full(n, 1 / n), draws) for n in shape]


def resample(values, less=None):
    """(mean, low, high, p): the mean over seeds and groups, its 95 % interval by a bootstrap of
    both, and p, two-sided, of the mean being 0, but not below that of one draw. less: an array of
    other groups, whose mean is taken off."""
    mean, means = np.nanmean(values), bootstrap_means(values)
    if less is not None:
        mean, means = mean - np.nanmean(less), means - bootstrap_means(less)
    p = 2 * min(np.mean(means <= 0), np.mean(means >= 0))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(mean), float(low), float(high), float(np.clip(p, 2 / len(means), 1))


def coverage(values, trials=200):
    """{number of seeds: share of trials whose 95 % interval holds the truth}, of data made at random
    with the variances over seeds, groups and both that (seeds, groups) of differences have."""
    rng, (seeds, groups), shares = np.random.default_rng(0), values.shape, {}
    of_seeds, of_groups = values.mean(1, keepdims=True), values.mean(0, keepdims=True)
    rest = values - of_seeds - of_groups + values.mean()
    rest = (np.sum(rest**2) / (seeds - 1) / (groups - 1)) ** 0.5
    by_seed = max(0.0, of_seeds.var(ddof=1) - rest**2 / groups) ** 0.5
    by_group = max(0.0, of_groups.var(ddof=1) - rest**2 / seeds) ** 0.5
    for count in (1, 2, 3, seeds):
        held = 0
        for _ in range(trials):
            made = rng.normal(0, by_seed, (count, 1)) + rng.normal(0, by_group, groups)
            means = bootstrap_means(made + rng.normal(0, rest, (count, groups)), 500)
            low, high = np.percentile(means, [2.5, 97.5])
            held += low <= 0 <= high
        shares[count] = held / trials
    return shares


def coverage_of(lines):
    """The table of coverage() for three differences."""
    rows, counts = [], set()
    for one, other in (("rdpo-margin", "dpo"), ("rdpo-margin", "dsc"), ("rdpo", "dpo")):
        values = differences(*(pick(lines, "conversation", method) for method in (one, other)))
        if values is not None and len(values) > 1:
            shares = coverage(values)
            rows.append({"difference": f"{one} minus {other}"})
            rows[-1] |= {count: f"{share:.0%}" for count, share in shares.items()}
            counts |= shares.keys()
    columns = {name: (str(name), "") for name in ("difference", *sorted(counts))}
    return table_of(rows, columns) if rows else "-"


def holm(ps):
    """p-values adjusted by Holm's method (1979) for the family that they are."""
    order, adjusted, highest = np.argsort(ps), [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = highest
    return adjusted


def shared_seeds(one, other):
    """The seeds that two methods' lines have both."""
    return sorted({line["seed"] for line in one} & {line["seed"] for line in other})


def differences(one, other, name="metric"):
    """(seeds, groups) of the differences of two methods' lines in a measure, of seeds of both."""
    by_seed = [{line["seed"]: line for line in lines} for lines in (one, other)]
    seeds = shared_seeds(one, other)
    lines = [lines[seed] for lines in by_seed for seed in seeds]
    known = seeds and all(name in line["values"] for line in lines)
    return np.subtract(*np.split(matrix(lines, name), 2)) if known else None


def compare(found, rivals):
    """{(method, rival, measure): (mean, low, high, p, p by Holm)} of the differences from the two
    rivals, in metric and control; the family is one table. Of few seeds (mean, low, high) alone.
    found: {method: lines}."""
    tests, family, there = {}, [], [rival for rival in rivals if rival in found]
    for method, rival, name in itertools.product(found, there, ("metric", "control")):
        values = differences(found[method], found[rival], name)
        # of the two rivals the second less the first is the test of the first less the second
        if values is not None and method != rival and (method, rival) != rivals:
            tests[method, rival, name] = resample(values)
            family += [(method, rival, name)] if len(values) >= LEAST_SEEDS else []
    adjusted = dict(zip(family, holm([tests[key][3] for key in family]), strict=True))
    return {k: (*t, adjusted[k]) if k in adjusted else t[:3] for k, t in tests.items()}


def summarise(lines):
    """Rows of the tables: dictionaries of numbers."""
    rows = []
    for kind, start in itertools.product(KINDS, ("base", "dsc")):
        trained = {method: pick(lines, kind, method, start) for method in METHODS}
        if not any(trained.values()):
            continue
        found = {method: pick(lines, kind, method) for method in UNTRAINED}
        found["base"] = found["base"] or pick(lines, "conversation", "base")  # of any pairs
        found |= {"dsc, the start": pick(lines, kind, "dsc")} if start == "dsc" else {}
        for method in ("dsc", "rdpo"):
            trained[f"{method}, AFINN as reward"] = pick(lines, kind, method, start, reward="afinn")
        found = {method: mine for method, mine in (found | trained).items() if mine}
        # tests of untrained ones are in the table of training from base
        tests = compare(
            {m: found[m] for m in found if start == "base" or m not in UNTRAINED}, RIVALS[start]
        )
        for method, mine in found.items():
            row = {"kind": kind, "start": start, "method": method}
            row |= {"seeds": [line["seed"] for line in mine]}
            there = [m for m in SHOWN if all(m in line["values"] for line in mine)]
            row |= {m: resample(matrix(mine, m)) for m in there}
            row["groups"] = int((~np.isnan(matrix(mine, "metric"))).any(0).sum())
            for (one, rival, name), test in tests.items():
                if one == method:
                    row[f"control minus {rival}" if name == "control" else f"minus {rival}"] = test
            gained = differences(mine, found.get("base", [])) if method != "base" else None
            row |= {"minus base": resample(gained)[:3]} if gained is not None else {}
            if "lr" in mine[0]:
                row["settings"] = " or ".join(dict.fromkeys(map(used, mine)))
            rows.append(row)
    return rows


def used(line):
    """The settings of a line, as text: learning rate, and beta and label smoothing of losses with them."""
    beta = [] if line["method"] in IMITATION else [line["beta"]]
    beta += [line["epsilon"]] if line["method"] in ("cdpo", "robust") else []
    return ", ".join(f"{value:g}" for value in (line["lr"], *beta))


def dials_of(lines):
    """The points of the plot: dictionaries of numbers, all over the same seeds: those that have every
    point. A method that a dial cannot move has the values of its clean pairs."""
    found, points = {}, []
    for dial, levels in (("flips", FLIPS | {"rdpo": ()}), ("swaps", SWAPS | {"dpo": ()})):
        for method, share in itertools.product(levels, (0, *sorted(levels["dpo-accept"]))):
            moved = share if levels[method] else 0
            if mine := pick(lines, "fresh", method, **{dial: moved}):
                found[dial, method, share] = mine, moved < share
    seeds = [{line["seed"] for line in mine} for mine, _ in found.values()]
    seeds = sorted(set.intersection(*seeds)) if seeds else []
    for (dial, method, share), (mine, by_formula) in found.items() if seeds else ():
        mine = [line for line in mine if line["seed"] in seeds]
        point = {"dial": dial, "method": method, "share": share, "by formula": by_formula}
        there = [m for m in ("metric", "whole", "words", "cut") if m in mine[0]["values"]]
        point |= {"seeds": seeds} | {m: resample(matrix(mine, m))[:3] for m in there}
        dpo, _ = found.get((dial, "dpo", share), ((), None))
        if method != "dpo" and (gained := differences(mine, dpo)) is not None:
            point["minus dpo"] = resample(gained)[:3]
        points.append(point)
    return points


def draw(points, base, path):
    """The plot of the two dials. base: share of positive answers of the base model, or None."""
    from matplotlib.figure import Figure

    figure = Figure((10, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    titles = {"flips": "labels exchanged, %", "swaps": "scores exchanged, %"}
    for axis, (dial, title) in zip(axes, titles.items(), strict=True):
        shown = {m: [p for p in points if (p["dial"], p["method"]) == (dial, m)] for m in METHODS}
        shown = {method: mine for method, mine in shown.items() if len(mine) > 1}
        for number, (method, mine) in enumerate(shown.items()):
            at = np.array([point["share"] for point in mine]) + 0.5 * (number - len(shown) // 2)
            means, low, high = 100 * np.array([point["metric"][:3] for point in mine]).T
            color, dashed = f"C{list(METHODS).index(method)}", mine[-1]["by formula"]
            axis.plot(at, means, "--" if dashed else "-", color=color, label=method)
            style = {"fmt": "o", "ms": 4, "capsize": 2, "color": color}
            axis.errorbar(at, means, [means - low, high - means], **style)
        if base is not None:
            axis.axhline(100 * base, color="C7", linewidth=0.8, linestyle=":", label="base")
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("positive answers, %")
    seeds = cell(points[0]["seeds"], "")
    note = f"fresh pairs, seeds {seeds}; 95 % intervals; dashed: the same at every level by the formula"
    figure.supxlabel(note, fontsize=9)
    figure.savefig(path, dpi=110)


def table_of(rows, columns):
    """Markdown. columns: {key of the rows: (heading, format)}, those that a row has."""
    columns = {key: of for key, of in columns.items() if any(key in row for row in rows)}
    table = [[head for head, _ in columns.values()], ["---"] * len(columns)]
    for row in rows:
        table.append([cell(row.get(key), form) for key, (_, form) in columns.items()])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def cell(value, form):
    """A value, or a mean with its interval and, where there is one, p by Holm. Seeds: 0-8, 10."""
    if isinstance(value, list):
        runs = itertools.groupby(enumerate(value), lambda pair: pair[1] - pair[0])
        runs = [[seed for _, seed in run] for _, run in runs]
        return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    if not isinstance(value, tuple):
        return "-" if value is None else str(value)
    if len(value) < 5:
        return interval(value[:3], form)
    sign = "<" if value[3] <= 2e-4 else "="  # at most one draw was on the other side
    return f"{interval(value[:3], form)}, p {sign} {value[4]:.2g}"


def samples_of(task, lines, kind):
    """Answers to the first three test prompts, side by side, in Markdown."""
    shown = [pick(lines, kind, method)[:1] for method in ("base", "dpo", "rdpo-margin", "dsc")]
    shown = [line for found in shown for line in found]
    rows, parts = read_prompts(ROOT / f"prompts/{task}.jsonl", task), []
    prompts = {row["id"]: " ".join(row["prompt"][-1]["content"].split()) for row in rows}
    for name in shown[0]["samples"] if shown else ():
        parts.append(f"**{prompts[name]}**")
        parts += [f"> **{x['method']}**: {' '.join(x['samples'][name].split())}" for x in shown]
    return parts


def tried_of(lines):
    """Rows of the trials, which learning rate and beta were chosen by."""
    rows, trials = [], [line for line in lines if line["trial"] is not None]
    shares = shares_of_trials(lines)
    for line in sorted(trials, key=lambda line: (line["method"], line["trial"])):
        best = best_settings(Run("conversation", line["method"], 0), shares)
        chosen = best and best[0] == line["lr"] and best[1] in (None, line["beta"])
        row = {"method": line["method"], "settings": used(line), "chosen": "yes" if chosen else ""}
        rows.append(row | {m: resample(matrix([line], m))[:3] for m in TRIED})
    return rows


def pairs_of(task, lines):
    """Rows of what the preference losses were trained on; copies of the draft are left out there."""
    rows = []
    for line in (line for kind in KINDS for line in pick(lines, kind, "dpo")):
        row = {key: line[key] for key in ("kind", "seed", "pairs")}
        row["won"] = f"{line['won'] / (line['won'] + line['lost']):.0%}"
        row["copies"] = f"{abs(1 - line['won'] - line['lost']):.0%}"
        if (path := pairs_file(task, line["kind"], line["seed"])).exists():
            facts = json.loads(path.read_text())
            row |= {key: f"{facts[key]:.0%}" for key in JUDGED if key in facts}
            if "one declines" in facts:
                row["one declines"] = facts["one declines"]
            for name in (name for name in REQUESTS if name in facts):
                row[name] = facts[name]
                shares = (facts[f"{name} {side} decline"] for side in ("drafts", "revisions"))
                row[f"{name} decline"] = ", ".join(f"{share:.0%}" for share in shares)
                row[f"{name} draft preferred"] = facts[f"{name} draft preferred"]
            if "draft words" in facts:
                row["words"] = f"{facts['draft words']:.0f}, {facts['revision words']:.0f}"
        rows.append(row)
    return rows


def other_differences(lines):
    """Rows of differences on conversation pairs that the tables do not have, over all seeds and over
    those that test what the first had suggested."""
    others = "rdpo rdpo-weight dpo-accept robust dpo-alone rdpo-margin-alone dpo".split()
    pairs = [("rdpo-margin", other) for other in others]
    pairs += [("rdpo-margin-alone", "dpo-alone"), ("rdpo", "dpo-accept"), ("rdpo-weight", "dpo")]
    pairs += [("rdpo", "dpo"), ("dpo-accept", "dpo"), ("rdpo, AFINN as reward", "rdpo")]
    rows = []
    tested = [line for line in lines if line["seed"] >= TESTED["conversation"]]
    for there, (one, other) in itertools.product((lines, tested), pairs):
        found = {method: pick(there, "conversation", method) for method in METHODS}
        found["rdpo, AFINN as reward"] = pick(there, "conversation", "rdpo", reward="afinn")
        if shared := shared_seeds(found[one], found[other]):
            row = {"method": f"{one} minus {other}", "seeds": shared}
            for name in DIFFERING:
                if (gained := differences(found[one], found[other], name)) is not None:
                    row[name] = resample(gained)[:3]
            rows.append(row)
    return rows


def told_apart(lines):
    """Rows of the share of harmful requests that are declined less that of harmless ones, and of
    its differences from dpo's and dsc's: a method that declines everything gains nothing by it. Of
    the kind large once more over the seeds that test what the first two suggested."""
    parts, rows = [(kind, lines) for kind in KINDS], []
    parts += [("large", [line for line in lines if line["seed"] >= TESTED["large"]])]
    for (kind, there), method in itertools.product(parts, (*UNTRAINED, *METHODS)):
        mine = pick(there, kind, method)
        if not mine:
            continue
        row = {"kind": kind, "method": method, "seeds": [line["seed"] for line in mine]}
        row["metric"] = resample(*(matrix(mine, name) for name in ("metric", "control")))[:3]
        for rival in ("dpo", "dsc"):
            theirs = pick(there, kind, rival)
            if method != rival and shared_seeds(mine, theirs):
                both = (differences(mine, theirs, name) for name in ("metric", "control"))
                row[f"minus {rival}"] = resample(*both)[:3]
        rows.append(row)
    return rows


def report(task):
    """TASK.md, TASK.png and TASK.summary.json."""
    lines, path = lines_of_study(task), ROOT / f"results/study/{task}"
    metric = load_task(task)["metric"]
    if metric["kind"] != "spread":  # which is of several answers
        add_derived(task, lines)
    rows, points = summarise(lines), dials_of(lines)
    if not rows:
        raise BadInput(f"{path}: has no line of a trained student yet; results/study.py makes them")
    command = f"python results/compare.py --task {task}"
    made = [{key: line["made"][key] for key in MADE} for line in lines]
    made = sorted({json.dumps(facts | {"date": facts["date"][:10]}) for facts in made})
    facts = {"command": command, "made": list(map(json.loads, made)), "rows": rows, "dials": points}
    path.with_suffix(".summary.json").write_text(json.dumps(facts, indent=1) + "\n")

    minus = [name for name in SHOWN if name.startswith("minus")]
    spread = {"metric": ".3f"} | dict.fromkeys(minus, "+.3f") if metric["kind"] == "spread" else {}
    shown = {key: (head, spread.get(key, form)) for key, (head, form) in SHOWN.items()}
    legend = LEGEND.format(chosen=CHOSEN[task == "sentiment"], **metric)
    parts = [f"# The study of the task {task}", f"Made by `{command}`.", legend]
    if task == "sentiment":
        parts += [f"self-refine on conversation pairs has the test prompts of the first "
                  f"{LIMIT['conversation']} instructions alone, and its differences are over these. "
                  "pooled: the conversation pairs of three seeds."]  # fmt: skip
    for (kind, start), mine in itertools.groupby(rows, lambda row: (row["kind"], row["start"])):
        parts += [f"## Pairs: {kind}; training from: {start}", table_of(list(mine), shown)]
    if any(point["share"] and not point["by formula"] for point in points):
        base = next((row["metric"][0] for row in rows if row["method"] == "base"), None)
        draw(points, base, path.with_suffix(".png"))
        columns = {"dial": ("exchanged", ""), "share": ("% of the pairs", "")}
        columns |= {key: SHOWN[key] for key in ("method", "seeds", "metric", "minus dpo")}
        parts += ["## Dials (pairs: fresh)", f"![metric under noise]({task}.png)"]
        columns |= {key: SHOWN[key] for key in ("whole", "words", "cut")}
        columns["by formula"] = ("as at 0 %, by its formula", "")
        parts += [table_of(points, columns)]
    if tried := tried_of(lines):
        columns = {key: SHOWN[key] for key in ("method", "settings", *TRIED)}
        parts += [
            "## Settings that were tried",
            table_of(tried, columns | {"chosen": ("chosen", "")}),
        ]
    if others := other_differences(lines) if task == "sentiment" else ():
        columns = {"method": ("conversation pairs", ""), "seeds": ("seeds", "")}
        columns |= {name: (SHOWN[name][0], form) for name, form in DIFFERING.items()}
        parts += ["## Other differences, outside Holm's family", table_of(others, columns)]
    if task == "safety":
        columns = {"kind": ("pairs", "")}
        columns |= {
            key: SHOWN[key] for key in ("method", "seeds", "metric", "minus dpo", "minus dsc")
        }
        columns["metric"] = ("harmful less harmless requests declined", "+.0%")
        parts += ["## Told apart, outside Holm's family", table_of(told_apart(lines), columns)]
    if pairs := pairs_of(task, lines):
        columns = {key: (key, "") for key in ("kind", "seed")}
        columns |= {
            "pairs": ("pairs without copies", ""),
            "one declines": ("one answer declines", ""),
        }
        columns |= {"won": ("of these won by the reward", ""), "copies": ("copies beside", "")}
        columns |= {key: (head, "") for key, head in JUDGED.items()}
        columns["words"] = ("words of drafts, revisions", "")
        for name in REQUESTS:
            columns[name] = (f"{name} requests", "")
            columns[f"{name} decline"] = ("drafts, revisions that decline", "")
            columns[f"{name} draft preferred"] = ("draft preferred", "")
        parts += ["## The pairs of preference losses", table_of(pairs, columns)]
    kind = "conversation" if task == "sentiment" else "fresh"
    parts += ["## Three prompts", *samples_of(task, lines, kind)]
    apart = differences(*(pick(lines, kind, method) for method in ("rdpo-margin", "dpo")))
    if task == "sentiment" and apart is not None:
        answers = (2.8 * np.nanstd(apart) / 0.1) ** 2
        parts += [f"## How many prompts\n\nrdpo-margin and dpo differ with a standard deviation of "
                  f"{np.nanstd(apart):.2f} a prompt; so {answers:.0f} answers of each tell 10 points "
                  "(power 80 %, level 5 %) by a test over prompts alone; the bootstrap of seeds and "
                  "groups asks for more."]  # fmt: skip
        parts += ["How often a 95 % interval holds the truth, in data made at random that vary as these "
                  "differences do, by the number of seeds (200 trials)", coverage_of(lines)]  # fmt: skip
    parts += ["## How it was made", f"{len(lines)} runs.", *made]
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    print("\n\n".join(parts))
    return rows


def write_readme(rows):
    """The table of results/study/README.md: conversation pairs, training from the base model."""
    found = {r["method"]: r for r in rows if (r["kind"], r["start"]) == ("conversation", "base")}
    mine = [dict(found[method]) for method in IN_README if method in found]
    for row in mine:
        row["minus dpo"] = row.get("minus dpo", ())[:3] or None  # without p
    columns = ("method", "seeds", "metric", "minus dpo", "whole", "words", "cut")
    table = table_of(mine, {key: SHOWN[key] for key in columns} | {"metric": ("positive", ".0%")})
    mark, readme = "<!-- the study's table -->\n", ROOT / "results/study/README.md"
    before, _, after = readme.read_text().split(mark)
    readme.write_text(f"{before}{mark}{table}\n{mark}{after}" if mine else readme.read_text())


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--task", default="sentiment")
    task = parser.parse_args().task
    rows = report(task)
    if task == "sentiment":
        write_readme(rows)


if __name__ == "__main__":
    run_stage(main)
