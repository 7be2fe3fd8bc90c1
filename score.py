"""Stage 2 of 4: an external reward scores both answers of every pair.

    python score.py --task sycophancy                                     # contrast reward, embedded model
    python score.py --task sentiment --reward classifier --model lvwerra/distilbert-imdb --label POSITIVE
    python score.py --task safety --reward classifier --model OpenAssistant/reward-model-deberta-v3-large-v2
    python score.py --task safety --reward judge --model Qwen/Qwen2.5-72B-Instruct --api-base http://localhost:8000/v1

runs/TASK/pairs.jsonl -> runs/TASK/scored.jsonl, the same rows with score_chosen, score_rejected (null where no
score could be had, never 0) and reward; it closes with an audit of how far the scores can be trusted.

Rewards:
    contrast    r(x, y) = 1/|y| [log pi(y | x, principle) - log pi(y | x, opposite)], in nats a token; the two
                sides are in prompts/TASK.toml. Needs nothing but a chat model, and the kernel that trains also
                scores.
    classifier  the logit of a sequence classifier or reward model (AutoModelForSequenceClassification)
    judge       a chat model rates the answer by the task's rubric, here or on a server (--api-base)
"""

import itertools
import math
import re
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention.flex_attention import create_block_mask
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForSequenceClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from generate import (
    Server,
    add_server_flags,
    append,
    check_served,
    check_server,
    check_task,
    commit,
    digest_of,
    encode,
    fail,
    fill,
    in_order,
    is_conversation,
    latest_task,
    load_chat_model,
    load_model,
    load_task,
    messages_of,
    open_output,
    parser_of,
    pick_device,
    pick_dtype,
    positive,
    put_in_order,
    read_jsonl,
    run_stage,
    sample,
    seed_of,
    show_plan,
    template_ids,
)
from kernels.logps import linear_logps

# ---- ALGORITHM: log-probability of an answer ------------------------------------------------------------------


def collate(sequences, share_prompt=True):
    """One stream of tokens without padding from a list of (prompt ids, completion ids).

    Neighbours with the same prompt share it: it stands in the stream once, and each completion behind it sees the
    prompt and itself, never its neighbour (prefix sharing, as in github.com/frankxwang/dpo-prefix-sharing). Without
    share_prompt every completion has a prompt of its own.

    Returns input_ids (1, T), position_ids (1, T), groups (T,), branches (T,), rows (N,), labels (N,), cu_seqlens
    (S + 1,). A group is a prompt with its completions; in it, branch 0 is the prompt and 1, 2, ... are the completions.
    `rows` are the places in the stream whose hidden states predict `labels`: the token before each label, which for
    every completion's first token is the end of the prompt.

    >>> ids, positions, groups, branches, rows, labels, cu = collate([([5, 6], [7, 2]), ([5, 6], [8, 2])])
    >>> ids.tolist(), positions.tolist()
    ([[5, 6, 7, 2, 8, 2]], [[0, 1, 2, 3, 2, 3]])
    >>> rows.tolist(), labels.tolist(), cu.tolist()
    ([1, 2, 1, 4], [7, 2, 8, 2], [0, 2, 4])
    >>> place = torch.arange(6)
    >>> sees(groups, branches)(0, 0, place[:, None], place)[4].int().tolist()  # the 8 sees the prompt and itself
    [1, 1, 0, 0, 1, 0]
    """
    ids, positions, groups, branches = [], [], [], []
    rows, labels, cu_seqlens = [], [], [0]
    last_prompt, group, branch = None, 0, 0
    for prompt, completion in sequences:
        if prompt != last_prompt or not share_prompt:
            last_prompt, group, branch, end = prompt, group + 1, 0, len(ids) + len(prompt) - 1
            ids += prompt
            positions += range(len(prompt))
            groups += [group] * len(prompt)
            branches += [0] * len(prompt)
        branch += 1
        rows += [end, *range(len(ids), len(ids) + len(completion) - 1)]
        ids += completion
        positions += range(len(prompt), len(prompt) + len(completion))
        groups += [group] * len(completion)
        branches += [branch] * len(completion)
        labels += completion
        cu_seqlens.append(len(labels))
    return tuple(map(torch.tensor, ([ids], [positions], groups, branches, rows, labels, cu_seqlens)))


