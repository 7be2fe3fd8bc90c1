"""Families of models, each by its own config class, small and random, with the peculiarities of its
public configs: whether they pack, their log-probs beside their logits, and a run of train.py."""

import json

import pytest
import torch
from conftest import pair_row, write_jsonl
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import train
from kernels.packed import completion_logps, use_packed_attention
from prompts.chat import load_model

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 600}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
SIZES |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2, "initializer_range": 0.1}
IMAGES = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "image_size": 28}
IMAGES |= {"num_attention_heads": 2, "patch_size": 14}

TIED = {"tie_word_embeddings": True}
WINDOW = {"sliding_window": 6}  # shorter than the sequences below
MIXED = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}


def rotary(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


def longrope(dimensions, **more):
    factors = {"short_factor": [1.0] * dimensions, "long_factor": [2.0] * dimensions}
    rope = rotary("longrope", original_max_position_embeddings=8, factor=64.0, **factors, **more)
    return rope | {"original_max_position_embeddings": 8}


LLAMA3 = rotary(
    "llama3", factor=8.0, original_max_position_embeddings=64, low_freq_factor=1.0, high_freq_factor=4.0
)  # fmt: skip
YARN = rotary("yarn", factor=8.0, original_max_position_embeddings=64, truncate=False)
GEMMA = TIED | {"head_dim": 16, "query_pre_attn_scalar": 24}
GEMMA2 = GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
DEEPSEEK |= {"n_shared_experts": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 16}
DEEPSEEK |= {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
DEEPSEEK |= {"v_head_dim": 4, "num_key_value_heads": 4, "routed_scaling_factor": 2.5}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
LINEAR |= {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
GEMMA4 = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 600}
GEMMA4 |= {"global_head_dim": 32, "num_kv_shared_layers": 0, "final_logit_softcapping": 30.0}
GRANITE = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0}
LLAMA4 = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48}
LLAMA4 |= {"head_dim": 16, "attention_chunk_size": 8, "no_rope_layers": [1, 0], "moe_layers": [1]}
LLAMA4_IMAGES = {"projector_input_dim": 16, "projector_output_dim": 16, "vision_output_dim": 16}

# Name, model_type, options of its config, and whether its pairs are packed. The others run one by one.
FAMILIES = [
    ("Llama 3", "llama", LLAMA3, True),
    ("SmolLM2", "llama", TIED, True),
    ("SmolLM3", "smollm3", TIED | {"no_rope_layers": [1, 0]}, True),
    ("Qwen 2.5", "qwen2", TIED | WINDOW | {"use_sliding_window": False}, True),
    ("Qwen 2.5, windows", "qwen2", MIXED | {"use_sliding_window": True}, True),
    ("Qwen 3", "qwen3", TIED | {"head_dim": 16}, True),
    ("Qwen 3 MoE", "qwen3_moe", QWEN_MOE | {"norm_topk_prob": True, "head_dim": 16}, True),
    ("Qwen 3.5", "qwen3_5_text", LINEAR | {"head_dim": 16}, False),
    ("Mistral 0.1", "mistral", WINDOW, True),
    ("Ministral 3", "ministral3", {"head_dim": 16}, True),
    ("Mixtral", "mixtral", EXPERTS | {"sliding_window": None}, True),
    ("Phi 3", "phi3", WINDOW, True),
    ("Phi 3, longrope", "phi3", WINDOW | longrope(4), False),
    ("Phi 4 mini", "phi3", TIED | longrope(3, partial_rotary_factor=0.75), False),
    ("Gemma 2", "gemma2", MIXED | GEMMA2, False),
    ("Gemma 3", "gemma3_text", MIXED | GEMMA, True),
    ("Gemma 3, images", "gemma3", {"text_config": SIZES | MIXED | GEMMA, "vision_config": IMAGES, "mm_tokens_per_image": 4}, True),
    ("Gemma 4", "gemma4_text", MIXED | GEMMA | GEMMA4, True),
    ("Granite", "granite", TIED | GRANITE | {"attention_multiplier": 0.0625}, True),
    ("Cohere", "cohere", TIED | {"logit_scale": 0.0625, "use_qk_norm": True}, True),
    ("Cohere 2", "cohere2", TIED | MIXED | {"logit_scale": 0.25}, True),
    ("OLMo 2", "olmo2", {}, True),
    ("OLMo 3", "olmo3", MIXED, True),
    ("DeepSeek V3", "deepseek_v3", DEEPSEEK, True),
    ("gpt-oss", "gpt_oss", MIXED | EXPERTS | YARN | {"head_dim": 16}, False),
    ("Llama 4", "llama4_text", LLAMA4, False),
    ("Llama 4, images", "llama4", {"text_config": SIZES | LLAMA4, "vision_config": IMAGES | LLAMA4_IMAGES}, False),
]  # fmt: skip
PROCESSOR = ("processor_config.json", "preprocessor_config.json")

