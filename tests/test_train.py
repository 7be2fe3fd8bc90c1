"""train.py: losses against their closed forms and limits, the data at its door, the loop, what it saves."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, make_model, pair_row, read_rows, write_jsonl
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

import train
from generate import open_alone
from score import completion_logps
from train import LOSSES, preference_loss, schedule

FAST = [
    "--dtype",
    "float32",
    "--epochs",
    "2",
    "--batch-size",
    "4",
    "--pack-tokens",
    "100",
    "--lr",
    "1e-3",
    "--beta",
    "0.1",
]


def losses_at(kind, z, delta=1.0, tau=1.0, beta=0.1, epsilon=0.1, mean_weight=0.5, tokens=10):
    """preference_loss where log pi_ref = 0, log pi(rejected) = 0 and log pi(chosen) = z / beta; with its gradient."""
    chosen = torch.tensor([z / beta], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    delta = torch.tensor([delta], dtype=torch.float64)
    settings = {"beta": beta, "delta": delta, "tau": tau, "epsilon": epsilon, "mean_weight": mean_weight}
    losses, got_z = preference_loss(kind, chosen, zero, zero, zero, tokens=torch.tensor([[tokens, tokens]]), **settings)
    assert got_z.item() == pytest.approx(z, abs=1e-6)
    losses.sum().backward()
    return losses.item(), chosen.grad.item() / beta


@pytest.mark.parametrize("kind", ["rdpo", "dpo", "cdpo", "robust"])
def test_initial_loss_is_ln2(kind):
    assert losses_at(kind, 0.0)[0] == pytest.approx(math.log(2), abs=1e-9)


def test_initial_loss_of_the_others_is_their_closed_form():
    assert losses_at("rdpo-margin", 0.0, delta=2.0, tau=0.5)[0] == pytest.approx(math.log1p(math.exp(4)), abs=1e-9)
    p = 1 / (1 + math.exp(-2))
    assert losses_at("rdpo-weight", 0.0, delta=2.0)[0] == pytest.approx((2 * p - 1) / 0.5 * math.log(2), abs=1e-9)
    assert losses_at("ipo", 0.0, beta=0.1)[0] == pytest.approx(25.0)
    assert losses_at("sft", -3.0, beta=0.1, tokens=10)[0] == pytest.approx(3.0)


def test_the_closed_form_at_step_0_is_the_loss_there():
    for kind in train.LOSSES[:-1]:
        for delta in (-1.0, 0.0, 2.0):
            settings = {"beta": 0.2, "epsilon": 0.1, "tau": 0.5, "mean_weight": 0.4}
            known = train.loss_at_reference(kind, torch.tensor([delta], dtype=torch.float64), **settings).item()
            assert losses_at(kind, 0.0, delta, **settings)[0] == pytest.approx(known)


@pytest.mark.parametrize("z", [-2.0, 0.3, 5.0])
def test_rdpo_becomes_dpo_as_tau_falls_and_turns_failed_pairs_round(z):
    assert losses_at("rdpo", z, delta=0.3, tau=1e-3) == pytest.approx(losses_at("dpo", z))
    loss, slope = losses_at("rdpo", z, delta=-0.3, tau=1e-3)
    mirrored_loss, mirrored_slope = losses_at("dpo", -z)
    assert (loss, slope) == pytest.approx((mirrored_loss, -mirrored_slope))


def test_rdpo_with_constant_belief_is_cdpo():
    delta = math.log(0.9 / 0.1)  # p = 0.9 = 1 - epsilon
    assert losses_at("rdpo", 0.7, delta=delta) == pytest.approx(losses_at("cdpo", 0.7, epsilon=0.1))


@pytest.mark.parametrize("delta", [-1.5, 0.0, 0.8])
def test_rdpo_has_its_optimum_where_z_is_delta_over_tau(delta):
    assert losses_at("rdpo", delta / 0.5, delta=delta, tau=0.5)[1] == pytest.approx(0.0, abs=1e-9)


def test_margin_and_weight_become_dpo_and_failed_revisions_carry_no_weight():
    assert losses_at("rdpo-margin", 0.4, delta=0.0) == pytest.approx(losses_at("dpo", 0.4))
    assert losses_at("rdpo-weight", 0.4, delta=80.0, mean_weight=1.0) == pytest.approx(losses_at("dpo", 0.4))
    for delta in (0.0, -2.0):
        assert losses_at("rdpo-weight", 0.4, delta=delta) == (0.0, 0.0)


def test_robust_loss_is_unbiased_under_flipped_labels():
    flipped = losses_at("robust", -0.6, epsilon=0.2)[0]
    expected = 0.8 * losses_at("robust", 0.6, epsilon=0.2)[0] + 0.2 * flipped
    assert expected == pytest.approx(losses_at("dpo", 0.6)[0])


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("z", [-100.0, 0.0, 100.0])
def test_every_loss_and_gradient_is_finite_for_ties_and_extremes(kind, z):
    for delta in (-1.0, 0.0, 1.0):
        assert all(math.isfinite(value) for value in losses_at(kind, z, delta=delta))
    if z == -100:
        assert losses_at("dpo", z)[0] == pytest.approx(100.0)  # log(sigmoid + eps) would stop at 27


def test_schedule_rises_then_falls_to_zero():
    rates = [schedule(step, 20, 4) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert 0 < rates[-1] < 0.02


# ---- data -----------------------------------------------------------------------------------------------------


def load(path, tokenizer, **options):
    args = {"loss": "rdpo", "accept": False, "keep_cut": False, "max_length": 512} | options
    rows = train.read_jsonl(path, ["chosen", "rejected"])
    return train.make_pairs(rows, path, tokenizer, type("Args", (), args))


def test_every_published_form_of_preference_data_gives_the_same_pair(workdir, tokenizer):
    user, good, bad = (
        {"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Yes."), ("assistant", "No."))
    )
    forms = [
        {"prompt": [user], "chosen": [good], "rejected": [bad]},
        {"prompt": "Hi", "chosen": [user, good], "rejected": [user, bad]},
        {"chosen": [user, good], "rejected": [user, bad]},
    ]
    scores = [{"score_chosen": 4.0, "score_rejected": 1.0}] * 2 + [{"chosen_rating": 4.0, "rejected_rating": 1.0}]
    rows = [form | score for form, score in zip(forms, scores, strict=True)]
    pairs, _, _ = load(write_jsonl(workdir / "in.jsonl", rows), tokenizer)
    assert len({json.dumps({**pair, "id": 0}) for pair in pairs}) == 1
    assert pairs[0]["delta"] == 3.0


def test_plain_text_pairs_train_without_a_template_and_end_with_one_eos(workdir, tokenizer):
    row = {"prompt": "Review the film", "chosen": " Titanic.", "rejected": " Heat."}
    pairs, _, _ = load(write_jsonl(workdir / "in.jsonl", [row]), tokenizer, loss="dpo")
    ids = pairs[0]["chosen"][1]
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(pairs[0]["chosen"][0]) == "Review the film"


def test_plain_text_pairs_without_a_prompt_share_what_they_begin_with_up_to_a_word(workdir, tokenizer):
    row = {"chosen": "Q: Which film?\nA: Titanic.", "rejected": "Q: Which film?\nA: Titan."}
    explicit = {"prompt": "Q: Which film?\nA:", "chosen": " Titanic.", "rejected": " Titan."}
    pairs, _, _ = load(write_jsonl(workdir / "in.jsonl", [row, explicit]), tokenizer, loss="dpo")
    assert pairs[0] | {"id": 0} == pairs[1] | {"id": 0}


def test_a_tied_embedding_adds_only_the_tokens_at_hand_to_the_gradient_of_the_head(tiny, tokenizer, workdir):
    pair = {"chosen": ([5, 6, 7], [8, 9]), "rejected": ([5, 6, 7], [10, 2]), "delta": 1.0}
    grads = []
    for sparse in (True, False):
        model, _ = train.load_student(tiny, torch.device("cpu"), torch.float32)
        embedding = model.get_input_embeddings()
        assert embedding.sparse
        embedding.sparse = sparse
        for _ in range(2):
            train.pair_logps(model, [pair]).sum().backward()
        assert embedding.weight.grad.layout == torch.strided
        grads.append(embedding.weight.grad)
    torch.testing.assert_close(*grads)
    make_model(len(tokenizer), tie_word_embeddings=False).save_pretrained(workdir / "untied")
    tokenizer.save_pretrained(workdir / "untied")
    model, _ = train.load_student(str(workdir / "untied"), torch.device("cpu"), torch.float32)
    assert not model.get_input_embeddings().sparse


def test_pairs_without_scores_have_no_say_in_tau_and_in_the_mean_belief():
    deltas = [1.0, None, -3.0]
    pairs = [{"chosen": ([1], [2]), "rejected": ([1], [3]), "delta": delta} for delta in deltas]
    args = type("Args", (), {"tau": 0.5, "loss": "dpo", "beta": 0.1, "epsilon": 0.1})
    settings = train.loss_settings(args, pairs, "in.jsonl")
    assert settings["tau"] == 0.5 * 2.0  # the standard deviation of 1 and -3
    logps = torch.tensor([[-1.0, -2.0]] * 3)
    means, both = train.diagnose("dpo", logps, logps, pairs, settings)
    assert means["belief"] == pytest.approx(sum(1 / (1 + math.exp(-delta)) for delta in (1, -3)) / 2)
    assert both[:, 0].isnan().tolist() == [False, True, False]
    unscored = [pair | {"delta": None} for pair in pairs]
    settings = train.loss_settings(args, unscored, "in.jsonl")
    means, _ = train.diagnose("dpo", logps, logps, unscored, settings)
    assert "belief" not in means and means["loss"] == pytest.approx(math.log(2))
    assert settings["tau"] == 0.5


def test_what_is_left_out_is_counted_by_reason(workdir, tokenizer):
    cut = pair_row(1, "a long answer", "b") | {"teacher": {"finish": {"answer": "length", "revision": "stop"}}}
    null = pair_row(2, "a", "b") | {"score_chosen": None}
    rows = [pair_row(0, "a", "b"), cut, null, {"id": "x", "error": "teacher failed"}, pair_row(4, "same", "same")]
    rows.append(pair_row(5, "lost", "won", delta=-1.0))
    path = write_jsonl(workdir / "in.jsonl", rows)
    pairs, _, counts = load(path, tokenizer)
    assert [pair["id"] for pair in pairs] == ["row-0", "row-5"]
    assert {k: v for k, v in counts.items() if v} == {
        "failed": 1, "no score": 1, "cut off by the teacher": 1, "identical": 1,
    }  # fmt: skip
    assert [pair["id"] for pair in load(path, tokenizer, accept=True)[0]] == ["row-0"]
    assert "row-1" in [pair["id"] for pair in load(path, tokenizer, keep_cut=True)[0]]
    assert "row-2" in [pair["id"] for pair in load(path, tokenizer, loss="dpo")[0]]


def test_answers_that_differ_only_beyond_max_length_are_dropped_as_identical(workdir, tokenizer):
    path = write_jsonl(
        workdir / "in.jsonl", [pair_row(0, "one two three four", "one two three five"), pair_row(1, "a", "b")]
    )
    prompt = len(load(path, tokenizer)[0][0]["chosen"][0])
    pairs, _, counts = load(path, tokenizer, max_length=prompt + 3)
    assert counts["identical"] == 1 and counts["shortened to --max-length"] == 1 and len(pairs) == 1


# ---- the loop -------------------------------------------------------------------------------------------------


def trained(run, tiny, out, *more):
    status, said, err = run("train", "--model", tiny, "--out", out, *FAST, *more)
    assert status == 0, err
    return [row for row in read_rows(out / "log.jsonl") if "loss" in row], said


def test_training_raises_the_margin_and_saves_a_model_that_loads(run, tiny, pairs_file, workdir):
    rows, said = trained(run, tiny, workdir / "out", "--loss", "dpo", "--epochs", "4")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert rows[-1]["margin"] > rows[0]["margin"] + 0.05
    assert "held out" in said
    model = AutoModelForCausalLM.from_pretrained(workdir / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert "lm_head.weight" not in load_file(workdir / "out" / "model.safetensors")
    assert AutoTokenizer.from_pretrained(workdir / "out").chat_template
    again, _ = train.load_model(str(workdir / "out"), torch.device("cpu"), torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    before = AutoModelForCausalLM.from_pretrained(tiny)
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    record = json.loads((workdir / "out" / "run.json").read_text())
    assert record["loss"] == "dpo" and record["torch"] == torch.__version__ and record["pairs"] == 8


def test_distilled_self_critique_trains_on_the_revisions_that_won(run, tiny, pairs_file, workdir):
    rows, said = trained(run, tiny, workdir / "out", "--loss", "sft", "--accept", "--epochs", "8")
    assert "4 training pairs" in said and "not accepted" in said
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"] and rows[-1]["chosen_logps"] > rows[0]["chosen_logps"]


def test_under_rdpo_a_failed_revision_loses_probability(run, tiny, workdir):
    rows = [pair_row(i, f"good answer {i}", f"poor answer {i}", delta=-3.0) for i in range(4)]
    rows[0]["score_chosen"] = 3.0  # one that won, so that the gaps have a spread
    write_jsonl(workdir / "runs/sentiment/scored.jsonl", rows)
    log, _ = trained(run, tiny, workdir / "out", "--epochs", "6")
    assert log[-1]["margin"] < -0.02


def assert_same_weights(one, other):
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=2e-5, rtol=0)


def test_accumulation_and_batch_shape_do_not_change_the_losses(run, tiny, pairs_file, workdir):
    wide, _ = trained(run, tiny, workdir / "wide", "--pack-tokens", "2000")
    narrow, _ = trained(run, tiny, workdir / "narrow", "--pack-tokens", "1")
    for a, b in zip(wide, narrow, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert_same_weights(workdir / "wide", workdir / "narrow")


def torchrun(*argv, nodes=1):
    """train.py in two processes, on one node or as two nodes of one each over loopback; their standard errors."""
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--nnodes", "2", "--nproc-per-node", "1"] if nodes == 2 else ["--standalone", "--nproc-per-node", "2"]
    port = 20000 + os.getpid() % 20000
    launched = []
    for node in range(nodes):
        where = ["--node-rank", node, "--master-addr", "127.0.0.1", "--master-port", port] if nodes == 2 else []
        launched.append(
            subprocess.Popen(
                list(map(str, [*command, *where, ROOT / "train.py", *argv])),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        )
    for process in launched:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors


@pytest.mark.parametrize("nodes", [1, 2])
def test_two_processes_give_the_losses_of_one(run, tiny, pairs_file, workdir, nodes):
    """Batches of three, so that a process has one pair or two, and none of the last batch's second half."""
    more = ["--batch-size", "3", "--checkpoint-activations"]
    alone, _ = trained(run, tiny, workdir / "alone", *more)
    torchrun("--model", tiny, "--out", workdir / "two", *FAST, *more, "--save-every", "4", "--keep", "1", nodes=nodes)
    together = [row for row in read_rows(workdir / "two" / "log.jsonl") if "loss" in row]
    assert len(together) == len(alone) == 6
    for a, b in zip(alone, together, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert_same_weights(workdir / "alone", workdir / "two")

    # no process holds the whole of weights or moments: each has written what it holds
    shards = [load_file(file) for file in sorted((workdir / "two" / "checkpoint-4").glob("*.safetensors"))]
    sizes = [
        {kind: sum(t.numel() for n, t in shard.items() if n.startswith(kind)) for kind in KINDS} for shard in shards
    ]
    for kind in KINDS:
        assert len(sizes) == 2 and abs(sizes[0][kind] - sizes[1][kind]) < 0.02 * sizes[0][kind]

    # what two have begun, one finishes
    (workdir / "two" / "model.safetensors").unlink()
    trained(run, tiny, workdir / "two", *more, "--save-every", "4", "--keep", "1")
    assert_same_weights(workdir / "alone", workdir / "two")


def test_a_model_that_takes_no_streams_trains_in_two_processes_too(run, pairs_file, workdir, tokenizer):
    """Such a model runs sequence by sequence, and FSDP needs equally many on all processes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, sliding_window=16, eos_token_id=2, **sizes)
    MistralForCausalLM(config).save_pretrained(workdir / "window")
    tokenizer.save_pretrained(workdir / "window")
    more = ["--batch-size", "3", "--pack-tokens", "1000", "--max-steps", "2"]
    alone, _ = trained(run, str(workdir / "window"), workdir / "alone", *more)
    torchrun("--model", workdir / "window", "--out", workdir / "two", *FAST, *more)
    together = [row for row in read_rows(workdir / "two" / "log.jsonl") if "loss" in row]
    assert [row["loss"] for row in alone] == pytest.approx([row["loss"] for row in together], abs=1e-5)


def test_attention_by_parts_is_not_for_a_model_with_a_window(workdir, tokenizer):
    """transformers gives an attention that it does not know no mask, so the window would be lost in silence."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, sliding_window=8, eos_token_id=2, **sizes)
    MistralForCausalLM(config).save_pretrained(workdir / "window")
    tokenizer.save_pretrained(workdir / "window")
    logps = {}
    for attention in ("eager", "by_parts"):
        model, _ = train.load_student(str(workdir / "window"), torch.device("cpu"), torch.float32, attention)
        logps[attention] = model.logps([(list(range(5, 25)), list(range(30, 50)))])
    assert model.config._attn_implementation == "sdpa" and not model.packs
    torch.testing.assert_close(*logps.values())


def test_a_student_that_changed_since_the_run_began_is_refused(run, tiny, pairs_file, workdir, tokenizer):
    base = make_model(len(tokenizer))
    for scale in (1.0, 1.05):
        base.model.embed_tokens.weight.data *= scale
        base.save_pretrained(workdir / "base")
        tokenizer.save_pretrained(workdir / "base")
        status, _, err = run("train", "--model", workdir / "base", "--out", workdir / "out", *FAST, "--max-steps", "1")
    assert status == 2 and "weights" in err


KINDS = ("weight.", "exp_avg.", "exp_avg_sq.")


def test_a_corrupt_reference_cache_stops_training_at_step_0(run, tiny, pairs_file, workdir):
    trained(run, tiny, workdir / "first")
    (cache,) = pairs_file.parent.glob("*.reference-*.safetensors")
    save_file({"logps": load_file(cache)["logps"] + torch.tensor([30.0, 0.0])}, cache)
    status, _, err = run("train", "--model", tiny, "--out", workdir / "second", *FAST)
    assert status == 2 and "step 0" in err


def test_one_changed_weight_gives_a_new_reference_cache(run, tiny, pairs_file, workdir, tokenizer):
    trained(run, tiny, workdir / "first")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 0.5
    model.save_pretrained(workdir / "changed")
    tokenizer.save_pretrained(workdir / "changed")
    trained(run, str(workdir / "changed"), workdir / "second")
    assert len(list(pairs_file.parent.glob("*.reference-*.safetensors"))) == 2


def test_dropout_is_off(run, pairs_file, workdir, tokenizer):
    """With it, two forwards would differ, the policy would not be the reference, and step 0 would stop the run."""
    make_model(len(tokenizer), attention_dropout=0.5).save_pretrained(workdir / "dropout")
    tokenizer.save_pretrained(workdir / "dropout")
    rows, _ = trained(run, str(workdir / "dropout"), workdir / "out", "--loss", "dpo", "--max-steps", "1")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_first_response_token_that_differs_has_a_gradient(tokenizer):
    model = make_model(len(tokenizer))
    pairs = [{"chosen": ([5, 6, 7], [8, 2]), "rejected": ([5, 6, 7], [9, 2])}]
    model.logps = partial(completion_logps, model)
    chosen, rejected = train.pair_logps(model, pairs)[0]
    (chosen - rejected).backward()
    assert chosen.item() != rejected.item()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


def test_a_run_killed_again_and_again_ends_as_an_unbroken_one_bit_for_bit(run, tiny, pairs_file, workdir):
    command = [sys.executable, ROOT / "train.py", "--model", tiny, *FAST, "--batch-size", "2", "--save-every", "2"]
    command += ["--eval-every", "3", "--epochs", "6", "--out"]

    def start(out):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen([*map(str, command), out], env=environment, stdout=subprocess.PIPE, text=True)

    assert start(workdir / "whole").communicate() and (workdir / "whole" / "model.safetensors").exists()
    for lines in (1, 4, 8):  # lines of the log at which it is killed: before the first checkpoint, and between others
        process = start(workdir / "cut")
        for said in process.stdout:
            log = workdir / "cut" / "log.jsonl"
            if said.startswith("step") and len(log.read_text().splitlines()) >= lines:
                break
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (workdir / "cut" / "model.safetensors").exists()
    (workdir / "cut" / "checkpoint.part").mkdir(exist_ok=True)  # as a kill amid the writing leaves it
    start(workdir / "cut").communicate()
    assert (workdir / "whole" / "log.jsonl").read_bytes() == (workdir / "cut" / "log.jsonl").read_bytes()
    assert (workdir / "whole" / "model.safetensors").read_bytes() == (
        workdir / "cut" / "model.safetensors"
    ).read_bytes()


def test_keep_bounds_the_checkpoints_and_leaves_them_after_the_finish(run, tiny, pairs_file, workdir):
    for keep, names in ((0, []), (2, ["checkpoint-3", "checkpoint-4"])):
        trained(run, tiny, workdir / f"out{keep}", "--save-every", "1", "--keep", str(keep))
        assert [folder.name for folder in train.checkpoints(workdir / f"out{keep}")] == names
    (workdir / "out2" / "lock").touch()  # as a kill between the saved model and the end leaves it
    trained(run, tiny, workdir / "out2", "--save-every", "1", "--keep", "0")
    assert not train.checkpoints(workdir / "out2") and not (workdir / "out2" / "lock").exists()


def test_a_full_disk_costs_the_new_checkpoint_and_not_the_last_one(run, tiny, pairs_file, workdir, monkeypatch):
    save, calls = train.dcp.save, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return save(*args, **kwargs)

    monkeypatch.setattr(train.dcp, "save", full)
    status, _, err = run("train", "--model", tiny, "--out", workdir / "out", *FAST, "--save-every", "1")
    assert status == 2 and "No space left" in err and "continue" in err
    assert [folder.name for folder in train.checkpoints(workdir / "out")] == ["checkpoint-2"]
    trained(run, tiny, workdir / "out", "--save-every", "1")
    trained(run, tiny, workdir / "whole", "--save-every", "1")
    assert (workdir / "whole" / "log.jsonl").read_bytes() == (workdir / "out" / "log.jsonl").read_bytes()


def test_a_full_disk_at_the_end_costs_no_training(run, tiny, pairs_file, workdir, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        status, _, err = run("train", "--model", tiny, "--out", workdir / "out", *FAST, "--save-every", "1")
    assert status == 2 and "No space left" in err and "continue" in err
    trained(run, tiny, workdir / "out", "--save-every", "1")
    trained(run, tiny, workdir / "whole", "--save-every", "1")
    assert_same_weights(workdir / "whole", workdir / "out")


def test_steps_that_are_not_finite_are_skipped_twice_and_then_stop_with_their_rows(
    run, tiny, pairs_file, workdir, monkeypatch
):
    clip, bad = torch.nn.utils.clip_grad_norm_, []

    def poisoned(parameters, *args):
        bad.append(len(bad) + 1)
        return clip(parameters, *args) * (float("nan") if bad[-1] in (2, 4, 5) else 1.0)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    status, said, err = run("train", "--model", tiny, "--out", workdir / "out", *FAST, "--epochs", "3")
    assert status == 2 and "third such step" in err and "row-" in err
    rows = read_rows(workdir / "out" / "log.jsonl")
    assert [row.get("skipped") for row in rows] == [None, 1, None, 2] and all("loss" in rows[i] for i in (0, 2))
    assert said.count("skipped") == 2


def test_a_finished_run_is_left_alone_and_changed_settings_are_refused(run, tiny, pairs_file, workdir):
    trained(run, tiny, workdir / "out")
    before = (workdir / "out" / "model.safetensors").stat().st_mtime_ns
    status, said, _ = run("train", "--model", tiny, "--out", workdir / "out", *FAST)
    assert status == 0 and "nothing to do" in said
    status, _, err = run("train", "--model", tiny, "--out", workdir / "out", *FAST, "--beta", "0.5")
    assert status == 2 and "beta" in err and "--overwrite" in err
    assert (workdir / "out" / "model.safetensors").stat().st_mtime_ns == before


def test_overwrite_never_deletes_a_folder_that_training_did_not_make(run, tiny, pairs_file, workdir):
    (workdir / "precious").mkdir()
    (workdir / "precious" / "thesis.txt").write_text("years of work")
    status, _, err = run("train", "--model", tiny, "--out", workdir / "precious", *FAST, "--overwrite")
    assert status == 2 and "does not move it" in err
    assert (workdir / "precious" / "thesis.txt").read_text() == "years of work"


def test_overwrite_keeps_the_model_that_was_there(run, tiny, pairs_file, workdir):
    trained(run, tiny, workdir / "out", "--max-steps", "1")
    before = (workdir / "out" / "model.safetensors").read_bytes()
    trained(run, tiny, workdir / "out", "--max-steps", "2", "--overwrite")
    assert (workdir / "out.old" / "model.safetensors").read_bytes() == before


def test_a_second_process_on_the_same_folder_is_refused(run, tiny, pairs_file, workdir):
    trained(run, tiny, workdir / "out", "--max-steps", "1")
    before = {path: path.read_bytes() for path in (workdir / "out").iterdir()}
    (workdir / "out" / "model.safetensors").rename(workdir / "aside")  # so that it looks unfinished
    with open_alone(workdir / "out" / "lock"):
        for more in ([], ["--overwrite"]):
            status, _, err = run("train", "--model", tiny, "--out", workdir / "out", *FAST, "--max-steps", "1", *more)
            assert status == 2 and "another process" in err
    (workdir / "aside").rename(workdir / "out" / "model.safetensors")
    (workdir / "out" / "lock").unlink()
    assert {path: path.read_bytes() for path in (workdir / "out").iterdir()} == before
