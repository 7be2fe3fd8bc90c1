"""Stages that work on this machine, killed at random moments and started again, end as if nobody had touched them.

The training is killed in test_train.py, a stage that asks a server in test_generate.py.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, pair_row, read_rows, write_jsonl

WORDS = "warm dull moving long bright slow tender loud".split()


# A stage that takes 20 ms to write a row, so that on a fast machine too it is at work when it is killed, and that hears
# SIGINT where the tests run in a shell's background, which is deaf to it and hands that on
SLOWED = """
import importlib, signal, sys, time, generate
signal.signal(signal.SIGINT, signal.default_int_handler)
write = generate.append
generate.append = lambda file, row: (time.sleep(0.02), write(file, row))
generate.run_stage(importlib.import_module(sys.argv.pop(1)).main)
"""


def run_stage(stage, flags, folder, output, kills):
    """Runs a stage to its end, killed `kills` times on the way, as soon as its output has grown by two lines."""
    command = list(map(str, [sys.executable, "-c", SLOWED, stage, *flags]))
    environment, draw = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, random.Random(stage)
    for kill in range(kills + 1):
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        lines = output.read_bytes().count(b"\n") if output.exists() else 0
        while process.poll() is None and kill < kills:
            time.sleep(0.01)
            if output.exists() and output.read_bytes().count(b"\n") >= lines + 2:
                time.sleep(draw.uniform(0, 0.1))
                process.send_signal(signal.SIGINT if kill % 2 else signal.SIGKILL)
                break
        status = process.wait()
        if status in (0, 1):
            assert kill == kills, (stage, kill)
            return
        assert kill < kills and status in (-signal.SIGKILL, 130), (stage, kill, status)


@pytest.mark.parametrize("stage", ["generate", "score", "eval"])
def test_a_stage_killed_again_and_again_ends_as_an_unbroken_one(stage, tiny, tmp_path):
    pairs = []
    for i in range(48):
        chosen, rejected = (" ".join(WORDS[(i * k + j) % 8] for j in range(4 + i % 5)) for k in (3, 5))
        pairs.append(pair_row(i, chosen + ".", rejected + "!", 1.0, "test", f"Review the film number {i}."))
    flags = {
        "generate": ["--task", "sentiment", "--limit", "48", "--max-tokens", "24", "--batch-tokens", "600"],
        "score": ["--task", "sentiment", "--batch-size", "1", "--in", "pairs.jsonl"],
        "eval": ["--task", "sentiment", "--max-tokens", "24", "--batch-tokens", "250", "--in", "scored.jsonl"],
    }[stage] + (
        ["--models", tiny, "self-refine", "--reward", "contrast", "--reward-model", tiny]
        if stage == "eval"
        else ["--model", tiny]
    )
    contents = []
    for name, kills in (("whole", 0), ("killed", 4)):
        folder = Path(tmp_path / name)
        write_jsonl(folder / "scored.jsonl", pairs)
        write_jsonl(folder / "pairs.jsonl", [{k: v for k, v in row.items() if "score" not in k} for row in pairs])
        output = folder / {"generate": "out.jsonl", "score": "out.jsonl", "eval": "eval.jsonl"}[stage]
        more = [] if stage == "eval" else ["--out", "out.jsonl"]
        run_stage(stage, flags + more, folder, output, kills)
        contents.append(output.read_bytes())
        assert len(read_rows(output)) == (96 if stage == "eval" else 48)
    assert contents[0] == contents[1]
