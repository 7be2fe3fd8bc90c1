"""Rows of JSONL in and out, and what the four stages share: flags, provenance, how a run ends."""

import hashlib
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

FOLDER = Path(__file__).parent
SIDES = ("chosen", "rejected")  # of a preference pair


class BadInput(Exception):
    """Input that a stage cannot use: one line that says what, where and how to fix it."""


# ---- reading -------------------------------------------------------------------------------------
def read_rows(path, *fields):
    """The rows of a JSONL file, dictionaries. NaN and Infinity, which JSON lacks, are None. Raises
    BadInput for a missing file, a line that is no JSON object, or a row that has neither `error`
    nor all of the fields."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file; write it, or run the stage that does")

    rows = []
    # Bytes are split, not text: an answer's own U+2028 does not end a line.
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=lambda name: None)
            if not isinstance(row, dict):
                raise ValueError("it is another value")
            if re.search(rb"\\u[dD]", line):  # half of a character's two codes can't be written
                json.dumps(row, ensure_ascii=False).encode()
        except ValueError as error:
            why = f"{error.msg}, column {error.colno}" if hasattr(error, "msg") else str(error)
            if number == 1 and not line.startswith(b"{"):
                looks = "CSV" if b"," in line else "text or Parquet"
                looks = "a JSON array" if line.startswith(b"[") else looks
                how = "datasets.load_dataset(...)['train'].to_json(...) converts it, see README.md"
                why = f"the file looks like {looks}; {how}"
            raise BadInput(f"{path}:{number}: one JSON object a line is needed: {why}") from None
        for field in fields:
            if field not in row and not row.get("error"):
                raise BadInput(f"{path}:{number}: the field '{field}' is missing in {list(row)}")
        rows.append(row)

    if not rows:
        raise BadInput(f"{path}: empty; at least one row is needed")
    return rows


def text_of(answer):
    """The text of an answer that is a list of messages, or text."""
    return answer if isinstance(answer, str) else answer[-1]["content"]


def is_scored(row):
    """Whether both scores of a row are finite numbers; anything else is no score."""
    scores = [row.get(f"score_{side}") for side in SIDES]
    return all(isinstance(score, int | float) and math.isfinite(score) for score in scores)


# ---- writing, and continuing a run that was stopped ----------------------------------------------
class Rows:
    """A JSONL file of rows with an id, to which rows are added as they are made.
    rows: {id: row} of the whole file. done: those of them that need not be made again."""

    def __init__(self, path, overwrite=False):
        """Opens or makes the file, without a torn last line. overwrite: begins an empty file; the
        old one is NAME.bak. Raises BadInput for a file of something else, which stays as it is."""
        self.path, self.done = Path(path), {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open_locked(path)
        self.file.seek(0)
        content = self.file.read()
        if overwrite and content:
            write(f"{path}.bak", content)
            content = b""
        *lines, torn = content.split(b"\n")
        try:
            rows = [json.loads(line) for line in lines if line.strip()]
            self.rows = {row["id"]: row for row in rows}
            if torn and not torn.startswith((b"{", b"\0")):  # NULs are of a disk that was cut off
                raise ValueError("the last line was never a row")
        except (ValueError, LookupError, TypeError):
            raise BadInput(f"{path}: is not of this stage; choose another --out") from None
        self.file.truncate(len(content) - len(torn))

    def add(self, *rows):
        """Writes the rows that are not done, so that a killed run keeps them."""
        new = {row["id"]: row for row in rows if row["id"] not in self.done}
        self.rows |= new
        self.file.write(lines_of(new.values()))
        self.file.flush()

    def resume(self, made_by, settings, source):
        """Marks the rows without `error` as done. Raises BadInput where the field made_by of one
        has other settings than this run, or its row of source, the input, changed or is gone."""
        origins = {row["id"]: row for row in source}
        if len(origins) < len(source):
            raise BadInput("--in: an id is there twice; ids must differ")

        self.done = {key: row for key, row in self.rows.items() if not row.get("error")}
        for key, row in self.done.items():
            origin = origins.get(key, {"id": "gone from the input"})
            for before, now in ((row.get(made_by, {}), settings), (row, origin)):
                what = difference(before, now)
                if what.startswith("prompt_text"):
                    what = "another text of the task"
                if what:
                    what = f"row {key} was made with {what}"
                    raise BadInput(f"{self.path}: {what}; choose another --out or --overwrite")

    def batches(self, rows, size=None):
        """Lists of `size` rows, of which at least one is not done. They are cut from all rows, done
        or not, so that a continued run computes the same batches. None: one list of the rows that
        are not done, since calls cost money."""
        if size is None:
            rows = [row for row in rows if row["id"] not in self.done]
            size = len(rows) or 1

        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [batch for batch in batches if any(row["id"] not in self.done for row in batch)]

    def finish(self, source):
        """Rewrites the file in the order of the input, and returns the input's rows."""
        rows = [self.rows.pop(row["id"]) for row in source if row["id"] in self.rows]
        write(self.path, lines_of([*rows, *self.rows.values()]))
        return rows


