"""Log-probs of completions from one packed sequence, in which completions share their prompt.

Pairs are one sequence [prompt | chosen | rejected | next prompt | ...] without padding, in which
each prompt stands once (prefix sharing, as in github.com/frankxwang/dpo-prefix-sharing). A token
attends to its prompt and to earlier tokens of its own segment. The last prompt token's hidden state
predicts the first token of each completion, so it is gathered once for each. Only completion tokens
reach the output layer (logps.linear_logps).
"""

import contextlib
import functools
import inspect
import itertools
from typing import NamedTuple

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kernels.logps import linear_logps

PACK_TOKENS = 4096 if torch.cuda.is_available() else 1024  # of a packed sequence, by default


class UnsupportedModel(Exception):
    """A model whose log-probs would come out wrong here."""


class Packed(NamedTuple):
    """What collate returns; T tokens in all, N completion tokens, S completions; all int64."""

    input_ids: torch.Tensor  # (1, T)
    position_ids: torch.Tensor  # (1, T) every completion goes on from its prompt
    rows: torch.Tensor  # (N,) place of the hidden state that predicts each label
    labels: torch.Tensor  # (N,) the completion tokens
    cu_seqlens: torch.Tensor  # (S + 1,) completion s is labels[cu_seqlens[s] : cu_seqlens[s + 1]]
    segments: tuple  # of (a, b, first, end): tokens first:end see a:b and earlier own tokens


def collate(sequences, device="cpu"):
    """Packs a list of (prompt ids, completion ids); neighbours with the same prompt share it.

    >>> batch = collate([([5, 6], [7, 2]), ([5, 6], [8, 2]), ([9], [4])])
    >>> for name, values in batch._asdict().items():
    ...     print(f"{name:12}", values if name == "segments" else values.tolist())
    input_ids    [[5, 6, 7, 2, 8, 2, 9, 4]]
    position_ids [[0, 1, 2, 3, 2, 3, 0, 1]]
    rows         [1, 2, 1, 4, 6]
    labels       [7, 2, 8, 2, 4]
    cu_seqlens   [0, 2, 4, 5]
    segments     ((0, 0, 0, 2), (0, 2, 2, 4), (0, 2, 4, 6), (6, 6, 6, 7), (6, 7, 7, 8))
    """
    ids, positions, rows, labels, cu_seqlens, segments = [], [], [], [], [0], []
    for prompt, neighbours in itertools.groupby(sequences, key=lambda sequence: sequence[0]):
        first, end = len(ids), len(ids) + len(prompt)
        segments.append((first, first, first, end))
        positions += range(len(prompt))
        ids += prompt
        for _, completion in neighbours:
            rows += [end - 1, *range(len(ids), len(ids) + len(completion) - 1)]
            labels += completion
            cu_seqlens.append(len(labels))
            segments.append((first, end, len(ids), len(ids) + len(completion)))
            positions += range(len(prompt), len(prompt) + len(completion))
            ids += completion
    lists = [ids], [positions], rows, labels, cu_seqlens
    tensors = (torch.tensor(values, dtype=torch.int64, device=device) for values in lists)
    return Packed(*tensors, tuple(segments))


def completion_logps(model, sequences):
    """log pi(completion | prompt) of each (prompt ids, completion ids): (S,) fp32, in nats.
    The sequences run one by one, unless check_model has found that the model takes packed ones."""
    packed = model.config._attn_implementation == "packed"
    if not packed and len(sequences) > 1:
        return torch.cat([completion_logps(model, [sequence]) for sequence in sequences])
    batch = collate(sequences, model.device)
    segments = {"segments": batch.segments} if packed else {}
    hidden = model.base_model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **segments
    ).last_hidden_state[0]  # (T, D)
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    dtype, device = head.weight.dtype, hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    operands = hidden[batch.rows], head.weight, getattr(head, "bias", None)
    hidden, weight, bias = (x if x is None else x.to(dtype) for x in operands)
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies the logits
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides them
    cap = getattr(config, "final_logit_softcapping", None) or 0.0  # Gemma
    return linear_logps(
        hidden, weight, batch.labels, batch.cu_seqlens, bias=bias, logit_scale=scale, softcap=cap
    )


