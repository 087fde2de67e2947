import dataclasses
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import nbformat
import pytest
import torch
from accelerate import Accelerator
from helpers import arguments
from nbdev.export import nb_export
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoConfig, AutoModelForCausalLM

from kdkit import load_config
from kdkit.config import RunStopped, UsageError
from kdkit.data import Steps, collate, load_rows
from kdkit.losses import DIVERGENCES, reverse_kl
from kdkit.models import ASSETS, BodyAndHead, load_student, load_teacher, load_tokenizer
from kdkit.running.devices import start_accelerator
from kdkit.teachers import OnlineTeacher
from kdkit.train import compile_models, learning_rate, main, make_optimizer, train

ROOT = Path(__file__).parent.parent


def training(history):
    return [event for event in history if "train/step" in event]


def test_own_optimizer_takes_the_steps_and_gets_the_learning_rate(small):
    made = []

    def sgd(model, config):
        made.append(torch.optim.SGD(model.parameters(), lr=9.0, momentum=0.9))
        return made[0]

    history = train(small(max_steps=3), make_optimizer=sgd)
    assert made[0].param_groups[0]["lr"] == training(history)[-1]["train/learning_rate"] < 1
    assert all("momentum_buffer" in state for state in made[0].state.values()) and made[0].state


@pytest.mark.parametrize("fused", [True, False])
def test_own_divergence_is_trained_and_evaluated(small, monkeypatch, fused):
    monkeypatch.setitem(DIVERGENCES, "own", lambda s, t, temperature: reverse_kl(s, t, temperature) * 2)
    own, known = (
        train(small(divergence=name, fused_loss=fused, output_dir=f"{small().output_dir}/{name}"))
        for name in ("own", "reverse_kl")
    )
    assert own[0]["eval/kl_loss"] == pytest.approx(2 * known[0]["eval/kl_loss"])
    assert training(own)[0]["train/kl_loss"] == pytest.approx(2 * training(known)[0]["train/kl_loss"])
    assert training(own)[0]["train/grad_norm"] == pytest.approx(2 * training(known)[0]["train/grad_norm"], rel=1e-4)


