"""The whole of Native Sparse Attention: three branches and their gated sum (rules 2 to 8)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from nsa_neuron.cases import Case, cast, exact_normal, packed_tensors
from nsa_neuron.numerics import Budget, TopKSet
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
    values = dict(locals())
    return compose_forward(reference_of, values)


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
    values = dict(locals())
    return compose_backward(reference_of, values)


Part = Callable[[str], Callable[..., Any]]
Three = tuple[Tensor, Tensor, Tensor]
Eight = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
BRANCHES = ("cmp", "slc", "win")
"""The branches as argument names call them, in the order of the gates."""


def compose_forward(part: Part, values: Mapping[str, Any]) -> Eight:
    """`nsa_attention_forward` out of the single ops.

    Args:
        part: gives the implementation of an op by name; called with the op's arguments by name.
        values: the arguments of `nsa_attention_forward` by name.
    """
    v = _Values(values)
    o_cmp, lse_cmp = part("compressed_attention")(**v.compressed, v_cmp=values["v_cmp"])
    ids = part("select_blocks")(**v.compressed, lse=lse_cmp, **v.selection)
    o_slc, lse_slc = part("selected_attention")(**v.branch("slc"), block_indices=ids, **v.block)
    o_win, lse_win = part("sliding_window_attention")(**v.branch("win"), **v.window)
    gates = values["gates"]
    o = part("gated_sum")(o_cmp=o_cmp, o_slc=o_slc, o_win=o_win, gates=gates)
    return o, ids, o_cmp, lse_cmp, o_slc, lse_slc, o_win, lse_win


def compose_backward(part: Part, values: Mapping[str, Any]) -> Eight:
    """`nsa_attention_backward` out of the single ops; arguments as for `compose_forward`."""
    *grads, dgates = part("gated_sum_backward")(
        **{name: values[name] for name in ("grad_o", "o_cmp", "o_slc", "o_win", "gates")}
    )
    compressed, chosen, near = branch_gradients(part, values, grads)
    q = values["q"]
    work = torch.promote_types(q.dtype, torch.float32)
    dq = (compressed[0].to(work) + chosen[0].to(work) + near[0].to(work)).to(q.dtype)
    return dq, *compressed[1:], *chosen[1:], *near[1:], dgates


def branch_gradients(
    part: Part,
    values: Mapping[str, Any],
    grads: Sequence[Tensor],
    extra: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> tuple[Three, Three, Three]:
    """dq, dk and dv of each branch, in the order of `BRANCHES`.

    Args:
        part, values: as for `compose_backward`.
        grads: gradients of o_cmp, o_slc, o_win.
        extra: by branch, arguments that a backend's own parts take besides the op's.
    """
    v = _Values(values)
    do_cmp, do_slc, do_win = grads
    compressed = part("compressed_attention_backward")(
        **v.compressed, v_cmp=values["v_cmp"], **v.saved("cmp", do_cmp), **extra.get("cmp", {})
    )
    chosen = part("selected_attention_backward")(
        **v.branch("slc"),
        block_indices=values["block_indices"],
        **v.saved("slc", do_slc),
        **v.block,
        **extra.get("slc", {}),
    )
    near = part("sliding_window_attention_backward")(
        **v.branch("win"), **v.saved("win", do_win), **v.window, **extra.get("win", {})
    )
    return compressed, chosen, near


class _Values:
    """The arguments of `nsa_attention`, grouped as its parts take them."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        shared = self._some("q", "scale", "cu_seqlens_q", "cu_seqlens_k")
        self._shared = shared
        kv_len = values["k_slc"].shape[1]
        self.compressed = {**shared, **self._some("k_cmp", "block", "stride"), "kv_len": kv_len}
        self.selection = self._some("select_block", "num_selected", "num_initial", "num_local")
        self.block = self._some("select_block")
        self.window = self._some("window")

    def branch(self, name: str) -> dict[str, Any]:
        """q, k, v of a branch over raw keys."""
        return {**self._shared, "k": self._values[f"k_{name}"], "v": self._values[f"v_{name}"]}

    def saved(self, name: str, grad_o: Tensor) -> dict[str, Any]:
        """What a branch's backward takes besides the forward's arguments."""
        o, lse = self._values[f"o_{name}"], self._values[f"lse_{name}"]
        return {"grad_o": grad_o, "o": o, "lse": lse, "grad_lse": None}

    def _some(self, *names: str) -> dict[str, Any]:
        return {name: self._values[name] for name in names}


PART_SPECS = {
    spec.name: spec
    for spec in (
        compressed_attention.SPEC,
        compressed_attention.BACKWARD,
        select_blocks.SPEC,
        selected.SPEC,
        selected.BACKWARD,
        sliding.SPEC,
        sliding.BACKWARD,
        gated_sum.SPEC,
        gated_sum.BACKWARD,
    )
}
PARTS = {
    "forward": (
        "compressed_attention",
        "select_blocks",
        "selected_attention",
        "sliding_window_attention",
        "gated_sum",
    ),
    "backward": (
        "gated_sum_backward",
        "compressed_attention_backward",
        "selected_attention_backward",
        "sliding_window_attention_backward",
    ),
}


def reference_of(name: str) -> Callable[..., Any]:
    """The reference of a part by name, as `compose_forward` takes it."""
    return PART_SPECS[name].reference


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
            + common.visible_pairs(bound, int(bound["n"] * bound["m"]))
            + common.visible_pairs(bound, int(bound["w"]))
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
        variant("several_tiles", "default_geometry", {"num_selected": 4}, queries=20),
        variant("prefill_tail", "custom_scale", {**SMALL, "scale": 0.3}),
        variant("m_plus_1", "l_d_m_equal", {**SMALL, "block": 16, "stride": 16}),
        variant(
            "prefill_tail", "no_initial_one_local",
            {**SMALL, "num_selected": 5, "num_initial": 0, "num_local": 1},
        ),
        bench_case(65536),
    ),
)  # fmt: skip


def selection_scores(values: Mapping[str, Any]) -> Tensor:
    """Float64 ranked scores of a call, `[B, S, Hkv, Ns]`; see `select_blocks.exact_scores`."""
    exact = cast(values, torch.float64, ())
    names = ("block", "stride", "scale", "cu_seqlens_q", "cu_seqlens_k")
    kv_len = exact["k_slc"].shape[1]
    _, lse = compressed_attention.compressed_attention(
        exact["q"], exact["k_cmp"], exact["v_cmp"], kv_len=kv_len,
        **{name: exact[name] for name in names},
    )  # fmt: skip
    return select_blocks.exact_scores({**exact, "lse": lse, "kv_len": kv_len})


COMPARE_SAVED = {
    name: TopKSet(selection_scores) if kind == "i32" else Budget() for name, _, kind in SAVED
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
    compare={"o": Budget(), **COMPARE_SAVED},
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
