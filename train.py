"""Stage 3 of 4: a student learns from the scored pairs.

    python train.py --task sycophancy                         # rDPO on the embedded model, on a CPU
    torchrun --nproc-per-node 8 train.py --model meta-llama/Llama-3.2-1B-Instruct --lr 1e-5
    python train.py --task sycophancy --loss dpo --sft-weight 1   # the same, but scores are ignored
    python train.py --task sycophancy --loss sft --accept     # dSC: SFT on the revisions that won,
    python train.py --model runs/sycophancy/sft-accept --lr 5e-6                  # and rDPO from there

runs/TASK/scored.jsonl (or --in FILE of TRL's or UltraFeedback's format) -> runs/TASK/LOSS/: a model
that transformers loads, log.jsonl (a line a step) and run.json (settings, versions, counts).

    z = beta [(log pi(chosen) - log pi_ref(chosen)) - (log pi(rejected) - log pi_ref(rejected))]
    loss = -log sigmoid(z - (score_chosen - score_rejected) / tau)   # --loss rdpo-margin
           + sft_weight (SFT loss of the better answer)              # 0 leaves the loss alone

Departure from the paper: the equation of rDPO (arXiv 2402.08005) was not at hand; rdpo-margin, rdpo
and rdpo-weight are three readings of its abstract.
"""

import functools
import json
import math
import os
import random
import shutil
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from generate import digest_of, encode, load_model, make_parser, pick_device, provenance, run, write
from kernels.packed import PACK_TOKENS, check_model, completion_logps, micro_batches
from prompts import BadInput, as_messages, read_rows
from score import is_scored, repetition

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process has no need of it
RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))  # of torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))
barrier = dist.barrier if WORLD > 1 else lambda: None
all_reduce = dist.all_reduce if WORLD > 1 else lambda tensor: tensor  # in place
say = functools.partial(print, flush=True) if RANK == 0 else lambda text: None
SCORED_LOSSES = ("rdpo-margin", "rdpo", "rdpo-weight")
LOSSES = (*SCORED_LOSSES, "dpo", "cdpo", "robust", "ipo", "sft")

# ---- the losses, and one training step -----------------------------------------------------------


def preference_loss(kind, policy_logps, reference_logps, delta, tokens, **settings):
    """Losses (B,) and margins z (B,) of B pairs.

    policy_logps, reference_logps: (B, 2) fp32, log-probs of chosen and rejected, sums in nats over
    tokens (for sft (B, 1), chosen alone). delta (B,): score_chosen - score_rejected. tokens (B, 2).
    p = sigmoid(delta / tau) is the probability that chosen is better. settings: beta; tau, in units
    of delta; epsilon, the assumed share of flipped labels; mean_weight, the mean of max(0, 2p - 1)
    over the training pairs; sft_weight.

    Where the revision failed (delta < 0) rdpo-margin nearly ignores the pair (at z = 0 its gradient
    has the weight p), rdpo pulls z down to delta / tau, rdpo-weight gives the pair no weight. All
    but sft add sft_weight times the SFT loss of the better answer, as arXiv 2404.19733 does for
    dpo: without it both log-probs fall, and that of the end of the turn falls with them.
    """
    if kind == "sft":
        return -policy_logps[:, 0] / tokens[:, 0], torch.zeros_like(delta)
    beta, tau, epsilon = settings["beta"], settings["tau"], settings["epsilon"]
    log_ratios = policy_logps - reference_logps
    z = beta * (log_ratios[:, 0] - log_ratios[:, 1])
    p = torch.sigmoid(delta / tau)
    if kind == "rdpo-margin":  # the reward gap as a margin, as in arXiv 2402.10571
        losses = -F.logsigmoid(z - delta / tau)
    elif kind == "rdpo":  # least at z = delta / tau
        losses = -p * F.logsigmoid(z) - (1 - p) * F.logsigmoid(-z)
    elif kind == "rdpo-weight":
        losses = -(2 * p - 1).clamp(min=0) / settings["mean_weight"] * F.logsigmoid(z)
    elif kind == "dpo":  # arXiv 2305.18290, eq. 7
        losses = -F.logsigmoid(z)
    elif kind == "cdpo":  # Mitchell, A note on DPO with noisy preferences
        losses = -(1 - epsilon) * F.logsigmoid(z) - epsilon * F.logsigmoid(-z)
    elif kind == "robust":  # arXiv 2403.00409, eq. 12
        losses = (epsilon * F.logsigmoid(-z) - (1 - epsilon) * F.logsigmoid(z)) / (1 - 2 * epsilon)
    else:  # ipo, arXiv 2310.12036, eq. 17, of means over tokens, as its authors run it
        h = log_ratios[:, 0] / tokens[:, 0] - log_ratios[:, 1] / tokens[:, 1]
        losses = (h - 1 / (2 * beta)) ** 2
    if settings["sft_weight"]:
        # the better answer: chosen; for the rdpo losses p times chosen and 1 - p times rejected
        of_chosen = p if kind in SCORED_LOSSES else torch.ones_like(p)
        weights = torch.stack([of_chosen, 1 - of_chosen], 1)
        losses = losses - settings["sft_weight"] * (weights * policy_logps / tokens).sum(1)
    return losses, z


