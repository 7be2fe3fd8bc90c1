"""Stage 3 of 4: a policy learns from the scored pairs.

    python train.py --task sycophancy                         # rDPO on the embedded model, on a CPU
    torchrun --nproc-per-node 8 train.py --model meta-llama/Llama-3.2-1B-Instruct --lr 1e-5
    python train.py --task sycophancy --loss dpo --sft-weight 1   # no scores; a rate of its own
    python train.py --task sycophancy --loss sft --accept     # dSC: SFT on the revisions that won,
    python train.py --model runs/sycophancy/sft-accept --lr 5e-6 --out runs/next  # then rDPO from there

runs/TASK/scored.jsonl (or --in FILE of TRL's or UltraFeedback's format) -> runs/TASK/LOSS/: a model
that transformers loads, log.jsonl (a line a step) and run.json (settings, versions, counts).

Departure: the paper's equation (arXiv 2402.08005) was not available to us. rdpo is our best reading
of what is known about it; rdpo-margin and rdpo-weight are our own.
"""

import contextlib
import functools
import json
import math
import os
import random
import shutil
import sys
import time
import warnings
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from kernels.packed import PACK_TOKENS, completion_logps, micro_batches, use_packed_attention
from prompts.chat import load_model, pick_device, save_tokenizer
from prompts.rows import (
    BadInput, digest_of, lines_of, make_parser, newest_task, number, open_locked, provenance, read_rows,
    run, write,
)  # fmt: skip
from prompts.tokens import make_pairs

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # not needed with one process
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # like RANK and LOCAL_RANK, set by torchrun
SCORED_LOSSES = ("rdpo", "rdpo-margin", "rdpo-weight")
LOSSES = (*SCORED_LOSSES, "dpo", "cdpo", "robust", "ipo", "sft")
# Learning rates that results/study chose.
RATES = {"rdpo": 4e-5, "rdpo-margin": 8e-5, "rdpo-weight": 4e-5, "sft": 2e-5}

# ---- the losses ----------------------------------------------------------------------------------
# From RLHF to rDPO, for a prompt x, chosen c and rejected r (equations of arXiv 2305.18290):
# (3) RLHF maximises E[R(x, y)] - beta KL(pi || pi_ref) over policies pi, for a reward R.
# (4) The optimum is pi(y|x) = pi_ref(y|x) exp(R(x, y) / beta) / Z(x), where Z(x) normalises it.
# (5) Solved for the reward: R(x, y) = beta log [pi(y|x) / pi_ref(y|x)] + beta log Z(x).
# (6) Bradley and Terry (1952): c beats r with probability sigmoid(R(x, c) - R(x, r)). By (5), where
#     Z(x) cancels, that is sigmoid(z), z = beta [log pi(c|x)/pi_ref(c|x) - log pi(r|x)/pi_ref(r|x)].
# (7) DPO maximises the likelihood of labels that say "c beats r": its loss is -log sigmoid(z).
# A label that is true with probability p has the cross-entropy -p log sigmoid(z) - (1 - p) log
# sigmoid(-z). cDPO (Mitchell 2023) has one p for all pairs. rDPO (2402.08005) has one for each, by
# (6) of an external reward: p = sigmoid(delta / tau), the gap of its scores in units of tau. The
# slope in z is sigmoid(z) - p, so the optimum is z = delta / tau.


