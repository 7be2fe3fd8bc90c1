"""Memory of train.py in several processes, measured on a CPU and by arithmetic.

    python results/memory.py --work /tmp/memory              # peaks of each process, by phase
    python results/memory.py activations --work /tmp/memory  # what a forward pass keeps, two ways
    python results/memory.py table                           # 1B, 8B and 70B on 8 and 32 GPUs

The first makes a random Llama in WORK, and runs two steps of the given train.py, which may be another
commit's, with a checkpoint between them. Linux counts each phase apart (VmHWM, by
/proc/PID/clear_refs). Tables are printed as Markdown."""

import argparse
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PHASES = {  # the functions of train.py that are the phases
    "load": "Policy", "reference": "pair_logps", "steps": "training_step",
    "checkpoint": "save_checkpoint", "save": "save_policy",
}  # fmt: skip
VOCABULARY = 49152  # of the embedded tokenizer
LLAMAS = {  # of Llama 3: layers, hidden size, that of the MLP, vectors of keys (8 heads), tied
    "1B": (16, 2048, 8192, 512, True),
    "8B": (32, 4096, 14336, 1024, False),
    "70B": (80, 8192, 28672, 1024, False),
}
PYTHON = 0.6e9  # bytes of a process with torch and transformers, before it has a model


# ---- by arithmetic -------------------------------------------------------------------------------
def memory_of(
    layers, hidden, mlp, keys, tied, *, vocabulary, processes, tokens, heads=None, ratio=2.0
):
    """Bytes of a Llama in training, by arithmetic: {what: bytes}; `parameters` alone is a number.

    hidden, mlp, keys: widths of the residual stream, the MLP and of all key heads together, numbers.
    tokens: of a micro-batch, --pack-tokens. heads: query heads, of 128 numbers if not given.
    ratio: keys a token. Each answer's attention copies the keys of its prompt, so two answers behind
        a prompt of half the tokens make it 2.

    A parameter takes 16 bytes over all processes: weight, gradient and two moments in fp32.
    gathered: in bf16 (2 bytes) two layers, of which one is on its way, and embedding and head.
    gradients: of what is gathered, before they are divided: bf16, and a copy in fp32 (4 bytes), of
        embedding and head or of two layers.
    kept: by one layer for its backward pass, with weights and activations in bf16. A token has
        16 hidden: each of two norms keeps its input in fp32 (4), the normed one (2) and the product
            with the weight (2), from which q, k and v, or gate and up, are computed;
        4 hidden: rotated queries (2), and the output of attention (2);
        4 keys ratio: rotated keys (2), and values (2), with the copies of prompts;
        4 heads: the log-sum-exp of attention in fp32;
        8 mlp: gate, its SiLU, up, and the product of these two (2 each);
        8: the scale of each norm in fp32 (4).
    all_kept: by all layers. inputs: with --checkpoint-activations, of each layer its input (2 hidden)
        and the inside of the one layer that is computed again.
    logits: what the log-probs keep, 2 bytes a logit if all tokens are answers', at most 4 GiB.
    loading: on the host, by the first process: the weights in fp32, and Python. others: Python.
    """
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * mlp + 2 * hidden
    root = vocabulary * hidden * (1 if tied else 2) + hidden
    parameters = layers * layer + root
    heads = heads or hidden // 128
    kept = tokens * (20 * hidden + 4 * keys * ratio + 4 * heads + 8 * mlp + 8)
    return {
        "parameters": parameters,
        "state": 16 * parameters / processes,
        "gathered": 2 * (root + 2 * layer),
        "gradients": 6 * max(root, 2 * layer),
        "kept": kept,
        "all_kept": layers * kept,
        "inputs": tokens * layers * 2 * hidden + kept,
        "logits": min(4 << 30, 2 * tokens * vocabulary),
        "loading": 4 * parameters + PYTHON,
        "others": PYTHON,
    }


def table(tokens=4096):
    """Prints 1B, 8B and 70B on 8 and 32 GPUs, eight on a node, in GB."""
    print(f"Llama 3's shapes and vocabulary, {tokens:,} tokens a micro-batch, GB.\n")
    print("| model | parameters | GPUs | host, first node | host, others | state | gathered | gradients "
          "| log-probs | activations | with the flag | sum | with the flag |")  # fmt: skip
    print("| --- " * 13 + "|")
    for name, shape in LLAMAS.items():
        for processes in (8, 32):
            how = {"processes": processes, "tokens": tokens, "heads": 32 if name == "1B" else None}
            m = memory_of(*shape, vocabulary=128256, **how)
            parts = [m[part] for part in ("state", "gathered", "gradients", "logits")]
            both = [m["all_kept"], m["inputs"]]
            values = [m["loading"] + 7 * m["others"], 8 * m["others"], *parts, *both]
            cells = [f"{x / 1e9:.1f}" for x in (*values, *(sum(parts) + x for x in both))]
            cells[1] = "-" if processes == 8 else cells[1]  # one node is all
            print(f"| {name} | {m['parameters'] / 1e9:.2f}e9 | {processes} | {' | '.join(cells)} |")


