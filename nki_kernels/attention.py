"""Full causal attention; dimensions, layout and cost: `common/range_attention`."""

import nki

from nki_kernels.common.range_attention.forward import attend


@nki.jit
def forward(q, k_t, v, bounds, reach, scale: float, chunk: int, resident: int):
    """o [B, S, Hq, Dv] and lse [B, S, Hq, 1]; arguments as `attend`'s."""
    return attend(q, k_t, v, bounds, reach, scale, chunk, resident)
