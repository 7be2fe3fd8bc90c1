"""kernels/packed.py: log-probs against sums by hand, packed sequences against separate ones."""

import doctest

import pytest
import torch
import transformers
from conftest import make_model
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kernels import packed
from kernels.packed import all_logps, collate, completion_logps, use_packed_attention
from prompts.rows import BadInput

SEQUENCES = [([5, 6, 7, 8], [9, 10, 2]), ([5, 6], [11, 2]), ([20, 21, 22], list(range(30, 50)))]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 600}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2}
SIZES |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}


def by_hand(model, prompt, completion):
    """The sum, token by token, from the model's own logits in fp64."""
    with torch.no_grad():
        logps = model(torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
    return sum(logps[len(prompt) + i - 1, token].item() for i, token in enumerate(completion))


def dense_mask(segments, window=None):
    """Which key (column) each query (row) attends to, by the words of packed.py: (T, T) bool."""
    positions = torch.zeros(segments[-1].end, dtype=torch.long)
    mask = torch.zeros(segments[-1].end, segments[-1].end, dtype=torch.bool)
    for start, end, prompt in segments:
        if prompt is not None:
            mask[start:end, segments[prompt].start : segments[prompt].end] = True
        mask[start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
        before = 0 if prompt is None else segments[prompt].end - segments[prompt].start
        positions[start:end] = torch.arange(before, before + end - start)
    distance = positions[:, None] - positions
    return mask if window is None else mask & (distance < window)


def build(kind, **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    if (bias := getattr(model.get_output_embeddings(), "bias", None)) is not None:
        torch.nn.init.normal_(bias)  # it begins as 0
    return model


@pytest.fixture(scope="module")
def model():
    """Of packed attention."""
    model = make_model(600)
    assert use_packed_attention(model) is True
    return model


def test_the_worked_batch_in_the_docstring_is_true():
    failed, attempted = doctest.testmod(packed)
    assert attempted and not failed


def test_log_probs_are_the_sums_by_hand_over_the_answer_alone(model):
    want = [by_hand(make_model(600), *sequence) for sequence in SEQUENCES]
    got = completion_logps(model, SEQUENCES)
    assert got.tolist() == pytest.approx(want, abs=2e-4)
    assert got.dtype == torch.float32 and min(abs(value) for value in want) > 3


def test_log_probs_do_not_depend_on_what_they_are_packed_with(model):
    together = completion_logps(model, SEQUENCES).tolist()
    for budget in (1, 20, 1000):  # one by one, two and one, all at once
        assert all_logps(model, SEQUENCES, budget).tolist() == pytest.approx(together, abs=1e-4)


def test_micro_batches_hold_neighbours_up_to_the_budget_and_at_least_one():
    assert packed.micro_batches([3, 3, 3, 9, 1, 5], 6) == [[0, 1], [2], [3], [4, 5]]
    assert packed.micro_batches([], 6) == []


def test_packed_pairs_equal_separate_sequences_in_value_and_gradient():
    """Two completions of one prompt share it; a third sequence stands beside or between them."""
    shared = [([5, 6, 7, 8], [9, 10, 11, 2]), ([5, 6, 7, 8], [30, 2]), ([40, 41], [9, 10, 2])]
    found = []
    for order, packs in (((0, 1, 2), False), ((0, 1, 2), True), ((0, 2, 1), True)):
        model = make_model(600)
        assert not packs or use_packed_attention(model)
        logps = completion_logps(model, [shared[i] for i in order])
        (torch.tensor([1.0, -2.0, 0.5])[list(order)] * logps).sum().backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        found.append((logps.detach()[list(order)], gradient))
    (want, exact), *others = found
    assert exact.norm() > 1
    for logps, gradient in others:
        assert torch.allclose(logps, want, atol=1e-4)
        assert (gradient - exact).norm() < 1e-4 * exact.norm()


def test_a_prompt_shared_by_two_completions_is_in_the_packed_sequence_once():
    prompt, other = [5, 6, 7], [8, 9]
    batch = packed.collate([(prompt, [1, 2]), (prompt, [3]), (other, [4]), (prompt, [5])])
    assert batch.input_ids.tolist() == [[*prompt, 1, 2, 3, *other, 4, *prompt, 5]]
    places = [segment[:2] for segment in batch.segments]
    assert places == [(0, 3), (3, 5), (5, 6), (6, 8), (8, 9), (9, 12), (12, 13)]


def test_log_probs_under_autocast_differ_by_rounding_only(model):
    with torch.no_grad():
        exact = completion_logps(model, SEQUENCES[:2])
        with torch.autocast("cpu", torch.bfloat16):
            rounded = completion_logps(model, SEQUENCES[:2])
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.05 * exact.abs().max()


# ---- models of other kinds -----------------------------------------------------------------------


MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
WINDOWED = [
    ("Mistral", {}),
    ("Qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    ("Cohere2", MIXED),
    ("Gemma3Text", MIXED | {"head_dim": 16}),
    ("Olmo3", MIXED),
]


@pytest.mark.parametrize(("kind", "options"), WINDOWED)
@pytest.mark.parametrize("window", [1, 4, 8])
def test_sliding_windows_are_kept_in_a_packed_sequence_in_value_and_gradient(kind, options, window):
    """Windows that end within the completion, within the prompt, and behind all but one token."""
    sequences = [
        ([5, 6, 7, 8], [9, 10, 11, 12, 13, 2]),
        ([5, 6, 7, 8], [30, 2]),
        ([40, 41], [9, 2]),
    ]
    weights = torch.tensor([1.0, -2.0, 0.5])
    found = []
    for packs in (False, True):
        model = build(kind, **options, sliding_window=window)
        assert not packs or use_packed_attention(model)
        logps = completion_logps(model, sequences)
        (weights * logps).sum().backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        found.append((logps.detach(), gradient))
    (want, exact), (logps, gradient) = found
    hand = [by_hand(build(kind, **options, sliding_window=window), *pair) for pair in sequences]
    full = completion_logps(build(kind, **options, sliding_window=20), sequences)
    assert want.tolist() == pytest.approx(hand, abs=1e-3)
    assert (full - want)[0].abs() > 1e-3  # the window matters
    assert torch.allclose(logps, want, atol=1e-4)
    assert (gradient - exact).norm() < 1e-4 * exact.norm()


def test_windows_are_as_they_were_after_the_switch_and_after_a_failure(monkeypatch):
    model = build("Cohere2", **MIXED, sliding_window=7)
    assert use_packed_attention(model) is True

    def windows():
        return [getattr(layer.self_attn, "sliding_window", None) for layer in model.model.layers]

    assert windows() == [7, None] and model.config.sliding_window == 7
    monkeypatch.setattr(type(model), "forward", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        use_packed_attention(model)
    assert windows() == [7, None] and model.config.sliding_window == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_that_a_model_keeps_from_its_attention_is_noticed(dtype):
    """Qwen2Moe has it in its mask alone, of which packed attention makes no use."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    experts |= {"shared_expert_intermediate_size": 16, "use_sliding_window": True}
    model = build("Qwen2Moe", **experts, max_window_layers=1, sliding_window=50).to(dtype)
    assert use_packed_attention(model) is False
    assert model.config._attn_implementation == "sdpa" and model.config.sliding_window == 50


def test_attention_that_is_not_computed_here_is_a_type_error():
    operands = [torch.randn(1, 2, 2, 8)] * 3
    segments = (packed.Segment(0, 2, None),)
    for argument in ("s_aux", "softcap", "position_bias", "indices"):
        with pytest.raises(TypeError, match=argument):
            packed.packed_attention(None, *operands, None, segments=segments, **{argument: 1})


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Cohere", {"logit_scale": 0.5}),
        ("Granite", {"logits_scaling": 3.0}),
        ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 16}),
        ("Phi", {}),  # a bias
    ],
)
def test_an_output_layer_with_a_scale_a_cap_or_a_bias_is_exact(kind, options):
    model = build(kind, **options)
    want = [by_hand(model, *sequence) for sequence in SEQUENCES]
    use_packed_attention(model)
    got = completion_logps(model, SEQUENCES)
    assert got.tolist() == pytest.approx(want, abs=1e-3)


def test_a_mask_that_lets_one_answer_see_the_other_is_noticed_in_16_bits_too(monkeypatch):
    """By a model of 30 nats an answer, of which rounding may take 5 %."""
    assert use_packed_attention(make_model(600).to(torch.bfloat16)) is True

    def leaky(module, query, key, value, mask, scaling=None, segments=None, **options):
        causal = {"is_causal": True, "scaling": scaling}
        return sdpa_attention_forward(module, query, key, value, None, **causal)

    monkeypatch.setitem(packed.AttentionInterface._global_mapping, "packed", leaky)
    assert use_packed_attention(make_model(600).to(torch.bfloat16)) is False


def test_an_output_layer_that_is_not_supported_is_refused(monkeypatch):
    model = make_model(600)
    forward = type(model).forward

    def scaled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 1.1
        return output

    monkeypatch.setattr(type(model), "forward", scaled)
    with pytest.raises(BadInput, match="not those of its logits"):
        use_packed_attention(model)


def test_a_model_that_hands_nothing_on_to_its_attention_runs_one_sequence_at_a_time(monkeypatch):
    model = make_model(600)
    forward = type(model.base_model).forward

    def strict(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, **kw):
        if "segments" in kw:
            raise TypeError("unexpected keyword argument 'segments'")
        return forward(self, input_ids, attention_mask, position_ids, use_cache=use_cache, **kw)

    monkeypatch.setattr(type(model.base_model), "forward", strict)
    assert use_packed_attention(model) is False
    assert model.config._attn_implementation == "sdpa"


def test_a_model_whose_attention_stays_its_own_is_not_taken_for_packed():
    """It only warns; under torchrun processes would make unequal numbers of passes."""
    model = build("Falcon")
    assert use_packed_attention(model) is False
    assert model.config._attn_implementation != "packed"


def test_positions_that_depend_on_the_length_are_refused_or_run_one_by_one():
    scaled = {"rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(BadInput, match="dynamic"):
        use_packed_attention(build("Llama", rope_parameters=scaled | {"rope_type": "dynamic"}))
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    factors |= {"original_max_position_embeddings": 8, "rope_type": "longrope"}
    model = build("Llama", rope_parameters=scaled | factors, head_dim=16)
    assert use_packed_attention(model) is False
    for prompt, completion in SEQUENCES:
        got = completion_logps(model, [(prompt, completion)] * 2)
        assert got.tolist() == pytest.approx([by_hand(model, prompt, completion)] * 2, abs=1e-3)


# ---- attention -----------------------------------------------------------------------------------


def test_no_query_is_multiplied_with_more_than_its_prompt_and_its_own_answer(monkeypatch):
    sequences = [*SEQUENCES, (SEQUENCES[-1][0], [7, 8, 9, 2])]  # two that share a prompt
    model, widths, attend = make_model(600), [], packed.scaled_dot_product_attention
    assert use_packed_attention(model)

    def watched(query, key, *rest, **options):
        widths.append(key.shape[2])
        return attend(query, key, *rest, **options)

    monkeypatch.setattr(packed, "scaled_dot_product_attention", watched)
    completion_logps(model, sequences)
    assert max(widths) == max(len(prompt) + len(answer) for prompt, answer in sequences)


@pytest.mark.parametrize(
    ("heads", "groups", "size", "value_size"), [(4, 4, 8, 8), (6, 2, 8, 5), (3, 1, 4, 16)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 3])
def test_packed_attention_is_dense_attention_for_any_heads(
    heads, groups, size, value_size, dtype, window
):
    segments = [(0, 1, None), (1, 8, 0), (8, 12, 0), (12, 15, None), (15, 16, 3)]
    segments = tuple(packed.Segment(*segment) for segment in segments)
    random = torch.Generator().manual_seed(heads)
    shapes = (heads, size), (groups, size), (groups, value_size)
    operands = [torch.randn(1, n, 16, d, generator=random).to(dtype) for n, d in shapes]
    exact = [operand.double().requires_grad_() for operand in operands]
    operands = [operand.requires_grad_() for operand in operands]
    told = {"segments": segments, "sliding_window": window}
    output, _ = packed.packed_attention(None, *operands, None, **told)
    mask = dense_mask(segments, window)
    key, value = (operand.repeat_interleave(heads // groups, 1) for operand in exact[1:])
    dense = torch.nn.functional.scaled_dot_product_attention(exact[0], key, value, mask)
    dense = dense.transpose(1, 2)
    above = torch.randn(dense.shape, generator=random)
    output.backward(above.to(dtype))
    dense.backward(above.double())
    error = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    gradients = [(a.grad, b.grad) for a, b in zip(operands, exact, strict=True)]
    for got, want in [(output, dense), *gradients]:
        assert got.dtype == dtype and (got.double() - want).norm() <= error * want.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 4, 64), (6, 2, 128), (3, 1, 32)])
@pytest.mark.parametrize("window", [None, 1, 5])
def test_flash_attention_is_dense_attention(heads, groups, size, window):
    random = torch.Generator().manual_seed(heads)
    segments = collate(SEQUENCES).segments
    shapes = [(1, n, segments[-1].end, size) for n in (heads, groups, groups)]
    operands = [torch.randn(shape, generator=random).bfloat16().cuda() for shape in shapes]
    exact = [operand.double().requires_grad_() for operand in operands]
    operands = [operand.requires_grad_() for operand in operands]
    told = {"segments": segments, "scaling": 0.2, "sliding_window": window}
    output, _ = packed.packed_attention(None, *operands, None, **told)
    key, value = (operand.repeat_interleave(heads // groups, 1) for operand in exact[1:])
    attend = torch.nn.functional.scaled_dot_product_attention
    dense = attend(exact[0], key, value, dense_mask(segments, window).cuda(), scale=0.2).transpose(
        1, 2
    )
    above = torch.randn(dense.shape, generator=random).cuda()
    output.backward(above.bfloat16())
    dense.backward(above.double())
    gradients = [(a.grad, b.grad) for a, b in zip(operands, exact, strict=True)]
    for got, want in [(output, dense), *gradients]:
        assert (got.double() - want).norm() <= 2e-2 * want.norm()


@pytest.mark.parametrize("window", [None, 1, 5])
def test_what_flash_attention_is_told_is_the_mask(monkeypatch, window):
    """On a CPU, with a stand-in that does what varlen_attn's documentation says."""

    def stand_in(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size, scale, enable_gqa
    ):
        # Causal, aligned at the last token; as many tokens before it as the first number, -1 for all.
        assert window_size == (-1 if window is None else window - 1, 0) and enable_gqa
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        sizes = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
        assert (max(sizes[0]), max(sizes[1])) == (max_q, max_k)
        parts = zip(query.split(sizes[0]), key.split(sizes[1]), value.split(sizes[1]), strict=True)
        outputs = []
        for part in parts:
            q, k, v = (x.transpose(0, 1) for x in part)
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
            mask = mask.tril(k.shape[1] - q.shape[1])
            if window_size[0] >= 0:
                mask = mask.triu(k.shape[1] - q.shape[1] - window_size[0])
            attend = torch.nn.functional.scaled_dot_product_attention
            outputs.append(attend(q, k, v, mask, scale=scale).transpose(0, 1))
        return torch.cat(outputs)

    monkeypatch.setattr(packed, "varlen_attn", stand_in)
    monkeypatch.setattr(packed, "GQA", {"enable_gqa": True})
    random, segments = torch.Generator().manual_seed(0), collate(SEQUENCES).segments
    shapes = [(1, n, segments[-1].end, 8) for n in (4, 2, 2)]
    operands = [torch.randn(shape, generator=random).half() for shape in shapes]
    operands = [operand.requires_grad_() for operand in operands]
    found = []
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(packed, "FLASH_DEVICE", device)
        told = {"segments": segments, "scaling": 0.2, "sliding_window": window}
        output, _ = packed.packed_attention(None, *operands, None, **told)
        found.append((output, *torch.autograd.grad(output.square().sum(), operands)))
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 2e-3 * other.norm() + 1e-5  # a window of 1: keys have none


def test_flash_attention_is_told_each_segments_keys_its_prompts_and_its_own():
    segments = collate(SEQUENCES[:2]).segments  # 4 + 3 and 2 + 2 tokens
    places, told = packed.ragged(segments, torch.device("cpu"))
    keys = places.split(told["cu_seq_k"].diff().tolist())
    assert [part.tolist() for part in keys] == [
        [0, 1, 2, 3],
        [0, 1, 2, 3, 4, 5, 6],
        [7, 8],
        [7, 8, 9, 10],
    ]
    assert told["cu_seq_q"].tolist() == [0, 4, 7, 9, 11] and told["cu_seq_q"].dtype == torch.int32
    assert (told["max_q"], told["max_k"]) == (4, 7)