def test_unknown_divergence_is_refused_before_anything_is_loaded(small):
    with pytest.raises(
        UsageError, match=r"divergence is 'kl', expected a key of DIVERGENCES: forward_kl, .*, neg_log_acceptance"
    ):
        train(small(divergence="kl", teacher_model="missing"))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_logged_loss_equals_the_formula_of_its_logged_parts(small, monkeypatch, alpha, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    for event in train(small(alpha=alpha, temperature=2.0, gradient_accumulation_steps=2, batch_size=2, eval_steps=3)):
        part = "train" if "train/step" in event else "eval"
        loss, ce, kl = (event[f"{part}/{name}"] for name in ("loss", "ce_loss", "kl_loss"))
        assert loss == pytest.approx(alpha * ce + (1 - alpha) * kl, abs=1e-5)
        assert ce > 0 and (kl > 0 or (alpha == 1 and part == "train"))


@pytest.mark.parametrize("alpha, divergence", [(0.0, "forward_kl"), (0.3, "jsd"), (1.0, "forward_kl")])
def test_metrics_do_not_depend_on_the_size_of_micro_batches(small, tmp_path, alpha, divergence):
    """Eight rows of different lengths, in 1, 2, 4 or 8 micro-batches, give the same losses and gradient norms."""
    runs = []
    for batch_size, accumulation in ((8, 1), (2, 4), (1, 8), (4, 2)):
        config = small(
            batch_size=batch_size, gradient_accumulation_steps=accumulation, alpha=alpha, temperature=2.0,
            divergence=divergence, packing=False, max_steps=3, output_dir=str(tmp_path / f"run{batch_size}"),
        )  # fmt: skip
        runs.append(training(train(config)))
    for run in runs[1:]:
        for step, (event, reference) in enumerate(zip(run, runs[0], strict=True)):
            tolerance = 1e-6 if step == 0 else 2e-5  # Adam's division increases rounding errors in each step
            for key in ("train/ce_loss", "train/kl_loss", "train/loss", "train/grad_norm"):
                assert event[key] == pytest.approx(reference[key], rel=tolerance), key


@pytest.mark.parametrize("alpha, divergence", [(0.0, "forward_kl"), (0.3, "skew_reverse_kl"), (1.0, "jsd")])
def test_metrics_of_training_with_fused_and_dense_loss_are_equal(small, tmp_path, alpha, divergence):
    fields = dict(alpha=alpha, divergence=divergence, temperature=2.0, gradient_accumulation_steps=2, max_steps=3)
    fused, dense = (
        training(train(small(**fields, fused_loss=is_fused, output_dir=str(tmp_path / f"run{is_fused}"))))
        for is_fused in (True, False)
    )
    for step, (event, reference) in enumerate(zip(fused, dense, strict=True)):
        for key in ("train/ce_loss", "train/kl_loss", "train/loss", "train/grad_norm"):
            assert event[key] == pytest.approx(reference[key], rel=2e-6 if step == 0 else 2e-5), key


def test_rows_of_the_micro_batch_tests_have_different_lengths(small):
    config = small(packing=False)
    rows, _ = load_rows(config, load_tokenizer(config))
    steps = Steps(rows, config, 2)
    assert len({len(rows[index]["labels"]) for index in steps.step_rows(0)}) > 1


def test_training_at_alpha_1_equals_plain_fine_tuning(small):
    """The reference is a short loop with the loss of transformers."""
    config = small(alpha=1.0, packing=False, batch_size=8, max_steps=5)
    history = training(train(config))

    torch.manual_seed(config.seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ASSETS / "embedded_student"))
    rows, _ = load_rows(config, load_tokenizer(config))
    steps, optimizer = Steps(rows, config, 2), make_optimizer(model, config)
    for index, event in enumerate(history):
        (batch,) = steps[index]
        # transformers shifts the labels itself, so shift them back
        ids = torch.cat([batch["input_ids"], torch.full((len(batch["labels"]), 1), 2)], 1)
        labels = torch.cat([torch.full((len(batch["labels"]), 1), -100), batch["labels"]], 1)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(index, len(steps), config)
        optimizer.step()
        optimizer.zero_grad()
        assert event["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert event["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert event["train/kl_loss"] == 0


@pytest.mark.parametrize("fused", [True, False])
def test_training_at_alpha_1_ignores_rows_of_the_student_head_beyond_the_vocabulary(small, tmp_path, fused):
    """Eight more rows of the head, which belong to no token, do not change the loss."""
    folder = shutil.copytree(ASSETS / "embedded_student", tmp_path / "student")
    settings = json.loads((folder / "config.json").read_text())
    torch.manual_seed(0)
    narrow = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    wide = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, vocab_size=settings["vocab_size"] + 8))
    state = wide.state_dict()
    for name, value in narrow.state_dict().items():
        state[name][: len(value)] = value
    state["lm_head.weight"][-8:] = 1.0
    losses = []
    for name, model in (("narrow", narrow), ("wide", wide)):
        model.save_pretrained(tmp_path / name)
        load_tokenizer(small()).save_pretrained(tmp_path / name)
        fields = dict(student_model=str(tmp_path / name), output_dir=str(tmp_path / f"run_{name}"))
        losses.append(training(train(small(alpha=1.0, fused_loss=fused, max_steps=2, **fields))))
    for one, other in zip(*losses, strict=True):
        assert other["train/loss"] == pytest.approx(one["train/loss"], rel=1e-6)


def test_training_at_alpha_1_runs_the_teacher_on_held_out_rows_only(small, monkeypatch):
    forward = OnlineTeacher.forward

    def held_out_only(self, batch, *arguments):
        assert batch is None or batch["row_ids"][0] < 0  # None: its examination
        return forward(self, batch, *arguments)

    monkeypatch.setattr(OnlineTeacher, "forward", held_out_only)
    train(small(alpha=1.0, max_steps=2))


