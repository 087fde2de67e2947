"""Loading models and checking pairs: what is loaded, and that wrong names and unsuitable pairs are explained."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import families
import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    DiffLlamaConfig,
    GPTNeoConfig,
    Mamba2Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    masking_utils,
)

from kdkit.config import UsageError
from kdkit.data import collate, load_rows
from kdkit.losses import forward_kl
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
from kdkit.models import cut as cutting
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


def test_student_is_cut_from_a_teacher_that_has_run_before():
    """Some recurrent models keep the state of the last text in their layers."""
    teacher = families.tiny("recurrent_gemma")
    teacher(torch.arange(8)[None], use_cache=False)
    assert student_from_layers(teacher, [0, 1]).config.num_hidden_layers == 2


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


@torch.no_grad()
@pytest.mark.parametrize("count, masked", [(1, False), (2, False), (3, False), (1, True)])
def test_layers_by_kl_are_those_whose_absence_raises_the_kl_most_on_the_tokens_in_the_loss(small, count, masked):
    config = small(student_layers=count, student_layers_by="kl", packing=False)
    teacher, rows = load_teacher(dtype=torch.float32), load_rows(config, load_tokenizer(config))[0][:4]

    def logits(model):
        return torch.cat([model(input_ids=torch.tensor(row["input_ids"])[None]).logits[0] for row in rows])

    without = [[layer for layer in range(4) if layer != absent] for absent in range(4)]
    cut = [student_from_layers(teacher, layers).eval() for layers in without]  # they do not skip, but lack a layer
    rises = torch.stack([forward_kl(logits(student), logits(teacher)) for student in cut])  # (4, N)
    keep = torch.tensor([label != -100 for row in rows for label in row["labels"]])
    if masked:  # only tokens for which the layer that matters least for all of them matters most
        keep &= rises.argmax(0) == rises[:, keep].sum(1).argmin()
        marks = iter(keep.tolist())
        rows = [{**row, "labels": [x if next(marks) else -100 for x in row["labels"]]} for row in rows]
    expected = sorted(rises[:, keep].sum(1).topk(count).indices.tolist())
    student = load_student(config, teacher, [*rows, {"input_ids": [], "labels": None}])  # later rows are not used
    assert keep.any() and not teacher.model.layers[0]._forward_hooks
    for layer, origin in zip(student.model.layers, expected, strict=True):
        torch.testing.assert_close(layer.state_dict(), teacher.model.layers[origin].state_dict(), rtol=0, atol=0)


def test_all_ranks_keep_the_layers_that_rank_0_has_chosen(small, monkeypatch, capsys):
    monkeypatch.setattr(cutting, "broadcast_object_list", lambda ours: ours.__setitem__(0, [1, 3]) or ours)
    teacher, rows = load_teacher(dtype=torch.float32), [{"input_ids": [5, 6, 7], "labels": [6, 7, 8]}]
    student = load_student(small(student_layers=2, student_layers_by="kl"), teacher, rows)
    for layer, origin in zip(student.model.layers, [1, 3], strict=True):
        torch.testing.assert_close(layer.state_dict(), teacher.model.layers[origin].state_dict(), rtol=0, atol=0)
    assert "layers   1, 3 of the teacher" in capsys.readouterr().out


@pytest.mark.parametrize("layers", [0, 5, [0, 4], [2, 1], [1, 1], [], [-1, 2]])
def test_layers_that_do_not_exist_are_named(layers):
    with pytest.raises(UsageError, match="student_layers is"):
        student_from_layers(load_teacher(), layers)


SMALL = {"vocab_size": 1024, "hidden_size": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LAYERS = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 32}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = {  # their layers differ in kind, by several fields of their configs
    "smollm3": SmolLM3Config(**SMALL, **LAYERS, no_rope_layer_interval=2),
    "gpt_neo": GPTNeoConfig(**SMALL, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]]),
    "qwen3_moe": Qwen3MoeConfig(**SMALL, **LAYERS, **EXPERTS, num_experts=4, head_dim=8, mlp_only_layers=[1]),
    "deepseek_v3": DeepseekV3Config(
        **SMALL, **LAYERS, **EXPERTS, first_k_dense_replace=2, n_routed_experts=4, n_group=1, topk_group=1,
        q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    ),
    "mamba2": Mamba2Config(
        **SMALL, num_hidden_layers=4, state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=16
    ),
}  # fmt: skip


def random_model(config):
    """A model whose attention is far from uniform, as that of a trained one is."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data.mul_(20)
    return model


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_student_of_layers_is_the_teacher_with_the_others_skipped_also_when_read_again(family, tmp_path):
    teacher = random_model(FAMILIES[family])
    student = student_from_layers(teacher, [1, 2]).eval()
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(3, 43)[None]
    (blocks,) = [m for m in teacher.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4 and m[0]._modules]
    for index in (0, 3):
        blocks[index].forward = lambda x, *_, **__: (x, None) if family == "gpt_neo" else x
    for model in (student, again):
        torch.testing.assert_close(model(ids).logits, teacher(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields, named", [({}, "lambda_init"), ({"cut_wrongly": True}, "its logits would differ")])
def test_teacher_that_cannot_be_cut_is_refused_in_one_line(monkeypatch, fields, named):
    """By a setting that depends on the index of the layer, and by its logits."""
    teacher = random_model(DiffLlamaConfig(**SMALL, **LAYERS))
    if fields:
        teacher = load_teacher(dtype=torch.float32)
        monkeypatch.setattr("kdkit.models.cut._layer_lists", lambda *_: ["model.layers"])
        teacher.model.layers[3].input_layernorm.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(UsageError, match=rf"^student_layers cannot cut a .*{named}.*--student_model$"):
        student_from_layers(teacher, [1, 3])
    assert not any(block._forward_hooks for block in teacher.model.layers)


def test_student_of_a_bf16_teacher_has_its_weights_in_fp32(folder):
    teacher = load_teacher("embedded", torch.bfloat16)
    student = student_from_layers(teacher, [0, 3])
    assert student.dtype == torch.float32 and student.training
    torch.testing.assert_close(student.model.layers[1].state_dict(), teacher.model.layers[3].float().state_dict())


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


def rewrite(folder, change):
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: {f"_orig_mod.{k}": v for k, v in w.items()}, r"lacks \d+ .*such as \S+ \(and has _orig_mod\."),
        (lambda w: {k: v for k, v in w.items() if ".layers.1." not in k}, r"lacks \d+ .*such as model\.layers\.1\."),
        (lambda w: {k: v for k, v in w.items() if "embed_tokens" not in k}, r"lacks \d+ "),
    ],
)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_missing_weights_are_never_random(small, folder, role, change, message):
    rewrite(folder, change)
    with pytest.raises(UsageError, match=rf"^{role}_model .*{message}"):
        if role == "teacher":
            load_teacher(str(folder))
        load_student(small(student_model=str(folder)), None)


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json", "half", "shard"])
def test_incomplete_folder_is_named_before_anything_is_trained(small, folder, role, missing):
    if missing == "half":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    elif missing == "shard":
        load_teacher().save_pretrained(folder, max_shard_size="1MB")
        (folder / "model.safetensors").unlink()
        missing = sorted(folder.glob("model-*.safetensors"))[1].name
    if missing != "half":
        (folder / missing).unlink()
    message = {"half": "broken safetensors", "tokenizer.json": "has no tokenizer: copy"}.get(missing, missing)
    with pytest.raises(UsageError, match=rf"^{role}_model .*{message}"):
        train(small(**{f"{role}_model": str(folder)}))
    assert not Path(small().output_dir).exists()


