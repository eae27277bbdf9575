"""Edges of `nsa agree`: subjects as they are brought, who made a call, what is judged and noted."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import nsa_neuron
from nsa_neuron.agree import Call, Subject, agree, load, saved
from nsa_neuron.agree.compare import point
from nsa_neuron.agree.decoding import Continuation, differences, greedy
from nsa_neuron.agree.judge import _compare, _without_nan, _worst_place
from nsa_neuron.agree.record import Recorder, watched
from nsa_neuron.agree.subject import imported, mapped, tensors
from nsa_neuron.errors import NsaError
from nsa_neuron.numerics import Diff
from nsa_neuron.ops import get
from nsa_neuron.registry import REGISTRY

if TYPE_CHECKING:
    from pathlib import Path

    from nsa_neuron.spec import OpSpec

EPS = torch.finfo(torch.float32).eps


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.Linear(3, 1).double())


# ---- subjects


def test_a_subject_describes_itself_in_one_line() -> None:
    x, ids = torch.zeros(2, 2), torch.zeros(1, 3, dtype=torch.int64)
    made = Subject("s", small(), ((x, ids),), {"mask": ids.bool(), "n": 3})
    assert made.describe() == (
        "Sequential, 13 parameters (float32, float64); inputs 0: float32[2, 2], 0: int64[1, 3], "
        "mask: bool[1, 3]"
    )
    assert Subject("s", torch.add).describe() == "add; inputs none"
    large = nn.Linear(1000, 2, bias=False)
    assert Subject("s", large).describe().startswith("Linear, 2,000 parameters (float32); inputs")


def test_a_subject_that_is_placed_is_a_copy_that_is_judged_as_it_infers() -> None:
    x, ids = torch.ones(2, 2), torch.ones(2, dtype=torch.int32)
    model = small().train()
    mine = Subject("s", model, (x, ids), {"y": [x]}, decode := lambda *a: a)  # type: ignore[arg-type,return-value]
    for dtype in (torch.float64, None):
        made = mine.placed("cpu", dtype)
        own = dtype or torch.float32
        a, b, (c,) = *made.args, made.kwargs["y"]
        assert (a.dtype, b.dtype, c.dtype) == (own, torch.int32, own)
        assert a.requires_grad and c.requires_grad and not b.requires_grad and a.is_leaf
        assert made.model is not model and not made.model.training
        last = own if dtype else torch.float64
        assert [p.dtype for p in made.model.parameters()] == [own, own, last, last]
        assert (made.name, made.decode) == ("s", decode)
        with torch.no_grad():
            a.zero_()
            b.zero_()
    assert model.training and x.sum() == 4 and ids.sum() == 2 and not x.requires_grad


def test_what_gets_a_gradient_is_every_parameter_and_floating_input() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    x, ids = torch.ones(2), torch.ones(2, dtype=torch.int32)
    made = Subject("s", model, ((x, x, ids, x), ids), {"y": x}).placed("cpu")
    assert list(made.leaves) == ["weight", "input 0", "input 0[1]", "input 0[3]", "input y"]
    assert made.leaves["input 0[1]"] is made.args[0][1]
    assert list(made.modules) == [""] and Subject("f", torch.add).modules == {}


@pytest.mark.parametrize(
    ("args", "is_one"),
    [
        ((torch.zeros(1, 4, dtype=torch.int64),), True), ((torch.zeros(1, 4),), False),
        ((torch.zeros(4, dtype=torch.int64),), False), ((), False), (([1, 2],), False),
        ((torch.zeros(1, 4, dtype=torch.int64),) * 2, False),
    ],
)  # fmt: skip
def test_a_prompt_is_the_one_input_of_token_ids(args: tuple[Any, ...], is_one: bool) -> None:
    prompt = Subject("s", torch.add, args).prompt
    assert (prompt is not None) is is_one and (not is_one or prompt is args[0])


@dataclass
class Made:
    x: Tensor
    n: int = 1
    own: Tensor = field(init=False, default_factory=lambda: torch.ones(1))


def test_tensors_are_found_in_what_they_stand_in_and_in_its_order() -> None:
    a, b, c, d = (torch.full((1,), float(i)) for i in range(4))
    value = {"x": [a, (b, "text")], "y": Made(c), "z": {"w": d, "n": None}}
    assert [float(x) for x in tensors(value)] == [0, 1, 2, 3]
    found = mapped(lambda x: x + 10, value)
    assert [float(x) for x in tensors(found)] == [10, 11, 12, 13]
    assert type(found["x"]) is list and type(found["x"][1]) is tuple and found["x"][1][1] == "text"
    assert type(found["y"]) is Made and found["y"].n == 1 and found["z"]["n"] is None
    assert tensors(Made) == [] and mapped(lambda x: x, Made) is Made, "a class is no object"


FILE = """
import torch
from beside_it import VALUE
def make():
    return torch.neg, INPUTS