def test_teacher_as_its_own_student_has_kl_0_or_is_stopped(small, monkeypatch):
    folder = str(ASSETS / "embedded_teacher")
    config = small(teacher_model=folder, student_model=folder, max_steps=1)
    assert train(config)[0]["eval/kl_t1"] < 1e-6

    def shuffled(*arguments):
        model = load_student(*arguments)
        model.model.layers = model.model.layers[::-1]
        return model

    monkeypatch.setattr(importlib.import_module("kdkit.train"), "load_student", shuffled)
    with pytest.raises(RunStopped, match=r"both .*embedded_teacher, but their KL is \d"):
        train(dataclasses.replace(config, output_dir=config.output_dir + "2"))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_gradient_checkpointing_gives_the_same_run(small, monkeypatch, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    runs = []
    for recompute in (False, True):
        config = small(gradient_checkpointing=recompute, output_dir=f"{small().output_dir}{recompute}", max_steps=2)
        runs.append([{k: v for k, v in event.items() if "per_second" not in k} for event in train(config)])
    assert runs[0] == runs[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [{"gradient_checkpointing": True}, {"packing": False}, {"on_policy": 0.5, "max_new_tokens": 8},
               {"teacher_placement": "offload"}], ids=str
)  # fmt: skip
def test_compiled_models_give_the_same_run_but_for_rounding(small, monkeypatch, fields):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    events, compiled, original = {}, [], torch.nn.Module.compile

    def compile(layer, **options):
        compiled.append(type(layer).__name__)
        original(layer, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    for wanted in (False, True):
        config = small(compile_models=wanted, output_dir=f"{small().output_dir}{wanted}", max_steps=2, **fields)
        events[wanted] = train(config)
    assert compiled == ["LlamaDecoderLayer"] * 6
    for event, other in zip(*events.values(), strict=True):
        for key in event.keys() - {"train/tokens_per_second", "train/writing_time"}:
            assert event[key] == pytest.approx(other[key], rel=1e-4), key


def test_models_that_cannot_be_compiled_are_refused_in_one_line(small, monkeypatch):
    config, device = small(compile_models=True), torch.device("cpu")
    models = [BodyAndHead(load_student(config, None)) for _ in range(2)]
    models[1]._no_split_modules = None
    with pytest.raises(UsageError, match=r"^LlamaForCausalLM does not name its decoder layers"):
        compile_models(config, *models, device)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match=r"^compile_models is true, but no C\+\+ compiler was found"):
        compile_models(config, *models, device)


def test_gradient_checkpointing_keeps_less_for_the_backward_pass(small):
    kept = []
    for recompute in (False, True):
        student, numbers = BodyAndHead(load_student(small(), None)), []
        if recompute:
            student.recompute_activations()
        batch = collate(load_rows(small(), load_tokenizer(small()))[0][:4], 0)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, n=numbers: n.append(x.nbytes) or x, lambda x: x):
            student(batch, lambda hidden, head: hidden)
        kept.append(sum(numbers))
    assert kept[1] < 0.3 * kept[0]


def test_training_does_not_change_the_teacher(small, monkeypatch):
    teachers = []

    def keep(*arguments):
        teachers.append(load_teacher(*arguments))
        return teachers[-1]

    monkeypatch.setattr("kdkit.teachers.load_teacher", keep)
    train(small())
    fresh = load_teacher(dtype=torch.float32).state_dict()
    assert all(torch.equal(fresh[name], value) for name, value in teachers[0].state_dict().items())
    assert not teachers[0].training


def test_training_reduces_the_kl_to_the_teacher_and_raises_top_1_agreement(small):
    history = train(small(max_train_tokens=20000, max_steps=60, batch_size=8))
    first, last = (event for event in history if "eval/step" in event)
    assert last["eval/kl_t1"] < 0.8 * first["eval/kl_t1"]
    assert last["eval/top1_agreement"] > 2 * first["eval/top1_agreement"]
    assert last["eval/teacher_ce_loss"] == pytest.approx(first["eval/teacher_ce_loss"], rel=1e-6)


