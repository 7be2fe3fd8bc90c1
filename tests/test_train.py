"""train.py: the losses against closed forms and limits, the data, the loop, what it saves."""

import doctest
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_model, make_tokenizer, pair_row, read_rows, write_jsonl
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
)

import train
from kernels.packed import completion_logps
from test_families import FAMILIES, save_model, shapes_in
from prompts.chat import load_model
from prompts.tokens import Pair, make_pairs
from prompts.rows import BadInput
from train import LOSSES, SCORED_LOSSES, preference_loss, total_loss

FAST = "--dtype float32 --epochs 2 --batch-size 4 --pack-tokens 100 --lr 1e-3 --beta 0.1".split()
CPU = torch.device("cpu")

# ---- the losses ----------------------------------------------------------------------------------


def losses_at(
    kind, z, delta=1.0, tau=1.0, beta=0.1, smoothing=0.1, mean_weight=0.5, rejected=-40.0, sft_weight=0.0
):  # fmt: skip
    """The loss where log pi_ref is -30 and -40, and its slope over z; policy(rejected) as given.
    Both answers have ten tokens."""
    reference = torch.tensor([[-30.0, -40.0]], dtype=torch.float64)
    chosen = torch.tensor(-30.0 + z / beta + rejected + 40, dtype=torch.float64, requires_grad=True)
    policy = torch.stack([chosen, torch.tensor(rejected, dtype=torch.float64)])[None]
    settings = {"tau": tau, "beta": beta, "label_smoothing": smoothing, "mean_weight": mean_weight}
    settings |= {"kind": kind, "sft_weight": sft_weight}
    delta, tokens = torch.tensor([delta], dtype=torch.float64), torch.tensor([[10, 10]])
    losses, got_z = total_loss(policy, reference, delta, tokens, **settings)
    assert kind == "sft" or got_z.item() == pytest.approx(z, abs=1e-9)
    losses.sum().backward()
    return losses.item(), chosen.grad.item() / beta


def log_s(x):
    return -math.log1p(math.exp(-x))


def test_the_sft_term_imitates_the_better_answer():
    # beside dpo: -log pi(chosen) / tokens; its slope over log pi(chosen) is -1/10, over z -1/10/beta
    loss, slope = losses_at("dpo", 0.5)
    more, steeper = losses_at("dpo", 0.5, sft_weight=2.0)
    chosen = -30.0 + 0.5 / 0.1
    assert more - loss == pytest.approx(-2.0 * chosen / 10)
    assert (steeper - slope) * 0.1 == pytest.approx(-2.0 / 10)
    # under rdpo by p: after a failed revision the answer before it is imitated
    p = 1 / (1 + math.exp(1.3))
    loss, more = (losses_at("rdpo", 0.5, delta=-1.3, sft_weight=w)[0] for w in (0.0, 2.0))
    assert more - loss == pytest.approx(-2.0 * (p * chosen + (1 - p) * -40.0) / 10)
    assert losses_at("sft", 0.0, sft_weight=2.0) == losses_at("sft", 0.0)


@pytest.mark.parametrize("z", [-1.7, 0.0, 0.4])
@pytest.mark.parametrize("delta", [-0.8, 0.0, 1.3])
def test_every_loss_is_its_published_formula(z, delta):
    p = 1 / (1 + math.exp(-delta / 0.5))
    formulas = {
        "rdpo": -p * log_s(z) - (1 - p) * log_s(-z),
        "rdpo-margin": -log_s(z - delta / 0.5),
        "rdpo-weight": -max(0, 2 * p - 1) / 0.3 * log_s(z),
        "dpo": -log_s(z),
        "cdpo": -0.8 * log_s(z) - 0.2 * log_s(-z),
        "robust": (-0.8 * log_s(z) + 0.2 * log_s(-z)) / 0.6,
        "ipo": (z / 0.1 / 10 - 1 / (2 * 0.1)) ** 2,  # both answers have 10 tokens
        "sft": (30 - z / 0.1) / 10,
    }
    assert formulas.keys() == set(LOSSES)
    options = {"delta": delta, "tau": 0.5, "smoothing": 0.2, "mean_weight": 0.3}
    for kind, value in formulas.items():
        assert losses_at(kind, z, **options)[0] == pytest.approx(value, abs=1e-12), kind


@pytest.mark.parametrize("kind", ["rdpo", "dpo", "cdpo", "robust"])
def test_initial_loss_is_ln2(kind):
    assert losses_at(kind, 0.0)[0] == pytest.approx(math.log(2), abs=1e-12)


def test_ipo_takes_means_over_the_tokens_of_each_answer():
    policy, reference = torch.tensor([[-20.0, -60.0]]), torch.tensor([[-30.0, -40.0]])
    tokens = torch.tensor([[5, 40]])
    losses, _ = preference_loss(
        policy, reference, torch.zeros(1), tokens, kind="ipo", beta=0.1, tau=1.0
    )
    assert losses.item() == pytest.approx((10 / 5 - -20 / 40 - 5) ** 2)


@pytest.mark.parametrize("z", [-2.0, 0.3, 5.0])
def test_rdpo_becomes_dpo_as_tau_falls_and_flips_the_label_of_a_failed_revision(z):
    assert losses_at("rdpo", z, delta=0.3, tau=1e-3) == pytest.approx(losses_at("dpo", z))
    loss, slope = losses_at("rdpo", z, delta=-0.3, tau=1e-3)
    mirrored_loss, mirrored_slope = losses_at("dpo", -z)
    assert (loss, slope) == pytest.approx((mirrored_loss, -mirrored_slope))


def test_rdpo_with_a_constant_p_is_cdpo():
    delta = math.log(0.9 / 0.1)  # p = 0.9 = 1 - label_smoothing
    assert losses_at("rdpo", 0.7, delta) == pytest.approx(losses_at("cdpo", 0.7, smoothing=0.1))


