"""Log-probabilities of given tokens, without the logits ever being in memory.

    gather_logps(logits, labels)                        logits already there: one pass over them, in Triton
    linear_logps(hidden, weight, labels, cu_seqlens)    hidden states and the output layer: no (N, V) array at all
    reference_logps(hidden, weight, labels, cu_seqlens) the same in six lines of PyTorch, to be compared with

The problem
    A preference loss needs, for every completion token t with label y, its log-probability
        logp = z[y] - LSE,    LSE = log sum_v exp(z[v]),    z = W h                                        (1)
    W is (V, D), h is (D,). The result is one number a token, but the logits z on the way to it are V numbers: for
    8,192 tokens and a vocabulary of 128,256 they are 4.2 GB in fp32, and autograd keeps them and their gradient.
    Keeping them in bf16 halves that and spoils the answer: a logit of 20 in bf16 has a step of 1/8, and the sum over
    128 tokens is then off by up to 0.9 nat (SmolLM2-135M on 1,024 tokens of English), more than many DPO margins.

The derivative
    From (1), d z[y] / dz[v] = 1[v = y], and d LSE / dz[v] = exp(z[v] - LSE) = p[v], the softmax. So
        d logp / dz[v] = 1[v = y] - p[v]                                                                    (2)
    and with c = d loss / d logp coming from above, dZ = c (onehot(y) - p), dH = dZ W, dW = dZ^T H. p needs the logits
    and LSE only: we keep LSE, one number a token, and make the logits again when the gradient is asked for.

Why c deserves a thought
    Cross-entropy has c = -1/N for every token: it is known beforehand, so the gradient can be made in the forward
    pass while the logits are there. A preference loss has one c per *sequence*, a function of the sums of both
    sequences of a pair: known only when every token has been seen. Rows of dH may still be multiplied by a late c;
    dW = sum_t c_t dz_t h_t^T may not, for its sum over tokens is already taken. Hence: recompute. To this file c is
    just autograd's grad_output, one number a token or a sequence, so it knows nothing of any loss.

Bytes and FLOPs
    The vocabulary is walked in slabs of a few thousand columns, sized by a byte budget; only one slab of logits exists:

                D             slab 0   slab 1   slab 2 ...          forward, per slab:  z = H W_slab^T
            +-------+        +--------+........+........+                   fold z into (LSE, z[y])
          N |   H   |   ->   |   z    |        :        :         backward, per slab: z again, z -> dZ in place
            +-------+        +--------+........+........+                   dH += dZ W_slab, dW_slab = dZ^T H
                                    V columns

    Slabs rather than blocks of tokens, because then all N tokens meet inside one matrix product and each dW_slab is
    written once, summed in that product's own fp32 accumulators. Forward: one product, 2NDV FLOPs. Backward: three,
    6NDV; two if the head or the hidden states are frozen. All 8NDV against 6NDV when logits are kept: a third more
    FLOPs for memory that does not grow with N x V. Kept between the passes: N numbers.

Online softmax (Milakov & Gimelshein, arXiv 1805.02867)
    sum_v exp(z[v]) overflows, so it is kept as (m, s): the largest logit so far, and s = sum exp(z - m). A new block:
        m' = max(m, block),  s' = s exp(m - m') + sum exp(block - m'),  at the end LSE = m + log s                (3)
    A finished LSE is itself such a pair, (LSE, 1): so the next slab simply goes on from the LSE of those before it.

Which code runs is decided by where the tensors are, and by nothing else: on CUDA the Triton kernels; on the CPU
chunked PyTorch; on the CPU with TRITON_INTERPRET=1 the Triton kernels in Triton's interpreter (slow, for tests; it
rounds bf16 stores toward zero). Triton is imported at the first call that needs it, and its absence is then an error.
LSE and z[y] always come from fp32 logits (fp64 from fp64 operands, CPU only). Nothing here sums with atomics: same
inputs, same machine, same threads, same bits.
"""

from __future__ import annotations  # the kernels name tl.constexpr before Triton is imported

import functools
import math
import os
from types import SimpleNamespace

import torch

tl = None  # triton.language, put here by _kernels() at the first call that needs it
BLOCK_V, NUM_WARPS = 4096, 8  # 16 logits a thread: two 16-byte loads in bf16, four in fp32
CPU_CHUNK_BYTES, CUDA_CHUNK_BYTES = 16 << 20, 512 << 20  # stay in the cache; keep the matrix products large
MIN_SLAB = 128  # columns: below this the products starve, and 512 N bytes are less than most hidden states

