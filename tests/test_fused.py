"""Tests that `fused_kd_loss` equals `kd_loss`, values and gradients, without a tensor of tokens x vocabulary."""

import itertools
import logging
import math
import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kdkit.fused
from kdkit.fused import block_sums_and_gradient, compile_block, fused_kd_loss
from kdkit.losses import DIVERGENCES, TopK, kd_loss, top_k

NAMES = sorted(DIVERGENCES)
MASKS = ("some", "none masked", "all masked", "one left")


def problem(mask="some", student_vocab=37, teacher_vocab=41, dtype=torch.float64, seed=0, shape=(3, 5)):
    """Return hidden states and heads of a student (H = 6) and of a teacher (H = 8), and labels."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(min(student_vocab, teacher_vocab), shape, generator=generator)
    if mask == "some":
        labels[torch.rand(shape, generator=generator) < 0.3] = -100
    elif mask == "all masked":
        labels[:] = -100
    elif mask == "one left":
        labels.flatten()[1:] = -100
    return randn(*shape, 6), randn(student_vocab, 6), randn(*shape, 8), randn(teacher_vocab, 8), labels


def run(loss_function, hidden, weight, *rest, scale=1.0, **arguments):
    """Return KDLoss, and the gradients of scale * loss with respect to the student's hidden states and head."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    result = loss_function(hidden, weight, *rest, **arguments)
    (scale * result.loss).backward()
    return *result, hidden.grad, weight.grad


def dense(student_hidden, student_head, teacher_hidden, teacher_head, labels, **arguments):
    return kd_loss(student_hidden @ student_head.T, teacher_hidden @ teacher_head.T, labels, **arguments)


def assert_same(got, expected, atol=1e-12):
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=atol)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("name", NAMES)
def test_fused_loss_equals_the_dense_loss(name, temperature):
    """For every divergence, alpha, mask and chunk size, with heads of different widths and a scaled loss."""
    for mask, alpha in itertools.product(MASKS, (0.0, 0.3, 1.0)):
        inputs = problem(mask)
        arguments = {"alpha": alpha, "temperature": temperature, "divergence": name}
        expected = run(dense, *inputs, scale=3.0, **arguments)
        for chunk_size in (1, 4, None):
            assert_same(run(fused_kd_loss, *inputs, scale=3.0, chunk_size=chunk_size, **arguments), expected)


@pytest.mark.parametrize(("name", "option"), [("jsd", "beta"), ("skew_kl", "skew"), ("skew_reverse_kl", "skew")])
def test_fused_loss_with_beta_or_skew_equals_the_dense_loss(name, option):
    for value in (0.3, 0.9, *([0.0] if option == "skew" else [])):
        arguments = {"alpha": 0.3, "temperature": 2.0, "divergence": name, option: value}
        assert_same(run(fused_kd_loss, *problem(), **arguments), run(dense, *problem(), **arguments))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("name", NAMES)
def test_fused_loss_over_buckets_equals_the_dense_loss(name, temperature):
    """Use top-k targets in place of the teacher, with K = 1, 7 and V."""

    def dense_top_k(student_hidden, student_head, teacher, _, labels, **arguments):
        return kd_loss(student_hidden @ student_head.T, teacher, labels, **arguments)

    for mask, alpha, k in itertools.product(MASKS, (0.0, 0.3, 1.0), (1, 7, 37)):
        hidden, weight, teacher_hidden, teacher_weight, labels = problem(mask)
        teacher = top_k(teacher_hidden @ teacher_weight[:37].T, k, temperature)
        arguments = {"alpha": alpha, "temperature": temperature, "divergence": name}
        inputs = hidden, weight, TopK(teacher.ids.int(), teacher.log_probs), None, labels
        expected = run(dense_top_k, *inputs, scale=3.0, **arguments)
        for chunk_size in (1, 4, None):
            assert_same(run(fused_kd_loss, *inputs, scale=3.0, chunk_size=chunk_size, **arguments), expected)


