"""score.py: log-probs against sums by hand, rewards that do not depend on their batch, the audit."""

import doctest
import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import HostileServer, make_model, pair_row, read_rows, write_jsonl
from transformers import DistilBertConfig, DistilBertForSequenceClassification, LlamaForSequenceClassification

import score
from generate import Reply, load_model
from score import audit, check_model, completion_logps, rating_of

SEQUENCES = [([5, 6, 7, 8], [9, 10, 2]), ([5, 6], [11, 2]), ([20, 21, 22], list(range(30, 50)))]


def by_hand(model, prompt, completion):
    """The sum, token by token, from the model's own logits in fp64."""
    logits = model(torch.tensor([prompt + completion])).logits[0].double()
    return sum(logits[len(prompt) + i - 1].log_softmax(-1)[token].item() for i, token in enumerate(completion))


def test_the_worked_batch_in_the_docstring_is_true():
    assert doctest.testmod(score).failed == 0


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(len(tokenizer))


def test_log_probs_are_the_sums_by_hand_over_the_answer_alone(model):
    got = completion_logps(model, SEQUENCES)
    want = [by_hand(model, *sequence) for sequence in SEQUENCES]
    assert got.tolist() == pytest.approx(want, abs=2e-4)
    assert got.dtype == torch.float32 and min(abs(value) for value in want) > 3


def test_alone_and_batched_log_probs_are_the_same(model):
    together = completion_logps(model, SEQUENCES).tolist()
    alone = [completion_logps(model, [sequence]).item() for sequence in SEQUENCES]
    assert together == pytest.approx(alone, abs=1e-4)


def test_packed_pair_equals_separate_sequences_in_value_and_gradient(tokenizer):
    """Two completions of one prompt share it; a third sequence stands beside them in the stream."""
    pair = [([5, 6, 7, 8], [9, 10, 11, 2]), ([5, 6, 7, 8], [30, 2]), ([40, 41], [9, 10, 2])]
    weights = torch.tensor([1.0, -2.0, 0.5])
    gradients, values = [], []
    for packs, share_prompt in ((True, True), (True, False), (False, True)):
        model = make_model(len(tokenizer))
        model.packs = packs
        logps = completion_logps(model, pair, share_prompt)
        (weights * logps).sum().backward()
        values.append(logps.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for value, gradient in zip(values[:2], gradients[:2], strict=True):
        assert torch.allclose(value, values[2], atol=1e-4)
        assert (gradient - gradients[2]).norm() < 1e-4 * gradients[2].norm()
    assert gradients[2].norm() > 1


def test_models_for_which_streams_are_not_exact_run_sequence_by_sequence(tokenizer):
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "vocab_size": len(tokenizer), "initializer_range": 0.2}
    window = MistralForCausalLM(MistralConfig(sliding_window=4, **sizes)).eval()
    check_model(window, "window")
    assert window.packs is False
    full = MistralForCausalLM(MistralConfig(sliding_window=None, **sizes)).eval()
    check_model(full, "full")
    assert full.packs is True
    long = [([5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 2]), ([5, 6, 7, 8], [30, 31, 32, 2])]
    want = [by_hand(window, *sequence) for sequence in long]
    assert completion_logps(window, long).tolist() == pytest.approx(want, abs=1e-3)


def test_a_head_that_scales_its_logits_is_noticed(tokenizer, capsys):
    model = make_model(len(tokenizer))
    check_model(model, "plain")
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 3
        return output

    model.forward = scaled
    with pytest.raises(SystemExit):
        check_model(model, "odd")
    assert "--model odd" in capsys.readouterr().err


def scored(run, tiny, *more):
    return run("score", "--model", tiny, "--dtype", "float32", *more)


@pytest.fixture
def pairs(workdir):
    rows = [pair_row(i, "Lovely film. " * (1 + i % 3), "Bad film. " * (1 + i % 2)) for i in range(5)]
    for row in rows:
        del row["score_chosen"], row["score_rejected"], row["reward"]
    rows.append({"id": "lost", "task": "sentiment", "error": "answer: empty"})
    return write_jsonl(workdir / "runs/sentiment/pairs.jsonl", rows)


