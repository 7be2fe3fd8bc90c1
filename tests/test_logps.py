"""kernels/logps.py against fp64, in PyTorch, under Triton's interpreter, and compiled for GPUs that are not here.

Tests named test_triton_* run where Triton runs: on CUDA, or on the CPU under TRITON_INTERPRET=1. That variable must be
set before Triton is first imported, so test_the_triton_tests_pass_under_the_interpreter runs them in a second pytest.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import logps as L
from kernels.logps import gather_logps, linear_logps, reference_logps

ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_triton = pytest.mark.skipif(not (INTERPRETED or DEVICE == "cuda"), reason="needs CUDA or TRITON_INTERPRET=1")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

if INTERPRETED and TRITON:
    import triton.language  # noqa: F401  now, while the variable is set: _choose_path takes it away for a while


@pytest.fixture(autouse=True)
def _choose_path(request, monkeypatch):
    """The same numbers on every run; and tests of the PyTorch path take it even in a pytest under the interpreter."""
    torch.manual_seed(0)
    if not request.node.name.startswith("test_triton"):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def head(N, D, V, dtype=torch.float32, device="cpu", spread=5.0, seed=0):
    """hidden, weight, labels with logits of standard deviation `spread`; the labels drawn from the model itself, as
    in a trained one, because uniform labels (logp = -20) would hide errors in the probabilities that matter."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=g).to(dtype)
    weight = (torch.randn(V, D, generator=g) * spread / D**0.5).to(dtype)
    labels = torch.multinomial((hidden.double() @ weight.double().t()).softmax(-1), 1, generator=g).squeeze(-1)
    return hidden.to(device), weight.to(device), labels.to(device)


def leaves(*tensors, dtype=None):
    return [t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in tensors]


def rel(got, want):
    return ((got.double().cpu() - want.double().cpu()).norm() / want.double().norm().cpu()).item()


def compare_with_fp64(hidden, weight, labels, cu=None, *, tol, grad_tol, bias=None, chunk_bytes=None, **settings):
    """Value and gradients of linear_logps, a different coefficient per output, against the fp64 reference."""
    operands = [t for t in (hidden, weight, bias) if t is not None]
    ours, exact = leaves(*operands), leaves(*operands, dtype=torch.float64)
    kw = {"bias": ours[2]} if bias is not None else {}
    got = linear_logps(ours[0], ours[1], labels, cu, chunk_bytes=chunk_bytes, **kw, **settings)
    kw = {"bias": exact[2]} if bias is not None else {}
    want = reference_logps(exact[0], exact[1], labels, cu, **kw, **settings)
    assert got.shape == want.shape
    assert got.dtype == torch.float32
    assert (got.double() - want).abs().max() <= tol
    coef = torch.linspace(-0.1, 0.07, len(got), device=got.device)
    got.backward(coef)
    want.backward(coef.double())
    for g, w in zip(ours, exact, strict=True):
        assert g.grad.dtype == g.dtype
        rounding = (w.grad.to(g.dtype) - w.grad).norm()  # 1.7e-3 in bf16, whoever computes it
        assert (g.grad - w.grad).norm() <= 1.02 * rounding + grad_tol * w.grad.norm() + 1e-7
    return [rel(g.grad, w.grad) for g, w in zip(ours, exact, strict=True)]


# --- gather_logps, PyTorch path ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("N", "V"), [(1, 1), (3, 7), (5, 1000), (1, 49152), (67, 49152)])
def test_gather_equals_fp64_at_any_vocabulary_size(N, V, dtype):
    check_gather(N, V, dtype, "cpu")


