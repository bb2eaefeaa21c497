"""Batches side by side on the cores of a CPU, each computed by one thread.

Threads that split an operation among them wait for the slowest after each; with batches of small images that is after
every fraction of a millisecond, and worst where a core has other work too. A batch of its own for every core needs no
such waiting, and its bytes depend neither on the number of cores nor on what else is computed.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

SMALL = 256  # pixels; an image with a side of this length keeps all cores busy, and memory stays that of one batch

T = TypeVar("T")
R = TypeVar("R")


def in_lanes(work: Callable[[T], R], batches: Iterable[T], device: torch.device, side: int) -> Iterator[R]:
    """``map(work, batches)``, on a CPU with batches of small images side by side; ``side``: an image's, in pixels.

    ``work`` is called from other threads, under the caller's autocast; inference mode belongs inside it, and it changes
    nothing that the batches share. The caller's thread takes the ``batches``, a few ahead of their results.
    """
    lanes = torch.get_num_threads()
    if device.type != "cpu" or side >= SMALL or lanes == 1:
        yield from map(work, batches)
        return
    enabled, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def in_lane(batch: T) -> R:
        with torch.autocast("cpu", dtype, enabled):
            return work(batch)

    upcoming = iter(batches)
    try:
        with ThreadPoolExecutor(lanes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            running: deque[Future[R]] = deque(pool.submit(in_lane, batch) for batch in islice(upcoming, lanes))
            for batch in upcoming:
                running.append(pool.submit(in_lane, batch))  # waits for a lane, so that no lane waits for a batch
                yield running.popleft().result()
            while running:
                yield running.popleft().result()
    finally:
        torch.set_num_threads(lanes)  # a lane's 1 would be that of every thread that begins later
