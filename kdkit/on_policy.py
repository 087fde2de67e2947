"""On-policy distillation: the student learns on text that it has written itself.

The prefixes of the data are not those that the student meets when it writes, and the gap (exposure bias) grows along a
text. In a step on its own text, the student continues the prompts of the step's rows, and the teacher says at each
position what it would have written there. Only the rows are other ones: the count of tokens, the teacher, the loss and
the checks are those of every step. Agarwal et al. 2023, GKD (arXiv:2306.13649); Gu et al. 2023 (arXiv:2306.08543).

The text is drawn from the student's whole distribution at temperature 1, without gradient, one continuation a prompt.
Each token is drawn with a number of its own, which depends on the seed, the step, the row and the position alone: so
the text does not depend on ranks, micro-batches and other rows, and a resumed run writes what the first would have.

Shapes: B rows, P tokens of the longest prompt, G generated tokens, V vocabulary, S tokens of a row.
"""

import dataclasses
import itertools
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from kdkit.config import DistillConfig, UsageError
from kdkit.data import Steps, prompt_of
from kdkit.evaluate import evaluate
from kdkit.losses import IGNORE_INDEX


def open_writer(config, tokenizer, student, teacher, vocab_size: int, rows, accelerator) -> "OwnText | None":
    """Return what writes the student's text in a run, after a check of the student; None if the run has no own text."""
    if not config.writes_own_text:
        return None
    body = getattr(student, "module", student)
    context = min((model.context for model in (body, teacher) if model.context), default=None)
    eos = body.model.config.eos_token_id
    writer = OwnText(config, tokenizer, eos, vocab_size, rows.are_texts, context, accelerator)
    writer.check(student, rows)
    return writer


