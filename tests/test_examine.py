"""What a model is asked before training. The answers are compared with transformers' own logits, for each document."""

import dataclasses

import pytest
import torch
from families import held_out_metrics, tiny
from transformers import AutoModelForCausalLM, BertConfig

from kdkit.config import DistillConfig, UsageError
from kdkit.data import load_rows
from kdkit.evaluate import evaluate
from kdkit.fused import fused_kd_loss
from kdkit.losses import dense_kd_loss, kd_loss
from kdkit.models import BodyAndHead, examine, load_tokenizer
from kdkit.targets import store
from kdkit.train import train

CPU = torch.device("cpu")
ROWS = [{"input_ids": [300, 42, 42, 77, 900, 901, 54, 55, 56, 57, 58, 59, 60, 61, 62]}]
BATCH = {"input_ids": torch.arange(40).view(2, 20), "position_ids": torch.arange(20).expand(2, 20)}


def examined(model) -> BodyAndHead:
    body = BodyAndHead(model)
    examine(body, "teacher", ROWS, CPU)
    return body


def cohere():
    return tiny("cohere")


def biased_and_capped():
    model = tiny("gemma2", seed=1)
    model.config.final_logit_softcapping = 0.7  # most logits are near the cap
    model.config.tie_word_embeddings = False
    model.lm_head = torch.nn.Linear(*model.lm_head.weight.T.shape)  # with a bias
    return model


