"""More than one process, and many pairs: what train.py must hold, tried on a CPU.

    python results/scale.py equal --work /tmp/scale   # 1, 2 and 4 processes, a kill, the saved model
    python results/scale.py pairs --work /tmp/scale   # 200,000 pairs: seconds and memory to step 1

Both train small random models with the embedded tokenizer. `equal` prints each comparison beside its
bound, and has status 1 where one does not hold."""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from memory import make_llama, status

ROOT = Path(__file__).resolve().parent.parent
WORDS = (
    "the film is a quiet moving story about people who live near sea and slowly learn to forgive each "
    "other while music light acting script remain honest warm never dull although some scenes feel "
    "long I would still recommend it to friends"
).split()


# ---- inputs --------------------------------------------------------------------------------------
def make_pairs_file(path, count, test_every):
    """`count` rows as score.py writes them, of about 250 tokens; every so many is held out."""
    some = random.Random(0)

    def said(role, least, most):
        text = " ".join(some.choices(WORDS, k=some.randint(least, most))).capitalize() + "."
        return [{"role": role, "content": text}]

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        for i in range(count):
            row = {
                "id": f"row-{i}",
                "task": "sentiment",
                "group": f"g{i}",
                "prompt": said("user", 17, 17),
            }
            row |= {
                "split": "train" if i % test_every else "test",
                "critique": said("user", 60, 60),
            }
            row |= {"chosen": said("assistant", 50, 150), "rejected": said("assistant", 50, 150)}
            row |= {"score_chosen": some.gauss(0.2, 1), "score_rejected": some.gauss(0, 1)}
            file.write(json.dumps(row) + "\n")


def command_of(processes, *argv, script=ROOT / "train.py"):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    line = [sys.executable, *(launcher if processes > 1 else []), script, *argv]
    return [*map(str, line), "--device", "cpu", "--dtype", "float32", "--loss", "dpo"]


# ---- equal ---------------------------------------------------------------------------------------
class Checks:
    """Comparisons, printed as rows of a table. failed: how many did not hold."""

    def __init__(self):
        self.failed = 0
        print("| model | compared | largest difference | at most |\n| --- | --- | --- | --- |")

    def add(self, model, what, difference, bound):
        held = difference <= bound
        self.failed += not held
        print(
            f"| {model} | {what} | {difference:.1e} | {bound:.0e}{'' if held else ' FAILED'} |",
            flush=True,
        )


def log_of(out):
    """(losses of the steps, held-out metrics after the last one) of a run directory."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    held_out = [row["held_out"] for row in rows if "held_out" in row]
    return torch.tensor([row["loss"] for row in rows if "loss" in row]).double(), held_out[-1]


def apart(one, other):
    """The largest difference between the saved weights of two run directories."""
    from safetensors.torch import load_file

    one, other = (load_file(out / "model.safetensors") for out in (one, other))
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def loaded(out):
    """A saved model, by transformers alone."""
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


@torch.no_grad()
def mean_logps(model, pairs):
    """The mean over pairs of log pi(chosen), by the model's own logits, in fp64."""
    total = 0.0
    for pair in pairs:
        ids = torch.tensor([[*pair.prompt, *pair.chosen]])
        logps = model(ids).logits[0, len(pair.prompt) - 1 : -1].double().log_softmax(-1)
        total += logps.gather(1, torch.tensor(pair.chosen)[:, None].long()).sum().item()
    return total / len(pairs)


def kill_after(step, command, out):
    """Runs a command, and kills all its processes at once when the log has so many steps. Returns how
    many steps the log then has."""
    launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    log = out / "log.jsonl"
    while launcher.poll() is None:
        if log.exists() and log.read_bytes().count(b"\n") >= step:
            break
        time.sleep(0.002)
    family = [launcher.pid]  # torchrun gives each process a group of its own
    for pid in family:
        try:
            family += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        except FileNotFoundError:
            continue
    for pid in family:
        if launcher.poll() is None or pid != launcher.pid:
            os.kill(pid, signal.SIGKILL)
    launcher.wait()
    return len(log_of_steps(log))


def log_of_steps(log):
    return [line for line in log.read_text().splitlines() if "held_out" not in line]


