"""Stage 4 of 4: did the behaviour change, on prompts that training never saw, and at what cost?

    python eval.py --task sycophancy                      # the base model and all of runs/sycophancy/
    python eval.py --task safety --models smollm2 runs/safety/dpo runs/safety/rdpo --samples 4

runs/TASK/scored.jsonl (rows of the split "test") and models -> runs/TASK/eval.jsonl, every answer
with its scores; report.md, the table and answers side by side; report.png.

Every model answers every test prompt --samples times. The task's own metric (a lexicon or marker
phrases), which training never saw, stands beside the reward, which training listened to, and beside
what a gain may have cost: length, repetition, and the log-prob under the first model, low for
broken English and high for text that repeats itself. Differences are from the first model,
group by group, with a 95 % interval from a bootstrap over groups, since variants of one text are
not independent.
"""

import json
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from kernels.packed import all_logps, use_packed_attention
from prompts import as_messages, load_task, measure
from prompts.chat import LocalModel, encode, pick_device, repetition
from prompts.rows import (
    BadInput, Rows, make_parser, newest_task, number, provenance, read_rows, run, text_of,
)  # fmt: skip
from score import add_reward_flags, finite, make_reward

SIDE_MEASURES = ("score", "words", "repeats", "base_logp", "cut")
SELF_REFINE = "self-refine"  # not a model: the teacher's own revisions of the test prompts


# ---- what is measured ----------------------------------------------------------------------------
def add_measures(rows, prompts, metric, reward, base):
    """Adds all measures to rows of eval.jsonl; score and base_logp are None for an empty answer.

    prompts: {id: row} of the test prompts. reward: of make_reward.
    base: the first model, a LocalModel, under which base_logp is an answer's log-prob per token.
    """
    for row in rows:
        answer = row["answer"]
        row["metric"] = measure(metric, prompts[row["prompt_id"]], answer)
        row["words"] = len(answer.split())
        row["repeats"] = repetition(answer)
        row["cut"] = float(row["finish"] == "length")
        row["score"] = row["base_logp"] = None

    answered = [row for row in rows if row["answer"]]
    sequences = []
    for row in answered:
        prompt, completion = encode(base.tokenizer, row["prompt"], row["answer"])
        if row["cut"]:
            completion = completion[:-1]  # an answer that was cut off has no end of its turn
        sequences.append((prompt, completion))
    logps = all_logps(base.model, sequences).tolist()
    asked = [prompts[row["prompt_id"]] for row in answered]
    scores = reward(asked, [row["answer"] for row in answered])
    for row, score, logp, (_, completion) in zip(answered, scores, logps, sequences, strict=True):
        row["score"] = finite(score.value)
        row["base_logp"] = logp / len(completion)


def by_group(rows, field, kind="mean"):
    """{group: value}. Of each sample the mean of `field` over the group's prompts, or for the kind
    spread the largest minus the smallest; then the mean over the samples. None is left out; a
    spread, which would be too small without it, loses the whole sample."""
    samples = {}  # (group, sample): values
    for row in rows:
        samples.setdefault((row["group"], row["sample"]), []).append(row[field])

    groups = {}
    for (group, _), values in samples.items():
        known = [value for value in values if value is not None]
        if not known or (kind == "spread" and len(known) < len(values)):
            continue
        value = max(known) - min(known) if kind == "spread" else np.mean(known)
        groups.setdefault(group, []).append(value)
    return {group: float(np.mean(values)) for group, values in groups.items()}