def sees(groups, branches):
    """Which token of a stream sees which, as FlexAttention asks for it: (batch, head, query, key) -> bool."""

    def rule(batch, head, query, key):
        prompt_or_own = (branches[key] == 0) | (branches[query] == branches[key])
        return (query >= key) & (groups[query] == groups[key]) & prompt_or_own

    return rule


def attention_by_parts(module, query, key, value, mask, scaling=None, parts=None, **options):
    """Attention of a stream, for models set to "by_parts": the scores that a (T, T) mask would hide are not computed.

    On a CPU this takes less than half the time of SDPA with a mask, whose backward pass gains nothing from what is
    hidden. In bf16 the scores are rounded to it, as in a plain implementation; SDPA keeps them in fp32.
    query, key, value: (1, heads, T, d), of key and value perhaps fewer heads; parts: as parts_of gives them, without
    them plain SDPA. Returns (1, T, heads, d) and None, as transformers asks for it.
    """
    if parts is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=scaling, **options)
    key = key * (key.shape[-1] ** -0.5 if scaling is None else scaling)
    key, value = (operand.squeeze(0).to(value.dtype) for operand in (key, value))
    # heads that share their keys stand side by side, so that those of a block of tokens are rows of one product
    query = query.squeeze(0).unflatten(0, (len(key), -1)).transpose(1, 2)
    seen = ByParts.apply(query.to(value.dtype).contiguous(), key, value, parts)
    return seen.transpose(0, 1).flatten(1, 2)[None], None


BLOCK = 128  # queries whose scores are computed together: few compute little in vain, many fill the matrix products


class ByParts(torch.autograd.Function):
    """softmax(query key^T) value, block by block: query (groups, T, heads of a group, d), key (groups, T, d) and value
    (groups, T, e) give (groups, T, heads of a group, e).

    The derivative is written out, because autograd would widen the gradient of every slice to the whole stream and add
    them up. That of the weights A = softmax(S) is dA = dO V^T, and dS = A (dA - sum of A dA over the keys).
    """

    @staticmethod
    def forward(ctx, query, key, value, parts):
        seen, kept = query.new_empty(*query.shape[:3], value.shape[-1]), []
        for rows, *columns in blocks_of(parts):
            size = rows.stop - rows.start
            scores = torch.bmm(query[:, rows].flatten(1, 2), join(key, columns).mT)
            # of the keys, the last are the queries' own tokens, which must not see those behind them
            own = scores.unflatten(1, (size, -1))[..., -size:]
            own += scores.new_full((size, size), -math.inf).triu(1)[:, None]
            weights = scores.softmax(-1).to(value.dtype)  # CUDA's autocast leaves it in fp32
            seen[:, rows] = torch.bmm(weights, join(value, columns)).unflatten(1, (size, -1))
            kept += [weights] if any(ctx.needs_input_grad) else []
        ctx.parts = parts
        ctx.save_for_backward(query, key, value, *kept)
        return seen

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dseen):
        query, key, value, *kept = ctx.saved_tensors
        dquery = torch.empty_like(query)
        wide = torch.promote_types(value.dtype, torch.float32)  # for sums over blocks
        dkey, dvalue = (torch.zeros_like(part, dtype=wide) for part in (key, value))
        for (rows, *columns), weights in zip(blocks_of(ctx.parts), kept, strict=True):
            above = dseen[:, rows].flatten(1, 2)
            dweights = torch.bmm(above, join(value, columns).mT)
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            dquery[:, rows] = torch.bmm(dscores, join(key, columns)).view_as(dquery[:, rows])
            add(dkey, columns, torch.bmm(dscores.mT, query[:, rows].flatten(1, 2)))
            add(dvalue, columns, torch.bmm(weights.mT, above))
        return dquery, dkey.to(key.dtype), dvalue.to(value.dtype), None


