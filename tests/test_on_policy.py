"""Distillation on the student's own text: what is drawn, from which distribution, and what a run makes of it."""

import copy
import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from families import tiny
from helpers import student_with_dropout
from test_devices import launch
from transformers import GenerationConfig

from kdkit.config import UsageError
from kdkit.data import Rows, collate, load_rows
from kdkit.losses import IGNORE_INDEX, reverse_kl
from kdkit.models import BodyAndHead, load_student, load_teacher, load_tokenizer
from kdkit.on_policy import Draw, OwnText, is_on_policy, own_text_metrics
from kdkit.running.devices import start_accelerator
from kdkit.running.tracking import read_metrics
from kdkit.teachers import OnlineTeacher
from kdkit.train import train

HOSTILE = dict(do_sample=True, temperature=0.1, top_k=1, top_p=0.1, repetition_penalty=1.5, min_new_tokens=9)


@pytest.fixture
def tokenizer(small):
    return load_tokenizer(small())


@pytest.fixture
def student():
    """A body whose distributions are far from uniform: the teacher's weights."""
    return BodyAndHead(load_teacher(dtype=torch.float32))


def writer(config, tokenizer, *, ends=(), vocab_size=1024, texts=True, context=None) -> OwnText:
    return OwnText(config, tokenizer, list(ends) or [tokenizer.eos_token_id], vocab_size, texts, context, Accelerator())


def prompts(*lengths):
    return [{"input_ids": list(range(50, 50 + n)), "labels": list(range(51, 51 + n))} for n in lengths]


def on_policy(small, **fields):
    return small(**{"on_policy": 1.0, "max_new_tokens": 12, "max_length": 48, "divergence": "reverse_kl"} | fields)


# --- what is drawn


def test_tokens_are_drawn_from_the_whole_distribution_whatever_the_students_generation_config_says(
    small, tokenizer, student
):
    """Chi-squared over 16 groups of tokens: with 15 degrees of freedom it is above 37.7 once in a thousand times."""
    student.model.generation_config = GenerationConfig(**HOSTILE)
    own_text = writer(on_policy(small, max_new_tokens=1), tokenizer, ends=[5])
    row, count = prompts(20)[0], 4000
    made = own_text.rows(student, [row] * count, range(count), 3)
    prompt = own_text.prompt(row)
    with torch.no_grad():
        probabilities = student.model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
    order = probabilities.argsort(descending=True)
    group = torch.empty(1024, dtype=torch.long)
    group[order] = (probabilities[order].cumsum(0) * 16).long().clamp(max=15)
    expected = torch.zeros(16, dtype=torch.float64).index_add_(0, group, probabilities) * count
    expected_groups = expected > 5
    drawn = torch.tensor([row["labels"][-1] for row in made])
    observed = torch.bincount(group[drawn], minlength=16)
    statistic = ((observed - expected) ** 2 / expected)[expected_groups].sum()
    assert expected_groups.sum() >= 8 and statistic < 37.7
    assert student.model.generation_config.top_k == 1  # it is the student's, and is exported


def test_a_row_is_the_same_alone_and_beside_others_of_other_lengths(small, tokenizer, student):
    own_text, rows = writer(on_policy(small), tokenizer), prompts(3, 30, 12)
    together = own_text.rows(student, rows, [7, 8, 9], 5)
    for row, number, expected in zip(rows, (7, 8, 9), together, strict=True):
        assert own_text.rows(student, [row], [number], 5) == [expected]
    assert own_text.rows(student, rows, [7, 8, 9], 6) != together  # another step, another text
    assert own_text.rows(student, rows[:1], [8], 5) != together[:1]  # another row, too


