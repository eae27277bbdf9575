"""Full causal attention: the baseline, and the last layers of a hybrid model."""

from __future__ import annotations

from torch import Tensor

from nsa_neuron.ops import common, softmax
from nsa_neuron.ops.attention_family import (
    COMPARE_FORWARD,
    QKV,
    backward_spec,
    derive_attention,
    pairs_cost,
    qkv_inputs,
)
from nsa_neuron.ops.grid import bench_case, grid, variant
from nsa_neuron.spec import Bound, OpSpec


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Full causal attention; the queries are the last S of the T tokens.

    Args:
        q: `[B, S, Hq, Dk]`.
        k: `[B, T, Hkv, Dk]`, T >= S; Hkv divides Hq.
        v: `[B, T, Hkv, Dv]`.
        scale: of the logits; default `Dk ** -0.5`.
        cu_seqlens_q: offsets of packed sequences' queries, `[N + 1]` int32; needs B == 1.
        cu_seqlens_k: the same for keys.

    Returns:
        o `[B, S, Hq, Dv]` in q's dtype; lse `[B, S, Hq]` float32, natural logarithm.

    Raises:
        InvalidArgument: an argument breaks the contract.
    """
    segs = common.segments(q.shape[1], k.shape[1], cu_seqlens_q, cu_seqlens_k)
    sequences = [(s.queries, s.keys, s.offset) for s in segs]
    return softmax.forward(q, k, v, sequences, softmax.Causal(), common.default_scale(scale, q))


def attention_backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention`: dq, dk, dv.

    Args:
        grad_o: `[B, S, Hq, Dv]`.
        q, k, v, scale, cu_seqlens_q, cu_seqlens_k: as given to `attention`.
        o, lse: what it returned.
        grad_lse: `[B, S, Hq]` float32; None: zero.
    """
    segs = common.segments(q.shape[1], k.shape[1], cu_seqlens_q, cu_seqlens_k)
    sequences = [(s.queries, s.keys, s.offset) for s in segs]
    factor = common.default_scale(scale, q)
    return softmax.backward(grad_o, q, k, v, o, lse, grad_lse, sequences, softmax.Causal(), factor)


def _pairs(bound: Bound) -> int:
    return common.visible_pairs(bound, int(bound["T"]))


SPEC = OpSpec(
    name="attention",
    args=(*QKV, *common.CU_SEQLENS, common.SCALE),
    returns=common.O_LSE,
    reference=attention,
    derive=derive_attention,
    check_values=common.check_offsets,
    compare=COMPARE_FORWARD,
    cases=grid(extra=(variant("group4_s40", "custom_scale", {"scale": 0.3}), bench_case(65536))),
    inputs=qkv_inputs,
    cost=pairs_cost(_pairs, 2),
    backward="attention_backward",
    saves=("o", "lse"),
)
BACKWARD = backward_spec(SPEC, attention_backward, _pairs)
