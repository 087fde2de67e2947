"""Loading models and checking pairs: what is loaded, and that wrong names and unsuitable pairs are explained."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

from kdkit.config import UsageError
from kdkit.data import collate
from kdkit.models import (
    ASSETS,
    BodyAndHead,
    check_models,
    check_pair,
    load_student,
    load_teacher,
    load_tokenizer,
    student_from_layers,
    teacher_dtype,
    teacher_fingerprint,
)
from kdkit.train import train

TEACHER = ASSETS / "embedded_teacher"
BATCH = {"input_ids": torch.arange(40)[None], "position_ids": torch.arange(40)[None]}


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded teacher to damage."""
    return shutil.copytree(TEACHER, tmp_path / "model")


def edit(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def tiny(rows=1024, **fields):
    config = AutoConfig.from_pretrained(ASSETS / "embedded_student", vocab_size=rows, **fields)
    return AutoModelForCausalLM.from_config(config)


def test_embedded_teacher_has_a_card_and_stays_small():
    assert "Held-out cross-entropy" in (TEACHER / "README.md").read_text()
    assert sum(file.stat().st_size for file in TEACHER.iterdir()) < 8e6


@pytest.mark.parametrize("layers, kept", [([0, 2], [0, 2]), (2, [0, 3]), (3, [0, 2, 3]), (4, [0, 1, 2, 3]), (1, [0])])
def test_student_of_layers_has_the_teachers_weights_and_ties(layers, kept):
    teacher = load_teacher(dtype=torch.float32)
    student = student_from_layers(teacher, layers).eval()
    assert student.config.num_hidden_layers == len(kept) == len(student.model.layers)
    for layer, origin in zip(student.model.layers, kept, strict=True):
        expected = teacher.model.layers[origin].state_dict()
        torch.testing.assert_close(layer.state_dict(), expected, rtol=0, atol=0)
    assert student.lm_head.weight.data_ptr() == student.model.embed_tokens.weight.data_ptr()
    assert all(parameter.requires_grad for parameter in student.parameters())
    if layers == 4:  # all of them
        torch.testing.assert_close(student(**BATCH).logits, teacher(**BATCH).logits, rtol=0, atol=0)


@pytest.mark.parametrize("layers", [0, 5, [0, 4], [2, 1], [1, 1], [], [-1, 2]])
def test_layers_that_do_not_exist_are_named(layers):
    with pytest.raises(UsageError, match="student_layers is"):
        student_from_layers(load_teacher(), layers)


def test_body_and_head_give_the_models_logits_and_sizes_and_get_gradients():
    model = tiny(tie_word_embeddings=False)
    wrapped = BodyAndHead(model)
    logits = wrapped(BATCH, lambda hidden, head, scale: scale * hidden @ head.T, 1.0)
    torch.testing.assert_close(logits, model(**BATCH).logits)
    hidden, head = wrapped(BATCH)
    torch.testing.assert_close(hidden @ head.T, logits)
    logits.logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert (wrapped.head_rows, wrapped.context, wrapped.num_parameters) == (1024, 512, model.num_parameters())


@pytest.mark.parametrize("lengths", [[[8], [8]], [[5, 3], [8]], [[5], [8]]], ids=["full rows", "packed", "padded"])
def test_transformers_is_told_the_documents_that_it_finds(lengths, monkeypatch):
    """It finds them on the device, and the host would wait for the answer. Padding is a document, too."""
    rows = [[i for length in row for i in range(length)] for row in lengths]
    batch = collate([{"input_ids": row, "labels": row, "position_ids": row} for row in rows], 0)
    model, find, told = BodyAndHead(tiny()), masking_utils.find_packed_sequence_indices, []

    def forward(position_ids, **_):
        told.append(masking_utils.find_packed_sequence_indices(position_ids))

    monkeypatch.setattr(model.decoder, "forward", forward)
    model.body(batch)
    assert masking_utils.find_packed_sequence_indices is find
    found = find(batch["position_ids"])
    assert told == [None] if found is None else torch.equal(told[0], found)


# --- what cannot be loaded


@pytest.mark.parametrize("name", ["./nothing", "/no/such/model", "no/such/model"])
def test_missing_folder_is_named_before_the_hub_is_asked(monkeypatch, name):
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", lambda *_, **__: pytest.fail("the hub is asked"))
    with pytest.raises(UsageError, match=f"teacher_model {name} does not exist"):
        load_teacher(name)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_folder_without_a_model_is_named_before_the_data_is_read(small, tmp_path, role):
    with pytest.raises(UsageError, match=rf"{role}_model .* in its config\.json"):
        train(small(**{f"{role}_model": str(tmp_path)}, dataset="never/looked-at"))


def test_truncated_weights_are_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UsageError, match=r"teacher_model .* broken safetensors file"):
        load_teacher(str(folder))


def test_refusal_of_the_hub_is_explained_in_one_line(monkeypatch):
    def refuse(*_, **__):
        response = SimpleNamespace(status_code=401, headers={}, request=None, url="", text="")
        raise GatedRepoError("401 Client Error", response=response)

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", refuse)
    with pytest.raises(
        UsageError, match=r"^teacher_model some/model is gated: .* https://huggingface.co/some/model.*$"
    ):
        load_teacher("some/model")


