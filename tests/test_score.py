"""score.py: the three rewards, which do not depend on their batch, and the audit."""

import doctest
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import HostileServer, make_model, make_tokenizer, pair_row, read_rows, write_jsonl
from test_packed import by_hand
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaForSequenceClassification,
)

import score
from prompts import fill, load_task
from prompts.chat import load_model
from prompts.tokens import encode
from prompts.rows import is_scored
from prompts.tokens import make_pair, was_cut_off
from score import Score, audit, contrast_reward, rating_of

CPU = torch.device("cpu")


def scored(run, model, *more):
    """score.py on the pairs: (exit status, rows, standard output)."""
    status, said, err = run("score", "--model", model, "--dtype", "float32", *more)
    assert status < 2, err
    out = more[more.index("--out") + 1] if "--out" in more else "runs/sentiment/scored.jsonl"
    return status, read_rows(out), said


@pytest.fixture
def pairs(workdir):
    """Five pairs, and a row that failed."""
    rows = [pair_row(i, "Lovely film. " * (1 + i % 3), "Bad. " * (1 + i % 2)) for i in range(5)]
    for row in rows:
        del row["score_chosen"], row["score_rejected"], row["reward"]
    rows.append({"id": "lost", "task": "sentiment", "error": "answer: empty"})
    return write_jsonl(workdir / "runs/sentiment/pairs.jsonl", rows)


def assert_same_alone(run, model, *flags):
    """That the scores are the same when each row is a batch of its own; returns those."""
    status, many, said = scored(run, model, *flags)
    assert status == 1 and "scored 5 of 6" in said and "1 failed" in said
    _, single, _ = scored(run, model, *flags, "--batch-size", "1", "--out", "single.jsonl")
    for a, b in zip(many[:5], single[:5], strict=True):
        assert a["score_chosen"] == pytest.approx(b["score_chosen"], abs=1e-5)
        assert a["score_rejected"] == pytest.approx(b["score_rejected"], abs=1e-5)
    assert len({row["score_chosen"] for row in many[:5]}) > 1
    assert "score_chosen" not in many[5] and many[5]["error"]
    return many


# ---- contrast ------------------------------------------------------------------------------------


def test_contrast_scores_are_the_formula_and_do_not_depend_on_the_batch(run, tiny, pairs):
    rows = assert_same_alone(run, tiny)
    assert rows[1]["reward"]["kind"] == "contrast"
    model, tokenizer = load_model(tiny, CPU, torch.float32)
    table, answer = load_task("sentiment")["contrast"], "Lovely film. " * 2
    chats = [
        encode(tokenizer, fill(table[side], rows[1]), answer) for side in ("principle", "opposite")
    ]
    good, bad = (by_hand(model, *chat) for chat in chats)
    assert rows[1]["score_chosen"] == pytest.approx((good - bad) / len(chats[0][1]), abs=1e-5)


def contrast(rows, folder, table, dtype=torch.float32):
    model, tokenizer = load_model(folder, CPU, dtype)
    return contrast_reward(rows, ["Lovely film."] * len(rows), model, tokenizer, table)


def test_the_contrast_of_two_equal_prompts_is_zero_not_noise(tiny, workdir):
    table = {
        "principle": [{"role": "user", "content": "{request}"}],
        "opposite": [{"role": "user", "content": "{prompt}"}],
    }
    rows = [pair_row(0, "a", "b"), pair_row(1, "a", "b") | {"request": "Review Heat."}]
    rows.append(rows[0] | {"prompt": "Review the film Heat."})  # text, as in other data sets
    scores = contrast(rows, tiny, table, torch.bfloat16)
    same, other, plain = (score.value for score in scores)
    assert same == plain == 0.0 and other != 0.0