def blocks_of(parts):
    """(queries, the prompt before them, their own part up to them) of each block, as slices of the stream."""
    prompt = none = slice(0, 0)
    for branch, start, end in parts:
        for first in range(start, end, BLOCK):
            last = min(first + BLOCK, end)
            yield slice(first, last), prompt if branch else none, slice(start, last)
        if branch == 0:
            prompt = slice(start, end)


def join(keys, columns):
    """Slices of (groups, T, d) in a row."""
    return torch.cat([keys[:, column] for column in columns], 1)


def add(total, columns, values):
    """The inverse of join: its parts are added where they came from."""
    sizes = [column.stop - column.start for column in columns]
    for column, part in zip(columns, values.split(sizes, 1), strict=True):
        total[:, column] += part


AttentionInterface.register("by_parts", attention_by_parts)


def parts_of(groups, branches):
    """[(branch, start, end)] of the prompts and completions of a stream, in order."""
    kinds, counts = torch.unique_consecutive(torch.stack([groups, branches]), dim=1, return_counts=True)
    ends = counts.cumsum(0).tolist()
    return list(zip(kinds[1].tolist(), [0, *ends[:-1]], ends, strict=True))


def attention_of(model, groups, branches):
    """Arguments that tell a model who sees whom in a stream of T tokens: a mask (1, 1, T, T) bool for SDPA; where the
    model was set to "flex_attention" or "by_parts", which skip what is masked, FlexAttention's blocks or the parts.
    """
    size, rule, kind = len(groups), sees(groups, branches), model.config._attn_implementation
    if kind == "by_parts":
        return {"attention_mask": None, "parts": parts_of(groups, branches)}
    if kind == "flex_attention":
        return {"attention_mask": create_block_mask(rule, None, None, size, size, device=groups.device)}
    place = torch.arange(size, device=groups.device)
    return {"attention_mask": rule(0, 0, place[:, None], place)[None, None]}


def completion_logps(model, sequences, share_prompt=True):
    """log pi(completion | prompt) of each (prompt ids, completion ids): (S,) fp32, in nats, differentiable.

    The vocabulary is met by the completion tokens alone, and their logits are never held all at once.
    """
    if not getattr(model, "packs", True) and len(sequences) > 1:
        return torch.cat([completion_logps(model, [sequence]) for sequence in sequences])
    device = next(model.parameters()).device
    stream = (part.to(device) for part in collate(sequences, share_prompt))
    input_ids, position_ids, groups, branches, rows, labels, cu_seqlens = stream
    # one sequence needs plain causal attention only, which every kind of model has
    attention = attention_of(model, groups, branches) if len(sequences) > 1 else {}
    hidden = model.base_model(
        input_ids=input_ids, position_ids=position_ids, use_cache=False, **attention
    ).last_hidden_state[0]  # (T, D)
    head = model.get_output_embeddings()
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else head.weight.dtype
    bias = getattr(head, "bias", None)
    return linear_logps(
        hidden[rows].to(dtype),
        head.weight.to(dtype),
        labels,
        cu_seqlens,
        bias=bias if bias is None else bias.to(dtype),
        **head_options(model.config),
    )


def cut(items, cost, budget):
    """Lists of neighbouring items that cost at most `budget` together; an item above it has a list of its own."""
    part, spent = [], 0
    for item in items:
        if part and spent + cost(item) > budget:
            yield part
            part, spent = [], 0
        part.append(item)
        spent += cost(item)
    if part:
        yield part


@torch.no_grad()
def all_logps(model, sequences, budget, report=lambda count: None):
    """completion_logps of any number of sequences, in streams of at most `budget` tokens: (S,) fp32 on the CPU."""
    shared = (list(group) for _, group in itertools.groupby(sequences, key=lambda sequence: sequence[0]))
    logps = [torch.zeros(0)]
    for groups in cut(shared, lambda group: len(group[0][0]) + sum(len(ids) for _, ids in group), budget):
        stream = [sequence for group in groups for sequence in group]
        logps.append(completion_logps(model, stream).cpu())
        report(len(stream))
    return torch.cat(logps)


