"""The pictures of README.md, all made from files in results/.

    python results/pictures.py

results/study/sentiment.summary.json -> results/pictures/study.svg      the methods side by side
results/demo/rdpo.run.json           -> results/pictures/losses.svg     loss and gradient, at its tau
results/bench-train/result.json      -> results/pictures/trainer.svg    what each feature brings
results/kernel/bench.json, results/gpu/kernel/bench.json -> results/pictures/kernel.svg
"""

import json
import sys
from pathlib import Path
from statistics import median

import matplotlib
import torch
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS.parent))

from train import preference_loss  # noqa: E402

METHODS = {  # of the study: label. In the order of the picture, from top to bottom.
    "base": "base model, untrained",
    "self-refine": "self-refine, untrained",
    "dsc": "dSC: SFT on accepted revisions",
    "dpo": "DPO",
    "dpo-accept": "DPO on accepted pairs",
    "rdpo": "rdpo",
    "rdpo-margin": "rdpo-margin",
    "robust": "robust DPO",
}
LOSSES = {"rdpo-margin": ("C1", "-"), "rdpo": ("C0", "-"), "dpo": ("k", ":")}  # color, line
FEATURES = {  # of train.py, as result.json calls what was off: label. "": nothing, the rest is beside it.
    "": "train.py, two pairs packed",
    "one pair": "train.py, pair by pair",
    "sharing": "without prefix sharing",
    "attention by parts": "without attention segment by segment",
    "caching": "without cached reference log-probs",
    "kernel": "without the kernel",
    "completion-only head": "with logits of the prompt too",
}
SETS = {"prompt-heavy": "Long prompts", "answer-heavy": "Long answers"}
KERNELS = {  # as bench.json calls the implementation: label
    "linear_logps, retain": "ours",
    "linear_logps, recompute": "ours, retain_bytes=0",
    "log_softmax + gather": "log_softmax, bf16 logits",
    "log_softmax + gather, fp32 logits": "log_softmax, fp32 logits",
    "TRL selective_log_softmax": "TRL, bf16 logits",
    "torch.compile, chunks": "torch.compile, bf16 logits",
}


def read(name):
    return json.loads((RESULTS / name).read_text())


# ---- what the pictures show ----------------------------------------------------------------------
def study_bars():
    """[(label, metric (mean, low, high), share that is positive and ends, seeds)] in per cent."""
    found = {}
    for row in read("study/sentiment.summary.json")["rows"]:
        if (row["kind"], row["start"]) == ("conversation", "base"):
            found[row["method"]] = row

    bars = []
    for method, label in METHODS.items():
        row = found[method]
        metric = [100 * value for value in row["metric"][:3]]
        bars.append((label, metric, 100 * row["whole"][0], len(row["seeds"])))
    return bars


def prompt_count():
    """How many test prompts the methods of the study answer."""
    rows = read("study/sentiment.summary.json")["rows"]
    return max(row["groups"] for row in rows if row["method"] in METHODS)


def loss_curves(kind, delta, z, settings):
    """(losses, their gradients on z) at the margins z, for a reward gap of delta root mean squares."""
    z = z.clone().requires_grad_()
    # beta times the log-ratio of chosen is z, if that of rejected is 0.
    logps = torch.stack([z / settings["beta"], torch.zeros_like(z)], dim=1)
    gaps = torch.full_like(z, delta)
    losses, _ = preference_loss(
        logps, torch.zeros_like(logps), gaps, torch.ones_like(logps), kind=kind, **settings
    )
    losses.sum().backward()
    return losses.detach(), z.grad


def trainer_bars(name):
    """[(label, answer tokens a second at the median step, the slowest, the fastest)] of one set."""
    rows = [row for row in read("bench-train/result.json")["measured"] if row["set"] == name]
    best = max(
        (row for row in rows if row["who"] == "trl"), key=lambda row: row["tokens_per_second"]
    )
    picked = [("TRL DPOTrainer, its fastest", best)]
    for off, label in FEATURES.items():
        row = next(row for row in rows if row["who"] == "ours" and row["off"] == off)
        picked.append((label, row))

    bars = []
    for label, row in picked:
        speed, seconds = row["tokens_per_second"], row["seconds"]
        tokens = speed * median(seconds)  # of a step
        bars.append((label, speed, tokens / max(seconds), tokens / min(seconds)))
    return bars


def kernel_bars(name, shape):
    """([(label, ms, bytes, error in nats)], the shape) of the bf16 operands of one shape."""
    shapes = [s for s in read(name)["shapes"] if s["name"] == shape and s["dtype"] == "bf16"]
    rows = {row["method"]: row for row in shapes[0]["rows"]}
    bars = []
    for method, label in KERNELS.items():
        row = rows[method]
        bars.append((label, row["both_ms"], row["peak_bytes"], row["error_nats"]))
    return bars, shapes[0]


