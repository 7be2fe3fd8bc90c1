"""How many calls a second does the client of prompts/server.py make? python results/bench_client.py

A server of its own process answers every call after a fixed time. Rows: the client against that
server; the same without the wait, which is what one Python process can do at all; and bare
requests.Session.post in as many threads, with neither journal nor retries, against both. They take
turns; medians of --rounds.
"""

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import requests
import torch
from requests.adapters import HTTPAdapter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from prompts.server import Server
from prompts.rows import provenance

MESSAGE = {"role": "assistant", "content": "word " * 100}
ANSWER = {"choices": [{"message": MESSAGE, "finish_reason": "stop"}]}
ANSWER["usage"] = {"prompt_tokens": 50, "completion_tokens": 100}


def serve(ports):
    """A server without a wait and one with 50 ms, until the process is ended; ports: a queue."""
    payload = json.dumps(ANSWER).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(payload)}\r\n\r\n".encode()

    def handler(wait):
        async def answer(reader, writer):
            while True:
                try:
                    request = (await reader.readuntil(b"\r\n\r\n")).lower()
                    length = request.partition(b"content-length:")[2].partition(b"\r")[0]
                    await reader.readexactly(int(length or 0))
                except (asyncio.IncompleteReadError, ConnectionError):
                    return writer.close()
                await asyncio.sleep(wait)
                writer.write(head + payload)

        return answer

    async def main():
        servers = [
            await asyncio.start_server(handler(wait), "127.0.0.1", 0, backlog=512)
            for wait in (0.0, 0.05)
        ]
        ports.put([server.sockets[0].getsockname()[1] for server in servers])
        await asyncio.Event().wait()

    asyncio.run(main())


def with_client(url, calls, threads):
    args = SimpleNamespace(api_base=url, api_key_env="NO_KEY", concurrency=threads, timeout=60)
    args.overwrite, args.seed, args.extra_body = False, 0, None
    with tempfile.TemporaryDirectory() as folder:
        server = Server("m", args, f"{folder}/calls", max_tokens=200, temperature=0.7, top_p=0.95)

        text = "Question {}: " + "why " * 50
        chats = [[{"role": "user", "content": text.format(i)}] for i in range(calls)]
        began = time.perf_counter()
        replies = server.ask(chats, [(i, "answer") for i in range(calls)])
        seconds = time.perf_counter() - began
        assert all(reply.finish == "stop" for reply in replies)
        assert len(server.call_log.rows) == calls
    return calls / seconds


def with_requests(url, calls, threads):
    session = requests.Session()
    session.mount("http://", HTTPAdapter(pool_maxsize=threads))
    messages = [{"role": "user", "content": "why " * 50}]
    body = {"model": "m", "messages": messages, "max_tokens": 200}

    def ask(_):
        return session.post(f"{url}/chat/completions", json=body, timeout=60).json()

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(ask, range(calls)))
    return calls / (time.perf_counter() - began)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--calls", type=int, default=3000, help="calls of a run (default: %(default)s)")
    add("--concurrency", type=int, default=64, help="threads (default: %(default)s)")
    add("--rounds", type=int, default=3, help="runs of each row (default: %(default)s)")
    add("--out", type=Path, default=Path("results/client"), help="folder of result.json")
    args = parser.parse_args()
    ports = multiprocessing.Queue()
    process = multiprocessing.Process(target=serve, args=(ports,), daemon=True)
    process.start()
    urls = [f"http://127.0.0.1:{port}/v1" for port in ports.get()]
    rows = {}
    for _ in range(args.rounds):
        for wait, url in zip(("no wait", "50 ms"), urls, strict=True):
            for who, run in (("client", with_client), ("bare requests", with_requests)):
                rows.setdefault(f"{who}, {wait}", []).append(run(url, args.calls, args.concurrency))
    process.kill()
    for name, rates in rows.items():
        print(f"{name:24s} {statistics.median(rates):7.0f} calls a second")
    print(f"ideal at 50 ms           {args.concurrency / 0.05:7.0f}")
    args.out.mkdir(parents=True, exist_ok=True)
    facts = provenance(torch.device("cpu")) | {"requests": requests.__version__}
    facts |= {"concurrency": args.concurrency, "calls_per_second": rows}
    (args.out / "result.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
