"""How fast is linear_logps, in how much memory, how exact, and beside what else: one command, a table, JSON, a figure.

    python -m kernels.bench                        every shape and peer that this machine can run -> results/kernel/
    python -m kernels.bench --shapes llama3        one of them
    python -m kernels.bench --plot results/kernel/bench.json        only draws the figure again

A row is one implementation at one shape (N tokens, hidden size D, vocabulary V). Every implementation computes the
log-probs of the same tokens and their gradients for the same upstream coefficients. They take turns: round after
round each runs once, so a clock that drifts or a neighbour hits all alike (what takes more than seven times as long as
the three products is left out of four rounds in five). Medians are reported, quartiles are in the JSON.

The floor is the bare matrix products in the operands' own type: z = H W^T, dH = dZ W, dW = dZ^T H, each 2NDV FLOPs.
TF/s counts only the work that the result needs (6NDV; 4NDV with a frozen head; 2NDV without gradients), whatever an
implementation computes twice. x gemm is its time over that of 3, 2 or 1 bare products.

Memory is the peak above what was there before the forward pass, gradients included: on CUDA what was allocated, on
a CPU under Linux resident pages. The JSON has it less the gradients as well.

Errors are against fp64 on the same operands, on the first 512 tokens: nats of the worst of four 128-token sums, and
relative norms of the gradients. Operands are random, with logits of the spread that SmolLM2-135M has on English
(standard deviation 5.5) and labels drawn from them. Cut Cross-Entropy's filtered backward skips what is nearly 0, so
its speed depends on the data, and random data are not text.

The peers are optional and not in requirements.txt; one that is missing is a row that says so. To have them all:
    pip install --no-deps trl==1.16.0 liger-kernel==0.8.5 cut-cross-entropy==25.1.1 && pip install datasets
"""

import argparse
import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from kernels.logps import gather_logps, linear_logps

SHAPES = {  # N, D, V, softcap, frozen head
    "llama3": (8192, 4096, 128256, 0.0, False),
    "llama3-ragged": (8191, 4096, 128256, 0.0, False),
    "llama3-frozen": (8192, 4096, 128256, 0.0, True),
    "qwen2.5": (4096, 3584, 152064, 0.0, False),
    "gemma2": (8192, 2304, 256000, 30.0, False),
    "qwen3": (2048, 2048, 151936, 0.0, False),
    "smollm2": (8192, 576, 49152, 0.0, False),
    "smollm2-1k": (1024, 576, 49152, 0.0, False),
    "tiny": (256, 64, 1003, 0.0, False),
    "tiny-frozen": (255, 64, 1003, 5.0, True),
}
DEFAULT_SHAPES = {"cuda": list(SHAPES)[:7], "cpu": ["smollm2-1k"]}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ERROR_TOKENS, SEQUENCE = 512, 128
SLOW = 7  # times the three products: what takes longer runs in every fifth round only


class Unavailable(Exception):
    """This implementation cannot run here; the message is its row."""


# --- 1. The problem ---------------------------------------------------------------------------------------------


def reference_logps(
    hidden, weight, labels, cu_seqlens=None, *, bias=None, logit_scale=1.0, softcap=0.0,
    ignore_index=-100,
):  # fmt: skip
    """linear_logps written plainly: full logits, autograd, fp32 (fp64 for fp64 operands). With
    weight=None hidden is the logits: the reference of gather_logps."""
    z = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if weight is not None:
        z = z @ weight.to(z.dtype).t()
    z = logit_scale * (z if bias is None else z + bias)
    z = softcap * torch.tanh(z / softcap) if softcap else z
    valid = labels != ignore_index
    indices = labels.long().where(valid, 0)[..., None]
    logps = z.log_softmax(-1).gather(-1, indices).squeeze(-1).where(valid, 0)
    if cu_seqlens is None:
        return logps
    return torch.stack([part.sum() for part in logps.tensor_split(cu_seqlens[1:-1].cpu().long())])


