"""Stage 4 of 4: did the behaviour change, on prompts that training never saw, and at what cost?

    python eval.py --task sycophancy                      # the base model and all of runs/sycophancy/
    python eval.py --task safety --models smollm2 runs/safety/dpo runs/safety/rdpo --samples 4

runs/TASK/scored.jsonl (rows of the split "test") and models -> runs/TASK/eval.jsonl, every answer
with its scores; report.md (verdicts, a table, answers side by side); report.png (bars, curves).
"""

import itertools
import json
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from kernels.packed import all_logps, use_packed_attention
from prompts import as_messages, load_task, measure
from prompts.chat import LocalModel
from prompts.report import (
    SELF_REFINE, SHARES, make_samples, make_table, make_verdicts, write_report,
)  # fmt: skip
from prompts.rows import BadInput, Rows, make_parser, newest_task, number, read_rows, run, text_of
from prompts.tokens import encode, repetition
from score import add_reward_flags, finite, make_reward

ZZ = 1.96**2  # square of the normal quantile of a 95 % interval
SIDE_MEASURES = ("score", "words", "repeats", "base_logp", "cut")


# ---- what is measured ----------------------------------------------------------------------------
def as_asked(prompt, tokenizer, raw_text):
    """A prompt as train.py sees it: text is a user's turn, where the model has a chat template."""
    return prompt if raw_text or not tokenizer.chat_template else as_messages(prompt)


def add_measures(rows, prompts, metric, reward, base, raw_text):
    """Adds all measures to rows of eval.jsonl. An empty answer has None as score and base_logp.
    prompts: {id: row}. reward: of make_reward. base: the first model, a LocalModel."""
    answered, sequences = [], []
    for row in rows:
        answer = row["answer"]
        row["metric"] = measure(metric, prompts[row["prompt_id"]], answer)
        row["words"] = len(answer.split())
        row["repeats"] = repetition(answer)
        row["cut"] = float(row["finish"] == "length")
        row["score"] = row["base_logp"] = None
        if answer:
            asked = as_asked(row["prompt"], base.tokenizer, raw_text)
            try:
                prompt, completion = encode(base.tokenizer, asked, answer)
            except ValueError as error:
                raise BadInput(f"row {row['prompt_id']}: {error}") from None
            # An answer that was cut off has no end of its turn.
            sequences.append((prompt, completion[:-1] if row["cut"] else completion))
            answered.append(row)

    logps = all_logps(base.model, sequences).tolist()
    sources = [prompts[row["prompt_id"]] for row in answered]
    scores = reward(sources, [row["answer"] for row in answered])
    for row, score, logp, (_, completion) in zip(answered, scores, logps, sequences, strict=True):
        row["score"] = finite(score.value)
        row["base_logp"] = logp / len(completion)


def by_group(rows, field, kind="mean"):
    """{group: value}: in each sample the mean of `field` over the group's prompts (for the kind spread
    the largest minus the smallest), then the mean over samples. Rows with None are left out."""
    samples = {}  # (group, sample): values
    for row in rows:
        if row[field] is not None:
            samples.setdefault((row["group"], row["sample"]), []).append(row[field])
    groups = {}
    for (group, _), values in samples.items():
        value = np.ptp(values) if kind == "spread" else np.mean(values)
        groups.setdefault(group, []).append(value)
    return {group: float(np.mean(values)) for group, values in groups.items()}


def bootstrap(values, share=False, seed=0, draws=10_000):
    """(mean, low, high) over n groups: a 95 % interval, percentiles of `draws` means, each of n groups
    drawn with replacement. None without values. share: where that reaches 0 or 1, Wilson's interval
    (1927) instead, since of 22 of 22 it would be [1, 1]."""
    values = np.asarray(list(values), dtype=float)
    n = len(values)
    if not n:
        return None
    mean = float(values.mean())
    picks = np.random.default_rng(seed).integers(n, size=(draws, n))
    low, high = np.percentile(values[picks].mean(1), [2.5, 97.5])
    if share and (low <= 0 or high >= 1):
        center = (n * mean + ZZ / 2) / (n + ZZ)
        half = (ZZ * (n * mean * (1 - mean) + ZZ / 4)) ** 0.5 / (n + ZZ)
        return mean, max(0.0, center - half), min(1.0, center + half)
    return mean, float(low), float(high)


