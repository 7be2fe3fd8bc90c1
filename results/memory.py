"""Peak resident memory of each process of a run of two, by phase, on a CPU:

    python results/memory.py --train train.py --work /tmp/memory

Makes a random Llama of one billion parameters in WORK, and runs one step of the given train.py, which
may be another commit's. Linux counts each phase apart (VmHWM, by /proc/PID/clear_refs)."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PHASES = {"load": "Policy", "reference and step": "train", "save": "save_policy"}
SIZES = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 12}
SIZES |= {"num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 49152}


def make_inputs(work):
    """A model with the embedded one's tokenizer, and four pairs."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from prompts.chat import model_folder

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, tie_word_embeddings=False, eos_token_id=2, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(work / "model")
    AutoTokenizer.from_pretrained(model_folder("smollm2")).save_pretrained(work / "model")
    with open(work / "scored.jsonl", "w") as file:
        for i in range(4):
            sides = {"chosen": f"A warm film {i}.", "rejected": f"A dull film {i}."}
            file.write(json.dumps({"prompt": "Review the film Heat.", **sides}) + "\n")


def measured(name, peaks, call):
    """`call`, which notes the peak of its process in GB under `name`."""

    def wrapper(*args, **kwargs):
        Path("/proc/self/clear_refs").write_text("5")
        result = call(*args, **kwargs)
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        peaks[name] = int(status["VmHWM"].split()[0]) * 1024 / 1e9
        return result

    return wrapper


def worker(script, out, argv):
    """One process of the run: train.py, with its phases measured."""
    sys.path.insert(0, str(Path(script).parent))
    sys.argv = [script, *argv]
    import train

    peaks = {}
    for name, function in PHASES.items():
        setattr(train, function, measured(name, peaks, getattr(train, function)))
    train.run(train.main)
    Path(f"{out}-{train.RANK}.json").write_text(json.dumps(peaks))
    train.dist.barrier()
    os._exit(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", default=str(ROOT / "train.py"))
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from prompts.rows import provenance

    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "model").exists():
        make_inputs(args.work)
    peaks = args.work / "peaks"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [__file__, "worker", args.train, str(peaks), "--model", str(args.work / "model")]
    command += ["--in", str(args.work / "scored.jsonl"), "--out", str(args.work / "out")]
    command += "--overwrite --device cpu --dtype float32 --loss dpo --lr 1e-6".split()
    subprocess.run([*command, "--batch-size", "4", "--max-steps", "1"], check=True)
    print("| process |", *(f"{name}, GB |" for name in PHASES))
    for rank in range(2):
        row = json.loads(Path(f"{peaks}-{rank}.json").read_text())
        print(f"| {rank} |", *(f"{row[name]:.2f} |" for name in PHASES))
    print(json.dumps(provenance(torch.device("cpu")), indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        main()
