"""The gated combination of the three branches (rule 7)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa_neuron.cases import Case, exact_normal
from nsa_neuron.numerics import Budget
from nsa_neuron.ops import common
from nsa_neuron.ops.grid import GRID, bench_case
from nsa_neuron.ops.softmax import work_dtype
from nsa_neuron.spec import Bound, Cost, OpSpec, Return, TensorArg

BRANCHES = (
    TensorArg("o_cmp", "B S Hq Dv", differentiable=True),
    TensorArg("o_slc", "B S Hq Dv", differentiable=True),
    TensorArg("o_win", "B S Hq Dv", differentiable=True),
    TensorArg("gates", "B S Hq 3", differentiable=True),
)


def gated_sum(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Tensor:
    """o = g_0 * o_cmp + g_1 * o_slc + g_2 * o_win, summed in float32.

    Args:
        o_cmp: `[B, S, Hq, Dv]`, the compressed branch.
        o_slc: the selected branch.
        o_win: the window branch.
        gates: `[B, S, Hq, 3]`, already in [0, 1]; order compressed, selected, window.

    Returns:
        o `[B, S, Hq, Dv]` in the branches' dtype.

    Raises:
        InvalidArgument: an argument breaks the contract.
    """
    work = work_dtype(o_cmp)
    g = gates.to(work)
    total = o_cmp.to(work) * g[..., 0, None]
    total.addcmul_(o_slc.to(work), g[..., 1, None])
    total.addcmul_(o_win.to(work), g[..., 2, None])
    return total.to(o_cmp.dtype).contiguous()


def gated_sum_backward(
    grad_o: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `gated_sum`: do_cmp, do_slc, do_win, dgates.

    Args:
        grad_o: `[B, S, Hq, Dv]`.
        o_cmp, o_slc, o_win, gates: as given to `gated_sum`.
    """
    work = work_dtype(grad_o)
    g, do = gates.to(work), grad_o.to(work)
    branches = [(do * g[..., i, None]).to(grad_o.dtype).contiguous() for i in range(3)]
    dgates = torch.stack([(do * o.to(work)).sum(-1) for o in (o_cmp, o_slc, o_win)], -1)
    return branches[0], branches[1], branches[2], dgates.to(gates.dtype)


def inputs(case: Case, gen: torch.Generator) -> dict[str, Any]:
    """Three branch outputs and gates on a grid of 1/64."""
    shape = (case.size("B"), case.size("S"), case.size("Hq"))
    values = {
        name: exact_normal(gen, *shape, case.size("Dv")) for name in ("o_cmp", "o_slc", "o_win")
    }
    values["gates"] = torch.rand(*shape, 3, generator=gen).mul(64).round().div(64)
    return values


def backward_inputs(case: Case, gen: torch.Generator) -> dict[str, Any]:
    """The same with a gradient."""
    values = inputs(case, gen)
    return {"grad_o": exact_normal(gen, *values["o_cmp"].shape), **values}


def _cost(flops_per_element: int) -> Any:
    def cost(bound: Bound) -> Cost:
        elements = int(bound["B"] * bound["S"] * bound["Hq"] * bound["Dv"])
        return Cost(flops_per_element * elements, common.tensor_bytes(bound))

    return cost


CASES = (*(case for case in GRID if case.lengths is None), bench_case(65536))

SPEC = OpSpec(
    name="gated_sum",
    args=BRANCHES,
    returns=(Return("o", "B S Hq Dv"),),
    reference=gated_sum,
    derive=common.no_derived_sizes,
    check_values=common.no_value_check,
    compare={"o": Budget()},
    cases=CASES,
    inputs=inputs,
    cost=_cost(6),
    backward="gated_sum_backward",
)
BACKWARD = OpSpec(
    name="gated_sum_backward",
    args=(TensorArg("grad_o", "B S Hq Dv"), *common.constants(BRANCHES)),
    returns=tuple(Return(f"d{arg.name}", like=arg.name) for arg in BRANCHES),
    reference=gated_sum_backward,
    derive=common.no_derived_sizes,
    check_values=common.no_value_check,
    compare={f"d{arg.name}": Budget() for arg in BRANCHES},
    cases=CASES,
    inputs=backward_inputs,
    cost=_cost(12),
)