def test_a_control_row_is_scored_by_the_table_of_the_controls(tiny):
    sides = load_task("safety")["contrast"]
    row = pair_row(0, "a", "b") | {"control": True}
    scores = []
    for table in (sides, sides["control"], sides | {"control": sides["control"]}):
        scores += contrast([row | {"control": "control" in table}], tiny, table)
    assert scores[0] == scores[1] == scores[2] and scores[0].value != 0
    assert contrast([row | {"control": False}], tiny, sides)[0] != scores[0]


# ---- classifiers ---------------------------------------------------------------------------------


def classifier(folder, tokenizer, labels):
    torch.manual_seed(1)
    config = make_model(len(tokenizer)).config
    config.num_labels = labels
    config.pad_token_id = tokenizer.eos_token_id  # the trap: an inner EOS would be padding
    if labels == 2:
        config.id2label, config.label2id = {0: "BAD", 1: "GOOD"}, {"BAD": 0, "GOOD": 1}
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("labels", "padding"), [(1, True), (2, True), (1, False)])
def test_a_reward_models_score_is_its_logit_at_the_last_token_whatever_the_batch(
    run, tokenizer, pairs, workdir, labels, padding
):
    folder = classifier(workdir / "rm", tokenizer, labels)
    if not padding:
        config = json.loads((folder / "config.json").read_text()) | {"pad_token_id": None}
        (folder / "config.json").write_text(json.dumps(config))
    rows = assert_same_alone(
        run, folder, "--reward", "classifier", *["--label", "GOOD"][: labels * (labels - 1)]
    )
    model = LlamaForSequenceClassification.from_pretrained(folder)
    text = tokenizer.apply_chat_template(rows[1]["prompt"] + rows[1]["chosen"], tokenize=False)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    hidden = model.model(ids).last_hidden_state[0, -1]
    logits = model.score(hidden).tolist()
    want = logits[0] if labels == 1 else logits[1] - logits[0]  # log-odds of GOOD
    assert rows[1]["score_chosen"] == pytest.approx(want, abs=1e-4)


def test_independent_labels_are_read_one_by_one_and_regression_of_several_is_refused(
    run, tokenizer, pairs, workdir
):
    folder = classifier(workdir / "rm", tokenizer, 2)
    config = json.loads((folder / "config.json").read_text())
    path, flags = folder / "config.json", ["--reward", "classifier", "--label", "GOOD"]
    path.write_text(json.dumps(config | {"problem_type": "multi_label_classification"}))
    _, rows, _ = scored(run, folder, *flags)
    model = LlamaForSequenceClassification.from_pretrained(folder)
    text = tokenizer.apply_chat_template(rows[1]["prompt"] + rows[1]["chosen"], tokenize=False)
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0]
    assert rows[1]["score_chosen"] == pytest.approx(logits[1].item(), abs=1e-4)
    path.write_text(json.dumps(config | {"problem_type": "regression"}))
    status, _, err = run("score", "--model", folder, *flags, "--overwrite")
    assert status == 2 and "gives 2 numbers" in err


def test_an_answer_that_is_too_long_for_the_classifier_has_no_score(run, pairs, workdir):
    """Cut to the same beginning, two answers would tie."""
    plain = make_tokenizer(template=None)
    plain.model_input_names = ["input_ids", "attention_mask"]  # without a limit of its own
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64}
    config = DistilBertConfig(vocab_size=len(plain), max_position_embeddings=16, **sizes)
    config.id2label, config.label2id = {0: "NO", 1: "POSITIVE"}, {"NO": 0, "POSITIVE": 1}
    DistilBertForSequenceClassification(config).save_pretrained(workdir / "bert")
    plain.save_pretrained(workdir / "bert")
    rows = read_rows(pairs)
    rows[1]["chosen"][0]["content"] = "Lovely film. " * 20
    write_jsonl(pairs, rows)
    flags = ["--reward", "classifier", "--label", "POSITIVE"]
    status, rows, _ = scored(run, workdir / "bert", *flags)
    assert status == 1 and rows[1]["score_chosen"] is None
    assert isinstance(rows[1]["score_rejected"], float)
    assert "where the classifier takes 16" in rows[1]["reward"]["comment_chosen"]