def loss_settings(args, pairs):
    """What preference_loss takes beside log-probs and scores, from the training pairs. --tau is in
    units of the root mean square of the reward gaps, so that any reward scale works."""
    delta = torch.tensor([pair.delta for pair in pairs], dtype=torch.float64)  # NaN without scores
    tau = args.tau * delta.square().nanmean().sqrt().nan_to_num().item()  # 0: no scores, or all tie
    mean_weight = (2 * torch.sigmoid(delta / tau) - 1).clamp(min=0).nanmean().nan_to_num().item()
    settings = {"beta": args.beta, "tau": tau, "epsilon": args.epsilon, "mean_weight": mean_weight}
    return settings | {"sft_weight": args.sft_weight}


def training_step(student, optimizer, batch, reference_logps, args, settings):
    """One optimizer step on B pairs: (log-probs before it, (B, 2), norm of the gradient). The loss
    is a sum over pairs, divided by B; how pairs are cut into micro-batches does not change it."""
    policy_logps = torch.zeros_like(reference_logps)
    for indices, weight in micro_batches_of(batch, student, args):
        pairs, reference = [batch[i] for i in indices], reference_logps[indices]
        logps = student(pairs)  # (b, 2), of chosen and rejected; in eval mode, without dropout
        delta, tokens = tensors_of(pairs, logps.device)
        losses, _ = preference_loss(args.loss, logps, reference, delta, tokens, **settings)
        # times WORLD, because FSDP takes the mean over the processes where the sum is meant
        (losses.sum() * weight * WORLD / len(batch)).backward()
        policy_logps[indices] += weight * logps.detach()
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), args.clip)
    norm = norm.full_tensor().item() if WORLD > 1 else norm.item()
    if not math.isfinite(norm):
        raise BadInput(f"gradient norm {norm} (all ties?); look at {[pair.id for pair in batch]}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    all_reduce(policy_logps)
    return policy_logps, norm


def metrics_of(policy_logps, reference_logps, pairs, args, settings):
    """Means over pairs for the log; of p over those with scores."""
    delta, tokens = tensors_of(pairs, policy_logps.device)
    losses, z = preference_loss(args.loss, policy_logps, reference_logps, delta, tokens, **settings)
    values = {"loss": losses, "chosen_logps": policy_logps[:, 0]}
    if args.loss != "sft":
        p = torch.sigmoid(delta / settings["tau"])
        values |= {"rejected_logps": policy_logps[:, 1], "margin": z, "accuracy": (z > 0).float()}
        values |= {"p": p[~p.isnan()]}
    return {name: value.double().mean().item() for name, value in values.items() if len(value)}


def learning_rate(step, steps, args):
    """Linear up over the share --warmup of the steps, then half a cosine down to 0."""
    warmup = max(1, round(args.warmup * steps))
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def pair_logps(student, pairs, args):
    """Log-probs of all pairs, (len(pairs), 2), for sft (len(pairs), 1), on every process."""
    logps = torch.zeros(len(pairs), len(student.sides), device=student.device)
    for indices, weight in micro_batches_of(pairs, student, args):
        logps[indices] += weight * student([pairs[i] for i in indices])
    all_reduce(logps)
    return logps


def micro_batches_of(pairs, student, args):
    """[(indices into pairs, weight)] for this process. FSDP gathers a layer on all processes at
    once, so all make equally many passes: a process with fewer repeats pair 0 with weight 0."""
    costs = [len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs]
    shares, budget = [], (args.pack_tokens if student.packs else 0)  # 0: one pair a micro-batch
    for rank in range(WORLD):  # which takes every WORLD-th pair
        mine = micro_batches(costs[rank::WORLD], budget)
        shares.append([[rank + WORLD * k for k in batch] for batch in mine])
    padding = max(map(len, shares)) - len(shares[RANK])
    return [(indices, 1.0) for indices in shares[RANK]] + [([0], 0.0)] * padding


def tensors_of(pairs, device):
    """(delta (B,) fp32, tokens (B, 2)) of pairs."""
    delta = torch.tensor([pair.delta for pair in pairs], device=device)
    tokens = [[len(pair.chosen), len(pair.rejected)] for pair in pairs]
    return delta, torch.tensor(tokens, device=device)


# ---- data ----------------------------------------------------------------------------------------


class Pair(NamedTuple):
    id: object
    prompt: list  # token ids
    chosen: list
    rejected: list
    delta: float  # score_chosen - score_rejected; NaN without scores


def make_pairs(rows, path, tokenizer, args):
    """(training pairs, held-out pairs, counts of rows that were left out, by reason). Raises
    BadInput for a row that is no preference pair."""
    train, held_out, counts = [], [], {}
    for number, row in enumerate(rows, 1):
        name = row.get("id", number)
        try:
            made = make_pair(row, name, tokenizer, args)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise BadInput(f"{path}: row {name}: {error}") from None
        if isinstance(made, Pair):
            (held_out if row.get("split") == "test" else train).append(made)
        else:
            counts[made] = counts.get(made, 0) + 1
    return train, held_out, counts


def make_pair(row, name, tokenizer, args):
    """The Pair of a row, or why the row is left out."""
    if row.get("error"):
        return "failed"
    for side in ("chosen", "rejected"):  # "chosen_rating" is another usual name
        row.setdefault(f"score_{side}", row.get(f"{side}_rating"))
    if (args.loss in SCORED_LOSSES or args.accept) and not is_scored(row):
        return "without scores"
    finish = (row.get("teacher") or {}).get("finish", {})
    if "length" in (finish.get("answer"), finish.get("revision")):
        return "cut off by the teacher"
    if args.accept and not row["score_chosen"] > row["score_rejected"]:
        return "not accepted"
    if row.get("split") not in (None, "", "train", "test"):
        return f"of the split {row['split']}"
    context, chosen, rejected = split_row(row)
    if not (chosen.strip() and rejected.strip()):
        return "with an empty answer"
    if repetition(chosen) > args.max_repeats:
        return "that repeat themselves"
    prompt, chosen = encode(tokenizer, context, chosen)
    _, rejected = encode(tokenizer, context, rejected)
    room = args.max_length - len(prompt)
    if room <= 0 or not prompt:
        return f"with a prompt of 0 or of more than {args.max_length - 1} tokens"
    if chosen[:room] == rejected[:room] and args.loss != "sft":
        return "identical"
    delta = row["score_chosen"] - row["score_rejected"] if is_scored(row) else math.nan
    return Pair(name, prompt, chosen[:room], rejected[:room], float(delta))


def split_row(row):
    """(prompt, chosen text, rejected text); the prompt is text, or all messages before the answer.
    Answers are text, messages behind the prompt (TRL), or whole conversations (UltraFeedback)."""
    prompt, sides = row.get("prompt"), (row["chosen"], row["rejected"])
    if all(isinstance(part, str) for part in (prompt, *sides)):
        return prompt, *sides
    prompt, sides = as_messages(prompt) if prompt else [], [as_messages(side) for side in sides]
    sides = [prompt + side if side[0]["role"] == "assistant" else side for side in sides]
    (*context, chosen), (*other, rejected) = sides
    # whole conversations may have a system message that the prompt lacks
    behind = context and context == other and all(message in context for message in prompt)
    if not behind or {chosen["role"], rejected["role"]} != {"assistant"}:
        raise ValueError("its answers must be the last messages, behind the same prompt")
    return context, chosen["content"], rejected["content"]


# ---- the student: in one process, or sharded over many by FSDP2 ----------------------------------


class Student(torch.nn.Module):
    """student(pairs) gives their log-probs, (B, 2), for sft (B, 1), computed in --dtype. FSDP
    gathers the outermost weights only while forward() of the outermost module runs."""

    def __init__(self, model, device, dtype, sides):
        super().__init__()
        self.model, self.device, self.sides = model, device, sides
        self.autocast = {"dtype": dtype, "enabled": dtype != torch.float32}
        with torch.autocast(model.device.type, **self.autocast):
            self.packs = check_model(model)
        self.weights = digest_of([torch.hash_tensor(x.cpu()).item() for x in model.parameters()])

    def forward(self, pairs):
        sequences = [(pair.prompt, getattr(pair, side)) for pair in pairs for side in self.sides]
        with torch.autocast(self.device.type, **self.autocast):
            return completion_logps(self.model, sequences).view(len(pairs), -1)


def load_student(args, device, dtype):
    """(Student with fp32 weights, tokenizer). Under torchrun FSDP2 shards weights, gradients and
    moments over all processes, layer by layer."""
    here = torch.device("cpu") if WORLD > 1 else device
    model, tokenizer = load_model(args.model, here, torch.float32)
    sides = ("chosen",) if args.loss == "sft" else ("chosen", "rejected")
    student = Student(model, device, dtype, sides)
    layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    if args.checkpoint_activations:  # keep a layer's input, and run the layer again in backward
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    if WORLD > 1:
        mixed = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        mesh = dist.init_device_mesh(device.type, (WORLD,))
        for module in (*layers, student):  # outside of forward() all weights are sharded
            fully_shard(module, mesh=mesh, mp_policy=mixed, reshard_after_forward=True)
    return student, tokenizer


# ---- the run directory: checkpoints and the saved model ------------------------------------------

# a run directory is continued only where all of these are as they were; else open_run refuses it
SAME = "data weights loss beta tau epsilon lr warmup clip sft_weight steps batch_size dtype seed"


def open_run(out, record, overwrite):
    """Makes or continues a run directory. Raises BadInput where it is another run's, or none."""
    path = out / "run.json"
    if out.exists() and not path.exists() and any(out.iterdir()):
        raise BadInput(f"--out {out}: is no run directory (it has no run.json), so it stays")
    if overwrite and (checkpoints(out) or (out / "config.json").exists()):  # else keep the old .bak
        shutil.rmtree(f"{out}.bak", ignore_errors=True)
        out.rename(f"{out}.bak")
    out.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() and not overwrite else record
    for key in SAME.split():
        if before.get(key) != record[key]:
            made = f"was trained with {key} = {before.get(key)}, not {record[key]}"
            raise BadInput(f"{out}: {made}; choose another --out, or pass --overwrite")
    if not (checkpoints(out) or before.get("finished")):
        write(path, json.dumps(record, indent=1).encode())  # no step is saved: the run starts anew


def state_of(model, optimizer):
    """{name: tensor} of the weights and of AdamW's moments, each process's own shards."""
    options = dcp_state.StateDictOptions(flatten_optimizer_state_dict=True)
    state = dcp_state.get_optimizer_state_dict(model, optimizer, options=options)
    moments = {name: value for name, value in state.items() if name.startswith("state.")}
    return {name: parameter.detach() for name, parameter in model.named_parameters()} | moments


def save_checkpoint(out, step, model, optimizer):
    """All that a later run needs to go on after `step` steps; each process writes its shards. It is
    renamed when it is whole: a kill or a full disk costs this checkpoint, not the one before."""
    part = out / "checkpoint.part"
    if RANK == 0:
        shutil.rmtree(part, ignore_errors=True)
    barrier()
    writer = dcp.HuggingFaceStorageWriter(str(part), save_distributed=True)
    dcp.save(state_of(model, optimizer), storage_writer=writer, no_dist=WORLD == 1)
    if RANK == 0:
        shutil.copy(out / "log.jsonl", part)
        old = checkpoints(out)
        part.rename(out / f"checkpoint-{step}")
        for folder in old:
            shutil.rmtree(folder)


def checkpoints(out):
    """Folders of the whole checkpoints, oldest first."""
    return sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))