@pytest.fixture
def gradients_of(small):
    """Return a function that runs one step and returns the gradient that the optimizer gets, and the logged norm."""

    def run(**fields):
        seen = []

        def look(optimizer, *_):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            seen.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))

        hook = register_optimizer_step_pre_hook(look)
        try:
            (event,) = training(train(small(max_steps=1, resume="never", **fields)))
        finally:
            hook.remove()
        (gradient,) = seen
        return gradient.double(), event["train/grad_norm"]

    return run


def test_gradient_is_scaled_to_max_grad_norm_if_larger_and_otherwise_unchanged(gradients_of):
    gradient, norm = gradients_of(max_grad_norm=float("inf"))
    assert gradient.norm().item() == pytest.approx(norm, rel=1e-5) and norm > 0.1  # the norm is computed in fp32
    for max_norm in (1.01 * norm, 100 * norm):
        left, logged = gradients_of(max_grad_norm=max_norm)
        assert torch.equal(left, gradient) and logged == norm
    for max_norm in (0.99 * norm, 0.01 * norm):
        scaled, logged = gradients_of(max_grad_norm=max_norm)
        assert logged == norm  # the norm before clipping
        torch.testing.assert_close(scaled, gradient * (max_norm / norm), rtol=1e-4, atol=0)


def test_student_cut_from_the_teacher_starts_with_a_lower_loss_than_a_random_one(small):
    history = train(small(student_layers=[0, 1, 3], max_steps=1, learning_rate=1e-5))
    scratch = train(small(max_steps=1, resume="never"))
    assert history[0]["eval/ce_loss"] < scratch[0]["eval/ce_loss"]


def test_learning_rate_rises_to_its_peak_and_falls_to_zero(small):
    config = small(learning_rate=2e-3, warmup_ratio=0.1)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert max(rates) == rates[9] == rates[10] == 2e-3 and rates[0] == pytest.approx(2e-4)
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 1e-5
    assert learning_rate(50, 100, small(warmup_ratio=0.0)) == pytest.approx(1e-3)
    assert math.isfinite(learning_rate(0, 1, small(warmup_ratio=1.0)))


def test_optimizer_applies_weight_decay_to_matrices_only():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    from kdkit import DistillConfig

    decayed, free = make_optimizer(model, DistillConfig(weight_decay=0.5)).param_groups
    assert decayed["weight_decay"] == 0.5 and [p.ndim for p in decayed["params"]] == [2]
    assert free["weight_decay"] == 0 and all(p.ndim == 1 for p in free["params"])


def test_weight_decay_in_a_run_shrinks_matrices_only(small):
    """Compare one step with and without decay, from the same start: the first layer of the teacher."""
    start, ends, rate, decay = load_teacher(dtype=torch.float32).state_dict(), [], 2e-3, 0.5
    for value in (0.0, decay):
        config = small(student_layers=[0], max_steps=1, learning_rate=rate, weight_decay=value, resume="never")
        train(config)
        ends.append(AutoModelForCausalLM.from_pretrained(Path(config.output_dir) / "final"))
    ndims = set()
    for (name, without), (_, with_decay) in zip(*(end.named_parameters() for end in ends), strict=True):
        shrunk = start[name] * rate * decay if without.ndim >= 2 else torch.zeros_like(without)
        torch.testing.assert_close(without - with_decay, shrunk, rtol=0, atol=1e-6)
        assert without.ndim < 2 or shrunk.abs().max() > 1e-5
        ndims.add(without.ndim)
    assert ndims == {1, 2}


def test_mixed_precision_is_bf16_unless_accelerate_is_configured_otherwise(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert start_accelerator().mixed_precision == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    type(Accelerator().state)._reset_state()
    assert start_accelerator().mixed_precision == "no"


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--alhpa", "1"], "--alpha"),
        (["--alpha", "1.5"], "alpha is 1.5"),
        (["--teacher_model", "./nothing"], "teacher_model ./nothing does not exist"),
        (["--student_model", "./nothing"], "student_model ./nothing does not exist"),
        (["--dataset", "./nothing.txt"], "nothing.txt does not exist"),
        (["--student_layers", "9"], "student_layers is 9"),
    ],
)
def test_invalid_argument_ends_the_command_with_one_line_and_writes_no_file(tmp_path, monkeypatch, capsys, argv, named):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(argv)
    message = str(end.value)
    assert message.startswith("kdkit: ") and named in message and "\n" not in message
    assert not list(tmp_path.iterdir())


