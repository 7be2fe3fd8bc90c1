"""Where linear_logps spends its time on a GPU, and under which settings it spends least.

    python tests/tune_kernel.py --out results/gpu/settings.json

For each shape: the device time of every kernel of one forward and backward pass by torch.profiler,
then all passes under other block sizes, warps and chunks, in turns, medians. The bare products
(kernels.bench) take their turns too. Random operands, bf16.
"""

import argparse
import json
import random
import statistics
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from generate import provenance  # noqa: E402
from kernels import logps  # noqa: E402
from kernels.bench import METHODS, SHAPES, make_problem, run_once  # noqa: E402

PASSES = ("linear_logps, retain", "linear_logps, recompute", "linear_logps, forward only")
USUAL = (logps.BLOCK_V, logps.NUM_WARPS, logps.CHUNK_BYTES["cuda"] >> 20)
SETTINGS = [
    (1024, 4),
    (2048, 4),
    (2048, 8),
    (4096, 4),
    (4096, 8),
    (4096, 16),
    (8192, 8),
    (8192, 16),
]
CHUNKS = (88, 176, 352, 704, 1408)  # MiB


def time_of_kernels(problem, name):
    """[(kernel, calls, ms)] of one pass, the slowest first."""
    pair = METHODS[name](problem)
    run_once(problem, *pair)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run_once(problem, *pair)
    rows = [(e.key[:90], e.count, e.device_time_total / 1e3) for e in found.key_averages()]
    return sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])[:14]


def set_to(block, warps, chunk):
    logps.BLOCK_V, logps.NUM_WARPS, logps.CHUNK_BYTES["cuda"] = block, warps, chunk << 20


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["llama3", "smollm2"], choices=list(SHAPES))
    parser.add_argument("--reps", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    result = provenance() | {"usual": USUAL, "shapes": {}}
    for shape in args.shapes:
        p = make_problem(*SHAPES[shape], torch.bfloat16, "cuda")
        kernels = {name: time_of_kernels(p, name) for name in PASSES}
        for name, rows in kernels.items():
            print(f"\n{shape} {name}")
            for key, count, ms in rows:
                print(f"  {ms:9.3f} ms {count:5d}  {key}")
        settings = [(*both, USUAL[2]) for both in SETTINGS] + [(*USUAL[:2], c) for c in CHUNKS]
        settings = list(dict.fromkeys([USUAL, *settings]))
        times = {(name, s): [] for s in settings for name in PASSES}
        times |= {(name, USUAL): [] for name in ("1 gemm", "3 gemms", "4 gemms")}
        for turn in range(args.reps + 1):
            # in another order each turn: what follows the bare products meets a card slowed by them
            order = random.Random(turn).sample(list(times), len(times))
            for name, setting in order:
                mine = times[name, setting]
                set_to(*setting)
                both = sum(run_once(p, *METHODS[name](p)))
                mine += [both] if turn else []  # the first one compiles
        set_to(*USUAL)
        medians = {key: statistics.median(mine) for key, mine in times.items()}
        print(f"\n{shape}: ms of retain, recompute, forward only by (columns, warps, MiB a chunk)")
        for s in settings:
            print(f"  {s!s:22}" + "".join(f"{medians[name, s]:9.2f}" for name in PASSES))
        print("  bare", {n: round(m, 2) for (n, _), m in medians.items() if "gemm" in n})
        rows = [{"method": n, "setting": s, "ms": m} for (n, s), m in medians.items()]
        result["shapes"][shape] = {"kernels": kernels, "medians": rows}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        del p
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
