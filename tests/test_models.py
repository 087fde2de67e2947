import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import errors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kdkit.config import UsageError
from kdkit.models import (
    ASSETS,
    BodyAndHead,
    check_models,
    check_pair,
    load_student,
    load_teacher,
    load_tokenizer,
    student_from_layers,
)
from kdkit.train import train

RESPONSE = SimpleNamespace(status_code=401, headers={}, request=None, url="", text="")
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


def test_a_folder_without_weights_is_named_before_the_data_is_read(small, folder):
    (folder / "model.safetensors").unlink()
    torch.save(load_teacher().state_dict(), folder / "pytorch_model.bin")  # whole, but a pickle
    config = small(teacher_model=str(folder), dataset="never/looked-at")
    for look in (lambda: train(config), lambda: load_teacher(str(folder))):
        with pytest.raises(UsageError, match=r"teacher_model .*model .*safetensors"):
            look()


def test_a_truncated_safetensors_file_is_named_before_the_data_is_read(small, folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    for role in ("teacher", "student"):
        with pytest.raises(UsageError, match=f"{role}_model .*: model.safetensors is truncated"):
            train(small(**{f"{role}_model": str(folder)}, dataset="never/looked-at"))
    with pytest.raises(UsageError, match="broken safetensors file"):
        load_teacher(str(folder))


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_wrong_name_is_told_before_the_data_is_read(small, tmp_path, role):
    with pytest.raises(UsageError, match=rf"{role}_model .* without a config\.json"):
        train(small(**{f"{role}_model": str(tmp_path)}, dataset="never/looked-at"))


@pytest.mark.parametrize(
    "error, said",
    [
        ("GatedRepoError", "teacher_model some/model is gated: ask for access at https://huggingface.co/some/model"),
        ("RepositoryNotFoundError", "teacher_model some/model is neither a local path nor on the hub"),
        ("RevisionNotFoundError", "teacher_model some/model has no such revision"),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_line(monkeypatch, error, said):
    def refuse(*_, **__):
        raise getattr(errors, error)("401 Client Error", response=RESPONSE)

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", refuse)
    with pytest.raises(UsageError, match=said) as raised:
        load_teacher("some/model")
    assert "\n" not in str(raised.value)


@pytest.fixture
def cached_hub(tmp_path, monkeypatch):
    """The embedded teacher in the hub's cache as some/model, with a branch of it that has no <|pad|>."""
    repo = tmp_path / "models--some--model"
    for branch, commit in (("main", "a" * 40), ("other", "b" * 40)):
        shutil.copytree(TEACHER, repo / "snapshots" / commit)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / branch).write_text(commit)
    settings = repo / "snapshots" / commit / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "pad_token": "<|eos|>"}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return "some/model"


def test_a_hub_id_is_loaded_at_its_revision(small, cached_hub):
    pads = [
        load_tokenizer(small(teacher_model=cached_hub + revision)).pad_token
        for revision in ("", "@other", "@" + "b" * 40)
    ]
    assert pads == ["<|pad|>", "<|eos|>", "<|eos|>"]
    config = small(teacher_model=cached_hub, student_model=f"{cached_hub}@other")
    check_models(config)
    teacher = load_teacher(cached_hub, config=config)
    assert any("pad <|pad|>" in line for line in check(small, teacher, load_student(config, teacher)).report)


def test_fields_decide_the_type_and_the_attention(small):
    config = small(teacher_dtype="float16", attn_implementation="eager")
    teacher = load_teacher("embedded", torch.bfloat16, config)
    assert teacher.dtype == torch.float16 and load_teacher("embedded", torch.bfloat16, small()).dtype == torch.bfloat16
    for model in (teacher, load_student(config, None), load_student(small(student_layers=2), teacher)):
        assert model.config._attn_implementation == "eager"
    with pytest.raises(UsageError, match=r"teacher_model embedded could not be loaded: FlashAttention2"):
        load_teacher("embedded", torch.bfloat16, small(attn_implementation="flash_attention_2"))


def test_code_that_comes_with_a_model_is_not_run_unless_asked_for(small, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(
        "import pathlib\nfrom transformers import LlamaConfig\n"
        f"pathlib.Path({str(tmp_path / 'ran')!r}).touch()\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    with pytest.raises(UsageError, match=r"teacher_model .*trust_remote_code"):
        check_models(small(teacher_model=str(folder)))
    assert not (tmp_path / "ran").exists()
    check_models(small(teacher_model=str(folder), trust_remote_code=True))
    assert (tmp_path / "ran").exists()


def test_a_chat_template_is_read_from_a_file(small, tmp_path):
    (tmp_path / "chat.jinja").write_text("{{ messages[0]['content'] }}")
    tokenizer = load_tokenizer(small(chat_template=str(tmp_path / "chat.jinja")))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    with pytest.raises(UsageError, match=r"chat_template nothing\.jinja does not exist"):
        load_tokenizer(small(chat_template="nothing.jinja"))


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
    assert pair.vocab_size == 1024 and not any("note" in line for line in pair.report)
    assert "context: 512 and 512 tokens" in pair.report


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


def spoil(folder, **fields):
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **fields}))
    return str(folder)


