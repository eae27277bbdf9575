"""The whole of Native Sparse Attention: three branches and their gated sum (rules 2 to 8)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nsa_neuron.cases import Case, cast, exact_normal, packed_tensors
from nsa_neuron.numerics import Budget
from nsa_neuron.ops import common, compressed_attention, gated_sum, select_blocks
from nsa_neuron.ops import selected_attention as selected
from nsa_neuron.ops import sliding_window_attention as sliding
from nsa_neuron.ops.attention_family import run_reference
from nsa_neuron.ops.grid import bench_case, grid, variant
from nsa_neuron.spec import Bound, Cost, OpSpec, Return, TensorArg


def nsa_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    block: int = 32,
    stride: int = 16,
    select_block: int = 64,
    num_selected: int = 16,
    num_initial: int = 1,
    num_local: int = 2,
    window: int = 512,
    scale: float | None = None,
) -> Tensor:
    """Native Sparse Attention: gated sum of compressed, selected and window attention.

    Args:
        q: `[B, S, Hq, Dk]`.
        k_cmp: `[B, Nc, Hkv, Dk]`, from `compress`.
        v_cmp: `[B, Nc, Hkv, Dv]`.
        k_slc: `[B, T, Hkv, Dk]`, T >= S; the queries are the last S tokens.
        v_slc: `[B, T, Hkv, Dv]`.
        k_win: `[B, T, Hkv, Dk]`.
        v_win: `[B, T, Hkv, Dv]`.
        gates: `[B, S, Hq, 3]` in [0, 1]; order compressed, selected, window.
        block, stride: l and d of `compress`.
        select_block: m, tokens of a selection block.
        num_selected: n, ids per row, the forced ones included.
        num_initial: forced blocks at the start of the sequence.
        num_local: forced blocks that end with the query's own.
        window: w, tokens that the window branch sees.
        scale: of the logits; default `Dk ** -0.5`.
        cu_seqlens_q: offsets of packed sequences' queries, `[N + 1]` int32; needs B == 1.
        cu_seqlens_k: the same for raw keys.

    Returns:
        o `[B, S, Hq, Dv]` in q's dtype.

    Raises:
        InvalidArgument: an argument breaks the contract.
    """
    return nsa_attention_forward(
        q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates,
        block=block, stride=stride, select_block=select_block, num_selected=num_selected,
        num_initial=num_initial, num_local=num_local, window=window, scale=scale,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
    )[0]  # fmt: skip


def nsa_attention_forward(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    block: int = 32,
    stride: int = 16,
    select_block: int = 64,
    num_selected: int = 16,
    num_initial: int = 1,
    num_local: int = 2,
    window: int = 512,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`nsa_attention` that also returns what its backward needs; used when training.

    Args:
        q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, block, stride, select_block,
            num_selected, num_initial, num_local, window, scale, cu_seqlens_q, cu_seqlens_k: as
            for `nsa_attention`.

    Returns:
        o, block_indices, o_cmp, lse_cmp, o_slc, lse_slc, o_win, lse_win.
    """
    kv_len = k_slc.shape[1]
    shared: dict[str, Any] = {
        "scale": scale, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k,
    }  # fmt: skip
    geometry: dict[str, Any] = {"kv_len": kv_len, "block": block, "stride": stride, **shared}
    o_cmp, lse_cmp = compressed_attention.compressed_attention(q, k_cmp, v_cmp, **geometry)
    ids = select_blocks.select_blocks(
        q, k_cmp, lse_cmp, select_block=select_block, num_selected=num_selected,
        num_initial=num_initial, num_local=num_local, **geometry,
    )  # fmt: skip
    o_slc, lse_slc = selected.selected_attention(
        q, k_slc, v_slc, ids, select_block=select_block, **shared
    )
    o_win, lse_win = sliding.sliding_window_attention(q, k_win, v_win, window=window, **shared)
    o = gated_sum.gated_sum(o_cmp, o_slc, o_win, gates)
    return o, ids, o_cmp, lse_cmp, o_slc, lse_slc, o_win, lse_win


