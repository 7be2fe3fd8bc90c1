"""The stages beside their state at an earlier commit: a training step, and sampling on this machine.

    python tests/against_before.py stages --out results/before
    python tests/against_before.py kernel --out results/before

stages  Both states run the same commands in turns, each in a process of its own. train.py takes two
        pairs a step of the sets of `make bench-train`; generate.py makes the demo's rows. Seconds
        between two steps' lines (the median), peak memory, completion tokens a second.
kernel  What each special case of the earlier kernel's CPU path was worth: that file with one of
        them taken out at a time, and the file as it is now, in turns, on SmolLM2's head in bf16.
Prints and writes stages.json or kernel.json.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from against_trl import make_rows

from generate import model_folder, provenance
from kernels import bench
from kernels import logps as kernel_now

ROOT = Path(__file__).resolve().parent.parent
# (what the earlier kernel's text has, what stands there without the special case)
BF16 = "hidden.dtype == torch.bfloat16 and not _on_triton(hidden)"
SPECIAL = {
    "product of dW in bf16": [("narrow = labels_apart and multiplies_bf16()", "narrow = False")],
    "labels' entries apart": [
        ("narrow = labels_apart and multiplies_bf16()", f"narrow = {BF16} and multiplies_bf16()"),
        (f"half, labels_apart = _is_half(h), {BF16}", "half, labels_apart = _is_half(h), False"),
    ],
    "pages of their own": [
        ("_memory_for_e(h, len(w), e_dtype)", "h.new_empty(len(h), len(w), dtype=e_dtype)")
    ],
    "oneDNN's switch": [("if operand.dtype == torch.bfloat16:", "if False:")],
}


def timed(folder, *command):
    """(seconds at which each line was printed, seconds in all, peak memory in GiB) of a command."""
    began = time.perf_counter()
    command = [sys.executable, *map(str, command)]
    how = {"cwd": folder, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen(command, **how)
    lines = [(time.perf_counter() - began, line) for line in process.stdout]
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0 or command[1].startswith("generate"), (command, lines[-3:])
    return lines, time.perf_counter() - began, usage.ru_maxrss / 2**20


def train(folder, data, out, steps):
    argv = [
        "--task",
        "sentiment",
        "--in",
        data,
        "--out",
        out,
        "--loss",
        "dpo",
        "--dtype",
        "bfloat16",
    ]
    argv += ["--batch-size", 2, "--max-length", 2048, "--pack-tokens", 2048, "--max-steps", steps]
    lines, _, memory = timed(folder, "train.py", *argv)
    times = [second for second, line in lines if line.lstrip().startswith("step")]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    return {"seconds a step": statistics.median(gaps), "GiB": memory}


def generate(folder, out, limit):
    argv = ["--task", "sentiment", "--limit", limit, "--out", out]
    _, seconds, memory = timed(folder, "generate.py", *argv)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(model_folder("smollm2"))
    texts = [row[side][0]["content"] for row in rows for side in ("rejected", "chosen")]
    texts += [row["critique"] for row in rows]
    tokens = sum(len(ids) + 1 for ids in tokenizer(texts)["input_ids"])  # and the end of the turn
    return {"completion tokens a second": tokens / seconds, "GiB": memory}


def stages(args):
    work = args.work.resolve()
    work.mkdir(parents=True)
    earlier, results = work / args.commit, {}
    subprocess.run(["git", "worktree", "add", "--detach", earlier, args.commit], check=True)
    for kind in ("prompt-heavy", "answer-heavy"):
        rows = "".join(json.dumps(row) + "\n" for row in make_rows(kind, 2 * args.steps))
        (work / f"{kind}.jsonl").write_text(rows)
    for turn in range(args.rounds):
        for name, folder in ((args.commit, earlier), ("now", ROOT)):
            out = work / f"{name}-{turn}"
            found = {"generate": generate(folder, out.with_suffix(".jsonl"), args.limit)}
            for kind in ("prompt-heavy", "answer-heavy"):
                found[kind] = train(folder, work / f"{kind}.jsonl", out / kind, args.steps)
            results.setdefault(name, []).append(found)
            print(name, json.dumps(found), flush=True)
    subprocess.run(["git", "worktree", "remove", "--force", earlier], check=True)
    return results


def module_of(text):
    module = types.ModuleType("earlier")
    exec(compile(text, "earlier", "exec"), module.__dict__)
    return module


def kernel(args):
    show = ["git", "show", f"{args.commit}:kernels/logps.py"]
    text = subprocess.run(show, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    modules = {"now": kernel_now, args.commit: module_of(text)}
    for name, changes in SPECIAL.items():
        changed = text
        for old, new in changes:
            assert old in changed, old
            changed = changed.replace(old, new)
        modules[f"without {name}"] = module_of(changed)
    problem = bench.make_problem(1024, 576, 49152, 0.0, False, torch.bfloat16, "cpu")
    exact, results = bench.exact(problem), {}
    for name, module in modules.items():
        results[name] = {"ms": [], **bench.errors(problem, method(module), exact)}
    for turn in range(args.rounds + 1):
        for name, module in modules.items():
            times = bench.run_once(problem, *method(module)(problem))
            results[name]["ms"] += [sum(times)] if turn else []  # the first one warms up
    for name, found in results.items():
        found["median ms"] = statistics.median(found["ms"])
        errors = ", ".join(f"{k} {v:.1e}" for k, v in found.items() if k.startswith("error"))
        print(f"{name:32} {found['median ms']:7.0f} ms   {errors}")
    return results


def method(module):
    """The kernel of a module, as bench.errors and bench.run_once take it."""
    return lambda p: bench.with_autograd(
        p, lambda: module.linear_logps(p.hidden, p.weight, p.labels, p.cu)
    )


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("what", choices=["stages", "kernel"])
    add("--commit", default="21b6aeb", help="the earlier state (default: %(default)s)")
    add("--rounds", type=int, default=2, help="runs of each, in turns (default: %(default)s)")
    add("--steps", type=int, default=5, help="training steps of a run (default: %(default)s)")
    add("--limit", type=int, default=64, help="rows that generate.py makes (default: %(default)s)")
    add("--work", type=Path, default=Path("runs/before"), help="folder to work in")
    add("--out", type=Path, default=Path("results/before"), help="folder of the JSON")
    args = parser.parse_args()
    facts = provenance("cpu")
    facts |= {
        "against": args.commit,
        "results": {"stages": stages, "kernel": kernel}[args.what](args),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.what}.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
