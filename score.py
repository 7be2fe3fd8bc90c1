"""Stage 2 of 4: an external reward scores both answers of every pair.

    python score.py --task sycophancy                                     # contrast reward, embedded model
    python score.py --task sentiment --reward classifier --model lvwerra/distilbert-imdb --label POSITIVE
    python score.py --task safety --reward classifier --model OpenAssistant/reward-model-deberta-v3-large-v2

runs/TASK/pairs.jsonl -> runs/TASK/scored.jsonl, the same rows with score_chosen, score_rejected (null where no
score could be had, never 0) and reward; it closes with an audit of how far the scores can be trusted.

Rewards:
    contrast    r(x, y) = 1/|y| [log pi(y | x, principle) - log pi(y | x, opposite)], in nats a token; the two
                system prompts are in prompts/TASK.toml. Needs nothing but a chat model, and the kernel that
                trains also scores.
    classifier  the logit of a sequence classifier or reward model (AutoModelForSequenceClassification)
"""

import contextlib
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

from generate import (
    append,
    encode,
    fail,
    fill,
    latest_task,
    load_model,
    load_task,
    open_output,
    parser_of,
    pick_device,
    pick_dtype,
    read_jsonl,
    template_ids,
)
from kernels.logps import linear_logps

# ---- ALGORITHM: log-probability of an answer ------------------------------------------------------------------


def collate(sequences):
    """Right-padded batch of (prompt ids, completion ids), and where to find the completions' predictions in it.

    Returns input_ids (S, T), attention_mask (S, T), rows (N,), labels (N,), cu_seqlens (S + 1,), all int64.
    `rows` index the hidden states flattened to (S * T, D). The state at position t predicts the token at t + 1,
    so a completion's first token is predicted at the prompt's last position, and prompt tokens by none:

    >>> ids, mask, rows, labels, cu = collate([([5, 6], [7, 2]), ([5], [8, 9, 2])])
    >>> ids.tolist(), mask.tolist()
    ([[5, 6, 7, 2], [5, 8, 9, 2]], [[1, 1, 1, 1], [1, 1, 1, 1]])
    >>> rows.tolist(), labels.tolist(), cu.tolist()
    ([1, 2, 4, 5, 6], [7, 2, 8, 9, 2], [0, 2, 5])
    """
    width = max(len(prompt) + len(completion) for prompt, completion in sequences)
    input_ids = torch.zeros(len(sequences), width, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    rows, labels, cu_seqlens = [], [], [0]
    for s, (prompt, completion) in enumerate(sequences):
        length = len(prompt) + len(completion)
        input_ids[s, :length] = torch.tensor(prompt + completion)
        attention_mask[s, :length] = 1
        rows.extend(range(s * width + len(prompt) - 1, s * width + length - 1))
        labels.extend(completion)
        cu_seqlens.append(len(labels))
    return input_ids, attention_mask, torch.tensor(rows), torch.tensor(labels), torch.tensor(cu_seqlens)


def completion_logps(model, sequences):
    """log pi(completion | prompt) of each (prompt ids, completion ids): (S,) fp32, in nats, differentiable.

    The vocabulary is met by the completion tokens alone, and their logits are never held all at once.
    """
    device = next(model.parameters()).device
    input_ids, attention_mask, rows, labels, cu_seqlens = (tensor.to(device) for tensor in collate(sequences))
    hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]  # (S, T, D)
    head = model.get_output_embeddings()
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else head.weight.dtype
    return linear_logps(
        hidden.flatten(0, 1)[rows].to(dtype),
        head.weight.to(dtype),
        labels,
        cu_seqlens,
        bias=getattr(head, "bias", None),
        **head_options(model.config),
    )


@torch.no_grad()
def all_logps(model, sequences, size, report=lambda count: None):
    """completion_logps of any number of sequences, `size` at a time, like lengths together: (S,) fp32 on the CPU."""
    order = sorted(range(len(sequences)), key=lambda i: sum(map(len, sequences[i])))
    logps = torch.zeros(len(sequences))
    for start in range(0, len(order), size):
        part = order[start : start + size]
        logps[part] = completion_logps(model, [sequences[i] for i in part]).cpu()
        report(len(part))
    return logps


def head_options(config):
    """What a model does to its logits behind the matrix product, as arguments of linear_logps."""
    config = config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
    return {"logit_scale": scale, "softcap": getattr(config, "final_logit_softcapping", None) or 0.0}  # Gemma


