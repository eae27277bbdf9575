"""Attention to compressed blocks (rule 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa_neuron.cases import Case, exact_normal, packed_tensors
from nsa_neuron.ops import common, softmax
from nsa_neuron.ops.attention_family import COMPARE_FORWARD, backward_spec, pairs_cost
from nsa_neuron.ops.grid import bench_case, grid, variant
from nsa_neuron.spec import Bound, OpSpec, TensorArg


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    kv_len: int,
    block: int = 32,
    stride: int = 16,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention to the compressed blocks that are complete at the query: i*d + l - 1 <= t.

    Args:
        q: `[B, S, Hq, Dk]`.
        k_cmp: `[B, Nc, Hkv, Dk]`, from `compress`. Packed: the sequences' blocks back to back;
            rows behind them are ignored.
        v_cmp: `[B, Nc, Hkv, Dv]`.
        kv_len: T; the queries are the last S of the T tokens (packed: total).
        block: l, tokens of a block.
        stride: d, tokens between block starts; divides `block`.
        scale: of the logits; default `Dk ** -0.5`.
        cu_seqlens_q: offsets of packed sequences' queries, `[N + 1]` int32; needs B == 1.
        cu_seqlens_k: the same for raw (uncompressed) keys.

    Returns:
        o `[B, S, Hq, Dv]`, zero on rows that see no block; lse `[B, S, Hq]` float32, -inf there.

    Raises:
        InvalidArgument: an argument breaks the contract.
    """
    sequences = _sequences(q, kv_len, block, stride, cu_seqlens_q, cu_seqlens_k)
    seen = softmax.Complete(block, stride)
    return softmax.forward(q, k_cmp, v_cmp, sequences, seen, common.default_scale(scale, q))


def compressed_attention_backward(
    grad_o: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    o: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    kv_len: int,
    block: int = 32,
    stride: int = 16,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `compressed_attention`: dq, dk_cmp, dv_cmp.

    Args:
        grad_o: `[B, S, Hq, Dv]`.
        q, k_cmp, v_cmp, kv_len, block, stride, scale, cu_seqlens_q, cu_seqlens_k: as given to the
            forward op.
        o, lse: what it returned.
        grad_lse: `[B, S, Hq]` float32; None: zero.
    """
    sequences = _sequences(q, kv_len, block, stride, cu_seqlens_q, cu_seqlens_k)
    seen = softmax.Complete(block, stride)
    factor = common.default_scale(scale, q)
    return softmax.backward(grad_o, q, k_cmp, v_cmp, o, lse, grad_lse, sequences, seen, factor)


def _sequences(
    q: Tensor,
    kv_len: int,
    block: int,
    stride: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> list[tuple[slice, slice, int]]:
    segs = list(common.segments(q.shape[1], kv_len, cu_seqlens_q, cu_seqlens_k))
    keys = common.compressed_slices(segs, block, stride)
    return [(seg.queries, blocks, seg.offset) for seg, blocks in zip(segs, keys, strict=True)]


def derive(bound: Bound) -> None:
    common.check_heads(bound)
    common.check_tokens(bound)
    common.check_compressed(bound)


def inputs(case: Case, gen: torch.Generator) -> dict[str, Any]:
    """q and compressed tensors of a case."""
    offsets = packed_tensors(case)
    nc = case_blocks(case)
    hkv, b = case.size("Hkv"), case.size("B")
    sharp = float(case.options.get("sharp", 1.0))
    return {
        "q": exact_normal(gen, b, case.size("S"), case.size("Hq"), case.size("Dk"), scale=sharp),
        "k_cmp": exact_normal(gen, b, nc, hkv, case.size("Dk")),
        "v_cmp": exact_normal(gen, b, nc, hkv, case.size("Dv")),
        "kv_len": case.size("T"),
        **offsets,
    }


def case_blocks(case: Case) -> int:
    """Nc of a case; packed: the static bound, as `compress` returns it."""
    block, stride = case.scalars.get("block", 32), case.scalars.get("stride", 16)
    return int(max(0, (case.size("T") - block) // stride + 1))


def _pairs(bound: Bound) -> int:
    s, t, l, d = (int(bound[symbol]) for symbol in ("S", "T", "l", "d"))

    def of_the_first(queries: int) -> int:
        seeing = max(0, queries - l + 1)  # one block each, and one more every d queries
        steps, rest = divmod(seeing, d)
        return d * steps * (steps + 1) // 2 + rest * (steps + 1)

    return (of_the_first(t) - of_the_first(t - s)) * int(bound["B"])


SPEC = OpSpec(
    name="compressed_attention",
    args=(
        TensorArg("q", "B S Hq Dk", differentiable=True),
        TensorArg("k_cmp", "B Nc Hkv Dk", differentiable=True),
        TensorArg("v_cmp", "B Nc Hkv Dv", differentiable=True),
        *common.CU_SEQLENS,
        common.KV_LEN,
        common.BLOCK,
        common.STRIDE,
        common.SCALE,
    ),
    returns=common.O_LSE,
    reference=compressed_attention,
    derive=derive,
    check_values=common.check_cmp_rows,
    compare=COMPARE_FORWARD,
    cases=grid(
        extra=(
            variant("several_tiles", "l8_d4", {"block": 8, "stride": 4}, queries=40),
            variant("m_plus_1", "stride_is_block", {"block": 16, "stride": 16}),
            variant("packed_tails", "packed_l12_d4", {"block": 12, "stride": 4}),
            variant("prefill_tail", "custom_scale", {"scale": 0.3}),
            bench_case(65536),
        )
    ),
    inputs=inputs,
    cost=pairs_cost(_pairs, 2),
    backward="compressed_attention_backward",
    saves=("o", "lse"),
)
BACKWARD = backward_spec(SPEC, compressed_attention_backward, _pairs)
