"""The plan of a run: its memory against that of a real step, and what changes it."""

import json
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, T5Config

from kdkit import fused, plan, train
from kdkit.config import DistillConfig, UsageError
from kdkit.models import BodyAndHead
from kdkit.plan import GB, Launch, measure

ROOT, CPU = Path(__file__).parent.parent, Launch(precision="no")
KEYS = [  # of the advice, in its order
    "a smaller batch_size", "gradient_checkpointing: true", "accelerate_configs/fsdp.yaml", "teacher_placement",
    "targets: hidden", "a smaller max_length",
]  # fmt: skip


@pytest.fixture
def pair(tmp_path):
    """Return the fields of a pair that is larger than the embedded one, from two config.json without weights."""
    return {"teacher_model": write_llama(tmp_path / "t", 4, 192), "student_model": write_llama(tmp_path / "s", 2, 128)}


def write_llama(folder, layers: int, hidden: int, **changes) -> str:
    folder.mkdir()
    content = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers, "vocab_size": 4096,
        "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 131072, "tie_word_embeddings": True, **changes,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


class Storages(TorchDispatchMode):
    """The bytes of all storages that operators have returned and that are still alive, and their maximum."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        if storage.data_ptr() not in self.alive and storage.nbytes():
            self.alive[storage.data_ptr()] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, storage.data_ptr())
            self.peak = max(self.peak, sum(self.alive.values()))


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("fused_loss", [True, False])
def test_peak_is_that_of_a_real_step_within_5_percent(small, monkeypatch, fused_loss, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    config = small(
        fused_loss=fused_loss, alpha=0.3, batch_size=16, gradient_accumulation_steps=2, max_length=128, max_steps=2,
        max_train_tokens=16 * 2 * 128 * 2, packing=True,
    )  # fmt: skip
    live, step, peaks = Storages(), train.train_step, []

    def measured(student, teacher, *arguments):
        for module in (student, teacher):
            for tensor in [*module.parameters(), *module.buffers()]:
                live.add(tensor.untyped_storage())
        for state in optimizers[0].state.values():
            for tensor in state.values():
                live.add(tensor.untyped_storage())
        live.peak = 0
        with live:
            result = step(student, teacher, *arguments)
        peaks.append(live.peak)
        return result

    optimizers, make = [], train.make_optimizer
    monkeypatch.setattr(train, "train_step", measured)
    train.train(config, make_optimizer=lambda *x: optimizers.append(make(*x)) or optimizers[-1])
    parts, *_ = measure(config, Launch(precision=precision))
    assert sum(parts.values()) - parts["allowance"] == pytest.approx(peaks[-1], rel=0.05)


def part(name: str, config, launch=CPU) -> float:
    return measure(config, launch)[0].get(name, 0)


def test_activations_grow_with_the_batch_and_the_rest_does_not(small, pair):
    """Beyond the chunk of the loss: from 32 to 64 rows they grow by twice as much as from 16 to 32."""
    sizes = [measure(small(batch_size=size, max_length=256, **pair), CPU)[0] for size in (16, 32, 64)]
    a, b, c = (parts["activations"] for parts in sizes)
    assert c - b == pytest.approx(2 * (b - a), rel=0.02)
    for name in ("teacher", "student", "optimizer"):
        assert len({parts[name] for parts in sizes}) == 1


def test_states_have_4_8_and_4_bytes_per_parameter_of_the_student(small, pair):
    """Gradients are all there from the first micro-batch to the second. Autocast copies the weights in 2 bytes each."""
    config = small(gradient_accumulation_steps=2, max_length=256, **pair)
    parts, _, (_, student) = measure(config, Launch())
    for name, size in (("student", 4), ("optimizer", 8), ("gradients", 4)):
        assert parts[name] == pytest.approx(size * student.num_parameters, rel=0.01), name
    assert part("gradients", replace(config, gradient_accumulation_steps=1), Launch()) < 2 * student.num_parameters


def test_teacher_without_a_weight_in_the_loss_is_in_memory_but_does_not_run(small, pair, monkeypatch):
    ran, forward = [], BodyAndHead.forward
    monkeypatch.setattr(BodyAndHead, "forward", lambda self, *x: ran.append(self.training) or forward(self, *x))
    both = measure(small(alpha=0.5, max_length=256, **pair), CPU)[0]
    assert ran == [False, True]  # the teacher, the student
    ce_only = measure(small(alpha=1, max_length=256, **pair), CPU)[0]
    assert ran[2:] == [True]
    assert ce_only["teacher"] == both["teacher"]  # the evaluation needs it
    hidden = 4 * 256 * 192 * 4  # bytes of the teacher's hidden states: rows, tokens, H, fp32
    assert both["activations"] - ce_only["activations"] > hidden


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_fsdp_divides_the_states_by_the_number_of_ranks(small, pair, precision):
    config, names = small(max_length=256, **pair), ("teacher", "student", "optimizer")
    alone = measure(config, Launch(precision=precision))[0]
    for ranks in (2, 8):
        sharded = measure(config, Launch(ranks, True, precision))[0]
        assert [ranks * sharded[name] for name in names] == pytest.approx([alone[name] for name in names], rel=0.01)
    both = measure(config, Launch(8, True, precision))[2]
    layers = [sum(x.numel() for x in model.model.model.layers[0].parameters()) for model in both]
    outside = [
        model.num_parameters - len(model.model.model.layers) * layer for model, layer in zip(both, layers, strict=True)
    ]
    size = 4 if precision == "no" else 2  # bytes per gathered number
    assert sharded["gathered"] == size * (sum(outside) + 2 * sum(layers))
    assert sharded["buckets"] == 4 * layers[1]  # gradients of a layer of the student, in fp32
    later = replace(config, gradient_accumulation_steps=2)  # each micro-batch leaves its gradients sharded
    whole = part("gradients", later, Launch(precision=precision))
    assert 8 * part("gradients", later, Launch(8, True, precision)) == pytest.approx(whole, rel=0.01)
    assert part("student", config, Launch(8, True, precision, offload=True)) == 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ddp_has_a_copy_of_all_and_buckets_for_the_gradients(small, pair, accumulation):
    """A gradient goes to its bucket at once, or to a tensor of its own if more are added before the exchange."""
    # so few tokens that the peak is in the backward pass, where there are complete gradients
    config = small(max_length=8, batch_size=1, gradient_accumulation_steps=accumulation, **pair)
    alone, several = (measure(config, Launch(ranks))[0] for ranks in (1, 4))
    assert several["buckets"] == pytest.approx(alone["student"], rel=0.01) and alone["buckets"] == 0
    assert several["gathered"] == 0
    for name in ("teacher", "student", "optimizer"):
        assert several[name] == alone[name]
    assert alone["gradients"] > 0
    assert several.get("gradients", 0) == (alone["gradients"] if accumulation == 2 else 0)


@pytest.mark.parametrize("targets, kept", [("hidden", 4096 * 192 * 2), ("top_k", 0)])
def test_stored_targets_leave_only_the_head_of_the_teacher(small, pair, targets, kept):
    config = small(targets=targets, targets_dir="targets", max_length=256, **pair)
    assert part("teacher", config, Launch()) == kept


def test_student_of_layers_of_the_teacher_and_recomputed_activations(small, pair):
    pair = {"teacher_model": pair["teacher_model"], "max_length": 256}
    whole, cut = (small(student_layers=layers, **pair) for layers in (4, 2))
    assert 0.4 < part("activations", cut) / part("activations", whole) < 0.8  # the head has its own
    more = replace(whole, batch_size=32)
    assert part("activations", replace(more, gradient_checkpointing=True)) < 0.5 * part("activations", more)


def test_loss_has_the_chunks_of_a_gpu(small, pair, monkeypatch):
    config = small(max_length=256, batch_size=8, **pair)
    before = part("activations", config)
    monkeypatch.setitem(fused.CHUNK_TOKENS, "gpu", fused.CHUNK_TOKENS["gpu"] + 512)
    logits = 2 * 512 * 4096 * 4  # bytes: models, tokens, vocabulary, fp32
    assert part("activations", config) - before == pytest.approx(logits, rel=0.05)


@pytest.mark.parametrize("role", ["teacher_model", "student_model"])
def test_model_of_another_kind_is_named_in_one_line(small, pair, tmp_path, role):
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(UsageError, match=rf"^{role} .*t5 .*T5Config.*give a causal language model\)$"):
        measure(small(**{**pair, role: str(tmp_path / "t5")}), CPU)


def test_model_that_reads_data_is_named_in_one_line(small, pair, monkeypatch):
    def forward(self, hidden):
        return self.down_proj(hidden) if hidden.sum() > 0 else hidden

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", forward)
    with pytest.raises(UsageError, match=r"^LlamaForCausalLM can be run but not .*DataDependentOutputException"):
        measure(small(**pair), CPU)


@pytest.mark.parametrize("tied", [True, False])
def test_formula_of_flop_is_what_torch_counts(tmp_path, tied):
    from transformers import AutoConfig

    folder = write_llama(tmp_path / "m", 2, 128, tie_word_embeddings=tied, attn_implementation="eager")
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 96, dtype=torch.long), use_cache=False)
    assert plan.forward_flop(BodyAndHead(model), 96) == pytest.approx(counter.get_total_flops() / 96, rel=0.01)


def run_plan(capsys, *arguments: str) -> str:
    plan.main([*arguments, "--use_wandb", "false"])
    return capsys.readouterr().out


def test_table_adds_up_and_says_what_is_unknown(capsys, pair):
    fields = [f"--{name}={value}" for name, value in pair.items()]
    out = run_plan(capsys, *fields, "--max_length", "512", "--batch_size", "32", "--gpus", "2")
    rows = [line[9:].split() for line in out.splitlines() if line.startswith(" " * 9)]
    parts = {row[1]: float(row[0]) for row in rows if len(row) == 2}
    assert {"teacher", "student", "activations", "optimizer", "buckets", "allowance"} <= parts.keys()
    assert sum(parts.values()) == pytest.approx(needed(out), abs=0.05)
    assert "the run fits" in out and "unknown hours" in out and "change" not in out
    _, _, (teacher, student) = measure(DistillConfig(**pair), Launch())
    flop = 3 * plan.forward_flop(student, 512) + plan.forward_flop(teacher, 512)  # a backward pass: two forward passes
    out = run_plan(capsys, *fields, "--max_length", "512", "--batch_size", "4", "--gradient_accumulation_steps", "9999")
    assert float(out.split("compute")[1].split()[0]) == pytest.approx(flop * 512 * 4 * 9999 / 1e12, abs=0.1)
    assert " hours for 7 steps of 8 full rows" in run_plan(capsys, *fields, "--max_steps", "7")
    # 1,000 tokens in rows of 100, 4 rows a step, 2 epochs
    some = ("--max_train_tokens", "1000", "--max_length", "100", "--batch_size", "4", "--num_epochs", "2")
    assert " hours for 6 steps of 4 full rows" in run_plan(capsys, *fields, *some)


def needed(out: str) -> float:
    return next(float(line.split()[1]) for line in out.splitlines() if line.startswith("memory"))


def test_run_that_does_not_fit_is_told_what_to_change(capsys, pair):
    """In an order, and only what applies to the run."""
    arguments = [*(f"--{name}={value}" for name, value in pair.items()), "--max_length", "1536", "--memory", "1.05"]
    fsdp = ["--accelerate_config", str(ROOT / "accelerate_configs" / "fsdp.yaml")]

    def advice(*more: str) -> list[str]:
        out = run_plan(capsys, *arguments, *more)
        assert "does not fit" in out and needed(out) > 1.05
        changes = [line.removeprefix("change   ") for line in out.splitlines() if line.startswith("change")]
        found = [next((key for key in KEYS if change.startswith(key)), change) for change in changes]
        assert found == sorted(found, key=KEYS.index)
        return found

    assert advice() == [KEYS[0], KEYS[1], KEYS[3], KEYS[4], KEYS[5]]
    assert advice("--gpus", "2") == KEYS
    assert advice("--batch_size", "1", "--gradient_checkpointing", "true", *fsdp) == [KEYS[4], KEYS[5]]
    assert advice("--targets", "top_k", "--targets_dir", "t", "--batch_size", "1") == [KEYS[1], KEYS[5]]


def test_help_shows_the_flags_of_the_plan(capsys):
    with pytest.raises(SystemExit):
        plan.main(["--help"])
    own, _, fields = capsys.readouterr().out.partition("fields of a run")
    explained = {"gpu": "the nearest", "gpus": "number of GPUs", "memory": "GB of a GPU", "mfu": "fraction of its peak"}
    assert all(f"--{flag} " in own and what in own for flag, what in explained.items()) and "--max_length" in fields


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--gpu", "h1000"], "argument --gpu: invalid choice: 'h1000' (choose from"),
        (["--teacher_model", "{folder}"], "teacher_model {folder} could not be loaded"),
        (["--accelerate_config", "{folder}/x.yaml"], "No such file or directory: '{folder}/x.yaml'"),
        (["--accelerate_config", "{folder}/list.yaml"], "list.yaml has no lines of `key: value`"),
        (["--gpus", "many"], "argument --gpus"),
        (["--gpus", "0"], "0 ranks: expected"),
        (["--memory", "-3"], "--memory -3, --mfu 0.4"),
        (["--mfu", "0"], "mfu in (0, 1]"),
        (["--mfu", "1.5"], "--mfu 1.5, mixed"),
        (["--accelerate_config", "{root}/accelerate_configs/fsdp.yaml", "--gpus", "1"], "two ranks for FSDP"),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, message):
    names = {"folder": tmp_path, "root": ROOT}
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "list.yaml").write_text("- num_processes: 2")
    with pytest.raises(SystemExit) as error:
        plan.main([argument.format(**names) for argument in arguments])
    assert str(error.value).startswith("kdkit: ") and message.format(**names) in str(error.value)
    assert "\n" not in str(error.value)


def test_8b_to_1b_takes_less_than_a_minute(small, tmp_path):
    llama = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8}
    teacher = write_llama(tmp_path / "8b", 32, 4096, intermediate_size=14336, tie_word_embeddings=False, **llama)
    student = write_llama(tmp_path / "1b", 16, 2048, intermediate_size=8192, **llama)
    start = time.process_time()
    config = small(teacher_model=teacher, student_model=student, max_length=8192, batch_size=1)
    parts, _, models = measure(config, Launch())
    assert time.process_time() - start < 60
    assert [model.num_parameters for model in models] == [8_030_261_248, 1_235_814_400]
    assert 50 * GB < sum(parts.values()) < 70 * GB
