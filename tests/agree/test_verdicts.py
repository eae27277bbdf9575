"""What counts as agreement, one step inside its limit and one outside; and that it is shown."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import nsa_neuron
from nsa_neuron.agree import Agreement, Call, Point, Run, Subject, Token, agree, record
from nsa_neuron.agree.compare import apart, gradient_floor, point
from nsa_neuron.agree.decoding import Continuation, again, differences
from nsa_neuron.agree.html import page
from nsa_neuron.agree.judge import judge
from nsa_neuron.agree.record import Recorder
from nsa_neuron.agree.text import SHOWN, to_text
from nsa_neuron.numerics import Budget
from nsa_neuron.ops import get
from nsa_neuron.registry import Target

if TYPE_CHECKING:
    from pathlib import Path

EPS = torch.finfo(torch.float32).eps

# ---- tensors against the truth


@pytest.mark.parametrize("calls", [0, 1, 3])
@pytest.mark.parametrize("inside", [True, False])
def test_each_call_before_grants_one_rounding(calls: int, inside: bool) -> None:
    """16 units in the last place of float32 for each, at the largest magnitude; eager is exact."""
    exact = [torch.full((4,), 2.0).double()]
    band = (1 + calls) * 16 * EPS * 2
    got = [torch.full((4,), 2.0)]
    got[0][1] += band * (0.93 if inside else 1.07)
    found = point("forward", "layer", 2, got, exact, [exact[0].float()], calls)
    assert found.ok is inside and found.budget == pytest.approx(band)
    assert (found.name, found.visit, found.phase) == ("layer", 2, "forward")


def test_the_worst_of_several_tensors_is_kept_for_its_budget() -> None:
    exact = [torch.ones(3).double(), 100 * torch.ones(3).double()]
    plain = [x.float() for x in exact]
    got = [plain[0] + 8 * EPS, plain[1] + 64 * EPS]
    found = point("forward", "", 0, got, exact, plain, 0)
    assert found.ok and found.error == pytest.approx(8 * EPS)
    for missing in ([], got[:1], [*got, got[0]]):
        assert not point("forward", "", 0, missing, exact, plain, 0).ok
    assert "none" in point("backward", "", 0, got, None, plain, 0).detail


@pytest.mark.parametrize(
    ("largest", "floor"), [(0.0, 1e-6), (1e-7, 1e-6), (1.0, 0.05), (40.0, 2.0)]
)
def test_gradients_are_judged_down_to_a_share_of_the_largest(largest: float, floor: float) -> None:
    exact = [torch.tensor([largest, -largest / 2, math.inf, math.nan]), torch.zeros(0)]
    assert gradient_floor(exact) == pytest.approx(floor)


def test_outputs_are_apart_by_their_largest_difference() -> None:
    a, b = torch.tensor([1.0, math.inf, 3.0]), torch.tensor([1.5, math.inf, 2.0])
    assert apart([a], [b]) == 1.0 and apart([a], [a]) == 0.0
    for other in (torch.tensor([1.0, -math.inf, 3.0]), torch.tensor([math.nan, math.inf, 3.0])):
        assert apart([a], [other]) == math.inf
    assert apart([a], [a[:2]]) == apart([a], []) == math.inf and apart([], []) == 0.0


# ---- tokens


def continuation(tokens: list[list[int]], logits: Any) -> Continuation:
    return Continuation(torch.tensor(tokens), torch.tensor(logits))


@pytest.mark.parametrize(("share", "tie"), [(0.95, True), (1.05, False)])
def test_a_token_ties_within_twice_the_budget_of_its_logits(share: float, tie: bool) -> None:
    budget = Budget().band(torch.float32, 1.0)
    exact = continuation([[0]], [[[1.0, 1.0 - 2 * share * budget]]])
    exact = replace(exact, logits=exact.logits.double())
    exact.logits[0, 0, 1] = 1.0 - 2 * share * budget
    mine = continuation([[1]], [[[1.0, 1.0]]])
    (found,) = differences(mine, exact, exact)
    assert found.tie is tie and found.allowed == pytest.approx(2 * budget)
    assert found.margin == pytest.approx(2 * share * budget)


def test_every_row_is_compared_up_to_its_own_first_difference() -> None:
    logits = [[[1.0, 0.0]] * 3] * 4
    exact = continuation([[0, 0, 0]] * 4, logits)
    mine = continuation([[0, 0, 0], [0, 1, 0], [1, 1, 1], [0, 0, 1]], logits)
    found = differences(mine, exact, exact)
    assert [(t.row, t.step, t.wanted, t.got) for t in found] == [
        (1, 1, 0, 1),
        (2, 0, 0, 1),
        (3, 2, 0, 1),
    ]


def test_decoding_again_takes_the_likeliest_behind_the_last_token() -> None:
    """The model's likeliest next token is the sum of all before, modulo 7."""

    def model(tokens: torch.Tensor) -> torch.Tensor:
        wanted = tokens.cumsum(1) % 7
        return nn.functional.one_hot(wanted, 7).float()

    tokens, logits = again(model, torch.tensor([[1, 2], [3, 3]]), 3)
    assert tokens.tolist() == [[3, 6, 5], [6, 5, 3]]
    assert logits.shape == (2, 3, 7) and (logits.argmax(-1) == tokens).all()
    last = again(lambda x: model(x)[:, -1], torch.tensor([[1, 2]]), 2)[0]
    assert last.tolist() == [[3, 6]]


