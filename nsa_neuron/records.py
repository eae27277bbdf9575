"""What simulated launches leave behind, for whoever wants to model their time.

A backend that simulates notes the record of every launch; nobody listens unless somebody records.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_records: ContextVar[list[Any] | None] = ContextVar("nsa_neuron_records", default=None)


@contextmanager
def recording() -> Iterator[list[Any]]:
    """Collects the record (`simulator.Run`) of every simulated launch inside, in order."""
    found: list[Any] = []
    token = _records.set(found)
    try:
        yield found
    finally:
        _records.reset(token)


def note(runs: Iterable[Any]) -> None:
    """Hands the records of a launch to `recording`, if it is active."""
    found = _records.get()
    if found is not None:
        found.extend(runs)