@pytest.mark.parametrize("delta", [-1.5, 0.0, 0.8])
def test_rdpo_has_its_optimum_where_z_is_delta_over_tau(delta):
    best = delta / 0.5
    assert losses_at("rdpo", best, delta, tau=0.5)[1] == pytest.approx(0.0, abs=1e-9)
    assert losses_at("rdpo", best - 1, delta, tau=0.5)[1] < 0
    assert losses_at("rdpo", best + 1, delta, tau=0.5)[1] > 0


def test_the_margin_counts_a_pair_by_p_and_asks_nothing_of_a_revision_that_clearly_lost():
    for delta in (-3.0, -0.4, 0.0, 0.4, 3.0):
        p = 1 / (1 + math.exp(-delta / 0.5))
        assert losses_at("rdpo-margin", 0.0, delta, tau=0.5)[1] == pytest.approx(-p)
    assert abs(losses_at("rdpo-margin", 0.0, -3.0, tau=0.5)[1]) < 0.01


def test_a_tie_pulls_z_back_to_0_under_rdpo_and_is_dpo_under_the_margin():
    assert losses_at("rdpo", 0.0, delta=0.0)[1] == pytest.approx(0.0, abs=1e-12)
    assert losses_at("rdpo", 1.0, delta=0.0)[1] > 0.2 > -0.2 > losses_at("rdpo", -1.0, delta=0.0)[1]
    assert losses_at("rdpo-margin", 0.4, delta=0.0) == pytest.approx(losses_at("dpo", 0.4))


def test_under_the_weight_failed_revisions_have_no_gradient_and_certain_ones_are_dpo():
    certain = losses_at("rdpo-weight", 0.4, delta=80.0, mean_weight=1.0)
    assert certain == pytest.approx(losses_at("dpo", 0.4))
    for delta in (0.0, -2.0):
        assert losses_at("rdpo-weight", 0.4, delta=delta) == (0.0, 0.0)


def test_robust_loss_is_unbiased_under_flipped_labels():
    flipped = losses_at("robust", -0.6, smoothing=0.2)[0]
    expected = 0.8 * losses_at("robust", 0.6, smoothing=0.2)[0] + 0.2 * flipped
    assert expected == pytest.approx(losses_at("dpo", 0.6)[0])


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("z", [-100.0, 0.0, 100.0])
def test_every_loss_and_gradient_is_finite_for_ties_and_extremes(kind, z):
    for delta in (-1.0, 0.0, 1.0):
        assert all(math.isfinite(value) for value in losses_at(kind, z, delta=delta))
    if z == -100:
        assert losses_at("dpo", z)[0] == pytest.approx(100.0)  # log(sigmoid + eps) would stop at 27


def settings_of(deltas, loss="rdpo", tau=0.5):
    pairs = [Pair(i, [1], [2], [3], delta) for i, delta in enumerate(deltas)]
    args = SimpleNamespace(tau=tau, loss=loss, beta=0.1, label_smoothing=0.1, sft_weight=0.0)
    return train.loss_settings(args, pairs)


def test_tau_is_in_units_of_the_root_mean_square_gap():
    assert settings_of([1.0, -7.0])["tau"] == pytest.approx(0.5 * 5)
    assert settings_of([100.0, -700.0])["tau"] == pytest.approx(50 * 5)
    assert settings_of([1.0, math.nan, -7.0])["tau"] == pytest.approx(0.5 * 5)  # has no score
    for deltas in ([2.0, 2.0, 2.0], [2.0, 2.0 + 1e-12]):  # their standard deviation is nothing
        assert settings_of(deltas)["tau"] == pytest.approx(0.5 * 2)
    weights = [max(0, 2 / (1 + math.exp(-d / 2.5)) - 1) for d in (1.0, -7.0)]
    assert settings_of([1.0, -7.0])["mean_weight"] == pytest.approx(sum(weights) / 2)


@pytest.mark.parametrize(
    ("loss", "gap", "said"),
    [*((loss, 0.0, "all pairs tie") for loss in SCORED_LOSSES), ("rdpo-weight", -1.0, "no revision won")],
)  # fmt: skip
def test_scores_that_say_nothing_stop_the_losses_that_listen_to_them_before_the_first_step(
    run, tiny, workdir, loss, gap, said
):
    rows = [pair_row(i, f"Lovely {i}.", "Bad.", delta=gap) for i in range(4)]
    write_jsonl(workdir / "runs/sentiment/scored.jsonl", rows)
    status, _, err = run("train", "--model", tiny, "--out", workdir / "out", "--loss", loss, *FAST)
    assert status == 2 and said in err and not (workdir / "out").exists()
    argv = ["--model", tiny, "--out", workdir / "dpo", "--loss", "dpo", *FAST]
    assert run("train", *argv)[0] == 0


def test_the_examples_in_the_docstrings_hold():
    failed, attempted = doctest.testmod(train)
    assert attempted and not failed


def test_the_learning_rate_rises_then_falls_to_zero():
    args = SimpleNamespace(lr=2.0, warmup_ratio=0.2)
    rates = [train.learning_rate(step, 20, args) for step in range(20)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert all(a > b for a, b in pairwise(rates[4:])) and 0 < rates[-1] < 0.04


# ---- data ----------------------------------------------------------------------------------------

USER, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", "Hi"), ("assistant", "Yes."), ("assistant", "No."))
)
MORE = {"role": "user", "content": "Really?"}


def load(rows, tokenizer, **options):
    args = {"loss": "dpo", "accept": False, "max_length": 512, "max_repeats": 1.0}
    args |= {"raw_text": False} | options
    need_scores = args["loss"] in SCORED_LOSSES or args["accept"]
    args = SimpleNamespace(**args)
    return make_pairs(rows, "in.jsonl", tokenizer, args, need_scores)


