"""Log-probabilities of given tokens without holding all logits: linear_logps, from hidden states and
the output layer; gather_logps, from given logits. Both must equal plain_logps, which is two lines.

The problem
    A preference loss needs for every completion token with label y the log-probability
        logp = z[y] - LSE,    LSE = log sum_v exp(z[v]),    z = W h,    W (V, D), h (D,)         (1)
    The logits of 8,192 tokens at V = 128,256 take 4.2 GB in fp32, and as much for their gradient. In
    bf16 a sum over 128 tokens is off by 0.4 to 0.7 nat, more than many DPO margins.

The derivative
    d z[y] / d z[v] = 1[v = y], and d LSE / d z[v] = exp(z[v] - LSE) = p[v], the softmax. So
        dz[v] := d (-logp) / d z[v] = p[v] - 1[v = y]                                            (2)
    and with c = -(d loss / d logp), one number a token that comes from the loss:
        dH = c (dZ W)    (rows times c),        dW = dZ^T (c H)    (rows of H times c)           (3)

When c is known
    Cross-entropy's c is 1/N, so its gradient can be made in the forward pass. A preference loss has
    one c per sequence, known when both sequences of a pair are summed: too late for dZ^T H. So
    something of size N x V is kept until then, or the logits are computed again.

Three modes, by whether a gradient is wanted and by a budget of bytes
                      matrix products             FLOPs   kept between the passes
        forward only  z                            2NDV   nothing
        retain        z; dZ W, dZ^T H              6NDV   2 bytes a logit (fp32 operands: 4)
        recompute     z; z again, dZ W, dZ^T H     8NDV   2 numbers a token
    The logits of one chunk of the vocabulary, a few thousand columns, are in memory at a time.

What is retained
    Rounding logits to bf16 would spoil p, as it spoils (1). So exponentials are kept: with m the
    largest logit of a row in a block of columns, e = exp(z - m) in fp16 and m in fp32 give
        p = e exp(m - LSE)                                                                       (4)
    e is at most 1 and off by at most 2^-11 of itself, or by 2^-25 below 2^-14; so is p. p[y] - 1,
    which (4) would spoil for p[y] near 1, comes from z[y] and LSE in fp32. fp32 operands have an
    fp32 e. A second backward pass (retain_graph=True) recomputes.

Online softmax (Milakov & Gimelshein, arXiv 1805.02867)
    sum_v exp(z[v]) overflows, so it is kept as (m, s), the largest logit so far and the sum of
    exp(z - m). With a new block of columns:
        m' = max(m, block),   s' = s exp(m - m') + sum exp(block - m'),   LSE = m + log s        (5)
    A finished LSE is the pair (LSE, 1), so a chunk goes on from the LSE of the chunks before it.

CUDA runs Triton; a CPU runs PyTorch or, with TRITON_INTERPRET=1, Triton's interpreter (for tests).
LSE and z[y] are fp32 (fp64 operands: fp64). There are no atomics: results are bitwise reproducible.
"""

from __future__ import annotations  # without Triton, annotations that name tl stay text

import math
import os

import torch

try:
    import triton.language as tl
    from triton import jit
except ImportError:  # macOS and Windows have no Triton; a CPU runs the PyTorch half of this file
    jit = staticmethod  # leaves a function as it is

BLOCK_V, NUM_WARPS = 4096, 8  # 16 logits a thread: two 16-byte loads in bf16, four in fp32
CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 704 << 20}  # fits the cache; is enough for full speed
RETAIN_BYTES = {"cpu": 512 << 20, "cuda": 4 << 30}  # bf16: 5,461 and 43,690 tokens at V = 49,152
ALIGN = 128  # chunks have a multiple of this many columns, so that rows start on 16 bytes


def plain_logps(hidden, weight, labels):
    """The definition, eq. 1: (N,) from hidden (N, D), weight (V, D) and labels (N,)."""
    logits = hidden.float() @ weight.float().t()
    return logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


