"""Stages killed at random moments and started again end as if nobody had touched them.

The training is killed in test_train.py, a stage that asks a server in test_generate.py.
"""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, pair_row, read_rows, write_jsonl

WORDS = "warm dull moving long bright slow tender loud".split()

# A stage that takes 20 ms to write a row, so that it is at work when it is killed, and that hears
# SIGINT where a shell's background made the tests deaf to it
SLOWED = """
import importlib, signal, sys, time, generate
signal.signal(signal.SIGINT, signal.default_int_handler)
write = generate.Rows.add
generate.Rows.add = lambda rows, *new: [(time.sleep(0.02), write(rows, row)) for row in new]
generate.run(importlib.import_module(sys.argv.pop(1)).main)
"""


def run_stage(stage, flags, folder, output, kills):
    """Runs a stage to its end, killed `kills` times, each time when it has written two lines."""
    command = list(map(str, [sys.executable, "-c", SLOWED, stage, *flags]))
    how = {"cwd": folder, "env": os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}}
    how |= {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    draw = random.Random(stage)

    def lines():
        return output.read_bytes().count(b"\n") if output.exists() else 0

    for kill in range(kills):
        start, process = lines(), subprocess.Popen(command, **how)
        while process.poll() is None and lines() < start + 2:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.1))
        process.send_signal(signal.SIGINT if kill % 2 else signal.SIGKILL)
        assert process.wait() in (-signal.SIGKILL, 130), (stage, kill)
    assert subprocess.run(command, **how).returncode in (0, 1)


@pytest.mark.parametrize("stage", ["generate", "score", "eval"])
def test_a_stage_killed_again_and_again_ends_as_an_unbroken_one(stage, tiny, tmp_path):
    pairs = []
    for i in range(48):
        chosen, rejected = (
            " ".join(WORDS[(i * k + j) % 8] for j in range(4 + i % 5)) for k in (3, 5)
        )
        prompt = f"Review the film number {i}."
        pairs.append(pair_row(i, chosen + ".", rejected + "!", 1.0, "test", prompt))
    flags, name, count = {
        "generate": (["--model", tiny, "--limit", 48, "--max-tokens", 24, "--batch-size", 5], "out.jsonl", 48),
        "score": (["--model", tiny, "--in", "pairs.jsonl", "--batch-size", 1], "out.jsonl", 48),
        "eval": (["--models", tiny, "self-refine", "--reward-model", tiny, "--in", "scored.jsonl",
                  "--max-tokens", 24, "--batch-size", 5], "eval.jsonl", 96),
    }[stage]  # fmt: skip
    flags = ["--task", "sentiment", *flags, *([] if stage == "eval" else ["--out", name])]
    contents = []
    for folder, kills in ((tmp_path / "whole", 0), (tmp_path / "killed", 2)):
        write_jsonl(folder / "scored.jsonl", pairs)
        plain = [{k: v for k, v in row.items() if "score" not in k} for row in pairs]
        write_jsonl(folder / "pairs.jsonl", plain)
        run_stage(stage, flags, folder, folder / name, kills)
        assert len(read_rows(folder / name)) == count
        contents.append((folder / name).read_bytes())
    assert contents[0] == contents[1]
