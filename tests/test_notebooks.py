"""Every notebook runs from top to bottom, its sliders change its figures, and its prose quotes its stored outputs.

Prose marks a number that it takes from an output with `<samp>`, HTML's tag for the output of a program:
`<samp>2.7</samp>` quotes the nearest code cell above that has printed numbers, `<samp title="heldout">2.7</samp>` the
cell `heldout`, and `<samp title="05_evaluate/results">2.7</samp>` a cell of another notebook.
"""

import importlib
import os
import re
from decimal import Decimal
from functools import cache
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUOTE = re.compile(r'<samp(?: title="([^"]+)")?>(.*?)</samp>', re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?")
MOVE_EVERY_SLIDER = """
import io

import ipywidgets


def image(figure):
    figure.savefig(buffer := io.BytesIO(), format="png")
    return buffer.getvalue()


boxes = [value for name, value in list(globals().items())
         if isinstance(value, ipywidgets.interactive) and not name.startswith("_")]
assert boxes
for box in boxes:
    assert box.auto_display  # otherwise a reader sees sliders, but no figure
    for slider in box.kwargs_widgets:
        if not hasattr(slider, "max"):
            continue
        slider.value = -(10**9)  # a value out of range is set to the end of the range
        low = image(box.result)
        slider.value = 10**9
        assert image(box.result) != low, slider.description
"""


@pytest.fixture
def execute(monkeypatch):
    """`execute` of notebooks/run.py, with the defaults of a reader, except for one OpenMP thread."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # several threads of models this small wait for each other
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    monkeypatch.syspath_prepend(ROOT / "notebooks")
    return importlib.import_module("run").execute


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_its_sliders_change_its_figures(path, execute):
    notebook = nbformat.read(path, as_version=4)
    if "interactive(" in path.read_text(encoding="utf-8"):
        notebook.cells.append(nbformat.v4.new_code_cell(MOVE_EVERY_SLIDER))
    execute(notebook)


@pytest.mark.slow
def test_notebook_with_a_cell_that_raises_fails(execute):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 == 2")])
    with pytest.raises(CellExecutionError, match="AssertionError"):
        execute(notebook)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_is_small_and_has_clean_outputs(path):
    text = path.read_text(encoding="utf-8")
    cells = [cell for cell in nbformat.reads(text, as_version=4).cells if cell.cell_type == "code"]
    assert len(text) < 300_000
    assert any(cell.outputs for cell in cells)
    assert not any(cell.execution_count for cell in cells)
    assert not any(output.get("name") == "stderr" for cell in cells for output in cell.outputs)
    assert "/home/" not in text and "/tmp/" not in text


def numbers(text):
    return [Decimal(number.replace(",", "")) for number in NUMBER.findall(text)]


def printed_numbers(cell):
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.get("outputs", [])]
    return numbers("\n".join(texts))


@cache
def printed_in(name):
    """Return the printed numbers of each cell of a committed notebook."""
    notebook = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)
    return {cell.id: printed_numbers(cell) for cell in notebook.cells}


def is_rounded(quoted, printed):
    """Whether `quoted` is `printed`, rounded to its last digit, or for a whole number within 1 %."""
    exponent = quoted.as_tuple().exponent
    tolerance = Decimal("0.5").scaleb(exponent)
    return abs(printed - quoted) <= (max(tolerance, abs(quoted) / 100) if exponent == 0 else tolerance)


def wrong_quotes(notebook):
    """Return the numbers in <samp> that the output which they quote does not have."""
    cells, above, wrong = {cell.id: printed_numbers(cell) for cell in notebook.cells}, [], []
    for cell in notebook.cells:
        above = cells[cell.id] or above
        for title, text in QUOTE.findall(cell.source if cell.cell_type == "markdown" else ""):
            name, _, key = title.rpartition("/")
            printed = (printed_in(name) if name else cells).get(key, []) if title else above
            missing = [str(n) for n in numbers(text) if not any(is_rounded(n, each) for each in printed)]
            wrong += [f"cell {cell.id}: {text}: {number}" for number in missing or ["no number"] * (not numbers(text))]
    return wrong


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_quoted_numbers_are_those_of_the_stored_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    assert any(QUOTE.search(cell.source) for cell in notebook.cells)
    assert not wrong_quotes(notebook)


@pytest.mark.parametrize(
    ("prose", "is_right"),
    [
        ("<samp>2.7</samp> nats, <samp>80 %</samp> of <samp>2,200</samp>, <samp>2.701 and 80.2</samp>", True),
        ("a mean of <samp>2.8</samp>", False),
        ("a mean of <samp>2.711</samp>", False),
        ("<samp>79 %</samp> of it", False),
        ("<samp>2.7 and 3.1</samp>", False),
        ("less than <samp>1e-4</samp>", True),
        ('first <samp title="first">0.5</samp>', True),
        ('first <samp title="second">0.5</samp>', False),
        ('no such cell: <samp title="third">0.5</samp>', False),
        ('another notebook: <samp title="01_teacher_inspection/pair">1,024</samp>', True),
        ('another notebook: <samp title="01_teacher_inspection/pair">1,124</samp>', False),
        ("no number: <samp>few</samp>", False),
    ],
)
def test_an_altered_quote_is_found(prose, is_right):
    cells = [nbformat.v4.new_code_cell(id=name) for name in ("first", "second", "figure")]
    cells[0].outputs = [nbformat.v4.new_output("stream", text="loss 0.5\n")]
    cells[1].outputs = [nbformat.v4.new_output("stream", text="mean 2.701, top-10 80.2% of 2,207: below 1e-4\n")]
    cells[2].outputs = [nbformat.v4.new_output("display_data", data={"image/png": "", "text/plain": "<Figure>"})]
    notebook = nbformat.v4.new_notebook(cells=[*cells, nbformat.v4.new_markdown_cell(prose)])
    assert (not wrong_quotes(notebook)) == is_right
