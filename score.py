"""Stage 2 of 4: a reward that is not the teacher's critique scores both answers of every pair.

    python score.py --task sycophancy                                  # contrast, embedded model
    python score.py --task sentiment --reward classifier --model lvwerra/distilbert-imdb --label POSITIVE
    python score.py --task safety --reward judge --model NAME --api-base http://localhost:8000/v1

runs/TASK/pairs.jsonl -> runs/TASK/scored.jsonl: the same rows with score_chosen and score_rejected
(null, never 0, if there is no score) and reward; then an audit of the scores."""

import functools
import math
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

from kernels.packed import all_logps, use_packed_attention
from prompts import as_messages, fill, load_task, measure
from prompts.chat import load_model, open_chat, pick_device
from prompts.rows import SIDES, BadInput, Rows, digest_of, is_scored, make_parser, newest_task
from prompts.rows import number, read_rows, run, text_of
from prompts.tokens import apply_template, encode, was_cut_off


class Score(NamedTuple):
    """A score, None if there is none; and a judge's words, or why there is no score."""

    value: float | None
    comment: str = ""


# ---- the three rewards ---------------------------------------------------------------------------
def contrast_reward(rows, answers, model, tokenizer, table):
    """A Score for each answer, in nats per token:
    r(x, y) = 1/|y| [log pi(y | x, principle) - log pi(y | x, opposite)]

    table: [contrast] of the task file, two lists of messages behind which the answer stands. Rows
        with `control` have a table of their own, if there is [contrast.control]."""
    under_principle, under_opposite = [], []
    for row, answer in zip(rows, answers, strict=True):
        sides = table.get("control", table) if row.get("control") else table
        under_principle.append(encode(tokenizer, fill(sides["principle"], row), answer))
        under_opposite.append(encode(tokenizer, fill(sides["opposite"], row), answer))

    # Answers to one prompt are neighbours, so they share it in the packed sequence.
    logps = all_logps(model, under_principle + under_opposite).double()
    gaps = logps[: len(answers)] - logps[len(answers) :]
    scores = []
    for gap, one, other in zip(gaps.tolist(), under_principle, under_opposite, strict=True):
        # Equal prompts have the score 0 by definition, not the rounding noise of two sums.
        scores.append(Score(0.0 if one == other else gap / len(one[1])))
    return scores