@pytest.mark.parametrize(
    "family, packs, scale, cap",
    [
        ("llama", True, 1, None),
        ("gpt2", True, 1, None),
        ("qwen3_moe", True, 1, None),
        ("cohere", True, 0.0625, None),
        ("granite", True, 1, None),
        ("gemma2", True, 1, 30),
        ("phi", True, 1, None),
        ("gpt_oss", False, 1, None),
        ("opt", False, 1, None),
        ("bloom", False, 1, None),
        ("mamba", False, 1, None),
        ("recurrent_gemma", False, 1, 30),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_families_say_what_they_do(family, packs, scale, cap, dtype):
    body = examined(tiny(family).to(dtype))
    assert (body.packs, body.logit_scale, body.soft_cap) == (packs, scale, cap)


@pytest.mark.parametrize("factor", [1 / 6, 1 / 8, 1 / 12, 0.0625, 3.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_is_found_without_the_errors_of_rounding(factor, dtype):
    model = tiny("granite").to(dtype)
    model.config.logits_scaling = 1 / factor
    assert examined(model).logit_scale == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize("teacher, student", [(cohere, biased_and_capped), (biased_and_capped, cohere)])
@pytest.mark.parametrize("loss", [fused_kd_loss, dense_kd_loss])
def test_loss_and_gradient_are_those_of_the_models_own_logits(teacher, student, loss):
    teacher, student = examined(teacher()), examined(student())
    assert [body.soft_cap for body in (teacher, student)] in ([None, 0.7], [0.7, None])
    settings = {"alpha": 0.4, "temperature": 1.5}
    labels = (BATCH["input_ids"] + 1) % 1024
    caps = {"student_cap": student.soft_cap, "teacher_cap": teacher.soft_cap}
    with torch.no_grad():
        targets = teacher(BATCH)
    result = student(BATCH, lambda *both: loss(*both, *targets, labels, **settings, **caps))
    result.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    with torch.no_grad():
        teacher_logits = teacher.model(BATCH["input_ids"]).logits
    expected = kd_loss(student.model(BATCH["input_ids"]).logits, teacher_logits, labels, **settings)
    expected.loss.backward()
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-5, atol=1e-6)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)
    if student.soft_cap:
        assert gradients["model.lm_head.bias"].abs().max() > 0


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2", "phi"])
def test_evaluation_of_unwrapped_models_is_that_of_their_own_logits(small, family):
    models = {"teacher": tiny(family), "student": tiny(family, seed=1)}
    config = small(packing=False)
    rows = load_rows(config, load_tokenizer(config))[1]
    metrics = evaluate(models["student"], models["teacher"], rows, config, pad_token_id=0)
    for key, value in held_out_metrics(models, rows).items():
        assert metrics[key] == pytest.approx(value, rel=1e-4)


def test_evaluation_of_packed_rows_refuses_a_model_whose_documents_see_each_other(small):
    config = small()
    rows = load_rows(config, load_tokenizer(config))[1]
    with pytest.raises(UsageError, match=r"the student lets documents in one row see each other.*packing=False"):
        evaluate(tiny("mamba"), tiny("llama"), rows, config, pad_token_id=0)


def test_models_that_the_loss_cannot_use_are_refused():
    bert = AutoModelForCausalLM.from_config(
        BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    ).eval()
    with pytest.raises(UsageError, match=r"teacher \(BertLMHeadModel\) lets a token see a later one"):
        examined(bert)
    with pytest.raises(UsageError, match=r"ModernBertDecoderForCausalLM\) has logits that are not soft_cap\(scale"):
        examined(tiny("modernbert-decoder"))
    with pytest.raises(
        UsageError, match=r"XmodForCausalLM\) cannot run on plain token ids \(ValueError: Input language"
    ):
        examined(tiny("xmod"))


def test_a_model_whose_rows_depend_on_the_batch_is_refused(monkeypatch):
    model = tiny("llama")
    norm = model.model.norm.forward
    monkeypatch.setattr(model.model.norm, "forward", lambda x: norm(x - 0.5 * x.mean(0, keepdim=True)))
    with pytest.raises(UsageError, match="gives other hidden states in a batch or beside padding than alone"):
        examined(model)


def test_weights_that_are_not_finite_are_left_to_the_first_evaluation():
    model = tiny("llama")
    model.lm_head.weight.data[5] = float("nan")
    assert examined(model).packs


def test_examination_restores_the_mode_and_has_no_effect_on_the_random_numbers():
    body = BodyAndHead(tiny("gpt2").train())
    state = torch.get_rng_state()
    examine(body, "student", ROWS, CPU)
    assert body.training and body.model.training and torch.equal(state, torch.get_rng_state())


# --- what a run makes of the answers


@pytest.fixture
def folders(tmp_path):
    """Return a function that writes a tiny model of a family with the embedded tokenizer to a folder."""

    def write(family: str, seed: int = 0) -> str:
        folder = tmp_path / f"{family}_{seed}"
        tiny(family, seed).save_pretrained(folder)
        load_tokenizer(DistillConfig()).save_pretrained(folder)
        return str(folder)

    return write


def test_run_is_unpacked_if_one_of_the_models_needs_that(small, folders, capsys):
    config = small(teacher_model=folders("llama"), student_model=folders("mamba"), max_steps=1)
    train(config)
    assert "packing: no, one sample per row, since in the student the samples" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"packing is on, but in the student .*--packing false"):
        train(dataclasses.replace(config, packing=True, output_dir=config.output_dir + "2"))


def test_stored_targets_are_of_the_rows_that_the_teacher_needs(small, folders, tmp_path):
    config = small(
        teacher_model=folders("mamba"), student_model=folders("llama"), targets="hidden",
        targets_dir=str(tmp_path / "targets"), max_steps=1,
    )  # fmt: skip
    store(config)
    stored, online = train(config), train(dataclasses.replace(config, targets="online", output_dir=f"{tmp_path}/2"))
    assert stored[0]["eval/kl_t1"] == pytest.approx(online[0]["eval/kl_t1"], rel=1e-5)
    packed = dataclasses.replace(config, teacher_model=folders("llama"), targets_dir=str(tmp_path / "packed"))
    store(packed)
    with pytest.raises(UsageError, match="the samples of a row would see each other: use --packing false"):
        train(dataclasses.replace(packed, student_model=folders("mamba"), output_dir=f"{tmp_path}/3"))


@pytest.mark.parametrize("targets", ["hidden", "top_k"])
@pytest.mark.parametrize("family", ["gemma2", "phi"])
def test_targets_of_a_head_with_a_soft_cap_or_a_bias_equal_the_online_run(small, folders, tmp_path, family, targets):
    config = small(
        teacher_model=folders(family), student_model=folders("llama"), targets=targets, top_k=1040,
        targets_dir=str(tmp_path / "targets"), max_steps=2,
    )  # fmt: skip
    store(config)
    stored, online = train(config), train(dataclasses.replace(config, targets="online", output_dir=f"{tmp_path}/2"))
    for before, after in zip(stored, online, strict=True):
        for key in ("train/loss", "eval/kl_t1", "eval/teacher_ce_loss"):
            if key in before:
                assert before[key] == pytest.approx(after[key], rel=1e-4), key
