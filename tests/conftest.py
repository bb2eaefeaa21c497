"""The files that take longest come first, so that no worker is left alone with one at the end."""

import pytest

LONGEST = (
    "test_remote", "test_compose", "test_trainer", "test_your_own", "test_killed", "test_dvc", "test_experiments",
    "test_bench", "test_tracking", "test_cli", "test_dora", "test_loss_seeds",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))