# ---- Triton kernels; one program a row, whose offsets are int64: row * stride passes 2^31 --------
@jit
def _cap(z, softcap, HAS_SOFTCAP: tl.constexpr):
    """softcap tanh(z / softcap)."""
    if HAS_SOFTCAP:
        z = softcap * (1.0 - 2.0 / (tl.exp(2.0 * z / softcap) + 1.0))
    return z


@jit
def _update_kernel(
    logits_ptr, logits_row_stride, labels_ptr, lse_ptr, target_ptr, exp_ptr, exp_row_stride,
    block_max_ptr, block_max_row_stride, width, first_column, logit_scale, softcap,
    HAS_SOFTCAP: tl.constexpr, KEEP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Updates lse and target by a chunk, columns [first_column, first_column + width): eq. 5. With KEEP
    it writes e (N, width), and the largest logit of every BLOCK_V columns to block_max: eq. 4."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_row_stride
    columns = tl.arange(0, BLOCK_V)
    # Go on from a finished LSE: m = lse, s = 1, in one lane. m is finite, as exp(-inf + inf) is NaN.
    lse = tl.load(lse_ptr + row)
    m = tl.maximum(lse, -1e38)
    # One partial sum per lane, reduced once after the loop.
    s = tl.where(columns == 0, tl.exp(lse - m), 0.0)
    for start in range(0, width, BLOCK_V):
        inside = start + columns < width
        z = tl.load(logits_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        z = tl.where(inside, _cap(z * logit_scale, softcap, HAS_SOFTCAP), float("-inf"))
        block_max = tl.maximum(tl.max(z, axis=0), -1e38)
        exp_logits = tl.exp(z - block_max)
        if KEEP:
            exp_at = exp_ptr + row * exp_row_stride + start + columns
            tl.store(exp_at, exp_logits.to(exp_ptr.dtype.element_ty), mask=inside)
            tl.store(block_max_ptr + row * block_max_row_stride + start // BLOCK_V, block_max)
        m_new = tl.maximum(m, block_max)
        s = s * tl.exp(m - m_new) + exp_logits * tl.exp(block_max - m_new)
        m = m_new
    total = tl.sum(s, axis=0)
    tl.store(lse_ptr + row, tl.where(total == 0.0, float("-inf"), m + tl.log(total)))
    column = tl.load(labels_ptr + row) - first_column
    here = (column >= 0) & (column < width)  # false for ignored labels too, which are -1 - V
    z = tl.load(logits_ptr + column, mask=here, other=0.0).to(tl.float32)
    tl.store(target_ptr + row, _cap(z * logit_scale, softcap, HAS_SOFTCAP), mask=here)


@jit
def _dlogits_kernel(
    x_ptr, x_row_stride, block_max_ptr, block_max_row_stride, labels_ptr, lse_ptr, dlabel_ptr,
    c_ptr, dz_ptr, dz_row_stride, width, first_column, logit_scale, softcap,
    HAS_SOFTCAP: tl.constexpr, KEPT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes c dZ of a chunk: eq. 2, with softcap's derivative. x is e if KEPT, else the
    logits. dz_ptr may be x_ptr: a lane reads an element before it writes it."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_row_stride
    dz_ptr += row * dz_row_stride
    c = tl.load(c_ptr + row)
    wanted = c != 0.0
    # A row without gradient (c = 0) is not read: it may hold NaN, and its lse may be -inf. Its dz is 0.
    lse = tl.where(wanted, tl.load(lse_ptr + row), 0.0)
    readable = tl.where(wanted, width, 0)
    dlabel = tl.load(dlabel_ptr + row)
    label_column = tl.load(labels_ptr + row) - first_column
    columns = tl.arange(0, BLOCK_V)
    for start in range(0, width, BLOCK_V):
        inside = start + columns < readable
        x = tl.load(x_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        if KEPT:
            block_max = tl.load(block_max_ptr + row * block_max_row_stride + start // BLOCK_V)
            p = x * tl.where(wanted, tl.exp(block_max - lse), 0.0)
            z = block_max + tl.log(tl.maximum(x, 1e-37))  # x = 0 has p = 0, and here a finite z
        else:
            z = _cap(x * logit_scale, softcap, HAS_SOFTCAP)
            p = tl.exp(z - lse)
        if HAS_SOFTCAP:  # d softcap tanh(u/softcap) / du = 1 - tanh^2, which dlabel has already
            p *= 1.0 - (z / softcap) * (z / softcap)
        dz = (tl.where(start + columns == label_column, dlabel, p) * c).to(dz_ptr.dtype.element_ty)
        tl.store(dz_ptr + start + columns, dz, mask=start + columns < width)


@jit
def _scale_kernel(x_ptr, scale_ptr, out_ptr, size, BLOCK_V: tl.constexpr):
    """Writes x times the number at scale_ptr, rounded once; one program for BLOCK_V numbers."""
    places = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    x = tl.load(x_ptr + places, mask=places < size, other=0.0).to(tl.float32)
    x *= tl.load(scale_ptr)
    tl.store(out_ptr + places, x.to(out_ptr.dtype.element_ty), mask=places < size)


def _launch(kernel, programs, x, *arguments, **flags):
    flags |= {"BLOCK_V": BLOCK_V, "num_warps": NUM_WARPS, "enable_fp_fusion": True}
    with torch.cuda.device_of(x):  # Triton launches on the current device, which may be another
        kernel[(programs,)](x, *arguments, **flags)


def _on_triton(x):
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


# ---- the same two steps, in Triton or PyTorch; logits are before scale and softcap ---------------
def _update(z, labels, first_column, lse, target, logit_scale, softcap, e=None):
    """Updates lse and target in place by the logits z (N, columns) of a chunk: eq. 5. PyTorch
    overwrites z. e (N, columns) is filled with the exponentials of eq. 4 where it is given.
    Returns their m, (N, blocks): in Triton of every BLOCK_V columns, in PyTorch of the chunk."""
    if _on_triton(z):
        keep = e is not None
        blocks = -(-z.shape[1] // BLOCK_V)
        # Without KEEP the kernel never touches e and block_max; any tensor will do.
        block_max = lse.new_empty(len(z), blocks) if keep else lse[:, None]
        e = e if keep else z
        _launch(
            _update_kernel, len(z), z, z.stride(0), labels, lse, target, e, e.stride(0), block_max,
            block_max.stride(0), z.shape[1], first_column, logit_scale, softcap,
            HAS_SOFTCAP=softcap != 0, KEEP=keep,
        )  # fmt: skip
        return block_max
    _scale_and_cap_(z, logit_scale, softcap)
    rows, columns = _labels_in(z, labels, first_column)
    target[rows] = z[rows, columns]
    block_max = z.amax(-1, keepdim=True).clamp_(min=torch.finfo(z.dtype).min)  # finite, as above
    z.sub_(block_max).exp_()
    torch.logaddexp(lse, z.sum(-1).log_().add_(block_max.squeeze(-1)), out=lse)
    if e is not None:
        e.copy_(z)
    return block_max


def _dlogits(x, block_max, labels, first_column, lse, dlabel, c, out, logit_scale, softcap):
    """Writes c dZ (eq. 2) of a chunk to out, which may be x: logits if block_max is None, which
    PyTorch overwrites, else e of eq. 4. dlabel (N,): dZ of the label, with softcap's derivative."""
    if _on_triton(x):
        kept = block_max is not None
        block_max = block_max if kept else lse[:, None]  # never read
        _launch(
            _dlogits_kernel, len(x), x, x.stride(0), block_max, block_max.stride(0), labels, lse,
            dlabel, c, out, out.stride(0), x.shape[1], first_column, logit_scale, softcap,
            HAS_SOFTCAP=softcap != 0, KEPT=kept,
        )  # fmt: skip
        return
    if block_max is None:
        _scale_and_cap_(x, logit_scale, softcap)
        z = x.clone() if softcap else None
        p = x.sub_(lse[:, None]).exp_()
    else:
        p = out.copy_(x).mul_((block_max.squeeze(-1) - lse).exp()[:, None])
        z = p.clamp(min=1e-37).log_().add_(lse[:, None]) if softcap else None  # p = exp(z - lse)
    if softcap:
        p.addcmul_(p, z.div_(softcap).square_(), value=-1)
    rows, columns = _labels_in(p, labels, first_column)
    p[rows, columns] = dlabel[rows]
    p.mul_(c[:, None])
    p[c == 0] = 0  # 0 times NaN is NaN: an unwanted row must not spoil the sum
    out.copy_(p)  # rounded when it is finished; nothing to do where out is p


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


def _empty_state(x, labels):
    """(lse, target) before the first chunk: -inf, the log of an empty sum, and 0."""
    target = x.new_zeros(labels.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.full_like(target, -math.inf), target


# ---- from logits ---------------------------------------------------------------------------------
@torch._disable_dynamo  # torch.compiler.disable without its 1.4 s of imports
def gather_logps(logits, labels, ignore_index=-100):
    """Log-probabilities, in nats, of labels under softmax(logits): eq. 1, with its gradient.

    logits (..., V): bf16, fp16 or fp32, on a CPU also fp64; -inf is allowed.
    labels (...): int32 or int64; ignore_index gives 0, and no gradient.
    Returns (...), fp32 (fp64 for fp64 logits). Raises ValueError for shapes that do not fit, and for
    labels outside [0, V), which on CUDA end in a device-side assertion."""
    checked = _check(logits, labels, logits.shape[-1], ignore_index)
    rows = logits.reshape(-1, logits.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return _GatherLogps.apply(rows, checked.view(-1)).view(labels.shape)


class _GatherLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels):
        lse, target = _empty_state(logits, labels)
        z = logits if _on_triton(logits) else logits.to(lse.dtype, copy=True)
        _update(z, labels, 0, lse, target, 1.0, 0.0)
        ctx.save_for_backward(logits, labels, lse, target)
        return torch.where(labels >= 0, target - lse, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logps):
        logits, labels, lse, target = ctx.saved_tensors
        c = torch.where(labels >= 0, -grad_logps, 0).to(lse.dtype)  # minus: dZ is that of -logp
        dlabel = torch.where(c != 0, torch.expm1(target - lse), 0)
        dlogits = torch.empty_like(logits)
        z = logits if _on_triton(logits) else logits.to(lse.dtype, copy=True)
        _dlogits(z, None, labels, 0, lse, dlabel, c, dlogits, 1.0, 0.0)
        return dlogits, None


# ---- from hidden states and the output layer -----------------------------------------------------
@torch._disable_dynamo
def linear_logps(
    hidden, weight, labels, cu_seqlens=None, *, bias=None, logit_scale=1.0, softcap=0.0,
    ignore_index=-100, chunk_bytes=None, retain_bytes=None,
):  # fmt: skip
    """Log-probabilities, in nats, of labels under softmax(z), z = cap(logit_scale (W h + bias)).

    hidden (N, D), weight (V, D), bias (V,) or None: one type, bf16, fp16, fp32, on a CPU also fp64.
    labels (N,): int32 or int64, predicted by hidden; ignore_index gives 0, and no gradient.
    cu_seqlens (S + 1,): 0 = cu[0] <= ... <= cu[S] = N; sequence s is cu[s]:cu[s + 1], maybe empty.
    logit_scale: Cohere's logit_scale, Granite's 1 / logits_scaling.
    softcap: cap(u) = softcap tanh(u / softcap), Gemma 2 (arXiv 2408.00118, section 2); 0: none.
    chunk_bytes: budget for a chunk, which has at least 128 columns. None: CHUNK_BYTES.
    retain_bytes: budget for what is kept until backward. None: RETAIN_BYTES.
    Returns fp32 (fp64 for fp64 operands): (N,), one number a token, or with cu_seqlens (S,) sums.
    Gradients have the types of hidden, weight and bias. Autocast is off. Raises as gather_logps.
        forward: _LinearLogps.forward, and for each chunk of the vocabulary _logits, _update
        backward: _gradients or _gradients_of_halves, _dlogits_chunks, for each chunk _dlogits
    """
    device = "cuda" if hidden.is_cuda else "cpu"
    chunk_bytes = CHUNK_BYTES[device] if chunk_bytes is None else chunk_bytes
    retain_bytes = RETAIN_BYTES[device] if retain_bytes is None else retain_bytes
    retain_bytes = retain_bytes if torch.is_grad_enabled() else 0
    labels = _check(hidden, labels, len(weight), ignore_index)
    settings = float(logit_scale), float(softcap), chunk_bytes, retain_bytes
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
        h, is_half = _operand(hidden), hidden.dtype.itemsize == 2
        lse, target = _empty_state(hidden, labels)
        e_dtype = torch.float16 if is_half else hidden.dtype
        # Bytes for each column: 4 N for logits; of halves also 2 N for dZ, 6 D for W and dW.
        bytes_a_column = 6 * sum(hidden.shape) if is_half else 4 * len(hidden)
        columns = max(1, chunk_bytes // max(1, bytes_a_column) // ALIGN) * ALIGN
        kept = {}  # first column of a chunk: (e, block_max)
        for start in range(0, len(weight), columns):
            z = _logits(h, weight, bias, start, columns)
            e = None
            if any(ctx.needs_input_grad) and z.numel() * e_dtype.itemsize <= retain_bytes:
                retain_bytes -= z.numel() * e_dtype.itemsize
                e = torch.empty_like(z, dtype=e_dtype)
            block_max = _update(z, labels, start, lse, target, logit_scale, softcap, e)
            if e is not None:
                kept[start] = e, block_max
            del z, e, block_max  # before the next ones are made
        ctx.settings, ctx.kept = (logit_scale, softcap, columns), kept
        ctx.save_for_backward(hidden, weight, bias, labels, lse, target)
        return torch.where(labels >= 0, target - lse, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logps):
        hidden, _, _, labels, lse, _ = ctx.saved_tensors
        # c of eq. 3, times logit_scale, which is d z / d (W h).
        c = torch.where(labels >= 0, -grad_logps, 0).to(lse.dtype) * ctx.settings[0]
        halves = _on_triton(hidden) and hidden.dtype.itemsize == 2
        with torch.autocast(grad_logps.device.type, enabled=False):
            gradients = _gradients_of_halves(ctx, c) if halves else _gradients(ctx, c)
        return *gradients, None, None


def _gradients(ctx, c):
    """(dhidden, dweight, dbias) of eq. 3, None where not wanted, using up what was kept. For fp32 and
    fp64 operands, and for all on a CPU, where dW of a bf16 W is a bf16 product. c goes into dZ."""
    hidden, weight = ctx.saved_tensors[:2]
    h = _operand(hidden)
    wanted_h = torch.where(c[:, None] != 0, h, 0)  # the others may hold NaN, and 0 NaN is NaN
    if weight.dtype == torch.bfloat16:
        wanted_h = wanted_h.bfloat16()

    dhidden, dweight, dbias = _empty_gradients(ctx)
    for chunk, dz in _dlogits_chunks(ctx, h, c, h.dtype):
        if dbias is not None:
            dbias[chunk] = dz.sum(0)
        if dhidden is not None:
            dhidden.addmm_(dz, _operand(weight[chunk]))
        if dweight is not None:
            dweight[chunk] = dz.to(wanted_h.dtype).t() @ wanted_h
        del dz  # before the next one is made
    return None if dhidden is None else dhidden.to(hidden.dtype), dweight, dbias


def _gradients_of_halves(ctx, c):
    """_gradients of bf16 and fp16 operands under Triton. Products take fp16, whose 11 bits fit numbers
    of at most 1: dZ without c, and c H divided by its largest entry. A bf16 W becomes fp16, exactly
    between 6e-5 and 65504. dZ in bf16 would cost 1.5e-3 of the norm of dH (SmolLM2-135M)."""
    hidden, weight = ctx.saved_tensors[:2]
    wanted = (c != 0).to(c.dtype)  # 0 or 1 in place of c; c itself multiplies H and, at last, dH
    ch = c[:, None] * torch.where(c[:, None] != 0, hidden, 0)  # fp32
    one = c.new_ones(())
    # The largest entry stays a tensor, so that the host does not wait for CUDA.
    largest = ch.abs().amax().clamp(min=1e-30) if len(ch) else one
    ch = (ch / largest).half()

    dhidden, dweight, dbias = _empty_gradients(ctx)
    for chunk, dz in _dlogits_chunks(ctx, hidden, wanted, torch.float16):
        if dbias is not None:
            dbias[chunk] = c @ dz.float()
        w = weight[chunk]
        if dhidden is not None and dz.is_cuda:
            if w.dtype != dz.dtype:
                w = _scale(w.contiguous(), one, torch.empty_like(w, dtype=dz.dtype))
            # The product adds to dH itself, which saves another pass over dH.
            torch.addmm(dhidden, dz, w, out_dtype=torch.float32, out=dhidden)
        elif dhidden is not None:
            dhidden.addmm_(dz.float(), w.float())
        if dweight is not None:
            _scale(_mm(dz.t(), ch), largest, dweight[chunk])
        del w, dz  # before the next ones are made
    return None if dhidden is None else dhidden.mul_(c[:, None]).to(hidden.dtype), dweight, dbias


def _empty_gradients(ctx):
    """dhidden, a sum over chunks in fp32 or fp64; dweight and dbias, each chunk written once."""
    hidden, weight, bias, _, lse, _ = ctx.saved_tensors
    dhidden = torch.zeros_like(hidden, dtype=lse.dtype) if ctx.needs_input_grad[0] else None
    dweight = weight.new_empty(weight.shape) if ctx.needs_input_grad[1] else None
    return dhidden, dweight, torch.empty_like(bias) if ctx.needs_input_grad[2] else None


def _dlogits_chunks(ctx, h, row_scale, dtype):
    """Yields (slice of the vocabulary, row_scale dZ (N, columns) in dtype), from what was kept, or
    from logits that are computed again."""
    _, weight, bias, labels, lse, target = ctx.saved_tensors
    logit_scale, softcap, columns = ctx.settings
    dlabel = torch.expm1(target - lse)  # p[y] - 1, exact where p[y] is near 1
    if softcap:
        dlabel *= 1 - (target / softcap) ** 2
    dlabel = torch.where(row_scale != 0, dlabel, 0)
    for start in range(0, len(weight), columns):
        x, block_max = ctx.kept.pop(start, (None, None))
        if x is None:
            x = _logits(h, weight, bias, start, columns)
        dz = x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
        _dlogits(x, block_max, labels, start, lse, dlabel, row_scale, dz, logit_scale, softcap)
        del x, block_max
        yield slice(start, start + dz.shape[1]), dz
        del dz  # before the next one is made


def _logits(h, weight, bias, start, columns):
    """Raw logits (N, columns) of a chunk of the vocabulary, fp32 or fp64."""
    z = _mm(h, _operand(weight[start : start + columns]).t())
    return z if bias is None else z.add_(bias[start : start + columns])


def _mm(a, b):
    """The product as it leaves the fp32 accumulators, never rounded to half."""
    if a.dtype.itemsize > 2:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _scale(x, scale, out):
    """out = scale x, rounded once. PyTorch's kernel for two types has a third of the bandwidth."""
    if not x.is_cuda:
        return torch.mul(x, scale, out=out)
    _launch(_scale_kernel, -(-x.numel() // BLOCK_V), x, scale, out, x.numel())
    return out


def _operand(x):
    """An operand of the products: on a CPU fp32, since its product of halves is rounded to half."""
    return x if _on_triton(x) or x.dtype == torch.float64 else x.float()


def _check(x, labels, V, ignore_index):
    """Labels as int64. Ignored ones become -1 - V: minus any chunk's first column it is negative."""
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