def check_gather(N, V, dtype, device, spread=7.0):
    g = torch.Generator().manual_seed(N + V)
    logits = (torch.randn(N, V, generator=g) * spread).to(dtype).to(device)
    labels = torch.multinomial(logits.double().cpu().softmax(-1), 1, generator=g).squeeze(-1).to(device)
    ours, peer, exact = *leaves(logits, logits), *leaves(logits, dtype=torch.float64)
    got, want = gather_logps(ours, labels), reference_logps(exact, None, labels)
    torch_same = peer.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)  # what the type itself allows
    coef = torch.linspace(-0.1, 0.07, N, device=device)
    got.backward(coef)
    want.backward(coef.double())
    torch_same.backward(coef.to(dtype))
    assert got.dtype == torch.float32
    assert (got - want).abs().max() <= (torch_same - want).abs().max() + 1e-5
    ours_error, torch_error = ((x.grad.double() - exact.grad).norm() for x in (ours, peer))
    truncation = 2**-7 if INTERPRETED and dtype == torch.bfloat16 else 0.0  # of bf16 stores, in the interpreter only
    assert ours_error <= torch_error + (1e-6 + truncation) * exact.grad.norm() + 1e-9


def test_gather_takes_leading_dimensions_and_int32_labels():
    logits, labels = torch.randn(2, 3, 5, 11) * 5, torch.randint(0, 11, (2, 3, 5), dtype=torch.int32)
    assert torch.allclose(gather_logps(logits, labels), reference_logps(logits, None, labels), atol=1e-5)
    assert gather_logps(logits[0, 0, 0], labels[0, 0, 0]).shape == ()
    assert gather_logps(logits[:, :-1], labels[:, :-1]).shape == (2, 2, 5)
    assert gather_logps(logits[..., ::2], labels.clamp(max=5)).shape == (2, 3, 5)


def test_adding_a_constant_to_all_logits_changes_nothing():
    logits, labels = torch.randn(9, 1000) * 5, torch.randint(0, 1000, (9,))
    assert torch.allclose(gather_logps(logits + 1000, labels), gather_logps(logits, labels), atol=2e-3)
    assert torch.isfinite(gather_logps(logits - 1e30, labels)).all()


@pytest.mark.parametrize("V", [1, 7, 49152])
def test_equal_logits_give_minus_log_V(V):
    want = -torch.tensor(float(V)).log()
    assert torch.allclose(gather_logps(torch.full((2, V), 3.0), torch.tensor([0, V - 1])), want, atol=1e-6)
    assert torch.allclose(linear_logps(torch.ones(2, 4), torch.ones(V, 4), torch.tensor([0, V - 1])), want, atol=1e-6)


def test_when_every_label_is_ignored_all_is_zero():
    hidden, weight, _ = head(4, 8, 30)
    hidden[1] = float("nan")  # what an ignored row holds must not matter
    labels = torch.full((4,), -100)
    for function, inputs in ((gather_logps, [hidden @ weight.t()]), (linear_logps, [hidden, weight])):
        inputs = leaves(*inputs)
        got = function(*inputs, labels)
        got.sum().backward()
        assert (got == 0).all()
        assert all((x.grad == 0).all() for x in inputs)


def test_another_ignore_index_is_honoured():
    hidden, weight, labels = head(6, 8, 30)
    labels[2] = 0
    assert linear_logps(hidden, weight, labels, ignore_index=0)[2] == 0
    assert linear_logps(hidden, weight, labels)[2] < 0


def check_minus_inf(device):
    logits = torch.randn(4, 6000, device=device) * 5
    logits[:, :4500] = -torch.inf  # more than one block of nothing before the first number
    labels = torch.tensor([5000, 10, -100, 5999], device=device)  # the second is itself a masked word
    ours, exact = *leaves(logits), *leaves(logits, dtype=torch.float64)
    got, want = gather_logps(ours, labels), reference_logps(exact, None, labels)
    assert got[1] == -torch.inf
    assert torch.allclose(got.double(), want, atol=1e-5)
    got[[0, 3]].sum().backward()
    want[[0, 3]].sum().backward()
    assert torch.allclose(ours.grad.double(), exact.grad, atol=1e-6)


