"""Compression of key and value blocks (rule 1)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_neuron.cases import Case, exact_normal, packed_tensors
from nsa_neuron.numerics import Budget
from nsa_neuron.ops import common
from nsa_neuron.ops.softmax import work_dtype
from nsa_neuron.spec import Bound, Cost, OpSpec, Return, ScalarArg, TensorArg, differ

METHODS = ("mean", "linear", "mlp")


def compress(
    x: Tensor,
    w1: Tensor | None = None,
    b1: Tensor | None = None,
    w2: Tensor | None = None,
    b2: Tensor | None = None,
    pe: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    method: str = "mean",
    block: int = 32,
    stride: int = 16,
) -> Tensor:
    """Compresses blocks of `block` tokens, one every `stride` tokens, to one token each.

    `mean`: mean(x + pe). `linear`: flatten(x + pe) @ w1 (+ b1). `mlp`:
    gelu(flatten(x + pe) @ w1 + b1) @ w2 + b2, exact (erf) gelu. Row `r * D + c` of w1 belongs to
    token r, channel c of a block. Weights are shared by the kv heads, or have a leading Hkv axis.

    Args:
        x: `[B, T, Hkv, D]`, raw keys or values.
        w1: `[block * D, F]`; F = D for `linear`; None for `mean`.
        b1: `[F]`; optional for `linear`.
        w2: `[F, D]`, `mlp` only.
        b2: `[D]`, `mlp` only.
        pe: `[block, D]`, position encoding within a block; None: none.
        method: `mean`, `linear` or `mlp`.
        block: l.
        stride: d, divides `block`.
        cu_seqlens_k: offsets of packed sequences, `[N + 1]` int32; needs B == 1.

    Returns:
        `[B, Nc, Hkv, D]` with Nc = max(0, (T - block) // stride + 1). Packed: each sequence's own
        blocks back to back; as they are at most Nc, the rows behind them are zero (so the shape
        does not depend on data).

    Raises:
        InvalidArgument: an argument breaks the contract.
    """
    b, t, hkv, dim = x.shape
    y = x.new_zeros(b, max(0, (t - block) // stride + 1), hkv, dim)
    for tokens, rows in _sequences(t, block, stride, cu_seqlens_k):
        if rows.start < rows.stop:
            flat = _flatten(x[:, tokens], pe, block, stride)
            y[:, rows] = _phi(flat, w1, b1, w2, b2, method, x.dtype, dim).to(x.dtype)
    return y


def _sequences(
    total: int, block: int, stride: int, cu_seqlens_k: Tensor | None
) -> Iterator[tuple[slice, slice]]:
    segs = list(common.segments(total, total, cu_seqlens_k, cu_seqlens_k))
    rows = common.compressed_slices(segs, block, stride)
    yield from zip((seg.keys for seg in segs), rows, strict=True)


def _flatten(x: Tensor, pe: Tensor | None, block: int, stride: int) -> Tensor:
    """`[B, T, H, D]` -> `[B, Nc, H, l*D]` of x + pe, rounded to x's dtype, in the work dtype."""
    blocks = x.unfold(1, block, stride).movedim(-1, -2)
    if pe is not None:
        blocks = (blocks.to(work_dtype(x)) + pe.to(work_dtype(x))).to(x.dtype)
    return blocks.to(work_dtype(x)).flatten(-2)


def _project(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """`[B, N, H, E]` @ `[E, F]` or `[H, E, F]`, plus bias, in the work dtype of x."""
    w = w.to(x.dtype)
    y = x @ w if w.dim() == 2 else torch.einsum("bnhe,hef->bnhf", x, w)
    return y if b is None else y + b.to(x.dtype)


def _phi(
    flat: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    method: str,
    dtype: torch.dtype,
    dim: int,
) -> Tensor:
    if method == "mean":
        return flat.view(*flat.shape[:-1], -1, dim).mean(-2)
    assert w1 is not None
    hidden = _project(flat, w1, b1)
    if method == "linear":
        return hidden
    assert w2 is not None
    return _project(F.gelu(hidden).to(dtype).to(flat.dtype), w2, b2)


def compress_backward(
    grad_y: Tensor,
    x: Tensor,
    w1: Tensor | None = None,
    b1: Tensor | None = None,
    w2: Tensor | None = None,
    b2: Tensor | None = None,
    pe: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    method: str = "mean",
    block: int = 32,
    stride: int = 16,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `compress`: dx, dw1, db1, dw2, db2, dpe.

    Args:
        grad_y: `[B, Nc, Hkv, D]`; rows behind a packed call's blocks are ignored.
        x, w1, b1, w2, b2, pe, method, block, stride, cu_seqlens_k: as given to `compress`.

    Returns:
        One gradient per input; that of an absent input is empty (`[0]`).
    """
    work, (_, t, _, dim) = work_dtype(x), x.shape
    dx = torch.zeros(x.shape, dtype=work, device=x.device)
    weights = (w1, b1, w2, b2)
    grads = [
        None if w is None else torch.zeros(w.shape, dtype=work, device=x.device) for w in weights
    ]
    dpe = None if pe is None else torch.zeros(pe.shape, dtype=work, device=x.device)
    for tokens, rows in _sequences(t, block, stride, cu_seqlens_k):
        count = rows.stop - rows.start
        if count == 0:
            continue
        dy = grad_y[:, rows].to(work)
        if method == "mean":
            dblocks = (dy / block)[..., None, :].expand(-1, -1, -1, block, -1)
        else:
            flat = _flatten(x[:, tokens], pe, block, stride)
            dblocks = _phi_backward(dy, flat, weights, grads, method, x.dtype)
            dblocks = dblocks.unflatten(-1, (block, dim))
        if dpe is not None:
            dpe += dblocks.sum((0, 1, 2) if dpe.dim() == 2 else (0, 1))
        part = dx[:, tokens]
        for r in range(block):
            part[:, r : r + (count - 1) * stride + 1 : stride] += dblocks[..., r, :]
    results = (dx, *grads, dpe)
    first, *rest = (x.new_empty(0) if g is None else g.to(x.dtype) for g in results)
    return first, rest[0], rest[1], rest[2], rest[3], rest[4]


def _phi_backward(
    dy: Tensor,
    flat: Tensor,
    weights: tuple[Tensor | None, ...],
    grads: list[Tensor | None],
    method: str,
    dtype: torch.dtype,
) -> Tensor:
    """Adds the weights' gradients to `grads`; returns that of flat, `[B, N, H, l*D]`."""
    w1, b1, w2, _ = weights
    assert w1 is not None
    if method == "mlp":
        assert w2 is not None
        hidden = _project(flat, w1, b1)
        act = F.gelu(hidden).to(dtype).to(flat.dtype)
        _accumulate(grads, 2, act, dy)
        dact = _project(dy, w2.transpose(-1, -2), None)
        dy = (dact * gelu_slope(hidden)).to(dtype).to(flat.dtype)
    _accumulate(grads, 0, flat, dy)
    return _project(dy, w1.transpose(-1, -2), None)


def _accumulate(grads: list[Tensor | None], at: int, x: Tensor, dy: Tensor) -> None:
    """Adds the gradients of weight `at` and of the bias behind it."""
    dw, db = grads[at], grads[at + 1]
    if dw is not None:
        per_head = torch.einsum("bnhe,bnhf->hef", x, dy)
        dw += per_head if dw.dim() == 3 else per_head.sum(0)
    if db is not None:
        db += dy.sum((0, 1) if db.dim() == 2 else (0, 1, 2))


def gelu_slope(x: Tensor) -> Tensor:
    """Derivative of the exact gelu: Phi(x) + x * phi(x)."""
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density


def derive(bound: Bound) -> None:
    """Weights must fit the method; Nc follows."""
    spec, sizes = bound.spec, bound.sizes
    common.check_geometry(bound)
    common.check_packed(bound, ("cu_seqlens_k",))
    sizes["Nc_out"] = common.compressed_blocks(sizes["T"], sizes["l"], sizes["d"])
    if "Nc" in sizes and differ(sizes["Nc"], sizes["Nc_out"]):
        raise spec.refuse("grad_y", f"of {sizes['Nc']} blocks", f"of {sizes['Nc_out']} blocks")
    method = bound.scalars["method"]
    needed = {"mean": (), "linear": ("w1",), "mlp": ("w1", "b1", "w2", "b2")}[method]
    allowed = (*needed, "b1") if method == "linear" else needed
    for name in ("w1", "b1", "w2", "b2"):
        if name in needed and name not in bound.shapes:
            raise spec.refuse(name, "None", f"given when method is '{method}'")
        if name not in allowed and name in bound.shapes:
            raise spec.refuse(name, "given", f"None when method is '{method}'")
    if "w1" in bound.shapes:
        flat = sizes["l"] * sizes["D"]
        if sizes["lD"] != flat:
            raise spec.refuse("w1", f"of {sizes['lD']} rows", f"of block * D = {flat} rows")
        if method == "linear" and sizes["F"] != sizes["D"]:
            raise spec.refuse("w1", f"of {sizes['F']} columns", f"of D = {sizes['D']} columns")


def inputs(case: Case, gen: torch.Generator) -> dict[str, Any]:
    """x and the weights that the method needs; options `pe`, `per_head`, `bias`."""
    hkv, dim = case.size("Hkv"), case.size("Dk")
    block, method = case.scalars.get("block", 32), case.scalars.get("method", "mean")
    hidden = dim if method == "linear" else int(case.options.get("hidden", 24))
    lead = (hkv,) if case.options.get("per_head") else ()
    values: dict[str, Any] = dict.fromkeys(("w1", "b1", "w2", "b2", "pe"))
    values["x"] = exact_normal(gen, case.size("B"), case.size("T"), hkv, dim)
    if method != "mean":
        values["w1"] = exact_normal(gen, *lead, block * dim, hidden, scale=(block * dim) ** -0.5)
    if method == "mlp":
        values["w2"] = exact_normal(gen, *lead, hidden, dim, scale=hidden**-0.5)
        values["b2"] = exact_normal(gen, *lead, dim)
    if method == "mlp" or (method == "linear" and case.options.get("bias")):
        values["b1"] = exact_normal(gen, *lead, hidden)
    if case.options.get("pe"):
        values["pe"] = exact_normal(gen, *lead, block, dim)
    return {**values, "cu_seqlens_k": packed_tensors(case)["cu_seqlens_k"]}


def backward_inputs(case: Case, gen: torch.Generator) -> dict[str, Any]:
    """The same with a gradient."""
    values = inputs(case, gen)
    b, t, hkv, dim = values["x"].shape
    block, stride = case.scalars.get("block", 32), case.scalars.get("stride", 16)
    rows = max(0, (t - block) // stride + 1)
    return {"grad_y": exact_normal(gen, b, rows, hkv, dim), **values}


def _cost(passes: int) -> Any:
    def cost(bound: Bound) -> Cost:
        rows = int(bound["B"] * bound["Nc_out"] * bound["Hkv"])
        flat = int(bound["l"] * bound["D"])
        per_row = flat
        if "w1" in bound.shapes:
            per_row = 2 * flat * int(bound["F"])
        if "w2" in bound.shapes:
            per_row += 2 * int(bound["F"] * bound["D"])
        return Cost(passes * rows * per_row, common.tensor_bytes(bound))

    return cost


def _case(name: str, tags: str, t: int, method: str = "mean", **more: Any) -> Case:
    sizes = {
        "B": more.pop("b", 1),
        "S": t,
        "T": t,
        "Hkv": more.pop("hkv", 1),
        "Dk": more.pop("dim", 16),
    }
    lengths = more.pop("lengths", None)
    scalars = {"method": method, "block": more.pop("block", 8), "stride": more.pop("stride", 4)}
    return Case(name, tuple(tags.split()), sizes, scalars, lengths, more)


PACKED = ((3, 3), (8, 8), (30, 30))
CASES = (
    _case("mean", "smoke", 40),
    _case("linear", "smoke", 40, "linear"),
    _case("mlp", "smoke", 40, "mlp", pe=True),
    _case("too_short", "edge", 7),
    _case("exactly_one", "edge", 8, pe=True),
    _case("one_and_a_bit", "edge", 11, "linear", pe=True, bias=True),
    _case("mean_kv2_pe_per_head", "edge", 37, hkv=2, b=2, pe=True, per_head=True),
    _case("linear_per_head", "edge", 37, "linear", hkv=2, b=2, per_head=True, bias=True, pe=True),
    _case("mlp_kv2", "edge", 37, "mlp", hkv=2, b=2),
    _case("mlp_per_head", "edge", 37, "mlp", hkv=2, per_head=True, pe=True),
    _case("stride_is_block", "edge", 33, "linear", block=8, stride=8),
    _case("three_strides", "edge", 50, "mlp", block=12, stride=4, dim=24),
    _case("packed_mean", "edge", 0, lengths=PACKED, pe=True),
    _case("packed_linear", "edge", 0, "linear", lengths=PACKED, hkv=2),
    _case("packed_mlp", "edge", 0, "mlp", lengths=PACKED, pe=True),
    _case("paper_mean", "conform", 200, block=32, stride=16, dim=192),
    _case("paper_mlp", "conform", 130, "mlp", block=32, stride=16, dim=64, pe=True, hidden=64),
    _case("bench_65536", "bench", 65536, "mlp", block=32, stride=16, dim=192, hkv=4, hidden=192),
)

ARGS = (
    TensorArg("x", "B T Hkv D", differentiable=True),
    TensorArg("w1", "lD F|Hkv lD F", optional=True, differentiable=True),
    TensorArg("b1", "F|Hkv F", optional=True, differentiable=True),
    TensorArg("w2", "F D|Hkv F D", optional=True, differentiable=True),
    TensorArg("b2", "D|Hkv D", optional=True, differentiable=True),
    TensorArg("pe", "l D|Hkv l D", optional=True, differentiable=True),
    common.CU_SEQLENS[1],
    ScalarArg("method", "str", choices=METHODS),
    common.BLOCK,
    common.STRIDE,
)
GRADS = tuple(Return(f"d{name}", like=name) for name in ("x", "w1", "b1", "w2", "b2", "pe"))


def check_values(bound: Bound, values: Mapping[str, Any]) -> None:
    common.check_offsets(bound, values)


SPEC = OpSpec(
    name="compress",
    args=ARGS,
    returns=(Return("y", "B Nc_out Hkv D"),),
    reference=compress,
    derive=derive,
    check_values=check_values,
    compare={"y": Budget()},
    cases=CASES,
    inputs=inputs,
    cost=_cost(1),
    backward="compress_backward",
)
BACKWARD = OpSpec(
    name="compress_backward",
    args=(TensorArg("grad_y", "B Nc Hkv D"), *common.constants(ARGS)),
    returns=GRADS,
    reference=compress_backward,
    derive=derive,
    check_values=check_values,
    compare={item.name: Budget() for item in GRADS},
    cases=CASES,
    inputs=backward_inputs,
    cost=_cost(3),
)
