"""kernels/bench.py: the arithmetic of its columns, rows that cannot run, the JSON and the figure. Tiny shapes."""

import json
import statistics
import sys

import pytest
import torch

from kernels import bench as B

OURS = ["linear_logps, retain", "linear_logps, recompute", "linear_logps, forward only"]


@pytest.fixture
def no_peers(monkeypatch):
    for package in ("trl", "liger_kernel", "cut_cross_entropy"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it now fails


def test_one_command_writes_the_table_the_json_and_the_figure(
    no_peers, tmp_path, monkeypatch, capsys
):
    methods = [
        name for name in B.METHODS if name != "torch.compile, chunks"
    ]  # it may need a C++ compiler, and time
    monkeypatch.setattr(
        sys,
        "argv",
        ["bench", "--shapes", "tiny", "tiny-frozen", "--dtypes", "bf16", "--device", "cpu"],
    )
    sys.argv += ["--reps", "3", "--out", str(tmp_path), "--methods", *methods]
    B.main()
    results = json.loads((tmp_path / "bench.json").read_text())
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    for key in ("date", "commit", "versions", "device", "threads"):
        assert results["machine"][key], key
    for shape in results["shapes"]:
        rows = {row["method"]: row for row in shape["rows"]}
        assert list(rows) == methods
        for name in OURS:
            assert rows[name]["status"] == "ok", rows[name]
            assert rows[name]["error_nats"] < 1e-3
            assert rows[name].get("error_dhidden", 0) < 2e-3
            assert rows[name].get("error_dweight", 0) < 3e-3  # dW of a bf16 product
        assert "error_dhidden" in rows[OURS[0]]
        assert ("error_dweight" in rows[OURS[0]]) == (not shape["frozen"])
        assert rows["log_softmax + gather"]["error_nats"] > 1e-3  # bf16 logits
        for peer in ("TRL chunked", "Liger DPO loss", "CCE filtered"):
            assert rows[peer]["status"].startswith("not installed")
        # TF/s counts what the result needs, not what was computed; x gemm is held against as many bare products
        products = 2 if shape["frozen"] else 3
        for name, count in ((OURS[0], products), (OURS[1], products), (OURS[2], 1)):
            flops = 2 * count * shape["N"] * shape["D"] * shape["V"]
            assert rows[name]["tflops"] * 1e12 * rows[name]["both_ms"] / 1e3 == pytest.approx(flops)
            floor = rows["1 gemm" if count == 1 else f"{count} gemms"]["both_ms"]
            assert rows[name]["over_gemms"] == pytest.approx(rows[name]["both_ms"] / floor)
    printed = capsys.readouterr().out
    assert "linear_logps, retain" in printed
    assert "not installed" in printed

    monkeypatch.setattr(sys, "argv", ["bench", "--plot", str(tmp_path / "bench.json")])
    (tmp_path / "bench.png").unlink()
    B.main()
    assert (tmp_path / "bench.png").exists()


def test_a_method_that_fails_is_a_row_and_the_others_go_on(monkeypatch):
    def broken(p):
        return lambda: 1 / 0, None

    def too_large(p):
        raise torch.OutOfMemoryError

    monkeypatch.setitem(B.METHODS, "broken", broken)
    monkeypatch.setitem(B.METHODS, "too large", too_large)
    names = ["1 gemm", "3 gemms", "broken", "too large", "linear_logps, recompute"]
    p = B.make_problem(64, 8, 50, 0.0, False, torch.float32, "cpu")
    rows = {row["method"]: row for row in B.bench(p, names, 2)}
    assert "ZeroDivisionError" in rows["broken"]["status"]
    assert rows["too large"]["status"] == "out of memory"
    assert rows["linear_logps, recompute"]["status"] == "ok"
    assert "too large" in B.table(list(rows.values()))


def test_methods_take_turns_and_medians_are_reported(monkeypatch):
    order, fake = [], iter(range(1, 100))
    monkeypatch.setitem(B.METHODS, "a", lambda p: (lambda: order.append("a"), None))
    monkeypatch.setitem(B.METHODS, "b", lambda p: (lambda: order.append("b"), None))
    monkeypatch.setattr(B, "PARTS", (*B.PARTS, "a", "b"))
    monkeypatch.setattr(B, "SLOW", float("inf"))  # these products take microseconds
    p = B.make_problem(8, 4, 10, 0.0, False, torch.float32, "cpu")
    B.bench(p, ["1 gemm", "3 gemms", "a", "b"], 5)
    assert "".join(order)[-10:] == "ab" * 5
    monkeypatch.setattr(B, "run_once", lambda *_: (float(next(fake)), 0.0))
    rows = {row["method"]: row for row in B.bench(p, ["1 gemm", "3 gemms", "a"], 5)}
    times = [
        1 + 9 + 2 + 3 * i for i in range(5)
    ]  # nine warm-up and memory runs, then every third is a's
    assert rows["a"]["both_ms"] == statistics.median(times)


@pytest.mark.skipif(sys.platform != "linux", reason="memory of a CPU is read from /proc")
def test_peak_memory_is_what_the_forward_and_backward_pass_take_at_once():
    p = B.make_problem(8, 4, 10, 0.0, False, torch.float32, "cpu")
    million = 1 << 20

    def forward():
        return torch.ones(16 * million)  # 64 MiB

    def backward(out):
        torch.ones(8 * million).sum()  # 32 MiB more, gone at once
        torch.ones(8 * million).sum()

    for _ in range(2):
        assert B.peak_bytes(p, forward, backward) == pytest.approx(96 * million, rel=0.1)


def test_the_full_logits_are_seen_in_the_peak_and_not_in_ours():
    p = B.make_problem(1024, 16, 20011, 0.0, False, torch.float32, "cpu")
    logits = 4 * p.N * p.V
    full, recompute = (
        B.peak_bytes(p, *B.METHODS[name](p)) for name in ("log_softmax + gather", OURS[1])
    )
    if full is not None:
        assert full > 2 * logits
        assert (
            recompute < 0.75 * logits
        )  # a slab of 16 MiB and dW, and pages that the allocator does not give back


def test_outside_a_repository_the_commit_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(B, "__file__", str(tmp_path / "kernels.py"))  # as in a source archive
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert B.machine("cpu")["commit"] == "unknown"
