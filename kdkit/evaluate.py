"""What tells whether distillation worked, on held-out text.

    python -m kdkit.evaluate runs/demo_ce runs/demo        # compare finished runs: table, figure, samples

Shapes: N tokens in the loss, V vocabulary, p the teacher's distribution, q the student's, at T = 1 unless said.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor

from kdkit import plots
from kdkit.config import DistillConfig, UsageError, read_config
from kdkit.data import collate, empty_row, load_rows
from kdkit.losses import DIVERGENCES, IGNORE_INDEX, forward_kl
from kdkit.models import BodyAndHead, count_parameters, load_teacher, load_tokenizer
from kdkit.running.tracking import read_metrics

CHUNK = 1024  # tokens whose logits exist at once


def metric_sums(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    vocab_size: int | None = None,
    **divergence_options: float,
) -> Tensor:
    """Sums over the tokens in the loss, so that batches and ranks just add up.

    Args: as in `kdkit.losses.dense_kd_loss`.

    Returns:
        (7,) float64: the student's CE, the teacher's CE, T^2 * divergence, KL(p || q), tokens whose likeliest next
        token is the same, sum_v min(p_v, q_v), and the tokens.
    """
    valid = labels != IGNORE_INDEX
    labels, student_hidden, teacher_hidden = labels[valid], student_hidden[valid], teacher_hidden[valid]
    student_head, teacher_head = student_head[:vocab_size].float(), teacher_head[:vocab_size].float()
    sums = torch.zeros(7, dtype=torch.float64, device=labels.device)
    device_type = labels.device.type
    with torch.autocast(device_type, enabled=False):  # the products in fp32: a small KL drowns in bf16 logits
        for start in range(0, labels.numel(), CHUNK):
            rows = slice(start, start + CHUNK)
            student_logits = student_hidden[rows].float() @ student_head.T  # (CHUNK, V)
            teacher_logits = teacher_hidden[rows].float() @ teacher_head.T
            p, q = teacher_logits.softmax(-1), student_logits.softmax(-1)
            loss = DIVERGENCES[divergence](student_logits, teacher_logits, temperature, **divergence_options)
            chunk = (
                F.cross_entropy(student_logits, labels[rows], reduction="none"),
                F.cross_entropy(teacher_logits, labels[rows], reduction="none"),
                temperature**2 * loss,
                forward_kl(student_logits, teacher_logits),
                student_logits.argmax(-1) == teacher_logits.argmax(-1),
                torch.minimum(p, q).sum(-1),
                torch.ones_like(labels[rows]),
            )
            sums += torch.stack([value.double().sum() for value in chunk])
    return sums


def evaluation_batches(
    rows: list[dict], batch_size: int, pad_token_id: int, accelerator: Accelerator | None = None
) -> Iterator[dict[str, Tensor]]:
    """A rank's share of the held-out rows in micro-batches, as many on every rank: models may be sharded."""
    rank, num_ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    mine = range(rank, len(rows), num_ranks)
    for start in range(0, math.ceil(len(rows) / num_ranks), batch_size):
        indices = list(mine[start : start + batch_size])
        batch = collate([rows[index] for index in indices] or [empty_row(pad_token_id)], pad_token_id)
        yield {**batch, "row_ids": [-1 - index for index in indices]}


