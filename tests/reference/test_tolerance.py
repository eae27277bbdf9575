"""The tolerance policy: it lets honest kernels pass and refuses mutants, in every dtype."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from flash_style import HONEST, Bugs, backward, forward
from torch import Tensor

from nsa_neuron.cases import Case, cast
from nsa_neuron.ops import get

if TYPE_CHECKING:
    from nsa_neuron.numerics import Diff
    from nsa_neuron.spec import OpSpec

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def case_of(spec: OpSpec, name: str) -> Case:
    return next(case for case in spec.cases if case.name == name)


def results(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def judge(
    op: str, case: str | Case, dtype: torch.dtype, kernel: Callable[..., Any]
) -> dict[str, Diff]:
    """The policy's verdict on each result of a kernel that takes the op's arguments by name."""
    spec = get(op)
    chosen = case_of(spec, case) if isinstance(case, str) else case
    inputs = spec.arguments(chosen, dtype)
    oracle = results(spec.reference(**cast(inputs, torch.float64, ())))
    eager, got = results(spec.reference(**inputs)), results(kernel(**inputs))
    return {
        item.name: spec.compare[item.name](mine, exact, plain, inputs)
        for item, mine, exact, plain in zip(spec.returns, got, oracle, eager, strict=True)
    }


def refused(verdicts: dict[str, Diff]) -> set[str]:
    return {name for name, diff in verdicts.items() if not diff.ok}


def causal_mask(s: int, t: int, window: int = 1 << 30) -> Tensor:
    """[S, T]: keys position - window + 1 .. position."""
    position, key = torch.arange(t - s, t)[:, None], torch.arange(t)
    return (key <= position) & (key > position - window)


def windowed(
    bugs: Bugs = HONEST,
    *,
    more: int = 0,
    rate: Callable[[float], float] = float,
    drop: int | None = None,
) -> Callable[..., Any]:
    """`sliding_window_attention` of a kernel with mistakes in mask or scale."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, *, window: int, scale: float | None, **_: Any):
        mask = causal_mask(q.shape[1], k.shape[1], window + more)
        if drop is not None:
            mask[:, drop] = False
        return forward(q, k, v, mask, rate(scale or q.shape[-1] ** -0.5), bugs)

    return kernel


def bf16(x: float) -> float:
    return float(torch.tensor(x).bfloat16())


# Mutant, and which results must be refused in all three dtypes. dims_odd_80_24 has a scale that
# bfloat16 cannot hold.
WINDOW_MUTANTS = {
    "window_plus_1": (windowed(more=1), {"o", "lse"}),
    "window_minus_1": (windowed(more=-1), {"o", "lse"}),
    "scale_in_bf16": (windowed(rate=bf16), {"lse"}),
    "scale_missing": (windowed(rate=lambda _: 1.0), {"o", "lse"}),
    "last_key_dropped": (windowed(drop=-1), {"o", "lse"}),
    "first_key_dropped": (windowed(drop=0), {"o", "lse"}),
    "lse_base_2": (windowed(Bugs(lse_base_2=True)), {"lse"}),
    "lse_without_max": (windowed(Bugs(lse_without_max=True)), {"lse"}),
    "sum_in_bf16": (windowed(Bugs(coarse_sum=True)), {"lse"}),
}


@by_dtype
@pytest.mark.parametrize("mutant", WINDOW_MUTANTS)
def test_mutants_of_window_attention(mutant: str, dtype: torch.dtype) -> None:
    kernel, wanted = WINDOW_MUTANTS[mutant]
    assert refused(judge("sliding_window_attention", "dims_odd_80_24", dtype, kernel)) >= wanted


@by_dtype
@pytest.mark.parametrize(
    "case", ["one_token", "group4_s40", "dims_odd_80_24", "sharp_logits", "several_tiles"]
)
def test_honest_kernel_of_window_attention(case: str, dtype: torch.dtype) -> None:
    verdicts = judge("sliding_window_attention", case, dtype, windowed())
    assert not refused(verdicts), verdicts


def test_softmax_without_maximum_overflows_float16() -> None:
    spec = get("sliding_window_attention")
    sharp = replace(case_of(spec, "several_tiles"), options={"sharp": 16.0})
    for kernel, wanted in ((windowed(Bugs(no_max=True)), True), (windowed(), False)):
        assert ("o" in refused(judge(spec.name, sharp, torch.float16, kernel))) == wanted


@by_dtype
def test_wrong_head_mapping_is_refused(dtype: torch.dtype) -> None:
    kernel = windowed(Bugs(heads_interleaved=True))
    assert refused(judge("sliding_window_attention", "prefill_tail", dtype, kernel)) == {"o", "lse"}


