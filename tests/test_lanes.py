"""Batches side by side: the same results in the same order, at once, each by its share of the threads."""

import threading
from collections.abc import Iterator

import pytest
import torch

from dspo.lanes import in_lanes

CPU = torch.device("cpu")
SIDE = 64


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("n_batches", "at_once"), [(1, 1), (3, 3), (9, 4)])
def test_batches_run_at_once_and_come_in_order(n_batches: int, at_once: int) -> None:
    everyone = threading.Barrier(at_once)

    def work(batch: int) -> tuple[int, int]:
        if batch < at_once:
            everyone.wait(timeout=60)  # broken unless as many run at once
        return batch, torch.get_num_threads()

    found = list(in_lanes(work, iter(range(n_batches)), CPU, SIDE))
    assert found == [(batch, 1) for batch in range(n_batches)]  # a lone one too, so that its bytes are the same
    later = threading.Thread(target=lambda: found.append((-1, torch.get_num_threads())))
    later.start()
    later.join()
    assert torch.get_num_threads() == 4 and found[-1] == (-1, 4)


@pytest.mark.parametrize(("device", "side"), [("meta", SIDE), ("cpu", 256)])
def test_a_gpu_and_a_large_image_keep_the_callers_thread(device: str, side: int) -> None:
    found = list(in_lanes(lambda _: threading.current_thread(), range(5), torch.device(device), side))
    assert found == [threading.current_thread()] * 5


def test_few_batches_are_taken_ahead() -> None:
    taken = []
    results = in_lanes(int, (taken.append(i) or i for i in range(100)), CPU, SIDE)
    assert next(results) == 0
    assert len(taken) <= 5


def test_autocast_is_the_callers() -> None:
    ones = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert {x.dtype for x in in_lanes(lambda _: ones @ ones, range(3), CPU, SIDE)} == {torch.bfloat16}
    assert {x.dtype for x in in_lanes(lambda _: ones @ ones, range(3), CPU, SIDE)} == {torch.float32}


def test_an_error_in_a_lane_is_the_callers() -> None:
    with pytest.raises(ZeroDivisionError):
        list(in_lanes(lambda i: 1 // (2 - i), range(4), CPU, SIDE))