def make_problem(N, D, V, softcap, frozen, dtype, device):
    """Operands with logits of standard deviation 5.5; one coefficient a sequence of 128 tokens, as in DPO."""
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(N, D, generator=g, device=device).to(dtype).requires_grad_()
    weight = (
        (torch.randn(V, D, generator=g, device=device) * (5.5 / D**0.5))
        .to(dtype)
        .requires_grad_(not frozen)
    )
    with torch.no_grad():
        labels = torch.cat(
            [draw(rows @ weight.t(), softcap, g) for rows in hidden.split(ERROR_TOKENS)]
        )
    cu = torch.tensor([*range(0, N, SEQUENCE), N], device=device)
    coef = torch.linspace(-0.1, 0.07, len(cu) - 1, device=device)
    return SimpleNamespace(
        N=N,
        D=D,
        V=V,
        softcap=softcap,
        frozen=frozen,
        hidden=hidden,
        weight=weight,
        labels=labels,
        cu=cu,
        coef=coef,
    )


def draw(logits, softcap, generator):
    logits = logits.float()
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


def first_tokens(p):
    """The part of a problem on which errors are measured, with leaves of its own."""
    n = min(p.N, ERROR_TOKENS)
    cu = torch.tensor([*range(0, n, SEQUENCE), n], device=p.cu.device)
    hidden = p.hidden.detach()[:n].clone().requires_grad_()
    return SimpleNamespace(**{**vars(p), "N": n, "hidden": hidden, "labels": p.labels[:n], "cu": cu,
                              "coef": p.coef[: len(cu) - 1]})  # fmt: skip


# --- 2. The implementations. Each takes a problem and returns (forward, backward): forward() gives what backward needs.


def with_autograd(p, logps):
    """For a function that gives log-probs, one a token or one a sequence."""

    def forward():
        out = logps()
        return (
            out
            if len(out) == len(p.coef)
            else torch.segment_reduce(out.float(), "sum", offsets=p.cu, unsafe=True)
        )

    return forward, lambda out: out.backward(p.coef.to(out.dtype))


def ours(p, **kw):
    return with_autograd(
        p, lambda: linear_logps(p.hidden, p.weight, p.labels, p.cu, softcap=p.softcap, **kw)
    )


def ours_forward_only(p):
    forward, _ = ours(p)
    return torch.no_grad()(forward), None


def gemms(p, count):
    """`count` bare products, each with its operands and its result in the operands' type."""
    h, w = p.hidden.detach(), p.weight.detach()
    z, dh, dw = h.new_empty(p.N, p.V), torch.empty_like(h), torch.empty_like(w)
    backward = [
        lambda: torch.mm(z, w, out=dh),
        lambda: torch.mm(z.t(), h, out=dw),
        lambda: torch.mm(h, w.t(), out=z),
    ]
    return lambda: torch.mm(h, w.t(), out=z), lambda _: [
        product() for product in backward[: count - 1]
    ]


def copy(p):
    """A device copy of (N, V) numbers: the bandwidth that the row kernels are held against."""
    x = p.hidden.new_zeros(p.N, p.V)
    y = torch.empty_like(x)
    return lambda: y.copy_(x), None


def gather(p):
    """The row kernels alone: forward reads the logits, backward reads them and writes their gradient."""
    logits = (p.hidden.detach() @ p.weight.detach().t()).requires_grad_()

    def logps():
        logits.grad = None  # else backward would add to the gradient of the round before
        return gather_logps(logits, p.labels)

    return with_autograd(p, logps)


def full_logits(p):
    """What everyone writes first: logits in the operands' type, log_softmax in fp32, autograd."""

    def logps():
        z = (p.hidden @ p.weight.t()).float()
        z = p.softcap * torch.tanh(z / p.softcap) if p.softcap else z
        return z.log_softmax(-1).gather(-1, p.labels[:, None]).squeeze(-1)

    return with_autograd(p, logps)


