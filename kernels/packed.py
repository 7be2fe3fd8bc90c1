"""Log-probs of completions from one packed sequence, in which completions share their prompt.

A padded batch of preference pairs computes each prompt twice, and padding besides. Here any number
of pairs is one sequence [prompt | chosen | rejected | next prompt | ...] without padding, in which
each prompt stands once (prefix sharing, as in github.com/frankxwang/dpo-prefix-sharing).

A token attends to earlier tokens of its document that are in the prompt or in its own segment. The
last prompt token's hidden state predicts the first token of each completion, so it is gathered once
for each. Only completion tokens reach the output layer (logps.linear_logps).
"""

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
    document_ids: torch.Tensor  # (T,) a prompt with its completions is a document
    segment_ids: torch.Tensor  # (T,) 0: prompt, 1, 2, ...: completions
    rows: torch.Tensor  # (N,) place of the hidden state that predicts each label
    labels: torch.Tensor  # (N,) the completion tokens
    cu_seqlens: torch.Tensor  # (S + 1,) completion s is labels[cu_seqlens[s] : cu_seqlens[s + 1]]


def collate(sequences):
    """Packs a list of (prompt ids, completion ids); neighbours with the same prompt share it.

    >>> batch = collate([([5, 6], [7, 2]), ([5, 6], [8, 2]), ([9], [4])])
    >>> for name, tensor in batch._asdict().items(): print(f"{name:12}", tensor.tolist())
    input_ids    [[5, 6, 7, 2, 8, 2, 9, 4]]
    position_ids [[0, 1, 2, 3, 2, 3, 0, 1]]
    document_ids [0, 0, 0, 0, 0, 0, 1, 1]
    segment_ids  [0, 0, 1, 1, 2, 2, 0, 1]
    rows         [1, 2, 1, 4, 6]
    labels       [7, 2, 8, 2, 4]
    cu_seqlens   [0, 2, 4, 5]
    """
    ids, positions, documents, segments, rows, labels, cu_seqlens = [], [], [], [], [], [], [0]
    by_prompt = itertools.groupby(sequences, key=lambda sequence: sequence[0])
    for document, (prompt, neighbours) in enumerate(by_prompt):
        last = len(ids) + len(prompt) - 1
        for segment, tokens in enumerate([prompt, *(completion for _, completion in neighbours)]):
            if segment:
                rows += [last, *range(len(ids), len(ids) + len(tokens) - 1)]
                labels += tokens
                cu_seqlens.append(len(labels))
            start = len(prompt) if segment else 0
            positions += range(start, start + len(tokens))
            ids += tokens
            documents += [document] * len(tokens)
            segments += [segment] * len(tokens)
    lists = [ids], [positions], documents, segments, rows, labels, cu_seqlens
    return Packed(*(torch.tensor(values, dtype=torch.int64) for values in lists))


def dense_mask(document_ids, segment_ids):
    """Which key (column) each query (row) attends to: (T, T) bool."""
    places = torch.arange(len(segment_ids), device=segment_ids.device)
    prompt_or_own = (segment_ids == 0) | (segment_ids == segment_ids[:, None])
    same_document = document_ids == document_ids[:, None]
    return (places <= places[:, None]) & same_document & prompt_or_own


def attention_arguments(kind, document_ids, segment_ids):
    """Arguments that give a model of attention `kind` the mask of a packed sequence."""
    if kind != "packed":
        return {"attention_mask": dense_mask(document_ids, segment_ids)[None, None]}
    ids, sizes = torch.unique_consecutive(segment_ids, return_counts=True)
    ends = sizes.cumsum(0)
    segments = torch.stack([ids, ends - sizes, ends], 1).tolist()  # id, first token, end
    return {"attention_mask": None, "segments": tuple(map(tuple, segments))}


def completion_logps(model, sequences, packs=True):
    """log pi(completion | prompt) of each (prompt ids, completion ids): (S,) fp32, in nats.

    packs: what check_model says of the model; where it is False, the sequences run one by one.
    """
    if not packs and len(sequences) > 1:
        return torch.cat([completion_logps(model, [sequence]) for sequence in sequences])
    batch = Packed(*(tensor.to(model.device) for tensor in collate(sequences)))
    attention = {}  # one sequence needs plain causal attention only, which every model has
    if len(sequences) > 1:
        kind = model.config._attn_implementation
        attention = attention_arguments(kind, batch.document_ids, batch.segment_ids)
    hidden = model.base_model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **attention
    ).last_hidden_state[0]  # (T, D)
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    device, dtype = hidden.device.type, head.weight.dtype
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
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
    batch, spent = [], 0
    for i, cost in enumerate(costs):
        if batch and spent + cost > budget:
            yield batch
            batch, spent = [], 0
        batch, spent = [*batch, i], spent + cost
    if batch:
        yield batch


@torch.no_grad()
def all_logps(model, sequences, packs=True, budget=PACK_TOKENS):
    """completion_logps of any number of sequences, `budget` tokens at a time: (S,), on the CPU."""
    logps = [torch.zeros(0)]
    for batch in micro_batches([len(prompt) + len(tokens) for prompt, tokens in sequences], budget):
        logps.append(completion_logps(model, [sequences[i] for i in batch], packs).cpu())
    return torch.cat(logps)