def test_a_classifier_of_several_labels_needs_one_of_them(run, tokenizer, pairs, workdir):
    model = classifier(workdir / "rm", tokenizer, 2)
    status, _, err = run("score", "--model", model, "--reward", "classifier")
    assert status == 2 and "BAD, GOOD" in err


def test_an_encoder_classifier_scores_the_text_of_the_answer(run, pairs, workdir):
    plain = make_tokenizer(template=None)
    plain.model_input_names, plain.model_max_length = ["input_ids", "attention_mask"], 64
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64}
    config = DistilBertConfig(vocab_size=len(plain), max_position_embeddings=64, **sizes)
    config.id2label, config.label2id = {0: "NO", 1: "POSITIVE"}, {"NO": 0, "POSITIVE": 1}
    DistilBertForSequenceClassification(config).save_pretrained(workdir / "bert")
    plain.save_pretrained(workdir / "bert")
    flags = ["--reward", "classifier", "--label", "POSITIVE"]
    rows = assert_same_alone(run, workdir / "bert", *flags)
    assert rows[0]["score_chosen"] == pytest.approx(rows[3]["score_chosen"])  # the same answer


# ---- scores that are none ------------------------------------------------------------------------


def test_a_score_that_is_not_finite_becomes_null_and_leaves_the_audit(
    run, tiny, pairs, monkeypatch
):
    def broken(rows, answers):
        given = [math.nan, 1.0, 1.0, -math.inf]
        return [Score(value) for value in [*given, *[1.0] * (len(answers) - 4)]]

    settings = {"kind": "contrast", "model": "x"}
    monkeypatch.setattr(score, "make_reward", lambda *args: (broken, settings))
    status, rows, said = scored(run, tiny)
    assert rows[0]["score_chosen"] is None and rows[0]["score_rejected"] == 1.0
    assert rows[1]["score_chosen"] == 1.0 and rows[1]["score_rejected"] is None
    assert status == 1 and "scored 3 of 6" in said
    assert "2 without a score" in said and "ties 100%" in said


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, "9", [1.0]])
def test_only_finite_numbers_are_scores(value):
    row = {"score_chosen": 1, "score_rejected": 0.5}
    assert is_scored(row) and not is_scored({}) and not is_scored({"score_chosen": 1})
    for side in row:
        assert not is_scored(row | {side: value})


# ---- continuing ----------------------------------------------------------------------------------


def test_pairs_that_changed_since_they_were_scored_are_refused(run, tiny, pairs, workdir):
    scored(run, tiny)
    before = (workdir / "runs/sentiment/scored.jsonl").read_bytes()
    rows = read_rows(pairs)
    rows[2]["chosen"][0]["content"] += " Truly."
    write_jsonl(pairs, rows)
    status, _, err = run("score", "--model", tiny, "--dtype", "float32")
    assert status == 2 and "row row-2 was made with chosen" in err
    assert (workdir / "runs/sentiment/scored.jsonl").read_bytes() == before


def test_a_change_inside_the_teachers_settings_is_named_with_both_values(run, tiny, pairs):
    rows = read_rows(pairs)
    for most in (200, 140):
        settings = {"model": "org/a-name", "finish": {"draft": "stop"}, "max_tokens": most}
        write_jsonl(pairs, [row | {"teacher": settings} for row in rows])
        status, _, err = run("score", "--model", tiny, "--dtype", "float32")
    assert status == 2 and "was made with teacher.max_tokens 200, now it is 140;" in err
    settings = {"model": "org/a-name", "finish": {"draft": "length"}}
    write_jsonl(pairs, [row | {"teacher": settings} for row in rows])
    status, _, err = run("score", "--model", tiny, "--dtype", "float32")
    assert status == 2 and "teacher.finish.draft 'stop', now it is 'length';" in err
    write_jsonl(
        pairs, [row | {"teacher": settings | {"finish": {"draft": "stop"}}} for row in rows]
    )
    status, _, err = run("score", "--model", tiny, "--dtype", "float32")
    assert status == 2 and "teacher.max_tokens 200, now it is None;" in err


