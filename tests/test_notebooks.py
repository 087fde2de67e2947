"""Every notebook runs from top to bottom, as a reader would run it, and its sliders change its figures."""

import importlib
import os
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
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
