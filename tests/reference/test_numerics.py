"""The comparators at their limits: what is just inside passes, what is just outside does not."""

from __future__ import annotations

import math

import pytest
import torch

from nsa_neuron.numerics import Budget, Exact, TopKSet
from nsa_neuron.ops import OPS

UNITS = {
    torch.float64: 16 * 2.0**-52,
    torch.float32: 16 * 2.0**-23,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}
"""The rounding band at magnitude 1: one unit in the last place of 16-bit results, 16 of wider."""
by_dtype = pytest.mark.parametrize("dtype", UNITS, ids=lambda d: str(d)[6:])
by_side = pytest.mark.parametrize(("side", "ok"), [(0.99, True), (1.01, False)], ids=["in", "out"])


def verdict(
    dtype: torch.dtype, errors: list[float], eager: list[float], magnitude: float = 1.0
) -> tuple[bool, str]:
    """The default budget's word on results of `dtype` with these errors, where eager has its own.

    The result is 0 everywhere but in a last element, `magnitude`, which nobody gets wrong.
    """
    got = torch.tensor([0.0] * len(errors) + [magnitude], dtype=dtype)
    oracle = torch.tensor([*errors, float(got[-1])], dtype=torch.float64)
    diff = Budget()(got, oracle, oracle + torch.tensor([*eager, 0.0]).double(), {})
    return diff.ok, diff.detail


@by_side
@by_dtype
def test_the_largest_error_may_be_twice_eagers_and_a_band(dtype, side, ok) -> None:
    """The band is the only slack: a factor of 2.1 would already take what is outside."""
    own = 4 * UNITS[dtype]
    allowed = 2 * own + UNITS[dtype] * side
    passes, detail = verdict(dtype, [allowed, *[0.0] * 15], [own] * 16)
    assert passes is ok and ("largest error" in detail) is not ok


@by_side
@by_dtype
@pytest.mark.parametrize(("magnitude", "scale"), [(8.0, 8.0), (2.0**-7, 0.05)])
def test_the_band_grows_with_the_largest_result_and_has_a_floor(
    dtype, magnitude, scale, side, ok
) -> None:
    error = UNITS[dtype] * scale * side
    passes, detail = verdict(dtype, [error, *[0.0] * 15], [0.0] * 16, magnitude)
    assert passes is ok and ("largest error" in detail) is not ok


@by_side
@by_dtype
def test_the_rms_error_may_be_twice_eagers_and_half_a_band(dtype, side, ok) -> None:
    """Eager is far off in one place, so that the largest error never decides."""
    own = 4 * UNITS[dtype]
    rms = 2 * own / 8 + UNITS[dtype] / 2  # eager: one of 64 elements
    passes, detail = verdict(dtype, [rms * side * math.sqrt(64 / 63)] * 63, [own, *[0.0] * 62])
    assert passes is ok and ("rms error" in detail) is not ok


def test_a_magnitude_of_one_result_is_no_band_for_another_dtype() -> None:
    """float32 results are held to float32's band, however coarse eager was computed."""
    error = UNITS[torch.float32] * 1.5
    assert not verdict(torch.float32, [error, *[0.0] * 15], [0.0] * 16)[0]
    assert verdict(torch.float16, [error, *[0.0] * 15], [0.0] * 16)[0]


def test_every_op_is_held_to_the_same_policy() -> None:
    """No op has a budget of its own: floats by the default, selections by lost mass."""
    for spec in OPS:
        assert set(spec.compare) == {item.name for item in spec.returns}, spec.name
        for item in spec.returns:
            compare = spec.compare[item.name]
            if item.dtype == "i32":
                assert isinstance(compare, TopKSet) and compare.tolerance == 1e-5, item
            else:
                assert compare == Budget(factor=2.0, floor=0.05), item


def test_budget_refuses_shapes_nan_and_infinities() -> None:
    exact = torch.tensor([1.0, -math.inf, 0.0]).double()
    plain, judge_one = exact.float(), Budget()
    assert judge_one(plain, exact, plain, {}).ok
    assert "shape" in judge_one(plain[:2], exact, plain, {}).detail
    assert "NaN" in judge_one(torch.tensor([1.0, math.nan, 0.0]), exact, plain, {}).detail
    for wrong in ([1.0, 0.0, 0.0], [math.inf, -math.inf, 0.0], [1.0, math.inf, 0.0]):
        assert not judge_one(torch.tensor(wrong), exact, plain, {}).ok