def head_options(config):
    """What a model does to its logits behind the matrix product, as arguments of linear_logps."""
    config = config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
    return {"logit_scale": scale, "softcap": getattr(config, "final_logit_softcapping", None) or 0.0}  # Gemma


@torch.no_grad()
def check_model(model, name, logps=completion_logps, by_parts=False):
    """Stops where logps(model, sequences) would misread the model's head; sets model.packs where streams are exact for it.

    by_parts: whether to go over from "sdpa" to attention_by_parts, where that is exact too.
    The known answer is the model's own logits, one sequence at a time. Streams are not exact for recurrent layers or
    for positions that come from the mask; such models, and those with a sliding window, run sequence by sequence.
    """
    device = next(model.parameters()).device
    sequences = [([3, 4, 5], [6, 7, 8, 9]), ([3, 4, 5], [10, 11]), ([12, 13], [14, 15, 16])]
    own = []
    for prompt, completion in sequences:
        logits = model(input_ids=torch.tensor([prompt + completion], device=device)).logits[0, len(prompt) - 1 : -1]
        labels = torch.tensor(completion, device=device)[:, None]
        own.append(logits.double().log_softmax(-1).gather(-1, labels).sum().cpu())
    own = torch.stack(own)
    tolerance = own.abs() * (1e-3 if logits.dtype == torch.float32 else 2e-2) + 1e-2

    def exact():
        return bool(((logps(model, sequences).cpu() - own).abs() <= tolerance).all())

    model.packs = False
    if not exact():
        fail(
            f"--model {name}: log-probs differ from those of its own logits; this kind of output head is not supported"
        )
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    model.packs = kinds == {"full_attention"} and not window
    if model.packs:
        model.packs = exact()
    if model.packs and by_parts:
        try:
            model.set_attn_implementation("by_parts")
            by_parts = model.config._attn_implementation == "by_parts" and exact()
        except (TypeError, KeyError, ValueError, RuntimeError):  # `parts` is not handed on, or meets another attention
            by_parts = False
        if not by_parts:
            model.set_attn_implementation("sdpa")


# ---- ALGORITHM: rewards. Each is a function (rows, answers) -> list of Score -----------------------------------


@dataclass
class Score:
    """What a reward gives an answer: a number, or None where none could be had. Of a judge also its words, why it could not
    be asked (the next run asks again), how many of its ratings could not be read, and what it read and wrote."""

    value: float | None
    said: str | None = None
    fault: str | None = None
    unread: int = 0
    prompt_tokens: int = 0
    tokens: int = 0

    def __post_init__(self):
        if self.value is not None and not math.isfinite(self.value):
            self.value = None