# ---- the pictures --------------------------------------------------------------------------------
def draw_study():
    bars = study_bars()
    figure = Figure((8, 4.3), layout="constrained")
    axis = figure.subplots()
    for y, (label, (mean, low, high), ended, _) in enumerate(bars):
        color = "C0" if label.startswith("rdpo") else "C7"
        first = y == 0
        axis.barh(y, mean, color=color, alpha=0.35, label="positive, cut off" if first else None)
        axis.barh(y, ended, color=color, label="positive, and ended" if first else None)
        axis.plot([low, high], [y, y], "k-|", label="95 % interval" if first else None)
        note = f"{mean:.0f} %, {ended:.0f} ended"
        axis.annotate(note, (high, y), (6, 0), textcoords="offset points", va="center")
    axis.set_yticks(range(len(bars)), [f"{label} ({seeds})" for label, _, _, seeds in bars])
    axis.invert_yaxis()
    axis.set_xlim(0, 135)
    axis.set_xticks(range(0, 101, 20))
    axis.set_xlabel(f"positive answers to {prompt_count()} unseen requests for bad reviews, %")
    figure.suptitle("How often is the review a positive one? (in brackets: training seeds)")
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower right", ncols=3, frameon=False)
    return figure


def draw_losses():
    run = read("demo/rdpo.run.json")
    settings = {"beta": run["beta"], "tau": run["tau"]}
    figure = Figure((8, 4.8), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey="row")
    z = torch.linspace(-10, 10, 401)
    titles = {
        -1.0: "the revision lost, Δ = -1",
        0.0: "a tie, Δ = 0",
        1.0: "the revision won, Δ = 1",
    }
    for column, (delta, title) in enumerate(titles.items()):
        loss_axis, slope_axis = axes[:, column]
        loss_axis.set_title(title)
        for kind, (color, line) in LOSSES.items():
            losses, slopes = loss_curves(kind, delta, z, settings)
            style = {"color": color, "linestyle": line, "label": None if column else kind}
            loss_axis.plot(z, losses, linewidth=2, **style)
            slope_axis.plot(z, slopes, linewidth=2, **(style | {"label": None}))
        slope_axis.axhline(0, color="k", linewidth=0.8)
        slope_axis.set_xlabel("margin z, nats")
        for axis in (loss_axis, slope_axis):
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("loss, nats")
    axes[1, 0].set_ylabel("gradient of the loss on z")
    figure.suptitle(
        f"Below 0 a step raises z; above 0 it lowers z (Δ in root mean squares, τ = {settings['tau']:g})"
    )
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_trainer():
    figure = Figure((8, 5.2), layout="constrained")
    axes = figure.subplots(2, 1)
    rows = read("bench-train/result.json")["measured"]
    for axis, (name, title) in zip(axes, SETS.items(), strict=True):
        size = next(row for row in rows if row["set"] == name)
        bars = trainer_bars(name)
        trl = bars[0][1]
        for y, (label, speed, low, high) in enumerate(bars):
            color = "C7" if label.startswith("TRL") else "C0"
            axis.barh(y, speed, color=color, alpha=1 if y < 3 else 0.5)
            axis.plot([low, high], [y, y], "k-|")
            note = f"{speed:.0f}, {speed / trl:.1f} times TRL" if y else f"{speed:.0f}"
            axis.annotate(note, (high, y), (6, 0), textcoords="offset points", va="center")
        axis.set_yticks(range(len(bars)), [bar[0] for bar in bars])
        axis.invert_yaxis()
        axis.set_xlim(0, 1.5 * max(high for *_, high in bars))
        tokens = f"{size['prompt_tokens']} tokens, two answers of {size['answer_tokens']}"
        axis.set_title(f"{title}: {tokens}")
        axis.grid(axis="x", alpha=0.3)
    axes[1].set_xlabel("answer tokens a second, more is better (lines: slowest and fastest step)")
    return figure


def draw_kernel():
    figure = Figure((8, 5.6), layout="constrained")
    places = (
        ("gpu/kernel/bench.json", "llama3", "One H200"),
        ("kernel/bench.json", "smollm2-1k", "Two CPU cores"),
    )
    for part, (name, shape, where) in zip(figure.subfigures(2, 1), places, strict=True):
        bars, size = kernel_bars(name, shape)
        part.suptitle(
            f"{where}: {size['N']:,} tokens, hidden size {size['D']:,}, vocabulary {size['V']:,}"
        )
        axes = part.subplots(1, 3, sharey=True)
        units = (
            ("forward and backward, ms", 1),
            ("peak memory, MB", 1e-6),
            ("error of a sum, nats", 1),
        )
        for column, (axis, (unit, scale)) in enumerate(zip(axes, units, strict=True), 1):
            values = [scale * bar[column] for bar in bars]
            colors = ["C0" if bar[0].startswith("ours") else "C7" for bar in bars]
            axis.barh(range(len(bars)), values, color=colors)
            axis.set_xlabel(unit)
            if unit.startswith("error"):
                axis.set_xscale("log")
                axis.set_xlim(1e-5, 40)
            else:
                axis.set_xlim(0, 1.6 * max(values))
            for y, value in enumerate(values):
                text = f"{value:.0e}" if unit.startswith("error") else f"{value:,.0f}"
                axis.annotate(text, (value, y), (4, 0), textcoords="offset points", va="center")
        axes[0].set_yticks(range(len(bars)), [bar[0] for bar in bars])
        axes[0].invert_yaxis()
    return figure


PICTURES = {
    "study": draw_study,
    "losses": draw_losses,
    "trainer": draw_trainer,
    "kernel": draw_kernel,
}


def main(folder=RESULTS / "pictures", form="svg"):
    # Without dates and random names, so that the same numbers give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "rdpo"
    metadata = {"Date": None} if form == "svg" else None
    folder.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        draw().savefig(folder / f"{name}.{form}", metadata=metadata)


if __name__ == "__main__":
    main()
