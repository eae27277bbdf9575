"""Attention to the last w keys; dimensions, layout, cost: `common/range_attention`.

At w = 512, 64/4/192/128, bfloat16, 64K tokens: 219 ns per query and kv head, 2.6 times its matmuls
(84), since five tiles of keys cannot hide what a tile of queries costs once: ScalarE, with 172,
makes exponentials 75, squares for the bound of the logits 33, copies of q^T 45, results 20; VectorE
has 129.
"""

import nki

from nki_kernels.common.range_attention.backward import gradient_of_queries, gradients_of_keys
from nki_kernels.common.range_attention.forward import attend


@nki.jit
def forward(
    q, k_t, v, bounds, largest_key, trips, bases, reach, scale: float, chunk: int, resident: int,
    looped: tuple,
):  # fmt: skip
    """o [B, S, Hq, Dv] and lse [B, S, Hq, 1]; arguments as `attend`'s."""
    return attend(
        q, k_t, v, bounds, largest_key, trips, bases, reach, scale, chunk, resident, looped
    )


@nki.jit
def backward_dq(
    grad_o, q, k_t, v_t, k, stats, bounds, trips, bases, reach, scale: float, chunk: int,
    resident: int, looped: tuple,
):  # fmt: skip
    """dq [B, S, Hq, Dk]; arguments as `gradient_of_queries`."""
    return gradient_of_queries(
        grad_o, q, k_t, v_t, k, stats, bounds, trips, bases, reach, scale, chunk, resident, looped
    )


@nki.jit
def backward_dkv(grad_o, q, k_t, v_t, stats, bounds, trips, reach, scale: float, looped: tuple):
    """dk [B, T, Hkv, Dk] and dv [B, T, Hkv, Dv]; arguments as `gradients_of_keys`."""
    return gradients_of_keys(grad_o, q, k_t, v_t, stats, bounds, trips, reach, scale, looped)
