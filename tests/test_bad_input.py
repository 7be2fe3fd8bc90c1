"""Bad input: one clear line that names the thing, exit status 2, and no file written or changed."""

import json

import pytest
from conftest import pair_row, write_jsonl

import generate

GOOD = pair_row(0, "Lovely.", "Bad.")


def case(name, stage, argv, said, rows=None, raw=None):
    return pytest.param(stage, argv, said, rows, raw, id=name)


CASES = [
    case("missing file", "score", [], "no such file"),
    case("missing file for train", "train", [], "no such file"),
    case("missing file for eval", "eval", [], "no such file"),
    case("missing prompts", "generate", ["--prompts", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    case("empty file", "score", ["--in", "in.jsonl"], "empty", raw=""),
    case("empty prompts", "generate", ["--prompts", "in.jsonl"], "empty", raw=""),
    case("no JSON", "score", ["--in", "in.jsonl"], "in.jsonl:2: not JSON", raw=json.dumps(GOOD) + "\n{oops\n"),
    case("no object", "train", ["--in", "in.jsonl"], "in.jsonl:1: a JSON object", raw="[1, 2]\n"),
    case("missing field", "score", ["--in", "in.jsonl"], "'chosen' is missing", rows=[{"id": "a", "prompt": []}]),
    case("missing field for train", "train", ["--in", "in.jsonl"], "'rejected' is missing", rows=[{"chosen": "a"}]),
    case("no prompt column", "generate", ["--prompts", "in.jsonl"], "none of the columns", rows=[{"a": "b"}]),
    case("prompt of a wrong type", "generate", ["--prompts", "in.jsonl"], "row 1", rows=[{"prompt": 3}]),
    case("twice the same id", "generate", ["--prompts", "in.jsonl"], "twice", rows=[{"id": 1, "prompt": "a"}] * 2),
    case("no such task", "generate", ["--task", "nosuch"], "no task 'nosuch'"),
    case("no such model folder", "generate", ["--model", "./nowhere"], "--model ./nowhere"),
    case("no such hub id", "generate", ["--model", "nobody/nothing"], "--model nobody/nothing: cannot be loaded"),
    case("all scores null", "train", ["--in", "in.jsonl"], "no pair has score", rows=[GOOD | {"score_chosen": None}]),
    case("empty answer", "train", ["--in", "in.jsonl"], "an answer is empty", rows=[pair_row(1, " ", "Bad.")]),
    case("empty prompt", "train", ["--in", "in.jsonl", "--loss", "dpo"], "the prompt is empty",
         rows=[{"prompt": "", "chosen": "Yes.", "rejected": "No."}]),
    case("dry run without a judge", "score", ["--dry-run"], "--reward judge"),
    case("long prompt", "train", ["--in", "in.jsonl", "--max-length", "8"], "raise --max-length", rows=[GOOD]),
    case("nothing left", "train", ["--in", "in.jsonl", "--loss", "dpo"], "no pair left", rows=[{"id": "a", "error": "x"}]),
    case("no test rows", "eval", ["--in", "in.jsonl"], "no row with split 'test'", rows=[GOOD]),
    case("beta of 0", "train", ["--beta", "0"], "--beta"),
    case("no step", "train", ["--max-steps", "0"], "must be above 0"),
    case("no row a batch", "score", ["--batch-size", "0"], "must be above 0"),
    case("no answer", "eval", ["--samples", "-1"], "must be above 0"),
    case("other bytes", "generate", ["--prompts", "in.csv"], "not UTF-8"),
    case("a group on both sides", "generate", ["--prompts", "in.jsonl"], "both splits", rows=[
        {"prompt": "a", "group": "g", "split": "train"}, {"prompt": "b", "group": "g", "split": "test"}]),
    case("no reward model", "score", ["--in", "in.jsonl", "--reward", "classifier", "--model", "TINY"], "weights lack", rows=[GOOD]),
    case("another task's rows", "score", ["--in", "in.jsonl", "--task", "safety"], "pass --task sentiment", rows=[GOOD]),
    case("temperature", "generate", ["--temperature", "nan"], "--temperature"),
    case("cells too many", "generate", ["--prompts", "in2.csv"], "more cells"),
    case("a split of its own", "generate", ["--prompts", "in.jsonl"], "'split' train or test is needed", rows=[
        {"prompt": "a", "split": "validation"}]),
    case("float16 training", "train", ["--dtype", "float16"], "--dtype float16"),
    case("epsilon of one half", "train", ["--epsilon", "0.5"], "--epsilon"),
    case("classifier without model", "score", ["--in", "in.jsonl", "--reward", "classifier"], "needs --model", rows=[GOOD]),
    case("dead server", "generate", ["--api-base", "http://127.0.0.1:9/v1", "--limit", "1"], "no server answers"),
    case("output is a folder", "generate", ["--out", "."], "is a folder"),
    case("input is a folder", "score", ["--in", "."], "no such file"),
    case("prompts are a folder", "generate", ["--prompts", "."], "no such file"),
    case("no such device", "generate", ["--device", "gpu"], "--device gpu"),
    case("a GPU that is not there", "score", ["--in", "in.jsonl", "--device", "cuda:7"], "--device cuda:7", rows=[GOOD]),
    case("folder without a model", "generate", ["--model", "."], "cannot be loaded"),
    case("server without a scheme", "generate", ["--api-base", "localhost:8000"], "http://"),
    case("a score that is text", "train", ["--in", "in.jsonl"], "no pair has score", rows=[GOOD | {"score_chosen": "9"}]),
    case("an answer that is a number", "train", ["--in", "in.jsonl"], "'chosen' and 'rejected'", rows=[GOOD | {"chosen": 3}]),
    case("an answer that is a number, to score", "score", ["--in", "in.jsonl"], "'chosen'", rows=[GOOD | {"chosen": 3}]),
    case("twice the same id, to score", "score", ["--in", "in.jsonl"], "twice", rows=[GOOD, GOOD]),
    case("ratings that are all the same", "score", ["--in", "in.jsonl", "--reward", "judge", "--judge-samples", "3"],
         "--judge-temperature", rows=[GOOD]),
    case("negative price", "generate", ["--price-in", "-1"], "--price-in"),
    case("negative warm-up", "train", ["--in", "in.jsonl", "--warmup", "-1"], "--warmup", rows=[GOOD]),
    case("top-p above 1", "eval", ["--top-p", "2"], "--top-p"),
    case("a server without a model's name", "generate", ["--api-base", "http://127.0.0.1:9/v1", "--model", "smollm2"],
         "pass that of one that it serves"),
    case("a flag that does not exist", "train", ["--bta", "1"], "unrecognized arguments: --bta"),
    case("a choice that does not exist", "train", ["--loss", "dpoo"], "invalid choice: 'dpoo'"),
    case("a split that does not exist", "generate", ["--prompts", "in.jsonl"], "'tset'", rows=[{"prompt": "a", "split": "tset"}]),
    case("a prompt that is missing", "generate", ["--prompts", "in.jsonl"], "'prompt' is missing", rows=[{"prompt": "a"}, {"promt": "b"}]),
    case("semicolons", "generate", ["--prompts", "in3.csv"], "CSV with commas"),
    case("negative keep", "train", ["--keep", "-1"], "--keep"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "argv", "said", "rows", "raw"), CASES)
def test_bad_input_gets_one_clear_line_and_status_2(run, tiny, workdir, monkeypatch, stage, argv, said, rows, raw):
    if rows is not None:
        write_jsonl(workdir / "in.jsonl", rows)
    elif raw is not None:
        (workdir / "in.jsonl").write_text(raw)
    (workdir / "in.csv").write_bytes("prompt\nCaf\u00e9?\n".encode("cp1252"))
    (workdir / "in2.csv").write_text("prompt\nHi, there\n")
    (workdir / "in3.csv").write_text("prompt;split\nHi;train\n")
    argv = [tiny if word == "TINY" else word for word in argv]
    if "--model" not in argv and "classifier" not in argv and stage != "eval":
        argv = [*argv, "--model", tiny]
    monkeypatch.setattr("random.uniform", lambda low, high: 0.001)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file() and path.stat().st_size}
    status, _, err = run(stage, *argv)
    assert status == 2
    assert said in err
    assert len([line for line in err.splitlines() if line.startswith(f"{stage}.py: ")]) == 1
    assert "Traceback" not in err
    after = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file() and path.stat().st_size}
    assert after == before