# ---- runs and reports

GOOD, BAD = Run("cpu:torch"), Run("cuda:sim")
CALL = Call(1, "forward", "layer", "attention", "right", "o", 1.0, 4.0)
POINT = Point("forward", "layer", 0, True, 1.0, 4.0)
TIE, WRONG = Token(0, 1, 2, 3, 0.1, 0.1), Token(0, 1, 2, 3, 0.11, 0.1)


@pytest.mark.parametrize(
    ("parts", "ok", "first"),
    [
        ({"calls": [CALL], "points": [POINT], "tokens": [TIE]}, True, ""),
        ({"calls": [CALL, replace(CALL, status="wrong")]}, False, "call 1, attention is wrong"),
        ({"calls": [replace(CALL, status="refused")]}, False, "call 1, attention is refused"),
        ({"points": [POINT, replace(POINT, ok=False)]}, False, "forward, layer"),
        ({"points": [replace(POINT, ok=False, phase="backward")]}, False, "gradient of layer"),
        ({"tokens": [TIE, WRONG]}, False, "decode, row 0, step 1: token 3, not 2"),
        ({"failure": "decode ended"}, False, "decode ended"),
    ],
)
def test_a_run_agrees_if_nothing_in_it_parts(parts: dict[str, Any], ok: bool, first: str) -> None:
    run = Run("cuda:sim", **parts)
    assert run.ok is ok and first in run.first
    found = Agreement("x", "y", [GOOD, run])
    assert found.ok is ok and found.to_dict()["ok"] is ok
    assert found.to_dict()["runs"][1]["ok"] is ok
    text, html = to_text(found), page(found)
    assert ("cuda:sim first parts at" in text) is not ok
    verdicts = [
        line.split()[-1] for line in text.splitlines() if line.endswith(("agrees", "PARTS"))
    ]
    assert verdicts == ["agrees", "agrees" if ok else "PARTS"]
    assert ('<span class="bad">parts</span>' in html) is not ok
    assert ("cuda:sim: parts" in html, "every target agrees" in html) == (not ok, ok)


def test_what_is_not_shown_is_counted() -> None:
    wrong = replace(CALL, status="wrong", detail="off")
    parted = replace(POINT, ok=False, detail="beyond")
    run = Run(
        "cuda:sim", calls=[wrong] * (SHOWN + 2) + [CALL], points=[parted] * (SHOWN + 3) + [POINT]
    )
    run.tokens, run.decoded = [TIE, WRONG, WRONG], 4
    text = to_text(Agreement("x", "y", [run]))
    assert "... and 5 more; --json has all" in text and text.count("beyond\n") == SHOWN
    assert f"1 right, {SHOWN + 2} wrong" in text and f"1 within, {SHOWN + 3} beyond" in text
    assert "4 each, 2 differ, 1 tie" in text
    few = Run("cuda:sim", calls=[wrong] * SHOWN, points=[parted] * SHOWN)
    assert "more; --json" not in to_text(Agreement("x", "y", [few]))