@torch.no_grad()
def check_head(model, name):
    """Stops if completion_logps differs from the model's own logits: an output head we would misread."""
    ids = list(range(3, 11))
    device = next(model.parameters()).device
    with torch.autocast(device.type, enabled=False):
        ours = completion_logps(model, [(ids[:3], ids[3:])]).item()
        logits = model(input_ids=torch.tensor([ids], device=device)).logits[0, 2:-1].float()
    theirs = logits.log_softmax(-1).gather(-1, torch.tensor(ids[3:], device=device)[:, None]).sum().item()
    if abs(ours - theirs) > 0.02 * abs(theirs) + 0.1:
        fail(f"--model {name}: log-prob {ours:.3f} here, {theirs:.3f} by its own logits; this head is not supported")


# ---- ALGORITHM: rewards. Each is a function (rows, answers) -> list of float or None ---------------------------


def contrast_reward(task, name, device, dtype, size):
    """The contrast reward of the task file with the chat model `name`."""
    sides = [task["contrast"][side] for side in ("principle", "opposite")]
    user = {"role": "user", "content": task["contrast"].get("user", "{prompt}")}
    model, tokenizer = load_model(name, device, dtype)
    check_head(model, name)

    def reward(rows, answers):
        sequences = []
        for row, answer in zip(rows, answers, strict=True):
            # The principle takes the place of the instruction's own system prompt.
            turns = {**row, "prompt": [m for m in row["prompt"] if m["role"] != "system"]}
            for system in sides:
                messages = fill([{"role": "system", "content": system}, user], turns)
                sequences.append(encode(tokenizer, messages, answer))
        lengths = torch.tensor([len(completion) for _, completion in sequences[::2]])
        principle, opposite = all_logps(model, sequences, size).view(-1, 2).unbind(1)
        return ((principle - opposite) / lengths).tolist()

    return reward


def classifier_reward(name, label, device, dtype):
    """The score that a sequence classifier gives to (prompt, answer).

    One label: its logit, as reward models have it. Several: the log-odds of `label` against all others.
    Only sequences of equal length share a batch, so none is padded and no score depends on its neighbours
    (with padding, transformers takes the last token that is not the padding token, which may be an inner one).
    """
    model, tokenizer = load_model(name, device, dtype, AutoModelForSequenceClassification)
    labels = model.config.label2id
    if model.config.num_labels > 1 and label not in labels:
        fail(f"--label: {name} knows the labels {', '.join(labels)}; choose the one that counts as good")

    @torch.no_grad()
    def reward(rows, answers):
        by_length = {}
        for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            if tokenizer.chat_template:
                ids = template_ids(tokenizer, [*row["prompt"], {"role": "assistant", "content": answer}])
            elif len(labels) > 1:  # a plain text classifier judges the answer, not the request
                ids = tokenizer(answer, truncation=True)["input_ids"]
            else:
                ids = tokenizer("\n".join(m["content"] for m in row["prompt"]), answer, truncation=True)["input_ids"]
            by_length.setdefault(len(ids), []).append((i, ids))
        scores = [None] * len(answers)
        for group in by_length.values():
            places, ids = zip(*group, strict=True)
            logits = model(input_ids=torch.tensor(ids, device=device)).logits.double()  # (rows, labels)
            if len(labels) > 1:
                good = labels[label]
                others = [k for k in range(logits.shape[1]) if k != good]
                logits = (logits[:, good] - logits[:, others].logsumexp(1))[:, None]
            for i, value in zip(places, logits[:, 0].tolist(), strict=True):
                scores[i] = value
        return scores

    return reward


def make_reward(args, task):
    """(reward function, settings that its scores depend on) for the arguments of score.py or eval.py."""
    device = pick_device(args.device)
    name = args.reward_model
    settings = {"kind": args.reward, "model": name}
    if args.reward == "contrast":
        if not {"principle", "opposite"} <= task.get("contrast", {}).keys():
            fail(f"prompts/{args.task}.toml: the table [contrast] needs principle and opposite")
        settings["prompt_text"] = hashlib.sha256(json.dumps(task["contrast"]).encode()).hexdigest()[:12]
        return contrast_reward(task, name, device, pick_dtype(args.dtype, device), args.batch_size), settings
    if name == "smollm2":
        fail("--reward classifier needs --model: a sequence classifier or reward model (folder or hub id)")
    settings["label"] = args.label
    return classifier_reward(name, args.label, device, pick_dtype(args.dtype, device)), settings