def full_fp32_logits(p):
    """The same with operands widened first: exact as ours."""
    return with_autograd(
        p, lambda: reference_logps(p.hidden, p.weight, p.labels, p.cu, softcap=p.softcap)
    )


def compiled_chunks(p, rows=1024):
    """1,024 tokens at a time through torch.compile, checkpointed."""

    @torch.compile
    def chunk(h, w, y):
        z = (h @ w.t()).float()
        z = p.softcap * torch.tanh(z / p.softcap) if p.softcap else z
        return z.gather(-1, y[:, None]).squeeze(-1) - z.logsumexp(-1)

    def logps():
        parts = zip(p.hidden.split(rows), p.labels.split(rows), strict=True)
        return torch.cat(
            [
                torch.utils.checkpoint.checkpoint(chunk, h, p.weight, y, use_reentrant=False)
                for h, y in parts
            ]
        )

    return with_autograd(p, logps)


def torch_linear_cross_entropy(p):
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"not in torch {torch.__version__}")
    no_softcap(p)
    options = torch.nn.LinearCrossEntropyOptions()
    with_options = {"reduction": "none", "options": options}
    return with_autograd(
        p, lambda: -F.linear_cross_entropy(p.hidden, p.weight, p.labels, **with_options)
    )


def trl_chunked(p):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    # temperature, columns of a tile (trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE), softcap, scale, no statistics
    settings = 1.0, 32768, p.softcap or None, 1.0, ()
    return with_autograd(
        p, lambda: ChunkedLogProbFunction.apply(p.hidden, p.weight, None, p.labels, *settings)[0]
    )


def trl_selective(p):
    from trl.trainer.utils import selective_log_softmax

    no_softcap(p)
    return with_autograd(
        p, lambda: selective_log_softmax((p.hidden @ p.weight.t())[None], p.labels[None])[0]
    )


def liger_cross_entropy(p):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    needs_gpu(p)
    kw = {"reduction": "none", "softcap": p.softcap or None}
    return with_autograd(
        p, lambda: -liger_fused_linear_cross_entropy(p.hidden, p.weight, p.labels, **kw)
    )


