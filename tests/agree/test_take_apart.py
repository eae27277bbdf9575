"""A composed op that is wrong is made again of its parts; a tie of the selection is no fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nsa_neuron.agree.judge import judge
from nsa_neuron.backends import composite
from nsa_neuron.ops import get
from nsa_neuron.ops.nsa_attention import compose_forward
from nsa_neuron.registry import REGISTRY, Supported, Target, Unsupported

SIZES = {"block": 4, "stride": 4, "select_block": 4, "num_selected": 3, "window": 3}
TOKENS = 24


def whole(change: Callable[..., Any] | None = None) -> dict[str, Any]:
    """A call in which blocks 1 and 2 are equally important to everybody, with other values."""
    gen = torch.Generator().manual_seed(0)
    spec = get("nsa_attention_forward")
    values: dict[str, Any] = {**spec.defaults, **SIZES, "num_local": 1}
    values["q"] = torch.randn(1, TOKENS, 2, 8, generator=gen)
    for branch, rows in (("cmp", 6), ("slc", TOKENS), ("win", TOKENS)):
        values[f"k_{branch}"] = torch.randn(1, rows, 1, 8, generator=gen)
        values[f"v_{branch}"] = torch.randn(1, rows, 1, 8, generator=gen)
    values["k_cmp"][:, 1:3] = 4.0 * values["k_cmp"][:, 1:2]
    values["gates"] = torch.rand(1, TOKENS, 2, 3, generator=gen)
    return {name: values[name] for name in spec.names}


class Parts:
    """A backend of the references of the parts; `wrong` are others. `whole_only`: no part."""

    name = "parts"

    def __init__(self, wrong: dict[str, Callable[..., Any]], whole_only: bool = False) -> None:
        self.wrong, self.whole_only = wrong, whole_only

    def modes(self) -> dict[str, str]:
        return {"hw": ""}

    def supports(self, bound: Any, mode: str) -> Any:
        if self.whole_only and bound.spec.name not in composite.WHOLE:
            return Unsupported("kernel", "none")
        return Supported()

    def lower(self, bound: Any, plan: Any) -> Callable[..., Any]:
        return self.wrong.get(bound.spec.name, bound.spec.reference)


def higher_of_a_tie(**values: Any) -> torch.Tensor:
    """Ids that name block 2 where the reference names block 1."""
    ids = get("select_blocks").reference(**values)
    swapped = torch.where((ids == 1) & ~(ids == 2).any(-1, keepdim=True), 2, ids)
    visible = torch.arange(TOKENS)[None, :, None, None] >= 11
    return torch.where(visible, swapped, ids)


def worst_block(**values: Any) -> torch.Tensor:
    """Ids that name block 3 where the reference names block 1."""
    ids = get("select_blocks").reference(**values)
    last = torch.arange(TOKENS)[None, :, None, None] >= 16
    return torch.where(last & (ids == 1) & ~(ids == 3).any(-1, keepdim=True), 3, ids).sort(-1)[0]


def shorter_window(**values: Any) -> Any:
    spec = get("sliding_window_attention")
    return spec.reference(**{**values, "window": values["window"] - 1})


def judged(op: str, wrong: dict[str, Callable[..., Any]], spoil: float = 0.0, **more: Any) -> Any:
    """What is said of a call whose results are those of a backend's parts, off by `spoil`."""
    spec, backend = get(op), Parts(wrong, **more)
    values = whole()
    made = compose_forward(lambda name: wrong.get(name, get(name).reference), values)
    made = (made[0] + spoil, *made[1:])
    got = made if op.endswith("_forward") else made[0]
    REGISTRY.register(backend)
    try:
        return judge(spec, Target("parts", "hw"), values, got)
    finally:
        REGISTRY.unregister("parts")


@pytest.mark.parametrize("op", ["nsa_attention", "nsa_attention_forward"])
def test_another_of_two_equal_blocks_is_right(op: str) -> None:
    tie = {"select_blocks": higher_of_a_tie}
    ids = higher_of_a_tie, get("select_blocks").reference
    values = whole()
    one, other = (compose_forward({**PARTS, "select_blocks": f}.__getitem__, values) for f in ids)
    assert (one[0] - other[0]).abs().max() > 0.01, "the results differ by far more than rounding"
    found = judged(op, tie)
    assert found.ok, found.detail
    spoiled = judged(op, tie, spoil=0.01)
    assert not spoiled.ok and not spoiled.parts, "what the parts do not give is wrong"


PARTS = {
    name: get(name).reference
    for name in (
        "compressed_attention", "select_blocks", "selected_attention", "sliding_window_attention",
        "gated_sum",
    )
}  # fmt: skip


@pytest.mark.parametrize("op", ["nsa_attention", "nsa_attention_forward"])
@pytest.mark.parametrize(
    ("part", "wrong"),
    [("sliding_window_attention", shorter_window), ("select_blocks", worst_block)],
)
def test_a_wrong_part_is_named(op: str, part: str, wrong: Callable[..., Any]) -> None:
    found = judged(op, {part: wrong})
    assert not found.ok and found.parts == (part,) and f"; {part}." in found.detail


def test_a_target_that_has_the_whole_only_is_judged_by_the_whole() -> None:
    assert judged("nsa_attention", {}, whole_only=True).ok
    found = judged("nsa_attention", {}, spoil=0.01, whole_only=True)
    assert not found.ok and found.parts == () and found.result == "o"


def test_nan_of_the_inputs_is_no_fault_and_nan_beside_it_is() -> None:
    spec = get("gated_sum")
    values = spec.arguments(next(c for c in spec.cases if c.name == "group4_s40"), torch.float32)
    values["o_win"][0, 3] = float("nan")
    got = spec.reference(**values)
    assert got[0, 3].isnan().all()
    assert judge(spec, Target("cpu", "torch"), values, got).ok
    wrong = got.clone()
    wrong[0, 4, 0, 0] = float("nan")
    assert "1 NaN" in judge(spec, Target("cpu", "torch"), values, wrong).detail
    lost = got.clone()
    lost[0, 3] = 0.0
    assert not judge(spec, Target("cpu", "torch"), values, lost).ok