def test_every_published_form_of_preference_data_gives_the_same_pair(tokenizer):
    forms = [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Hi", "chosen": "Yes.", "rejected": "No."},
        {"prompt": [USER], "chosen": "Yes.", "rejected": "No."},
    ]
    scores = [{"score_chosen": 4.0, "score_rejected": 1.0}] * 4
    scores += [{"chosen_rating": 4.0, "rejected_rating": 1.0}]
    rows = [form | score for form, score in zip(forms, scores, strict=True)]
    pairs, _, counts = load(rows, tokenizer, loss="rdpo")
    assert all(pair[1:] == pairs[0][1:] for pair in pairs) and len(pairs) == 5 and not counts
    assert pairs[0].delta == 3.0 and pairs[0].chosen[-1] == tokenizer.eos_token_id


def test_plain_text_ends_with_one_end_of_sequence_token(tokenizer):
    row = {"prompt": "The film", "chosen": " Up.", "rejected": " It."}
    without_template = make_tokenizer(template=None)
    for made_by, raw_text in ((tokenizer, True), (without_template, False)):
        ((pair,), _, _) = load([row], made_by, raw_text=raw_text)
        assert made_by.decode(pair.prompt) == "The film"
        assert pair.chosen.count(made_by.eos_token_id) == 1
        assert pair.chosen[-1] == made_by.eos_token_id
    with pytest.raises(BadInput, match=r"row 1.*has no chat template"):
        load([row | {"prompt": [USER]}], without_template)


@pytest.mark.parametrize("teacher", ["gpt-4", 3, ["a"], None, {"name": "gpt-4"}, {"finish": None}])
def test_a_column_teacher_of_other_people_means_nothing(tokenizer, teacher):
    row = {"prompt": "Hi", "chosen": "Yes.", "rejected": "No.", "teacher": teacher}
    pairs, _, counts = load([row], tokenizer)
    assert len(pairs) == 1 and not counts


def test_a_large_file_is_tokenised_in_several_processes_to_the_same_pairs(tokenizer, monkeypatch):
    row = {"prompt": "Hi", "rejected": "No.", "score_chosen": 1.0, "score_rejected": 0.0}
    rows = [row | {"chosen": f"Yes, {i} times."} for i in range(2500)]
    rows[7] |= {"split": "test"}
    rows[1200] |= {"error": "no answer"}
    alone = load([dict(row) for row in rows], tokenizer, loss="rdpo")
    monkeypatch.setattr("prompts.tokens.LARGE", 100)
    assert load([dict(row) for row in rows], tokenizer, loss="rdpo") == alone
    assert [len(part) for part in alone[:2]] == [2498, 1] and alone[2] == {"failed": 1}
    with pytest.raises(BadInput, match=r"in.jsonl: row 2001: .*must be the last messages"):
        load([*rows[:2000], rows[0] | {"chosen": [GOOD, MORE], "id": 2001}], tokenizer)


def test_a_row_that_the_template_refuses_is_named():
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    row = {"id": "a7", "prompt": [{"role": "system", "content": "Be kind."}, USER]}
    with pytest.raises(BadInput, match=r"in.jsonl: row a7: .*no system"):
        load([row | {"chosen": [GOOD], "rejected": [BAD]}], make_tokenizer(template))


def test_a_second_run_in_one_directory_is_refused(run, tiny, pairs_file, monkeypatch):
    """The second one, with other settings, starts while the first one trains."""
    step, second = train.training_step, []

    def training_step(*args):
        if not second:
            second.append(None)
            second[0] = run("train", "--model", tiny, "--lr", "1e-3", "--overwrite")
        return step(*args)

    monkeypatch.setattr(train, "training_step", training_step)
    argv = ["--model", tiny, "--lr", "1e-4", "--max-steps", "2"]
    status, _, err = run("train", *argv)
    ((refused, _, said),) = second
    assert status == 0, err
    assert refused == 2 and "rdpo/log.jsonl: another run writes to it" in said
    lines = read_rows("runs/sentiment/rdpo/log.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert not Path("runs/sentiment/rdpo.bak").exists()
    assert run("train", *argv, "--overwrite")[0] == 0


def test_all_turns_before_the_answer_are_its_context(tokenizer):
    turns = [USER, BAD, MORE]
    forms = [
        {"prompt": turns, "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": [BAD, MORE, GOOD], "rejected": [BAD, MORE, BAD]},
        {"prompt": [USER], "chosen": [*turns, GOOD], "rejected": [*turns, BAD]},
        {"prompt": MORE["content"], "chosen": [*turns, GOOD], "rejected": [*turns, BAD]},
    ]
    pairs, _, _ = load(forms, tokenizer)
    assert pairs[0][1:] == pairs[3][1:]
    assert pairs[0][1:] == pairs[1][1:] == pairs[2][1:]
    said = tokenizer.decode(pairs[0].prompt)
    assert all(message["content"] in said for message in turns)


UNCLEAR = "its answers must be the last messages, behind the same prompt"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": [USER], "chosen": [BAD, MORE, GOOD], "rejected": [BAD]}, UNCLEAR),
        ({"prompt": [USER], "chosen": [GOOD, MORE], "rejected": [BAD]}, UNCLEAR),
        ({"prompt": [MORE], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, UNCLEAR),
        ({"prompt": [USER], "chosen": 3, "rejected": [BAD]}, "'int' object is not iterable"),
        ({"chosen": [GOOD], "rejected": [BAD]}, UNCLEAR),
    ],
)
def test_a_context_that_is_not_clear_is_refused(tokenizer, row, said):
    with pytest.raises(BadInput, match="row 1") as refused:
        load([row], tokenizer)
    assert said in str(refused.value)


