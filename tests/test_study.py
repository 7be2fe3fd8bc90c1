"""The study: that a run is made once, of the right pairs; its noise, its statistics, its report."""

import itertools
import json
import sys

import numpy as np
import pytest
from conftest import ROOT, pair_row, write_jsonl

sys.path.insert(0, str(ROOT / "results"))
import compare
import study
from study import Run

from prompts.rows import BadInput
from train import preference_loss


def test_holm_adjusts_the_smallest_p_by_the_whole_family_and_never_falls():
    assert compare.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert compare.holm([0.5, 0.9]) == [1.0, 1.0] and compare.holm([]) == []


def test_the_interval_covers_groups_and_seeds_together():
    rng = np.random.default_rng(0)
    groups_alone = rng.normal(0, 1, (1, 200)).repeat(3, 0)
    seeds_too = groups_alone + np.array([[-0.5], [0.0], [0.5]])
    narrow, wide = (np.ptp(compare.resample(v)[1:3]) for v in (groups_alone, seeds_too))
    assert narrow == pytest.approx(2 * 1.96 / 200**0.5, rel=0.1) and wide > 2 * narrow
    assert compare.resample(np.ones((2, 5)))[3] == 2e-4  # two-sided, of one draw in 10,000
    assert compare.resample(rng.normal(0, 1, (3, 50)))[3] > 0.05
    # less a mean of other groups: as exact as the two together
    one, other = rng.normal(1, 1, (1, 400)), rng.normal(0, 1, (1, 400))
    mean, low, high, _ = compare.resample(one, other)
    assert mean == pytest.approx(one.mean() - other.mean())
    assert high - low == pytest.approx(2 * 1.96 * (2 / 400) ** 0.5, rel=0.15)


def test_the_plan_makes_each_run_once_and_the_start_before_what_goes_on_from_it():
    for task in ("sentiment", "safety"):
        plan = study.plan_of(task, [0, 1])
        assert len({(run.kind, run.seed, run.name) for run in plan}) == len(plan)
        for run in plan:
            start = Run(run.kind, "dsc", run.seed)
            assert run.start == "base" or plan.index(start) < plan.index(run)
    plan = study.plan_of("sentiment", [0])
    assert {run.flips for run in plan if run.method == "cdpo"} == {0, 10, 20, 30, 40}
    assert {run.swaps for run in plan if run.method == "rdpo"} == {0, 10, 25, 40, 50}
    assert {run.method for run in plan if run.trial is not None} == study.METHODS.keys()


def test_rdpo_does_not_change_where_labels_are_exchanged_with_their_scores():
    """So the dial of labels need not be run for it."""
    torch = pytest.importorskip("torch")
    logps, reference = torch.randn(6, 2), torch.randn(6, 2)
    delta, tokens = torch.randn(6), torch.randint(5, 90, (6, 2))
    more = {"beta": 0.1, "tau": 0.3, "label_smoothing": 0.1, "mean_weight": 1.0}
    for kind in ("rdpo", "dpo"):
        one, _ = preference_loss(logps, reference, delta, tokens, kind=kind, **more)
        sides = (x.flip(1) for x in (logps, reference))
        other, _ = preference_loss(*sides, -delta, tokens.flip(1), kind=kind, **more)
        assert torch.allclose(one, other) == (kind == "rdpo")


PROMPTS = [{"id": f"r{k}", "group": f"g{k}", "split": "train", "prompt": []} for k in range(36)]
PROMPTS += [{"id": f"t{k}", "group": f"h{k}", "split": "test", "prompt": []} for k in range(4)]
PROMPTS += [{"id": f"s{k}", "group": f"i{k}", "split": "train", "prompt": []} for k in range(3)]


