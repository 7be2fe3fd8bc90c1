"""Stages that are killed and started again end as if nobody had touched them.

The training is killed in test_train.py, a stage that asks a server in test_generate.py.
"""

import os
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
import importlib, signal, sys, time
from prompts import rows as module
signal.signal(signal.SIGINT, signal.default_int_handler)
write = module.Rows.add
module.Rows.add = lambda rows, *new: [(time.sleep(0.02), write(rows, row)) for row in new]
module.run(importlib.import_module(sys.argv.pop(1)).main)
"""


def kill_once(stage, flags, folder, output, kill):
    """Starts a stage in a process, and kills it when it has written two lines."""
    command = list(map(str, [sys.executable, "-c", SLOWED, stage, *flags]))
    how = {"cwd": folder, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    how |= {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    process = subprocess.Popen(command, **how)
    while process.poll() is None and not (output.exists() and output.read_bytes().count(b"\n") > 1):
        time.sleep(0.01)
    process.send_signal(kill)
    assert process.wait() in (-signal.SIGKILL, 130)


@pytest.mark.parametrize(
    ("stage", "kill"),
    [("generate", signal.SIGKILL), ("score", signal.SIGINT), ("eval", signal.SIGKILL)],
)
def test_a_stage_that_was_killed_ends_as_an_unbroken_one(run, stage, kill, tiny, workdir):
    pairs = []
    for i in range(48):
        chosen, rejected = (
            " ".join(WORDS[(i * k + j) % 8] for j in range(4 + i % 5)) for k in (3, 5)
        )
        prompt = f"Review the film number {i}."
        pairs.append(pair_row(i, chosen + ".", rejected + "!", 1.0, "test", prompt))
    write_jsonl(workdir / "scored.jsonl", pairs)
    plain = [{k: v for k, v in row.items() if "score" not in k} for row in pairs]
    write_jsonl(workdir / "pairs.jsonl", plain)
    small = ["--task", "sentiment", "--max-tokens", 24, "--batch-size", 5]
    flags, name, count = {
        "generate": (["--model", tiny, "--limit", 48, *small, "--out"], "", 48),
        "score": (["--model", tiny, "--in", "pairs.jsonl", "--batch-size", 1, "--out"], "", 48),
        "eval": (["--models", tiny, "self-refine", "--reward-model", tiny, *small, "--in",
                  "scored.jsonl", "--out"], "eval.jsonl", 96),
    }[stage]  # fmt: skip
    contents = []
    for out in ("whole", "killed"):
        output = workdir / out / name
        if out == "killed":
            kill_once(stage, [*flags, out], workdir, output, kill)
        status, _, err = run(stage, *flags, out)
        assert status in (0, 1), err
        assert len(read_rows(output)) == count
        contents.append(output.read_bytes())
    assert contents[0] == contents[1]
