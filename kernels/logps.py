"""Log-probabilities of given tokens: linear_logps, from hidden states and the output layer, without
all logits in memory; gather_logps, from logits that are there already.

The problem
    A preference loss needs for every completion token with label y the log-probability
        logp = z[y] - LSE,    LSE = log sum_v exp(z[v]),    z = W h,    W (V, D), h (D,)         (1)
    The logits of 8,192 tokens at V = 128,256 take 4.2 GB in fp32, and autograd keeps them and their
    gradient. bf16 logits spoil the result: near 20 their step is 1/8, and a sum over 128 tokens is
    off by 0.4 to 0.7 nat (results/README.md), more than many DPO margins.

The derivative
    d z[y] / d z[v] = 1[v = y], and d LSE / d z[v] = exp(z[v] - LSE) = p[v], the softmax. So
        dz[v] := d (-logp) / d z[v] = p[v] - 1[v = y]                                            (2)
    and with c = -(d loss / d logp), one number a token that comes from the loss:
        dH = c (dZ W)    (rows times c),        dW = dZ^T (c H)    (rows of H times c)           (3)

When c is known
    Cross-entropy's c is 1/N, so its gradient can be made in the forward pass. A preference loss has
    one c per sequence, known when both sequences of a pair are summed, too late for dZ^T H, a sum
    over tokens. So something of size N x V is kept until then, or the logits are computed again.

Three modes, by whether a gradient is wanted and by a budget of bytes
                      matrix products             FLOPs   kept between the passes
        forward only  z                            2NDV   nothing
        retain        z; dZ W, dZ^T H              6NDV   2 bytes a logit (fp32 operands: 4)
        recompute     z; z again, dZ W, dZ^T H     8NDV   2 numbers a token
    One chunk of the vocabulary, a few thousand columns, has its logits in memory at a time, for all
    N tokens: each chunk of dW is written once. Chunks beyond the budget are recomputed.

What is retained
    Logits rounded to bf16 would spoil p as they spoil (1). Kept are their exponentials: with m the
    largest logit of a row in a block of columns, e = exp(z - m) in fp16 and m in fp32 give
        p = e exp(m - LSE)                                                                       (4)
    e is at most 1 and off by at most 2^-11 of itself, or by 2^-25 below 2^-14; so is p. p[y] - 1,
    which (4) would spoil for p[y] near 1, comes from z[y] and LSE in fp32. fp32 operands ask for
    fp32 gradients, so their e is fp32. A second backward pass (retain_graph=True) recomputes.

Online softmax (Milakov & Gimelshein, arXiv 1805.02867)
    sum_v exp(z[v]) overflows, so it is kept as (m, s), the largest logit so far and the sum of
    exp(z - m). With a new block of columns:
        m' = max(m, block),   s' = s exp(m - m') + sum exp(block - m'),   LSE = m + log s        (5)
    A finished LSE is the pair (LSE, 1), so a chunk goes on from the LSE of the chunks before it.

CUDA runs Triton; a CPU runs PyTorch or, with TRITON_INTERPRET=1, Triton's interpreter (for tests).
LSE and z[y] are fp32 (fp64 operands: fp64). There are no atomics, so a run repeats its bits.
"""

from __future__ import annotations  # the kernels name tl.constexpr before Triton is imported

import functools
import math
import os
from types import SimpleNamespace

import torch

_run_as_is = torch._disable_dynamo  # torch.compiler.disable without its 1.4 s of imports
tl = None  # triton.language, set by _kernels()
BLOCK_V, NUM_WARPS = 4096, 8  # 16 logits a thread: two 16-byte loads in bf16, four in fp32
CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 704 << 20}  # in the cache; products stay large
RETAIN_BYTES = {"cpu": 512 << 20, "cuda": 4 << 30}  # bf16: 5,461 and 43,690 tokens at V = 49,152
ALIGN = 128  # chunks have a multiple of this many columns, so that rows start on 16 bytes

# ---- Triton kernels: fold and dz, one program a row (int64: row * stride passes 2^31), and a cast -


