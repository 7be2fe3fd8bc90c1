"""Stage 2 of 4: a reward that is not the teacher's critique scores both answers of every pair.

    python score.py --task sycophancy                                  # contrast, embedded model
    python score.py --task sentiment --reward classifier --model lvwerra/distilbert-imdb --label POSITIVE
    python score.py --task safety --reward classifier --model OpenAssistant/reward-model-deberta-v3-large-v2
    python score.py --task safety --reward judge --model NAME --api-base http://localhost:8000/v1

runs/TASK/pairs.jsonl -> runs/TASK/scored.jsonl: the same rows with score_chosen and score_rejected
(null where no score could be had, never 0) and reward; then an audit of the scores.
"""

import math
import re
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

from generate import (
    Output,
    digest_of,
    encode,
    load_model,
    make_parser,
    name_of,
    open_chat,
    pick_device,
    run,
    show_plan,
)
from kernels.packed import all_logps, check_model
from prompts import BadInput, as_messages, fill, load_task, read_rows

SIDES = ("chosen", "rejected")

# ---- the three rewards: (rows, answers) -> list of (score or None, judge's words, its error) ------


def contrast_reward(table, name, device, dtype, pack_tokens):
    """r(x, y) = 1/|y| [log pi(y | x, principle) - log pi(y | x, opposite)], in nats a token.

    table: [contrast] of the task file: two lists of messages, behind which the answer stands. Rows
    with `control` have a table of their own, if there is [contrast.control].
    """
    model, tokenizer = load_model(name, device, dtype)
    packs = check_model(model)

    def reward(rows, answers):
        sequences = {"principle": [], "opposite": []}
        for row, answer in zip(rows, answers, strict=True):
            part = table.get("control", table) if row.get("control") else table
            for side in sequences:
                sequences[side].append(encode(tokenizer, fill(part[side], row), answer))
        # answers to one prompt are neighbours and share it in the packed sequence
        both = sequences["principle"] + sequences["opposite"]
        principle, opposite = all_logps(model, both, pack_tokens, packs).view(2, -1).tolist()
        lengths = [len(completion) for _, completion in sequences["principle"]]
        # equal prompts have the score 0 by definition, not the rounding noise of two sums
        same = [a == b for a, b in zip(*sequences.values(), strict=True)]
        columns = zip(principle, opposite, lengths, same, strict=True)
        return [(0.0 if equal else (p - o) / count, "", "") for p, o, count, equal in columns]

    return reward


def classifier_reward(name, label, device, dtype):
    """The logit of a reward model, or the log-odds of `label` in a classifier of several labels.

    Only sequences of equal length share a batch: with padding, transformers takes the last token
    that is not the padding token, which may be an inner one (transformers#35352).
    """
    model, tokenizer = load_model(name, device, dtype, AutoModelForSequenceClassification)
    labels, plain = model.config.label2id, not tokenizer.chat_template
    if model.config.num_labels > 1 and label not in labels:
        raise BadInput(f"--label: {name} has the labels {', '.join(labels)}; name the good one")

    def inputs_of(row, answer):
        turns = as_messages(row["prompt"])
        if not plain:  # the whole template, as reward models are published
            turns = [*turns, {"role": "assistant", "content": answer}]
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            return dict(tokenizer(text, add_special_tokens=False))
        if len(labels) > 1:  # a classifier of texts judges the answer, not the request
            return dict(tokenizer(answer, truncation=True))
        text = "\n".join(message["content"] for message in turns)
        return dict(tokenizer(text, answer, truncation=True))

    @torch.no_grad()
    def reward(rows, answers):
        by_length = {}
        for i, inputs in enumerate(map(inputs_of, rows, answers)):
            # without a padding token in its configuration, a model takes one sequence at a time
            length = len(inputs["input_ids"]) if model.config.pad_token_id is not None else -i
            by_length.setdefault(length, []).append((i, inputs))
        scores = [None] * len(answers)
        for members in by_length.values():
            batch = {
                key: torch.tensor([inputs[key] for _, inputs in members], device=device)
                for key in members[0][1]
            }
            logits = model(**batch).logits.double()  # (rows, labels)
            if len(labels) > 1:
                others = [k for k in range(logits.shape[1]) if k != labels[label]]
                logits = (logits[:, labels[label]] - logits[:, others].logsumexp(1))[:, None]
            for (i, _), value in zip(members, logits[:, 0].tolist(), strict=True):
                scores[i] = (value, "", "")
        return scores

    return reward


