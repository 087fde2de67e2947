"""Where the metrics go: metrics.jsonl always, Weights & Biases where it is there."""

import importlib.util
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from kdkit.config import DistillConfig, RunStopped
from kdkit.running.files import write_text

WANDB_ID = "wandb_id.txt"


class Tracker:
    """Writes each logged event as a line of metrics.jsonl, and to Weights & Biases under the same keys.

    Only the main process has one that writes. What was logged where is said in one line.

    Attributes:
        history: the events so far, those of a run that is gone on with included.
    """

    def __init__(self, config: DistillConfig, step: int = 0, enabled: bool = True, watch: Callable | None = None):
        """Open the log of a run that goes on after `step`: what was logged beyond it will be logged again.

        Args:
            config: the run.
            step: the step it goes on from.
            enabled: whether this process writes.
            watch: called with each event once it is logged.
        """
        self.history: list[dict] = []
        self.where = ""
        self._watch, self._file, self._wandb = watch, None, None
        if not enabled:
            return
        path = Path(config.output_dir) / "metrics.jsonl"
        # at step 0 nothing stays: the evaluation before the first step is done again
        self.history = [event for event in read_metrics(path) if step and event_step(event) <= step]
        write_text(path, "".join(json.dumps(event) + "\n" for event in self.history))
        self._file = path.open("a", encoding="utf-8")
        self._wandb, where = _start_wandb(config)
        self.where = f"metrics  {path}{where}"

    def log_training(self, loss, ce_loss, kl_loss, rate, grad_norm, tokens_per_second, *, step: int, epoch: float):
        """Log a step: sums over all its micro-batches and ranks, the gradient's norm before clipping."""
        self._log(
            {
                "train/loss": loss,
                "train/ce_loss": ce_loss,
                "train/kl_loss": kl_loss,
                "train/learning_rate": rate,
                "train/grad_norm": grad_norm,
                "train/epoch": epoch,
                "train/step": step,
                "train/tokens_per_second": tokens_per_second,
            }
        )

    def log_evaluation(self, metrics: dict, *, step: int, epoch: float) -> None:
        """Log what `kdkit.evaluate.evaluate` returned, and the least loss so far."""
        losses = [event["eval/loss"] for event in self.history if "eval/loss" in event] + [metrics["eval/loss"]]
        self._log({**metrics, "eval/min_loss": min(losses), "eval/epoch": epoch, "eval/step": step})

    def _log(self, event: dict) -> None:
        self.history.append(event)
        if self._file:
            try:
                self._file.write(json.dumps(event) + "\n")
                self._file.flush()
            except OSError as error:
                raise RunStopped(
                    f"{self._file.name} cannot be written ({error.strerror}). Make room and start the same command "
                    "again: it goes on from the newest checkpoint"
                ) from error
        self._try_wandb("log", event)
        if self._watch:
            self._watch(event)

    def finish(self) -> None:
        """Close what is open."""
        if self._file:
            self._file.close()
        self._try_wandb("finish")

    def _try_wandb(self, method: str, *arguments) -> None:
        """Call a method of the wandb run. One that fails is the last: it is said, and the training goes on."""
        if self._wandb is None:
            return
        try:
            getattr(self._wandb, method)(*arguments)
        except Exception as error:  # of whatever kind: its process may be gone, its server, its disk
            self._wandb = None
            print(f"\nnote     no more to Weights & Biases ({_reason(error)}); the run goes on, with {self._file.name}")


def event_step(event: dict) -> int:
    """The optimizer step of an event."""
    return event.get("train/step", event.get("eval/step"))


def read_metrics(path: Path) -> list[dict]:
    """The events of a metrics.jsonl. A last line that a kill cut short is left out."""
    events = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is not JSON: the file is damaged") from None
    return events


def _start_wandb(config: DistillConfig):
    """A wandb run or None, and what to say of it. It never asks anything, and never stops a run."""
    if not config.use_wandb:
        return None, ""
    if importlib.util.find_spec("wandb") is None:
        return None, " (not to Weights & Biases: wandb is not installed; pip install wandb, or --use_wandb false)"
    offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
    try:
        import wandb

        if not offline and not wandb.login(prompt=False, verify=False):
            return None, " (not to Weights & Biases: not logged in; run `wandb login`, or set WANDB_MODE=offline)"
        run = wandb.init(
            project=config.wandb_project,
            entity=config.wandb_entity,
            name=config.wandb_run_name or run_name(config),
            id=_wandb_id(config),
            resume="allow",
            dir=config.output_dir,
            config=config.as_dict(),
            settings=wandb.Settings(
                silent=True,
                init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", 20)),
                finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT", 60)),  # else it waits for a server forever
            ),
        )
        for part in ("train", "eval"):
            run.define_metric(f"{part}/*", step_metric=f"{part}/step")
    except Exception as error:  # of whatever kind, see `Tracker._try_wandb`
        return None, f" (not to Weights & Biases: {_reason(error)})"
    return run, f" and Weights & Biases ({run.url or 'offline, ' + run.dir})"


def run_name(config: DistillConfig) -> str:
    """A name made from the settings."""
    teacher, student = Path(config.teacher_model).name, Path(config.student_model).name
    student = student if config.student_layers is None else f"{teacher}-layers"
    loss = "ce" if config.alpha == 1 else f"{config.divergence}-alpha{config.alpha:g}-T{config.temperature:g}"
    return f"{teacher}-to-{student}-{loss}-seed{config.seed}"


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _wandb_id(config: DistillConfig) -> str:
    """The run's id at Weights & Biases: made once, and kept in its folder, so that it goes on under the same."""
    path = Path(config.output_dir) / WANDB_ID
    if not path.is_file():
        write_text(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8").strip()
