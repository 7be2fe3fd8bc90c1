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

from kernels.logps import linear_logps
from prompts.rows import BadInput

PACK_TOKENS = 4096 if torch.cuda.is_available() else 1024  # of a packed sequence, by default


# ---- packing -------------------------------------------------------------------------------------
class Segment(NamedTuple):
    """Tokens [start, end) of a packed sequence, a prompt or a completion."""

    start: int
    end: int
    prompt: int | None  # the number of the segment that is a completion's prompt


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
        spent += cost
        if not batches or spent > budget:
            batches.append([])
            spent = cost
        batches[-1].append(i)
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
    decoder = getattr(model, "model", model.base_model)  # Llama 4's base_model lacks hidden states
    output = decoder(batch.input_ids, position_ids=batch.position_ids, use_cache=False, **options)
    weight, options = output_layer(model)
    hidden = output.last_hidden_state[0, batch.predict_index].to(weight.dtype)  # (N, D)
    return linear_logps(hidden, weight, batch.labels, batch.cu_seqlens, **options)


def output_layer(model):
    """(weight (V, D), {bias, logit_scale, softcap}) of linear_logps; under autocast in its dtype."""
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    weight, bias = head.weight, getattr(head, "bias", None)
    if torch.is_autocast_enabled(weight.device.type):
        dtype = torch.get_autocast_dtype(weight.device.type)
        weight, bias = weight.to(dtype), bias if bias is None else bias.to(dtype)

    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies the logits
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides them
    softcap = getattr(config, "final_logit_softcapping", None) or 0.0  # Gemma
    return weight, {"bias": bias, "logit_scale": scale, "softcap": softcap}


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


def packed_attention(
    module, query, key, value, mask, *, segments, scaling=None, sliding_window=None,
    dropout=0.0, position_ids=None, use_cache=False, output_attentions=None,
):  # fmt: skip
    """Attention in a packed sequence, as transformers calls it: ((1, T, heads, d), None). query: (1,
    heads, T, d); key, value: perhaps fewer heads. sliding_window: how many tokens, itself the last,
    each attends to; None: all. Any argument but these, as for attention sinks, is a TypeError."""
    # Rotary embeddings may have left query and key in another dtype than autocast's.
    query, key = query.to(value.dtype), key.to(value.dtype)
    flash = value.device.type == FLASH_DEVICE and value.element_size() == 2
    if flash and query.shape[-1] == value.shape[-1] <= 256 and value.shape[-1] % 8 == 0:
        return flash_attention(query, key, value, segments, scaling, sliding_window), None

    lengths = [segment.end - segment.start for segment in segments]
    queries, keys, values = (x.split(lengths, 2) for x in (query, key, value))
    outputs = []
    for i, segment in enumerate(segments):
        parts = [i] if segment.prompt is None else [segment.prompt, i]
        k, v = (torch.cat([x[part] for part in parts], 2) for x in (keys, values))
        # A token attends to the prompt and its own tokens up to itself; a window keeps the last.
        prompt_length = k.shape[2] - lengths[i]
        mask = torch.ones(lengths[i], k.shape[2], dtype=torch.bool, device=k.device)
        mask = mask.tril(prompt_length).triu(prompt_length + 1 - (sliding_window or k.shape[2]))
        options = {"attn_mask": mask, "scale": scaling, "enable_gqa": True}
        outputs.append(scaled_dot_product_attention(queries[i], k, v, **options))
    return torch.cat(outputs, 2).transpose(1, 2), None


AttentionInterface.register("packed", packed_attention)


def flash_attention(query, key, value, segments, scaling, sliding_window):
    """packed_attention by Flash Attention, in 16-bit formats on a GPU: (1, T, heads, d). A segment's
    keys are its prompt's, copied, and its own; the copies' gradients are added in that format."""
    places, lengths = ragged(segments, value.device)
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (T, heads, d)
    key, value = key.index_select(0, places), value.index_select(0, places)
    # Causal, aligned at the last query and key: all of a segment's tokens see the whole prompt, or
    # as many tokens before themselves as a window has; -1 is all.
    options = {"window_size": ((sliding_window or 0) - 1, 0), "scale": scaling, **GQA}
    return varlen_attn(query, key, value, **lengths, **options)[None]


@functools.lru_cache(maxsize=1)  # every layer makes the same call
def ragged(segments, device):
    """For varlen_attn: the places of all segments' keys, where each one's queries and keys end."""
    query_lengths = [segment.end - segment.start for segment in segments]
    key_places = []
    for segment in segments:
        prompt = [] if segment.prompt is None else key_places[segment.prompt]
        key_places.append([*prompt, *range(segment.start, segment.end)])

    lengths = {}
    for name, counts in (("q", query_lengths), ("k", [len(places) for places in key_places])):
        ends = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device)
        lengths |= {f"cu_seq_{name}": ends, f"max_{name}": max(counts)}
    return torch.tensor(list(itertools.chain(*key_places)), device=device), lengths


@torch.no_grad()
def use_packed_attention(model):
    """Switches a model to packed_attention if its log-probs stay the same; returns whether it did.
    Raises BadInput if even single sequences differ from its logits: an unknown output layer."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    with contextlib.ExitStack() as stack:
        # Windows have two tokens meanwhile, so that short sequences show whether they are kept.
        for owner in (*model.modules(), *configs):
            if size := getattr(owner, "sliding_window", None):
                stack.callback(setattr, owner, "sliding_window", size)
                owner.sliding_window = 2
        return switch_if_equal(model)


def switch_if_equal(model):
    """What use_packed_attention does, by sequences of up to seven tokens."""
    sequences = [([3, 4, 5], [6, 7, 8, 9]), ([3, 4, 5], [10, 11]), ([12, 13], [14, 15, 16])]
    expected = []
    for prompt, completion in sequences:
        ids = torch.tensor([prompt + completion], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        expected.append(-cross_entropy(logits.double(), ids[0, len(prompt) :], reduction="sum"))
    alone = completion_logps(model, sequences)
    rtol = 1e-3 if logits.dtype == torch.float32 else 5e-2  # 16 bits round logits
    if not torch.allclose(alone.double(), torch.stack(expected), rtol, 1e-2):
        raise BadInput(f"model {model.name_or_path}: log-probs are not those of its logits")
    config = model.config.get_text_config()
    rope = str(getattr(config, "rope_parameters", None))
    if "dynamic" in rope:
        raise BadInput(f"model {model.name_or_path}: dynamic rotary embeddings change with length")
    # These sequences are too short to show longrope, or another mask than a window's.
    layers = set(getattr(config, "layer_types", None) or [])
    if "longrope" in rope or layers - {"full_attention", "sliding_attention"}:
        return False

    usual = model.config._attn_implementation
    # Layers that packed_attention does not compute raise one of these.
    with contextlib.suppress(TypeError, KeyError, ValueError, RuntimeError):
        model.set_attn_implementation("packed")
        logps = completion_logps(model, sequences)
        # A completion must not change with its neighbour; 1e-4 is tighter than rtol in 16 bits.
        changed = completion_logps(model, [([3, 4, 5], [9, 8, 7, 6]), *sequences[1:]])
        apart = torch.allclose(logps[1:], changed[1:], 1e-4)
        if apart and torch.allclose(logps, alone, rtol / 5, 1e-2):
            return model.config._attn_implementation == "packed"  # some models only warn
    model.set_attn_implementation(usual)
    return False
