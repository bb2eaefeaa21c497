"""The files that take longest come first, so that no worker is left alone with one at the end."""

import pytest

LONGEST = ("test_your_own", "test_killed", "test_bench", "test_compose", "test_loss_seeds")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)
