"""Tasks: TASK.toml holds all text that a model is shown, TASK.jsonl the instructions."""

import hashlib
import re
import tomllib

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from prompts.rows import FOLDER, BadInput, read_rows

FORMS = ("conversation", "fresh")  # what critic and reviser see
CALLS = ("draft", "critique", "revision")  # of a form
WRITTEN = ("error", "rejected", "critique", "chosen", "teacher")  # what generate.py adds to a row
LEXICON = SentimentIntensityAnalyzer()


# ---- task files ----------------------------------------------------------------------------------
def load_task(name):
    """The checked dictionary of prompts/NAME.toml, with two keys added. Raises BadInput.
    seed_by: the field that a row's random numbers depend on. With "group" the variants of one text
    share them. columns: what rows must have for the metric."""
    path = FOLDER / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.toml")))
        raise BadInput(f"--task {name}: no {path}; known: {known}")
    try:
        task = {"seed_by": "id"} | tomllib.loads(path.read_text(encoding="utf-8"))
        check_task(task)
    except KeyError as error:
        known = "{prompt}, {request}, {draft}, {critique}, {answer}, once a call has made it"
        raise BadInput(f"{path}: no placeholder {{{error.args[0]}}}; known: {known}") from None
    except re.error as error:
        raise BadInput(f"{path}: [metric]: the pattern {error.pattern!r}: {error}") from None
    except (AttributeError, ValueError, TypeError) as error:  # also invalid TOML, UTF-8
        raise BadInput(f"{path}: {error}") from None
    by_field = task["metric"]["kind"] == "match" and not task["metric"].get("patterns")
    return task | {"columns": [task["metric"]["field"]] if by_field else []}


def check_task(task):
    """Raises the errors of load_task. Each call is filled in once, as a test."""
    check_keys("top level", task, ("about", "metric"), ("seed_by", *FORMS, "contrast", "judge"))
    for form in [form for form in FORMS if form in task]:
        check_keys(f"[{form}]", task[form], ("draft", "revision"), ("critique",))
        texts = {}  # that the calls before have made
        for call in [call for call in CALLS if call in task[form]]:
            fill(task[form][call], {"prompt": "P"}, **texts)
            texts[call] = "text"
        if "critique" in texts and "{critique}" not in str(task[form]["revision"]):
            raise ValueError(f"[{form}]: revision does not read {{critique}}; then leave it out")
    if "contrast" in task:
        for table in (task["contrast"], task["contrast"].get("control", task["contrast"])):
            check_keys("[contrast] or its control", table, ("principle", "opposite"), ("control",))
            fill(table["principle"], {"prompt": "P"})
            fill(table["opposite"], {"prompt": "P"})
    if "judge" in task:
        check_keys("[judge]", task["judge"], ("prompt", "scale"))
        fill(task["judge"]["prompt"], {"prompt": "P"}, answer="A")
    metric = task["metric"]
    needed = ["kind", "better", "meaning"]
    if metric.get("kind") == "match":
        needed += ["want", "field" if "field" in metric else "patterns"]
    check_keys("[metric]", metric, needed, ("want", "patterns", "field"))
    want = metric.get("want", "any")
    if metric["kind"] not in ("match", "positive", "spread") or want not in ("any", "none"):
        raise ValueError("[metric]: kind is match (want: any or none), positive or spread")
    if metric["better"] not in ("lower", "higher") or not metric.get("patterns", True):
        raise ValueError("[metric]: better is lower or higher, and patterns are not empty")
    for pattern in metric.get("patterns", []):
        re.compile(pattern)


def check_keys(where, table, needed, others=()):
    """Raises ValueError where a key of the table is unknown, or a needed one is missing."""
    known = dict.fromkeys([*needed, *others])
    for key in [*table, *needed]:
        if key not in known:
            raise ValueError(f"{where}: '{key}' is not among {', '.join(known)}")
        if key not in table:
            raise ValueError(f"{where}: '{key}' is missing")


