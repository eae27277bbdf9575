"""Two versions of the simulator by turns: what is compared, and how a line is made."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING

from tools import simulator_ab

if TYPE_CHECKING:
    import pytest


def test_a_version_times_the_same_kernels_shape_only() -> None:
    version = simulator_ab.Version("nsa_neuron.simulator", 512, 512)
    for kernel in ("attention", "hoisted matmul"):
        record, timeline, count = version.times(kernel)
        assert record >= 0 and timeline >= 0 and count > 10


def test_pairs_are_compared_after_a_first_round() -> None:
    took = iter([(9.0, 9.0), (9.0, 9.0), (2.0, 2.0), (1.0, 1.0), (1.5, 1.5), (4.0, 4.0)])

    def version() -> SimpleNamespace:
        return SimpleNamespace(times=lambda kernel: (*next(took), 1000))

    class Hashed(SimpleNamespace):
        __hash__ = object.__hash__  # type: ignore[assignment]

    old, new = (Hashed(**vars(version())) for _ in range(2))
    line = simulator_ab.compare(old, new, "attention", 2)  # type: ignore[arg-type]
    # Round 1: old 4 s, new 2 s. Round 2: new 3 s, old 8 s.
    assert re.search(r"0\.2 then and 0\.5 thousand/s now", line), line
    assert "x 0.438" in line, line


def test_another_version_is_imported_beside_this_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def copied(revision, folder):
        package = folder / simulator_ab.NAME
        package.symlink_to(simulator_ab.ROOT / "nsa_neuron" / "simulator")

    monkeypatch.setattr(simulator_ab, "extract", copied)
    before = set(sys.modules)
    try:
        sizes = ["--rounds", "1", "--tokens", "512", "--matrix", "512"]
        assert simulator_ab.main(["HEAD", *sizes]) == 0
    finally:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == simulator_ab.NAME:
                del sys.modules[name]
    printed = capsys.readouterr().out
    assert "attention:" in printed and "hoisted matmul:" in printed