def liger_dpo(p):
    """Its whole DPO loss, gradients made in forward; chosen sequences first. The only row with a loss of its own."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    no_softcap(p)
    if p.N % (2 * SEQUENCE):
        raise Unavailable(f"needs a multiple of {2 * SEQUENCE} tokens here")
    loss, labels = LigerFusedLinearDPOLoss(use_ref_model=False), p.labels.view(-1, SEQUENCE)
    return lambda: loss(p.weight, p.hidden.view(-1, SEQUENCE, p.D), labels)[
        0
    ], lambda out: out.backward()


def cut_cross_entropy(p, filter_eps):
    from cut_cross_entropy import linear_cross_entropy

    needs_gpu(p)
    kw = {"softcap": p.softcap or None, "reduction": "none", "filter_eps": filter_eps}
    return with_autograd(p, lambda: -linear_cross_entropy(p.hidden, p.weight, p.labels, **kw))


def no_softcap(p):
    if p.softcap:
        raise Unavailable("has no softcap")


def needs_gpu(p):
    if not p.hidden.is_cuda:
        raise Unavailable("needs a GPU")


METHODS = {
    "1 gemm": lambda p: gemms(p, 1),
    "2 gemms": lambda p: gemms(p, 2),
    "3 gemms": lambda p: gemms(p, 3),
    "4 gemms": lambda p: gemms(p, 4),
    "copy": copy,
    "gather_logps, logits given": gather,
    "linear_logps, retain": lambda p: ours(p, retain_bytes=1 << 40),
    "linear_logps, recompute": lambda p: ours(p, retain_bytes=0),
    "linear_logps, forward only": ours_forward_only,
    "log_softmax + gather": full_logits,
    "log_softmax + gather, fp32 logits": full_fp32_logits,
    "torch.compile, chunks": compiled_chunks,
    "F.linear_cross_entropy": torch_linear_cross_entropy,
    "TRL chunked": trl_chunked,
    "TRL selective_log_softmax": trl_selective,
    "Liger cross-entropy": liger_cross_entropy,
    "Liger DPO loss": liger_dpo,
    "CCE exact": lambda p: cut_cross_entropy(p, None),
    "CCE filtered": lambda p: cut_cross_entropy(p, "auto"),
}
NO_GRADIENT = ("1 gemm", "copy", "linear_logps, forward only")
PARTS = (
    "1 gemm",
    "2 gemms",
    "3 gemms",
    "4 gemms",
    "copy",
    "gather_logps, logits given",
)  # not the whole operation


# --- 3. Measuring -------------------------------------------------------------------------------------------------


def run_once(p, forward, backward):
    """(ms of forward, ms of backward); gradients start from None, as after zero_grad()."""
    p.hidden.grad = p.weight.grad = None
    if p.hidden.is_cuda:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        out = forward()
        marks[1].record()
        if backward:
            backward(out)
        marks[2].record()
        marks[2].synchronize()
        return marks[0].elapsed_time(marks[1]), marks[1].elapsed_time(marks[2])
    start = time.perf_counter()
    out = forward()
    middle = time.perf_counter()
    if backward:
        backward(out)
    return (middle - start) * 1e3, (time.perf_counter() - middle) * 1e3


def peak_bytes(p, forward, backward):
    """Peak above the start of the forward pass, or None where it cannot be known."""
    p.hidden.grad = p.weight.grad = None
    gc.collect()
    if p.hidden.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_once(p, forward, backward)
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)  # else pages that malloc has kept would hide what is taken
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    run_once(p, forward, backward)
    return resident("VmHWM") - before


def resident(field):
    status = Path("/proc/self/status").read_text()
    return next(
        int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field)
    )


def exact(p):
    """(log-probs of the sequences, dH, dW) in fp64; (None, None, None) where torch has no memory for it."""
    p = first_tokens(p)
    hidden, weight = (
        t.detach().double().requires_grad_(t.requires_grad) for t in (p.hidden, p.weight)
    )
    try:
        out = reference_logps(hidden, weight, p.labels, p.cu, softcap=p.softcap)
        out.backward(p.coef.double())
    except torch.OutOfMemoryError:
        return None, None, None
    return out.detach(), hidden.grad, weight.grad


def errors(p, method, want):
    p = first_tokens(p)
    p.weight.grad = None
    forward, backward = method(p)
    out = forward()
    found = {"error_nats": (out.detach().double() - want[0]).abs().max().item()}
    if backward:
        backward(out)
        for name, got, right in (
            ("error_dhidden", p.hidden.grad, want[1]),
            ("error_dweight", p.weight.grad, want[2]),
        ):
            if right is not None:
                found[name] = ((got.double() - right).norm() / right.norm()).item()
    return found


def bench(p, names, reps):
    """Rows of one shape: a dict a method, with either its numbers or, in "status", why it has none."""
    rows, ready = {}, {}
    want = exact(p)
    for (
        name
    ) in names:  # make, warm up, measure memory and error: whatever fails here is out of the race
        rows[name] = {"method": name}
        try:
            ready[name] = METHODS[name](p)
            for _ in range(2):
                run_once(p, *ready[name])
            peak, gradients = (
                peak_bytes(p, *ready[name]),
                [t.grad for t in (p.hidden, p.weight) if t.grad is not None],
            )
            rows[name] |= {
                "status": "ok",
                "peak_bytes": peak,
                "gradient_bytes": sum(g.nbytes for g in gradients),
            }
            if name not in PARTS and name != "Liger DPO loss" and want[0] is not None:
                rows[name] |= errors(p, METHODS[name], want)
        except Unavailable as reason:
            rows[name]["status"] = str(reason)
        except ImportError as error:
            rows[name]["status"] = f"not installed ({error})"
        except torch.OutOfMemoryError:
            rows[name]["status"] = "out of memory"
        except Exception as error:  # a peer's own failure is a result: it is printed and stored
            rows[name]["status"] = (
                f"failed: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"
            )
        if rows[name]["status"] != "ok":
            ready.pop(name, None)
    times, products = {name: [] for name in ready}, "2 gemms" if p.frozen else "3 gemms"
    for turn in range(reps):
        for name, run in ready.items():
            slow = turn and min(map(sum, times[name])) > SLOW * min(map(sum, times[products]))
            if not slow or turn % 5 == 0 or turn == reps - 1:
                times[name].append(run_once(p, *run))
    for name, pairs in times.items():
        both = [sum(pair) for pair in pairs]
        row, alone = rows[name], "1 gemm" if name in NO_GRADIENT else products
        row |= {
            "forward_ms": statistics.median(f for f, _ in pairs),
            "backward_ms": statistics.median(b for _, b in pairs),
        }
        row |= {
            "both_ms": statistics.median(both),
            "quartiles_ms": statistics.quantiles(both, n=4)[::2],
        }
        row["rounds"] = len(both)
        if name in ("copy", "gather_logps, logits given"):
            numbers = p.N * p.V * p.hidden.element_size()
            row["gb_per_s"] = (2 if name == "copy" else 3) * numbers / row["both_ms"] / 1e6
        elif name not in PARTS:
            row["tflops"] = 2 * int(alone[0]) * p.N * p.D * p.V / row["both_ms"] / 1e9
            row["over_gemms"] = row["both_ms"] / statistics.median(map(sum, times[alone]))
    p.hidden.grad = p.weight.grad = None
    return list(rows.values())


# --- 4. Where it ran, the table, the figure -------------------------------------------------------------------------


def machine(device):
    """All that the numbers depend on."""

    def output(*command):
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip() if done.returncode == 0 else None

    def version(package):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    packages = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")
    about = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": output("git", "rev-parse", "HEAD") or "unknown",
        "uncommitted": bool(output("git", "status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
    }
    if device == "cuda":
        query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        answer = (
            output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0") or ""
        )
        about |= dict(
            zip(query.split(","), answer.split(", "), strict=False), cuda=torch.version.cuda
        )
    else:
        about |= {
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        }
    return about


def cpu_name():
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def table(rows):
    """One line a row, fixed width; units in the heading."""
    heads = "fwd ms", "bwd ms", "both ms", "x gemm", "TF/s", "GB/s", "peak MB", "nats", "dH", "dW"
    lines = [" " * 36 + "".join(f"{head:>9}" for head in heads)]
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"  {row['method']:34}{row['status'][:90]}")
            continue
        row = row | {"peak": None if row["peak_bytes"] is None else row["peak_bytes"] / 1e6}
        cells = [
            (row.get(key), "9.2f")
            for key in ("forward_ms", "backward_ms", "both_ms", "over_gemms", "tflops")
        ]
        cells += [(row.get(key), "9.0f") for key in ("gb_per_s", "peak")]
        cells += [
            (row.get(key), "9.1e") for key in ("error_nats", "error_dhidden", "error_dweight")
        ]
        lines.append(
            f"  {row['method']:34}"
            + "".join(" " * 9 if v is None else format(v, form) for v, form in cells)
        )
    return "\n".join(line.rstrip() for line in lines)


def plot(results, path):
    """A line of two panels for each shape: time, with the bare products as a dashed line, and peak memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes, about = results["shapes"], results["machine"]
    figure, axes = plt.subplots(
        len(shapes), 2, figsize=(11, 3.1 * len(shapes)), squeeze=False, layout="constrained"
    )
    for (left, right), shape in zip(axes, shapes, strict=True):
        ok = {row["method"]: row for row in shape["rows"] if row["status"] == "ok"}
        rows = [row for name, row in reversed(ok.items()) if name not in (*PARTS, *NO_GRADIENT)]
        names = [row["method"] for row in rows]
        colors = ["C3" if name.startswith("linear_logps") else "C0" for name in names]
        left.barh(names, [row["forward_ms"] for row in rows], color=colors)
        left.barh(
            names,
            [row["backward_ms"] for row in rows],
            left=[row["forward_ms"] for row in rows],
            color=colors,
            alpha=0.5,
        )
        left.axvline(
            ok["2 gemms" if shape["frozen"] else "3 gemms"]["both_ms"],
            color="0.3",
            linestyle="--",
            linewidth=1,
        )
        left.set_xlabel(
            "ms: forward, backward (pale); dashed: its matrix products alone", fontsize=8
        )
        right.barh(names, [(row["peak_bytes"] or 0) / 1e6 for row in rows], color=colors)
        right.set_xlabel("MB: peak above the inputs, gradients included", fontsize=8)
        right.set_yticks([])
        size = f"N {shape['N']:,}, D {shape['D']:,}, V {shape['V']:,}, {shape['dtype']}"
        left.set_title(
            f"{shape['name']}: {size}{', frozen head' * shape['frozen']}", fontsize=9, loc="left"
        )
        for ax in (left, right):
            ax.tick_params(labelsize=8)
            ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{about['device']}, torch {about['versions']['torch']}, {about['date'][:10]}", fontsize=9
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse_args():
    parser = argparse.ArgumentParser("python -m kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    # fmt: off
    add("--shapes", nargs="+", choices=SHAPES, help="problems to run (default: the first seven on CUDA, smollm2-1k on a CPU)")
    add("--dtypes", nargs="+", choices=DTYPES, help="types of the operands (default: bf16 on CUDA, bf16 and fp32 on a CPU)")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help="rows, by the names in METHODS; the bare products always run (default: all)")
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu", help="where to run (default: %(default)s)")
    add("--reps", type=int, default=30, help="rounds; every time is a median over them (default: %(default)s)")
    add("--out", type=Path, default=Path("results/kernel"), metavar="DIR", help="folder of bench.json and bench.png (default: %(default)s)")
    add("--plot", type=Path, metavar="JSON", help="measure nothing: draw the figure of this earlier run beside it")
    # fmt: on
    args = parser.parse_args()
    if args.reps < 2:
        parser.error("--reps must be at least 2")
    args.shapes = args.shapes or DEFAULT_SHAPES[args.device]
    args.dtypes = args.dtypes or {"cuda": ["bf16"], "cpu": ["bf16", "fp32"]}[args.device]
    return args