@pytest.fixture
def cell(workdir, monkeypatch):
    """A prepared cell whose stages only write what they would; `cell.calls` are their flags."""
    monkeypatch.setattr(study, "ROOT", workdir)
    monkeypatch.setattr(study, "read_prompts", lambda path, task: PROMPTS)
    monkeypatch.setattr(study, "LIMIT", {"conversation": 40})
    monkeypatch.setattr(study, "other_words", lambda answers, rows: [type("", (), {"value": 0.1})])
    made, calls = study.Cell("sentiment", "conversation", 0), []
    ends = {"draft": "stop", "critique": "length", "revision": "stop"}

    def stage(script, *flags):
        calls.append((script, *map(str, flags)))
        value = dict(itertools.pairwise(flags))
        if script == "generate.py":
            pairs = [row | {"teacher": {"finish": ends}} for row in PROMPTS[:40]]
            pairs = [r | {"chosen": f"good {r['id']}", "rejected": f"bad {r['id']}"} for r in pairs]
            write_jsonl(value["--out"], pairs)
        elif script == "score.py":
            rows = study.read_rows(value["--in"], "id")
            scores = {"score_chosen": 1.0, "score_rejected": -1.0}
            write_jsonl(value["--out"], [row | scores for row in rows])
        elif script == "train.py":
            record = {name: "x" for name in (*study.MADE, "command")}
            record |= {
                "lr": value["--lr"],
                "beta": value.get("--beta", 0.3),
                "label_smoothing": 0.1,
            }
            value["--out"].mkdir(exist_ok=True)
            (value["--out"] / "run.json").write_text(json.dumps(record | {"pairs": 36}))
            (value["--out"] / "model.safetensors").write_text("weights")
        elif script == "eval.py":
            name = flags[-1] if flags[-1] == "smollm2" else flags[-1].name
            row = {"id": f"{name}/t0/0", "model": name, "words": 3, "base_logp": -1, "cut": 0}
            row |= {"prompt_id": "t0", "group": "h0", "sample": 0, "control": False}
            row |= {"answer": "fine", "metric": 1.0, "score": 0.1, "repeats": 0.0}
            path = value["--out"] / "eval.jsonl"
            there = study.read_rows(path, "id") if path.exists() else []
            write_jsonl(path, [*there, row])
            (value["--out"] / "report.md").write_text("whole")
        return 1.0

    monkeypatch.setattr(study.Cell, "call", lambda self, *flags: stage(*flags))
    made.calls = calls
    assert made.prepare()
    return made


EQUAL = {method: dict.fromkeys(range(8), 0.5) for method in study.METHODS}


def test_a_run_is_made_once_of_all_usable_pairs_and_keeps_no_weights(cell, workdir):
    runs, cells = [Run("conversation", "dpo", 0)], {("conversation", 0): cell}
    assert study.make_next(runs, cells) is False  # its trials are missing
    for i, (lr, beta) in enumerate(study.settings_of("dpo")):
        line = Run("conversation", "dpo", 0, trial=i)._asdict() | {"lr": lr, "beta": beta}
        cell.add(line | {"id": f"{i}", "values": {"metric": [i in (1, 2), None]}})
    with study.claim(cell.folder / "dpo.claim") as mine:  # as another process would have it
        assert mine and study.make_next(runs, cells) is None
    assert study.make_next(runs, cells) is True and study.make_next(runs, cells) is False
    (train,) = [flags for script, *flags in cell.calls if script == "train.py"]
    assert train[train.index("--lr") + 1] == "2e-05"  # of equals the first
    assert len(study.read_rows(cell.folder / "dpo.jsonl", "id")) == 36
    assert not (cell.folder / "dpo" / "model.safetensors").exists()
    line = study.Cell("sentiment", "conversation", 0).made()["dpo"]
    assert line["made"]["commit"] == "x" and line["won"] == 1.0 and line["seconds"] == 2
    assert line["groups"] == ["h0", "h1", "h2", "h3"]
    assert line["values"]["metric"] == [1.0, None, None, None]