def test_logits_of_minus_infinity_have_probability_zero():
    check_minus_inf("cpu")


def test_a_bias_of_minus_infinity_masks_words_even_a_whole_slab_of_them():
    hidden, weight, labels = head(5, 16, 1000)
    bias = torch.zeros(1000)
    bias[:400] = -torch.inf
    labels = labels % 600 + 400
    got = linear_logps(hidden, weight, labels, bias=bias, chunk_bytes=1)
    assert torch.allclose(got, reference_logps(hidden, weight, labels, bias=bias), atol=1e-5)


# --- linear_logps, PyTorch path ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("N", "D", "V"), [(1, 1, 1), (5, 8, 7), (33, 24, 1000), (1, 16, 49152), (64, 64, 5003)])
def test_linear_equals_fp64_at_odd_sizes(N, D, V):
    compare_with_fp64(*head(N, D, V), tol=5e-5, grad_tol=1e-5, chunk_bytes=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{}, {"softcap": 30.0, "logit_scale": 0.7}], ids=["plain", "softcap"])
def test_half_operands_are_within_a_hundredth_of_a_nat_over_128_tokens(dtype, settings):
    hidden, weight, labels = head(256, 64, 8192, dtype)
    cu = torch.tensor([0, 128, 256])
    errors = compare_with_fp64(hidden, weight, labels, cu, tol=0.01, grad_tol=1e-4, chunk_bytes=1 << 20, **settings)
    assert max(errors) < 2e-3
    bf16_logits = reference_logps(hidden @ weight.t(), None, labels, cu)  # and what it is that we avoid:
    if dtype == torch.bfloat16 and not settings:
        assert (bf16_logits - reference_logps(hidden.double(), weight.double(), labels, cu)).abs().max() > 0.02


@pytest.mark.parametrize("settings", [{"softcap": 5.0}, {"logit_scale": -1.7}, {"softcap": 8.0, "logit_scale": 0.3}])
@pytest.mark.parametrize("with_bias", [False, True])
def test_softcap_scale_and_bias_have_their_derivatives(settings, with_bias):
    hidden, weight, labels = head(20, 16, 300)
    bias = torch.randn(300) if with_bias else None
    compare_with_fp64(hidden, weight, labels, bias=bias, tol=5e-5, grad_tol=1e-5, chunk_bytes=1, **settings)


@pytest.mark.parametrize("settings", [{}, {"softcap": 3.0, "logit_scale": 1.3}])
def test_gradcheck_passes_in_fp64(settings, monkeypatch):
    monkeypatch.setattr(L, "MIN_SLAB", 5)  # three slabs of a vocabulary small enough for finite differences
    hidden, weight, labels = head(5, 3, 13, torch.float64, spread=2.0)
    labels[1] = -100
    bias, cu = torch.randn(13, dtype=torch.float64), torch.tensor([0, 2, 2, 5])
    f = lambda h, w, b: linear_logps(h, w, labels, cu, bias=b, chunk_bytes=1, **settings)  # noqa: E731
    assert torch.autograd.gradcheck(f, leaves(hidden, weight, bias))
    assert torch.autograd.gradcheck(lambda z: gather_logps(z, labels), leaves(hidden @ weight.t()))


def test_every_chunk_size_gives_the_unchunked_answer():
    hidden, weight, labels = head(37, 32, 3001)
    results = []
    for chunk_bytes in (1 << 30, 4 * 37 * 1500, 4 * 37 * 257, 1):
        h, w = leaves(hidden, weight)
        out = linear_logps(h, w, labels, chunk_bytes=chunk_bytes)
        out.backward(torch.linspace(-1, 1, 37))
        results.append((out.detach(), h.grad, w.grad))
    for other in results[1:]:
        assert torch.allclose(other[0], results[0][0], atol=2e-5)
        assert all(rel(a, b) < 1e-5 for a, b in zip(other[1:], results[0][1:], strict=True))


