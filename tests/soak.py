"""Thousands of rows through a server that fails three calls in ten, with kills: is every row there, was any call paid twice?

    python tests/soak.py --rows 10000 --out results/client       (about 25 minutes)

generate.py, then score.py with a judge, are started as a user would, killed at random moments (SIGKILL and SIGINT) and
started again until they are done. The server counts whole answers by request. Prints and writes soak.json: rows, calls,
calls answered more than once and the most that the kills explain, and the resident memory of the last, unbroken stretch
at half, three quarters and all of the rows.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
FAULTS = {
    "500": 20,
    "502": 20,
    "503 0": 0.5,
    "529 0": 0.5,
    "429 0": 0.5,
    "429": 0.5,
    "reset": 20,
    "half": 15,
    "no json": 10,
    "no choices": 10,
}
FAULTS |= {"slow": 1}  # weights; the two that slow all calls down are rare, as on a real server


def serve(port, share):
    """Chat completions until the process ends, of which `share` fail; GET tells how many. port: a queue for the port."""
    answered, faults, draw = collections.Counter(), collections.Counter(), random.Random(0)

    def payload(body):
        text = hashlib.sha256(body).hexdigest() + " word" * 60 + " Rating: 7"
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 50, "completion_tokens": 60}}).encode()

    async def answer(reader, writer):
        while True:
            try:
                request = await reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionError):
                return writer.close()
            if request.startswith(b"GET"):
                many = {"answered": sum(answered.values()), "requests": len(answered), "faults": dict(faults)}
                data, status, extra = json.dumps(many).encode(), "200", ""
            else:
                length = int(request.lower().partition(b"content-length:")[2].partition(b"\r")[0])
                try:
                    body = await reader.readexactly(length)
                except (asyncio.IncompleteReadError, ConnectionError):  # the stage was killed
                    return writer.close()
                kind = draw.choices(list(FAULTS), list(FAULTS.values()))[0] if draw.random() < share else "200"
                faults[kind] += kind != "200"
                if kind == "reset":
                    return writer.transport.abort()
                if kind == "slow":
                    await asyncio.sleep(4)
                status, _, wait = kind.partition(" ") if kind[0].isdigit() else ("200", "", "")
                extra = f"Retry-After: {wait}\r\n" if wait else ""
                data = payload(body) if status == "200" else b'{"error": "busy"}'
                data = b"<html>" if kind == "no json" else b'{"choices": []}' if kind == "no choices" else data
            head = (
                f"HTTP/1.1 {status} OK\r\nContent-Type: application/json\r\n{extra}Content-Length: {len(data)}\r\n\r\n"
            )
            if not request.startswith(b"GET") and kind == "half":
                writer.write(head.encode() + data[: len(data) // 2])
                await writer.drain()
                return writer.close()
            try:
                writer.write(head.encode() + data)
                await writer.drain()
            except ConnectionError:
                return
            if not request.startswith(b"GET") and kind == "200":
                answered[hashlib.sha256(body).digest()] += 1

    async def main():
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=512)
        port.put(server.sockets[0].getsockname()[1])
        await asyncio.Event().wait()

    asyncio.run(main())


def lines_of(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def resident(process):
    """Resident memory of a process in MB."""
    try:
        text = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith("VmRSS")), 0.0)


def drive(command, out, rows, kills, draw):
    """Runs a stage until it is done, killed `kills` times in its first two fifths; (seconds, [(rows written, MB)])."""
    began, marks, memory = time.time(), sorted(draw.sample(range(rows // 50, 2 * rows // 5), kills)), []
    while True:
        start = lines_of(out)
        with open(f"{out}.log", "a") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        while process.poll() is None:
            time.sleep(0.5)
            done = lines_of(out)
            if marks and done >= marks[0] and done > start:
                process.send_signal(signal.SIGINT if len(marks) % 2 else signal.SIGKILL)
                assert process.wait() in (130, -signal.SIGKILL), "it did not end at the signal"
                marks.pop(0)
            elif not marks and (now := resident(process)):
                memory.append((done, now))
        if process.returncode == 0:
            return time.time() - began, memory
        assert process.returncode in (130, -signal.SIGKILL, 1), f"status {process.returncode}, see {out}.log"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=int, default=10_000, help="rows; three calls each, then two of the judge (default: %(default)s)"
    )
    parser.add_argument("--kills", type=int, default=8, help="kills of each stage (default: %(default)s)")
    parser.add_argument("--faults", type=float, default=0.3, help="share of the calls that fail (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=64, help="threads (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/soak"), help="folder to work in (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("results/client"), help="folder of soak.json (default: %(default)s)"
    )
    args = parser.parse_args()
    import requests
    import torch

    from generate import provenance, read_jsonl

    ports, draw = multiprocessing.Queue(), random.Random(1)
    process = multiprocessing.Process(target=serve, args=(ports, args.faults), daemon=True)
    process.start()
    url = f"http://127.0.0.1:{ports.get()}/v1"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else a run in a shell's background hands on its deafness
    work = args.work.resolve()
    work.mkdir(parents=True)
    prompts, pairs, scored = work / "in.jsonl", work / "pairs.jsonl", work / "scored.jsonl"
    prompts.write_text(
        "".join(json.dumps({"id": f"r{i}", "prompt": f"Say {i}. " + "why " * 50}) + "\n" for i in range(args.rows))
    )
    common = [
        "--api-base",
        url,
        "--concurrency",
        args.concurrency,
        "--timeout",
        3,
        "--model",
        "big",
        "--task",
        "sentiment",
    ]
    stages = {
        "generate": (pairs, ["generate.py", *common, "--prompts", prompts, "--out", pairs], 3),
        "score": (
            scored,
            ["score.py", *common, "--reward", "judge", "--in", pairs, "--out", scored],
            2,
        ),
    }
    results, asked, answered = provenance(torch.device("cpu")) | {"requests": requests.__version__}, 0, 0
    for stage, (out, command, calls) in stages.items():
        seconds, memory = drive([sys.executable, *map(str, command)], out, args.rows, args.kills, draw)
        now = requests.get(url, timeout=60).json()
        rows = read_jsonl(out)
        assert rows.ids == [f"r{i}" for i in range(args.rows)] and not any("error" in row for row in rows)
        again = now["answered"] - answered - (now["requests"] - asked)
        found = {"rows": len(rows), "calls": now["requests"] - asked, "answered more than once": again}
        found |= {"at most, from kills": args.kills * args.concurrency, "kills": args.kills, "faults": now["faults"]}
        found["seconds"], asked, answered = round(seconds), now["requests"], now["answered"]
        for share in (0.5, 0.75, 1.0):
            at = [mb for done, mb in memory if done <= share * args.rows]
            found[f"MB at {share:.0%} of the rows"] = round(at[-1]) if at else None
        assert found["calls"] == calls * args.rows and again <= args.kills * args.concurrency, found
        results[stage] = found
        print(stage, json.dumps(found, indent=1), flush=True)
    process.kill()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "soak.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
