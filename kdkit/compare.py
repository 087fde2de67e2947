"""Compare finished runs of one teacher: a table, a sample of each model, and a figure (`python -m kdkit.evaluate`)."""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from kdkit import drafts
from kdkit.command_line import read_config
from kdkit.config import DataFields, UsageError
from kdkit.data import load_rows, prompt_of
from kdkit.evaluate import align, evaluate
from kdkit.models import count_parameters, load_teacher, load_tokenizer
from kdkit.running.tracking import read_metrics

COLUMNS = {  # heading -> key, format
    "held-out CE": ("eval/ce_loss", "{:.3f}"),
    "perplexity": ("eval/perplexity", "{:.1f}"),
    "KL to teacher": ("eval/kl_t1", "{:.3f}"),
    "top-1 agreement": ("eval/top1_agreement", "{:.1%}"),
    "acceptance": ("eval/acceptance_rate", "{:.1%}"),
}


def compare(run_dirs: list[str], prompt: str | None = None) -> str:
    """Return a table of finished runs on their held-out text, in fp32, and how each model continues a prompt."""
    configs, same = {}, [field.name for field in dataclasses.fields(DataFields) if not field.metadata]
    for run in run_dirs:
        for name in ("config.yaml", "final/config.json"):
            if not (Path(run) / name).is_file():
                raise UsageError(f"{run} is not a finished run: it has no {name}")
        configs[run] = read_config(Path(run) / "config.yaml")
        first = configs[run_dirs[0]]
        if other := [name for name in ("teacher_model", *same) if getattr(configs[run], name) != getattr(first, name)]:
            raise UsageError(f"{run} has another {other[0]} than {run_dirs[0]}: their numbers cannot be compared")
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    tokenizer = load_tokenizer(first)
    _, rows = load_rows(dataclasses.replace(first, packing=False), tokenizer)  # right for every model
    start = rows[0]["input_ids"][:24] if rows.are_texts else prompt_of(rows[0])
    ids = tokenizer(prompt)["input_ids"] if prompt else start
    inputs, shown = torch.tensor([ids], device=device), tokenizer.decode(ids)  # with the markers of turns
    greedy = {"max_new_tokens": 40, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    first = dataclasses.replace(first, divergence="forward_kl")  # a run's own function may not be known here
    teacher = load_teacher(first.teacher_model, torch.float32, first).to(device)
    lines, better, samples = [["in fp32", "parameters", *COLUMNS]], [], [f"Each model continues {shown!r}:"]
    for run, config in {"": first, **configs}.items():
        model, name = teacher, "teacher"
        if run:
            model = AutoModelForCausalLM.from_pretrained(Path(run) / "final", dtype=torch.float32).eval().to(device)
            name = f"{run}: {config.loss_formula.removeprefix('loss = ').replace('teacher, student; ', '')}"
        # the entries that both heads have, as in training; the teacher's own line uses those of the first run
        vocab_size = AutoConfig.from_pretrained(Path(run or run_dirs[0]) / "final").get_text_config().vocab_size
        metrics = evaluate(model, teacher, rows, first, pad_token_id=tokenizer.pad_token_id, vocab_size=vocab_size)
        values = [pattern.format(metrics[key]) for key, pattern in COLUMNS.values()]
        lines.append([name, f"{count_parameters(model) / 1e6:.2f} M", *values])
        better += [run] if metrics["eval/ce_loss"] < metrics["eval/teacher_ce_loss"] else []
        model.generation_config = GenerationConfig(**greedy)  # its own may have a penalty or a temperature
        written = model.generate(inputs, attention_mask=torch.ones_like(inputs))[0, len(ids) :]
        written = tokenizer.decode(written, skip_special_tokens=True)
        samples.append(f"  {name}\n    {written!r}")
    note = (
        f"\nnote  on this text {', '.join(better)} is better than the teacher, which cannot teach it well: raise "
        "alpha, or train the teacher on such text first\n"
    )
    return "\n".join([*align(lines), note if better else "", *samples])


def plot_curves(run_dirs: list[str], path: str | Path) -> None:
    """Plot the held-out cross-entropy and KL to the teacher of each run over its steps, into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2)
    titles = {"eval/ce_loss": "Cross-entropy on held-out text", "eval/kl_t1": "KL(teacher || student)"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for index, run in enumerate(run_dirs):
            events = [event for event in read_metrics(Path(run) / "metrics.jsonl") if "eval/step" in event]
            steps, values = ([event[x] for event in events] for x in ("eval/step", key))
            axis.plot(steps, values, linestyle=("-", "--", "-.", ":")[index % 4], marker="o", markersize=3, label=run)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set(xlabel="optimizer step", ylabel="nats per token", title=title)
    # the value of the last run that was drawn: the teacher is the same in all runs
    axes[0].axhline(events[-1]["eval/teacher_ce_loss"], color="#444444", linewidth=1, label="teacher")
    axes[0].legend(frameon=False)
    axes[1].set_ylim(bottom=0)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(argv: list[str] | None = None) -> None:
    """`python -m kdkit.evaluate RUN [RUN ...] [--prompt TEXT] [--figure PNG]`, or with `--draft [--gamma NUMBER]`."""
    parser = argparse.ArgumentParser(prog="python -m kdkit.evaluate", description="Compare finished runs.")
    parser.add_argument("runs", nargs="+", help="folders of runs, such as runs/demo")
    parser.add_argument("--prompt", help="the text that each model continues; by default the start of a document")
    parser.add_argument("--figure", help="the PNG file for the curves; by default curves.png in the last run")
    parser.add_argument("--draft", action="store_true", help="instead, measure them as drafts: kdkit/drafts.py")
    parser.add_argument("--gamma", type=int, default=4, help="with --draft: tokens drafted for a pass of the teacher")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="with --draft")
    arguments = parser.parse_args(argv)
    last = Path(arguments.runs[-1])
    figure = arguments.figure or last / "curves.png"
    try:
        if arguments.draft:
            return print(drafts.report(arguments.runs, arguments.gamma, arguments.dtype))
        print(compare(arguments.runs, arguments.prompt))
    except UsageError as error:
        sys.exit(f"kdkit: {error}")
    plot_curves(arguments.runs, figure)
    print(f"\nThe curves: {figure}\nA folder for AutoModelForCausalLM.from_pretrained: {last / 'final'}")
