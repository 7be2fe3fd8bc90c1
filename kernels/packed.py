"""Log-probs of completions from one packed sequence, in which completions share their prompt.

A preference pair is a prompt and two completions. Padded batches compute the prompt twice, and the
padding for nothing. Here any number of pairs is one sequence without padding, in which each prompt
stands once (prefix sharing, as in github.com/frankxwang/dpo-prefix-sharing):

    input_ids      [prompt | chosen | rejected | next prompt | ...]
    document_ids    0 ...                        1 ...            a prompt with its completions
    segment_ids     0 ...    1 ...    2 ...      0 ...            0: prompt, 1, 2, ...: completions
    position_ids    0 ..p-1  p ...    p ...      0 ...            both completions follow the prompt

A token attends to earlier tokens of its document that are in the prompt or in its own segment. The
last prompt token's hidden state predicts the first token of each completion, so it is gathered once
for each. Only completion tokens reach the output layer (logps.linear_logps).

Which attention runs is read off model.config._attn_implementation:
    packed           CPU: PackedAttention below, which computes only what the mask leaves
    flex_attention   CUDA: a block mask, for FlexAttention to skip the rest
    anything else    a dense mask, (1, 1, T, T) bool
"""

import itertools
from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kernels.logps import linear_logps


class Packed(NamedTuple):
    """What collate returns; T tokens in all, N completion tokens, S completions; all int64."""

    input_ids: torch.Tensor  # (1, T)
    position_ids: torch.Tensor  # (1, T)
    document_ids: torch.Tensor  # (T,)
    segment_ids: torch.Tensor  # (T,)
    rows: torch.Tensor  # (N,) place of the hidden state that predicts each label
    labels: torch.Tensor  # (N,) the completion tokens
    cu_seqlens: torch.Tensor  # (S + 1,) completion s is labels[cu_seqlens[s] : cu_seqlens[s + 1]]


def collate(sequences):
    """Packs a list of (prompt ids, completion ids); neighbours with the same prompt share it.

    >>> batch = collate([([5, 6], [7, 2]), ([5, 6], [8, 2])])
    >>> batch.input_ids.tolist(), batch.position_ids.tolist()
    ([[5, 6, 7, 2, 8, 2]], [[0, 1, 2, 3, 2, 3]])
    >>> batch.document_ids.tolist(), batch.segment_ids.tolist()
    ([0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 2, 2])
    >>> batch.rows.tolist(), batch.labels.tolist(), batch.cu_seqlens.tolist()
    ([1, 2, 1, 4], [7, 2, 8, 2], [0, 2, 4])
    >>> place = torch.arange(6)
    >>> mask = mask_mod(batch.document_ids, batch.segment_ids)(0, 0, place[:, None], place)
    >>> mask[4].int().tolist()  # the 8 attends to the prompt and to itself
    [1, 1, 0, 0, 1, 0]
    """
    ids, positions, documents, segments, rows, labels, cu_seqlens = [], [], [], [], [], [], [0]
    by_prompt = itertools.groupby(sequences, key=lambda sequence: sequence[0])
    for document, (prompt, neighbours) in enumerate(by_prompt):
        last = len(ids) + len(prompt) - 1
        parts = [prompt, *(completion for _, completion in neighbours)]
        for segment, part in enumerate(parts):
            start = len(prompt) if segment else 0
            if segment:
                rows += [last, *range(len(ids), len(ids) + len(part) - 1)]
                labels += part
                cu_seqlens.append(len(labels))
            ids += part
            positions += range(start, start + len(part))
            documents += [document] * len(part)
            segments += [segment] * len(part)
    lists = [ids], [positions], documents, segments, rows, labels, cu_seqlens
    return Packed(*(torch.tensor(values, dtype=torch.int64) for values in lists))


def mask_mod(document_ids, segment_ids):
    """The attention mask as a function of (batch, head, query, key), as FlexAttention has it."""

    def attends(batch, head, query, key):
        prompt_or_own = (segment_ids[key] == 0) | (segment_ids[key] == segment_ids[query])
        return (key <= query) & (document_ids[key] == document_ids[query]) & prompt_or_own

    return attends


# ---- attention on a CPU --------------------------------------------------------------------------

BLOCK = 128  # queries of a matrix product: smaller ones compute less that is masked, but slower


