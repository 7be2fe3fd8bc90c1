"""Stage 2 of 4: a reward that is not the teacher's critique scores both answers of every pair.

    python score.py --task sycophancy                                  # contrast, embedded model
    python score.py --task sentiment --reward classifier --model lvwerra/distilbert-imdb --label POSITIVE
    python score.py --task safety --reward judge --model NAME --api-base http://localhost:8000/v1

runs/TASK/pairs.jsonl -> runs/TASK/scored.jsonl: the same rows with score_chosen and score_rejected
(null where no score could be had, never 0) and reward; then an audit of the scores.
"""

import functools
import itertools
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

from generate import Rows, digest_of, encode, load_model, make_parser, open_chat, pick_device, run
from kernels.packed import all_logps, check_model
from prompts import BadInput, as_messages, fill, load_task, read_rows

SIDES = ("chosen", "rejected")


class Score(NamedTuple):
    """A score; None where none could be had. said: a judge's words, or why it said nothing."""

    value: float | None
    said: str = ""

    @property
    def finite(self):
        """The value; what is not finite is no score."""
        return self.value if self.value is not None and math.isfinite(self.value) else None


# ---- the three rewards ---------------------------------------------------------------------------


def contrast_reward(rows, answers, model, tokenizer, table):
    """A Score for each answer, in nats a token:
    r(x, y) = 1/|y| [log pi(y | x, principle) - log pi(y | x, opposite)]

    table: [contrast] of the task file: two lists of messages, behind which the answer stands. Rows
    with `control` have a table of their own, if there is [contrast.control].
    """
    sequences = {"principle": [], "opposite": []}
    for row, answer in zip(rows, answers, strict=True):
        sides = table.get("control", table) if row.get("control") else table
        for side in sequences:
            sequences[side].append(encode(tokenizer, fill(sides[side], row), answer))
    # answers to one prompt are neighbours and share it in the packed sequence
    both = sequences["principle"] + sequences["opposite"]
    good, bad = all_logps(model, both).double().chunk(2)
    gaps = zip((good - bad).tolist(), *sequences.values(), strict=True)
    # equal prompts have the score 0 by definition, not the rounding noise of two sums
    return [Score(0.0 if one == other else gap / len(one[1])) for gap, one, other in gaps]


@torch.no_grad()
def classifier_reward(rows, answers, model, tokenizer, label):
    """A Score for each answer: the logit of a reward model, or the log-odds of `label` in a
    classifier of several labels.

    Sequences run one by one, without padding. As in training by the same code, transformers takes
    the logits at the last token that is not the padding token (transformers#35352).
    """
    labels, scores = model.config.label2id, []
    for row, answer in zip(rows, answers, strict=True):
        prompt = as_messages(row["prompt"])
        if tokenizer.chat_template:  # a reward model reads the whole template
            chat = [*prompt, {"role": "assistant", "content": answer}]
            inputs = tokenizer.apply_chat_template(chat, return_dict=True, return_tensors="pt")
        elif len(labels) > 1:  # a classifier of texts judges the answer, not the request
            inputs = tokenizer(answer, truncation=True, return_tensors="pt")
        else:
            text = "\n".join(message["content"] for message in prompt)
            inputs = tokenizer(text, answer, truncation=True, return_tensors="pt")
        logits = model(**inputs.to(model.device)).logits[0].double()  # (labels,)
        value = logits[0]
        if len(labels) > 1:
            others = [k for name, k in labels.items() if name != label]
            value = logits[labels[label]] - logits[others].logsumexp(0)
        scores.append(Score(value.item()))
    return scores


def judge_reward(rows, answers, ask, table):
    """A Score for each answer: the rating that a chat model gives it by the rubric of [judge].

    ask: as refine() of generate.py has it.
    """
    both = zip(rows, answers, strict=True)
    conversations = [fill(table["prompt"], row, answer=answer) for row, answer in both]
    scores = []
    for reply in ask(conversations, [(row["id"], "judge") for row in rows]):
        rating = rating_of(reply.text, reply.finish, table["scale"])
        scores.append(Score(rating, reply.text or reply.finish))  # of a failed call, why it failed
    return scores