def summarise(names, rows, kind):
    """(table, pairs). table: of each model a dictionary with mean and interval of every measure, and
    its metric by group. pairs: {"B - A": the difference in metric, group by group} of any two."""
    shares = {"cut", "metric", "control"} if kind in SHARES else {"cut"}
    table, pairs = [], {}
    for name in names:
        answers = [row for row in rows if row["model"] == name]
        measures = {key: by_group(answers, key) for key in SIDE_MEASURES}
        for key, control in (("metric", False), ("control", True)):
            asked = [row for row in answers if row["control"] == control]
            measures[key] = by_group(asked, "metric", kind)
        empty = sum(not row["answer"] for row in answers)
        table.append({"model": name, "groups": measures["metric"], "empty": empty})
        for key, groups in measures.items():
            table[-1][key] = bootstrap(groups.values(), share=key in shares)
    for first, second in itertools.combinations(table, 2):
        ours, others = second["groups"], first["groups"]
        differences = [ours[group] - others[group] for group in ours if group in others]
        found = bootstrap(differences)
        if "metric" in shares and found and found[1] == found[2]:
            # All n groups differ by d alike. By Wilson's bound a share of ZZ / (n + ZZ) of all groups
            # may do otherwise, as far as -1 or 1.
            d, share = found[0], ZZ / (len(differences) + ZZ)
            found = d, d - share * (1 + d), d + share * (1 - d)
        pairs[f"{second['model']} - {first['model']}"] = found
    return table, pairs


# ---- command line --------------------------------------------------------------------------------
def models_in(folder, refined):
    """What --models is by default: the base of the runs in folder, the revisions if there are rows
    `refined`, and the finished runs. Raises BadInput where the runs have several bases."""
    runs = {}
    for file in sorted(folder.glob("*/run.json")):
        if file.parent.suffix != ".bak":
            runs[os.path.relpath(file.parent)] = json.loads(file.read_text())
    finished = [name for name, record in runs.items() if record.get("finished")]
    for name in sorted(runs.keys() - finished):
        print(f"{name} is left out: its training has not finished")
    # A run that began from another one here, as rdpo from sft, has the base of that one.
    bases = sorted({os.path.relpath(runs[name]["model"]) for name in finished} - runs.keys())
    if len(bases) > 1:
        raise BadInput(f"{folder}: its runs have several bases, {', '.join(bases)}; pass --models")
    return [*(bases or ["smollm2"]), *[SELF_REFINE] * bool(refined), *finished]


def jobs_of(models, names, rows, refined, samples):
    """A row of eval.jsonl for each answer that is wanted; of self-refine one per prompt. The field
    `made`, the times of the weights or the revision, changes if the answer is outdated."""
    jobs = []
    for model, name in zip(models, names, strict=True):
        folder = Path(model)
        # Checked now, and not when other models have been sampled for minutes.
        is_local = folder.exists() or model.startswith((".", "/", "~", "runs/"))  # else on the hub
        if is_local and not (folder / "config.json").exists():
            unfinished = " (its training has not finished)" * (folder / "run.json").exists()
            raise BadInput(f"model {model}: no config.json is there{unfinished}; name a model")
        times = [file.stat().st_mtime_ns for file in sorted(folder.glob("*.safetensors"))]
        weights = str([os.path.relpath(model), *times])
        for sample in range(1 if name == SELF_REFINE else samples):
            for row in refined if name == SELF_REFINE else rows:
                job = {"id": f"{name}/{row['id']}/{sample}", "model": name, "sample": sample}
                job |= {"prompt_id": row["id"], "group": row["group"], "prompt": row["prompt"]}
                job |= {"made": weights, "control": bool(row.get("control"))}
                if name == SELF_REFINE:
                    teacher = row["teacher"] if isinstance(row.get("teacher"), dict) else {}
                    job |= {"made": row["chosen"], "answer": text_of(row["chosen"])}
                    job["finish"] = teacher.get("finish", {}).get("revision", "stop")
                jobs.append(job)
    return jobs


