"""Settings of the whole suite: one thread, repeatable property tests, slow files first."""

from __future__ import annotations

import gc
import os
import random

import pytest
from hypothesis import HealthCheck, settings

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
    torch = None
else:
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Takes modules and tests from the collector, which would walk through them again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)  # records of instructions live long and hold no cycles
    gc.enable()


def pytest_runtest_setup() -> None:
    """The same numbers in every test, whatever ran before it in this process."""
    random.seed(0)
    if torch is not None:
        torch.default_generator.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: one that began last would keep the other workers waiting.

    Raises:
        UsageError: a test's name is another one in the next process, so that workers disagree.
    """
    for item in items:
        if " at 0x" in item.name or _named_by_a_set(item):
            raise pytest.UsageError(f"{item.nodeid}: named by the order of a set, or by an address")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def _named_by_a_set(item: pytest.Item) -> bool:
    params = getattr(item, "callspec", None)
    return params is not None and any(
        isinstance(value, (set, frozenset)) and len(value) > 1 and str(value) in item.name
        for value in params.params.values()
    )