def test_text_ends_with_the_first_of_all_end_tokens_and_labels_are_the_written_tokens(small, tokenizer, student):
    config = on_policy(small, max_new_tokens=24, max_length=64)
    rows = prompts(*[20] * 64)
    plain = writer(config, tokenizer, ends=[1023]).rows(student, rows, range(64), 1)  # hardly ever ends
    ends = [300, 301, tokenizer.eos_token_id, *range(400, 440)]
    ended = writer(config, tokenizer, ends=ends).rows(student, rows, range(64), 1)
    cut = 0
    for row, longer in zip(ended, plain, strict=True):
        prompt = 20 - 10  # half of a text of 20 is kept
        own = row["labels"][prompt - 1 :]
        whole = longer["labels"][prompt - 1 :]
        stop = next((i for i, token in enumerate(whole) if token in ends), len(whole) - 1)
        assert own == whole[: stop + 1]
        assert row["labels"][: prompt - 1] == [IGNORE_INDEX] * (prompt - 1)
        assert row["input_ids"] == list(range(50, 60)) + own[:-1]
        assert row["position_ids"] == list(range(len(row["input_ids"])))
        cut += own[-1] not in ends
    assert 0 < cut < 64


def test_prompt_of_a_conversation_ends_before_the_first_token_in_the_loss(small, tokenizer):
    row = {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100, -100, 4, 5, -100, 7]}
    assert writer(on_policy(small), tokenizer, texts=False).prompt(row) == [1, 2, 3]
    assert len(writer(on_policy(small), tokenizer).prompt(prompts(40)[0])) == 28  # a text, less max_new_tokens


def test_entries_that_no_token_has_are_not_drawn(small, tokenizer, student):
    torch.nn.init.constant_(student.model.lm_head.weight.data[900:], 0.0)
    student.model.lm_head.weight.data[:900] *= 0.01  # all entries are nearly equally likely
    made = writer(on_policy(small, max_new_tokens=40, max_length=96), tokenizer, vocab_size=900).rows(
        student, prompts(*[20] * 32), range(32), 1
    )
    labels = torch.tensor([label for row in made for label in row["labels"] if label != IGNORE_INDEX])
    assert labels.max() < 900 and len(labels) > 500
    assert (labels == 899).sum() < 20  # their probability does not go to the last entry, either


