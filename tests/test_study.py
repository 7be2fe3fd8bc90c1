"""The study: its statistics, its noise, and that a run is made once."""

import json
import sys

import numpy as np
import pytest
from conftest import ROOT, write_jsonl

sys.path.insert(0, str(ROOT / "results"))
import study


def test_holm_adjusts_the_smallest_p_by_the_whole_family_and_never_falls():
    assert study.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert study.holm([0.5, 0.9]) == [1.0, 1.0] and study.holm([]) == []


def test_the_interval_covers_groups_and_seeds_together():
    rng = np.random.default_rng(0)
    groups_alone = rng.normal(0, 1, (1, 200)).repeat(3, 0)
    seeds_too = groups_alone + np.array([[-0.5], [0.0], [0.5]])
    narrow, wide = (np.ptp(study.resample(v)[1:3]) for v in (groups_alone, seeds_too))
    assert narrow == pytest.approx(2 * 1.96 / 200**0.5, rel=0.1) and wide > 2 * narrow
    assert study.resample(np.ones((2, 5)))[3] == 1e-4  # p is never said to be 0
    assert study.resample(rng.normal(0, 1, (3, 50)))[3] > 0.05


def test_the_plan_makes_each_run_once_and_the_start_before_what_goes_on_from_it():
    for task in ("sentiment", "safety"):
        keys = [run.key for run in study.plan_of(task, [0, 1])]
        assert len(set(keys)) == len(keys)
        for run in study.plan_of(task, [0, 1]):
            start = f"{run.kind}/{run.seed}/dsc"
            assert run.start == "base" or keys.index(start) < keys.index(run.key)
    every = {run.key for run in study.plan_of("sentiment", [0])}
    assert every >= {f"fresh/0/{m}-flips{s}" for m in study.DIAL for s in (10, 20, 30, 40)}


def test_the_settings_of_the_best_trial_are_taken_and_trials_are_asked_other_films(made, workdir):
    trials = study.trials_of("rdpo")
    for trial, metric in zip(trials, (0.4, 0.7, 0.7), strict=True):
        made.lines[trial.key] = {"values": {"metric": [metric, None]}}
        (workdir / made.folder(trial) / trial.name).mkdir(parents=True)
    assert made.settings("rdpo") == (trials[1].lr, trials[1].beta)
    kept = [trial for trial in trials if (made.folder(trial) / trial.name).exists()]
    assert kept == [trials[1]]  # its student is that of the study's first seed
    write_jsonl(workdir / made.folder(trials[0]) / "scored.jsonl", [{"id": "r0", "split": "test"}])
    prompts = study.read_prompts(ROOT / "prompts/sentiment.jsonl", "sentiment")
    asked = {row["group"] for row in made.rows(trials[0])[1]}
    assert len(asked) > 100 and not asked & {r["group"] for r in prompts if r["split"] == "test"}
    assert not asked & {r["group"] for r in prompts[: study.LIMIT["conversation"]]}


@pytest.fixture
def made(workdir):
    """A study with scored pairs of 36 training and 4 test rows."""
    rows = []
    for k in range(40):
        row = {"id": f"r{k}", "group": f"g{k}", "split": "train" if k < 36 else "test"}
        row |= {"chosen": f"good {k}", "rejected": f"bad {k}"}
        rows.append(row | {"score_chosen": 1.0, "score_rejected": -1.0})
    write_jsonl(workdir / "runs/study/sentiment/fresh-0/scored.jsonl", rows)
    arguments = type("", (), {"task": "sentiment", "jobs": 1})
    return study.Study(arguments)


def test_flipped_labels_keep_their_scores_with_the_texts_and_swapped_scores_do_not(made):
    clean, test = made.rows(study.Run("fresh", "dpo", 0))
    assert len(clean) == 36 and len(test) == 4
    flipped, _ = made.rows(study.Run("fresh", "dpo", 0, flips=25))
    turned = [row for row in flipped if row["chosen"].startswith("bad")]
    assert len(turned) == 9 and all(row["score_chosen"] == -1.0 for row in turned)
    swapped, _ = made.rows(study.Run("fresh", "rdpo", 0, swaps=50))
    wrong = [row for row in swapped if row["score_chosen"] == -1.0]
    assert len(wrong) == 18 and all(row["chosen"].startswith("good") for row in wrong)
    # the levels are nested, so that they differ by what is added alone
    assert {row["id"] for row in turned} < {row["id"] for row in wrong}


def test_pairs_with_an_answer_that_was_cut_off_or_repeats_itself_are_not_whole():
    finish = {"answer": "stop", "critique": "length", "revision": "stop"}
    row = {"chosen": "a fine film", "teacher": {"finish": finish}}
    assert study.is_whole(row) and not study.is_whole(row | {"error": "no answer"})
    assert not study.is_whole(row | {"chosen": "a fine film " * 4})
    for name in ("answer", "revision"):
        assert not study.is_whole(row | {"teacher": {"finish": finish | {name: "length"}}})


def test_the_report_has_a_row_a_method_with_intervals_and_its_rivals(made, workdir, capsys):
    rng, made.lines = np.random.default_rng(0), {}
    made.path = workdir / "sentiment.jsonl"
    facts = {key: "x" for key in ("commit", "hardware", "torch", "transformers")}
    runs = [study.Run("fresh", m, s) for m in ("base", "dsc", "dpo", "rdpo") for s in (0, 1)]
    runs += [study.Run("fresh", m, 0, flips=40) for m in ("dpo", "rdpo")]
    for run in runs:
        likely = {"base": 0.3, "rdpo": 0.9}.get(run.method, 0.5)
        values = {"metric": [float(x) for x in rng.random(40) < likely], "words": [60] * 40}
        line = {**run._asdict(), "seconds": 1}
        line |= {"threads": 1, "made": facts | {"date": "2026-01-01"}}
        made.lines[run.key] = line | {"values": values | {"reward": [0.0] * 40}}
    study.report(made)
    summary = json.loads((workdir / "sentiment.summary.json").read_text())
    rows = {row["method"]: row for row in summary["rows"]}
    assert set(rows) == {"base", "dsc", "dpo", "rdpo"} and rows["rdpo"]["seeds"] == [0, 1]
    mean, low, high, p, adjusted = rows["rdpo"]["less dpo"]
    assert mean == pytest.approx(rows["rdpo"]["metric"][0] - rows["dpo"]["metric"][0])
    assert 0 < low < mean < high and p <= adjusted < 0.05 < rows["dsc"]["less dpo"][4]
    assert [p["share"] for p in summary["dials"] if p["method"] == "dpo"] == [0, 40, 0]
    assert (workdir / "sentiment.png").read_bytes()[:4] == b"\x89PNG"
    assert "| rdpo | [0, 1] |" in (workdir / "sentiment.md").read_text()


def test_the_committed_lines_can_be_read_and_say_how_they_were_made():
    for path in (ROOT / "results/study").glob("*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            assert {"commit", "date", "hardware", "torch", "transformers"} <= line["made"].keys()
            assert all(len(v) == len(line["groups"]) for v in line["values"].values())
