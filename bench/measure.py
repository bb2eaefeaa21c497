"""What one run of something takes: seconds in interleaved rounds, bytes at the peak, FLOPs.

On a GPU a second is one of the wall, with the device synchronised at both ends. On a CPU it is a second of the
process's CPU time on one thread: what other programs take of the core does not count.
"""

import gc
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from dspo.estimate import Peak

PRODUCTS = 100  # of the matrix rate: as long as a step, since a GPU's clock is higher for a moment than for a second

Row = dict[str, Any]

ATEN = torch.ops.aten
FORMULAS = flop_registry | {  # torch knows CUDA's fused attention, and not the CPU's
    ATEN._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(
        lambda dy, q, k, v, *_, **__: sdpa_backward_flop_count(dy, q, k, v)
    ),
}


@dataclass
class Case:
    """One thing to be measured, with the labels of its row."""

    labels: Row
    run: Callable[[], object]
    tensors: Callable[[], Iterable[Tensor]]  # what it keeps in memory between two runs
    measured: Row = field(default_factory=dict)


def measure(cases: Sequence[Case], rounds: int, device: torch.device) -> list[Row]:
    """Measure cases beside each other: each round runs all of them once, in an order of its own.

    What slows the machine down for a while then slows all of them. A case that does not fit into the device's memory is
    left out of the rounds, and its row says so.
    """
    fitting = [case for case in cases if _fits(case, device)]
    order = random.Random(0)
    for _ in range(rounds):
        for case in order.sample(fitting, len(fitting)):
            case.measured["seconds"].append(seconds(case.run, device))
    for case in fitting:  # here and not in the step, which would wait for the device
        assert all(tensor.isfinite().all() for tensor in case.tensors()), case.labels
    return [case.labels | case.measured for case in cases]


def _fits(case: Case, device: torch.device) -> bool:
    """Run the case, and count. The first runs make what is made once: the optimizer's state, and what is compiled."""
    try:
        with torch.compiler.set_stance("force_eager"), Flops() as flops:  # compiled operations have no formulas
            case.run()
        if device.type == "cuda":
            case.run()
        peak = peak_bytes(case.run, device) + distinct_bytes(case.tensors())
        case.measured = {"flops": flops.total, "memory_gb": peak / 1e9, "seconds": []}
        return True
    except torch.OutOfMemoryError:
        case.measured = {"out_of_memory": True}
    gc.collect()
    torch.cuda.empty_cache()
    return False


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
    if device.type != "cuda":
        with Peak() as peak:
            run()
        return peak.bytes
    gc.collect()  # what goes during the run would be counted as memory that it does not need
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def distinct_bytes(tensors: Iterable[Tensor]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


class Flops(TorchDispatchMode):
    """FLOPs of matrix products, convolutions and attention by torch's formulas; a product and a sum are two.

    torch's own ``FlopCounterMode`` also follows modules, and by that keeps alive what checkpointing would free.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = FORMULAS.get(func._overloadpacket)
        if formula is None and func._can_decompose():  # in inference mode, what is else taken apart before comes whole
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        self.total += formula(*args, **kwargs, out_val=result) if formula else 0
        return result


def matrix_product(side: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Products of square matrices one after the other: the rate that a step is held against."""
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    c = torch.empty_like(a)
    labels = {"group": "matrix", "variant": "product", "side": side}

    def products() -> None:
        for _ in range(PRODUCTS):
            torch.mm(a, b, out=c)

    return Case(labels, products, lambda: [a, b, c])
