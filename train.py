"""Stage 3 of 4: a student learns from the scored pairs, as much from each as the reward believes in it.

    python train.py --task sycophancy                                  # rDPO on the embedded model, CPU is enough
    torchrun --nproc-per-node 8 train.py --task sycophancy --model meta-llama/Llama-3.2-1B-Instruct --lr 1e-6
    python train.py --task sycophancy --loss dpo                       # the same pairs, scores ignored
    python train.py --task sycophancy --loss sft --accept              # dSC: SFT on the revisions that won,
    python train.py --task sycophancy --model runs/sycophancy/sft-accept --lr 5e-6    # and rDPO from there

runs/TASK/scored.jsonl -> runs/TASK/LOSS/: a model folder that transformers loads as it is, log.jsonl (one line a
step) and run.json (settings, versions, counts). Any preference data of TRL's format trains as well, with --in.

    z = beta [(log pi(chosen) - log pi_ref(chosen)) - (log pi(rejected) - log pi_ref(rejected))]
    p = sigmoid((score_chosen - score_rejected) / tau)
    loss = -p log sigmoid(z) - (1 - p) log sigmoid(-z)          # --loss rdpo; preference_loss has the others

Departures from the papers: the equation of rDPO (arXiv 2402.08005) was not at hand. Its abstract asks that the loss
generalise DPO, take an external reward in and bear noise; three readings of that are here, and `rdpo` is the one in
which failed revisions turn round, ties teach nothing and every pair counts by how much the reward believes in it.
"""

import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import time
import types
import warnings
from array import array
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from generate import (
    append,
    encode,
    fail,
    find_model,
    is_conversation,
    latest_task,
    load_model,
    load_tokenizer,
    on_disk,
    open_alone,
    parser_of,
    pick_device,
    pick_dtype,
    positive,
    provenance,
    put_aside,
    read_jsonl,
    rewrite,
    run_stage,
)
from score import SIDES, check_model, completion_logps, cut, is_scored, text_of

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process has no need of it
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun sets them
SCORE_AWARE = ("rdpo", "rdpo-margin", "rdpo-weight")
LOSSES = (*SCORE_AWARE, "dpo", "cdpo", "robust", "ipo", "sft")

# ---- ALGORITHM: the loss --------------------------------------------------------------------------------------


def preference_loss(kind, policy_chosen, policy_rejected, reference_chosen, reference_rejected, **settings):
    """Losses (B,) and z (B,) of B pairs, from four (B,) fp32 tensors of per-sequence sums of log-probs, in nats.

    settings: beta; delta (B,) = score_chosen - score_rejected; tau, in the units of delta; mean_weight, the mean of
    max(0, 2p - 1) over the training pairs; epsilon, the share of wrong labels; tokens (B, 2), lengths of the two.

    With z as above and p = sigmoid(delta / tau):
    rdpo         -p log s(z) - (1 - p) log s(-z)       optimum z = delta / tau; tau -> 0: dpo on the reward's sign
    rdpo-margin  -log s(z - delta / tau)               the reward gap as a margin; delta = 0: dpo
    rdpo-weight  -w log s(z), w = max(0, 2p - 1) / mean_weight                 failed revisions have no gradient
    dpo          -log s(z)                                                     arXiv 2305.18290, eq. 7
    cdpo         -(1 - e) log s(z) - e log s(-z)                               Mitchell, note on noisy preferences
    robust       [-(1 - e) log s(z) + e log s(-z)] / (1 - 2e)                  arXiv 2403.00409, eq. 12
    ipo          (h - 1 / (2 beta))^2, h = z / beta with each log-ratio a mean over tokens   arXiv 2310.12036, eq. 17
    sft          -log pi(chosen) / tokens

    The mean in ipo is not in the paper's text, but in its experiments, as its authors told those of TRL, who do the same
    (trl/trainer/dpo_trainer.py); sums would make the squared loss a matter of length.
    """
    beta, epsilon = settings["beta"], settings["epsilon"]
    z = beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected))
    if kind in SCORE_AWARE:
        belief = settings["delta"] / settings["tau"]
        p = torch.sigmoid(belief)
    if kind == "rdpo":
        losses = -p * F.logsigmoid(z) - (1 - p) * F.logsigmoid(-z)
    elif kind == "rdpo-margin":
        losses = -F.logsigmoid(z - belief)
    elif kind == "rdpo-weight":
        losses = -(2 * p - 1).clamp(min=0) / settings["mean_weight"] * F.logsigmoid(z)
    elif kind == "dpo":
        losses = -F.logsigmoid(z)
    elif kind == "cdpo":
        losses = -(1 - epsilon) * F.logsigmoid(z) - epsilon * F.logsigmoid(-z)
    elif kind == "robust":
        losses = (-(1 - epsilon) * F.logsigmoid(z) + epsilon * F.logsigmoid(-z)) / (1 - 2 * epsilon)
    elif kind == "ipo":
        per_chosen, per_rejected = settings["tokens"].unbind(1)
        h = (policy_chosen - reference_chosen) / per_chosen - (policy_rejected - reference_rejected) / per_rejected
        losses = (h - 1 / (2 * beta)) ** 2
    elif kind == "sft":
        losses = -policy_chosen / settings["tokens"][:, 0]
    else:
        raise ValueError(f"no loss '{kind}'; there are {', '.join(LOSSES)}")
    return losses, z


