"""What one run of something takes: seconds in interleaved rounds, bytes at the peak, FLOPs.

On a GPU a second is one of the wall, with the device synchronised at both ends. On a CPU it is a second of the process's
CPU time on one thread: what other programs take of the core does not count.
"""

import gc
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from dspo.estimate import Peak

Row = dict[str, Any]

ATEN = torch.ops.aten
CPU_ATTENTION = {  # torch counts CUDA's fused attention, and not the CPU's
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda dy, q, k, v, *_, **__: sdpa_backward_flop_count(
        dy, q, k, v
    ),
}


@dataclass
class Case:
    """One thing to be measured, with the labels of its row."""

    labels: Row
    run: Callable[[], object]
    tensors: Callable[[], Iterable[Tensor]]  # what it keeps in memory between two runs
    counted: Callable[[], object] | None = None  # what FLOPs are counted of; default: ``run``
    measured: Row = field(default_factory=dict)


def measure(cases: Sequence[Case], rounds: int, device: torch.device) -> list[Row]:
    """Measure cases beside each other: each round runs all of them once, in an order of its own.

    What slows the machine down for a while then slows all of them. A case that does not fit into the device's memory is
    left out of the rounds, and its row says so.
    """
    fitting = []
    for case in cases:
        try:
            case.run()  # makes the optimizer's state, and whatever is made once
            case.measured["flops"] = flops(case.counted or case.run)
            case.measured["memory_gb"] = (peak_bytes(case.run, device) + distinct_bytes(case.tensors())) / 1e9
            case.measured["seconds"] = []
            fitting.append(case)
        except torch.OutOfMemoryError:
            case.measured = {"out_of_memory": True}
            gc.collect()
            torch.cuda.empty_cache()
    order = random.Random(0)
    for _ in range(rounds):
        for case in order.sample(fitting, len(fitting)):
            case.measured["seconds"].append(seconds(case.run, device))
    return [case.labels | case.measured for case in cases]


def seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that ``run`` takes at its peak beyond what was there: CUDA's own count, or that of all tensors made."""
    gc.collect()
    if device.type != "cuda":
        with Peak() as peak:
            run()
        return peak.bytes
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def distinct_bytes(tensors: Iterable[Tensor]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def flops(run: Callable[[], object]) -> int:
    """FLOPs of matrix products, convolutions and attention, a product and a sum as two."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        run()
    return int(counter.get_total_flops())


def matrix_product(side: int, dtype: torch.dtype, device: torch.device) -> Case:
    """A product of square matrices: the rate that a step is held against."""
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    c = torch.empty_like(a)
    return Case({"group": "matrix", "variant": "product", "side": side}, lambda: torch.mm(a, b, out=c), lambda: [a, b, c])