def test_writing_is_without_dropout_or_gradient_and_leaves_the_student_as_it_was(
    small, tokenizer, tmp_path, monkeypatch
):
    config = small(student_model=student_with_dropout(tmp_path / "student"), student_random_init=True)
    student = BodyAndHead(load_student(config, None))
    before, state = copy.deepcopy(student.model.generation_config), torch.get_rng_state()
    own_text = writer(on_policy(small), tokenizer)
    first = own_text.rows(student, prompts(9), [1], 1)
    assert own_text.rows(student, prompts(9), [1], 1) == first
    assert student.training and student.model.generation_config == before
    assert torch.equal(state, torch.get_rng_state()) and all(p.grad is None for p in student.parameters())
    monkeypatch.setattr(Draw, "__call__", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        own_text.rows(student, prompts(9), [1], 1)
    assert student.training and student.model.generation_config == before


@torch.no_grad()
def test_mean_of_the_summed_log_ratios_of_own_text_is_the_sum_of_reverse_kls(small, tokenizer):
    """The chain rule: it holds only if prefix, shift and labels are all right."""
    teacher, student = load_teacher(dtype=torch.float32), load_student(small(), None)
    config = on_policy(small, max_new_tokens=4)
    rows = writer(config, tokenizer, ends=[1023]).rows(BodyAndHead(student), prompts(*[10] * 2000), range(2000), 1)
    batch = collate(rows, 0)
    log_q, log_p = (model.eval()(batch["input_ids"]).logits.log_softmax(-1) for model in (student, teacher))
    valid = batch["labels"] != IGNORE_INDEX
    ids = batch["labels"].clamp(min=0)[..., None]
    ratios = ((log_q - log_p).gather(-1, ids)[..., 0] * valid).sum(-1)
    exact = (reverse_kl(log_q, log_p) * valid).sum(-1)
    difference = ratios - exact  # their means agree within the error of a mean
    assert abs(difference.mean()) < 3.5 * difference.std() / len(rows) ** 0.5
    assert exact.mean() > 5 * difference.std() / len(rows) ** 0.5


# --- runs


def test_step_on_own_text_is_a_step_on_a_file_of_these_rows(small, tokenizer, monkeypatch):
    config = on_policy(small, max_steps=1, batch_size=4, eval_own_text=False)
    made = []
    write = OwnText.rows

    def keep(*arguments):
        made.append(write(*arguments))
        return made[-1]

    monkeypatch.setattr(OwnText, "rows", keep)
    own = train(config)[1]
    held_out = load_rows(dataclasses.replace(config, packing=False), tokenizer)[1]
    monkeypatch.setattr("kdkit.train.load_rows", lambda *_: (Rows.of(made[0]), held_out))
    data = train(dataclasses.replace(config, on_policy=0.0, packing=False, output_dir=config.output_dir + "2"))[1]
    for key in ("train/loss", "train/kl_loss", "train/grad_norm"):
        assert own[key] == pytest.approx(data[key], rel=1e-5)
    assert own["train/on_policy"] == 1 and "train/on_policy" not in data
    lengths = [sum(label != IGNORE_INDEX for label in row["labels"]) for row in made[0]]
    assert own["train/own_length"] == pytest.approx(np.mean(lengths))
    ends = [row["labels"][-1] == tokenizer.eos_token_id for row in made[0]]
    assert own["train/own_cut"] == 1 - np.mean(ends)


def test_share_of_steps_is_on_policy_by_a_coin_that_ranks_share(small):
    steps = [is_on_policy(on_policy(small, on_policy=0.3), step) for step in range(1, 1001)]
    assert 250 < sum(steps) < 350
    assert all(is_on_policy(on_policy(small), step) for step in range(1, 100))
    assert not any(is_on_policy(small(), step) for step in range(1, 100))
    config = on_policy(small, on_policy=0.5, max_steps=6, logging_steps=1)
    taken = [event["train/on_policy"] for event in train(config) if "train/on_policy" in event]
    assert taken == [is_on_policy(config, step) for step in range(1, 7)] and 0 < sum(taken) < 6


def test_row_is_no_longer_than_max_length(small, tokenizer, student):
    labels = [IGNORE_INDEX] * 45 + [7, 8, 9]  # a prompt of 46 tokens, and 12 more are written
    row = {"input_ids": list(range(50, 98)), "labels": labels}
    (made,) = writer(on_policy(small), tokenizer, texts=False, ends=[1023]).rows(student, [row], [0], 1)
    assert [len(values) for values in made.values()] == [48, 48, 48]
    assert made["labels"][:45] == [IGNORE_INDEX] * 45 and IGNORE_INDEX not in made["labels"][45:]


def test_student_writes_in_the_precision_in_which_it_is_trained(small, tokenizer, student, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    dtypes = set()
    student.model.lm_head.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    own_text = writer(on_policy(small), tokenizer)
    own_text.accelerator = start_accelerator()
    own_text.rows(student, prompts(9), [1], 1)
    assert dtypes == {torch.bfloat16}


def test_teacher_on_its_own_text_has_nothing_to_learn(small, tmp_path):
    folder = str(tmp_path / "model")
    load_teacher(dtype=torch.float32).save_pretrained(folder)
    load_tokenizer(small()).save_pretrained(folder)
    events = train(on_policy(small, teacher_model=folder, student_model=folder, max_steps=1))
    assert abs(events[1]["train/loss"]) < 1e-6 and abs(events[0]["eval/own_kl"]) < 1e-6


def test_run_without_own_text_never_writes(small, monkeypatch):
    monkeypatch.setattr(OwnText, "rows", lambda *_: 1 / 0)
    assert not any("own" in key or "policy" in key for event in train(small(max_steps=2)) for key in event)


def test_own_text_that_is_only_evaluated_on_is_not_in_the_training_log(small):
    events = train(small(eval_own_text=True, max_new_tokens=8, max_steps=1))
    assert "eval/own_kl" in events[0]
    assert not any(key.startswith("train/") and ("own" in key or "writing" in key) for key in events[1])


def test_keys_of_the_metrics_are_those_of_the_documentation(small):
    text = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    events = train(on_policy(small, on_policy=0.5, max_steps=4, logging_steps=1, max_new_tokens=24))
    assert {key for event in events for key in event} == set(re.findall(r"`((?:train|eval)/\w+)`", text))


def test_run_killed_while_it_writes_resumes_to_the_same_numbers(small, monkeypatch):
    fields = dict(on_policy=0.5, max_steps=8, save_steps=2, eval_steps=4, gradient_accumulation_steps=2, batch_size=2)
    uncut = on_policy(small, **fields, output_dir=small().output_dir + "_uncut")
    cut = on_policy(small, **fields)
    expected = train(uncut)
    write, last = OwnText.rows, max(step for step in range(1, 9) if is_on_policy(cut, step))

    def killed(self, student, rows, row_ids, step):
        if step == last:
            raise KeyboardInterrupt
        return write(self, student, rows, row_ids, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(OwnText, "rows", killed)
        train(cut)
    assert last > 2
    resumed = train(cut)
    without = ("tokens_per_second", "writing_time")
    for one, other in zip(resumed, expected, strict=True):
        assert {k: v for k, v in one.items() if not k.endswith(without)} == {
            k: v for k, v in other.items() if not k.endswith(without)
        }


def test_own_kl_is_that_of_the_written_tokens_for_any_batch_size(small, tokenizer):
    config = on_policy(small, max_eval_tokens=300)
    rows = load_rows(config, tokenizer)[1]
    teacher, student = OnlineTeacher(load_teacher(dtype=torch.float32)), BodyAndHead(load_student(small(), None))
    own_text = writer(config, tokenizer)
    metrics = own_text_metrics(own_text, student, teacher, rows)
    made = own_text.rows(student, rows, [-1 - index for index in range(len(rows))], 0)
    sums = np.zeros(4)
    with torch.no_grad():
        for row in made:
            ids = torch.tensor([row["input_ids"]])
            kl = reverse_kl(student.model.eval()(ids).logits, teacher.model(ids).logits)[0].double()
            own = kl[torch.tensor(row["labels"]) != IGNORE_INDEX]
            sums += [own.sum(), len(own), own[9:].sum(), len(own[9:])]  # the last quarter of 12
    assert metrics["eval/own_kl"] == pytest.approx(sums[0] / sums[1], rel=1e-5)
    assert metrics["eval/own_kl_late"] == pytest.approx(sums[2] / sums[3], rel=1e-5)
    other = writer(dataclasses.replace(config, batch_size=3), tokenizer)
    assert own_text_metrics(other, student, teacher, rows) == pytest.approx(metrics, rel=1e-6)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"alpha": 0.5}, "alpha is 0.5, expected 0 with on_policy"),
        ({"targets": "hidden", "targets_dir": "x"}, "targets is 'hidden', expected online"),
        ({"packing": True}, "packing is True, expected false or null"),
        ({"max_new_tokens": 48}, "max_new_tokens is 48, expected 1 to 47"),
        ({"on_policy": 1.1}, "on_policy is 1.1, expected a fraction from 0 to 1"),
    ],
)
def test_combinations_that_cannot_work_are_refused(small, fields, message):
    with pytest.raises(UsageError, match=message):
        on_policy(small, **fields)