def loss_at_reference(kind, delta, beta, epsilon, tau, mean_weight):
    """The loss (B,) where the policy is the reference still, so z = 0: ln 2 but for these. For sft there is none."""
    ln2 = torch.full_like(delta, math.log(2))
    if kind == "rdpo-margin":
        return F.softplus(delta / tau)
    if kind == "rdpo-weight":
        return torch.tanh(delta / (2 * tau)).clamp(min=0) / mean_weight * ln2  # 2 sigmoid(x) - 1 = tanh(x / 2)
    return torch.full_like(delta, 1 / (4 * beta**2)) if kind == "ipo" else ln2


def sides_of(kind):
    """The answers of a pair that a loss looks at."""
    return SIDES[:1] if kind == "sft" else SIDES


def gaps(pairs):
    """score_chosen - score_rejected of each pair, (B,) fp64; NaN where there are no scores."""
    known = array("d", (math.nan if pair["delta"] is None else pair["delta"] for pair in pairs))
    return torch.tensor(known, dtype=torch.float64)


def loss_settings(args, pairs, source):
    """What preference_loss is told beside the log-probs; --tau is in standard deviations of the gap over these pairs."""
    deltas = gaps(pairs)
    deltas = deltas[~deltas.isnan()]
    spread = deltas.std(correction=0).item() if len(deltas) else 0.0
    tau = args.tau * (spread or 1.0)
    belief = torch.sigmoid(deltas / tau)
    mean_weight = (2 * belief - 1).clamp(min=0).mean().item()
    if args.loss in SCORE_AWARE:
        say(f"tau {args.tau} x standard deviation of the gaps = {tau:.4g}; mean belief p {belief.mean():.3f}")
    if args.loss == "rdpo-weight" and mean_weight == 0:
        fail(f"{source}: no revision won, so rdpo-weight has nothing to learn from")
    return {"beta": args.beta, "epsilon": args.epsilon, "tau": tau, "mean_weight": mean_weight}


def pair_losses(kind, policy, reference, pairs, settings):
    """preference_loss for pairs whose log-probs are the rows of policy and reference: (B, 2), chosen and rejected, or
    (B, 1) where the loss looks at the chosen ones alone; z means nothing then."""
    delta = gaps(pairs).to(policy)
    tokens = torch.tensor([[len(pair[side][1]) for side in SIDES] for pair in pairs]).to(policy.device)
    both = (F.pad(logps, (0, 2 - logps.shape[1])).unbind(1) for logps in (policy, reference))
    return preference_loss(kind, *itertools.chain(*both), delta=delta, tokens=tokens, **settings)


def diagnose(kind, policy, reference, pairs, settings):
    """Means over pairs for people to look at, and (p, sigmoid(z)) of each: the reward's belief and the student's.

    p is known of pairs with scores alone: where no pair has them, there is no "belief"."""
    losses, z = pair_losses(kind, policy, reference, pairs, settings)
    if kind == "sft":
        return {"loss": losses.mean().item(), "chosen_logps": policy.mean().item()}, torch.zeros(0, 2)
    belief, student = torch.sigmoid(gaps(pairs).to(z) / settings["tau"]), z.sigmoid()
    means = {"loss": losses, "margin": z, "accuracy": (z > 0).float(), "belief": belief[~belief.isnan()]}
    means |= {"student": student, "chosen_logps": policy[:, 0], "rejected_logps": policy[:, 1]}
    means = {name: value.double().mean().item() for name, value in means.items() if len(value)}
    return means, torch.stack([belief, student], 1)


