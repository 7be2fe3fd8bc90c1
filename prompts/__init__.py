"""Tasks: TASK.toml holds all text that a model is shown, TASK.jsonl the instructions. Only this
file knows their form, and it imports nothing from the stages."""

import hashlib
import json
import re
import tomllib
from pathlib import Path

FOLDER = Path(__file__).parent
KEYS = {"about", "seed_by", "conversation", "fresh", "contrast", "judge", "metric"}  # of a task
WRITTEN = ("error", "rejected", "critique", "chosen", "teacher")  # what generate.py adds to a row


class BadInput(Exception):
    """Input that a stage cannot use: one line that says what, where and how to mend it."""


def load_task(name):
    """The dictionary of prompts/NAME.toml, each call filled in once on trial. Raises BadInput.
    `seed_by` (default "id") names the field that a row's random numbers hang on: with "group" the
    variants of one text share them. `columns`: what rows must have for the metric."""
    path = FOLDER / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.toml")))
        raise BadInput(f"--task {name}: no {path}; known: {known}")
    try:
        task = {"seed_by": "id"} | tomllib.loads(path.read_text(encoding="utf-8"))
        contrast = task.get("contrast")
        tables = [contrast, contrast.get("control", contrast)] if contrast else []
        calls = [table[side] for table in tables for side in ("principle", "opposite")]
        for form in {"conversation", "fresh"} & task.keys():
            calls += [task[form][call] for call in ("answer", "critique", "revise")]
        calls += [task["judge"]["prompt"]] if "judge" in task else []
        for call in calls:
            fill(call, {"prompt": "P"}, answer="A", critique="C")
        if unknown := task.keys() - KEYS:
            raise ValueError(f"'{min(unknown)}' is not among {', '.join(sorted(KEYS))}")
        metric, task["columns"] = task["metric"], []
        task["about"], metric["better"], metric["meaning"]  # a KeyError if one is missing
        if metric["kind"] == "match" and metric["want"] in ("any", "none"):
            re.compile("|".join(metric.get("patterns", [])))
            task["columns"] += [] if metric.get("patterns") else [metric["field"]]
        elif metric["kind"] not in ("positive", "spread"):
            raise ValueError("[metric]: kind is match (want: any or none), positive or spread")
    except (LookupError, ValueError, TypeError, re.error) as error:  # also: no TOML, no UTF-8
        what = "lacks the key or placeholder " if isinstance(error, KeyError) else ""
        raise BadInput(f"{path}: {what}{error}") from None
    return task


def fill(call, row, **texts):
    """Messages of one call: those of the task file with the placeholders replaced.
    {prompt} is the row's last user turn, and all messages of its prompt where it stands alone;
    {request} is its field `request`, the instruction in neutral words, or else as {prompt}. texts
    replace {answer} and {critique}. Raises KeyError for an unknown placeholder."""
    prompt = as_messages(row["prompt"])
    last = [message["content"] for message in prompt if message["role"] == "user"][-1]
    texts = {"prompt": last, "request": row.get("request") or last, **texts}
    messages = []
    for message in as_messages(call):  # one pass: a placeholder's name inside an answer stays text
        text = re.sub(r"\{(\w+)\}", lambda match: texts[match[1]], message["content"])
        messages += prompt if message["content"] == "{prompt}" else [{**message, "content": text}]
    return messages


def as_messages(prompt):
    """A prompt as messages: text is one user message. Raises an error for anything else."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    known = [message["role"] in ("system", "user", "assistant") for message in messages]
    if not (known and all(known) and all(isinstance(m["content"], str) for m in messages)):
        raise ValueError("messages are needed, of text and the role system, user or assistant")
    return messages


def read_rows(path, *fields):
    """Rows of a JSONL file; those without `error` have the fields. Raises BadInput for others."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file; run the stage before this one, or name another file")
    rows = []
    # bytes, since an answer's own U+2028 does not end a line
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(dict(**json.loads(line)))
            missing = [field for field in fields if field not in rows[-1]]
            if missing and not rows[-1].get("error"):
                raise ValueError(f"the field '{missing[0]}' is missing")
        except (ValueError, TypeError, AttributeError) as error:
            raise BadInput(f"{path}:{number}: not the JSON that is needed: {error}") from None
    if not rows:
        raise BadInput(f"{path}: empty; at least one row is needed")
    return rows


def read_prompts(path, task, *needed):
    """Instructions of a JSONL file: rows of id, task, group, split, prompt and the columns beside.
    Rows without `group` are grouped by prompt. Rows without `split` are divided by a hash of their
    group, four to one. Raises BadInput, also for a row without a needed column."""
    rows, splits = {}, {}
    for number, columns in enumerate(read_rows(path, "prompt", *needed), 1):
        key = str(columns["id"] if "id" in columns else f"{task}-{number:05d}")
        try:
            prompt = as_messages(columns["prompt"])
            if prompt[-1]["role"] != "user":
                raise ValueError("the prompt must end with the user's turn")
            text = "\n".join(message["content"] for message in prompt)
            group = str(text if columns.get("group") is None else columns["group"])
            held_out = int(hashlib.sha256(group.encode()).hexdigest(), 16) % 5 == 0
            split = columns.get("split") or splits.get(group, "test" if held_out else "train")
            if key in rows or splits.setdefault(group, split) != split:
                raise ValueError(f"id {key} is there before, or its group is in another split")
            if split not in ("train", "test"):
                raise ValueError(f"split {split}: must be train or test")
        except (ValueError, TypeError, LookupError) as error:
            raise BadInput(f"{path}: row {number}: {error}") from None
        row = {"id": key, "task": task, "prompt": prompt, "group": group, "split": split}
        rows[key] = row | {k: v for k, v in columns.items() if k not in (*row, *WRITTEN)}
    return list(rows.values())
