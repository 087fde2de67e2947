"""Tests of `kdkit.drafts`: what is counted, which settings are used, and what is refused."""

import itertools
import json
import shutil
from unittest import mock

import pytest
import torch
from helpers import json_lines
from transformers import AutoModelForCausalLM, GenerationConfig, MambaConfig
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from kdkit import drafts
from kdkit.compare import main
from kdkit.drafts import load_pair, measure, rate_for, report, tokens_per_pass
from kdkit.models import load_teacher
from kdkit.train import train


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    return [[0, 100 + i, 200, 300 + 7 * i, 50] for i in range(3)]


@pytest.fixture
def pair():
    """Return the embedded teacher, and a copy with some noise, which is a good draft but not a perfect one."""
    teacher, draft = (load_teacher(dtype=torch.float32) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for weight in draft.parameters():
        weight += 0.03 * weight.std() * torch.randn(weight.shape, generator=generator)
    return teacher, draft


def test_rate_and_tokens_per_pass_are_inverse_and_no_rate_gives_more_than_gamma_and_one():
    for rate, gamma in itertools.product((0.0, 0.3, 0.9, 1.0), (1, 4, 9)):
        assert rate_for(tokens_per_pass(rate, gamma), gamma) == pytest.approx(rate, abs=1e-4)
    assert tokens_per_pass(0.5, 2) == 1.75
    assert rate_for(5.01, 4) > 1


def test_teacher_as_its_own_draft_is_always_accepted(texts):
    found = measure(load_teacher(dtype=torch.float32), load_teacher(dtype=torch.float32), texts, sampled=False)
    assert found["tau"] > 4  # of 5: the last round of a text is cut short. A draft that does not see the bos has 3.2
    assert found["different"] == 0


@pytest.mark.parametrize("sampled", [False, True])
def test_passes_of_the_teacher_are_the_rounds_of_generate(pair, texts, sampled):
    rounds, update = [], AssistedCandidateGenerator.update_candidate_strategy

    def record(self, input_ids, scores, num_matches):
        rounds.append((scores.shape[1] - 1, int(num_matches)))
        update(self, input_ids, scores, num_matches)

    with mock.patch.object(AssistedCandidateGenerator, "update_candidate_strategy", record):
        found = measure(*pair, texts, sampled=sampled, gamma=3)
    assert max(drafted for drafted, _ in rounds) == 3
    assert found["tau"] == pytest.approx(sum(kept + 1 for _, kept in rounds) / len(rounds))
    assert 1.2 < found["tau"] < 3.8
    assert found["different"] == 0
    assert found["k"] == pytest.approx(found["c"] + (found["v"] - 1) / 3)
    assert found["speedup"] == pytest.approx(found["tau"] / (3 * found["c"] + found["v"]))
    assert tokens_per_pass(found["rate"], 3) == pytest.approx(found["tau"], abs=1e-3)
    assert not pair[0]._forward_hooks and not pair[1]._forward_pre_hooks


def test_settings_of_the_models_generation_configs_are_not_used(pair, texts):
    expected = measure(*pair, texts, sampled=True)
    for model in pair:
        model.generation_config = GenerationConfig(
            do_sample=True, top_k=1, temperature=0.1, top_p=0.1, repetition_penalty=5.0, eos_token_id=1,
            min_new_tokens=3, num_assistant_tokens=9, num_assistant_tokens_schedule="heuristic",
        )  # fmt: skip
    assert measure(*pair, texts, sampled=True)["tau"] == expected["tau"]


def test_another_greedy_text_is_reported_with_the_gap_between_its_logits_and_the_teachers(pair, texts):
    teacher, draft = pair
    generate = teacher.generate

    def corrupt(ids, **arguments):
        output = generate(ids, **arguments)
        if arguments["assistant_model"] is not None:
            output[0, -1] = (output[0, -1] + 1) % 1024
        return output

    with mock.patch.object(teacher, "generate", corrupt):
        found = measure(teacher, draft, texts, sampled=False)
    assert found["different"] == len(texts) and found["gap"] > 0.01


def test_error_is_the_standard_error_of_a_ratio_over_prompts(pair, texts):
    """Twice the same prompts give the same ratio, and an error that is smaller by about the root of 2."""
    once, twice = (measure(*pair, prompts, sampled=False) for prompts in (texts, texts * 2))
    assert twice["tau"] == once["tau"]
    assert twice["error"] == pytest.approx(once["error"] * (2 / 5) ** 0.5)  # n (n - 1) is 6, and 30 for twice the sum


def test_command_prints_a_table_and_first_that_no_rate_can_pay(small, capsys):
    run = small(max_steps=1, max_eval_tokens=200)
    train(run)
    capsys.readouterr()
    measured, costs = drafts.measure, {"k": 1.2, "different": 2, "gap": 0.004}
    with mock.patch.object(drafts, "measure", lambda *args, **kw: measured(*args, **kw) | costs):
        main(["--draft", run.output_dir, "--gamma", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"no acceptance rate can pay for {run.output_dir}, greedy: a drafted token costs 1.20")
    assert lines[1].startswith("error  2 of ") and "differ by up to 0.004" in lines[1]
    assert "gamma 2, float32, cpu" in "".join(lines)
    assert next(line for line in lines if line.startswith(f"{run.output_dir}, sampled")).count("  none  ") == 1


def test_run_whose_tokenizer_is_not_the_teachers_is_refused_in_one_line(small):
    config = small(max_steps=1)
    train(config)
    path = f"{config.output_dir}/final/tokenizer.json"
    with open(path) as file:
        content = json.load(file)
    vocab = content["model"]["vocab"]
    vocab["Ġthe"], vocab["Ġof"] = vocab["Ġof"], vocab["Ġthe"]
    with open(path, "w") as file:
        json.dump(content, file)
    with pytest.raises(SystemExit, match=r"^kdkit: .* have different tokenizers: 2 tokens have different ids.*'Ġthe'"):
        main(["--draft", config.output_dir])


def test_pair_with_heads_of_two_widths_is_cut_to_the_narrower_one(small, tmp_path):
    shutil.copytree(drafts.load_model.__globals__["ASSETS"] / "embedded_teacher", tmp_path / "teacher")
    model = load_teacher(dtype=torch.float32)
    model.resize_token_embeddings(1100, mean_resizing=False)
    model.save_pretrained(tmp_path / "teacher")
    config = small(teacher_model=str(tmp_path / "teacher"), max_steps=1)
    train(config)
    *models, prompts = load_pair(config.output_dir)
    assert [len(model.get_output_embeddings().weight) for model in models] == [1024, 1024]
    measure(*models, prompts[:2], sampled=True)


def test_prompt_of_a_conversation_ends_before_the_first_answer(small, tmp_path):
    turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}] * 2
    template = tmp_path / "chatml.jinja"
    template.write_text("{% for m in messages %}<|bos|>{{ m['role'] }}\n{{ m['content'] }}<|eos|>\n{% endfor %}"
                        "{% if add_generation_prompt %}<|bos|>assistant\n{% endif %}")  # fmt: skip
    data = json_lines(tmp_path / "chat.jsonl", *[{"messages": [*turns, turns[0], {**turns[1], "content": f"{i}"}]}
                                                  for i in range(60)])  # fmt: skip
    config = small(dataset=str(data), chat_template=str(template), max_steps=1, max_length=128)
    train(config)
    *_, prompts = load_pair(config.output_dir, num_prompts=2)
    tokenizer = drafts.load_tokenizer(config)
    assert len(prompts) == 2
    assert tokenizer.decode(prompts[0]) == "<|bos|>user\nab<|eos|>\n<|bos|>assistant\n"


def test_gamma_0_and_a_gamma_longer_than_any_text_are_refused(small, pair, texts):
    with pytest.raises(drafts.UsageError, match="gamma is 0"):
        report([], gamma=0)
    with pytest.raises(drafts.UsageError, match="gamma is 80, expected less"):
        measure(*pair, texts[:2], sampled=False, gamma=80)


def test_recurrent_model_which_cannot_go_back_is_refused(texts):
    config = MambaConfig(vocab_size=1024, hidden_size=32, num_hidden_layers=2, eos_token_id=1)
    models = [AutoModelForCausalLM.from_config(config).eval() for _ in range(2)]
    with pytest.raises(drafts.UsageError, match="MambaForCausalLM cannot draft: assisted generation"):
        measure(*models, texts, sampled=False)
