"""From rows to tokens: the same ones when a model samples an answer, scores it and learns it."""

import functools
import itertools
import math
import os
import re
from array import array
from multiprocessing import get_start_method
from typing import NamedTuple

from jinja2 import TemplateError
from torch.utils.data import DataLoader

from prompts import as_messages
from prompts.rows import SIDES, BadInput, is_scored

FIXED_DAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"  # for templates that ask
LARGE = 10_000  # rows
MARK = "\ue000"  # holds an answer's place in a template; Unicode leaves it to private use


# ---- from rows to pairs --------------------------------------------------------------------------
class Pair(NamedTuple):
    id: object
    prompt: array  # token ids
    chosen: array
    rejected: array
    delta: float  # score_chosen - score_rejected; NaN without scores


def make_pairs(rows, path, tokenizer, args, need_scores):
    """(training pairs, held-out pairs, {why rows were left out: how many}). Raises BadInput.
    args: those of train.py. need_scores: leave out rows without scores."""
    for i, row in enumerate(rows, 1):
        row.setdefault("id", i)
    # A large file is tokenised in as many processes as this one has cores. Without fork each would
    # get a copy of all rows.
    cores = min(16, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    workers = cores if len(rows) > LARGE and get_start_method() == "fork" else 0
    make = functools.partial(try_rows, tokenizer=tokenizer, args=args, need_scores=need_scores)
    made = DataLoader(rows, 1000, collate_fn=make, num_workers=workers)
    pairs, held_out, left_out = [], [], {}
    for row, (pair, reason) in zip(rows, itertools.chain.from_iterable(made), strict=True):
        if isinstance(reason, Exception):
            raise BadInput(f"{path}: row {row['id']}: {reason}")
        if reason:
            left_out[reason] = left_out.get(reason, 0) + 1
        else:
            (held_out if row.get("split") == "test" else pairs).append(pair)
    return pairs, held_out, left_out


def try_rows(rows, **how):
    """make_pair of each row; where it raises, the error takes the place of the reason."""
    made = []
    for row in rows:
        try:
            made.append(make_pair(row, **how))
        except (ValueError, TypeError, LookupError, AttributeError, BadInput) as error:
            made.append((None, error))
    return made


def make_pair(row, tokenizer, args, need_scores):
    """(the Pair of a row, None), or (None, why the row is left out)."""
    if row.get("error"):
        return None, "failed"
    for side in SIDES:  # "chosen_rating" is another usual name
        row.setdefault(f"score_{side}", row.get(f"{side}_rating"))
    if was_cut_off(row):
        return None, "cut off by the teacher"
    if need_scores and not is_scored(row):
        return None, "without scores"
    if args.accept and not row["score_chosen"] > row["score_rejected"]:
        return None, "not accepted"
    if row.get("split") not in (None, "", "train", "test"):
        return None, f"of the split {row['split']}"
    context, *answers = split_row(row, args.raw_text or not tokenizer.chat_template)
    if not all(answer.strip() for answer in answers):
        return None, "with an empty answer"
    if repetition(answers[0]) > args.max_repeats:
        return None, "that repeat themselves"
    prompt, *answers = encode(tokenizer, context, *answers)
    room = args.max_length - len(prompt)
    if room <= 0 or not prompt:
        return None, f"with a prompt of 0 or of more than {args.max_length - 1} tokens"
    # A list takes nine times the memory of an array.
    prompt, chosen, rejected = (array("i", x) for x in (prompt, *(ids[:room] for ids in answers)))
    if chosen == rejected and args.loss != "sft":
        return None, "identical"
    delta = row["score_chosen"] - row["score_rejected"] if is_scored(row) else math.nan
    return Pair(row["id"], prompt, chosen, rejected, float(delta)), None


def was_cut_off(row):
    """Whether the draft or the revision of a pair was cut off. Such a pair is left out."""
    teacher = row.get("teacher")  # in a data set of others it may be anything
    finish = teacher.get("finish") if isinstance(teacher, dict) else None
    finish = finish if isinstance(finish, dict) else {}
    return any(call != "critique" and why == "length" for call, why in finish.items())


def split_row(row, raw_text):
    """(prompt, chosen text, rejected text). The prompt is all messages before the answer, or text if
    raw_text is set and all three are text. A row's answers are text, messages after the prompt
    (TRL), or whole conversations (UltraFeedback)."""
    prompt, sides = row.get("prompt"), [row["chosen"], row["rejected"]]
    if raw_text and all(isinstance(text, str) for text in (prompt, *sides)):
        return prompt, *sides
    prompt = as_messages(prompt) if prompt else []
    sides = [as_messages(side, "assistant") for side in sides]
    chosen, rejected = [prompt + s if s[0]["role"] == "assistant" else s for s in sides]
    context = chosen[:-1]
    # A whole conversation may have a system message that the prompt lacks.
    same = context and context == rejected[:-1] and all(message in context for message in prompt)
    if not same or {chosen[-1]["role"], rejected[-1]["role"]} != {"assistant"}:
        raise ValueError("its answers must be the last messages, behind the same prompt")
    return context, chosen[-1]["content"], rejected[-1]["content"]


def repetition(answer):
    """Share of an answer's 4-grams of words that have occurred before in it, 0 to 1."""
    words = answer.split()
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


# ---- from messages to tokens ---------------------------------------------------------------------
def encode(tokenizer, prompt, *answers):
    """[prompt ids, ids of each answer]: the tokens that a model samples, is scored and is trained on.

    prompt: messages, or text for a model without a chat template.
    answers: texts. The ids of each end with the end-of-turn token and nothing behind it.
    Raises ValueError where the prompt's ids are no prefix of the whole, where the template refuses
        the messages, or for tokens that the model lacks.
    """
    if isinstance(prompt, str):
        prompt_ids, *wholes = encode_text(tokenizer, prompt, answers)
    else:
        prompt_ids, *wholes = encode_chat(tokenizer, prompt, answers)
    start = len(prompt_ids)
    for ids in wholes:
        if ids[:start] != prompt_ids:
            raise ValueError("the prompt's tokens are not a prefix of those of prompt and answer")
        if ids[-1] is None:
            raise ValueError("the tokenizer has no end-of-sequence token, which an answer needs")
    highest = max(map(max, filter(None, (prompt_ids, *wholes))), default=0)
    if highest >= getattr(tokenizer, "embeddings", math.inf):  # set by load_model
        raise ValueError(f"the model has no embedding of token {highest}")
    return [prompt_ids, *(ids[start:] for ids in wholes)]


def encode_text(tokenizer, prompt, answers):
    """[prompt ids, ids of prompt and answer for each answer]; one end-of-sequence token ends each."""
    encoded = tokenizer([prompt, *(prompt + answer for answer in answers)])["input_ids"]
    for ids in encoded:
        if ids[-1:] == [tokenizer.eos_token_id]:
            ids.pop()
    prompt_ids, *wholes = encoded
    # White space at the prompt's end may be one token with the answer's first word.
    text = prompt.rstrip()
    if text != prompt and any(ids[: len(prompt_ids)] != prompt_ids for ids in wholes):
        return encode_text(tokenizer, text, [prompt[len(text) :] + answer for answer in answers])
    return [prompt_ids, *([*ids, tokenizer.eos_token_id] for ids in wholes)]


def encode_chat(tokenizer, messages, answers):
    """Ids of the prompt, and of prompt and answer for each, as the chat template writes them.

    The template writes one answer for all, which is MARK. In ChatML, after the prompt
    "<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n", that is MARK and "<|im_end|>\\n".
    The first special token after MARK ends the turn; without one the end of sequence does.
    """
    prompt = apply_template(tokenizer, messages, add_generation_prompt=True)
    if not answers:
        return tokenizer([prompt], add_special_tokens=False)["input_ids"]
    turn = [*messages, {"role": "assistant", "content": MARK}]
    before, _, after = apply_template(tokenizer, turn).rpartition(MARK)
    end = special_tokens(tokenizer).search(after)
    after = after[: end.end()] if end else ""
    texts = [before + answer.strip() + after for answer in answers]
    # The template alone writes the beginning of sequence.
    prompt_ids, *wholes = tokenizer([prompt, *texts], add_special_tokens=False)["input_ids"]
    return [prompt_ids, *(ids if end else [*ids, tokenizer.eos_token_id] for ids in wholes)]


@functools.lru_cache(8)
def special_tokens(tokenizer):
    """A pattern that matches any special token, the longest one where several begin."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    names = {name for name in (*added, *tokenizer.all_special_tokens) if name.strip()}
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def apply_template(tokenizer, messages, **options):
    """The text of messages, without thoughts before the answer, and on a fixed day, since a run that
    continues tomorrow must see the same text. Raises ValueError for messages that the template
    refuses, BadInput where there is none."""
    if not tokenizer.chat_template:
        raise BadInput(f"{tokenizer.name_or_path}: has no chat template; use an instruct version")
    fixed = {"tokenize": False, "enable_thinking": False, "date_string": "26 Jul 2024"}
    fixed["chat_template"] = FIXED_DAY + tokenizer.get_chat_template()
    try:
        text = tokenizer.apply_chat_template(messages, **fixed, **options)
    except TemplateError as error:
        raise ValueError(f"the chat template of {tokenizer.name_or_path} says: {error}") from None
    for message in messages:  # some templates pass over what they do not expect
        if message["content"].strip()[-20:] not in text:
            where = f"the chat template of {tokenizer.name_or_path}"
            raise ValueError(f"{where} leaves out what the {message['role']} says")
    return text
