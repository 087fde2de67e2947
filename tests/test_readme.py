"""What the README shows is run as it stands there: its commands, in their order, in one folder, and its scripts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import environment
from test_recipes import model_files

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MY_YAML = """teacher_model: path/or/hub-id
student_model: path/or/hub-id
dataset: chats.jsonl
max_length: 256
batch_size: 1
max_steps: 4
"""


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def commands() -> list[str]:
    """Every command in the README that has arguments, from blocks of bash and from the text, in order."""
    found = re.findall(r"```bash\n(.*?)```|`((?:python -m kdkit|accelerate launch)[^`\n]* [^`\n]*)`", README, re.DOTALL)
    lines = [re.sub(r"\\\n\s*", "", block or inline).splitlines() for block, inline in found]
    return [line for each in lines for line in each if line.startswith(("python -m kdkit", "accelerate launch"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as the README has it in mind: recipes, configurations, a model, chats, and a YAML file."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("recipes", "accelerate_configs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "path/or/hub-id").mkdir(parents=True)
    model_files("any/llama", folder / "path/or/hub-id")
    (folder / "my.yaml").write_text(MY_YAML)
    (record,) = blocks("json")
    assert json.loads(record)["messages"][-1]["role"] == "assistant"
    (folder / "chats.jsonl").write_text(
        "".join(record.replace("raining", f"raining at {i} o'clock") for i in range(60))
    )
    script = blocks("python")[-1].replace("import DistillConfig", "import load_config")
    (folder / "script.py").write_text(re.sub(r"DistillConfig\(.*?\)", "load_config()", script))
    return folder


def run(command: str, folder: Path) -> subprocess.CompletedProcess:
    """Run a command line with the python and the accelerate of this environment, on a machine without a GPU."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = environment(PATH=path, CUDA_VISIBLE_DEVICES="99")  # none has this number
    return subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_commands_of_the_readme_run(folder):
    found, refused = commands(), {}
    assert len(found) >= 14
    for command in found:
        result = run(command, folder)
        if result.returncode:
            refused[command] = result.stderr
        elif command.startswith("python -m kdkit.evaluate runs/demo_ce runs/demo"):
            check_table(result.stdout)
    (command,) = refused
    assert "fsdp.yaml" in command and "kdkit: the launcher asked for 8 processes, but no GPU" in refused[command]


def check_table(printed: str) -> None:
    """Check the comparison that the README shows: other CPUs round differently, which 500 steps enlarge a little."""
    (shown,) = [block for block in blocks("") if "held-out CE" in block]
    for line in shown.strip().splitlines()[1:]:
        name = line.split("  ")[0]
        (again,) = [other for other in printed.splitlines() if other.startswith(name)]
        numbers, expected = ([float(x.rstrip("M%")) for x in re.findall(r"\d+\.\d+", text)] for text in (again, line))
        assert numbers == pytest.approx(expected, rel=0.05), again


@pytest.mark.slow
def test_scripts_of_the_readme_run_and_their_runs_can_be_compared(folder):
    scripts = blocks("python")
    assert len(scripts) == 3
    for number, script in enumerate(scripts):
        assert len([line for line in script.splitlines() if line.strip()]) < 10
        (folder / f"{number}.py").write_text(script)
        result = run(f"python {number}.py", folder)
        assert result.returncode == 0, result.stderr
    events = [json.loads(line) for line in (folder / "runs/top5/metrics.jsonl").read_text().splitlines()]
    assert 0.1 < events[-1]["eval/top5"] <= 1
    compared = run("python -m kdkit.evaluate runs/squares runs/top5 runs/sgd", folder)
    assert compared.returncode == 0, compared.stderr
    assert "squares(T=1)" in compared.stdout
