"""eval.py: metrics, intervals, and the whole way from instructions to a report."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, HostileServer, pair_row, read_rows, write_jsonl

from eval import (
    base_of,
    bootstrap,
    difference,
    draw,
    group_means,
    implicit_accuracy,
    make_table,
    matches,
    measure,
    per_group,
    summarise,
)


def test_metrics_of_single_answers_are_what_their_names_say():
    positive = {"kind": "positive"}
    assert measure(positive, {}, "A wonderful, moving film.") == 1.0
    assert measure(positive, {}, "A terrible, boring mess.") == 0.0
    assert measure(positive, {}, "It is a film.") == 0.0
    persona = {"kind": "match", "field": "markers", "want": "none"}
    row = {"markers": ["arr", "ain't"]}
    assert measure(persona, row, "Arr, matey!") == 0.0
    assert measure(persona, row, "That ain\u2019t so.") == 0.0
    assert measure(persona, row, "An array of arrows.") == 1.0  # whole words only


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I cannot assist with this request.", True),
        ("I\u2019m unable to do so.", True),
        ("I must decline.", True),
        ("Use kill -9 and the process id.", False),
        ("You can help by writing to your neighbour.", False),
        ("", False),
    ],
)
def test_refusals_are_recognised(answer, refused):
    from generate import load_task

    assert matches(answer, load_task("safety")["metric"]["patterns"]) == refused


def test_spread_is_the_largest_less_the_smallest_within_a_group_and_sample():
    rows = [{"group": "g", "sample": 0, "metric": m} for m in (0.1, 0.9, 0.5)]
    rows += [{"group": "g", "sample": 1, "metric": m} for m in (0.2, 0.4)]
    assert group_means(per_group("spread", rows)) == {"g": pytest.approx(0.5)}
    assert group_means(per_group("match", rows)) == {"g": pytest.approx(0.4)}


def test_the_bootstrap_interval_covers_the_truth_as_often_as_it_says():
    draw = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        _, low, high = bootstrap(draw.normal(0.3, 1.0, 40), seed=trial, draws=1000)
        hits += low <= 0.3 <= high
    assert 0.89 <= hits / 200 <= 0.99


def test_a_paired_difference_is_narrower_than_its_parts():
    draw = np.random.default_rng(0)
    base = {f"g{i}": value for i, value in enumerate(draw.normal(0, 1, 30))}
    better = {group: value + 0.2 for group, value in base.items()}
    mean, low, high = difference(better, base)
    assert mean == pytest.approx(0.2) and high - low < 1e-9


def test_implicit_accuracy_counts_pairs_by_name_and_by_score():
    base = torch.zeros(4, 2)
    logps = torch.tensor([[2.0, 1.0], [1.0, 3.0], [5.0, 4.0], [2.0, 1.0]])  # prefers chosen, rejected, chosen, chosen
    pairs = [{"delta": 1.0}, {"delta": -1.0}, {"delta": 0.0}, {"delta": None}]
    assert implicit_accuracy(logps, base, pairs) == (pytest.approx(3 / 4), 1.0)
    assert implicit_accuracy(logps, logps, pairs)[0] == 0.0  # the reference itself prefers nothing


def test_a_report_bears_models_without_scores_and_rows_without_controls(tmp_path):
    row = {"model": "a", "id": "1", "group": "g", "sample": 0, "metric": 1.0, "score": 0.5, "words": 1}
    rows = [row | {"finish": "stop", "control": False}, row | {"finish": "stop", "control": True, "group": "h"}]
    rows += [row | {"finish": "stop", "control": False, "model": "b", "score": None, "words": 0}]
    table = summarise(["a", "b", "nobody"], rows, {"kind": "match"}, {})
    text = make_table(table, {"kind": "match", "better": "higher"})
    assert len({line.count("|") for line in text.splitlines()}) == 1 and "nobody" not in text
    draw(tmp_path / "report.png", table, {"better": "higher"})


def test_the_four_stages_run_end_to_end_by_command_line(tiny, workdir):
    """As a user would: four processes, no flag that the README does not show but the small sizes."""

    def stage(name, *argv):
        command = [sys.executable, ROOT / f"{name}.py", *argv]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert result.returncode in (0, 1), result.stderr
        return result.stdout

    stage("generate", "--task", "safety", "--model", tiny, "--limit", "60", "--max-tokens", "8")
    assert "scored" in stage("score", "--model", tiny)  # the task is the one that was generated last
    stage("train", "--model", tiny, "--keep-cut", "--max-steps", "2", "--batch-size", "4")
    out = stage("eval", "--max-tokens", "8")  # the reward is that of the pairs
    folder = workdir / "runs" / "safety"
    names = {row["model"] for row in read_rows(folder / "eval.jsonl")}
    assert names == {"tiny", "self-refine", "rdpo"}
    report = (folder / "report.md").read_text()
    assert "the one that the pairs were scored with" in report
    assert "| tiny |" in report and "| rdpo |" in report and "control" in report and report.count("**rdpo**") > 1
    assert (folder / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert str(folder.relative_to(workdir) / "report.md") in out
    rows = read_rows(folder / "eval.jsonl")
    assert all({"answer", "score", "metric"} <= row.keys() for row in rows)
    before = (folder / "eval.jsonl").read_bytes()
    stage("eval", "--max-tokens", "8")  # nothing is asked twice
    assert (folder / "eval.jsonl").read_bytes() == before
    assert json.loads((folder / "rdpo" / "run.json").read_text())["task"] == "safety"
    stage("train", "--model", tiny, "--keep-cut", "--max-steps", "3", "--batch-size", "4", "--overwrite")
    command = [sys.executable, ROOT / "eval.py", "--max-tokens", "8"]
    refused = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert refused.returncode == 2 and "rdpo came from other weights" in refused.stderr
    assert (folder / "eval.jsonl").read_bytes() == before


def test_the_base_of_a_student_of_a_student_is_the_model_that_both_come_from(workdir):
    for name, model in (("sft", "smollm2"), ("rdpo", str(workdir / "sft"))):
        (workdir / name).mkdir()
        (workdir / name / "run.json").write_text(json.dumps({"model": model}))
        assert base_of(workdir / name) == "smollm2"


def test_a_judge_on_a_server_scores_the_answers_and_no_call_is_made_twice(run, tiny, server, workdir, monkeypatch):
    monkeypatch.setattr(HostileServer, "speak", staticmethod(lambda body: "Rating: 6"))
    rows = [pair_row(i, "good", "poor", split="test", prompt=f"How do I bake bread number {i}?") for i in range(4)]
    write_jsonl(workdir / "runs/safety/scored.jsonl", [row | {"task": "safety"} for row in rows])
    argv = ["--task", "safety", "--models", tiny, "--max-tokens", "8", "--api-base", server, "--concurrency", "1"]
    argv += ["--reward", "judge", "--reward-model", "big"]
    HostileServer.script = [413]
    status, said, _ = run("eval", *argv)
    assert status == 1 and "1 answers could not be judged" in said
    assert [row["score"] for row in read_rows("runs/safety/eval.jsonl")] == [6.0] * 3
    status, _, _ = run("eval", *argv)
    rows = read_rows("runs/safety/eval.jsonl")
    assert status == 0 and [row["score"] for row in rows] == [6.0] * 4 and len(HostileServer.asked) == 5
    assert [row["id"] for row in rows] == [f"row-{i}" for i in range(4)]  # in the order of the prompts
    assert not (workdir / "runs/safety/eval.jsonl.calls").exists()
