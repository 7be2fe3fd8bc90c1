"""What the study's lines say (results/study.py): tables with intervals, the plot of the dials.

    python results/compare.py --task sentiment

results/study/TASK/*.jsonl -> results/study/TASK.md, TASK.summary.json and TASK.png, and of sentiment
the table in README.md. Methods are compared prompt by prompt; the intervals are over seeds and prompts.
"""

import argparse
import itertools
import json

import numpy as np
from study import (
    FLIPS,
    IMITATION,
    LIMIT,
    MADE,
    METHODS,
    ROOT,
    SWAPS,
    UNTRAINED,
    BadInput,
    lines_of_study,
    load_task,
    read_prompts,
    run_stage,
)

from eval import interval

RIVALS = ("dpo", "dsc")
SHOWN = {  # key of a row: heading, format
    "method": ("method", ""),
    "seeds": ("seeds", ""),
    "films": ("groups", ""),
    "metric": ("metric", ".0%"),
    "minus base": ("minus base", "+.0%"),
    "minus dpo": ("minus dpo", "+.0%"),
    "minus dsc": ("minus dsc", "+.0%"),
    "control": ("control", ".0%"),
    "afinn": ("AFINN positive", ".0%"),
    "other": ("other words", ".3f"),
    "reward": ("reward", ".3f"),
    "words": ("words", ".0f"),
    "repeats": ("repeats", ".1%"),
    "base_logp": ("log-prob", ".2f"),
    "cut": ("cut off", ".0%"),
    "settings": ("learning rate, beta", ""),
}
LEGEND = """metric: {meaning} ({better} is better). minus: paired difference, by seed and group; p by \
Holm over all differences from dpo and dsc of its table, of 10,000 draws. In brackets: 95 % intervals \
by a bootstrap of seeds and groups together: too wide where seeds matter little, too narrow where they \
matter much, three being few, and of one seed silent on others. other words: the contrast by words \
that no training saw; reward: the one that training saw. repeats: share of 4-grams that an answer has \
had before. log-prob: nats a token under the base model, high in loops too. groups: test prompts that \
do not hang together; self-refine on conversation pairs has those of the first {limit} instructions \
alone, and its differences are over these."""


def pick(lines, kind, method, start="base", flips=0, swaps=0):
    """The lines of one method, a seed each."""
    wanted = {"kind": kind, "method": method, "start": start, "flips": flips, "swaps": swaps}
    wanted["trial"] = None
    found = [line for line in lines if wanted.items() <= line.items()]
    return sorted(found, key=lambda line: line["seed"])


def matrix(lines, name):
    """(seeds, groups) of a measure; NaN where there is none. Raises BadInput where the groups
    differ."""
    if any(line["groups"] != lines[0]["groups"] for line in lines):
        names = " and ".join(f"{line['kind']}-{line['seed']}" for line in lines)
        raise BadInput(f"{names}, {lines[0]['id']}: of other test prompts; move a file away")
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


def differences(one, other):
    """(seeds, groups) of the differences in the metric of two methods' lines, of seeds of both."""
    by_seed = [{line["seed"]: line for line in lines} for lines in (one, other)]
    seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
    lines = [lines[seed] for lines in by_seed for seed in seeds]
    return np.subtract(*np.split(matrix(lines, "metric"), 2)) if seeds else None


def compare(found):
    """{(method, rival): (mean, low, high, p, p by Holm)} of the differences from RIVALS; the family
    is one table. found: {method: lines}."""
    tests = {}
    for pair in itertools.product(found, (rival for rival in RIVALS if rival in found)):
        values = differences(*(found[method] for method in pair))
        # dpo from dsc is the test dsc from dpo
        if values is not None and pair[0] != pair[1] and pair != RIVALS:
            tests[pair] = resample(values)
    adjusted = holm([test[3] for test in tests.values()])
    return {pair: (*tests[pair], p) for pair, p in zip(tests, adjusted, strict=True)}