def parse_args():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_reward_flags(parser)
    # fmt: off
    add("--reward-model", metavar="NAME", help="model of the reward (default: that of the pairs)")
    add("--models", nargs="+", metavar="NAME", help=f"models to compare, the first is the baseline; '{SELF_REFINE}' stands for the teacher's revisions (default: the runs' common base, {SELF_REFINE}, and every finished run in runs/TASK)")
    add("--in", dest="input", metavar="FILE", help="scored pairs; rows with split 'test' are used (default: runs/TASK/scored.jsonl)")
    add("--out", metavar="DIR", help="folder of eval.jsonl, report.md and report.png (default: that of --in, so runs/TASK)")
    add("--raw-text", action="store_true", help="prompts that are text are asked as they are, without the chat template (default: as a user's turn, where the model has a template)")
    add("--samples", type=number(), default=1, help="answers per prompt (default: %(default)s)")
    add("--batch-size", type=number(), default=64, help="answers that are sampled, and written, together (default: %(default)s)")
    add("--max-tokens", type=number(), help="longest answer, in tokens (default: as in the pairs, else 200)")
    add("--temperature", type=number(0, kind=float), default=0.7, help="sampling temperature, 0 = greedy (default: %(default)s)")
    add("--top-p", type=number(1e-6, 1, float), default=0.95, help="sample from the likeliest tokens of this total probability (default: %(default)s)")
    # fmt: on
    args = parser.parse_args()
    args.named, args.task = args.task, args.task or newest_task("scored.jsonl", args.input)
    args.input = Path(args.input or f"runs/{args.task}/scored.jsonl")
    args.out = Path(args.out or args.input.parent)
    return args


def read_test_rows(args, task):
    """The rows of the split "test". What --reward, --reward-model, --label and --max-tokens leave
    open is set to what the pairs were made with."""
    rows = read_rows(args.input, "id", "group", "prompt", *task["columns"])
    rows = [row for row in rows if row.get("split") == "test"][: args.limit]
    if not rows:
        how = 'run generate.py with more rows, or add "split": "test" to the rows of some groups'
        raise BadInput(f"{args.input}: nothing is held out; {how}")
    name = rows[0].get("task")
    if (name or args.named or args.input.parent.name) != args.task:
        raise BadInput(f"{args.input}: not rows of task {args.task}; pass --task {name or 'NAME'}")

    made = next((row["reward"] for row in rows if row.get("reward")), {})
    args.reward = args.reward or made.get("kind", "contrast")
    if args.reward != made.get("kind"):
        made = {}
    args.reward_model = args.reward_model or made.get("model") or "smollm2"
    args.label = args.label or made.get("label")
    args.scored_by = made.get("prompt_text")
    teacher = next((row["teacher"] for row in rows if isinstance(row.get("teacher"), dict)), {})
    args.max_tokens = args.max_tokens or teacher.get("max_tokens", 200)
    args.teacher_tokens = teacher.get("max_tokens") or args.max_tokens
    return rows


def check_raw_text(args):
    """Raises BadInput where a run was trained with another --raw-text than prompts are asked with."""
    for file in filter(Path.exists, [Path(model, "run.json") for model in args.models]):
        if json.loads(file.read_text()).get("raw_text", False) != args.raw_text:
            how = "without" if args.raw_text else "with"
            raise BadInput(f"{file.parent}: trained {how} --raw-text; evaluate it {how} the flag")


