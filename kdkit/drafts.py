"""Measure students as drafts of their teacher in speculative decoding: `python -m kdkit.evaluate --draft RUN`.

The student drafts gamma tokens, and the teacher verifies them in one pass: it keeps those up to the first rejection and
adds one token of its own (Leviathan et al. 2023, arXiv:2211.17192; drafts that are distilled for it: DistillSpec,
arXiv:2310.08461, LK losses, arXiv:2602.23881). If a draft step takes c teacher steps, and verifying gamma + 1 tokens v,
then tau tokens per teacher pass are tau / (gamma * c + v) times as fast; at an acceptance rate a per token, tau is
1 + a + ... + a^gamma. For another gamma, v is taken to be linear in it: a drafted token costs k = c + (v - 1) / gamma
teacher steps, and the speed-up is tau / (1 + gamma * k). At k >= 1 no acceptance rate pays, with any gamma.
"""

import bisect
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from kdkit.command_line import read_config
from kdkit.config import DistillConfig, UsageError
from kdkit.data import load_rows, prompt_of
from kdkit.evaluate import align
from kdkit.models import check_pair, load_tokenizer, wrap
from kdkit.models.load import load_model
from kdkit.running.hub import first_line

TOKENS = 64  # of each text
COLUMNS = ("tokens per pass", "acceptance", "break-even (gamma 1)", "c", "v", "speed-up", "best gamma")
LEGEND = """\
tokens per pass: of the teacher, counted (± standard error over the prompts); acceptance: the rate that explains them
break-even: the acceptance at which the speed-up is 1; c: a draft step, and v: verifying, in teacher steps, measured
speed-up: tokens per pass / (gamma * c + v), the models' passes alone; best gamma: at this acceptance rate"""


def tokens_per_pass(rate: float, gamma: int) -> float:
    return sum(rate**i for i in range(gamma + 1))


def rate_for(tau: float, gamma: int) -> float:
    """The acceptance rate at which `tokens_per_pass` is tau, to 0.0001; above 1 if there is none."""
    return bisect.bisect_left(range(10001), tau, key=lambda i: tokens_per_pass(i / 10000, gamma)) / 10000


