"""A GPU whose kernels do nothing: what torch would give to cuBLAS and cuDNN, which do not start without a device, gives
a tensor of the right shape instead."""

from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("aten", "IMPL")
empty = torch.empty_like


def install() -> None:
    for name, kernel in (
        ("mm", lambda a, b: a.new_empty(len(a), b.shape[1])),
        ("addmm", lambda c, a, b, **_: a.new_empty(len(a), b.shape[1])),
        ("bmm", lambda a, b: a.new_empty(*a.shape[:2], b.shape[2])),
        ("mm.out", lambda a, b, out: out),
        ("addmm.out", lambda c, a, b, out, **_: out),
        ("bmm.out", lambda a, b, out: out),
        ("baddbmm_", lambda c, a, b, **_: c),
        ("cudnn_convolution", convolution),
        ("convolution_backward", convolution_backward),
        ("_scaled_dot_product_cudnn_attention", attention),
        ("_scaled_dot_product_cudnn_attention_backward", lambda g, q, k, v, *_, **__: tuple(map(empty, (q, k, v)))),
    ):
        _library.impl(name, kernel, "CUDA")


def convolution(
    x: Tensor, weight: Tensor, padding: list[int], stride: list[int], dilation: list[int], groups: int, *_: Any
) -> Tensor:
    pixels = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)
    )
    last = any(t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return torch.empty(
        (len(x), len(weight), *pixels),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


def convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    for_x, for_weight, for_bias = rest[-1]
    bias = weight.new_empty(len(weight)) if for_bias else None
    return empty(x) if for_x else None, empty(weight) if for_weight else None, bias


def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Any, ...]:
    batch, heads, length, _width = query.shape
    output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
    log_sum_exp = query.new_empty(batch, heads, length, 1, dtype=torch.float32)
    number = query.new_empty((), dtype=torch.int64)
    none = torch.empty(0)
    return output, log_sum_exp, none, none, length, key.shape[2], number, empty(number), none