class PackedAttention(torch.autograd.Function):
    """softmax(Q K^T + mask) V for the mask above, block by block of queries.

    On a CPU a training step is 1.25 times as fast with it as with scaled_dot_product_attention, by
    segments or with a mask, because scores that the mask would hide are not computed. In bf16 the
    scores are rounded to bf16, as in a plain implementation.

    query: (G, T, H, d) of H query heads for each of G key heads; key: (G, T, d), scaled beforehand;
    value: (G, T, e). Returns (G, T, H, e).

    The derivative is written out, because autograd would widen each block's gradient to all T
    tokens before it adds them up. With the weights A = softmax(S) and the output O = A V:
        dV = A^T dO,  dA = dO V^T,  dS = A (dA - sum over keys of A dA),  dQ = dS K,  dK = dS^T Q
    """

    @staticmethod
    def forward(ctx, query, key, value, segments):
        output, kept = query.new_empty(*query.shape[:3], value.shape[-1]), []
        for rows, columns in blocks(segments):
            size = rows.stop - rows.start
            scores = torch.bmm(query[:, rows].flatten(1, 2), take(key, columns).mT)
            # the last `size` keys are the queries' own tokens: causal among themselves
            own = scores.unflatten(1, (size, -1))[..., -size:]
            own += scores.new_full((size, size), float("-inf")).triu(1)[:, None]
            weights = scores.softmax(-1).to(value.dtype)  # CUDA's autocast leaves it in fp32
            output[:, rows] = torch.bmm(weights, take(value, columns)).unflatten(1, (size, -1))
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
        dkey, dvalue = (torch.zeros_like(part, dtype=wide) for part in (key, value))
        for (rows, columns), weights in zip(blocks(ctx.segments), kept, strict=True):
            above = doutput[:, rows].flatten(1, 2)
            dweights = torch.bmm(above, take(value, columns).mT)
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            dquery[:, rows] = torch.bmm(dscores, take(key, columns)).view_as(dquery[:, rows])
            add_to(dkey, columns, torch.bmm(dscores.mT, query[:, rows].flatten(1, 2)))
            add_to(dvalue, columns, torch.bmm(weights.mT, above))
        return dquery, dkey.to(key.dtype), dvalue.to(value.dtype), None


def blocks(segments):
    """(rows, columns) of each block: its queries; its keys in the prompt and its own segment."""
    prompt = slice(0, 0)
    for segment, start, end in segments:
        for first in range(start, end, BLOCK):
            last = min(first + BLOCK, end)
            yield slice(first, last), (prompt if segment else slice(0, 0), slice(start, last))
        prompt = prompt if segment else slice(start, end)


def take(keys, columns):
    """(G, T, d) at two slices of T, side by side."""
    return torch.cat([keys[:, column] for column in columns], 1)


def add_to(total, columns, values):
    """The derivative of take: adds values to total where they were taken."""
    sizes = [column.stop - column.start for column in columns]
    for column, part in zip(columns, values.split(sizes, 1), strict=True):
        total[:, column] += part


def packed_attention(module, query, key, value, mask, scaling=None, segments=None, **options):
    """PackedAttention as transformers calls it; without segments, scaled_dot_product_attention.

    query, key, value: (1, heads, T, d), key and value perhaps of fewer heads. segments: the list of
    (segment id, first token, end). Returns ((1, T, heads, e), None).
    """
    if segments is None:
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, mask, scaling=scaling, **options)
    key = key * (key.shape[-1] ** -0.5 if scaling is None else scaling)
    key, value = (operand.squeeze(0).to(value.dtype) for operand in (key, value))
    # query heads that share a key head become rows of one matrix product
    query = query.squeeze(0).unflatten(0, (len(key), -1)).transpose(1, 2)
    output = PackedAttention.apply(query.to(value.dtype).contiguous(), key, value, segments)
    return output.transpose(0, 1).flatten(1, 2)[None], None


AttentionInterface.register("packed", packed_attention)


