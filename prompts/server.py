"""Chat models on a server: what is sent, what is kept, and how an answer is read.

Servers that call themselves OpenAI-compatible differ in each of these. read_reply alone knows how
their answers differ, status_of and pause_of how their errors do."""

import contextlib
import hashlib
import json
import os
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import NamedTuple
from urllib.parse import urljoin

import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm

from prompts.rows import BadInput, Rows, digest_of

PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529, 530)
USED_UP = "insufficient_quota|exceeded_current_quota_error"  # no call will be answered
OF_ITS_TEXT = "(?i)content.?(filter|policy|management)|moderation|context.?length|too long"
SECONDS = {"ms": 0.001, "s": 1, "": 1, "m": 60, "h": 3600}  # in the units of Retry-After

# Finish reasons, in lower case.
BROKEN = "error|aborted|abort|cancelled|network_error|insufficient_system_resource"
ENDED = "stop|stop_?sequence|eos|eos_?token|eos_?found|end_?turn|complete|"
CUT_OFF = ".*length.*|.*max.*tokens.*|.*context_window.*"

# Thoughts before an answer, which may itself mention a tag: in the middle of a line, behind a space,
# a quote or an opening tag. So such a tag ends no thoughts, unless the text began with an opening.
OPENING = r"\s*(<(seed:)?(think|thought|reasoning)|\[THINK\]|◁think▷|<\|channel|<\|(begin_of_thought|START_THINKING)\|>)"
TAG = "</(seed:)?(think|thinking|thought|reasoning)>"
TOKEN = r"\[/THINK\]|◁/think▷|<channel\|>|<\|(end_of_thought|END_THINKING)\|>|<\|channel\|>final<\|message\|>"
BARE = rf"(?<![ \t\"'`“(]){TAG}(?!`)"
THOUGHTS = rf"""(?isx)
    (?P<ended>
        .* ({TOKEN} | \n{TAG} | {TAG}[ \t]*\n)
        | {OPENING} (.*{BARE} | .*?{TAG})
        | (?: (?!<(seed:)?(think|thought|reasoning)) . )* {BARE}
    )
    | {OPENING} .*  # without an end"""

# Ends of turns that a server leaves in the text.
END_OF_TURN = r"(\s*(<\|\w+\|>|</s>|<end_of_turn>))+\s*$"


class Reply(NamedTuple):
    """An answer. finish: stop, length (cut off at --max-tokens), or why it cannot be used."""

    text: str
    finish: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


