"""Each recipe runs as it is, on small models of its families with random weights, and data of its form, from a hub."""

import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from test_hub import Hub, hub  # noqa: F401
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from kdkit.command_line import read_config
from kdkit.models import ASSETS

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"), key=lambda path: path.stem != "demo")
SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
FAMILIES = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen": (Qwen2ForCausalLM, Qwen2Config)}
FAMILIES["smollm2"] = FAMILIES["llama"]
TEMPLATE = b"{% for m in messages %}<|bos|>{{ m['role'] }}\n{{ m['content'] }}<|eos|>\n{% endfor %}"
PROGRAM = """
import sys
from kdkit import load_config
from kdkit.train import train
for recipe in sys.argv[1:]:
    history = train(load_config(["--config", recipe, "--max_steps=2", "--max_train_tokens=4000",
                                 "--max_eval_tokens=600", "--use_wandb=false", "--save_steps=null"]))
    print("ran", recipe, history[-1]["eval/step"])
"""


def model_files(name: str, folder: Path) -> dict[str, bytes]:
    """The files of a small model of the family that the name of a model on the hub says, with 16 layers."""
    family = next(family for family in FAMILIES if family in name.lower().split("/")[1])
    model_class, config_class = FAMILIES[family]
    torch.manual_seed(zlib.crc32(name.encode()))
    rows = 1152 if "7B" in name else 1088  # more than the tokenizer has entries, and more in larger models
    model_class(config_class(**SMALL, num_hidden_layers=16, vocab_size=rows)).save_pretrained(folder)
    for file in (ASSETS / "embedded_teacher").glob("*token*"):
        shutil.copy(file, folder)
    (folder / "chat_template.jinja").write_bytes(TEMPLATE)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def dataset_files(recipe) -> dict[str, bytes]:
    """The files of a dataset with the configuration and the splits that the recipe reads, all of one form."""
    texts = [
        f"The {i}th sentence is about {['snow', 'rain', 'wind'][i % 3]}, and it ends here. " * 4 for i in range(99)
    ]
    turns = [[{"role": "user", "content": text[:30]}, {"role": "assistant", "content": text}] for text in texts]
    lines = [{"text": t} for t in texts] if "fineweb" in recipe.dataset else [{"messages": turn} for turn in turns]
    files = {split: f"{recipe.dataset_config}/{split}.jsonl" for split in {"train", recipe.eval_split or "train"}}
    listed = "".join(f"  - {{split: {split}, path: {path}}}\n" for split, path in files.items())
    card = f"---\nconfigs:\n- config_name: {recipe.dataset_config}\n  data_files:\n{listed}---\n"
    return {"README.md": card.encode()} | {path: "\n".join(map(json.dumps, lines)).encode() for path in files.values()}


@pytest.mark.slow
def test_each_recipe_takes_two_steps(hub, tmp_path):  # noqa: F811
    Hub.repositories = {}
    for recipe in map(read_config, RECIPES):
        for name in (recipe.teacher_model, recipe.student_model):
            if name.count("/") == 1 and name not in Hub.repositories:
                Hub.repositories[name] = model_files(name, tmp_path / name.replace("/", "_"))
        if recipe.dataset != "embedded":
            Hub.repositories[f"datasets/{recipe.dataset}"] = dataset_files(recipe)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, RECIPES)],
        cwd=tmp_path, env={**hub, "PYTHONPATH": str(RECIPES[0].parents[1])}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("\nran ") == len(RECIPES)
    for recipe in RECIPES:
        assert f"ran {recipe} 2" in run.stdout
        assert (tmp_path / "runs" / recipe.stem / "final" / "model.safetensors").is_file()