def test_a_killed_run_continues_to_the_same_file(run, tiny, pairs, workdir):
    _, whole, _ = scored(run, tiny, "--batch-size", "2")
    path = workdir / "runs/sentiment/scored.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:30])
    _, again, _ = scored(run, tiny, "--batch-size", "2")
    assert [row["id"] for row in again] == [row["id"] for row in whole]
    for a, b in zip(whole[:5], again[:5], strict=True):
        assert a["score_chosen"] == pytest.approx(b["score_chosen"], abs=1e-5)


# ---- the audit -----------------------------------------------------------------------------------


TASK = load_task("sentiment")


def test_the_audit_counts_wins_and_ties_and_measures_drafts_and_revisions():
    rows = [
        pair_row(0, "wonderful", "awful", 2.0),
        pair_row(1, "awful", "awful", 1.0),
        pair_row(2, "awful", "wonderful", -1.0),
        pair_row(3, "a", "b", 0.0),
    ]
    others = [{"id": "e", "error": "judge: x"}, rows[0] | {"score_chosen": None}]
    text = audit(rows + others, TASK)
    assert "scored 4 of 6 pairs; 1 without a score, 1 failed" in text
    assert "won 50%, lost 25%, ties 25%" in text
    assert "mean +0.500, root mean square 1.225" in text
    assert "metric where it won: draft 0.00, revision 0.50" in text
    assert "metric where it lost: draft 1.00, revision 0.00" in text
    by_columns = load_task("sycophancy") | {"columns": ["markers"]}
    assert "metric" not in audit(rows, by_columns)  # pairs of others, without the column


def test_the_audit_and_training_leave_out_the_same_pairs_as_cut_off(tokenizer):
    finishes = [
        {"finish": {"draft": "stop", "critique": "length", "revision": "stop"}},
        {"finish": {"draft": "length", "critique": "stop", "revision": "stop"}},
        {"finish": {"draft": "stop", "critique": "stop", "revision": "length"}},
        {"finish": None},
        {"finish": {}},
        "Mr Smith",
        None,
    ]
    rows = [
        pair_row(i, "good", "poor") | {"teacher": teacher} for i, teacher in enumerate(finishes)
    ]
    rows.append(pair_row(7, "good", "poor"))
    args = {"loss": "rdpo", "accept": False, "raw_text": False, "max_repeats": 1, "max_length": 512}
    left_out = []
    for row in rows:
        _, reason = make_pair(dict(row), tokenizer, SimpleNamespace(**args), need_scores=True)
        left_out.append(reason == "cut off by the teacher")
    assert left_out == [was_cut_off(row) for row in rows] and sum(left_out) == 2
    asked = []
    score.add_scores(
        rows, lambda _, texts: asked.extend(texts) or [score.Score(1.0)] * len(texts), {}
    )
    assert len(asked) == 2 * 6  # what is left out costs no call
    assert audit(rows, TASK).startswith(
        "scored 6 of 8 pairs; 0 without a score, 0 failed, 2 cut off and so left out\n"
    )


def test_a_pair_that_was_cut_off_and_failed_or_has_a_score_is_counted_once():
    cut = {"teacher": {"finish": {"draft": "length"}}}
    rows = [pair_row(0, "a", "b") | cut, pair_row(1, "a", "b") | cut | {"score_chosen": None}]
    rows += [{"id": "x", "error": "revision: no answer"} | cut]
    assert audit(rows, TASK).startswith(
        "scored 1 of 3 pairs; 0 without a score, 1 failed, 1 cut off and so left out\n"
    )
    assert not was_cut_off({"teacher": {"finish": "length"}})  # a column of other people