def test_hub_id_is_loaded_at_its_revision(small, tmp_path, monkeypatch):
    """From a hub's cache with the embedded teacher as some/model, and branches of it that have no <|pad|>."""
    repo = tmp_path / "models--some--model"
    for branch, commit in (("main", "a" * 40), ("other", "b" * 40), ("refs/pr/1", "b" * 40)):
        shutil.copytree(TEACHER, repo / "snapshots" / commit, dirs_exist_ok=True)
        (repo / "refs" / branch).parent.mkdir(parents=True, exist_ok=True)
        (repo / "refs" / branch).write_text(commit)
    edit(repo / "snapshots" / commit / "tokenizer_config.json", pad_token="<|eos|>")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for revision in ("", "@other", "@refs/pr/1", "@" + "b" * 40):
        tokenizer = load_tokenizer(small(teacher_model=f"some/model{revision}"))
        assert tokenizer.pad_token == ("<|eos|>" if revision else "<|pad|>")
    config = small(teacher_model="some/model", student_model="some/model@other")
    assert teacher_fingerprint(config) == teacher_fingerprint(small())
    check_models(config)
    teacher = load_teacher("some/model", config=config)
    check_pair(config, teacher, load_student(config, teacher), load_tokenizer(config))


def test_models_have_their_dtype_mode_and_attention(small):
    config = small(teacher_dtype="float16", attn_implementation="eager")
    assert (teacher_dtype(config, "bf16"), teacher_dtype(small(), "bf16")) == (torch.float16, torch.bfloat16)
    teacher = load_teacher("embedded", torch.float16, config)
    students = load_student(config, None), load_student(small(student_layers=2), teacher)
    assert teacher.dtype == torch.float16 and all(student.dtype == torch.float32 for student in students)
    for model in (teacher, *students):
        assert model.config._attn_implementation == "eager"
    assert all(student.training for student in students) and not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    with pytest.raises(UsageError, match=r"teacher_model embedded could not be loaded: FlashAttention2"):
        load_teacher("embedded", torch.bfloat16, small(attn_implementation="flash_attention_2"))


def test_chat_template_is_read_from_a_file(small, tmp_path):
    (tmp_path / "chat.jinja").write_text("{{ messages[0]['content'] }}")
    tokenizer = load_tokenizer(small(chat_template=str(tmp_path / "chat.jinja")))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    with pytest.raises(UsageError, match=r"chat_template nothing\.jinja does not exist"):
        load_tokenizer(small(chat_template="nothing.jinja"))


# --- nothing that runs code


def test_code_of_a_model_runs_only_if_asked_for(small, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    edit(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    (folder / "own.py").write_text(
        "import pathlib\nfrom transformers import LlamaConfig\n"
        f"pathlib.Path({str(tmp_path / 'ran')!r}).touch()\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    for load in (lambda: check_models(small(teacher_model=str(folder))), lambda: load_teacher(str(folder))):
        with pytest.raises(UsageError, match=r"comes with Python code of its own, which is not run.*trust_remote_code"):
            load()
    assert not (tmp_path / "ran").exists()
    check_models(small(teacher_model=str(folder), trust_remote_code=True))
    assert (tmp_path / "ran").exists()


def test_weights_are_never_unpickled(folder):
    torch.save(load_teacher().state_dict(), folder / "pytorch_model.bin")  # which could be loaded
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"teacher_model .*model .*safetensors"):
        load_teacher(str(folder))


# --- the pair


def check(small, teacher, student, **fields):
    config = small(**fields)
    return check_pair(config, teacher, student, load_tokenizer(config))


@pytest.mark.parametrize("wrap", [BodyAndHead, lambda model: model])
def test_heads_of_different_sizes_are_cut_to_the_smaller(small, wrap):
    pair = check(small, wrap(tiny(1100)), wrap(tiny(1060)))
    assert pair.vocab_size == 1060 and any("1,100 and 1,060 rows" in line for line in pair.report)


@pytest.mark.parametrize(
    "teacher, student, message",
    [
        (tiny, lambda: tiny(1000), r"student's head has 1000 rows for a tokenizer of 1024 entries"),
        (
            tiny,
            lambda: tiny(max_position_embeddings=300),
            r"max_length is 500, expected at most 300, the context of the student",
        ),
    ],
)
def test_unsuitable_model_is_refused_by_name(small, teacher, student, message):
    with pytest.raises(UsageError, match=message):
        check(small, teacher(), student(), max_length=500)


def test_dropout_in_the_student_is_reported(small):
    report = check(small, tiny(), tiny(attention_dropout=0.1)).report
    assert "note: the student has dropout (attention_dropout 0.1)" in report


def test_same_tokenizer_passes_and_another_of_the_same_size_is_refused(small, folder):
    fields = {"student_model": str(folder)}
    pair = check(small, load_teacher(), load_student(small(**fields), None), **fields)
    assert pair.vocab_size == 1024 and not any("note" in line for line in pair.report)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    entries = tokenizer["model"]["vocab"]
    entries["Ġthe"], entries["Ġto"] = entries["Ġto"], entries["Ġthe"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match=r"different tokenizers: 2 tokens.*'Ġthe'"):
        check(small, load_teacher(), load_teacher(), **fields)


def test_other_special_tokens_and_templates_are_reported(small, folder):
    edit(folder / "tokenizer_config.json", eos_token="<|pad|>", chat_template="another")
    report = check(small, load_teacher(), load_student(small(), None), student_model=str(folder)).report
    assert "note: eos_token is <|eos|> for the teacher and <|pad|> for the student: the teacher's is used" in report
    assert "note: the chat templates differ: the teacher's is used for both" in report
    edit(folder / "tokenizer_config.json", eos_token="<|eos|>", pad_token="<|eos|>")
    report = check(small, load_teacher(), load_teacher(), teacher_model=str(folder), student_layers=2).report
    assert any("pad <|eos|> (pad and eos share an id; padding is masked by position" in line for line in report)