def micro_batches(costs, budget):
    """Lists of neighbouring indices of costs that add up to at most budget, or hold one index."""
    batches, spent = [], budget + 1  # so that the first index begins a batch
    for i, cost in enumerate(costs):
        if spent + cost > budget:
            batches.append([])
            spent = 0
        batches[-1].append(i)
        spent += cost
    return batches


@torch.no_grad()
def all_logps(model, sequences, budget=PACK_TOKENS):
    """completion_logps of any number of sequences, `budget` tokens at a time: (S,), on the CPU."""
    logps = [torch.zeros(0)]
    for batch in micro_batches([len(prompt) + len(tokens) for prompt, tokens in sequences], budget):
        logps.append(completion_logps(model, [sequences[i] for i in batch]).cpu())
    return torch.cat(logps)


@torch.no_grad()
def check_model(model):
    """Switches a model to packed_attention if that keeps its log-probs; returns whether it did.
    Raises UnsupportedModel if even single sequences differ: an unknown form of output layer."""
    sequences = [([3, 4, 5], [6, 7, 8, 9]), ([3, 4, 5], [10, 11]), ([12, 13], [14, 15, 16])]
    known = []
    for prompt, completion in sequences:
        ids = torch.tensor([prompt + completion], device=model.device)
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        known.append(-cross_entropy(logits.double(), ids[0, len(prompt) :], reduction="sum"))
    known, rtol = torch.stack(known), 1e-3 if logits.dtype == torch.float32 else 5e-2

    def exact(logps):
        return torch.allclose(logps.double(), known, rtol, 1e-2)

    if not exact(completion_logps(model, sequences)):  # with the usual attention, one by one
        raise UnsupportedModel(f"{model.name_or_path}: log-probs are not those of its logits")
    config, usual = model.config.get_text_config(), model.config._attn_implementation
    layers = set(getattr(config, "layer_types", None) or [])
    if layers - {"full_attention"} or getattr(config, "sliding_window", None):
        return False  # these sequences are too short to tell
    # suppressed: what layers raise that take no such attention
    with contextlib.suppress(TypeError, KeyError, ValueError, RuntimeError):
        model.set_attn_implementation("packed")
        logps = completion_logps(model, sequences)
        # what one completion says must not matter to the others packed with it, in 16 bits either
        changed = completion_logps(model, [([3, 4, 5], [9, 8, 7, 6]), *sequences[1:]])
        took = model.config._attn_implementation == "packed"  # some models only warn
        if took and exact(logps) and torch.allclose(logps[1:], changed[1:], 1e-4):
            return True
    model.set_attn_implementation(usual)
    return False


VARLEN = inspect.signature(varlen_attn).parameters
GQA = {"enable_gqa": True} if "enable_gqa" in VARLEN else {}  # torch 2.11 does it unasked
FLASH_DEVICE = "cuda"
BLOCK = 128  # queries of a matrix product: smaller ones compute less that is masked, but slower