def contrast_reward(task, name, device, dtype, pack_tokens):
    """The contrast reward of the task file with the chat model `name`.

    A side is a list of messages with placeholders, like a call of generate.py; the answer stands behind it. Rows with
    `control` have sides of their own where the table has a part [contrast.control].
    """
    table = task["contrast"]
    model, tokenizer = load_chat_model(name, device, dtype)
    check_model(model, name)

    def reward(rows, answers):
        sequences = []  # under the principle, then under its opposite; answers to one prompt stay neighbours
        for side in ("principle", "opposite"):
            for row, answer in zip(rows, answers, strict=True):
                part = table.get("control", table) if row.get("control") else table
                sequences.append(encode(tokenizer, fill(part[side], row), answer))
        lengths = torch.tensor([len(completion) for _, completion in sequences[: len(answers)]])
        principle, opposite = all_logps(model, sequences, pack_tokens).view(2, -1)
        scores = (principle - opposite) / lengths
        # Where both sides are one and the same prompt the score is 0 by definition, not the noise of two sums.
        same = [a == b for a, b in zip(sequences[: len(answers)], sequences[len(answers) :], strict=True)]
        return [Score(score) for score in scores.masked_fill(torch.tensor(same), 0.0).tolist()]

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
            turns = messages_of(row["prompt"])
            if tokenizer.chat_template:
                inputs = {"input_ids": template_ids(tokenizer, [*turns, {"role": "assistant", "content": answer}])}
            elif len(labels) > 1:  # a plain text classifier judges the answer, not the request
                inputs = dict(tokenizer(answer, truncation=True))
            else:
                inputs = dict(tokenizer("\n".join(m["content"] for m in turns), answer, truncation=True))
            # Without a padding token in its configuration, transformers takes one sequence at a time.
            batch = len(inputs["input_ids"]) if model.config.pad_token_id is not None else (len(by_length), "alone")
            by_length.setdefault(batch, []).append((i, inputs))
        scores = [None] * len(answers)
        for group in by_length.values():
            places, inputs = zip(*group, strict=True)
            batch = {key: torch.tensor([one[key] for one in inputs], device=device) for key in inputs[0]}
            logits = model(**batch).logits.double()  # (rows, labels)
            if len(labels) > 1:
                good = labels[label]
                others = [k for k in range(logits.shape[1]) if k != good]
                logits = (logits[:, good] - logits[:, others].logsumexp(1))[:, None]
            for i, value in zip(places, logits[:, 0].tolist(), strict=True):
                scores[i] = Score(value)
        return scores

    return reward


def judge_reward(task, args, chat):
    """The mean rating that a judge gives by the rubric of the task's [judge] table; None where none can be read.

    chat: (conversations, ids, seeds) -> list of Reply. args: judge_samples, seed.
    """
    table = task["judge"]
    call = [{"role": "user", "content": table["prompt"]}]

    def reward(rows, answers):
        conversations, ids, seeds = [], [], []
        for row, answer in zip(rows, answers, strict=True):
            for k in range(args.judge_samples):
                conversations.append(fill(call, row, answer=answer))
                ids.append(row["id"])
                seeds.append(seed_of(args.seed, row["id"], "judge", k))
        replies = chat(conversations, ids, seeds)
        scores = []
        for start in range(0, len(replies), args.judge_samples):
            said = replies[start : start + args.judge_samples]
            fault = next((reply.finish for reply in said if reply.finish.startswith("error")), None)
            ratings = [rating for reply in said if (rating := rating_of(reply, table)) is not None]
            score = Score(sum(ratings) / len(ratings) if ratings and not fault else None, fault=fault)
            score.said, score.unread = "\n----\n".join(reply.text for reply in said), len(said) - len(ratings)
            score.prompt_tokens = sum(reply.prompt_tokens for reply in said)
            score.tokens = sum(reply.tokens for reply in said)
            scores.append(score)
        return scores

    return reward


def rating_of(reply, table):
    """The rating in a judge's reply: the number behind the last "Rating:" (or the table's `phrase`), if it is inside
    the scale and the reply was not cut off; else None. Where the server gave log-probs, and a token wrote the whole number,
    the mean over the ratings that were likely in its place.

    >>> from generate import Reply
    >>> table = {"scale": [-5, 5], "phrase": "Overall sentiment:"}
    >>> rating_of(Reply("It scores 2 points, not 4. Overall sentiment: -3", "stop"), table)
    -3.0
    >>> rating_of(Reply("Overall sentiment: 40", "stop"), table)
    """
    low, high = table["scale"]
    phrase = re.escape(table.get("phrase", "Rating:").rstrip(": "))
    pattern = re.compile(rf"{phrase}[\s:*_=`\"]*([-+\u2212]?\d+(?:\.\d+)?)", re.IGNORECASE)
    found = pattern.findall(reply.text)
    rating = float(found[-1].replace("\u2212", "-")) if found else None
    if rating is None or not low <= rating <= high or reply.finish == "length":
        return None
    ends = list(itertools.accumulate(len(token) for token, _ in reply.logprobs or ()))
    matches = list(pattern.finditer("".join(token for token, _ in reply.logprobs or ())))
    place = next((i for i, end in enumerate(ends) if matches and matches[-1].start(1) < end), None)
    if place is None or reply.logprobs[place][0].strip() != found[-1]:
        return rating
    weights = {}
    for token, logp in reply.logprobs[place][1]:
        if re.fullmatch(r"[0-9]+", token.strip()) and low <= int(token) <= high:
            weights[int(token)] = weights.get(int(token), 0.0) + math.exp(logp)
    if not weights or (high > 9 and max(weights) <= 9):  # digit by digit, a 1 may be the beginning of a 10
        return rating
    return sum(value * weight for value, weight in weights.items()) / sum(weights.values())


