"""Tensors that say they are on cuda:0, are computed by the CPU, and follow the rules of a torch with CUDA.

`device.cpp` makes a torch without CUDA accept such tensors, and `cardboard()` answers for torch.cuda. In between, `run`
receives every operation on a `Card`, or with device="cuda", and

1. refuses what CUDA refuses: operands on different devices, operand types of matrix products;
2. counts the times that the host would wait for the device (`WAITS`), with the line of code that makes it wait;
3. computes the result with the CPU.
"""

import contextlib
import sys
from collections import Counter
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
CUDA = torch.device("cuda:0")
PACKAGES = ("kdkit/", "transformers/", "accelerate/", "torch/optim/", "torch/distributed/")


class Waits(Counter):
    """How often the host waited, by (reason, place); counted while `counting` is true."""

    counting = False

    def add(self, reason: str) -> None:
        if self.counting:
            self[reason, place()] += 1


WAITS = Waits()


def place() -> str:
    """Return the file and the function that called torch: of the innermost frame that belongs to `PACKAGES`."""
    frame = sys._getframe(1)
    while frame is not None:
        for package in PACKAGES:
            _, found, file = frame.f_code.co_filename.rpartition(f"/{package}")
            if found:
                return f"{package}{file} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


class Card(torch.Tensor):
    """A tensor on the card: says cuda:0, and keeps its numbers in `inner`, an ordinary tensor of the CPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, requires_grad: bool = False):
        if inner.is_meta:  # see __init__
            return torch.nn.Parameter(inner, requires_grad)
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "layout": inner.layout}
        options = {"dtype": inner.dtype, "device": CUDA, "requires_grad": requires_grad, **layout}
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), **options)

    def __init__(self, inner: torch.Tensor, requires_grad: bool = False):
        # accelerate moves a parameter of an offloaded model by calling the class of the one before, which is this class
        self.inner = inner.inner if isinstance(inner, Card) else inner

    def __repr__(self) -> str:
        return f"Card({self.inner})"

    def __format__(self, spec: str) -> str:  # torch's own formats only tensors of its own class
        return format(self.item(), spec)

    def tolist(self) -> list:  # torch's own reads the memory, which a wrapper does not have
        WAITS.add("tolist()")
        return self.inner.tolist()

    def data_ptr(self) -> int:  # this one and the next are used to find tied weights
        return self.inner.data_ptr()

    def storage(self) -> torch.storage.TypedStorage:
        return self.inner.storage()

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        return run(function, arguments, options or {})


class _OnTheCard(TorchDispatchMode):
    """Also sends operations without a `Card` to `run`: torch.zeros(3, device="cuda")."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return run(function, arguments, options or {})


def run(function, arguments: tuple, options: dict):
    """Check, count and compute one operation."""
    tensors = [value for value in tree_leaves((arguments, options)) if isinstance(value, torch.Tensor)]
    on_card = [tensor for tensor in tensors if isinstance(tensor, Card)]
    target = torch.device(options["device"]).type if options.get("device") is not None else None
    if not on_card and target != "cuda":
        return function(*arguments, **options)
    if on_card:
        _check_devices(function, arguments, tensors)
    if reason := _why_wait(function, arguments, options, target):
        WAITS.add(reason)

    inner_arguments, inner_options = tree_map(_inner, (arguments, options))
    inner_options.pop("pin_memory", None)
    result = PRODUCTS.get(function, function)(*inner_arguments, **inner_options)

    written = [argument for argument in function._schema.arguments if _is_written(argument)]
    if written:  # in place or out=: the objects that were given are returned
        given = {argument.name: value for argument, value in zip(function._schema.arguments, arguments, strict=False)}
        given |= options
        outputs = [given[argument.name] for argument in written][: len(function._schema.returns)]
        return outputs[0] if len(outputs) == 1 else (tuple(outputs) or None)
    if target not in (None, "cuda"):
        return result
    result = tree_map(lambda value: Card(value) if type(value) is torch.Tensor else value, result)
    return return_and_correct_aliasing(function, arguments, options, result) if on_card else result


def _inner(value):
    """Replace a tensor of the card, or the name of its device, by what the CPU computes with."""
    if isinstance(value, Card):
        return value.inner
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value


def _is_written(argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


# --- 1. what CUDA refuses

INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
JOINING = {aten.cat.default, aten.stack.default}
COPIES = {aten.copy_.default, aten._to_copy.default, aten._has_compatible_shallow_copy_type.default}


def _check_devices(function, arguments: tuple, tensors: list) -> None:
    """Raise as torch does if operands are on different devices. Most may be CPU tensors without dimensions."""
    if function in COPIES:
        return
    if function in INDEXING:
        if not isinstance(arguments[0], Card):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        tensors = [arguments[0], *arguments[2:3]]  # indices may be on the CPU
    others = [x for x in tensors if isinstance(x, torch.Tensor) and not isinstance(x, Card)]
    if any(x.dim() > 0 or function in JOINING for x in others):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two, cuda:0 and cpu! ({function})"
        )


