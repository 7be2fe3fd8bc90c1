"""kernels/logps.py against fp64, in PyTorch, under Triton's interpreter, and compiled for GPUs that are not here.

Tests named test_triton_* run where Triton runs: on CUDA, or on the CPU under TRITON_INTERPRET=1. That variable must be
set before Triton is first imported, so test_the_triton_tests_pass_under_the_interpreter runs them in a second pytest.
"""

import functools
import importlib.util
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import logps as L
from kernels.bench import reference_logps
from kernels.logps import gather_logps, linear_logps

ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A CPU makes dW of bf16 weights in one bf16 product, of dZ rounded to bf16: 2.6e-3 at most was seen, where rounding the
# result alone costs 1.7e-3
DWEIGHT = 3e-3
runs_triton = pytest.mark.skipif(
    not (INTERPRETED or DEVICE == "cuda"), reason="needs CUDA or TRITON_INTERPRET=1"
)
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
    labels = torch.multinomial(
        (hidden.double() @ weight.double().t()).softmax(-1), 1, generator=g
    ).squeeze(-1)
    return hidden.to(device), weight.to(device), labels.to(device)


def leaves(*tensors, dtype=None):
    return [t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in tensors]


def rel(got, want):
    return ((got.double().cpu() - want.double().cpu()).norm() / want.double().norm().cpu()).item()


RETAIN, RECOMPUTE = 1 << 40, 0  # retain_bytes: more than any test needs, and none


def compare_with_fp64(
    hidden, weight, labels, cu=None, *, tol, grad_tol, bias=None, chunk_bytes=None, **settings
):
    """Value and gradients of linear_logps in both modes, a different coefficient per output, against the fp64
    reference; what is retained may cost the gradients another 1.5e-4, a dZ in bf16 dW another 0.75e-3. Returns the
    errors of the last, RETAIN."""
    operands = [t for t in (hidden, weight, bias) if t is not None]
    exact = leaves(*operands, dtype=torch.float64)
    want = reference_logps(
        *exact[:2], labels, cu, **({"bias": exact[2]} if bias is not None else {}), **settings
    )
    coef = torch.linspace(-0.1, 0.07, len(want), device=want.device)
    want.backward(coef.double())
    for retain_bytes in (RECOMPUTE, RETAIN):
        ours = leaves(*operands)
        kw = {"bias": ours[2]} if bias is not None else {}
        got = linear_logps(
            *ours[:2],
            labels,
            cu,
            chunk_bytes=chunk_bytes,
            retain_bytes=retain_bytes,
            **kw,
            **settings,
        )
        assert got.shape == want.shape
        assert got.dtype == torch.float32
        assert (got.double() - want).abs().max() <= tol
        got.backward(coef)
        for g, w in zip(ours, exact, strict=True):
            assert g.grad.dtype == g.dtype
            rounding = (w.grad.to(g.dtype) - w.grad).norm()  # 1.7e-3 in bf16, whoever computes it
            if g is ours[1] and g.dtype == torch.bfloat16 and g.device.type == "cpu":
                rounding = torch.hypot(rounding, 1.6e-3 * w.grad.norm())  # of dZ to bf16
            error, allowed = (g.grad - w.grad).norm(), grad_tol + (1.5e-4 if retain_bytes else 0)
            assert error <= 1.02 * rounding + allowed * w.grad.norm() + 1e-7, (
                f"retain_bytes {retain_bytes}"
            )
    return [rel(g.grad, w.grad) for g, w in zip(ours, exact, strict=True)]


# --- gather_logps, PyTorch path ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("N", "V"), [(1, 1), (3, 7), (5, 1000), (1, 49152), (67, 49152)])
def test_gather_equals_fp64_at_any_vocabulary_size(N, V, dtype):
    check_gather(N, V, dtype, "cpu")


def check_gather(N, V, dtype, device, spread=7.0):
    g = torch.Generator().manual_seed(N + V)
    logits = (torch.randn(N, V, generator=g) * spread).to(dtype).to(device)
    labels = (
        torch.multinomial(logits.double().cpu().softmax(-1), 1, generator=g).squeeze(-1).to(device)
    )
    ours, peer, exact = *leaves(logits, logits), *leaves(logits, dtype=torch.float64)
    got, want = gather_logps(ours, labels), reference_logps(exact, None, labels)
    torch_same = (
        peer.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    )  # what the type itself allows
    coef = torch.linspace(-0.1, 0.07, N, device=device)
    got.backward(coef)
    want.backward(coef.double())
    torch_same.backward(coef.to(dtype))
    assert got.dtype == torch.float32
    assert (got - want).abs().max() <= (torch_same - want).abs().max() + 1e-5
    ours_error, torch_error = ((x.grad.double() - exact.grad).norm() for x in (ours, peer))
    # p = exp(z - lse) has the error of an fp32 lse, one unit in its last place
    rounding = 2**-23 * exact.logsumexp(-1).abs().max()
    if INTERPRETED and dtype == torch.bfloat16:
        rounding += 2**-7  # of bf16 stores, in the interpreter only
    assert ours_error <= torch_error + (1e-6 + rounding) * exact.grad.norm() + 1e-9


