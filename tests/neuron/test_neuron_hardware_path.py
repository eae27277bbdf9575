"""The path to the hardware against a stand-in of AWS's documented interface (`vendor.py`)."""

from __future__ import annotations

import functools
import sys
from dataclasses import replace

import judged
import pytest
import torch
from test_neuron_nsa_attention import problem
from torch._dynamo.backends.registry import register_backend
from torch._subclasses.fake_tensor import FakeTensorMode
from vendor import StandIn

import nsa_neuron
from nsa_neuron import simulator
from nsa_neuron.backends import neuron
from nsa_neuron.backends.neuron import buckets, hardware, run
from nsa_neuron.ops import get

pytestmark = pytest.mark.sim


@functools.cache
def stand_in() -> StandIn:
    """One for the process: operators cannot be registered twice."""
    return StandIn()


@pytest.fixture
def vendor(monkeypatch):
    """torch_neuronx and nki are there, and CPU tensors count as a Neuron device's."""
    module = stand_in()
    module.launches.clear()
    monkeypatch.setitem(sys.modules, "torch_neuronx", module)
    monkeypatch.setitem(neuron.DEVICES_OF_MODE, "hw", ("cpu",))
    monkeypatch.setattr(hardware, "hindrance", lambda: "")
    run.on_hardware.cache_clear()
    run._vendor_package.cache_clear()
    with simulator.activate():
        yield module
    run.on_hardware.cache_clear()
    run._vendor_package.cache_clear()


def call(name: str, case_name: str, dtype: torch.dtype):
    spec = get(name)
    case = next(case for case in spec.cases if case.name == case_name)
    return getattr(torch.ops.nsa, name).default, spec.arguments(case, dtype)


def results(op, values, target: str):
    with torch.no_grad(), nsa_neuron.use_backend(target):
        out = op(**values)
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("name", ["gated_sum", "attention", "attention_backward"])
def test_an_op_runs_through_the_vendors_operators_with_the_same_bits(vendor, name):
    op, values = call(name, "group4_s40", torch.bfloat16)
    got = results(op, values, "neuron:hw")
    with nsa_neuron.use_backend("neuron:sim"):
        want = buckets.bucketed(get(name), op)(**values)
    want = want if isinstance(want, tuple) else (want,)
    assert all(a.equal(b) for a, b in zip(got, want, strict=True))
    assert f"{hardware.NAMESPACE}::{name}" in vendor.operators
    # Two cores, as AWS's compiler takes for granted on trn2.
    assert vendor.launches and {lnc for _, _, lnc in vendor.launches} == {2}


def test_lengths_of_a_bucket_share_the_programs(vendor):
    """AWS's compiler makes one per shape; 130 to 144 tokens need one, forward and backward."""
    shapes = set()
    original = vendor.wrap_nki

    def noting(kernel):
        def start(*args, **kwargs):
            shapes.add((kernel.fn.__name__, tuple(x.shape for x in args if hasattr(x, "shape"))))
            return original(kernel)[2](*args, **kwargs)

        return {2: start}

    vendor.wrap_nki = noting
    try:
        for tokens in (130, 137, 144):
            x = torch.ones(1, tokens, 1, 8)
            with torch.no_grad(), nsa_neuron.use_backend("neuron:hw"):
                o, lse = torch.ops.nsa.attention(x, x, x)
                torch.ops.nsa.attention_backward(x, x, x, x, o, lse)
            assert o.shape == x.shape
    finally:
        del vendor.wrap_nki
    names = [name for name, _ in shapes]
    assert sorted(names) == sorted(set(names)) and len(names) == 3


def test_nsa_attention_is_one_launch_also_where_tiles_are_done_again(vendor):
    """What is not safe is found and done again on the device: the host is never asked."""
    op, values = torch.ops.nsa.nsa_attention.default, problem(128, 300, (8, 2), sharp=60.0)
    got = results(op, values, "neuron:hw")
    assert vendor.launches == [("nki_kernels.nsa_attention", "forward", 2)]
    with judged.cores(2):
        assert got[0].equal(results(op, values, "neuron:sim")[0])
    vendor.launches.clear()
    results(op, problem(128, 200, (3, 1)), "neuron:hw")  # three heads a group: its parts
    assert len(vendor.launches) >= 5


@pytest.mark.parametrize("name", neuron.OPS)
def test_every_launcher_can_be_traced_without_data(vendor, name):
    """torch.compile asks for the results' shapes with fake tensors."""
    spec = get(name)
    case = next(case for case in spec.cases if {"smoke", "edge"} & set(case.tags))
    values = spec.arguments(case, torch.bfloat16)
    bound = spec.bind(values)
    operator = neuron.BACKEND.lower(bound, "hw")
    assert isinstance(operator, torch._ops.OpOverload)
    with FakeTensorMode() as mode:
        fake = {
            key: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x
            for key, x in values.items()
        }
        found = operator(**fake)
    found = found if isinstance(found, tuple) else (found,)
    promised = [(tuple(shape), dtype) for _, shape, dtype in bound.returns()]
    assert [(tuple(x.shape), x.dtype) for x in found] == promised


def test_a_compiled_graph_holds_the_vendors_operators(vendor):
    """The vendor's compiler gets operators that it can see into, not calls back into Python."""
    seen = []

    def compiler(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    if "neuron" not in torch._dynamo.list_backends():
        register_backend(compiler, name="neuron")
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(1, 20, 2, 16, generator=gen)

    def attend(q):
        return nsa_neuron.sliding_window_attention(q, q, q, window=5)[0] + 1

    compiled = torch.compile(
        attend, backend="nsa_neuron", options={"target": "trn2", "mode": "hw"}, fullgraph=True
    )
    with torch.no_grad():
        got = compiled(q)
        with nsa_neuron.use_backend("neuron:sim"):
            want = attend(q)
    assert "nsa_trn2.sliding_window_attention.default" in seen
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # filled up to 128 tokens
    assert [str(c.target) for c in nsa_neuron.explain(compiled).choices] == ["neuron:hw"]


def test_it_says_that_it_has_not_run_on_hardware(vendor, caplog):
    told = replace(get("gated_sum"), name="gated_sum_told")
    with caplog.at_level("WARNING", "nsa_neuron"):
        hardware.operation(told, lambda **values: values["o_cmp"].clone())
    assert hardware.NOT_RUN in caplog.text


def test_what_hinders_the_hardware_is_said(monkeypatch):
    assert "'torch_neuronx' is not installed" in neuron.BACKEND.modes()["hw"]
    monkeypatch.setitem(sys.modules, "torch_neuronx", stand_in())
    assert "no Neuron device" in neuron.BACKEND.modes()["hw"]