def judge_reward(table, samples, ask):
    """The mean of the ratings that a chat model gives an answer by the rubric of [judge].

    ask: as refine() of generate.py has it. samples: ratings of an answer.
    """

    def reward(rows, answers):
        conversations = [
            fill(table["prompt"], row, answer=answer)
            for row, answer in zip(rows, answers, strict=True)
            for _ in range(samples)
        ]
        keys = [(row["id"], "judge", k) for row in rows for k in range(samples)]
        replies, scores = ask(conversations, keys), []
        for start in range(0, len(replies), samples):
            mine = replies[start : start + samples]
            ratings = [rating_of(reply.text, reply.finish, table) for reply in mine]
            ratings = [rating for rating in ratings if rating is not None]
            said = "\n----\n".join(reply.text for reply in mine)
            error = next((r.finish for r in mine if r.finish.startswith("error")), "")
            scores.append((np.mean(ratings).item() if ratings and not error else None, said, error))
        return scores

    return reward


def rating_of(text, finish, table):
    """The number behind the last "Rating:" (or the table's `phrase`), if it is on the scale.

    >>> table = {"scale": [-5, 5], "phrase": "Overall sentiment:"}
    >>> rating_of("It scores 2 points, not 4. Overall sentiment: -3", "stop", table)
    -3.0
    >>> rating_of("Overall sentiment: 40", "stop", table)
    """
    phrase = re.escape(table.get("phrase", "Rating:").rstrip(": "))
    found = re.findall(rf"(?i){phrase}[\s:*_=`\"]*([-+\u2212]?\d+(?:\.\d+)?)", text)
    if not found or finish == "length":
        return None
    rating = float(found[-1].replace("\u2212", "-"))
    return rating if table["scale"][0] <= rating <= table["scale"][1] else None


def make_reward(args, task, journal):
    """(reward function, settings that its scores depend on, chat model of a judge or None).

    args: reward, reward_model, label, and flags of add_reward_flags. journal: of a judge's calls.
    """
    kind, name = args.reward, args.reward_model
    if kind != "classifier" and kind not in task:
        raise BadInput(f"--reward {kind}: prompts/{args.task}.toml has no [{kind}]; write it")
    settings = {"kind": kind, "model": name_of(name), "label": args.label}
    if kind != "classifier":
        settings["prompt_text"] = digest_of(task[kind])
    if kind == "judge":
        temperature = float(args.judge_samples > 1)  # equal ratings need no mean
        sampling = {"max_tokens": args.judge_tokens, "temperature": temperature, "top_p": 1.0}
        chat = open_chat(name, args, journal, **sampling)
        settings |= {"samples": args.judge_samples, **chat.settings}
        return judge_reward(task["judge"], args.judge_samples, chat.ask), settings, chat
    device, dtype = pick_device(args.device, args.dtype)
    settings["dtype"] = str(dtype)
    if kind == "contrast":
        reward = contrast_reward(task["contrast"], name, device, dtype, args.pack_tokens)
    elif name == "smollm2":
        raise BadInput("--reward classifier: needs --model, a reward model or sequence classifier")
    else:
        reward = classifier_reward(name, args.label, device, dtype)
    return reward, settings, None


def add_scores(rows, reward, settings):
    """The rows with both answers' scores, in place."""
    pairs = [row for row in rows if not row.get("error")]
    answers = [text_of(row[side]) for row in pairs for side in SIDES]
    scores = iter(reward([row for row in pairs for _ in SIDES], answers) if pairs else [])
    for row in pairs:
        row["reward"] = dict(settings)
        for side in SIDES:
            value, said, error = next(scores)
            row[f"score_{side}"] = value if value is None or math.isfinite(value) else None
            row["reward"] |= {f"said_{side}": said} if said else {}
            if error:
                row["error"] = f"judge: {error}"
    return rows


# ---- the audit -----------------------------------------------------------------------------------


def is_scored(row):
    """Whether both scores of a row are finite numbers; what is not finite is no score."""
    scores = [row.get(f"score_{side}") for side in SIDES]
    return all(isinstance(score, int | float) and math.isfinite(score) for score in scores)


def text_of(answer):
    """The text of an answer that is a list of messages, or text."""
    return answer if isinstance(answer, str) else answer[-1]["content"]


