"""AWS's kernels run unmodified and agree with AWS's references."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from nsa_neuron.simulator import SimulationError, simulate

from . import library, sdk
from .checkouts import importable, path_of, why_missing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .library import LibraryCase
    from .sdk import SdkCase

pytestmark = pytest.mark.sim


def parameters(cases: tuple[LibraryCase, ...] | tuple[SdkCase, ...]) -> list:
    """Cases with readable, unique ids."""
    seen: dict[str, int] = {}
    out = []
    for case in cases:
        seen[case.id] = seen.get(case.id, 0) + 1
        name = case.id if seen[case.id] == 1 else f"{case.id}-{'abcdefgh'[seen[case.id] - 1]}"
        out.append(pytest.param(case, id=name, marks=[pytest.mark.slow] if case.slow else []))
    return out


@pytest.fixture(scope="module")
def library_checkout() -> Iterator[None]:
    if path_of("library") is None:
        pytest.skip(why_missing("library"))
    with importable("library", ".", "src"):
        yield


@pytest.fixture
def sdk_checkout() -> Iterator[None]:
    if path_of("sdk") is None:
        pytest.skip(why_missing("sdk"))
    with importable("sdk"):
        yield


def judge(case: LibraryCase | SdkCase) -> None:
    outcome = case.run()
    assert not outcome.failures, "; ".join(outcome.failures)
    assert outcome.results > 0 and outcome.instructions > 0, "nothing was run or compared"
    unused = set(case.relax) - set(outcome.relaxed)
    assert not unused, f"relaxed without need: {unused}"


@pytest.mark.parametrize("case", parameters(library.CASES))
def test_nki_library(case: LibraryCase, library_checkout: None) -> None:
    judge(case)


@pytest.mark.parametrize("case", parameters(sdk.CASES))
def test_sdk_example(case: SdkCase, sdk_checkout: None) -> None:
    judge(case)


def test_sdk_example_that_violates_a_layout_is_refused(sdk_checkout: None) -> None:
    import numpy as np

    kernel = sdk.load("layout-violation.py").tensor_exp_kernel_
    with pytest.raises(SimulationError) as error:
        simulate(kernel)(np.ones((256, 512), np.float32))
    assert error.value.rule == "partition-limit"
