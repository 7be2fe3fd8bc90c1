"""The page: its pictures show the numbers of the files in results/, its task loads, its links lead somewhere."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "results"))

import pictures  # noqa: E402

import prompts  # noqa: E402


def widths(axis):
    """Lengths of the horizontal bars of an axis, from top to bottom."""
    return [bar.get_width() for bar in axis.patches]


def test_study_bars_equal_the_summary():
    rows = json.loads((ROOT / "results/study/sentiment.summary.json").read_text())["rows"]
    rows = [row for row in rows if (row["kind"], row["start"]) == ("conversation", "base")]
    by_method = {row["method"]: row for row in rows}
    axis = pictures.draw_study().axes[0]
    found = widths(axis)  # positive, and positive and ended, in turn
    labels = [label.get_text() for label in axis.get_yticklabels()]
    for i, method in enumerate(pictures.METHODS):
        row = by_method[method]
        assert found[2 * i] == pytest.approx(100 * row["metric"][0])
        assert found[2 * i + 1] == pytest.approx(100 * row["whole"][0])
        assert list(axis.lines[i].get_xdata()) == pytest.approx(
            [100 * end for end in row["metric"][1:3]]
        )
        assert labels[i].endswith(f"({len(row['seeds'])})")


def test_trainer_bars_equal_the_measured_speeds():
    rows = json.loads((ROOT / "results/bench-train/result.json").read_text())["measured"]
    for axis, name in zip(pictures.draw_trainer().axes, pictures.SETS, strict=True):
        speeds = {
            row["off"]: row["tokens_per_second"]
            for row in rows
            if (row["set"], row["who"]) == (name, "ours")
        }
        trl = [
            row["tokens_per_second"] for row in rows if row["set"] == name and row["who"] == "trl"
        ]
        expected = [max(trl), *(speeds[off] for off in pictures.FEATURES)]
        assert widths(axis) == pytest.approx(expected)


def test_kernel_bars_equal_the_benchmarks():
    axes = pictures.draw_kernel().axes
    for name, shape, three in (
        ("gpu/kernel", "llama3", axes[:3]),
        ("kernel", "smollm2-1k", axes[3:]),
    ):
        shapes = json.loads((ROOT / f"results/{name}/bench.json").read_text())["shapes"]
        rows = next(s for s in shapes if (s["name"], s["dtype"]) == (shape, "bf16"))["rows"]
        by_method = {row["method"]: row for row in rows}
        rows = [by_method[method] for method in pictures.KERNELS]
        assert widths(three[0]) == pytest.approx([row["both_ms"] for row in rows])
        assert widths(three[1]) == pytest.approx([row["peak_bytes"] / 1e6 for row in rows])
        assert widths(three[2]) == pytest.approx([row["error_nats"] for row in rows])


def test_loss_curves_have_the_closed_forms_and_their_gradients():
    z, settings = torch.tensor([-2.0, 0.0, 3.0]), {"beta": 0.1, "tau": 0.5}
    losses, slopes = pictures.loss_curves("rdpo", -1.0, z, settings)
    p = torch.sigmoid(torch.tensor(-2.0))
    torch.testing.assert_close(losses[1].item(), torch.tensor(2.0).log().item())
    torch.testing.assert_close(slopes, torch.sigmoid(z) - p)
    _, slopes = pictures.loss_curves("rdpo-margin", 1.0, z, settings)
    torch.testing.assert_close(slopes, torch.sigmoid(z - 2) - 1)


def test_pictures_in_the_repository_are_those_that_the_command_makes(tmp_path):
    pictures.main(tmp_path)
    number = re.compile(r"-?\d+\.\d+")
    for name in pictures.PICTURES:
        made = (tmp_path / f"{name}.svg").read_text()
        kept = (ROOT / f"results/pictures/{name}.svg").read_text()
        hint = f"{name}.svg is out of date: python results/pictures.py"
        assert number.sub("", made) == number.sub("", kept), hint
        # Another processor may round the last digit of a coordinate otherwise.
        made, kept = (list(map(float, number.findall(text))) for text in (made, kept))
        assert made == pytest.approx(kept, abs=1e-3), hint


def test_the_readmes_task_loads(tmp_path, monkeypatch):
    text = re.search(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)[1]
    (tmp_path / "brief.toml").write_text(text)
    monkeypatch.setattr(prompts, "FOLDER", tmp_path)
    task = prompts.load_task("brief")
    assert {"fresh", "contrast", "metric"} <= task.keys()


def headings(path):
    """The anchors of a Markdown file, as GitHub names them."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    titles = [title.lower().replace(" ", "-") for title in re.findall(r"(?m)^#+ (.*)", text)]
    return {re.sub(r"[^\w-]", "", title) for title in titles}


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "results").rglob("*.md"))], ids=str
)
def test_links_lead_to_files_and_headings(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        if not name.startswith("http"):
            target = path.parent / name if name else path
            assert target.exists(), link
            assert not anchor or anchor in headings(target), link