def difference(before, now):
    """The first key of `now` that has another value in `before`, with both; "" if there is none."""
    for name, value in now.items():
        old = before.get(name)
        if isinstance(old, dict) and isinstance(value, dict) and old != value:
            return f"{name}.{difference(old, dict.fromkeys(old) | value)}"
        if old != value:
            return f"{name} {old!r:.60}, now it is {value!r:.60}"
    return ""


def open_locked(path):
    """A file to read and append to. Raises BadInput where another run has it open in this way."""
    file = open(path, "a+b")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(f"{path}: another run writes to it; wait, or choose another --out") from None
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
    return file


def lines_of(rows):
    """Rows as the bytes of a JSONL file. Half of a character's two codes stays an escape of JSON."""
    texts = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    return "".join(texts).encode(errors="backslashreplace")


def write(path, content):
    """Writes a file of these bytes: after a kill the old one is there, or the whole new one."""
    Path(f"{path}.part").write_bytes(content)
    os.replace(f"{path}.part", path)


# ---- provenance ----------------------------------------------------------------------------------
def digest_of(value):
    """A hash of anything that JSON can hold, and of arrays, 24 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def provenance(device):
    """The facts that are needed to reproduce a result. device: a torch.device."""
    git = f"git -C '{FOLDER}' describe --always --abbrev=12 --dirty=+ --exclude='*' 2>/dev/null"
    names = re.findall("model name.*: (.*)", subprocess.getoutput("cat /proc/cpuinfo"))  # Linux
    hardware = f"{os.cpu_count()} cores, {names[0] if names else platform.machine()}"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    return {
        "command": shlex.join(sys.argv),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "commit": subprocess.getoutput(git) or "unknown",
        "hardware": hardware,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


# ---- command line --------------------------------------------------------------------------------
def make_parser(doc, server=True):
    """A parser with the flags that mean the same in every stage. server: whether it may ask one."""
    # fmt: off
    parser = ArgumentParser(usage="%(prog)s [flags] (--help lists them)", description=doc, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", type=lambda text: Path(text).name.removesuffix(".toml"), help="name of a file prompts/TASK.toml (default: sentiment for generate.py, for the other stages the task of the newest input file)")
    add("--limit", type=number(), help="use only the first LIMIT rows of the input (default: all)")
    add("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")
    add("--overwrite", action="store_true", help="where the output exists already, start afresh and rename the old one to NAME.bak (default: continue it)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="number format to compute in (default: bfloat16 where that is fast, else float32)")
    if server:
        add("--api-base", metavar="URL", help="OpenAI-compatible server, e.g. http://localhost:8000/v1 (default: run the model here)")
        add("--api-key-env", metavar="NAME", default="OPENAI_API_KEY", help="environment variable that holds the server's key (default: %(default)s)")
        add("--extra-body", metavar="JSON", help='fields to add to each request to the server; null leaves a field out, e.g. {"max_tokens": null, "max_completion_tokens": 800} or {"seed": null} (default: none)')
        add("--concurrency", type=number(), default=16, help="calls made to the server at the same time (default: %(default)s)")
        add("--timeout", type=number(), default=300, help="seconds that the server may be silent (default: %(default)s)")
    # fmt: on
    return parser


def number(least=1, most=math.inf, kind=int):
    """An argparse type: a number of this kind from least to most; what is not finite is refused."""

    def number(text):  # the name is in argparse's errors
        value = kind(text)
        if least <= value <= most and value < math.inf:
            return value
        raise ArgumentTypeError(f"{text}: must be from {least} to {most}")

    return number


def newest_task(name, path=None):
    """The task in `path`, of --in, else that whose file runs/TASK/NAME is newest, else sentiment."""
    files = sorted(Path("runs").glob(f"*/{name}"), key=os.path.getmtime)
    tasks = ["sentiment", *(file.parent.name for file in files), Path(path or "").parent.name]
    return [task for task in tasks if (FOLDER / f"{task}.toml").exists()][-1]


def run(main):
    """Runs a stage. Bad input, or a file that cannot be used, ends it with one line, status 2."""
    sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal without some character
    try:
        return main()
    except KeyboardInterrupt:
        how = "the same command without --overwrite goes on from what is saved, if anything is"
        print(f"\nstopped; {how}", file=sys.stderr)
        sys.stdout.flush()
        os._exit(130)  # at once: threads may still wait for a server
    except (BadInput, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun, once a node
            tqdm.write(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