def summarise(lines):
    """Rows of the tables: dictionaries of numbers."""
    rows = []
    for kind, start in itertools.product(("conversation", "fresh"), ("base", "dsc")):
        trained = {method: pick(lines, kind, method, start) for method in METHODS}
        if not any(trained.values()):
            continue
        found = {method: pick(lines, kind, method) for method in UNTRAINED}
        found |= {"dsc, the start": pick(lines, kind, "dsc")} if start == "dsc" else {}
        found = {method: mine for method, mine in (found | trained).items() if mine}
        tests = compare(found)
        for method, mine in found.items():
            row = {"kind": kind, "start": start, "method": method}
            row |= {"seeds": [line["seed"] for line in mine]}
            row |= {m: resample(matrix(mine, m)) for m in SHOWN if m in mine[0]["values"]}
            row["films"] = int((~np.isnan(matrix(mine, "metric"))).any(0).sum())
            row |= {f"minus {r}": tests[method, r] for r in RIVALS if (method, r) in tests}
            gained = differences(mine, found.get("base", [])) if method != "base" else None
            row |= {"minus base": resample(gained)[:3]} if gained is not None else {}
            if "lr" in mine[0]:
                beta = "" if method in IMITATION else f", {mine[0]['beta']:g}"
                row["settings"] = f"{mine[0]['lr']:g}{beta}"
            rows.append(row)
    return rows


def dials_of(lines):
    """The points of the plot: dictionaries of numbers. A method that a dial cannot move has the
    values of its clean pairs."""
    points = []
    for dial, levels in (("flips", FLIPS | {"rdpo": ()}), ("swaps", SWAPS | {"dpo": ()})):
        for method, share in itertools.product(levels, (0, *sorted(levels["dpo-accept"]))):
            moved = share if levels[method] else 0
            mine = pick(lines, "fresh", method, **{dial: moved})
            dpo = pick(lines, "fresh", "dpo", flips=share if dial == "flips" else 0)
            if mine:
                point = {"dial": dial, "method": method, "share": share}
                point |= {"by formula": moved < share, "seeds": [line["seed"] for line in mine]}
                point |= {"metric": resample(matrix(mine, "metric"))}
                if method != "dpo" and (gained := differences(mine, dpo)) is not None:
                    point["minus dpo"] = resample(gained)[:3]
                points.append(point)
    return points