class PackedAttention(torch.autograd.Function):
    """softmax(Q K^T + mask) V in a packed sequence, block by block of queries, made for a CPU.

    query: (G, T, H, d) of H query heads for each of G key heads; key: (G, T, d), scaled beforehand;
    value: (G, T, e). Returns (G, T, H, e). In bf16 the scores are rounded to bf16. The derivative
    is written out, because autograd would widen each block's gradient to all T tokens. With the
    weights A = softmax(S) and the output O = A V:
        dV = A^T dO,  dA = dO V^T,  dS = A (dA - sum over keys of A dA),  dQ = dS K,  dK = dS^T Q
    """

    @staticmethod
    def forward(ctx, query, key, value, segments):
        output, kept = query.new_empty(*query.shape[:3], value.shape[-1]), []
        for rows, prompt, own in blocks(segments):
            keys, values = (torch.cat([x[:, prompt], x[:, own]], 1) for x in (key, value))
            scores = torch.bmm(query[:, rows].flatten(1, 2), keys.mT)
            # the last `size` keys are the queries' own tokens: causal among themselves
            size = rows.stop - rows.start
            causal = scores.new_full((size, size), float("-inf")).triu(1)[:, None]
            scores.unflatten(1, (size, -1))[..., -size:] += causal
            weights = scores.softmax(-1).to(value.dtype)  # CUDA's autocast leaves it in fp32
            output[:, rows] = torch.bmm(weights, values).unflatten(1, (size, -1))
            kept += [weights] if any(ctx.needs_input_grad) else []
        ctx.segments = segments
        ctx.save_for_backward(query, key, value, *kept)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, doutput):
        query, key, value, *kept = ctx.saved_tensors
        dquery = torch.empty_like(query)
        wide = torch.promote_types(value.dtype, torch.float32)  # dK and dV are sums over blocks
        dkey, dvalue = (torch.zeros_like(x, dtype=wide) for x in (key, value))
        for (rows, prompt, own), weights in zip(blocks(ctx.segments), kept, strict=True):
            keys, values = (torch.cat([x[:, prompt], x[:, own]], 1) for x in (key, value))
            queries, above = query[:, rows].flatten(1, 2), doutput[:, rows].flatten(1, 2)
            dweights = torch.bmm(above, values.mT)
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            dquery[:, rows] = torch.bmm(dscores, keys).view_as(dquery[:, rows])
            size = prompt.stop - prompt.start
            for total, left, right in ((dkey, dscores, queries), (dvalue, weights, above)):
                part = torch.bmm(left.mT, right)
                total[:, prompt] += part[:, :size]
                total[:, own] += part[:, size:]
        return dquery, dkey.to(key.dtype), dvalue.to(value.dtype), None


def blocks(segments):
    """Slices for each block of queries: these, the keys in their prompt, the keys of their own."""
    for prompt_first, prompt_end, first, end in segments:
        for start in range(first, end, BLOCK):
            stop = min(start + BLOCK, end)
            yield slice(start, stop), slice(prompt_first, prompt_end), slice(first, stop)


@functools.lru_cache(maxsize=1)  # all layers ask for the same
def ragged(segments, device):
    """What varlen_attn is told of the segments: the places of their keys, one segment after the
    other, and where the queries and the keys of each end."""
    places = torch.arange(segments[-1][-1])
    keys = [torch.cat([places[a:b], places[first:end]]) for a, b, first, end in segments]
    lengths, queries = {}, [end - first for _, _, first, end in segments]
    for name, sizes in (("q", queries), ("k", [len(part) for part in keys])):
        ends = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
        lengths |= {f"cu_seq_{name}": ends.to(device), f"max_{name}": max(sizes)}
    return torch.cat(keys).to(device), lengths


def packed_attention(module, query, key, value, mask, scaling=None, segments=None, **options):
    """Attention in a packed sequence, as transformers calls it; without segments, the usual one.
    In 16-bit formats on a GPU it is Flash Attention, which adds up a prompt's gradients from its
    segments in that format; elsewhere PackedAttention. query: (1, heads, T, d); key, value: perhaps
    fewer heads. Returns ((1, T, heads, e), None)."""
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **options)
    query, key, value = (x.squeeze(0) for x in (query, key, value))
    flash = value.device.type == FLASH_DEVICE and value.element_size() == 2
    if flash and query.shape[-1] == value.shape[-1] <= 256 and value.shape[-1] % 8 == 0:
        places, lengths = ragged(segments, value.device)
        query, key, value = (x.transpose(0, 1).to(value.dtype) for x in (query, key, value))
        key, value = (x.index_select(0, places) for x in (key, value))
        causal = {"window_size": (-1, 0), "scale": scaling, **GQA}
        return varlen_attn(query, key, value, **lengths, **causal)[None], None
    key = key * (key.shape[-1] ** -0.5 if scaling is None else scaling)
    # query heads that share a key head become rows of one matrix product
    query = query.unflatten(0, (len(key), -1)).transpose(1, 2).to(value.dtype).contiguous()
    output = PackedAttention.apply(query, key.to(value.dtype), value, segments)
    return output.transpose(0, 1).flatten(1, 2)[None], None


AttentionInterface.register("packed", packed_attention)
