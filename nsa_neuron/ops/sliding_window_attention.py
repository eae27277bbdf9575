"""Attention to the last `window` tokens, the query's own included (rule 6)."""

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


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    window: int = 512,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention to tokens t-window+1 .. t.

    Args:
        q: `[B, S, Hq, Dk]`.
        k: `[B, T, Hkv, Dk]`, T >= S; the queries are the last S tokens.
        v: `[B, T, Hkv, Dv]`.
        window: number of tokens a query sees, its own included.
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
    factor = common.default_scale(scale, q)
    return softmax.forward(q, k, v, sequences, softmax.Window(window), factor)


def sliding_window_attention_backward(
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
    window: int = 512,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `sliding_window_attention`: dq, dk, dv.

    Args:
        grad_o: `[B, S, Hq, Dv]`.
        q, k, v, window, scale, cu_seqlens_q, cu_seqlens_k: as given to the forward op.
        o, lse: what it returned.
        grad_lse: `[B, S, Hq]` float32; None: zero.
    """
    segs = common.segments(q.shape[1], k.shape[1], cu_seqlens_q, cu_seqlens_k)
    sequences = [(s.queries, s.keys, s.offset) for s in segs]
    factor = common.default_scale(scale, q)
    return softmax.backward(
        grad_o, q, k, v, o, lse, grad_lse, sequences, softmax.Window(window), factor
    )


def _pairs(bound: Bound) -> int:
    return common.visible_pairs(bound, int(bound["w"]))


SPEC = OpSpec(
    name="sliding_window_attention",
    args=(*QKV, *common.CU_SEQLENS, common.WINDOW, common.SCALE),
    returns=common.O_LSE,
    reference=sliding_window_attention,
    derive=derive_attention,
    check_values=common.check_offsets,
    compare=COMPARE_FORWARD,
    cases=grid(
        {"window": 24},
        (
            variant("group4_s40", "window_1", {"window": 1}),
            variant("several_tiles", "window_default", {}, queries=40),
            variant("m_plus_1", "window_of_all", {"window": 65}),
            variant("prefill_tail", "custom_scale", {"window": 33, "scale": 0.3}),
            bench_case(65536),
        ),
    ),
    inputs=qkv_inputs,
    cost=pairs_cost(_pairs, 2),
    backward="sliding_window_attention_backward",
    saves=("o", "lse"),
)
BACKWARD = backward_spec(SPEC, sliding_window_attention_backward, _pairs)
