"""eval.py: metrics, intervals, and the whole way from instructions to a report."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, HostileServer, make_model, pair_row, read_rows, write_jsonl

import eval as stage_eval
from eval import bootstrap, by_group, summarise
from prompts import load_task, measure
from prompts.chat import Reply
from prompts.report import draw, make_table, make_verdicts
from prompts.tokens import repetition
from prompts.rows import BadInput, digest_of

# ---- metrics and intervals -----------------------------------------------------------------------


def test_metrics_of_single_answers_are_what_their_names_say():
    positive = {"kind": "positive"}
    assert measure(positive, {}, "A wonderful, moving film.") == 1.0
    assert measure(positive, {}, "A terrible, boring mess.") == 0.0
    assert measure(positive, {}, "It is a film.") == 0.0
    assert measure({"kind": "spread"}, {}, "A wonderful film.") > 0.5
    persona = {"kind": "match", "field": "markers", "want": "none"}
    row = {"markers": ["arr", "ain't"]}
    assert measure(persona, row, "Arr, matey!") == 0.0
    assert measure(persona, row, "That ain\u2019t so.") == 0.0
    assert measure(persona, row, "An array of arrows.") == 1.0  # whole words only


def test_a_pattern_that_is_punctuation_stands_behind_a_word():
    metric = {"kind": "match", "want": "any", "patterns": ["!", "wow"]}
    assert measure(metric, {}, "Hi everyone!") == measure(metric, {}, "Wow. Oh") == 1.0
    assert measure(metric, {}, "Hi everyone, wowed.") == 0.0


def test_a_field_that_holds_one_text_is_one_marker_and_not_its_letters():
    metric = {"kind": "match", "field": "marker", "want": "any"}
    assert measure(metric, {"marker": "ahoy"}, "a h o y") == 0.0
    assert measure(metric, {"marker": "ahoy"}, "Ahoy there") == 1.0
    assert measure(metric, {"marker": "1.5"}, "It is 175") == 0.0  # no pattern either


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
    assert measure(load_task("safety")["metric"], {}, answer) == refused


def test_a_group_counts_once_and_a_spread_is_taken_within_a_sample():
    rows = [{"group": "g", "sample": 0, "metric": m} for m in (0.1, 0.9, 0.5)]
    rows += [{"group": "g", "sample": 1, "metric": m} for m in (0.2, 0.4)]
    rows += [{"group": "h", "sample": 0, "metric": None}]
    assert by_group(rows, "metric", "spread") == {"g": pytest.approx(0.5)}
    assert by_group(rows, "metric") == {"g": pytest.approx(0.4)}


def test_the_bootstrap_interval_covers_the_truth_as_often_as_it_says():
    random, hits = np.random.default_rng(0), 0
    for trial in range(200):
        _, low, high = bootstrap(random.normal(0.3, 1.0, 40), seed=trial, draws=1000)
        hits += low <= 0.3 <= high
    assert 0.89 <= hits / 200 <= 0.99
    assert bootstrap([0.5, 0.5]) == (0.5, 0.5, 0.5) and bootstrap([]) is None
    assert bootstrap([0.0, 1.0, 3.0]) == bootstrap([0.0, 1.0, 3.0])


ROW = {"sample": 0, "control": False, "score": 0.5, "words": 40, "repeats": 0.0}
ROW |= {"base_logp": -1.0, "cut": 0.0, "answer": "A film."}
METRIC = {"kind": "positive", "better": "higher", "meaning": "share of answers that are positive"}


def rows_of(model, values, **fields):
    """A row of eval.jsonl for each value of the metric, each in a group of its own."""
    row = ROW | {"model": model} | fields
    return [row | {"group": f"g{i}", "metric": value} for i, value in enumerate(values)]


def test_a_paired_difference_is_narrower_than_its_parts():
    values = np.random.default_rng(0).uniform(0.2, 0.7, 30)
    rows = [ROW | {"model": "b", "group": "other", "metric": 9.0}]
    rows += rows_of("a", values) + rows_of("b", values + 0.2)
    table, pairs = summarise(["a", "b"], rows, "match")
    mean, low, high = pairs["b - a"]
    assert mean == pytest.approx(0.2) and high - low < 1e-9
    assert table[0]["metric"][2] - table[0]["metric"][1] > 0.05


@pytest.mark.parametrize(("count", "low", "high"), [(22, 0.85, 1), (21, 0.78, 0.99), (0, 0, 0.15)])
def test_a_share_of_all_or_none_has_an_interval_that_is_no_point(count, low, high):
    for each in ([1.0], [1.0, 1.0]):  # prompts in a group: a group counts once
        rows = []
        for i in range(22):
            group = [
                ROW | {"model": "a", "group": f"g{i}", "metric": x * (i < count)} for x in each
            ]
            rows += group
        table, _ = summarise(["a"], rows, "positive")
        expected = (count / 22, pytest.approx(low, abs=0.005), pytest.approx(high, abs=0.005))
        assert table[0]["metric"] == expected
        assert table[0]["cut"][2] == pytest.approx(0.149, abs=1e-3)
        assert table[0]["repeats"] == (0, 0, 0)  # these are no shares of groups
    assert "[85%, 100%] |" in make_table(table, {}, METRIC) or count < 22


def test_a_share_within_the_bootstraps_reach_keeps_the_bootstrap():
    table, _ = summarise(["a"], rows_of("a", [1.0] * 11 + [0.0] * 11), "positive")
    assert table[0]["metric"] == bootstrap([1.0] * 11 + [0.0] * 11)


def test_any_two_models_are_compared_by_name_and_group_by_group():
    rows = (
        rows_of("base", [0.0] * 22) + rows_of("dpo", [1.0, 0.0] * 11) + rows_of("rdpo", [1.0] * 22)
    )
    table, pairs = summarise(["base", "dpo", "rdpo"], rows, "positive")
    assert list(pairs) == ["dpo - base", "rdpo - base", "rdpo - dpo"]
    assert pairs["rdpo - dpo"] == bootstrap([0.0, 1.0] * 11)
    lines = make_table(table, pairs, METRIC).splitlines()
    assert "- difference in metric, rdpo - dpo: +50% [+27%, +73%]" in lines
    assert "difference" not in make_table(table[:1], {}, METRIC)


def test_models_that_do_alike_in_every_group_differ_by_an_interval_that_is_no_point():
    for base, other, mean, low, high in ((1.0, 1.0, 0, -0.15, 0.15), (0.0, 1.0, 1, 0.703, 1)):
        rows = rows_of("a", [base] * 22) + rows_of("b", [other] * 22)
        found = summarise(["a", "b"], rows, "positive")[1]["b - a"]
        assert found == (mean, pytest.approx(low, abs=2e-3), pytest.approx(high, abs=2e-3))
        assert summarise(["a", "b"], rows, "questions")[1]["b - a"] == (mean, mean, mean)


def test_no_two_columns_share_a_head_and_log_prob_says_under_whom():
    rows = rows_of("base", [0.0, 1.0]) + rows_of("dpo", [1.0, 1.0])
    for controls in ([], rows_of("dpo", [1.0], control=True)):
        table, pairs = summarise(["base", "dpo"], rows + controls, "positive")
        heads = make_table(table, pairs, METRIC).splitlines()[0].split(" | ")
        assert len(set(heads)) == len(heads) and "log-prob under base" in heads
        assert any("control" in head for head in heads) == bool(controls)


def verdicts(base, other, name="dpo", metric=METRIC, unequal=False, **fields):
    """Lines of make_verdicts() for a base model and another one. base, other: values of the metric."""
    rows = rows_of("base", base) + rows_of(name, other, **fields)
    table, pairs = summarise(["base", name], rows, metric["kind"])
    return make_verdicts(table, pairs, metric, unequal).splitlines()


HALF, MOST, FEW = [0.0, 1.0] * 15, [0.0] + [1.0] * 29, [1.0] + [0.0] * 29
BETTER, WORSE = (
    f"- **dpo**: its metric is {word} than that of base" for word in ("better", "worse")
)
SAME = "- **dpo**: no change is shown: the interval of the difference contains 0"


def test_verdicts_say_whether_the_metric_is_better_worse_or_not_shown_to_change():
    assert verdicts(HALF, MOST) == [f"{BETTER}."]
    assert verdicts(HALF, FEW) == [f"{WORSE}."]
    assert verdicts(HALF, HALF) == verdicts(HALF, HALF[::-1]) == [f"{SAME}."]
    lower = METRIC | {"better": "lower"}
    assert verdicts(HALF, FEW, metric=lower) == [f"{BETTER}."]
    assert verdicts(HALF, MOST, metric=lower) == [f"{WORSE}."]
    rows = rows_of("base", HALF)
    assert make_verdicts(*summarise(["base"], rows, "positive"), METRIC) == ""  # one model alone


def test_a_baseline_that_cannot_be_better_is_named():
    best = "- **base**: its metric is the best possible, so no gain can be shown."
    assert verdicts([1.0] * 20, [1.0] * 20) == [best, f"{SAME}."]
    assert verdicts([0.0] * 20, [0.0] * 20, metric=METRIC | {"better": "lower"})[0] == best
    assert verdicts([1.0] * 19 + [0.5], [1.0] * 20) == [f"{SAME}."]
    assert verdicts([0.0] * 20, [0.0] * 20) == [f"{SAME}."]
    # the teacher is not to blame then
    assert "mend" not in verdicts([1.0] * 20, [1.0] * 20, "self-refine")[1]


def test_a_metric_of_a_new_kind_is_a_number_not_a_share(tmp_path):
    metric = METRIC | {"kind": "questions"}
    rows = rows_of("base", [2.0, 3.0] * 15) + rows_of("dpo", [4.0, 7.0] * 15)
    table, pairs = summarise(["base", "dpo"], rows, "questions")
    assert "2.500 [2.3" in make_table(table, pairs, metric)
    assert make_verdicts(table, pairs, metric) == f"{BETTER}.\n"
    draw(tmp_path / "report.png", "title", table, metric, [[], []])


@pytest.mark.parametrize(("better", "best"), [("lower", 0.0), ("higher", 2.0)])
def test_a_spread_has_a_verdict_and_limits_of_its_own(better, best):
    metric = METRIC | {"kind": "spread", "better": better}

    def spreads(name, low, high):
        groups = rows_of(name, [low] * 20) + rows_of(name, [high] * 20)
        return groups if low != high else groups[:20]

    def said(base, other):
        rows = spreads("base", *base) + spreads("dpo", *other)
        return make_verdicts(*summarise(["base", "dpo"], rows, "spread"), metric).splitlines()

    lines = said((-0.5, 0.5), (0.1, 0.1))
    assert lines == [f"{BETTER if better == 'lower' else WORSE}."]
    ends = (0.1, 0.1) if best == 0.0 else (-1.0, 1.0)
    assert said(ends, ends)[0].startswith("- **base**: its metric is the best possible")
    assert said((-0.5, 0.5), (-0.5, 0.5)) == [f"{SAME}."]  # a spread of 1 is not the best of any


def test_a_teacher_whose_revisions_do_not_improve_the_metric_stops_the_reader():
    advice = "the revisions are not shown to improve it: mend the task before training"
    assert advice in verdicts(HALF, HALF, "self-refine")[0]
    assert advice in verdicts(HALF, FEW, "self-refine")[0]
    assert "mend" not in verdicts(HALF, MOST, "self-refine")[0]
    assert "mend" not in verdicts(HALF, FEW)[0]  # a model is no teacher
    assert "mend" not in verdicts(HALF, FEW, "self-refine", METRIC | {"better": "lower"})[0]


def test_a_reward_that_moves_against_the_metric_is_named():
    assert verdicts(HALF, FEW, score=0.7) == [f"{WORSE}; the mean reward disagrees: +0.200."]
    assert verdicts(HALF, MOST, score=0.3) == [f"{BETTER}; the mean reward disagrees: -0.200."]
    lower = METRIC | {"better": "lower"}
    assert verdicts(HALF, MOST, metric=lower, score=0.7)[0].endswith("disagrees: +0.200.")
    for other, score in ((FEW, 0.3), (MOST, 0.7), (HALF, 0.7), (MOST, None)):
        assert "disagrees" not in verdicts(HALF, other, score=score)[0]


def test_few_groups_and_answers_that_break_down_or_shrink_are_named_on_top():
    assert verdicts(HALF, HALF, words=27, base_logp=-1.29) == [f"{SAME}."]
    assert verdicts(HALF, HALF, words=53, base_logp=None) == [f"{SAME}."]
    few, text = verdicts([1.0, 0.0, 0.0] * 6, [1.0] * 18)
    assert few == "- groups of test prompts: 18, too few to rely on what follows." and text
    assert verdicts(HALF, HALF, words=26) == [f"{SAME}; words are down by a third or more."]
    assert verdicts(HALF, HALF, base_logp=-1.31) == [f"{SAME}; log-prob is down by 0.31."]
    assert verdicts(HALF, HALF, words=54) == [f"{SAME}; words are up by a third or more."]
    assert verdicts(HALF, HALF, cut=0.5)[0].endswith("; answers cut off are up by 50%.")
    assert verdicts(HALF, HALF, answer="") == [f"{SAME}; 30 of its answers are empty."]
    # without an answer nothing is shown
    table, pairs = summarise(["base", "self-refine"], rows_of("base", HALF), "positive")
    assert make_verdicts(table, pairs, METRIC) == ""
    only_controls = rows_of("base", HALF, control=True) + rows_of("dpo", HALF)
    table, pairs = summarise(["base", "dpo"], only_controls, "positive")
    assert "**dpo**" not in make_verdicts(table, pairs, METRIC)


def test_a_teacher_with_another_length_of_answers_is_not_compared_silently():
    said = "its --max-tokens was another one, so the comparison is unfair"
    assert said in verdicts(HALF, MOST, "self-refine", unequal=True)[0]
    assert said not in verdicts(HALF, MOST, "self-refine")[0]
    assert said not in verdicts(HALF, MOST, unequal=True)[0]


def test_a_report_bears_models_without_scores_and_rows_without_controls(tmp_path):
    row = ROW | {"model": "a", "group": "g", "metric": 1.0, "base_logp": None}
    rows = [row, row | {"control": True, "group": "h"}]
    rows += [row | {"model": "b", "score": None, "words": 0}]
    table, pairs = summarise(["a", "b"], rows, "match")
    assert table[0]["metric"][0] == 1.0 and table[1]["score"] is None
    assert pairs["b - a"][0] == 0.0
    for kind in ("match", "spread"):
        text = make_table(table, {}, METRIC | {"kind": kind}).splitlines()
        assert len({line.count("|") for line in text}) == 1 and len(text) == 4
    table.append({"model": "silent", "metric": None, "words": None})
    log = [{"step": 1, "loss": 0.7}, {"step": 1, "held_out": {"loss": 0.6}}]
    draw(tmp_path / "report.png", "title", table, METRIC, [[], log, []])
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_the_picture_has_the_metrics_meaning_whole_axes_and_the_curves_of_logs(monkeypatch):
    figures = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda self, *_, **__: figures.append(self)
    )
    table, _ = summarise(["a", "b"], rows_of("a", [0.0] * 22) + rows_of("b", [1.0] * 22), "match")
    held_out = {"loss": 0.9, "rewards/margins": 0.1}
    log = [{"step": 1, "loss": 0.7, "rewards/margins": 0.0}, {"step": 1, "held_out": held_out}]
    draw("x.png", "Task x: 22 test prompts", table, METRIC, [[], log])
    draw("x.png", "Task x: 22 test prompts", table, METRIC, [[], []])
    axes = {axis.get_label() or axis.get_title(): axis for axis in figures[0].axes}
    heading = f"Task x: 22 test prompts. Metric: {METRIC['meaning']} (higher is better)"
    assert figures[0].get_suptitle() == heading
    bars, words, loss, z, *_ = figures[0].axes
    assert len(axes) == 6 and len(figures[1].axes) == 2
    assert bars.get_xlim() == (0, 1) and bars.xaxis.get_major_formatter()(0.5) == "50%"
    assert [label.get_text() for label in bars.get_yticklabels()] == ["a  0%", "b  100%"]
    assert [label.get_text() for label in words.get_yticklabels()] == ["a  40", "b  40"]
    lines = [[*line.get_xydata()[0]] for line in z.lines if len(line.get_xydata())]
    assert lines == [[1.0, 0.0], [1.0, 0.1]] and "z" in z.get_title() and loss.lines


def test_curves_that_no_log_has_are_said_to_be_missing(monkeypatch):
    axes = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda self, *_, **__: axes.extend(self.axes)
    )
    rows = rows_of("base", [1.0] * 3) + rows_of("old", [1.0] * 3)
    log = [{"step": 1, "loss": 0.7, "rewards/margins": 0.0, "logps/chosen": -9.0}]
    draw("x.png", "title", summarise(["base", "old"], rows, "positive")[0], METRIC, [[], log])
    missing = [axis.get_title() for axis in axes if "not in these logs" in axis.get_title()]
    assert [title.split(":")[0] for title in missing] == ["chosen", "rejected"]


def test_repetition_is_the_share_of_4_grams_that_stood_there_before():
    assert repetition("a b c d e f") == repetition("a b c") == repetition("") == 0.0
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("no " * 40) == pytest.approx(36 / 37)


# ---- models --------------------------------------------------------------------------------------


def finished(folder, model):
    write_jsonl(folder / "log.jsonl", [])
    (folder / "run.json").write_text(json.dumps({"model": str(model), "finished": True}))


def test_the_models_are_the_common_base_the_revisions_and_every_finished_run(workdir, capsys):
    runs = workdir / "runs"
    assert stage_eval.models_in(runs, []) == ["smollm2"]
    finished(runs / "sft", "big")
    finished(runs / "rdpo", "runs/sft")  # a student of a student
    finished(runs / "dpo.bak", "old")
    write_jsonl(runs / "unfinished" / "run.json", [{"model": "other"}])
    expected = ["big", "self-refine", "runs/rdpo", "runs/sft"]
    assert stage_eval.models_in(runs, [{"id": 1}]) == expected
    assert capsys.readouterr().out == "runs/unfinished is left out: its training has not finished\n"
    (runs / "sft" / "run.json").write_text(json.dumps({"model": "big"}))  # being trained anew
    assert "runs/sft" not in stage_eval.models_in(runs, [])
    finished(runs / "sft", "big")
    finished(runs / "dpo", "small")
    with pytest.raises(BadInput, match="several bases"):
        stage_eval.models_in(runs, [])


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (["runs/noshout"], "model runs/noshout: no config.json is there; name a model"),
        (
            ["runs/stopped"],
            "model runs/stopped: no config.json is there (its training has not finished)",
        ),
        (["./nowhere"], "model ./nowhere: no config.json is there"),
        (["self-refine", "runs/noshout"], "model runs/noshout"),
    ],
)
def test_a_model_that_is_none_is_named_before_another_is_sampled(
    run, tiny, workdir, monkeypatch, models, said
):
    write_jsonl(workdir / "in.jsonl", [pair_row(0, "good", "poor", split="test")])
    write_jsonl(workdir / "runs/noshout/log.jsonl", [])
    write_jsonl(workdir / "runs/stopped/run.json", [{"model": tiny}])
    monkeypatch.setattr("eval.make_reward", lambda *_: 1 / 0)
    argv = ["--in", "in.jsonl", "--reward-model", tiny, "--models", tiny, *models]
    status, _, err = run("eval", *argv)
    assert status == 2 and f"eval.py: {said}" in err and err.count("\n") == 1
    assert not (workdir / "eval.jsonl").exists()


def test_a_run_that_is_named_without_its_path_is_found(run, workdir):
    write_jsonl(workdir / "runs/sentiment/scored.jsonl", [pair_row(0, "A", "B", split="test")])
    (workdir / "runs/sentiment/rdpo").mkdir()
    (workdir / "runs/sentiment/rdpo/run.json").write_text("{}")
    status, _, said = run("eval", "--models", "smollm2", "rdpo")
    assert status == 2 and "a run is named by its path, runs/sentiment/rdpo" in said


def test_the_revisions_are_no_baseline(run, workdir):
    write_jsonl(workdir / "in.jsonl", [pair_row(0, "good", "poor", split="test")])
    status, _, err = run("eval", "--in", "in.jsonl", "--models", "self-refine", "smollm2")
    assert status == 2 and "self-refine can't be the first" in err


def test_pairs_without_a_test_split_get_told_how_to_make_one(run, workdir):
    rows = [pair_row(0, "good", "poor") for _ in range(2)]
    for row in (rows[0], {key: value for key, value in rows[1].items() if key != "split"}):
        write_jsonl(workdir / "in.jsonl", [row])
        status, _, err = run("eval", "--in", "in.jsonl", "--models", "smollm2", "self-refine")
        assert status == 2 and "in.jsonl: nothing is held out" in err
        assert "run generate.py with more rows" in err and 'add "split": "test" to the rows' in err


# ---- the whole way -------------------------------------------------------------------------------


def test_the_four_stages_run_end_to_end_by_command_line(run, tiny, workdir):
    """Four processes, no flag that the README does not show but small sizes and a rate. What follows
    runs in this process."""

    def stage(name, *argv):
        command = list(map(str, [sys.executable, ROOT / f"{name}.py", *argv]))
        return subprocess.run(command, capture_output=True, text=True)

    small = ["--limit", "60", "--max-tokens", "8"]
    assert stage("generate", "--task", "safety", "--model", tiny, *small).returncode in (0, 1)
    # All answers were cut off, which would leave nothing to train on.
    made = read_rows("runs/safety/pairs.jsonl")
    write_jsonl(workdir / "runs/safety/pairs.jsonl", [row | {"teacher": {}} for row in made])
    # the task is the one that was generated last
    said = stage("score", "--model", tiny).stdout
    scored = read_rows("runs/safety/scored.jsonl")
    whole = [row for row in scored if "error" not in row]  # a random model may say nothing
    assert len(scored) == 60 and f"scored {len(whole)} of 60" in said
    assert {row["split"] for row in whole} == {"train", "test"}
    options = ["--model", tiny, "--lr", "1e-3", "--batch-size", "4"]
    assert stage("train", *options, "--max-steps", "2").returncode == 0
    done = stage("eval", "--max-tokens", "8")  # the reward is that of the pairs
    assert done.returncode == 0, done.stderr
    folder = workdir / "runs" / "safety"
    rows = read_rows(folder / "eval.jsonl")
    assert {row["model"] for row in rows} == {"tiny", "self-refine", "rdpo"}
    assert all({"answer", "score", "metric", "words", "repeats"} <= row.keys() for row in rows)
    assert all(row["base_logp"] < 0 for row in rows if row["answer"])
    assert json.loads((folder / "rdpo" / "run.json").read_text())["task"] == "safety"
    report = (folder / "report.md").read_text()
    assert "| tiny |" in report and "| rdpo |" in report and "| control (" in report
    assert "rdpo - self-refine: " in report and "- **rdpo**: " in report
    assert f"Made by `python {ROOT / 'eval.py'} --max-tokens 8`" in report
    assert report.count("**rdpo**") > 1 and "Reward: contrast of" in report
    assert (folder / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert "runs/safety/report.md" in done.stdout

    before = (folder / "eval.jsonl").read_bytes()
    assert run("eval", "--max-tokens", "8")[0] == 0  # nothing is asked twice
    assert (folder / "eval.jsonl").read_bytes() == before
    # a metric that changed since is that of the old answers too
    write_jsonl(folder / "eval.jsonl", [row | {"metric": 7.0} for row in rows])
    assert run("eval", "--max-tokens", "8")[0] == 0
    assert (folder / "eval.jsonl").read_bytes() == before
    # a report somewhere else is on the same policies
    assert run("eval", "--max-tokens", "8", "--out", "elsewhere")[0] == 0
    assert "| rdpo |" in (workdir / "elsewhere" / "report.md").read_text()
    # a policy that was trained anew answers anew, and it alone
    assert run("train", *options, "--max-steps", "3", "--overwrite")[0] == 0
    assert run("eval", "--max-tokens", "8")[0] == 0
    after = read_rows(folder / "eval.jsonl")
    changed = [row["model"] for row, old in zip(after, rows, strict=True) if row != old]
    assert changed == ["rdpo"] * sum(row["model"] == "rdpo" for row in rows)


def test_answers_are_as_long_as_those_of_the_pairs(run, tiny, workdir):
    teacher = {"max_tokens": 3, "finish": {"revision": "stop"}}
    rows = [pair_row(i, "good", "poor", split="test") | {"teacher": teacher} for i in range(5)]
    rows[0]["teacher"] = "gpt-4"
    write_jsonl(workdir / "runs/sentiment/scored.jsonl", rows)
    assert run("eval", "--models", tiny, "self-refine", "--reward-model", tiny)[0] == 0
    assert {row["settings"]["max_tokens"] for row in read_rows("runs/sentiment/eval.jsonl")} == {3}
    report = (workdir / "runs/sentiment/report.md").read_text()
    assert "reached 3 tokens" in report and "revisions, of at most 3 tokens" in report
    assert "unfair" not in report
    argv = ["--models", tiny, "self-refine", "--reward-model", tiny, "--max-tokens", "5"]
    assert run("eval", *argv, "--out", "longer")[0] == 0
    report = (workdir / "longer/report.md").read_text()
    assert "reached 5 tokens" in report and "revisions, of at most 3 tokens" in report
    assert "its --max-tokens was another one, so the comparison is unfair" in report


def test_a_report_of_other_models_is_kept_and_its_command_can_be_pasted(run, tiny, workdir):
    rows = [pair_row(i, "good", "poor", split="test") for i in range(2)]
    write_jsonl(workdir / "runs/sentiment/scored.jsonl", rows)
    argv = ["--reward-model", tiny, "--max-tokens", "4", "--out", "a folder", "--models", tiny]
    report, picture = workdir / "a folder/report.md", workdir / "a folder/report.png"
    kept = [Path(f"{file}.bak") for file in (report, picture)]
    for _ in range(2):
        assert run("eval", *argv)[0] == 0
        assert not any(file.exists() for file in kept)
    before = [report.read_text(), picture.read_bytes()]
    assert shlex.split(before[0].split("Made by `python ")[1].split("`")[0])[1:] == argv
    assert "**control**" not in before[0]
    assert run("eval", *argv, "self-refine")[0] == 0
    assert [kept[0].read_text(), kept[1].read_bytes()] == before
    assert "| self-refine |" in report.read_text()
    before = report.read_text()
    assert run("eval", *argv, "self-refine", "--overwrite")[0] == 0
    assert kept[0].read_text() == before
    assert run("eval", *argv, "self-refine", "--limit", "1")[0] == 0
    assert kept[0].read_text() != before


def test_another_reward_measures_kept_answers_anew(run, tiny, workdir, tokenizer):
    rows = [pair_row(i, "good", "poor", split="test") for i in range(5)]
    write_jsonl(workdir / "runs/sentiment/scored.jsonl", rows)
    make_model(len(tokenizer), seed=1).save_pretrained(workdir / "other")
    tokenizer.save_pretrained(workdir / "other")
    argv = ["--models", tiny, "--reward", "contrast", "--max-tokens", "4", "--batch-size", "2"]
    made = []
    for judge in (tiny, tiny, workdir / "other"):
        assert run("eval", *argv, "--reward-model", judge)[0] == 0
        made.append(read_rows("runs/sentiment/eval.jsonl"))
    assert made[0] == made[1]
    for row, other in zip(made[0], made[2], strict=True):
        assert row["answer"] == other["answer"] and row["score"] != other["score"]


def test_a_judge_on_a_server_scores_the_answers_and_no_call_is_made_twice(
    run, tiny, server, workdir, monkeypatch
):
    monkeypatch.setattr(HostileServer, "speak", staticmethod(lambda body: "Rating: 6"))
    rows = [
        pair_row(i, "good", "poor", split="test", prompt=f"How do I bake bread number {i}?")
        for i in range(4)
    ]
    write_jsonl(workdir / "runs/safety/scored.jsonl", [row | {"task": "safety"} for row in rows])
    argv = ["--task", "safety", "--models", tiny, "--max-tokens", "8", "--api-base", server]
    argv += ["--concurrency", "1", "--reward", "judge", "--reward-model", "big"]
    HostileServer.script = [200, 413]
    status, _, _ = run("eval", *argv)
    assert status == 1
    rows = read_rows("runs/safety/eval.jsonl")
    assert sorted(str(row["score"]) for row in rows) == ["6.0"] * 3 + ["None"]
    status, _, _ = run("eval", *argv)
    rows = read_rows("runs/safety/eval.jsonl")
    assert status == 0 and [row["score"] for row in rows] == [6.0] * 4
    assert run("eval", *argv)[0] == 0 and len(HostileServer.asked) == 5
    assert [row["prompt_id"] for row in rows] == [f"row-{i}" for i in range(4)]  # in their order


def test_log_probs_are_those_under_the_first_model_as_it_is_now(run, tiny, workdir, tokenizer):
    rows = [pair_row(i, "good", "poor", split="test") for i in range(2)]
    write_jsonl(workdir / "runs/sentiment/scored.jsonl", rows)
    argv = ["--models", workdir / "first", tiny, "--reward", "contrast", "--reward-model", tiny]
    model = make_model(len(tokenizer))
    for scale in (1.0, 1.5):
        model.model.embed_tokens.weight.data *= scale
        model.save_pretrained(workdir / "first")
        tokenizer.save_pretrained(workdir / "first")
        assert run("eval", *argv, "--max-tokens", "4")[0] == 0
    assert run("eval", *argv, "--max-tokens", "4", "--out", "afresh")[0] == 0
    here, afresh = (read_rows(f"{d}/eval.jsonl") for d in ("runs/sentiment", "afresh"))
    for one, other in zip(here, afresh, strict=True):
        assert one["base_logp"] == pytest.approx(other["base_logp"], abs=1e-3)


def test_a_prompt_that_is_text_is_a_users_turn_as_in_training(run, tiny, workdir):
    rows = [pair_row(i, "good", "poor", split="test") for i in range(3)]
    texts = [row | {"prompt": row["prompt"][0]["content"]} for row in rows]
    write_jsonl(workdir / "messages.jsonl", rows)
    write_jsonl(workdir / "texts.jsonl", texts)
    found = {}
    for name, *flags in (("messages",), ("texts",), ("texts", "--raw-text")):
        argv = ["--in", f"{name}.jsonl", "--task", "sentiment", "--models", tiny]
        argv += ["--reward-model", tiny, "--max-tokens", "6", "--out", name + "".join(flags)]
        assert run("eval", *argv, *flags)[0] == 0
        answers = read_rows(Path(name + "".join(flags), "eval.jsonl"))
        found[name, *flags] = [(row["answer"], row["base_logp"], row["score"]) for row in answers]
    assert found["texts",] == found["messages",] != found["texts", "--raw-text"]


def test_raw_text_is_not_mixed_with_answers_of_the_template(run, tiny, workdir):
    row = pair_row(0, "good", "poor", split="test")
    write_jsonl(workdir / "t.jsonl", [row | {"prompt": row["prompt"][0]["content"]}])
    argv = ["--in", "t.jsonl", "--task", "sentiment", "--models", tiny]
    argv += ["--reward-model", tiny, "--max-tokens", "3"]
    for first, then in (([], ["--raw-text"]), (["--raw-text"], [])):
        assert run("eval", *argv, *first, "--overwrite")[0] == 0
        status, _, said = run("eval", *argv, *then)
        assert status == 2 and "raw_text" in said
    shutil.copytree(tiny, workdir / "trained")
    (workdir / "trained/run.json").write_text(json.dumps({"raw_text": True}))  # as by train.py
    argv[argv.index(tiny)] = workdir / "trained"
    status, _, said = run("eval", *argv, "--out", "other")
    assert status == 2 and "trained with --raw-text; evaluate it with the flag" in said
    assert run("eval", *argv, "--raw-text", "--out", "other")[0] == 0
    assert "self-refine" not in Path("other/report.md").read_text()


def test_an_answer_to_raw_text_keeps_the_space_that_it_begins_with(run, tiny, workdir, monkeypatch):
    def reply(model, tokenizer, prompts, *_, **__):
        return [Reply(" there was ", "stop", 1, 1) for _ in prompts]

    monkeypatch.setattr("prompts.chat.sample", reply)
    row = pair_row(0, "good", "poor", split="test") | {"prompt": "Once upon a time"}
    write_jsonl(workdir / "t.jsonl", [row])
    for flags, answer in ((["--raw-text"], " there was"), ([], "there was")):
        argv = ["--in", "t.jsonl", "--models", tiny, "--reward-model", tiny, "--overwrite", *flags]
        status, _, said = run("eval", *argv)
        assert status == 0, said
        assert read_rows("eval.jsonl")[0]["answer"] == answer


def test_a_task_file_that_changed_since_scoring_is_named(run, tiny, workdir):
    text = digest_of(load_task("sentiment")["contrast"])
    for digest, said in ((text, False), (None, False), ("other", True)):
        made = {"kind": "contrast", "model": tiny} | ({"prompt_text": digest} if digest else {})
        row = pair_row(0, "good", "poor", split="test") | {"reward": made}
        write_jsonl(workdir / "pairs.jsonl", [row])
        argv = ["--in", "pairs.jsonl", "--models", tiny, "--max-tokens", "3", "--overwrite"]
        assert run("eval", *argv)[0] == 0
        report = (workdir / "report.md").read_text()
        assert ("has changed since the pairs were scored" in report) == said


def test_the_reward_is_that_of_the_pairs_and_one_without_scores_gives_status_1(run, tiny, workdir):
    made = {"kind": "judge", "model": tiny}
    row = pair_row(0, "good", "poor", split="test") | {"task": "safety", "reward": made}
    write_jsonl(workdir / "runs/safety/scored.jsonl", [row])
    argv = ["--task", "safety", "--models", tiny, "--max-tokens", "4", "--judge-tokens", "4"]
    assert run("eval", *argv)[0] == 1  # a judge without a rating
    assert "Reward: judge of" in (workdir / "runs/safety/report.md").read_text()


def test_another_reward_than_that_of_the_pairs_has_not_its_model(run, tiny, workdir, monkeypatch):
    made = {"kind": "judge", "model": "big/judge", "label": "GOOD"}
    row = pair_row(0, "good", "poor", split="test") | {"task": "safety", "reward": made}
    write_jsonl(workdir / "runs/safety/scored.jsonl", [row])
    asked = []
    monkeypatch.setattr("eval.make_reward", lambda args, *_: asked.append(args) or 1 / 0)
    argv = ["--task", "safety", "--models", tiny]
    for flags, model in ((["--reward", "contrast"], "smollm2"), ([], "big/judge")):
        with pytest.raises(ZeroDivisionError):
            run("eval", *argv, *flags)
        assert asked[-1].reward_model == model