class OwnText:
    """Writes rows: `own_text.rows(student, rows, row_ids, step)`.

    Args:
        eos_token_id: the id that ends a text, or all of them.
        vocab_size: the entries that both heads have; others belong to no token, and are not drawn.
        texts: whether the rows are texts, whose prompt is their beginning, and not conversations.
        context: the largest number of positions of both models; None is unlimited.

    Raises:
        UsageError: a prompt of max_length and max_new_tokens after it do not fit into the context.
    """

    def __init__(
        self, config: DistillConfig, tokenizer, eos_token_id: int | list[int], vocab_size: int, texts: bool,
        context: int | None, accelerator: Accelerator,
    ):  # fmt: skip
        longest = config.max_length + config.max_new_tokens
        if context is not None and longest > context:
            raise UsageError(
                f"max_length + max_new_tokens is {longest:,}, expected at most {context:,}, the context of the models: "
                "make one of them smaller"
            )
        self.config, self.texts, self.accelerator, self.vocab_size = config, texts, accelerator, vocab_size
        self.pad_token_id = tokenizer.pad_token_id
        self.eos_token_ids = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id
        self.seconds, self.since = 0.0, time.perf_counter()
        # nothing of the student's own generation config: it may contain a top_k, a temperature or a penalty
        self.generation_config = GenerationConfig(
            do_sample=False, use_cache=True, pad_token_id=self.pad_token_id, eos_token_id=self.eos_token_ids
        )

    def prompt(self, row: dict) -> list[int]:
        """Return the tokens that the student continues.

        In a conversation, those before the first in the loss. Of a text, all but the last `max_new_tokens`, and at
        least half.
        """
        ids = row["input_ids"]
        if self.texts:
            return ids[: max(len(ids) - self.config.max_new_tokens, (len(ids) + 1) // 2)]
        return prompt_of(row)

    def rows(self, student: nn.Module, rows: Sequence[dict], row_ids: Sequence[int], step: int) -> list[dict]:
        """Continue the prompts of some rows. Every rank calls this in every step on own text, also without rows."""
        prompts = [self.prompt(row) for row in rows] or [[self.pad_token_id]]
        seeds = [[self.config.seed, step, abs(row), int(row < 0)] for row in row_ids] or [[0]]  # held-out rows are < 0
        numbers = np.stack([np.random.default_rng(seed).random(self.config.max_new_tokens) for seed in seeds])
        written = self._generate(student, prompts, numbers)  # (B, G)
        made = []
        for prompt, tokens in zip(prompts, written.tolist(), strict=True):
            ends = [i for i, token in enumerate(tokens) if token in self.eos_token_ids]
            ids = (prompt + tokens[: ends[0] + 1 if ends else None])[: self.config.max_length + 1]
            labels = [IGNORE_INDEX] * (len(prompt) - 1) + ids[len(prompt) :]
            made.append({"input_ids": ids[:-1], "labels": labels, "position_ids": list(range(len(labels)))})
        return made[: len(rows)]

    def take(
        self, student: nn.Module, steps: Steps, micro_batches: list[dict], step: int
    ) -> tuple[list[dict], dict[str, float]]:
        """Return the micro-batches of a step, with own text in the place of the data's if its turn has come.

        Also returns what to log: `on_policy` (1 or 0), over all ranks `own_length` (the mean number of written tokens)
        and `own_cut` (the share of rows without an end), and `writing_time`, the share of the time since the start.
        """
        metrics = {"on_policy": float(is_on_policy(self.config, step))}
        if metrics["on_policy"]:
            start, row_ids = time.perf_counter(), [index for batch in micro_batches for index in batch["row_ids"]]
            rows = self.rows(student, [steps.rows[index] for index in row_ids], row_ids, step)
            self.seconds += time.perf_counter() - start
            cut, rest = sum(row["labels"][-1] not in self.eos_token_ids for row in rows), iter(rows)
            micro_batches = [
                {**steps.collate(list(itertools.islice(rest, len(batch["row_ids"])))), "row_ids": batch["row_ids"]}
                for batch in micro_batches
            ]
            counts = torch.tensor([len(rows), sum(len(batch["valid"]) for batch in micro_batches), cut])
            rows, tokens, cut = self.accelerator.reduce(counts.to(self.accelerator.device), "sum").tolist()
            metrics |= {"own_length": tokens / rows, "own_cut": cut / rows}
        metrics["writing_time"] = self.seconds / (time.perf_counter() - self.since)
        return micro_batches, metrics

    def check(self, student: nn.Module, rows: Sequence[dict]) -> None:
        """Write a few tokens after prompts of several lengths, together and alone, before the first step.

        Raises:
            UsageError: most of them differ, or the model cannot write in a batch.
        """
        ids = list(itertools.islice(itertools.chain.from_iterable(row["input_ids"] for row in rows), 16))
        prompts = [ids[: len(ids) * n // 8 or 1] for n in (1, 2, 4, 5, 7, 8)]
        numbers = np.random.default_rng(0).random((len(prompts), min(4, self.config.max_new_tokens)))
        try:
            together = self._generate(student, prompts, numbers)
            alone = [self._generate(student, prompts[i : i + 1], numbers[i : i + 1]) for i in range(len(prompts))]
            width = min(tokens.shape[1] for tokens in (together, *alone))  # rows that end early are padded
            same = [torch.equal(a[0, :width], b[:width]) for a, b in zip(alone, together, strict=True)]
            fault = None if sum(same) > len(same) / 2 else "it writes another text beside other prompts than alone"
        except (RuntimeError, ValueError, TypeError, LookupError) as error:
            fault = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        if fault:
            name = type(getattr(student, "module", student).model).__name__
            raise UsageError(
                f"on_policy cannot be used with a {name} ({fault}): set on_policy to 0, or choose another student"
            )

    def _generate(self, student: nn.Module, prompts: list[list[int]], numbers: np.ndarray) -> Tensor:
        """Return the tokens (B, G), without gradient, that follow the prompts, which are padded on the left."""
        device = self.accelerator.device
        width = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[self.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        draw = Draw(torch.from_numpy(numbers).to(device), width, self.vocab_size)
        with _ready_to_write(student, self.generation_config) as (generate, sharded), self.accelerator.autocast():
            output = generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), synced_gpus=sharded,
                logits_processor=LogitsProcessorList([draw]), max_new_tokens=numbers.shape[1],
            )  # fmt: skip
        return output[:, width:]


class Draw(LogitsProcessor):
    """Draws the next token of each row, by inverting the cumulative distribution, and leaves only that one possible.

    So the token does not depend on the other rows or on the state of a generator of random numbers.
    """

    def __init__(self, numbers: Tensor, width: int, vocab_size: int):
        self.numbers, self.width, self.vocab_size = numbers, width, vocab_size  # (B, G), of [0, 1), float64

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative = scores[:, : self.vocab_size].double().softmax(-1).cumsum(-1)  # (B, V)
        number = self.numbers[:, input_ids.shape[1] - self.width, None] * cumulative[:, -1:]  # (B, 1)
        token = torch.searchsorted(cumulative, number, right=True).clamp(max=self.vocab_size - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


@contextmanager
def _ready_to_write(student: nn.Module, generation_config: GenerationConfig) -> Iterator[tuple]:
    """Put the student in eval mode, with this generation config, and with its parameters gathered if it is sharded.

    Yields its `generate`, and whether it is sharded: then all ranks have to generate equally many tokens.
    """
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    body = getattr(student, "module", student)  # without DDP: writing needs no communication
    model, sharded, training = body.model, isinstance(student, FSDPModule), student.training
    before, model.generation_config = model.generation_config, generation_config
    student.eval()
    try:
        if sharded:
            register_fsdp_forward_method(student, "generate")
            student.set_reshard_after_forward(False)  # gather each parameter once, and not for every token
        yield body.generate, sharded
    finally:
        if sharded:
            student.set_reshard_after_forward(True)
            for module in student.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        student.train(training)
        model.generation_config = before


def is_on_policy(config: DistillConfig, step: int) -> bool:
    """Whether a step is on the student's own text: the same on all ranks, and after a resume."""
    return random.Random(f"{config.seed}/own text/{step}").random() < config.on_policy


def own_text_metrics(own_text: OwnText, student: nn.Module, teacher, rows: Sequence[dict]) -> dict[str, float]:
    """Measure the student where it writes: on its own continuations of held-out prompts, the same numbers each time.

    Returns `eval/own_kl`, the mean KL(student || teacher) at T = 1 over the generated tokens, in nats; and
    `eval/own_kl_late`, that over the last quarter of `max_new_tokens`, where the errors have added up, if any text is
    so long. Neither depends on the number of ranks.
    """
    accelerator, config = own_text.accelerator, own_text.config
    own: list[dict] = [{}] * len(rows)  # of all ranks; each fills in its part, which is the one that `evaluate` reads
    mine = range(accelerator.process_index, len(rows), accelerator.num_processes)
    for start in range(0, math.ceil(len(rows) / accelerator.num_processes), config.batch_size):
        chosen = mine[start : start + config.batch_size]
        written = own_text.rows(student, [rows[index] for index in chosen], [-1 - index for index in chosen], 0)
        for index, row in zip(chosen, written, strict=True):
            own[index] = row
    late = [{**row, "labels": _late(row["labels"], config.max_new_tokens)} if row else {} for row in own]
    reverse = dataclasses.replace(config, on_policy=0.0, divergence="reverse_kl", temperature=1.0)
    found = {}
    for name, part in (("eval/own_kl", own), ("eval/own_kl_late", late)):
        metrics = evaluate(student, teacher, part, reverse, pad_token_id=own_text.pad_token_id,
                           vocab_size=own_text.vocab_size, accelerator=accelerator)  # fmt: skip
        found[name] = metrics["eval/kl_loss"]
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _late(labels: list[int], max_new_tokens: int) -> list[int]:
    """Leave only the labels of the last quarter of `max_new_tokens` in the loss."""
    first = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX) + math.ceil(0.75 * max_new_tokens)
    return [IGNORE_INDEX] * min(first, len(labels)) + labels[first:]