# ---- measured ------------------------------------------------------------------------------------
def make_llama(folder, layers, hidden, heads, key_heads, tied):
    """Saves a random Llama with the embedded model's tokenizer, its MLP four times as wide as the
    rest."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from prompts.chat import model_folder

    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "vocab_size": VOCABULARY}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": key_heads}
    sizes |= {"num_hidden_layers": layers, "tie_word_embeddings": tied}
    config = LlamaConfig(**sizes, eos_token_id=2, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder("smollm2")).save_pretrained(folder)


def make_inputs(work, layers, hidden, words=3):
    """A random Llama, with heads of 128 numbers; and sixteen pairs, each answer of so many words, the
    prompt of twice as many."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "model" / "config.json").exists():
        heads = hidden // 128
        make_llama(work / "model", layers, hidden, heads, heads, tied=False)
    with open(work / "scored.jsonl", "w") as file:
        for i in range(16):
            row = {
                "prompt": "film " * 2 * words,
                "chosen": "warm " * words,
                "rejected": "dull " * words,
            }
            file.write(json.dumps({name: f"{text}{i}." for name, text in row.items()}) + "\n")


def status(key):
    """A size in bytes from /proc/self/status, as VmHWM (the peak) or VmRSS (now)."""
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[key].split()[0]) * 1024


def measured(name, peaks, call, last=False):
    """`call`, which notes the peak of its process under `name`, the highest of all calls."""

    @functools.wraps(call, updated=())
    def wrapper(*args, **kwargs):
        Path("/proc/self/clear_refs").write_text("5")
        result = call(*args, **kwargs)
        peaks[name] = max(peaks.get(name, 0), status("VmHWM"))
        if last:
            raise SystemExit
        return result

    return wrapper


def growing(peaks, forward):
    """`forward` of the policy, which notes what it keeps for the backward pass, in bytes."""

    @functools.wraps(forward)
    def wrapper(self, pairs):
        before = status("VmRSS")
        result = forward(self, pairs)
        if torch.is_grad_enabled():
            peaks["kept"] = max(peaks.get("kept", 0), status("VmRSS") - before)
            peaks["tokens"] = sum(map(len, (x for pair in pairs for x in pair[1:4])))
            peaks["answers"] = sum(map(len, (x for pair in pairs for x in pair[2:4])))
        return result

    return wrapper


def worker(script, out, last, argv):
    """One process of the run: train.py, with its phases measured. It ends after the phase `last`."""
    sys.path.insert(0, str(Path(script).parent))
    sys.argv = [script, *argv]
    import train

    peaks = {}
    train.Policy.forward = growing(peaks, train.Policy.forward)
    for name, function in PHASES.items():
        call = measured(name, peaks, getattr(train, function), last == name)
        setattr(train, function, call)
    try:
        train.run(train.main)
    except SystemExit as error:
        if error.code:
            raise
    Path(f"{out}-{train.RANK}.json").write_text(json.dumps(peaks))
    if train.WORLD > 1:
        train.dist.barrier()
    os._exit(0)