def fill(call, row, **texts):
    """The messages of one call: messages, or text for one user message, with placeholders replaced.
    A message that is exactly "{prompt}" becomes all messages of the row's prompt. Inside other text
    {prompt} is the last user turn, and {request} its field `request`, without one the same.
    texts: what replaces {draft} and {critique}, or a judge's {answer}. Others raise KeyError."""
    prompt = as_messages(row["prompt"])
    last_turn = [message["content"] for message in prompt if message["role"] == "user"][-1]
    texts = {"prompt": last_turn, "request": row.get("request") or last_turn, **texts}
    messages = []
    for message in as_messages(call):
        if message["content"] == "{prompt}":
            messages += prompt
        else:
            # One pass over the text: a placeholder's name inside an answer stays as it is.
            text = re.sub(r"\{(\w+)\}", lambda match: texts[match[1]], message["content"])
            messages.append({**message, "content": text})
    return messages


def as_messages(prompt, role="user"):
    """Messages without null fields; text is one of this role. Raises ValueError or TypeError."""
    messages = [{"role": role, "content": prompt}] if isinstance(prompt, str) else prompt
    messages = [{k: v for k, v in dict(message).items() if v is not None} for message in messages]
    for message in messages or [{}]:
        known = message.get("role") in ("system", "user", "assistant")
        if not known or not isinstance(message.get("content"), str):
            raise ValueError("a message needs content and the role system, user or assistant")
    return messages


# ---- instructions --------------------------------------------------------------------------------
def read_prompts(path, task, *needed):
    """Instructions: rows of id, task, group, split, prompt and the file's other columns, of which
    `needed` must be there. The default group is the prompt; a hash of it splits rows four to one."""
    rows, splits = {}, {}
    for number, columns in enumerate(read_rows(path, "prompt", *needed), 1):
        try:
            row = read_prompt(columns, task, number, splits)
            if row["id"] in rows:
                raise ValueError(f"id {row['id']} is used twice")
        except (ValueError, TypeError, LookupError) as error:
            raise BadInput(f"{path}: row {number}: {error}") from None
        splits[row["group"]] = row["split"]
        rows[row["id"]] = row
    return list(rows.values())


def read_prompt(columns, task, number, splits):
    """One instruction. splits: {group: split} of those before it. Raises ValueError."""
    prompt = as_messages(columns["prompt"])
    if prompt[-1]["role"] != "user":
        raise ValueError("the prompt must end with the user's turn")
    text = "\n".join(message["content"] for message in prompt)
    group = str(text if columns.get("group") is None else columns["group"])
    fifth = int(hashlib.sha256(group.encode()).hexdigest(), 16) % 5 == 0
    split = columns.get("split") or splits.get(group, "test" if fifth else "train")
    if split not in ("train", "test"):
        raise ValueError(f"split {split}: must be train or test")
    if splits.get(group, split) != split:
        raise ValueError("its group is in another split")

    key = str(columns["id"] if "id" in columns else f"{task}-{number:05d}")
    row = {"id": key, "task": task, "prompt": prompt, "group": group, "split": split}
    return row | {k: v for k, v in columns.items() if k not in row and k not in WRITTEN}


# ---- the metric ----------------------------------------------------------------------------------
def measure(metric, row, answer):
    """The task's metric of one answer, a number.

    spread: the VADER compound score (Hutto & Gilbert 2014), -1 to 1, of which eval.py makes a
        group's spread. positive: 1 if it is at least 0.05, the lexicon's own threshold, else 0.
    match: 1 if a pattern occurs as whole words, ignoring case, else 0; for want = "none" the
        other way round. Without patterns, the row's own markers are looked for."""
    if metric["kind"] == "spread":
        return LEXICON.polarity_scores(answer)["compound"]
    if metric["kind"] == "positive":
        return float(LEXICON.polarity_scores(answer)["compound"] >= 0.05)

    patterns = metric.get("patterns")
    if not patterns:
        markers = row[metric["field"]]
        markers = [markers] if isinstance(markers, str) else markers
        patterns = [re.escape(marker) for marker in markers]  # they are no regular expressions
    edge = r"(?!(?<=\w)(?=\w))"  # not inside a word; unlike \b it fits patterns of punctuation
    text = answer.replace("\u2019", "'")
    found = any(re.search(f"(?i){edge}(?:{pattern}){edge}", text) for pattern in patterns)
    return float(found == (metric["want"] == "any"))