@torch.no_grad()
def check_model(model, attention=None):
    """Whether packed sequences give the log-probs of a model's own logits. If so, the model is set
    to `attention`, where that does too. False for recurrent layers, sliding windows. Raises
    UnsupportedModel where single sequences differ as well, by an output layer of another form.
    """
    sequences = [([3, 4, 5], [6, 7, 8, 9]), ([3, 4, 5], [10, 11]), ([12, 13], [14, 15, 16])]
    known = []
    for prompt, completion in sequences:
        ids = torch.tensor([prompt + completion], device=model.device)
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        known.append(-cross_entropy(logits.double(), ids[0, len(prompt) :], reduction="sum"))
    known, rtol = torch.stack(known), 1e-3 if logits.dtype == torch.float32 else 5e-2

    def exact(packs):
        logps = completion_logps(model, sequences, packs)
        # what one completion says must not matter to the others packed with it, in 16 bits either
        changed = [([3, 4, 5], [9, 8, 7, 6]), *sequences[1:]]
        other = completion_logps(model, changed) if packs else logps
        apart = torch.allclose(logps[1:], other[1:], 1e-4)
        return apart and torch.allclose(logps.double(), known, rtol, 1e-2)

    if not exact(packs=False):
        reason = "its log-probs are not those of its logits; it is not supported here"
        raise UnsupportedModel(f"{model.name_or_path}: {reason}")
    config, usual = model.config.get_text_config(), model.config._attn_implementation
    layers = set(getattr(config, "layer_types", None) or [])
    if layers - {"full_attention"} or getattr(config, "sliding_window", None):
        return False  # these sequences are too short to tell
    for kind in dict.fromkeys([attention or usual, usual]):  # each once
        try:
            model.set_attn_implementation(kind)
            if exact(packs=True):
                return True
        except (TypeError, KeyError, ValueError, RuntimeError):  # its layers take no such attention
            continue
    return False


VARLEN = inspect.signature(varlen_attn).parameters
GQA = {"enable_gqa": True} if "enable_gqa" in VARLEN else {}  # torch 2.11 does it unasked
BLOCK = 128  # queries of a matrix product: smaller ones compute less that is masked, but slower


class PackedAttention(torch.autograd.Function):
    """softmax(Q K^T + mask) V for the mask above, block by block of queries, made for a CPU.

    query: (G, T, H, d) of H query heads for each of G key heads; key: (G, T, d), scaled beforehand;
    value: (G, T, e). Returns (G, T, H, e). In bf16 the scores are rounded to bf16.

    Scores that the mask hides are not computed: a training step on a CPU is 1.25 times as fast as
    with scaled_dot_product_attention. The derivative is written out, because autograd would widen
    each block's gradient to all T tokens. With the weights A = softmax(S) and the output O = A V:
        dV = A^T dO,  dA = dO V^T,  dS = A (dA - sum over keys of A dA),  dQ = dS K,  dK = dS^T Q
    """

    @staticmethod
    def forward(ctx, query, key, value, segments):
        output, kept = query.new_empty(*query.shape[:3], value.shape[-1]), []
        for rows, prompt, own in blocks(segments, BLOCK):
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
        for (rows, prompt, own), weights in zip(blocks(ctx.segments, BLOCK), kept, strict=True):
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


def blocks(segments, size):
    """Slices of each block of `size` queries: these, keys in their prompt, keys of their own."""
    prompt = nothing = slice(0, 0)
    for segment, start, end in segments:
        for first in range(start, end, size):
            last = min(first + size, end)
            yield slice(first, last), prompt if segment else nothing, slice(start, last)
        prompt = prompt if segment else slice(start, end)


@functools.lru_cache(maxsize=1)  # all layers ask for the same
def ragged(segments, device):
    """The segments as varlen_attn has them, sequences without padding: places of their keys, which
    are their prompt's and their own, and {where each segment ends, length of the longest}."""
    _, _, tokens = segments[-1]
    places, lengths = torch.arange(tokens), {}
    whole = blocks(segments, tokens)  # a block for each segment
    keys = [torch.cat([places[prompt], places[own]]) for _, prompt, own in whole]
    sizes = {"q": [end - start for _, start, end in segments], "k": [len(part) for part in keys]}
    for name, parts in sizes.items():
        ends = torch.tensor([0, *itertools.accumulate(parts)], dtype=torch.int32)
        lengths |= {f"cu_seq_{name}": ends.to(device), f"max_{name}": max(parts)}
    return torch.cat(keys).to(device), lengths


def suits_flash(query, value):
    """Whether Flash Attention takes them."""
    size = value.shape[-1]
    known = query.shape[-1] == size <= 256 and size % 8 == 0
    return known and value.is_cuda and value.element_size() == 2


def packed_attention(module, query, key, value, mask, scaling=None, segments=None, **options):
    """Attention in a packed sequence, as transformers calls it; without segments, the usual one.
    In 16-bit formats on a GPU it is torch's Flash Attention, which leaves a prompt's gradients from
    its segments to be added up in that format; elsewhere PackedAttention.

    query: (1, heads, T, d); key, value: perhaps fewer heads. Returns ((1, T, heads, e), None).
    """
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **options)
    query, key, value = (x.squeeze(0) for x in (query, key, value))
    if suits_flash(query, value):
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