def family(name):
    """What models of one make have in common in their names: 'qwen' of 'Qwen/Qwen2.5-7B-Instruct'."""
    return re.split(r"[^a-z]", name.lower().rstrip("/").rpartition("/")[2])[0]


def make_reward(args, task, out):
    """(reward function, settings that its scores depend on) for the arguments of score.py or eval.py, which writes `out`."""
    if args.reward == "judge":
        return make_judge(args, task, out)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    name = args.reward_model
    settings = {"kind": args.reward, "model": name, "dtype": str(dtype).removeprefix("torch.")}
    if args.reward == "contrast":
        if "contrast" not in task:
            fail(f"prompts/{args.task}.toml: the table [contrast] is missing; write it, or choose another --reward")
        settings["prompt_text"] = digest_of(task["contrast"])
        reward = contrast_reward(task, name, device, dtype, args.pack_tokens)
    else:
        if name == "smollm2":
            fail("--reward classifier needs --model: a sequence classifier or reward model (folder or hub id)")
        settings["label"] = args.label
        reward = classifier_reward(name, args.label, device, dtype)
    reward.server = None
    return reward, settings


def judge_settings(args, task):
    """(the task's table [judge], sampling settings of the judge); stops where one of them will not do."""
    table = task.get("judge", {})
    if not table:
        fail(f"prompts/{args.task}.toml: the table [judge] is missing; write it, or choose another --reward")
    if args.judge_samples > 1 and args.judge_temperature == 0:
        fail("--judge-samples: above 1 they need a --judge-temperature above 0, else all are the same")
    return table, {"max_tokens": args.judge_tokens, "temperature": args.judge_temperature, "top_p": 1.0}


def make_judge(args, task, out):
    """make_reward for a judge: on a server, whose answers are kept beside `out` until it is whole, or on this machine."""
    table, how = judge_settings(args, task)
    settings = {"kind": "judge", "model": args.reward_model, "samples": args.judge_samples, **how}
    settings["prompt_text"] = digest_of(table)
    server = None
    if args.api_base:
        check_served(args.reward_model, "--model (eval.py: --reward-model)")
        server = Server(args, f"{out}.calls")
        more = {"logprobs": True, "top_logprobs": 20} if args.judge_logprobs else {}
        settings |= {"logprobs": args.judge_logprobs}

        def chat(conversations, ids, seeds):
            calls = zip(conversations, ids, seeds, strict=True)
            return [server.ask(m, row=i, model=args.reward_model, seed=k, **how, **more) for m, i, k in calls]
    else:
        device = pick_device(args.device)
        dtype = pick_dtype(args.dtype, device)
        settings["dtype"] = str(dtype).removeprefix("torch.")
        model, tokenizer = load_chat_model(args.reward_model, device, dtype)

        def chat(conversations, ids, seeds):
            return sample(model, tokenizer, conversations, seeds=seeds, **how)

    reward = judge_reward(task, args, chat)
    reward.server = server
    return reward, settings


# ---- audit ----------------------------------------------------------------------------------------------------


