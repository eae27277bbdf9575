"""What a router remembers calls by, and whose index tensors it reads.

The meta device stands for an accelerator: another device than the CPU, whose data nobody may read.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsa_neuron.library import Router
from nsa_neuron.ops import get
from nsa_neuron.registry import ANYWHERE, AUTOMATIC, REGISTRY, Supported, use_backend


class Asked:
    """A backend that takes everything and notes what it was asked and ran."""

    name = "asked"

    def __init__(self) -> None:
        self.bounds: list[Any] = []
        self.ran: list[Any] = []

    def modes(self) -> dict[str, str]:
        return {"hw": "", "sim": ""}

    def supports(self, bound: Any, mode: str) -> Supported:
        self.bounds.append(bound)
        return Supported()

    def lower(self, bound: Any, plan: Any) -> Any:
        def run(**values: Any) -> Any:
            self.ran.append(bound)
            results = [
                torch.empty(shape, dtype=dtype, device=bound.device)
                for _, shape, dtype in bound.returns()
            ]
            return tuple(results) if len(results) > 1 else results[0]

        return run


@pytest.fixture
def asked():
    backend = Asked()
    REGISTRY.register(backend)
    with use_backend("asked"):
        yield backend
    REGISTRY.unregister("asked")


def selected(device: str = "cpu", dtype: torch.dtype = torch.float32, s: int = 6) -> dict[str, Any]:
    q, k = (torch.zeros(1, s, heads, 4, dtype=dtype, device=device) for heads in (2, 1))
    ids = torch.zeros(1, s, 1, 1, dtype=torch.int32, device=device)
    edges = torch.tensor([0, s], dtype=torch.int32).to(device)
    return {
        "q": q, "k": k, "v": k, "block_indices": ids, "cu_seqlens_q": edges, "cu_seqlens_k": edges,
        "select_block": 8, "scale": 0.5,
    }  # fmt: skip


CHANGES: dict[str, Any] = {
    "device": selected("meta"),
    "dtype": selected(dtype=torch.float16),
    "shape": selected(s=7),
    "scale": {"scale": 0.25},
    "no scale": {"scale": None},
    "select_block": {"select_block": 16},
    "ids": {"block_indices": torch.zeros(1, 6, 1, 2, dtype=torch.int32) - 1},
    "not packed": {"cu_seqlens_q": None, "cu_seqlens_k": None},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_choice_serves_calls_that_differ_in_nothing(asked: Asked, change: str) -> None:
    router = Router(get("selected_attention"))
    other = {**selected(), **CHANGES[change]}
    for _ in range(2):
        router(**selected())
        router(**other)
    assert len(asked.bounds) == 2, "each of the two is asked for once"
    first, second = asked.bounds
    assert asked.ran == [first, second, first, second], "and each gets its own lowering"
    assert second.device == other["q"].device and second.dtype == other["q"].dtype
    assert second.scalars == {name: other[name] for name in ("select_block", "scale")}


def test_a_choice_belongs_to_the_backend_and_mode_that_were_asked_for(asked: Asked) -> None:
    router = Router(get("selected_attention"))
    for mode in ("hw", "sim", "hw"):
        with use_backend("asked", mode):
            router(**selected())
    assert len(asked.bounds) == 2 and len(asked.ran) == 3


def test_positions_names_and_defaults_make_one_call(asked: Asked) -> None:
    router = Router(get("sliding_window_attention"))
    values = selected()
    qkv = [values[name] for name in "qkv"]
    router(*qkv)
    router(*qkv, window=512)
    router(*qkv[:2], v=qkv[2], scale=None, window=512, cu_seqlens_q=None, cu_seqlens_k=None)
    assert len(asked.bounds) == 1 and len(asked.ran) == 3


@pytest.mark.parametrize(
    ("device", "setting", "reads"),
    [
        ("cpu", None, True), ("cpu", "0", True), ("cpu", "1", True),
        ("meta", None, False), ("meta", "0", False), ("meta", "", False), ("meta", "1", True),
    ],
)  # fmt: skip
def test_an_accelerators_indices_are_read_only_when_that_is_asked_for(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, device: str, setting: str | None, reads: bool
) -> None:
    """Reading them would wait for the device. Each call with new ids is checked, the first too."""
    if setting is None:
        monkeypatch.delenv("NSA_CHECK_VALUES", raising=False)
    else:
        monkeypatch.setenv("NSA_CHECK_VALUES", setting)
    spec, read = get("selected_attention"), []
    monkeypatch.setitem(vars(spec), "check_values", lambda bound, values: read.append(values))
    router = Router(spec)
    for _ in range(3):
        router(**selected(device))
    assert len(read) == (3 if reads else 0)
    assert len(asked.ran) == 3


def test_an_accelerators_wrong_ids_are_refused_when_asked_for(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NSA_CHECK_VALUES", "1")
    values = {**selected(), "block_indices": torch.full((1, 6, 1, 1), 99, dtype=torch.int32)}
    with pytest.raises(ValueError, match="block_indices"):
        Router(get("selected_attention"))(**values)
    assert not asked.ran


def test_the_automatic_choice_asks_hardware_first_and_a_simulator_never() -> None:
    for order in (*AUTOMATIC.values(), ANYWHERE):
        assert order[-1] == "reference:eager"
        assert not any(":sim" in name for name in order)
    assert AUTOMATIC["cuda"][0] == "cuda:hw" and ANYWHERE == ("reference:eager",)
    assert AUTOMATIC["cpu"] == ("cpu:native", "cpu:torch", "reference:eager"), "best first"
    assert {AUTOMATIC[kind][0] for kind in ("neuron", "xla", "privateuseone")} == {"neuron:hw"}