def seed_of(*parts):
    """A 63-bit seed from anything printable, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


# ---- asking --------------------------------------------------------------------------------------
class Server:
    """Chat completions of an OpenAI-compatible server, whose key comes from the environment.

    Each answer is a line of the file call_log, as it came, unless it is empty and free of charge. So
    a call that was answered is never made again, whatever read_reply makes of the answer.
    """

    def __init__(self, name, args, call_log, **sampling):
        self.where = f"--api-base {args.api_base}"
        self.url = f"{args.api_base.rstrip('/')}/chat/completions"
        self.concurrency, self.timeout = args.concurrency, args.timeout
        try:
            extra = dict(json.loads(args.extra_body or "{}"))
        except (ValueError, TypeError) as error:
            raise BadInput(f"--extra-body: is no JSON object: {error}") from None
        self.settings = {"model": name, "seed": args.seed, **sampling, "extra_body": extra or None}

        self.key = os.environ.get(args.api_key_env, "").strip()
        self.session = requests.Session()
        if self.key:
            self.session.headers["Authorization"] = f"Bearer {self.key}"
        # Without an auth function of its own, requests would look for a key in a .netrc file.
        self.session.auth = lambda request: request
        try:
            self.session.get(args.api_base, timeout=self.timeout)
        except (requests.RequestException, ValueError) as error:
            reason = f"{type(error).__name__}; check the URL and the key in {args.api_key_env}"
            raise BadInput(f"{self.where}: cannot be asked: {reason}") from None
        self.session.mount(args.api_base, HTTPAdapter(pool_maxsize=self.concurrency))

        self.call_log = Rows(call_log, args.overwrite)
        self.answered = False  # whether any call of this run was
        self.stopped = threading.Event()  # the run ends: threads that wait must not ask again

    def ask(self, conversations, keys):
        """A Reply to each conversation. keys: what its seed depends on, besides --seed."""
        digests, calls = [], {}
        for messages, key in zip(conversations, keys, strict=True):
            seed = seed_of(self.settings["seed"], *key) >> 32  # 31 bits suit all servers
            body = {**self.settings, "messages": messages, "seed": seed}
            digests.append(digest_of(body))
            body |= {"stream": False} | (body.pop("extra_body") or {})
            calls[digests[-1]] = {name: value for name, value in body.items() if value is not None}

        replies = {}  # digest: Reply; equal calls are made once
        # The first call is made alone, so that a request in a form that is wrong is sent once.
        for some in (list(calls)[:1], list(calls)[1:]):
            # The pool is not closed here: Ctrl-C would have to wait for its calls.
            pool = ThreadPoolExecutor(self.concurrency)
            results = pool.map(self.call, some, [calls[digest] for digest in some])
            results = tqdm(results, "calls", len(some), leave=False, disable=None)
            replies |= dict(zip(some, results, strict=True))

        paid = [read_reply(row["answer"]) for row in self.call_log.rows.values()]
        prompts = sum(reply.prompt_tokens for reply in paid)
        completions = sum(reply.completion_tokens for reply in paid)
        tqdm.write(f"{prompts:,} prompt and {completions:,} completion tokens so far")
        return [replies[digest] for digest in digests]

    def call(self, digest, body):
        """The Reply of the call log or, in up to eight tries, of the server. Without an answer its
        finish is "error: ...". Raises BadInput where the other calls would fail as well."""
        if digest in self.call_log.rows:
            return read_reply(self.call_log.rows[digest]["answer"])

        for attempt in range(8):
            status, said, answer, retry_after = self.post(body)
            if status == 200:
                self.answered = True
                reply = read_reply(answer)
                if reply != Reply("", "stop"):  # empty and free of charge: it may come next time
                    self.call_log.add({"id": digest, "answer": answer})
                return reply
            lasting = status not in PASSING or re.search(USED_UP, said)
            if lasting or attempt == 7 or self.stopped.wait(pause_of(retry_after, attempt)):
                break

        # An error is its row's alone if it speaks of the text, or if another call has succeeded.
        of_all = status in (401, 402) or re.search(USED_UP, said)
        form_is_known = status in (400, 413, 422) and self.call_log.rows  # by an earlier run
        of_row = self.answered or form_is_known or re.search(OF_ITS_TEXT, said)
        if of_all or (status not in PASSING and 400 <= status < 500 and not of_row):
            self.stopped.set()
            raise BadInput(f"{self.where}: {said[:250]}; check URL, key, --model, --extra-body")
        return Reply("", f"error: {said[:250]}")

    def post(self, body):
        """One try: (status, what the server said, its JSON or None, Retry-After or ""). The status is
        0 where no answer came in time: one may have been paid, so it is not asked for again."""
        how = {"timeout": (10, self.timeout), "allow_redirects": False}
        try:
            response = self.session.post(self.url, json=body, **how)
        except requests.RequestException as error:  # its words are not said: they may hold the key
            if "Read timed out" in str(error):
                return 0, f"no answer within --timeout {self.timeout} seconds", None, ""
            return 503, type(error).__name__, None, ""

        if response.is_redirect:  # requests would turn the POST into a GET
            self.stopped.set()
            url = urljoin(self.url, response.headers["Location"]).removesuffix("/chat/completions")
            raise BadInput(f"{self.where}: the server has moved; pass --api-base {url}")
        said = f"status {response.status_code}: {response.content.decode(errors='replace')}"
        said = " ".join(said.split())
        if self.key:  # a server may send it back
            said = said.replace(self.key, "[key]")
        answer = None
        with contextlib.suppress(ValueError):
            answer = json.loads(response.content)  # in UTF-8, whatever the header says
        status = status_of(response.status_code, answer)
        return status, said, answer, response.headers.get("Retry-After", "")


# ---- reading what a server sends -----------------------------------------------------------------
def pause_of(retry_after, attempt):
    """Seconds until the next try: what Retry-After says ("2", "1m30s", a date), else a pause that
    grows from try to try, in part by chance, so that not all calls come at once."""
    parts = re.findall(r"(\d+\.?\d*)\s*(ms|[smh]|$)", retry_after)
    seconds = sum(float(number) * SECONDS[unit] for number, unit in parts)
    with contextlib.suppress(ValueError, TypeError):
        seconds = seconds or parsedate_to_datetime(retry_after).timestamp() - time.time()
    if seconds > 60:
        tqdm.write(f"the server asks to wait {seconds:.0f} seconds; at most an hour is waited")
    return min(seconds, 3600) if seconds > 0 else random.uniform(0.25, 0.5) * 2**attempt


def table(value):
    """The value if it is a dictionary, else an empty one."""
    return value if isinstance(value, dict) else {}


def choice_of(answer):
    """The first choice in the JSON of a chat completion, {} if there is none."""
    choices = table(answer).get("choices")
    return table(choices[0]) if isinstance(choices, list) and choices else {}


def status_of(status, answer):
    """What a status and a JSON amount to. 200 with an error inside is that error, 400 if it has no
    number; 200 without a choice, or with one that broke off, is 502, which may pass."""
    choice = choice_of(answer)
    error = table(answer).get("error") or choice.get("error")
    if table(answer).get("object") == "error":
        error = answer
    if not 200 <= status < 300:
        return status
    if not error:
        broken = re.fullmatch(BROKEN, str(choice.get("finish_reason")).lower())
        return 200 if choice and not broken else 502
    code = str(table(error).get("code"))
    return int(code) if re.fullmatch("[45][0-9][0-9]", code) else 400


def as_answer(reply):
    """The JSON that read_reply reads as this reply."""
    choice = {"message": {"content": reply.text}, "finish_reason": reply.finish}
    usage = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}
    return {"choices": [choice], "usage": usage}


def read_reply(answer, strip=str.strip):
    """The Reply in the JSON of a chat completion, whatever it is. strip: what its text goes through."""
    choice, usage = choice_of(answer), table(table(answer).get("usage"))
    message = table(choice.get("message"))
    content = message.get("content") or message.get("refusal")
    text = ""
    for part in content if isinstance(content, list) else [content]:
        if table(part).get("type", "text") in ("text", "output_text"):
            part = table(part).get("text", part)
        text += part if isinstance(part, str) else ""
    # Half of a character that takes two codes cannot be written, so it is replaced.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    thoughts = re.match(THOUGHTS, text)
    text = text[thoughts.end() :] if thoughts else text
    text = strip(re.sub(END_OF_TURN, "", text))

    reason = str(choice.get("finish_reason") or "").lower()
    finish = "stop" if re.fullmatch(ENDED, reason) else reason
    if re.fullmatch(CUT_OFF, reason) or (thoughts and not thoughts["ended"]):
        finish = "length"
    hidden = table(usage.get("completion_tokens_details")).get("reasoning_tokens")
    apart = message.get("reasoning_content") or message.get("reasoning") or hidden
    if not text and (thoughts or apart):
        used_up = "error: thinking used up --max-tokens, or of a judge --judge-tokens"
        finish = used_up if finish == "length" else "error: thoughts alone"
    counts = [
        str(usage.get(f"{kind}_tokens")).partition(".")[0] for kind in ("prompt", "completion")
    ]
    return Reply(text, finish, *[int(count) if count.isdigit() else 0 for count in counts])