def bootstrap(values, seed=0, draws=10_000):
    """(mean, low, high): the mean over groups and its 95 % interval, percentiles of the means of
    `draws` samples of as many groups, drawn with replacement. None without values."""
    values = np.asarray(list(values), dtype=float)
    if not len(values):
        return None
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.percentile(values[picks].mean(1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def summarise(names, rows, kind):
    """A dictionary for each model: bootstrap() of every measure, and of its difference from the
    first model's."""
    table = []
    first = None  # measures of the first model
    for name in names:
        of_model = [row for row in rows if row["model"] == name]
        asked = [row for row in of_model if not row["control"]]
        harmless = [row for row in of_model if row["control"]]
        measures = {key: by_group(of_model, key) for key in SIDE_MEASURES}
        measures["metric"] = by_group(asked, "metric", kind)
        measures["control"] = by_group(harmless, "metric", kind)
        first = first or measures
        if kind != "spread":  # a spread without some of the answers would be another one
            half = {group: words / 2 for group, words in first["words"].items()}
            long = [row for row in asked if row["words"] >= half.get(row["group"], 0)]
            measures["long"] = by_group(long, "metric")

        line = {"model": name, "answers": len(of_model), "groups": len(measures["metric"])}
        for key, values in measures.items():
            line[key] = bootstrap(values.values())
        for key in ("metric", "score") if table else ():  # the first differs from none
            base = first[key]
            differences = [value - base[g] for g, value in measures[key].items() if g in base]
            line[f"{key} difference"] = bootstrap(differences)
        table.append(line)
    return table


# ---- the report ----------------------------------------------------------------------------------
def interval(triple, form):
    """'0.413 [0.301, 0.520]', each number in the format `form`; '-' for None."""
    if not triple:
        return "-"
    mean, low, high = (format(value, form) for value in triple)
    return f"{mean} [{low}, {high}]"


def make_table(table, metric):
    """The result table in Markdown, without the columns that no model has."""
    form = ".3f" if metric["kind"] == "spread" else ".0%"
    columns = [
        ("metric", f"metric ({metric['better']} is better)", form),
        ("metric difference", "difference", f"+{form}"),
        ("control", "control", form),
        ("long", "of long answers", form),
        ("score", "mean reward", ".3f"),
        ("score difference", "difference", "+.3f"),
        ("words", "words", ".0f"),
        ("repeats", "repeats", ".1%"),
        ("base_logp", "log-prob", ".2f"),
        ("cut", "cut off", ".0%"),
    ]
    columns = [column for column in columns if any(line.get(column[0]) for line in table)]
    rows = [["model", *(heading for _, heading, _ in columns)]]
    rows.append(["---"] * len(rows[0]))
    for line in table:
        rows.append([line["model"], *(interval(line.get(key), form) for key, _, form in columns)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def make_samples(rows, count):
    """First answers of all models to the first `count` prompts, side by side, in Markdown."""
    prompt_ids = list(dict.fromkeys(row["prompt_id"] for row in rows))
    parts = []
    for prompt_id in prompt_ids[:count]:
        answers = [row for row in rows if row["prompt_id"] == prompt_id and row["sample"] == 0]
        prompt = as_messages(answers[0]["prompt"])
        parts.append("\n".join(f"**{m['role']}**: {m['content']}" for m in prompt))
        for row in answers:
            score = "no score" if row["score"] is None else f"reward {row['score']:+.2f}"
            text = row["answer"].replace("\n", "\n> ")
            parts.append(f"> **{row['model']}** ({score}): {text}")
    return "\n\n".join(parts)


def make_report(args, task, table, lines, samples, reward):
    """Text of report.md. lines: the table in Markdown. reward: its settings."""
    count, first = table[0]["groups"], table[0]["model"]
    made = provenance(pick_device(args.device)[0])
    return f"""# Task {args.task}: {task["about"]}

{lines}

In brackets: 95 % bootstrap intervals over groups of prompts ({count} for the metric), not over \
training seeds. Answers per prompt: {args.samples}; temperature {args.temperature}, \
seed {args.seed}.

- **metric**: {task["metric"]["meaning"]}. Training never saw it. **control**: on harmless prompts \
that look harmful; there lower is better. **difference**: from {first}, paired.
- **mean reward**: {reward["kind"]} reward of {reward["model"]}.
- **of long answers**: the metric of answers at least half as long as {first}'s. \
**words**: mean length. **repeats**: share of an answer's 4-grams that are repeats. \
**log-prob**: nats per token under {first}. **cut off**: share of answers that reached {args.max_tokens} tokens.
- **{SELF_REFINE}**: not a model: the teacher's revisions of the same prompts.

![metric of every model](report.png)

## Answers side by side

{samples}

Made by `{made["command"]}` at commit {made["commit"]}, {made["date"]}, on {made["hardware"]}, \
torch {made["torch"]}, transformers {made["transformers"]}.
"""


def draw(path, table, metric):
    """report.png: the metric of every model, with its interval."""
    from matplotlib.figure import Figure  # slow to import, and needed only at the end

    figure = Figure((8, 0.35 * len(table) + 1.2), layout="constrained")
    axis = figure.subplots()
    for y, line in enumerate(table):
        if line["metric"]:  # a model may have no answer
            mean, *ends = line["metric"]
            axis.plot(ends, [y, y], "C0-|", mean, y, "C0o")
    axis.set_yticks(range(len(table)), [line["model"] for line in table])
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel(f"metric ({metric['better']} is better), 95 % bootstrap intervals over groups")
    figure.savefig(path, dpi=150)


# ---- command line --------------------------------------------------------------------------------
def models_in(folder, refined):
    """What --models is by default: the common base of the runs in folder, the revisions if there are
    rows `refined`, and the finished runs. Raises BadInput where the runs have no common base."""
    runs = {}
    for file in sorted(folder.glob("*/run.json")):
        if file.parent.suffix != ".bak":
            runs[os.path.relpath(file.parent)] = json.loads(file.read_text())
    finished = [name for name, record in runs.items() if record.get("finished")]
    for name in sorted(runs.keys() - finished):
        print(f"{name} is left out: its training has not finished")

    # A run that began from another one here, as rdpo from sft, has the base of that one.
    bases = {os.path.relpath(runs[name]["model"]) for name in finished}
    bases = sorted(bases - runs.keys()) or ["smollm2"]
    if len(bases) > 1:
        several = " and ".join(bases)
        raise BadInput(f"{folder}: its runs have several bases, {several}; pass --models")
    return [*bases, SELF_REFINE, *finished] if refined else [*bases, *finished]


def jobs_of(models, names, rows, refined, samples):
    """One row of eval.jsonl for each answer that is wanted; those of self-refine have one. Its field
    `made` is the times of the weights, or the revision: if it changes, the answer is out of date."""
    jobs = []
    for model, name in zip(models, names, strict=True):
        files = sorted(Path(model).glob("*.safetensors"))
        weights = str([os.path.relpath(model), *(file.stat().st_mtime_ns for file in files)])
        for sample in range(1 if name == SELF_REFINE else samples):
            for row in refined if name == SELF_REFINE else rows:
                job = {"id": f"{name}/{row['id']}/{sample}", "model": name, "sample": sample}
                job |= {"prompt_id": row["id"], "group": row["group"], "prompt": row["prompt"]}
                job |= {"made": weights, "control": bool(row.get("control"))}
                if name == SELF_REFINE:
                    teacher = row["teacher"] if isinstance(row.get("teacher"), dict) else {}
                    job["made"] = row["chosen"]
                    job["answer"] = text_of(row["chosen"])
                    job["finish"] = teacher.get("finish", {}).get("revision", "stop")
                jobs.append(job)
    return jobs


def add_answers(jobs, prompts, chat, seed_by):
    """Adds a chat model's answers to the jobs; all models draw the same random numbers."""
    keys = [(prompts[job["prompt_id"]][seed_by], "eval", job["sample"]) for job in jobs]
    replies = chat.ask([job["prompt"] for job in jobs], keys)
    for job, reply in zip(jobs, replies, strict=True):
        job["answer"] = reply.text
        job["finish"] = reply.finish


def parse_args():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_reward_flags(parser)
    # fmt: off
    add("--reward-model", metavar="NAME", help="model of the reward (default: that of the pairs)")
    add("--models", nargs="+", metavar="NAME", help=f"models to compare, the first is the baseline; '{SELF_REFINE}' stands for the teacher's revisions (default: the runs' common base, {SELF_REFINE}, and every finished run in runs/TASK)")
    add("--in", dest="input", metavar="FILE", help="scored pairs; rows with split 'test' are used (default: runs/TASK/scored.jsonl)")
    add("--out", metavar="DIR", help="folder of eval.jsonl, report.md and report.png (default: that of --in, so runs/TASK)")
    add("--samples", type=number(), default=1, help="answers per prompt (default: %(default)s)")
    add("--batch-size", type=number(), default=64, help="answers that are sampled, and written, together (default: %(default)s)")
    add("--max-tokens", type=number(), help="longest answer, in tokens (default: as in the pairs, else 200)")
    add("--temperature", type=number(0, kind=float), default=0.7, help="sampling temperature, 0 = greedy (default: %(default)s)")
    add("--top-p", type=number(1e-6, 1, float), default=0.95, help="sample from the likeliest tokens of this total probability (default: %(default)s)")
    # fmt: on
    args = parser.parse_args()
    args.task = args.task or newest_task("scored.jsonl", args.input)
    args.input = Path(args.input or f"runs/{args.task}/scored.jsonl")
    args.out = Path(args.out or args.input.parent)
    return args


def read_test_rows(args, task):
    """The rows of the split "test". What --reward, --reward-model, --label and --max-tokens leave
    open is set to what the pairs were made with."""
    rows = read_rows(args.input, "id", "group", "prompt", *task["columns"])
    rows = [row for row in rows if row.get("split") == "test"][: args.limit]
    if not rows:
        raise BadInput(f"{args.input}: nothing is held out: no row has the split 'test'")
    if rows[0].get("task", args.task) != args.task:
        raise BadInput(f"{args.input}: rows of another task; pass --task {rows[0]['task']}")

    reward = next((row["reward"] for row in rows if row.get("reward")), {})
    args.reward = args.reward or reward.get("kind", "contrast")
    if args.reward == reward.get("kind"):
        args.reward_model = args.reward_model or reward.get("model")
        args.label = args.label or reward.get("label")
    args.reward_model = args.reward_model or "smollm2"
    teacher = next((row["teacher"] for row in rows if isinstance(row.get("teacher"), dict)), {})
    args.max_tokens = args.max_tokens or teacher.get("max_tokens", 200)
    return rows


def main():
    args = parse_args()
    task = load_task(args.task)
    rows = read_test_rows(args, task)
    # A spread over the variants of a text needs all of them.
    broken = {row["group"] for row in rows if row.get("error") or "chosen" not in row}
    refined = [row for row in rows if row["group"] not in broken]
    args.models = args.models or models_in(args.input.parent, refined)
    names = [Path(name).name for name in args.models]
    if len(set(names)) < len(names):
        raise BadInput("--models: two have the same last name; rename one of the folders")

    out = args.out / "eval.jsonl"
    reward, reward_settings = make_reward(args, task, f"{out}.calls")
    sampling = {"max_tokens": args.max_tokens, "temperature": args.temperature, "top_p": args.top_p}
    settings = {**sampling, "seed": args.seed}
    prompts = {row["id"]: row for row in rows}
    jobs = jobs_of(args.models, names, rows, refined, args.samples)
    output = Rows(out, args.overwrite)
    for job in jobs:  # a policy that was trained anew is asked again
        if job["id"] in output.rows and output.rows[job["id"]].get("made") != job["made"]:
            del output.rows[job["id"]]
    # Rows of models that are not named now stay; resume() wants a source for each, so themselves.
    others = [output.rows[key] for key in output.rows.keys() - {job["id"] for job in jobs}]
    output.resume("settings", settings, jobs + others)
    print(f"{args.reward} of {args.reward_model}, {len(jobs)} answers, {len(output.done)} done")

    for model, name in zip(args.models, names, strict=True):
        chat = None  # frees the model before
        batches = output.batches([job for job in jobs if job["model"] == name], args.batch_size)
        if batches and name != SELF_REFINE:
            chat = LocalModel(model, args, **sampling)
        for batch in tqdm(batches, name, unit="batch"):
            if chat:
                add_answers(batch, prompts, chat, task["seed_by"])
            output.add(*(job | {"settings": settings} for job in batch))
    chat = None

    # All answers are measured again, since metric, reward and first model may have changed. They
    # are the dictionaries of output.rows, so that finish() writes the measures too.
    answers = [output.rows[job["id"]] for job in jobs]
    base = LocalModel(args.models[0], args, **sampling)
    use_packed_attention(base.model)
    size = len(answers) if args.api_base else args.batch_size
    for start in tqdm(range(0, len(answers), size), "measures", unit="batch"):
        batch = answers[start : start + size]
        add_measures(batch, prompts, task["metric"], reward, base)
    for row in answers:
        row["reward"] = reward_settings
    output.finish(jobs)

    table = summarise(names, answers, task["metric"]["kind"])
    lines = make_table(table, task["metric"])
    report = make_report(args, task, table, lines, make_samples(answers, 6), reward_settings)
    (args.out / "report.md").write_text(report, encoding="utf-8")
    draw(args.out / "report.png", table, task["metric"])
    print(f"\n{lines}\n\n{make_samples(answers, 3)}\n\n{args.out / 'report.md'}, {out}")
    unscored = any(row["answer"] and row["score"] is None for row in answers)
    raise SystemExit(1 if unscored else 0)


if __name__ == "__main__":
    run(main)
