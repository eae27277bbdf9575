"""A call that records no gradient goes straight to the router, but never past what lies between."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from spy_backend import spying
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import nsa_neuron as nsa
from nsa_neuron.errors import InvalidArgument

ATTENTION = torch.ops.nsa.attention.default


class Watching(TorchDispatchMode):
    """Notes every op below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def q() -> torch.Tensor:
    return torch.randn(1, 4, 2, 8)


def test_a_dispatch_mode_sees_the_op(q: torch.Tensor) -> None:
    nsa.attention(q, q, q)
    with Watching() as mode, spying() as spy:
        nsa.attention(q, q, q)
    assert mode.seen[0] is ATTENTION
    assert spy.calls == 1


def test_a_profiler_sees_the_op_once(q: torch.Tensor) -> None:
    nsa.attention(q, q, q)
    with profile() as record:
        nsa.attention(q, q, q)
    assert sum(event.name == "nsa::attention" for event in record.events()) == 1


@pytest.mark.parametrize("kind", ["fake", "fake, mode left", "meta"])
def test_tensors_without_data_reach_no_backend(q: torch.Tensor, kind: str) -> None:
    nsa.attention(q, q, q)
    with spying() as spy:
        if kind == "meta":
            x = q.to("meta")
            o, lse = nsa.attention(x, x, x)
            assert o.is_meta and lse.is_meta
        else:
            with FakeTensorMode() as mode:
                x = mode.from_tensor(q)
                o, lse = nsa.attention(x, x, x)
            if kind == "fake, mode left":
                o, lse = nsa.attention(x, x, x)
        assert o.shape == q.shape and lse.shape == q.shape[:3]
    assert spy.calls == 0


def test_functionalized_tensors_stay_so(q: torch.Tensor) -> None:
    nsa.attention(q, q, q)
    x = torch._to_functional_tensor(q)
    torch._enable_functionalization(reapply_views=True)
    try:
        o, _ = ATTENTION(x, x, x)
    finally:
        torch._disable_functionalization()
    assert torch._is_functional_tensor(o)


def test_sparse_tensors_are_refused_by_name(q: torch.Tensor) -> None:
    """Also after dense ones of the same sizes, whose choice is remembered."""
    with spying() as spy:
        nsa.attention(q, q, q)
        calls = spy.calls
        with pytest.raises(InvalidArgument, match="q"):
            nsa.attention(q.to_sparse(), q, q)
    assert spy.calls == calls > 0


def test_a_loss_of_lse_alone_asks_nothing_of_the_values(q: torch.Tensor) -> None:
    k, v = q.clone().requires_grad_(), q.clone().requires_grad_()
    nsa.attention(q, k, v)[1].sum().backward()
    assert k.grad is not None and k.grad.any()
    assert v.grad is None or not v.grad.any()


def test_no_grad_of_tensors_that_want_gradients_records_nothing(q: torch.Tensor) -> None:
    wanting = q.clone().requires_grad_()
    with torch.no_grad():
        o, lse = nsa.attention(wanting, q, q)
    assert not o.requires_grad and not lse.requires_grad
    o, _ = nsa.attention(wanting, q, q)
    assert o.requires_grad


def test_public_functions_can_be_pickled() -> None:
    """A user's module keeps one as an attribute and is saved whole, or goes to another process."""
    for name in ("attention", "nsa_attention", "decode"):
        function = getattr(nsa, name)
        assert pickle.loads(pickle.dumps(function)) is function
