"""Run notebooks from top to bottom and write their outputs, cleaned, into them.

    python notebooks/run.py                     # all of them
    python notebooks/run.py 02_loss_math        # this one
    python notebooks/run.py --handout           # run none: write copies without the solutions into handout/

Removed: execution counts, times, widgets (blank without a kernel) and stderr. Figures get a palette of 64 colours.
"""

import base64
import io
import os
import re
import shutil
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.output_widget import OutputWidget
from PIL import Image

FOLDER = Path(__file__).resolve().parent
SOLUTION = re.compile(r"<details><summary>Solution</summary>.*?</details>\n*", re.DOTALL)
WIDGET = "application/vnd.jupyter.widget-view+json"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the kernels: with more, threads of small models wait for each other


class SilentOutput(OutputWidget):
    """The place of a slider's figure. It does not send the figure back to the kernel, which does not need it.

    nbclient sends it on the channel on which it waits for the end of the cell, and then sometimes misses the end and
    waits for its timeout (github.com/jupyter/nbclient/issues/312).
    """

    def send(self, *_, **__) -> None:
        """Send nothing."""


def execute(notebook, folder: Path = FOLDER, timeout: int = 900) -> None:
    """Run all cells of a notebook in a new kernel, and leave their outputs in it.

    Raises:
        CellExecutionError: a cell raised an exception.
    """
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": folder}})
    client.widget_registry["@jupyter-widgets/output"]["OutputModel"] = SilentOutput
    client.execute()


def clean_outputs(outputs):
    """Return the outputs of a cell as they are committed, with consecutive pieces of printed text joined."""
    kept = []
    for output in filter(None, map(clean_output, outputs)):
        if kept and output.output_type == kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def clean_output(output):
    """Return an output as it is committed, or None if it is removed."""
    if output.get("name") == "stderr" or WIDGET in output.get("data", {}):
        return None
    if "execution_count" in output:
        output.execution_count = None
    if "image/png" in output.get("data", {}):
        image = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")
        image.quantize(64, dither=Image.Dither.NONE).save(buffer := io.BytesIO(), "PNG", optimize=True)
        output.data = {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": "<Figure>"}
        output.metadata = {}
    return output


def run(path: Path) -> None:
    """Execute a notebook in its folder, and write it back with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    since = time.time()
    execute(notebook)
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = clean_outputs(cell.outputs)
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
    written = nbformat.writes(notebook)
    for private in (str(FOLDER.parent), str(Path.home()) + "/", "/tmp/"):
        if private in written:
            raise ValueError(f"an output of {path.name} contains {private}: print less")
    path.write_text(written + "\n", encoding="utf-8")
    print(f"{path.name}: {time.time() - since:.0f} s, {path.stat().st_size / 1000:.0f} kB")


def write_handout(folder: Path) -> None:
    """Write a copy of each notebook without the solutions of its exercises, and plots.py, which they import."""
    folder.mkdir(exist_ok=True)
    shutil.copy(FOLDER / "plots.py", folder)
    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = SOLUTION.sub("", cell.source)
        nbformat.write(notebook, folder / path.name)


if __name__ == "__main__":
    if sys.argv[1:] == ["--handout"]:
        sys.exit(write_handout(FOLDER.parent / "handout"))  # beside notebooks/, for the relative paths in the cells
    chosen = [FOLDER / f"{Path(name).stem}.ipynb" for name in sys.argv[1:]]
    for path in chosen or sorted(FOLDER.glob("*.ipynb")):
        run(path)
