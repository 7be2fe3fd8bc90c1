"""prompts/: task files, placeholders, instructions, and the tasks that come along."""

import json

import pytest
from conftest import ROOT, write_jsonl

import prompts
from prompts import as_messages, fill, load_task, read_prompts
from prompts.rows import BadInput, newest_task, read_rows

USER = [{"role": "user", "content": "Review the film Heat."}]
TASKS = sorted(path.stem for path in (ROOT / "prompts").glob("*.toml"))


# ---- placeholders --------------------------------------------------------------------------------


def test_placeholders_are_filled_once_and_never_inside_an_answer():
    row = {"prompt": [{"role": "system", "content": "S"}, *USER], "request": "Neutral."}
    mixed = {"role": "user", "content": "{request} | {prompt} | {answer}"}
    call = [{"role": "user", "content": "{prompt}"}, mixed]
    messages = fill(call, row, answer="I write {critique} and {prompt}")
    assert messages[:2] == row["prompt"]
    said = "Neutral. | Review the film Heat. | I write {critique} and {prompt}"
    assert messages[2:] == [{"role": "user", "content": said}]


def test_a_row_without_a_request_is_shown_its_last_user_turn_instead():
    turns = [*USER, {"role": "assistant", "content": "Good."}, {"role": "user", "content": "Why?"}]
    (message,) = fill("{request} {prompt}", {"prompt": turns, "request": ""})
    assert message == {"role": "user", "content": "Why? Why?"}


def test_a_placeholder_that_nothing_replaces_is_refused():
    with pytest.raises(KeyError, match="anser"):
        fill("{anser}", {"prompt": "Hi"}, answer="A")


@pytest.mark.parametrize(
    "prompt", [3, None, [], {}, ["Hi"], [{"role": "user"}], [{"role": "usr", "content": "Hi"}]]
)
def test_what_is_neither_text_nor_messages_is_no_prompt(prompt):
    with pytest.raises((ValueError, TypeError, KeyError)):
        as_messages(prompt)


def test_null_fields_of_a_message_are_no_fields():
    """datasets writes them where another message of the table has the field."""
    message = {"role": "user", "content": "Hi"}
    assert as_messages([message | {"name": None}]) == [message]


def test_a_group_0_is_a_group(tmp_path):
    rows = [{"id": i, "group": 0, "prompt": f"Say {i}"} for i in range(8)]
    write_jsonl(tmp_path / "in.jsonl", rows)
    read = read_prompts(tmp_path / "in.jsonl", "x")
    assert {row["group"] for row in read} == {"0"} and len({row["split"] for row in read}) == 1
    assert [row["id"] for row in read] == [str(i) for i in range(8)]


# ---- instructions --------------------------------------------------------------------------------


def test_a_row_needs_a_prompt_and_gets_what_else_a_stage_needs(tmp_path):
    rows = [{"prompt": "Hello?", "control": True}, {"prompt": USER, "id": 7, "group": "g"}]
    one, two = read_prompts(write_jsonl(tmp_path / "a.jsonl", rows), "safety")
    assert one["id"] == "safety-00001" and one["group"] == "Hello?" and one["control"] is True
    assert one["prompt"] == [{"role": "user", "content": "Hello?"}] and two["prompt"] == USER
    assert two["id"] == "7" and two["group"] == "g" and two["task"] == "safety"
    assert {one["split"], two["split"]} <= {"train", "test"}


def test_columns_that_the_stages_write_are_not_taken_from_the_instructions(tmp_path):
    given = {"prompt": "Hi", "error": "no film", "chosen": "x", "teacher": {}, "film": "Heat"}
    (row,) = read_prompts(write_jsonl(tmp_path / "a.jsonl", [given]), "t")
    assert row.keys() == {"id", "task", "group", "split", "prompt", "film"}


def test_a_prompt_without_a_group_stays_in_its_split_wherever_it_stands(tmp_path):
    rows = [{"prompt": f"Why {i}?", "group": None} for i in range(40)]
    first = read_prompts(write_jsonl(tmp_path / "a.jsonl", rows), "t")
    assert {row["split"] for row in first} == {"train", "test"}
    moved = read_prompts(write_jsonl(tmp_path / "b.jsonl", rows[:0:-1] + rows), "t")
    sides = {row["group"]: row["split"] for row in first}
    assert all(row["split"] == sides[row["group"]] for row in moved)  # nearly all are there twice
    spelt = [{"prompt": [{"content": row["prompt"], "role": "user"}]} for row in rows]
    spelt = read_prompts(write_jsonl(tmp_path / "d.jsonl", spelt), "t")
    assert all(row["split"] == sides[row["group"]] for row in spelt)
    given = [{"prompt": "Why 1?", "split": split} for split in ("test", None)]
    read = read_prompts(write_jsonl(tmp_path / "e.jsonl", given), "t")
    assert [row["split"] for row in read] == ["test", "test"]
    one_in_both = [{"prompt": "Why?", "split": split} for split in ("train", "test")]
    with pytest.raises(BadInput, match="is in another split"):
        read_prompts(write_jsonl(tmp_path / "c.jsonl", one_in_both), "t")


