"""The conformance suite on interpreted Triton kernels; `nsa conform` runs all of it.

Every edge case of the ops whose kernels are quick to interpret, and of the others those that tell
one mistake from another: `tests/cuda` has tests of their own for these. What is made of parts
(`nsa_attention`) is tried on the smoke cases, its parts on the edges.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from nsa_neuron.conformance import Problem, conformance_tests, find_targets, problems, try_problem
from nsa_neuron.conformance.pytest_suite import settle
from nsa_neuron.ops import OPS

pytestmark = pytest.mark.sim

TELLING = {
    "select_blocks": {
        "default_geometry", "l_d_m_equal", "no_initial_one_local", "custom_scale", "three_to_one",
        "m", "decode_one", "dims_odd_80_24",
    },
    "selected_attention": {
        "default_block", "dead_rows", "one_id", "custom_scale", "m", "decode_one",
        "dims_odd_80_24", "prefill_tail",
    },
    "decode": {
        "group3", "odd_pages", "page_of_one", "no_initial_one_local", "n_of_one",
        "custom_scale", "window_of_splits_and_one",
    },
}  # fmt: skip
TELLING["selected_attention_backward"] = TELLING["selected_attention"]
COMPOSED = tuple(spec.name for spec in OPS if spec.name.startswith("nsa_attention"))
SINGLE = tuple(spec.name for spec in OPS if spec.name not in COMPOSED)
EDGES = [
    problem
    for problem in problems(SINGLE, (torch.float32,), ("edge",))
    if problem.label in TELLING.get(problem.op, (problem.label,))
]

test_smoke = conformance_tests("cuda:sim", dtypes=(torch.bfloat16,), tags=("smoke",))
test_smoke_of_the_whole = conformance_tests(
    "cuda:sim", ops=COMPOSED, dtypes=(torch.float32,), tags=("smoke",)
)


@pytest.mark.parametrize("problem", EDGES, ids=map(str, EDGES))
def test_edges(problem: Problem) -> None:
    settle(try_problem(problem, find_targets(["cuda:sim"])[0]))


def test_the_edges_that_are_named_exist() -> None:
    found = {(problem.op, problem.label) for problem in EDGES}
    assert found >= {(op, label) for op, labels in TELLING.items() for label in labels}
    assert {problem.op for problem in EDGES} == set(SINGLE)