@pytest.mark.parametrize(
    ("error", "budget", "bar"),
    [
        (1.0, 4.0, 'class="bar"><i style="width:25%"'),
        (9.0, 3.0, 'class="bar bad"><i style="width:100%"'),
    ],
)
def test_bars_show_the_share_of_a_budget(error: float, budget: float, bar: str) -> None:
    status = "right" if error < budget else "wrong"
    run = Run("cpu:torch", calls=[replace(CALL, error=error, budget=budget, status=status)])
    assert bar in page(Agreement("x", "y", [run]))


# ---- what is run and kept


def test_only_the_first_wrong_call_is_kept(tmp_path: Path, monkeypatch) -> None:
    kept: list[str] = []
    monkeypatch.setattr(record, "save", lambda *a: kept.append(a[1]) or tmp_path / a[1])
    recorder, spec = Recorder(tmp_path), get("attention")
    for status in ("right", "wrong", "refused", "wrong"):
        recorder.calls.append(replace(CALL, number=len(recorder.calls) + 1, status=status))
        recorder.keep(Target("cuda", "sim"), spec, {})
    assert kept == ["cuda-sim-call2-attention"]


def test_every_tensor_of_an_input_has_its_gradient_compared() -> None:
    def add(pair: tuple[torch.Tensor, torch.Tensor], more: torch.Tensor) -> torch.Tensor:
        return pair[0] * pair[1] + more

    x = [torch.randn(3) for _ in range(3)]
    found = agree(Subject("add", add, ((x[0], x[1]),), {"more": x[2]}), ["reference"], decode=0)
    names = [p.name for p in found.runs[0].points if p.phase == "backward"]
    assert names == ["input 0", "input 0[1]", "input more"]


def test_another_seed_takes_another_direction_and_draws_other_numbers() -> None:
    """The model's gradient is the direction; what it draws is the seed's."""
    drawn: list[float] = []

    def model(x: torch.Tensor) -> torch.Tensor:
        drawn.append(float(torch.randn(())))
        return x * 1.0

    def errors(seed: int) -> list[float]:
        drawn.clear()
        agree(Subject("id", model, (torch.ones(5),)), ["reference"], decode=0, seed=seed)
        return list(drawn)

    assert len(set(errors(1))) == 1, "every run draws the same"
    assert errors(1) == errors(1) != errors(2)
    seen = []
    real = torch.autograd.grad

    def grad(outputs: Any, inputs: Any, directions: Any, **more: Any) -> Any:
        seen.append(directions[0].double().cpu())
        return real(outputs, inputs, directions, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", grad)
        errors(1), errors(2)
    one, two = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert all(torch.allclose(x, one[0]) for x in one), "every target is asked in one direction"
    assert not torch.allclose(one[0], two[0])


def test_a_call_is_judged_on_its_inputs_within_its_budget() -> None:
    spec = get("gated_sum")
    case = next(c for c in spec.cases if c.name == "group4_s40")
    values = spec.arguments(case, torch.float32)
    exact = spec.reference(**{name: x.double() for name, x in values.items()})
    band = 16 * EPS * float(exact.abs().max())
    plain = (spec.reference(**values).double() - exact).abs().max()
    allowed = 2 * float(plain) + band
    for share, ok in ((0.95, True), (1.05, False)):
        got = exact.clone()
        got[0, 3, 1, 7] += share * allowed
        found = judge(spec, Target("cpu", "torch"), values, got.float())
        assert found.ok is ok and found.result == "o", share
        assert ok or "o[0, 3, 1, 7] is" in found.detail


def test_modules_keep_their_names_and_calls_their_modules() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a = nsa_neuron.attention(self.inner(x), x, x)[0]
            return nsa_neuron.attention(self.inner(a), x, x)[0]

    x = torch.randn(1, 5, 1, 8)
    run = agree(Subject("twice", nn.Sequential(Twice()), (x,)), ["cpu:torch"], decode=0).runs[0]
    ahead = [(p.name, p.visit) for p in run.points if p.phase == "forward"]
    assert ahead == [("0.inner", 0), ("0.inner", 1), ("0", 0), ("", 0)]
    assert [(c.number, c.phase, c.module) for c in run.calls] == [
        (1, "forward", "0"), (2, "forward", "0"), (3, "backward", "0"), (4, "backward", "0")
    ]  # fmt: skip
    assert run.ok
