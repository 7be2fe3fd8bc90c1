"""Log-probs of completions from one packed sequence, in which completions share their prompt.

[prompt | chosen | rejected | next prompt | ...], without padding, has each prompt once (prefix
sharing, as in github.com/frankxwang/dpo-prefix-sharing). Only completions reach the output layer."""

import contextlib
import functools
import inspect
import itertools
from typing import NamedTuple

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kernels.logps import linear_logps
from prompts.rows import BadInput

PACK_TOKENS = 4096 if torch.cuda.is_available() else 1024  # of a packed sequence, by default


# ---- packing -------------------------------------------------------------------------------------
class Segment(NamedTuple):
    """Tokens [start, end) of a packed sequence, a prompt or a completion; prompt: the number of the
    segment that holds a completion's prompt, None for a prompt."""

    start: int
    end: int
    prompt: int | None


class Packed(NamedTuple):
    """What collate returns; T tokens in all, N completion tokens, S completions; all int64."""

    input_ids: torch.Tensor  # (1, T)
    position_ids: torch.Tensor  # (1, T) every completion goes on from its prompt
    predict_index: torch.Tensor  # (N,) place of the hidden state that predicts each label
    labels: torch.Tensor  # (N,) the completion tokens
    cu_seqlens: torch.Tensor  # (S + 1,) completion s is labels[cu_seqlens[s] : cu_seqlens[s + 1]]
    segments: tuple  # of Segment


def collate(sequences, device="cpu"):
    """Packs a list of (prompt ids, completion ids); neighbours with the same prompt share it.

    >>> batch = collate([([5, 6], [7, 2]), ([5, 6], [8, 2]), ([9], [4])])
    >>> for name, values in batch._asdict().items():
    ...     print(f"{name:13}", list(map(tuple, values)) if name == "segments" else values.tolist())
    input_ids     [[5, 6, 7, 2, 8, 2, 9, 4]]
    position_ids  [[0, 1, 2, 3, 2, 3, 0, 1]]
    predict_index [1, 2, 1, 4, 6]
    labels        [7, 2, 8, 2, 4]
    cu_seqlens    [0, 2, 4, 5]
    segments      [(0, 2, None), (2, 4, 0), (4, 6, 0), (6, 7, None), (7, 8, 3)]

    The tokens (columns) that each token of the first pair attends to:
                     5 6 7 2 8 2
        prompt    5  x . . . . .
                  6  x x . . . .
        chosen    7  x x x . . .
                  2  x x x x . .
        rejected  8  x x . . x .      its prompt and itself, not the chosen answer
                  2  x x . . x x
    A prompt's last token, here 6, predicts the first token of both completions."""
    ids, positions, predict_index, labels, cu_seqlens, segments = [], [], [], [], [0], []
    for prompt, neighbours in itertools.groupby(sequences, key=lambda sequence: sequence[0]):
        prompt_segment = len(segments)
        prompt_end = len(ids) + len(prompt)
        segments.append(Segment(len(ids), prompt_end, None))
        positions += range(len(prompt))
        ids += prompt
        for _, completion in neighbours:
            start, end = len(ids), len(ids) + len(completion)
            segments.append(Segment(start, end, prompt_segment))
            positions += range(len(prompt), len(prompt) + len(completion))
            predict_index += [prompt_end - 1, *range(start, end - 1)]
            labels += completion
            cu_seqlens.append(len(labels))
            ids += completion

    lists = [ids], [positions], predict_index, labels, cu_seqlens
    tensors = [torch.tensor(values, dtype=torch.int64, device=device) for values in lists]
    return Packed(*tensors, tuple(segments))


def micro_batches(costs, budget):
    """Lists of neighbouring indices, whose costs add up to at most budget, or of one index."""
    batches, spent = [], 0
    for i, cost in enumerate(costs):
        if not batches or spent + cost > budget:
            batches.append([])
            spent = 0
        batches[-1].append(i)
        spent += cost
    return batches


# ---- log-probs -----------------------------------------------------------------------------------
def completion_logps(model, sequences):
    """log pi(completion | prompt) of each (prompt ids, completion ids): (S,) fp32, in nats. They run
    one by one, unless use_packed_attention has switched the model to packed sequences."""
    packs = model.config._attn_implementation == "packed"
    if not packs and len(sequences) > 1:
        return torch.cat([completion_logps(model, [sequence]) for sequence in sequences])

    batch = collate(sequences, model.device)
    options = {"segments": batch.segments} if packs else {}
    hidden = model.base_model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **options
    ).last_hidden_state[0]  # (T, D)
    weight, bias, logit_scale, softcap = output_layer(model)
    return linear_logps(
        hidden[batch.predict_index].to(weight.dtype), weight, batch.labels, batch.cu_seqlens,
        bias=bias, logit_scale=logit_scale, softcap=softcap,
    )  # fmt: skip


def output_layer(model):
    """(weight (V, D), bias (V,) or None, logit_scale, softcap) of linear_logps; under autocast the
    tensors are in its type."""
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    weight, bias = head.weight, getattr(head, "bias", None)
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        weight, bias = weight.to(dtype), bias if bias is None else bias.to(dtype)

    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies the logits
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides them
    softcap = getattr(config, "final_logit_softcapping", None) or 0.0  # Gemma
    return weight, bias, scale, softcap


@torch.no_grad()
def all_logps(model, sequences, budget=PACK_TOKENS):
    """completion_logps of any number of sequences, `budget` tokens at a time: (S,), on the CPU."""
    logps = [torch.zeros(0)]
    for batch in micro_batches([len(prompt) + len(tokens) for prompt, tokens in sequences], budget):
        logps.append(completion_logps(model, [sequences[i] for i in batch]).cpu())
    return torch.cat(logps)