def preference_loss(
    policy_logps, reference_logps, delta, tokens, *, kind, beta, tau, label_smoothing=0.1, mean_weight=1.0
):  # fmt: skip
    """Losses (B,) and margins z (B,) of B pairs. kind: one of LOSSES but sft.

    policy_logps, reference_logps: (B, 2) fp32, sums in nats over the tokens of chosen and rejected.
    delta: (B,) score_chosen - score_rejected, in the same units as tau. tokens: (B, 2) lengths.
    beta: strength of the pull to the reference. label_smoothing: share of flipped labels that cdpo
        and robust assume.
    mean_weight: mean of max(0, 2p - 1) over the training pairs, which gives rdpo-weight the mean 1.

    The gradient on log pi(chosen) of a pair won, tied and lost, at z = 0; negative means: learn it.

    >>> same, delta, tokens = torch.zeros(3, 2), torch.tensor([1.0, 0.0, -1.0]), torch.ones(3, 2)
    >>> for kind in ("dpo", "rdpo", "rdpo-margin", "rdpo-weight"):
    ...     logps = torch.zeros(3, 2, requires_grad=True)
    ...     losses, z = preference_loss(logps, same, delta, tokens, kind=kind, beta=0.1, tau=0.15)
    ...     losses.sum().backward()
    ...     print(f"{kind:12}", *(f"{slope:+.4f}" for slope in logps.grad[:, 0].tolist()))
    dpo          -0.0500 -0.0500 -0.0500
    rdpo         -0.0499 +0.0000 +0.0499
    rdpo-margin  -0.0999 -0.0500 -0.0001
    rdpo-weight  -0.0499 +0.0000 +0.0000
    """
    log_ratios = policy_logps - reference_logps
    z = beta * (log_ratios[:, 0] - log_ratios[:, 1])
    p = torch.sigmoid(delta / tau)
    if kind == "rdpo":
        losses = -p * F.logsigmoid(z) - (1 - p) * F.logsigmoid(-z)
    elif kind == "rdpo-margin":  # the reward gap as a margin, as in arXiv 2402.10571
        losses = -F.logsigmoid(z - delta / tau)
    elif kind == "rdpo-weight":
        losses = -(2 * p - 1).clamp(min=0) / mean_weight * F.logsigmoid(z)
    elif kind == "dpo":  # arXiv 2305.18290, eq. 7
        losses = -F.logsigmoid(z)
    elif kind == "cdpo":  # Mitchell, A note on DPO with noisy preferences
        losses = -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)
    elif kind == "robust":  # arXiv 2403.00409, eq. 12
        losses = label_smoothing * F.logsigmoid(-z) - (1 - label_smoothing) * F.logsigmoid(z)
        losses /= 1 - 2 * label_smoothing
    elif kind == "ipo":  # arXiv 2310.12036, eq. 17, of means over tokens, as its authors run it
        h = log_ratios[:, 0] / tokens[:, 0] - log_ratios[:, 1] / tokens[:, 1]
        losses = (h - 1 / (2 * beta)) ** 2
    else:
        raise ValueError(f"no loss {kind}")
    return losses, z


def sft_term(policy_logps, tokens, p):
    """Expected SFT loss per token (B,), where chosen is the better answer with probability p (B,):
    -p log pi(chosen) / |chosen| - (1 - p) log pi(rejected) / |rejected|. A preference loss alone lets
    both log-probs fall, also that of the end-of-turn token: answers run on (arXiv 2404.19733)."""
    chosen_loss, rejected_loss = (-policy_logps / tokens).unbind(1)
    return p * chosen_loss + (1 - p) * rejected_loss


def total_loss(policy_logps, reference_logps, delta, tokens, *, kind, sft_weight, **settings):
    """The losses (B,) that are trained, and margins z (B,): preference loss plus SFT term. Arguments
    are those of preference_loss; for sft, which is the SFT loss of chosen, logps are (B, 1)."""
    if kind == "sft":
        return -policy_logps[:, 0] / tokens[:, 0], torch.zeros_like(delta)
    losses, z = preference_loss(policy_logps, reference_logps, delta, tokens, kind=kind, **settings)
    if sft_weight:
        p = torch.ones_like(delta)  # a loss that ignores the scores imitates every revision
        if kind in SCORED_LOSSES:
            p = torch.sigmoid(delta / settings["tau"])
        losses = losses + sft_weight * sft_term(policy_logps, tokens, p)
    return losses, z