def test_what_is_left_out_is_counted_by_reason(tokenizer):
    cut = pair_row(1, "a long answer", "b") | {"teacher": {"finish": {"answer": "length"}}}
    rows = [pair_row(0, "a", "b"), cut, pair_row(2, "a", "b") | {"score_chosen": None}]
    rows += [pair_row(3, "a", "b", delta=math.nan), pair_row(4, "a", "b", delta=math.inf)]
    rows += [{"id": "x", "error": "no answer"}, pair_row(5, "same", "same")]
    rows += [pair_row(6, "a", "b", split="validation"), pair_row(7, " ", "b")]
    rows += [pair_row(8, "a", "b", prompt="long " * 600), pair_row(9, "lost", "won", delta=-1.0)]
    rows += [pair_row(10, "a", "b", split="test")]
    pairs, held_out, counts = load(rows, tokenizer, loss="rdpo")
    assert [pair.id for pair in pairs] == ["row-0", "row-9"]
    assert [pair.id for pair in held_out] == ["row-10"]
    assert counts.pop("with a prompt of 0 or of more than 511 tokens") == 1
    assert counts == {
        "failed": 1, "without scores": 3, "cut off by the teacher": 1, "identical": 1,
        "of the split validation": 1, "with an empty answer": 1,
    }  # fmt: skip
    for options, names in (
        ({"loss": "rdpo", "accept": True}, {"row-0"}),
        ({"loss": "dpo"}, {"row-0", "row-2", "row-3", "row-4", "row-9"}),
    ):
        assert {pair.id for pair in load(rows, tokenizer, **options)[0]} == names


def test_another_model_than_the_embedded_one_needs_a_learning_rate(run, tiny, workdir):
    status, _, err = run("train", "--model", tiny)
    assert status == 2 and "--lr: has a default for the embedded model only" in err


def test_pairs_whose_chosen_answer_repeats_itself_are_left_out_on_demand(tokenizer):
    rows = [pair_row(0, "so it is and so it is and so", "b"), pair_row(1, "a", "so so so so so so")]
    assert len(load(rows, tokenizer)[0]) == 2
    (pair,), _, counts = load(rows, tokenizer, max_repeats=0.0)
    assert pair.id == "row-1" and counts == {"that repeat themselves": 1}


def test_answers_that_differ_only_beyond_max_length_are_left_out_as_identical(tokenizer):
    rows = [pair_row(0, "one two three four", "one two three five"), pair_row(1, "a", "b")]
    prompt = len(load(rows, tokenizer)[0][0].prompt)
    pairs, _, counts = load(rows, tokenizer, max_length=prompt + 3)
    assert counts == {"identical": 1} and [pair.id for pair in pairs] == ["row-1"]


# ---- the gradient --------------------------------------------------------------------------------

PAIRS = [
    Pair("a", [5, 6, 7], [8, 9, 2], [10, 2], 1.0),
    Pair("b", [11, 12], [13, 2], [14, 15, 16, 2], -2.0),
]


def policy_of(model, activations=False, pack_tokens=1000):
    args = SimpleNamespace(model=model, loss="rdpo", checkpoint_activations=activations)
    args.pack_tokens = pack_tokens
    return train.Policy(args, CPU, torch.float32)


def gradient_of(policy):
    """The gradient of one training step on PAIRS, by parameter, unclipped."""
    kept = {}

    class Recorder:
        def step(self):
            for name, parameter in policy.model.named_parameters():
                kept[name] = parameter.grad.clone()

        def zero_grad(self, **_):
            policy.zero_grad()

    settings = {"kind": "rdpo", "sft_weight": 0.0, "beta": 0.1, "tau": 1.0}
    reference = train.pair_logps(policy, PAIRS) + torch.tensor([1, -1])
    train.training_step(policy, Recorder(), PAIRS, reference, settings, 1e9)
    return kept


def test_the_gradient_is_that_of_the_loss_by_the_model_s_own_logits(tiny):
    """Packed sequences, micro-batches and recomputed layers change nothing."""
    model, _ = load_model(tiny, CPU, torch.float32)
    losses, known = [], []
    for pair in PAIRS:
        logps = []
        for answer in (pair.chosen, pair.rejected):
            logits = model(torch.tensor([pair.prompt + answer])).logits[
                0, len(pair.prompt) - 1 : -1
            ]
            logps.append(logits.log_softmax(-1)[torch.arange(len(answer)), answer].sum())
        known.append([logps[0].item() + 1, logps[1].item() - 1])
        z = 0.1 * ((logps[0] - known[-1][0]) - (logps[1] - known[-1][1]))
        p = 1 / (1 + math.exp(-pair.delta))
        losses.append(-p * F.logsigmoid(z) - (1 - p) * F.logsigmoid(-z))
    (sum(losses) / 2).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for activations, pack_tokens in ((False, 1000), (False, 1), (True, 1000)):
        policy = policy_of(tiny, activations, pack_tokens)
        assert policy.pack_tokens and policy.model.config._attn_implementation == "packed"
        got = gradient_of(policy)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, atol=2e-6, rtol=1e-4)


