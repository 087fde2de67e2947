"""Let three teachers of different size and training teach one small student: is the best teacher the best one to have?

python benchmarks/capacity_gap.py                # two teachers, 12 students, three seeds: 8 minutes
python benchmarks/capacity_gap.py --max_steps 2000 --results benchmarks/capacity_gap_2000.json      # 20 minutes
python benchmarks/capacity_gap.py --only table   # print the table of an earlier run

Mirzadeh et al. 2020 (arXiv:1902.03393) and Cho and Hariharan 2019 (arXiv:1910.01348) found that a teacher may be too
strong for a small student: beyond some strength the student gets worse. Busbridge et al. 2025 (arXiv:2502.08606) fit
this capacity gap for language models. All text is used, so that a student needs no teacher to protect it from
overfitting. Writes capacity_gap.json; a repeated call trains only the models that are missing.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from divergences import complete, differences, means, measure, train_quietly
from transformers import AutoConfig

from kdkit.models import ASSETS

# name -> changes of the embedded student's shape, optimizer steps; the third is recipes/train_embedded_teacher.py's
TEACHERS = {
    "small": ({}, 600),
    "medium": ({"hidden_size": 192, "intermediate_size": 448, "num_hidden_layers": 3}, 1000),
}
LARGE = "embedded"
STUDENT = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 2, "num_key_value_heads": 2}
ARMS = ("no teacher", *TEACHERS, "large")
COLUMNS = {
    "teacher's CE": "eval/teacher_ce_loss", "student's CE": "eval/ce_loss", "KL to its teacher": "eval/kl_t1",
    "top-1 agreement": "eval/top1_agreement", "acceptance": "eval/acceptance_rate",
}  # fmt: skip


def shape(folder: Path, changes: dict) -> str:
    """Write the configuration of a model with random weights into a folder, and return its name."""
    config = AutoConfig.from_pretrained(ASSETS / "embedded_student")
    config.update(changes)
    config.head_dim = config.hidden_size // config.num_attention_heads
    config.save_pretrained(folder)
    return str(folder)


def teacher(name: str, folder: Path, steps: float) -> str:
    """Return the folder of a teacher, which is trained on the labels of all text if it is not there."""
    if name not in TEACHERS:
        return LARGE
    made, (changes, max_steps) = folder / name, TEACHERS[name]
    if not (made / "final" / "config.json").is_file():
        train_quietly(str(made), student_model=shape(folder / f"{name}_shape", changes), student_random_init=True,
                      alpha=1.0, seed=7, max_steps=max(1, int(steps * max_steps)), max_train_tokens=None,
                      resume="never")  # fmt: skip
    return str(made / "final")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["table"], help="table: print that of an earlier run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max_steps", type=int, default=500, help="of a student")
    parser.add_argument("--teacher_steps", type=float, default=1.0, help="a fraction of the teachers' steps")
    parser.add_argument("--eval_tokens", type=int, default=20_000)
    parser.add_argument("--teachers", type=Path, default=Path("runs/capacity_gap"), help="the folder of the teachers")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # for models this small, more threads are slower
    settings = {"max_steps": arguments.max_steps, "teacher_steps": arguments.teacher_steps,
                "eval_tokens": arguments.eval_tokens}  # fmt: skip

    def run(arm: str, seed: int) -> dict[str, float]:
        name = teacher(arm, arguments.teachers, arguments.teacher_steps)
        with tempfile.TemporaryDirectory() as folder:
            train_quietly(f"{folder}/run", student_model=shape(Path(folder) / "shape", STUDENT), seed=seed,
                          student_random_init=True, teacher_model=name, alpha=1.0 if arm == "no teacher" else 0.0,
                          max_steps=arguments.max_steps, max_train_tokens=None)  # fmt: skip
            return measure(f"{folder}/run/final", name, arguments.eval_tokens, own=False)

    jobs = [] if arguments.only else [(arm, seed) for seed in range(arguments.seeds) for arm in ARMS]
    if arguments.only:
        settings = json.loads(arguments.results.read_text(encoding="utf-8"))["settings"]
    results = complete(arguments.results, settings, jobs, run)
    print(json.loads(arguments.results.read_text(encoding="utf-8"))["made"])
    means(results, COLUMNS)  # the student without a teacher is compared with the large one
    differences(results, {"student's CE": "eval/ce_loss"}, "large")


if __name__ == "__main__":
    main()
