"""Servers as public bug reports describe them: what they send, refuse and take amiss, and what becomes of it."""

import functools
import json

import pytest
from conftest import ROOT, HostileServer, pair_row, read_rows, write_jsonl

from prompts.rows import Rows
from prompts.server import Reply, pause_of, read_reply, status_of

PAIRS = "runs/sentiment/pairs.jsonl"
TEXT = "A fine film."
MENTIONS = (
    "The tag </think> ends thoughts.",
    'Thoughts end with `</think>`, and a "</thought>" is rare.',
    "Put them between <think> and </think>.",
    "It writes <think>a plan</think> before it answers.",
    "The last of all tags is </think>",
)


def answer(text=TEXT, finish="stop", usage=(5, 3), **message):
    usage = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    message = {"role": "assistant", "content": text, **message}
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": usage}


def error(status, message, headers=(), **more):
    return status, dict(headers), {"error": {"message": message, **more}}


def respond(monkeypatch, function):
    """function: (body, how often it came before) -> (status, headers, JSON), or None for a plain answer."""
    monkeypatch.setattr(HostileServer, "respond", staticmethod(function))


@pytest.fixture
def films(workdir):
    rows = [{"id": f"film-{i}", "prompt": f"Review film {i}."} for i in range(1, 5)]
    return write_jsonl(workdir / "films.jsonl", rows)


@pytest.fixture
def ask(run, server, films):
    """ask(*flags) -> (status, output, errors) of generate.py on four films."""
    flags = ["--model", "big", "--api-base", server, "--prompts", films]
    return functools.partial(run, "generate", *flags)