def test_sums_of_sequences_and_of_empty_ones():
    hidden, weight, labels = head(10, 8, 50)
    labels[4] = -100
    cu = torch.tensor([0, 0, 3, 3, 5, 10, 10], dtype=torch.int32)
    token = linear_logps(hidden, weight, labels)
    want = torch.stack([part.sum() for part in token.split([0, 3, 0, 2, 5, 0])])
    got = linear_logps(hidden, weight, labels, cu)
    assert torch.allclose(got, want, atol=1e-5)
    assert (got[[0, 2, 5]] == 0).all()
    compare_with_fp64(hidden, weight, labels, cu, tol=5e-5, grad_tol=1e-5)


def test_no_tokens_at_all_give_empty_results_and_zero_gradients():
    hidden, weight, labels = *leaves(torch.zeros(0, 8), torch.randn(50, 8)), torch.zeros(0, dtype=torch.long)
    sums = linear_logps(hidden, weight, labels, torch.tensor([0, 0, 0]))
    (linear_logps(hidden, weight, labels).sum() + sums.sum()).backward()
    assert sums.tolist() == [0.0, 0.0]
    assert linear_logps(hidden, weight, labels, torch.tensor([0])).shape == (0,)
    assert (weight.grad == 0).all()
    assert gather_logps(torch.zeros(0, 5), labels).shape == (0,)


def test_a_tied_weight_gets_both_its_gradients():
    _, weight, labels = head(6, 8, 40)
    tokens = torch.tensor([1, 5, 5, 30, 2, 39])
    grads = []
    for function in (linear_logps, reference_logps):
        (w,) = leaves(weight)
        function(torch.tanh(w[tokens]), w, labels).sum().backward()
        grads.append(w.grad)
    assert rel(*grads) < 1e-5