def report_of(small, folder, teacher_template=None):
    config = small(student_model=str(folder))
    tokenizer = load_tokenizer(config)
    tokenizer.chat_template = teacher_template
    return check_pair(config, load_teacher(), load_student(config, None), tokenizer).report


def test_other_special_tokens_are_reported(small, folder):
    report = report_of(small, spoil(folder, eos_token="<|pad|>"))
    assert "note: eos_token is <|eos|> for the teacher and <|pad|> for the student: the teacher's is used" in report


def test_padding_with_the_end_is_reported(small, folder):
    config = small(teacher_model=spoil(folder, pad_token="<|eos|>"), student_layers=2)
    teacher = load_teacher(str(folder))
    report = check_pair(config, teacher, load_student(config, teacher), load_tokenizer(config)).report
    assert any("pad <|eos|> (padding is told from the end by its place" in line for line in report)


def test_chat_templates_are_compared_as_they_render(small, folder):
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    report = report_of(small, spoil(folder, chat_template=template + "{# other, but alike #}"), template)
    assert "chat templates: they render alike" in report
    report = report_of(small, spoil(folder, chat_template=template.replace(": ", ":")), template)
    assert any("templates differ, at character 7 by ' Be brief" in line for line in report)
    report = report_of(small, spoil(folder, chat_template=template), None)
    assert any("templates differ, at character 0" in line and "'none at all'" in line for line in report)


def test_rows_longer_than_a_context_are_refused(small):
    with pytest.raises(UsageError, match=r"max_length is 500, more than the student's context of 300 tokens"):
        check(small, tiny(), tiny(max_position_embeddings=300), max_length=500)


def test_dropout_in_the_student_is_reported(small):
    report = check(small, tiny(), tiny(attention_dropout=0.1)).report
    assert "note: the student has dropout (attention_dropout 0.1)" in report


# --- nothing that runs code


def evil(tmp_path, **config):
    """A model folder whose code, or whose weights when unpickled, make the file `made`."""
    folder = shutil.copytree(ASSETS / "embedded_student", tmp_path / "evil")
    shutil.copytree(ASSETS / "embedded_teacher", folder, dirs_exist_ok=True, ignore=lambda *_: ["model.safetensors"])
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **config}))
    return str(folder), tmp_path / "made"


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    folder, made = evil(tmp_path, model_type="evil", auto_map=classes)
    (Path(folder) / "code.py").write_text(f"open({str(made)!r}, 'w')")
    with pytest.raises(UsageError, match=r"teacher_model .* comes with Python code of its own, which is not run"):
        load_teacher(folder)
    assert not made.exists()


class MakesAFile:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_weights_are_not_unpickled(tmp_path):
    folder, made = evil(tmp_path)
    torch.save({"model.norm.weight": MakesAFile(made)}, Path(folder) / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"could not be loaded: .*safetensors"):
        load_teacher(folder)
    assert not made.exists()
    torch.load(Path(folder) / "pytorch_model.bin", weights_only=False)
    assert made.exists()  # so the test can fail