def main():
    args = parse_args()
    task = load_task(args.task)
    rows = read_test_rows(args, task)
    # A spread over the variants of a text needs all of them.
    broken = {row["group"] for row in rows if row.get("error") or "chosen" not in row}
    refined = [row for row in rows if row["group"] not in broken]
    args.models = args.models or models_in(args.input.parent, refined)
    for name in args.models:
        if not Path(name).exists() and (path := args.input.parent / name / "run.json").exists():
            raise BadInput(f"--models {name}: a run is named by its path, {path.parent}")
    names = [Path(name).name for name in args.models]
    if len(set(names)) < len(names) or names[0] == SELF_REFINE:
        raise BadInput(f"--models: last names must differ, and {SELF_REFINE} can't be the first")

    jobs = jobs_of(args.models, names, rows, refined, args.samples)
    out = args.out / "eval.jsonl"
    reward, reward_settings = make_reward(args, task, f"{out}.calls")
    sampling = {"max_tokens": args.max_tokens, "temperature": args.temperature, "top_p": args.top_p}
    settings = {**sampling, "seed": args.seed}
    if any(isinstance(row["prompt"], str) for row in rows):  # else the flag changes nothing
        settings["raw_text"] = args.raw_text
        check_raw_text(args)
    prompts = {row["id"]: row for row in rows}
    seeds = {row["id"]: row[task["seed_by"]] for row in rows}
    output = Rows(out, args.overwrite)
    for job in jobs:  # a policy that was trained anew is asked again
        if job["id"] in output.rows and output.rows[job["id"]].get("made") != job["made"]:
            del output.rows[job["id"]]
    # Rows of models that --models lacks are kept. resume() wants a source for each: the row itself.
    others = [output.rows[key] for key in output.rows.keys() - {job["id"] for job in jobs}]
    output.resume("settings", settings, jobs + others)
    judge = f"task {args.task}, {args.reward} of {args.reward_model}"
    print(f"{judge}: {len(jobs)} answers, {len(output.done)} done")

    for model, name in zip(args.models, names, strict=True):
        chat = None  # frees the model before
        batches = output.batches([job for job in jobs if job["model"] == name], args.batch_size)
        if batches and name != SELF_REFINE:
            chat = LocalModel(model, args, **sampling)
        for batch in tqdm(batches, name, unit="batch", disable=not batches):
            if chat:  # all models draw the same random numbers
                keys = [(seeds[job["prompt_id"]], "eval", job["sample"]) for job in batch]
                asked = [as_asked(job["prompt"], chat.tokenizer, args.raw_text) for job in batch]
                replies = chat.ask(asked, keys)
                for job, reply in zip(batch, replies, strict=True):
                    job |= {"answer": reply.text, "finish": reply.finish}
            output.add(*(job | {"settings": settings} for job in batch))
    chat = None

    # All answers are measured again, since metric, reward and first model may have changed. They
    # are the dictionaries of output.rows, so that finish() writes the measures too.
    answers = [output.rows[job["id"]] for job in jobs]
    base = LocalModel(args.models[0], args, **sampling)
    use_packed_attention(base.model)
    size = len(answers) if args.api_base else args.batch_size
    for start in tqdm(range(0, len(answers), size), "measures", unit="batch"):
        some = answers[start : start + size]
        add_measures(some, prompts, task["metric"], reward, base, args.raw_text)
    for row in answers:
        row["reward"] = reward_settings
    output.finish(jobs)

    table, pairs = summarise(names, answers, task["metric"]["kind"])
    results = make_table(table, pairs, task["metric"])
    unequal = args.teacher_tokens != args.max_tokens
    changed = args.scored_by not in (None, reward_settings.get("prompt_text"))
    verdicts = make_verdicts(table, pairs, task["metric"], unequal, changed)
    write_report(args, task, table, verdicts, results, answers)
    samples = make_samples(answers, 3, task["metric"]["kind"])
    print(f"\n{samples}\n\n{results}\n\n{verdicts}")
    print(f"{args.out / 'report.md'}, {out}")
    raise SystemExit(any(row["answer"] and row["score"] is None for row in answers))


if __name__ == "__main__":
    run(main)