def test_a_pair_that_was_cut_off_is_neither_scored_nor_missed(run, tiny, workdir, monkeypatch):
    cut = {"teacher": {"finish": {"draft": "stop", "revision": "length"}}}
    write_jsonl(workdir / "in.jsonl", [pair_row(0, "a", "b"), pair_row(1, "c", "d") | cut])
    argv = ["--in", "in.jsonl", "--task", "sentiment", "--model", tiny]
    status, said, err = run("score", *argv)
    assert status == 0 and "scored 1 of 2 pairs" in said, err
    assert read_rows("scored.jsonl")[1]["score_chosen"] is None
    monkeypatch.setattr(score, "add_scores", lambda *args: 1 / 0)
    assert run("score", *argv)[0] == 0  # nothing is done again


def test_a_copied_draft_is_scored_once_and_a_tie():
    scores = iter(score.Score(value) for value in (0.5, 0.2, 0.1))
    rows = [pair_row(0, "same", "same"), pair_row(1, "a", "b")]
    done = score.add_scores(rows, lambda rows, answers: [next(scores) for _ in answers], {})
    assert [row["score_chosen"] for row in done] == [0.5, 0.2]
    assert [row["score_rejected"] for row in done] == [0.5, 0.1]


def test_the_audit_of_one_pair_or_of_none_says_what_there_is():
    failed = [{"id": "e", "error": "x"}]
    assert audit(failed, TASK) == "scored 0 of 1 pairs; 0 without a score, 1 failed"
    text = audit([pair_row(0, "a", "b")], TASK)
    assert "won 100%" in text and "where it won" in text and "where it lost" not in text


# ---- the judge -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("I counted 3 faults in 10 lines. Rating: 7", 7),
        ("Rating: 2? No. **Rating:** 9/10", 9),  # the last one
        ("rating - 4.5", None),
        ("RATING: `4.5`", 4.5),
        ("Rating: -3", -3),
        ("Rating: \u22123", -3),
        ("Rating: 40", None),
        ("It is poor, 2 of 10 at most.", None),
        ("Rating: none", None),
        ("", None),
        ("**Rating:** **8**", 8),
        ('{"explanation": "warm", "rating": 8}', 8),
        ("Rating: [[7]]", 7),
        ("Rating: 7,5", 7.5),
        ("Rating\uff1a8", 8),
        ("Rating: \\boxed{8}", 8),
        ("Rating is 8", 8),
        ("<rating>8</rating>", 8),
        ("### Rating\n\n8", 8),
        ("Rating 1-10: 8 out of 10", 8),
        ("Rating: 8 \u2013 warm", 8),
        ("Rating: 4/5", None),
        ("Rating\u20144", None),
        ("Rating: 8-9", None),
        ("Rating: 7 - 8", None),
        ("Rating: **8**/10", 8),
        ("Rating: $\\boxed{8}$", 8),
        ("Rating: 8.0/10.0", 8),
        ("celebrating 10 years", None),
        ('Rating: 2\n\n(I ignored "Rating: 9" in the text.)', 2),
        ("Rating:\n1. It is warm.\n2. It is kind.", None),
        ("Rating: 9 is too high, I would say 6.", None),
        ("At first I thought Rating: 3.\nRating: 7", 7),
        ("Rating: 3, or perhaps Rating: 7, who knows", None),
    ],
)
def test_a_rating_is_the_number_behind_the_last_rating_if_it_is_on_the_scale(text, rating):
    assert rating_of(text, "stop", (-5, 10)) == rating
    assert rating_of(text, "length", (-5, 10)) is None  # "Rating: 1" of a 10


def test_the_examples_in_the_docstrings_hold():
    failed, attempted = doctest.testmod(score)
    assert attempted and not failed


def judged(run, server, monkeypatch, said, *argv):
    """Scores two rows with a judge that says said(answer): (status, rows, output)."""
    speak = staticmethod(lambda body: said(body["messages"][-1]["content"]))
    monkeypatch.setattr(HostileServer, "speak", speak)
    rows = [pair_row(i, f"gold {i}", f"dross {i}") | {"task": "safety"} for i in range(2)]
    write_jsonl(Path("runs/safety/pairs.jsonl"), rows)
    flags = ["--task", "safety", "--reward", "judge", "--model", "org/big-1"]
    status, out, err = run("score", *flags, "--api-base", server, *argv)
    assert status < 2, err
    return status, read_rows("runs/safety/scored.jsonl"), out


