import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import TYPES

import kdkit.config
from kdkit import DistillConfig, load_config
from kdkit.command_line import read_config
from kdkit.config import FIELDS, PATHS, UsageError
from kdkit.losses import DIVERGENCES

RECIPES = Path(__file__).parent.parent / "recipes"


def write(path, text):
    path.write_text(text)
    return str(path)


def test_config_without_arguments_uses_the_embedded_models():
    config = load_config([])
    assert config == DistillConfig()
    assert config.teacher_model == config.student_model == config.dataset == "embedded"


@pytest.mark.parametrize("order", [0, 1])
def test_command_line_overrides_the_file_before_and_after_it(tmp_path, order):
    file = write(tmp_path / "r.yaml", "alpha: 0.3\ntemperature: 4\n")
    parts = [["--alpha", "0.5"], ["--config", file]]
    config = load_config(parts[order] + parts[1 - order])
    assert (config.alpha, config.temperature) == (0.5, 4.0)


def test_yaml_value_1e_minus_5_is_read_as_a_float(tmp_path):
    config = load_config([f"--config={write(tmp_path / 'r.yaml', 'learning_rate: 1e-5')}"])
    assert config.learning_rate == 1e-5 and isinstance(config.learning_rate, float)


def test_student_layers_accepts_a_list_and_a_number():
    assert load_config(["--student_layers", "[0, 3]"]).student_layers == [0, 3]
    assert load_config(["--student_layers", "2"]).student_layers == 2


def test_null_in_a_file_or_argument_is_read_as_none(tmp_path):
    assert load_config(["--config", write(tmp_path / "r.yaml", "eval_steps: null")]).eval_steps is None
    assert load_config(["--eval_steps", "null"]).eval_steps is None


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--alhpa", "0.5"], ["--alhpa", "--alpha"]),
        (["--max-steps", "5"], ["--max_steps"]),
        (["--alpha", "1.5"], ["alpha is 1.5", "0 <= alpha <= 1"]),
        (["--alpha", "much"], ["alpha", "a number", "much"]),
        (["--temperature", "0"], ["temperature is 0.0", "above 0"]),
        (["--temperature", "nan"], ["temperature", "nan"]),
        (["--batch_size", "0"], ["batch_size is 0"]),
        (["--student_layers", "2", "--student_model", "a/final"], ["student_layers is 2", "student_model a/final"]),
        (["--student_layers", "[0, 1]", "--student_layers_by", "kl"], ["student_layers is [0, 1]", "a count"]),
        (["--student_layers_by", "kl"], ["student_layers is None", "a count with student_layers_by kl"]),
        (["--student_layers", "2", "--student_random_init", "true"], ["student_layers is 2", "random_init True"]),
        (["--student_model", "runs/a/final", "--output_dir", "runs/a"], ["output_dir is", "student_model"]),
        (["--beta", "1"], ["beta is 1.0"]),
        (["--skew", "1"], ["skew is 1.0"]),
        (["--max_steps", "0"], ["max_steps is 0"]),
        (["--lr", "1"], ["did you mean --learning_rate?"]),
        (["--config"], ["--config", "YAML"]),
        (["--config", "no/such.yaml"], ["no/such.yaml", "No such file"]),
        (["stray"], ["stray"]),
    ],
)
def test_invalid_argument_raises_an_error_of_one_line_that_names_it(argv, named):
    with pytest.raises(ValueError) as error:
        load_config(argv)
    assert all(word in str(error.value) for word in named), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name, kind in TYPES.items() if "str" not in str(kind)])
def test_value_of_the_wrong_type_is_refused_in_words_and_not_in_types_of_python(name):
    with pytest.raises(UsageError, match=rf"^{name} is 'x', expected [a-z_0-9 ]+$"):
        load_config([f"--{name}", "x"])


def test_chat_template_options_are_a_mapping_in_yaml_and_json_as_an_argument(tmp_path):
    file = write(tmp_path / "r.yaml", "chat_template_options:\n  enable_thinking: false\n  style: 'no'\n")
    given = load_config(["--chat_template_options", '{"enable_thinking": false, "style": "no"}'])
    assert load_config(["--config", file]).chat_template_options == {"enable_thinking": False, "style": "no"}
    assert given.chat_template_options == {"enable_thinking": False, "style": "no"}
    write(tmp_path / "again.yaml", yaml.safe_dump(given.as_dict()))
    assert read_config(tmp_path / "again.yaml").chat_template_options == given.chat_template_options


def test_home_folder_is_expanded_wherever_a_path_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in PATHS:
        for config in (
            load_config(["--config", write(tmp_path / "r.yaml", f"{name}: ~/x")]),
            load_config([f"--{name}", "~/x"]),
            DistillConfig(**{name: "~/x"}),
        ):
            assert getattr(config, name) == str(tmp_path / "x")
    assert load_config(["--output_dir", "a/~b"]).output_dir == "a/~b" and {"output_dir", "resume"} <= PATHS