def nsa_attention_backward(
    grad_o: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    block_indices: Tensor,
    o_cmp: Tensor,
    lse_cmp: Tensor,
    o_slc: Tensor,
    lse_slc: Tensor,
    o_win: Tensor,
    lse_win: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    block: int = 32,
    stride: int = 16,
    select_block: int = 64,
    num_selected: int = 16,
    num_initial: int = 1,
    num_local: int = 2,
    window: int = 512,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `nsa_attention`: dq, dk_cmp, dv_cmp, dk_slc, dv_slc, dk_win, dv_win, dgates.

    Args:
        grad_o: `[B, S, Hq, Dv]`.
        q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, block, stride, select_block,
            num_selected, num_initial, num_local, window, scale, cu_seqlens_q, cu_seqlens_k: as
            given to `nsa_attention_forward`.
        block_indices, o_cmp, lse_cmp, o_slc, lse_slc, o_win, lse_win: what it returned.
    """
    shared: dict[str, Any] = {
        "scale": scale, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k,
    }  # fmt: skip
    do_cmp, do_slc, do_win, dgates = gated_sum.gated_sum_backward(
        grad_o, o_cmp, o_slc, o_win, gates
    )
    dq_cmp, dk_cmp, dv_cmp = compressed_attention.compressed_attention_backward(
        do_cmp, q, k_cmp, v_cmp, o_cmp, lse_cmp,
        kv_len=k_slc.shape[1], block=block, stride=stride, **shared,
    )  # fmt: skip
    dq_slc, dk_slc, dv_slc = selected.selected_attention_backward(
        do_slc, q, k_slc, v_slc, block_indices, o_slc, lse_slc,
        select_block=select_block, **shared,
    )  # fmt: skip
    dq_win, dk_win, dv_win = sliding.sliding_window_attention_backward(
        do_win, q, k_win, v_win, o_win, lse_win, window=window, **shared
    )
    work = torch.promote_types(q.dtype, torch.float32)
    dq = (dq_cmp.to(work) + dq_slc.to(work) + dq_win.to(work)).to(q.dtype)
    return dq, dk_cmp, dv_cmp, dk_slc, dv_slc, dk_win, dv_win, dgates


def derive(bound: Bound) -> None:
    common.check_heads(bound)
    common.check_tokens(bound)
    common.check_compressed(bound)


def check_values(bound: Bound, values: Mapping[str, Any]) -> None:
    common.check_cmp_rows(bound, values)
    if "block_indices" in values:
        selected.check_values(bound, values)


def inputs(case: Case, gen: torch.Generator) -> dict[str, Any]:
    """Three independent key-value pairs, and gates on a grid of 1/64."""
    values = compressed_attention.inputs(case, gen)
    del values["kv_len"]
    b, t, hkv = case.size("B"), case.size("T"), case.size("Hkv")
    for branch in ("slc", "win"):
        values[f"k_{branch}"] = exact_normal(gen, b, t, hkv, case.size("Dk"))
        values[f"v_{branch}"] = exact_normal(gen, b, t, hkv, case.size("Dv"))
    gates = torch.rand(b, case.size("S"), case.size("Hq"), 3, generator=gen)
    return {**values, "gates": gates.mul(64).round().div(64), **packed_tensors(case)}


def backward_inputs(case: Case, gen: torch.Generator) -> dict[str, Any]:
    """The forward's inputs, what it returns in float64, and a gradient."""
    given = cast(inputs(case, gen), torch.float64, ())
    results = run_reference(FORWARD, {**given, **case.scalars})
    grad_o = exact_normal(gen, *results.pop("o").shape)
    return {**given, **results, "grad_o": grad_o}


def _cost(passes: float) -> Any:
    """Sum of the branches' matmuls (forward 2 per pair and the scores' QK again; backward 5)."""

    def cost(bound: Bound) -> Cost:
        pairs = (
            compressed_attention._pairs(bound)
            + common.visible_pairs(bound, 0, int(bound["n"] * bound["m"]))
            + common.visible_pairs(bound, 0, int(bound["w"]))
        )
        flops = int(common.attention_flops(bound, pairs) * passes)
        if passes == 1:
            flops += 2 * compressed_attention._pairs(bound) * int(bound["Hq"] * bound["Dk"])
        return Cost(flops, common.tensor_bytes(bound))

    return cost


TENSORS = (
    TensorArg("q", "B S Hq Dk", differentiable=True),
    TensorArg("k_cmp", "B Nc Hkv Dk", differentiable=True),
    TensorArg("v_cmp", "B Nc Hkv Dv", differentiable=True),
    TensorArg("k_slc", "B T Hkv Dk", differentiable=True),
    TensorArg("v_slc", "B T Hkv Dv", differentiable=True),
    TensorArg("k_win", "B T Hkv Dk", differentiable=True),
    TensorArg("v_win", "B T Hkv Dv", differentiable=True),
    TensorArg("gates", "B S Hq 3", differentiable=True),
)
SAVED = (
    ("block_indices", "B S Hkv n", "i32"),
    ("o_cmp", "B S Hq Dv", "float"),
    ("lse_cmp", "B S Hq", "stat"),
    ("o_slc", "B S Hq Dv", "float"),
    ("lse_slc", "B S Hq", "stat"),
    ("o_win", "B S Hq Dv", "float"),
    ("lse_win", "B S Hq", "stat"),
)
SCALARS = (
    *common.CU_SEQLENS,
    common.BLOCK,
    common.STRIDE,
    *common.SELECTION,
    common.WINDOW,
    common.SCALE,
)
SMALL = {**select_blocks.SMALL, "window": 20}
CASES = grid(
    SMALL,
    (
        variant("several_tiles", "default_geometry", {"num_selected": 4}),
        variant("prefill_tail", "custom_scale", {**SMALL, "scale": 0.3}),
        variant("m_plus_1", "l_d_m_equal", {**SMALL, "block": 16, "stride": 16}),
        bench_case(65536),
    ),
)
COMPARE_SAVED = {
    name: select_blocks.SPEC.compare["block_indices"] if kind == "i32" else Budget()
    for name, _, kind in SAVED
}


def _spec(name: str, **rest: Any) -> OpSpec:
    return OpSpec(name=name, derive=derive, check_values=check_values, cases=CASES, **rest)


SPEC = _spec(
    "nsa_attention",
    args=(*TENSORS, *SCALARS),
    returns=(Return("o", "B S Hq Dv"),),
    reference=nsa_attention,
    compare={"o": Budget()},
    inputs=inputs,
    cost=_cost(1),
    backward="nsa_attention_backward",
)
FORWARD = _spec(
    "nsa_attention_forward",
    args=(*TENSORS, *SCALARS),
    returns=(Return("o", "B S Hq Dv"), *(Return(*row) for row in SAVED)),
    reference=nsa_attention_forward,
    compare={"o": Budget()},
    inputs=inputs,
    cost=_cost(1),
    backward="nsa_attention_backward",
    saves=tuple(name for name, _, _ in SAVED),
)
BACKWARD = _spec(
    "nsa_attention_backward",
    args=(
        TensorArg("grad_o", "B S Hq Dv"),
        *(TensorArg(arg.name, arg.dims) for arg in TENSORS),
        *(TensorArg(*row) for row in SAVED),
        *SCALARS,
    ),
    returns=tuple(Return(f"d{arg.name}", like=arg.name) for arg in TENSORS),
    reference=nsa_attention_backward,
    compare={f"d{arg.name}": Budget() for arg in TENSORS},
    inputs=backward_inputs,
    cost=_cost(2.5),
)