def test_a_judges_rating_is_a_score_and_what_has_none_is_null_with_its_words(
    run, server, workdir, monkeypatch
):
    poor = "It is poor, 2 of 10 at most."
    status, rows, out = judged(
        run, server, monkeypatch, lambda text: "Rating: 9" if "gold" in text else poor
    )
    assert status == 1 and "2 without a score" in out
    assert all(row["score_chosen"] == 9 and row["score_rejected"] is None for row in rows)
    assert rows[0]["reward"]["comment_rejected"] == poor and "error" not in rows[0]
    assert len(HostileServer.asked) == 4 and HostileServer.asked[0][1]["temperature"] == 0


def test_ratings_outside_the_scale_are_none(run, server, workdir, monkeypatch):
    numbers = itertools.cycle([4, 40])
    flags = ["--concurrency", "1"]
    _, rows, _ = judged(run, server, monkeypatch, lambda text: f"Rating: {next(numbers)}", *flags)
    assert [row["score_chosen"] for row in rows] == [4, 4]
    assert [row["score_rejected"] for row in rows] == [None, None]


def test_a_call_that_failed_leaves_its_row_without_a_score_and_is_asked_again(
    run, server, workdir, monkeypatch
):
    HostileServer.script = [200, 413]
    flags = ["--concurrency", "1"]
    status, rows, _ = judged(run, server, monkeypatch, lambda text: "Rating: 5", *flags)
    assert status == 1 and rows[0]["score_rejected"] is None and "error" not in rows[1]
    assert "status 413" in rows[0]["reward"]["comment_rejected"]
    status, rows, _ = judged(run, server, monkeypatch, lambda text: "Rating: 5", *flags)
    assert status == 0 and all(row["score_chosen"] == row["score_rejected"] == 5 for row in rows)
    assert len(HostileServer.asked) == 5  # what was answered was not asked again


def test_rows_without_a_score_bind_nobody_to_their_settings(run, server, workdir, monkeypatch):
    HostileServer.script = ["length", *[400] * 3]
    assert judged(run, server, monkeypatch, lambda text: "Rating: 5")[0] == 1
    HostileServer.script = []
    flags = ["--judge-tokens", "200"]
    status, rows, _ = judged(run, server, monkeypatch, lambda text: "Rating: 5", *flags)
    assert status == 0 and rows[0]["score_chosen"] == 5


def test_pairs_are_not_overwritten_by_scores_of_others(run, tiny, pairs, workdir):
    write_jsonl(workdir / "other.jsonl", [pair_row(0, "a", "b") | {"prompt": "Other."}])
    before = pairs.read_bytes()
    status, _, err = run("score", "--model", tiny, "--in", "other.jsonl", "--out", pairs)
    assert status == 2 and "was made with kind None" in err and pairs.read_bytes() == before


def test_a_judge_whose_words_begin_with_error_has_not_failed(run, server, workdir, monkeypatch):
    status, rows, _ = judged(run, server, monkeypatch, lambda text: "error-free. Rating: 9")
    assert status == 0 and "error" not in rows[0] and rows[0]["score_chosen"] == 9


def test_the_model_on_this_machine_can_be_the_judge(run, tiny, workdir):
    row = pair_row(0, "good", "poor") | {"task": "safety"}
    write_jsonl(Path("runs/safety/pairs.jsonl"), [row])
    flags = ["--task", "safety", "--reward", "judge", "--model", tiny, "--judge-tokens", "4"]
    status, _, err = run("score", *flags)
    (row,) = read_rows("runs/safety/scored.jsonl")
    assert status == 1 and row["score_chosen"] is None and row["reward"]["comment_chosen"], err