def attention_arguments(kind, document_ids, segment_ids):
    """Arguments that give a model of attention `kind` the mask of a packed sequence of T tokens."""
    size, rule = len(document_ids), mask_mod(document_ids, segment_ids)
    if kind == "packed":
        both = torch.stack([document_ids, segment_ids])
        ids, counts = torch.unique_consecutive(both, dim=1, return_counts=True)
        ends = counts.cumsum(0).tolist()
        segments = list(zip(ids[1].tolist(), [0, *ends[:-1]], ends, strict=True))
        return {"attention_mask": None, "segments": segments}
    if kind == "flex_attention":
        device = document_ids.device
        return {"attention_mask": create_block_mask(rule, None, None, size, size, device=device)}
    place = torch.arange(size, device=document_ids.device)
    return {"attention_mask": rule(0, 0, place[:, None], place)[None, None]}


# ---- log-probs of completions --------------------------------------------------------------------


def completion_logps(model, sequences, packs=True):
    """log pi(completion | prompt) of each (prompt ids, completion ids): (S,) fp32, in nats.

    model: of transformers, for causal language modelling. packs: what check_model says of it; where
    it is false, the sequences run one by one. Differentiable, in autocast too.
    """
    if not packs and len(sequences) > 1:
        return torch.cat([completion_logps(model, [sequence]) for sequence in sequences])
    device = next(model.parameters()).device
    batch = Packed(*(tensor.to(device) for tensor in collate(sequences)))
    attention = {}  # one sequence needs plain causal attention only, which every model has
    if len(sequences) > 1:
        kind = model.config._attn_implementation
        attention = attention_arguments(kind, batch.document_ids, batch.segment_ids)
    hidden = model.base_model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **attention
    ).last_hidden_state[0]  # (T, D)
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else head.weight.dtype
    bias = getattr(head, "bias", None)
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies the logits
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides them
    return linear_logps(
        hidden[batch.rows].to(dtype),
        head.weight.to(dtype),
        batch.labels,
        batch.cu_seqlens,
        bias=None if bias is None else bias.to(dtype),
        logit_scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None) or 0.0,  # Gemma
    )


def micro_batches(costs, budget):
    """Lists of neighbouring indices of costs that add up to at most budget, or hold one index."""
    batch, spent = [], 0
    for i, cost in enumerate(costs):
        if batch and spent + cost > budget:
            yield batch
            batch, spent = [], 0
        batch.append(i)
        spent += cost
    if batch:
        yield batch


@torch.no_grad()
def all_logps(model, sequences, budget, packs=True):
    """completion_logps of any number of sequences, `budget` tokens at a time: (S,), on the CPU."""
    costs = [len(prompt) + len(completion) for prompt, completion in sequences]
    parts = [torch.zeros(0)]
    for batch in micro_batches(costs, budget):
        parts.append(completion_logps(model, [sequences[i] for i in batch], packs).cpu())
    return torch.cat(parts)


@torch.no_grad()
def check_model(model, attention=None):
    """Whether packed sequences give a model's own log-probs. It is set to `attention` where so.

    The known answer comes from the model's logits, one sequence at a time. Packing is not exact for
    recurrent layers, sliding windows, and positions that a model takes from the mask. Raises
    ValueError where even single sequences differ: an output layer that is not supported here.
    """
    device, usual = next(model.parameters()).device, model.config._attn_implementation
    sequences = [([3, 4, 5], [6, 7, 8, 9]), ([3, 4, 5], [10, 11]), ([12, 13], [14, 15, 16])]
    known = []
    for prompt, completion in sequences:
        logits = model(input_ids=torch.tensor([prompt + completion], device=device)).logits[0]
        logps = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
        labels = torch.tensor(completion, device=device)[:, None]
        known.append(logps.gather(-1, labels).sum())
    known = torch.stack(known)
    tolerance = known.abs() * (1e-3 if logits.dtype == torch.float32 else 5e-2) + 1e-2

    def exact(packs):
        logps = completion_logps(model, sequences, packs)
        return bool(((logps.double() - known).abs() <= tolerance).all())

    if not exact(packs=False):
        raise ValueError("the log-probs are not those of the model's logits: not supported here")
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    if layers != {"full_attention"} or window or not exact(packs=True):
        return False
    if attention not in (None, usual):
        try:
            model.set_attn_implementation(attention)
            suits = model.config._attn_implementation == attention and exact(packs=True)
        except (TypeError, KeyError, ValueError, RuntimeError):  # its layers take no such attention
            suits = False
        if not suits:
            model.set_attn_implementation(usual)
    return True
