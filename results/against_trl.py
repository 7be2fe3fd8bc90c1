"""train.py beside TRL's DPOTrainer: are the numbers the same, and which is faster?

    make parity          python results/against_trl.py parity --out results/parity
    make bench-train     python results/against_trl.py bench --out results/bench-train

Both train the same model from the same tokens in the same order with the same schedule; every run is a process of its
own, and they take turns. TRL is a development dependency (requirements-dev.txt); nothing else here needs it.

parity  float32, for dpo, ipo and robust: loss, margin, log-probs and gradient norm of every step, side by side; it fails
        where a loss differs by more than --tolerance.
bench   bfloat16 compute, cached reference: tokens of answers a second and peak memory, on a prompt-heavy and on an
        answer-heavy set, for TRL with all pairs of a step at once or one by one, for train.py, and for train.py with one of
        its features switched off at a time.
"""

import argparse
import copy
import functools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LOSSES = {"dpo": "sigmoid", "ipo": "ipo", "robust": "robust"}  # ours: TRL's
OFF = ("sharing", "caching", "completion-only head", "kernel", "packed attention")
WITH = {"activations": "activation checkpointing", "one pair": "pair by pair"}
WITH |= {"Liger": "Liger's layers", "double packs": "micro-batches twice as large"}
WITH["one pair, activations"] = "pair by pair, activation checkpointing"
# without TRL at its slowest, all pairs at once
MAIN = [("trl", "activations"), ("trl", "one pair"), ("trl", "one pair, activations")]
MAIN += [("ours", ""), ("ours", "one pair"), ("ours", "one pair, activations")]
# on a GPU, where TRL is at its fastest with all pairs at once
ON_GPU = [("trl", ""), ("ours", ""), ("ours", "double packs"), ("trl", "Liger")]
LR, BETA, EPSILON, WARMUP, SEED = 2e-5, 0.1, 0.1, 0.1, 0


# ---- the data ---------------------------------------------------------------------------------------------------