# ---- an answer -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("sent", "text", "finish"),
    [
        (answer(), TEXT, "stop"),
        (answer([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": TEXT}]), TEXT, "stop"),
        (answer([{"type": "output_text", "text": "A "}, {"text": "fine "}, "film."]), TEXT, "stop"),
        (answer({"type": "text", "text": TEXT}), TEXT, "stop"),
        (answer("Great \ud83d film."), "Great \ufffd film.", "stop"),
        (answer("Great \ud83d\ude00 film."), "Great \U0001f600 film.", "stop"),
        (answer(f"<think>\nRating: 10 is best.\n</think>\n\n{TEXT} Rating: 3"), f"{TEXT} Rating: 3", "stop"),
        (answer(f"I should be warm.</think>{TEXT}"), TEXT, "stop"),
        (answer(f"<think>a</think> no <think>b</think> {TEXT}"), TEXT, "stop"),
        (answer(f"<thinking>a</thinking>{TEXT}"), TEXT, "stop"),
        (answer(f"I should be warm.\n</think> {TEXT}"), TEXT, "stop"),
        (answer(f"I should be warm. </think>\n\n{TEXT}"), TEXT, "stop"),
        (answer(f"Sure.\n<think>\nWarm.\n</think>\n{TEXT}"), TEXT, "stop"),
        (answer(f"<think> </think> {TEXT}"), TEXT, "stop"),
        (answer("<think>a</think>The tag </think> ends it."), "The tag </think> ends it.", "stop"),
        *((answer(text), text, "stop") for text in MENTIONS),
        (answer(f"[THINK]a[/THINK]{TEXT}"), TEXT, "stop"),
        (answer(f"<seed:think>a</seed:think>{TEXT}"), TEXT, "stop"),
        (answer(f"◁think▷a◁/think▷{TEXT}"), TEXT, "stop"),
        (answer(f"<|channel>thought\na<channel|>{TEXT}"), TEXT, "stop"),
        (answer(f"<|START_THINKING|>a<|END_THINKING|>{TEXT}"), TEXT, "stop"),
        (answer(f"{TEXT}<|im_end|>\n<|endoftext|>"), TEXT, "stop"),
        (answer(None, refusal="I can't help with that."), "I can't help with that.", "stop"),
        (answer(f"<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>{TEXT}"), TEXT, "stop"),
        (answer("<think>\nLet me see what the user", "length"), "", "thinking used up --max-tokens"),
        (answer("<think>\nLet me see what the user"), "", "thinking used up --max-tokens"),
        (answer("<think>Hm.</think>\n"), "", "thoughts alone"),
        (answer(None, "length", reasoning_content="Okay, the user"), "", "thinking used up --max-tokens"),
        (answer("", "stop", reasoning="Okay, the user"), "", "thoughts alone"),
        (answer("", "length"), "", "length"),
        (answer(finish=None), TEXT, "stop"),
        (answer(finish=""), TEXT, "stop"),
        *((answer(finish=word), TEXT, "stop") for word in ("eos_token", "eos", "end_turn", "STOP", "stop_sequence", "COMPLETE")),
        *((answer(finish=word), TEXT, "length") for word in ("MAX_TOKENS", "max_tokens", "model_length", "max_output_tokens")),
        *((answer(finish=word), TEXT, word) for word in ("content_filter", "safety", "tool_calls")),
    ],
)  # fmt: skip
def test_an_answer_is_read_in_every_form_that_servers_give_it(sent, text, finish):
    reply = read_reply(json.loads(json.dumps(sent)))
    assert reply.text == text and finish in reply.finish
    assert (
        finish in ("stop", "length", sent["choices"][0]["finish_reason"]) or "error" in reply.finish
    )
    assert reply[2:] == (5, 3)


@pytest.mark.parametrize("sent", [("5", "3"), (5.0, 3.0), ("5.0", 3)])
def test_token_counts_are_read_as_numbers(sent):
    assert read_reply(answer(usage=sent))[2:] == (5, 3)


@pytest.mark.parametrize(
    "sent",
    [
        answer(usage=(None, "many")), {"choices": [{"message": {"content": TEXT}}], "usage": [5, 3]},
        {"choices": [{"message": {"content": TEXT}}], "usage": None},
    ],
)  # fmt: skip
def test_token_counts_that_are_no_numbers_are_zero(sent):
    assert read_reply(sent) == Reply(TEXT, "stop")


@pytest.mark.parametrize(
    "sent", [{"choices": ["A"]}, {"choices": [{}]}, {"choices": {}}, [], "", None]
)
def test_nothing_that_a_server_sends_makes_the_reader_fail(sent):
    assert read_reply(sent) == Reply("", "stop")
    assert status_of(200, sent) == 502


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (answer(), 200),
        ({"error": {"message": "Provider returned error", "code": 502}}, 502),
        ({"error": {"message": "busy", "code": "503"}}, 503),
        ({"error": {"message": "no", "code": "model_not_found"}}, 400),
        ({"error": {"message": "no", "code": 1302}}, 400),
        ({"error": "Unexpected endpoint or method."}, 400),
        ({"error": None, **answer()}, 200),
        ({"choices": [{"finish_reason": "error", "error": {"code": 429}}]}, 429),
        ({"detail": "not yet"}, 502),
        ({"object": "error", "code": 404, "message": "no such model"}, 404),
        *((answer("Half", word), 502) for word in ("error", "abort", "network_error")),
    ],
)  # fmt: skip
def test_a_status_of_200_with_an_error_inside_is_that_error(sent, status):
    assert status_of(200, sent) == status_of(201, sent) == status
    assert status_of(500, sent) == 500


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("2", 2), ("0.2", 0.2), ("1m0s", 60), ("1m30s", 90), ("300ms", 0.3), ("2 seconds", 2), ("1h", 3600)],
)  # fmt: skip
def test_a_server_that_asks_for_a_pause_gets_it(header, seconds, capsys):
    assert pause_of(header, 0) == pytest.approx(seconds)
    assert ("asks to wait" in capsys.readouterr().out) == (seconds > 60)