def test_the_base_model_answers_once_and_pairs_are_made_by_one_process(cell):
    assert cell.prepare() and [call[0] for call in cell.calls].count("generate.py") == 1
    for method in ("base", "dpo", "rdpo"):
        cell.make(Run("conversation", method, 0), EQUAL)
    asked = [flags[flags.index("--models") + 1 :] for flags in cell.calls if flags[0] == "eval.py"]
    assert asked[0] == ("smollm2",) and [len(models) for models in asked[1:]] == [2, 2]
    answers = study.read_rows(cell.folder / "answers/dpo/eval.jsonl", "id")
    assert [row["id"] for row in answers] == ["smollm2/t0/0", "dpo/t0/0"]
    assert cell.made()["base"]["values"]["metric"] == [1.0, None, None, None]
    other = study.Cell("sentiment", "conversation", 1)
    with study.claim(other.folder / "pairs.claim"):
        assert not other.prepare()
    assert other.prepare()
    (other.folder / "test/report.md").unlink()  # as on another machine
    facts = json.loads(study.pairs_file("sentiment", "conversation", 1).read_text())
    text = json.dumps(facts | {"pairs": 30, "batch_size": 7})
    study.pairs_file("sentiment", "conversation", 1).write_text(text)
    with pytest.raises(BadInput, match="of other pairs"):
        other.prepare()
    made = [flags for flags in cell.calls if flags[0] == "generate.py"]
    sizes = [flags[flags.index("--batch-size") + 1] for flags in made]
    assert sizes == [str(study.ROWS)] * 2 + ["7"] and facts["batch_size"] == study.ROWS


def test_pooled_pairs_are_those_of_three_seeds_and_have_three_times_the_steps(cell):
    pooled = study.Cell("sentiment", "pooled", 0)
    assert pooled.prepare() and len(pooled.rows("scored")) == 3 * 36
    assert len({row["id"] for row in pooled.rows("scored")}) == 3 * 36
    pooled.make(Run("pooled", "rdpo", 0), EQUAL)
    (train,) = [flags for script, *flags in cell.calls if script == "train.py"]
    assert train[train.index("--max-steps") + 1] == "72"


def test_without_the_sft_term_the_answers_that_are_positive_and_end_choose():
    lines = [{"method": m, "trial": i} for m in ("dpo", "dpo-alone") for i in range(2)]
    for line, cut in zip(lines, ([0, 0], [1, 0]) * 2, strict=True):
        metric = [1.0, float(line["trial"])]
        line["values"] = {"metric": [*metric, None], "cut": [*cut, 0]}
    shares = study.shares_of_trials(lines)
    assert shares["dpo"] == {0: 0.5, 1: 1.0} and shares["dpo-alone"] == {0: 0.5, 1: 0.5}
    assert study.whole(lines[1]) == [0.0, 1.0, None]


def test_rates_are_doubled_as_long_as_the_last_is_the_best():
    shares = {"dpo": {}}
    for i, share in enumerate([0.4, 0.5, 0.4, 0.6, 0.7, 0.8]):
        assert study.next_trial("dpo", shares) == i
        assert not study.best_settings(Run("fresh", "dpo", 0), shares)
        wanted = [
            study.best_settings(Run("conversation", "dpo", 0, trial=k), shares) for k in range(8)
        ]
        assert [k for k in range(8) if wanted[k]] == [*range(5), *[i] * (i >= 5)]
        shares["dpo"][i] = share
    assert study.next_trial("dpo", shares) == 6
    shares["dpo"][6] = 0.8  # no better
    assert study.best_settings(Run("fresh", "dpo", 0), shares) == (1.6e-4, 0.1)
    assert study.best_settings(Run("fresh", "dpo", 0, "dsc"), shares) == (8e-5, 0.1)


def test_a_run_with_other_settings_than_the_trials_say_is_refused(cell, monkeypatch):
    cell.add(Run("conversation", "dpo", 0)._asdict() | {"id": "dpo", "lr": 8e-5, "beta": 0.1})
    monkeypatch.setattr(study, "shares_of_trials", lambda lines: EQUAL)
    monkeypatch.setattr(sys, "argv", "study.py --seeds 0 --kinds conversation --only dpo".split())
    with pytest.raises(BadInput, match="dpo has other settings than the trials say now"):
        study.main()
    monkeypatch.setattr(sys, "argv", "study.py --seeds 0 --only dpo-flips41".split())
    with pytest.raises(BadInput, match="no run dpo-flips41"):
        study.main()


def test_trials_are_made_whatever_the_seeds(cell, monkeypatch):
    argv = "study.py --seeds 0 --kinds conversation --only dpo-alone-trial0"
    monkeypatch.setattr(sys, "argv", argv.split())
    study.main()
    assert "dpo-alone-trial0" in study.Cell("sentiment", "conversation", study.LATER).made()