def test_contrast_scores_are_the_formula_and_do_not_depend_on_the_batch(run, tiny, pairs, workdir):
    status, said, _ = scored(run, tiny)
    assert status == 1 and "scored 5 of 6" in said and "1 failed" in said
    scored(run, tiny, "--batch-size", "1", "--out", "single.jsonl")
    many, single = read_rows(workdir / "runs/sentiment/scored.jsonl"), read_rows(workdir / "single.jsonl")
    for a, b in zip(many[:5], single[:5], strict=True):
        assert a["score_chosen"] == pytest.approx(b["score_chosen"], abs=1e-5)
        assert a["reward"]["kind"] == "contrast"
    model, tokenizer = score.load_model(tiny, torch.device("cpu"), torch.float32)
    contrast = score.load_task("sentiment")["contrast"]
    chats = [
        score.encode(tokenizer, [contrast[side][0], *many[1]["prompt"]], "Lovely film. " * 2)
        for side in ("principle", "opposite")
    ]
    good, bad = (by_hand(model, *chat) for chat in chats)
    assert many[1]["score_chosen"] == pytest.approx((good - bad) / len(chats[0][1]), abs=1e-5)
    assert "score_chosen" not in many[5] and many[5]["error"]


def test_the_contrast_of_two_equal_prompts_is_zero_not_noise(tiny, workdir):
    task = {"contrast": {side: [{"role": "user", "content": text}] for side, text in
                         (("principle", "{request}"), ("opposite", "{prompt}"))}}  # fmt: skip
    rows = [pair_row(0, "a", "b"), pair_row(1, "a", "b") | {"request": "Review Heat."}]
    rows.append(rows[0] | {"prompt": "Review the film Heat."})  # plain text, as in other data sets
    reward = score.contrast_reward(task, tiny, torch.device("cpu"), torch.bfloat16, 100)
    same, other, plain = (one.value for one in reward(rows, ["Lovely film."] * 3))
    assert same == plain == 0.0 and other != 0.0


def test_pairs_that_changed_since_they_were_scored_are_refused(run, tiny, pairs, workdir):
    scored(run, tiny)
    before = (workdir / "runs/sentiment/scored.jsonl").read_bytes()
    rows = read_rows(pairs)
    rows[2]["chosen"][0]["content"] += " Truly."
    write_jsonl(pairs, rows)
    status, _, err = scored(run, tiny)
    assert status == 2 and "'chosen' of row row-2 has changed since" in err
    assert (workdir / "runs/sentiment/scored.jsonl").read_bytes() == before


def classifier(folder, tokenizer, labels):
    torch.manual_seed(1)
    config = make_model(len(tokenizer)).config
    config.num_labels, config.pad_token_id = labels, tokenizer.eos_token_id  # the trap: padding is the inner EOS
    if labels == 2:
        config.id2label, config.label2id = {0: "BAD", 1: "GOOD"}, {"BAD": 0, "GOOD": 1}
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("labels", "padding"), [(1, True), (2, True), (1, False)])
def test_a_reward_models_score_does_not_depend_on_its_batch(run, tokenizer, pairs, workdir, labels, padding):
    model = classifier(workdir / "rm", tokenizer, labels)
    if not padding:
        config = json.loads((model / "config.json").read_text()) | {"pad_token_id": None}
        (model / "config.json").write_text(json.dumps(config))
    flags = ["--reward", "classifier", "--label", "GOOD"] if labels == 2 else ["--reward", "classifier"]
    scored(run, model, *flags)
    scored(run, model, *flags, "--batch-size", "1", "--out", "single.jsonl")
    many, single = read_rows(workdir / "runs/sentiment/scored.jsonl"), read_rows(workdir / "single.jsonl")
    for a, b in zip(many[:5], single[:5], strict=True):
        assert a["score_chosen"] == pytest.approx(b["score_chosen"], abs=1e-5)
    assert len({row["score_chosen"] for row in many[:5]}) > 1


def test_a_classifier_of_several_labels_needs_one_of_them(run, tokenizer, pairs, workdir):
    model = classifier(workdir / "rm", tokenizer, 2)
    status, _, err = scored(run, model, "--reward", "classifier")
    assert status == 2 and "BAD, GOOD" in err