def test_quantised_model_is_refused_as_a_student_and_allowed_as_a_teacher(small, folder):
    edit(folder / "config.json", quantization_config={"quant_method": "fp8"})
    for fields in ({"student_model": str(folder)}, {"teacher_model": str(folder), "student_layers": 2}):
        with pytest.raises(UsageError, match=r"^(student|teacher)_model .* is quantised"):
            check_models(small(**fields))
    check_models(small(teacher_model=str(folder)))
    teacher = load_teacher()
    teacher.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), False)
    with pytest.raises(UsageError, match="not quantised"):
        student_from_layers(teacher, 2)


@pytest.mark.parametrize("layers", [None, 4])
def test_head_of_the_file_is_kept_though_the_config_says_it_is_tied(small, folder, tmp_path, layers):
    rewrite(folder, lambda w: {**w, "lm_head.weight": 2 * w["model.embed_tokens.weight"]})
    fields = {"student_layers": layers} if layers else {"student_model": str(folder)}
    teacher = load_teacher(str(folder), torch.float32)
    student = load_student(small(**fields), teacher)
    assert not student.config.tie_word_embeddings and not teacher.config.tie_word_embeddings
    student.tie_weights()  # as accelerate does for FSDP
    torch.testing.assert_close(student.lm_head.weight, 2 * student.model.embed_tokens.weight)
    torch.testing.assert_close(student.eval()(**BATCH).logits, teacher(**BATCH).logits)


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
    assert "note: the student has attention_dropout 0.1, which adds noise to the divergence" in report


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


def test_reserved_tokens_may_have_other_names_but_other_tokens_may_not(small, folder):
    fields = {"teacher_model": str(folder), "student_model": str(shutil.copytree(folder, folder.parent / "other"))}
    for name, token in zip(fields.values(), ("<|reserved|>", "<|unused|>"), strict=True):
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.add_special_tokens({"additional_special_tokens": [token]})
        tokenizer.save_pretrained(name)
    report = check(small, tiny(1030), tiny(1030), **fields).report
    assert "but for 2 names of reserved tokens" in report[0]
    edit(folder / "tokenizer_config.json", chat_template="<|reserved|>{{ messages[0]['content'] }}")
    with pytest.raises(UsageError, match=r"1 tokens have different ids, such as '<\|reserved\|>'"):
        check(small, tiny(1030), tiny(1030), **fields)


def test_student_with_experts_is_reported(small):
    experts = random_model(FAMILIES["qwen3_moe"])
    assert any("experts" in line for line in check(small, tiny(), experts).report)
    assert not any("experts" in line for line in check(small, experts, tiny()).report)
