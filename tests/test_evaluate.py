import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import json_lines, student_with_dropout
from transformers import AutoConfig, AutoModelForCausalLM

from kdkit.compare import compare, main
from kdkit.config import UsageError
from kdkit.data import collate, load_rows
from kdkit.evaluate import METRICS, describe_metrics, evaluate
from kdkit.losses import IGNORE_INDEX, forward_kl, reverse_kl, total_variation
from kdkit.models import ASSETS, BodyAndHead, load_teacher, load_tokenizer
from kdkit.train import train


@pytest.fixture
def setting(small):
    config = small(max_eval_tokens=1500, packing=False)
    _, rows = load_rows(config, load_tokenizer(config))
    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ASSETS / "embedded_student"))
    return config, rows, student, load_teacher(dtype=torch.float32)


def by_hand(student, teacher, rows, per_token):
    """Return the mean over all tokens of a function of both models' logits and the labels, computed row by row."""
    total = count = 0
    for row in rows:
        batch = collate([row], 0)
        labels = batch.pop("labels")[0]
        with torch.no_grad():
            values = per_token(student(**batch).logits[0], teacher(**batch).logits[0], labels)
        values = values[labels != IGNORE_INDEX]  # the bos before a later piece of a text has no label
        total, count = total + values.double().sum().item(), count + len(values)
    return total / count


def test_evaluation_before_the_first_step_says_what_is_unusual(setting):
    config, rows, student, teacher = setting
    metrics = [evaluate(*pair, rows, config, pad_token_id=2) for pair in ((student, teacher), (teacher, student))]
    usual, exchanged = (describe_metrics(each, step=0, vocab_size=1024) for each in metrics)
    worse_than_chance = metrics[0] | {"eval/ce_loss": 8.0}  # ln 1024 is 6.9
    assert "CE is above 6.9, that of 1,024 equally likely tokens" in describe_metrics(worse_than_chance, 0, 1024)
    assert "note" not in usual and "note" not in describe_metrics(worse_than_chance, 1, 1024)
    assert usual.startswith("step 0      held-out CE: student 6.") and "warning" not in usual
    assert "warning  the teacher is worse" in exchanged


def test_own_metric_is_averaged_over_tokens_whatever_the_batch(setting, monkeypatch):
    config, rows, student, teacher = setting
    monkeypatch.setitem(METRICS, "labels", lambda student, teacher, labels: labels)
    labels = [label for row in rows for label in row["labels"] if label != -100]
    for config.batch_size in (1, 3):
        metrics = evaluate(student, teacher, rows, config, pad_token_id=2)
        assert metrics["eval/labels"] == pytest.approx(sum(labels) / len(labels))


def test_each_metric_equals_its_definition(setting):
    config, rows, student, teacher = setting
    config.alpha, config.temperature, config.divergence = 0.3, 2.0, "reverse_kl"
    metrics = evaluate(student, teacher, rows, config, pad_token_id=2)
    expected = {
        "eval/ce_loss": lambda s, t, y: F.cross_entropy(s, y, reduction="none"),
        "eval/teacher_ce_loss": lambda s, t, y: F.cross_entropy(t, y, reduction="none"),
        "eval/kl_loss": lambda s, t, y: 4 * reverse_kl(s, t, 2.0),
        "eval/kl_t1": lambda s, t, y: forward_kl(s, t),
        "eval/top1_agreement": lambda s, t, y: s.argmax(-1) == t.argmax(-1),
        "eval/acceptance_rate": lambda s, t, y: 1 - total_variation(s, t),
    }
    for key, per_token in expected.items():
        assert metrics[key] == pytest.approx(by_hand(student, teacher, rows, per_token), rel=1e-4), key
    assert metrics["eval/perplexity"] == pytest.approx(math.exp(metrics["eval/ce_loss"]))
    assert metrics["eval/loss"] == pytest.approx(0.3 * metrics["eval/ce_loss"] + 0.7 * metrics["eval/kl_loss"])


def test_metrics_do_not_depend_on_the_batch_size(setting):
    config, rows, student, teacher = setting
    results = []
    for batch_size in (1, 3, 64):
        config.batch_size = batch_size
        results.append(evaluate(student, teacher, rows, config, pad_token_id=2))
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-5)


def test_metrics_do_not_depend_on_the_chunk_size(setting, monkeypatch):
    config, rows, student, teacher = setting
    whole = evaluate(student, teacher, rows, config, pad_token_id=2)
    monkeypatch.setattr("kdkit.evaluate.CHUNK_TOKENS", 7)
    assert evaluate(student, teacher, rows, config, pad_token_id=2) == pytest.approx(whole, rel=1e-5)


def test_metrics_of_the_teacher_with_itself_are_kl_0_and_agreement_1(setting):
    config, rows, _, teacher = setting
    metrics = evaluate(teacher, teacher, rows, config, pad_token_id=2)
    assert metrics["eval/kl_t1"] == pytest.approx(0, abs=1e-6)
    assert metrics["eval/top1_agreement"] == 1 and metrics["eval/acceptance_rate"] == pytest.approx(1)
    assert metrics["eval/ce_loss"] == metrics["eval/teacher_ce_loss"]