def test_budget_holds_the_root_mean_square_as_well() -> None:
    """Wrong everywhere by less than the worst element is refused."""
    exact = torch.zeros(1000, dtype=torch.float64)
    eager = torch.zeros(1000)
    eager[0] = 1e-3
    everywhere = torch.full((1000,), 0.9e-3)
    assert not Budget()(everywhere, exact, eager, {}).ok
    once = torch.zeros(1000)
    once[5] = 0.9e-3
    assert Budget()(once, exact, eager, {}).ok


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_budget_where_eager_overflows(broken: float) -> None:
    """An eager that is infinite or NaN grants the kernel nothing."""
    exact, eager = torch.tensor([1.0, 2.0]).double(), torch.tensor([1.0, broken])
    assert not Budget()(torch.tensor([1.0, 1e30]), exact, eager, {}).ok
    assert not Budget()(torch.tensor([1.0, 1e30]), exact, eager * math.nan, {}).ok
    assert Budget()(torch.tensor([1.0, 2.0]), exact, eager, {}).ok


def test_exact() -> None:
    one = torch.tensor([1, 2])
    assert Exact()(one, one, one, {}).ok
    wrong = Exact()(torch.tensor([1, 3]), one, one, {})
    assert not wrong.ok and wrong.error == 1 and "1 elements differ" in wrong.detail
    assert not Exact()(one[:1], one, one, {}).ok


def test_topk_set_accepts_near_ties_and_nothing_else() -> None:
    scores = torch.tensor([math.inf, 0.5, 0.5 - 1e-9, 0.2, -math.inf]).double().view(1, 1, 1, 5)
    compare = TopKSet(lambda inputs: scores)
    ids = {
        "best": [0, 1, -1], "near": [0, 2, -1], "worse": [0, 3, -1], "unforced": [1, 2, -1],
        "hidden": [0, 4, -1], "twice": [0, 0, -1], "gap": [0, -1, 1], "more": [0, 1, 2],
        "fewer": [0, -1, -1], "far": [0, 9, -1],
    }  # fmt: skip
    made = {name: torch.tensor(row).int().view(1, 1, 1, 3) for name, row in ids.items()}
    accepted = {n for n, x in made.items() if compare(x, made["best"], made["best"], {}).ok}
    assert accepted == {"best", "near"}
    assert not compare(made["best"].long(), made["best"], made["best"], {}).ok


@by_side
def test_topk_set_may_lose_a_hundred_thousandth_of_the_mass(side, ok) -> None:
    lost = 1e-5 * side
    free = [0.5, 0.3, 0.3 - 0.8 * lost, 1e-9]
    scores = torch.tensor([math.inf, *free], dtype=torch.float64).view(1, 1, 1, 5)
    best, mine = (torch.tensor([[[[0, 1, last]]]], dtype=torch.int32) for last in (2, 3))
    diff = TopKSet(lambda inputs: scores)(mine, best, best, {})
    assert diff.ok is ok and diff.error == pytest.approx(lost, rel=1e-6)


def test_topk_set_refuses_a_hidden_block_even_where_no_mass_is_lost() -> None:
    scores = torch.tensor([math.inf, 0.5, 0.0, -math.inf]).double().view(1, 1, 1, 4)
    ids = {last: torch.tensor([[[[0, 1, last]]]], dtype=torch.int32) for last in (2, 3)}
    assert TopKSet(lambda inputs: scores)(ids[2], ids[2], ids[2], {}).ok
    assert not TopKSet(lambda inputs: scores)(ids[3], ids[2], ids[2], {}).ok


@pytest.mark.parametrize(("last", "ok"), [(4, True), (5, False)])
def test_topk_set_knows_the_last_block(last, ok) -> None:
    scores = torch.full((1, 1, 1, 5), 0.5).double()
    best, mine = (torch.tensor([[[[0, i]]]], dtype=torch.int32) for i in (1, last))
    diff = TopKSet(lambda inputs: scores)(mine, best, best, {})
    assert diff.ok is ok and ("block id 5 too large" in diff.detail) is not ok


def test_topk_set_judges_every_query_by_itself() -> None:
    """One query's surplus does not pay for another's loss."""
    scores = torch.tensor([[0.5, 0.4, 0.1], [0.5, 0.4, 0.1]]).double().view(1, 2, 1, 3)
    best = torch.tensor([[0, 1], [0, 1]], dtype=torch.int32).view(1, 2, 1, 2)
    mine = torch.tensor([[0, 1], [0, 2]], dtype=torch.int32).view(1, 2, 1, 2)
    assert TopKSet(lambda inputs: scores)(best, best, best, {}).ok
    assert not TopKSet(lambda inputs: scores)(mine, best, best, {}).ok


@pytest.mark.parametrize("queries", [1, 1000])
def test_topk_set_is_as_bad_as_its_worst_query(queries) -> None:
    """Others that lose nothing do not make up for one, however many they are."""
    scores = torch.tensor([0.5, 0.3, 0.3 - 1e-4], dtype=torch.float64).expand(1, queries, 1, 3)
    best = torch.tensor([0, 1], dtype=torch.int32).expand(1, queries, 1, 2).clone()
    mine = best.clone()
    mine[0, queries // 2, 0, 1] = 2
    diff = TopKSet(lambda inputs: scores)(mine, best, best, {})
    assert not diff.ok and diff.error == pytest.approx(1e-4 / 0.8)
