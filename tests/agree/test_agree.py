"""`nsa agree`: what agrees is said to agree, and each planted fault is found where it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nsa_neuron
from nsa_neuron.agree import Run, Subject, agree, load
from nsa_neuron.agree.decoding import Continuation, differences
from nsa_neuron.agree.subject import imported
from nsa_neuron.agree.text import to_text
from nsa_neuron.cli import main
from nsa_neuron.registry import REGISTRY

sys.path.insert(0, str(Path(__file__).parent))
from faulty import HEAD_DIM, AcmeBackend

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "porting" / "model.py"
TOKENS = 44


def subject(dtype: torch.dtype = torch.float32) -> Subject:
    """The example's layers, the second with another head dim."""
    with imported(EXAMPLE) as example:
        torch.manual_seed(0)
        model = example.Model()
        model.layers[1] = example.Layer(32, 4, HEAD_DIM, 20)
    tokens = torch.randint(0, 64, (1, TOKENS))
    return Subject("example", model.to(dtype), (tokens,))


@contextmanager
def acme(fault: str = "") -> Iterator[None]:
    REGISTRY.register(AcmeBackend(fault))
    try:
        yield
    finally:
        REGISTRY.unregister("acme")


def run_with(fault: str, **options: Any) -> Run:
    with acme(fault):
        found = agree(subject(), ["acme"], **{"decode": 0, **options})
    return found.runs[0]


def test_a_right_backend_agrees_in_every_phase() -> None:
    run = run_with("", decode=2)
    assert run.ok and run.first == "" and run.decoded == 2
    assert {call.phase for call in run.calls} == {"forward", "backward", "decode"}
    ops = [(call.module, call.op) for call in run.calls if call.phase == "forward"]
    assert ops[:3] == [
        ("layers.0", "compress"),
        ("layers.0", "compress"),
        ("layers.0", "nsa_attention_forward"),
    ]
    assert [module for module, _ in ops] == ["layers.0"] * 3 + ["layers.1"] * 3
    backward = {(c.module, c.op) for c in run.calls if c.phase == "backward"}
    assert backward == {
        (f"layers.{i}", op)
        for i in (0, 1)
        for op in ("compress_backward", "nsa_attention_backward")
    }
    assert {p.name for p in run.points if p.phase == "forward"} >= {"", "layers.0", "layers.1.norm"}
    assert {p.name for p in run.points if p.phase == "backward"} >= {"layers.0.q.weight"}
    assert "REGISTRY" not in run.first and "acme" not in REGISTRY.names()


@pytest.mark.parametrize(
    ("fault", "phase", "op", "parts"),
    [
        ("window edge", "forward", "nsa_attention_forward", ("sliding_window_attention",)),
        ("bf16 accumulation", "forward", "compress", ()),
        ("dropped block", "forward", "nsa_attention_forward", ("selected_attention",)),
        # What only gets the NaN is not blamed.
        ("nan in dead rows", "forward", "nsa_attention_forward", ("compressed_attention",)),
        (
            "scale in dq",
            "backward",
            "nsa_attention_backward",
            ("sliding_window_attention_backward",),
        ),
    ],
)
def test_planted_faults_are_found_at_the_right_module_and_part(
    fault: str, phase: str, op: str, parts: tuple[str, ...]
) -> None:
    run = run_with(fault)
    assert not run.ok
    first = run.bad_calls[0]
    assert (first.module, first.phase, first.op) == ("layers.1", phase, op)
    assert first.status == "wrong" and first.parts == parts and first.error > first.budget
    assert {call.module for call in run.bad_calls} == {"layers.1"}, "no other layer is blamed"
    forward = [p for p in run.parted if p.phase == "forward"]
    if phase == "forward":
        assert forward[0].name == "layers.1" or forward[0].name.startswith("layers.1.")
    else:
        assert not forward, "the forward pass was right"
    assert "layers.1" in run.first and "is wrong" in run.first
    assert f"[1, {TOKENS}," in first.inputs, "the inputs are named"


def test_the_worst_element_is_named_with_both_values() -> None:
    detail = run_with("window edge", backward=False).bad_calls[0].detail
    # Only rows with a full window lose a token.
    row = int(detail.split("o[0, ")[1].split(",")[0])
    assert 19 <= row < TOKENS and ", not " in detail