def test_empty_lines_are_no_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n\n  \n{"prompt": "b"}\n\n')
    assert [row["prompt"] for row in read_rows(tmp_path / "a.jsonl")] == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "looks"),
    [
        (b"prompt,film\nHello,Heat\n", "CSV"),
        (b"PAR1\x15\x04\x15\xc8", "text or Parquet"),
        (b"Why is the sky blue?\n", "text or Parquet"),
        (b'[{"prompt": "Hello"}]', "a JSON array"),
        (b'[\n {"prompt": "Hello"}\n]', "a JSON array"),
    ],
)
def test_a_file_of_another_format_is_one_line_with_its_conversion(tmp_path, content, looks):
    (tmp_path / "in.csv").write_bytes(content)
    said = rf"in.csv:1: .* looks like {looks}; datasets.load_dataset\(.*to_json\("
    with pytest.raises(BadInput, match=said):
        read_prompts(tmp_path / "in.csv", "sentiment")


def test_only_a_file_of_another_format_gets_the_hint_of_its_conversion(tmp_path):
    for row in ('{"promt": "Hello"}', '{"prompt": "Hello", }'):
        (tmp_path / "in.jsonl").write_text(row)
        with pytest.raises(BadInput, match=r"in\.jsonl:1: ") as refused:
            read_prompts(tmp_path / "in.jsonl", "sentiment")
        assert "load_dataset" not in str(refused.value)


def test_nan_in_a_column_beside_is_null_and_the_same_run_goes_on(run, tiny, workdir):
    rows = '{"prompt": "Hello", "year": NaN}\n{"prompt": "Bye", "year": Infinity}\n'
    (workdir / "in.jsonl").write_text(rows)
    for done in (0, 2):
        status, out, err = run("generate", "--model", tiny, "--prompts", "in.jsonl")
        assert status == 0 and f"{done} done" in out, err
    assert [row["year"] for row in read_rows("runs/sentiment/pairs.jsonl")] == [None, None]


def test_a_group_is_never_split_between_train_and_test(tmp_path):
    rows = [{"prompt": f"p{i}", "group": f"g{i % 40}"} for i in range(200)]
    sides = {}
    for row in read_prompts(write_jsonl(tmp_path / "a.jsonl", rows), "safety"):
        sides.setdefault(row["group"], set()).add(row["split"])
    assert all(len(side) == 1 for side in sides.values())
    assert 3 <= sum(side == {"test"} for side in sides.values()) <= 15


def test_a_line_break_of_unicode_inside_a_text_is_no_end_of_a_row(tmp_path):
    row = {"prompt": "one\u2028two\u0085three"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert read_rows(tmp_path / "a.jsonl") == [row]
    assert read_prompts(tmp_path / "a.jsonl", "t")[0]["prompt"][0]["content"] == row["prompt"]


def test_only_rows_that_failed_may_lack_a_field(tmp_path):
    failed = write_jsonl(tmp_path / "a.jsonl", [{"id": "a", "error": "no answer"}])
    assert len(read_rows(failed, "id", "chosen")) == 1
    whole = write_jsonl(tmp_path / "b.jsonl", [{"id": "a", "error": None}])
    with pytest.raises(BadInput, match=r"b.jsonl:1: .*'chosen' is missing"):
        read_rows(whole, "id", "chosen")


# ---- task files ----------------------------------------------------------------------------------

SLIPS = [
    ("{draft}", "{drafft}", "no placeholder {drafft}; known: {prompt}, {request}, {draft}, "),
    ('"{request}"', '"{reqest}"', "no placeholder {reqest}; known: {prompt}, {request}, {draft}, "),
    (
        'draft = [{ role = "user", content = "{prompt}" }]',
        'draft = "{critique}"',
        "no placeholder {critique};",
    ),
    ('role = "user"', 'role = "usr"', "a message needs content and the role system, user or "),
    ('role = "user"', 'rol = "user"', "a message needs content and the role system, user or "),
    ("revision = [", "revison = [", "'revison' is not among draft, revision, critique\n"),
    ('content = "{critique}" }', 'content = "I see" }', "[conversation]: revision does not read"),
    ("principle = [", "principal = [", "'principal' is not among principle, opposite, control\n"),
    ("scale = [1, 10]", "scales = [1, 10]", "[judge]: 'scales' is not among prompt, scale\n"),
    ("scale = [1, 10]", "", "[judge]: 'scale' is missing\n"),
    ("patterns = [", 'patterns = ["(open", ', "[metric]: the pattern '(open': missing )"),
    ("patterns = [", "patterns = []\nothers = [", "[metric]: 'others' is not among kind, better, "),
    ('want = "any"', 'want = "all"', "want: any or none"),
    (
        'want = "any"',
        'wnat = "any"',
        "'wnat' is not among kind, better, meaning, want, patterns, field\n",
    ),
    ('want = "any"', "", "[metric]: 'want' is missing\n"),
    ('[metric]\nkind = "match"', "[metric]", "[metric]: 'kind' is missing\n"),
    ("[metric]", "#", "top level: 'metric' is missing\n"),
    ('about = "', 'abuot = "', "'abuot' is not among about, "),
    ("[metric]", "[metrics]", "'metrics' is not among about, "),
    ("[judge]", "[judges]", "'judges' is not among about, "),
    ("meaning = ", "means = ", "[metric]: 'means' is not among kind, better, meaning, "),
    ("meaning = ", "# ", "[metric]: 'meaning' is missing\n"),
    ("[fresh]", "[fresh", "safety.toml: "),
]


@pytest.mark.parametrize(("right", "wrong", "said"), SLIPS)
def test_a_slip_in_a_task_file_is_found_when_it_is_read(monkeypatch, tmp_path, right, wrong, said):
    text = (ROOT / "prompts/safety.toml").read_text()
    assert right in text
    (tmp_path / "safety.toml").write_text(text.replace(right, wrong))
    monkeypatch.setattr(prompts, "FOLDER", tmp_path)
    with pytest.raises(BadInput) as refused:
        load_task("safety")
    assert said in f"{refused.value}\n" and str(tmp_path) in str(refused.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('better = "', 'better = "more or ', "better is lower or higher"),
        ("field = ", "patterns = [] # ", "patterns are not empty"),
    ],
)
def test_a_metric_that_cannot_be_judged_is_refused(monkeypatch, tmp_path, old, new, said):
    text = (ROOT / "prompts/roleplay.toml").read_text()
    (tmp_path / "roleplay.toml").write_text(text.replace(old, new))
    monkeypatch.setattr(prompts, "FOLDER", tmp_path)
    with pytest.raises(BadInput, match=said):
        load_task("roleplay")


