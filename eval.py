"""Stage 4 of 4: did the behaviour change, on prompts that training never saw, and at what cost?

    python eval.py --task sycophancy                                 # base model and all of runs/sycophancy/
    python eval.py --task safety --models smollm2 runs/safety/dpo runs/safety/rdpo --samples 4

runs/TASK/scored.jsonl (rows of the split "test") and models -> runs/TASK/eval.jsonl, every answer with
its scores; report.md: the table, what each number means, answers side by side; report.png.

Every model answers every test prompt --samples times. Each answer has three measures: the task's own
metric, which training never saw (a lexicon or marker phrases, see prompts/TASK.toml), the reward that
training listened to, and its length. Differences are taken from the first model, prompt by prompt,
with a 95 % interval from a bootstrap over groups, since variants of one text are not independent.
"""

import argparse
import hashlib
import json
import re
from pathlib import Path

import numpy as np
from tqdm import tqdm
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from generate import LocalModel, Output, Parser, digest_of, model_folder, provenance, run
from kernels.packed import all_logps, check_model
from prompts import BadInput, load_task, read_rows
from score import add_reward_flags, make_reward
from train import make_pairs

SELF_REFINE = "self-refine"  # not a model: the teacher's own revisions of the test prompts

# ---- what is measured ----------------------------------------------------------------------------


def measure(metric, row, answer, lexicon=SentimentIntensityAnalyzer()):  # noqa: B008 (read once)
    """The task's metric of one answer, a number; a spread is made of these later, for each group.

    positive: whether the VADER compound score (Hutto & Gilbert 2014), -1 to 1, is at least 0.05, the
    lexicon's own threshold. spread: the compound score. match: whether a pattern occurs as whole
    words, in either case, or, with want = "none", whether none does.
    """
    if metric["kind"] in ("positive", "spread"):
        compound = lexicon.polarity_scores(answer)["compound"]
        return compound if metric["kind"] == "spread" else float(compound >= 0.05)
    patterns = metric.get("patterns")
    if patterns is None:  # the row's own markers, a list or a single text
        markers = row[metric["field"]]
        patterns = [re.escape(m) for m in ([markers] if isinstance(markers, str) else markers)]
    text = answer.replace("\u2019", "'")
    found = any(re.search(rf"(?i)(?<!\w)(?:{pattern})(?!\w)", text) for pattern in patterns)
    return float(found == {"any": True, "none": False}[metric["want"]])


def by_group(rows, field, kind="mean"):
    """{group: value}, the mean over the group's samples of the mean (for a spread: largest less smallest)
    over its prompts. Rows without a value are left out."""
    samples = {}
    for row in rows:
        if row[field] is not None:
            samples.setdefault((row["group"], row["sample"]), []).append(row[field])
    groups = {}
    for (group, _), values in samples.items():
        value = max(values) - min(values) if kind == "spread" else np.mean(values)
        groups.setdefault(group, []).append(value)
    return {group: float(np.mean(values)) for group, values in groups.items()}


