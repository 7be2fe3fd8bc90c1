"""Stage 3 of 4: a student learns from the scored pairs, as much from each as the reward believes in it.

    python train.py --task sycophancy                                  # rDPO on the embedded model, CPU is enough
    torchrun --nproc-per-node 8 train.py --task sycophancy --model meta-llama/Llama-3.2-1B-Instruct --lr 1e-6
    python train.py --task sycophancy --loss dpo                       # the same pairs, scores ignored
    python train.py --task sycophancy --loss sft --accept              # dSC: SFT on the revisions that won

runs/TASK/scored.jsonl -> runs/TASK/LOSS/: a model folder that transformers loads as it is, log.jsonl (one line a
step) and run.json (settings, versions, counts). Any preference data of TRL's format trains as well, with --in.

    z = beta [(log pi(chosen) - log pi_ref(chosen)) - (log pi(rejected) - log pi_ref(rejected))]
    p = sigmoid((score_chosen - score_rejected) / tau)
    loss = -p log sigmoid(z) - (1 - p) log sigmoid(-z)          # --loss rdpo; preference_loss has the others

Departures from the papers: the equation of rDPO (arXiv 2402.08005) was not at hand. Its abstract asks that the loss
generalise DPO, take an external reward in and bear noise; three readings of that are here, and `rdpo` is the one in
which failed revisions turn round, ties teach nothing and every pair counts by how much the reward believes in it.
"""

import hashlib
import json
import math
import os
import random
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoConfig

from generate import (
    append,
    encode,
    fail,
    find_model,
    is_conversation,
    latest_task,
    load_model,
    parser_of,
    pick_device,
    pick_dtype,
    positive,
    provenance,
    read_jsonl,
    run_stage,
)
from score import all_logps, check_model, completion_logps, cut, is_scored, text_of

SCORE_AWARE = ("rdpo", "rdpo-margin", "rdpo-weight")
LOSSES = (*SCORE_AWARE, "dpo", "cdpo", "robust", "ipo", "sft")

# ---- ALGORITHM: the loss --------------------------------------------------------------------------------------


def preference_loss(kind, policy_chosen, policy_rejected, reference_chosen, reference_rejected, **settings):
    """Losses (B,) and z (B,) of B pairs, from four (B,) fp32 tensors of per-sequence sums of log-probs, in nats.

    settings: beta; delta (B,) = score_chosen - score_rejected; tau, in the units of delta; mean_weight, the mean of
    max(0, 2p - 1) over the training pairs; epsilon, the share of wrong labels; tokens (B,), lengths of chosen.

    With z as above and p = sigmoid(delta / tau):
    rdpo         -p log s(z) - (1 - p) log s(-z)       optimum z = delta / tau; tau -> 0: dpo on the reward's sign
    rdpo-margin  -log s(z - delta / tau)               the reward gap as a margin; delta = 0: dpo
    rdpo-weight  -w log s(z), w = max(0, 2p - 1) / mean_weight                 failed revisions have no gradient
    dpo          -log s(z)                                                     arXiv 2305.18290, eq. 7
    cdpo         -(1 - e) log s(z) - e log s(-z)                               Mitchell, note on noisy preferences
    robust       [-(1 - e) log s(z) + e log s(-z)] / (1 - 2e)                  arXiv 2403.00409, eq. 12
    ipo          (z / beta - 1 / (2 beta))^2                                   arXiv 2310.12036, eq. 17
    sft          -log pi(chosen) / tokens
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
        losses = (z / beta - 1 / (2 * beta)) ** 2
    elif kind == "sft":
        losses = -policy_chosen / settings["tokens"]
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


def pair_losses(kind, policy, reference, pairs, settings):
    """preference_loss for pairs whose log-probs are the rows of policy and reference, (B, 2): chosen, rejected."""
    delta = torch.tensor([pair["delta"] for pair in pairs], device=policy.device)
    tokens = torch.tensor([len(pair["chosen"][1]) for pair in pairs], device=policy.device)
    return preference_loss(kind, *policy.unbind(1), *reference.unbind(1), delta=delta, tokens=tokens, **settings)


def pair_logps(model, pairs):
    """log pi of chosen and rejected: (B, 2) fp32."""
    return completion_logps(model, [pair[side] for pair in pairs for side in ("chosen", "rejected")]).view(-1, 2)


def pair_cost(pair):
    """Tokens of a pair in a stream: the prompt stands there once."""
    return len(pair["chosen"][0]) + len(pair["chosen"][1]) + len(pair["rejected"][1])


def schedule(step, steps, warmup):
    """Share of the peak learning rate at `step`: linear up over `warmup` steps, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ---- data: from rows to token ids -----------------------------------------------------------------------------