def test_an_encoder_classifier_scores_plain_text(run, pairs, workdir):
    from conftest import make_tokenizer

    plain = make_tokenizer(template=None)
    plain.model_input_names, plain.model_max_length = ["input_ids", "attention_mask"], 64
    config = DistilBertConfig(
        vocab_size=len(plain), dim=32, n_layers=1, n_heads=2, hidden_dim=64, max_position_embeddings=64
    )
    config.id2label, config.label2id = {0: "NEGATIVE", 1: "POSITIVE"}, {"NEGATIVE": 0, "POSITIVE": 1}
    DistilBertForSequenceClassification(config).save_pretrained(workdir / "bert")
    plain.save_pretrained(workdir / "bert")
    _, said, err = scored(run, workdir / "bert", "--reward", "classifier", "--label", "POSITIVE")
    assert "scored 5 of 6" in said, err


def test_a_score_that_is_not_finite_becomes_null_and_leaves_the_audit(run, tiny, pairs, workdir, monkeypatch):
    def broken(args, task, out):
        scores = lambda rows, answers: [score.Score(float("nan")), *[score.Score(1.0)] * (len(answers) - 1)]  # noqa: E731
        scores.server = None
        return scores, {"kind": "contrast", "model": "x"}

    monkeypatch.setattr(score, "make_reward", broken)
    status, said, _ = scored(run, tiny)
    rows = read_rows(workdir / "runs/sentiment/scored.jsonl")
    assert rows[0]["score_chosen"] is None and rows[0]["score_rejected"] == 1.0
    assert status == 1 and "scored 4 of 6" in said and "1 without a score" in said and "ties 100%" in said


def test_a_killed_run_continues_to_the_same_file(run, tiny, pairs, workdir):
    scored(run, tiny, "--batch-size", "2")
    path = workdir / "runs/sentiment/scored.jsonl"
    whole = read_rows(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:30])
    scored(run, tiny, "--batch-size", "2")
    again = read_rows(path)
    assert [row["id"] for row in again] == [row["id"] for row in whole]
    assert all(
        math.isclose(a.get("score_chosen", 0), b.get("score_chosen", 0), abs_tol=1e-5)
        for a, b in zip(whole, again, strict=True)
    )


def test_the_audit_counts_wins_ties_and_length():
    rows = [
        pair_row(0, "long " * 9, "b", 2.0),
        pair_row(1, "long " * 5, "b", 1.0),
        pair_row(2, "a", "longer", -1.0),
        pair_row(3, "a", "b", 0.0),
    ]
    text, failed, unscored = audit([*rows, {"id": "e", "error": "judge: x"}, rows[0] | {"score_chosen": None}])
    assert (failed, unscored) == (1, 1)
    assert "won 50%, lost 25%, ties 25%" in text
    assert "mean gap (chosen - rejected) +0.500" in text
    assert "length +0.9" in text


def test_log_probs_under_autocast_differ_by_rounding_only(model):
    with torch.no_grad():
        exact = completion_logps(model, SEQUENCES[:2])
        with torch.autocast("cpu", torch.bfloat16):
            rounded = completion_logps(model, SEQUENCES[:2])
    assert rounded.dtype == torch.float32
    assert (exact - rounded).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention compiles C++ on a CPU")
def test_flex_attention_gives_the_log_probs_of_sdpa(tiny):
    """Forward only: FlexAttention has no backward pass on a CPU."""
    logps = []
    for kind in ("sdpa", "flex_attention"):
        model, _ = load_model(tiny, torch.device("cpu"), torch.float32, attn_implementation=kind)
        with torch.no_grad():
            logps.append(completion_logps(model, SEQUENCES))
    assert torch.allclose(*logps, atol=1e-4)