def compressed(bugs: Bugs = HONEST, early: int = 0) -> Callable[..., Any]:
    """`compressed_attention`; blocks become visible `early` tokens too early."""

    def kernel(q: Tensor, k_cmp: Tensor, v_cmp: Tensor, *, kv_len: int, block: int, stride: int, scale: float | None, **_: Any):  # fmt: skip # noqa: E501
        position = torch.arange(kv_len - q.shape[1], kv_len)[:, None] + early
        mask = torch.arange(k_cmp.shape[1]) * stride + block - 1 <= position
        return forward(q, k_cmp, v_cmp, mask, scale or q.shape[-1] ** -0.5, bugs)

    return kernel


COMPRESSED_MUTANTS = {
    "visible_too_early": (compressed(early=1), {"o", "lse"}),
    "visible_too_late": (compressed(early=-1), {"o", "lse"}),
    "lse_of_dead_rows_0": (compressed(Bugs(lse_of_dead_rows_0=True)), {"lse"}),
    "nan_on_dead_rows": (compressed(Bugs(nan_on_dead_rows=True)), {"o"}),
}


@by_dtype
@pytest.mark.parametrize("mutant", COMPRESSED_MUTANTS)
def test_mutants_of_compressed_attention(mutant: str, dtype: torch.dtype) -> None:
    kernel, wanted = COMPRESSED_MUTANTS[mutant]
    assert refused(judge("compressed_attention", "several_tiles", dtype, kernel)) >= wanted


@by_dtype
def test_honest_kernel_of_compressed_attention(dtype: torch.dtype) -> None:
    assert not refused(judge("compressed_attention", "several_tiles", dtype, compressed()))