def test_rows_that_would_leave_the_context_are_refused(small):
    with pytest.raises(UsageError, match=r"max_length \+ max_new_tokens is 600, expected at most 512, the context"):
        train(on_policy(small, max_length=400, max_new_tokens=200))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba", "gemma2", "opt", "rwkv", "bart"])
def test_students_that_do_not_write_the_same_in_a_batch_are_refused(small, tokenizer, family):
    student, own_text = BodyAndHead(tiny(family)), writer(on_policy(small), tokenizer)
    if family in ("rwkv", "bart"):
        with pytest.raises(UsageError, match=r"cannot be used with a (RwkvForCausalLM .it writes another|Bart)"):
            own_text.check(student, prompts(30))
    else:
        own_text.check(student, prompts(30))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_write_what_one_writes(small, tmp_path, kind):
    fields = dict(max_steps=4, on_policy=0.6, eval_steps=2, save_steps=2, max_eval_tokens=300)
    one = on_policy(small, **fields, batch_size=4, output_dir=str(tmp_path / "one"))
    two = on_policy(small, **fields, batch_size=2, output_dir=str(tmp_path / "two"))
    train(one)
    launch(kind, two)
    events = [read_metrics(Path(config.output_dir) / "metrics.jsonl") for config in (one, two)]
    for ours, theirs in zip(*events, strict=True):
        for key in set(ours) - {"train/tokens_per_second", "train/writing_time"}:
            assert ours[key] == pytest.approx(theirs[key], rel=2e-5), key
