"""The code in docs/teaching.md and docs/exam_answers.md runs as it stands there, and each question has an answer."""

import re
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from kdkit import train

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def own_pair(small, tmp_path, monkeypatch):
    """The names that the block of docs/teaching.md defines, with a run of a few steps as runs/demo."""
    monkeypatch.syspath_prepend(DOCS.parent / "notebooks")
    train.train(small(output_dir=str(tmp_path / "runs" / "demo")))
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    names = {}
    (block,) = blocks("teaching.md")
    exec(block, names)
    return names


def test_every_figure_can_be_drawn_of_ones_own_pair(own_pair, tmp_path):
    calls = re.findall(r"^\| `(plots\..*?)` \|", (DOCS / "teaching.md").read_text(encoding="utf-8"), re.MULTILINE)
    for call in calls:
        figure = eval(call, own_pair)
        assert isinstance(figure, Figure), call
        figure.savefig(tmp_path / f"{call[6:12]}.png")
    functions = re.findall(r"^def ([a-z]\w+)\(", (DOCS.parent / "notebooks/plots.py").read_text(), re.MULTILINE)
    assert {call.partition("(")[0].removeprefix("plots.") for call in calls} >= set(functions)


@pytest.mark.parametrize("block", blocks("exam_answers.md"), ids=lambda block: "question " + block.splitlines()[0][2:])
def test_answer_of_the_exam_holds(block):
    torch.manual_seed(0)
    assert "assert" in block
    exec(block, {})


def test_each_question_of_the_exam_has_an_answer_of_the_same_number_and_name():
    questions, answers = (
        re.findall(r"^\*\*(\d+\. [^.]+)\.\*\*", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
        for page in ("exam.md", "exam_answers.md")
    )
    assert questions == answers and len(questions) == 12