def train_in(work, processes, script=ROOT / "train.py", last="save", *more):
    """Runs train.py over the inputs in `work`; what each process measured, a list."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", __file__, "worker", script, work / "peaks", last]
    command += ["--model", work / "model", "--in", work / "scored.jsonl", "--out", work / "out"]
    command += "--overwrite --device cpu --loss dpo --lr 1e-6 --max-steps 2 --save-every 1".split()
    # Memory that is freed goes back to the system at once.
    how = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    subprocess.run([*map(str, command), *more], check=True, env=how, stdout=sys.stderr)
    return [json.loads((work / f"peaks-{rank}.json").read_text()) for rank in range(processes)]


def peaks_table(args):
    """Runs train.py, and prints the peaks of all processes beside what each may take at most."""
    work = args.work / f"{args.layers}x{args.hidden}"
    make_inputs(work, args.layers, args.hidden)
    last = "load" if args.load_only else "save"
    peaks = train_in(work, args.processes, args.train.resolve(), last, "--dtype", "float32")
    shape = args.layers, args.hidden, 4 * args.hidden, args.hidden, False
    m = memory_of(*shape, vocabulary=VOCABULARY, processes=args.processes, tokens=0)
    weights, layer = 4 * m["parameters"], 4 * 16 * args.hidden**2
    print(f"{args.layers} layers of {args.hidden}, {m['parameters'] / 1e9:.3f}e9 parameters, fp32 "
          f"{weights / 1e9:.2f} GB; {args.processes} processes; GB.\n")  # fmt: skip
    phases = [phase for phase in PHASES if phase in peaks[0]]
    print(f"| process | {' | '.join(phases)} | at most | loading and saving | met |")
    print("| --- " * (len(phases) + 4) + "|")
    limit = m["state"] + layer + 1.5e9
    for rank, found in enumerate(peaks):
        whole = limit + (weights if rank == 0 else 0)
        missed = [p for p in phases if found[p] > (whole if p in ("load", "save") else limit)]
        cells = [f"{x / 1e9:.2f}" for x in (*(found[p] for p in phases), limit, whole)]
        print(
            f"| {rank} | {' | '.join(cells)} | {'not in ' + ', '.join(missed) if missed else 'yes'} |"
        )


def activations(args):
    """Measures what a forward pass in bf16 keeps, in two processes, without the flag and with it, and
    prints it beside memory_of's arithmetic for the same tokens."""
    layers, hidden, work = 8, 1024, args.work / "activations"
    make_inputs(work, layers, hidden, words=300)
    more = "--dtype bfloat16 --pack-tokens 5000 --max-length 2000 --batch-size 6".split()
    runs = [[], ["--checkpoint-activations"]]
    runs = [train_in(work, 2, ROOT / "train.py", "save", *more, *flag)[0] for flag in runs]
    tokens, answers = runs[0]["tokens"], runs[0]["answers"]
    ratio = (tokens + 2 * (tokens - answers)) / tokens
    shape = layers, hidden, 4 * hidden, hidden, False
    m = memory_of(*shape, vocabulary=VOCABULARY, processes=2, tokens=tokens, ratio=ratio)
    # On a CPU attention runs segment by segment, and its joined output is kept too.
    joined, logits = layers * tokens * 2 * hidden, min(512 << 20, 2 * answers * VOCABULARY)
    expected = [m["all_kept"] + joined + logits, m["inputs"] - m["kept"] + logits]
    print(f"{m['parameters'] / 1e6:.0f}e6 parameters, {layers} layers of {hidden}, {tokens:,} tokens a "
          f"process, {answers:,} of answers; GB.\n")  # fmt: skip
    # The table's sum, which is a bound: its parts are not all held at once.
    fixed = PYTHON + m["state"] + m["gathered"] + m["gradients"] + logits
    bounds = [fixed + joined + m["all_kept"], fixed + joined / layers + m["inputs"]]
    print("| --checkpoint-activations | kept after the forward pass | by arithmetic "
          "| peak of a step | at most, by arithmetic |\n| --- | --- | --- | --- | --- |")  # fmt: skip
    both = zip(runs, expected, bounds, strict=True)
    rows = [[run["kept"], kept, run["steps"], bound] for run, kept, bound in both]
    rows.append([one - other for one, other in zip(*rows, strict=True)])
    for name, row in zip(("without", "with", "difference"), rows, strict=True):
        print(f"| {name} |", *(f"{x / 1e9:.3f} |" for x in row))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("part", nargs="?", default="peaks", choices=["peaks", "activations", "table"])
    add("--train", type=Path, default=ROOT / "train.py", help="may be another commit's (default: this one's)")  # fmt: skip
    add("--work", type=Path, help="folder for the model and what train.py writes")
    add("--processes", type=int, default=2, help="default: %(default)s")
    add("--layers", type=int, default=12, help="of the model: 12 of 2,048 make 1.0 billion parameters, 4 half of it (default: %(default)s)")  # fmt: skip
    add("--hidden", type=int, default=2048, help="width of the model (default: %(default)s)")
    add(
        "--load-only", action="store_true", help="end after the phase `load`, which takes the least"
    )
    args = parser.parse_args()
    if args.part == "table":
        return table()
    if not args.work:
        parser.error("--work: needed")
    sys.path.insert(0, str(ROOT))
    from prompts.rows import provenance

    (peaks_table if args.part == "peaks" else activations)(args)
    print(json.dumps(provenance(torch.device("cpu")), indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(*sys.argv[2:5], sys.argv[5:])
    else:
        main()
