"""Several processes at one task: who does which part, and how the parts come together again.

There is one process per GPU, started by `accelerate launch` (docs/scaling.md). Without a launcher there is one process,
and the functions here return what they were given. Work is cut into batches in a way that does not depend on the number
of processes; a process takes every n-th batch whole, so that the same batches are computed however many processes
there are.
"""

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dspo.environment import device, launched

T = TypeVar("T")

# The launcher notices a dead process and ends the others; only a slow one is waited for.
PATIENCE = timedelta(days=2)


def start() -> None:
    """Join the processes that the launcher started with this one; nothing happens without a launcher."""
    if dist.is_initialized() or not launched():
        return
    cuda = device().type == "cuda"
    if cuda:
        torch.cuda.set_device(device())
    # gloo beside nccl: waiting for a slow process must not keep a GPU busy.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Whether this is the process that writes what exists once."""
    return rank() == 0


def wait() -> None:
    """Return when all processes have come here."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))


def from_first(value: T) -> T:
    """The first process's value, on every process."""
    if count() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def share(items: Iterable[T], batch_size: int = 1) -> list[T]:
    """This process's items: of the batches of ``batch_size`` that one process would make, every n-th."""
    own, n = rank(), count()
    return [item for position, item in enumerate(items) if position // batch_size % n == own]


def merged(part: Sequence[T], batch_size: int = 1) -> list[T]:
    """The inverse of :func:`share`: the parts of all processes, in the order of the whole, on every process."""
    n = count()
    if n == 1:
        return list(part)
    parts: list[Any] = [None] * n
    dist.all_gather_object(parts, list(part))
    upcoming = [iter(one) for one in parts]
    return [next(upcoming[position // batch_size % n]) for position in range(sum(map(len, parts)))]


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace tensors of one dtype by their sums over all processes, which get the same bits, in place."""
    if count() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def add_up_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Sum the gradients over all processes; one that had no batch of this step counts as zeros."""
    if count() == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    add_up(gradients)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
