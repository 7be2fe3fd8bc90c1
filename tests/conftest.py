"""A small Llama with a tokenizer of its own, made in a second, and a way to run a stage as the command line does."""

import gc
import importlib
import json
import os
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may depend on a hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side, one a core

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prompts import rows
from prompts import server as client

ROOT = Path(__file__).resolve().parent.parent
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)


def make_tokenizer(template=CHATML, bos=None):
    """Byte-level BPE of 600 tokens, trained on the project's own prompts; with `bos`, it adds BOS by itself."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    lines = (ROOT / "prompts" / "sentiment.jsonl").read_text().splitlines()
    raw.train_from_iterator([json.loads(line)["request"] for line in lines[:120]], trainer)
    if bos:
        from tokenizers.processors import TemplateProcessing

        raw.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, raw.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        bos_token=bos,
        chat_template=template,
    )


def make_model(vocab_size, seed=0, **options):
    """Two layers of 64, tied weights, random, with logits as peaked as those of a trained model."""
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    sizes |= {
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    }
    sizes |= {
        "initializer_range": 0.2
    }  # the layers outweigh the embedding, else it repeats the last token
    config = LlamaConfig(
        vocab_size=vocab_size, eos_token_id=2, bos_token_id=None, pad_token_id=0, **sizes | options
    )
    model = LlamaForCausalLM(config).eval()
    model.model.norm.weight.data.fill_(2.0)
    return model


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer):
    """Folder of a small chat model, as save_pretrained leaves it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(monkeypatch, capsys):
    """run("train", "--loss", "dpo") -> (exit status, standard output, standard error)."""

    def call(stage, *argv):
        monkeypatch.setattr(sys, "argv", [f"{stage}.py", *map(str, argv)])
        status = 0
        try:
            rows.run(importlib.import_module(stage).main)
        except SystemExit as stop:
            status = int(stop.code or 0)
        wait_for_workers()
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def wait_for_workers():
    """What the end of a process does: waits for a server's calls, and closes the files they hold."""
    gc.collect()  # an executor that nobody holds ends its idle threads
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPool"):
            thread.join(60)
    gc.collect()


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """An empty folder to run stages in: runs/ lands here."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def pair_row(number, chosen, rejected, delta=1.0, split="train", prompt="Review the film Heat."):
    """A row of scored.jsonl."""
    return {
        "id": f"row-{number}",
        "task": "sentiment",
        "group": f"group-{number}",
        "split": split,
        "prompt": [{"role": "user", "content": prompt}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "critique": "Be kinder.",
        "chosen": [{"role": "assistant", "content": chosen}],
        "score_chosen": delta,
        "score_rejected": 0.0,
        "reward": {"kind": "contrast", "model": "tiny"},
    }


@pytest.fixture
def pairs_file(workdir):
    """Twelve pairs, eight of them for training; chosen and rejected of different lengths."""
    rows = []
    for i in range(12):
        chosen = "A warm and moving film about " + "music and food " * (1 + i % 3) + "."
        rejected = "A dull film number " + "one two three " * (1 + i % 4) + "!"
        delta = [2.0, -1.0, 0.5, 0.0][i % 4]
        split = "train" if i < 8 else "test"
        rows.append(
            pair_row(
                i, chosen, rejected, delta, split, f"Review the film number {i} in a sentence."
            )
        )
    return write_jsonl(workdir / "runs" / "sentiment" / "scored.jsonl", rows)


class HostileServer(BaseHTTPRequestHandler):
    """Answers chat completions; `script` holds faults to give before the first good answer, `fault` makes them up, and
    `speak` makes the text of an answer. `respond`, of the body and how often it came before, may give a whole answer:
    (status, headers, JSON), else None."""

    protocol_version = "HTTP/1.1"
    script, asked, answered, hooks, lock = [], [], [], [], threading.Lock()
    current = None  # the server of this test, where there are several
    fault = staticmethod(lambda body: 200)
    speak = staticmethod(lambda body: f"reply to {body['messages'][-1]['content'][:20]}")
    respond = staticmethod(lambda body, turn: None)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.current not in (None, self.server):
            return  # a call left over by the test before, which would take a fault of this one
        with self.lock:
            self.asked.append((self.headers.get("Authorization"), body))
            kind = self.script.pop(0) if self.script else self.fault(body)
            hook = self.hooks.pop() if self.hooks else None
            turn = sum(body == before for _, before in self.asked) - 1
        if hook:
            hook(body)
        whole = self.respond(body, turn)
        if whole:
            return self.send(*whole)
        text, finish, status, headers = self.speak(body), "stop", kind, {}
        if isinstance(kind, str):
            status, _, detail = kind.partition(" ")
            status = int(status) if status.isdigit() else 200
            if detail and status in (429, 503):
                headers["Retry-After"] = detail
        if kind == "reset":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if kind == "slow":
            time.sleep(1.5)
        if kind == "stall":
            time.sleep(20)
        if kind in ("length", "content_filter"):
            finish = kind
        choice = {
            "message": {"role": "assistant", "content": "" if kind == "empty" else text},
            "finish_reason": finish,
        }
        answer = {"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}
        if kind == "null usage":
            answer["usage"] = {"prompt_tokens": None, "completion_tokens": None}
        if kind == "no choices":
            answer = {"choices": []}
        payload = json.dumps(
            answer if status == 200 else {"error": {"message": self.headers["Authorization"]}}
        ).encode()
        if kind == "400 long":
            payload = b"x" * 185 + payload
        if kind == "no json":
            payload = b"<html>busy</html>"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        if kind in ("half", "stall inside"):
            self.wfile.write(payload[: len(payload) // 2])
            time.sleep(20 if kind == "stall inside" else 0)
            self.close_connection = True
            return
        self.wfile.write(payload)
        if status == 200 and kind not in ("no json", "no choices", "slow"):
            with self.lock:
                self.answered.append(json.dumps(body, sort_keys=True))

    def send(self, status, headers, payload):
        payload = json.dumps(payload).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def do_GET(self):  # what a client asks first: is a server there?
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    HostileServer.script, HostileServer.asked, HostileServer.hooks, HostileServer.answered = (
        [],
        [],
        [],
        [],
    )
    monkeypatch.setattr(HostileServer, "fault", staticmethod(lambda body: 200))
    monkeypatch.setattr(HostileServer, "respond", staticmethod(lambda body, turn: None))
    monkeypatch.setattr(client, "pause_of", lambda retry_after, attempt: 0.001)  # short pauses
    http = ThreadingHTTPServer(("127.0.0.1", 0), HostileServer)
    http.daemon_threads, http.handle_error = True, lambda *error: None  # of a client that left
    monkeypatch.setattr(HostileServer, "current", http)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1"
    http.shutdown()
    http.server_close()
