import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kdkit.config import UsageError
from kdkit.models import (
    ASSETS,
    BodyAndHead,
    check_pair,
    load_student,
    load_teacher,
    load_tokenizer,
    student_from_layers,
)

TEACHER = ASSETS / "embedded_teacher"


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded teacher to spoil."""
    return shutil.copytree(TEACHER, tmp_path / "model")


def tiny(rows=1024, **fields):
    config = AutoConfig.from_pretrained(ASSETS / "embedded_student", vocab_size=rows, **fields)
    return AutoModelForCausalLM.from_config(config)


def test_the_teacher_is_frozen_and_stays_so_while_the_student_trains(small):
    teacher = load_teacher()
    student = load_student(small(), teacher).train()
    assert student.training and not teacher.training
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert teacher.dtype == torch.bfloat16 and student.dtype == torch.float32


def test_the_embedded_teacher_fits_its_card():
    card = (TEACHER / "README.md").read_text()
    assert "Held-out cross-entropy" in card
    assert sum(file.stat().st_size for file in TEACHER.iterdir()) < 8e6


def test_the_seed_decides_the_random_student(small):
    def weights(seed):
        torch.manual_seed(seed)
        return load_student(small(), None).state_dict()["model.layers.0.mlp.up_proj.weight"]

    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))


@pytest.mark.parametrize("layers, kept", [([0, 2], [0, 2]), (2, [0, 3]), (3, [0, 2, 3]), (4, [0, 1, 2, 3]), (1, [0])])
def test_a_student_of_layers_has_those_of_the_teacher(layers, kept):
    teacher = load_teacher(dtype=torch.float32)
    student = student_from_layers(teacher, layers)
    assert student.config.num_hidden_layers == len(kept) == len(student.model.layers)
    for layer, origin in enumerate(kept):
        torch.testing.assert_close(
            student.model.layers[layer].state_dict(), teacher.model.layers[origin].state_dict(), rtol=0, atol=0
        )
    assert student.lm_head.weight.data_ptr() == student.model.embed_tokens.weight.data_ptr()  # still tied


def test_a_student_of_all_layers_is_the_teacher():
    teacher = load_teacher(dtype=torch.float32)
    ids = torch.arange(30)[None]
    student = student_from_layers(teacher, 4).eval()
    torch.testing.assert_close(student(ids).logits, teacher(ids).logits, rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("layers", [0, 5, [0, 4], [2, 1], [1, 1], [], [-1, 2]])
def test_layers_that_are_not_there_are_named(layers):
    with pytest.raises(UsageError, match="student_layers is"):
        student_from_layers(load_teacher(), layers)


def test_the_body_and_head_make_the_models_logits():
    model = load_teacher(dtype=torch.float32)
    ids = torch.arange(40)[None]
    batch = {"input_ids": ids, "position_ids": torch.arange(40)[None]}
    logits = BodyAndHead(model)(batch, lambda hidden, head, scale: scale * hidden @ head.T, 1.0)
    torch.testing.assert_close(logits, model(ids).logits)


def test_a_wrapped_model_trains_its_head():
    model = BodyAndHead(tiny(tie_word_embeddings=False))
    batch = {"input_ids": torch.arange(8)[None], "position_ids": torch.arange(8)[None]}
    model(batch, lambda hidden, head: (hidden @ head.T).logsumexp(-1).sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# --- what cannot be loaded


@pytest.mark.parametrize("name", ["./nothing", "/no/such/model", "no/such/model"])
def test_a_missing_folder_is_named_before_anything_is_looked_up(name):
    with pytest.raises(UsageError, match=f"teacher_model {name} does not exist"):
        load_teacher(name)


def test_a_hub_id_without_a_network_is_named():
    with pytest.raises(UsageError, match="teacher_model nobody/nothing could not be loaded"):
        load_teacher("nobody/nothing")


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"without a config\.json"):
        load_teacher(str(tmp_path))


def test_a_folder_without_weights_is_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="could not be loaded"):
        load_teacher(str(folder))


# --- the pair


def check(small, teacher, student, **fields):
    config = small(**fields)
    return check_pair(config, teacher, student, load_tokenizer(config))


def test_heads_of_different_width_are_cut_to_the_narrower(small):
    pair = check(small, tiny(1100), tiny(1060))
    assert pair.vocab_size == 1060
    assert any("1,100 and 1,060 rows" in line for line in pair.report)


def test_a_head_with_too_few_rows_is_refused(small):
    with pytest.raises(UsageError, match=r"student's head has 1000 rows for a tokenizer of 1024 entries"):
        check(small, tiny(), tiny(1000))


def test_another_tokenizer_of_the_same_size_is_refused(small, folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    entries = tokenizer["model"]["vocab"]
    entries["Ġthe"], entries["Ġto"] = entries["Ġto"], entries["Ġthe"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    ours, theirs = (AutoTokenizer.from_pretrained(path).get_vocab() for path in (TEACHER, folder))
    assert len(ours) == len(theirs) and ours != theirs
    with pytest.raises(UsageError, match=r"different tokenizers: 2 tokens.*'Ġthe'"):
        check(small, load_teacher(), load_teacher(), student_model=str(folder))


def test_a_pair_with_one_tokenizer_passes(small, folder):
    pair = check(small, load_teacher(), load_student(small(student_model=str(folder)), None), student_model=str(folder))
    assert pair.vocab_size == 1024 and len(pair.report) == 1


def test_a_soft_cap_is_refused_by_name(small):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=1024, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=1.0, initializer_range=0.5,
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"teacher's logits.*final_logit_softcapping = 1\.0"):
        check(small, Gemma2ForCausalLM(config), tiny())


def test_a_bias_in_the_head_is_refused_by_name(small):
    student = tiny(tie_word_embeddings=False)
    student.lm_head.bias = torch.nn.Parameter(torch.randn(1024))
    with pytest.raises(UsageError, match=r"student's logits.*bias in the head"):
        check(small, tiny(), student)