def save_unpacked(folder, tokenizer):
    """A model whose positions depend on the length of its sequence."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 2.0}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rope |= {"original_max_position_embeddings": 16}
    make_model(len(tokenizer), rope_parameters=rope).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# ---- runs ----------------------------------------------------------------------------------------


def trained(run, model, out, *more):
    status, said, err = run("train", "--model", model, "--out", out, *FAST, *more)
    assert status == 0, err
    return steps_of(out), said


def steps_of(out):
    """Lines of log.jsonl without what depends on the clock."""
    rows = read_rows(out / "log.jsonl")
    return [{k: v for k, v in row.items() if k not in ("ms", "tokens_per_second")} for row in rows]


def train_steps(rows):
    return [row for row in rows if "loss" in row]


def assert_same_weights(one, other, atol=2e-5):
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=atol, rtol=0)


def test_training_raises_the_margin_and_saves_a_model_that_loads(run, tiny, pairs_file, workdir):
    rows, said = trained(run, tiny, workdir / "out", "--loss", "dpo", "--epochs", "4")
    steps = train_steps(rows)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert steps[-1]["rewards/margins"] > steps[0]["rewards/margins"] + 0.05
    assert "4 held out" in said and "held_out" in rows[-1]
    model = AutoModelForCausalLM.from_pretrained(workdir / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert "lm_head.weight" not in load_file(workdir / "out" / "model.safetensors")
    assert AutoTokenizer.from_pretrained(workdir / "out").chat_template
    before = AutoModelForCausalLM.from_pretrained(tiny)
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    record = json.loads((workdir / "out" / "run.json").read_text())
    assert record["loss"] == "dpo" and record["torch"] == torch.__version__
    assert record["pairs"] == 8 and record["tau_absolute"] > 0


def test_a_change_that_bf16_would_round_away_is_saved(run, pairs_file, workdir, tokenizer):
    base = make_model(len(tokenizer)).bfloat16()
    base.save_pretrained(workdir / "half")
    tokenizer.save_pretrained(workdir / "half")
    trained(run, str(workdir / "half"), workdir / "out", "--max-steps", "1", "--lr", "1e-6")
    weights = load_file(workdir / "out" / "model.safetensors")
    scale, before = weights["model.norm.weight"], base.state_dict()["model.norm.weight"]
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert (scale != before.float()).all() and torch.equal(scale.bfloat16(), before)


def test_distilled_self_critique_trains_on_the_revisions_that_won(run, tiny, pairs_file, workdir):
    more = ["--loss", "sft", "--accept", "--epochs", "8"]
    rows, said = trained(run, tiny, workdir / "out", *more)
    steps = train_steps(rows)
    assert "4 training pairs" in said and "6 not accepted" in said
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]


def test_under_rdpo_a_failed_revision_loses_probability(run, tiny, workdir):
    rows = [pair_row(i, f"good answer {i}", f"poor answer {i}", delta=-3.0) for i in range(4)]
    write_jsonl(workdir / "runs/sentiment/scored.jsonl", rows)
    steps = train_steps(trained(run, tiny, workdir / "out", "--loss", "rdpo", "--epochs", "6")[0])
    assert steps[-1]["rewards/margins"] < -0.02 and steps[-1]["rewards/accuracies"] == 0
    gains = [steps[-1][f"rewards/{side}"] for side in ("chosen", "rejected")]
    assert (
        "logps/chosen" in steps[-1]
        and gains[0] < gains[1]
        and gains[0] - gains[1] == pytest.approx(steps[-1]["rewards/margins"])
    )


def torchrun(*argv, nodes=1, script=ROOT / "train.py"):
    """train.py in two processes, on one node or on two nodes of one process each over loopback."""
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--nnodes=2", "--nproc-per-node=1"] if nodes == 2 else []
    command += ["--standalone", "--nproc-per-node=2"] if nodes == 1 else []
    port = 20000 + os.getpid() % 12000  # below those that the system gives out
    where = ["--master-addr=127.0.0.1", f"--master-port={port}"]
    how = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    how["env"] = os.environ | {"OMP_NUM_THREADS": "1"}
    launched = []
    for node in range(nodes):
        more = [f"--node-rank={node}", *where] if nodes == 2 else []
        line = [*command, *more, script, *argv]
        launched.append(subprocess.Popen(list(map(str, line)), **how))
    errors = [process.communicate()[1] for process in launched]
    print(*errors, sep="\n")  # whole, where the test fails
    assert not any(process.returncode for process in launched)


# two processes need two GPUs, or none
ON_CPU = ["--device", "cpu"] if torch.cuda.device_count() == 1 else []
KINDS = (".exp_avg", ".exp_avg_sq", "weight")


@pytest.mark.parametrize("nodes", [1, 2])
def test_two_processes_give_the_losses_of_one(run, tiny, pairs_file, workdir, nodes):
    """Batches of three, so that a process has one pair or two, and of the last batch one or none."""
    more = ["--batch-size", "3", "--checkpoint-activations", "--save-every", "4", *ON_CPU]
    alone = train_steps(trained(run, tiny, workdir / "alone", *more)[0])
    torchrun("--model", tiny, "--out", workdir / "two", *FAST, *more, nodes=nodes)
    together = train_steps(read_rows(workdir / "two" / "log.jsonl"))
    assert len(together) == len(alone) == 6
    for a, b in zip(alone, together, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert_same_weights(workdir / "alone", workdir / "two")


@pytest.mark.parametrize("name", ["Llama 3", "Gemma 3", "Mixtral", "Qwen 3 MoE"])
def test_a_family_in_two_processes_is_that_of_one(name, run, pairs_file, workdir, tokenizer):
    """Untied and tied, buffers that are computed, and weights that are renamed on loading."""
    kind, options = next(row[1:3] for row in FAMILIES if row[0] == name)
    model = save_model(workdir / "base", tokenizer, kind, options)
    more = ["--batch-size", "3", "--lr", "1e-4", *ON_CPU]
    alone = train_steps(trained(run, model, workdir / "alone", *more)[0])
    torchrun("--model", model, "--out", workdir / "two", *FAST, *more)
    together = train_steps(read_rows(workdir / "two" / "log.jsonl"))
    losses = [[row["loss"] for row in rows] for rows in (alone, together)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 6
    assert shapes_in(workdir / "two") == shapes_in(model)
    logits = []
    for folder in ("alone", "two"):
        saved, loading = AutoModelForCausalLM.from_pretrained(
            workdir / folder, output_loading_info=True
        )
        assert not any(loading.values()), loading
        logits.append(saved(torch.arange(5, 25)[None]).logits)
    torch.testing.assert_close(*logits, atol=1e-3, rtol=0)


LOADS = """
import os, sys
sys.path.insert(0, {root!r})
import train
load = train.load_model
def load_model(name, device, dtype):
    with open(f"loads-{{train.RANK}}", "a") as file:
        file.write(f"{{device}} ")
    return load(name, device, dtype)