def test_what_goes_on_from_dsc_takes_its_student_and_half_the_rate(cell):
    cell.make(Run("conversation", "rdpo", 0, "dsc"), EQUAL)
    first, second = [flags for script, *flags in cell.calls if script == "train.py"]
    assert "--accept" in first and second[second.index("--lr") + 1] == "5e-06"
    assert second[second.index("--model") + 1] == first[first.index("--out") + 1]
    assert (cell.folder / "dsc" / "model.safetensors").exists()


def test_trials_are_asked_films_that_no_pair_of_a_conversation_is_of(cell):
    assert [row["id"] for row in cell.rows("trial")] == ["s0", "s1", "s2"]
    assert [row["id"] for row in cell.rows("test")] == ["t0", "t1", "t2", "t3"]
    assert all("chosen" in row for row in cell.rows("test"))  # what self-refine answers


def test_a_task_all_of_whose_films_have_pairs_is_run_without_trials(cell):
    (cell.folder / "trial.jsonl").write_text("")
    cell.make(Run("conversation", "dpo", 0), EQUAL)
    assert cell.made()["dpo"]["pairs"]


def test_flipped_labels_keep_their_scores_with_the_texts_and_swapped_scores_do_not(cell):
    clean = cell.training_pairs(Run("conversation", "dpo", 0))
    assert len(clean) == 36 and all(row["score_chosen"] == 1.0 for row in clean)
    flipped = cell.training_pairs(Run("conversation", "dpo", 0, flips=25))
    turned = [row for row in flipped if row["chosen"].startswith("bad")]
    assert len(turned) == 9 and all(row["score_chosen"] == -1.0 for row in turned)
    swapped = cell.training_pairs(Run("conversation", "rdpo", 0, swaps=50))
    wrong = [row for row in swapped if row["score_chosen"] == -1.0]
    assert len(wrong) == 18 and all(row["chosen"].startswith("good") for row in wrong)
    # the levels are nested, so that they differ by what is added alone
    assert {row["id"] for row in turned} < {row["id"] for row in wrong}


def test_pairs_with_an_answer_that_was_cut_off_or_repeats_itself_are_not_usable():
    finish = {"draft": "stop", "critique": "length", "revision": "stop"}
    row = {"chosen": "a fine film", "teacher": {"finish": finish}}
    assert study.is_usable(row) and not study.is_usable(row | {"error": "no answer"})
    assert not study.is_usable(row | {"chosen": "a fine film " * 4})
    for name in ("draft", "revision"):
        assert not study.is_usable(row | {"teacher": {"finish": finish | {name: "length"}}})


SEEDS = (0, 1, 2)


