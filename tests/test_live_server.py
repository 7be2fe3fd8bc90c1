"""generate.py and score.py against a real server, `transformers serve` with the embedded model.

Runs where transformers' server is installed (requirements-dev.txt); skipped elsewhere, with the reason.
"""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from conftest import read_rows

for name in ("fastapi", "uvicorn"):
    pytest.importorskip(name, reason="transformers serve is missing; see requirements-dev.txt")

from prompts.chat import model_folder  # noqa: E402


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """(address, model name) of a server with the embedded model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = str(model_folder("smollm2"))
    log = open(tmp_path_factory.mktemp("live") / "serve.log", "w")
    command = [
        Path(sys.executable).with_name("transformers"),
        "serve",
        model,
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
    for _ in range(240):
        assert process.poll() is None, Path(log.name).read_text()
        try:
            requests.get(f"http://127.0.0.1:{port}/health", timeout=1)
            break
        except requests.RequestException:
            time.sleep(0.5)
    yield f"http://127.0.0.1:{port}/v1", model
    process.terminate()
    process.wait()


def test_teacher_and_judge_on_a_real_server(run, live, workdir):
    address, model = live
    argv = ["--task", "sentiment", "--model", model, "--api-base", address, "--limit", "2"]
    status, said, err = run(
        "generate", *argv, "--max-tokens", "40", "--form", "fresh", "--concurrency", "1"
    )
    assert status == 0, err
    rows = read_rows("runs/sentiment/pairs.jsonl")
    assert len(rows) == 2 and "completion tokens" in said
    for row in rows:
        assert row["chosen"][0]["content"] and row["rejected"][0]["content"] and row["critique"]
        assert set(row["teacher"]["finish"].values()) <= {"stop", "length"}
        assert all(count > 0 for count in row["teacher"]["completion_tokens"].values())
        assert all(count > 0 for count in row["teacher"]["prompt_tokens"].values())
    status, said, err = run(
        "score", *argv, "--reward", "judge", "--judge-tokens", "60", "--concurrency", "1"
    )
    assert status in (0, 1), err  # so small a judge may give no rating
    rows = read_rows("runs/sentiment/scored.jsonl")
    assert len(rows) == 2 and "completion tokens" in said
    for row in rows:
        for side in ("chosen", "rejected"):
            assert row["reward"][f"comment_{side}"]
            assert row[f"score_{side}"] is None or 1 <= row[f"score_{side}"] <= 10