def test_attention_by_parts_gives_the_log_probs_and_gradients_of_sdpa(tiny, monkeypatch):
    monkeypatch.setattr(score, "BLOCK", 3)  # so that parts have several blocks
    sequences = [*SEQUENCES, (SEQUENCES[-1][0], [7, 8, 9, 2])]  # two that share a prompt
    found, computed, bmm = {}, [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: computed.append(b.shape[-1]) or bmm(a, b))
    for kind in ("sdpa", "by_parts"):
        model, _ = load_model(tiny, torch.device("cpu"), torch.float32)
        score.check_model(model, tiny, by_parts=kind == "by_parts")
        assert model.packs and model.config._attn_implementation == kind
        computed.clear()
        logps = completion_logps(model, sequences)
        logps[::2].sum().backward()
        found[kind] = [logps.detach(), *(parameter.grad for parameter in model.parameters())]
        assert bool(computed) == (kind == "by_parts")
    longest = max(len(prompt) + len(completion) for prompt, completion in sequences)
    assert max(computed) <= longest  # no block meets more than a prompt and one answer
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("heads", "groups", "size", "value_size"), [(4, 4, 8, 8), (6, 2, 8, 5), (3, 1, 4, 16)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_by_parts_is_dense_attention_for_any_heads(heads, groups, size, value_size, dtype, monkeypatch):
    monkeypatch.setattr(score, "BLOCK", 4)
    labels = torch.tensor([1] * 12 + [2] * 4), torch.tensor([0] + [1] * 7 + [2] * 4 + [0] * 3 + [1])
    draw = torch.Generator().manual_seed(heads)
    shapes = (heads, size), (groups, size), (groups, value_size)
    operands = [torch.randn(1, n, 16, d, generator=draw).to(dtype).requires_grad_() for n, d in shapes]
    seen, _ = score.attention_by_parts(None, *operands, None, parts=score.parts_of(*labels))
    place = torch.arange(16)
    mask = score.sees(*labels)(0, 0, place[:, None], place)
    exact = [operand.detach().double().requires_grad_() for operand in operands]
    key, value = (part.repeat_interleave(heads // groups, 1) for part in exact[1:])
    dense = torch.nn.functional.scaled_dot_product_attention(exact[0], key, value, mask).transpose(1, 2)
    above = torch.randn(dense.shape, generator=draw)
    seen.backward(above.to(dtype))
    dense.backward(above.double())
    error = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for got, want in [(seen, dense), *((a.grad, b.grad) for a, b in zip(operands, exact, strict=True))]:
        assert got.dtype == dtype and (got.double() - want).norm() <= error * want.norm()


def test_a_model_that_hands_nothing_on_to_its_attention_runs_with_sdpa(tiny, monkeypatch):
    model, _ = load_model(tiny, torch.device("cpu"), torch.float32)
    forward = type(model.base_model).forward

    def strict(self, input_ids=None, position_ids=None, attention_mask=None, use_cache=None, **other):
        if "parts" in other:
            raise TypeError("unexpected keyword argument 'parts'")
        return forward(self, input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, **other)

    monkeypatch.setattr(type(model.base_model), "forward", strict)
    score.check_model(model, tiny, by_parts=True)
    assert model.packs and model.config._attn_implementation == "sdpa"


def judged(run, server, monkeypatch, said, *argv):
    """Scores two rows with a judge that says said(answer); (status, rows, output)."""
    monkeypatch.setattr(HostileServer, "speak", staticmethod(lambda body: said(body["messages"][-1]["content"])))
    write_jsonl(
        Path("runs/safety/pairs.jsonl"), [pair_row(i, f"gold {i}", f"dross {i}") | {"task": "safety"} for i in range(2)]
    )
    argv = ["--task", "safety", "--reward", "judge", "--model", "org/big-1", "--api-base", server, *argv]
    status, out, err = run("score", *argv)
    assert status < 2, err
    return status, read_rows("runs/safety/scored.jsonl"), out


def test_a_judges_rating_is_the_number_behind_the_phrase_or_null_with_its_words(run, server, workdir, monkeypatch):
    def said(text):
        return "I counted 3 faults in 10 lines. **Rating:** 9" if "gold" in text else "It is poor, 2 of 10 at most."

    status, rows, out = judged(run, server, monkeypatch, said)
    assert status == 1  # no score could be had for the poor ones
    assert all(row["score_chosen"] == 9 and row["score_rejected"] is None for row in rows)
    assert rows[0]["reward"]["said_rejected"] == "It is poor, 2 of 10 at most."
    assert "could not be read 50%" in out and len(HostileServer.asked) == 4
    assert "20 read, 12 written" in out and rows[0]["reward"]["tokens"] == 6  # 5 and 3 a call
    assert HostileServer.asked[0][1]["temperature"] == 0


def test_a_dry_run_shows_what_the_judge_would_be_asked(run, server, workdir, monkeypatch):
    write_jsonl(workdir / "runs/safety/pairs.jsonl", [pair_row(0, "gold", "dross") | {"task": "safety"}])
    argv = ["--task", "safety", "--reward", "judge", "--model", "big", "--api-base", server, "--dry-run"]
    status, out, err = run("score", *argv, "--price-out", "1000")
    assert status == 0, err
    assert "gold" in out and '"model": "big"' in out and "2 calls" in out and "cost 0.60" in out
    assert not HostileServer.asked and not (workdir / "runs/safety/scored.jsonl").exists()


def test_several_ratings_are_averaged_and_those_outside_the_scale_left_out(run, server, workdir, monkeypatch):
    numbers = itertools.cycle([4, 6, 40])
    argv = ["--judge-samples", "3", "--judge-temperature", "1", "--concurrency", "1"]
    _, rows, _ = judged(run, server, monkeypatch, lambda text: f"Rating: {next(numbers)}", *argv)
    assert [row["score_chosen"] for row in rows] == [5, 5] and len(HostileServer.asked) == 12


def test_a_judge_of_the_teachers_family_is_noted(run, server, workdir, monkeypatch):
    rows = [
        pair_row(0, "a", "b")
        | {"teacher": {"model": "qwen/Qwen3-8B"}}
        | {"reward": {"kind": "judge", "model": "Org/Qwen2.5-7B", "samples": 1}}
    ]
    assert "one family" in audit(rows)[0]
    assert "one family" not in audit([rows[0] | {"teacher": {"model": "smollm2"}}])[0]


def test_a_rating_is_weighed_by_its_log_probs_where_one_token_wrote_it():
    def rating(likely, text="Rating: 7", tokens=("Rating", ":", " 7"), high=10):
        likely = [[token, math.log(p)] for token, p in likely]
        logprobs = [(token, likely if token.strip().isdigit() else []) for token in tokens]
        return rating_of(Reply(text, "stop", logprobs=logprobs), {"scale": [1, high]})

    likely = [(" 7", 0.5), ("7", 0.1), (" 8", 0.2), ("10", 0.1), ("99", 0.05), (" the", 0.03), ("²", 0.02)]
    assert rating(likely) == pytest.approx((7 * 0.6 + 8 * 0.2 + 10 * 0.1) / 0.9)
    assert rating(likely[:3]) == 7  # no 10 as one token: a 1 might be its beginning
    assert rating(likely[:3], high=9) == pytest.approx((7 * 0.6 + 8 * 0.2) / 0.8)
    assert rating([]) == 7 and rating([(" the", 1.0)]) == 7
    assert rating(likely, "Rating: 10/10", ("Rating", ":", " ", "1", "0", "/", "10")) == 10
    assert rating_of(Reply("Rating: 1 would be a panning, but", "length"), {"scale": [1, 10]}) is None


def test_a_call_that_failed_is_an_error_of_its_row_and_is_asked_again(run, server, workdir, monkeypatch):
    HostileServer.script = [413]
    status, rows, out = judged(run, server, monkeypatch, lambda text: "Rating: 5", "--concurrency", "1")
    assert status == 1 and "status 413" in rows[0]["error"] and "error" not in rows[1] and "3 calls answered" in out
    status, rows, _ = judged(run, server, monkeypatch, lambda text: "Rating: 5")
    assert status == 0 and all(row["score_chosen"] == row["score_rejected"] == 5 for row in rows)
    assert len(HostileServer.asked) == 5  # the one that was answered in the failed row was not asked for again


def test_the_model_on_this_machine_can_be_the_judge(run, tiny, workdir):
    write_jsonl(Path("runs/safety/pairs.jsonl"), [pair_row(0, "good", "poor") | {"task": "safety"}])
    argv = ["--task", "safety", "--reward", "judge", "--model", tiny, "--judge-tokens", "4"]
    status, _, err = run("score", *argv)
    (row,) = read_rows("runs/safety/scored.jsonl")
    assert status == 1 and row["score_chosen"] is None and row["reward"]["said_chosen"], err  # it babbles