WORDS = [
    ('want = "any"', 'want = "some"', "[metric] needs want, one of any, none"),
    ('better = "higher"', 'better = "more"', "[metric] needs better, one of higher, lower"),
    ("{answer}", "{anser}", "nothing is put in for {anser}"),
    ('role = "user"', 'role = "usr"', "a list of messages is needed"),
    ("revise = [", "revice = [", "needs answer, critique, revise, and has answer, critique, revice"),
    ("principle = [", "principal = [", "needs principle, opposite"),
    ("scale = [1, 10]", "scale = [10]", "[judge] needs prompt, and scale"),
    ('prompt = """', 'prompt = """{critique}', "nothing is put in for {critique}"),
    ("patterns = [", 'patterns = ["(open", ', "[metric] patterns"),
    ('about = "', 'abuot = "', "'about'"),
    ('kind = "match"', 'kind = "mach"', "[metric] needs kind"),
]


@pytest.mark.parametrize(("right", "wrong", "said"), WORDS)
def test_a_slip_in_a_task_file_is_found_before_anything_is_asked(monkeypatch, tmp_path, capsys, right, wrong, said):
    text = (generate.ROOT / "prompts/safety.toml").read_text()
    assert right in text
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/safety.toml").write_text(text.replace(right, wrong))
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    with pytest.raises(SystemExit) as stop:
        generate.load_task("safety")
    assert stop.value.code == 2 and said in capsys.readouterr().err
