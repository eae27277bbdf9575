"""Settings of the whole suite: one thread, repeatable property tests, slow files first."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    import pytest

settings.register_profile(
    "nsa",
    derandomize=True,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("nsa")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # numpy's and children's; as `make test` has it
gc.disable()  # until all tests are collected: what importing makes stays
try:
    import torch
except ImportError:  # the simulator's tests run without torch
    pass
else:
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Takes modules and tests from the collector, which would walk through them again and again."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: one that began last would keep the other workers waiting."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
