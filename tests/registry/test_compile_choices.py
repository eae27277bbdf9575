"""What the compile backend puts into a graph: by hand-made graphs, without dynamo."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import nsa_neuron
from nsa_neuron import compile as compiling
from nsa_neuron import torch_private
from nsa_neuron.compile import Choice, Explanation, choose_lowerings, policy_of
from nsa_neuron.errors import BackendUnavailable, NsaError
from nsa_neuron.library import pinned
from nsa_neuron.registry import REGISTRY, Refusal, Supported, Target, Unsupported


class Noting:
    """Takes what is asked of its mode `hw`; lowers to an operator of torch's own."""

    name = "noting"

    def __init__(self) -> None:
        self.bounds: list[Any] = []

    def modes(self) -> dict[str, str]:
        return {"hw": "", "off": "no such device"}

    def supports(self, bound: Any, mode: str) -> Any:
        self.bounds.append(bound)
        if bound.spec.name == "gated_sum":
            return Unsupported("kernel", "none")
        return Supported()

    def lower(self, bound: Any, plan: Any) -> Any:
        if bound.spec.name == "attention":
            return torch.ops.aten.relu.default
        return bound.spec.reference


@pytest.fixture
def noting():
    backend = Noting()
    REGISTRY.register(backend)
    yield backend
    REGISTRY.unregister("noting")


def graph_of(*calls: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> torch.fx.GraphModule:
    """Calls of ops on one fake q of [1, 6, 2, 8] on the meta-like device `cuda`."""
    graph = torch.fx.Graph()
    with FakeTensorMode():
        q = torch.empty(1, 6, 2, 8, device="cuda")
    x = graph.placeholder("x")
    x.meta["val"] = q
    nodes = [graph.call_function(op, tuple(x for _ in args), more) for op, args, more in calls]
    graph.output(tuple(nodes))
    return torch.fx.GraphModule({}, graph)


def targets(graph: torch.fx.GraphModule) -> list[Any]:
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


OPS = torch.ops.nsa
QKV = (0, 0, 0)


def test_an_operator_stands_in_the_graph_and_anything_else_is_called_through_ours(noting) -> None:
    chosen = pinned("attention", Target("reference", "eager"))
    graph = graph_of(
        (OPS.attention.default, QKV, {}),
        (OPS.sliding_window_attention.default, QKV, {"window": 3}),
        (chosen, QKV, {}),
        (torch.ops.aten.relu.default, (0,), {}),
    )
    choices: list[Choice] = []
    assert choose_lowerings(graph, "noting:hw", choices) is graph
    ours = pinned("sliding_window_attention", Target("noting", "hw"))
    relu = torch.ops.aten.relu.default
    assert targets(graph) == [relu, ours, chosen, relu], "what was chosen before is not asked again"
    assert "noting_hw" in graph.code
    assert [(c.op, str(c.target)) for c in choices] == [
        ("attention", "noting:hw"), ("sliding_window_attention", "noting:hw")
    ]  # fmt: skip
    full, window = noting.bounds
    assert window.scalars == {"window": 3, "scale": None} and full.scalars == {"scale": None}
    assert full.device.type == "cuda", "the choice is for the graph's device"
    assert full.shapes["k"] == (1, 6, 2, 8)


def test_left_out_arguments_are_the_defaults(noting) -> None:
    graph = graph_of((OPS.sliding_window_attention.default, QKV, {}))
    choose_lowerings(graph, "noting:hw", [])
    assert noting.bounds[0].scalars == {"window": 512, "scale": None}
    assert set(noting.bounds[0].shapes) == {"q", "k", "v"}


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        ({}, None), ({"rest": "eager"}, None), ({"target": "noting"}, "noting:hw"),
        ({"target": "noting", "mode": "hw"}, "noting:hw"), ({"target": "noting:hw"}, "noting:hw"),
    ],
    ids=str,
)  # fmt: skip
def test_options_name_a_target(noting, options: dict[str, str], policy: str | None) -> None:
    assert policy_of(options) == policy


@pytest.mark.parametrize(
    "options",
    [{"mode": "hw"}, {"mode": ""}, {"target": "noting", "mode": "off"}, {"rest": "Eager"}],
    ids=str,
)
def test_options_that_cannot_be_are_refused_before_anything_is_compiled(noting, options) -> None:
    with pytest.raises(NsaError):
        policy_of(options)


