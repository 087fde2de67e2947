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
from transformers import AutoModelForCausalLM

from kdkit import plan, train
from kdkit.models import BodyAndHead
from kdkit.plan import GB, Launch, measure

CPU = Launch(precision="no", on_cpu=True)


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
    monkeypatch.setattr(train, "make_optimizer", lambda *x: optimizers.append(make(*x)) or optimizers[-1])
    monkeypatch.setattr(train, "train_step", measured)
    train.train(config)
    parts, *_ = measure(config, CPU._replace(precision=precision))
    assert sum(parts.values()) - parts["allowance"] == pytest.approx(peaks[-1], rel=0.05)


def part(name: str, config, launch=CPU) -> float:
    return measure(config, launch)[0].get(name, 0)


def test_activations_grow_with_the_batch_and_the_rest_does_not(small, pair):
    """So the largest tensors are those of a row: a batch of 8 has twice the activations of a batch of 4."""
    one, two = (measure(small(batch_size=size, max_length=256, **pair), CPU)[0] for size in (4, 8))
    assert two["activations"] == pytest.approx(2 * one["activations"], rel=0.02)
    for name in ("teacher", "student", "optimizer"):
        assert two[name] == one[name]


def test_states_have_4_8_and_4_bytes_per_parameter_of_the_student(small, pair):
    """Gradients are all there from the first micro-batch to the second."""
    config = small(gradient_accumulation_steps=2, max_length=256, **pair)
    parts, _, (_, student) = measure(config, Launch())
    for name, size in (("student", 4), ("optimizer", 8), ("gradients", 4), ("copies", 2)):
        assert parts[name] == pytest.approx(size * student.num_parameters, rel=0.01), name
    assert part("gradients", replace(config, gradient_accumulation_steps=1), Launch()) < 2 * student.num_parameters


def test_teacher_without_a_weight_in_the_loss_is_in_memory_but_does_not_run(small, pair):
    both, ce_only = (measure(small(alpha=alpha, max_length=256, **pair), CPU)[0] for alpha in (0.5, 1))
    assert ce_only["teacher"] == both["teacher"]  # the evaluation needs it
    assert ce_only["loss"] < both["loss"]
    hidden = 4 * 256 * 192 * 4  # bytes of the teacher's hidden states: rows, tokens, H, fp32
    assert both["activations"] - ce_only["activations"] == pytest.approx(hidden, rel=0.01)


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
    # two layers of each model, and the gradients of a layer of the student, in fp32
    assert sharded["gathered"] == size * (sum(outside) + 2 * sum(layers)) + 4 * layers[1]
    assert sharded.get("copies", 0) == 0
    later = replace(config, gradient_accumulation_steps=2)  # each micro-batch exchanges its gradients
    whole = part("gradients", later, Launch(precision=precision))
    assert 8 * part("gradients", later, Launch(8, True, precision)) == pytest.approx(whole, rel=0.01)
    assert part("student", config, Launch(8, True, precision, offload=True)) == 0


def test_ddp_has_a_copy_of_all_on_each_rank(small, pair):
    config = small(max_length=256, **pair)
    assert measure(config, Launch(1))[0] == measure(config, Launch(4))[0]


@pytest.mark.parametrize("targets, kept", [("hidden", 4096 * 192 * 2), ("top_k", 0)])
def test_stored_targets_leave_only_the_head_of_the_teacher(small, pair, targets, kept):
    config = small(targets=targets, targets_dir="targets", max_length=256, **pair)
    assert part("teacher", config, Launch()) == kept


def test_student_of_layers_of_the_teacher_and_recomputed_activations(small, pair):
    whole, cut = (small(student_layers=layers, max_length=256, **pair) for layers in (4, 2))
    assert 0.4 < part("activations", cut) / part("activations", whole) < 0.7
    assert part("activations", replace(cut, gradient_checkpointing=True)) < 0.5 * part("activations", cut)


def test_a_gpu_takes_larger_chunks_of_the_loss_than_a_cpu(small, pair):
    config = small(max_length=256, batch_size=8, **pair)
    assert part("loss", config, Launch(on_cpu=True)) < part("loss", config, Launch())


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
    out = run_plan(capsys, *fields, "--max_length", "512", "--batch_size", "32")
    numbers = {
        line[18:].strip(): float(line[9:18])
        for line in out.splitlines()
        if line.startswith(" " * 9) and "." in line[9:18]
    }
    assert sum(value for name, value in numbers.items() if name in LINES) == pytest.approx(numbers["needed"], abs=0.05)
    assert "the run fits" in out and "unknown  hours" in out
    assert " hours for 7 steps" in run_plan(capsys, *fields, "--max_steps", "7")
    # 1,000 tokens in rows of 100, 4 rows a step, 2 epochs
    some = ("--max_train_tokens", "1000", "--max_length", "100", "--batch_size", "4", "--num_epochs", "2")
    assert " hours for 6 steps" in run_plan(capsys, *fields, *some)


LINES = "teacher", "student", "optimizer", "gradients", "copies", "activations", "loss", "gathered", "allowance"


def test_run_that_does_not_fit_is_told_what_to_change(capsys, pair):
    fields = [f"--{name}={value}" for name, value in pair.items()]
    arguments = (*fields, "--max_length", "512", "--batch_size", "64")
    need = next(float(line.split()[0]) for line in run_plan(capsys, *arguments).splitlines() if line.endswith("needed"))
    out = run_plan(capsys, *arguments, "--memory", f"{need - 0.1}")
    changes = [line for line in out.splitlines() if line.startswith("change")]
    assert "does not fit" in out and "gradient_checkpointing: true" in changes[0] and "batch_size" in changes[1]
    assert not any("fsdp" in line for line in changes)  # on one GPU
    assert "fsdp.yaml" in run_plan(capsys, *arguments, "--memory", "1", "--gpus", "2")
    assert "change" not in run_plan(capsys, *arguments, "--memory", f"{need + 0.1}")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--gpu", "h1000"], "--gpu is h1000, expected one of a100"),
        (["--teacher_model", "{folder}"], "teacher_model {folder} could not be loaded"),
        (["--accelerate_config", "{folder}/x.yaml"], "--accelerate_config {folder}/x.yaml is not a file of accelerate"),
        (["--gpus", "many"], "argument --gpus"),
        (["--mfu", "1.5"], "--mfu is 1.5"),
        (["--memory", "-1"], "--memory -1.0"),
        (["--accelerate_config", "{root}/accelerate_configs/fsdp.yaml", "--gpus", "1"], "two ranks for FSDP"),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, message):
    names = {"folder": tmp_path, "root": Path(__file__).parent.parent}
    (tmp_path / "config.json").write_text("{")
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