@pytest.mark.parametrize("header", ["", "0", "soon", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_a_pause_that_says_nothing_grows_from_try_to_try(header):
    assert 0 < pause_of(header, 0) <= 0.5 and 16 <= pause_of(header, 6) <= 32


@pytest.mark.parametrize("far", ["Wed, 21 Oct 2099 07:28:00 GMT", "1745452800000", "48h"])
def test_at_most_an_hour_is_waited(far, capsys):
    assert pause_of(far, 0) == 3600 and "at most an hour" in capsys.readouterr().out


# ---- a run ---------------------------------------------------------------------------------------
def test_an_answer_that_was_paid_is_never_lost_by_how_it_is_read(ask, monkeypatch):
    """The journal keeps what came, so that a better reader finds it there without another call."""
    respond(monkeypatch, lambda body, turn: (200, {}, answer("Great \ud83d film.")))
    assert ask()[0] == 0 and len(HostileServer.asked) == 12
    assert read_rows(PAIRS)[0]["chosen"][0]["content"] == "Great \ufffd film."
    kept = Rows(f"{PAIRS}.calls").rows.values()
    assert len(kept) == 12 and all(row["answer"] == answer("Great \ud83d film.") for row in kept)

    respond(monkeypatch, lambda body, turn: (200, {}, answer(TEXT, "a_new_word")))
    status, said, _ = ask("--overwrite")
    assert status == 1 and "4 failed; 4 of them: draft: no answer (a_new_word)" in said
    monkeypatch.setattr("prompts.server.ENDED", "stop|a_new_word")
    assert ask()[0] == 0 and len(HostileServer.asked) == 12 + 12  # the drafts were not asked again


def test_a_think_tag_is_no_part_of_an_answer_or_of_a_rating(ask, run, server, monkeypatch):
    thoughts = "<think>\nThe user wants warmth. Rating: 10 is best.\n</think>\n\n"
    respond(monkeypatch, lambda body, turn: (200, {}, answer(f"{thoughts}{TEXT} Rating: 3")))
    assert ask()[0] == 0
    rows = read_rows(PAIRS)
    assert all(row["chosen"][0]["content"] == f"{TEXT} Rating: 3" for row in rows)
    rows[0]["rejected"][0]["content"] = "Another."
    write_jsonl(ROOT.__class__(PAIRS), rows)
    judge = ["--task", "sentiment", "--reward", "judge", "--model", "big", "--api-base", server]
    assert run("score", *judge)[0] == 0
    assert {row["score_chosen"] for row in read_rows("runs/sentiment/scored.jsonl")} == {3}


@pytest.mark.parametrize("finish", ["MAX_TOKENS", "max_tokens", "model_length"])
def test_an_answer_that_was_cut_off_in_other_words_has_no_rating(
    ask, run, server, monkeypatch, finish
):
    respond(monkeypatch, lambda body, turn: (200, {}, answer("Rating: 3", finish)))
    status, said, _ = ask()
    assert status == 0 and "4 pairs, 0 of them complete" in said
    # Pairs that were cut off would not be judged.
    rows = [row | {"teacher": {}} for row in read_rows(PAIRS)]
    write_jsonl(ROOT.__class__(PAIRS), rows)
    judge = ["--task", "sentiment", "--reward", "judge", "--model", "big", "--api-base", server]
    assert run("score", *judge)[0] == 1
    assert {row["score_chosen"] for row in read_rows("runs/sentiment/scored.jsonl")} == {None}


def test_a_moderated_answer_is_said_to_be_one(ask, monkeypatch):
    respond(monkeypatch, lambda body, turn: (200, {}, answer("", "content_filter", usage=(5, 0))))
    status, said, _ = ask()
    assert status == 1 and "4 of them: draft: no answer (content_filter)" in said


@pytest.mark.parametrize(
    "refusal",
    [
        error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
        (422, {}, {"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}),
        error(429, "You exceeded your current quota.", code="insufficient_quota"),
        (200, {}, {"error": "Unexpected endpoint or method. (POST /chat/completions)"}),
        error(404, "The model `big` does not exist."), error(403, "no such key"),
    ],
)  # fmt: skip
def test_a_request_that_no_call_can_mend_is_sent_once_and_the_server_is_quoted(
    ask, monkeypatch, refusal
):
    respond(monkeypatch, lambda body, turn: refusal)
    status, _, err = ask("--concurrency", "4")
    assert status == 2 and len(HostileServer.asked) == 1
    words = refusal[2].get("error", refusal[2].get("detail"))
    words = words["message"] if isinstance(words, dict) else words
    assert (words if isinstance(words, str) else words[0]["msg"]) in err.splitlines()[-1]


def test_a_field_can_be_left_out_renamed_or_added(ask, monkeypatch):
    flags = {
        "max_tokens": None,
        "max_completion_tokens": 800,
        "seed": None,
        "reasoning_effort": "low",
    }
    assert ask("--extra-body", json.dumps(flags))[0] == 0
    _, body = HostileServer.asked[0]
    assert "max_tokens" not in body and "seed" not in body
    assert body["max_completion_tokens"] == 800 and body["reasoning_effort"] == "low"
    assert read_rows(PAIRS)[0]["teacher"]["extra_body"] == flags
    status, _, err = ask()
    assert status == 2 and "was made with extra_body" in err
    assert ask("--extra-body", json.dumps(flags, indent=1))[0] == 0
    assert len(HostileServer.asked) == 12


def test_a_judge_takes_extra_fields_too(run, server, workdir, monkeypatch):
    monkeypatch.setattr(HostileServer, "speak", staticmethod(lambda body: "Rating: 5"))
    row = pair_row(0, "good", "poor") | {"task": "safety"}
    write_jsonl(workdir / "runs/safety/pairs.jsonl", [row])
    judge = ["--task", "safety", "--reward", "judge", "--model", "big", "--api-base", server]
    assert run("score", *judge, "--extra-body", '{"top_p": null, "think": false}')[0] == 0
    _, body = HostileServer.asked[0]
    assert "top_p" not in body and body["think"] is False
    assert read_rows("runs/safety/scored.jsonl")[0]["reward"]["extra_body"] == {
        "top_p": None,
        "think": False,
    }


@pytest.mark.parametrize("text", ["{", "[1]", "5", '"a"'])
def test_extra_fields_that_are_no_object_are_one_line(ask, text):
    status, _, err = ask("--extra-body", text)
    assert status == 2 and "--extra-body" in err.splitlines()[-1] and not HostileServer.asked


def test_extra_fields_without_a_server_are_refused(run, films, tiny):
    status, _, err = run("generate", "--prompts", films, "--model", tiny, "--extra-body", "{}")
    assert status == 2 and "--api-base" in err


def test_equal_prompts_have_answers_of_their_own_without_a_seed(ask, workdir):
    rows = [{"id": name, "prompt": "Hello"} for name in "ab"]
    write_jsonl(workdir / "films.jsonl", rows)
    assert ask("--extra-body", '{"seed": null}')[0] == 0
    assert len(HostileServer.asked) == 6


@pytest.mark.parametrize(
    "refusal",
    [
        error(403, "This model requires moderation and your input was flagged"),
        error(400, "This model's maximum context length is 2048 tokens."),
        (200, {}, {"error": {"message": "flagged", "code": "content_policy"}}),
    ],
)  # fmt: skip
def test_a_refused_prompt_costs_its_row_alone(ask, monkeypatch, refusal):
    respond(monkeypatch, lambda body, turn: refusal if "film 2" in str(body["messages"]) else None)
    status, said, err = ask("--concurrency", "4")
    rows = read_rows(PAIRS)
    words = refusal[2]["error"]["message"]
    assert status == 1 and ["error" in row for row in rows] == [False, True, False, False], err
    assert words in rows[1]["error"] and "3 pairs" in said
    assert f"1 failed; 1 of them: {rows[1]['error']}" in said and len(HostileServer.asked) == 10


@pytest.mark.parametrize("status", [401, 402, 429])
def test_a_key_that_ends_in_the_middle_stops_the_run(ask, monkeypatch, status):
    def after_five(body, turn):
        return error(status, "insufficient_quota") if len(HostileServer.asked) > 5 else None

    respond(monkeypatch, after_five)
    code, _, err = ask("--concurrency", "1")
    assert code == 2 and "insufficient_quota" in err.splitlines()[-1]
    refused = len(HostileServer.asked) - 5
    assert refused <= 2  # its own, and one that was under way
    respond(monkeypatch, lambda body, turn: None)
    assert ask("--concurrency", "1")[0] == 0 and len(HostileServer.asked) == 12 + refused


def test_a_refused_prompt_that_comes_first_costs_its_row_alone(ask, films, monkeypatch):
    """Where the server says that it is the text, and where rows beside it were made before."""
    fault = error(400, "The response was filtered by our content management policy.")
    respond(monkeypatch, lambda body, turn: fault if "film 1" in str(body["messages"]) else None)
    status, said, _ = ask()
    assert status == 1 and "3 pairs" in said and "1 of them: draft" in said
    fault = error(400, "no")
    rows = [{"id": f"film-{i}", "prompt": f"Review film {i}."} for i in range(1, 9)]
    write_jsonl(films, rows)
    status, said, _ = ask()
    assert status == 1 and "7 pairs" in said


def test_a_wrong_address_stops_a_run_that_goes_on_too(ask, monkeypatch):
    assert ask("--limit", "1")[0] == 0
    respond(monkeypatch, lambda body, turn: error(404, "The model `big` does not exist."))
    status, _, err = ask()
    assert status == 2 and "does not exist" in err and len(HostileServer.asked) == 4


def test_an_error_inside_a_200_is_tried_again_like_the_status_it_names(ask, monkeypatch):
    fault = 200, {}, {"error": {"message": "Provider returned error", "code": 502}}
    respond(monkeypatch, lambda body, turn: fault if turn < 1 else None)
    assert ask()[0] == 0 and len(HostileServer.asked) == 24


@pytest.mark.parametrize("wait", ["0.2", "1m0s", "", "-1"])
def test_a_row_is_made_whatever_form_the_pause_has(ask, monkeypatch, wait):
    fault = error(429, "slow down", {"Retry-After": wait})
    respond(monkeypatch, lambda body, turn: fault if turn < 1 else None)
    assert ask()[0] == 0 and len(HostileServer.asked) == 24


def test_an_answer_beyond_the_timeout_may_be_paid_so_it_is_not_asked_for_again(ask, monkeypatch):
    monkeypatch.setattr(HostileServer, "fault", staticmethod(lambda body: "slow"))
    status, said, _ = ask("--timeout", "1", "--limit", "2")
    assert status == 1 and len(HostileServer.asked) == 2
    assert "2 of them: draft: no answer (error: no answer within --timeout 1 seconds)" in said


@pytest.mark.parametrize("code", [301, 302, 307, 308])
@pytest.mark.parametrize("place", ["http://127.0.0.1:9", ""])
def test_a_server_that_has_moved_is_named_and_gets_no_call(ask, server, monkeypatch, code, place):
    moved = code, {"Location": f"{place}/v2/chat/completions"}, {}
    respond(monkeypatch, lambda body, turn: moved)
    status, _, err = ask()
    where = place or server.removesuffix("/v1")
    assert status == 2 and err.splitlines()[-1].endswith(f"pass --api-base {where}/v2")
    assert len(HostileServer.asked) == 1


def test_an_answer_is_utf_8_whatever_the_header_says_and_of_any_good_status(ask, monkeypatch):
    def respond_as_text(body, turn):
        return 201, {"Content-Type": "text/plain"}, answer("Schön.")

    respond(monkeypatch, respond_as_text)
    assert ask("--limit", "1")[0] == 0 and HostileServer.asked[0][1]["stream"] is False
    assert read_rows(PAIRS)[0]["chosen"][0]["content"] == "Schön."


def test_half_a_character_in_a_prompt_is_refused_by_row_before_anything_is_paid(ask, films):
    films.write_text('{"prompt": "Hello"}\n{"prompt": "Great \\ud83d film"}\n')
    status, _, err = ask()
    assert status == 2 and "films.jsonl:2: " in err and not HostileServer.asked
    films.write_text('{"prompt": "Great \\ud83d\\ude00 film"}\n')
    assert ask()[0] == 0 and "\U0001f600" in read_rows(PAIRS)[0]["prompt"][0]["content"]


def test_a_second_run_on_the_same_rows_or_calls_is_refused_before_it_pays(
    ask, run, server, monkeypatch
):
    """The second one starts while the server answers the first one's call."""
    second = []
    HostileServer.hooks = [lambda body: second.append(ask("--temperature", "0.1"))]
    monkeypatch.setattr("conftest.wait_for_workers", lambda: None)
    status, _, err = ask()
    assert status == 0, err
    ((status, _, err),) = second
    assert status == 2 and "another run writes to it" in err and err.count("\n") == 1
    assert len(HostileServer.asked) == 12