class Watch(TorchDispatchMode):
    """Counts matrix products, and remembers the size of the largest result of any operation."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm")
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.numel())
        return out


@pytest.mark.parametrize(("frozen", "products"), [("", 3), ("hidden", 2), ("weight", 2)])
def test_a_frozen_operand_saves_its_product_and_gets_no_gradient(frozen, products):
    hidden, weight, labels = head(8, 16, 100)
    h, w = leaves(hidden, weight)
    h.requires_grad_(frozen != "hidden")
    w.requires_grad_(frozen != "weight")
    out = linear_logps(h, w, labels)
    with Watch() as watch:
        out.sum().backward()
    assert watch.products == products
    assert (h.grad is None) == (frozen == "hidden")
    assert (w.grad is None) == (frozen == "weight")


def test_without_a_gradient_nothing_is_kept():
    hidden, weight, labels = head(8, 16, 100)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        assert linear_logps(hidden, weight, labels).grad_fn is None
        assert not kept
        linear_logps(*leaves(hidden, weight), labels)
    assert sorted(map(tuple, kept)) == [(8,), (8,), (8, 16), (100, 16)]  # labels, LSE and the operands: no logits


def test_the_full_logits_never_exist():
    N, D, V = 256, 16, 8192
    hidden, weight, labels = head(N, D, V)
    for call, allowed in ((linear_logps, 256 * N), (reference_logps, None)):
        h, w = leaves(hidden, weight)
        with Watch() as watch:
            kw = {"chunk_bytes": 4 * N * 256} if call is linear_logps else {}
            call(h, w, labels, softcap=20.0, **kw).sum().backward()
        if allowed:
            assert watch.largest <= max(allowed, V * D)  # one slab, or dW
        else:
            assert watch.largest == N * V  # the watch does see them where they are


def test_tokens_without_a_coefficient_are_skipped_and_may_hold_anything():
    hidden, weight, labels = head(6, 8, 40)
    (want,) = leaves(weight)
    linear_logps(hidden[:3], want, labels[:3]).sum().backward()
    hidden[3:] = float("nan")
    h, w = leaves(hidden, weight)
    linear_logps(h, w, labels).backward(torch.tensor([1.0, 1, 1, 0, 0, 0]))
    assert torch.allclose(w.grad, want.grad, atol=1e-6)
    assert (h.grad[3:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeating_gives_the_same_bits(dtype):
    hidden, weight, labels = head(50, 32, 2000, dtype)
    runs = []
    for _ in range(3):
        h, w = leaves(hidden, weight)
        out = linear_logps(h, w, labels, torch.tensor([0, 20, 50]), chunk_bytes=1)
        out.backward(torch.tensor([0.3, -0.2]))
        runs.append((out.detach(), h.grad, w.grad))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_autocast_does_not_reach_the_products():
    hidden, weight, labels = head(16, 32, 500)
    runs = []
    for enabled in (False, True):
        h, w = leaves(hidden, weight)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = linear_logps(h, w, labels)
            out.sum().backward()  # inside as well: nothing forbids it
        runs.append((out.detach(), h.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_nan_is_reported_not_hidden():
    hidden, weight, labels = head(3, 8, 40)
    hidden[1, 0] = float("nan")
    assert linear_logps(hidden, weight, labels).isnan().tolist() == [False, True, False]
    assert gather_logps(hidden @ weight.t(), labels).isnan().tolist() == [False, True, False]


ok_h, ok_w, ok_y = torch.zeros(4, 3), torch.zeros(9, 3), torch.zeros(4, dtype=torch.long)
BAD = {
    "label too large": (lambda: linear_logps(ok_h, ok_w, ok_y + 9), "label"),
    "label negative": (lambda: gather_logps(torch.zeros(4, 9), ok_y - 1), "label"),
    "float labels": (lambda: gather_logps(torch.zeros(4, 9), ok_y.float()), "int64"),
    "labels short": (lambda: linear_logps(ok_h, ok_w, ok_y[:3]), "one a row"),
    "D differs": (lambda: linear_logps(ok_h, torch.zeros(9, 4), ok_y), "hidden"),
    "gather shapes": (lambda: gather_logps(torch.zeros(4, 9), ok_y[:3]), "logits"),
    "types differ": (lambda: linear_logps(ok_h.bfloat16(), ok_w, ok_y), "weight is"),
    "integers": (lambda: linear_logps(ok_h.int(), ok_w.int(), ok_y), "bf16"),
    "bias shape": (lambda: linear_logps(ok_h, ok_w, ok_y, bias=torch.zeros(3)), "bias"),
    "no vocabulary": (lambda: linear_logps(ok_h, ok_w[:0], ok_y), "empty"),
    "cu does not end at N": (lambda: linear_logps(ok_h, ok_w, ok_y, torch.tensor([0, 3])), "cu_seqlens"),
    "cu does not start at 0": (lambda: linear_logps(ok_h, ok_w, ok_y, torch.tensor([1, 4])), "cu_seqlens"),
    "cu falls": (lambda: linear_logps(ok_h, ok_w, ok_y, torch.tensor([0, 3, 2, 4])), "cu_seqlens"),
    "cu float": (lambda: linear_logps(ok_h, ok_w, ok_y, torch.tensor([0.0, 4.0])), "cu_seqlens"),
    "softcap negative": (lambda: linear_logps(ok_h, ok_w, ok_y, softcap=-1.0), "softcap"),
    "no budget": (lambda: linear_logps(ok_h, ok_w, ok_y, chunk_bytes=0), "chunk_bytes"),
}


@pytest.mark.parametrize(("call", "word"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_one_line(call, word):
    with pytest.raises(ValueError, match=word) as error:
        call()
    assert "\n" not in str(error.value)


# --- Triton: on CUDA, or under the interpreter -----------------------------------------------------------------------


@runs_triton
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("N", "V"), [(1, 1), (3, 7), (5, 1000), (2, 4096), (2, 49152)])
def test_triton_gather_equals_fp64_at_any_vocabulary_size(N, V, dtype):
    check_gather(N, V, dtype, DEVICE)


@runs_triton
def test_triton_logits_of_minus_infinity_have_probability_zero():
    check_minus_inf(DEVICE)


@runs_triton
def test_triton_ignored_rows_are_zero_whatever_they_hold():
    logits = torch.randn(4, 5000, device=DEVICE) * 5
    logits[1] = float("nan")
    labels = torch.tensor([3, -100, 4999, 0], device=DEVICE)
    (z,) = leaves(logits)
    got = gather_logps(z, labels)
    got.sum().backward()
    assert got[1] == 0
    assert (z.grad[1] == 0).all()
    assert torch.isfinite(z.grad).all()
    assert gather_logps(logits, labels.where(labels >= 0, 7))[1].isnan()


@runs_triton
def test_triton_reads_rows_at_their_stride():
    wide = torch.randn(6, 300, device=DEVICE) * 5
    labels = torch.randint(0, 100, (6,), device=DEVICE)
    got = gather_logps(wide[:, 50:150], labels)
    assert torch.allclose(got, reference_logps(wide[:, 50:150], None, labels), atol=1e-5)


@runs_triton
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("settings", [{}, {"softcap": 10.0, "logit_scale": 1.4}], ids=["plain", "softcap"])
def test_triton_linear_equals_fp64_over_several_slabs(dtype, settings):
    hidden, weight, labels = head(9, 32, 517, dtype, DEVICE)
    labels[4] = -100
    bias = torch.randn(517, device=DEVICE).to(dtype)
    cu = torch.tensor([0, 4, 4, 9], device=DEVICE)
    # On CUDA dZ is rounded to the operands' type as well: 1.6e-3 in bf16.
    grad_tol = 1e-5 if dtype == torch.float32 else 1e-4 if DEVICE == "cpu" else 2e-3
    compare_with_fp64(hidden, weight, labels, cu, bias=bias, chunk_bytes=1, tol=2e-4, grad_tol=grad_tol, **settings)


@runs_triton
def test_triton_is_what_ran_and_repeats_its_bits(monkeypatch):
    launches = []
    fold = L._kernels().fold
    counting = type("Fold", (), {"__getitem__": lambda self, grid: launches.append(grid) or fold[grid]})()
    monkeypatch.setattr(L._kernels(), "fold", counting)
    hidden, weight, labels = head(3, 16, 300, device=DEVICE)
    first, second = (linear_logps(hidden, weight, labels, chunk_bytes=1) for _ in range(2))
    assert launches == [(3,)] * 6  # slabs of 128, 128 and 44 columns, twice
    assert torch.equal(first, second)


@pytest.mark.skipif(INTERPRETED, reason="this is the pytest that it starts")
@pytest.mark.skipif(not TRITON, reason="Triton is not installed")
def test_the_triton_tests_pass_under_the_interpreter():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "test_triton",
    ]
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b2\d passed", done.stdout), done.stdout
    assert "skipped" not in done.stdout, done.stdout


def test_the_module_works_without_triton():
    code = """
