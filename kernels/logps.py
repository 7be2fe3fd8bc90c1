"""Log-probabilities of given tokens, without the logits ever being in memory.

    gather_logps(logits, labels)                        logits already there: one pass over them, in Triton
    linear_logps(hidden, weight, labels, cu_seqlens)    hidden states and the output layer: no (N, V) array of logits
    reference_logps(hidden, weight, labels, cu_seqlens) the same in a few lines of PyTorch, to be compared with

The problem
    A preference loss needs, for every completion token t with label y, its log-probability
        logp = z[y] - LSE,    LSE = log sum_v exp(z[v]),    z = W h                                        (1)
    W is (V, D), h is (D,). The result is one number a token, but the logits z on the way to it are V numbers: for
    8,192 tokens and a vocabulary of 128,256 they are 4.2 GB in fp32, and autograd keeps them and their gradient.
    Keeping them in bf16 halves that and spoils the answer: a logit of 20 in bf16 has a step of 1/8, and the sum over
    128 tokens is then off by up to 0.9 nat (SmolLM2-135M on 1,024 tokens of English), more than many DPO margins.

The derivative
    From (1), d z[y] / dz[v] = 1[v = y], and d LSE / dz[v] = exp(z[v] - LSE) = p[v], the softmax. So
        dz[v] := d (-logp) / dz[v] = p[v] - 1[v = y]                                                        (2)
    and with c = -(d loss / d logp), a number that comes from above for each token:
        dH = c (dZ W)   (its rows times c),      dW = dZ^T (c H)   (the rows of H times c)                  (3)

Why c deserves a thought
    Cross-entropy has c = 1/N for every token: it is known beforehand, so the gradient can be made in the forward pass
    while the logits are there. A preference loss has one c per *sequence*, a function of the sums of both sequences
    of a pair: known only when every token has been seen. Rows of dZ W may still be multiplied by a late c; dZ^T H may
    not, for its sum over tokens is already taken. So dZ must be had *after* the loss: either something of size
    N x V is kept until then, or the logits are made a second time. To this file c is just autograd's grad_output,
    one number a token or a sequence, so it knows nothing of any loss. By (3) it never touches the large array.

Three modes, by whether a gradient is wanted and by a budget of bytes
                      products                    FLOPs   kept between the passes
        forward only  z                            2NDV   nothing
        retain        z; dZ W, dZ^T H              6NDV   2 bytes a logit (fp32 operands: 4)
        recompute     z; z again, dZ W, dZ^T H     8NDV   2 numbers a token
    A frozen head or frozen hidden states save one product, 2NDV, in the last two.
    The vocabulary is walked in slabs of a few thousand columns; only one slab of logits exists:

                D             slab 0   slab 1   slab 2 ...        forward, per slab:  z = H W_slab^T
            +-------+        +--------+........+........+                 fold z into (LSE, z[y]); keep e?
          N |   H   |   ->   |   z    |        :        :       backward, per slab:  dZ from e, or from z again
            +-------+        +--------+........+........+                 dH += dZ W_slab, dW_slab = dZ^T (c H)
                                    V columns

    Slabs rather than blocks of tokens, because then all N tokens meet inside one matrix product and each dW_slab is
    written once, summed in that product's own fp32 accumulators. The first slabs are retained for as long as the
    budget lasts, the others are recomputed: with room for half of them the price is 7NDV, and there is no cliff.

What is retained, if rounded logits are no good: their exponentials
    For a row and a block of columns with largest logit m we keep e = exp(z - m) in fp16, and m in fp32:
        p = e exp(m - LSE)                                                                                  (4)
    e is at most 1 and off by at most 2^-11 of itself, or by 2^-25 if it is below 2^-14; so is p. A bf16 e would be off
    by 2^-8, a bf16 logit of 20 makes p off by 2^-4. p[y] - 1, which (4) would spoil for p[y] near 1, comes from the
    fp32 numbers z[y] and LSE, and LSE is summed before anything is rounded. With softcap z = m + log e. fp32 operands
    ask for fp32 gradients: their e stays fp32. A slab is let go as soon as its products are done: a second backward
    (retain_graph=True) finds nothing and recomputes.

Online softmax (Milakov & Gimelshein, arXiv 1805.02867)
    sum_v exp(z[v]) overflows, so it is kept as (m, s): the largest logit so far, and s = sum exp(z - m). A new block:
        m' = max(m, block),  s' = s exp(m - m') + sum exp(block - m'),  at the end LSE = m + log s                (5)
    A finished LSE is itself such a pair, (LSE, 1): so the next slab simply goes on from the LSE of those before it.

Which code runs is decided by where the tensors are, and by nothing else: on CUDA the Triton kernels; on the CPU
PyTorch; on the CPU with TRITON_INTERPRET=1 the Triton kernels in Triton's interpreter (slow, for tests; it rounds bf16
stores toward zero). Triton is imported at the first call that needs it, and its absence is then an error. LSE and
z[y] always come from fp32 logits (fp64 from fp64 operands, CPU only). Nothing sums with atomics: same inputs, machine
and threads, same bits. torch.compile breaks its graph at both functions and runs them as they are.
"""