@pytest.mark.parametrize("encoding, read", [("utf-16", True), ("utf-8-sig", True), ("latin-1", False)])
def test_yaml_file_in_another_encoding_is_read_or_refused_in_one_line(tmp_path, encoding, read):
    (tmp_path / "r.yaml").write_bytes("output_dir: runs/caf\xe9\n".encode(encoding))
    if read:
        assert load_config(["--config", str(tmp_path / "r.yaml")]).output_dir == "runs/caf\xe9"
        return
    with pytest.raises(UsageError, match=r"r\.yaml is not valid YAML in UTF-8") as error:
        load_config(["--config", str(tmp_path / "r.yaml")])
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match=r"--config .* cannot be read: Is a directory"):
        load_config(["--config", str(tmp_path)])


def test_unknown_field_in_a_file_raises_an_error_with_the_file_and_the_nearest_name(tmp_path):
    file = write(tmp_path / "r.yaml", "temprature: 2")
    with pytest.raises(ValueError, match=r"r\.yaml.*temprature.*did you mean temperature\?"):
        load_config(["--config", file])


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_is_a_valid_configuration_with_its_own_output_dir(recipe):
    assert read_config(recipe).output_dir == f"runs/{recipe.stem}"


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--streaming", "true"], ["max_train_tokens is None", "streaming"]),
        (["--truncation_mode", "middle"], ["truncation_mode", "keep_start"]),
    ],
)
def test_incompatible_fields_raise_an_error_that_names_them(argv, named):
    with pytest.raises(ValueError) as error:
        load_config(argv)
    assert all(word in str(error.value) for word in named), str(error.value)


@pytest.mark.parametrize("text", ["- alpha", "alpha: [", "just words"])
def test_yaml_file_that_is_not_a_mapping_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"r\.yaml"):
        load_config(["--config", write(tmp_path / "r.yaml", text)])


def test_config_written_as_yaml_is_read_back_unchanged(tmp_path):
    config = DistillConfig(alpha=0.25, student_layers=[0, 2], max_eval_tokens=None, learning_rate=1e-5)
    write(tmp_path / "config.yaml", yaml.safe_dump(config.as_dict()))
    assert read_config(tmp_path / "config.yaml") == config
    assert list(config.as_dict()) == list(FIELDS)


def test_help_names_every_divergence():
    documented = Path(kdkit.config.__file__).read_text().partition('divergence: str = "forward_kl"')[2].split('"""')[1]
    assert re.findall(r"\w+", documented)[: len(DIVERGENCES)] == list(DIVERGENCES)


def test_loss_formula_shows_the_values_of_the_fields():
    formula = DistillConfig(alpha=0.3, temperature=2, divergence="jsd", beta=0.2).loss_formula
    assert formula == "loss = 0.3 * CE + 0.7 * 2^2 * jsd(teacher, student; T=2, beta=0.2)"
    assert DistillConfig(alpha=0.0, temperature=1).loss_formula == "loss = forward_kl(teacher, student; T=1)"
    assert DistillConfig(alpha=1.0, temperature=2).loss_formula == "loss = CE"


def test_help_explains_every_field():
    printed = subprocess.run(
        [sys.executable, "-m", "kdkit.train", "--help"], capture_output=True, text=True, check=True
    ).stdout
    words = " ".join(printed.split())
    for name in FIELDS:
        after = words.split(f"--{name} ")[-1]  # the last occurrence is followed by the explanation
        assert "(type: " in after[:600], name
        assert len(after.split("(type: ")[0].split()) >= 4, f"{name} is not explained"


def test_import_of_kdkit_does_not_import_torch_or_transformers():
    code = "import sys, kdkit; print([m for m in ('torch', 'transformers', 'datasets', 'wandb') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_python_object_in_a_yaml_file_is_refused_and_not_created(tmp_path):
    made = tmp_path / "made"
    file = write(tmp_path / "r.yaml", f"dataset: !!python/object/apply:os.mkdir [{str(made)!r}]")
    with pytest.raises(UsageError, match="is not valid YAML"):
        load_config(["--config", file])
    assert not made.exists()
    yaml.unsafe_load((tmp_path / "r.yaml").read_text())
    assert made.exists()  # so this test can fail


def test_python_m_kdkit_prints_the_folder_of_the_accelerate_configurations():
    command = [sys.executable, "-m", "kdkit", "accelerate_configs"]
    folder = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    assert (folder / "fsdp.yaml").is_file()


def test_default_learning_rate_depends_on_where_the_student_starts():
    assert DistillConfig().as_dict()["learning_rate"] == 2e-3
    assert DistillConfig(student_layers=2).as_dict()["learning_rate"] == 2e-4
    assert DistillConfig(student_model="some/model").peak_learning_rate == 2e-5
    assert DistillConfig(student_model="some/model", student_random_init=True).peak_learning_rate == 2e-3
    assert DistillConfig(student_layers=2, learning_rate=1e-4).peak_learning_rate == 1e-4