@torch.no_grad()
def classifier_reward(rows, answers, model, tokenizer, label):
    """A Score for each answer: a reward model's logit, or the log-odds of `label` in a classifier;
    where its labels are independent, the label's own logit. An answer that is too long has none.
    Sequences run one by one, without padding: transformers reads the logits at the last token that
    is not the padding token, as it did in training (transformers#35352)."""
    config, label_ids = model.config, model.config.label2id
    most = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or 1e9)
    scores = []
    for row, answer in zip(rows, answers, strict=True):
        prompt = as_messages(row["prompt"])
        if tokenizer.chat_template:  # a reward model reads the whole template
            chat = [*prompt, {"role": "assistant", "content": answer}]
            text = apply_template(tokenizer, chat)
            inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        elif len(label_ids) > 1:  # a classifier of texts judges the answer, not the request
            inputs = tokenizer(answer, return_tensors="pt")
        else:
            text = "\n".join(message["content"] for message in prompt)
            inputs = tokenizer(text, answer, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        if length > most:
            scores.append(Score(None, f"{length} tokens, where the classifier takes {most}"))
            continue

        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        logits = model(**inputs).logits[0].double()  # (labels,)
        value = logits[label_ids[label] if len(label_ids) > 1 else 0]
        if len(label_ids) > 1 and config.problem_type != "multi_label_classification":
            others = [i for name, i in label_ids.items() if name != label]
            value = value - logits[others].logsumexp(0)
        scores.append(Score(value.item()))
    return scores


def judge_reward(rows, answers, ask, table):
    """A Score for each answer: the rating that a chat model gives it by the rubric of [judge], which
    table is. ask: of LocalModel or Server."""
    conversations = [fill(table["prompt"], rows[i], answer=text) for i, text in enumerate(answers)]
    replies = ask(conversations, [(row["id"], "judge") for row in rows])
    # A failed call has no text; its finish says why it failed.
    return [Score(rating_of(r.text, r.finish, table["scale"]), r.text or r.finish) for r in replies]


# "Rating", perhaps the scale, markup, a number, perhaps "/10", markup, and an end or a reason.
RATING = re.compile(
    r"""(?P<quote>["'“]?) (?<![a-z]) rating (?![a-z]) (\s*\([^)]*[^)\d][^)]*\) | \s+\d+\s*(-|to)\s*\d+)?
    (?P<markup> ([\s:*_=`"'”<>\[\]{}\#|$] | \bis\b | \\boxed)* ) (?P<number> ((?<![a-z])[-+])?\d+([.,]\d+)? )
    ([*_`]*\s*(/|out\ of)\s*(?P<top>\d+)(\.0+)?)? [*_`"'”\]}>)$]*
    (?P<end> \s*$ | \s*\n | [.,;!<](?!\d) | \s\( | \s-\s(?!\d) | \s+(because|points?|stars?)\b )""",
    re.IGNORECASE | re.VERBOSE,
)


def rating_of(text, finish, scale):
    """The rating in a judge's reply, None where there is none on the scale (lowest, highest), or
    where several differ and none of them is the last line.

    >>> rating_of("It scores 2 points, not 4. Rating: -3", "stop", (-5, 5))
    -3.0
    >>> rating_of("Rating: 4/5", "stop", (1, 10))
    """
    text = re.sub("[\u2212\u2013\u2014]", "-", unicodedata.normalize("NFKC", text)).strip("\"' \n")
    found = []
    for match in RATING.finditer(text):
        quoted = match["quote"] and not set("\"'”") & set(match["markup"])  # but not a key in JSON
        # "Rating:", and in the next line "1. It is warm."
        in_a_list = "\n" in match["markup"] and match["end"].strip()
        of_another_scale = match["top"] and int(match["top"]) != scale[1]
        if not (quoted or in_a_list or of_another_scale):
            found.append(match)
    ratings = [float(match["number"].replace(",", ".")) for match in found]
    if not found or finish == "length":
        return None
    before = text[: found[-1].start()].rpartition("\n")[2].strip("*_#> ")
    last_line = not (before or text[found[-1].end() :].strip())
    clear = last_line or len(set(ratings)) == 1
    return ratings[-1] if clear and scale[0] <= ratings[-1] <= scale[1] else None


def make_reward(args, task, call_log):
    """(reward: (rows, answers) -> Scores, the settings that they depend on). task: of load_task.
    call_log: path of the file that keeps a judge's calls. Raises BadInput."""
    kind, name = args.reward, args.reward_model
    if args.api_base and kind != "judge":
        raise BadInput("--api-base: only --reward judge asks a server")
    if kind != "classifier" and kind not in task:
        raise BadInput(f"--reward {kind}: prompts/{args.task}.toml has no [{kind}]; write it")
    settings = {"kind": kind, "model": name, "label": args.label}
    settings["prompt_text"] = digest_of(task.get(kind))
    if kind == "judge":
        sampling = {"max_tokens": args.judge_tokens, "temperature": 0.0, "top_p": 1.0}
        chat = open_chat(name, args, call_log, **sampling)
        reward = functools.partial(judge_reward, ask=chat.ask, table=task["judge"])
        return reward, settings | chat.settings
    device, dtype = pick_device(args.device, args.dtype)
    settings["dtype"] = str(dtype)
    if kind == "contrast":
        model, tokenizer = load_model(name, device, dtype)
        use_packed_attention(model)
        reward = functools.partial(contrast_reward, table=task["contrast"])
    else:
        model, tokenizer = load_model(name, device, dtype, AutoModelForSequenceClassification)
        labels = model.config.label2id = {label: i for i, label in model.config.id2label.items()}
        if len(labels) > 1 and model.config.problem_type == "regression":
            raise BadInput(f"--model {name}: gives {len(labels)} numbers; one is needed")
        if len(labels) > 1 and args.label not in labels:
            raise BadInput(f"--label: {name} has the labels {', '.join(labels)}; name the good one")
        reward = functools.partial(classifier_reward, label=args.label)
    return functools.partial(reward, model=model, tokenizer=tokenizer), settings


def add_scores(rows, reward, settings):
    """The rows with both answers' scores; those that failed before are unchanged."""
    pairs = [row for row in rows if not row.get("error")]
    # A copied draft is asked for once: it is a tie, whatever rounding or a judge's mood would say.
    asked = {}  # (number of the pair, text): row
    for i, row in enumerate(pairs):
        for side in () if was_cut_off(row) else SIDES:  # what is not trained on costs no call
            asked[i, text_of(row[side])] = row
    scores = reward(list(asked.values()), [text for _, text in asked])
    scores = dict(zip(asked, scores, strict=True))
    for i, row in enumerate(pairs):
        row["reward"] = dict(settings)
        for side in SIDES:
            score = scores.get((i, text_of(row[side])), Score(None))
            row[f"score_{side}"] = finite(score.value)
            if score.comment:
                row["reward"][f"comment_{side}"] = score.comment
    return rows


def score_batch(rows, reward, settings):
    """add_scores; where that raises, of each row alone, so that a bad one costs no other its score."""
    try:
        return add_scores(rows, reward, settings)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if len(rows) == 1:
            return [rows[0] | {"error": f"score: {type(error).__name__}: {error}"}]
        return [score_batch([row], reward, settings)[0] for row in rows]


def finite(value):
    """The value, or None if it is missing or not finite."""
    return value if value is not None and math.isfinite(value) else None


# ---- the audit -----------------------------------------------------------------------------------
def audit(rows, task):
    """What to know of the scores before training on them, as text. task: of load_task."""
    scored = [row for row in rows if is_scored(row)]
    failed = sum(bool(row.get("error")) for row in rows)
    cut = sum(was_cut_off(r) and not (r.get("error") or is_scored(r)) for r in rows)
    left = len(rows) - len(scored) - failed - cut
    lines = [f"scored {len(scored)} of {len(rows)} pairs; {left} without a score, {failed} failed"]
    lines[0] += f", {cut} cut off and so left out" * bool(cut)
    if not scored:
        return lines[0]
    gaps = np.array([row["score_chosen"] - row["score_rejected"] for row in scored])
    won, lost, ties = np.mean(gaps > 0), np.mean(gaps < 0), np.mean(gaps == 0)
    lines.append(f"revisions that won {won:.0%}, lost {lost:.0%}, ties {ties:.0%}")
    spread = f"mean {gaps.mean():+.3f}, root mean square {np.sqrt(np.mean(gaps**2)):.3f}"
    lines.append(f"reward gap (chosen - rejected): {spread}")
    metric = task["metric"]
    if all(set(task["columns"]) <= row.keys() for row in scored):  # the pairs of others lack some
        for name, which in (("won", gaps > 0), ("lost", gaps < 0)):
            some = [row for row, counts in zip(scored, which, strict=True) if counts]
            values = [[measure(metric, r, text_of(r[side])) for side in SIDES] for r in some]
            if values:
                revision, draft = np.mean(values, axis=0)
                lines.append(f"metric where it {name}: draft {draft:.2f}, revision {revision:.2f}")
    return "\n".join(lines)


# ---- command line --------------------------------------------------------------------------------
def add_reward_flags(parser, kind=None):
    """Flags that score.py and eval.py share. kind: the default reward; None: that of the pairs."""
    add, default = parser.add_argument, "that of the pairs"
    # fmt: off
    add("--reward", default=kind, choices=["contrast", "classifier", "judge"], help=f"contrast: the answer's log-prob under the task's principle minus that under its opposite; classifier: a reward model or sequence classifier; judge: a chat model's rating (default: {kind or default})")
    add("--label", help="for a classifier with several labels: the one that counts as good, e.g. POSITIVE")
    add("--judge-tokens", type=number(), default=300, help="maximum length of the judge's reply, in tokens; a longer one gives no score (default: %(default)s)")
    # fmt: on


def parse_args():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_reward_flags(parser, "contrast")
    # fmt: off
    add("--model", dest="reward_model", metavar="MODEL", default="smollm2", help="model of the reward: 'smollm2' (the embedded model), a local folder, a hub id, or with --api-base the server's name of the model (default: %(default)s)")
    add("--in", dest="input", metavar="FILE", help="pairs to score (default: runs/TASK/pairs.jsonl)")
    add("--out", metavar="FILE", help="scored pairs to write (default: scored.jsonl beside --in)")
    add("--batch-size", type=number(), default=32, help="rows that are scored and written together, without --api-base (default: %(default)s)")
    # fmt: on
    args = parser.parse_args()
    args.named, args.task = args.task, args.task or newest_task("pairs.jsonl", args.input)
    args.input = args.input or f"runs/{args.task}/pairs.jsonl"
    args.out = args.out or str(Path(args.input).parent / "scored.jsonl")
    return args


def main():
    args = parse_args()
    task = load_task(args.task)
    if Path(args.out).resolve() == Path(args.input).resolve():
        raise BadInput(f"--out {args.out}: is --in too; choose another file")
    source = read_rows(args.input, "id", "prompt", *SIDES)
    name = source[0].get("task")
    if (name or args.named or Path(args.input).parent.name) != args.task:
        raise BadInput(f"{args.input}: not rows of task {args.task}; pass --task {name or 'NAME'}")
    earlier = ("score_chosen", "score_rejected", "reward")  # of another reward
    source = [{k: v for k, v in row.items() if k not in earlier} for row in source]
    rows = source[: args.limit]
    reward, settings = make_reward(args, task, f"{args.out}.calls")
    output = Rows(args.out, args.overwrite)
    for key, row in [*output.rows.items()]:  # what has no score is asked for again
        if "reward" in row and not (is_scored(row) or was_cut_off(row)):
            del output.rows[key]
    output.resume("reward", settings, source)
    print(f"task {args.task}, {args.reward} of {args.reward_model}: {len(output.done)} rows done")
    batches = output.batches(rows, None if args.api_base else args.batch_size)
    for batch in tqdm(batches, unit="batch", disable=not batches):
        output.add(*score_batch(batch, reward, settings))
    rows = output.finish(source)
    print(f"{args.out}:\n{audit(rows, task)}")
    raise SystemExit(not all(is_scored(r) or (was_cut_off(r) and not r.get("error")) for r in rows))


if __name__ == "__main__":
    run(main)
