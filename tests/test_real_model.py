"""Tests with a real model: SmolLM2-135M-Instruct, which uses its end-of-turn token as padding.

They are skipped if its folder does not exist: $KDKIT_REAL_MODEL, or by default models/smollm2-135m-instruct, which
recipes/smollm2_from_package.py creates.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdkit.data import Rows, collate, load_rows, pack
from kdkit.data.chat import make_rows
from kdkit.data.records import Document
from kdkit.losses import IGNORE_INDEX
from kdkit.models import BodyAndHead, check_pair, load_teacher, load_tokenizer, student_from_layers
from kdkit.train import train

ROOT = Path(__file__).parent.parent
FOLDER = Path(os.environ.get("KDKIT_REAL_MODEL", ROOT / "models" / "smollm2-135m-instruct"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (FOLDER / "config.json").is_file(), reason=f"no model in {FOLDER}"),
]


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(str(FOLDER), torch.float32)


@pytest.fixture
def real(small, monkeypatch):
    """Return a function that makes configurations of short bf16 runs with a student of half the layers."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")

    def make(**fields):
        defaults = {
            "teacher_model": str(FOLDER), "student_layers": 15, "learning_rate": 2e-4, "warmup_ratio": 0.0,
            "max_train_tokens": 1000, "max_eval_tokens": 250, "max_length": 128, "batch_size": 2, "max_steps": 3,
        }  # fmt: skip
        return small(**{**defaults, **fields})

    return make


def evaluations(history):
    return [event for event in history if "eval/kl_t1" in event]


def test_logits_of_a_packed_document_equal_those_of_the_document_alone(teacher):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    texts = ("The capital of France is Paris.", "def f(x):\n    return x", "Water boils at 100 degrees")
    made = make_rows([Document(row, text) for row, text in enumerate(texts)], tokenizer, 64)
    rows = Rows.of([row for rows, _ in made for row in rows])
    batch = collate(pack(rows, 64), tokenizer.pad_token_id, length=48)  # with padding, whose id is that of eos
    assert teacher.config._attn_implementation == "sdpa" and batch["input_ids"].shape == (1, 48)
    for model in (teacher, student_from_layers(teacher, 15).eval()):
        with torch.no_grad():
            packed = BodyAndHead(model)(batch, lambda hidden, head: hidden @ head.T)[0]
            start = 0
            for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
                alone = model(torch.tensor([row["input_ids"]])).logits[0]  # plain transformers, without position ids
                torch.testing.assert_close(packed[start : start + len(alone)], alone, rtol=1e-3, atol=1e-3)
                start += len(alone)


def test_report_of_a_pair_says_that_pad_and_eos_share_an_id(real, teacher):
    config = real()
    tokenizer = load_tokenizer(config)
    pair = check_pair(config, teacher, student_from_layers(teacher, 2), tokenizer)
    assert pair.vocab_size == 49152
    assert any("pad <|im_end|> (pad and eos share an id" in line for line in pair.report)


def test_run_on_text_is_resumed_to_the_same_result_and_its_export_generates(real):
    config = real(save_steps=2)
    whole = evaluations(train(config))
    earlier, newest = sorted(Path(config.output_dir).glob("checkpoints/*"))
    assert (earlier.name, newest.name) == ("step_00000002", "step_00000003")
    shutil.rmtree(newest)  # as if the run had been killed after step 2
    resumed = evaluations(train(config))
    assert resumed[-1]["eval/kl_t1"] == pytest.approx(whole[-1]["eval/kl_t1"], rel=1e-3)
    assert whole[-1]["eval/kl_t1"] < 0.9 * whole[0]["eval/kl_t1"]
    assert whole[0]["eval/teacher_ce_loss"] < whole[0]["eval/ce_loss"]

    final = Path(config.output_dir) / "final"
    student = AutoModelForCausalLM.from_pretrained(final)
    assert student.config.num_hidden_layers == 15
    assert (
        student.lm_head.weight.data_ptr() == student.model.embed_tokens.weight.data_ptr()
    )  # tied: stored once in the file
    assert (final / "model.safetensors").stat().st_size < 4 * 1.01 * student.num_parameters()
    tokenizer = AutoTokenizer.from_pretrained(final)
    inputs = tokenizer("The function returns", return_tensors="pt")
    written = student.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert written.shape[1] > inputs["input_ids"].shape[1]


def test_run_on_conversations_learns_assistant_turns_with_their_end_tokens(real, tmp_path):
    lines = [
        {"messages": [
            {"role": "user", "content": f"What is {n} plus {n}?"}, {"role": "assistant", "content": f"{2 * n}."},
            {"role": "user", "content": "And one more?"}, {"role": "assistant", "content": f"That is {2 * n + 1}."},
        ]}
        for n in range(40)
    ]  # fmt: skip
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = real(dataset=str(tmp_path / "chat.jsonl"), eval_fraction=0.2, alpha=0.5)
    tokenizer = load_tokenizer(config)
    rows, _ = load_rows(config, tokenizer)
    learned = tokenizer.decode([label for label in rows[0]["labels"] if label != IGNORE_INDEX])
    assert learned.count("<|im_end|>") == 2 * sum(position == 0 for position in rows[0]["position_ids"])
    assert "What" not in learned and "assistant" not in learned and "\n" not in learned and "That is" in learned
    batch = collate(rows[:2], tokenizer.pad_token_id, length=140)
    assert (batch["labels"][:, 128:] == IGNORE_INDEX).all() and (batch["labels"] == tokenizer.eos_token_id).any()

    before, after = (evaluations(train(config))[i] for i in (0, -1))
    assert after["eval/loss"] < before["eval/loss"] and after["eval/ce_loss"] < before["eval/ce_loss"]
    student = AutoModelForCausalLM.from_pretrained(Path(config.output_dir) / "final")
    tokenizer = AutoTokenizer.from_pretrained(Path(config.output_dir) / "final")
    prompt = tokenizer.apply_chat_template(lines[0]["messages"][:1], add_generation_prompt=True, return_tensors="pt")
    written = student.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert written.shape[1] > prompt["input_ids"].shape[1]