def _fold_kernel(
    logits_ptr, logits_row_stride, labels_ptr, lse_ptr, target_ptr, e_ptr, e_row_stride,
    peak_ptr, peak_row_stride, V, first_column, logit_scale, softcap,
    HAS_SOFTCAP: tl.constexpr, KEEP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Folds a chunk, columns [first_column, first_column + V), into lse and target: eq. 5. With
    KEEP it writes e (N, V), and the largest logit of every BLOCK_V columns to peak: eq. 4."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_row_stride
    columns = tl.arange(0, BLOCK_V)
    # (m, s) starts as (lse, 1), or with a finite m: exp(-inf - -inf) is NaN, while a logit of -inf
    # (a masked word) adds exp(-inf - m) = 0 as it should.
    lse = tl.load(lse_ptr + row)
    m = tl.maximum(lse, -1e38)
    s = tl.where(columns == 0, tl.exp(lse - m), 0.0)  # a partial sum a lane: one reduction less
    for start in range(0, V, BLOCK_V):
        inside = start + columns < V
        z = tl.load(logits_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        z *= logit_scale
        if HAS_SOFTCAP:
            z = softcap * (1.0 - 2.0 / (tl.exp(2.0 * z / softcap) + 1.0))  # softcap tanh(z/softcap)
        z = tl.where(inside, z, float("-inf"))
        peak = tl.maximum(tl.max(z, axis=0), -1e38)
        e = tl.exp(z - peak)
        if KEEP:
            e_at = e_ptr + row * e_row_stride + start + columns
            tl.store(e_at, e.to(e_ptr.dtype.element_ty), mask=inside)
            tl.store(peak_ptr + row * peak_row_stride + start // BLOCK_V, peak)
        m_new = tl.maximum(m, peak)
        s = s * tl.exp(m - m_new) + e * tl.exp(peak - m_new)
        m = m_new
    total = tl.sum(s, axis=0)
    tl.store(lse_ptr + row, tl.where(total == 0.0, float("-inf"), m + tl.log(total)))

    column = tl.load(labels_ptr + row) - first_column
    here = (column >= 0) & (column < V)  # false for ignored labels too, which are -1 - V
    z = tl.load(logits_ptr + column, mask=here, other=0.0).to(tl.float32) * logit_scale
    if HAS_SOFTCAP:
        z = softcap * (1.0 - 2.0 / (tl.exp(2.0 * z / softcap) + 1.0))
    tl.store(target_ptr + row, z, mask=here)


def _dz_kernel(
    x_ptr, x_row_stride, peak_ptr, peak_row_stride, labels_ptr, lse_ptr, dz_label_ptr, coef_ptr,
    dz_ptr, dz_row_stride, V, first_column, logit_scale, softcap,
    HAS_SOFTCAP: tl.constexpr, KEPT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes coef dZ of a chunk: eq. 2, with softcap's derivative; x is e if KEPT, else logits.
    dz_ptr may be x_ptr: a lane reads an element before it writes it."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_row_stride
    dz_ptr += row * dz_row_stride
    coef = tl.load(coef_ptr + row)
    # a row with coef 0 is not read: its dz is 0 whatever it holds (NaN), and its lse may be -inf
    lse = tl.where(coef != 0.0, tl.load(lse_ptr + row), 0.0)
    readable = tl.where(coef != 0.0, V, 0)
    dz_label = tl.load(dz_label_ptr + row)
    column = tl.load(labels_ptr + row) - first_column
    columns = tl.arange(0, BLOCK_V)
    for start in range(0, V, BLOCK_V):
        inside = start + columns < readable
        x = tl.load(x_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
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
            p *= 1.0 - (z / softcap) * (z / softcap)  # d softcap tanh(u/softcap) / du = 1 - tanh^2
        dz = tl.where(start + columns == column, dz_label, p) * coef
        tl.store(dz_ptr + start + columns, dz.to(dz_ptr.dtype.element_ty), mask=start + columns < V)


def _scale_kernel(x_ptr, unit_ptr, out_ptr, size, BLOCK_V: tl.constexpr):
    """Writes x times the number at unit_ptr, rounded once; one program for BLOCK_V numbers."""
    places = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    x = tl.load(x_ptr + places, mask=places < size, other=0.0).to(tl.float32)
    x *= tl.load(unit_ptr)
    tl.store(out_ptr + places, x.to(out_ptr.dtype.element_ty), mask=places < size)


@functools.cache
def _kernels():
    """The kernels, compiled at their first launch."""
    global tl
    import triton.language as tl
    from triton import jit

    return SimpleNamespace(fold=jit(_fold_kernel), dz=jit(_dz_kernel), scale=jit(_scale_kernel))


def _launch(kernel, programs, x, *arguments, **flags):
    with torch.cuda.device_of(x):  # Triton launches on the current device, which may be another
        kernel[(programs,)](
            x, *arguments, **flags, BLOCK_V=BLOCK_V, num_warps=NUM_WARPS, enable_fp_fusion=True
        )


def _on_triton(x):
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


# ---- the same two steps, in Triton or PyTorch; logits are before scale and softcap ---------------


def _fold(z, labels, first_column, lse, target, logit_scale, softcap, e=None):
    """Folds the chunk z (N, columns) into lse and target, in place; with e (N, columns) it fills e
    and returns the m of eq. 4, of BLOCK_V columns in Triton, of the chunk in PyTorch. There z is
    overwritten, and may be e."""
    if _on_triton(z):
        keep, blocks = e is not None, -(-z.shape[1] // BLOCK_V)
        peak = lse.new_empty(len(z), blocks) if keep else lse[:, None]  # not touched without KEEP
        e = e if keep else z
        _launch(
            _kernels().fold, len(z), z, z.stride(0), labels, lse, target, e, e.stride(0), peak,
            peak.stride(0), z.shape[1], first_column, logit_scale, softcap,
            HAS_SOFTCAP=softcap != 0, KEEP=keep,
        )  # fmt: skip
        return peak
    _scale_and_cap_(z, logit_scale, softcap)
    rows, columns = _labels_in(z, labels, first_column)
    target[rows] = z[rows, columns]
    peak = z.amax(-1, keepdim=True).clamp_(min=torch.finfo(z.dtype).min)  # finite, see _fold_kernel
    z.sub_(peak).exp_()
    torch.logaddexp(lse, z.sum(-1).log_().add_(peak.squeeze(-1)), out=lse)
    if e is not None and e.data_ptr() != z.data_ptr():
        e.copy_(z)
    return peak


def _dz(x, peak, labels, first_column, lse, dz_label, coef, out, logit_scale, softcap):
    """Writes coef dZ (eq. 2) to out, which may be x: logits if peak is None, else e of eq. 4.
    dz_label (N,): p[y] - 1 from fp32 numbers, 0 where coef is 0. PyTorch overwrites logits."""
    if _on_triton(x):
        kept, peak = peak is not None, lse[:, None] if peak is None else peak
        _launch(
            _kernels().dz, len(x), x, x.stride(0), peak, peak.stride(0), labels, lse, dz_label, coef,
            out, out.stride(0), x.shape[1], first_column, logit_scale, softcap,
            HAS_SOFTCAP=softcap != 0, KEPT=kept,
        )  # fmt: skip
        return
    if peak is None:
        _scale_and_cap_(x, logit_scale, softcap)
        z = x.clone() if softcap else None
        p = x.sub_(lse[:, None]).exp_()
    else:
        p = out.copy_(x).mul_((peak.squeeze(-1) - lse).exp()[:, None])
        z = p.clamp(min=1e-37).log_().add_(lse[:, None]) if softcap else None  # finite for p = 0
    if softcap:
        p.addcmul_(p, z.div_(softcap).square_(), value=-1)
    rows, columns = _labels_in(p, labels, first_column)
    p[rows, columns] = dz_label[rows]
    p.mul_(coef[:, None])
    if bool((coef == 0).any()):
        p[coef == 0] = 0  # 0 times NaN is NaN: a row that nobody asked for must not spoil the sum
    out.copy_(p)  # rounded when it is finished; nothing to do where out is p


def _scale(x, unit, out):
    """out = unit x, rounded once. On a GPU PyTorch's kernel for two types has a third of the
    bandwidth; the interpreter cuts bf16 numbers off instead of rounding them."""
    if not x.is_cuda:
        return torch.mul(x, unit, out=out)
    _launch(_kernels().scale, -(-x.numel() // BLOCK_V), x, unit, out, x.numel())
    return out


def _scale_and_cap_(z, logit_scale, softcap):
    if logit_scale != 1:
        z.mul_(logit_scale)
    if softcap:
        z.div_(softcap).tanh_().mul_(softcap)


def _labels_in(z, labels, first_column):
    """(rows whose label lies in this chunk, its column there). On a CPU only: the sizes vary."""
    columns = labels - first_column
    rows = ((columns >= 0) & (columns < z.shape[1])).nonzero().squeeze(-1)
    return rows, columns[rows]


def _dz_of_labels(lse, target, coef, softcap):
    """p[y] - 1, times the slope of softcap there; exact where p[y] is near 1. 0 where coef is 0."""
    dz = torch.expm1(target - lse)
    dz = dz * (1 - (target / softcap) ** 2) if softcap else dz
    return torch.where(coef != 0, dz, 0)


def _empty_state(x, labels):
    """(lse, target) of no columns: the log of an empty sum, and no logit found yet."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_full(labels.shape, -math.inf, dtype=wide), x.new_zeros(labels.shape, dtype=wide)


@_run_as_is
def gather_logps(logits, labels, ignore_index=-100):
    """Log-probabilities, in nats, of labels under softmax(logits): eq. 1, with its gradient.
    logits: (..., V), bf16, fp16 or fp32, on a CPU also fp64; -inf is allowed. labels: (...), int32
    or int64; where a label is ignore_index, the result and the gradient are 0. Returns (...), fp32
    (fp64 for fp64 logits). Raises ValueError for shapes that do not fit and for labels outside
    [0, V); on CUDA such a label ends in a device-side assertion."""
    checked = _check(logits, labels, logits.shape[-1], ignore_index)
    rows = logits.reshape(-1, logits.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return _GatherLogps.apply(rows, checked.view(-1)).view(labels.shape)


class _GatherLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels):
        lse, target = _empty_state(logits, labels)
        for rows, z in _row_chunks(logits, lse.dtype):
            _fold(z, labels[rows], 0, lse[rows], target[rows], 1.0, 0.0)
        ctx.save_for_backward(logits, labels, lse, target)
        return torch.where(labels >= 0, target - lse, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logps):
        logits, labels, lse, target = ctx.saved_tensors
        coef = torch.where(labels >= 0, -grad_logps, 0).to(lse.dtype)
        label, grad = _dz_of_labels(lse, target, coef, 0.0), torch.empty_like(logits)
        for rows, z in _row_chunks(logits, lse.dtype):
            _dz(z, None, labels[rows], 0, lse[rows], label[rows], coef[rows], grad[rows], 1.0, 0.0)
        return grad, None


def _row_chunks(logits, dtype):
    """(rows, their logits): all at once for the kernels; on a CPU copies that fit the cache."""
    if _on_triton(logits):
        return [(slice(None), logits)]
    size = max(1, CHUNK_BYTES["cpu"] // (4 * logits.shape[1]))
    chunks = (slice(i, i + size) for i in range(0, len(logits), size))
    return ((rows, logits[rows].to(dtype, copy=True)) for rows in chunks)


@_run_as_is
def linear_logps(
    hidden, weight, labels, cu_seqlens=None, *, bias=None, logit_scale=1.0, softcap=0.0,
    ignore_index=-100, chunk_bytes=None, retain_bytes=None,
):  # fmt: skip
    """Log-probabilities, in nats, of labels under softmax(z), z = cap(logit_scale (W h + bias)).

    hidden (N, D), weight (V, D), bias (V,) or None: one type, bf16, fp16, fp32, on a CPU also fp64.
        hidden[t] is the state that predicts labels[t].
    labels (N,): int32 or int64; ignore_index gives 0, and no gradient.
    cu_seqlens (S + 1,): 0 = cu[0] <= ... <= cu[S] = N; sequence s is cu[s]:cu[s + 1], maybe empty.
    logit_scale: Cohere's logit_scale, Granite's 1 / logits_scaling. softcap: cap(u) = softcap
        tanh(u / softcap), as in Gemma 2 (arXiv 2408.00118, section 2); 0 is none.
    chunk_bytes: for what exists of one chunk of at least 128 columns. None: CHUNK_BYTES.
    retain_bytes: for what is kept until backward. None: RETAIN_BYTES, no share of what is free, so
        that a gradient's bits depend on no other process.
    Returns fp32 (fp64 for fp64 operands): (N,), one number a token, or with cu_seqlens (S,) sums.
    Gradients have the types of hidden, weight and bias. Products of halves come out in fp32; those
    of fp32 follow torch.backends.cuda.matmul on CUDA. Autocast is off. Raises as gather_logps does."""
    device = "cuda" if hidden.is_cuda else "cpu"
    chunk_bytes = CHUNK_BYTES[device] if chunk_bytes is None else chunk_bytes
    retain_bytes = RETAIN_BYTES[device] if retain_bytes is None else retain_bytes
    budgets = chunk_bytes, retain_bytes if torch.is_grad_enabled() else 0
    labels = _check(hidden, labels, len(weight), ignore_index)
    settings = float(logit_scale), float(softcap), *budgets
    with torch.autocast(hidden.device.type, enabled=False):
        logps = _LinearLogps.apply(hidden, weight, bias, labels, settings)
    if cu_seqlens is None:
        return logps
    ends = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == len(hidden))
    rises = (cu_seqlens[1:] >= cu_seqlens[:-1]).all()
    _require(ends & rises, f"cu_seqlens must rise from 0 to the {len(hidden)} tokens")
    # summed in fp64 and rounded once; segment_reduce adds each sequence in order, without atomics
    offsets = cu_seqlens.to(hidden.device, torch.int64)
    sums = torch.segment_reduce(logps.double(), "sum", offsets=offsets, initial=0, unsafe=True)
    return sums.to(logps.dtype)


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, settings):
        logit_scale, softcap, chunk_bytes, retain_bytes = settings
        retain_bytes = retain_bytes if any(ctx.needs_input_grad) else 0
        lse, target = _empty_state(hidden, labels)
        h, half = _wide(hidden), hidden.dtype.itemsize == 2
        e_dtype = torch.float16 if half else hidden.dtype
        # half operands need 4 bytes a logit, 2 for dZ, and 6 D for W and dW in another type
        bytes_a_column = 6 * sum(hidden.shape) if half else 4 * len(hidden)
        columns = max(1, chunk_bytes // max(1, bytes_a_column) // ALIGN) * ALIGN
        kept = {}  # first column of a chunk -> (e, peak)
        for chunk, tile in _chunks(h, weight, columns):
            e, size = None, len(h) * (chunk.stop - chunk.start) * e_dtype.itemsize
            if size <= retain_bytes:
                retain_bytes -= size
                e = h.new_empty(len(h), chunk.stop - chunk.start, dtype=e_dtype)
            in_place = e is not None and tile is not None and e.dtype == h.dtype
            z = _logits(h, _wide(weight[chunk]), bias, chunk, e if in_place else tile)
            peak = _fold(z, labels, chunk.start, lse, target, logit_scale, softcap, e)
            if e is not None:
                kept[chunk.start] = e, peak
            del z, e, peak  # before the next ones are made
        ctx.settings, ctx.kept = (logit_scale, softcap, columns), kept
        ctx.save_for_backward(hidden, weight, bias, labels, lse, target)
        return torch.where(labels >= 0, target - lse, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logps):
        with torch.autocast(grad_logps.device.type, enabled=False):
            return *_gradients(ctx, grad_logps), None, None


def _gradients(ctx, grad_logps):
    """Eq. 3, chunk by chunk, using up what was kept: (dhidden, dweight, dbias), None if not wanted.
    Half operands under Triton: dZ and c H, over its largest entry, are rounded to fp16, whose 11
    bits fit numbers that are at most 1; bf16 W is turned to fp16 for it, exactly between 6e-5 and
    65504. dZ in bf16 would cost 1.5e-3 of the norm of dH (SmolLM2-135M), as much as rounding dH.
    Otherwise c goes into dZ, and products are in fp32, but for a bf16 dW on a CPU with bf16."""
    hidden, weight, bias, labels, lse, target = ctx.saved_tensors
    (logit_scale, softcap, columns), wanted = ctx.settings, ctx.needs_input_grad
    coef = torch.where(labels >= 0, -grad_logps, 0).to(lse.dtype)  # minus: dZ is that of -logp
    # under Triton all rows: to count those with a gradient, the host would have to wait
    rows = slice(None) if _on_triton(coef) or bool(coef.all()) else coef.nonzero().squeeze(-1)
    labels, lse, target, coef = (tensor[rows] for tensor in (labels, lse, target, coef))
    h, scaled = _wide(hidden[rows]), coef * logit_scale
    label, half = _dz_of_labels(lse, target, coef, softcap), h.dtype.itemsize == 2
    right, c, unit = torch.where(coef[:, None] != 0, h, 0), scaled, 1.0
    if half:
        ch, one = scaled[:, None] * right, lse.new_ones(())
        unit = ch.abs().amax().clamp(min=1e-30) if len(h) else one  # a tensor: no wait for CUDA
        right, c = (ch / unit).half(), (coef != 0).to(lse.dtype)
    narrow = weight.dtype == torch.bfloat16 and multiplies_bf16()
    direct = not half and (narrow or weight.dtype == h.dtype)  # the product has the type of dW
    dhidden = lse.new_zeros(h.shape) if wanted[0] else None  # a sum over chunks
    dweight = weight.new_empty(weight.shape) if wanted[1] else None  # each chunk is written once
    dbias = torch.empty_like(bias) if wanted[2] else None
    for chunk, tile in _chunks(h, weight, columns):
        w, peak = _wide(weight[chunk]), None
        if chunk.start in ctx.kept:
            x, peak = (tensor[rows] for tensor in ctx.kept.pop(chunk.start))
        else:
            x = _logits(h, w, bias, chunk, tile)
        dz = x
        if x.dtype != right.dtype:
            dz = torch.empty_like(x, dtype=right.dtype) if tile is None else tile[:, : len(w)]
        _dz(x, peak, labels, chunk.start, lse, label, c, dz, logit_scale, softcap)
        del x, peak
        if wanted[2]:
            dbias[chunk] = scaled @ dz.to(scaled.dtype) if half else dz.sum(0)
        if wanted[0] and half and dz.is_cuda:  # += inside the product, not by another pass over dH
            if w.dtype != dz.dtype:
                w = _scale(w.contiguous(), one, w.new_empty(w.shape, dtype=dz.dtype))
            torch.addmm(dhidden, dz, w, out_dtype=torch.float32, out=dhidden)
        elif wanted[0]:
            dhidden.addmm_(dz.to(dhidden.dtype), w.to(dhidden.dtype))
        if wanted[1] and direct:
            torch.mm(dz.to(weight.dtype).t(), right.to(weight.dtype), out=dweight[chunk])
        elif wanted[1]:
            _scale(_mm(dz.t(), right), unit, dweight[chunk])
        del dz, w  # before the next ones are made
    if wanted[0]:
        total, dhidden = dhidden, torch.zeros_like(hidden)
        dhidden[rows] = (total.mul_(scaled[:, None]) if half else total).to(hidden.dtype)
    return dhidden, dweight, dbias


def _chunks(h, weight, columns):
    """(slice of the vocabulary, memory for its logits, reused on a CPU; None under Triton)."""
    tile = None if _on_triton(h) else h.new_empty(len(h), min(columns, len(weight)))
    for start in range(0, len(weight), columns):
        yield slice(start, min(start + columns, len(weight))), tile


def _logits(h, w, bias, chunk, tile):
    """Raw logits (N, columns), fp32 or fp64."""
    z = _mm(h, w.t()) if tile is None else torch.mm(h, w.t(), out=tile[:, : len(w)])
    return z if bias is None else z.add_(bias[chunk])


def _mm(a, b):
    """The product as it leaves the fp32 accumulators, never rounded to half."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _wide(x):
    """Operands of the products: on a CPU fp32, since its product of halves is rounded to half."""
    return x if _on_triton(x) or x.dtype == torch.float64 else x.float()


@functools.cache
def multiplies_bf16():
    """Whether an x86 CPU has instructions for products of bf16 numbers."""
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))


def _check(x, labels, V, ignore_index):
    """Labels as int64, the ignored ones -1 - V: before column 0 of every chunk."""
    if labels.shape != x.shape[:-1] or labels.is_floating_point():
        raise ValueError(f"labels must be {list(x.shape[:-1])} integers, not {list(labels.shape)}")
    if x.dtype == torch.float64 and _on_triton(x):
        raise ValueError("the kernels take bf16, fp16 and fp32, not fp64")
    ignored = labels == ignore_index
    valid = ignored | ((labels >= 0) & (labels < V))
    _require(valid.all(), f"a label is neither in [0, {V}) nor {ignore_index}")
    return torch.where(ignored, -1 - V, labels.long()).contiguous()


def _require(ok, message):
    if ok.is_cuda:
        torch._assert_async(ok, message)  # fails on the device, later: the host does not wait
    elif not bool(ok):
        raise ValueError(message)
