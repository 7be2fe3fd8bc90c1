"""What only a GPU can show, in one command that needs no network:

    python results/on_gpu.py --out results/gpu          # 10 to 15 minutes on one H200

1. the tests, with those that are skipped without CUDA
2. the kernel beside its bare products and its peers (kernels.bench), at three sizes of real models
3. train.py beside TRL's DPOTrainer (against_trl.py bench), on a model of 1.2 billion random
   weights (16 layers, hidden size 2,048, vocabulary 128,256)

Each part is a process of its own with a time limit; what a part printed, its exit status and its
seconds go into result.json, with commit, card and versions; the parts' own JSON lies beside it.
TRL is needed for part 3 only (requirements-dev.txt). --small tries the command out on a CPU.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

PARTS = ("tests", "kernel", "prompt-heavy", "answer-heavy")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from prompts.chat import model_folder, pick_device  # noqa: E402
from prompts.rows import provenance  # noqa: E402


def random_model(folder, small):
    """Saves a Llama with random weights, and the embedded model's tokenizer; returns the folder."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder("smollm2"))
    sizes = {"vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192}
    sizes |= {"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
    if small:
        sizes |= {"vocab_size": 49_152, "hidden_size": 128, "intermediate_size": 256}
        sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, **ids, max_position_embeddings=8192, tie_word_embeddings=True)
    with torch.device("cpu" if small else "cuda"):  # which is faster at random numbers
        model = LlamaForCausalLM(config)
    model.bfloat16().save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    tokenizer.save_pretrained(folder)
    return str(folder)


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--out", type=Path, default=Path("results/gpu"), help="folder of the results")
    add("--limit", type=int, default=280, help="seconds a part may take (default: %(default)s)")
    add("--parts", nargs="+", choices=PARTS, help="of the four, see result.json (default: all)")
    add("--small", action="store_true", help="small sizes, for a try on a CPU")
    args = parser.parse_args()
    if not (args.small or torch.cuda.is_available()):
        sys.exit("there is no CUDA device here; --small tries the command out")
    out, work = args.out.resolve(), Path("runs/gpu").resolve()
    out.mkdir(parents=True, exist_ok=True)
    model = random_model(work / "model", args.small)
    shapes = ["tiny"] if args.small else ["llama3", "qwen2.5", "smollm2"]
    tests = [f"tests/test_{name}.py" for name in ("logps", "packed", "train")]
    bench = ["results/against_trl.py", "bench", "--model", model, "--work", work / "against_trl"]
    bench += ["--whole", "--rounds", 1]
    bench += ["--steps", 3, "--batch", 2] if args.small else ["--steps", 12, "--batch", 8]
    parts = {
        # -v after addopts' -q, so that a test is named as it ends: a time limit costs no names
        "tests": [
            "-m",
            "pytest",
            "-vv",
            "-n",
            2 if args.small else 14,
            *tests[: 1 if args.small else 3],
        ],
        "kernel": [
            "-m",
            "kernels.bench",
            "--shapes",
            *shapes,
            "--reps",
            10,
            "--out",
            out / "kernel",
        ],
    }
    for kind in ("prompt-heavy", "answer-heavy"):
        parts[kind] = [*bench, "--sets", kind, "--out", out / f"train-{kind}"]
    parts = {name: command for name, command in parts.items() if name in (args.parts or parts)}
    results = provenance(pick_device()[0]) | {"parts": {}}
    for name, command in parts.items():
        began = time.perf_counter()
        command = [sys.executable, *map(str, command)]
        try:
            how = {"cwd": ROOT, "env": os.environ | {"HF_HUB_OFFLINE": "1"}, "timeout": args.limit}
            done = subprocess.run(command, capture_output=True, text=True, **how)
            status, said = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired as error:
            status, said = "time limit", (error.stdout or b"").decode(errors="replace")
        seconds = round(time.perf_counter() - began)
        found = {"command": " ".join(command[1:]), "status": status, "seconds": seconds}
        results["parts"][name] = found | {"end": said[-4000:]}
        print(f"{name}: status {status}, {seconds} s\n{said[-1500:]}", flush=True)
        (out / "result.json").write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(any(part["status"] != 0 for part in results["parts"].values()))


if __name__ == "__main__":
    main()