def audit(rows):
    """What to know of the scores before training on them, as text."""
    scored = [row for row in rows if is_scored(row)]
    gap = np.array([row["score_chosen"] - row["score_rejected"] for row in scored])
    longer = np.array([len(text_of(r["chosen"])) - len(text_of(r["rejected"])) for r in scored])
    failed = sum(bool(row.get("error")) for row in rows)
    without = len(rows) - len(scored) - failed
    lines = [
        f"scored {len(scored)} of {len(rows)} pairs; {without} without a score, {failed} failed"
    ]
    if len(gap):
        won, lost, ties = np.mean(gap > 0), np.mean(gap < 0), np.mean(gap == 0)
        lines.append(f"revisions that won {won:.0%}, lost {lost:.0%}, ties {ties:.0%}")
        mean, rms = gap.mean(), np.sqrt(np.mean(gap**2))
        lines.append(
            f"reward gap (chosen - rejected): mean {mean:+.3f}, root mean square {rms:.3f}"
        )
    if len(gap) > 2 and gap.std() > 0 and longer.std() > 0:
        correlation = np.corrcoef(gap, longer)[0, 1]
        lines.append(f"correlation of the gap with the difference in length {correlation:+.2f}")
    return "\n".join(lines)


# ---- command line --------------------------------------------------------------------------------


def add_reward_flags(parser, kind, model):
    """Flags that score.py and eval.py share; kind and model: their defaults, or None."""
    add, default = parser.add_argument, "that of the pairs"
    # fmt: off
    add("--reward", default=kind, choices=["contrast", "classifier", "judge"], help=f"contrast: log-prob under the task's principle less that under its opposite; classifier: a reward model or sequence classifier; judge: a chat model's rating (default: {kind or default})")
    add("--label", help="label of a classifier of several labels that counts as good")
    add("--pack-tokens", type="count", default=1024, help="tokens of one packed sequence; changes memory and speed, not results (default: %(default)s)")
    add("--judge-samples", type="count", default=1, help="ratings of an answer, at temperature 1 if more than one; their mean is the score (default: %(default)s)")
    add("--judge-tokens", type="count", default=300, help="longest reply of the judge, in tokens (default: %(default)s)")
    # fmt: on


def main():
    parser = make_parser(__doc__, reads="pairs.jsonl")
    add = parser.add_argument
    add_reward_flags(parser, "contrast", "smollm2")
    # fmt: off
    add("--model", default="smollm2", help="model of the reward: 'smollm2' (embedded), a folder, a hub id, or the server's model name (default: %(default)s)")
    add("--in", dest="input", metavar="FILE", help="pairs to score (default: runs/TASK/pairs.jsonl)")
    add("--out", metavar="FILE", help="scored pairs to write (default: scored.jsonl beside --in)")
    add("--batch-size", type="count", default=32, help="rows that are scored, and written, together on this machine (default: %(default)s)")
    add("--dry-run", action="store_true", help="judge: show the first call and an estimate of tokens and cost, and ask nothing")
    # fmt: on
    args = parser.parse_args()
    task = load_task(args.task)
    path = args.input or f"runs/{args.task}/pairs.jsonl"
    out = args.out or str(Path(path).parent / "scored.jsonl")
    if Path(out).resolve() == Path(path).resolve():
        raise BadInput(f"--out {out}: is --in too; name another file")
    source = read_rows(path, "id", "prompt", *SIDES)
    if source[0].get("task", args.task) != args.task:
        raise BadInput(f"{path}: rows of another task; pass --task {source[0]['task']}")
    for row in source:  # what an earlier reward said of them goes
        for name in ("score_chosen", "score_rejected", "reward"):
            row.pop(name, None)
    rows = source[: args.limit]
    if args.dry_run:
        if args.reward != "judge":
            raise BadInput("--dry-run: only --reward judge asks anything")
        answers = [(r, text_of(r[side])) for r in rows if not r.get("error") for side in SIDES]
        calls = [fill(task["judge"]["prompt"], row, answer=answer) for row, answer in answers]
        return show_plan(args, calls * args.judge_samples, args.judge_tokens)

    args.reward_model, journal = args.model, f"{out}.calls"
    reward, settings, judge = make_reward(args, task, journal)
    output = Output(out, args.overwrite, "reward", settings, source)
    print(f"{args.reward} of {args.model}, {len(rows)} pairs, {len(output.done)} done -> {out}")

    size, over = (judge.batch_size, judge.map) if judge else (args.batch_size, map)
    todo = [row for row in rows if row["id"] not in output.done]
    batches = [todo[i : i + size] for i in range(0, len(todo), size)]
    with tqdm(total=len(rows), unit="pair", initial=len(rows) - len(todo)) as bar:
        for batch in over(lambda batch: add_scores(batch, reward, settings), batches):
            for row in batch:
                output.write(row)
            bar.update(len(batch))
    rows = output.close()
    print(f"{out}:\n{audit(rows)}")
    if judge and args.api_base:
        judge.close(not any(row.get("error") for row in rows))
    raise SystemExit(not all(is_scored(row) for row in rows))


if __name__ == "__main__":
    run(main)
