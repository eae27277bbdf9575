"""The torch.compile backend: what it chooses, says and refuses."""

from __future__ import annotations

import pytest
import torch

import nsa_neuron
from nsa_neuron.compile import choose_lowerings, policy_of
from nsa_neuron.errors import BackendUnavailable, NsaError, UnknownBackend
from nsa_neuron.registry import REGISTRY, Supported, Unsupported

SMALL = {"block": 8, "stride": 4, "select_block": 16, "num_selected": 4, "window": 10}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.project = torch.nn.Linear(16, 3 * 2 * 16)

    def forward(self, x):
        b, s, _ = x.shape
        q, k, v = self.project(x).view(b, s, 2, 48).split(16, -1)
        k, v = k[:, :, :1], v[:, :, :1]
        k_cmp = nsa_neuron.compress(k, block=8, stride=4)
        v_cmp = nsa_neuron.compress(v, block=8, stride=4)
        gates = q[..., :3].sigmoid()
        return nsa_neuron.nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates, **SMALL).tanh()


def compiled(layer, rest="eager", **options):
    return torch.compile(
        layer, backend="nsa_neuron", options={"rest": rest, **options}, fullgraph=True, dynamic=True
    )


def test_backend_is_an_entry_point():
    assert "nsa_neuron" in torch._dynamo.list_backends()


@pytest.mark.parametrize("rest", ["eager", "inductor"])
def test_forward_and_backward_equal_eager_without_recompiling(rest):
    layer = Layer()
    fast = compiled(layer, rest)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (40, 57):
            x = torch.randn(1, tokens, 16)
            expected = torch.autograd.grad(layer(x).sum(), layer.project.weight)[0]
            got = torch.autograd.grad(fast(x).sum(), layer.project.weight)[0]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_explain_names_every_choice_forward_and_backward():
    layer = Layer()
    fast = compiled(layer, target="cpu")
    assert "no nsa op" in str(nsa_neuron.explain(fast))
    fast(torch.randn(1, 40, 16)).sum().backward()
    found = nsa_neuron.explain(fast)
    assert {c.op for c in found.choices} == {
        "compress", "compress_backward", "nsa_attention_forward", "nsa_attention_backward",
    }  # fmt: skip
    assert {c.target.backend for c in found.choices} == {"cpu"}
    assert found.rest == "eager"
    assert "-> cpu:" in str(found) and found.to_json()["choices"]


def test_explain_keeps_callables_apart():
    def attend(q):
        return nsa_neuron.attention(q, q, q)[0]

    one = torch.compile(attend, backend="nsa_neuron", options={"rest": "eager"})
    other = torch.compile(attend, backend="nsa_neuron", options={"target": "cpu", "rest": "eager"})
    one(torch.randn(1, 4, 1, 8))
    assert len(nsa_neuron.explain(one).choices) == 1
    assert len(nsa_neuron.explain(other).choices) == 0
    with pytest.raises(NsaError, match=r"torch\.compile"):
        nsa_neuron.explain(attend)
    with pytest.raises(NsaError, match=r"torch\.compile"):
        nsa_neuron.explain(torch.compile(attend, backend="eager"))


def test_graph_breaks_are_explained_together():
    def attend(q):
        a = nsa_neuron.attention(q, q, q)[0]
        torch._dynamo.graph_break()
        return nsa_neuron.sliding_window_attention(a, q, q, window=2)[0]

    fast = torch.compile(attend, backend="nsa_neuron", options={"rest": "eager"})
    fast(torch.randn(1, 4, 1, 8))
    ops = [c.op for c in nsa_neuron.explain(fast).choices]
    assert ops == ["attention", "sliding_window_attention"]


class Picky:
    """Takes forward calls of `attention` only, by doubling the reference."""

    name = "picky"

    def modes(self):
        return {"hw": "", "off": "no such device here"}

    def supports(self, bound, mode):
        if bound.spec.name != "attention":
            return Unsupported("picky-rule", "only attention pleases me")
        return Supported()

    def lower(self, bound, plan):
        def double(**values):
            o, lse = bound.spec.reference(**values)
            return o * 2, lse

        return double


@pytest.fixture
def picky():
    REGISTRY.register(Picky())
    yield
    REGISTRY.unregister("picky")


def test_the_chosen_backend_really_runs(picky):
    q = torch.randn(1, 9, 2, 8)
    fast = torch.compile(
        lambda q: nsa_neuron.attention(q, q, q)[0] + 1,
        backend="nsa_neuron",
        options={"target": "picky", "rest": "eager"},
    )
    plain = nsa_neuron.attention(q, q, q)[0]
    torch.testing.assert_close(fast(q), plain * 2 + 1)


def test_a_refused_node_fails_at_compile_time_with_the_reason(picky):
    with pytest.raises(Exception, match="picky:hw refused by rule 'picky-rule': only attention"):
        compiled(Layer(), target="picky")(torch.randn(1, 40, 16))


def test_the_cpu_interpreter_as_target():
    pytest.importorskip("triton")
    q = torch.randn(1, 20, 2, 16)
    fast = torch.compile(
        lambda q: nsa_neuron.sliding_window_attention(q, q, q, window=5)[0],
        backend="nsa_neuron",
        options={"target": "h200", "mode": "sim", "rest": "eager"},
    )
    expected = nsa_neuron.sliding_window_attention(q, q, q, window=5)[0]
    torch.testing.assert_close(fast(q), expected)
    assert str(nsa_neuron.explain(fast).choices[0].target) == "cuda:sim"


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"colour": "red"}, NsaError, "unknown option 'colour'"),
        ({"rest": "magic"}, NsaError, "option 'rest'"),
        ({"mode": "sim"}, NsaError, "needs 'target'"),
        ({"target": "tpu"}, UnknownBackend, "no backend or target 'tpu'"),
        ({"target": "cpu", "mode": "hw"}, UnknownBackend, "no mode 'hw'"),
        ({"target": "trn2"}, BackendUnavailable, "'neuron:sim' can run here"),
    ],
)
def test_bad_options(options, error, text):
    with pytest.raises(error, match=text):
        policy_of(options)


def test_hardware_is_never_replaced_by_a_simulator():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendUnavailable, match="cuda:hw cannot run here"):
        policy_of({"target": "h200"})


def test_other_graphs_pass_unchanged():
    graph = torch.fx.symbolic_trace(lambda x: torch.relu(x) + 1)
    choices = []
    assert choose_lowerings(graph, None, choices) is graph
    assert choices == []
