"""Knowledge distillation without any abstraction: two models, ten texts, one loss, AdamW.

    python -m kdkit.minimal

`kdkit.train` does the same for any model and text, on many devices, and can resume exactly.
"""

import math

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kdkit.models import ASSETS

TEXTS = [f"The built-in function {f}() {does}." for f, does in {
    "len": "returns the number of items of an object", "abs": "returns the absolute value of a number",
    "sum": "adds up the items of an iterable", "max": "returns the largest of its arguments",
    "open": "opens a file and returns a file object", "print": "writes objects to a text stream",
    "sorted": "returns a new sorted list", "zip": "iterates over several iterables in parallel",
    "range": "makes a sequence of integers", "input": "reads a line from standard input",
}.items()]  # fmt: skip


def distil(texts, num_steps=5, alpha=0.1, temperature=2.0, learning_rate=2e-3, seed=0):
    """Yield the loss of each step: alpha * CE + (1 - alpha) * T^2 * KL(teacher || student), in nats per token."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "embedded_teacher")
    teacher = AutoModelForCausalLM.from_pretrained(ASSETS / "embedded_teacher", dtype=torch.float32).eval()
    torch.manual_seed(seed)
    student = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ASSETS / "embedded_student")).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)

    # One batch of all texts. Position s predicts token s + 1; padding (on the right) has the label -100.
    ids = [torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id]) for text in texts]
    inputs = torch.nn.utils.rnn.pad_sequence([x[:-1] for x in ids], batch_first=True)  # (B, S)
    labels = torch.nn.utils.rnn.pad_sequence([x[1:] for x in ids], batch_first=True, padding_value=-100)  # (B, S)
    valid = labels != -100

    for step in range(num_steps):
        with torch.no_grad():
            teacher_logits = teacher(input_ids=inputs).logits[valid]  # (N, V)
        student_logits = student(input_ids=inputs).logits[valid]  # (N, V)
        log_p = F.log_softmax(teacher_logits / temperature, dim=-1)
        log_q = F.log_softmax(student_logits / temperature, dim=-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        ce = F.cross_entropy(student_logits, labels[valid])
        loss = alpha * ce + (1 - alpha) * temperature**2 * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


if __name__ == "__main__":
    for step, loss in enumerate(distil(TEXTS), start=1):
        print(f"step {step}: loss {loss:.3f} nats per token")