def back(bugs: Bugs = HONEST) -> Callable[..., Any]:
    """`attention_backward`."""

    def kernel(
        grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
        grad_lse: Tensor | None, *, scale: float | None, **_: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        mask = causal_mask(q.shape[1], k.shape[1])
        scale = scale or q.shape[-1] ** -0.5
        return backward(grad_o, q, k, v, o, lse, grad_lse, mask, scale, bugs)

    return kernel


BACKWARD_MUTANTS = {
    "no_delta": (Bugs(no_delta=True), {"dq", "dk"}),
    "dq_unscaled": (Bugs(dq_unscaled=True), {"dq"}),
    "mean_over_the_group": (Bugs(group_mean=True), {"dk", "dv"}),
    "last_head_only": (Bugs(last_head_only=True), {"dk", "dv"}),
    "grad_lse_ignored": (Bugs(grad_lse_ignored=True), {"dq", "dk"}),
}


@by_dtype
@pytest.mark.parametrize("mutant", BACKWARD_MUTANTS)
def test_mutants_of_attention_backward(mutant: str, dtype: torch.dtype) -> None:
    bugs, wanted = BACKWARD_MUTANTS[mutant]
    assert refused(judge("attention_backward", "group4_s40", dtype, back(bugs))) == wanted


@by_dtype
@pytest.mark.parametrize("case", ["group4_s40", "batch2_kv2", "dims_192_128", "sharp_logits"])
def test_honest_kernel_of_attention_backward(case: str, dtype: torch.dtype) -> None:
    verdicts = judge("attention_backward", case, dtype, back())
    assert not refused(verdicts), verdicts


def selector(
    *, shift: int = 0, flat: bool = False, one_head: bool = False, late: bool = False,
    local: int | None = None, initial: int | None = None, fewer: int = 0, future: bool = False,
    unsorted: bool = False, coarse: bool = False, early: int = 0,
) -> Callable[..., Any]:  # fmt: skip
    """`select_blocks` with a dense W; switches make one mistake each."""

    def kernel(
        q: Tensor, k_cmp: Tensor, *, kv_len: int, block: int, stride: int, select_block: int,
        num_selected: int, num_initial: int, num_local: int, scale: float | None, **_: Any,
    ) -> Tensor:  # fmt: skip
        (_, s, hq, dk), hkv = q.shape, k_cmp.shape[2]
        position = torch.arange(kv_len - s, kv_len)
        starts = torch.arange(k_cmp.shape[1]) * stride
        kh = k_cmp.float().repeat_interleave(hq // hkv, 2).transpose(1, 2)
        logits = q.float().transpose(1, 2) @ kh.mT * (scale or dk**-0.5)
        visible = starts + block - 1 <= position[:, None] + early
        p = logits.masked_fill(~visible, -math.inf).softmax(-1).nan_to_num(0.0)
        p = p.unflatten(1, (hkv, -1))
        p = p[:, :, 0] if one_head else p.sum(2)
        p = p.half().float() if coarse else p
        total = -(-kv_len // select_block)
        first = torch.arange(total) * select_block + shift * select_block
        shared = torch.minimum(starts[:, None] + block, first + select_block)
        shared = (shared - torch.maximum(starts[:, None], first)).clamp(min=0) / stride
        scores = p @ ((shared > 0).float() if flat else shared)
        own, j = position[:, None] // select_block, torch.arange(total)
        near = num_local if local is None else local
        lead = num_initial if initial is None else initial
        scores = scores.masked_fill((j < lead) | (j > own - near), math.inf)
        scores = scores.masked_fill(j > own + future, -math.inf)
        best, ids = scores.sort(dim=-1, descending=True, stable=True)
        count = num_selected - fewer
        ids = ids[..., :count].masked_fill(best[..., :count] == -math.inf, total)
        ids = ids if unsorted else ids.sort(-1).values
        ids = torch.nn.functional.pad(ids, (0, num_selected - ids.shape[-1]), value=total)
        return ids.masked_fill(ids == total, -1).int().transpose(1, 2).contiguous()

    return kernel


SELECTION_MUTANTS = {
    "weights_shifted_by_one": selector(shift=1),
    "weights_all_one": selector(flat=True),
    "one_head_instead_of_the_group": selector(one_head=True),
    "no_local_blocks": selector(local=0),
    "one_local_block": selector(local=1),
    "no_initial_block": selector(initial=0),
    "one_block_too_few": selector(fewer=1),
    "a_future_block": selector(future=True),
    "unsorted": selector(unsorted=True),
    "visible_too_early": selector(early=4),
    "probabilities_in_float16": selector(coarse=True),
}


@by_dtype
@pytest.mark.parametrize("mutant", SELECTION_MUTANTS)
def test_mutants_of_select_blocks(mutant: str, dtype: torch.dtype) -> None:
    verdicts = judge("select_blocks", "several_tiles", dtype, SELECTION_MUTANTS[mutant])
    assert refused(verdicts) == {"block_indices"}, verdicts


@by_dtype
@pytest.mark.parametrize("case", ["several_tiles", "one_token", "prefill_tail", "sharp_logits"])
def test_honest_kernel_of_select_blocks(case: str, dtype: torch.dtype) -> None:
    verdicts = judge("select_blocks", case, dtype, selector())
    assert not refused(verdicts), verdicts


def mean_kernel(divisor: int, span: int) -> Callable[..., Any]:
    def kernel(x: Tensor, *, block: int, stride: int, **_: Any) -> Tensor:
        blocks = x.float().unfold(1, block, stride)[..., : block - span]
        return (blocks.sum(-1) / (divisor or block - span)).to(x.dtype)

    return kernel


def linear_kernel(channel_major: bool, pe_ignored: bool = False) -> Callable[..., Any]:
    def kernel(
        x: Tensor, w1: Tensor, b1: Tensor, *, pe: Tensor, block: int, stride: int, **_: Any
    ) -> Tensor:
        blocks = x.float().unfold(1, block, stride)  # [B, N, H, D, l]
        if not pe_ignored:
            blocks = blocks + pe.float().mT
        flat = (blocks if channel_major else blocks.mT).flatten(-2)
        return (flat @ w1.float() + b1.float()).to(x.dtype)

    return kernel


@by_dtype
def test_kernels_of_compress(dtype: torch.dtype) -> None:
    def caught(case: str, kernel: Callable[..., Any]) -> bool:
        return bool(refused(judge("compress", case, dtype, kernel)))

    assert not caught("mean", mean_kernel(0, 0))
    assert caught("mean", mean_kernel(4, 0)), "divided by the stride"
    assert caught("mean", mean_kernel(0, 1)), "last token of the block dropped"
    assert not caught("one_and_a_bit", linear_kernel(False))
    assert caught("one_and_a_bit", linear_kernel(True)), "w1 rows channel first"
    assert caught("one_and_a_bit", linear_kernel(False, pe_ignored=True))


@by_dtype
def test_kernels_of_gated_sum(dtype: torch.dtype) -> None:
    def summing(order: tuple[int, int, int], squash: bool = False) -> Callable[..., Any]:
        def kernel(gates: Tensor, **branches: Tensor) -> Tensor:
            g = gates.float()[..., list(order)]
            g = g.sigmoid() if squash else g
            total = sum(g[..., i, None] * x.float() for i, x in enumerate(branches.values()))
            return total.to(gates.dtype)  # type: ignore[union-attr]

        return kernel

    def caught(kernel: Callable[..., Any]) -> bool:
        return bool(refused(judge("gated_sum", "group4_s40", dtype, kernel)))

    assert not caught(summing((0, 1, 2)))
    assert caught(summing((1, 0, 2))) and caught(summing((0, 2, 1)))
    assert caught(summing((0, 1, 2), squash=True)), "gates squashed twice"
