"""Tensors that say they are on a GPU and hold the CPU's data.

An operation runs on the data, once the devices of its tensors were looked at as CUDA looks at them: a program gives a
CPU's results, and an error where a GPU would give one.
"""

import atexit
import collections
import ctypes
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2"}  # their result is read
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # a GPU's tensor takes the CPU's indices

waits: collections.Counter[str] = collections.Counter()


class OnGPU(Tensor):
    on_cpu: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnGPU":
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=CUDA
        )

    def __init__(self, inner: Tensor) -> None:
        self.on_cpu = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_gpu(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        return OnGPU(self.on_cpu.detach())

    @data.setter
    def data(self, value: Tensor) -> None:
        self.on_cpu = value.on_cpu.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copy: Tensor = OnGPU(self.on_cpu.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, requires_grad=self.requires_grad)
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.on_cpu.detach().clone().__reduce_ex__(protocol)

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on = any(isinstance(t, Tensor) and t.is_cuda for t in tree_leaves((args, kwargs)))
        return on_gpu(func, args, kwargs) if on or wants_gpu(kwargs) else func(*args, **kwargs)


def install() -> None:
    """For this process, and all threads that it starts."""
    torch.autograd.set_multithreading_enabled(False)  # torch's own threads would not have the mode
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch.inference_mode = lambda mode=True: torch.no_grad()  # its tensors cannot be wrapped
    plain_attention, start = F.scaled_dot_product_attention, threading.Thread.run

    def attention(query: Tensor, *rest: Any, **options: Any) -> Any:
        """Written out: the choice of a kernel looks for a tensor's address."""
        if not isinstance(query, OnGPU):
            return plain_attention(query, *rest, **options)
        return torch.ops.aten._scaled_dot_product_attention_math(query, *rest, **options)[0]

    def run(thread: threading.Thread) -> None:
        with Mode():
            start(thread)

    F.scaled_dot_product_attention = attention
    threading.Thread.run = run
    if "WAITS" in os.environ:
        atexit.register(lambda: Path(os.environ["WAITS"]).write_text(json.dumps(waits), encoding="utf-8"))
    Mode().__enter__()


def on_gpu(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation that has a tensor on the GPU, or makes one. Raises ``RuntimeError`` where CUDA would."""
    name = func.overloadpacket.__name__
    if is_composite(func) and (result := func.decompose(*args, **kwargs)) is not NotImplemented:
        return result
    args, kwargs = tree_map(adopted, (args, kwargs))
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if name == "_to_copy":
        return moved(args[0], kwargs)
    if name == "_pin_memory":
        return args[0].clone()
    to_gpu = wants_gpu(kwargs) or ("device" not in kwargs and any(isinstance(t, OnGPU) for t in tensors))
    check_generator(func, args, kwargs, to_gpu)
    if name == "copy_":
        across = isinstance(args[0], OnGPU) != isinstance(args[1], OnGPU)
        if across and not any([*args[2:], kwargs.get("non_blocking")]):
            wait()
        inner(args[0]).copy_(inner(args[1]))
        return args[0]
    others = [t for t in tensors if not isinstance(t, OnGPU) and t.ndim]
    if others and (name not in INDEXING or not isinstance(args[0], OnGPU)):
        shapes = [(t.device.type, tuple(t.shape)) for t in tensors]
        raise RuntimeError(f"{func}: expected all tensors to be on the same device: {shapes}")
    masks = name in INDEXING and any(isinstance(t, OnGPU) and t.dtype == torch.bool for t in tree_leaves(args[1]))
    if others or masks or name in WAITING:
        wait()
    options = {key: CPU if key == "device" else inner(value) for key, value in kwargs.items() if key != "pin_memory"}
    result = func(*tree_map(inner, args), **options)
    if not to_gpu:
        return result
    return return_and_correct_aliasing(func, args, kwargs, tree_map_only(Tensor, wrapped, result))


def moved(tensor: Tensor, kwargs: Any) -> Tensor:
    """``tensor.to(…)``: to the other device, or to another dtype."""
    to_gpu = wants_gpu(kwargs) if kwargs.get("device") is not None else isinstance(tensor, OnGPU)
    if isinstance(tensor, OnGPU) != to_gpu and not (to_gpu and kwargs.get("non_blocking")):
        wait()
    options = {key: value for key, value in kwargs.items() if key in ("dtype", "memory_format")}
    copy = torch.ops.aten._to_copy(inner(tensor), **options)
    return OnGPU(copy) if to_gpu else copy


def check_generator(func: Any, args: Any, kwargs: Any, on: bool) -> None:
    for generator in tree_leaves((args, kwargs)):
        if isinstance(generator, torch.Generator) and (generator.device.type == "cuda") != on:
            raise RuntimeError(f"{func}: expected a generator of the tensor's own device")


def is_composite(func: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


def wants_gpu(kwargs: Any) -> bool:
    return kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"


def inner(value: Any) -> Any:
    return value.on_cpu if isinstance(value, OnGPU) else value


def wrapped(tensor: Tensor) -> OnGPU:
    return tensor if isinstance(tensor, OnGPU) else OnGPU(tensor)


def adopted(value: Any) -> Any:
    """What torch made of Python's numbers, beneath the mode, and copied to a GPU whose memory is the host's."""
    if not isinstance(value, Tensor) or isinstance(value, OnGPU) or not value.is_cuda:
        return value
    wait()
    copy = torch.empty(value.shape, dtype=value.dtype, device=CPU)
    ctypes.memmove(copy.data_ptr(), value.contiguous().data_ptr(), value.numel() * value.element_size())
    return OnGPU(copy)


def wait() -> None:
    """Count a wait for the device, by the project's functions that led to it, the innermost last."""
    names: list[str] = []
    frame = sys._getframe()
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if module.startswith("dspo."):
            names.append(f"{module.rpartition('.')[2]}.{frame.f_code.co_name}")
        frame = frame.f_back
    waits[" ".join(reversed(names))] += 1
