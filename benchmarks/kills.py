"""Kill a run many times, restart it each time, and compare its result with that of a run that is never killed.

    python benchmarks/kills.py                          # 52 kills, 12 of them of one of two ranks; 15 minutes
    python benchmarks/kills.py --kills 10 --of_two 0    # 10 kills of a single process

Each restart is the same command. A thread sends SIGKILL to its own process, at a random time after a call of one of the
functions in MOMENTS.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOMENTS = {  # what the run is doing -> the function of `kdkit.train` that does it
    "between micro-batches": "send_to_device",
    "in an evaluation": "evaluate",
    "in a save": "save_checkpoint",
    "while resuming": "load_checkpoint",
    "while exporting": "export",
    "anywhere": None,
}
RUN = {
    "max_train_tokens": 3000, "max_eval_tokens": 600, "max_length": 64, "batch_size": 2, "alpha": 0.3,
    "gradient_accumulation_steps": 2, "logging_steps": 1, "save_steps": 4, "eval_steps": 3, "use_wandb": False,
}  # fmt: skip


# --- in the process that is killed


def live(arguments: list[str]) -> None:
    """Run `kdkit.train`, and kill it as the environment variable KILL says, if that names this rank."""
    order = os.environ.get("KILL", "")
    rank, moment, call, fraction = order.split("/") if order else ("none", "", 0, 0)
    mine = rank == os.environ.get("RANK", "0")
    if mine and moment == "anywhere":
        _kill_after(float(fraction) * 12, moment, lambda: True)  # seconds; the start takes most of them
    import kdkit.train

    if mine and MOMENTS[moment]:
        _kill_in(kdkit.train, MOMENTS[moment], moment, int(call), float(fraction))
    kdkit.train.main(arguments)


def _kill_in(module, name: str, moment: str, call: int, fraction: float) -> None:
    """Kill the process in the given call of a function, after a fraction of the time that the previous call took."""
    function, calls, inside, took = getattr(module, name), [], [], [0.02]

    def wrapped(*arguments, **options):
        calls.append(1)
        inside.append(1)
        if len(calls) == call:
            _kill_after(fraction * took[-1], moment, lambda: inside or name == "send_to_device")
        started = time.perf_counter()
        result = function(*arguments, **options)
        took.append(time.perf_counter() - started)
        inside.pop()
        return result

    setattr(module, name, wrapped)


def _kill_after(seconds: float, moment: str, inside) -> None:
    def kill():
        time.sleep(seconds)
        os.write(2, f"\nKILLED {moment if inside() else 'anywhere'}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()


# --- in the process that starts and restarts it


def command(output_dir: Path, num_ranks: int, fields: dict) -> list[str]:
    """Return the command that runs one rank, or two ranks with FSDP."""
    config = str(ROOT / "accelerate_configs" / "fsdp_cpu.yaml")
    launcher = ["-m", "accelerate.commands.launch", "--config_file", config, "--mixed_precision", "no"]
    program = [__file__, "--live", *(f"--{k}={v}" for k, v in {**RUN, **fields, "output_dir": output_dir}.items())]
    return [sys.executable, *(launcher if num_ranks == 2 else []), *program]


def start(output_dir: Path, num_ranks: int, fields: dict, kill: str = "") -> tuple[bool, str]:
    """Start a run once. Return whether it finished, and what it printed."""
    environment = {**os.environ, "KILL": kill, "ACCELERATE_MIXED_PRECISION": "no", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = str(ROOT)  # import kdkit from this clone, not an installed one
    life = subprocess.run(
        command(output_dir, num_ranks, fields), env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, timeout=600,
    )  # fmt: skip
    assert life.returncode == 0 or "KILLED" in life.stdout, life.stdout[-5000:]
    return life.returncode == 0, life.stdout


def series(folder: Path, moments: list[str], num_ranks: int, max_steps: int, seed: int = 0) -> dict:
    """Start a run once for each of these moments, kill it there, and then let it finish.

    Returns:
        `kills` (the number for each moment), `restarts`, `lost` (how many steps before a complete checkpoint were
        repeated, over all restarts), `once` (whether metrics.jsonl has each step once, with the numbers of the run that
        is never killed) and `equal` (whether the final weights are equal bit for bit).
    """
    from safetensors.torch import load_file

    from kdkit.running.checkpoint import checkpoints
    from kdkit.running.tracking import read_metrics

    choose, fields = random.Random(seed), {"max_steps": max_steps}
    disturbed, alone = folder / f"disturbed_{num_ranks}", folder / f"alone_{num_ranks}"
    assert (alone / "final").exists() or start(alone, num_ranks, fields)[0]
    kills, lives, lost, complete = Counter(), 0, 0, 0
    for moment in [*moments, ""]:
        calls = {"between micro-batches": 16, "in a save": 3, "in an evaluation": 4}.get(moment, 1)
        kill = f"{choose.randrange(num_ranks)}/{moment}/{choose.randint(1, calls)}/{choose.random()}" if moment else ""
        ended, said = start(disturbed, num_ranks, fields, kill)
        lives += 1
        if resumed := re.search(r"resume .*step_(\d+)", said):
            lost += max(0, complete - int(resumed[1]))
        elif "metrics  " in said:
            lost += complete  # it started from step 0
        found = re.search("KILLED (.*)", said)
        kills.update([found[1]] if found else [])
        complete = max([complete, *(int(path.name[5:]) for path in checkpoints(disturbed))])
        print(
            f"  {num_ranks} ranks, life {lives}: {'ended' if ended else kill}; newest checkpoint {complete}", flush=True
        )

    def numbers(run: Path) -> list[dict]:
        events = read_metrics(run / "metrics.jsonl")
        return [{k: v for k, v in event.items() if k != "train/tokens_per_second"} for event in events]

    steps = [event["train/step"] for event in numbers(disturbed) if "train/step" in event]
    ours, theirs = (load_file(run / "final" / "model.safetensors") for run in (disturbed, alone))
    return {
        "kills": kills,
        "restarts": lives - 1,
        "lost": lost,
        "once": steps == list(range(1, max_steps + 1)) and numbers(disturbed) == numbers(alone),
        "equal": ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40, help="kills of a single process")
    parser.add_argument("--of_two", type=int, default=12, help="kills of one rank of two")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    names = [moment for moment in MOMENTS if moment != "while exporting"]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for num_ranks, count in ((1, arguments.kills), (2, arguments.of_two)):
            if count:
                exports = max(1, count // 6)  # at the end, when there is a trained student to export
                moments = [names[i % len(names)] for i in range(count - exports)]
                random.Random(arguments.seed).shuffle(moments)
                moments += ["while exporting"] * exports
                results.append(series(Path(folder), moments, num_ranks, 8 * count, arguments.seed))
    kills = sum((result["kills"] for result in results), Counter())
    yes = {True: "yes", False: "NO"}
    print(", ".join(f"{moment}: {count}" for moment, count in kills.items()))
    print(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores: kills {kills.total()}, "
        f"restarts {sum(result['restarts'] for result in results)}, "
        f"steps repeated before the last checkpoint {sum(result['lost'] for result in results)}, "
        f"metrics.jsonl each step once {yes[all(result['once'] for result in results)]}, "
        f"final weights equal {yes[all(result['equal'] for result in results)]}"
    )


if __name__ == "__main__":
    live(sys.argv[2:]) if sys.argv[1:2] == ["--live"] else main()