def test_gather_takes_leading_dimensions_and_int32_labels():
    logits, labels = (
        torch.randn(2, 3, 5, 11) * 5,
        torch.randint(0, 11, (2, 3, 5), dtype=torch.int32),
    )
    assert torch.allclose(
        gather_logps(logits, labels), reference_logps(logits, None, labels), atol=1e-5
    )
    assert gather_logps(logits[0, 0, 0], labels[0, 0, 0]).shape == ()
    assert gather_logps(logits[:, :-1], labels[:, :-1]).shape == (2, 2, 5)
    assert gather_logps(logits[..., ::2], labels.clamp(max=5)).shape == (2, 3, 5)


def test_adding_a_constant_to_all_logits_changes_nothing():
    logits, labels = torch.randn(9, 1000) * 5, torch.randint(0, 1000, (9,))
    assert torch.allclose(
        gather_logps(logits + 1000, labels), gather_logps(logits, labels), atol=2e-3
    )
    assert torch.isfinite(gather_logps(logits - 1e30, labels)).all()


@pytest.mark.parametrize("V", [1, 7, 49152])
def test_equal_logits_give_minus_log_V(V):
    want = -torch.tensor(float(V)).log()
    assert torch.allclose(
        gather_logps(torch.full((2, V), 3.0), torch.tensor([0, V - 1])), want, atol=1e-6
    )
    assert torch.allclose(
        linear_logps(torch.ones(2, 4), torch.ones(V, 4), torch.tensor([0, V - 1])), want, atol=1e-6
    )


def test_when_every_label_is_ignored_all_is_zero():
    hidden, weight, _ = head(4, 8, 30)
    hidden[1] = float("nan")  # what an ignored row holds must not matter
    labels = torch.full((4,), -100)
    for function, inputs in (
        (gather_logps, [hidden @ weight.t()]),
        (linear_logps, [hidden, weight]),
    ):
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
    labels = torch.tensor(
        [5000, 10, -100, 5999], device=device
    )  # the second is itself a masked word
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


@pytest.mark.parametrize(
    ("N", "D", "V"), [(1, 1, 1), (5, 8, 7), (33, 24, 1000), (1, 16, 49152), (64, 64, 5003)]
)
def test_linear_equals_fp64_at_odd_sizes(N, D, V):
    compare_with_fp64(*head(N, D, V), tol=5e-5, grad_tol=1e-5, chunk_bytes=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "settings", [{}, {"softcap": 30.0, "logit_scale": 0.7}], ids=["plain", "softcap"]
)
def test_half_operands_are_within_a_hundredth_of_a_nat_over_128_tokens(dtype, settings):
    hidden, weight, labels = head(256, 64, 8192, dtype)
    cu = torch.tensor([0, 128, 256])
    errors = compare_with_fp64(
        hidden, weight, labels, cu, tol=0.01, grad_tol=1e-4, chunk_bytes=1 << 20, **settings
    )
    assert errors[0] < 2e-3 and errors[1] < DWEIGHT
    bf16_logits = reference_logps(
        hidden @ weight.t(), None, labels, cu
    )  # and what it is that we avoid:
    if dtype == torch.bfloat16 and not settings:
        assert (
            bf16_logits - reference_logps(hidden.double(), weight.double(), labels, cu)
        ).abs().max() > 0.02


