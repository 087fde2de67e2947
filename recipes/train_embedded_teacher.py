"""Train the embedded teacher, on the training split of the embedded text.

    python recipes/train_embedded_teacher.py

A Llama of 2.4 million parameters and a tokenizer with 1,024 entries. The text is read about ten times; dropout and a
strong weight decay prevent overfitting. The model is that of the last step, not that of the best one. All random
numbers come from one seed, and one thread computes everything: the same Python, torch and processor give the same
weights, in about twenty minutes.
"""

import argparse
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kdkit.config import DistillConfig
from kdkit.data import Steps, count_tokens, load_rows
from kdkit.data.sources import documents_of, open_sources
from kdkit.evaluate import evaluate
from kdkit.models import ASSETS, BodyAndHead, count_parameters
from kdkit.train import learning_rate, make_loss, make_optimizer

DROPOUT = 0.1
SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>"]
CONFIG = DistillConfig(
    alpha=1.0, max_length=256, batch_size=8, max_steps=4000, learning_rate=2e-3, weight_decay=0.3, warmup_ratio=0.025,
    max_eval_tokens=None,
)  # fmt: skip

CARD = """---
license: apache-2.0
library_name: transformers
---
# The embedded teacher of kdkit

A small Llama that knows the documentation of Python's standard library and nothing else. It exists so that
distillation can be shown, taught and tested without a download. It has no other use.

- Made by `python recipes/train_embedded_teacher.py`.
- Trained on the language reference's topics and the docstrings of the standard library of Python {python}, read from
  its sources: {train_tokens:,} tokens, {epochs:.1f} passes, {steps:,} steps, {minutes:.0f} minutes on one CPU thread
  (torch {torch}), {date}. The text is under the PSF License Agreement.
- {parameters:.2f} million parameters in fp16, {layers} layers, hidden width {hidden}, tied head, 1,024 byte-level BPE
  entries; trained on rows of {max_length} tokens.
- Held-out cross-entropy: **{ce:.3f}** nats per token on {eval_tokens:,} tokens of modules and topics that it has not
  seen (chosen by a hash of their names).
"""


def train_tokenizer(texts: list[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that starts each text with <|bos|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A <|bos|> $B", special_tokens=[("<|bos|>", 0)]
    )
    bos, eos, pad = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, model_max_length=512
    )


def make_model() -> LlamaForCausalLM:
    """A new model, with dropout after the embedding and in each residual branch, which Llama itself does not have."""
    config = LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=448, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
        pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    branches = [module for layer in model.model.layers for module in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    for module in [model.model.embed_tokens, *branches]:
        module.register_forward_hook(lambda module, _, output: F.dropout(output, DROPOUT, module.training))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=ASSETS / "embedded_teacher")
    parser.add_argument("--max_steps", type=int, default=CONFIG.max_steps, help="fewer, to try it out")
    arguments = parser.parse_args()
    CONFIG.max_steps = arguments.max_steps

    torch.set_num_threads(1)  # sums then have one order on any machine
    torch.manual_seed(CONFIG.seed)
    source, _ = open_sources(CONFIG)
    tokenizer = train_tokenizer([document.text for document in documents_of(source)])
    train_rows, eval_rows = load_rows(CONFIG, tokenizer)
    steps = Steps(train_rows, CONFIG, tokenizer.pad_token_id)
    model = make_model().train()
    student, optimizer = BodyAndHead(model), make_optimizer(model, CONFIG)
    loss, _ = make_loss(CONFIG, steps, len(tokenizer), torch.device("cpu"))

    def held_out_ce() -> float:
        return evaluate(model, model, eval_rows, CONFIG, pad_token_id=tokenizer.pad_token_id)["eval/ce_loss"]

    started = time.time()
    progress = tqdm(range(len(steps)), unit="step")
    for step in progress:
        (batch,) = steps[step]
        with torch.autocast("cpu", torch.bfloat16):
            result = student(batch, loss, (None, None), batch, None)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CONFIG.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(steps), CONFIG)
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix_str(f"loss {result.loss.item():.3f}", refresh=False)
        if (step + 1) % 500 == 0:
            progress.write(f"step {step + 1}: held-out CE {held_out_ce():.4f}")
    minutes = (time.time() - started) / 60

    model.half().save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)
    model.float()
    card = CARD.format(
        python=platform.python_version(), torch=torch.__version__.split("+")[0], date=time.strftime("%Y-%m-%d"),
        minutes=minutes, steps=len(steps), epochs=len(steps) / steps.steps_per_epoch,
        train_tokens=count_tokens(train_rows), eval_tokens=count_tokens(eval_rows), ce=held_out_ce(),
        parameters=count_parameters(model) / 1e6, layers=model.config.num_hidden_layers,
        hidden=model.config.hidden_size, max_length=CONFIG.max_length,
    )  # fmt: skip
    (arguments.output_dir / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
