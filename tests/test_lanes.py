"""Batches side by side: the same results in the same order, at once, each by its share of the threads."""

import threading
from collections.abc import Iterator

import pytest
import torch

from dspo.lanes import in_lanes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("n_batches", "lanes"), [(2, 2), (3, 3), (9, 4)])
def test_batches_run_at_once_and_come_in_order(n_batches: int, lanes: int) -> None:
    everyone = threading.Barrier(lanes)

    def work(batch: int) -> tuple[int, int]:
        if batch < lanes:
            everyone.wait(timeout=60)  # broken unless as many run at once
        return batch, torch.get_num_threads()

    found = list(in_lanes(work, iter(range(n_batches)), CPU))
    assert found == [(batch, 4 // lanes) for batch in range(n_batches)]
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(("n_batches", "device"), [(0, "cpu"), (1, "cpu"), (5, "meta")])
def test_one_batch_or_a_gpu_keeps_the_callers_thread(n_batches: int, device: str) -> None:
    found = list(in_lanes(lambda _: threading.current_thread(), range(n_batches), torch.device(device)))
    assert found == [threading.current_thread()] * n_batches


def test_few_batches_are_taken_ahead() -> None:
    taken = []
    results = in_lanes(int, (taken.append(i) or i for i in range(100)), CPU)
    assert next(results) == 0
    assert len(taken) <= 5


def test_autocast_is_the_callers() -> None:
    ones = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert {x.dtype for x in in_lanes(lambda _: ones @ ones, range(3), CPU)} == {torch.bfloat16}
    assert {x.dtype for x in in_lanes(lambda _: ones @ ones, range(3), CPU)} == {torch.float32}


def test_an_error_in_a_lane_is_the_callers() -> None:
    with pytest.raises(ZeroDivisionError):
        list(in_lanes(lambda i: 1 // (2 - i), range(4), CPU))