def split_row(row, where):
    """(prompt, chosen text, rejected text) of a row in one of the forms that preference data come in.

    prompt, chosen, rejected as plain text; as lists of messages; or chosen and rejected as whole conversations,
    with or without a prompt beside them (as in UltraFeedback).
    """
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
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
    """Training and held-out pairs, each {"id", "chosen": (prompt ids, ids), "rejected": ..., "delta"}; and counts
    of what was left out and why. Bad rows end the run with status 2; path: where they come from, for the message."""
    for row in rows:  # UltraFeedback's names
        for side in ("chosen", "rejected"):
            if f"{side}_rating" in row:
                row.setdefault(f"score_{side}", row[f"{side}_rating"])
    needs_scores = args.loss in SCORE_AWARE or args.accept
    if needs_scores and not any(is_scored(row) for row in rows):
        fail(f"{path}: no pair has score_chosen and score_rejected; run score.py, or use --loss dpo")

    counts = dict.fromkeys(("failed", "no score", "cut off by the teacher", "not accepted", "identical"), 0)
    counts["shortened to --max-length"] = 0
    train, held_out = [], []
    for number, row in enumerate(rows, 1):
        where = f"{path}: pair {row.get('id', number)}"
        finish = (row.get("teacher") or {}).get("finish", {}) if isinstance(row.get("teacher"), dict) else {}
        reason = None
        if "error" in row:
            reason = "failed"
        elif needs_scores and not is_scored(row):
            reason = "no score"
        elif "length" in (finish.get("answer"), finish.get("revision")) and not args.keep_cut:
            reason = "cut off by the teacher"
        elif args.accept and not row["score_chosen"] > row["score_rejected"]:
            reason = "not accepted"
        if reason:
            counts[reason] += 1
            continue
        prompt, *answers = split_row(row, where)
        if not all(answer.strip() for answer in answers):
            fail(f"{where}: an answer is empty; remove the pair")
        try:
            chosen, rejected = (encode(tokenizer, prompt, answer) for answer in answers)
        except ValueError as error:
            fail(f"{where}: {error}")
        if len(chosen[0]) >= args.max_length:
            fail(f"{where}: the prompt has {len(chosen[0])} tokens; raise --max-length {args.max_length}, or remove it")
        room = args.max_length - len(chosen[0])
        counts["shortened to --max-length"] += max(len(chosen[1]), len(rejected[1])) > room
        chosen, rejected = ((prompt_ids, ids[:room]) for prompt_ids, ids in (chosen, rejected))
        if chosen == rejected and args.loss != "sft":
            counts["identical"] += 1
            continue
        delta = row["score_chosen"] - row["score_rejected"] if is_scored(row) else 0.0
        pair = {"id": row.get("id", number), "chosen": chosen, "rejected": rejected, "delta": float(delta)}
        (held_out if row.get("split") == "test" else train).append(pair)
    return train, held_out, counts


