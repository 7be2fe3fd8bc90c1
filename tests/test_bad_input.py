"""Bad input: one clear line that names the thing, exit status 2, and no file written or changed."""

import gc
import json

import pytest
import torch
from conftest import make_model, make_tokenizer, pair_row, write_jsonl
from transformers import LlamaForSequenceClassification

from prompts.chat import pick_device

GOOD = pair_row(0, "Lovely.", "Bad.")
TEST = pair_row(0, "Lovely.", "Bad.", split="test")
IN = ["--in", "in.jsonl"]
OURS = ["--prompts", "in.jsonl"]
DEAD = "http://127.0.0.1:9/v1"
OTHER = "float32" if pick_device()[1] == torch.bfloat16 else "bfloat16"  # than the default
SPLITS = ["train", "train", "test"]


def case(name, stage, argv, said, *rows, raw=None):
    return pytest.param(stage, argv, said, rows, raw, id=name)


CASES = [
    # paths
    case("no pairs", "score", [], "runs/sentiment/pairs.jsonl: no such file"),
    case("no scored pairs", "train", [], "runs/sentiment/scored.jsonl: no such file"),
    case("no scored pairs for eval", "eval", [], "runs/sentiment/scored.jsonl: no such file"),
    case("no prompts", "generate", ["--prompts", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    case("prompts are a folder", "generate", ["--prompts", "."], "no such file"),
    case("input is a folder", "score", ["--in", "."], "no such file"),
    case("output is a folder", "generate", ["--out", "runs"], "Is a directory: 'runs'"),
    case("output is the input", "score", [*IN, "--out", "./in.jsonl"], "is --in too", GOOD),
    case("output is the input anew", "score", [*IN, "--out", "in.jsonl", "--overwrite"], "is --in too", GOOD),
    case("output is another file", "generate", ["--out", "notes.txt"], "notes.txt"),
    case("output is the input of generate", "generate", [*OURS, "--out", "in.jsonl"], "in.jsonl",
         {"id": "a", "prompt": "Hi"}),
    *[case(f"output below a file, {stage}", stage, [*IN, "--out", "notes.txt/below/out"],
           "notes.txt", GOOD, TEST | {"id": "b"}) for stage in ("score", "train", "eval")],
    case("output below a file, generate", "generate", ["--out", "notes.txt/out"], "notes.txt"),
    # tasks and models
    case("no such task", "generate", ["--task", "nosuch"], "--task nosuch"),
    case("a dot in a task", "generate", ["--task", "safety.v2"], "--task safety.v2"),
    case("another task", "score", [*IN, "--task", "safety"], "pass --task sentiment", GOOD),
    case("another task for eval", "eval", [*IN, "--task", "safety"], "pass --task sentiment", TEST),
    case("rows of no task", "score", IN, "pass --task NAME", {**GOOD, "task": None}),
    case("rows of no task for eval", "eval", IN, "pass --task NAME", {**TEST, "task": None}),
    case("no test rows", "eval", IN, "nothing is held out", GOOD),
    case("no such device", "generate", ["--device", "gpu"], "--device gpu"),
    case("a row that is a text", "generate", OURS, "in.jsonl:1", "prompt"),
    case("no such folder", "generate", ["--model", "./nowhere"], "model ./nowhere: there is no such folder"),
    case("no such hub id", "generate", ["--model", "nobody/nothing"],
         "model nobody/nothing: cannot be loaded"),
    case("a folder without a model", "train", [*IN, "--model", "."], "model .: cannot be loaded",
         GOOD),
    case("no model to compare", "eval", [*IN, "--models", "./nowhere"], "./nowhere", TEST),
    case("two models of one name", "eval", [*IN, "--models", "a/dpo", "b/dpo"], "last name", TEST),
    case("no chat template", "generate", ["--model", "BASE"], "no chat template"),
    case("no chat template to score", "score", [*IN, "--model", "BASE"], "chat template", GOOD),
    case("no chat template to train", "train", [*IN, "--model", "BASE"], "chat template", GOOD),
    case("a classifier as teacher", "generate", ["--model", "CLASSIFIER"], "--reward classifier"),
    case("a classifier without --reward", "score", [*IN, "--model", "CLASSIFIER"],
         "--reward classifier", GOOD),
    case("a chat model as classifier", "score", [*IN, "--reward", "classifier", "--model", "TINY"],
         "its weights lack", GOOD),
    case("no classifier", "score", [*IN, "--reward", "classifier", "--model", "smollm2"],
         "its weights lack", GOOD),
    case("a dead server", "generate", ["--api-base", DEAD], f"--api-base {DEAD}"),
    case("a dead judge", "score", [*IN, "--reward", "judge", "--api-base", DEAD],
         f"--api-base {DEAD}", GOOD),
    case("a server without a judge", "score", [*IN, "--api-base", DEAD], "only --reward judge", GOOD),
    case("no URL", "generate", ["--api-base", "localhost:8000"], "check the URL"),
    case("a server's model without a name", "generate", ["--api-base", DEAD, "--model", "smollm2"],
         "give the server's model name"),
    # what stands in the files
    case("nothing", "score", IN, "in.jsonl: empty", raw=""),
    case("no prompts at all", "generate", OURS, "in.jsonl: empty", raw=""),
    case("no JSON", "score", IN, "in.jsonl:2: one JSON object a line is needed: Expecting",
         raw=json.dumps(GOOD) + "\n{oops\n"),
    case("a number", "score", IN, "in.jsonl:2: one JSON object a line is needed: it is another value",
         raw=json.dumps(GOOD) + "\n3\n"),
    case("no object", "train", IN, "in.jsonl:1: one JSON object a line", raw="[1, 2]\n"),
    case("rows in a list", "generate", OURS, "the file looks like a JSON array; datasets.",
         raw=json.dumps([{"prompt": "a", "id": "b"}] * 2) + "\n"),
    case("text as instruction", "generate", OURS, "in.jsonl", raw='"Hello"\n'),
    case("a missing field", "score", IN, "in.jsonl:1: the field 'chosen' is missing in ['id', 'prompt']\n",
         {"id": "a", "prompt": "P"}),
    case("an error that is null", "score", IN, "the field 'chosen' is missing",
         {"id": "a", "prompt": "P", "error": None}),
    case("a missing field to train", "train", IN, "'rejected' is missing", {"chosen": "a"}),
    case("no column of text", "generate", OURS, "'prompt' is missing", {"a": "b"}),
    case("no markers for the metric", "generate", [*OURS, "--task", "roleplay"], "'markers' is missing",
         {"prompt": "a"}),
    case("no markers for eval", "eval", [*IN, "--task", "roleplay"], "'markers' is missing",
         TEST | {"task": "roleplay"}),
    case("a column misspelt", "generate", OURS, "in.jsonl:2: ", {"prompt": "a"}, {"promt": "b"}),
    case("a prompt that is a number", "generate", OURS, "row 1", {"prompt": 3}),
    case("a prompt without a user", "generate", OURS, "in.jsonl",
         {"prompt": [{"role": "system", "content": "Be kind."}]}),
    case("one id twice", "generate", OURS, "row 2: id 1", *[{"id": 1, "prompt": "a"}] * 2),
    case("one id twice to score", "score", IN, "an id is there twice", GOOD, GOOD),
    case("a group in both splits", "generate", OURS, "row 2: ",
         {"prompt": "a", "group": "g", "split": "train"},
         {"prompt": "b", "group": "g", "split": "test"}),
    case("no such split", "generate", OURS, "split tset", {"prompt": "a", "split": "tset"}),
    case("an answer that is a number", "train", IN, "row row-0", GOOD | {"chosen": 3}),
    case("no pair left", "train", IN, "1 without scores",
         GOOD | {"score_chosen": None}),
    case("all failed", "train", IN, "1 failed", {"error": "x"}),
    case("a long prompt", "train", [*IN, "--max-length", "8"], "no pair", GOOD),
    case("empty answers", "train", IN, "1 with an empty answer", pair_row(1, " ", "Bad.")),
    # flags
    case("an unknown flag", "train", ["--bta", "1"], "unrecognized arguments: --bta"),
    case("steps of no pairs", "train", [*IN, "--batch-size", "0"], "0: must be from 1", GOOD),
    case("no tokens", "generate", ["--max-tokens", "-3"], "-3: must be from 1"),
    case("no calls at a time", "generate", ["--concurrency", "0"], "0: must be from 1"),
    case("no rows", "score", [*IN, "--limit", "-1"], "-1: must be from 1", GOOD),
    case("a share above 1", "generate", ["--top-p", "1.5"], "1.5: must be from"),
    case("below greedy", "generate", ["--temperature", "-1"], "-1: must be from 0"),
    case("no temperature of p", "train", [*IN, "--tau", "0"], "0: must be from", GOOD),
    case("not a number", "train", [*IN, "--beta", "nan"], "nan: must be from", GOOD),
    case("an unknown choice", "train", ["--loss", "dpoo"], "invalid choice: 'dpoo'"),
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny):
    """{name: folder} of a chat model, one without a chat template, and a classifier."""
    folder, plain = tmp_path_factory.mktemp("other"), make_tokenizer(template=None)
    base = make_model(len(plain))
    base.save_pretrained(folder / "base")
    plain.save_pretrained(folder / "base")
    classifier = LlamaForSequenceClassification(base.config)
    classifier.save_pretrained(folder / "classifier")
    make_tokenizer().save_pretrained(folder / "classifier")
    others = {name: f"{folder}/{name.lower()}" for name in ("BASE", "CLASSIFIER")}
    return {"TINY": tiny} | others


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files if path.stat().st_size}


@pytest.mark.parametrize(("stage", "argv", "said", "rows", "raw"), CASES)
def test_bad_input_gets_one_clear_line_and_status_2(
    run, models, workdir, stage, argv, said, rows, raw
):
    if rows:
        write_jsonl(workdir / "in.jsonl", rows)
    elif raw is not None:
        (workdir / "in.jsonl").write_text(raw)
    (workdir / "runs").mkdir()
    (workdir / "notes.txt").write_text("Dear diary,\nall is well")
    name = "--models" if stage == "eval" else "--model"
    argv = [models.get(word, word) for word in argv]
    argv += [] if name in argv else [name, models["TINY"]]
    argv += ["--reward-model", models["TINY"]] if stage == "eval" else []
    argv += ["--lr", "1e-3"] if stage == "train" else []
    before = contents(workdir)
    status, _, err = run(stage, *argv)
    assert status == 2 and said in err
    assert len([line for line in err.splitlines() if line.startswith(f"{stage}.py: ")]) == 1
    assert contents(workdir) == before


@pytest.mark.parametrize("stage", ["generate", "score", "train", "eval"])
def test_a_run_is_never_mixed_with_one_of_other_settings(run, tiny, workdir, stage):
    rows = [pair_row(i, "Lovely. " * (i + 1), "Bad.", 1.0, split) for i, split in enumerate(SPLITS)]
    write_jsonl(workdir / "in.jsonl", rows)
    argv, other, said = {
        "generate": (["--limit", "1", "--max-tokens", "4"], ["--seed", "1"], "seed 0, now it is 1"),
        "score": (IN, ["--dtype", OTHER], "made with dtype 'torch."),
        "train": ([*IN, "--max-steps", "1", "--lr", "1e-3"], ["--beta", "0.5"], "beta"),
        "eval": (
            [*IN, "--max-tokens", "4", "--reward-model", tiny],
            ["--seed", "1"],
            "seed 0, now it is 1",
        ),
    }[stage]
    argv = ["--models" if stage == "eval" else "--model", tiny, *argv]
    assert run(stage, *argv)[0] in (0, 1)
    before = contents(workdir)
    gc.collect()
    status, _, err = run(stage, *argv, *other)
    assert status == 2 and said in err
    assert contents(workdir) == before
