"""Every notebook runs from top to bottom, as a reader would run it, and its sliders move its figures."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
MOVE_EVERY_SLIDER = """
import io

import ipywidgets


def drawn(figure):
    figure.savefig(buffer := io.BytesIO(), format="png")
    return buffer.getvalue()


boxes = [value for name, value in list(globals().items())
         if isinstance(value, ipywidgets.interactive) and not name.startswith("_")]
assert boxes
for box in boxes:
    assert box.auto_display  # else a reader would see sliders and no figure
    for slider in box.kwargs_widgets:
        if not hasattr(slider, "max"):
            continue
        slider.value = -(10**9)  # a value beyond its end stops at the end
        low = drawn(box.result)
        slider.value = 10**9
        assert drawn(box.result) != low, slider.description
print(len(boxes), "sliders moved")
"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom_and_its_sliders_move_its_figures(path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")  # a reader has the defaults
    notebook = nbformat.read(path, as_version=4)
    if "interactive(" in path.read_text(encoding="utf-8"):
        notebook.cells.append(nbformat.v4.new_code_cell(MOVE_EVERY_SLIDER))
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()


def test_a_cell_that_raises_fails_the_run():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 == 2")])
    with pytest.raises(Exception, match="AssertionError"):
        NotebookClient(notebook, kernel_name="python3").execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_small_and_clean(path):
    assert path.stat().st_size < 300_000
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("execution_count") for cell in notebook.cells)
    assert "/home/" not in path.read_text() and "/tmp/" not in path.read_text()