def audit(rows):
    """(what a reader must know of the scores before training on them, as text; rows that failed; rows without scores)."""
    gap, longer, failed, unscored, teachers, judge = array("d"), array("d"), 0, 0, set(), None
    counts = dict.fromkeys(("ratings", "unread", "prompt_tokens", "tokens"), 0)
    for row in rows:
        if row.get("reward", {}).get("kind") == "judge":
            judge = row["reward"]["model"]
        if isinstance(row.get("teacher"), dict):
            teachers.add(row["teacher"].get("model") or "")
        if "error" in row:
            failed += 1
            continue
        if judge:
            counts["ratings"] += len(SIDES) * row["reward"]["samples"]
            for name in ("unread", "prompt_tokens", "tokens"):
                counts[name] += row["reward"].get(name, 0)
        if is_scored(row):
            gap.append(row["score_chosen"] - row["score_rejected"])
            longer.append(len(text_of(row["chosen"])) - len(text_of(row["rejected"])))
        else:
            unscored += 1
    gap, longer, total = np.array(gap), np.array(longer), len(gap) + failed + unscored
    lines = [f"scored {len(gap)} of {total} pairs ({unscored} without a score, {failed} failed)"]
    if len(gap):
        lines.append(f"mean gap (chosen - rejected) {gap.mean():+.3f}, standard deviation {gap.std():.3f}")
        lines.append(
            f"revisions that won {np.mean(gap > 0):.0%}, lost {np.mean(gap < 0):.0%}, ties {np.mean(gap == 0):.0%}"
        )
        if len(gap) > 2 and gap.std() > 0 and longer.std() > 0:
            correlation = np.corrcoef(gap, longer)[0, 1]
            lines.append(f"correlation of the gap with the difference in length {correlation:+.2f}")
    if judge:
        unread, read, written = (counts[name] for name in ("unread", "prompt_tokens", "tokens"))
        lines.append(f"ratings of the judge that could not be read {unread / max(1, counts['ratings']):.0%}")
        lines.append(f"tokens of the judge: {read:,} read, {written:,} written")
        if family(judge) in {family(teacher) for teacher in teachers} - {""}:
            lines.append("judge and teacher are of one family: it may favour its own kind of answer")
    return "\n".join(lines), failed, unscored


SIDES = ("chosen", "rejected")


def is_scored(row):
    """Whether a row has two numbers as scores."""
    return all(isinstance(row.get(name), int | float) for name in ("score_chosen", "score_rejected"))


def text_of(answer):
    """The text of an answer that is a list of messages or plain text."""
    return answer if isinstance(answer, str) else answer[-1]["content"]


# ---- command line ---------------------------------------------------------------------------------------------


def add_reward_flags(add, model_flag, default=None):
    """Flags that score.py and eval.py share. model_flag: '--model' or '--reward-model'. default: in words, where none of
    the flags given does not mean the contrast reward of the embedded model."""
    kind, model = (None, None) if default else ("contrast", "smollm2")
    # fmt: off
    add("--reward", default=kind, choices=["contrast", "classifier", "judge"], help=f"what scores an answer (default: {default or kind})")
    add(model_flag, dest="reward_model", default=model, metavar="NAME", help=f"model of the reward: 'smollm2' (embedded), a folder or a hub id (default: {default or model})")
    add("--label", help="label of a classifier with several labels that counts as good")
    add("--pack-tokens", type=positive, default=1024, help="tokens of one forward pass; changes memory and speed, not results (default: %(default)s)")
    add("--batch-size", type=positive, default=32, help="rows scored and written together (default: %(default)s)")
    add("--judge-samples", type=positive, default=1, help="ratings of the judge an answer; their mean is the score (default: %(default)s)")
    add("--judge-temperature", type=float, default=0.0, help="sampling temperature of the judge, 0 = greedy (default: %(default)s)")
    add("--judge-tokens", type=positive, default=300, help="longest reply of the judge, in tokens (default: %(default)s)")
    add("--judge-logprobs", action="store_true", help="weigh the ratings by the log-probs that the server gives for them")
    # fmt: on
    add_server_flags(add)