def test_a_refusal_is_reported_with_its_rule_and_module() -> None:
    run = run_with("refusal")
    assert [(c.status, c.module) for c in run.bad_calls] == [("refused", "layers.1")]
    assert f"rule head_dim: no kernel for head dim {HEAD_DIM}" in run.first
    assert run.failure == "forward ended with NoLowering: compress"


def test_a_refused_backward_op_belongs_to_the_module_whose_turn_it_is() -> None:
    run = run_with("no backward")
    refused = run.bad_calls[0]
    assert (refused.module, refused.op) == ("layers.1", "nsa_attention_backward")
    assert not [p for p in run.parted if p.phase == "forward"]


def test_a_crash_is_reported_and_ends_its_phase_only() -> None:
    run = run_with("crash", decode=1)
    assert run.failure == "forward ended with RuntimeError: out of registers"
    assert not run.ok and not [c for c in run.calls if c.phase == "backward"]
    said = "layers.1: call 6, nsa_attention_forward is wrong: it raised RuntimeError: out of regis"
    assert said in run.first
    call = run.bad_calls[0]
    assert (call.result, call.error, call.budget, call.parts) == ("", 0.0, 0.0, ())


def test_results_that_break_the_contract_are_found_where_they_are() -> None:
    run = run_with("lost dk")
    wrong = run.bad_calls[0]
    assert (wrong.module, wrong.op) == ("layers.1", "nsa_attention_backward")
    assert "acme:eager returned dk_win of nsa_attention_backward as a NoneType" in wrong.detail
    assert run.failure.startswith("backward ended with ContractViolation")


def test_targets_are_compared_with_each_other() -> None:
    with acme("window edge"):
        found = agree(subject(), ["acme", "reference"], decode=0, backward=False)
    wrong, right = found.runs
    assert right.ok and not wrong.ok and not found.ok
    assert wrong.between == {"reference:eager": right.between["acme:eager"]}
    assert wrong.between["reference:eager"] > 1e-4
    said = to_text(found)
    assert "acme:eager first parts at forward, layers.1" in said and "agrees" in said


def test_bfloat16_models_are_judged_by_bfloat16_s_own_error() -> None:
    with acme():
        assert agree(subject(torch.bfloat16), ["acme"], decode=2).ok
    with acme("window edge"):
        run = agree(subject(torch.bfloat16), ["acme"], decode=0).runs[0]
    assert run.bad_calls[0].module == "layers.1"


def test_functions_are_tried_as_well() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        o: torch.Tensor = nsa_neuron.sliding_window_attention(q, k, k, window=5)[0]
        return o

    q, k = torch.randn(1, 9, 2, HEAD_DIM), torch.randn(1, 9, 1, HEAD_DIM)
    with acme("window edge"):
        found = agree(Subject("attend", attend, (q, k)), ["acme"])
    run = found.runs[0]
    assert run.bad_calls[0].module == "" and run.parted[0].name == ""
    assert all(point.visit == 0 for point in run.points), "it is called once"
    assert {p.name for p in run.points if p.phase == "backward"} == {"input 0", "input 1"}
    assert "(model)" in run.first and "nothing was decoded" in found.notes[0]


def test_every_result_of_a_call_is_judged_though_nobody_uses_it() -> None:
    def attend(q: torch.Tensor) -> torch.Tensor:
        return nsa_neuron.sliding_window_attention(q, q, q, window=5)[0]

    with acme("lse"):
        made = Subject("attend", attend, (torch.randn(1, 9, 2, HEAD_DIM),))
        run = agree(made, ["acme"], backward=False).runs[0]
    (call,) = run.bad_calls
    assert call.result == "lse" and call.error == pytest.approx(0.01, rel=1e-3)
    assert not run.parted, "what the function returned is right"


@pytest.mark.parametrize("right", [True, False])
def test_small_gradients_are_judged_as_closely_as_large_ones(right: bool) -> None:
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.on_acme = (nsa_neuron.registry.requested() or "").startswith("judged-acme")
            return 1e-7 * x

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return 1e-7 * grad * (1.01 if ctx.on_acme and not right else 1.0)

    with acme():
        run = agree(Subject("scaled", Scaled.apply, (torch.randn(2, 4),)), ["acme"]).runs[0]
    assert [(p.phase, p.name) for p in run.parted] == ([] if right else [("backward", "input 0")])