def schedule(step, steps, warmup):
    """Share of the peak learning rate at `step`: linear up over `warmup` steps, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ---- data: from rows to token ids -----------------------------------------------------------------------------


def split_row(row, where):
    """(prompt, chosen text, rejected text) of a row in one of the forms that preference data come in.

    prompt, chosen, rejected as plain text; as lists of messages; or chosen and rejected as whole conversations,
    with or without a prompt beside them (as in UltraFeedback). Of plain text without a prompt, what both begin with is
    the prompt (as in HH-RLHF), up to the last white space, so that no word is cut.
    """
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str) and prompt is None:
        same = itertools.takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))
        prompt = re.match(r"(?s).*(?=\s)|", "".join(a for a, _ in same))[0].rstrip()
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str):
        return prompt, chosen, rejected
    if not is_conversation(chosen) or not is_conversation(rejected):
        fail(f"{where}: 'chosen' and 'rejected' must both be text (with 'prompt' as text) or lists of messages")
    if not is_conversation(prompt):
        prompt = chosen[:-1]
        if not prompt or prompt != rejected[:-1]:
            fail(f"{where}: without 'prompt', 'chosen' and 'rejected' must begin with the same messages")
    return prompt, text_of(chosen), text_of(rejected)


def make_pairs(rows, path, tokenizer, args):
    """Training and held-out pairs, each {"id", "chosen": (prompt ids, ids), "rejected": ..., "delta"}, as Rows; and
    counts of what was left out and why. Bad rows end the run with status 2; path: where they come from, for the message."""
    counts = dict.fromkeys(("failed", "no score", "cut off by the teacher", "not accepted", "identical"), 0)
    counts["shortened to --max-length"] = 0
    made = (make_pair(row, number, path, tokenizer, args, counts) for number, row in enumerate(rows, 1))
    pairs = on_disk(pair for pair in made if pair)
    if not pairs and counts["no score"] and counts["no score"] + counts["failed"] == sum(counts.values()):
        fail(f"{path}: no pair has score_chosen and score_rejected; run score.py, or use --loss dpo")
    return pairs.where(lambda pair: not pair["held_out"]), pairs.where(lambda pair: pair["held_out"]), counts


def make_pair(row, number, path, tokenizer, args, counts):
    """The pair of a row, the `number`th; None where it is left out, which is then counted."""
    for side in SIDES:  # UltraFeedback's names
        if f"{side}_rating" in row:
            row.setdefault(f"score_{side}", row[f"{side}_rating"])
    where = f"{path}: pair {row.get('id', number)}"
    finish = (row.get("teacher") or {}).get("finish", {}) if isinstance(row.get("teacher"), dict) else {}
    reason = None
    if "error" in row:
        reason = "failed"
    elif (args.loss in SCORE_AWARE or args.accept) and not is_scored(row):
        reason = "no score"
    elif "length" in (finish.get("answer"), finish.get("revision")) and not args.keep_cut:
        reason = "cut off by the teacher"
    elif args.accept and not row["score_chosen"] > row["score_rejected"]:
        reason = "not accepted"
    if reason:
        counts[reason] += 1
        return None
    prompt, *answers = split_row(row, where)
    if not all(answer.strip() for answer in answers):
        fail(f"{where}: an answer is empty; remove the pair")
    try:
        chosen, rejected = (encode(tokenizer, prompt, answer) for answer in answers)
    except ValueError as error:
        fail(f"{where}: {error}")
    if not chosen[0]:
        fail(f"{where}: the prompt is empty, so nothing foretells the answer's first token; remove the pair")
    if len(chosen[0]) >= args.max_length:
        fail(f"{where}: the prompt has {len(chosen[0])} tokens; raise --max-length {args.max_length}, or remove it")
    room = args.max_length - len(chosen[0])
    counts["shortened to --max-length"] += max(len(chosen[1]), len(rejected[1])) > room
    chosen, rejected = ((prompt_ids, ids[:room]) for prompt_ids, ids in (chosen, rejected))
    if chosen == rejected and args.loss != "sft":
        counts["identical"] += 1
        return None
    delta = float(row["score_chosen"] - row["score_rejected"]) if is_scored(row) else None
    pair = {"id": row.get("id", number), "chosen": chosen, "rejected": rejected, "delta": delta}
    return {**pair, "held_out": row.get("split") == "test"}


# ---- the student, on one process or cut over many ---------------------------------------------------------------


def load_student(name, device, dtype, attention="sdpa", share_prompt=True, checkpoint_activations=False):
    """(model with fp32 weights, tokenizer). The model gets a method `logps`: completion_logps of sequences.

    Under torchrun FSDP2 cuts the weights, and with them gradients and moments, over all processes, layer by layer; a
    layer is put together, in `dtype`, while it is computed. The model is built without memory and each process reads
    its own slices of the safetensors, so that none ever holds the whole.
    """
    by_parts = attention == "by_parts"
    attention = "sdpa" if by_parts else attention
    if WORLD == 1:
        model, tokenizer = load_model(name, device, torch.float32, attn_implementation=attention)
    else:
        tokenizer, path = load_tokenizer(name), find_model(name)
        if not Path(path).is_dir():
            path = snapshot_download(path, allow_patterns=["*.safetensors", "*.json"])
        with init_empty_weights(include_buffers=False):  # buffers, such as rotary tables, are in no file
            config = AutoConfig.from_pretrained(path)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
        if (Path(path) / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(path)
        model.tie_weights()
    layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    if checkpoint_activations:  # a layer keeps its input only, and is computed once more in the backward pass
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if WORLD == 1 and device.type == "cpu" and head is not None and head.weight is embedding.weight:
        # to the head's gradient that of the tokens at hand is added, and not a whole second one (CUDA: not measured)
        embedding.sparse = True
    model.logps = types.MethodType(functools.partial(completion_logps, share_prompt=share_prompt), model)
    if WORLD > 1:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        mesh = init_device_mesh(device.type, (WORLD,))
        for module in (*layers, model):  # cut again behind every forward pass: outside of one, weights are in pieces
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        register_fsdp_forward_method(model, "logps")
        buffers = [buffer.clone() for buffer in model.buffers()]
        model.to_empty(device=device)
        for buffer, values in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(values)
        model.tie_weights()
        try:
            dcp.load(dict(model.named_parameters()), storage_reader=HuggingFaceStorageReader(str(path)))
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            fail(f"--model {name}: its safetensors cannot be read in slices: {str(cause).splitlines()[0]}")
        model.eval()
    check_model(model, name, lambda model, sequences: model.logps(sequences), by_parts)
    return model, tokenizer


# ---- ALGORITHM: log-probs and gradients of a batch ------------------------------------------------------------------


def pair_logps(model, pairs, sides=SIDES):
    """log pi of the answers of each pair, chosen and rejected or one of them: (B, len(sides)) fp32."""
    return model.logps([pair[side] for pair in pairs for side in sides]).view(-1, len(sides))


def pair_cost(pair, sides=SIDES):
    """Tokens of a pair in a stream: the prompt stands there once."""
    return len(pair["chosen"][0]) + sum(len(pair[side][1]) for side in sides)


def shares(model, pairs, budget, sides=SIDES):
    """This process's part of the pairs, as streams of at most `budget` tokens: [(places in pairs, weight)].

    FSDP puts a layer together on all processes at once, so all must run equally many streams: where this process has
    fewer than another, the first pair is run again, with weight 0. A model that takes no streams runs pair by pair.
    """
    budget = budget if model.packs else 0
    costs = [pair_cost(pair, sides) for pair in pairs]
    cuts = [list(cut(range(r, len(pairs), WORLD), costs.__getitem__, budget)) for r in range(WORLD)]
    surplus = max(map(len, cuts)) - len(cuts[RANK])
    return [(places, 1.0) for places in cuts[RANK]] + [([0], 0.0)] * surplus


def backward(model, batch, known, args, settings, autocast):
    """Adds the gradient of a batch's mean loss, stream by stream; returns the log-probs that it met, (B, sides) fp32.

    known: those of the reference, (B, 2), or (B, 1) of zeros for sft; autocast: what the forward pass runs in.
    """
    sides = sides_of(args.loss)
    policy = torch.zeros(len(batch), len(sides), device=known.device)
    for places, weight in shares(model, batch, args.pack_tokens, sides):
        pairs = [batch[i] for i in places]
        with autocast:
            logps = pair_logps(model, pairs, sides)
        losses, _ = pair_losses(args.loss, logps, known[places], pairs, settings)
        # A sum over pairs, divided by the whole batch: streams and processes do not change the result.
        # WORLD, because FSDP takes the mean over the processes where the sum is meant.
        (losses.sum() * (weight * WORLD / len(batch))).backward()
        if weight:
            policy[places] = logps.detach()
    return summed(policy)


@torch.no_grad()
def all_pair_logps(model, pairs, budget, sides=SIDES, what=None):
    """pair_logps of any number of pairs, the work shared by all processes, the result on each."""
    logps = torch.zeros(len(pairs), len(sides), device=model.device)
    with tqdm(total=len(pairs), desc=what, unit="pair", disable=RANK > 0 or what is None) as bar:
        for places, weight in shares(model, pairs, budget, sides):
            values = pair_logps(model, [pairs[i] for i in places], sides)
            if weight:
                logps[places] = values
                bar.update(len(places) * WORLD)
    return summed(logps)


def reference_logps(model, digest, pairs, path, args):
    """log pi_ref of every pair, (len(pairs), 2) fp32, computed once and kept beside the data. pairs: Rows.

    The file's name is a hash of the weights (`digest`), of every token and of what else the numbers depend on, so a
    changed model or changed data never meet an old cache: one process rounds otherwise than FSDP's. The check at step
    0 notices a file that holds other numbers. The first process alone looks for the file, so that all do the same.
    """
    how = f"{args.dtype} {model.device.type} {'cut' if WORLD > 1 else 'whole'} {torch.__version__}"
    how += f" {model.config._attn_implementation}"
    key = hashlib.sha256(f"{how} {digest}".encode())
    for pair in pairs:
        key.update(json.dumps([pair["chosen"], pair["rejected"]]).encode())
    cache = path.with_name(f"{path.stem}.reference-{key.hexdigest()[:16]}.safetensors")
    if summed(torch.tensor(float(RANK == 0 and cache.exists()), device=model.device)):
        logps = load_file(cache)["logps"] if RANK == 0 else torch.zeros(len(pairs), 2)
        return summed(logps.to(model.device))
    logps = all_pair_logps(model, pairs, args.pack_tokens, what="reference log-probs")
    if RANK == 0:
        save_file({"logps": logps.cpu()}, f"{cache}.{os.getpid()}.part")
        os.replace(f"{cache}.{os.getpid()}.part", cache)
    return logps


def check_first_loss(loss, batch, args, settings, source):
    """Stops where the loss of the first step is not that of policy = reference, which is known beforehand."""
    expected = loss_at_reference(args.loss, gaps(batch), **settings).mean().item()
    slope = 1 / args.beta**2 if args.loss == "ipo" else max(1.0, expected)  # of the loss over z, at most
    if abs(loss - expected) > (1e-3 if args.dtype == "float32" else 0.05) * slope:
        fail(
            f"step 0: loss {loss:.5f}, but policy = reference gives {expected:.5f}; "
            f"delete {source.parent}/*.reference-* and see whether the model is what was meant"
        )


# ---- between processes ----------------------------------------------------------------------------------------


def summed(tensor):
    """The sum over all processes, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def wait():
    """Until all processes are here."""
    if WORLD > 1:
        dist.barrier()