def test_run_prints_its_settings_before_the_first_step(small, capsys):
    train(small(alpha=0.3, temperature=2.0, gradient_accumulation_steps=3, batch_size=2, max_steps=1))
    printed = capsys.readouterr().out
    for words in ("2.43 M parameters\n", "0.53 M parameters, from random weights", "loss = 0.3 * CE + 0.7 * 2^2",
                  "6 rows = batch_size 2 x gradient_accumulation_steps 3 x ranks 1",
                  "metrics.jsonl", "final"):  # fmt: skip
        assert words in printed, words


def test_device_out_of_memory_is_one_line_that_says_what_to_lower(small, monkeypatch):
    def train(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")

    monkeypatch.setattr(importlib.import_module("kdkit.train"), "train", train)
    with pytest.raises(SystemExit) as end:
        main(arguments(small()))
    message = str(end.value)
    assert message.startswith("kdkit: the device is out of memory") and "\n" not in message
    assert all(name in message for name in ("batch_size", "gradient_accumulation_steps", "gradient_checkpointing"))


def test_ddp_keeps_no_second_copy_of_the_gradients():
    assert start_accelerator().ddp_handler.gradient_as_bucket_view


@pytest.mark.parametrize(
    "at, said",
    [(1, r"starts over, as no checkpoint is saved yet \(see save_steps\)"), (3, "resumes from step_00000002")],
)
def test_interrupted_run_says_from_where_it_goes_on(small, monkeypatch, at, said):
    module = importlib.import_module("kdkit.train")

    def interrupt(what, numbers, batches, step, *rest):
        if (what, step) == ("step", at):
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "stop_if_not_finite", interrupt)
    with pytest.raises(SystemExit, match=f"^kdkit: interrupted. The same command {said}$"):
        main(arguments(small(max_steps=4, save_steps=2)))


def test_demo_opens_no_network_connection(tmp_path):
    """Run it in a network namespace without interfaces, and print each address that Python asks for."""
    program = """
        import sys
        def hook(event, arguments):
            if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
                print("NETWORK", event, arguments)
        sys.addaudithook(hook)
        from kdkit.train import main
        main(sys.argv[1:])
    """
    away = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") is None or subprocess.run([*away, "true"], capture_output=True).returncode != 0:
        away = []  # not allowed here: only print the addresses
    fields = ["--max_steps=2", "--max_eval_tokens=600", f"--output_dir={tmp_path / 'run'}"]
    command = [*away, sys.executable, "-c", textwrap.dedent(program), "--config=recipes/demo.yaml", *fields]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "NETWORK" not in run.stdout and "the student is in" in run.stdout


# --- the exported module


def test_exported_module_is_in_step_with_its_notebook(tmp_path):
    nb_export(str(ROOT / "notebooks" / "03_train.ipynb"), lib_path=tmp_path / "kdkit")
    # the first line and the cell markers contain the path of the notebook, which differs here
    fresh, committed = ((root / "train.py").read_text().splitlines() for root in (tmp_path / "kdkit", ROOT / "kdkit"))
    marks = ("# %% ", "# AUTOGENERATED!")
    assert [x for x in fresh if not x.startswith(marks)] == [x for x in committed if not x.startswith(marks)]


def test_exported_cells_in_a_notebook_do_not_parse_the_command_line(monkeypatch):
    notebook = nbformat.read(ROOT / "notebooks" / "03_train.ipynb", as_version=4)
    (cell,) = [cell.source for cell in notebook.cells if '__name__ == "__main__"' in cell.source]
    monkeypatch.setattr("sys.argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    exec(cell.replace("#| export", ""), {"__name__": "__main__", "load_config": load_config})