def draw(points, path):
    """The plot of the two dials."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True, layout="constrained")
    titles = {"flips": "labels exchanged", "swaps": "scores exchanged"}
    for axis, (dial, title) in zip(axes, titles.items(), strict=True):
        for number, method in enumerate(METHODS):
            mine = [p for p in points if (p["dial"], p["method"]) == (dial, method)]
            if len(mine) > 1:
                at = np.array([point["share"] for point in mine]) + 0.3 * number  # side by side
                means, low, high = 100 * np.array([point["metric"][:3] for point in mine]).T
                style = {"fmt": "--" if mine[-1]["by formula"] else "o-", "color": f"C{number}"}
                ends = [means - low, high - means]
                axis.errorbar(at, means, ends, **style, ms=3, capsize=2, label=method)
        axis.set_xlabel(f"{title}, % of the pairs (dashed: the same by the formula)")
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=8)
    axes[0].set_ylabel("positive answers, %")
    figure.savefig(path, dpi=110)


def table_of(rows, columns):
    """Markdown. columns: {key of the rows: (heading, format)}, those that a row has."""
    columns = {key: of for key, of in columns.items() if any(key in row for row in rows)}
    table = [[head for head, _ in columns.values()], ["---"] * len(columns)]
    for row in rows:
        table.append([cell(row.get(key), form) for key, (_, form) in columns.items()])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def cell(value, form):
    """A value, or a mean with its interval and, where there is one, p by Holm."""
    if not isinstance(value, tuple):
        return "-" if value is None else str(value)
    if len(value) < 5:
        return interval(value[:3], form)
    sign = "<" if value[3] <= 1e-4 else "="  # no draw was on the other side
    return f"{interval(value[:3], form)}, p {sign} {value[4]:.2g}"


def samples_of(lines):
    """Answers to the first three test prompts, side by side, in Markdown."""
    shown = [pick(lines, "conversation", method)[:1] for method in ("base", "dpo", "rdpo", "dsc")]
    shown = [line for found in shown for line in found]
    rows, parts = read_prompts(ROOT / "prompts/sentiment.jsonl", "sentiment"), []
    prompts = {row["id"]: row["prompt"][-1]["content"] for row in rows}
    for name in shown[0]["samples"] if shown else ():
        parts.append(f"**{prompts[name]}**")
        parts += [f"> **{x['method']}**: {' '.join(x['samples'][name].split())}" for x in shown]
    return parts


def report(task):
    """TASK.md, TASK.png and TASK.summary.json, and the table of the README."""
    lines, path = lines_of_study(task), ROOT / f"results/study/{task}"
    rows, points, metric = summarise(lines), dials_of(lines), load_task(task)["metric"]
    if not rows:
        raise BadInput(f"{path}: has no line of a trained student yet; results/study.py makes them")
    command = f"python results/compare.py --task {task}"
    made = [{key: line["made"][key] for key in MADE} for line in lines]
    made = sorted({json.dumps(facts | {"date": facts["date"][:10]}) for facts in made})
    facts = {"command": command, "made": list(map(json.loads, made)), "rows": rows, "dials": points}
    path.with_suffix(".summary.json").write_text(json.dumps(facts, indent=1) + "\n")

    spread = {"metric": ".3f"} | {f"minus {name}": "+.3f" for name in ("base", *RIVALS)}
    spread = spread if metric["kind"] == "spread" else {}
    shown = {key: (head, spread.get(key, form)) for key, (head, form) in SHOWN.items()}
    parts = [f"# The study of the task {task}", f"Made by `{command}`."]
    parts += [LEGEND.format(**metric, limit=LIMIT["conversation"])]
    for (kind, start), mine in itertools.groupby(rows, lambda row: (row["kind"], row["start"])):
        parts += [f"## Pairs: {kind}; training from: {start}", table_of(list(mine), shown)]
    if any(point["share"] for point in points):
        draw(points, path.with_suffix(".png"))
        columns = {"dial": ("exchanged", ""), "share": ("% of the pairs", "")}
        columns |= {key: SHOWN[key] for key in ("method", "seeds", "metric", "minus dpo")}
        parts += ["## Dials (pairs: fresh)", f"![metric under noise]({task}.png)"]
        parts += [table_of([point for point in points if not point["by formula"]], columns)]
    if trials := [line for line in lines if line["trial"] is not None]:
        tried = [{k: line[k] for k in ("method", "lr", "beta")} for line in trials]
        for row, line in zip(tried, trials, strict=True):
            row |= {name: resample(matrix([line], name))[:3] for name in ("metric", "words")}
        columns = {key: (key, "") for key in ("method", "lr", "beta")}
        columns |= {key: SHOWN[key] for key in ("metric", "words")}
        parts += ["## Settings that were tried", table_of(tried, columns)]
    parts += ["## The pairs", "Trained on, without copies of drafts; won, lost: by the reward."]
    pairs = [x for kind in LIMIT for x in pick(lines, kind, "dpo")]
    pairs = [x | {"won": f"{x['won']:.0%}", "lost": f"{x['lost']:.0%}"} for x in pairs]
    parts += [table_of(pairs, {key: (key, "") for key in ("kind", "seed", "pairs", "won", "lost")})]
    if task == "sentiment":
        parts += ["## Three prompts", *samples_of(lines)]
        apart = differences(*(pick(lines, "conversation", method) for method in ("rdpo", "dpo")))
        if apart is not None:
            answers = (2.8 * np.nanstd(apart) / 0.1) ** 2
            parts += [f"## How many prompts\n\nrdpo and dpo differ with a standard deviation of "
                      f"{np.nanstd(apart):.2f} a prompt; so {answers:.0f} answers of each tell 10 points "
                      "(power 80 %, level 5 %) where seeds do not matter."]  # fmt: skip
    seconds = sum(line["seconds"] for line in lines if line["threads"] == "1")
    parts += ["## How it was made", f"{len(lines)} runs; those with one thread took "
              f"{seconds / 3600:.1f} core-hours in train.py and eval.py.", *made]  # fmt: skip
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    print("\n\n".join(parts))
    return rows


def write_readme(rows):
    """The README's table: pairs of one conversation, training from the base model."""
    mine = [row for row in rows if (row["kind"], row["start"]) == ("conversation", "base")]
    columns = ("method", "metric", "minus dpo", "minus dsc", "afinn", "words", "repeats", "cut")
    table = table_of(mine, {key: SHOWN[key] for key in columns})
    mark, readme = "<!-- the study's table -->\n", ROOT / "README.md"
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