@pytest.mark.parametrize("wrap", [lambda model: model, BodyAndHead], ids=["model", "wrapped"])
@pytest.mark.parametrize("training", [True, False])
def test_evaluation_of_a_student_with_dropout_uses_eval_mode_and_restores_the_mode(setting, tmp_path, wrap, training):
    config, rows, _, teacher = setting
    student = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(student_with_dropout(tmp_path / "student")))
    with torch.no_grad():
        student.train(), torch.manual_seed(0)
        batch = collate(rows[:2], 2)
        losses = [student(batch["input_ids"]).logits.sum() for _ in range(2)]
    assert losses[0] != losses[1]  # dropout is active, so this test can fail
    student, before = wrap(student.train(training)), torch.get_rng_state()
    results = [evaluate(student, wrap(teacher), rows, config, pad_token_id=2) for _ in range(2)]
    assert results[0] == results[1]
    assert torch.equal(torch.get_rng_state(), before)
    assert {module.training for module in student.modules()} == {training}
    assert not any(module.training for module in teacher.modules())
    assert results[0] == evaluate(student.eval(), teacher, rows, config, pad_token_id=2)


def test_rows_without_a_label_do_not_change_the_metrics(setting):
    config, rows, student, teacher = setting
    silent = [{**row, "labels": [IGNORE_INDEX] * len(row["labels"])} for row in rows[:3]]
    whole = evaluate(student, teacher, rows, config, pad_token_id=2)
    assert evaluate(student, teacher, [*silent, *rows], config, pad_token_id=2) == pytest.approx(whole, rel=1e-5)


def test_comparison_prints_the_logged_metrics_and_writes_curves(small, tmp_path, capsys):
    runs = [str(tmp_path / name) for name in ("ce", "kd")]
    for run, alpha in zip(runs, (1.0, 0.0), strict=True):
        train(small(alpha=alpha, output_dir=run, max_steps=2))
    capsys.readouterr()
    main(runs)
    printed = capsys.readouterr().out
    assert f"{runs[0]}: CE " in printed and f"{runs[1]}: forward_kl(T=1) " in printed and "in fp32" in printed
    assert (tmp_path / "kd" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    # the numbers in the table are those that the run logged last
    last = json.loads((tmp_path / "kd" / "metrics.jsonl").read_text().splitlines()[-1])
    row = next(line for line in printed.splitlines() if "forward_kl" in line)
    assert f"{last['eval/ce_loss']:.3f}" in row and f"{last['eval/kl_t1']:.3f}" in row


def test_comparison_says_that_the_teacher_does_not_know_the_text(small, tmp_path):
    shutil.copytree(ASSETS / "embedded_teacher", tmp_path / "teacher")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "teacher")).save_pretrained(
        tmp_path / "teacher"
    )
    student = str(ASSETS / "embedded_teacher")
    weak = small(teacher_model=str(tmp_path / "teacher"), student_model=student, max_steps=1)
    good = small(max_steps=1, output_dir=str(tmp_path / "good"))
    for config in (weak, good):
        train(config)
    assert f"note  on this text {weak.output_dir} is better than the teacher" in compare([weak.output_dir])
    assert "note" not in compare([good.output_dir])


@pytest.mark.parametrize("sizes", [(1100, 1060), (1060, 1100)])
def test_comparison_of_heads_of_two_sizes_gives_the_logged_numbers(small, tmp_path, sizes):
    """Both are cut to the smaller one, as in training: also for the teacher, whose other entries are likely here."""
    for role, size in zip(("teacher", "student"), sizes, strict=True):
        shutil.copytree(ASSETS / "embedded_teacher", tmp_path / role)
        model = load_teacher(dtype=torch.float32)
        model.resize_token_embeddings(size, mean_resizing=False)
        model.get_output_embeddings().weight.data[1060:].normal_()
        model.save_pretrained(tmp_path / role)
    config = small(
        teacher_model=str(tmp_path / "teacher"), student_model=str(tmp_path / "student"), max_steps=1,
        teacher_dtype="float32",
    )  # fmt: skip
    last = train(config)[-1]
    table = compare([config.output_dir])
    numbers = [line.split(" M ")[1].split()[0] for line in table.splitlines() if " M " in line]
    assert numbers == [f"{last['eval/teacher_ce_loss']:.3f}", f"{last['eval/ce_loss']:.3f}"]


def test_sample_of_a_conversation_is_its_whole_prompt_and_no_setting_of_the_student_changes_it(small, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = [("user", "what is a list?"), ("assistant", "a sequence of items")]
    messages = [{"role": role, "content": content} for role, content in turns]
    data = json_lines(tmp_path / "chats.jsonl", *[{"messages": messages}] * 60)
    config = small(dataset=str(data), chat_template=str(template), max_steps=1)
    train(config)
    printed = compare([config.output_dir])
    assert "continues '<user>what is a list?<eos><assistant>':" in printed.replace(
        load_tokenizer(config).eos_token, "<eos>"
    )
    path = Path(config.output_dir, "final", "generation_config.json")
    path.write_text(json.dumps({"do_sample": True, "repetition_penalty": 9.0, "temperature": 5.0, "max_new_tokens": 3}))
    assert compare([config.output_dir]) == printed


def test_comparison_of_a_folder_without_a_run_names_the_missing_file(tmp_path):
    with pytest.raises(UsageError, match=r"no config\.yaml"):
        compare([str(tmp_path)])


def test_comparison_of_runs_with_different_held_out_text_is_refused(small, tmp_path):
    for name, tokens in (("a", 600), ("b", 700)):
        train(small(output_dir=str(tmp_path / name), max_steps=1, max_eval_tokens=tokens))
    with pytest.raises(UsageError, match="another max_eval_tokens"):
        compare([str(tmp_path / "a"), str(tmp_path / "b")])