@torch.no_grad()
def evaluate(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    rows: list[dict],
    config: DistillConfig,
    *,
    pad_token_id: int,
    vocab_size: int | None = None,
    accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """The `eval/` metrics of a student on held-out rows, in nats per token: each row once, over all ranks.

    The numbers do not depend on the batch size or on the number of ranks.

    Args:
        student, teacher: transformers causal language models, or `BodyAndHead`s of them, wrapped or not.
        rows: from `kdkit.data.load_rows`.
        config: for the loss and the batch size.
        pad_token_id: any id; padding is not in the loss.
        vocab_size: use the first so many rows of both heads.
        accelerator: of a run on several ranks.

    Returns:
        `eval/loss`, `eval/ce_loss`, `eval/kl_loss` (T^2 * divergence, as in the loss), `eval/perplexity`,
        `eval/kl_t1` (KL(p || q) at T = 1), `eval/top1_agreement`, `eval/acceptance_rate` (the expected acceptance of
        the student as a draft model, Leviathan et al. 2023, arXiv:2211.17192), `eval/teacher_ce_loss`.
    """
    student, teacher = (BodyAndHead(m) if hasattr(m, "get_output_embeddings") else m for m in (student, teacher))
    device = accelerator.device if accelerator else next(student.parameters()).device
    was_training = student.training
    student.eval()
    sums = partial(
        metric_sums,
        temperature=config.temperature,
        divergence=config.divergence,
        vocab_size=vocab_size,
        **config.divergence_options,
    )
    total = torch.zeros(7, dtype=torch.float64, device=device)
    for batch in evaluation_batches(rows, config.batch_size, pad_token_id, accelerator):
        batch = send_to_device(batch, device)
        targets = teacher(batch, lambda hidden, head: (hidden, head))
        total += student(batch, sums, *targets, batch["labels"])
    student.train(was_training)
    if accelerator:
        total = accelerator.reduce(total, "sum")
    *values, num_items = total.tolist()
    ce, teacher_ce, divergence, kl, agreement, acceptance = (value / num_items for value in values)
    return {
        "eval/loss": config.alpha * ce + (1 - config.alpha) * divergence,
        "eval/ce_loss": ce,
        "eval/kl_loss": divergence,
        "eval/perplexity": math.exp(min(ce, 700)),
        "eval/kl_t1": kl,
        "eval/top1_agreement": agreement,
        "eval/acceptance_rate": acceptance,
        "eval/teacher_ce_loss": teacher_ce,
    }


def describe_start(metrics: dict[str, float]) -> str:
    """What the evaluation before the first step says: how far the student is from a teacher worth learning from."""
    teacher, student = metrics["eval/teacher_ce_loss"], metrics["eval/ce_loss"]
    line = f"before   held-out CE: teacher {teacher:.3f}, student {student:.3f}; KL {metrics['eval/kl_t1']:.3f}"
    if teacher > student:
        line += (
            "\nwarning  the teacher is worse than the student on this data: it would teach noise. Check that it is the "
            "right model, that its chat template is the data's, or train the teacher on such data first"
        )
    return line


# --- comparing runs ------------------------------------------------------------------------------------------

COLUMNS = {  # heading -> key, format
    "held-out CE": ("eval/ce_loss", "{:.3f}"),
    "perplexity": ("eval/perplexity", "{:.1f}"),
    "KL to teacher": ("eval/kl_t1", "{:.3f}"),
    "top-1 agreement": ("eval/top1_agreement", "{:.1%}"),
    "acceptance": ("eval/acceptance_rate", "{:.1%}"),
}


COMPARABLE = (  # what has to be the same for two runs' numbers to be of the same tokens
    "teacher_model", "chat_template", "dataset", "dataset_config", "dataset_split",
    "eval_dataset", "eval_split", "eval_fraction", "text_column", "messages_column",
    "prompt_column", "completion_column", "max_eval_tokens", "max_length", "truncation_mode",
)  # fmt: skip


def compare(run_dirs: list[str], prompt: str | None = None, max_new_tokens: int = 40) -> str:
    """A table of finished runs of one teacher on one held-out text, and what each model writes, in fp32.

    Args:
        run_dirs: folders of runs, each with `config.yaml` and `final/`.
        prompt: what to go on from; by default the start of a held-out document.
        max_new_tokens: how many tokens each model writes, taking the likeliest each time.

    Raises:
        UsageError: a folder that is not a finished run, or runs that cannot be compared.
    """
    from transformers import AutoModelForCausalLM

    configs = {run: _finished_run(run) for run in run_dirs}
    first = configs[run_dirs[0]]
    for run, config in configs.items():
        for name in COMPARABLE:
            if getattr(config, name) != getattr(first, name):
                raise UsageError(f"{run} has another {name} than {run_dirs[0]}: their numbers cannot be compared")
    tokenizer = load_tokenizer(first)
    teacher = load_teacher(first.teacher_model, config=replace(first, teacher_dtype="float32"))
    _, rows = load_rows(first, tokenizer)
    prompt = prompt or tokenizer.decode(rows[0]["input_ids"][:24], skip_special_tokens=True)

    models = {"teacher": (teacher, first)}
    for run, config in configs.items():
        student = AutoModelForCausalLM.from_pretrained(Path(run) / "final", dtype=torch.float32).eval()
        models[f"student, {_kind(config)}: {run}"] = (student, config)
    lines, samples = [["", "parameters", *COLUMNS]], [f"Each goes on from {prompt!r}:"]
    for name, (model, config) in models.items():
        metrics = evaluate(model, teacher, rows, config, pad_token_id=tokenizer.pad_token_id)
        values = [pattern.format(metrics[key]) for key, pattern in COLUMNS.values()]
        lines.append([name, f"{count_parameters(model) / 1e6:.2f} M", *values])
        samples.append(f"  {name}\n    {_continue(model, tokenizer, prompt, max_new_tokens)!r}")
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    table = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([*table, "", *samples])


def _kind(config: DistillConfig) -> str:
    return "CE only" if config.alpha == 1 else "distilled"


def _finished_run(run: str) -> DistillConfig:
    for name in ("config.yaml", "final/config.json"):
        if not (Path(run) / name).is_file():
            raise UsageError(f"{run} is not a finished run: it has no {name}. Train it with python -m kdkit.train")
    return read_config(Path(run) / "config.yaml")


def _continue(model, tokenizer, prompt: str, max_new_tokens: int) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=max_new_tokens, do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main(argv: list[str] | None = None) -> None:
    """`python -m kdkit.evaluate RUN [RUN ...] [--prompt TEXT] [--figure PNG]`."""
    parser = argparse.ArgumentParser(prog="python -m kdkit.evaluate", description="Compare finished runs.")
    parser.add_argument("runs", nargs="+", help="folders of runs, such as runs/demo")
    parser.add_argument("--prompt", help="what each model goes on from; by default the start of a held-out document")
    parser.add_argument("--figure", help="where to write the curves (PNG); by default curves.png in the last run")
    arguments = parser.parse_args(argv)
    figure = arguments.figure or str(Path(arguments.runs[-1]) / "curves.png")
    try:
        print(compare(arguments.runs, arguments.prompt))
    except UsageError as error:
        raise SystemExit(f"kdkit: {error}") from None
    names = [f"{_kind(read_config(Path(run) / 'config.yaml'))}: {run}" for run in arguments.runs]
    histories = [read_metrics(Path(run) / "metrics.jsonl") for run in arguments.runs]
    plots.evaluation_curves(dict(zip(names, histories, strict=True))).savefig(figure)
    print(f"\nThe curves: {figure}")
    print(f"A folder for AutoModelForCausalLM.from_pretrained: {Path(arguments.runs[-1]) / 'final'}")


if __name__ == "__main__":
    main()