def test_top_k_of_a_wrong_shape_is_refused():
    hidden, weight, teacher_hidden, teacher_weight, labels = problem()
    ids, log_probs = top_k(teacher_hidden @ teacher_weight.T, 4)
    for teacher in (TopK(ids[:, :2], log_probs[:, :2]), TopK(ids, log_probs[..., :-1])):
        with pytest.raises(ValueError, match=r"expected \(\*labels.shape, K\)"):
            fused_kd_loss(hidden, weight, teacher, None, labels, alpha=0.0, temperature=1.0)


@pytest.mark.parametrize("block_elements", [1, 37 * 2, 37 * 3, 10**6])
def test_fused_loss_does_not_depend_on_the_size_of_blocks(block_elements, monkeypatch):
    monkeypatch.setitem(kdkit.fused.BLOCK_ELEMENTS, "cpu", block_elements)
    arguments = {"alpha": 0.3, "temperature": 2.0, "divergence": "jsd"}
    assert_same(run(fused_kd_loss, *problem(), chunk_size=5, **arguments), run(dense, *problem(), **arguments))


@pytest.mark.parametrize("name", NAMES)
def test_fused_loss_passes_gradcheck(name):
    hidden, weight, *rest = problem(student_vocab=7, teacher_vocab=6)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    arguments = {"alpha": 0.3, "temperature": 2.0, "divergence": name, "chunk_size": 4}
    assert torch.autograd.gradcheck(lambda h, w: fused_kd_loss(h, w, *rest, **arguments).loss, inputs)


@pytest.mark.parametrize(("student_vocab", "teacher_vocab"), [(37, 41), (41, 37)])
def test_rows_of_a_head_beyond_the_vocabulary_get_no_gradient_and_change_nothing(student_vocab, teacher_vocab):
    h, w, th, tw, labels = problem(student_vocab=student_vocab, teacher_vocab=teacher_vocab)
    arguments = {"alpha": 0.3, "temperature": 2.0}
    expected = run(dense, h, w[:37], th, tw[:37], labels, **arguments)
    got = run(fused_kd_loss, h, w, th, tw, labels, **arguments)
    assert_same((*got[:-1], got[-1][:37]), expected)
    assert got[-1][37:].abs().sum() == 0
    labels = labels.clamp(max=29)
    expected = run(dense, h, w[:30], th, tw[:30], labels, **arguments)
    got = run(fused_kd_loss, h, w, th, tw, labels, vocab_size=30, **arguments)
    assert_same((*got[:-1], got[-1][:30]), expected)
    assert got[-1][30:].abs().sum() == 0


def test_gradient_of_a_tied_head_is_the_sum_of_both_uses():
    """The head is also the embedding, as in many small models."""
    _, weight, *rest = problem()
    ids = torch.randint(37, (3, 5), generator=torch.Generator().manual_seed(5))
    grads = []
    for function in (fused_kd_loss, dense):
        tied = weight.clone().requires_grad_()
        function(tied[ids].tanh(), tied, *rest, alpha=0.3, temperature=2.0).loss.backward()
        grads.append(tied.grad)
    assert_same(grads[:1], grads[1:])


@pytest.mark.parametrize("name", NAMES)
def test_fused_loss_of_identical_models_is_zero(name):
    hidden, weight, _, _, labels = problem()
    got = run(fused_kd_loss, hidden, weight, hidden, weight, labels, alpha=0.0, temperature=2.0, divergence=name)
    assert abs(got[2]) < 1e-14
    kink = name in ("total_variation", "neg_log_acceptance")  # at p = q
    assert max(got[4].abs().max(), got[5].abs().max()) < 1e-14 or kink
    single = [x.float() if x.is_floating_point() else x for x in (hidden, weight, hidden, weight, labels)]
    assert abs(run(fused_kd_loss, *single, alpha=0.0, temperature=2.0, divergence=name)[2]) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_fused_loss_of_nearly_equal_models_is_positive(name):
    for seed in range(20):
        h, w, _, _, labels = problem("one left", seed=seed)
        teacher = w + 1e-3 * problem(seed=seed + 100)[1]
        assert fused_kd_loss(h, w, h, teacher, labels, alpha=0.0, temperature=1.0, divergence=name).kl_loss > 0