def main():
    args = parse_args()
    if args.plot:
        plot(json.loads(args.plot.read_text()), args.plot.with_suffix(".png"))
        return
    warnings.filterwarnings(
        "ignore", message=".*linear_cross_entropy.*"
    )  # it says which path it takes; the row shows
    torch.backends.cuda.matmul.allow_tf32 = False
    methods = [name for name in METHODS if name in args.methods or name.endswith(("gemm", "gemms"))]
    results = {
        "command": sys.argv[1:],
        "machine": machine(args.device),
        "reps": args.reps,
        "shapes": [],
    }
    print(json.dumps(results["machine"]))
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.shapes:
        for dtype in args.dtypes:
            shape = dict(zip(("N", "D", "V", "softcap", "frozen"), SHAPES[name], strict=True))
            print(f"{name}, {dtype}: {shape}")
            rows = bench(
                make_problem(**shape, dtype=DTYPES[dtype], device=args.device), methods, args.reps
            )
            print(table(rows), flush=True)
            results["shapes"].append({"name": name, "dtype": dtype, **shape, "rows": rows})
            results["machine_after"] = machine(args.device)  # clocks and temperature under load
            (args.out / "bench.json").write_text(
                json.dumps(results, indent=1) + "\n"
            )  # after each: nothing is lost
    plot(results, args.out / "bench.png")
    print(f"{args.out / 'bench.json'}, {args.out / 'bench.png'}")


if __name__ == "__main__":
    main()