@torch.no_grad()
def measure(teacher, student, prompts: Sequence[list[int]], *, sampled: bool, gamma: int = 4) -> dict[str, float]:
    """Let the teacher continue prompts, one at a time, alone and with the student as draft, and count its passes.

    Both are transformers models with equally many logits. Of their generation configs, which are replaced, only the ids
    that end a text are kept. Returns `tau`, its standard `error`, `rate`, `c`, `v`, `k`, `break_even`, `speedup`,
    `best_gamma`, `best`; and how many greedy texts are `different` from the teacher's own, with the largest `gap`
    between its logits of both tokens where they part. A gap of the size of rounding is a tie: a pass over gamma + 1
    tokens does not round like one over a single token, above all in bf16 (nor do batches; here a batch is one text).
    """
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {"do_sample": False}
    ends = teacher.generation_config.eos_token_id
    # without padding, any id but eos would be wrong: generate hides tokens with the id of pad from the draft
    how |= {"eos_token_id": ends, "pad_token_id": ends[0] if isinstance(ends, list) else ends}
    teacher.generation_config = GenerationConfig(**how, max_new_tokens=TOKENS)
    student.generation_config = GenerationConfig(
        num_assistant_tokens=gamma, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    passes, times = [], {"step": [], "draft": [], "verify": []}  # passes: model, tokens read, seconds

    def start(model, _, inputs):
        passes.append([model, inputs["input_ids"].shape[1], -_now()])

    def stop(model, *_):
        passes[-1][2] += _now()

    hooks = [model.register_forward_pre_hook(start, with_kwargs=True) for model in (teacher, student)]
    hooks += [model.register_forward_hook(stop) for model in (teacher, student)]
    lengths, counts, gaps = [], [], []
    for index, prompt in enumerate(tqdm(prompts, desc="sampled" if sampled else "greedy", leave=False)):
        texts, ids = [], torch.tensor([prompt], device=teacher.device)
        for draft in (None, student):
            torch.manual_seed(index)
            passes.clear()
            try:
                texts += teacher.generate(ids, attention_mask=torch.ones_like(ids), assistant_model=draft).tolist()
            except ValueError as error:  # a recurrent model, say, cannot go back to the last accepted token
                raise UsageError(f"{type(student).__name__} cannot draft: {first_line(error)}") from error
            for model, tokens, seconds in passes:
                kind = "draft" if model is student else "verify" if draft else "step"
                if tokens in {"step": [1], "draft": [1, 2], "verify": [gamma + 1]}[kind]:
                    times[kind].append(seconds)
        lengths.append(len(texts[1]) - len(prompt))
        counts.append(sum(model is teacher for model, *_ in passes))
        if not sampled and texts[0] != texts[1]:
            at, pair = next((i, pair) for i, pair in enumerate(zip(*texts, strict=False)) if pair[0] != pair[1])
            logits = teacher(input_ids=ids.new_tensor([texts[0][:at]])).logits[0, -1].float()
            gaps.append(logits[list(pair)].diff().abs().item())
    for hook in hooks:
        hook.remove()
    if not all(times.values()):
        raise UsageError(f"gamma is {gamma}, expected less: no text is long enough to draft so many tokens")
    step, draft_step, verifying = map(statistics.median, times.values())
    tau, c, v = sum(lengths) / sum(counts), draft_step / step, verifying / step
    k, rate = c + (v - 1) / gamma, rate_for(tau, gamma)
    errors = [length - tau * count for length, count in zip(lengths, counts, strict=True)]  # of a ratio of two sums
    best, best_gamma = max((tokens_per_pass(rate, g) / (1 + g * k), g) for g in range(1, 17))
    return {
        "tau": tau, "error": statistics.stdev(errors) * math.sqrt(len(errors)) / sum(counts), "rate": rate, "c": c,
        "v": v, "k": k, "break_even": rate_for(1 + gamma * k, gamma), "speedup": tau / (1 + gamma * k),
        "best_gamma": best_gamma, "best": best, "different": len(gaps), "gap": max(gaps, default=0.0),
    }  # fmt: skip


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def load_pair(run: str, dtype: str = "float32", num_prompts: int = 16) -> tuple:
    """Return the teacher and the student of a finished run, with equally many logits, and held-out prompts."""
    config = dataclasses.replace(read_config(Path(run) / "config.yaml"), packing=False)
    final, tokenizer = str(Path(run) / "final"), load_tokenizer(config)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    models = [
        load_model(name, role, config, getattr(torch, dtype)).eval().to(device)
        for name, role in ((config.teacher_model, "teacher"), (final, "student"))
    ]
    fields = {name: getattr(config, name) for name in ("teacher_model", "max_length", "trust_remote_code")}
    own = DistillConfig(**fields, student_model=final, output_dir=final)  # nothing is written
    vocab_size = check_pair(own, *models, tokenizer).vocab_size
    for model in models:  # generate refuses heads of two widths; the rows beyond the narrower one belong to no token
        if wrap(model).head_rows > vocab_size:
            model.resize_token_embeddings(vocab_size)
    _, rows = load_rows(config, tokenizer)
    room, prompts = min(wrap(model).context or 10**9 for model in models) - TOKENS, []
    for row in rows:  # the beginning of a text, or what stands before the first answer of a conversation
        prompt = row["input_ids"][:32] if rows.are_texts else prompt_of(row)
        prompts += [prompt] * (len(prompt) <= room)
    if len(prompts) < 2:
        raise UsageError(f"{run} has {len(prompts)} held-out prompts of at most {room} tokens, expected at least 2")
    return *models, prompts[:: math.ceil(len(prompts) / num_prompts)]


def report(runs: Sequence[str], gamma: int = 4, dtype: str = "float32") -> str:
    """Return a table of finished runs as drafts of their teachers. What speaks against a draft stands before it."""
    if gamma < 1:
        raise UsageError(f"gamma is {gamma}, expected at least 1 drafted token")
    faults, lines = [], [["", *COLUMNS]]
    for run, kind in itertools.product(runs, ("greedy", "sampled")):
        *pair, prompts = load_pair(run, dtype)
        m = measure(*pair, prompts, sampled=kind == "sampled", gamma=gamma)
        if m["k"] >= 1:
            cost = f"a drafted token costs {m['k']:.2f} teacher steps, and saves one at most"
            faults.append(f"no acceptance rate can pay for {run}, {kind}: {cost}")
        if m["different"]:
            faults.append(
                f"error  {m['different']} of {len(prompts)} greedy texts with {run} are not the teacher's: where they "
                f"part, its logits differ by up to {m['gap']:.1g} (as small as rounding: a tie; otherwise a fault)"
            )
        tau, limit = f"{m['tau']:.2f} ± {m['error']:.2f}", f"{m['break_even']:.1%} ({m['k']:.1%})"
        costs = f"{m['c']:.2f}", f"{m['v']:.2f}", f"{m['speedup']:.2f} x"
        best = f"{m['best_gamma']} ({m['best']:.2f} x)" if m["best"] > 1 else "none pays"
        lines.append([f"{run}, {kind}", tau, f"{m['rate']:.1%}", limit if m["k"] < 1 else "none", *costs, best])
    head = f"{len(prompts)} prompts, {TOKENS} tokens each, gamma {gamma}, {dtype}, {pair[0].device}, one text at a time"
    return "\n".join([*faults, head, "", *align(lines), "", LEGEND])
