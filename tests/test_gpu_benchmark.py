"""benchmarks/gpu.py runs from end to end on a CPU, and its three teachers and the other losses give the same loss."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
spec = importlib.util.spec_from_file_location("gpu", BENCHMARKS / "gpu.py")
gpu = importlib.util.module_from_spec(spec)
sys.modules["gpu"] = gpu
spec.loader.exec_module(gpu)


def test_gpu_benchmark_on_a_cpu(capsys, monkeypatch):
    for name in ("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # the script changes these: this restores them
    monkeypatch.setattr(
        gpu.implementations, "peers", lambda: ({"another": gpu.implementations.naive}, ["x is skipped"])
    )
    gpu.main(["--device", "cpu", "--tiny"])
    output = capsys.readouterr().out
    steps, loss_alone = output.split("The loss alone")
    assert "out of memory" not in output and "x is skipped" in output

    tables = {}
    for part in (steps, loss_alone):
        rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in part.splitlines() if line.startswith("| ")]
        (columns, *rows) = rows
        for row in rows:
            tables[row[0]] = dict(zip(columns, row, strict=True))
    assert list(tables) == ["online", "offload", "stored", "online, another", "kdkit", "another", "naive"]
    losses = [float(tables[name]["last loss"]) for name in ("online", "offload", "stored")]
    assert losses[0] == losses[1] == pytest.approx(losses[2], abs=1e-3)
    assert float(tables["online, another"]["last loss"]) == pytest.approx(losses[0], rel=0.01)
    assert float(tables["kdkit"]["loss"]) == pytest.approx(float(tables["naive"]["loss"]), rel=0.01)
    times = [cell for row in tables.values() for column, cell in row.items() if "ms" in column]
    assert times and all(float(cell) > 0 for cell in times)
    assert re.search(r"reaches [\d.]+ TFLOP/s", steps)
