"""Stage 4 of 4: did the behaviour change, on prompts that training never saw, and at what cost?

    python eval.py --task sycophancy                                        # base model and all of runs/sycophancy/
    python eval.py --task safety --models smollm2 runs/safety/dpo runs/safety/rdpo --samples 4

runs/TASK/scored.jsonl (its rows with split "test") + models -> runs/TASK/eval.jsonl, every answer with its scores;
report.md, the table, what each number means, answers side by side; report.png.

Each model answers each test prompt --samples times. Three things are measured on every answer: the reward that
training listened to; the task's own metric, which training never saw (a lexicon, or phrases, see prompts/TASK.toml);
and its length. Differences are taken from the first model, prompt by prompt, with a 95 % interval from a bootstrap
over groups, because variants of one text are not independent. Chosen and rejected answers of the held-out pairs give
the accuracy of the implicit reward, beta (log pi - log pi_ref).
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
from tqdm import tqdm
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from generate import (
    append,
    batches_of,
    check_sampling,
    check_server,
    check_task,
    digest_of,
    encode,
    fail,
    find_model,
    in_order,
    latest_task,
    load_model,
    load_task,
    open_output,
    parser_of,
    pick_device,
    pick_dtype,
    positive,
    provenance,
    read_jsonl,
    rewrite,
    run_stage,
    sample,
    seed_of,
)
from score import SIDES, Score, add_reward_flags, all_logps, check_model, make_reward, text_of
from train import gaps, make_pairs, weights_digest

SELF_REFINE = "self-refine"  # not a model: the teacher's own revisions of the test prompts, from --in

# ---- ALGORITHM: metrics and intervals -------------------------------------------------------------------------


def positivity(text, analyzer=SentimentIntensityAnalyzer()):  # noqa: B008 (one lexicon, read once)
    """VADER compound score, -1 to 1 (Hutto & Gilbert 2014)."""
    return analyzer.polarity_scores(text)["compound"]


def matches(text, patterns):
    """Whether any pattern occurs in the text: case-insensitive, as whole words, straight apostrophes."""
    text = text.replace("\u2019", "'")
    return any(re.search(rf"(?<!\w)(?:{pattern})(?!\w)", text, re.IGNORECASE) for pattern in patterns)


def measure(metric, row, answer):
    """The task's metric of one answer: a number; `spread` is made of these later, per group."""
    if metric["kind"] == "positive":
        return float(positivity(answer) >= 0.05)
    if metric["kind"] == "spread":
        return positivity(answer)
    patterns = metric.get("patterns") or [re.escape(marker) for marker in row[metric["field"]]]
    return float(matches(answer, patterns) == (metric["want"] == "any"))


def per_group(kind, rows, value=lambda row: row["metric"]):
    """{(group, sample): number} of a model's rows: the mean of value(row), or for the metric kind `spread` the largest
    less the smallest."""
    groups = {}
    for row in rows:
        groups.setdefault((row["group"], row["sample"]), []).append(value(row))
    reduce = (lambda v: max(v) - min(v)) if kind == "spread" else (lambda v: sum(v) / len(v))
    return {key: reduce(values) for key, values in groups.items()}


def group_means(values):
    """{group: mean over its samples} of {(group, sample): value}."""
    groups = {}
    for (group, _), value in values.items():
        groups.setdefault(group, []).append(value)
    return {group: float(np.mean(of_group)) for group, of_group in groups.items()}