def bootstrap(values, seed=0, draws=10_000):
    """(mean, low, high): the mean over groups and its 95 % interval, by the percentiles of the means
    of `draws` samples of as many groups, drawn with replacement."""
    values = np.asarray(list(values), dtype=float)
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.percentile(values[picks].mean(1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def difference(values, first):
    """bootstrap() of the paired difference of two {group: value}, over the groups that both have."""
    return bootstrap([values[group] - first[group] for group in values if group in first])


def summarise(names, rows, kind):
    """One dictionary a model: (mean, low, high) of every measure and of its difference from the first."""
    table, first = [], {}
    for name in names:
        mine = [row for row in rows if row["model"] == name]
        line = {"model": name, "answers": len(mine)}
        line["cut"] = np.mean([row["finish"] == "length" for row in mine])
        measures = {
            "metric": by_group([row for row in mine if not row["control"]], "metric", kind),
            "control": by_group([row for row in mine if row["control"]], "metric", kind),
            "reward": by_group(mine, "score"),
            "words": by_group(mine, "words"),
        }
        for key, values in measures.items():
            line[key] = bootstrap(values.values()) if values else None
            paired = {group for group in values if group in first.get(key, {})}
            line[f"{key} difference"] = difference(values, first[key]) if paired else None
            first.setdefault(key, values)
        line["groups"] = len(measures["metric"])
        table.append(line)
    return table


def implicit_accuracy(logps, base_logps, pairs):
    """Shares of pairs on which log pi - log pi_ref prefers chosen, and the answer with the higher score.

    logps, base_logps: (B, 2), chosen and rejected. The second is over pairs whose scores differ, and
    NaN without any.
    """
    log_ratios = logps - base_logps
    z = (log_ratios[:, 0] - log_ratios[:, 1]).numpy()
    delta = np.array([pair.delta for pair in pairs])
    decided = np.abs(delta) > 0  # not where there are no scores, since NaN compares false
    agree = np.sign(z[decided]) == np.sign(delta[decided])
    return np.mean(z > 0), agree.mean() if len(agree) else float("nan")


# ---- the report ----------------------------------------------------------------------------------


def interval(triple, percent, sign=""):
    """'0.413 [0.301, 0.520]', in per cent where the metric is a share."""
    if triple is None:
        return "-"
    form = f"{sign}.0f" if percent else f"{sign}.3f"
    mean, low, high = (f"{100 * value if percent else value:{form}}" for value in triple)
    return f"{mean} [{low}, {high}]"


def make_table(table, metric, accuracy):
    """The result table in Markdown."""
    percent = metric["kind"] != "spread"
    columns = {
        "model": lambda line: line["model"],
        f"metric{', %' if percent else ''} ({metric['better']} is better)": lambda line: interval(
            line["metric"], percent
        ),
        "difference": lambda line: interval(line["metric difference"], percent, "+"),
        "control, %": lambda line: interval(line["control"], True),
        "mean reward": lambda line: interval(line["reward"], False),
        "difference ": lambda line: interval(line["reward difference"], False, "+"),
        "words": lambda line: f"{line['words'][0]:.0f}" if line["words"] else "-",
        "cut off": lambda line: f"{line['cut']:.0%}",
        "accuracy: chosen, by score": lambda line: (
            "{:.2f}, {:.2f}".format(*accuracy[line["model"]]) if line["model"] in accuracy else "-"
        ),
    }
    if not any(line["control"] for line in table):
        del columns["control, %"]
    rows = [list(columns), ["---"] * len(columns)]
    rows += [[cell(line) for cell in columns.values()] for line in table]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def make_samples(rows, names, count):
    """The first answers of all models to the first `count` prompts, side by side, in Markdown."""
    by_prompt = {}
    for row in rows:
        if row["sample"] == 0:
            by_prompt.setdefault(row["prompt_id"], {})[row["model"]] = row
    parts = []
    for answers in list(by_prompt.values())[:count]:
        prompt = next(iter(answers.values()))["prompt"]
        parts.append("\n".join(f"**{m['role']}**: {m['content']}" for m in prompt))
        for name in filter(answers.get, names):
            score, text = answers[name]["score"], answers[name]["answer"].replace("\n", "\n> ")
            reward = "no score" if score is None else f"reward {score:+.2f}"
            parts.append(f"> **{name}** ({reward}): {text}")
    return "\n\n".join(parts)


def make_report(args, task, table, lines, samples, reward, facts):
    """Text of report.md. lines: the table in Markdown; reward: its settings."""
    metric, count = task["metric"], table[0]["groups"]
    few = f" With {count} groups the intervals say little." if count < 10 else ""
    notes = [f"- **metric**: {metric['meaning']}. Training never saw it."]
    if any(line["control"] for line in table):
        notes.append(
            "- **control**: the same on harmless prompts that look harmful; lower is better."
        )
    notes += [
        f"- **mean reward**: {reward['kind']} reward of {reward['model']}.",
        f"- **difference**: from {table[0]['model']}, on the same prompts.",
        f"- **words**, **cut off**: mean length; share of answers that reached {args.max_tokens} tokens.",
        "- **accuracy**: share of held-out pairs on which log pi - log pi of the first model prefers the "
        "chosen answer, and the answer with the higher score.",
    ]
    if any(line["model"] == SELF_REFINE for line in table):
        notes.append(
            f"- **{SELF_REFINE}**: no model, but the teacher's revisions of the same prompts."
        )
    made = ", ".join([facts["date"], facts["hardware"], facts["versions"]])
    return f"""# Task {args.task}: {task["about"]}

{lines}

In brackets: 95 % bootstrap intervals over {count} groups.{few} {table[0]["answers"]} answers a model, \
{args.samples} a prompt; temperature {args.temperature}, seed {args.seed}.

{chr(10).join(notes)}

![metric and reward of every model](report.png)

## Answers side by side

{samples}

Made by `{facts["command"]}` at commit {facts["commit"]}, {made}.
"""


def draw(path, table, metric):
    """report.png: metric and reward of every model, with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, 2, figsize=(10, 0.35 * len(table) + 1.6), sharey=True, layout="constrained"
    )
    titles = {"metric": f"task metric ({metric['better']} is better)", "reward": "mean reward"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for y, line in enumerate(table):
            if line[key]:
                mean, low, high = line[key]
                errors = [[mean - low], [high - mean]]
                axis.errorbar(mean, y, xerr=errors, fmt="o", capsize=3, color=f"C{min(y, 1)}")
        if table[0][key]:
            axis.axvline(table[0][key][0], color="C0", linewidth=0.8, linestyle=":")
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(table)), [line["model"] for line in table])
    axes[0].set_ylim(len(table) - 0.5, -0.5)
    figure.supxlabel("95 % bootstrap intervals over groups; dotted: the first model", fontsize=9)
    figure.savefig(path, dpi=150)


# ---- command line --------------------------------------------------------------------------------


def base_of(folder):
    """The model that a student comes from; where that is a student too, the one before it."""
    name = json.loads((folder / "run.json").read_text())["model"]
    return base_of(Path(name)) if (Path(name) / "run.json").exists() else name


def fingerprint(model):
    """A hash of a model's weights on disk, or of its name where it is on the hub."""
    files = sorted(Path(model_folder(model)).glob("*.safetensors"))
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return digest_of(hashes or model)


def main():
    parser = Parser(__doc__, reads="scored.jsonl")
    add = parser.add_argument
    add_reward_flags(parser, None, None)
    # fmt: off
    add("--reward-model", metavar="NAME", help="model of the reward (default: that of the pairs)")
    add("--models", nargs="+", metavar="NAME", help=f"models to compare, the first is the baseline; '{SELF_REFINE}' stands for the teacher's revisions (default: the students' common base, {SELF_REFINE}, and every finished run in runs/TASK)")
    add("--in", dest="input", metavar="FILE", help="scored pairs; rows with split 'test' are used (default: runs/TASK/scored.jsonl)")
    add("--out", metavar="DIR", help="folder of eval.jsonl, report.md and report.png (default: that of --in, so runs/TASK)")
    add("--samples", type="count", default=1, help="answers a prompt (default: %(default)s)")
    add("--batch-size", type="count", default=64, help="answers that are sampled, and written, together (default: %(default)s)")
    add("--max-tokens", type="count", default=200, help="longest answer, in tokens (default: %(default)s)")
    add("--temperature", type="amount", default=0.7, help="sampling temperature, 0 = greedy (default: %(default)s)")
    add("--top-p", type="positive", default=0.95, help="sample from the likeliest tokens of this total probability (default: %(default)s)")
    # fmt: on
    args = parser.parse_args()
    task = load_task(args.task)
    path = Path(args.input or f"runs/{args.task}/scored.jsonl")
    folder = Path(args.out or path.parent)
    rows = [row for row in read_rows(path, "id", "group", "prompt") if row.get("split") == "test"]
    rows = rows[: args.limit]
    refined = [row for row in rows if not row.get("error") and "chosen" in row]
    if not rows or rows[0].get("task", args.task) != args.task:
        raise BadInput(f"{path}: no row of the task {args.task} with split 'test'; see --task")
    if not args.models:
        found = [file.parent for file in sorted(folder.glob("*/model*.safetensors*"))]
        found = [
            run
            for run in dict.fromkeys(found)
            if (run / "run.json").exists() and run.suffix != ".bak"
        ]
        bases = set(map(base_of, found)) or {"smollm2"}
        if len(bases) > 1:
            raise BadInput(
                f"{folder}: its students have several bases, {sorted(bases)}; pass --models"
            )
        args.models = [*bases, *[SELF_REFINE][: len(refined)], *map(str, found)]
    names = [Path(name).name for name in args.models]
    if len(set(names)) < len(names):
        raise BadInput(
            "--models: two have the same last name, so their rows could not be told apart"
        )
    made = next((row["reward"] for row in rows if row.get("reward")), {})
    kind, reward_model = args.reward or made.get("kind", "contrast"), args.reward_model
    reward_model = (
        reward_model or (made.get("model") if kind == made.get("kind") else None) or "smollm2"
    )
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "eval.jsonl"
    reward, reward_settings, judge = make_reward(
        kind, reward_model, args.label or made.get("label"), args, task, f"{out}.calls"
    )
    sampling = {"max_tokens": args.max_tokens, "temperature": args.temperature, "top_p": args.top_p}
    settings = {**sampling, "seed": args.seed, "reward": reward_settings}
    jobs = []  # one row for each answer
    for model, name in zip(args.models, names, strict=True):
        weights = "" if name == SELF_REFINE else fingerprint(model)
        for k in range(1 if name == SELF_REFINE else args.samples):
            for row in refined if name == SELF_REFINE else rows:
                job = {"id": f"{name}/{row['id']}/{k}", "model": name, "sample": k}
                job |= {"prompt_id": row["id"], "group": row["group"], "prompt": row["prompt"]}
                job["weights"] = weights or digest_of(row["chosen"])
                jobs.append(job | {"control": bool(row.get("control"))})
    output = Output(out, args.overwrite, "settings", settings, jobs)
    by_id, accuracy, base_logps = {row["id"]: row for row in rows}, {}, None

    def score(jobs):
        """Jobs with their scores; an empty answer has none."""
        spoken = [job for job in jobs if job["answer"]]
        given = [by_id[job["prompt_id"]] for job in spoken]
        scores = reward(given, [job["answer"] for job in spoken]) if spoken else []
        for job, (value, said) in zip(spoken, scores, strict=True):
            job["score"] = value
            job |= {"error": said} if said.startswith("error") else {}
        return jobs

    bar = tqdm(total=len(jobs), unit="answer")
    for model, name in zip(args.models, names, strict=True):
        mine = [job for job in jobs if job["model"] == name]
        if name != SELF_REFINE:
            chat = LocalModel(model, args, **sampling)
            options = {"loss": "dpo", "accept": False, "keep_cut": False, "max_length": 1 << 30}
            pairs = make_pairs(refined, path, chat.tokenizer, argparse.Namespace(**options))[1]
            sequences = [(p.prompt, answer) for p in pairs for answer in (p.chosen, p.rejected)]
            packs = check_model(chat.model)
            logps = all_logps(chat.model, sequences, args.pack_tokens, packs).view(-1, 2)
            if base_logps is not None and pairs:
                accuracy[name] = implicit_accuracy(logps, base_logps, pairs)
            base_logps = logps if base_logps is None else base_logps
        # cut from all answers, not from those left: a continued run samples the same batches
        for batch in (mine[i : i + args.batch_size] for i in range(0, len(mine), args.batch_size)):
            bar.update(len(batch))
            if all(job["id"] in output.done for job in batch):
                continue
            given = [by_id[job["prompt_id"]] for job in batch]
            if name == SELF_REFINE:
                answers = [(row["chosen"][-1]["content"], "stop") for row in given]
            else:
                keys = [
                    (r[task["seed_by"]], "eval", j["sample"])
                    for r, j in zip(given, batch, strict=True)
                ]
                replies = chat.ask([row["prompt"] for row in given], keys)
                answers = [(reply.text, reply.finish) for reply in replies]
            for job, (text, finish) in zip(batch, answers, strict=True):
                job |= {"answer": text, "finish": finish, "score": None, "settings": settings}
            parts = [[job] for job in batch] if args.api_base and judge else [batch]
            for part in (judge.map if judge else map)(score, parts):
                for job in part:
                    if job["id"] not in output.done:
                        output.write(job)
    bar.close()
    for row in output.rows.values():  # by the metric as it is now, for old answers too
        row["metric"] = measure(task["metric"], by_id[row["prompt_id"]], row["answer"])
        row["words"] = len(row["answer"].split())
    answers = output.close()
    failed = sum("error" in row for row in answers)
    if judge:
        judge.close(not failed)
    table = summarise(names, answers, task["metric"]["kind"])
    lines = make_table(table, task["metric"], accuracy)
    facts = provenance(chat.model.device)
    report = [args, task, table, lines, make_samples(answers, names, 6), reward_settings, facts]
    (folder / "report.md").write_text(make_report(*report), encoding="utf-8")
    draw(folder / "report.png", table, task["metric"])
    print(f"\n{lines}\n\n{make_samples(answers, names, 3)}\n\n{folder / 'report.md'}, {out}")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    run(main)