def test_a_match_without_patterns_or_a_field_says_what_is_missing(monkeypatch, tmp_path):
    text = (ROOT / "prompts/roleplay.toml").read_text()
    (tmp_path / "roleplay.toml").write_text(text.replace("field = ", "# field = "))
    monkeypatch.setattr(prompts, "FOLDER", tmp_path)
    with pytest.raises(BadInput, match=r"roleplay.toml: \[metric\]: 'patterns' is missing$"):
        load_task("roleplay")


def test_the_default_task_is_the_newest_that_is_a_task(workdir):
    assert newest_task("pairs.jsonl") == "sentiment"
    for name in ("safety", "demo"):
        write_jsonl(workdir / f"runs/{name}/pairs.jsonl", [{}])
    assert newest_task("pairs.jsonl") == "safety"
    assert newest_task("pairs.jsonl", "runs/sycophancy/pairs.jsonl") == "sycophancy"
    assert newest_task("pairs.jsonl", "runs/demo/pairs.jsonl") == "safety"


@pytest.mark.parametrize("task", TASKS)
def test_the_tasks_that_come_along_are_complete(task):
    text, rows = load_task(task), read_prompts(ROOT / "prompts" / f"{task}.jsonl", task)
    assert len({json.dumps(row["prompt"]) for row in rows}) == len(rows)
    held_out = {row["group"] for row in rows if row["split"] == "test"}
    assert len(held_out) >= 10  # the least for an interval that says something
    assert len({row["group"] for row in rows} - held_out) >= 8
    written = {"draft": "D", "critique": "C"}
    for form in ("conversation", "fresh"):
        for call in text[form]:
            for row in rows:
                assert "{" not in json.dumps(
                    [m["content"] for m in fill(text[form][call], row, **written)]
                )
    assert text["contrast"]["principle"] != text["contrast"]["opposite"]
    assert text["metric"]["kind"] in ("positive", "spread", "match")
    assert text["metric"]["better"] in ("higher", "lower") and text["judge"]["scale"] == [1, 10]


def test_the_tasks_have_the_sizes_they_promise():
    rows = {task: read_prompts(ROOT / "prompts" / f"{task}.jsonl", task) for task in TASKS}
    framings = {}
    for row in rows["sycophancy"]:
        framings.setdefault(row["group"], set()).add(row["framing"])
    assert len(framings) >= 40 and all(len(kinds) == 5 for kinds in framings.values())
    crossed = {(r["persona"], r["group"]) for r in rows["roleplay"] if r["split"] == "train"}
    personas, questions = ({pair[k] for pair in crossed} for k in (0, 1))
    assert len(personas) >= 15 and len(questions) >= 8
    assert len(crossed) == len(personas) * len(questions)
    for split, harmful, harmless in (("train", 58, 27), ("test", 72, 60)):
        controls = [row["control"] for row in rows["safety"] if row["split"] == split]
        assert controls.count(False) >= harmful and controls.count(True) >= harmless
    assert len(rows["sentiment"]) >= 100
