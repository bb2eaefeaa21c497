"""Progress of long work: a bar on a terminal, plain lines elsewhere, both with rate and remaining time."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from dspo.environment import rank

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 15.0


def progress(iterable: Iterable[T], total: int, desc: str) -> Iterator[T]:
    """Yield the items of ``iterable`` and show on stderr how far along ``total`` they are.

    Of several processes the first one shows its own part.
    """
    if rank() > 0:
        yield from iterable
        return
    if sys.stderr.isatty():
        yield from tqdm(iterable, total=total, desc=desc, dynamic_ncols=True)
        return
    start = last = time.monotonic()
    done = 0
    for item in iterable:
        yield item
        done += 1
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES and done < total:
            last = now
            _line(desc, done, total, now - start)
    _line(desc, done, total, time.monotonic() - start)


def _line(desc: str, done: int, total: int, seconds: float) -> None:
    line = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
    text = tqdm.format_meter(done, total, seconds, prefix=desc, bar_format=line)
    print(text, file=sys.stderr, flush=True)