def other():
    return torch.abs, {"input": torch.ones(VALUE)}
"""


@pytest.mark.parametrize(
    ("inputs", "args", "kwargs"),
    [("torch.ones(2)", 1, 0), ("(torch.ones(2), 3)", 2, 0), ("()", 0, 0), ("{'x': 1}", 0, 1)],
)
def test_inputs_are_a_tensor_or_positional_or_named(
    tmp_path: Path, inputs: str, args: int, kwargs: int
) -> None:
    (tmp_path / "beside_it.py").write_text("VALUE = 5\n")
    file = tmp_path / "mine.py"
    file.write_text(FILE.replace("INPUTS", inputs))
    before = list(sys.path)
    try:
        made = load(str(file))
        other = load(f"{file}::other")
    finally:
        sys.modules.pop("beside_it", None)
    assert sys.path == before, "the folder is on the path meanwhile only"
    assert (len(made.args), len(made.kwargs)) == (args, kwargs) and made.decode is None
    assert (made.name, made.model) == (f"{file}::make", torch.neg)
    assert (other.name, other.kwargs["input"].shape) == (f"{file}::other", (5,))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ("make = 3", "has no function 'make'"),
        ("make = lambda: 3", "returned int; it must return (model, inputs)"),
        ("make = lambda: (print, (), 1)", "returned tuple; it must return (model, inputs)"),
        ("make = lambda: (3, ())", "returned tuple; it must return (model, inputs)"),
        ("def make():\n    raise KeyError('x')", "mine.py::make raised KeyError: 'x' ({file}:2)"),
        ("1 / 0", "mine.py raised ZeroDivisionError: division by zero ({file}:1)"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_place(
    tmp_path: Path, made: str, said: str
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(made)
    with pytest.raises(NsaError) as error:
        load(str(file))
    assert said.replace("{file}", str(file)) in str(error.value)
    notes = tmp_path / "notes.txt"
    notes.write_text("x = 1")
    with pytest.raises(NsaError, match=r"notes.txt is no Python file"), imported(notes):
        pass


def test_a_saved_call_holds_everything_and_is_called_without_gradients(tmp_path: Path) -> None:
    spec = get("gated_sum")
    values = spec.arguments(next(c for c in spec.cases if c.name == "one_token"), torch.float32)
    values = {n: x.requires_grad_() for n, x in values.items()}
    file = saved.save(tmp_path / "a" / "b", "call", spec, values)
    assert file == tmp_path / "a" / "b" / "call.pt" and list(file.parent.iterdir()) == [file]
    found = saved.load(file)
    assert found.spec is spec and set(found.values) == set(values)
    assert all(torch.equal(found.values[n], x) for n, x in values.items())
    assert not any(x.requires_grad for x in found.values.values())
    with nsa_neuron.use_backend("reference"):
        out = found.function(**{n: x.requires_grad_() for n, x in found.values.items()})
    assert found.function.__name__ == "gated_sum" and not out.requires_grad
    again = saved.save(file.parent, "call", spec, {**values, "gates": values["gates"] * 2})
    assert torch.equal(saved.load(again).values["gates"], values["gates"] * 2), "written over"
    torch.save({"format": "nsa call 0", "op": "gated_sum", "values": {}}, file)
    with pytest.raises(NsaError, match="holds no saved call"):
        saved.load(file)


# ---- what is compared


def test_the_result_nearest_its_own_budget_is_reported() -> None:
    """16 and 4 units of 16 * 2 each; the first is larger, but the second nearer its budget."""
    exact = [torch.full((2,), 8.0).double(), torch.full((2,), 1.0).double()]
    plain = [x.float() for x in exact]
    for order in (1, -1):
        got = [plain[0] + 16 * EPS, plain[1] + 8 * EPS]
        sides = [x[::order] for x in (got, exact, plain)]
        found = point("forward", "", 0, *sides, 0)
        assert found.ok and (found.error, found.budget) == pytest.approx((8 * EPS, 16 * EPS))


@pytest.mark.parametrize(
    ("phase", "got", "exact", "said"),
    [
        ("forward", 1, None, "1 output; the reference's run has none"),
        ("forward", 1, 0, "1 output; the reference's run has none"),
        ("forward", 0, 2, "no output; the reference's run has one"),
        ("backward", 0, 1, "no gradient; the reference's run has one"),
        ("backward", 1, 0, "1 gradient; the reference's run has none"),
        ("forward", 2, 3, "2 output; the reference's run has another number of them"),
    ],
)
def test_another_number_of_results_is_said(phase: str, got: int, exact: Any, said: str) -> None:
    x = [torch.ones(2)] * 3
    truth = None if exact is None else x[:exact]
    found = point(phase, "m", 4, x[:got], truth, truth, 0)
    assert (found.ok, found.detail, found.error, found.budget) == (False, said, 0.0, 0.0)
    assert (found.phase, found.name, found.visit) == (phase, "m", 4)


def test_a_result_beyond_its_budget_ends_the_comparison() -> None:
    exact = [torch.ones(2).double()] * 3
    plain = [x.float() for x in exact]
    found = point("forward", "", 0, [plain[0], plain[0] + 1, plain[0] + 2], exact, plain, 0)
    assert not found.ok and found.error == pytest.approx(1.0) and found.detail


def test_nan_on_both_sides_is_set_aside_and_ids_are_left_alone() -> None:
    nan = torch.nan
    got, oracle = torch.tensor([nan, nan, 1.0]), torch.tensor([nan, 2.0, nan])
    for found, wanted in zip(
        _without_nan(got, oracle, torch.tensor([5.0, 6.0, 7.0])),
        ([0.0, nan, 1.0], [0.0, 2.0, nan], [0.0, 6.0, 7.0]),
        strict=True,
    ):
        assert torch.equal(found, torch.tensor(wanted)) or torch.allclose(
            found, torch.tensor(wanted), equal_nan=True
        )
    plain = torch.ones(2)
    assert _without_nan(plain, plain, plain)[0] is plain
    ids = torch.ones(2, dtype=torch.int32)
    assert _without_nan(ids, ids, ids)[1] is ids
    short = torch.tensor([nan])
    assert _without_nan(short, oracle, oracle)[0] is short, "another shape"


@pytest.mark.parametrize(
    ("got", "oracle", "said"),
    [
        ([[1.0, 2.0], [3.0, 4.5]], [[1.0, 2.0], [3.25, 4.0]], "; o[1, 1] is 4.5, not 4"),
        ([[1.0, 2.0], [9.0, 4.0]], [[1.0, 2.0], [3.0, -1.0]], "; o[1, 0] is 9, not 3"),
        ([[1.0, 2.0, 0.0]], [[1.0, 2.0, 7.0]], "; o[0, 2] is 0, not 7"),
        ([-torch.inf, 1.0], [-torch.inf, 1.5], "; o[1] is 1, not 1.5"),
        ([torch.nan, 1.0], [0.0, 9.5], "; o[0] is nan, not 0"),
        ([1.0], [1.0, 2.0], ""),
        ([], [], ""),
    ],
)
def test_the_worst_place_is_named_by_every_index(got: Any, oracle: Any, said: str) -> None:
    assert _worst_place("o", torch.tensor(got), torch.tensor(oracle)) == said


def test_no_place_is_named_in_ids() -> None:
    ids = torch.tensor([1, 2], dtype=torch.int32)
    assert _worst_place("ids", ids, ids + 1) == ""


def test_the_reference_in_float64_is_the_truth_of_a_call_and_its_dtype_the_allowance() -> None:
    """A reference that is off in float32: as much again is allowed, and the band."""
    spec = get("gated_sum")
    values = spec.arguments(next(c for c in spec.cases if c.name == "one_token"), torch.float32)
    exact = spec.reference(**{n: x.double() for n, x in values.items()})

    def reference(**given: Any) -> Tensor:
        out: Tensor = spec.reference(**given)
        return out if out.dtype == torch.float64 else out + 0.01

    for off, ok in ((0.019, True), (0.021, False)):
        found = _compare(spec, values, (exact + off).float(), reference)
        assert found.ok is ok and found.error == pytest.approx(off, rel=1e-3)


# ---- tokens


def test_ties_are_granted_by_plain_torch_only_where_it_has_the_same_prefix() -> None:
    """Its logits are off by 0.25: behind another prefix that says nothing."""
    tokens = torch.tensor([[0, 0]])
    exact = Continuation(tokens, torch.tensor([[[1.0, 0.0], [1.0, 0.9]]]).double())
    mine = Continuation(torch.tensor([[0, 1]]), torch.tensor([[[1.0, 0.0], [1.0, 1.0]]]))
    off = torch.tensor([[[1.0, 0.0], [1.0, 0.65]]])
    (same,) = differences(mine, exact, Continuation(tokens, off))
    assert same.tie and 1.0 < same.allowed < 1.01 and same.margin == pytest.approx(0.1)
    (other,) = differences(mine, exact, Continuation(torch.tensor([[1, 0]]), off))
    assert not other.tie and other.allowed < 1e-4


def test_decoding_uses_the_subject_s_own_and_returns_to_the_cpu() -> None:
    prompt = torch.zeros(2, 3, dtype=torch.int64)
    asked = []

    def decode(model: Any, tokens: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        asked.append((model, tokens, steps))
        return tokens[:, :steps], torch.zeros(2, steps, 5, requires_grad=True)

    found = greedy(Subject("s", torch.neg, (prompt,), {}, decode), 2)
    assert asked[0][0] is torch.neg and asked[0][1] is prompt and asked[0][2] == 2
    assert found.tokens.shape == (2, 2) and not found.logits.requires_grad
    for tokens, logits in (((2, 3), (2, 2, 5)), ((2, 2), (2, 3, 5)), ((1, 2), (2, 2, 5))):
        given = torch.zeros(tokens), torch.zeros(logits)
        with pytest.raises(NsaError, match=r"must be \[2, 2\] and \[2, 2, V\]"):
            greedy(Subject("s", torch.neg, (prompt,), {}, lambda *a, g=given: g), 2)


# ---- who made a call


def bound(op: str, **values: Tensor) -> tuple[Any, dict[str, Any]]:
    spec: OpSpec = get(op)
    given = {**dict.fromkeys(spec.names), **spec.defaults, **values}
    return spec.bind(given), given


def test_a_backward_call_is_made_by_the_module_of_its_forward_call() -> None:
    recorder = Recorder()
    x, y = torch.zeros(1, 4, 1, 2), torch.zeros(1, 4, 1, 2)
    lse = torch.zeros(1, 4, 1)
    for name, q in (("a", x), ("b", y)):
        recorder.modules.append(name)
        assert recorder.maker(*bound("attention", q=q, k=q, v=q)) == name == recorder.module
        recorder.modules.pop()
    assert recorder.module == ""
    recorder.modules += ["outer", "now"]
    for name, q in (("b", y), ("a", x)):
        given = {"grad_o": torch.zeros(1, 4, 1, 2), "q": q, "k": q, "v": q, "o": q, "lse": lse}
        assert recorder.maker(*bound("attention_backward", **given)) == name
    z = torch.zeros(1, 4, 1, 2)
    given = {"grad_o": x, "q": z, "k": z, "v": z, "o": z, "lse": lse}
    assert recorder.maker(*bound("attention_backward", **given)) == "now", "nobody's: the innermost"


@pytest.mark.parametrize(
    ("before", "op", "module"),
    [
        ([], "attention_backward", "now"), ([], "attention", "now"),
        ([("forward", "a"), ("forward", "b")], "attention_backward", "b"),
        ([("forward", "a"), ("forward", "b"), ("backward", "b")], "attention_backward", "a"),
        ([("forward", "a"), ("backward", "a")], "attention_backward", "now"),
        ([("forward", "a")], "compress_backward", "now"), ([("forward", "a")], "attention", "now"),
    ],
)  # fmt: skip
def test_a_refused_backward_call_is_of_the_module_whose_turn_it_is(
    before: list[tuple[str, str]], op: str, module: str
) -> None:
    recorder = Recorder()
    recorder.modules.append("now")
    ends = {"forward": "_forward", "backward": "_backward"}
    recorder.calls += [
        Call(i, phase, name, f"attention{ends[phase]}", "right")
        for i, (phase, name) in enumerate(before)
    ]
    assert recorder.guessed_maker(op) == module


def test_modules_are_watched_in_order_and_left_alone_after() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x: Tensor) -> Any:
            return self.inner(x), [self.inner(x + 1), torch.ones(1, dtype=torch.int32)]

    model, recorder, seen = Twice(), Recorder(), []

    def visit(name: str, count: int, outputs: list[Tensor]) -> None:
        seen.append((name, count, [float(x) for x in outputs], list(recorder.modules)))

    with watched(dict(model.named_modules()), recorder, visit):
        model(torch.zeros(1))
        model(torch.full((1,), 5.0))
        recorder.modules.append("left over")
    assert recorder.modules == []
    assert seen == [
        ("inner", 0, [0.0], [""]), ("inner", 1, [1.0], [""]), ("", 0, [0.0, 1.0], []),
        ("inner", 2, [5.0], [""]), ("inner", 3, [6.0], [""]), ("", 1, [5.0, 6.0], []),
    ]  # fmt: skip
    model(torch.zeros(1))
    assert len(seen) == 6, "nobody watches any more"


# ---- runs


def run(model: Any, *args: Any, targets: Any = ("reference",), **options: Any) -> Any:
    return agree(Subject("mine", model, args), targets, **{"decode": 0, **options})


def test_what_was_left_out_is_noted_in_whole() -> None:
    x = torch.ones(2)
    found = run(lambda x: x.argmax(), x, decode=3)
    assert found.notes == [
        "nothing was decoded: the only positional input is not token ids [B, S]",
        "outputs were not compared: there is no floating tensor in what the model returns",
        "gradients were not compared: no output has any, of a parameter or an input",
        "no nsa op was called on any target: only the rest of the model was compared "
        "(a use_backend of the model's own goes before the targets)",
    ]
    quiet = run(lambda x: x.argmax(), x, backward=False)
    assert len(quiet.notes) == 2 and "outputs were not compared" in quiet.notes[0]
    q = torch.ones(1, 2, 1, 2)
    assert run(lambda q: nsa_neuron.attention(q, q, q)[0], q).notes == []


def test_a_target_is_tried_once_however_often_it_is_named() -> None:
    found = run(lambda x: x * 2, torch.ones(2), targets=["cpu:torch", "reference", "cpu:torch"])
    assert [each.target for each in found.runs] == ["cpu:torch", "reference:eager"]
    assert [each.between for each in found.runs] == [{"reference:eager": 0.0}, {"cpu:torch": 0.0}]
    assert found.ok and (found.subject, found.runs[0].decoded) == ("mine", 0)


def test_without_gradients_none_are_made() -> None:
    made = []

    def model(x: Tensor) -> Tensor:
        made.append(torch.is_grad_enabled())
        return x * 2

    found = run(model, torch.ones(2), backward=False)
    assert made == [False] * 3 and {p.phase for p in found.runs[0].points} == {"forward"}


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (ValueError("boom"), "mine cannot be run in float64 on the reference: ValueError: boom"),
        (NsaError("plain"), "mine cannot be run in float64 on the reference: plain"),
    ],
)
def test_a_model_that_does_not_run_is_no_subject(raised: Exception, said: str) -> None:
    def model(x: Tensor) -> Tensor:
        raise raised

    with pytest.raises(NsaError) as error:
        run(model, torch.ones(2))
    assert str(error.value) == said

    def single(x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            raise raised
        return x

    with pytest.raises(NsaError, match="cannot be run in its own dtype on the reference"):
        run(single, torch.ones(2))


def test_an_error_s_first_line_ends_its_phase_and_later_ones_do_not_replace_it() -> None:
    ids = torch.zeros(1, 2, dtype=torch.int64)

    def model(tokens: Tensor) -> Tensor:
        if (nsa_neuron.registry.requested() or "").startswith("judged"):
            raise ValueError(f"boom {tokens.shape[1]}\nmore of it")
        return torch.zeros(1, tokens.shape[1], 3)

    (one,) = run(model, ids, decode=1).runs
    assert one.failure == "forward ended with ValueError: boom 2"
    assert one.decoded == 0 and one.points == [] and not one.ok

    def decoding_alone(tokens: Tensor) -> Tensor:
        return model(tokens) if tokens.shape[1] > 2 else torch.zeros(1, 2, 3)

    (two,) = run(decoding_alone, ids, decode=2).runs
    assert two.failure == "decode ended with ValueError: boom 3"
    assert [p.phase for p in two.points] == ["forward"]


def test_no_backend_of_a_run_stays_registered() -> None:
    before = REGISTRY.names()

    def model(x: Tensor) -> Tensor:
        if "judged" in (nsa_neuron.registry.requested() or ""):
            assert "judged-reference-eager" in REGISTRY.names()
            raise KeyError
        return x

    assert "KeyError" in run(model, torch.ones(2)).runs[0].failure
    assert REGISTRY.names() == before and nsa_neuron.registry.requested() is None


def test_a_gradient_the_reference_has_not_is_found() -> None:
    def model(q: Tensor, k: Tensor) -> Tensor:
        there = "judged" in (nsa_neuron.registry.requested() or "")
        return q + (k if there else k.detach())

    (one,) = run(model, torch.ones(2), torch.ones(2)).runs
    assert [(p.name, p.detail) for p in one.parted] == [
        ("input 1", "1 gradient; the reference's run has none")
    ]


def test_calls_say_in_which_phase_they_were_made() -> None:
    ids = torch.zeros(1, 3, dtype=torch.int64)
    weight = nn.Parameter(torch.ones(3))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, tokens: Tensor) -> Tensor:
            x = (tokens[..., None, None] + 1.0) * self.weight
            return nsa_neuron.attention(x, x, x)[0][:, :, 0]

    (one,) = run(Model(), ids, decode=2).runs
    assert [(call.phase, call.op) for call in one.calls] == [
        ("forward", "attention"), ("backward", "attention_backward"), ("decode", "attention"),
        ("decode", "attention"),
    ]  # fmt: skip
    assert one.ok and one.decoded == 2 and [p.name for p in one.points] == ["", "weight"]


def test_what_returned_nothing_is_nothing_wrong() -> None:
    found = point("forward", "m", 1, [], [], [], 3)
    assert (found.ok, found.error, found.budget, found.detail) == (True, 0.0, 0.0, "")


@pytest.mark.parametrize(("errors", "worst"), [((2.0, 3.0), "o"), ((1.0, 6.0), "lse")])
def test_the_result_of_a_call_nearest_its_own_budget_is_reported(
    monkeypatch, errors: tuple[float, float], worst: str
) -> None:
    """Of budgets 4 and 8."""
    spec = get("attention")
    for name, error, budget in zip(("o", "lse"), errors, (4.0, 8.0), strict=True):
        diff = Diff(True, error, budget, "")
        monkeypatch.setitem(spec.compare, name, lambda *given, diff=diff: diff)
    values = spec.arguments(next(c for c in spec.cases if c.name == "one_token"), torch.float32)
    found = _compare(spec, values, spec.reference(**values), spec.reference)
    index = ("o", "lse").index(worst)
    assert (found.ok, found.result, found.error) == (True, worst, errors[index])


def test_gradients_are_of_one_direction_whatever_a_target_draws() -> None:
    def model(x: Tensor) -> Tensor:
        if "judged" in (nsa_neuron.registry.requested() or ""):
            torch.randn(7)
        return x * x

    (one,) = run(model, torch.randn(5)).runs
    assert one.ok and [p.name for p in one.points if p.phase == "backward"] == ["input 0"]


def test_a_token_that_a_target_chose_is_not_taken_for_the_wanted_one() -> None:
    def model(tokens: Tensor) -> Tensor:
        judged = "judged" in (nsa_neuron.registry.requested() or "")
        logits = torch.zeros(1, tokens.shape[1], 8)
        logits[..., 5 if judged and tokens.shape[1] > 3 else 2] = 1.0
        return logits

    (one,) = run(model, torch.zeros(1, 3, dtype=torch.int64), decode=3).runs
    (token,) = one.tokens
    assert (token.row, token.step, token.wanted, token.got) == (0, 1, 2, 5) and not one.ok
    assert one.decoded == 3 and token.margin == 1.0