# ---- attention -----------------------------------------------------------------------------------

FLASH_DEVICE = "cuda"
# torch 2.11 lets query heads share key heads unasked.
GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def packed_attention(module, query, key, value, mask, scaling=None, segments=None, **options):
    """Attention in a packed sequence, as transformers calls it; without segments, the usual one.
    query: (1, heads, T, d); key, value: perhaps fewer heads. Returns ((1, T, heads, d), None)."""
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **options)
    # Rotary embeddings may have left query and key in another dtype than autocast's.
    query, key = query.to(value.dtype), key.to(value.dtype)
    flash = value.device.type == FLASH_DEVICE and value.element_size() == 2
    if flash and query.shape[-1] == value.shape[-1] <= 256 and value.shape[-1] % 8 == 0:
        return flash_attention(query, key, value, segments, scaling), None

    lengths = [segment.end - segment.start for segment in segments]
    queries, keys, values = (x.split(lengths, 2) for x in (query, key, value))
    outputs = []
    for i, segment in enumerate(segments):
        parts = [i] if segment.prompt is None else [segment.prompt, i]
        k = torch.cat([keys[part] for part in parts], 2)
        v = torch.cat([values[part] for part in parts], 2)
        # A token attends to the whole prompt, and to own tokens up to itself.
        prompt_length = k.shape[2] - lengths[i]
        mask = torch.ones(lengths[i], k.shape[2], dtype=torch.bool, device=k.device)
        options = {"attn_mask": mask.tril(prompt_length), "scale": scaling, "enable_gqa": True}
        outputs.append(scaled_dot_product_attention(queries[i], k, v, **options))
    return torch.cat(outputs, 2).transpose(1, 2), None


def flash_attention(query, key, value, segments, scaling):
    """packed_attention by Flash Attention, in 16-bit formats on a GPU: (1, T, heads, d). A segment's
    keys are its prompt's, copied, and its own; the copies' gradients are added in that format."""
    places, lengths = ragged(segments, value.device)
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (T, heads, d)
    key, value = key.index_select(0, places), value.index_select(0, places)
    # Causal, aligned at the last query and key: all of a segment's tokens see the whole prompt.
    options = {"window_size": (-1, 0), "scale": scaling, **GQA}
    return varlen_attn(query, key, value, **lengths, **options)[None]


@functools.lru_cache(maxsize=1)  # every layer makes the same call
def ragged(segments, device):
    """For varlen_attn: the places of all segments' keys, where each one's queries and keys end."""
    places, key_ends, most_queries, most_keys = [], [0], 0, 0
    for segment in segments:
        if segment.prompt is not None:
            places += range(segments[segment.prompt].start, segments[segment.prompt].end)
        places += range(segment.start, segment.end)
        most_queries = max(most_queries, segment.end - segment.start)
        most_keys = max(most_keys, len(places) - key_ends[-1])
        key_ends.append(len(places))

    query_ends = [0, *(segment.end for segment in segments)]
    ends = functools.partial(torch.tensor, dtype=torch.int32, device=device)
    lengths = {"cu_seq_q": ends(query_ends), "max_q": most_queries}
    lengths |= {"cu_seq_k": ends(key_ends), "max_k": most_keys}
    return torch.tensor(places, device=device), lengths


AttentionInterface.register("packed", packed_attention)


@torch.no_grad()
def use_packed_attention(model):
    """Switches a model to packed_attention if its log-probs stay the same; returns whether it did.
    Raises BadInput if even single sequences differ from its logits: an unknown output layer."""
    sequences = [([3, 4, 5], [6, 7, 8, 9]), ([3, 4, 5], [10, 11]), ([12, 13], [14, 15, 16])]
    expected = []
    for prompt, completion in sequences:
        ids = torch.tensor([prompt + completion], device=model.device)
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        expected.append(-cross_entropy(logits.double(), ids[0, len(prompt) :], reduction="sum"))
    error = {"rtol": 1e-3 if logits.dtype == torch.float32 else 5e-2, "atol": 1e-2}
    as_expected = functools.partial(torch.allclose, torch.stack(expected), **error)
    if not as_expected(completion_logps(model, sequences).double()):
        raise BadInput(f"model {model.name_or_path}: log-probs are not those of its logits")
    config = model.config.get_text_config()
    rope = str(getattr(config, "rope_parameters", None))
    if "dynamic" in rope:
        raise BadInput(f"model {model.name_or_path}: dynamic rotary embeddings change with length")
    usual = model.config._attn_implementation
    other_layers = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    # The sequences above are shorter than any window, or longrope's, so they would pass wrongly.
    if other_layers or getattr(config, "sliding_window", None) or "longrope" in rope:
        return False

    # Layers that cannot take the argument `segments` raise one of these.
    with contextlib.suppress(TypeError, KeyError, ValueError, RuntimeError):
        model.set_attn_implementation("packed")
        logps = completion_logps(model, sequences)
        # A completion must not change with its neighbour; 1e-4 is tighter than rtol in 16 bits.
        changed = completion_logps(model, [([3, 4, 5], [9, 8, 7, 6]), *sequences[1:]])
        switched = model.config._attn_implementation == "packed"  # some models only warn
        apart = torch.allclose(logps[1:], changed[1:], 1e-4)
        if switched and apart and as_expected(logps.double()):
            return True
    model.set_attn_implementation(usual)
    return False