train.load_model = load_model
train.run(train.main)
train.dist.barrier()
os._exit(0)
"""


def test_only_the_first_process_reads_the_weights(tiny, pairs_file, workdir):
    (workdir / "loads.py").write_text(LOADS.format(root=str(ROOT)))
    argv = ["--model", tiny, "--out", workdir / "out", *FAST, "--max-steps", "1", *ON_CPU]
    torchrun(*argv, script=workdir / "loads.py")
    assert [Path(f"loads-{rank}").read_text().split() for rank in (0, 1)] == [["cpu"], ["meta"]]
    model, _ = load_model(tiny, "meta", torch.float32)
    assert all(weight.is_meta for weight in model.parameters())


def test_no_process_holds_the_whole_optimizer_state_and_one_finishes_what_two_began(
    run, tiny, pairs_file, workdir, monkeypatch
):
    more = ["--save-every", "2", "--eval-every", "3", *ON_CPU]
    trained(run, tiny, workdir / "alone", *more)
    # two processes, ended by a fault when they would save the model: the checkpoint stays
    obstacle = workdir / "two" / "model.safetensors"

    def obstruct():  # once the run has begun: it would not begin in a folder of something else
        while not (workdir / "two" / "run.json").exists():
            time.sleep(0.01)
        obstacle.mkdir()

    threading.Thread(target=obstruct, daemon=True).start()
    with pytest.raises(AssertionError):
        torchrun("--model", tiny, "--out", workdir / "two", *FAST, *more)
    shards = [{}, {}]
    files = list((workdir / "two" / "checkpoint-2").glob("shard-0000*.safetensors"))
    for file in files:
        shards[int(file.name[10]) - 1] |= load_file(file)
    assert len(files) > 2  # a file is built in memory, so none has all of a process's shards
    for kind in KINDS:
        sizes = [sum(t.numel() for n, t in s.items() if n.endswith(kind)) for s in shards]
        assert abs(sizes[0] - sizes[1]) < 0.02 * sizes[0]
    obstacle.rmdir()
    trained(run, tiny, workdir / "two", *more)
    assert_same_weights(workdir / "alone", workdir / "two")


def test_a_model_that_packed_sequences_do_not_suit_trains_in_two_processes_too(
    run, pairs_file, workdir, tokenizer
):
    """Such a model runs sequence by sequence, and FSDP needs equally many on all processes."""
    model = save_unpacked(workdir / "longrope", tokenizer)
    assert policy_of(model).pack_tokens == 0
    more = ["--batch-size", "3", "--pack-tokens", "1000", "--max-steps", "2", *ON_CPU]
    alone = train_steps(trained(run, model, workdir / "alone", *more)[0])
    torchrun("--model", model, "--out", workdir / "two", *FAST, *more)
    together = train_steps(read_rows(workdir / "two" / "log.jsonl"))
    losses = [[row["loss"] for row in rows] for rows in (alone, together)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_reference_of_other_numbers_stops_training_at_step_1(
    run, tiny, pairs_file, workdir, monkeypatch
):
    right = train.pair_logps
    monkeypatch.setattr(train, "pair_logps", lambda *args: right(*args) - 5)
    status, _, err = run("train", "--model", tiny, "--out", workdir / "out", *FAST)
    assert status == 2 and "step 1: policy and reference differ by 0." in err


def test_dropout_is_off(run, pairs_file, workdir, tokenizer):
    """With it policy and reference would differ, and step 1 would stop the run."""
    make_model(len(tokenizer), attention_dropout=0.5).save_pretrained(workdir / "dropout")
    tokenizer.save_pretrained(workdir / "dropout")
    model, more = str(workdir / "dropout"), ["--loss", "dpo", "--max-steps", "1"]
    rows, _ = trained(run, model, workdir / "out", *more)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_run_that_was_killed_ends_as_an_unbroken_one(run, tiny, pairs_file, workdir):
    """Killed once before the first checkpoint and once behind it, which is amid an epoch."""
    flags = [*FAST, "--batch-size", "2", "--save-every", "3", "--eval-every", "3", "--epochs", "3"]
    whole, cut = workdir / "whole", workdir / "cut"
    trained(run, tiny, whole, *flags)
    command = [sys.executable, ROOT / "train.py", "--model", tiny, *flags, "--out", cut]
    dates, kept = [], []
    for lines in (1, 6):
        process = subprocess.Popen(list(map(str, command)), text=True, stdout=subprocess.PIPE)
        for said in process.stdout:
            if said.startswith("step") and len(read_rows(cut / "log.jsonl")) >= lines:
                break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        dates.append(json.loads((cut / "run.json").read_text())["date"])
        kept.append(bool(train.checkpoints(cut)))
        assert "finished" not in json.loads((cut / "run.json").read_text())
    (cut / "checkpoint.part").mkdir(exist_ok=True)  # as a kill amid the writing leaves it
    trained(run, tiny, cut, *flags)
    assert steps_of(whole) == steps_of(cut) and len(steps_of(cut)) == 12 + 4
    one, other = ((out / "model.safetensors").read_bytes() for out in (whole, cut))
    assert one == other and not train.checkpoints(cut)
    # the record is that of the start that made the first step which counts
    dates.append(json.loads((cut / "run.json").read_text())["date"])
    assert [one == next_ for one, next_ in itertools.pairwise(dates)] == kept and any(kept)


def test_a_restart_computes_the_reference_only_if_its_file_is_torn_or_of_another_run(
    run, tiny, pairs_file, workdir, monkeypatch
):
    """The run is stopped before its end, again and again. Eight pairs are trained, four held out."""
    calls, pair_logps = [], train.pair_logps

    def counted(policy, pairs):
        calls.append(len(pairs))
        return pair_logps(policy, pairs)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "pair_logps", counted)
    argv = ["train", "--model", tiny, "--out", workdir / "out", *FAST, "--eval-every", "99"]
    path = workdir / "out" / "reference.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_policy", full)
        assert run(*argv)[0] == 2 and calls == [12, 4]
        whole = path.read_bytes()
        (logps,) = load_file(path).values()
        assert logps.shape == (12, 2)
        assert run(*argv)[0] == 2 and calls == [12, 4, 4]
        path.write_bytes(whole[:-7])
        assert run(*argv)[0] == 2 and calls == [12, 4, 4, 12, 4]
        assert path.read_bytes() == whole
        save_file({"another run's": logps}, path)
        assert run(*argv)[0] == 2 and calls == [12, 4, 4, 12, 4, 12, 4]
        assert path.read_bytes() == whole
        # Another seed has other pairs first.
        assert run(*argv, "--seed", "1", "--overwrite")[0] == 2 and calls[-2:] == [12, 4]
        assert run(*argv, "--overwrite")[0] == 2 and calls[-2:] == [12, 4]
    # A finished run is a model's folder, of which servers read all safetensors as weights.
    trained(run, tiny, workdir / "out", "--eval-every", "99")
    assert [file.name for file in (workdir / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_a_layer_keeps_what_the_arithmetic_of_memory_says():
    """Bytes of all that a forward pass in bf16 saves for the backward pass, weights apart, of two
    layers and of one; and the number of parameters."""
    sys.path.insert(0, str(ROOT / "results"))
    from memory import memory_of

    prompt = list(range(3, 53))
    sequences = [(prompt, list(range(60, 85))), (prompt, list(range(90, 115)))]
    shape = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 640}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    bytes_of = []
    for layers in (1, 2):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **shape, **heads)).bfloat16()
        model.set_attn_implementation("packed")
        own, saved = {w.untyped_storage().data_ptr() for w in model.parameters()}, {}

        def keep(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor  # held, so that addresses differ
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16),
        ):
            completion_logps(model, sequences)
        sizes = {place: tensor.untyped_storage().nbytes() for place, tensor in saved.items()}
        bytes_of.append(sum(size for place, size in sizes.items() if place not in own))
        how = {"vocabulary": 640, "processes": 1, "tokens": 100, "ratio": 2.0}
        found = memory_of(layers, 512, 1024, 256, False, **how)
        assert found["parameters"] == sum(w.numel() for w in model.parameters())
    # On a CPU attention also keeps its joined output, and each segment's mask.
    joined, masks = 100 * 2 * 512, 2 * (50 * 50 + 2 * 25 * 75)
    assert bytes_of[1] - bytes_of[0] == found["kept"] + joined + masks


def test_a_full_disk_costs_the_new_checkpoint_and_not_the_last_one(
    run, tiny, pairs_file, workdir, monkeypatch
):
    save, calls = train.dcp.save, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return save(*args, **kwargs)

    argv = ["train", "--model", tiny, "--out", workdir / "out", *FAST, "--save-every", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(train.dcp, "save", full)
        status, _, err = run(*argv)
    assert status == 2 and "No space left" in err
    assert [folder.name for folder in train.checkpoints(workdir / "out")] == ["checkpoint-2"]
    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        calls[:] = [1, 1]  # the next save is the one of the finished model
        status, _, err = run(*argv)
    assert status == 2 and "No space left" in err
    trained(run, tiny, workdir / "out", "--save-every", "1")
    trained(run, tiny, workdir / "whole", "--save-every", "1")
    assert steps_of(workdir / "whole") == steps_of(workdir / "out")
    assert_same_weights(workdir / "whole", workdir / "out", atol=0)


def test_ctrl_c_while_a_checkpoint_is_written_stops_the_run_as_elsewhere(
    run, tiny, pairs_file, workdir, monkeypatch
):
    def interrupted(*args):
        raise KeyboardInterrupt

    def leave(status):
        raise SystemExit(status)

    argv = ["train", "--model", tiny, "--out", workdir / "out", *FAST, "--save-every", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(train.dcp.HuggingFaceStorageWriter, "write_data", interrupted)
        patch.setattr("os._exit", leave)
        status, _, err = run(*argv)
    assert status == 130 and "stopped" in err and "Traceback" not in err
    trained(run, tiny, workdir / "out", "--save-every", "1")


def test_fewer_steps_than_an_epoch_has_need_the_reference_of_fewer_pairs(
    run, tiny, pairs_file, workdir, monkeypatch
):
    counts, right = [], train.pair_logps
    monkeypatch.setattr(
        train, "pair_logps", lambda policy, pairs: counts.append(len(pairs)) or right(policy, pairs)
    )
    argv = ["train", "--model", tiny, *FAST, "--batch-size", "2", "--eval-every", "99"]
    assert run(*argv, "--out", workdir / "whole", "--epochs", "1")[0] == 0
    assert run(*argv, "--out", workdir / "part", "--max-steps", "2")[0] == 0
    assert counts == [8 + 4, 4, 2 * 2 + 4, 4]  # training and held-out pairs; held out at the end
    first = [train_steps(read_rows(workdir / name / "log.jsonl"))[0] for name in ("whole", "part")]
    assert first[0]["loss"] == first[1]["loss"]


def test_a_model_of_which_a_part_is_not_in_use_continues_too(
    run, pairs_file, workdir, tokenizer, monkeypatch
):
    """As the tower for images of Gemma 3: it has no gradient, and AdamW no moments of it."""
    text = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    images = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    images |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    parts = {"text_config": text | {"head_dim": 16}, "vision_config": images}
    config = Gemma3Config(**parts, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(workdir / "gemma")
    tokenizer.save_pretrained(workdir / "gemma")
    argv = ["train", "--model", workdir / "gemma", *FAST, "--save-every", "1", "--out"]

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_policy", full)
        assert run(*argv, "out")[0] == 2 and train.checkpoints(workdir / "out")
    for out in ("out", "whole"):
        status, _, err = run(*argv, out)
        assert status == 0, err
    assert_same_weights(workdir / "whole", workdir / "out", atol=0)


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_the_pairs(
    run, tiny, pairs_file, workdir, monkeypatch
):
    poisoned = lambda parameters, *args: torch.tensor(float("nan"))  # noqa: E731
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    status, _, err = run("train", "--model", tiny, "--out", workdir / "out", *FAST)
    assert status == 2 and "norm nan" in err and err.count("row-") == 4
    assert not train_steps(read_rows(workdir / "out" / "log.jsonl"))


def test_a_finished_run_is_left_alone_and_changed_settings_are_refused(
    run, tiny, pairs_file, workdir
):
    trained(run, tiny, workdir / "out", "--max-steps", "1")
    before = (workdir / "out" / "model.safetensors").stat().st_mtime_ns
    argv = ["train", *FAST, "--max-steps", "1", "--out"]
    # the same run, spelt otherwise
    status, said, err = run(*argv, "out/", "--model", f"{tiny}/", "--in", pairs_file.resolve())
    assert status == 0 and "nothing to do" in said, err
    status, _, err = run(*argv, "out", "--model", tiny, "--beta", "0.5")
    assert status == 2 and "beta" in err and "--overwrite" in err
    rows = read_rows(pairs_file)
    write_jsonl(pairs_file, [rows[0] | {"score_chosen": 9.0}, *rows[1:]])
    status, _, err = run(*argv, "out", "--model", tiny)
    assert status == 2 and "data" in err
    assert (workdir / "out" / "model.safetensors").stat().st_mtime_ns == before


def test_a_run_of_which_no_step_is_left_has_the_record_of_the_start_that_made_it(
    run, tiny, pairs_file, workdir
):
    trained(run, tiny, workdir / "out", "--max-steps", "1")
    path = workdir / "out" / "run.json"
    record = json.loads(path.read_text()) | {"commit": "of a start that died"}
    del record["finished"]
    path.write_text(json.dumps(record))
    trained(run, tiny, workdir / "out", "--max-steps", "1")
    assert json.loads(path.read_text())["commit"] != "of a start that died"


def test_a_policy_that_changed_since_the_run_began_is_refused(run, pairs_file, workdir, tokenizer):
    base = make_model(len(tokenizer))
    for scale in (1.0, 1.05):
        base.model.embed_tokens.weight.data *= scale
        base.save_pretrained(workdir / "base")
        tokenizer.save_pretrained(workdir / "base")
        argv = ["--model", workdir / "base", "--out", workdir / "out", *FAST, "--max-steps", "1"]
        status, _, err = run("train", *argv)
    assert status == 2 and "weights" in err


def test_overwrite_keeps_the_run_that_was_there_and_spares_other_folders(
    run, tiny, pairs_file, workdir
):
    trained(run, tiny, workdir / "out", "--max-steps", "1")
    before = (workdir / "out" / "model.safetensors").read_bytes()
    trained(run, tiny, workdir / "out", "--max-steps", "2", "--overwrite")
    assert (workdir / "out.bak" / "model.safetensors").read_bytes() == before
    record = json.loads((workdir / "out" / "run.json").read_text())
    del record["finished"]  # as of a run that failed at its first step
    (workdir / "out" / "run.json").write_text(json.dumps(record))
    for name in ("config.json", "model.safetensors"):
        (workdir / "out" / name).unlink()
    trained(run, tiny, workdir / "out", "--max-steps", "2", "--overwrite")
    assert (workdir / "out.bak" / "model.safetensors").read_bytes() == before
    (workdir / "precious").mkdir()
    (workdir / "precious" / "thesis.txt").write_text("years of work")
    argv = ["--model", tiny, "--out", workdir / "precious", *FAST, "--overwrite"]
    status, _, err = run("train", *argv)
    assert status == 2 and "no run directory" in err
    assert (workdir / "precious" / "thesis.txt").read_text() == "years of work"


def test_a_flag_that_changed_the_pairs_is_named(run, tiny, workdir):
    rows = [{"prompt": "The film", "chosen": f" Up {i}.", "rejected": " No."} for i in range(4)]
    argv = ["--in", write_jsonl(workdir / "in.jsonl", rows), "--model", tiny, "--loss", "dpo"]
    argv += ["--lr", "1e-4", "--max-steps", "1", "--out", workdir / "out"]
    assert run("train", *argv)[0] == 0
    status, _, err = run("train", *argv, "--raw-text")
    assert status == 2 and "began with other data (raw_text False then, True now)" in err
    status, _, err = run("train", *argv, "--max-steps", "2")
    assert status == 2 and "began with other steps (max_steps 1 then, 2 now)" in err


def test_a_policy_trained_on_in_its_own_folder_is_moved_aside(run, tiny, pairs_file, workdir):
    out = workdir / "runs" / "sentiment" / "rdpo"
    trained(run, tiny, out, "--max-steps", "1")
    before = {path: path.read_bytes() for path in out.iterdir()}
    status, _, err = run("train", "--model", out, *FAST)
    assert status == 2 and "began with other weights" in err
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert run("train", "--model", out, *FAST, "--max-steps", "1", "--overwrite")[0] == 0
    aside = {path.name: path.read_bytes() for path in Path(f"{out}.bak").iterdir()}
    assert aside == {path.name: content for path, content in before.items()}