@pytest.mark.parametrize(
    ("policy", "compiler", "rest"),
    [
        ("neuron:hw", True, "neuron"), ("neuron:hw", False, "neuron"),
        ("neuron:sim", True, "inductor"), ("cuda:hw", True, "inductor"), (None, True, "inductor"),
        (None, False, "eager"),
    ],
)  # fmt: skip
def test_the_rest_is_the_vendor_s_for_its_hardware_else_inductor_s(
    monkeypatch, caplog, policy: str | None, compiler: bool, rest: str
) -> None:
    monkeypatch.setattr(torch_private, "has_cpp_compiler", lambda: compiler)
    with caplog.at_level(logging.WARNING, "nsa_neuron"):
        assert compiling._default_rest(policy) == rest
    assert bool(caplog.records) == (rest == "eager")


def test_the_vendor_s_backend_is_its_own(monkeypatch) -> None:
    monkeypatch.setattr(torch_private, "dynamo_backend", {"neuron": "theirs"}.get)
    assert compiling._vendor_backend() == "theirs"
    monkeypatch.setattr(torch_private, "dynamo_backend", {}.get)
    with pytest.raises(BackendUnavailable, match="no backend 'neuron' here"):
        compiling._vendor_backend()


def test_each_rest_compiles_what_was_chosen(monkeypatch) -> None:
    """`choose` sees the graph first; what it gives is handed on."""
    seen: list[Any] = []
    monkeypatch.setattr(torch_private, "inductor", lambda gm, x, choose: ("inductor", choose(gm)))
    monkeypatch.setattr(torch_private, "aot", lambda gm, x, compiler: compiler(gm, x))
    monkeypatch.setattr(torch_private, "boxed", lambda forward: ("eager", forward))
    monkeypatch.setattr(
        compiling, "_vendor_backend", lambda: lambda graph, inputs: seen.append(graph) or "vendor"
    )
    graph = torch.fx.symbolic_trace(lambda x: torch.relu(x))
    other = torch.fx.symbolic_trace(lambda x: torch.sin(x))
    compile_rest = compiling._compile_rest
    assert compile_rest(graph, [], "inductor", lambda g: other) == ("inductor", other)
    assert compile_rest(graph, [], "eager", lambda g: other) == ("eager", other.forward)
    assert compile_rest(graph, [], "neuron", lambda g: other) == "vendor" and seen == [other]


def test_inductor_is_not_handed_choices_of_another_run(monkeypatch) -> None:
    """torch's cache of autograd graphs knows nothing of targets."""
    import torch._inductor.compile_fx as theirs

    seen: list[Any] = []

    def compile_fx(gm: Any, inputs: Any, inner_compile: Any) -> Any:
        seen.append(torch._functorch.config.enable_autograd_cache)
        return inner_compile(gm, inputs, cudagraphs=False)

    monkeypatch.setattr(theirs, "compile_fx", compile_fx)
    monkeypatch.setattr(theirs, "compile_fx_inner", lambda graph, example, **more: (graph, more))
    before = torch._functorch.config.enable_autograd_cache
    with torch._functorch.config.patch(enable_autograd_cache=True):
        found = torch_private.inductor("graph", [], lambda graph: f"chosen {graph}")
    assert found == ("chosen graph", {"cudagraphs": False}) and seen == [False]
    assert torch._functorch.config.enable_autograd_cache == before


def test_what_follows_several_graph_breaks_is_explained_together() -> None:
    def attend(q: torch.Tensor) -> torch.Tensor:
        a = nsa_neuron.attention(q, q, q)[0]
        torch._dynamo.graph_break()
        b = nsa_neuron.sliding_window_attention(a, q, q, window=2)[0]
        torch._dynamo.graph_break()
        return nsa_neuron.gated_sum(a, b, q, torch.ones(1, 4, 1, 3))

    torch._dynamo.reset()
    fast = torch.compile(attend, backend="nsa_neuron", options={"rest": "eager"})
    fast(torch.randn(1, 4, 1, 8))
    ops = [c.op for c in nsa_neuron.explain(fast).choices]
    assert ops == ["attention", "sliding_window_attention", "gated_sum"]
    torch._dynamo.reset()


def test_an_explanation_says_who_refused_and_what_compiles_the_rest() -> None:
    refusal = Refusal(Target("cuda", "hw"), "available", "no CUDA device")
    choice = Choice(
        "attention", "float32 on cpu", Target("cpu", "torch"), (refusal,), "attention_1"
    )
    said = Explanation([choice], "eager")
    assert str(said).splitlines() == [
        "attention_1: attention -> cpu:torch   (float32 on cpu)",
        "    not cuda:hw: available: no CUDA device",
        "everything else: eager",
    ]
    assert said.to_json() == {
        "choices": [
            {
                "node": "attention_1", "op": "attention", "call": "float32 on cpu",
                "target": "cpu:torch", "rejected": [["cuda:hw", "available", "no CUDA device"]],
            }
        ],
        "rest": "eager",
    }  # fmt: skip
    assert str(Explanation()).splitlines() == [
        "no nsa op has been compiled yet", "everything else: not compiled yet",
    ]  # fmt: skip