def whole(tensor):
    """A weight in one piece. Where it is cut, all processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights_digest(model):
    """SHA-256 of all weights, in hexadecimal: two models that differ in one number differ in it."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(whole(parameter.detach()).cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


# ---- checkpoints and the finished model -------------------------------------------------------------------------


def optimizer_state(model, optimizer):
    """{name: tensor} of weights and of AdamW's moments, which are made where there was no step yet."""
    tensors = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0, device=parameter.device if parameter.is_cuda else None)
            state |= {moment: torch.zeros_like(parameter) for moment in ("exp_avg", "exp_avg_sq")}
        tensors |= {f"weight.{name}": parameter.detach()}
        tensors |= {f"{moment}.{name}": state[moment] for moment in ("exp_avg", "exp_avg_sq")}
    return tensors


def save_checkpoint(out, step, skipped, model, optimizer, keep):
    """Everything that a later run needs to go on after `step` steps, each process writing its share as safetensors.

    Written aside and renamed when whole, so a kill or a full disk costs the new checkpoint and never the one before.
    """
    part = out / "checkpoint.part"
    if RANK == 0:
        shutil.rmtree(part, ignore_errors=True)
    wait()
    writer = HuggingFaceStorageWriter(str(part), save_distributed=True)
    try:
        dcp.save(optimizer_state(model, optimizer), storage_writer=writer, no_dist=WORLD == 1)
    except (OSError, CheckpointException) as error:
        fail(f"{part}: could not be written ({error}); make room, and repeat the command to continue")
    if RANK == 0:
        (part / "state.json").write_text(json.dumps({"step": step, "skipped": skipped}))
        part.rename(out / f"checkpoint-{step}")
        for old in checkpoints(out)[: -max(1, keep)]:
            shutil.rmtree(old)
    wait()