def equal(work):
    """Compares runs of 1, 2 and 4 processes, and one that is killed; how many checks failed."""
    from transformers import AutoTokenizer

    from prompts.rows import read_rows
    from prompts.tokens import make_pairs

    work = work / "equal"
    make_pairs_file(work / "scored.jsonl", 56, 8)
    checks = Checks()
    for name in ("untied", "tied"):
        model = work / name
        make_llama(model, 2, 64, heads=4, key_heads=2, tied=name == "tied")
        flags = [
            "--in",
            work / "scored.jsonl",
            "--model",
            model,
            "--lr",
            "1e-4",
            "--batch-size",
            "6",
        ]
        flags += ["--max-steps", "8", "--save-every", "2", "--eval-every", "8"]
        flags += ["--sft-weight", "1", "--overwrite"]
        outs = {}
        for processes in (1, 2, 4):
            outs[processes] = out = work / f"{name}-{processes}"
            line = command_of(processes, *flags, "--out", out)
            subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
        losses = {processes: log_of(out)[0] for processes, out in outs.items()}
        assert len(losses[1]) == 8
        for processes in (2, 4):
            what = f"{processes} processes and 1: "
            gap = (losses[processes] - losses[1]).abs().max().item()
            checks.add(name, what + "losses of 8 steps", gap, 1e-5)
            # AdamW divides by the gradient's size, so it enlarges the rounding of small gradients.
            checks.add(name, what + "saved weights", apart(outs[1], outs[processes]), 2e-5)

        cut = work / f"{name}-cut"
        shutil.rmtree(cut, ignore_errors=True)
        steps = kill_after(5, command_of(4, *flags[:-1], "--out", cut), cut)
        assert "finished" not in json.loads((cut / "run.json").read_text()) and 5 <= steps < 8, (
            steps
        )
        line = command_of(2, *flags[:-1], "--out", cut)
        said = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout
        where = next(line for line in said.splitlines() if "goes on after" in line).partition(": ")[
            2
        ]
        what = f"4 processes, killed after step {steps}; 2 that end it ({where}), and 4 unbroken: "
        gap = (log_of(cut)[0] - losses[4]).abs().max().item()
        checks.add(name, what + "losses", gap, 1e-5)
        checks.add(name, what + "saved weights", apart(outs[4], cut), 1e-5)

        args = {
            "loss": "dpo",
            "accept": False,
            "max_length": 1024,
            "max_repeats": 1.0,
            "raw_text": False,
        }
        rows, tokenizer = read_rows(work / "scored.jsonl"), AutoTokenizer.from_pretrained(outs[4])
        _, held_out, _ = make_pairs(rows, "", tokenizer, SimpleNamespace(**args), False)
        models = {processes: loaded(out) for processes, out in outs.items()}
        for processes, model in models.items():
            tie = model.get_input_embeddings().weight is model.get_output_embeddings().weight
            assert tie == (name == "tied")
            what = f"{processes} process(es): log-probs of the loaded model and of the policy, relative"
            logged, found = log_of(outs[processes])[1]["logps/chosen"], mean_logps(model, held_out)
            checks.add(name, what, abs(found / logged - 1), 1e-6)
        ids = torch.tensor([[*held_out[0].prompt, *held_out[0].chosen]])
        with torch.no_grad():
            logits = {processes: model(ids).logits for processes, model in models.items()}
        for processes in (2, 4):
            gap = (logits[processes] - logits[1]).abs().max().item()
            checks.add(name, f"{processes} processes and 1: logits of the loaded models", gap, 1e-5)
    print()
    return checks.failed


# ---- pairs ---------------------------------------------------------------------------------------
def noted(name, notes, call):
    """`call`, which notes when it ended, and the CPU seconds and peak memory of the process so far."""

    def wrapper(*args, **kwargs):
        result = call(*args, **kwargs)
        # Of the digests only that of the pairs counts, which are two lists.
        if name not in notes and (name != "digest" or isinstance(args[0][0], list)):
            times = os.times()
            notes[name] = {
                "ended": time.time(),
                "cpu": times.user + times.system,
                "cpu of children": times.children_user + times.children_system,
                "peak": status("VmHWM"),
                "peak of a child": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
            }
        return result

    return wrapper


def worker(out, argv):
    """train.py, which notes when each phase ended."""
    sys.path.insert(0, str(ROOT))
    sys.argv = ["train.py", *argv]
    import train

    notes = {}
    phases = {"read_rows": "read_rows", "model": "Policy", "make_pairs": "make_pairs"}
    phases |= {
        "digest": "digest_of",
        "reference": "reference_logps_of",
        "first step": "training_step",
    }
    for name, function in phases.items():
        setattr(train, function, noted(name, notes, getattr(train, function)))
    train.run(train.main)
    Path(f"{out}-{train.RANK}.json").write_text(json.dumps(notes))
    if train.WORLD > 1:
        train.dist.barrier()
        sys.stdout.flush()
        os._exit(0)


def pairs(work, count, processes):
    """Prints seconds and memory up to the first step; how many targets were missed."""
    work = work / "pairs"
    path = work / f"{count}.jsonl"
    if not path.exists():
        make_pairs_file(path, count, 1000)
    make_llama(work / "model", 2, 64, heads=4, key_heads=2, tied=True)
    flags = ["worker", work / "notes", "--in", path, "--model", work / "model", "--lr", "1e-4"]
    flags += ["--max-steps", "8", "--overwrite", "--out", work / "out"]
    load, began = os.getloadavg()[0], time.time()
    subprocess.run(command_of(processes, *flags, script=__file__), check=True, stdout=sys.stderr)
    print(f"{count:,} pairs, {path.stat().st_size / 1e6:.0f} MB, {processes} process(es); load average "
          f"before {load:.2f}, behind {os.getloadavg()[0]:.2f}.\n")  # fmt: skip
    print(
        "| process | until the end of | wall, s | CPU, s | CPU of children, s | peak, GB | of a child, GB |"
    )
    print("| --- " * 7 + "|")
    missed = 0
    for rank in range(processes):
        notes = json.loads(Path(f"{work / 'notes'}-{rank}.json").read_text())
        for name, note in sorted(notes.items(), key=lambda item: item[1]["ended"]):
            cells = [note["ended"] - began, note["cpu"], note["cpu of children"]]
            cells = [f"{x:.1f}" for x in cells]
            cells += [f"{note[key] / 1e9:.2f}" for key in ("peak", "peak of a child")]
            print(f"| {rank} | {name} | {' | '.join(cells)} |")
        step = notes["first step"]
        missed += step["ended"] - began > 120
        missed += max(step["peak"], step["peak of a child"]) > 4e9
    print(f"\nFirst step within 120 s, and 4 GB a process: {'NOT met' if missed else 'met'}.\n")
    return missed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("part", choices=["equal", "pairs"])
    add("--work", type=Path, required=True, help="folder for models, pairs and runs")
    add("--count", type=int, default=200_000, help="of pairs (default: %(default)s)")
    add("--processes", type=int, default=1, help="of `pairs` (default: %(default)s)")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from prompts.rows import provenance

    failed = (
        equal(args.work) if args.part == "equal" else pairs(args.work, args.count, args.processes)
    )
    print(json.dumps(provenance(torch.device("cpu")), indent=1))
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], sys.argv[3:])
    else:
        main()