@pytest.mark.parametrize("name", NAMES)
def test_fused_loss_in_fp32_stays_finite_if_probabilities_underflow(name):
    """The logits differ by hundreds, so that many probabilities are 0 in fp32."""
    h, w, th, tw, labels = problem(dtype=torch.float32)
    got = run(fused_kd_loss, 40 * h, w, 40 * th, tw, labels, alpha=0.3, temperature=0.5, divergence=name)
    expected = run(
        dense, *(x.double() for x in (40 * h, w, 40 * th, tw)), labels, alpha=0.3, temperature=0.5, divergence=name
    )
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-4, atol=1e-4)


def test_fused_loss_of_two_tokens_equals_the_value_computed_by_hand():
    """p = (3/4, 1/4), q = (1/2, 1/2), the label is token 1, and T = 1."""
    h, w = torch.ones(1, 1).double().requires_grad_(), torch.tensor([[1.0], [1.0]]).double().requires_grad_()
    th, tw = torch.ones(1, 1).double(), torch.tensor([[math.log(3)], [0.0]]).double()
    got = fused_kd_loss(h, w, th, tw, torch.tensor([1]), alpha=0.5, temperature=1.0)
    got.loss.backward()
    assert got.ce_loss.item() == pytest.approx(math.log(2))
    assert got.kl_loss.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert got.loss.item() == pytest.approx(0.5 * got.ce_loss.item() + 0.5 * got.kl_loss.item())
    d_z = [0.5 * 0.5 + 0.5 * (0.5 - 0.75), 0.5 * (0.5 - 1) + 0.5 * (0.5 - 0.25)]  # alpha (q - onehot) + ... (q - p)
    assert w.grad.flatten().tolist() == pytest.approx(d_z)
    assert h.grad.item() == pytest.approx(sum(d_z))


@pytest.mark.parametrize("alpha", [0.0, 1.0])  # only the divergence, only the cross-entropy
@pytest.mark.parametrize("size", [1, 2, 4])
def test_fused_losses_of_micro_batches_add_up_to_the_loss_of_the_batch(size, alpha):
    inputs = problem(shape=(8, 5))
    num_items = (inputs[-1] != -100).sum()
    expected = run(fused_kd_loss, *inputs, alpha=alpha, temperature=2.0, num_items_in_batch=num_items)
    for items in (num_items, num_items.item()):
        hidden, weight = inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_()
        parts = zip(*(x.split(size) for x in (hidden, inputs[2], inputs[4])), strict=True)
        losses = [
            fused_kd_loss(h, weight, th, inputs[3], y, alpha=alpha, temperature=2.0, num_items_in_batch=items)
            for h, th, y in parts
        ]
        total = sum(x.loss for x in losses)
        total.backward()
        assert_same((total, hidden.grad, weight.grad), (expected[0], *expected[4:]))
        assert_same([sum(x.ce_loss for x in losses), sum(x.kl_loss for x in losses)], expected[1:3])


def test_nan_in_masked_tokens_does_not_change_the_fused_loss():
    h, w, th, tw, labels = problem()
    masked = (labels == -100)[..., None]
    expected = run(fused_kd_loss, h, w, th, tw, labels, alpha=0.3, temperature=2.0)
    h, th = h.masked_fill(masked, math.nan), th.masked_fill(masked, math.nan)
    assert_same(run(fused_kd_loss, h, w, th, tw, labels, alpha=0.3, temperature=2.0), expected, atol=0)


def test_every_token_id_is_learned_as_a_label_and_only_minus_100_is_masked():
    """The id of the padding is a valid label, too: with pad == eos the model has to learn it."""
    h, w, th, tw, _ = problem()
    labels = torch.arange(15).reshape(3, 5)
    assert_same(*(run(f, h, w, th, tw, labels, alpha=0.3, temperature=2.0) for f in (fused_kd_loss, dense)))


def test_alpha_1_with_nan_teacher_gives_the_plain_cross_entropy():
    h, w, th, tw, labels = problem(teacher_vocab=37)
    expected = run(dense, h, w, th, tw, labels, alpha=1.0, temperature=2.0)
    for teacher in ((None, None), (th * math.nan, tw * math.nan)):
        assert_same(run(fused_kd_loss, h, w, *teacher, labels, alpha=1.0, temperature=2.0), expected)


