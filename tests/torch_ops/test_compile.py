"""torch.compile and torch.export of the registered ops."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import nsa_neuron as nsa
from nsa_neuron.errors import InvalidArgument
from nsa_neuron.numerics import Budget

GEOMETRY = {"block": 4, "stride": 2}
WHOLE = {**GEOMETRY, "select_block": 8, "num_selected": 3, "window": 5}
needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None,
    reason="inductor needs a C++ compiler for CPU code",
)
inductor = [needs_compiler, pytest.mark.slow]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(
    s: int, hq: int = 4, hkv: int = 2, dim: int = 4
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(s)
    q, k, v = (torch.randn(1, s, h, dim, generator=gen) for h in (hq, hkv, hkv))
    gates = torch.randn(1, s, hq, 3, generator=gen)
    return tuple(x.requires_grad_() for x in (q, k, v, gates))  # type: ignore[return-value]


def layer(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    """Ordinary torch around every public op."""
    k_cmp, v_cmp = nsa.compress(k * 2, **GEOMETRY), nsa.compress(v.relu(), **GEOMETRY)
    where = {"kv_len": k.shape[1], **GEOMETRY}
    o_cmp, lse = nsa.compressed_attention(q, k_cmp, v_cmp, **where)
    ids = nsa.select_blocks(q, k_cmp, lse, **where, select_block=8, num_selected=3)
    o_slc, _ = nsa.selected_attention(q, k, v, ids, select_block=8)
    o_win, lse_win = nsa.sliding_window_attention(q, k, v, window=5)
    parts = nsa.gated_sum(o_cmp, o_slc, o_win, gates.sigmoid())
    whole = nsa.nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates.sigmoid(), **WHOLE)
    full, _ = nsa.attention(q, k, v)
    return (parts + whole * 0.5 + full.tanh()).sum(-1) + lse_win


def grads(f: Callable[..., Tensor], values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    out = f(*values)
    return (out, *torch.autograd.grad(out.square().sum(), values))


@needs_compiler
def test_compiled_layer_forward_and_backward() -> None:
    """Of fixed sizes; the next test has symbols for them."""
    values = tensors(21)
    wanted = grads(layer, values)
    compiled = torch.compile(layer, fullgraph=True, backend="inductor")
    torch.testing.assert_close(grads(compiled, values), wanted)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*values), wanted[0])


LENGTHS = (21, 34, 57, 8, 64)


@pytest.mark.parametrize(
    ("backend", "marked"),
    [("aot_eager", False), ("aot_eager", True), pytest.param("inductor", False, marks=inductor)],
)
def test_one_graph_serves_every_length(backend: str, marked: bool) -> None:
    """dynamic=True, or a marked sequence axis: no recompilation per length, forward + backward.

    Marking concerns Dynamo, which is in front of both backends.
    """
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(
        layer, fullgraph=True, backend=counter, dynamic=None if marked else True
    )
    for s in LENGTHS:
        values = tensors(s)
        if marked:
            for x in values:
                torch._dynamo.mark_dynamic(x, 1)
        exact = grads(layer, tuple(x.detach().double().requires_grad_() for x in values))
        eager = grads(layer, values)
        # Compiled pointwise code rounds elsewhere: as near to float64 as eager, not equal to it.
        for got, truth, plain in zip(grads(compiled, values), exact, eager, strict=True):
            diff = Budget()(got, truth, plain, {})
            assert diff.ok, (s, diff)
    assert counter.frame_count == 1


def test_a_decoding_cache_compiles_once() -> None:
    """One query against growing keys."""

    def step(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        k_cmp, v_cmp = nsa.compress(k, **GEOMETRY), nsa.compress(v, **GEOMETRY)
        return nsa.nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates, **WHOLE)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for t in range(20, 26):
        q, _, _, gates = (x.detach() for x in tensors(1))
        _, k, v, _ = (x.detach() for x in tensors(t))
        for x in (k, v):
            torch._dynamo.mark_dynamic(x, 1)
        values = (q, k, v, gates.sigmoid())
        torch.testing.assert_close(compiled(*values), step(*values))
    assert counter.frame_count == 1


def test_packed_sequences_compile() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return nsa.attention(q, k, v, cu, cu)[0].square()

    q, k, v, _ = tensors(21)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for edges in ([0, 5, 21], [0, 20, 21]):
        cu = torch.tensor(edges, dtype=torch.int32)
        got, wanted = (torch.autograd.grad(g(q, k, v, cu).sum(), (q, k, v)) for g in (compiled, f))
        torch.testing.assert_close(got, wanted)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.project(x).unflatten(-1, (2, 4))
        return (
            nsa.sliding_window_attention(heads, heads, heads, window=5)[0]
            + nsa.attention(heads, heads, heads)[0]
        )


def test_export_with_a_dynamic_length() -> None:
    model = Model()
    length = torch.export.Dim("length", min=2, max=4096)
    exported = torch.export.export(
        model, (torch.randn(1, 16, 8),), dynamic_shapes=({1: length},), strict=True
    )
    names = {str(node.target) for node in exported.graph.nodes}
    assert {"nsa.sliding_window_attention.default", "nsa.attention.default"} <= names
    for s in (16, 3, 77):
        x = torch.randn(1, s, 8)
        torch.testing.assert_close(exported.module()(x), model(x))


def test_an_exported_graph_serves_sequences_without_a_compressed_block() -> None:
    class Compress(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nsa.compress(x, **GEOMETRY) * 2

    tokens = {"x": {1: torch.export.Dim("tokens", min=1, max=1024)}}
    exported = torch.export.export(Compress(), (torch.randn(1, 16, 1, 8),), dynamic_shapes=tokens)
    for length, blocks in ((3, 0), (4, 1), (5, 1), (6, 2), (40, 19)):
        x = torch.randn(1, length, 1, 8)
        torch.testing.assert_close(exported.module()(x), nsa.compress(x, **GEOMETRY) * 2)
        assert exported.module()(x).shape == (1, blocks, 1, 8)


def test_export_survives_saving(tmp_path: Any) -> None:
    model, x = Model(), torch.randn(1, 16, 8)
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(model, (x,)), path)
    torch.testing.assert_close(torch.export.load(path).module()(x), model(x))


BAD: dict[str, Callable[..., Any]] = {
    "heads do not divide": lambda q, k, v: nsa.attention(q[:, :, :3], k, v),
    "fewer keys than queries": lambda q, k, v: nsa.attention(q, k[:, 1:], v[:, 1:]),
    "head dims differ": lambda q, k, v: nsa.sliding_window_attention(q, k[..., :3], v),
    "stride does not divide": lambda q, k, v: nsa.compress(k, block=8, stride=3),
    "wrong number of blocks": lambda q, k, v: nsa.compressed_attention(q, k, v, kv_len=21),
    "mixed dtypes": lambda q, k, v: nsa.attention(q, k.half(), v),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_while_compiling(name: str) -> None:
    q, k, v, _ = tensors(21)
    with pytest.raises(Exception) as eager:
        BAD[name](q, k, v)
    assert isinstance(eager.value, InvalidArgument)
    compiled = torch.compile(BAD[name], fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception) as caught:
        compiled(q, k, v)
    assert eager.value.argument in str(caught.value)
    causes, error = [], caught.value
    while error is not None:
        causes.append(type(error).__name__)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    assert {"InvalidArgument", "InvalidType"} & {*causes} or "it must be" in str(caught.value)


def test_bad_offsets_are_refused_when_a_compiled_graph_runs() -> None:
    """Contents are not known while compiling; the op itself checks them."""
    q, k, v, _ = tensors(21)
    compiled = torch.compile(lambda *x: nsa.attention(*x), fullgraph=True, backend="aot_eager")
    with pytest.raises(InvalidArgument, match="starting with 0"):
        compiled(q, k, v, *[torch.tensor([1, 5, 21], dtype=torch.int32)] * 2)
