"""The files that take longest come first, so that no worker is left alone with one at the end.

Every test begins with the same global generator, so that weights which a test leaves to it, and how far rounding takes
what they give, are the same in every run and order.

What the imports make stays until the end: looking through it for garbage would take a tenth of the tests' time.
"""

import gc

import pytest
import torch

gc.disable()

LONGEST = (
    "test_remote", "test_compose", "test_trainer", "test_your_own", "test_killed", "test_dvc", "test_experiments",
    "test_bench", "test_tracking", "test_cli", "test_dora", "test_loss_seeds",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    torch.manual_seed(0)