# ---- audit ----------------------------------------------------------------------------------------------------


def audit(rows):
    """What a reader must know of the scores before training on them, as text."""
    scored = [row for row in rows if is_scored(row)]
    failed, null = sum("error" in row for row in rows), sum("error" not in row for row in rows) - len(scored)
    lines = [f"scored {len(scored)} of {len(rows)} pairs ({null} without a score, {failed} failed before)"]
    if scored:
        gap = np.array([row["score_chosen"] - row["score_rejected"] for row in scored])
        text = [(text_of(row["chosen"]), text_of(row["rejected"])) for row in scored]
        longer = np.array([len(chosen) - len(rejected) for chosen, rejected in text], dtype=float)
        lines.append(f"mean gap (chosen - rejected) {gap.mean():+.3f}, standard deviation {gap.std():.3f}")
        lines.append(
            f"revisions that won {np.mean(gap > 0):.0%}, lost {np.mean(gap < 0):.0%}, ties {np.mean(gap == 0):.0%}"
        )
        if len(scored) > 2 and gap.std() > 0 and longer.std() > 0:
            correlation = np.corrcoef(gap, longer)[0, 1]
            lines.append(f"correlation of the gap with the difference in length {correlation:+.2f}")
    return "\n".join(lines)


def is_scored(row):
    """Whether a row has two numbers as scores."""
    return all(isinstance(row.get(name), int | float) for name in ("score_chosen", "score_rejected"))


def text_of(answer):
    """The text of an answer that is a list of messages or plain text."""
    return answer if isinstance(answer, str) else answer[-1]["content"]


# ---- command line ---------------------------------------------------------------------------------------------


def add_reward_flags(add, model_flag):
    """Flags that score.py and eval.py share. model_flag: '--model' or '--reward-model'."""
    # fmt: off
    add("--reward", default="contrast", choices=["contrast", "classifier"], help="what scores an answer (default: %(default)s)")
    add(model_flag, dest="reward_model", default="smollm2", metavar="NAME", help="model of the reward: 'smollm2' (embedded), a folder or a hub id (default: %(default)s)")
    add("--label", help="label of a classifier with several labels that counts as good")
    add("--batch-size", type=int, default=8, help="sequences a forward pass of the reward (default: %(default)s)")
    # fmt: on


def main():
    parser = parser_of(__doc__, latest_task("pairs.jsonl"))
    add_reward_flags(parser.add_argument, "--model")
    parser.add_argument("--in", dest="input", metavar="FILE", help="pairs to score (default: runs/TASK/pairs.jsonl)")
    parser.add_argument("--out", metavar="FILE", help="scored pairs to write (default: scored.jsonl beside --in)")
    args = parser.parse_args()

    task = load_task(args.task)
    source = Path(args.input or f"runs/{args.task}/pairs.jsonl")
    rows = read_jsonl(source, ["id", "prompt", "chosen", "rejected"])[: args.limit]
    if all("error" in row for row in rows):
        fail(f"{source}: every row has an error; nothing to score")
    reward, settings = make_reward(args, task)
    out = Path(args.out or source.parent / "scored.jsonl")
    done, file = open_output(out, args.overwrite, lambda row: row.get("reward"), settings)
    finished = {row["id"] for row in done}
    print(f"reward {args.reward} ({args.reward_model}), {len(rows)} pairs, {len(finished)} of them done -> {out}")

    todo = [row for row in rows if row["id"] not in finished]
    window = 4 * args.batch_size  # rows written together: enough sequences to put like lengths together
    with file, tqdm(total=len(rows), initial=len(finished), unit="pair") as bar:
        for start in range(0, len(todo), window):
            batch = todo[start : start + window]
            whole = [row for row in batch if "error" not in row]
            answers = [text_of(row[side]) for row in whole for side in ("chosen", "rejected")]
            values = iter(reward([row for row in whole for _ in range(2)], answers) if whole else [])
            for row in batch:
                if "error" not in row:
                    for name in ("score_chosen", "score_rejected"):
                        value = next(values)
                        row[name] = value if value is not None and math.isfinite(value) else None
                    row["reward"] = settings
                append(file, row)
                done.append(row)
                bar.update()
    print(f"{out}:\n{audit(done)}")
    raise SystemExit(1 if any("error" in row or not is_scored(row) for row in done) else 0)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
        raise SystemExit(0)
    raise SystemExit(130)