def load_checkpoint(out, model, optimizer):
    """Steps done by the newest checkpoint, which is loaded; 0 without one. Any number of processes
    may read what any other number wrote."""
    if not checkpoints(out):
        return 0
    folder = checkpoints(out)[-1]
    reader = dcp.HuggingFaceStorageReader(str(folder))
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)  # weights not in use have no moments
    dcp.load(state_of(model, optimizer), storage_reader=reader, planner=planner, no_dist=WORLD == 1)
    if RANK == 0:
        shutil.copy(folder / "log.jsonl", out)
    return int(folder.name.partition("-")[2])


def save_student(student, tokenizer, out, record):
    """Saves the student in fp32, as transformers does: bf16 would lose changes below 1/512 of a
    weight. Sharded weights meet in the first process."""
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = dcp_state.get_model_state_dict(student.model, options=options)
    if RANK == 0:
        for name in student.model.all_tied_weights_keys:
            del weights[name]  # a tied weight is saved once
        student.model.save_pretrained(out, state_dict=weights)
        tokenizer.save_pretrained(out)
        write(out / "run.json", json.dumps(record | {"finished": True}, indent=1).encode())
        for folder in checkpoints(out):
            shutil.rmtree(folder)


# ---- command line --------------------------------------------------------------------------------


def parse_args():
    parser = make_parser(__doc__, reads="scored.jsonl", server=False)
    add = parser.add_argument
    # fmt: off
    add("--model", default="smollm2", help="student, and reference: 'smollm2' (embedded), a folder or a hub id (default: %(default)s)")
    add("--in", dest="input", metavar="FILE", help="scored pairs, or any data set in TRL's preference format (default: runs/TASK/scored.jsonl)")
    add("--out", metavar="DIR", help="run directory (default: LOSS beside --in, so runs/TASK/LOSS)")
    add("--loss", default="rdpo-margin", choices=LOSSES, help="see preference_loss in this file (default: %(default)s)")
    add("--accept", action="store_true", help="train only on pairs whose revision won: score_chosen > score_rejected")
    add("--max-repeats", type=float, default=1.0, help="leave out pairs whose chosen answer has a larger share of repeated 4-grams of words, 0 to 1; a small student that imitates them runs in circles (default: %(default)s, which is none)")
    add("--beta", type=float, default=0.1, help="strength of the pull to the reference, as in DPO (default: %(default)s)")
    add("--tau", type=float, default=0.15, help="temperature of the preference probability p, in units of the root mean square reward gap of the training pairs: a gap of TAU units has p = 0.73, and asks z to exceed 1 under rdpo-margin (default: %(default)s)")
    add("--epsilon", type=float, default=0.1, help="share of flipped labels that cdpo and robust assume, below 0.5 (default: %(default)s)")
    add("--sft-weight", type=float, help="weight of the loss sft of the better answer that is added to the preference losses; keeps answers of small models from running on (default: 1 with the rdpo losses, and with the others 0, as published)")
    add("--lr", type=float, help="peak learning rate; 5e-7 to 1e-6 is usual for 7B models and thousands of steps (default, for the embedded one alone: rdpo-margin 8e-5, rdpo and rdpo-weight 4e-5, sft 2e-5; the others, which run on without an SFT term, 1e-5)")
    add("--warmup", type=float, default=0.1, help="share of the steps with a rising learning rate (default: %(default)s)")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient (default: %(default)s)")
    add("--epochs", type=int, default=2, help="passes over the training pairs (default: %(default)s)")
    add("--max-steps", type=int, help="optimizer steps at most; the learning rate falls to 0 over those that are made (default: as many as the epochs have)")
    add("--batch-size", type=int, default=8, help="pairs an optimizer step, over all processes (default: %(default)s)")
    add("--pack-tokens", type=int, default=PACK_TOKENS, help="tokens of a micro-batch, at least one pair; changes memory and speed, not results (default: %(default)s)")
    add("--checkpoint-activations", action="store_true", help="keep each layer's input only and compute the layer again in the backward pass: less memory, a third more time")
    add("--max-length", type=int, default=1024, help="longest prompt and answer together, in tokens; longer answers are shortened, pairs with longer prompts left out (default: %(default)s)")
    add("--eval-every", type=int, default=20, help="steps between evaluations on the held-out pairs (default: %(default)s)")
    add("--save-every", type=int, default=10, help="steps between checkpoints (default: %(default)s)")
    # fmt: on
    args = parser.parse_args()
    if args.lr is None and args.model != "smollm2":
        raise BadInput("--lr: has a default for the embedded model only; see --help")
    rates = {"rdpo-margin": 8e-5, "rdpo": 4e-5, "rdpo-weight": 4e-5, "sft": 2e-5}  # of the study
    args.lr = rates.get(args.loss, 1e-5) if args.lr is None else args.lr
    if args.sft_weight is None:
        args.sft_weight = float(args.loss in SCORED_LOSSES)
    if min(args.batch_size, args.eval_every, args.save_every, args.clip) <= 0:
        raise BadInput("--batch-size, --eval-every, --save-every, --clip: must be more than 0")
    return args


