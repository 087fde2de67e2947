"""Log metrics: to metrics.jsonl always, and to Weights & Biases if it is installed and usable."""

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from tqdm.auto import tqdm

from kdkit.config import DistillConfig, RunStopped
from kdkit.running import files
from kdkit.running.hub import first_line


class Tracker:
    """Writes each event as a line of metrics.jsonl, and to Weights & Biases under the same keys.

    A run that resumes from `step` repeats the steps after it: `history` loses their events. Only the main process is
    `enabled`. `watch` is called with each event after it is written. `where` is a line to print.
    """

    def __init__(self, config: DistillConfig, step: int = 0, enabled: bool = True, watch: Callable | None = None):
        self.history, self.where = [], ""
        self._watch, self._path, self._wandb = watch, None, None
        if not enabled:
            return
        self._path = Path(config.output_dir) / "metrics.jsonl"
        events = read_metrics(self._path) if step else []  # from step 0 on, the evaluation of step 0 is repeated, too
        self.history = [event for event in events if event.get("train/step", event.get("eval/step")) <= step]
        files.write(self._path, "".join(json.dumps(event) + "\n" for event in self.history))
        self.where = f"metrics  {self._path}"
        if config.use_wandb:
            self._call_wandb(self._start_wandb, config, step)

    def log_training(self, *, step: int, epoch: float, **metrics: float) -> None:
        """Log a step: losses summed over micro-batches and ranks, the norm of the gradient before clipping, ..."""
        self._log({f"train/{name}": value for name, value in (metrics | {"epoch": epoch, "step": step}).items()})

    def log_evaluation(self, metrics: dict, *, step: int, epoch: float) -> None:
        """Log the result of `kdkit.evaluate.evaluate` and the lowest loss so far."""
        losses = [event["eval/loss"] for event in [*self.history, metrics] if "eval/loss" in event]
        self._log({**metrics, "eval/min_loss": min(losses), "eval/epoch": epoch, "eval/step": step})

    def _log(self, event: dict) -> None:
        self.history.append(event)
        if self._path:
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(event) + "\n")
            except OSError as error:
                remedy = "make room and run the same command again, which resumes"
                raise RunStopped(f"{self._path} cannot be written ({error.strerror}): {remedy}") from error
        if self._wandb:
            self._call_wandb(self._wandb.log, event)
        if self._watch:
            self._watch(event)

    def finish(self) -> None:
        """Close the wandb run."""
        if self._wandb:
            self._call_wandb(self._wandb.finish)

    def _call_wandb(self, function: Callable, *arguments) -> None:
        """Call a function that uses wandb. After its first error wandb is not used any more; the run continues."""
        try:
            function(*arguments)
        except Exception as error:  # any: its process, the server or the disk may have failed
            self._wandb = None
            tqdm.write(f"note     not to Weights & Biases: {first_line(error)} (--use_wandb false turns it off)")

    def _start_wandb(self, config: DistillConfig, step: int) -> None:
        """Start a wandb run, or continue that of a resumed run, without asking a question."""
        os.environ.setdefault("WANDB_INIT_TIMEOUT", "20")  # seconds
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")  # by default it waits forever
        import wandb

        offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
        if not offline and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("not logged in (run `wandb login`, or set WANDB_MODE=offline)")
        id_file = Path(config.output_dir) / "wandb_id.txt"
        if step == 0 or not id_file.is_file():
            files.write(id_file, secrets.token_hex(4))
        self._wandb = wandb.init(
            project=config.wandb_project, entity=config.wandb_entity, name=config.wandb_run_name or run_name(config),
            id=id_file.read_text().strip(), resume="allow", dir=config.output_dir, config=config.as_dict(),
            settings=wandb.Settings(silent=True),
        )  # fmt: skip
        for part in ("train", "eval"):
            self._wandb.define_metric(f"{part}/*", step_metric=f"{part}/step")
        self.where += f" and Weights & Biases ({self._wandb.url or 'offline, ' + self._wandb.dir})"


def read_metrics(path: Path) -> list[dict]:
    """Return the events of a metrics.jsonl file. An incomplete last line, left by a kill, is skipped."""
    *lines, _ = path.read_text(encoding="utf-8").split("\n") if path.is_file() else [""]
    return [json.loads(line) for line in lines]


def run_name(config: DistillConfig) -> str:
    """Return a name made from the settings."""
    teacher = Path(config.teacher_model).name
    student = Path(config.student_model).name if config.student_layers is None else f"{teacher}-layers"
    loss = "ce" if config.alpha == 1 else f"{config.divergence}-alpha{config.alpha:g}-T{config.temperature:g}"
    return f"{teacher}-to-{student}-{loss}-seed{config.seed}"
