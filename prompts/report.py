"""report.md and report.png, which eval.py writes: what it found, in words, numbers and pictures."""

import json
import textwrap
from pathlib import Path

import numpy as np

from prompts import as_messages
from prompts.chat import pick_device
from prompts.rows import provenance, read_rows

SHARES = ("match", "positive")  # kinds of metric that are a share of the answers
SELF_REFINE = "self-refine"  # not a model: the teacher's own revisions of the test prompts


def interval(triple, form):
    """'0.413 [0.301, 0.520]', each number in the format `form`. None: '-'."""
    if not triple:
        return "-"
    mean, low, high = (format(value, form) for value in triple)
    return f"{mean} [{low}, {high}]"


def make_table(table, pairs, metric):
    """What summarise() found, in Markdown, without the columns that no model has."""
    form = ".0%" if metric["kind"] in SHARES else ".3f"
    columns = [
        ("metric", f"metric ({metric['better']} is better)", form),
        ("control", "control (lower is better)", form),
        ("score", "mean reward", ".3f"), ("words", "words", ".0f"), ("repeats", "repeats", ".1%"),
        ("base_logp", f"log-prob under {table[0]['model']}", ".2f"), ("cut", "cut off", ".0%"),
    ]  # fmt: skip
    columns = [column for column in columns if any(line[column[0]] for line in table)]
    rows = [["model", *(heading for _, heading, _ in columns)], ["---"] * (len(columns) + 1)]
    for line in table:
        rows.append([line["model"], *(interval(line[key], form) for key, _, form in columns)])
    lines = [*(f"| {' | '.join(row)} |" for row in rows), ""]
    for name, difference in pairs.items():
        lines.append(f"- difference in metric, {name}: {interval(difference, f'+{form}')}")
    return "\n".join(lines)


def make_verdicts(table, pairs, metric, unequal=False, changed=False):
    """Lines for the top of the report: what is shown of each model beside the first one, and what
    to beware of. unequal: whether --max-tokens differs between the teacher and the models.
    changed: whether the reward's text in the task file was edited after the pairs were scored."""
    first = table[0]
    base, groups = first["model"], len(first["groups"])
    # Without prompts that both answered, nothing is shown.
    others = [line for line in table[1:] if pairs[f"{line['model']} - {base}"]]
    highest = 1 if metric["kind"] in SHARES else {"spread": 2}.get(metric["kind"])
    best = {"lower": 0, "higher": highest}[metric["better"]]
    at_best = first["metric"] is not None and first["metric"][0] == best
    lines = [f"groups of test prompts: {groups}, too few to rely on what follows"] * (groups < 20)
    lines += [f"**{base}**: its metric is the best possible, so no gain can be shown"] * at_best
    text = "the reward's text in the task file has changed since the pairs were scored"
    lines += [text] * changed
    for line in others:
        _, low, high = pairs[f"{line['model']} - {base}"]
        gained = int(low > 0) - int(high < 0)  # 0: the interval contains 0
        gained *= -1 if metric["better"] == "lower" else 1
        is_teacher = line["model"] == SELF_REFINE
        useless = is_teacher and gained < 1 and not at_best
        rise = {}  # of the means
        for key in ("score", "words", "base_logp", "cut"):
            rise[key] = line[key][0] - first[key][0] if line[key] and first[key] else 0
        says = {
            f"its metric is better than that of {base}": gained > 0,
            f"its metric is worse than that of {base}": gained < 0,
            "no change is shown: the interval of the difference contains 0": gained == 0,
            "the revisions are not shown to improve it: mend the task before training": useless,
            "its --max-tokens was another one, so the comparison is unfair": is_teacher and unequal,
            f"the mean reward disagrees: {rise['score']:+.3f}": rise["score"] * gained < 0,
            f"{line['empty']} of its answers are empty": line["empty"] > 0,
            "words are down by a third or more": rise["words"] < -first["words"][0] / 3,
            "words are up by a third or more": rise["words"] > first["words"][0] / 3,
            f"answers cut off are up by {rise['cut']:.0%}": rise["cut"] >= 0.1,
            f"log-prob is down by {-rise['base_logp']:.2f}": rise["base_logp"] <= -0.3,
        }
        texts = [text for text, holds in says.items() if holds]
        lines.append(f"**{line['model']}**: {'; '.join(texts)}")
    return "".join(f"- {line}.\n" for line in lines)


def make_samples(rows, count, kind):
    """First answers of all models to the first `count` prompts, side by side, in Markdown. kind: of
    the metric; a spread is one of a group, so that an answer has its lexicon's score instead."""
    parts, name = [], "lexicon" if kind == "spread" else "metric"
    for prompt_id in [*dict.fromkeys(row["prompt_id"] for row in rows)][:count]:
        answers = [row for row in rows if row["prompt_id"] == prompt_id and row["sample"] == 0]
        parts += [f"**{m['role']}**: {m['content']}" for m in as_messages(answers[0]["prompt"])]
        for row in answers:
            score = "no score" if row["score"] is None else f"reward {row['score']:+.2f}"
            score += f", {name} {row['metric']:.2g}"
            text = row["answer"].replace("\n", "\n> ")
            parts.append(f"> **{row['model']}** ({score}): {text}")
    return "\n\n".join(parts)


