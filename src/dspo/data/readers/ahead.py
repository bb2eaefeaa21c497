"""Rows read ahead in threads: to see that an image is whole is to decode it, which takes 10 to 50 ms at 1024 px."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from dspo.environment import processes

T = TypeVar("T")
R = TypeVar("R")


def read_ahead(read: Callable[[T], R], rows: Iterable[T]) -> Iterator[R]:
    """``map(read, rows)``, in as many threads as there are cores; no more than twice so many rows are in memory."""
    threads = processes()
    with ThreadPoolExecutor(threads) as pool:
        upcoming: deque[Future[R]] = deque()
        for row in rows:
            upcoming.append(pool.submit(read, row))
            if len(upcoming) == 2 * threads:
                yield upcoming.popleft().result()
        while upcoming:
            yield upcoming.popleft().result()