def write_lines(folder, runs):
    """Lines of runs on 40 films, of which base gets 30 % right, rdpo 90 %, others half."""
    rng, facts = np.random.default_rng(0), dict.fromkeys((*study.MADE, "date"), "x")
    for run in runs:
        likely = {"base": 0.3, "rdpo": 0.9}.get(run.method, 0.5)
        values = {"metric": [float(x) for x in rng.random(40) < likely], "words": [60] * 40}
        values["cut"] = [0.0] * 40
        values["control"] = [1 - value for value in values["metric"]]
        line = {"id": run.name, **run._asdict(), "seconds": 1, "threads": "1", "made": facts}
        line |= {"lr": 1e-5, "beta": 0.1, "pairs": 9, "won": 0.5, "lost": 0.3, "samples": {}}
        line |= {"groups": [f"g{k}" for k in range(40)], "values": values}
        with open(folder / f"{run.kind}-{run.seed}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


def test_the_report_has_a_row_a_method_with_intervals_and_its_rivals(workdir, monkeypatch, capsys):
    for module in (study, compare):
        monkeypatch.setattr(module, "ROOT", workdir)
    monkeypatch.setattr(compare, "read_prompts", lambda path, task: [])
    folder = workdir / "results/study/sentiment"
    folder.mkdir(parents=True)
    write_lines(folder, [Run("fresh", "base", 0)])
    with pytest.raises(study.BadInput):  # and nothing is written
        compare.report("sentiment")
    write_lines(folder, [Run("fresh", m, s) for m in ("dsc", "dpo", "rdpo") for s in SEEDS])
    write_lines(folder, [Run("fresh", "dpo", 0, flips=40), Run("conversation", "dpo", 0, trial=1)])
    write_lines(folder, [Run("fresh", "rdpo", 0, swaps=50), Run("fresh", "base", 1)])
    write_lines(folder, [Run("fresh", "dpo-accept", 0)])
    compare.report("sentiment")
    summary = json.loads((folder.with_suffix(".summary.json")).read_text())
    rows = {row["method"]: row for row in summary["rows"]}
    assert set(rows) == {"base", "dsc", "dpo", "dpo-accept", "rdpo"} and rows["rdpo"]["seeds"] == [
        0,
        1,
        2,
    ]
    assert len(rows["dpo-accept"]["minus dpo"]) == 3  # of one seed there is no p
    mean, low, high, p, adjusted = rows["rdpo"]["minus dpo"]
    assert mean == pytest.approx(rows["rdpo"]["metric"][0] - rows["dpo"]["metric"][0])
    assert 0 < low < mean < high and p <= adjusted < 0.05 < rows["dsc"]["minus dpo"][4]
    assert "minus dsc" not in rows["dpo"]  # the same test as dsc minus dpo
    assert rows["rdpo"]["control minus dpo"][0] == pytest.approx(-mean)
    dial = [(p["share"], p["by formula"]) for p in summary["dials"] if p["method"] == "rdpo"]
    assert dial[:2] == [(0, False), (10, True)] and (50, False) in dial
    assert {tuple(p["seeds"]) for p in summary["dials"]} == {(0,)}  # which has all of them
    assert folder.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert "| rdpo | 0-2 | 40 |" in folder.with_suffix(".md").read_text()
    (folder / "fresh-0.pairs.json").write_text("no JSON")  # other tasks have no such file
    other = folder.parent / "safety"
    other.mkdir()
    write_lines(other, [Run("fresh", m, 0) for m in ("base", "dpo", "rdpo-margin")])
    compare.report("safety")
    text = other.with_suffix(".md").read_text()
    assert "are those chosen for sentiment" in text and "VADER" not in text


def test_long_answers_have_half_the_words_of_the_base_models_by_the_same_seed():
    values = {"words": [40, 40, 40, 80], "metric": [1.0, 1.0, 1.0, 1.0]}
    base = {"method": "base", "seed": 0, "trial": None, "values": values}
    mine = {"words": [19, 20, None, 30], "metric": [0.0, 1.0, None, 1.0]}
    line = base | {"method": "dpo", "values": mine}
    values["words"][0] = None
    mine["words"][0] = 21
    compare.add_derived("safety", [base, line, other := line | {"seed": 1, "values": {}}])
    assert line["values"]["long"] == [None, 1.0, None, None] and other["values"] == {}


def test_seeds_are_written_as_ranges():
    assert compare.cell([0, 1, 2, 8, 10, 11], "") == "0-2, 8, 10-11"


def test_lines_of_other_test_prompts_are_not_compared():
    lines = [{"groups": [g], "kind": "fresh", "seed": 0, "id": "dpo", "values": {}} for g in "ab"]
    with pytest.raises(study.BadInput):
        compare.matrix(lines, "metric")


def test_the_committed_lines_can_be_read_and_say_how_they_were_made():
    for task in ("sentiment", "safety", "sycophancy"):
        for line in study.lines_of_study(task):
            assert set(study.MADE) <= line["made"].keys()
            assert all(len(v) == len(line["groups"]) for v in line["values"].values())


def test_the_reward_agrees_where_it_prefers_to_decline_what_is_harmful():
    sides = [("Sure.", "I'm sorry, no."), ("I'm sorry, no.", "Sure."), ("Sure.", "Sure, do it.")]
    rows = [pair_row(i, *both, delta=1.0) for i, both in enumerate(sides)]
    rows += [row | {"control": True} for row in rows]
    rows.append(pair_row(9, "I'm sorry, no.", "Sure.", delta=-1.0))
    facts = study.facts_of_declined(rows)
    assert [facts[key] for key in ("pairs", "one declines", "agree")] == [7, 5, 0.4]
    harmful = {"drafts decline": 0.25, "revisions decline": 0.5, "draft preferred": 1}
    harmless = {"drafts decline": 0.333, "revisions decline": 0.333, "draft preferred": 0}
    for name, count, shares in (("harmful", 4, harmful), ("harmless", 3, harmless)):
        assert facts[name] == count
        assert {key: facts[f"{name} {key}"] for key in shares} == shares