def dry_run(args, task, rows):
    """Prints what the judge would be asked. A token is taken for 4 characters, a reply for --judge-tokens of them."""
    table, how = judge_settings(args, task)
    call, first, calls, read = [{"role": "user", "content": table["prompt"]}], {}, 0, 0
    for row in rows.where(lambda row: "error" not in row):
        for side in SIDES:
            messages = fill(call, row, answer=text_of(row[side]))
            first = first or {f"{side} of {row['id']}": messages}
            calls += args.judge_samples
            read += args.judge_samples * sum(len(message["content"]) // 4 for message in messages)
    show_plan(args, first, {"model": args.reward_model, **how}, calls, read, calls * args.judge_tokens)


def main():
    parser = parser_of(__doc__, latest_task("pairs.jsonl"))
    add_reward_flags(parser.add_argument, "--model")
    parser.add_argument("--in", dest="input", metavar="FILE", help="pairs to score (default: runs/TASK/pairs.jsonl)")
    parser.add_argument("--out", metavar="FILE", help="scored pairs to write (default: scored.jsonl beside --in)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the judge's sampling (default: %(default)s)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="judge: show the first request and an estimate of tokens, cost and time, and ask nothing",
    )
    args = parser.parse_args()
    check_server(args)
    if args.dry_run and args.reward != "judge":
        fail("--dry-run: only a judge is asked anything; pass --reward judge")

    task = load_task(args.task)
    source, seen, failed = Path(args.input or f"runs/{args.task}/pairs.jsonl"), set(), set()

    def check(number, row):
        check_task(args.task, row, source)
        if row["id"] in seen:
            fail(f"{source}:{number}: the id '{row['id']}' is there twice; ids must differ")
        seen.add(row["id"])
        if "error" in row:
            failed.add(row["id"])
            return
        for side in SIDES:
            if not isinstance(row[side], str) and not is_conversation(row[side]):
                fail(f"{source}:{number}: '{side}' must be text or a list of messages with role and content")

    everything = read_jsonl(source, ["id", "prompt", "chosen", "rejected"], check)
    rows = everything[: args.limit]
    if failed.issuperset(rows.ids):
        fail(f"{source}: every row has an error; nothing to score")
    out = Path(args.out or source.parent / "scored.jsonl")
    if args.dry_run:
        return dry_run(args, task, rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    reward, settings = make_reward(args, task, out)
    same = ["prompt", *SIDES]
    done, file = open_output(out, args.overwrite, settings, lambda row: row.get("reward"), everything, same)
    finished = set(done.ids)
    print(f"reward {args.reward} ({args.reward_model}), {len(rows)} pairs, {len(finished)} of them done -> {out}")

    made_at = commit()

    def score(places):
        """Some of the rows, with what the reward says of them."""
        batch = [rows[i] for i in places]
        whole = [row for row in batch if "error" not in row]
        answers = [text_of(row[side]) for row in whole for side in SIDES]
        scores = iter(reward([row for row in whole for _ in SIDES], answers) if whole else [])
        for row in whole:
            row["reward"] = {**settings, "commit": made_at}
            both = [next(scores) for _ in SIDES]
            for side, one in zip(SIDES, both, strict=True):
                row[f"score_{side}"] = one.value
                if one.fault:
                    row["error"] = f"judge: {one.fault}"
                elif one.said is not None:
                    row["reward"][f"said_{side}"] = one.said
            if args.reward == "judge":
                for name in ("unread", "prompt_tokens", "tokens"):
                    row["reward"][name] = sum(getattr(one, name) for one in both)
        return batch

    todo = [i for i, identity in enumerate(rows.ids) if identity not in finished]
    size = 1 if reward.server else args.batch_size
    batches = (todo[start : start + size] for start in range(0, len(todo), size))
    with file, tqdm(total=len(rows), initial=len(finished), unit="pair") as bar:
        for batch in in_order(score, batches, reward.server) if reward.server else map(score, batches):
            for row in batch:
                append(file, row)
                bar.update()
    text, failed, unscored = audit(put_in_order(out, rows.ids))
    print(f"{out}:\n{text}")
    if reward.server:
        reward.server.finish(whole=not failed)
    raise SystemExit(1 if failed or unscored else 0)


if __name__ == "__main__":
    run_stage(main)