def note(file, step, row, part=None):
    """A line of log.jsonl and on the screen. part: "held_out" or None."""
    texts = {name: f"{v:,.0f}" if abs(v) >= 1000 else f"{v:.4g}" for name, v in row.items()}
    values = " | ".join(f"{name} {text:>8}" for name, text in texts.items())
    say(f"{part or 'step':8} {step:4d} | {values}")
    file.write(json.dumps({"step": step, **({part: row} if part else row)}) + "\n")


def main():
    args = parse_args()
    if WORLD > 1 and args.device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(LOCAL_RANK)  # before anything is put on the first one
    device, dtype = pick_device(args.device, args.dtype)
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    source = Path(args.input or f"runs/{args.task}/scored.jsonl")
    out = Path(args.out or source.parent / (args.loss + ("-accept" if args.accept else "")))
    rows = read_rows(source, "chosen", "rejected")[: args.limit]
    student, tokenizer = load_student(args, device, dtype)
    train, held_out, counts = make_pairs(rows, source, tokenizer, args)
    left_out = ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "none"
    if not train:
        raise BadInput(f"{source}: no pair to train on; left out: {left_out}; see --loss")
    settings = loss_settings(args, train)
    say(f"{source}: {len(train)} training pairs, {len(held_out)} held out; left out: {left_out}")
    per_epoch = math.ceil(len(train) / args.batch_size)
    steps = min(args.epochs * per_epoch, math.inf if args.max_steps is None else args.max_steps)
    record = {"data": digest_of([train, held_out]), "weights": student.weights}
    record |= {"pairs": len(train), "left_out": counts, "tau_absolute": settings["tau"]}
    record |= {"dtype": str(dtype), "steps": steps, "processes": WORLD}
    record = vars(args) | record | provenance(args.device)
    if RANK == 0:
        open_run(out, record, args.overwrite)
    barrier()
    record = json.loads((out / "run.json").read_text())
    if record.get("finished"):
        return say(f"{out}: finished before; nothing to do (--overwrite starts afresh)")
    say(f"{steps} steps, {per_epoch} an epoch; tau = {settings['tau']:.4g} in units of the scores")
    options = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
    optimizer = torch.optim.AdamW(student.model.parameters(), args.lr, **options)
    # before the checkpoint is loaded: the reference is the model before training
    reference = torch.zeros(len(train) + len(held_out), 1, device=device)
    if args.loss != "sft":
        reference = pair_logps(student, train + held_out, args)
    start = load_checkpoint(out, student.model, optimizer)
    # line by line, so that a killed run keeps what it printed
    log = open(out / "log.jsonl" if RANK == 0 else os.devnull, "a" if start else "w", buffering=1)

    for step in range(start, steps):
        began = time.perf_counter()
        # the order of the pairs is a function of seed and epoch alone
        epoch, place = divmod(step, per_epoch)
        order = random.Random(f"{args.seed} {epoch}").sample(range(len(train)), len(train))
        picks = order[place * args.batch_size : (place + 1) * args.batch_size]
        batch, batch_reference = [train[i] for i in picks], reference[picks]
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, args)
        policy, norm = training_step(student, optimizer, batch, batch_reference, args, settings)
        # the rest is diagnostics and saving
        seconds = time.perf_counter() - began
        tokens = sum(len(getattr(pair, side)) for pair in batch for side in student.sides)
        if step == 0 and args.loss != "sft":  # policy and reference are the same model still
            gap = ((policy - batch_reference).abs().sum() / tokens).item()
            if not gap < 0.05:
                raise BadInput(f"step 1: policy and reference differ by {gap:.2f} nats a token")
        row = metrics_of(policy, batch_reference, batch, args, settings)
        row |= {"grad_norm": norm, "lr": optimizer.param_groups[0]["lr"], "ms": 1000 * seconds}
        note(log, step + 1, row | {"tokens_per_second": tokens / seconds})
        if held_out and ((step + 1) % args.eval_every == 0 or step + 1 == steps):
            policy = pair_logps(student, held_out, args)
            row = metrics_of(policy, reference[len(train) :], held_out, args, settings)
            note(log, step + 1, row, "held_out")
        if (step + 1) % args.save_every == 0 and step + 1 < steps:
            save_checkpoint(out, step + 1, student.model, optimizer)
    save_student(student, tokenizer, out, record)
    say(f"{out}: saved")


if __name__ == "__main__":
    run(main)
    if WORLD > 1:
        barrier()  # no process leaves while another still saves
        os._exit(0)  # Gloo's threads may abort while Python shuts down (pytorch's 179291)