class Allocations(TorchDispatchMode):
    """Records the size, in elements, of the largest tensor that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return result


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_loss_never_holds_the_logits_of_all_tokens(dtype, name):
    """With 64 tokens, V = 500 and chunks of 8, no tensor has more than 3 * 8 * 500 elements."""
    inputs = problem("none masked", 500, 500, dtype=dtype, shape=(64,))
    with Allocations() as allocations:
        run(fused_kd_loss, *inputs, alpha=0.3, temperature=2.0, divergence=name, chunk_size=8)
    assert allocations.largest <= 3 * 8 * 500
    with Allocations() as allocations:
        run(dense, *inputs, alpha=0.3, temperature=2.0, divergence=name)
    assert allocations.largest >= 64 * 500  # the dense loss does allocate all logits, so this test can fail


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("hidden_grad", "head_grad", "alpha", "count"),
    [(True, True, 0.5, 4), (True, False, 0.5, 3), (False, True, 0.5, 3), (False, False, 0.5, 2), (True, True, 1.0, 3)],
)
def test_fused_loss_computes_only_the_matrix_products_that_are_needed(hidden_grad, head_grad, alpha, count):
    h, w, th, tw, labels = problem()
    h.requires_grad_(hidden_grad), w.requires_grad_(head_grad)
    with Products() as products:
        result = fused_kd_loss(h, w, th, tw, labels, alpha=alpha, temperature=2.0)
    assert products.count == count
    assert result.loss.requires_grad == (hidden_grad or head_grad)
    assert not result.ce_loss.requires_grad and not result.kl_loss.requires_grad
    with Products() as products, torch.no_grad():
        assert fused_kd_loss(h, w, th, tw, labels, alpha=alpha, temperature=2.0).loss == result.loss
    assert products.count == (1 if alpha == 1 else 2)


def test_second_backward_pass_with_retain_graph_keeps_the_first_result():
    h, w, th, tw, labels = problem()
    h.requires_grad_(), w.requires_grad_()
    loss = fused_kd_loss(h, w, th, tw, labels, alpha=0.3, temperature=2.0).loss
    first = torch.autograd.grad(2 * loss, (h, w), retain_graph=True)
    second = torch.autograd.grad(3 * loss, (h, w))
    assert_same([1.5 * x for x in first], second)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def closeness(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


def nearly_equal_pair(kl: float, dtype=torch.bfloat16):
    """Return a student that is its teacher plus noise, with a KL of about `kl` at T = 1."""
    generator = torch.Generator().manual_seed(0)
    h, w = torch.randn(48, 64, generator=generator), 0.5 * torch.randn(2000, 64, generator=generator)
    noise = torch.randn(2000, 64, generator=generator) * (2 * kl / 64) ** 0.5
    return h.to(dtype), (w + noise).to(dtype), h.to(dtype), w.to(dtype), torch.randint(2000, (48,), generator=generator)


def test_bf16_gradient_of_a_small_kl_is_within_half_a_percent_of_float64():
    """At a KL of 0.04. With logits rounded to bf16 the error is above 2%."""
    inputs = nearly_equal_pair(0.04)
    expected = run(dense, *(x.double() for x in inputs[:-1]), inputs[-1], alpha=0.0, temperature=1.0)
    assert 0.03 < expected[2] < 0.05
    got = run(fused_kd_loss, *inputs, alpha=0.0, temperature=1.0)
    assert got[4].dtype == got[5].dtype == torch.bfloat16
    assert got[2].item() == pytest.approx(expected[2].item(), rel=1e-4)
    assert closeness(got[4], expected[4]) < 0.005
    assert closeness(got[5], expected[5]) < 0.005
    logits = [(x.float() @ head.float().T).bfloat16() for x, head in (inputs[:2], inputs[2:4])]
    rounded = (logits[0].double().softmax(-1) - logits[1].double().softmax(-1)) @ inputs[1].double() / len(inputs[4])
    assert closeness(rounded, expected[4]) > 0.02


def test_bf16_head_gradient_summed_over_many_chunks_is_within_one_percent_of_float64():
    inputs = nearly_equal_pair(0.4)
    expected = run(dense, *(x.double() for x in inputs[:-1]), inputs[-1], alpha=0.0, temperature=1.0)
    assert closeness(run(fused_kd_loss, *inputs, alpha=0.0, temperature=1.0, chunk_size=8)[5], expected[5]) < 0.01


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_an_fp32_head_inside_autocast_is_fp32(hidden_dtype):
    """The products run in bf16, and each gradient has the dtype of its tensor."""
    h, w, th, tw, labels = problem(student_vocab=300, teacher_vocab=300, dtype=torch.float32, shape=(32,))
    h, th = h.to(hidden_dtype), th.to(hidden_dtype)
    rounded = [x.bfloat16().double() for x in (h, w, th, tw)]
    expected = run(dense, *rounded, labels, alpha=0.3, temperature=2.0)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(fused_kd_loss, h, w, th, tw, labels, alpha=0.3, temperature=2.0, chunk_size=8)
    assert (got[0].dtype, got[4].dtype, got[5].dtype) == (torch.float32, hidden_dtype, torch.float32)
    assert got[0].item() == pytest.approx(expected[0].item(), rel=0.005)
    assert max(closeness(got[4], expected[4]), closeness(got[5], expected[5])) < 0.02
    before = torch.backends.mkldnn.matmul.fp32_precision
    assert before != "bf16", "the setting that speeds up the products has to be put back"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"divergence": "jsd", "beta": 0.0}, "beta is 0.0"),
        ({"divergence": "kl"}, "divergence is 'kl'"),
        ({"teacher_hidden": None}, "only alpha = 1 allows"),
        ({"labels": torch.zeros(2, dtype=torch.long)}, "one label per token"),
        ({"student_head": torch.zeros(37, 5).double()}, "student_hidden has H = 6, student_head 5"),
        ({"chunk_size": 0}, "chunk_size is 0"),
    ],
)
def test_invalid_argument_of_the_fused_loss_raises_an_error_that_names_it(changed, message):
    names = ("student_hidden", "student_head", "teacher_hidden", "teacher_head", "labels")
    arguments = dict(zip(names, problem(), strict=True)) | {"alpha": 0.5, "temperature": 2.0} | changed
    with pytest.raises(ValueError, match=message):
        fused_kd_loss(**arguments)


def test_option_that_the_divergence_does_not_take_is_refused():
    with pytest.raises(TypeError, match="beta"):
        fused_kd_loss(*problem(), alpha=0.5, temperature=2.0, beta=0.3)


# --- compiled

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


SLOW = [pytest.param(x, k, marks=pytest.mark.slow) for x in DIVERGENCES for k in (None, 5)]


@needs_compiler
@pytest.mark.parametrize(("name", "k"), [("forward_kl", None), *SLOW[1:]])
def test_compiled_loss_equals_the_eager_loss(name, k):
    """One compilation serves blocks of all sizes. The teacher gives logits, or its K most likely tokens."""
    torch._dynamo.reset()
    for shape in ((64,), (49,)):
        h, w, th, tw, labels = problem(shape=shape)
        teacher = (th, tw) if k is None else (top_k(th @ tw[:37].T, k, 2.0), None)
        arguments = {"alpha": 0.3, "temperature": 2.0, "divergence": name, "chunk_size": 16}
        eager, compiled = (
            run(fused_kd_loss, h, w, *teacher, labels, **arguments, compile=flag) for flag in (False, True)
        )
        assert_same(compiled, eager)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", DIVERGENCES)
def test_compiled_loss_on_a_gpu_moves_at_most_20_bytes_per_entry(name):
    """The compiler counts the bytes: the logits of both models are read twice, the gradient is written once in bf16."""
    from torch._inductor import compile_fx, metrics

    z, t, labels = torch.randn(64, 32000), torch.randn(64, 32000), torch.randint(32000, (64,))
    compile_fx.inductor_metrics_log.setLevel(logging.INFO)  # the compiler counts only if it logs
    with torch._inductor.config.patch(force_disable_caches=True):
        for temperature in (1.0, 2.0):
            torch._dynamo.reset()
            metrics.reset()
            keywords = {"alpha": 0.3, "temperature": temperature, "divergence": DIVERGENCES[name], "options": {}}
            function = compile_block("cuda", lambda *args, **kw: block_sums_and_gradient(*args, **kw)[1].bfloat16())
            function(z, labels, t, **keywords)
            assert 10 < metrics.num_bytes_accessed / z.numel() <= 20
