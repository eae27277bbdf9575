"""Steps that are compared, measured in turns, so that a busy machine meets them alike."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch

from nsa_neuron.bench.record import Record


def in_turns(
    bench: str,
    steps: dict[str, Callable[[], Any]],
    rounds: int,
    facts: dict[str, Any],
    held: dict[str, int] | None = None,
    warm: bool = True,
) -> list[Record]:
    """A record of each step's wall time in ms, with its CPU time, the threads and the load beside.

    Args:
        bench: name of the records' benchmark.
        steps: by name; what they return is dropped.
        rounds: how often each is timed.
        facts: of all records.
        held: bytes of each step's cache, a fact of its record.
        warm: each step runs once before.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for step in steps.values() if warm else ():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    records = []
    for name, runs in taken.items():
        cpu = sorted(cpu for _, cpu in runs)[len(runs) // 2]
        more = {"bytes": held[name]} if held else {}
        records.append(
            Record.of(
                bench, name, "ms", [1e3 * wall for wall, _ in runs], **facts, **more,
                cpu_ms=round(1e3 * cpu, 3), threads=torch.get_num_threads(),
                load=round(os.getloadavg()[0], 2),
            )
        )  # fmt: skip
    return records