# Longer than the windows; the first two have the same prompt.
SEQUENCES = [([5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 15, 2]), ([5, 6, 7, 8, 9], [30, 31, 32, 2])]
SEQUENCES += [([40, 41, 42], list(range(50, 66)))]


def save_model(folder, tokenizer, kind, options):
    """A random model of a family, of which no parameter is 0 or 1 throughout."""
    torch.manual_seed(0)
    with_images = "vision_config" in options
    auto_class = AutoModelForImageTextToText if with_images else AutoModelForCausalLM
    config = AutoConfig.for_model(kind, **({} if with_images else SIZES) | options)
    model = auto_class.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in PROCESSOR if with_images else ():
        (folder / name).write_text(json.dumps({"for": name}))
    return folder


@torch.no_grad()
def by_hand(model, sequences=SEQUENCES):
    """Log-probs of completions from the model's own logits of each sequence alone."""
    sums = []
    for prompt, completion in sequences:
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        tokens = torch.tensor(completion)[:, None]
        sums.append(logits.double().log_softmax(-1).gather(1, tokens).sum().item())
    return sums


def shapes_in(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}


@pytest.fixture
def train_argv(workdir):
    """The arguments of two steps on six pairs."""
    rows = []
    for i in range(6):
        rows.append(pair_row(i, "A warm film. " * (1 + i % 3), "A dull film.", [1.0, -1.0][i % 2]))
    pairs = write_jsonl(workdir / "pairs.jsonl", rows)
    settings = "--dtype float32 --lr 1e-2 --batch-size 3 --max-steps 2".split()
    return ["--in", pairs, "--out", workdir / "out", *settings]


@pytest.mark.parametrize(
    ("kind", "options", "packs"), [row[1:] for row in FAMILIES], ids=[row[0] for row in FAMILIES]
)
def test_a_family_is_trained_and_saved_as_it_was(
    kind, options, packs, run, workdir, tokenizer, train_argv, monkeypatch
):
    folder = save_model(workdir / "base", tokenizer, kind, options)
    base, _ = load_model(folder, "cpu", torch.float32)
    before = by_hand(base)
    assert use_packed_attention(base) is packs
    assert completion_logps(base, SEQUENCES).tolist() == pytest.approx(before, abs=1e-3)

    policies, save = [], train.save_policy
    monkeypatch.setattr(train, "save_policy", lambda *args: save(*args) or policies.append(args[0]))
    status, _, err = run("train", "--model", folder, *train_argv)
    assert status == 0, err
    options = {"dtype": torch.float32, "output_loading_info": True}
    saved, loading = AutoModelForCausalLM.from_pretrained(workdir / "out", **options)
    assert type(saved) is type(base) and not any(loading.values()), loading
    after = by_hand(saved)
    trained = completion_logps(policies[0].model, SEQUENCES).tolist()
    assert trained == pytest.approx(after, abs=1e-3)
    assert max(abs(a - b) for a, b in zip(after, before, strict=True)) > 0.02


@pytest.mark.parametrize("name", ["Qwen 3 MoE", "Mixtral", "Gemma 3, images"])
def test_saved_weights_have_the_names_and_shapes_of_the_original(
    name, run, workdir, tokenizer, train_argv
):
    """transformers joins the experts of a layer, and renames the parts of a model for images."""
    kind, options = next(row[1:3] for row in FAMILIES if row[0] == name)
    folder = save_model(workdir / "base", tokenizer, kind, options)
    assert run("train", "--model", folder, *train_argv)[0] == 0
    assert shapes_in(workdir / "out") == shapes_in(folder)
    for file in PROCESSOR if "images" in name else ():
        assert (workdir / "out" / file).read_bytes() == (folder / file).read_bytes()


def test_a_hub_ids_processor_is_saved_too(run, workdir, tokenizer, train_argv, monkeypatch):
    """From the cache of a hub that cannot be reached, which lacks the second file."""
    kind, options = next(row[1:3] for row in FAMILIES if row[0] == "Gemma 3, images")
    cache = workdir / "cache" / "models--lab--gemma"
    folder = save_model(cache / "snapshots" / "1", tokenizer, kind, options)
    (folder / PROCESSOR[1]).unlink()
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(workdir / "cache"))
    status, _, err = run("train", "--model", "lab/gemma", *train_argv)
    assert status == 0, err
    found = [name for name in PROCESSOR if (workdir / "out" / name).exists()]
    assert found == [PROCESSOR[0]]