# --- 1. Two Triton kernels. One program a row; "row" is int64, for row * stride passes 2**31. ---------------------


def _fold_kernel(
    logits_ptr, logits_row_stride, labels_ptr, lse_ptr, target_ptr, V, first_column, logit_scale, softcap,
    HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Fold one slab, columns [first_column, first_column + V), into lse (N,) and target (N,), both fp32: eq. 3."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_row_stride
    columns = tl.arange(0, BLOCK_V)
    # Go on from the slabs before: (m, s) = (lse, 1), or "nothing yet". The sentinel for that is finite, because
    # exp(-inf - -inf) is NaN; then a logit of -inf (a masked word) adds exp(-inf - m) = 0 as it should.
    lse = tl.load(lse_ptr + row)
    m = tl.maximum(lse, -1e38)
    s = tl.where(columns == 0, tl.exp(lse - m), 0.0)  # one partial sum a lane: a reduction less in each turn
    for start in range(0, V, BLOCK_V):
        z = tl.load(logits_ptr + start + columns, mask=start + columns < V, other=0.0).to(tl.float32) * logit_scale
        if HAS_SOFTCAP:
            z = softcap * (1.0 - 2.0 / (tl.exp(2.0 * z / softcap) + 1.0))  # softcap * tanh(z / softcap)
        z = tl.where(start + columns < V, z, float("-inf"))
        m_new = tl.maximum(m, tl.max(z, axis=0))
        s = s * tl.exp(m - m_new) + tl.exp(z - m_new)
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
    logits_ptr, logits_row_stride, labels_ptr, lse_ptr, coef_ptr, dz_ptr, dz_row_stride, V, first_column,
    logit_scale, softcap, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write dZ of one slab (eq. 2) times the derivatives of scale and softcap. dz_ptr may be logits_ptr."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_row_stride
    dz_ptr += row * dz_row_stride
    coef = tl.load(coef_ptr + row)
    # A dead row is not read: z = lse = 0 there, so dz is 0 whatever the row holds (NaN) and its lse is (-inf).
    lse = tl.where(coef != 0.0, tl.load(lse_ptr + row), 0.0)
    readable = tl.where(coef != 0.0, V, 0)
    column = tl.load(labels_ptr + row) - first_column
    columns = tl.arange(0, BLOCK_V)
    for start in range(0, V, BLOCK_V):
        z = (
            tl.load(logits_ptr + start + columns, mask=start + columns < readable, other=0.0).to(tl.float32)
            * logit_scale
        )
        slope = coef * logit_scale
        if HAS_SOFTCAP:
            tanh = 1.0 - 2.0 / (tl.exp(2.0 * z / softcap) + 1.0)
            z = softcap * tanh
            slope *= 1.0 - tanh * tanh
        # 1 - p at the label is taken in fp32 and only then rounded to the type of dz
        dz = (tl.where(start + columns == column, 1.0, 0.0) - tl.exp(z - lse)) * slope
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


# --- 2. The same two steps for one slab, in Triton or in PyTorch. z is (N, columns), raw: before scale and softcap. --


def _fold(z, labels, first_column, lse, target, logit_scale, softcap):
    """Fold the slab z into lse and target, in place. The PyTorch branch overwrites z, the Triton one does not."""
    if _on_triton(z):
        with torch.cuda.device_of(z):  # Triton launches on the current device, which need not be z's
            _kernels().fold[(len(z),)](
                z, z.stride(0), labels, lse, target, z.shape[1], first_column, logit_scale, softcap,
                HAS_SOFTCAP=softcap != 0, BLOCK_V=BLOCK_V, num_warps=NUM_WARPS, enable_fp_fusion=True,
            )  # fmt: skip
        return
    _scale_and_cap_(z, logit_scale, softcap)
    rows, columns = _hits(z, labels, first_column)
    target[rows] = z[rows, columns]
    m = z.amax(-1, keepdim=True).clamp_(min=torch.finfo(z.dtype).min)  # finite, for the reason in _fold_kernel
    slab_lse = z.sub_(m).exp_().sum(-1, keepdim=True).log_().add_(m).squeeze(-1)
    torch.logaddexp(lse, slab_lse, out=lse)


def _dz(z, labels, first_column, lse, coef, out, logit_scale, softcap):
    """Write dZ of the slab z to out; out may be z itself. The PyTorch branch overwrites z as well."""
    if _on_triton(z):
        with torch.cuda.device_of(z):
            _kernels().dz[(len(z),)](
                z, z.stride(0), labels, lse, coef, out, out.stride(0), z.shape[1], first_column, logit_scale, softcap,
                HAS_SOFTCAP=softcap != 0, BLOCK_V=BLOCK_V, num_warps=NUM_WARPS, enable_fp_fusion=True,
            )  # fmt: skip
        return
    _scale_and_cap_(z, logit_scale, softcap)
    slope = 1 - (z / softcap).square_() if softcap else None  # d softcap tanh(u / softcap) / du = 1 - tanh^2
    coef = coef * logit_scale
    z.sub_(lse[:, None]).exp_().mul_(-coef[:, None])
    rows, columns = _hits(z, labels, first_column)
    z[rows, columns] += coef[rows]
    if bool((coef == 0).any()):
        z[coef == 0] = 0  # 0 * NaN is NaN: a row that nobody asked for must not speak
    if slope is not None:
        z.mul_(slope)
    if out is not z:
        out.copy_(z)


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


# --- 3. Logits given ---------------------------------------------------------------------------------------------


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
        ctx.save_for_backward(logits, labels, lse)
        return torch.where(labels >= 0, target - lse, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logps):
        logits, labels, lse = ctx.saved_tensors
        coef = torch.where(labels >= 0, grad_logps, 0).to(lse.dtype)
        grad = torch.empty_like(logits)
        for rows in _row_chunks(logits):
            z = logits[rows] if _on_triton(logits) else logits[rows].to(lse.dtype, copy=True)
            _dz(z, labels[rows], 0, lse[rows], coef[rows], grad[rows], 1.0, 0.0)
        return grad, None


def _row_chunks(logits):
    """Everything at once for the kernels; on the CPU as many rows as fit the budget once they are fp32."""
    rows = len(logits) if _on_triton(logits) else CPU_CHUNK_BYTES // (4 * logits.shape[1])
    return [slice(i, i + max(1, rows)) for i in range(0, len(logits), max(1, rows))]


# --- 4. Hidden states and output layer given ---------------------------------------------------------------------


def linear_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
) -> torch.Tensor:
    """Log-probabilities, in nats, of labels under softmax(z), z = cap(logit_scale (hidden weight^T + bias)).

    hidden (N, D), weight (V, D), bias (V,) or None: one floating type (bf16, fp16, fp32; on the CPU also fp64).
        hidden[t] is the state that predicts labels[t]: shifting is the caller's business. N = 0 is fine.
    labels (N,): int32 or int64; ignore_index gives 0, and no gradient.
    cu_seqlens (S + 1,): int32 or int64, 0 = cu[0] <= ... <= cu[S] = N: sequence s is tokens cu[s]:cu[s+1], and may
        be empty (its sum is 0).
    logit_scale: Cohere's logit_scale, Granite's 1 / logits_scaling. softcap: cap(u) = softcap tanh(u / softcap), as
        in Gemma 2 (arXiv 2408.00118, section 2); 0 is none.
    chunk_bytes: budget of one slab of fp32 logits; None is 16 MiB on the CPU and 512 MiB on CUDA. A slab has at least
        128 columns, whatever the budget.
    returns fp32 (fp64 for fp64 operands): (N,), one number a token, or with cu_seqlens (S,), one sum a sequence.

    Gradients flow to hidden, weight and bias, each only if it asks (a frozen one costs nothing), in its own type and
    for any upstream gradient. On the CPU every product runs in fp32 and skips ignored tokens and those whose upstream
    gradient is 0. On CUDA half operands enter the products as they are, logits leave them in fp32, and dZ is rounded
    to the operands' type; fp32 operands follow torch.backends.cuda.matmul (TF32 if you allowed it). Autocast is off
    in here. Raises as gather_logps does, and for a cu_seqlens that is not as above.
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
    if chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes must be positive, got {chunk_bytes}")
    labels = _check(hidden, labels, len(weight), ignore_index)
    if cu_seqlens is not None:
        cu_seqlens = _check_cu_seqlens(cu_seqlens, hidden)

    logps = _LinearLogps.apply(hidden, weight, bias, labels, float(logit_scale), float(softcap), chunk_bytes)
    if cu_seqlens is None:
        return logps
    # Summed in fp64, rounded once. segment_reduce and its gradient walk each sequence in order: no atomics.
    return torch.segment_reduce(logps.double(), "sum", offsets=cu_seqlens, initial=0, unsafe=True).to(logps.dtype)


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, logit_scale, softcap, chunk_bytes):
        ctx.settings = logit_scale, softcap, chunk_bytes
        lse, target = _empty_state(hidden, labels)
        with torch.autocast(hidden.device.type, enabled=False):  # it would turn our fp32 products into bf16 ones
            rows = _live_rows(labels >= 0)
            h, labels_, lse_, target_ = _widen(hidden[rows]), labels[rows], lse[rows], target[rows]
            for slab, z, w in _slabs(h, weight, bias, chunk_bytes):
                _fold(z, labels_, slab.start, lse_, target_, logit_scale, softcap)
                del z, w  # before the next ones are made
            lse[rows], target[rows] = lse_, target_
        ctx.save_for_backward(hidden, weight, bias, labels, lse)  # which keeps nothing if no gradient is wanted
        return torch.where(labels >= 0, target - lse, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logps):
        hidden, weight, bias, labels, lse = ctx.saved_tensors
        logit_scale, softcap, chunk_bytes = ctx.settings
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        coef = torch.where(labels >= 0, grad_logps, 0).to(lse.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            rows = _live_rows(coef != 0)
            h, labels, lse, coef = _widen(hidden[rows]), labels[rows], lse[rows], coef[rows]
            dhidden = lse.new_zeros(h.shape) if want_hidden else None  # fp32: it is a sum over slabs
            dweight = torch.empty_like(weight) if want_weight else None  # each slab of it is written once
            dbias = torch.empty_like(bias) if want_bias else None
            for slab, z, w in _slabs(h, weight, bias, chunk_bytes):
                dz = z if z.dtype == h.dtype else torch.empty_like(z, dtype=h.dtype)  # half only on CUDA
                _dz(z, labels, slab.start, lse, coef, dz, logit_scale, softcap)
                if want_bias:
                    dbias[slab] = dz.sum(0, dtype=lse.dtype)
                if want_hidden:
                    if dz.dtype == dhidden.dtype:
                        dhidden.addmm_(dz, w)
                    else:
                        dhidden += torch.mm(dz, w, out_dtype=dhidden.dtype)
                if want_weight:
                    dweight[slab] = dz.t() @ h  # a sum over all tokens, inside one product, in fp32 accumulators
                del z, dz, w  # before the next ones are made
            if want_hidden:
                full = torch.zeros_like(hidden)
                full[rows] = dhidden.to(hidden.dtype)
                dhidden = full
        return dhidden, dweight, dbias, None, None, None, None


def _slabs(h, weight, bias, chunk_bytes):
    """Yield (columns, raw logits (N, columns) in fp32 or fp64, rows of weight as the products take them)."""
    columns = max(MIN_SLAB, chunk_bytes // (4 * max(1, len(h))))  # N = 0 too: dweight is still written, with zeros
    tile = None if h.is_cuda else h.new_empty(len(h) * min(columns, len(weight)))  # one, reused: page faults cost
    for start in range(0, len(weight), columns):
        slab = slice(start, min(start + columns, len(weight)))
        w = _widen(weight[slab])
        if not h.is_cuda:
            z = torch.mm(h, w.t(), out=tile[: len(h) * len(w)].view(len(h), len(w)))
        elif h.dtype == torch.float32:
            z = h @ w.t()
        else:
            z = torch.mm(h, w.t(), out_dtype=torch.float32)  # the accumulators as they are: never rounded to half
        if bias is not None:
            z += bias[slab]
        yield slab, z, w
        del z, w


def _widen(x):
    """Operands of the products: on the CPU fp32, for a CPU product of bf16 rounds its result to bf16."""
    return x if x.is_cuda or x.dtype == torch.float64 else x.float()


def _live_rows(mask):
    """Which rows to work on. On the CPU those in mask; on CUDA all, because counting them would stop the host."""
    return slice(None) if mask.is_cuda or bool(mask.all()) else mask.nonzero().squeeze(-1)


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