def weights_digest(model):
    """SHA-256 of all weights, in hexadecimal: two models that differ in one number differ in it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def reference_logps(model, pairs, path, args, rank, world):
    """log pi_ref of every pair, (len(pairs), 2) fp32, computed once and kept beside the data.

    The file's name is a hash of the weights, of every token and of what else the numbers depend on, so a changed
    model or changed data never meet an old cache. The check at step 0 notices a file that holds other numbers.
    """
    key = hashlib.sha256(f"{args.dtype} {torch.__version__} {weights_digest(model)}".encode())
    key.update(json.dumps([[pair["chosen"], pair["rejected"]] for pair in pairs]).encode())
    cache = path.with_name(f"{path.stem}.reference-{key.hexdigest()[:16]}.safetensors")
    if not cache.exists():  # the processes share the work: each fills in its rows, the sum is the whole
        logps = torch.zeros(len(pairs), 2, device=model.device)
        sequences = [pair[side] for pair in pairs[rank::world] for side in ("chosen", "rejected")]
        with tqdm(total=len(sequences), desc="reference log-probs", unit="answer", disable=rank > 0) as bar:
            logps[rank::world] = all_logps(model, sequences, args.pack_tokens, bar.update).view(-1, 2).to(model.device)
        if world > 1:
            dist.all_reduce(logps)
        if rank == 0:
            save_file({"logps": logps.cpu()}, f"{cache}.part")
            os.replace(f"{cache}.part", cache)
    if world > 1:
        dist.barrier()
    return load_file(cache)["logps"]


# ---- checkpoints ------------------------------------------------------------------------------------------------


def save_checkpoint(folder, step, model, optimizer):
    """Everything that a later process needs to go on after `step` steps; written aside, then put in place."""
    part, old = folder.with_name("checkpoint.part"), folder.with_name("checkpoint.old")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, part / "weights.safetensors")
    torch.save(optimizer.state_dict(), part / "optimizer.pt")
    (part / "step").write_text(str(step))
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder, model, optimizer, device):
    """The number of steps done; 0 where there is no checkpoint."""
    if not folder.exists():
        return 0
    model.load_state_dict(load_file(folder / "weights.safetensors", device=str(device)), strict=False)
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location=device, weights_only=True))
    return int((folder / "step").read_text())


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
    add("--beta", type=float, default=0.3, help="strength of the pull to the reference, as in DPO; 0.1 is usual for large models, and makes the embedded one repeat itself (default: %(default)s)")
    add("--tau", type=float, default=0.25, help="softness of the belief in the reward, in standard deviations of the score gap over the training pairs: a gap of TAU of them is believed to 73 %%, and z rises to gap / TAU (default: %(default)s)")
    add("--epsilon", type=float, default=0.1, help="share of wrong labels that cdpo and robust assume (default: %(default)s)")
    add("--lr", type=float, default=2e-5, help="peak learning rate; 5e-7 to 1e-6 is usual for 7B models (default: %(default)s)")
    add("--warmup", type=float, default=0.1, help="share of the steps with a rising learning rate (default: %(default)s)")
    add("--weight-decay", type=float, default=0.0, help="AdamW's decoupled weight decay (default: %(default)s)")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient (default: %(default)s)")
    add("--epochs", type=positive, default=2, help="passes over the training pairs (default: %(default)s)")
    add("--max-steps", type=positive, help="stop after this many optimizer steps (default: as many as the epochs have)")
    add("--batch-size", type=positive, default=8, help="pairs an optimizer step, over all processes (default: %(default)s)")
    add("--pack-tokens", type=positive, default=1024, help="tokens of one forward pass, at least one pair; changes memory and speed, not results (default: %(default)s)")
    add("--max-length", type=positive, default=1024, help="longest prompt + answer, in tokens; longer answers are shortened (default: %(default)s)")
    add("--eval-every", type=positive, default=20, help="steps between looks at the held-out pairs (default: %(default)s)")
    add("--save-every", type=positive, default=10, help="steps between checkpoints to continue from (default: %(default)s)")
    # fmt: on
    args = parser.parse_args()
    for name in ("beta", "tau", "lr", "clip"):
        if not getattr(args, name) > 0:
            fail(f"--{name}: must be above 0")
    if not 0 <= args.epsilon < 0.5:
        fail("--epsilon: must be at least 0 and below 0.5")
    if args.dtype == "float16":
        fail("--dtype float16: gradients would need loss scaling, which is not here; use bfloat16 or float32")
    return args


def main():
    args = parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(args.device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    say = print if rank == 0 else lambda *_: None
    wait = dist.barrier if world > 1 else lambda: None
    dtype = pick_dtype(args.dtype, device)
    args.dtype = str(dtype).removeprefix("torch.")
    torch.manual_seed(args.seed)

    # -- data
    source = Path(args.input or f"runs/{args.task}/scored.jsonl")
    name = args.loss + ("-accept" if args.accept else "")
    out = Path(args.out or source.parent / name)
    rows = read_jsonl(source, ["chosen", "rejected"])[: args.limit]
    model, tokenizer = load_model(args.model, device, torch.float32)  # fp32 master weights, dropout off
    check_model(model, args.model)
    train, held_out, counts = make_pairs(rows, source, tokenizer, args)
    left_out = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
    if not train:
        fail(f"{source}: no pair left to train on ({left_out})")
    say(f"{source}: {len(train)} training pairs, {len(held_out)} held out" + (f"; {left_out}" if left_out else ""))

    # -- what the loss is told of the scores
    deltas = torch.tensor([pair["delta"] for pair in train], dtype=torch.float64)
    tau = args.tau * (deltas.std(correction=0).item() or 1.0)
    belief = torch.sigmoid(deltas / tau)
    mean_weight = (2 * belief - 1).clamp(min=0).mean().item()
    settings = {"beta": args.beta, "epsilon": args.epsilon, "tau": tau, "mean_weight": mean_weight}
    if args.loss in SCORE_AWARE:
        say(f"tau {args.tau} x standard deviation of the gaps = {tau:.4g}; mean belief p {belief.mean():.3f}")
        if args.loss == "rdpo-weight" and mean_weight == 0:
            fail(f"{source}: no revision won, so rdpo-weight has nothing to learn from")

    # -- steps; the order of the data is a function of seed and epoch alone
    per_epoch = math.ceil(len(train) / args.batch_size)
    steps = min(args.max_steps or sys.maxsize, args.epochs * per_epoch)
    warmup = max(1, round(args.warmup * steps))

    # -- where to write, and from where to go on
    run = {**vars(args), "input": str(source), "steps": steps, "tau_absolute": tau, "pairs": len(train)}
    run |= {"held_out": len(held_out), "left_out": counts}
    same = [key for key in run if key not in ("out", "overwrite", "device", "pack_tokens", "save_every", "eval_every")]
    checkpoint, record = out / "checkpoint", out / "run.json"
    if args.overwrite and out.exists() and any(out.iterdir()) and not record.exists():
        fail(f"--out {out}: not a folder of this script (it has no run.json), so --overwrite does not move it")
    wait()
    if rank == 0:
        if args.overwrite and out.exists():
            shutil.rmtree(f"{out}.old", ignore_errors=True)
            out.rename(f"{out}.old")
        out.mkdir(parents=True, exist_ok=True)
        if not checkpoint.exists() and (out / "checkpoint.old").exists():
            (out / "checkpoint.old").rename(checkpoint)  # killed between the two renames of save_checkpoint
    wait()
    if record.exists():
        before = json.loads(record.read_text())
        changed = [key for key in same if before.get(key) != json.loads(json.dumps(run[key]))]
        if changed:
            was, now = before.get(changed[0]), run[changed[0]]
            fail(f"{out}: was trained with {changed[0]} = {was}, not {now}; choose another --out, or --overwrite")
        if list(out.glob("model*.safetensors")):
            say(f"{out}: finished before; nothing to do (--overwrite starts afresh)")
            return
    wait()
    if rank == 0 and not record.exists():
        text = json.dumps({**run, **provenance(device), "processes": world}, indent=1)
        record.write_text(text + "\n")

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True
    )
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with autocast:  # before the checkpoint: the reference is the model before training
        reference = reference_logps(model, train + held_out, source, args, rank, world).to(device)
    for index, pair in enumerate(train + held_out):
        pair["index"] = index
    start = load_checkpoint(checkpoint, model, optimizer, device)
    log_path = out / "log.jsonl"
    if rank == 0:
        lines = log_path.read_text().splitlines() if log_path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= start] if start else []
        log_path.write_text("".join(line + "\n" for line in kept))
    log = log_path.open("a") if rank == 0 else None

    def look_at_held_out(step):
        """Loss, margin and accuracy on pairs of groups that training never saw."""
        totals = torch.zeros(3, dtype=torch.float64, device=device)
        mine = held_out[rank::world]
        with torch.no_grad(), autocast:
            for pairs in cut(mine, pair_cost, args.pack_tokens):
                known = reference[[pair["index"] for pair in pairs]]
                losses, z = pair_losses(args.loss, pair_logps(model, pairs), known, pairs, settings)
                totals += torch.stack([losses.sum(), z.sum(), (z > 0).sum()])
        if world > 1:
            dist.all_reduce(totals)
        loss, margin, accuracy = (totals / len(held_out)).tolist()
        say(f"held out  {step:4d}/{steps} | loss {loss:.4f} | margin {margin:+.3f} | acc {accuracy:.2f}")
        if rank == 0:
            append(log, {"step": step, "held_out": {"loss": loss, "margin": margin, "accuracy": accuracy}})

    # -- ALGORITHM: the training loop
    for step in range(start, steps):
        began = time.perf_counter()
        epoch, place = divmod(step, per_epoch)
        order = random.Random(f"{args.seed} {epoch}").sample(range(len(train)), len(train))
        batch = [train[i] for i in order[place * args.batch_size : (place + 1) * args.batch_size]]
        mine = batch[rank::world]

        # sums over pairs, divided by the whole batch: micro-batches and processes do not change the result
        totals = torch.zeros(6, dtype=torch.float64, device=device)
        for pairs in cut(mine, pair_cost, args.pack_tokens):
            known = reference[[pair["index"] for pair in pairs]]
            with autocast:
                policy = pair_logps(model, pairs)
            losses, z = pair_losses(args.loss, policy, known, pairs, settings)
            (losses.sum() / len(batch)).backward()
            with torch.no_grad():  # the rest is just diagnostics
                sums = [losses.sum(), z.sum(), (z > 0).sum(), *policy.sum(0)]
                tokens = sum(len(pair[side][1]) for pair in pairs for side in ("chosen", "rejected"))
                totals += torch.stack([*sums, torch.tensor(float(tokens), device=device)])
        if world > 1:
            dist.all_reduce(totals)
            for parameter in model.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)  # this process had no pair of the last batch
                dist.all_reduce(parameter.grad)
        loss, margin, accuracy, chosen, rejected = (totals[:5] / len(batch)).tolist()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip).item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            fail(f"step {step}: loss {loss}, gradient norm {norm}; pairs {[pair['id'] for pair in batch]}")
        if step == 0 and args.loss != "sft":  # the policy is the reference still, so the loss is known beforehand
            delta = torch.tensor([pair["delta"] for pair in batch])
            expected = loss_at_reference(args.loss, delta, **settings).mean().item()
            slope = 1 / args.beta**2 if args.loss == "ipo" else max(1.0, expected)  # of the loss over z, at most
            if abs(loss - expected) > (1e-3 if dtype == torch.float32 else 0.05) * slope:
                fail(
                    f"step 0: loss {loss:.5f}, but policy = reference gives {expected:.5f}; "
                    f"delete {source.parent}/*.reference-* and see whether the model is what was meant"
                )
        rate = args.lr * schedule(step, steps, warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        seconds = time.perf_counter() - began
        speed = totals[5].item() / seconds
        say(
            f"step {step + 1:4d}/{steps} | loss {loss:.4f} | margin {margin:+.3f} | acc {accuracy:.2f} | "
            f"chosen {chosen:8.2f} | rejected {rejected:8.2f} | norm {norm:6.2f} | lr {rate:.1e} | "
            f"{1000 * seconds:,.0f} ms | {speed:,.0f} tok/s"
        )
        if rank == 0:
            fields = {"step": step + 1, "loss": loss, "margin": margin, "accuracy": accuracy}
            fields |= {"chosen_logps": chosen, "rejected_logps": rejected, "grad_norm": norm, "lr": rate}
            append(log, {**fields, "seconds": seconds, "tokens_per_second": speed})
        if held_out and ((step + 1) % args.eval_every == 0 or step + 1 == steps):
            look_at_held_out(step + 1)
        if rank == 0 and (step + 1) % args.save_every == 0 and step + 1 < steps:
            save_checkpoint(checkpoint, step + 1, model, optimizer)

    # -- save in the number format that the student came in
    if rank == 0:
        model.to(AutoConfig.from_pretrained(find_model(args.model)).dtype or torch.float32)
        part = out / "model.part"
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        # the weights last: their presence says that the run is finished
        for file in sorted(part.iterdir(), key=lambda file: file.name.startswith("model")):
            os.replace(file, out / file.name)
        part.rmdir()
        shutil.rmtree(checkpoint, ignore_errors=True)
        say(f"{out}: saved")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_stage(main)