def checkpoints(out):
    """Folders of the whole checkpoints, oldest first."""
    return sorted(out.glob("checkpoint-*"), key=lambda folder: int(folder.name.partition("-")[2]))


def load_checkpoint(out, model, optimizer):
    """(steps done, steps skipped) of the newest checkpoint, with its weights and moments; (0, 0) where there is none.

    Any number of processes may read what any other number has written.
    """
    if not checkpoints(out):
        return 0, 0
    folder = checkpoints(out)[-1]
    tensors = optimizer_state(model, optimizer)
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=WORLD == 1)
    done = json.loads((folder / "state.json").read_text())
    for state in optimizer.state.values():
        state["step"].fill_(done["step"] - done["skipped"])
    return done["step"], done["skipped"]


def save_student(model, tokenizer, out, dtype):
    """The student as a folder that transformers loads as it is, put together on the first process."""
    part, state = out / "model.part", None
    if WORLD > 1:
        tensors = dict(model.named_parameters())
        tied = dict(model.named_parameters(remove_duplicate=False)).keys()
        tensors |= {name: tensor for name, tensor in model.state_dict().items() if name not in tied}  # buffers
        state = {}
        for name, tensor in tensors.items():
            tensor = whole(tensor.detach().to(dtype) if tensor.is_floating_point() else tensor)
            if RANK == 0:
                state[name] = tensor.cpu()
        config, generation_config = model.config, model.generation_config
        with init_empty_weights():  # a model that is not cut, for its way of saving
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.generation_config = generation_config
    if RANK == 0:
        shutil.rmtree(part, ignore_errors=True)
        try:
            model.to(dtype).save_pretrained(part, state_dict=state)
            tokenizer.save_pretrained(part)
        except (OSError, SafetensorError) as error:
            fail(f"{part}: could not be written ({error}); make room, and repeat the command to continue")
        # the weights last, and last of them what finished() looks for
        for file in sorted(part.iterdir(), key=lambda file: (file.name.startswith("model"), file.name)):
            os.replace(file, out / file.name)
        part.rmdir()


def tidy(out, keep):
    """Leaves a finished run its newest `keep` checkpoints and no lock."""
    for old in checkpoints(out)[: -keep or None] if RANK == 0 else ():
        shutil.rmtree(old, ignore_errors=True)
    if RANK == 0:
        (out / "lock").unlink(missing_ok=True)


def finished(out):
    """Whether the folder holds a trained model."""
    return (out / "model.safetensors").exists() or (out / "model.safetensors.index.json").exists()