def make_rows(kind, count):
    """Preference rows in TRL's conversational form, of the arguments in prompts/sycophancy.jsonl.

    kind: "prompt-heavy", prompts about three times as long as an answer; "answer-heavy"; "short", for parity.
    """
    lines = (ROOT / "prompts" / "sycophancy.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["request"] for line in lines[::5]]
    draw = random.Random(kind)
    prompt, answer = {"prompt-heavy": (6, 2), "answer-heavy": (1, 3), "short": (1, 1)}[kind]

    def say(role, some):
        return [{"role": role, "content": "\n\n".join(some)}]

    rows = []
    for i in range(count):
        some = draw.sample(
            texts, prompt + 2 * answer
        )  # no text twice in a row, so that chosen is never rejected
        chosen, rejected = some[prompt : prompt + answer], some[prompt + answer :]
        row = {"id": str(i), "split": "train", "prompt": say("user", some[:prompt])}
        rows.append(
            row | {"chosen": say("assistant", chosen), "rejected": say("assistant", rejected)}
        )
    return rows


def tokens_of(rows, tokenizer):
    """Mean tokens of a prompt and of an answer."""
    from prompts.tokens import encode

    answers = [(row, row[side][0]["content"]) for row in rows for side in ("chosen", "rejected")]
    pairs = [encode(tokenizer, row["prompt"], answer) for row, answer in answers]
    return tuple(round(statistics.mean(len(pair[part]) for pair in pairs)) for part in (0, 1))


# ---- one run, in a process of its own ------------------------------------------------------------------------------


def run_ours(job):
    """train.py's main() with one feature switched off, by patching it, where the job says so."""
    import torch
    from transformers import AttentionInterface

    import train
    from kernels import packed
    from prompts.rows import run

    usual = {"step": train.training_step, "logps": packed.linear_logps, "collate": packed.collate}
    if job["off"] == "caching":  # the reference is computed at every step, by a model of its own
        frozen = []

        def step_with_reference(policy, optimizer, batch, *more):
            frozen.extend([] if frozen else [copy.deepcopy(policy).requires_grad_(False)])
            with torch.no_grad():
                frozen[0](batch)
            return usual["step"](policy, optimizer, batch, *more)

        train.training_step = step_with_reference
    if torch.cuda.is_available():  # the optimizer's kernels belong to the step's time
        step = train.training_step

        def finished_step(*arguments):
            result = step(*arguments)
            torch.cuda.synchronize()
            return result

        train.training_step = finished_step
    if job["off"] == "kernel":  # log_softmax and gather on the logits of the answers, with autograd

        def plain_logps(hidden, weight, labels, cu_seqlens, bias=None, **options):
            logps = torch.nn.functional.linear(hidden, weight).float().log_softmax(-1)
            logps = logps.gather(-1, labels[:, None])[:, 0]
            return torch.stack([part.sum() for part in logps.split(cu_seqlens.diff().tolist())])

        packed.linear_logps = plain_logps
    if job["off"] == "completion-only head":  # the head meets the prompts' tokens as well

        def all_tokens(hidden, weight, labels, cu_seqlens, **options):
            prompts = job["prompt_tokens"] * (len(cu_seqlens) - 1) // 2
            extra = hidden.repeat(1 + prompts // len(hidden), 1)[:prompts]
            more = torch.cat([cu_seqlens, cu_seqlens[-1:] + prompts])
            hidden, labels = (
                torch.cat([hidden, extra]),
                torch.cat([labels, labels.new_zeros(prompts)]),
            )
            return usual["logps"](hidden, weight, labels, more, **options)[:-1]

        packed.linear_logps = all_tokens
    if job["off"] == "sharing":  # equal prompts are told apart

        class Own(list):
            __eq__ = object.__eq__
            __hash__ = object.__hash__

        def unshared(sequences, device):
            return usual["collate"]([(Own(p), c) for p, c in sequences], device)

        packed.collate = unshared
    if job["off"] == "packed attention":  # SDPA with the mask of packed.py instead
        AttentionInterface.register("packed", masked_attention)
    argv = ["train.py", "--model", job["model"], "--in", job["data"], "--out", job["out"]]
    argv += ["--overwrite", "--loss", job["loss"], "--dtype", job["dtype"], "--lr", str(LR)]
    argv += ["--beta", str(BETA), "--label-smoothing", str(EPSILON), "--warmup-ratio", str(WARMUP)]
    argv += ["--epochs", "1", "--batch-size", str(job["batch"]), "--max-length", "2048"]
    argv += ["--seed", str(SEED), "--save-every", "1000000"]
    usual = 4096 if torch.cuda.is_available() else 2048
    tokens = {"one pair": 1, "one pair, activations": 1, "double packs": 2 * usual}
    argv += ["--pack-tokens", str(tokens.get(job["off"], usual))]
    sys.argv = argv + ["--checkpoint-activations"] * ("activations" in job["off"])
    run(train.main)
    log = [json.loads(line) for line in (Path(job["out"]) / "log.jsonl").read_text().splitlines()]
    names = {"loss": "loss", "margin": "rewards/margins", "chosen": "logps/chosen"}
    names |= {"rejected": "logps/rejected", "norm": "grad_norm"}
    curves = [{key: row[name] for key, name in names.items()} for row in log]
    return curves, [row["ms"] / 1000 for row in log]


def masked_attention(module, query, key, value, mask, scaling=None, segments=None, **options):
    """What packed_attention computes, by SDPA with a mask."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    mask = dense_mask(segments, query.device)[None, None] if segments else mask
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **options)


@functools.lru_cache(maxsize=1)  # all layers ask for the same
def dense_mask(segments, device):
    import torch

    mask = torch.zeros(segments[-1].end, segments[-1].end, dtype=torch.bool, device=device)
    for start, end, prompt in segments:
        if prompt is not None:
            mask[start:end, segments[prompt].start : segments[prompt].end] = True
        mask[start:end, start:end] = torch.ones(end - start, end - start, device=device).tril()
    return mask


def run_trl(job):
    """TRL's DPOTrainer on the same tokens: the conversations are written out in the chat template beforehand, since
    TRL would also train on the line break that the template puts behind an answer."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from prompts.chat import model_folder
    from train import learning_rate

    path = model_folder(job["model"])
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = [json.loads(line) for line in Path(job["data"]).read_text().splitlines()]
    order = random.Random(f"{SEED} 0").sample(range(len(rows)), len(rows))  # train.py's
    plain = []
    for row in (rows[i] for i in order):
        prompt = tokenizer.apply_chat_template(
            row["prompt"], tokenize=False, add_generation_prompt=True
        )
        plain.append(
            {"prompt": prompt, **{side: row[side][0]["content"] for side in ("chosen", "rejected")}}
        )
    seconds, steps_seen, steps = [], [], len(rows) // job["batch"]
    at_once = 1 if "one pair" in job["off"] else job["batch"]  # the rest by accumulation

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def create_scheduler(self, num_training_steps, optimizer=None):
            share = SimpleNamespace(lr=1.0, warmup_ratio=WARMUP)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer, lambda step: learning_rate(step, steps, share)
            )
            return self.lr_scheduler

        def training_step(self, *args, **kwargs):
            result = super().training_step(*args, **kwargs)
            exact = {
                key: values[-1] for key, values in self._metrics["train"].items() if values
            }  # its log is rounded
            steps_seen.append({"loss": result.item(), **exact})
            return result

    class Clock(TrainerCallback):
        """Seconds of whole steps, with clipping and the optimizer."""

        def on_step_begin(self, *args, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.began)

    bf16 = job["dtype"] == "bfloat16"
    trainer = InOrder(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        args=DPOConfig(
            output_dir=job["out"],
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=job["batch"] // at_once,
            num_train_epochs=1,
            learning_rate=LR,
            beta=BETA,
            loss_type=[LOSSES[job["loss"]]],
            label_smoothing=EPSILON if job["loss"] == "robust" else 0.0,
            adam_beta2=0.95,
            weight_decay=0.0,
            max_grad_norm=1.0,
            bf16=bf16,
            max_length=2048,
            logging_steps=1,
            precompute_ref_log_probs=True,
            gradient_checkpointing="activations" in job["off"],
            use_liger_kernel=job["off"] == "Liger",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list(plain),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    names = {
        "loss": "loss",
        "margin": "rewards/margins",
        "chosen": "logps/chosen",
        "rejected": "logps/rejected",
    }
    if at_once < job["batch"]:
        return [], seconds  # the curves would be those of single pairs
    norms = [float(row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]
    curves = [{key: float(row[name]) for key, name in names.items()} for row in steps_seen]
    return [curve | {"norm": norm} for curve, norm in zip(curves, norms, strict=True)], seconds


def work(job):
    """The run that `job` describes; its curves, seconds a step and peak memory as one line of JSON."""
    curves, seconds = (run_ours if job["who"] == "ours" else run_trl)(job)
    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux: KiB
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    Path(job["result"]).write_text(
        json.dumps({"curves": curves, "seconds": seconds, "peak_bytes": peak})
    )


def start(job, folder):
    """work(job) in a process of its own; its result. The log stays in `folder` where it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "-".join(str(job[key]).replace(" ", "-") for key in ("who", "loss", "off", "set"))
    job = {**job, "out": str(folder / name), "result": str(folder / f"{name}.json")}
    Path(job["result"]).unlink(missing_ok=True)
    with open(folder / f"{name}.log", "w") as log:
        command = [sys.executable, __file__, "work", json.dumps(job)]
        code = subprocess.run(
            command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        ).returncode
    if code:
        sys.exit(f"{name}: status {code}; see {folder / name}.log")
    return json.loads(Path(job["result"]).read_text())


# ---- the two commands ----------------------------------------------------------------------------------------------


def write_report(args, kind, result):
    """result.json with everything that was measured and what it hangs on."""
    import trl

    from prompts.chat import pick_device
    from prompts.rows import provenance

    facts = provenance(pick_device()[0]) | {"trl": trl.__version__}
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        {**facts, "kind": kind, "settings": {k: str(v) for k, v in vars(args).items()}, **result},
        indent=1,
    )
    (args.out / "result.json").write_text(text + "\n")
    return facts


def parity(args):
    rows = make_rows("short", args.steps * args.batch)
    data = args.work / "short.jsonl"
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = ("loss", "margin", "chosen", "rejected", "norm")
    result, worst, lines = {}, {}, []
    for loss in args.losses:
        job = {
            "model": args.model,
            "data": str(data),
            "loss": loss,
            "dtype": "float32",
            "batch": args.batch,
        }
        job |= {"off": "", "set": "short"}
        got = {who: start({**job, "who": who}, args.work)["curves"] for who in ("ours", "trl")}
        result[loss] = got
        worst[loss] = {
            key: max(abs(a[key] - b[key]) for a, b in zip(*got.values(), strict=True))
            for key in keys
        }
        lines += [f"\n{loss}: train.py | TRL", " step" + "".join(f" {key:>21}" for key in keys)]
        for step, (a, b) in enumerate(zip(*got.values(), strict=True), 1):
            lines.append(f"{step:5d}" + "".join(f" {a[key]:10.4f}|{b[key]:10.4f}" for key in keys))
        lines.append("worst" + "".join(f" {worst[loss][key]:21.1e}" for key in keys))
        print("\n".join(lines[-args.steps - 3 :]), flush=True)
    facts = write_report(args, "parity", {"curves": result, "worst": worst})
    head = f"Made by `{facts['command']}` at commit {facts['commit']}, {facts['date']}, on {facts['hardware']}, "
    head += f"torch {facts['torch']}, transformers {facts['transformers']}, trl {facts['trl']}.\n"
    (args.out / "curves.txt").write_text(head + "\n".join(lines) + "\n")
    off = [loss for loss in worst if not worst[loss]["loss"] <= args.tolerance]
    if off:
        sys.exit(f"{', '.join(off)}: a loss differs by more than {args.tolerance}")
    print(f"\nall losses agree to {args.tolerance} over {args.steps} steps")


def bench(args):
    import torch
    from transformers import AutoTokenizer

    from prompts.chat import model_folder

    tokenizer = AutoTokenizer.from_pretrained(model_folder(args.model))
    measured, table, failed = [], [], []
    for kind in args.sets:
        rows = make_rows(kind, args.steps * args.batch)
        prompt, answer = tokens_of(rows, tokenizer)
        data = args.work / f"{kind}.jsonl"
        data.parent.mkdir(parents=True, exist_ok=True)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        job = {
            "model": args.model,
            "data": str(data),
            "loss": "dpo",
            "dtype": "bfloat16",
            "batch": args.batch,
        }
        job |= {"set": kind, "prompt_tokens": prompt}
        whole = ON_GPU if torch.cuda.is_available() else MAIN
        who = whole + [("ours", off) for off in OFF if not args.whole]
        runs = {one: [] for one in who}
        for turn in range(args.rounds):  # in turns, so that a busy minute hits all
            for one in who if turn == 0 else whole:
                try:
                    got = start({**job, "who": one[0], "off": one[1]}, args.work)
                except SystemExit as error:  # a trainer's failure is a result of its own
                    print(f"{kind} {one}: {error}", flush=True)
                    failed.append(str(error))
                    continue
                runs[one].append(got)
                pace = 2 * answer * args.batch / statistics.median(got["seconds"][1:])
                print(
                    f"{kind} {one}: {pace:.0f} tok/s, {got['peak_bytes'] / 2**30:.2f} GiB",
                    flush=True,
                )
        for one in (one for one in who if runs[one]):
            seconds = [
                s for run in runs[one] for s in run["seconds"][1:]
            ]  # the first step warms up
            line = {
                "set": kind,
                "who": one[0],
                "off": one[1],
                "prompt_tokens": prompt,
                "answer_tokens": answer,
            }
            line["tokens_per_second"] = 2 * answer * args.batch / statistics.median(seconds)
            line["peak_bytes"] = max(run["peak_bytes"] for run in runs[one])
            measured.append(line | {"seconds": seconds})
        theirs = [m for m in measured if m["set"] == kind and m["who"] == "trl"]
        if not theirs:
            sys.exit(f"{kind}: no run of TRL ended well, so there is nothing to compare with")
        best = max(theirs, key=lambda m: m["tokens_per_second"])
        for line in (m for m in measured if m["set"] == kind):
            name = {"trl": "TRL DPOTrainer", "ours": "train.py"}[line["who"]]
            name += line["off"] and (
                f", {WITH[line['off']]}" if line["off"] in WITH else f" without {line['off']}"
            )
            speed, memory = line["tokens_per_second"], line["peak_bytes"]
            row = [
                f"{kind} ({prompt} + 2 x {answer})",
                name,
                f"{speed:.0f}",
                f"{speed / best['tokens_per_second']:.2f}",
            ]
            table.append([*row, f"{memory / 2**30:.2f}", f"{memory / best['peak_bytes']:.2f}"])
    head = [
        "set (tokens of prompt + answers)",
        "trainer",
        "answer tokens a second",
        "ratio to TRL's best",
    ]
    head += ["peak memory, GiB", "ratio"]
    text = "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *table])
    facts = write_report(args, "bench", {"measured": measured, "failed": failed})
    made = f"Made by `{facts['command']}` at commit {facts['commit']}, {facts['date']}, on {facts['hardware']}, "
    made += f"torch {facts['torch']}, transformers {facts['transformers']}, trl {facts['trl']}. Median of "
    made += (
        f"{args.rounds} x {args.steps - 1} steps of {args.batch} pairs, of {args.steps - 1} with a feature off; memory is "
        + (
            "the most that was allocated on the GPU."
            if torch.cuda.is_available()
            else "the process's largest resident set."
        )
    )
    (args.out / "report.md").write_text(f"{text}\n\n{made}\n")
    draw(args.out / "bench.png", measured)
    print(text)
    sys.exit(bool(failed))


def draw(path, measured):
    """Bars of speed and of memory, one panel a set."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sets = list(dict.fromkeys(line["set"] for line in measured))
    figure, axes = plt.subplots(
        2, len(sets), figsize=(5.5 * len(sets), 5), sharey=True, layout="constrained", squeeze=False
    )
    for column, kind in enumerate(sets):
        mine = [line for line in measured if line["set"] == kind]
        names = [
            m["off"] and (f", {WITH[m['off']]}" if m["off"] in WITH else f" without {m['off']}")
            for m in mine
        ]
        names = [
            f"{'TRL' if m['who'] == 'trl' else 'train.py'}{name}"
            for m, name in zip(mine, names, strict=True)
        ]
        colours = [
            "tab:gray" if m["who"] == "trl" else "tab:blue" if not m["off"] else "tab:cyan"
            for m in mine
        ]
        for axis, key, unit in (
            (axes[0][column], "tokens_per_second", 1),
            (axes[1][column], "peak_bytes", 2**30),
        ):
            axis.barh(names, [m[key] / unit for m in mine], color=colours)
            axis.set_xlabel(
                "answer tokens a second" if unit == 1 else "peak memory, GiB", fontsize=9
            )
        axes[0][column].set_title(kind, fontsize=10)
    axes[0][0].invert_yaxis()  # all share it
    figure.savefig(path, dpi=120)


def main():
    if sys.argv[1:2] == ["work"]:
        return work(json.loads(sys.argv[2]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["parity", "bench"])
    parser.add_argument("--model", default="smollm2", help="model to train (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/against_trl"),
        help="folder of the runs (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, default=20, help="optimizer steps of a run (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=4, help="pairs a step (default: %(default)s)")
    parser.add_argument(
        "--rounds",
        type=int,
        default=2,
        help="bench: runs of each kind; with a feature off, one (default: %(default)s)",
    )
    parser.add_argument("--whole", action="store_true", help="bench: no run with a feature off")
    parser.add_argument(
        "--losses", nargs="+", choices=LOSSES, default=list(LOSSES), help="parity: which"
    )
    parser.add_argument(
        "--sets",
        nargs="+",
        choices=["prompt-heavy", "answer-heavy"],
        default=["prompt-heavy", "answer-heavy"],
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=3e-5,
        help="parity: largest difference of a loss (default: %(default)s)",
    )
    args = parser.parse_args()
    (parity if args.what == "parity" else bench)(args)


if __name__ == "__main__":
    main()
