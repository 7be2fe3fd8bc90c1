"""Thousands of rows through a server that fails three calls in ten, with kills: is every row there,
and was any call paid twice?

    python tests/soak.py --rows 10000 --out results/client

generate.py, then score.py with a judge, are started as a user would, killed at random moments
(SIGKILL and SIGINT) and started again until they are done. The server counts whole answers by
request. Prints and writes soak.json: rows, calls, calls answered more than once and the most that
the kills explain, kills, faults and seconds.
"""

import argparse
import asyncio
import collections
import hashlib
import json
import multiprocessing
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import requests
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from prompts.rows import provenance  # noqa: E402
from prompts.rows import read_rows  # noqa: E402

# weights; those that slow all calls down are rare, as on a real server
FAULTS = {"500": 20, "502": 20, "reset": 20, "half": 15, "no json": 10, "no choices": 10}
FAULTS |= {"503 0": 0.5, "529 0": 0.5, "429 0": 0.5, "429": 0.5, "slow": 1}


def serve(port, share):
    """Chat completions until the process ends, of which `share` fail; GET tells how many were
    answered. port: a queue for the port."""
    answered, faults, draw = collections.Counter(), collections.Counter(), random.Random(0)

    def completion(body):
        text = hashlib.sha256(body).hexdigest() + " word" * 60 + " Rating: 7"
        message = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": 50, "completion_tokens": 60}
        return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}

    def said(kind, body):
        """(head and body of an answer, whether it is a completion)"""
        if kind == "count":
            data = {"answered": answered.total(), "requests": len(answered), "faults": dict(faults)}
        else:
            data = {"choices": []} if kind == "no choices" else completion(body)
        data = b"<html>" if kind == "no json" else json.dumps(data).encode()
        status, _, wait = kind.partition(" ") if kind[0].isdigit() else ("200", "", "")
        lines = [f"HTTP/1.1 {status} OK", "Content-Type: application/json"]
        lines += [f"Content-Length: {len(data)}", *([f"Retry-After: {wait}"] if wait else [])]
        return "\r\n".join([*lines, "", ""]).encode() + data

    async def talk(reader, writer):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\r")[0] or 0)
            body, kind = await reader.readexactly(length), "200"
            if head.startswith(b"get"):
                kind = "count"
            elif draw.random() < share:
                (kind,) = draw.choices(list(FAULTS), list(FAULTS.values()))
                faults[kind] += 1
            if kind == "reset":
                return writer.transport.abort()
            await asyncio.sleep(4 if kind == "slow" else 0)
            data = said(kind, body)
            writer.write(data[: len(data) // 2] if kind == "half" else data)
            await writer.drain()
            if kind == "half":
                return writer.close()
            if kind == "200":
                answered[hashlib.sha256(body).digest()] += 1

    async def answer(reader, writer):
        try:
            await talk(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):  # the stage left, or was killed
            writer.close()

    async def main():
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=512)
        port.put(server.sockets[0].getsockname()[1])
        await asyncio.Event().wait()

    asyncio.run(main())


def drive(command, out, calls, kills, draw):
    """Runs a stage until it is done, killed in its first four fifths; (seconds, kills)."""
    began, marks = time.time(), sorted(draw.sample(range(calls // 50, 4 * calls // 5), kills))
    killed, journal = 0, out.with_name(f"{out.name}.calls")

    def lines():
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    while True:
        start = lines()
        with open(f"{out}.log", "a") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        while process.poll() is None:
            time.sleep(0.1)
            if marks and lines() >= max(marks[0], start + 1):
                process.send_signal(signal.SIGINT if len(marks) % 2 else signal.SIGKILL)
                marks.pop(0)
                killed += process.wait() in (130, -signal.SIGKILL)  # else it was done before
        if process.returncode == 0:
            return time.time() - began, killed
        ended = process.returncode in (130, -signal.SIGKILL, 1)
        assert ended, f"status {process.returncode}, see {out}.log"


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--rows", type=int, default=10_000, help="each three calls, then two of the judge")
    add("--kills", type=int, default=8, help="kills of each stage (default: %(default)s)")
    add("--faults", type=float, default=0.3, help="share of failures (default: %(default)s)")
    add("--concurrency", type=int, default=64, help="threads (default: %(default)s)")
    add("--work", type=Path, default=Path("runs/soak"), help="folder to work in")
    add("--out", type=Path, default=Path("results/client"), help="folder of soak.json")
    args = parser.parse_args()
    ports, draw = multiprocessing.Queue(), random.Random(1)
    process = multiprocessing.Process(target=serve, args=(ports, args.faults), daemon=True)
    process.start()
    url = f"http://127.0.0.1:{ports.get()}/v1"
    # else a run in a shell's background hands its deafness on
    signal.signal(signal.SIGINT, signal.default_int_handler)
    work = args.work.resolve()
    work.mkdir(parents=True)
    prompts, pairs, scored = work / "in.jsonl", work / "pairs.jsonl", work / "scored.jsonl"
    ids = [f"r{i}" for i in range(args.rows)]
    texts = [{"id": name, "prompt": f"Say {name}. " + "why " * 50} for name in ids]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in texts))
    common = ["--api-base", url, "--concurrency", args.concurrency, "--timeout", 3]
    common += ["--model", "big", "--task", "sentiment"]
    judge = ["score.py", *common, "--reward", "judge", "--in", pairs, "--out", scored]
    teacher = ["generate.py", *common, "--prompts", prompts, "--out", pairs]
    results = provenance(torch.device("cpu")) | {"requests": requests.__version__}
    asked = answered = 0
    for out, command, calls in ((pairs, teacher, 3), (scored, judge, 2)):
        command = [sys.executable, *map(str, command)]
        seconds, kills = drive(command, out, calls * args.rows, args.kills, draw)
        now = requests.get(url, timeout=60).json()
        rows = read_rows(out)
        assert [row["id"] for row in rows] == ids and not any("error" in row for row in rows)
        again = now["answered"] - answered - (now["requests"] - asked)
        found = {"rows": len(rows), "calls": now["requests"] - asked}
        found |= {"answered more than once": again, "at most, from kills": kills * args.concurrency}
        found |= {"kills": kills, "seconds": round(seconds), "faults": now["faults"]}
        asked, answered = now["requests"], now["answered"]
        print(out.name, json.dumps(found, indent=1), flush=True)
        assert found["calls"] == calls * args.rows and again <= kills * args.concurrency
        results[out.name] = found
    process.kill()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "soak.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