def draw_curves(path, log, pairs):
    """train.png: what to look at after a run. log: the rows of log.jsonl; pairs (B, 2): p and sigmoid(z), held out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [row for row in log if "loss" in row]
    looks = [row["held_out"] | {"step": row["step"]} for row in log if "held_out" in row]
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    panels = [("loss",), ("margin",), ("accuracy",), ("chosen_logps", "rejected_logps"), ("grad_norm",)]
    for axis, names in zip(axes.flat, panels, strict=False):
        for name, colour in zip(names, ("tab:blue", "tab:red"), strict=False):
            if not steps or name not in steps[0]:  # sft knows no pairs
                continue
            axis.plot([row["step"] for row in steps], [row[name] for row in steps], colour, lw=1, label=name)
            if looks and name in looks[0]:
                axis.plot([row["step"] for row in looks], [row[name] for row in looks], f"{colour[4]}o--", lw=1, ms=4)
        axis.set_title(" and ".join(names).replace("_", " "), fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8)
    axis = axes.flat[-1]
    if len(pairs):
        axis.scatter(*pairs.T.tolist(), s=14)
    axis.plot([0, 1], [0, 1], color="tab:gray", linewidth=0.8, linestyle=":")
    axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axis.set_xlabel("p: the reward prefers chosen", fontsize=9)
    axis.set_title("sigmoid(z): the student does (held-out pairs)", fontsize=10)
    axis.grid(alpha=0.3)
    figure.suptitle("line: batch of each step; dots: held-out pairs", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---- command line ---------------------------------------------------------------------------------------------


def parse_args():
    parser = parser_of(__doc__, latest_task("scored.jsonl"))
    add = parser.add_argument
    # fmt: off
    add("--seed", type=int, default=0, help="seed of the order of the pairs (default: %(default)s)")
    add("--model", default="smollm2", help="student, and reference: 'smollm2' (embedded), a folder or a hub id (default: %(default)s)")
    add("--in", dest="input", metavar="FILE", help="scored pairs, or any data set in TRL's preference format (default: runs/TASK/scored.jsonl)")
    add("--out", metavar="DIR", help="folder of the trained model (default: LOSS beside --in, so runs/TASK/LOSS)")
    add("--loss", default="rdpo", choices=LOSSES, help="see preference_loss in this file (default: %(default)s)")
    add("--accept", action="store_true", help="train only on pairs whose revision won: score_chosen > score_rejected")
    add("--keep-cut", action="store_true", help="train also on answers that the teacher was cut off in")
    add("--beta", type=float, default=0.3, help="strength of the pull to the reference, as in DPO; 0.1 is usual for large models; rdpo comes to rest at z = gap / TAU, so it goes as far as dpo only with a smaller one (default: %(default)s)")
    add("--tau", type=float, default=0.25, help="softness of the belief in the reward, in standard deviations of the score gap over the training pairs: a gap of TAU of them is believed to 73 %%, and z rises to gap / TAU (default: %(default)s)")
    add("--epsilon", type=float, default=0.1, help="share of wrong labels that cdpo and robust assume (default: %(default)s)")
    add("--lr", type=float, help="peak learning rate; 5e-7 to 1e-6 is usual for 7B models (default, for the embedded one: 1e-5, with sft 2e-5)")
    add("--warmup", type=float, default=0.1, help="share of the steps with a rising learning rate (default: %(default)s)")
    add("--weight-decay", type=float, default=0.0, help="AdamW's decoupled weight decay (default: %(default)s)")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient (default: %(default)s)")
    add("--epochs", type=positive, default=2, help="passes over the training pairs (default: %(default)s)")
    add("--max-steps", type=positive, help="stop after this many optimizer steps (default: as many as the epochs have)")
    add("--batch-size", type=positive, default=8, help="pairs an optimizer step, over all processes (default: %(default)s)")
    add("--pack-tokens", type=positive, default=1024, help="micro-batch: tokens of one forward pass, at least one pair; changes memory and speed, not results (default: %(default)s)")
    add("--attention", default="auto", choices=["auto", "by_parts", "sdpa", "flex_attention"], help="by_parts runs everywhere, one prompt or answer after the other; sdpa with a (tokens, tokens) mask; flex_attention skips the masked blocks, needs CUDA and a C++ compiler, and pays with long streams (default: by_parts on a CPU, else sdpa)")
    add("--no-share-prompt", dest="share_prompt", action="store_false", help="compute the prompt of a pair twice, once for each answer; for comparison")
    add("--checkpoint-activations", action="store_true", help="keep each layer's input only and compute the layer again in the backward pass: less memory, a third more time")
    add("--max-length", type=positive, default=1024, help="longest prompt + answer, in tokens; longer answers are shortened (default: %(default)s)")
    add("--eval-every", type=positive, default=20, help="steps between looks at the held-out pairs (default: %(default)s)")
    add("--save-every", type=positive, default=10, help="steps between checkpoints to continue from (default: %(default)s)")
    add("--keep", type=int, default=0, help="newest checkpoints that stay when the model is saved; until then one at least (default: %(default)s)")
    add("--tensorboard", action="store_true", help="write the log for TensorBoard too, into --out")
    # fmt: on
    args = parser.parse_args()
    if args.lr is None:
        args.lr = 2e-5 if args.loss == "sft" else 1e-5
    for name in ("beta", "tau", "lr", "clip"):
        if not getattr(args, name) > 0:
            fail(f"--{name}: must be above 0")
    if not 0 <= args.warmup <= 1:
        fail("--warmup: a share of the steps, so from 0 to 1")
    if args.keep < 0:
        fail("--keep: must be at least 0")
    if not 0 <= args.epsilon < 0.5:
        fail("--epsilon: must be at least 0 and below 0.5")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        fail("--tensorboard: the package tensorboard is missing; pip install tensorboard")
    if args.dtype == "float16":
        fail("--dtype float16: gradients would need loss scaling, which is not here; use bfloat16 or float32")
    return args


# ---- the folder of a run ----------------------------------------------------------------------------------------


def claim(out, run, overwrite, keep, device):
    """Takes the folder of a run, which is new or holds this very run (`run`: what it hangs on), begun or finished.

    Returns whether it is finished, and else, for the first process, the lock that keeps others out. Stops where the folder
    holds another run, or is another process's.
    """
    record = out / "run.json"
    if overwrite and out.exists() and any(out.iterdir()) and not record.exists():
        fail(f"--out {out}: not a folder of this script (it has no run.json), so --overwrite does not move it")
    if record.exists() and not overwrite:
        before, now = json.loads(record.read_text()), json.loads(json.dumps(run))
        changed = [key for key in now if key not in FREE and before.get(key) != now[key]]
        if changed:
            values = f"{changed[0]} = {before.get(changed[0])}, not {now[changed[0]]}"
            fail(f"{out}: was trained with {values}; choose another --out, or --overwrite")
        if finished(out):
            tidy(out, keep)
            return True, None
    wait()  # all have looked, so the first may change what is there
    lock = None
    if RANK == 0:
        if overwrite and out.exists():
            open_alone(out / "lock").close()  # a folder that another process works in stays where it is
            put_aside(out)
        out.mkdir(parents=True, exist_ok=True)
        lock = open_alone(out / "lock")
        if not record.exists():
            text = json.dumps({**run, **provenance(device), "processes": WORLD}, indent=1)
            (out / "run.json.part").write_text(text + "\n")
            os.replace(out / "run.json.part", record)
    wait()
    return False, lock


# settings that a continued run may change, since they do not change the result beyond rounding
FREE = ("task", "out", "overwrite", "device", "pack_tokens", "attention", "share_prompt", "checkpoint_activations")
FREE += ("save_every", "eval_every", "keep", "tensorboard")


class Log:
    """log.jsonl, a line a step, speed.jsonl beside it, and the same for TensorBoard; written by the first process alone."""

    def __init__(self, out, start, tensorboard):
        """start: steps that are done, whose lines stay."""
        self.board = self.files = None
        if RANK > 0:
            return
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(out, purge_step=start + 1)
        self.files = {name: out / f"{name}.jsonl" for name in ("log", "speed")}
        for name, path in self.files.items():
            lines = path.read_text().splitlines() if path.exists() and start else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= start]
            rewrite(path, map(json.loads, kept))
            self.files[name] = path.open("a")

    def write(self, step, row, speed=None):
        """A line for a step; a row may have a part "held_out". speed: what another machine would not repeat."""
        if self.files:
            append(self.files["log"], {"step": step, **row})
        if self.files and speed:
            append(self.files["speed"], {"step": step, **speed})
        part = "held_out" if "held_out" in row else "train"
        for key, value in row.get("held_out", row).items() if self.board else ():
            self.board.add_scalar(f"{part}/{key}", value, step)
        if self.board:
            self.board.flush()  # else the last two minutes would be lost


def model_flops(model, pairs, sides):
    """Floating-point operations of a training step by the usual count: 6 a weight and token that meet."""
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        body -= head
    completions = sum(len(pair[side][1]) for pair in pairs for side in sides)
    return 6 * (body * sum(pair_cost(pair, sides) for pair in pairs) + head * completions)


PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense bf16 FLOP/s, from the makers' data sheets


def as_text(means):
    """The means of diagnose() for a line on the screen."""
    forms = {"loss": ".4f", "margin": "+.3f", "accuracy": ".2f", "belief": ".2f", "student": ".2f"}
    return " | ".join(
        f"{name.removesuffix('_logps')} {value:{forms.get(name, '8.2f')}}" for name, value in means.items()
    )


def say(text):
    """Prints, under torchrun once."""
    if RANK == 0:
        print(text, flush=True)


def main():
    args = parse_args()
    device = pick_device(args.device)
    if WORLD > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    dtype = pick_dtype(args.dtype, device)
    args.dtype = str(dtype).removeprefix("torch.")
    if args.attention == "auto":
        args.attention = "by_parts" if device.type == "cpu" else "sdpa"

    # -- data
    source = Path(args.input or f"runs/{args.task}/scored.jsonl")
    name = args.loss + ("-accept" if args.accept else "")
    out = Path(args.out or source.parent / name)
    rows = read_jsonl(source, ["chosen", "rejected"])[: args.limit]
    train, held_out, counts = make_pairs(rows, source, load_tokenizer(args.model), args)
    left_out = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
    if not train:
        cut_off = (
            "; --keep-cut trains on these too, generate.py --max-tokens makes room" if "cut off" in left_out else ""
        )
        fail(f"{source}: no pair left to train on ({left_out}){cut_off}")
    say(f"{source}: {len(train)} training pairs, {len(held_out)} held out" + (f"; {left_out}" if left_out else ""))

    settings = loss_settings(args, train, source)

    # -- steps; the order of the data is a function of seed and epoch alone
    per_epoch = math.ceil(len(train) / args.batch_size)
    steps = min(args.max_steps or sys.maxsize, args.epochs * per_epoch)
    sides = sides_of(args.loss)
    warmup = max(1, round(args.warmup * steps))

    # -- where to write, and from where to go on
    digest = hashlib.sha256()
    for pair in train + held_out:
        digest.update(json.dumps(pair).encode())
    run = {**vars(args), "input": str(source), "data": digest.hexdigest()[:12], "steps": steps}
    run |= {"tau_absolute": settings["tau"], "pairs": len(train), "held_out": len(held_out), "left_out": counts}
    model, tokenizer = load_student(
        args.model, device, dtype, args.attention, args.share_prompt, args.checkpoint_activations
    )
    run["attention"] = model.config._attn_implementation
    weights = weights_digest(model)
    run["weights"] = weights[:16]
    done, lock = claim(out, run, args.overwrite, args.keep, device)
    if done:
        say(f"{out}: finished before; nothing to do (--overwrite starts afresh)")
        return
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True
    )
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with autocast:  # before the checkpoint: the reference is the model before training
        reference = torch.zeros(len(train) + len(held_out), 1, device=device)
        if args.loss != "sft":
            reference = reference_logps(model, weights, train + held_out, source, args)
    start, skipped = load_checkpoint(out, model, optimizer)
    log = Log(out, start, args.tensorboard)
    peak = next(
        (PEAK[gpu] for gpu in PEAK if device.type == "cuda" and gpu in torch.cuda.get_device_name(device)), None
    )

    def look_at_held_out(step):
        """The diagnostics on pairs of groups that training never saw; (p, sigmoid(z)) of each."""
        with autocast:
            policy = all_pair_logps(model, held_out, args.pack_tokens, sides)
        means, beliefs = diagnose(args.loss, policy, reference[len(train) :], held_out, settings)
        say(f"held out  {step:4d}/{steps} | {as_text(means)}")
        log.write(step, {"held_out": means})
        return beliefs

    # -- ALGORITHM: the training loop
    beliefs = torch.zeros(0, 2)
    for step in range(start, steps):
        began = time.perf_counter()
        epoch, place = divmod(step, per_epoch)
        if place == 0 or step == start:
            order = random.Random(f"{args.seed} {epoch}").sample(range(len(train)), len(train))
        picks = order[place * args.batch_size : (place + 1) * args.batch_size]
        batch, known = [train[i] for i in picks], reference[picks]

        policy = backward(model, batch, known, args, settings, autocast)
        norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)).item()
        means, _ = diagnose(args.loss, policy, known, batch, settings)
        if not math.isfinite(means["loss"]) or not math.isfinite(norm):
            optimizer.zero_grad(set_to_none=True)
            skipped += 1
            said = f"loss {means['loss']}, gradient norm {norm}; pairs {[pair['id'] for pair in batch]}"
            if skipped > 2:
                fail(f"step {step + 1}: {said}; the third such step, so training stops")
            say(f"step {step + 1:4d}/{steps} | skipped: {said}")
            log.write(step + 1, {"skipped": skipped})
            continue
        if step == 0 and args.loss != "sft":
            check_first_loss(means["loss"], batch, args, settings, source)
        rate = args.lr * schedule(step, steps, warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # -- the rest is just diagnostics and saving
        seconds = time.perf_counter() - began
        tokens = sum(len(pair[side][1]) for pair in batch for side in sides)
        pace = {"seconds": seconds, "tokens_per_second": tokens / seconds}
        if peak:
            pace["utilisation"] = model_flops(model, batch, sides) / seconds / WORLD / peak
        say(
            f"step {step + 1:4d}/{steps} | {as_text(means)} | norm {norm:6.2f} | lr {rate:.1e} | "
            f"{1000 * seconds:,.0f} ms | {tokens / seconds:,.0f} tok/s"
            + (f" | {pace['utilisation']:.0%} of peak" if peak else "")
        )
        log.write(step + 1, {**means, "grad_norm": norm, "lr": rate}, pace)
        if held_out and ((step + 1) % args.eval_every == 0 or step + 1 == steps):
            beliefs = look_at_held_out(step + 1)
        if (step + 1) % args.save_every == 0 and (step + 1 < steps or args.keep):
            save_checkpoint(out, step + 1, skipped, model, optimizer, args.keep)

    # -- save in the number format that the student came in
    if RANK == 0:
        draw_curves(out / "train.png", read_jsonl(out / "log.jsonl"), beliefs.cpu())
    save_student(model, tokenizer, out, AutoConfig.from_pretrained(find_model(args.model)).dtype or torch.float32)
    tidy(out, args.keep)
    if lock:
        lock.close()
    say(f"{out}: saved; {out / 'train.png'} shows how it went")
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_stage(main)