from __future__ import annotations  # the kernels name tl.constexpr before Triton is imported

import contextlib
import functools
import math
import mmap
import os
import threading
from types import SimpleNamespace

import torch

_one_at_a_time = threading.RLock()  # see _exact_products
_run_as_is = torch._disable_dynamo  # torch.compiler.disable, without its 1.4 s of imports before the first call
tl = None  # triton.language, put here by _kernels() at the first call that needs it
BLOCK_V, NUM_WARPS = 4096, 8  # 16 logits a thread: two 16-byte loads in bf16, four in fp32
CPU_CHUNK_BYTES, CUDA_CHUNK_BYTES = 16 << 20, 352 << 20  # stay in the cache; keep the matrix products large
CPU_RETAIN_BYTES, CUDA_RETAIN_BYTES = 512 << 20, 4 << 30  # bf16: 5,461 tokens at V = 49,152; 16,743 at V = 128,256
ALIGN = 128  # slabs have a multiple of this many columns: rows of them start on 16 bytes, products do not starve

# --- 1. Two Triton kernels. One program a row; "row" is int64, for row * stride passes 2**31. ---------------------


def _fold_kernel(
    logits_ptr, logits_row_stride, labels_ptr, lse_ptr, target_ptr, e_ptr, e_row_stride, peak_ptr, peak_row_stride,
    V, first_column, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr, KEEP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Fold one slab, columns [first_column, first_column + V), into lse (N,) and target (N,), both fp32: eq. 5.

    With KEEP it leaves e (N, V) and, for each block of BLOCK_V columns, its largest logit in peak: eq. 4.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_row_stride
    columns = tl.arange(0, BLOCK_V)
    # Go on from the slabs before: (m, s) = (lse, 1), or "nothing yet". The sentinel for that is finite, because
    # exp(-inf - -inf) is NaN; then a logit of -inf (a masked word) adds exp(-inf - m) = 0 as it should.
    lse = tl.load(lse_ptr + row)
    m = tl.maximum(lse, -1e38)
    s = tl.where(columns == 0, tl.exp(lse - m), 0.0)  # one partial sum a lane: a reduction less in each turn
    for start in range(0, V, BLOCK_V):
        inside = start + columns < V
        z = tl.load(logits_ptr + start + columns, mask=inside, other=0.0).to(tl.float32) * logit_scale
        if HAS_SOFTCAP:
            z = softcap * (1.0 - 2.0 / (tl.exp(2.0 * z / softcap) + 1.0))  # softcap * tanh(z / softcap)
        z = tl.where(inside, z, float("-inf"))
        peak = tl.maximum(tl.max(z, axis=0), -1e38)
        e = tl.exp(z - peak)
        if KEEP:
            tl.store(e_ptr + row * e_row_stride + start + columns, e.to(e_ptr.dtype.element_ty), mask=inside)
            tl.store(peak_ptr + row * peak_row_stride + start // BLOCK_V, peak)
        m_new = tl.maximum(m, peak)
        s = s * tl.exp(m - m_new) + e * tl.exp(peak - m_new)
        m = m_new
    total = tl.sum(s, axis=0)
    tl.store(lse_ptr + row, tl.where(total == 0.0, float("-inf"), m + tl.log(total)))

    column = tl.load(labels_ptr + row) - first_column
    here = (column >= 0) & (column < V)  # false for an ignored label too: it was made -1 - V outside
    z = tl.load(logits_ptr + column, mask=here, other=0.0).to(tl.float32) * logit_scale
    if HAS_SOFTCAP:
        z = softcap * (1.0 - 2.0 / (tl.exp(2.0 * z / softcap) + 1.0))
    tl.store(target_ptr + row, z, mask=here)


def _dz_kernel(
    x_ptr, x_row_stride, peak_ptr, peak_row_stride, labels_ptr, lse_ptr, dz_label_ptr, coef_ptr, dz_ptr, dz_row_stride,
    V, first_column, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr, KEPT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write coef dZ of one slab (eq. 2), with the derivative of softcap; x is e if KEPT, else raw logits.

    dz_ptr may be x_ptr: a lane reads an element before it writes the same one.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_row_stride
    dz_ptr += row * dz_row_stride
    coef = tl.load(coef_ptr + row)
    # A dead row is not read: x = lse = 0 there, so dz is 0 whatever the row holds (NaN) and its lse is (-inf).
    lse = tl.where(coef != 0.0, tl.load(lse_ptr + row), 0.0)
    readable = tl.where(coef != 0.0, V, 0)
    dz_label = tl.load(dz_label_ptr + row)
    column = tl.load(labels_ptr + row) - first_column
    columns = tl.arange(0, BLOCK_V)
    for start in range(0, V, BLOCK_V):
        x = tl.load(x_ptr + start + columns, mask=start + columns < readable, other=0.0).to(tl.float32)
        if KEPT:
            peak = tl.load(peak_ptr + row * peak_row_stride + start // BLOCK_V)
            p = x * tl.where(coef != 0.0, tl.exp(peak - lse), 0.0)
            z = peak + tl.log(tl.maximum(x, 1e-37))  # x = 0 has p = 0, and here a finite z
        else:
            z = x * logit_scale
            if HAS_SOFTCAP:
                z = softcap * (1.0 - 2.0 / (tl.exp(2.0 * z / softcap) + 1.0))
            p = tl.exp(z - lse)
        if HAS_SOFTCAP:
            p *= 1.0 - (z / softcap) * (z / softcap)  # d softcap tanh(u / softcap) / du = 1 - tanh^2
        dz = tl.where(start + columns == column, dz_label, p) * coef
        tl.store(dz_ptr + start + columns, dz.to(dz_ptr.dtype.element_ty), mask=start + columns < V)


@functools.cache
def _kernels() -> SimpleNamespace:
    """Import Triton and compile-on-call the two kernels; ImportError where there is no Triton."""
    global tl
    import triton
    import triton.language as tl

    return SimpleNamespace(fold=triton.jit(_fold_kernel), dz=triton.jit(_dz_kernel))


def _on_triton(x: torch.Tensor) -> bool:
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


# --- 2. The same two steps for one slab, in Triton or in PyTorch. Logits are raw: before scale and softcap. --------


def _fold(z, labels, first_column, lse, target, logit_scale, softcap, e=None):
    """Fold the slab z (N, columns) into lse and target, in place. If e, a tensor like z, is given: fill it and return
    peak of eq. 4.

    The PyTorch branch overwrites z, and e may be z; the Triton one does not. A peak is that of BLOCK_V columns in
    Triton, of the slab in PyTorch.
    """
    keep = e is not None
    if _on_triton(z):
        e, peak = z if e is None else e, lse[:, None]  # not touched without KEEP
        if keep:
            peak = lse.new_empty(len(z), -(-z.shape[1] // BLOCK_V))
        with torch.cuda.device_of(z):  # Triton launches on the current device, which need not be z's
            _kernels().fold[(len(z),)](
                z, z.stride(0), labels, lse, target, e, e.stride(0), peak, peak.stride(0), z.shape[1], first_column,
                logit_scale, softcap, HAS_SOFTCAP=softcap != 0, KEEP=keep, BLOCK_V=BLOCK_V, num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )  # fmt: skip
        return peak
    _scale_and_cap_(z, logit_scale, softcap)
    rows, columns = _hits(z, labels, first_column)
    target[rows] = z[rows, columns]
    peak = z.amax(-1, keepdim=True).clamp_(min=torch.finfo(z.dtype).min)  # finite, for the reason in _fold_kernel
    z.sub_(peak).exp_()
    torch.logaddexp(lse, z.sum(-1).log_().add_(peak.squeeze(-1)), out=lse)
    if keep and e.data_ptr() != z.data_ptr():
        e.copy_(z)
    return peak


def _memory_for_e(h, columns, dtype):
    """(N, columns) of dtype. On a CPU in pages of its own, for malloc would keep the pages of what is let go slab by slab
    while dW grows beside it."""
    shape = len(h), columns
    if _on_triton(h) or not hasattr(mmap, "MAP_ANONYMOUS") or len(h) == 0:
        return h.new_empty(shape, dtype=dtype)
    pages = mmap.mmap(-1, len(h) * columns * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def _dz(x, peak, labels, first_column, lse, dz_label, coef, out, logit_scale, softcap):
    """Write coef dZ (eq. 2) to out. x is raw logits if peak is None, else e: eq. 4. out may be x itself.

    dz_label (N,) is p[y] - 1, from fp32 numbers and 0 in dead rows (coef = 0). PyTorch overwrites raw logits.
    """
    if _on_triton(x):
        kept, peak = peak is not None, lse[:, None] if peak is None else peak
        with torch.cuda.device_of(x):
            _kernels().dz[(len(x),)](
                x, x.stride(0), peak, peak.stride(0), labels, lse, dz_label, coef, out, out.stride(0), x.shape[1],
                first_column, logit_scale, softcap, HAS_SOFTCAP=softcap != 0, KEPT=kept, BLOCK_V=BLOCK_V,
                num_warps=NUM_WARPS, enable_fp_fusion=True,
            )  # fmt: skip
        return
    if peak is None:
        _scale_and_cap_(x, logit_scale, softcap)
        slope = 1 - (x / softcap).square_() if softcap else None
        dz = x.sub_(lse[:, None]).exp_().mul_(coef[:, None])
    else:
        slope = None
        if softcap:
            z = x.to(lse.dtype, copy=True).clamp_(min=1e-37).log_().add_(peak)
            slope = 1 - z.div_(softcap).square_()
        dz = out.copy_(x).mul_((coef * (peak.squeeze(-1) - lse).exp())[:, None])
    if slope is not None:
        dz.mul_(slope)
    rows, columns = _hits(dz, labels, first_column)
    dz[rows, columns] = (dz_label * coef)[rows].to(dz.dtype)
    if bool((coef == 0).any()):
        dz[coef == 0] = 0  # 0 * NaN is NaN: a row that nobody asked for must not speak
    if out is not dz:
        out.copy_(dz)


def _scale_and_cap_(z, logit_scale, softcap):
    if logit_scale != 1:
        z.mul_(logit_scale)
    if softcap:
        z.div_(softcap).tanh_().mul_(softcap)


def _hits(z, labels, first_column):
    """Rows whose label lies in this slab, and its column there. CPU only: the sizes depend on the data."""
    columns = labels - first_column
    rows = ((columns >= 0) & (columns < z.shape[1])).nonzero().squeeze(-1)
    return rows, columns[rows]


def _dz_of_labels(lse, target, coef, softcap):
    """p[y] - 1 times the slope of softcap there, by expm1: exact where p[y] is nearly 1. 0 in dead rows."""
    dz = torch.expm1(target - lse)
    if softcap:
        dz = dz * (1 - (target / softcap) ** 2)
    return torch.where(coef != 0, dz, 0)


# --- 3. Logits given ---------------------------------------------------------------------------------------------


@_run_as_is
def gather_logps(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Log-probabilities, in nats, of labels under softmax(logits): eq. 1 of this file, with its gradient.

    logits: (..., V), bf16, fp16 or fp32, and on the CPU fp64; any V >= 1; -inf allowed. The last two dimensions of
        a 2-D array may be strided by rows; more dimensions are flattened, which copies a view such as
        logits[:, :-1] (shift the labels instead, and ignore the last one).
    labels: (...), int32 or int64. Where a label is ignore_index the result is 0 and so is the gradient of the row.
    returns (...), fp32 (fp64 for fp64 logits).
    raises ValueError for shapes, types and devices that do not fit, and for labels outside [0, V). On CUDA a look
        at the labels would stop the host, so there a bad label ends in a device-side assertion.
    """
    if logits.ndim < 1 or logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits (..., V) and labels (...) needed, got {list(logits.shape)} and {list(labels.shape)}")
    labels_1d = _check(logits, labels.reshape(-1), logits.shape[-1], ignore_index)
    logits_2d = logits.reshape(-1, logits.shape[-1])
    logits_2d = logits_2d if logits_2d.stride(1) == 1 else logits_2d.contiguous()
    return _GatherLogps.apply(logits_2d, labels_1d).view(labels.shape)


class _GatherLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels):
        lse, target = _empty_state(logits, labels)
        for rows in _row_chunks(logits):
            z = logits[rows] if _on_triton(logits) else logits[rows].to(lse.dtype, copy=True)
            _fold(z, labels[rows], 0, lse[rows], target[rows], 1.0, 0.0)
        ctx.save_for_backward(logits, labels, lse, target)
        return torch.where(labels >= 0, target - lse, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logps):
        logits, labels, lse, target = ctx.saved_tensors
        coef = torch.where(labels >= 0, -grad_logps, 0).to(lse.dtype)
        dz_label = _dz_of_labels(lse, target, coef, 0.0)
        grad = torch.empty_like(logits)
        for rows in _row_chunks(logits):
            z = logits[rows] if _on_triton(logits) else logits[rows].to(lse.dtype, copy=True)
            _dz(z, None, labels[rows], 0, lse[rows], dz_label[rows], coef[rows], grad[rows], 1.0, 0.0)
        return grad, None


def _row_chunks(logits):
    """Everything at once for the kernels; on the CPU as many rows as fit the budget once they are fp32."""
    rows = len(logits) if _on_triton(logits) else CPU_CHUNK_BYTES // (4 * logits.shape[1])
    return [slice(i, i + max(1, rows)) for i in range(0, len(logits), max(1, rows))]


# --- 4. Hidden states and output layer given ---------------------------------------------------------------------


@_run_as_is
def linear_logps(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, cu_seqlens: torch.Tensor | None = None, *,
    bias: torch.Tensor | None = None, logit_scale: float = 1.0, softcap: float = 0.0, ignore_index: int = -100,
    chunk_bytes: int | None = None, retain_bytes: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Log-probabilities, in nats, of labels under softmax(z), z = cap(logit_scale (hidden weight^T + bias)).

    hidden (N, D), weight (V, D), bias (V,) or None: one floating type (bf16, fp16, fp32; on the CPU also fp64).
        hidden[t] is the state that predicts labels[t]: shifting is the caller's business. N = 0 is fine.
    labels (N,): int32 or int64; ignore_index gives 0, and no gradient.
    cu_seqlens (S + 1,): int32 or int64, 0 = cu[0] <= ... <= cu[S] = N: sequence s is tokens cu[s]:cu[s+1], and may
        be empty (its sum is 0).
    logit_scale: Cohere's logit_scale, Granite's 1 / logits_scaling. softcap: cap(u) = softcap tanh(u / softcap), as
        in Gemma 2 (arXiv 2408.00118, section 2); 0 is none.
    chunk_bytes: budget of what exists for one slab only: fp32 logits, dZ, and copies of its part of weight and dW
        in another type. None is 16 MiB on the CPU and 352 MiB on CUDA. A slab has at least 128 columns anyhow.
    retain_bytes: how much may be kept until backward, at 2 bytes a logit (4 for fp32 operands, 8 for fp64), if a
        gradient is wanted at all; slabs that do not fit are recomputed. None is 512 MiB on the CPU and 4 GiB on CUDA,
        never a share of what is free: the bits of a gradient must not depend on the neighbours. 0 recomputes all.
    returns fp32 (fp64 for fp64 operands): (N,), one number a token, or with cu_seqlens (S,), one sum a sequence.

    Gradients flow to hidden, weight and bias, each only if it asks (a frozen one costs nothing), in its own type and
    for any upstream gradient, once: a second backward through a kept graph works, by recomputing. On the CPU products
    skip ignored tokens and those whose upstream gradient is 0. They run in fp32 (see _exact_products), but that of dW
    in bf16 where the operands are bf16 and the CPU multiplies it (see _gradients). On CUDA half operands enter the
    products as halves and fp32 comes out; dZ, between -1 and 1, is fp16 for bf16 operands too (see _gradients).
    fp32 operands follow torch.backends.cuda.matmul (TF32 if you allowed it). Autocast is off in here. Raises as
    gather_logps does, and for a cu_seqlens that is not as above.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden (N, D), weight (V, D) needed, got {list(hidden.shape)}, {list(weight.shape)}")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels must be ({len(hidden)},), one a row of hidden, got {list(labels.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},), one a row of weight, got {list(bias.shape)}")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and (other.dtype != hidden.dtype or other.device != hidden.device):
            raise ValueError(f"{name} is {other.dtype} on {other.device}, hidden is {hidden.dtype} on {hidden.device}")
    if not (math.isfinite(logit_scale) and math.isfinite(softcap) and softcap >= 0):
        raise ValueError(f"logit_scale must be finite and softcap finite and >= 0, got {logit_scale}, {softcap}")
    if chunk_bytes is None:
        chunk_bytes = CUDA_CHUNK_BYTES if hidden.is_cuda else CPU_CHUNK_BYTES
    if retain_bytes is None:
        retain_bytes = CUDA_RETAIN_BYTES if hidden.is_cuda else CPU_RETAIN_BYTES
    if chunk_bytes <= 0 or retain_bytes < 0:
        raise ValueError(f"chunk_bytes must be positive, retain_bytes not negative, got {chunk_bytes}, {retain_bytes}")
    labels = _check(hidden, labels, len(weight), ignore_index)
    if cu_seqlens is not None:
        cu_seqlens = _check_cu_seqlens(cu_seqlens, hidden)

    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    settings = float(logit_scale), float(softcap), chunk_bytes, retain_bytes if wanted else 0
    logps = _LinearLogps.apply(hidden, weight, bias, labels, settings)
    if cu_seqlens is None:
        return logps
    # Summed in fp64, rounded once. segment_reduce and its gradient walk each sequence in order: no atomics.
    return torch.segment_reduce(logps.double(), "sum", offsets=cu_seqlens, initial=0, unsafe=True).to(logps.dtype)


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, settings):
        logit_scale, softcap, chunk_bytes, retain_bytes = settings
        lse, target = _empty_state(hidden, labels)
        kept = {}  # first column of a slab -> (e, peak)
        e_dtype = torch.float16 if _is_half(hidden) else hidden.dtype
        with _exact_products(hidden):
            rows = _live_rows(labels >= 0)
            h, labels_, lse_, target_ = _widen(hidden[rows]), labels[rows], lse[rows], target[rows]
            columns = _slab_columns(h, hidden.dtype, chunk_bytes)
            slabs, tile = _slabs(h, weight, columns)
            for slab in slabs:
                w, e = _widen(weight[slab]), None
                size = len(h) * len(w) * e_dtype.itemsize
                if size <= retain_bytes:
                    retain_bytes -= size
                    e = _memory_for_e(h, len(w), e_dtype)
                in_place = tile is not None and e is not None and e.dtype == h.dtype
                z = _logits(h, w, bias, slab, e if in_place else tile)
                peak = _fold(z, labels_, slab.start, lse_, target_, logit_scale, softcap, e)
                if e is not None:
                    kept[slab.start] = e, peak
                del z, e, peak, w  # before the next ones are made
            lse[rows], target[rows] = lse_, target_
        ctx.settings, ctx.kept = (logit_scale, softcap, columns), kept
        ctx.save_for_backward(hidden, weight, bias, labels, lse, target)  # nothing if no gradient is wanted
        return torch.where(labels >= 0, target - lse, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logps):
        labels = ctx.saved_tensors[3]
        coef = torch.where(labels >= 0, -grad_logps, 0)  # minus: dZ is the derivative of -logp
        with _exact_products(ctx.saved_tensors[0]):
            return *_gradients(*ctx.saved_tensors, coef, ctx.kept, *ctx.settings, ctx.needs_input_grad), None, None


def _gradients(hidden, weight, bias, labels, lse, target, coef, kept, logit_scale, softcap, columns, wanted):
    """Eq. 3, slab by slab, using up what was kept: (dhidden, dweight, dbias), None for those not wanted.

    Half operands under Triton: dZ and c H are rounded to fp16, whose 11 bits fit numbers that are at most 1; W goes
    from bf16 to fp16 for it, exactly between 6e-5 and 65504. dZ in bf16 would cost 1.5e-3 of the norm of dH, as
    much again as rounding dH itself (SmolLM2-135M, 512 tokens); in fp16 the difference is lost in that rounding.
    Elsewhere c goes into dZ. A CPU that multiplies bf16 (see _exact_products) rounds c dZ to it; most of the norm of a
    row of dZ is p[y] - 1, so the labels' entries stay out of the products and are added in fp32: 0.7e-3.
    A product of bf16 operands takes half the time of one in fp32, but its result is rounded to bf16. That is what
    becomes of dW anyway. dH stays in fp32: what it sums over the vocabulary is large where the rows of W have much
    in common, and cancels against the labels' entries, its rounding not.
    """
    want_hidden, want_weight, want_bias = wanted[:3]
    coef = coef.to(lse.dtype)
    rows, picked = _live_rows(coef != 0), _live_rows(coef[_live_rows(labels >= 0)] != 0)  # of all; of those kept
    h, labels, lse, target, coef = _widen(hidden[rows]), labels[rows], lse[rows], target[rows], coef[rows]
    dz_label = _dz_of_labels(lse, target, coef, softcap)
    half, labels_apart = _is_half(h), hidden.dtype == torch.bfloat16 and not _on_triton(hidden)
    dz_in_product = torch.zeros_like(dz_label) if labels_apart else dz_label
    scaled = coef * logit_scale
    narrow = labels_apart and multiplies_bf16()  # the product of dW
    if half:
        ch = torch.where(coef[:, None] != 0, scaled[:, None] * h, 0)
        unit = ch.abs().amax().clamp(min=1e-30) if len(h) else 1.0  # a tensor: the host does not wait for it
        right, c = (ch / unit).half(), (coef != 0).to(lse.dtype)
    else:
        right, c = torch.where(coef[:, None] != 0, h, 0), scaled
    dhidden = lse.new_zeros(h.shape) if want_hidden else None  # fp32: it is a sum over slabs
    dweight = torch.empty_like(weight) if want_weight else None  # each slab of it is written once
    dbias = torch.empty_like(bias) if want_bias else None
    slabs, tile = _slabs(h, weight, columns)
    if narrow:
        rounded, h_rounded = torch.empty_like(tile, dtype=torch.bfloat16), right.bfloat16()
    for slab in slabs:
        w = _widen(weight[slab])
        if slab.start in kept:
            x, peak = (part[picked] for part in kept.pop(slab.start))
        else:
            x, peak = _logits(h, w, bias, slab, tile), None
        dz = x
        if x.dtype != right.dtype:
            dz = torch.empty_like(x, dtype=right.dtype) if tile is None else tile[:, : len(w)]
        _dz(x, peak, labels, slab.start, lse, dz_in_product, c, dz, logit_scale, softcap)
        del x, peak
        if want_bias:
            dbias[slab] = scaled @ dz.to(scaled.dtype) if half else dz.sum(0)
        if want_hidden:
            _add_mm_(dhidden, dz, w.half() if half else w)
        if want_weight and narrow:
            torch.mm(rounded[:, : len(w)].copy_(dz).t(), h_rounded, out=dweight[slab])
        elif want_weight and dweight.dtype == right.dtype and not half:
            torch.mm(dz.t(), right, out=dweight[slab])  # a sum over all tokens, inside one product
        elif want_weight and half:
            torch.mul(_mm(dz.t(), right), unit, out=dweight[slab])  # the same, rounded once
        elif want_weight:
            dweight[slab] = _mm(dz.t(), right)
        del dz, w  # before the next ones are made
    if labels_apart:
        _add_labels(dhidden, dweight, dbias, h, weight, labels, c * dz_label)
    if want_hidden:
        full = torch.zeros_like(hidden)
        full[rows] = (dhidden.mul_(scaled[:, None]) if half else dhidden).to(hidden.dtype)
        dhidden = full
    return dhidden, dweight, dbias


def _add_labels(dhidden, dweight, dbias, h, weight, labels, dz_label):
    """The labels' entries of c dZ, (N,) fp32, and what they add to the gradients that are wanted; one pass, in order."""
    words, word_of = labels.unique(return_inverse=True)
    if dhidden is not None:
        dhidden.addcmul_(dz_label[:, None], _widen(weight[labels]))
    for total, right in ((dweight, h), (dbias, h.new_ones(len(h), 1))):
        if total is not None:
            sums = right.new_zeros(len(words), right.shape[1]).index_add_(0, word_of, dz_label[:, None] * right)
            total[words] = (total[words] + sums.view(len(words), *total.shape[1:])).to(total.dtype)


def _slab_columns(h, dtype, chunk_bytes):
    """Columns of a slab. Half operands need, beside 4 bytes a logit, dZ (2) and W and dW in another type (6 D)."""
    bytes_a_column = 6 * sum(h.shape) if dtype.itemsize == 2 else 4 * len(h)
    return max(1, chunk_bytes // max(1, bytes_a_column) // ALIGN) * ALIGN


@contextlib.contextmanager
def _exact_products(operand):
    """Autocast off: it would turn fp32 products into bf16 ones. And bf16 operands on a CPU, which _widen makes fp32
    because a bf16 product would round its result: oneDNN may take them for the bf16 numbers that they are. Products
    are exact then, sums and results fp32, at the speed of bf16 on CPUs with AMX; with AVX-512 alone it multiplies in
    fp32, and on an AMD EPYC 1.3 times as fast as MKL. The setting is the whole process's, so one call at a time.
    """
    settings = torch.backends.mkldnn.matmul
    with torch.autocast(operand.device.type, enabled=False):
        if _on_triton(operand):
            yield
            return
        with _one_at_a_time:
            before = settings.fp32_precision
            try:
                if operand.dtype == torch.bfloat16:
                    settings.fp32_precision = "bf16"
                yield
            finally:
                if operand.dtype == torch.bfloat16:
                    settings.fp32_precision = before


def _is_half(x):
    return x.dtype in (torch.bfloat16, torch.float16)


def _slabs(h, weight, columns):
    """Slices of the vocabulary; and on the CPU one memory for the logits of each, because page faults cost."""
    slabs = [slice(i, min(i + columns, len(weight))) for i in range(0, len(weight), columns)]
    return slabs, None if _on_triton(h) else h.new_empty(len(h), min(columns, len(weight)))


def _logits(h, w, bias, slab, tile):
    """Raw logits (N, columns), fp32 or fp64."""
    z = _mm(h, w.t()) if tile is None else torch.mm(h, w.t(), out=tile[:, : len(w)])
    return z if bias is None else z.add_(bias[slab])


def _mm(a, b):
    """The product as it leaves the fp32 accumulators: never rounded to half."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()  # beside the interpreter


def _add_mm_(total, a, b):
    """total += a b, inside the product: at D = 4,096 a pass over fp32 dH for every slab would be seen."""
    if a.is_cuda and a.dtype == torch.float16:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


@functools.cache
def multiplies_bf16():
    """Whether an x86 CPU has instructions for products of bf16 numbers."""
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))


def _widen(x):
    """Operands of the products: in PyTorch's path fp32, for a CPU product of bf16 rounds its result to bf16."""
    return x if _on_triton(x) or x.dtype == torch.float64 else x.float()


def _live_rows(mask):
    """Which rows to work on. In PyTorch those in mask; in Triton all, because counting them would stop a CUDA host."""
    return slice(None) if _on_triton(mask) or bool(mask.all()) else mask.nonzero().squeeze(-1)


def _empty_state(x, labels):
    """(lse, target) of zero columns: log of an empty sum, and nothing found yet."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_full(labels.shape, -math.inf, dtype=wide), x.new_zeros(labels.shape, dtype=wide)


# --- 5. At the door ----------------------------------------------------------------------------------------------


def _check(x, labels, V, ignore_index):
    """Labels as int64, the ignored ones -1 - V: below column 0 of every slab. Refuses what does not fit."""
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"bf16, fp16, fp32 or fp64 needed, got {x.dtype}")
    if x.dtype == torch.float64 and _on_triton(x):
        raise ValueError("the Triton kernels work in fp32: fp64 is for the CPU, without TRITON_INTERPRET")
    if labels.dtype not in (torch.int32, torch.int64) or labels.device != x.device:
        raise ValueError(f"labels must be int32 or int64 on {x.device}, got {labels.dtype} on {labels.device}")
    if V < 1:
        raise ValueError("the vocabulary is empty")
    ignored = labels == ignore_index
    _require(ignored | ((labels >= 0) & (labels < V)), f"a label is neither in [0, {V}) nor {ignore_index}")
    return torch.where(ignored, -1 - V, labels.long()).contiguous()


def _check_cu_seqlens(cu, hidden):
    if cu.ndim != 1 or len(cu) < 1 or cu.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be (S + 1,) int32 or int64, got {list(cu.shape)} {cu.dtype}")
    ends = torch.stack([cu[0] == 0, cu[-1] == len(hidden)])
    _require(torch.cat([ends, cu[1:] >= cu[:-1]]), f"cu_seqlens must rise from 0 to the {len(hidden)} tokens")
    return cu.to(hidden.device, torch.int64)


def _require(ok, message):
    if ok.is_cuda:
        torch._assert_async(ok.all(), message)  # fails on the device, later: the host does not wait for it
    elif not bool(ok.all()):
        raise ValueError(message)


# --- 6. The reference --------------------------------------------------------------------------------------------


def reference_logps(
    hidden, weight, labels, cu_seqlens=None, *, bias=None, logit_scale=1.0, softcap=0.0, ignore_index=-100
):
    """linear_logps written down plainly: full logits, autograd, fp32 (fp64 for fp64 operands). What tests compare
    with, and what each line above means. With weight=None hidden is the logits: the reference of gather_logps."""
    z = hidden.to(torch.promote_types(hidden.dtype, torch.float32))  # bf16 times bf16 would round z to bf16
    if weight is not None:
        z = z @ weight.to(z.dtype).t()
    z = logit_scale * (z if bias is None else z + bias)
    z = softcap * torch.tanh(z / softcap) if softcap else z
    valid = labels != ignore_index
    logps = z.log_softmax(-1).gather(-1, labels.long().where(valid, 0)[..., None]).squeeze(-1)
    logps = logps.where(valid, 0)
    if cu_seqlens is None:
        return logps
    return torch.stack([part.sum() for part in logps.tensor_split(cu_seqlens[1:-1].cpu().long())])
