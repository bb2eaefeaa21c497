"""Batches side by side on the cores of a CPU, each computed by one thread.

Threads that split an operation among them wait for the slowest after each; with batches of small images that is after
every fraction of a millisecond, and worst where a core has other work too. A batch of its own for every core needs no
such waiting, and its result is the same to the bit.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def in_lanes(work: Callable[[T], R], batches: Iterable[T], device: torch.device) -> Iterator[R]:
    """``map(work, batches)`` whose batches run side by side where ``device`` is a CPU of several threads.

    ``work`` is called from other threads, under the caller's autocast; inference mode belongs inside it, and it changes
    nothing that the batches share. The caller's thread takes the ``batches``, a few ahead of their results.
    """
    upcoming = iter(batches)
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    head = list(islice(upcoming, threads))
    if len(head) < 2:
        yield from map(work, chain(head, upcoming))
        return
    enabled, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def in_lane(batch: T) -> R:
        with torch.autocast("cpu", dtype, enabled):
            return work(batch)

    with ThreadPoolExecutor(len(head), initializer=torch.set_num_threads, initargs=(threads // len(head),)) as lanes:
        running: deque[Future[R]] = deque(lanes.submit(in_lane, batch) for batch in head)
        for batch in upcoming:
            running.append(lanes.submit(in_lane, batch))  # waits for a lane, so that no lane waits for a batch
            yield running.popleft().result()
        while running:
            yield running.popleft().result()
