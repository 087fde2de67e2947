"""Compare finished runs of one teacher: a table, what each model writes, and a figure (`python -m kdkit.evaluate`)."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from kdkit.config import DataFields, DistillConfig, UsageError, read_config
from kdkit.data import load_rows
from kdkit.evaluate import evaluate
from kdkit.models import count_parameters, load_teacher, load_tokenizer
from kdkit.running.tracking import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = {  # heading -> key, format
    "held-out CE": ("eval/ce_loss", "{:.3f}"),
    "perplexity": ("eval/perplexity", "{:.1f}"),
    "KL to teacher": ("eval/kl_t1", "{:.3f}"),
    "top-1 agreement": ("eval/top1_agreement", "{:.1%}"),
    "acceptance": ("eval/acceptance_rate", "{:.1%}"),
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito: for any colour vision


def compare(run_dirs: list[str], prompt: str | None = None, max_new_tokens: int = 40) -> str:
    """Evaluate finished runs on their held-out text, in fp32, and let each model continue a prompt.

    Args:
        run_dirs: folders of runs, each with `config.yaml` and `final/`.
        prompt: the text to continue; None takes the start of a held-out document.
        max_new_tokens: the number of tokens to write, the most likely one each time.

    Returns:
        A table and the samples, as text.

    Raises:
        UsageError: a folder without a finished run, or runs whose numbers are not of the same teacher and text.
    """
    from transformers import AutoModelForCausalLM

    configs = {run: _finished_run(run) for run in run_dirs}
    first = configs[run_dirs[0]]
    for run, config in configs.items():
        _check_comparable(run_dirs[0], first, run, config)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    tokenizer = load_tokenizer(first)
    _, rows = load_rows(first, tokenizer)
    prompt = prompt or tokenizer.decode(rows[0]["input_ids"][:24], skip_special_tokens=True)
    teacher = load_teacher(first.teacher_model, torch.float32, first).to(device)

    lines, samples = [["", "parameters", *COLUMNS]], [f"Each model continues {prompt!r}:"]
    for run, config in {"": first, **configs}.items():
        model, name = teacher, "teacher"
        if run:
            model = AutoModelForCausalLM.from_pretrained(Path(run) / "final", dtype=torch.float32).eval().to(device)
            name = f"student, {_kind(config)}: {run}"
        metrics = evaluate(model, teacher, rows, config, pad_token_id=tokenizer.pad_token_id)
        values = [pattern.format(metrics[key]) for key, pattern in COLUMNS.values()]
        lines.append([name, f"{count_parameters(model) / 1e6:.2f} M", *values])
        samples.append(f"  {name}\n    {_continue(model, tokenizer, prompt, max_new_tokens)!r}")
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    table = [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(cells))
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    return "\n".join([*table, "", *samples])


def _finished_run(run: str) -> DistillConfig:
    for name in ("config.yaml", "final/config.json"):
        if not (Path(run) / name).is_file():
            raise UsageError(f"{run} is not a finished run: it has no {name}. Train it with python -m kdkit.train")
    return read_config(Path(run) / "config.yaml")


def _check_comparable(first_run: str, first: DistillConfig, run: str, config: DistillConfig) -> None:
    names = [field.name for field in dataclasses.fields(DataFields) if not field.metadata]
    for name in ["teacher_model", *names]:
        if getattr(config, name) != getattr(first, name):
            raise UsageError(f"{run} has another {name} than {first_run}: their numbers cannot be compared")


def _kind(config: DistillConfig) -> str:
    return "CE only" if config.alpha == 1 else "distilled"


def _continue(model: nn.Module, tokenizer, prompt: str, max_new_tokens: int) -> str:
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    ids = model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=max_new_tokens, do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def evaluation_curves(histories: dict[str, list[dict]]) -> "Figure":
    """Plot held-out cross-entropy and KL to the teacher against the step, for runs of one teacher.

    Args:
        histories: the name of each run -> its events, as in metrics.jsonl.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2)
    titles = {"eval/ce_loss": "Cross-entropy on held-out text", "eval/kl_t1": "KL(teacher || student)"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for index, (name, history) in enumerate(histories.items()):
            events = [event for event in history if "eval/step" in event]
            steps, values = ([event[x] for event in events] for x in ("eval/step", key))
            style = ("-", "--", "-.", ":")[index % 4]
            axis.plot(steps, values, color=COLOURS[index % 6], linestyle=style, marker="o", markersize=3, label=name)
            if index == 0 and events and key == "eval/ce_loss":
                axis.axhline(events[-1]["eval/teacher_ce_loss"], color="#444444", linewidth=1, label="teacher")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set(xlabel="optimizer step", ylabel="nats per token", title=title)
    axes[1].set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    return figure


def main(argv: list[str] | None = None) -> None:
    """`python -m kdkit.evaluate RUN [RUN ...] [--prompt TEXT] [--figure PNG]`."""
    parser = argparse.ArgumentParser(prog="python -m kdkit.evaluate", description="Compare finished runs.")
    parser.add_argument("runs", nargs="+", help="folders of runs, such as runs/demo")
    parser.add_argument("--prompt", help="the text that each model continues; by default the start of a document")
    parser.add_argument("--figure", help="the PNG file for the curves; by default curves.png in the last run")
    arguments = parser.parse_args(argv)
    figure = arguments.figure or str(Path(arguments.runs[-1]) / "curves.png")
    try:
        print(compare(arguments.runs, arguments.prompt))
    except UsageError as error:
        sys.exit(f"kdkit: {error}")
    names = [f"{_kind(read_config(Path(run) / 'config.yaml'))}: {run}" for run in arguments.runs]
    histories = [read_metrics(Path(run) / "metrics.jsonl") for run in arguments.runs]
    evaluation_curves(dict(zip(names, histories, strict=True))).savefig(figure)
    print(f"\nThe curves: {figure}")
    print(f"A folder for AutoModelForCausalLM.from_pretrained: {Path(arguments.runs[-1]) / 'final'}")
