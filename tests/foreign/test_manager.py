"""The stand-in of AWS's orchestrator: oracles read what the test made, not what the kernel left."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nsa_neuron.simulator import Kernel
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl

from .manager import Manager, copied


def in_place(cache: Any, step: Any) -> Any:
    tile = nl.load(cache)
    nisa.tensor_tensor(tile, tile, nl.load(step), op=nl.add)
    nl.store(cache, tile)
    return cache


class LazyGolden:
    """Computes its reference when it is asked for it, after the run, as AWS's tests do."""

    def __init__(self, inputs: dict[str, Any], factor: float) -> None:
        self.inputs, self.factor = inputs, factor

    @property
    def golden(self) -> dict[str, Any]:
        return {"cache": self.inputs["cache"] + self.factor * self.inputs["step"]}


def outcome(factor: float, ranks: int = 1) -> tuple[Any, dict[str, Any]]:
    inputs = {"cache.must_alias_input": np.ones((8, 16), np.float32)}
    inputs["step"] = np.full((8, 16), 0.5, np.float32)
    plain = {"cache": inputs["cache.must_alias_input"], "step": inputs["step"]}
    manager = Manager()
    manager.execute(
        SimpleNamespace(
            inference_args=SimpleNamespace(collective_ranks=ranks),
            compiler_input=SimpleNamespace(logical_nc_config=1),
            kernel_input=inputs,
            kernel_func=Kernel(in_place),
            validation_args=SimpleNamespace(
                golden_output=LazyGolden(plain, factor),
                relative_accuracy=1e-6,
                absolute_accuracy=0.0,
            ),
        )
    )
    return manager.outcome, plain


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_kernel_that_updates_its_argument_is_compared_with_the_first_values(ranks):
    found, plain = outcome(1.0, ranks)
    assert found.failures == [] and found.error == 0.0 and found.results == ranks
    np.testing.assert_array_equal(plain["cache"], np.ones((8, 16)))


def test_a_reference_that_agrees_with_the_changed_array_only_is_a_failure():
    found, _ = outcome(0.0)  # 1.5 is the kernel's result, and was the changed array's value
    assert len(found.failures) == 1 and found.error == pytest.approx(0.5)


def test_copies_keep_aliases_and_leave_all_else_alone():
    a = np.arange(3)
    kind = object()
    new = copied({"x": a, "y": (a, [a, None]), "kind": kind})
    assert new["x"] is not a and new["y"][0] is new["x"] and new["y"][1][0] is new["x"]
    assert new["kind"] is kind and new["y"][1][1] is None