def test_a_model_s_own_decoding_is_used(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        EXAMPLE.read_text() + "\n\ndef decode(model, tokens, steps):\n"
        "    logits = torch.zeros(len(tokens), steps, 64); logits[..., 7] = 1\n"
        "    return logits.argmax(-1), logits\n"
    )
    made = load(f"{path}::make")
    found = agree(made, ["reference"], backward=False, decode=3).runs[0]
    assert found.decoded == 3 and not [c for c in found.calls if c.phase == "decode"]


def test_modules_that_part_without_a_wrong_call_are_found() -> None:
    """What is no nsa op can part as well: here a layer that knows which device it runs for."""

    class Strange(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            on_acme = (nsa_neuron.registry.requested() or "").startswith("judged-acme")
            return x + 0.01 * on_acme

    model = nn.Sequential(nn.Linear(4, 4), Strange(), nn.Linear(4, 4))
    with acme():
        run = agree(Subject("strange", model, (torch.randn(2, 4),)), ["acme"]).runs[0]
    assert not run.calls and run.parted[0].name == "1"
    assert "every call of an nsa op is right on its own inputs" in run.first


def logits(*rows: list[float]) -> torch.Tensor:
    return torch.tensor([rows], dtype=torch.float64)


def test_tokens_that_differ_are_ties_only_within_the_logits_budget() -> None:
    exact = Continuation(torch.tensor([[0, 1]]), logits([1.0, 0.0], [0.5, 0.5 + 1e-9]))
    near = Continuation(torch.tensor([[0, 0]]), logits([1.0, 0.0], [0.5, 0.5]).float())
    far = Continuation(torch.tensor([[1, 1]]), logits([0.9, 1.0], [0.5, 0.5]).float())
    (tie,) = differences(near, exact, exact)
    assert tie.tie and (tie.step, tie.wanted, tie.got) == (1, 1, 0)
    (wrong,) = differences(far, exact, exact)
    assert not wrong.tie and wrong.step == 0 and wrong.margin == 1.0
    assert differences(exact, exact, exact) == []


def test_the_command_s_exit_codes_json_and_page(tmp_path: Path, capsys) -> None:
    words = ["agree", f"{EXAMPLE}::make", "--targets", "acme", "--decode", "1"]
    with acme():
        assert main([*words, "--html", str(tmp_path / "a.html")]) == 0
    assert "agrees" in capsys.readouterr().out
    page = (tmp_path / "a.html").read_text()
    assert "every target agrees" in page and "nsa_attention_forward" in page
    with acme("crash"):
        AcmeBackend.lower.__globals__["HEAD_DIM"] = 16
        try:
            assert main([*words, "--json"]) == 1
        finally:
            AcmeBackend.lower.__globals__["HEAD_DIM"] = HEAD_DIM
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"] and "out of registers" in found["runs"][0]["failure"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.py", "--targets", "cpu"], "there is no file nowhere.py"),
        (["raises.py", "--targets", "cpu"], "raises.py::make raised ValueError: boom"),
        (["broken.py", "--targets", "cpu"], "broken.py raised SyntaxError"),
        ([f"{EXAMPLE}::nothing", "--targets", "cpu"], "has no function 'nothing'"),
        ([f"{EXAMPLE}::Model", "--targets", "cpu"], "it must return (model, inputs)"),
        ([f"{EXAMPLE}::make", "--targets", "tpu"], "no backend or target 'tpu'"),
        ([f"{EXAMPLE}::make", "--targets", "trn2:hw"], "neuron:hw cannot run here"),
    ],
)
def test_what_cannot_be_carried_out_is_said(
    words: list[str], said: str, capsys, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raises.py").write_text("def make():\n    raise ValueError('boom')\n")
    (tmp_path / "broken.py").write_text("def make(:\n")
    assert main(["agree", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.sim
def test_the_h200_s_kernels_agree_on_a_small_model() -> None:
    pytest.importorskip("triton")
    made = subject()
    short = Subject(made.name, made.model, (made.args[0][:, :20],))
    run = agree(short, ["h200:sim"], decode=0).runs[0]
    assert run.ok, run.first
    assert {call.phase for call in run.calls} == {"forward", "backward"}