@pytest.mark.parametrize(
    "settings", [{"softcap": 5.0}, {"logit_scale": -1.7}, {"softcap": 8.0, "logit_scale": 0.3}]
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_softcap_scale_and_bias_have_their_derivatives(settings, with_bias):
    hidden, weight, labels = head(20, 16, 300)
    bias = torch.randn(300) if with_bias else None
    compare_with_fp64(
        hidden, weight, labels, bias=bias, tol=5e-5, grad_tol=1e-5, chunk_bytes=1, **settings
    )


@pytest.mark.parametrize("settings", [{}, {"softcap": 3.0, "logit_scale": 1.3}])
def test_gradcheck_passes_in_fp64(settings, monkeypatch):
    monkeypatch.setattr(
        L, "ALIGN", 5
    )  # three slabs of a vocabulary small enough for finite differences
    hidden, weight, labels = head(5, 3, 13, torch.float64, spread=2.0)
    labels[1] = -100
    bias, cu = torch.randn(13, dtype=torch.float64), torch.tensor([0, 2, 2, 5])
    coef = torch.tensor([0.3, 1.0, -0.7], dtype=torch.float64)

    # One number comes out, so that the first backward, the only one to find something retained, gives all of it.
    def loss(function, *x, **kw):
        return coef @ function(*x[:2], labels, cu, bias=x[2], **settings, **kw)

    for retain_bytes in (0, 8 * 4 * 5, RETAIN):  # nothing, the first of the three slabs, all
        ours = functools.partial(loss, linear_logps, chunk_bytes=1, retain_bytes=retain_bytes)
        assert torch.autograd.gradcheck(ours, leaves(hidden, weight, bias), nondet_tol=1e-12)
    assert torch.autograd.gradcheck(
        functools.partial(loss, reference_logps), leaves(hidden, weight, bias)
    )
    assert torch.autograd.gradcheck(lambda z: gather_logps(z, labels), leaves(hidden @ weight.t()))


def test_every_chunk_size_gives_the_unchunked_answer():
    hidden, weight, labels = head(37, 32, 3001)
    results = []
    for chunk_bytes in (1 << 30, 4 * 37 * 1500, 4 * 37 * 257, 1):
        h, w = leaves(hidden, weight)
        out = linear_logps(h, w, labels, chunk_bytes=chunk_bytes, retain_bytes=0)
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
    hidden, weight, labels = (
        *leaves(torch.zeros(0, 8), torch.randn(50, 8)),
        torch.zeros(0, dtype=torch.long),
    )
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


def run_mode(hidden, weight, labels, retain_bytes, slabs=1, **kw):
    """(log-probs, dH, dW, products): one forward and backward, the vocabulary in `slabs` slabs."""
    h, w = leaves(hidden, weight)
    chunk_bytes = -(-len(weight) // slabs) * 4 * max(1, len(hidden))
    with Watch() as watch:
        out = linear_logps(h, w, labels, chunk_bytes=chunk_bytes, retain_bytes=retain_bytes, **kw)
        out.backward(torch.linspace(-1, 1, len(out)))
    return out.detach(), h.grad, w.grad, watch.products


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    "settings", [{}, {"softcap": 20.0, "logit_scale": 0.8}], ids=["plain", "softcap"]
)
def test_the_modes_agree_and_any_budget_between_them_costs_in_proportion(settings, dtype):
    slabs = 4
    N = 32 * dtype.itemsize  # so that `slabs` is right for both
    hidden, weight, labels = head(N, 64 if dtype == torch.float32 else 16, 128 * slabs, dtype)
    slab_bytes = dtype.itemsize * N * 128
    close = 2e-6 if dtype == torch.float32 else 5e-4  # the gradients are fp16 themselves
    budgets = [0, slab_bytes - 1, slab_bytes, 3 * slab_bytes, 4 * slab_bytes]
    runs = [run_mode(hidden, weight, labels, budget, slabs, **settings) for budget in budgets]
    assert [run[3] for run in runs] == [
        4 * slabs - kept for kept in (0, 0, 1, 3, 4)
    ]  # 8NDV ... 6NDV
    for run in runs[1:]:
        assert torch.equal(run[0], runs[0][0])  # the value does not know the mode
        assert rel(run[1], runs[0][1]) < close
        assert rel(run[2], runs[0][2]) < close
    assert torch.equal(runs[1][2], runs[0][2])
    assert not torch.equal(runs[4][2], runs[0][2])  # another way to the same


@pytest.mark.parametrize(("frozen", "products"), [("", 3), ("hidden", 2), ("weight", 2)])
def test_a_frozen_operand_saves_its_product_and_gets_no_gradient(frozen, products):
    hidden, weight, labels = head(8, 16, 100)
    for retain_bytes in (RETAIN, RECOMPUTE):
        h, w = leaves(hidden, weight)
        h.requires_grad_(frozen != "hidden")
        w.requires_grad_(frozen != "weight")
        with Watch() as watch:
            linear_logps(h, w, labels, retain_bytes=retain_bytes).sum().backward()
        assert watch.products == products + (retain_bytes == RECOMPUTE)
        assert (h.grad is None) == (frozen == "hidden")
        assert (w.grad is None) == (frozen == "weight")


def test_recompute_keeps_two_numbers_a_token_and_forward_only_nothing(monkeypatch):
    hidden, weight, labels = head(8, 16, 100)
    kept, keep, fold = [], [], L._update
    monkeypatch.setattr(
        L, "_update", lambda *args: keep.append(args[-1] is not None) or fold(*args)
    )
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        assert linear_logps(hidden, weight, labels, retain_bytes=RETAIN).grad_fn is None
        with torch.no_grad():
            linear_logps(*leaves(hidden, weight), labels, retain_bytes=RETAIN)
        assert not kept
        assert keep == [False, False]
        linear_logps(*leaves(hidden, weight), labels, retain_bytes=RECOMPUTE)
    assert keep == [False] * 3
    assert sorted(map(tuple, kept)) == [(8,)] * 3 + [
        (8, 16),
        (100, 16),
    ]  # labels, LSE, z[y]; operands, kept anyway


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_what_is_retained_has_two_or_four_bytes_a_logit_and_goes_chunk_by_chunk(
    monkeypatch, dtype, size
):
    hidden, weight, labels = head(6, 16, 128 * 4, dtype)
    kept, left, fold, dz = [], [], L._update, L._dlogits

    def remember(*args):
        kept.append(weakref.ref(args[7]))
        assert args[7].dtype.itemsize == size and args[7].shape == (6, 128)
        return fold(*args)

    def count(x, peak, *rest):
        assert peak is not None and x.dtype.itemsize == size
        left.append(sum(e() is not None for e in kept))
        return dz(x, peak, *rest)

    monkeypatch.setattr(L, "_update", remember)
    monkeypatch.setattr(L, "_dlogits", count)
    out = linear_logps(*leaves(hidden, weight), labels, chunk_bytes=1, retain_bytes=RETAIN)
    out.sum().backward()
    assert left == [4, 3, 2, 1]


def test_a_second_backward_through_a_kept_graph_recomputes():
    hidden, weight, labels = head(9, 16, 300)
    h, w = leaves(hidden, weight)
    out = linear_logps(h, w, labels, retain_bytes=RETAIN)
    grads = [torch.autograd.grad(out.sum(), (h, w), retain_graph=True) for _ in range(3)]
    recomputed = torch.autograd.grad(
        linear_logps(h, w, labels, retain_bytes=RECOMPUTE).sum(), (h, w)
    )
    assert all(rel(a, b) < 1e-4 for a, b in zip(grads[0], recomputed, strict=True))
    assert all(
        torch.equal(a, b) for later in grads[1:] for a, b in zip(later, recomputed, strict=True)
    )
    (twice,) = torch.autograd.grad(linear_logps(h, w, labels).sum(), h, create_graph=True)
    with pytest.raises(
        RuntimeError, match="does not require grad"
    ):  # a second derivative is refused
        twice.sum().backward()


@pytest.mark.parametrize("N", [0, 1])
def test_no_token_and_one_token_work_in_both_modes(N):
    for retain_bytes in (RETAIN, RECOMPUTE):
        hidden, weight, labels = head(max(N, 1), 8, 131)
        out, dh, dw, _ = run_mode(hidden[:N], weight, labels[:N], retain_bytes)
        assert out.shape == (N,)
        assert dh.shape == (N, 8)
        assert torch.isfinite(dw).all() and (dw == 0).all() == (N == 0)


def test_the_full_logits_never_exist():
    N, D, V = 256, 16, 8192
    hidden, weight, labels = head(N, D, V)
    for call, allowed in ((linear_logps, 256 * N), (reference_logps, None)):
        h, w = leaves(hidden, weight)
        with Watch() as watch:
            kw = (
                {"chunk_bytes": 4 * N * 256, "retain_bytes": RETAIN} if call is linear_logps else {}
            )
            call(h, w, labels, softcap=20.0, **kw).sum().backward()
        if allowed:
            assert watch.largest <= max(allowed, V * D)  # one slab, or dW
        else:
            assert watch.largest == N * V  # the watch does see them where they are


@pytest.mark.parametrize("retain_bytes", [RETAIN, RECOMPUTE])
def test_tokens_without_a_coefficient_are_skipped_and_may_hold_anything(retain_bytes):
    hidden, weight, labels = head(6, 8, 40)
    labels[4] = -100
    (want,) = leaves(weight)
    linear_logps(hidden[:3], want, labels[:3], retain_bytes=RECOMPUTE).sum().backward()
    hidden[3:] = float("nan")
    h, w = leaves(hidden, weight)
    out = linear_logps(h, w, labels, retain_bytes=retain_bytes)
    out.backward(torch.tensor([1.0, 1, 1, 0, 7, 0]), retain_graph=True)
    assert rel(w.grad, want.grad) < 1e-4
    assert (h.grad[3:] == 0).all()
    h.grad = w.grad = None
    out.backward(torch.zeros(6))
    assert (h.grad == 0).all()
    assert (w.grad == 0).all()


@pytest.mark.parametrize("retain_bytes", [RETAIN, 2 * 50 * 500, RECOMPUTE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeating_gives_the_same_bits(dtype, retain_bytes):
    hidden, weight, labels = head(50, 32, 2000, dtype)
    runs = []
    for _ in range(3):
        h, w = leaves(hidden, weight)
        out = linear_logps(
            h, w, labels, torch.tensor([0, 20, 50]), chunk_bytes=1, retain_bytes=retain_bytes
        )
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
    "labels short": (lambda: linear_logps(ok_h, ok_w, ok_y[:3]), "labels"),
    "gather shapes": (lambda: gather_logps(torch.zeros(4, 9), ok_y[:3]), "labels"),
    "no vocabulary": (lambda: linear_logps(ok_h, ok_w[:0], ok_y), "label"),
    "cu does not end at N": (
        lambda: linear_logps(ok_h, ok_w, ok_y, torch.tensor([0, 3])),
        "cu_seqlens",
    ),
    "cu does not start at 0": (
        lambda: linear_logps(ok_h, ok_w, ok_y, torch.tensor([1, 4])),
        "cu_seqlens",
    ),
    "cu falls": (lambda: linear_logps(ok_h, ok_w, ok_y, torch.tensor([0, 3, 2, 4])), "cu_seqlens"),
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
@pytest.mark.parametrize(
    "settings", [{}, {"softcap": 10.0, "logit_scale": 1.4}], ids=["plain", "softcap"]
)
def test_triton_linear_equals_fp64_over_several_slabs(dtype, settings):
    hidden, weight, labels = head(9, 32, 517, dtype, DEVICE)
    labels[4] = -100
    bias = torch.randn(517, device=DEVICE).to(dtype)
    cu = torch.tensor([0, 4, 4, 9], device=DEVICE)
    grad_tol = (
        1e-5 if dtype == torch.float32 else 5e-4
    )  # fp16 dZ and c H: 2^-11 of each element at most
    compare_with_fp64(
        hidden,
        weight,
        labels,
        cu,
        bias=bias,
        chunk_bytes=1,
        tol=2e-4,
        grad_tol=grad_tol,
        **settings,
    )


@runs_triton
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_triton_retains_over_several_blocks_of_a_slab(dtype, monkeypatch):
    monkeypatch.setattr(L, "BLOCK_V", 64)
    hidden, weight, labels = head(7, 32, 333, dtype, DEVICE)
    labels[2] = -100
    compare_with_fp64(hidden, weight, labels, tol=2e-4, grad_tol=5e-4, softcap=25.0)


@runs_triton
def test_triton_gradients_do_not_depend_on_the_size_of_the_coefficients():
    """fp16 would lose a loss multiplied by 1e-9 or 1e9: c H is divided by its largest element for the product."""
    hidden, weight, labels = head(8, 16, 200, torch.bfloat16, DEVICE)
    grads = []
    for size in (1e-9, 1.0, 1e9):
        h, w = leaves(hidden, weight)
        (linear_logps(h, w, labels).sum() * size).backward()
        grads.append((h.grad / size, w.grad / size))
    for other in (grads[0], grads[2]):
        assert all(rel(a, b) < 5e-3 for a, b in zip(other, grads[1], strict=True))


@runs_triton
def test_triton_dead_rows_and_a_second_backward():
    hidden, weight, labels = head(6, 16, 300, torch.float16, DEVICE)
    hidden[3], labels[4] = float("nan"), -100
    hidden[5] *= 100  # logits of which exp is inf in fp32
    h, w = leaves(hidden, weight)
    out = linear_logps(h, w, labels)
    coef = torch.tensor([1.0, -1, 0.5, 0, 2, 0], device=DEVICE)
    grads = [torch.autograd.grad(out, (h, w), coef, retain_graph=True) for _ in range(2)]
    for dh, dw in grads:
        assert (dh[3:] == 0).all()
        assert dh[:3].abs().sum() > 0
        assert torch.isfinite(dw).all()
    assert all(rel(a, b) < 1e-3 for a, b in zip(*grads, strict=True))
    zeros = torch.autograd.grad(out, (h, w), torch.zeros_like(coef))
    assert all((g == 0).all() for g in zeros)


@runs_triton
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_triton_no_tokens_give_zero_gradients(dtype):
    for retain_bytes in (RETAIN, RECOMPUTE):
        h, w = leaves(
            torch.zeros(0, 8, dtype=dtype, device=DEVICE),
            torch.ones(50, 8, dtype=dtype, device=DEVICE),
        )
        none = torch.zeros(0, dtype=torch.long, device=DEVICE)
        linear_logps(
            h, w, none, torch.tensor([0, 0], device=DEVICE), retain_bytes=retain_bytes
        ).sum().backward()
        assert (w.grad == 0).all()


@runs_triton
def test_triton_offsets_beyond_2_to_the_31_elements():
    """Row 2 of a stride of 2^30 starts at element 2^31: in int32 that is a negative offset. Only the pages of the
    three rows are ever touched."""
    V, stride = 37, 1 << 30
    wide = torch.empty(2 * stride + V, dtype=torch.float16, device=DEVICE).as_strided(
        (3, V), (stride, 1)
    )
    wide.copy_(torch.randn(3, V) * 5)
    labels = torch.tensor([0, 36, 17], device=DEVICE)
    (z,) = leaves(wide.contiguous())
    want = reference_logps(z, None, labels)
    want.sum().backward()
    logps = gather_logps(wide.requires_grad_(), labels)
    assert torch.allclose(logps, want, atol=1e-5)
    logps.sum().backward()
    assert torch.allclose(wide.grad, z.grad, atol=1e-3)


@runs_triton
def test_triton_is_what_ran_and_repeats_its_bits(monkeypatch):
    launches = []
    fold = L._update_kernel
    counting = type(
        "Fold", (), {"__getitem__": lambda self, grid: launches.append(grid) or fold[grid]}
    )()
    monkeypatch.setattr(L, "_update_kernel", counting)
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
    env = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }
    whole = (SMOLLM2 / "model.safetensors").exists()  # else the test with that model is skipped
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b3\d passed", done.stdout), done.stdout
    assert not whole or "skipped" not in done.stdout, done.stdout


def test_the_module_works_without_triton():
    code = """
import sys; sys.modules["triton"] = None  # an import of it now fails
import torch
from kernels.logps import gather_logps, linear_logps
assert linear_logps(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, dtype=torch.long)).shape == (2,)
import os; os.environ["TRITON_INTERPRET"] = "1"
try: gather_logps(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
except TypeError: print("no silent fallback")
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT, timeout=120
    )
    assert done.stdout.strip() == "no silent fallback", done.stdout + done.stderr


COMPILE = """
import re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import logps as L

tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
types = dict(logits_row_stride="i32", labels_ptr="*i64", lse_ptr="*fp32", target_ptr="*fp32", exp_ptr="*fp16",
             exp_row_stride="i32", x_row_stride="i32", block_max_ptr="*fp32", block_max_row_stride="i32", dlabel_ptr="*fp32",
             c_ptr="*fp32", dz_row_stride="i32", width="i32", first_column="i32", logit_scale="fp32", softcap="fp32",
             scale_ptr="*fp32", out_ptr="*fp16", size="i32", HAS_SOFTCAP="constexpr", KEEP="constexpr", KEPT="constexpr", BLOCK_V="constexpr")
# Everything that is ever launched. fold: (logits, softcap, keep); dz: (x, dz, softcap, kept). gather_logps: any type,
# the gradient in the same, no softcap, nothing kept. linear_logps: fp32 logits; dZ and e both fp32, or both fp16.
folds = [("*bf16", "*fp16", 0, 0), ("*fp16", "*fp16", 0, 0)]
folds += [("*fp32", e, cap, keep) for cap in (0, 1) for e, keep in (("*fp16", 0), ("*fp16", 1), ("*fp32", 1))]
dzs = [("*bf16", "*bf16", 0, 0), ("*fp16", "*fp16", 0, 0)]
dzs += [(dz if kept else "*fp32", dz, cap, kept) for dz in ("*fp16", "*fp32") for cap in (0, 1) for kept in (0, 1)]
shipped = [(L._update_kernel, dict(logits_ptr=x, exp_ptr=e), dict(HAS_SOFTCAP=cap, KEEP=keep)) for x, e, cap, keep in folds]
shipped += [(L._dlogits_kernel, dict(x_ptr=x, dz_ptr=dz), dict(HAS_SOFTCAP=cap, KEPT=kept)) for x, dz, cap, kept in dzs]
shipped += [(L._scale_kernel, dict(x_ptr=x, out_ptr=out), {}) for x, out in (("*bf16", "*fp16"), ("*fp32", "*bf16"), ("*fp32", "*fp16"))]
for fn, pointers, flags in shipped:
    signature = {n: (types | pointers)[n] for n in fn.arg_names}
    # what the launcher finds out by itself: these are multiples of 16 (block_max's row stride is not)
    even = [i for i, n in enumerate(fn.arg_names) if n != "block_max_row_stride" and n.endswith(("_ptr", "stride")) or n in ("width", "size")]
    source = ASTSource(fn, signature, {n: bool(f) for n, f in flags.items()} | dict(BLOCK_V=L.BLOCK_V),
                       {(i,): [["tt.divisibility", 16]] for i in even})
    for sm in map(int, sys.argv[1:]):
        binary = triton.compile(source, target=GPUTarget("cuda", sm, 32),
                                options=dict(num_warps=L.NUM_WARPS, enable_fp_fusion=True))
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(binary.asm["cubin"]); f.flush()
            usage = subprocess.check_output([tool, "-res-usage", f.name], text=True)
        registers, stack, local = (int(re.search(k + r":(\\d+)", usage)[1]) for k in ("REG", "STACK", "LOCAL"))
        ptx = binary.asm["ptx"]
        loads, stores = (len(re.findall(k + r"\\.global[.\\w:]*\\.v4\\.b32", ptx)) for k in ("ld", "st"))
        print("RESULT", sm, fn.__name__, *pointers.values(), *flags.values(), "|", registers, stack, local, loads, stores)
"""


@pytest.mark.skipif(not TRITON, reason="Triton is not installed")
def test_every_kernel_compiles_for_sm_80_90_and_100_without_spills_and_with_16_byte_accesses(
    tmp_path,
):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMPILE, "80", "90", "100"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert len(rows) == 3 * (8 + 10 + 3)
    for row in rows:
        types, (registers, stack, local, loads, stores) = (
            row[3 : row.index("|")],
            map(int, row[row.index("|") + 1 :]),
        )
        assert registers <= 128, row
        assert stack == local == 0, row
        assert loads == (4 if types[0] == "*fp32" else 2), row  # 16 logits a thread
        stored = (
            row[2] in ("_dlogits_kernel", "_scale_kernel") or row[row.index("|") - 1] == "1"
        )  # dZ; e, with KEEP
        assert stores == stored * (4 if types[1] == "*fp32" else 2), row


@runs_triton
@pytest.mark.parametrize("size", [1, 4096, 9001])
def test_triton_scales_and_rounds_once(size):
    x, unit = torch.randn(size, device=DEVICE), torch.tensor(3e-3, device=DEVICE)
    for out_type in (torch.float16, torch.float32, *[torch.bfloat16] * (DEVICE == "cuda")):
        out = torch.full((size + 1,), 7.0, device=DEVICE, dtype=out_type)
        L._launch(L._scale_kernel, -(-size // L.BLOCK_V), x, unit, out, size)
        assert torch.equal(out[:size], (x * unit).to(out_type)) and out[size] == 7


def test_every_row_offset_is_int64():
    """8,193 rows of 262,144 logits end past 2^31 elements. The Triton test above runs such offsets; this one sees to
    it that no pointer is moved by a row that has not been widened."""
    source = Path(L.__file__).read_text()
    kernels = source[source.index("def _update_kernel") : source.index("def _launch")]
    widened = kernels.count("tl.program_id(0).to(tl.int64)")
    assert kernels.count("tl.program_id") == widened == 3
    row, stride = torch.tensor(8192, dtype=torch.int32), torch.tensor(262144, dtype=torch.int32)
    assert (row * stride).item() != 2**31  # int32 wraps
    assert (row.to(torch.int64) * stride).item() == 2**31


def test_torch_compile_of_a_caller_breaks_its_graph_here_and_gives_the_same():
    def loss(hidden, weight, labels, cu):
        return (linear_logps(torch.tanh(hidden), weight, labels, cu) * 2).sum()

    hidden, weight, labels = head(6, 8, 50)
    args, cu = leaves(hidden, weight), torch.tensor([0, 3, 6])
    want = torch.autograd.grad(loss(*args, labels, cu), args)
    compiled = torch.compile(loss, backend="aot_eager")
    assert all(
        torch.equal(a, b)
        for a, b in zip(torch.autograd.grad(compiled(*args, labels, cu), args), want, strict=True)
    )
    assert torch._dynamo.explain(loss)(*args, labels, cu).graph_break_count == 1
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(loss, backend="eager", fullgraph=True)(*args, labels, cu)


# --- a trained model's hidden states, if the embedded model is in the cache ------------------------------------------

SMOLLM2 = (
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rdpo/smollm2-135m-instruct"
)
needs_smollm2 = pytest.mark.skipif(
    not (SMOLLM2 / "model.safetensors").exists(), reason="python generate.py makes it"
)


@functools.cache
def smollm2():
    """hidden, weight, labels in bf16 and fp64 logits of 256 tokens: the model reads this repository's README."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.S)
    ids = AutoTokenizer.from_pretrained(SMOLLM2)(text, return_tensors="pt").input_ids[:, :257]
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state[0, :-1].bfloat16()
    return hidden, model.lm_head.weight.detach().bfloat16(), ids[0, 1:]


def exact_gradients(hidden, weight, labels, cu, coef, **settings):
    exact = leaves(hidden, weight, dtype=torch.float64)
    want = reference_logps(*exact, labels, cu, **settings)
    want.backward(coef.double())
    return want.detach(), exact[0].grad, exact[1].grad


def check_smollm2(device, length=128, **settings):
    """Two sequences of `length` tokens in both modes; returns what fp64 says of them."""
    hidden, weight, labels = smollm2()
    hidden, weight, labels = (
        t.to(device) for t in (hidden[: 2 * length], weight, labels[: 2 * length])
    )
    cu, coef = (
        torch.tensor([0, length, 2 * length], device=device),
        torch.tensor([0.037, -0.05], device=device),
    )
    want, *grads = exact_gradients(hidden, weight, labels, cu, coef, **settings)
    for retain_bytes in (RETAIN, RECOMPUTE):
        h, w = leaves(hidden, weight)
        got = linear_logps(h, w, labels, cu, retain_bytes=retain_bytes, **settings)
        assert (got - want).abs().max() < 0.01
        got.backward(coef)
        errors = rel(h.grad, grads[0]), rel(w.grad, grads[1])
        assert errors[0] < 2e-3 and errors[1] < (2e-3 if device == "cuda" else DWEIGHT), errors
    return want


@needs_smollm2
@pytest.mark.parametrize(
    "settings", [{}, {"softcap": 30.0, "logit_scale": 0.7}], ids=["plain", "softcap"]
)
def test_real_hidden_states_are_exact_to_a_hundredth_of_a_nat_and_gradients_to_a_few_thousandths(
    settings,
):
    want = check_smollm2("cpu", **settings)
    if not settings:
        hidden, weight, labels = smollm2()
        assert want.min() > -128 * 10  # the model does predict this text
        bf16_logits = reference_logps(
            hidden @ weight.t(), None, labels, torch.tensor([0, 128, 256])
        )
        assert (bf16_logits - want).abs().max() > 0.05  # what it is that we avoid


@pytest.mark.parametrize("common", [1.0, 10.0])
def test_what_the_rows_of_the_weight_have_in_common_costs_no_digits(common):
    """It cancels in dH, and a sum over the vocabulary that was rounded to bf16 before would be off by 1e-2."""
    hidden, weight, labels = head(128, 64, 8192, torch.bfloat16)
    weight = (weight + common * weight.std() * torch.randn(1, 64)).bfloat16()
    compare_with_fp64(hidden, weight, labels, tol=0.01, grad_tol=1e-4)


@runs_triton
@needs_smollm2
def test_triton_real_hidden_states_keep_the_same_bounds():
    """As above, where dZ and c H are fp16: the arithmetic of CUDA. The interpreter takes 0.1 s a token."""
    check_smollm2(DEVICE, length=128 if DEVICE == "cuda" else 4)


def test_fp64_is_refused_by_the_kernels_which_would_round_it(monkeypatch):
    monkeypatch.setattr(L, "_on_triton", lambda x: True)
    with pytest.raises(ValueError, match="not fp64"):
        L.gather_logps(torch.zeros(2, 3, dtype=torch.float64), torch.tensor([0, 1]))


def test_the_repo_root_does_not_break_transformers_by_the_name_kernels():
    code = (
        "import kernels, torch; from transformers import LlamaConfig, LlamaForCausalLM\n"
        "m = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,"
        " num_attention_heads=2, num_key_value_heads=2))\n"
        "print(m(torch.zeros(1, 3, dtype=torch.long)).logits.shape[-1], kernels.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.stdout.split()[:1] == ["32"], done.stderr
    assert str(ROOT) in done.stdout


@pytest.mark.skipif(DEVICE != "cuda", reason="needs CUDA")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_cuda_linear_is_exact_at_a_real_size(dtype):
    hidden, weight, labels = head(512, 576, 49152, dtype, "cuda")
    cu = torch.tensor([0, 128, 128, 512], device="cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    compare_with_fp64(
        hidden,
        weight,
        labels,
        cu,
        tol=0.02,
        grad_tol=2e-3 if dtype != torch.float32 else 1e-4,
        chunk_bytes=8 << 20,
    )