def trained_how(models):
    """A line for each model that is a run of train.py: the settings that decide a comparison."""
    lines = []
    for model in models:
        if (file := Path(model, "run.json")).exists():
            record = json.loads(file.read_text())
            names = "loss lr sft_weight beta tau steps batch_size pairs raw_text".split()
            said = ", ".join(f"{name} {record[name]}" for name in names if name in record)
            lines.append(f"- {Path(model).name}: {said}\n")
    return "\n" * bool(lines) + "".join(lines)


def make_report(args, task, compared, table, verdicts, results, answers):
    """Text of report.md. compared: a line on models and settings. verdicts, results: by
    make_verdicts and make_table."""
    made = provenance(pick_device(args.device)[0])
    control = " **control**: the same of harmless prompts." if table[0]["control"] else ""
    teacher = (
        f"no model, but `chosen`: a teacher's revisions, of at most {args.teacher_tokens} tokens"
    )
    teacher = f"- **{SELF_REFINE}**: {teacher}.\n" * (SELF_REFINE in args.models)
    return f"""# Task {args.task}: {task["about"]}

{verdicts}
{compared}
{trained_how(args.models)}
{results}

- **[ ]**: 95 % intervals over groups of prompts ({len(table[0]["groups"])} here), not over training seeds, by bootstrap, or by Wilson's formula where that would reach 0 or 100 % or all groups differ alike. Differences of shares are in points.
- **metric**: {task["metric"]["meaning"]}. Training never saw it.{control}
- **mean reward**: score of the reward named above. **words**: mean length. **repeats**: share of an answer's 4-grams that are repeats. **log-prob**: nats per token, low for broken English, but high for text that repeats itself, so neither end is good. **cut off**: share of answers that reached {args.max_tokens} tokens.
{teacher}
![metric and words of every model, and training curves](report.png)

## Answers side by side

{make_samples(answers, 6, task["metric"]["kind"])}

Made by `python {made["command"]}` at commit {made["commit"]}, {made["date"]}, \
on {made["hardware"]}, torch {made["torch"]}, transformers {made["transformers"]}.
"""


def draw(path, title, table, metric, logs):
    """report.png: bars of all models, curves of `logs`, for each the rows of log.jsonl or []."""
    from matplotlib.figure import Figure  # slow to import, and needed only at the end

    panels = {"metric": "metric", "words": "words", "loss": "loss", "rewards/margins": "margin z"}
    for side in ("chosen", "rejected"):
        panels[f"rewards/{side}"] = f"{side}: beta * log-prob gained"
    forms = {"metric": ".0%" if metric["kind"] in SHARES else ".2f", "words": ".0f"}
    figure = Figure((12, 7 if any(logs) else 4), layout="constrained")
    meaning = f"{metric['meaning']} ({metric['better']} is better)"
    figure.suptitle(textwrap.fill(f"{title}. Metric: {meaning}", 120))
    axes = figure.subplots(2, 3) if any(logs) else figure.subplots(1, 2)
    for axis, (key, heading) in zip(axes.flat, panels.items(), strict=False):
        axis.set_title(heading)
        axis.set_xlabel("" if key in forms else "step (dots: held out)")
        for i, (line, log) in enumerate(zip(table, logs, strict=True)):
            if key in forms:
                mean, *ends = line[key] or (0, 0, 0)  # a model may have no answer
                axis.barh(f"{line['model']}  {mean:{forms[key]}}", mean, color=f"C{i}", alpha=0.6)
                axis.plot(ends, [i, i], "k-|")
                axis.set_ylim(len(table) - 0.5, -0.5)  # the first model on top
            held_out = [row["held_out"] | {"step": row["step"]} for row in log if "held_out" in row]
            for rows, style in ((log, "-"), (held_out, "--o")):
                points = [(row["step"], row[key]) for row in rows if key in row]
                label = line["model"] if style == "-" and points else None
                axis.plot(*np.reshape(points, (-1, 2)).T, style, color=f"C{i}", label=label)
        if key not in forms and not any(line.get_xdata().size for line in axis.lines):
            axis.set_title(f"{heading} (not in these logs)")
        if key == "loss":
            axis.legend()
    if metric["kind"] in SHARES:
        axes.flat[0].set_xlim(0, 1)
        axes.flat[0].xaxis.set_major_formatter("{x:.0%}")
    figure.savefig(path, dpi=150)


def write_report(args, task, table, verdicts, results, answers):
    """Writes report.md and report.png to args.out; those of other models or settings become .bak.
    Arguments are those of make_report."""
    count = len({row["prompt_id"] for row in answers})
    compared = (
        f"Models: {', '.join(args.models)}. Test prompts: {count} of {args.input}, answers to each: "
        f"{args.samples}. Sampling: {json.dumps(answers[0]['settings'])[1:-1]}. "
        f"Reward: {args.reward} of {args.reward_model}."
    )
    report, picture = args.out / "report.md", args.out / "report.png"
    if report.exists() and (args.overwrite or compared not in report.read_text(encoding="utf-8")):
        for file in filter(Path.exists, (report, picture)):
            file.replace(f"{file}.bak")
    text = make_report(args, task, compared, table, verdicts, results, answers)
    report.write_text(text, encoding="utf-8")
    logs = [Path(model, "log.jsonl") for model in args.models]
    logs = [read_rows(log) if log.exists() and log.stat().st_size else [] for log in logs]
    draw(picture, f"Task {args.task}: {count} test prompts", table, task["metric"], logs)