def rating_of(text, finish, scale):
    """The number behind the last "Rating:", if it is on the scale (lowest, highest).

    >>> rating_of("It scores 2 points, not 4. Rating: -3", "stop", (-5, 5))
    -3.0
    >>> rating_of("Rating (1 to 10): 8", "stop", (1, 10))
    8.0
    >>> rating_of("Rating (8). 1. Good.", "stop", (1, 10))
    >>> rating_of("Rating: 40", "stop", (-5, 5))
    """
    pattern = r"(?i)rating(?: \([^)]*[^)\d][^)]*\))?[\s:*_=`\"]*([-+\u2212]?\d+(?:\.\d+)?)"
    found = re.findall(pattern, text)
    if not found or finish == "length":
        return None
    rating = float(found[-1].replace("\u2212", "-"))
    return rating if scale[0] <= rating <= scale[1] else None


def make_reward(args, task, journal):
    """(reward: (rows, answers) -> Scores, settings that they hang on).

    args: reward, reward_model, label, and flags of add_reward_flags. journal: of a judge's calls.
    """
    kind, name = args.reward, args.reward_model
    settings = {"kind": kind, "model": name, "label": args.label}
    if args.api_base and kind != "judge":
        raise BadInput("--api-base: only --reward judge asks a server")
    if kind != "classifier" and kind not in task:
        raise BadInput(f"--reward {kind}: prompts/{args.task}.toml has no [{kind}]; write it")
    settings["prompt_text"] = digest_of(task.get(kind))
    if kind == "judge":
        sampling = {"max_tokens": args.judge_tokens, "temperature": 0.0, "top_p": 1.0}
        chat = open_chat(name, args, journal, **sampling)
        reward = functools.partial(judge_reward, ask=chat.ask, table=task["judge"])
        return reward, settings | chat.settings
    device, dtype = pick_device(args.device, args.dtype)
    settings["dtype"] = str(dtype)
    if kind == "contrast":
        model, tokenizer = load_model(name, device, dtype)
        check_model(model)
        reward = functools.partial(contrast_reward, table=task["contrast"])
    else:
        model, tokenizer = load_model(name, device, dtype, AutoModelForSequenceClassification)
        labels = model.config.label2id
        if len(labels) > 1 and args.label not in labels:
            raise BadInput(f"--label: {name} has the labels {', '.join(labels)}; name the good one")
        reward = functools.partial(classifier_reward, label=args.label)
    return functools.partial(reward, model=model, tokenizer=tokenizer), settings


def add_scores(rows, reward, settings):
    """The rows with both answers' scores; those that failed before as they are."""
    pairs = [row for row in rows if not row.get("error")]
    # a copied draft is scored once: it is a tie, whatever rounding or a judge's mood would say
    asked = {(i, text_of(row[side])): row for i, row in enumerate(pairs) for side in SIDES}
    scores = reward(list(asked.values()), [text for _, text in asked])
    scores = dict(zip(asked, scores, strict=True))
    for i, row in enumerate(pairs):
        row["reward"] = dict(settings)
        for side in SIDES:
            score = scores[i, text_of(row[side])]
            row[f"score_{side}"] = score.finite
            if score.said:
                row["reward"][f"said_{side}"] = score.said
    return rows


# ---- the audit -----------------------------------------------------------------------------------


def is_scored(row):
    """Whether both scores of a row are finite numbers; what is not finite is no score."""
    scores = [row.get(f"score_{side}") for side in SIDES]
    return all(isinstance(score, int | float) and math.isfinite(score) for score in scores)


def text_of(answer):
    """The text of an answer that is a list of messages, or text."""
    return answer if isinstance(answer, str) else answer[-1]["content"]


