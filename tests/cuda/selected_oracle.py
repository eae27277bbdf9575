"""Plans for the tests of `selected_attention`, and its float64 check."""

from __future__ import annotations

from functools import partial

import masked_oracle as oracle
import torch
from chosen_blocks import mask_of

from nsa_neuron.backends.cuda import kernel_package, plans
from nsa_neuron.backends.cuda.launch import selected_attention as launch

OP = "selected_attention"


def plan(
    strategy: str, queries: int = 4, block_m: int = 64, block_n: int = 64, chunk: int = 64,
    rows_per_pass: int = 4096, overlap_rows: float = 1.0,
) -> dict:  # fmt: skip
    """The interpreter's plan with other tiles."""
    found = plans.find("interpret", OP, dk=64, dv=64, dtype="float32", group=1)
    limits = {"rows_per_pass": rows_per_pass, "min_pairs": 1}
    rows = {"forward_rows": overlap_rows, "backward_dq_rows": overlap_rows}
    found["dispatch"] = {"strategy": strategy, **limits, **rows}
    for kernel in ("forward", "backward_dq"):
        found[kernel] |= {"QUERIES": queries, "BLOCK_N": block_n}
    for kernel in ("forward_by_block", "backward_dq_by_block", "backward_dkv"):
        found[kernel] |= {"BLOCK_M": block_m, "CHUNK": chunk}
    found["backward_dkv"]["BLOCK_N"] = block_n
    found["reduce_dkv"]["BLOCK_N"] = min(block_n, 16)
    return found


def check(problem: oracle.Problem, ids: torch.Tensor, select_block: int, tiles: dict) -> None:
    group = problem.q.shape[2] // problem.k.shape[2]
    mask = mask_of(ids, problem.k.shape[1], select_block, group)
    bind = lambda f: partial(f, kernels(), tiles, select_block=select_block)  # noqa: E731
    oracle.check(
        problem,
        [(slice(None), slice(None), mask)],
        lambda q, k, v, **o: bind(launch.forward)(q, k, v, ids, **o),
        lambda g, q, k, v, *rest, **o: bind(launch.backward)(g, q, k, v, ids, *rest, **o),
    )


def kernels():
    """The interpreted kernels."""
    return kernel_package("sim").load(OP)