import sys; sys.modules["triton"] = None  # an import of it now fails
import torch
from kernels.logps import gather_logps, linear_logps
assert linear_logps(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, dtype=torch.long)).shape == (2,)
import os; os.environ["TRITON_INTERPRET"] = "1"
try: gather_logps(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
except ImportError: print("no silent fallback")
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT, timeout=120)
    assert done.stdout.strip() == "no silent fallback", done.stdout + done.stderr


COMPILE = """
import re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import logps as L

kernels, tool = L._kernels(), Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
for name, dz in (("fold", None), ("dz", "*fp16"), ("dz", "*bf16"), ("dz", "*fp32")):
    for logits in ("*fp32", "*bf16", "*fp16"):
        if dz and logits not in ("*fp32", dz):
            continue  # gather_logps writes the type it reads, linear_logps reads fp32
        for softcap in (False, True):
            fn = getattr(kernels, name)
            types = dict(logits_ptr=logits, logits_row_stride="i32", labels_ptr="*i64", lse_ptr="*fp32", V="i32",
                         target_ptr="*fp32", coef_ptr="*fp32", dz_ptr=dz, dz_row_stride="i32", first_column="i32",
                         logit_scale="fp32", softcap="fp32", HAS_SOFTCAP="constexpr", BLOCK_V="constexpr")
            signature = {n: types[n] for n in fn.arg_names}
            # what the launcher finds out by itself: pointers, strides and V are multiples of 16
            even = [i for i, n in enumerate(fn.arg_names) if n.endswith(("_ptr", "stride")) or n == "V"]
            source = ASTSource(fn, signature, dict(HAS_SOFTCAP=softcap, BLOCK_V=L.BLOCK_V),
                               {(i,): [["tt.divisibility", 16]] for i in even})
            for sm in map(int, sys.argv[1:]):
                binary = triton.compile(source, target=GPUTarget("cuda", sm, 32),
                                        options=dict(num_warps=L.NUM_WARPS, enable_fp_fusion=True))
                with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
                    f.write(binary.asm["cubin"]); f.flush()
                    usage = subprocess.check_output([tool, "-res-usage", f.name], text=True)
                registers, stack, local = (int(re.search(k + r":(\\d+)", usage)[1]) for k in ("REG", "STACK", "LOCAL"))
                wide = len(re.findall(r"ld\\.global[.\\w:]*\\.v4\\.b32", binary.asm["ptx"]))
                print("RESULT", sm, name, logits, dz, softcap, registers, stack, local, wide)
"""