def repetition(answer):
    """Share of an answer's 4-grams of words that stand in it before, 0 to 1."""
    words = answer.split()
    grams = list(zip(*(words[start:] for start in range(4)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def audit(rows):
    """What to know of the scores before training on them, as text."""
    scored = [row for row in rows if is_scored(row)]
    gap = np.array([row["score_chosen"] - row["score_rejected"] for row in scored])
    longer = np.array([len(text_of(r["chosen"])) - len(text_of(r["rejected"])) for r in scored])
    failed = sum(bool(row.get("error")) for row in rows)
    null = len(rows) - len(scored) - failed
    lines = [f"scored {len(scored)} of {len(rows)} pairs; {null} without a score, {failed} failed"]
    if len(gap):
        won, lost, ties = np.mean(gap > 0), np.mean(gap < 0), np.mean(gap == 0)
        lines.append(f"revisions that won {won:.0%}, lost {lost:.0%}, ties {ties:.0%}")
        mean, rms = f"mean {gap.mean():+.3f}", f"root mean square {np.sqrt(np.mean(gap**2)):.3f}"
        lines.append(f"reward gap (chosen - rejected): {mean}, {rms}")
    if len(gap) > 2 and gap.std() > 0 and longer.std() > 0:
        correlation = np.corrcoef(gap, longer)[0, 1]
        lines.append(f"correlation of the gap with the difference in length {correlation:+.2f}")
    return "\n".join(lines)


# ---- command line --------------------------------------------------------------------------------


def add_reward_flags(parser, kind=None):
    """Flags that score.py and eval.py share. kind: the default reward; None: that of the pairs."""
    add, default = parser.add_argument, "that of the pairs"
    # fmt: off
    add("--reward", default=kind, choices=["contrast", "classifier", "judge"], help=f"contrast: log-prob under the task's principle less that under its opposite; classifier: a reward model or sequence classifier; judge: a chat model's rating (default: {kind or default})")
    add("--label", help="label of a classifier of several labels that counts as good")
    add("--judge-tokens", type=int, default=300, help="longest reply of the judge, in tokens (default: %(default)s)")
    # fmt: on


def main():
    parser = make_parser(__doc__, reads="pairs.jsonl")
    add = parser.add_argument
    add_reward_flags(parser, "contrast")
    # fmt: off
    add("--model", dest="reward_model", metavar="MODEL", default="smollm2", help="model of the reward: 'smollm2' (embedded), a folder, a hub id, or the server's model name (default: %(default)s)")
    add("--in", dest="input", metavar="FILE", help="pairs to score (default: runs/TASK/pairs.jsonl)")
    add("--out", metavar="FILE", help="scored pairs to write (default: scored.jsonl beside --in)")
    add("--batch-size", type=int, default=32, help="rows that are scored, and written, together on this machine (default: %(default)s)")
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
    for row, name in itertools.product(source, ("score_chosen", "score_rejected", "reward")):
        row.pop(name, None)  # what an earlier reward said
    rows = source[: args.limit]

    reward, settings = make_reward(args, task, f"{out}.calls")
    output = Rows(out, args.overwrite)
    for key in [k for k, row in output.rows.items() if "reward" in row and not is_scored(row)]:
        del output.rows[key]  # a judge is asked again
    output.resume("reward", settings, source)
    print(f"{args.reward} of {args.reward_model}: {len(rows)} pairs, {len(output.done)} done")
    size = None if args.api_base else args.batch_size
    for batch in tqdm(output.batches(rows, size), unit="batch"):
        try:
            output.add(*add_scores(batch, reward, settings))
        except (ValueError, TypeError, LookupError) as error:
            names = f"{batch[0]['id']} to {batch[-1]['id']}"
            raise BadInput(f"{path}: rows {names}: {error}") from None
    rows = output.close(source)
    print(f"{out}:\n{audit(rows)}")
    raise SystemExit(not all(is_scored(row) for row in rows))


if __name__ == "__main__":
    run(main)