def loss_settings(args, pairs):
    """What total_loss takes beside tensors. --tau is in units of the root mean square of the reward
    gaps, so that any scale works. Raises BadInput where the loss needs scores that differ."""
    delta = torch.tensor([pair.delta for pair in pairs], dtype=torch.float64)
    delta = delta[~delta.isnan()]  # NaN: a pair without scores
    tau = args.tau * delta.square().mean().sqrt().item()  # NaN where no pair has scores
    weight = (2 * torch.sigmoid(delta / tau) - 1).clamp(min=0).mean().item()
    if args.loss in SCORED_LOSSES and tau == 0:
        raise BadInput(f"--loss {args.loss}: all pairs tie; the scores must differ")
    if args.loss == "rdpo-weight" and weight == 0:
        raise BadInput("--loss rdpo-weight: no revision won, so no pair has a weight")
    settings = {"kind": args.loss, "sft_weight": args.sft_weight, "beta": args.beta, "tau": tau}
    return settings | {"label_smoothing": args.label_smoothing, "mean_weight": weight}


# ---- one step, and the loop ----------------------------------------------------------------------
def training_step(policy, optimizer, pairs, reference_logps, settings, max_grad_norm):
    """One optimizer step on B pairs: (log-probs before it (B, 2), norm of the gradient). The loss is
    the mean over pairs, however they are cut into micro-batches and divided among processes."""
    policy_logps = torch.zeros_like(reference_logps)
    for indices, weight in micro_batches_of(pairs, policy):  # weight 0: a pass for FSDP alone
        some = [pairs[i] for i in indices]
        logps = policy(some)  # (b, 2), in eval mode, so without dropout
        delta, tokens = tensors_of(some, logps.device)
        losses, _ = total_loss(logps, reference_logps[indices], delta, tokens, **settings)
        # Times WORLD, because FSDP takes the mean over the processes where the sum is meant.
        (losses.sum() * weight * WORLD / len(pairs)).backward()
        policy_logps[indices] += weight * logps.detach()

    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
    norm = norm.full_tensor().item() if WORLD > 1 else norm.item()
    if not math.isfinite(norm):
        raise BadInput(f"gradient norm {norm}; look at the pairs {[pair.id for pair in pairs]}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if WORLD > 1:
        dist.all_reduce(policy_logps)  # each process had the log-probs of its own pairs
    return policy_logps, norm


def train(policy, optimizer, pairs, held_out, settings, args, steps, out, log):
    """Trains for `steps` steps, from the newest checkpoint in the run directory `out` if there is
    one. Each step is a line on the screen and in log, the open file log.jsonl."""
    per_epoch = math.ceil(len(pairs) / args.batch_size)

    def shuffled(epoch):
        return random.Random(f"{args.seed} {epoch}").sample(range(len(pairs)), len(pairs))

    # The reference is the policy before training, so it comes before a checkpoint is loaded.
    both = pairs + held_out
    reference_logps = torch.zeros(len(both), len(policy.sides), device=policy.device)
    if args.loss != "sft":  # a short run sees only part of the pairs
        needed = shuffled(0)[: steps * args.batch_size]
        needed += range(len(pairs), len(both))
        reference_logps[needed] = reference_logps_of(policy, [both[i] for i in needed], out)
    start = load_checkpoint(out, policy.model, optimizer)
    if start:
        print(f"{out}: goes on after step {start} of {steps}")

    for step in range(start, steps):
        began = time.perf_counter()
        epoch, place = divmod(step, per_epoch)  # place: which batch of this epoch's shuffle
        if step == start or place == 0:
            order = shuffled(epoch)
        picks = order[place * args.batch_size : (place + 1) * args.batch_size]
        batch, known = [pairs[i] for i in picks], reference_logps[picks]
        optimizer.param_groups[0]["lr"] = lr = learning_rate(step, steps, args)
        logps, norm = training_step(policy, optimizer, batch, known, settings, args.max_grad_norm)

        # The rest is diagnostics and saving.
        seconds = time.perf_counter() - began
        tokens = sum(len(getattr(pair, side)) for pair in batch for side in policy.sides)
        difference = ((logps - known).abs().sum() / tokens).item()
        if step == 0 and args.loss != "sft" and not difference < 0.05:  # rounding, or NaN
            raise BadInput(f"step 1: policy and reference differ by {difference:.2f} nats a token")
        metrics = metrics_of(logps, known, batch, settings) | {"grad_norm": norm, "lr": lr}
        metrics |= {"ms": 1000 * seconds, "tokens_per_second": tokens / seconds}
        log_metrics(log, step + 1, metrics)
        last = step + 1 == steps
        if held_out and (last or (step + 1) % args.eval_every == 0):
            logps = pair_logps(policy, held_out)
            metrics = metrics_of(logps, reference_logps[len(pairs) :], held_out, settings)
            log_metrics(log, step + 1, metrics, "held_out")
        if not last and (step + 1) % args.save_every == 0:
            save_checkpoint(out, step + 1, policy.model, optimizer)


def learning_rate(step, steps, args):
    """Linear up over the share --warmup-ratio of the steps, then half a cosine down to 0."""
    warmup = max(1, round(args.warmup_ratio * steps))
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def pair_logps(policy, pairs):
    """Log-probs of all pairs, (len(pairs), 2), for sft (len(pairs), 1), on every process."""
    logps = torch.zeros(len(pairs), len(policy.sides), device=policy.device)
    for indices, weight in micro_batches_of(pairs, policy):
        logps[indices] += weight * policy([pairs[i] for i in indices])
    if WORLD > 1:
        dist.all_reduce(logps)
    return logps


def reference_logps_of(policy, pairs, out):
    """pair_logps before training. The run directory keeps them until the run is finished, so that a
    restart goes on at once."""
    path, record = out / "reference.safetensors", json.loads((out / "run.json").read_text())
    name = digest_of([record[key] for key in SAME])  # the seed decides which pairs come first
    logps = torch.zeros(len(pairs), 2, device=policy.device)
    if RANK == 0:  # the file may be missing, torn or another run's
        with contextlib.suppress(OSError, safetensors.SafetensorError, KeyError):
            logps += safetensors.torch.load_file(path)[name].to(policy.device)
    if WORLD > 1:
        dist.broadcast(logps, 0)
    if not logps.all():  # zeros: the file had none
        logps = pair_logps(policy, pairs)
        if RANK == 0:
            write(path, safetensors.torch.save({name: logps.cpu()}))
    return logps


def micro_batches_of(pairs, policy):
    """[(indices into pairs, weight 1)] for this process. FSDP gathers a layer on all processes at
    once, so all need as many passes: a process with fewer repeats pair 0 with weight 0."""
    costs = [len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs]
    of_ranks = []
    for rank in range(WORLD):
        numbers = range(rank, len(pairs), WORLD)
        batches = micro_batches([costs[i] for i in numbers], policy.pack_tokens)
        of_ranks.append([([numbers[k] for k in batch], 1) for batch in batches])
    passes = max(map(len, of_ranks))
    return of_ranks[RANK] + [([0], 0)] * (passes - len(of_ranks[RANK]))


def tensors_of(pairs, device):
    """(delta (B,) fp32, tokens (B, 2)) of pairs."""
    tokens = [[len(pair.chosen), len(pair.rejected)] for pair in pairs]
    delta = torch.tensor([pair.delta for pair in pairs], device=device)
    return delta, torch.tensor(tokens, device=device)


def metrics_of(policy_logps, reference_logps, pairs, settings):
    """Means over pairs for the log, under TRL's names; p over the pairs with scores."""
    delta, tokens = tensors_of(pairs, policy_logps.device)
    losses, z = total_loss(policy_logps, reference_logps, delta, tokens, **settings)
    metrics = {"loss": losses, "logps/chosen": policy_logps[:, 0]}
    if settings["kind"] != "sft":
        p = torch.sigmoid(delta / settings["tau"])
        metrics |= {"logps/rejected": policy_logps[:, 1], "p": p[~p.isnan()]}
        metrics |= {"rewards/margins": z, "rewards/accuracies": (z > 0).float()}
        rewards = settings["beta"] * (policy_logps - reference_logps)
        metrics |= {"rewards/chosen": rewards[:, 0], "rewards/rejected": rewards[:, 1]}
    return {name: value.double().mean().item() for name, value in metrics.items() if len(value)}


def log_metrics(file, step, metrics, part=None):
    """A line of log.jsonl and, without logps, on the screen. part: "held_out", or None in training."""
    print(f"{part or 'step':8} {step:4d}", end="")
    for name in [name for name in metrics if not name.startswith("logps/")]:
        text = f"{metrics[name]:,.0f}" if abs(metrics[name]) >= 1000 else f"{metrics[name]:.4g}"
        print(f" | {name.rpartition('/')[2]} {text:>8}", end="")
    print(flush=True)
    file.write(lines_of([{"step": step} | ({part: metrics} if part else metrics)]))
    file.flush()


# ---- the policy: in one process, or sharded over many by FSDP2 -----------------------------------
class Policy(torch.nn.Module):
    """policy(pairs) gives their log-probs, (B, 2), for sft (B, 1), computed in dtype. Weights are
    fp32. Under torchrun FSDP2 shards weights, gradients and moments, layer by layer. It wraps the
    policy, not its model, since completion_logps uses the head outside of the model's forward()."""

    def __init__(self, args, device, dtype):
        super().__init__()
        self.device = device
        self.sides = ("chosen",) if args.loss == "sft" else ("chosen", "rejected")
        self.autocast = {"dtype": dtype, "enabled": dtype != torch.float32}
        # The first of several processes reads the weights. The others build the model without any
        # (on "meta") and wait meanwhile, so that one process says why it cannot be loaded.
        known = [None, None, None]
        if RANK > 0:
            dist.broadcast_object_list(known)
        where = device if WORLD == 1 else "cpu" if RANK == 0 else "meta"
        self.model, self.tokenizer = load_model(args.model, where, torch.float32)
        if RANK == 0:
            digest = digest_of([torch.hash_tensor(w.cpu()).item() for w in self.parameters()])
            with torch.autocast(self.model.device.type, **self.autocast):
                packs = use_packed_attention(self.model)
            known = [digest, packs, dict(self.model.named_buffers())]
            if WORLD > 1:
                dist.broadcast_object_list(known)
        self.digest, packs, buffers = known
        if packs:
            self.model.set_attn_implementation("packed")
        self.pack_tokens = args.pack_tokens if packs else 0  # of a micro-batch; 0: one pair

        kinds = self.model._no_split_modules or ()  # the names of its classes of decoder layers
        layers = [module for module in self.model.modules() if type(module).__name__ in kinds]
        if args.checkpoint_activations:  # keep a layer's input, and run the layer again in backward
            for layer in layers:
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        if WORLD > 1:
            weights = self.model.state_dict() if RANK == 0 else {}
            mixed = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
            mesh = dist.init_device_mesh(device.type, (WORLD,))
            for module in (*layers, self):
                fully_shard(module, mesh=mesh, mp_policy=mixed, reshard_after_forward=True)
            # Weights come one by one, so that no other process ever holds the whole model. The
            # buffers come apart from them, since state_dict() lacks those that are computed.
            self.to_empty(device=device)
            self.model.tie_weights()
            options = dcp_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            dcp_state.set_model_state_dict(self.model, weights, options=options)
            for name, buffer in buffers.items():
                self.model.get_buffer(name).copy_(buffer)

    def forward(self, pairs):
        sequences = [(pair.prompt, getattr(pair, side)) for pair in pairs for side in self.sides]
        with torch.autocast(self.device.type, **self.autocast):
            return completion_logps(self.model, sequences).view(len(pairs), -1)


# ---- the run directory: checkpoints and the saved model ------------------------------------------
# A run is continued only if none of these has changed; data and weights are hashes.
SAME = (
    "data", "weights", "loss", "beta", "tau", "label_smoothing", "sft_weight", "lr", "warmup_ratio",
    "max_grad_norm", "steps", "batch_size", "dtype", "seed",
)  # fmt: skip
REASONS = {  # flags and counts that change them
    "data": ("input", "raw_text", "accept", "max_repeats", "max_length", "limit", "pairs"),
    "weights": ("model",), "steps": ("epochs", "max_steps", "batch_size"),
}  # fmt: skip


def open_run(out, record, overwrite):
    """Makes or continues a run directory; returns its open log.jsonl, which keeps other runs out.
    Raises BadInput where the directory is another run's, or none."""
    path, log = out / "run.json", out / "log.jsonl"
    if out.exists() and not path.exists() and {*out.iterdir()} - {log}:
        raise BadInput(f"--out {out}: is no run directory (no run.json), so it is left alone")
    out.mkdir(parents=True, exist_ok=True)
    file = open_locked(log)
    if overwrite and (checkpoints(out) or (out / "config.json").exists()):  # worth keeping as .bak
        shutil.rmtree(f"{out}.bak", ignore_errors=True)
        out.rename(f"{out}.bak")
        return open_run(out, record, overwrite=False)
    before = json.loads(path.read_text()) if path.exists() and not overwrite else record
    for key in SAME:  # of a new run, before is record, so nothing differs
        if before.get(key) != record[key]:
            # Name the flag, where one explains it.
            changed = [name for name in REASONS.get(key, ()) if before.get(name) != record[name]]
            shown = (changed or [key])[0]
            made = f"other {key} ({shown} {before.get(shown)} then, {record[shown]} now)"
            raise BadInput(f"{out}: began with {made}; choose another --out, or pass --overwrite")
    if not (checkpoints(out) or before.get("finished")):  # no step is saved: the run starts anew
        write(path, json.dumps(record, indent=1).encode())
        file.truncate(0)
    return file


def state_of(model, optimizer):
    """{name: tensor} of the weights and of AdamW's moments, each process's own shards."""
    options = dcp_state.StateDictOptions(flatten_optimizer_state_dict=True)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    moments = dcp_state.get_optimizer_state_dict(model, optimizer, options=options)
    return state | {name: value for name, value in moments.items() if name.startswith("state.")}


def save_checkpoint(out, step, model, optimizer):
    """All that a later run needs to go on after `step` steps; each process writes its shards. It is
    renamed when it is whole: a kill or a full disk costs this checkpoint, not the one before."""
    part = out / "checkpoint.part"
    if RANK == 0:
        shutil.rmtree(part, ignore_errors=True)
    if WORLD > 1:
        dist.barrier()
    state = state_of(model, optimizer)
    files = {name: 1 + i // 20 for i, name in enumerate(state)}  # 20 tensors each
    writer = dcp.HuggingFaceStorageWriter(str(part), files, save_distributed=True)
    try:
        dcp.save(state, storage_writer=writer, no_dist=WORLD == 1)
    except CheckpointException as error:  # holds a full disk's error, or Ctrl-C
        raise next(iter(error.failures.values()))[0] from None
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
    """Loads the newest checkpoint, if any, into the tensors of state_of, which are the model's and
    the optimizer's own; returns its step, or 0. Any number of processes may have written it."""
    if not checkpoints(out):
        return 0
    folder = checkpoints(out)[-1]
    reader = dcp.HuggingFaceStorageReader(str(folder))
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)  # weights not in use have no moments
    dcp.load(state_of(model, optimizer), storage_reader=reader, planner=planner, no_dist=WORLD == 1)
    if RANK == 0:
        shutil.copy(folder / "log.jsonl", out)
    return int(folder.name.partition("-")[2])


def save_policy(policy, out, record):
    """Saves the policy in fp32, as transformers does: bf16 would lose changes below 1/512 of a
    weight. Sharded weights are gathered in the first process."""
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = dcp_state.get_model_state_dict(policy.model, options=options)
    if RANK == 0:
        for name in policy.model.all_tied_weights_keys:
            del weights[name]  # a tied weight is saved once
        policy.model.save_pretrained(out, state_dict=weights)
        save_tokenizer(policy.tokenizer, policy.model.name_or_path, out)
        (out / "reference.safetensors").unlink(missing_ok=True)  # a server would read it as weights
        write(out / "run.json", json.dumps(record | {"finished": True}, indent=1).encode())
        for folder in checkpoints(out):
            shutil.rmtree(folder)


# ---- command line --------------------------------------------------------------------------------
def parse_args():
    parser = make_parser(__doc__, server=False)
    add = parser.add_argument
    # fmt: off
    add("--model", default="smollm2", help="policy, and reference: 'smollm2' (embedded), a folder or a hub id (default: %(default)s)")
    add("--in", dest="input", metavar="FILE", help="scored pairs, or any data set in TRL's preference format (default: runs/TASK/scored.jsonl)")
    add("--out", metavar="DIR", help="run directory (default: LOSS beside --in, so runs/TASK/LOSS)")
    add("--loss", default="rdpo", choices=LOSSES, help="see preference_loss in this file (default: %(default)s)")
    add("--accept", action="store_true", help="train only on pairs whose revision won: score_chosen > score_rejected")
    add("--raw-text", action="store_true", help="prompts and answers that are text are trained as they are, without the chat template (default: as a user's and an assistant's turn, where the model has a template)")
    add("--max-repeats", type=float, default=1.0, help="leave out pairs whose chosen answer has a larger share of repeated 4-grams of words, 0 to 1; a small policy that imitates them repeats itself (default: %(default)s, which is none)")
    add("--beta", type=number(1e-9, kind=float), default=0.1, help="strength of the pull to the reference, as in DPO (default: %(default)s)")
    add("--tau", type=number(1e-9, kind=float), default=0.15, help="temperature of the preference probability p, in units of the root mean square reward gap of the training pairs: a gap of TAU units has p = 0.73 (default: %(default)s)")
    add("--label-smoothing", type=number(0, 0.499, float), default=0.1, help="share of flipped labels that cdpo and robust assume, below 0.5 (default: %(default)s)")
    add("--sft-weight", type=number(0, kind=float), help="weight of the SFT loss of the better answer that is added to the preference losses; keeps answers of small models from running on (default: 1 with the rdpo losses, and with the others 0, as published)")
    add("--lr", type=number(0, kind=float), help="peak learning rate; 5e-7 to 1e-6 is usual for 7B models and thousands of steps (default, for the embedded one alone: rdpo and rdpo-weight 4e-5, rdpo-margin 8e-5, sft 2e-5; the others, whose answers run on without an SFT term, 1e-5)")
    add("--warmup-ratio", type=number(0, 1, float), default=0.1, help="share of the steps with a rising learning rate (default: %(default)s)")
    add("--max-grad-norm", type=number(1e-9, kind=float), default=1.0, help="larger gradients are scaled down to this norm (default: %(default)s)")
    add("--epochs", type=number(), default=2, help="passes over the training pairs (default: %(default)s)")
    add("--max-steps", type=number(0), help="maximum number of optimizer steps; the learning rate falls to 0 over them (default: as many as the epochs have)")
    add("--batch-size", type=number(), default=8, help="pairs per optimizer step, over all processes (default: %(default)s)")
    add("--pack-tokens", type=number(), default=PACK_TOKENS, help="tokens of a micro-batch, at least one pair; changes memory and speed, not results (default: %(default)s)")
    add("--checkpoint-activations", action="store_true", help="keep each layer's input only and compute the layer again in the backward pass: less memory, a third more time")
    add("--max-length", type=number(), default=1024, help="longest prompt and answer together, in tokens; longer answers are shortened, pairs with longer prompts left out (default: %(default)s)")
    add("--eval-every", type=number(), default=20, help="steps between evaluations on the held-out pairs (default: %(default)s)")
    add("--save-every", type=number(), default=10, help="steps between checkpoints (default: %(default)s)")
    # fmt: on
    args = parser.parse_args()
    if args.lr is None and args.model != "smollm2":
        raise BadInput("--lr: has a default for the embedded model only; see --help")
    args.defaults = [name for name in ("lr", "sft_weight") if getattr(args, name) is None]
    if args.lr is None:
        args.lr = RATES.get(args.loss, 1e-5)
    if args.sft_weight is None:
        args.sft_weight = float(args.loss in SCORED_LOSSES)
    args.task = args.task or newest_task("scored.jsonl", args.input)
    args.input = args.input or f"runs/{args.task}/scored.jsonl"
    args.out = args.out or str(Path(args.input).parent / (args.loss + "-accept" * args.accept))
    return args


def main():
    args = parse_args()
    if WORLD > 1 and args.device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # before GPU 0 has a tensor
    device, dtype = pick_device(args.device, args.dtype)
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")  # only the first process prints

    rows = read_rows(args.input, "chosen", "rejected")[: args.limit]
    policy = Policy(args, device, dtype)
    need_scores = args.loss in SCORED_LOSSES or args.accept
    pairs, held_out, left_out = make_pairs(rows, args.input, policy.tokenizer, args, need_scores)
    del rows  # 200,000 take more than a gigabyte
    why = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none"
    if not pairs:
        how = "; score.py adds scores, plain --loss dpo needs none" * ("without scores" in left_out)
        raise BadInput(f"{args.input}: no pair to train on; left out: {why}{how}")
    print(f"{args.input}: {len(pairs)} training pairs, {len(held_out)} held out; left out: {why}")
    settings = loss_settings(args, pairs)
    per_epoch = math.ceil(len(pairs) / args.batch_size)
    steps = min(args.epochs * per_epoch, math.inf if args.max_steps is None else args.max_steps)
    out = Path(args.out)
    record = {
        **vars(args), **provenance(device), "dtype": str(dtype), "processes": WORLD, "steps": steps,
        "data": digest_of([pairs, held_out]), "weights": policy.digest, "pairs": len(pairs),
        "left_out": left_out, "tau_absolute": settings["tau"] if settings["tau"] > 0 else None,
    }  # fmt: skip
    log = open_run(out, record, args.overwrite) if RANK == 0 else open(os.devnull, "wb")
    if WORLD > 1:
        dist.barrier()
    record = json.loads((out / "run.json").read_text())
    if record.get("finished"):
        return print(f"{out}: already finished; nothing to do (--overwrite starts afresh)")
    tau = f"; tau = {settings['tau']:.4g} in the scores' units" * (settings["tau"] > 0)
    print(f"{steps} steps, {per_epoch} an epoch{tau}")
    print(f"--loss {args.loss} --lr {args.lr:g} --sft-weight {args.sft_weight:g}", end="")
    print(f"; by this loss's defaults: {', '.join(args.defaults)}" if args.defaults else "")
    options = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
    optimizer = torch.optim.AdamW(policy.model.parameters(), args.lr, **options)
    train(policy, optimizer, pairs, held_out, settings, args, steps, out, log)
    save_policy(policy, out, record)
    print(f"{out}: saved")


if __name__ == "__main__":
    run(main)
    if WORLD > 1:
        sys.stdout.flush()
        dist.barrier()  # no process leaves while another still saves
        os._exit(0)  # Gloo's threads may abort while Python shuts down (pytorch's 179291)
