"""Gradients of range attention, unrolled or in hardware loops, as the launcher says."""

from nki_kernels.common.range_attention import (
    backward_dkv,
    backward_dq,
    looped_dkv,
    looped_dq,
)


def gradient_of_queries(
    grad_o, q, k_t, v_t, k, stats, bounds, trips, bases, reach, scale, chunk, resident, looped
):  # fmt: skip
    """dq; trips, bases and looped are None, None and () for an unrolled program."""
    if len(looped) > 0:
        return looped_dq.gradient_of_queries(
            grad_o, q, k_t, v_t, k, stats, bounds, trips, bases, scale, looped
        )
    return backward_dq.gradient_of_queries(
        grad_o, q, k_t, v_t, k, stats, bounds, reach, scale, chunk, resident
    )


def gradients_of_keys(grad_o, q, k_t, v_t, stats, bounds, trips, reach, scale, looped):
    """dk and dv; trips and looped are None and () for an unrolled program."""
    if len(looped) > 0:
        return looped_dkv.gradients_of_keys(
            grad_o, q, k_t, v_t, stats, bounds, trips, scale, looped
        )
    return backward_dkv.gradients_of_keys(grad_o, q, k_t, v_t, stats, bounds, reach, scale)