def _product(a, b, out_dtype, out, compute):
    """The checks of mm and addmm with out_dtype in aten/src/ATen/native/cuda/Blas.cpp. CPUs do not have these."""
    if a.dtype != b.dtype:
        raise RuntimeError(f"expected mat1 and mat2 to have the same dtype, but got: {a.dtype} != {b.dtype}")
    if out_dtype != a.dtype and not (out_dtype == torch.float32 and a.dtype in (torch.bfloat16, torch.float16)):
        raise RuntimeError(f"out_dtype must be the same as input dtype or fp32 for fp16/bf16 inputs, is {out_dtype}")
    result = compute(a.to(out_dtype), b.to(out_dtype))
    if out is None:
        return result
    if out.dtype != out_dtype or out.shape != result.shape:
        raise RuntimeError(f"out is {out.dtype} {tuple(out.shape)}, expected {out_dtype} {tuple(result.shape)}")
    return out.copy_(result)


def _mm(a, b, out_dtype, *, out=None):
    return _product(a, b, out_dtype, out, torch.mm)


def _addmm(total, a, b, out_dtype, *, beta=1, alpha=1, out=None):
    if total.dtype not in (out_dtype, a.dtype):
        raise RuntimeError(f"self dtype must match either out_dtype or mat1 dtype, is {total.dtype}")
    total = total.to(out_dtype)
    return _product(a, b, out_dtype, out, lambda a, b: torch.addmm(total, a, b, beta=beta, alpha=alpha))


PRODUCTS = {
    aten.mm.dtype: _mm,
    aten.mm.dtype_out: _mm,
    aten.addmm.dtype: _addmm,
    aten.addmm.dtype_out: _addmm,
    aten._fused_sdp_choice.default: lambda *_, **__: 0,  # attention by matrix products: kernels cannot be rehearsed
}


# --- 2. when the host waits

# the size of the result depends on the numbers, or the result is a number of Python
READ_BY_THE_HOST = {
    "aten::_local_scalar_dense": "a number is read",  # item(), float(), bool(), `if tensor:`
    "aten::equal": "a number is read",
    "aten::nonzero": "nonzero",
    "aten::masked_select": "nonzero",
    "aten::_unique2": "unique",
    "aten::unique_dim": "unique",
    "aten::repeat_interleave": "repeat_interleave with a tensor of repeats",
}


def _why_wait(function, arguments: tuple, options: dict, target: str | None) -> str | None:
    """Return why the host waits for the device in this operation, or None."""
    name = function.overloadpacket._qualified_op_name
    if name in READ_BY_THE_HOST:
        return READ_BY_THE_HOST[name]
    if function in INDEXING:
        for index in arguments[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                return "a mask as an index: nonzero"
            if index is not None and not isinstance(index, Card):
                return "an index on the CPU: copied to the device"
    if function is aten.copy_.default:
        destination, source, *rest = arguments
        to_card, from_card = isinstance(destination, Card), isinstance(source, Card)
        to_cpu = not to_card
        non_blocking = options.get("non_blocking", rest[0] if rest else False)
    elif function is aten._to_copy.default:
        source, from_card = arguments[0], isinstance(arguments[0], Card)
        to_card, to_cpu = target == "cuda", target == "cpu"
        non_blocking = options.get("non_blocking", False)
    else:
        return None
    if from_card and to_cpu and not non_blocking:
        return "a copy to the CPU"
    if to_card and not from_card and not (non_blocking and getattr(source, "on_pinned_memory", False)):
        return "a copy to the device that is blocking, or from memory that is not pinned"
    return None


# --- 3. torch.cuda


class _Stream:
    """The one stream of the card."""

    device_type, device = "cuda", CUDA

    def __init__(self, *_, **__):
        pass

    def wait_stream(self, other) -> None:
        pass

    def synchronize(self) -> None:
        WAITS.add("stream.synchronize()")


def _pin_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Mark a copy of the tensor: there is no pinned memory without CUDA."""
    tensor = tensor.clone()
    tensor.on_pinned_memory = True
    return tensor


@contextlib.contextmanager
def cardboard():
    """Within this context, torch says that it has one CUDA device."""
    random_state = torch.zeros(16, dtype=torch.uint8)
    stream = _Stream()
    answers = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: "cardboard",
        "mem_get_info": lambda device=None: (76 * 2**30, 80 * 2**30),
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: WAITS.add("synchronize()"),
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: random_state.clone(),
        "set_rng_state": lambda state, device=None: random_state.copy_(state),
        "Stream": _Stream,
        "current_stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "_lazy_init": lambda: None,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", _pin_memory))
        # module.to("cuda") replaces parameters: their numbers cannot be replaced by a tensor of another class
        stack.enter_context(_setting(torch.__future__, "set_swap_module_params_on_conversion", True, False))
        # torch.tensor(5, device="cuda") makes a CPU tensor and copies it, where `run` sees the copy
        lifted = torch._C._only_lift_cpu_tensors()
        stack.enter_context(_setting(torch._C, "_set_only_lift_cpu_tensors", True, lifted))
        # `_OnTheCard` belongs to this thread, so the backward pass has to run in it too
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(_OnTheCard())
        yield


@contextlib.contextmanager
def _setting(module, setter: str, value: bool, before: bool):
    getattr(module, setter)(value)
    try:
        yield
    finally:
        getattr(module, setter)(before)