@pytest.mark.skipif(not TRITON, reason="Triton is not installed")
def test_the_kernels_compile_for_sm_80_and_sm_90_without_spills_and_with_16_byte_loads(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMPILE, "80", "90"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert len(rows) == 2 * 2 * (3 + 5)  # targets, softcap, type pairs
    for *which, registers, stack, local, wide in rows:
        assert int(registers) <= 128, which
        assert int(stack) == int(local) == 0, which
        assert int(wide) >= (4 if "*fp32" == which[2] else 2), which  # 16 logits a thread


def test_row_offsets_pass_2_to_the_31():
    """8,193 rows of 262,144 logits end past 2**31 elements; the kernels' own first lines, run on such a row."""
    source = Path(L.__file__).read_text()
    assert source.count("row = tl.program_id(0).to(tl.int64)") == 2
    row, stride = torch.tensor(8192, dtype=torch.int32), torch.tensor(262144, dtype=torch.int32)
    assert (row * stride).item() != 2**31  # int32 wraps
    assert (row.to(torch.int64) * stride).item() == 2**31


def test_the_repo_root_does_not_break_transformers_by_the_name_kernels():
    code = (
        "import kernels, torch; from transformers import LlamaConfig, LlamaForCausalLM\n"
        "m = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,"
        " num_attention_heads=2, num_key_value_heads=2))\n"
        "print(m(torch.zeros(1, 3, dtype=torch.long)).logits.shape[-1], kernels.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.split()[:1] == ["32"], done.stderr
    assert str(ROOT) in done.stdout


@pytest.mark.skipif(DEVICE != "cuda", reason="needs CUDA")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_cuda_linear_is_exact_at_a_real_size(dtype):
    hidden, weight, labels = head(512, 576, 49152, dtype, "cuda")
    cu = torch.tensor([0, 128, 128, 512], device="cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    compare_with_fp64(
        hidden, weight, labels, cu, tol=0.02, grad_tol=2e-3 if dtype != torch.float32 else 1e-4, chunk_bytes=8 << 20
    )