def bootstrap(values, seed=0, draws=10_000):
    """(mean, low, high): the mean over groups and its 95 % percentile interval, groups drawn with replacement."""
    values = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.percentile(values[picks].mean(1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def difference(values, baseline):
    """bootstrap() of the paired difference of two {group: value}, over the groups that both have."""
    return bootstrap([values[group] - baseline[group] for group in values if group in baseline])


# ---- answers --------------------------------------------------------------------------------------------------


def answers_of(jobs, args, seed_by, model, tokenizer, bar):
    """(text, finish) for each of a few jobs (row, sample number): sampled, or without a model the teacher's revision."""
    if model is None:
        bar.update(len(jobs))
        return [(text_of(row["chosen"]), row.get("teacher", {}).get("finish", {}).get("revision")) for row, _ in jobs]
    replies = sample(
        model,
        tokenizer,
        [row["prompt"] for row, _ in jobs],
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seeds=[seed_of(args.seed, row[seed_by], "eval", k) for row, k in jobs],
        report=lambda reply: bar.update(),
    )
    return [(reply.text, reply.finish) for reply in replies]


def implicit_accuracy(logps, base_logps, pairs):
    """Share of pairs on which log pi - log pi_ref prefers the chosen answer, and the one with the higher score.

    logps, base_logps: (B, 2), chosen and rejected. The second share is over pairs with scores that are no tie; NaN
    without any.
    """
    ratio = logps - base_logps
    z = ratio[:, 0] - ratio[:, 1]
    delta = gaps(pairs)
    decided = delta.abs() > 0  # NaN, so without scores, is not
    by_score = (z[decided].sign() == delta[decided].sign()).double().mean().item()
    return (z > 0).double().mean().item(), by_score


# ---- report ---------------------------------------------------------------------------------------------------


def summarise(names, rows, metric, accuracy):
    """One dictionary a model, with everything that the table and the plot show. rows: answers, without their text."""
    table, first = [], {}
    for name in names:
        mine = [row for row in rows if row["model"] == name]
        if not mine:
            continue
        real = [row for row in mine if not row.get("control")]
        control = [row for row in mine if row.get("control")]
        scored = [row for row in mine if row["score"] is not None]
        measures = {
            "metric": group_means(per_group(metric["kind"], real)),
            "reward": group_means(per_group("mean", scored, lambda row: row["score"])),
            "words": group_means(per_group("mean", mine, lambda row: row["words"])),
        }
        if control:
            measures["control"] = group_means(per_group(metric["kind"], control))
        line = {"model": name, "answers": len(mine), "groups": len(measures["metric"])}
        line["cut"] = float(np.mean([row["finish"] == "length" for row in mine]))
        for key, values in measures.items():
            line[key] = bootstrap(list(values.values())) if values else None
            first.setdefault(key, values)
            if name != names[0] and values and first[key]:
                line[f"{key}_difference"] = difference(values, first[key])
        line["accuracy"] = accuracy.get(name)
        table.append(line)
    return table


def interval(triple, percent, signed=False):
    """'0.41 [0.30, 0.52]', in per cent where the metric is a share."""
    if triple is None:
        return "-"
    scale, places = (100, 0) if percent else (1, 3)
    mean, low, high = (scale * value for value in triple)
    sign = "+" if signed else ""
    return f"{mean:{sign}.{places}f} [{low:{sign}.{places}f}, {high:{sign}.{places}f}]"


def make_table(table, metric):
    """The result table in Markdown."""
    percent = metric["kind"] != "spread"
    unit = ", %" if percent else ""
    head = ["model", f"metric{unit} ({metric['better']} is better)", "difference from the first", "mean reward"]
    head += ["difference", "words", "cut off", "accuracy: chosen", "accuracy: by score"]
    control = any("control" in line for line in table)
    if control:
        head.insert(3, "control, %")
    lines = [head, ["---"] * len(head)]
    for line in table:
        row = [line["model"], interval(line["metric"], percent), interval(line.get("metric_difference"), percent, True)]
        if control:
            row.append(interval(line.get("control"), True))
        row += [interval(line["reward"], False), interval(line.get("reward_difference"), False, True)]
        row += [f"{line['words'][0]:.0f}", f"{line['cut']:.0%}"]
        row += [f"{value:.2f}" for value in line["accuracy"]] if line["accuracy"] else ["-", "-"]
        lines.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def make_samples(rows, names):
    """Answers of all models to the same prompts, side by side, in Markdown."""
    by_prompt = {}
    for row in rows:
        by_prompt.setdefault(row["id"], {})[row["model"]] = row
    parts = []
    for answers in by_prompt.values():
        if names[0] not in answers:
            continue
        given = answers[names[0]]["prompt"]
        parts.append("\n".join(f"**{m['role']}**: {m['content']}" for m in given))
        for name in names:
            if name in answers:
                row = answers[name]
                score = "no score" if row["score"] is None else f"reward {row['score']:+.2f}"
                parts.append(f"> **{name}** ({score}): " + row["answer"].replace("\n", "\n> "))
        parts.append("---")
    return "\n\n".join(parts)


def make_report(args, task, table, samples, settings, trained_on):
    """Text of report.md. samples: answers side by side, as make_samples writes them."""
    metric = task["metric"]
    facts = provenance(pick_device(args.device))
    alike = all(trained_on.get(key) == value for key, value in settings.items())
    others = f"{trained_on['kind']} of {trained_on['model']}"
    scored = "the one that the pairs were scored with" if alike else f"the pairs were scored with {others}"
    control = "- **control**: the same on harmless prompts that only look harmful; lower is better there.\n"
    control = control if "control" in table[0] else ""
    refine = (
        f"- **{SELF_REFINE}**: not a trained model but the teacher's revisions of the same prompts, three calls each.\n"
    )
    refine = refine if any(line["model"] == SELF_REFINE for line in table) else ""
    few = "" if table[0]["groups"] >= 10 else f" With {table[0]['groups']} groups the intervals say little."
    return f"""# Task {args.task}: {task["about"]}

{make_table(table, metric)}

In brackets: 95 % bootstrap intervals over the {table[0]["groups"]} groups of the test split.{few} \
{table[0]["answers"]} answers a model, {args.samples} a prompt; temperature {args.temperature}, seed {args.seed}.

- **metric**: {metric["meaning"]}. Training never saw it.
{control}- **mean reward**: {settings["kind"]} reward of {settings["model"]}; {scored}.
- **difference**: from {table[0]["model"]} on the same prompts.
- **words**, **cut off**: mean length of an answer; share that reached {args.max_tokens} tokens.
- **accuracy**: share of held-out pairs on which the implicit reward, log pi - log pi of {table[0]["model"]}, prefers the chosen \
answer, and the answer with the higher score; "-" where there is none (pairs that the teacher was cut off in are left out).
{refine}
![report](report.png)

## Answers side by side

{samples}

Made by `{facts["command"]}` at commit {facts["commit"]}, {facts["date"]}, on {facts["hardware"]}, \
torch {facts["torch"]}, transformers {facts["transformers"]}.
"""


def draw(path, table, metric):
    """report.png: metric and reward of every model, with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 0.35 * len(table) + 1.6), sharey=True, layout="constrained")
    titles = {"metric": f"task metric ({metric['better']} is better)", "reward": "mean reward"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for y, line in enumerate(table):
            if line[key] is None:  # no answer of this model has a score
                continue
            mean, low, high = line[key]
            colour = "tab:gray" if y == 0 or line["model"] == SELF_REFINE else "tab:blue"
            axis.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color=colour, capsize=3)
        if table[0][key]:
            axis.axvline(table[0][key][0], color="tab:gray", linewidth=0.8, linestyle=":")
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(table)), [line["model"] for line in table])
    axes[0].set_ylim(len(table) - 0.5, -0.5)
    figure.supxlabel("with 95 % bootstrap intervals over groups; dotted: the first model", fontsize=9)
    figure.savefig(path, dpi=150)


# ---- command line ---------------------------------------------------------------------------------------------


def main():
    parser = parser_of(__doc__, latest_task("scored.jsonl"))
    add_reward_flags(parser.add_argument, "--reward-model", "that of the pairs")
    add = parser.add_argument
    # fmt: off
    add("--models", nargs="+", metavar="NAME", help=f"models to compare, the first is the baseline; '{SELF_REFINE}' stands for the teacher's revisions (default: the students' common base, {SELF_REFINE}, and every finished folder in runs/TASK)")
    add("--in", dest="input", metavar="FILE", help="scored pairs; rows with split 'test' are used (default: runs/TASK/scored.jsonl)")
    add("--out", metavar="DIR", help="folder of eval.jsonl, report.md and report.png (default: that of --in, so runs/TASK)")
    add("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    add("--samples", type=positive, default=1, help="answers a prompt (default: %(default)s)")
    add("--batch-tokens", type=positive, default=49152, help="prompts of like length are answered together up to this many tokens, with their answers; out of memory halves them (default: %(default)s)")
    add("--max-tokens", type=positive, default=200, help="longest answer, in tokens (default: %(default)s)")
    add("--temperature", type=float, default=0.7, help="sampling temperature, 0 = greedy (default: %(default)s)")
    add("--top-p", type=float, default=0.95, help="sample from the likeliest tokens of this total probability (default: %(default)s)")
    # fmt: on
    args = parser.parse_args()
    check_sampling(args)
    check_server(args)

    task = load_task(args.task)
    metric = task["metric"]
    source = Path(args.input or f"runs/{args.task}/scored.jsonl")
    folder = Path(args.out or source.parent)

    def check(number, row):
        check_task(args.task, row, source)
        if row.get("split") == "test" and metric.get("field", "id") not in row:
            reads = f"which the metric of prompts/{args.task}.toml reads"
            fail(f"{source}: row {row['id']} has no '{metric['field']}', {reads}")

    everything = read_jsonl(source, ["id", "group", "prompt"], check).where(lambda row: row.get("split") == "test")
    if not everything:
        fail(f"{source}: no row with split 'test'; nothing to evaluate on")
    rows = everything[: args.limit]
    refined = rows.where(lambda row: "error" not in row and "chosen" in row and "rejected" in row)
    if not args.models:
        found = sorted(
            path.parent for path in folder.glob("*/config.json") if not path.parent.suffix.startswith(".old")
        )
        found = [path for path in found if (path / "run.json").exists()]
        bases = set(map(base_of, found)) or {"smollm2"}
        if len(bases) > 1:
            fail(f"{folder}: its students have different bases ({', '.join(sorted(bases))}); name some with --models")
        args.models = [*bases, *[SELF_REFINE][: len(refined)], *map(str, found)]
    names = [name if name == SELF_REFINE else Path(name).name for name in args.models]
    if len(set(names)) < len(names):
        fail("--models: two of them have the same last name; their rows could not be told apart")

    for path in args.models:  # before the output is touched
        if path != SELF_REFINE:
            find_model(path)
    made = next((row["reward"] for row in rows if row.get("reward")), {"kind": "contrast", "model": "smollm2"})
    if args.reward is None and args.reward_model is None:  # the same as the pairs'
        args.reward, args.reward_model, args.label = made["kind"], made["model"], args.label or made.get("label")
        for flag in ("samples", "temperature", "max_tokens", "logprobs") if made["kind"] == "judge" else ():
            setattr(args, f"judge_{flag.removeprefix('max_')}", made.get(flag))
        if "logprobs" in made and not args.api_base:
            fail(
                f"{source}: scored by the judge {made['model']} on a server; name it with --api-base, or another --reward"
            )
    args.reward, args.reward_model = args.reward or "contrast", args.reward_model or "smollm2"
    out = folder / "eval.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    reward, settings = make_reward(args, task, out)
    how = {"max_tokens": args.max_tokens, "temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    how |= {"samples": args.samples, "reward": settings}
    done, file = open_output(out, args.overwrite, how, lambda row: row.get("settings"), everything, ["prompt"])
    weights_of = {(row["model"], row["id"], row["sample"]): row["weights"] for row in done}
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)

    accuracy, base_logps, unjudged = {}, None, 0
    bar = tqdm(total=len(refined) * (SELF_REFINE in names), unit="answer")
    bar.total += len(rows) * args.samples * sum(name != SELF_REFINE for name in names)
    for path, name in zip(args.models, names, strict=True):
        if name == SELF_REFINE:
            model = tokenizer = None
            mine, jobs = refined, [(i, 0) for i in range(len(refined))]
            costs = [args.max_tokens] * len(mine)
            made_by = {row["id"]: digest_of(row["chosen"]) for row in mine}  # what an answer hangs on
        else:
            model, tokenizer = load_model(path, device, dtype)
            check_model(model, path)
            mine, jobs = rows, [(i, k) for k in range(args.samples) for i in range(len(rows))]
            made_by = dict.fromkeys(rows.ids, weights_digest(model)[:16])
            pairs = held_out_pairs(refined, source, tokenizer)
            sequences = (pair[side] for pair in pairs for side in SIDES)
            logps = all_logps(model, sequences, args.pack_tokens).view(-1, 2)
            if base_logps is None:
                base_logps = logps
            elif pairs:
                accuracy[name] = implicit_accuracy(logps, base_logps, pairs)
            try:
                costs = [len(encode(tokenizer, row["prompt"])[0]) + args.max_tokens for row in mine]
            except ValueError as error:
                fail(f"--models {path}: {error}")
        if any(key[0] == name and was != made_by.get(key[1], was) for key, was in weights_of.items()):
            fail(f"{out}: the answers of {name} came from other weights; pass --overwrite")
        # Batches are cut from all jobs, so that a continued run samples the same ones.
        for places in batches_of([costs[i] for i, _ in jobs], args.batch_tokens):
            keys = [(name, mine.ids[i], k) for i, k in map(jobs.__getitem__, places)]
            if all(key in weights_of for key in keys):
                bar.update(len(keys))
                continue
            batch = [(mine[i], k) for i, k in map(jobs.__getitem__, places)]
            answers = answers_of(batch, args, task["seed_by"], model, tokenizer, bar)
            spoken = [(row, text) for (row, _), (text, _) in zip(batch, answers, strict=True) if text]
            scores = iter(scores_of(reward, spoken))
            for key, (row, k), (text, finish) in zip(keys, batch, answers, strict=True):
                score = next(scores) if text else Score(None)  # an empty answer has no score, never 0
                unjudged += bool(score.fault)
                if key in weights_of or score.fault:
                    continue
                result = {"model": name, "id": row["id"], "sample": k, "group": row["group"], "prompt": row["prompt"]}
                result |= {"control": bool(row.get("control")), "answer": text, "finish": finish}
                result |= {"weights": made_by[row["id"]], "score": score.value, "settings": how}
                append(file, result)
    bar.close()
    file.close()
    if reward.server:
        reward.server.finish(whole=not unjudged)

    if not out.stat().st_size:
        print(f"{out}: none of the {unjudged} answers could be judged; the same command asks again")
        raise SystemExit(1)
    answers = in_order_with_metric(out, names, everything, metric)
    measured, shown, asked, first = [], [], set(rows.ids), rows.ids[:6]
    for row in answers:
        if row["model"] in names and row["id"] in asked:
            shown += [row] if row["id"] in first and row["sample"] == 0 else []
            kept = {k: row[k] for k in ("model", "group", "sample", "control", "finish", "score", "metric")}
            measured.append(kept | {"words": len(row["answer"].split())})
    table = summarise(names, measured, metric, accuracy)
    samples = make_samples(shown, names)
    (folder / "report.md").write_text(make_report(args, task, table, samples, settings, made), encoding="utf-8")
    draw(folder / "report.png", table, metric)
    short = make_samples([row for row in shown if row["id"] in first[:3]], names)
    print(f"\n{make_table(table, metric)}\n\n{short}\n")
    print(f"{out}: every answer\n{folder / 'report.md'}\n{folder / 'report.png'}")
    if unjudged:
        print(f"{unjudged} answers could not be judged; the same command asks again")
        raise SystemExit(1)


def scores_of(reward, spoken):
    """A Score for each (row, answer), in order; where a server is asked, many of them at once."""
    if reward.server:
        return [score for (score,) in in_order(lambda pair: reward([pair[0]], [pair[1]]), spoken, reward.server)]
    rows, answers = zip(*spoken, strict=True) if spoken else ((), ())
    return reward(rows, answers) if spoken else []


def in_order_with_metric(path, names, prompts, metric):
    """Measures every answer of a file by the task's metric as it is now, and puts models, samples and prompts in order."""
    answers, number = read_jsonl(path), {identity: i for i, identity in enumerate(prompts.ids)}
    model = {name: i for i, name in enumerate(names)}
    keys = [(model.get(row["model"], len(names)), row["sample"], number[row["id"]]) for row in answers]

    def measured():
        for i in sorted(range(len(answers)), key=keys.__getitem__):
            row = answers[i]
            yield row | {"metric": measure(metric, prompts[number[row["id"]]], row["answer"])}

    rewrite(path, measured())
    return read_jsonl(path)


def base_of(folder):
    """The model that a student was trained from; where that is a student too, the one that it was trained from."""
    name = json.loads((folder / "run.json").read_text())["model"]
    return base_of(Path(name)) if (Path(name) / "run.json").exists() else name


def held_out_pairs(rows, source, tokenizer):
    """The held-out pairs as train.py would make them, whatever loss is asked for."""
    options = argparse.Namespace(loss="dpo", accept=False, keep_cut=False, max_length=1 << 30)
    return make_pairs(rows, source, tokenizer, options)[1]


if __name__ == "__main__":
    run_stage(main)
